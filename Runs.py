"""Run folders: their names, what a run writes into them, and how it stops."""

import contextlib
import datetime
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

import torch

import Distributed
import Locks
import Utils
from Lazy import LazyModule
from Utils import UserError

tensorboard = LazyModule("torch.utils.tensorboard")
hparams = LazyModule("tensorboard.plugins.hparams.plugin_data_pb2")
torchvision = LazyModule("torchvision")

NOT_FINITE = "loss or weights are not finite"
FIRST = ("data", "epochs", "lr", "pair", "seed")  # columns of TensorBoard's table of runs, which it sorts by name
TEXT = ("data", "pair", "p_gen", "net", "corrupt", "backbone")  # flags whose values are, or can be, words
SCORES = ("Accuracy/knn", "Accuracy/linear", "Pairs/alignment", "Train/best_of_1", "Train/diversity_pixels")
METRICS = "metrics.jsonl"
NAME_LENGTH = 100  # of a run folder's name, without its hash
MAIN = ("pair", "p_gen", "net", "corrupt", "backbone", "bs", "epochs", "periods", "lr", "temp", "seed")


def run_name(script, data, hyper, usual, suffix=""):
    """Return SCRIPT-DATA[-SUFFIX]-FLAG_VALUE-...-HASH, of about 100 characters.

    data: name of the data set. hyper: {flag: value} of all that decides the result; usual: their defaults. The flags
    that differ from these come first, then the MAIN ones, as far as there is room; 1 and 1.0 are the same value.
    The hash is of all flags, with the whole path of --data. Raises UserError on a suffix of more than 60 bytes.
    """
    if len(os.fsencode(suffix)) > 60:
        raise UserError(f"--suffix {Utils.shown(suffix)}: {len(os.fsencode(suffix))} bytes: no more than 60 fit")
    values = {key: str(value).removesuffix(".0") for key, value in hyper.items() if key != "data"}
    usual = {key: str(value).removesuffix(".0") for key, value in usual.items()}
    different = [key for key in values if values[key] != usual.get(key)]
    main = [key for key in MAIN if key in values and key not in different and values[key] != "None"]

    name = f"{script}-{data[:40]}"
    if suffix:
        name += f"-{suffix}"
    for key in [*different, *main]:
        flag = f"-{key}_{values[key]}"
        if len(name) + len(flag) <= NAME_LENGTH:
            name += flag
    whole = json.dumps([script, hyper["data"], suffix, sorted(values.items())])
    return re.sub(r"[^\w.+=,-]", "~", name) + "-" + Utils.short_hash(whole)


def find_run(args, script, data, hyper, usual, fingerprint):
    """Return the run folder of some flags: with --resume FILE that of the file, otherwise by `run_name`.

    If --resume auto finds no folder of that name, it takes a run with the same flags whose folder was named by an older
    version, or whose images have been moved. fingerprint: a function that returns that of the images. The other
    arguments are those of `run_name`.
    """
    if Utils.names_a_file(args.resume):
        folder = Path(args.resume).resolve().parent
        if not (folder / "args.json").exists():
            raise UserError(f"--resume {args.resume}: no run lies around it: put it back into its run folder")
        return folder
    models = Path(args.models_dir)
    folder = models / run_name(script, data, hyper, usual, args.suffix)
    if not args.resume or folder.exists():
        return folder
    similar = {}  # runs on this --data, and how their flags differ
    for record in sorted(models.glob(f"{script}-*/args.json")):
        stored = stored_flags(record.parent)
        different = _different_flags(stored, args, hyper, usual)
        place = Utils.expanded(str(stored.get("data")))
        is_here = place == args.data or str(Path(place).resolve()) == args.data
        if not different and (is_here or (_is_gone(place) and _learned_from(record.parent, fingerprint()))):
            return record.parent
        if is_here:
            similar[record.parent] = different
    _note_similar(similar, args.given, hyper)
    return folder


def _note_similar(similar, given, hyper):
    """Print which run --resume auto may have meant: one that differs only in flags that were not given.

    These can depend on the number of images. similar: {run folder: {flag: its value}} of flags that differ.
    """
    similar = {folder: values for folder, values in similar.items() if not values.keys() & {*given, "suffix"}}
    if similar:
        folder = min(similar, key=lambda folder: len(similar[folder]))
        values = ", ".join(f"--{name} {value} (here {hyper[name]})" for name, value in similar[folder].items())
        Distributed.notice(f"--resume auto: no run of these flags: {Utils.shown(folder)} has {values}")


def stored_flags(folder):
    """Return {flag: value} of a run's args.json, under their present names; {} if it is missing or damaged."""
    flags = (Utils.read_json(Path(folder) / "args.json") or {}).get("args")
    return Utils.current_flags(flags) if isinstance(flags, dict) else {}


def _different_flags(stored, args, hyper, usual):
    """Return {flag: stored value} of a run's flags that differ from these ones, --data left out."""
    asked = hyper | {"suffix": args.suffix}
    usual = usual | {"suffix": ""}
    found = {key: stored.get(key, usual.get(key)) for key in asked if key != "data"}
    return {key: value for key, value in found.items() if value != asked[key]}


def _is_gone(place):
    """Return whether a folder that held images is not there anymore."""
    return Path(place).is_absolute() and not Path(place).exists()


def _learned_from(folder, fingerprint):
    """Return whether the newest checkpoint of a run says that it was trained on the images of this fingerprint."""
    checkpoint = Utils.newest_checkpoint(folder)
    return checkpoint is not None and Utils.load_(checkpoint).get("data_fingerprint") == fingerprint


@contextlib.contextmanager
def claimed(folder):
    """Hold a run folder for this process, or for this group of processes. UserError if another one has it.

    If nothing was written into the folder, it is removed at the end.
    """
    folder = Path(folder)
    if not Distributed.is_first():
        # wait until the first process has claimed the folder; raise what that raised
        Distributed.first_rank_only(None)
        yield
        return
    with contextlib.ExitStack() as stack:

        def claim():
            try:
                str(folder).encode()
            except UnicodeEncodeError:
                place = Utils.shown(folder.parent)
                raise UserError(f"{place}: no valid UTF-8, as TensorBoard needs: name another --models_dir") from None
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                reason = f"{error.strerror}: name another place by --models_dir"
                raise UserError(f"cannot make the run folder {Utils.shown(folder)}: {reason}") from error
            stack.enter_context(Locks.locked(folder / ".lock", f"working on {Utils.shown(folder)}", wait=False))

        for place in (folder.parent, folder):  # left in the opposite order
            if not place.exists():
                stack.callback(_remove_if_empty, place)
        Distributed.first_rank_only(claim)
        yield


def _remove_if_empty(folder):
    with contextlib.suppress(OSError):
        folder.rmdir()


def check_unused(folder):
    """Raise UserError if a folder holds a run already."""
    if (Path(folder) / "args.json").exists():
        place = Utils.shown(folder)
        has_ended = any((Path(folder) / name).exists() for name in ("encoder.pt", "generator.json"))
        what = "a complete run: --resume auto shows its scores" if has_ended else "a run: --resume auto continues it"
        raise UserError(f"{place} holds {what}, --suffix NAME begins another next to it")


def checkpoint_for(args, folder):
    """Return the checkpoint that --resume continues from, or None. Raises UserError if the folder holds a run that is
    not to be resumed."""
    if Utils.names_a_file(args.resume):
        return Path(args.resume)
    if args.resume is None:
        check_unused(folder)
        return None
    return Utils.newest_checkpoint(folder)


def check_data(file, state, split, data, remedy="begin another run with --suffix NAME"):
    """Raise UserError unless the images are those that a checkpoint's run was trained on. data: the flag --data.

    remedy: what else the user can do than restore the images.
    """
    before = state.get("data_n"), state.get("data_fingerprint")
    if before == (None, None):  # of a version that noted neither
        return
    if before[0] != len(split):
        difference = f"had {before[0]} images and has {len(split)}"
    elif before[1] != split.fingerprint():
        difference = "had other images"
    else:
        return
    raise UserError(
        f"--data {Utils.shown(data)} {difference} when {Utils.shown(file)} was written: restore the images, or {remedy}"
    )


def git(*words):
    """Return what a git command prints about the repository of this code. CalledProcessError if it fails."""
    command = ["git", *words]
    return subprocess.check_output(command, cwd=Utils.ROOT, stderr=subprocess.DEVNULL, text=True).strip()


def revision():
    """Return the commit of this code, "-dirty" added if it has been edited since; "" without git or repository.

    What benchmarks write into Results/ while they run is not an edit of the code.
    """
    try:
        edited = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!Results")
        return git("describe", "--always") + ("-dirty" if edited else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def provenance(device):
    """Return what every result is stored with: command, code revision, versions, hardware."""
    hardware = f"cpu, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    return {
        "command": shlex.join(["python", *sys.argv]),
        "revision": revision(),
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "device": hardware,
    }


def announce(folder, step, dry_run):
    """Print the run folder, and whether a run starts in it or continues at a step."""
    start = "the run folder would be" if dry_run else "starting"
    if step:
        start = f"continuing at step {step}"
    Distributed.say(f"{start}: {Utils.shown(folder)}")


def farewell(folder):
    """Print where the files of a finished run are."""
    print(f"checkpoints, pictures, logs: {Utils.shown(folder)}")
    if (folder / "encoder.pt").exists():
        command = shlex.join(["python", "Export.py", str(folder)])
        print(Utils.shown(f"encoder: encoder.pt in it; how to load it: {command}"))
    print(Utils.shown(f"TensorBoard: {shlex.join(['tensorboard', '--logdir', str(folder.parent)])}"))


def read_metrics(folder):
    """Return the lines of a run's metrics.jsonl as objects; those that are damaged are left out."""
    lines = []
    with contextlib.suppress(OSError):
        for text in (Path(folder) / METRICS).read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError, TypeError, KeyError, OverflowError):  # a kill leaves half a line
                line = json.loads(text)
                lines.append({**line, "step": int(line["step"]), "seconds": float(line["seconds"])})
    return lines


def logged_at(folder, step):
    """Return {name: number} of all that a run's metrics.jsonl holds for a step."""
    numbers = {}
    for line in read_metrics(folder):
        if line["step"] == step:
            numbers |= line
    return numbers


def write_image(file, image):
    """Write an image, float (3, H, W) in [0, 1], as PNG, atomically."""
    Utils.write_atomically(file, lambda scratch: torchvision.utils.save_image(image, scratch, format="png"))


class Run:
    """A run folder: args.json, metrics.jsonl, TensorBoard event files, checkpoints, pictures."""

    TAGS: ClassVar = {"loss": "Loss/train", "knn": "Accuracy/knn", "linear": "Accuracy/linear"}

    def __init__(self, folder, args, device, resumed_step=None, writes=True, positives=""):
        """Write args.json, and open the logs. resumed_step: drop what was logged after it; None: the run is new.

        writes: False in all but the first of several processes. positives: what identifies the generator or the bank.
        """
        self.folder = Path(folder)
        self.writes = writes
        self.started = time.perf_counter()
        self.quiet = Utils.quiet()
        self.before = 0.0  # seconds of earlier starts
        if not writes:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        Utils.remove_stale(self.folder)
        record = self.folder / "args.json"
        starts = (Utils.read_json(record) or {}).get("starts")
        starts = starts if isinstance(starts, list) else []
        start = provenance(device)
        if positives:
            start["positives"] = positives
        Utils.write_json(record, {"args": Utils.plain(args), "starts": [*starts, start]})
        self.metrics = self.folder / METRICS
        if resumed_step is not None:
            self._drop_after(resumed_step)
        purge_step = None if resumed_step is None else resumed_step + 1  # from this step on, itself included
        self.board = tensorboard.SummaryWriter(self.folder, purge_step=purge_step)

    def _drop_after(self, step):
        kept = [line for line in read_metrics(self.folder) if line["step"] <= step]
        if kept:
            self.before = kept[-1]["seconds"]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        Utils.write_text(self.metrics, text)

    def clock(self):
        """Return the seconds that this run has taken, including earlier starts."""
        return self.before + time.perf_counter() - self.started

    def log(self, step, epoch, group="Train", **values):
        """Append one object to metrics.jsonl; show the values in TensorBoard, by the tags in TAGS or GROUP/name."""
        if not self.writes:
            return
        line = {"step": step, "epoch": epoch, "seconds": round(self.clock(), 3)} | values
        try:
            with self.metrics.open("a") as handle:
                handle.write(json.dumps(line) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self.metrics}: {error}: free space there, then --resume auto") from error
        for name, value in values.items():
            tag = self.TAGS.get(name, f"{group}/{name}")
            self.board.add_scalar(tag, 100 * value if tag.startswith("Accuracy/") else value, step)

    def baseline(self, name, scores, step):
        """Show scores, fractions of 1, as lines from step 0 to `step` in TensorBoard's charts of the accuracy.

        name: of the lines, "chance" for example; TensorBoard shows them as another run inside this run's folder.
        """
        with tensorboard.SummaryWriter(self.folder / name) as board:
            for key, value in scores.items():
                for place in (0, step):
                    board.add_scalar(self.TAGS[key], 100 * value, place)

    def show_flags(self, hyper):
        """Show the flags and the SCORES of this run in TensorBoard's HPARAMS. hyper: {flag: value}.

        TensorBoard takes the columns from any one of the runs: each names those of all scripts. First it shows the
        columns that are marked as different, by name.
        """
        shown = {}
        for name, value in hyper.items():
            if value is None:
                value = ""
            if name == "p_gen":  # a number or "auto"
                value = str(value)
            shown[name] = Utils.shown(value) if isinstance(value, str) else value
        if "/" in shown["data"]:  # TensorBoard cuts off the end of a long value
            shown["data"] = f"{Path(shown['data']).name} ({shown['data']})"

        # the columns, which torch makes of this run's flags alone
        summaries = tensorboard.summary.hparams(shown, dict.fromkeys(SCORES, 0.0))
        description = summaries[0].value[0].metadata.plugin_data
        content = hparams.HParamsPluginData.FromString(description.content)
        columns = content.experiment.hparam_infos
        for name in dict.fromkeys((*FIRST, *MAIN)):
            if name not in shown:
                columns.add(name=name, type="DATA_TYPE_STRING" if name in TEXT else "DATA_TYPE_FLOAT64")
        for column in columns:
            column.differs = column.name in FIRST
        description.content = content.SerializeToString()

        for summary in summaries:
            self.board.file_writer.add_summary(summary)

    def picture(self, name, image, step=0):
        """Write NAME.png and the same to TensorBoard. image: float (3, H, W) in [0, 1]."""
        write_image(self.folder / f"{name}.png", image)
        self.board.add_image(name, image, step)

    def failure(self, problem, causes):
        """Return the UserError of a run that has failed, with its last good checkpoint."""
        last = Utils.newest_checkpoint(self.folder) or "none"
        return UserError(f"{problem}: likely causes: {causes}; last good checkpoint: {last}")

    def interrupted(self, checkpoint):
        """Print that a signal stopped the run."""
        print(f"interrupted: saved {Utils.shown(checkpoint)}; --resume auto continues", flush=True)

    def close(self):
        """Write what TensorBoard still holds in memory."""
        if self.writes:
            self.board.close()
