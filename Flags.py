"""What the flags of the scripts share: types, common groups, parsing, and the objects that they describe."""

import argparse
import importlib
import math
import re
import shlex
from pathlib import Path

import torch

import Data
import Devices
import Utils
from Backbones import build_encoder, load_weights
from Distributed import any_process, count, is_same, say
from Images.Folders import DATA_DIR

SCRIPTS = ("TrainSimCLR", "TrainISICLE", "TrainCamNet")
SCRIPT_OF = {"pair": "TrainISICLE.py", "net": "TrainCamNet.py", "num_views": "TrainSimCLR.py"}  # flags of one script
LARGEST_SEED = 2**32 - 1  # other seeds are made from it by multiplication
LARGEST_INT = 2**31 - 1  # of flags without an upper bound: the product of two fits into torch's 64 bits
MOST_WORKERS = 1024
OTHER_NAMES = {  # what other programs call a flag
    "batch_size": "--bs",
    "batchsize": "--bs",
    "learning_rate": "--lr",
    "momentum": "--mm",
    "optimizer": "--opt",
    "temperature": "--temp",
    "weight_decay": "--wd",
    "workers": "--n_workers",
}
NAMES = ", ".join(name for name in Data.DATASETS if name != "folder")


def bounded(kind, low=None, high=None):
    """Return an argparse type: an int or a finite float (`kind`) from low to high; None: no bound but LARGEST_INT."""
    largest = LARGEST_INT if kind is int else math.inf
    if high is not None:
        largest = high

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no {'integer' if kind is int else 'number'}") from None
        if kind is float and not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text} is no finite number")
        is_low = low is not None and value < low
        if is_low or value > largest:
            bounds = f"at least {low}" if is_low and high is None else f"from {low} to {largest}"
            raise argparse.ArgumentTypeError(f"{text} is out of range: it must be {bounds}")
        return value

    return parse


def words_in(flag, text):
    """Return the words of a flag that holds a command line. Raises UserError on a quotation that does not end."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise Utils.UserError(f"--{flag} {text}: {error}: give each quotation mark its second one") from error


def path(text):
    """The argparse type of paths: ~ stands for the home folder."""
    if not text:  # as of a shell variable that is not set
        raise argparse.ArgumentTypeError("no path is given")
    return Utils.expanded(text)


def check_folder_of(out):
    """Raise UserError if the file of --out has no folder to lie in, or is a folder."""
    if out.is_dir():
        raise Utils.UserError(f"--out {out}: it is a folder: name a file")
    if not out.parent.is_dir():
        raise Utils.UserError(f"--out {out}: no folder {out.parent}: make it first")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of every flag that has one."""

    def _fill_text(self, text, width, indent):
        if text.startswith("examples:"):
            return text
        return super()._fill_text(text, width, indent)

    def _get_help_string(self, action):
        is_switch = isinstance(action, argparse._StoreTrueAction)  # off unless it is given
        if is_switch or action.default is None or action.default == "":
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Reports an error in one line, with the flag or value that was probably meant."""

    advice = None  # a function: words that no flag takes -> what to do with them; "" if it does not know

    def parse_args(self, argv=None, namespace=None):
        args, unknown = self.parse_known_args(argv, namespace)
        if unknown:
            flag = unknown[0].split("=")[0]
            if not flag.startswith("-"):
                self.error(f"{flag}: a word without a flag{_meant_word(flag, self.flags())}; --help lists all flags")
            advice = self.advice(unknown) if self.advice else ""
            no_such_flag = f"no such flag{_meant_flag(flag, self.flags())}; --help lists all"
            self.error(f"{unknown[0]}: {advice or _script_of(flag) or no_such_flag}")
        return args

    def flags(self):
        """Return all flags, with their dashes."""
        return [flag for action in self._actions for flag in action.option_strings]

    def error(self, message):
        choice = re.fullmatch(r"(argument .*): invalid choice: '(.*)' \(choose from (.*)\)", message)
        if choice:
            names = choice[3].replace("'", "").split(", ")
            message = (
                f"{choice[1]}: no such value: {choice[2]}{_meant(choice[2], names)}; choose from {', '.join(names)}"
            )
        self.exit(2, f"{self.prog}: error: {Utils.readable(message)}\n")


def _meant(word, names):
    """Return a question with the name that is closest to a misspelled word; "" if none is close."""
    near = Utils.nearest(word, names)
    return f": did you mean {near}?" if near else ""


def _meant_word(word, flags):
    """Return what a word without a flag is probably for; "" if that is not known."""
    if "--data" in flags and (Data.is_named(word) or Path(Utils.expanded(word)).is_dir()):
        return f": images are given by --data {Utils.shown(word)}"
    return ""


def _script_of(flag):
    """Return a sentence with the training script that has a flag; "" if none has it."""
    for name in SCRIPTS:
        script = importlib.import_module(name)  # here, because the scripts import this file
        if flag in script.build_parser().flags():
            return f"this flag is one of {name}.py: leave it out, or start that script"
    return ""


def _meant_flag(flag, flags):
    """Return a question with the flag that is closest, without its dashes, or that other programs call so."""
    name = flag.strip("-").replace("-", "_")
    usual = OTHER_NAMES.get(name)
    if usual in flags:
        return f": did you mean {usual}?"
    near = Utils.nearest(name, [each.strip("-") for each in flags])
    return f": did you mean --{near}?" if near else ""


def plain_parser(doc):
    """Return a parser without flags. doc: the docstring of the script: its first line describes it, its commands are
    the examples at the end of --help."""
    doc = doc or ""  # python -OO removes docstrings
    commands = [line.strip() for line in doc.splitlines() if line.startswith("    ")]
    return Parser(
        description=doc.partition("\n")[0],
        epilog="examples:\n  " + "\n  ".join(commands) if commands else "",
        allow_abbrev=False,
        formatter_class=HelpFormatter,
    )


def set_recipe(parser, recipe, data, device_type):
    """Make a recipe {flag: value} the defaults of a parser; the end of --help says whose they are."""
    parser.set_defaults(**recipe)
    parser.epilog += f"\ndefaults: those of --data {Utils.shown(data)} on {device_type}"


def add_data_place(group):
    """Add --data and --size."""
    add = group.add_argument
    add("--data", default="shapes", help=f"{NAMES}, or the path of a folder of images")
    size = "side of the images; files are resized (shorter side) and center-cropped to it"
    add("--size", type=bounded(int, 8), metavar="PX", help=size)


def add_reading(group, can_stream=True):
    """Add the flags of every script that reads images. can_stream: with --storage."""
    add = group.add_argument
    add("--device", default="auto", help="torch device, for example cpu or cuda:1; auto: cuda if available")
    workers = "worker processes that decode image files"
    add("--n_workers", type=bounded(int, 0, MOST_WORKERS), default=2, metavar="N", help=workers)
    add("--data_dir", type=path, default=str(DATA_DIR), metavar="DIR", help="folder that holds the data sets")
    if can_stream:
        storage = "memory: decode image folders once; stream: decode at every use; auto: memory if the images take at "
        storage += "most half of what is free and --data_dir can be written"
        add("--storage", choices=["auto", "memory", "stream"], default="auto", help=storage)
    add("--skip_bad", action="store_true", help="leave unreadable images out and count them, instead of stopping")


def add_run_group(parser, unit):
    """Add the group of flags that change the result by rounding at most, the last one of --help; return it.

    unit: what is counted between checkpoints, "epochs" or "periods".
    """
    group = parser.add_argument_group("run (same result, up to rounding; --device also sets the defaults)")
    add_reading(group)
    add = group.add_argument
    models = str(Utils.ROOT / "Models")
    add("--models_dir", type=path, default=models, metavar="DIR", help="folder of the run folders")
    add("--suffix", default="", help="a word of your own in the run folder's name")
    resume = "continue from a checkpoint, with its flags; auto: from the newest one of this run, if there is one"
    add("--resume", type=path, metavar="FILE|auto", help=resume)
    dry_run = "print what the run would do, its time and its memory, from a few real steps; make no run folder"
    add("--dry_run", action="store_true", help=dry_run)
    add("--log_iter", type=bounded(int, 1), default=20, metavar="N", help="steps between logged lines")
    save = f"{unit} between checkpoints; 0: only at the end"
    add("--save_iter", type=bounded(int, 0), default=10, metavar=unit[0].upper(), help=save)
    precision = "precision of the network; tf32: of its convolutions on CUDA, otherwise fp32; auto: bf16 if the "
    precision += "hardware has it, otherwise tf32"
    add("--precision", choices=["auto", "bf16", "tf32", "fp32"], default="auto", help=precision)
    deterministic = "on CUDA, use only convolutions that give the same bits in every run, as they do on a CPU; "
    deterministic += "the gradient of LPIPS still differs"
    add("--deterministic", action="store_true", help=deterministic)
    add(
        "--compile", action="store_true", help="compile the training step (torch.compile); the first steps take minutes"
    )
    graph = "on CUDA, without torchrun, launch all kernels of a training step at once, which helps if the CPU is slow"
    add("--cuda_graph", action="store_true", help=graph)
    return group


# Flags that do not change the result, up to rounding. All others are part of the run folder's name, and must be the
# same on --resume.
RUN_FLAGS = {
    # devices and files
    "device",
    "n_workers",
    "data_dir",
    "storage",
    "skip_bad",
    "models_dir",
    "suffix",
    "resume",
    "dry_run",
    "lpips_weights",
    "bank_storage",
    # what is scored, logged and saved
    "eval",
    "eval_iter",
    "baselines",
    "log_iter",
    "save_iter",
    "sample_iter",
    # speed
    "precision",
    "compile",
    "deterministic",
    "cuda_graph",
    "chunk",
    # no flags: set by the scripts from the images, and by `parse`
    "small_stem",
    "image_size",
    "given",
}


# Flags that can name files, which may lie in another place on --resume.
FILE_FLAGS = ("data", "generator", "bank", "init")


def hyper_parameters(args):
    """Return {flag: value} of the flags that decide what is learned."""
    return {key: value for key, value in vars(args).items() if key not in RUN_FLAGS}


def parse(argv, build_parser):
    """Parse a training script's flags: as given; else as in the checkpoint of --resume FILE; else by the recipe.

    build_parser: (data, type of device) -> parser. Adds args.given, the names of the flags that the user gave. Raises
    UserError where given flags contradict the checkpoint.
    """
    # --data, --device and --resume come first: the defaults of all other flags depend on them
    early_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    # nargs="?": the parser of all flags reports one that lacks its value
    early_parser.add_argument("--data", nargs="?")
    early_parser.add_argument("--device", nargs="?", default="auto", const="auto")
    early_parser.add_argument("--resume", nargs="?", type=Utils.expanded)
    early = early_parser.parse_known_args(argv)[0]
    device_type = Devices.pick_device(early.device).type
    if not Utils.names_a_file(early.resume):
        if early.resume and early.data:
            check_place(early.data, "--resume auto")
        data = "shapes" if early.data is None else Data.place(early.data)
        parser = build_parser(data, device_type)
        args = parser.parse_args(argv)
        args.data = Data.place(args.data)
        args.given = given_flags(parser, argv)
        return args

    # the checkpoint's flags take the place of the defaults
    stored = Utils.load_(early.resume).get("args", {})
    if not isinstance(stored, dict) or not isinstance(stored.get("data"), str):
        raise Utils.UserError(f"--resume {early.resume}: it holds no run: give a checkpoint of this script")
    if not early.data:
        check_place(stored["data"], f"--resume {early.resume}")
    parser = build_parser(early.data or stored["data"], device_type)
    return _parse_resumed(argv, parser, early.resume, stored)


def _script_with(flags):
    """Return the name of the script that has these flags; None for one without flags of its own."""
    for flag, name in SCRIPT_OF.items():
        if flag in flags:
            return name
    return None


def _parse_resumed(argv, parser, file, stored):
    """Parse the flags of a run that continues from a checkpoint; see `parse`. stored: the flags that the file holds."""
    defaults = parser.parse_args([])
    theirs = _script_with(Utils.current_flags(stored))
    if theirs and theirs != _script_with(vars(defaults)):
        raise Utils.UserError(f"--resume {file}: a run of {theirs}: start that script")
    note_version(file, stored, vars(defaults))
    stored = Utils.current_flags(stored)
    kept = {key: stored[key] for key in vars(defaults) if key in stored and key not in ("device", "resume")}
    damaged = [f"--{each.dest}" for each in parser._actions if each.dest in kept and not _can_be(each, kept[each.dest])]
    if damaged:
        raise Utils.UserError(f"--resume {file}: no value that {damaged[0]} can have: use another checkpoint")
    parser.set_defaults(**kept)
    args = parser.parse_args(argv)
    args.data = Data.place(args.data)
    given = given_flags(parser, argv)
    if "models_dir" not in given:  # the run may have been moved, with its generator
        args.models_dir = str(Path(file).resolve().parents[1])
    args.given = sorted({*given, *kept})  # what the first start said or fitted stays

    # flags that decide the result must not have changed; images, generators and banks are compared later, by content
    files = {each.dest for each in parser._actions if each.dest in FILE_FLAGS and not each.choices}
    changed = []
    for key, value in hyper_parameters(args).items():
        if key not in files and key in stored and value != stored[key]:
            changed.append(f"--{key} {value} (it was {stored[key]})")
    if args.suffix != stored.get("suffix", ""):
        raise Utils.UserError(f"--suffix {args.suffix}: --resume {file} continues the run there: leave one of them out")
    if changed:
        raise Utils.UserError(f"--resume {file}: other flags than that run's: {', '.join(changed)}: leave them out")
    return args


def _can_be(action, value):
    """Return whether a flag can have a value that a checkpoint holds. action: argparse's object of the flag."""
    if value is None:  # --size: a recipe may have one where that of the checkpoint's device has none
        return action.default is None or action.dest == "size"
    if action.nargs == 0:
        return isinstance(value, bool)
    if action.type is None:
        return isinstance(value, str) and (action.choices is None or value in action.choices)
    if action.type is path:  # older versions kept ~ as it was typed
        return isinstance(value, str)
    try:
        return not isinstance(value, bool) and action.type(str(value)) == value
    except argparse.ArgumentTypeError:
        return False


def check_place(data, whose):
    """Raise UserError if a run's images are not in their place. data: its flag --data; whose: what names the run."""
    if Data.is_named(data) or Path(Utils.expanded(data)).is_dir():
        return
    raise Utils.UserError(
        f"{whose}: the images are not in {data}, which is neither a data set nor a folder (anymore): "
        "--data NEW_PLACE gives their new place"
    )


def given_flags(parser, argv):
    """Return the names of the flags that a command line has."""
    unset = object()
    names = [action.dest for action in parser._actions]
    values = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(names, unset)))
    return sorted(name for name, value in vars(values).items() if value is not unset)


def note_version(file, stored, defaults):
    """Print which flags a checkpoint of another version lacks, whose defaults are used, or which it calls otherwise."""
    current = Utils.current_flags(stored)
    missing = [f"--{key} {value}" for key, value in defaults.items() if key not in current and key not in RUN_FLAGS]
    renamed = []
    for before, now in Utils.RENAMED.items():
        if stored.get(before) not in (None, False):  # a switch that is off says nothing
            renamed.append(f"--{before} is --{now} {stored[before]}")
    notes = [f"it lacks {', '.join(missing)}: these defaults are used"] if missing else []
    notes += [f"its {', '.join(renamed)} now"] if renamed else []
    if notes:
        say(f"{Utils.shown(file)} is of another version: {'; '.join(notes)}")


def note_unused(args, names, reason):
    """Print which of these flags the user gave although they change nothing. reason: "with --aug none", for example."""
    if Utils.names_a_file(args.resume):  # then all flags count as given
        return
    for name in names:
        if name in args.given:
            say(f"--{name} {Utils.shown(str(getattr(args, name)))} has no effect {reason}")


def adjust(args, name, value, reason):
    """Change a flag, with a notice, or raise UserError if the user gave it. reason: why the old value does not fit."""
    before = getattr(args, name)
    if name in getattr(args, "given", ()):
        raise Utils.UserError(f"--{name} {before:g}: {reason}: use {value:g}, or leave it out")
    say(f"--{name} {before:g} becomes {value:g}: {reason}")
    setattr(args, name, value)


# ---------------------------------------------------------------------------------------------- what the flags describe


def file_options(args, device):
    """Return the `Options` by which a run reads image files."""
    return Data.Options(
        data_dir=Path(args.data_dir),
        size=args.size,
        storage=args.storage,
        n_workers=args.n_workers,
        skip_bad=args.skip_bad,
        device=str(device),
    )


def check_models_dir(args):
    """Raise UserError if the pictures of runs would become training images of the next run."""
    if Data.is_read(args.data, args.models_dir):
        raise Utils.UserError(
            f"--models_dir {args.models_dir}: it lies among the images of --data {args.data}, and the pictures in it "
            "would be taken for images: name a folder outside"
        )


def splits_for(args, device):
    """Return the `Data.Splits` of a run's flags, on `device`."""
    splits = Data.get_data_splits(args.data, args.eval, file_options(args, device))
    check_machines(args, splits.train, splits.test)
    train = splits.train.to(device)
    test = train if splits.eval == "cv" else splits.test.to(device)
    return Data.Splits(train, test, splits.eval)


def train_split_for(args, device):
    """Return the train split of a run's flags, on `device`: the only images that a generator sees."""
    split = Data.get_train_split(args.data, file_options(args, device))
    check_machines(args, split)
    return split.to(device)


def check_machines(args, *splits):
    """Raise UserError unless all processes of a run, which can be on several machines, have the same images."""
    if count() > 1 and not is_same([split.fingerprint() for split in splits]):
        place = Utils.shown(args.data)
        raise Utils.UserError(f"--data {place}: the processes have different images: give every machine the same files")


def augmentation_for(args, aug=None):
    """Return the training `Augmentation` of a run's flags; aug: "full", "crop" or "none" instead of --aug."""
    return Data.get_ssl_data_augs(
        args.data,
        args.color_s,
        aug=aug or args.aug,
        size=args.size,
        crop_min=args.crop_min,
        gray_p=args.gray_p,
        blur_p=args.blur_p,
    )


def untrained_encoder(args, device):
    """Return `encoder_for` on a device, to compare the trained one with; None, with a notice, without --init's file."""
    if args.init and any_process(not Path(args.init).is_file()):
        say(f"--init {Utils.shown(args.init)}: no such file anymore: no scores of the untrained encoder")
        return None
    return encoder_for(args).to(device, memory_format=torch.channels_last)


def encoder_for(args, with_init=True):
    """Return the encoder of a run's flags as it was before training: by the seed and the file of --init.

    with_init: False if other weights are loaded anyway.
    """
    torch.manual_seed(args.seed)
    with Utils.as_user_error():
        encoder = build_encoder(args.backbone, args.small_stem, args.image_size, args.normalize)
        if args.init and with_init:
            load_weights(encoder, args.init)
    return encoder
