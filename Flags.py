"""The flags that scripts share, each defined once, and what a run's flags build: data, views, encoder."""

import argparse
from pathlib import Path

import torch

import Data
import Utils
from Backbones import BACKBONES, build_encoder
from CamNet.Generator import NETS
from Images.Folders import DATA_DIR

SEEDS = 2**32 - 1  # the largest one: other seeds are made from it by multiplication


def number(kind, low=None, high=None):
    """Return an argparse type: an int or float within [low, high]."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no {'integer' if kind is int else 'number'}") from None
        if not ((low is None or value >= low) and (high is None or value <= high)):  # written so that nan fails
            bounds = f"at least {low}" if high is None else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{text} is out of range: it must be {bounds}")
        return value

    return parse


def parser_for(doc):
    """Return a parser with the flags of every script, in its group `run`: where and how fast, not what comes out."""
    form = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=doc.splitlines()[0], allow_abbrev=False, formatter_class=form)
    parser.run = parser.add_argument_group("run: where and how fast, not what comes out")
    add = parser.run.add_argument
    add("--device", default="auto", help="torch device, as cpu or cuda:1; auto: cuda if there is one")
    add("--n_workers", type=number(int, 0), default=2, metavar="N", help="processes that decode image files")
    add("--data_dir", default=str(DATA_DIR), metavar="DIR", help="folder that holds the data sets")
    storage = "image folders: decode once into memory, or at every use; auto: memory if half of what is free suffices"
    add("--storage", choices=["auto", "memory", "stream"], default="auto", help=storage)
    add("--skip_bad", action="store_true", help="leave unreadable images out and count them, instead of stopping")
    return parser


def contrastive_parser(doc, data="shapes", positives=None):
    """Return the parser of the contrastive scripts; the defaults are the recipe of the row of `data`.

    positives: adds the flags of where they come from; None: those of SimCLR.
    """
    parser = parser_for(doc)
    _add_data_flags(parser.add_argument_group("data and views").add_argument)
    (positives or _add_simclr_flags)(parser)
    _add_model_flags(parser.add_argument_group("model and loss").add_argument)
    _add_optimisation_flags(parser.add_argument_group("optimisation").add_argument)
    _add_run_flags(parser.run.add_argument, "epochs")
    eval_ = "epochs between scores; 0: at the end only"
    parser.run.add_argument("--eval_iter", type=number(int, 0), default=10, metavar="E", help=eval_)
    baselines = "at the end, also score raw pixels, the encoder as it began, and a probe on augmented images"
    parser.run.add_argument("--baselines", action=argparse.BooleanOptionalAction, default=True, help=baselines)
    compile_ = "torch.compile; auto: on CUDA, in runs of 2,000 steps or more"
    parser.run.add_argument("--compile", choices=["auto", "yes", "no"], default="auto", help=compile_)
    parser.set_defaults(**Data.get_row(data).recipe)
    return parser


def isicle_parser(doc, data="shapes"):
    """Return the parser of TrainISICLE.py; the defaults are SimCLR's recipe."""
    return contrastive_parser(doc, data, _add_isicle_flags)


def camnet_parser(doc, data="shapes"):
    """Return the parser of TrainCamNet.py; the defaults are the generator's recipe in the row of `data`."""
    parser = parser_for(doc)
    add = parser.add_argument_group("data").add_argument
    _add_data_place(add)
    add("--flip", action=argparse.BooleanOptionalAction, default=True, help="mirror half of the images, drawn anew")
    _add_generator_flags(parser.add_argument_group("generator").add_argument)
    _add_imle_flags(parser.add_argument_group("search and distance").add_argument)
    _add_generator_optimisation(parser.add_argument_group("optimisation").add_argument)
    _add_run_flags(parser.run.add_argument, "periods")
    sample = "periods between pictures; 0: at the end only"
    parser.run.add_argument("--sample_iter", type=number(int, 0), default=5, metavar="P", help=sample)
    parser.set_defaults(**Data.get_row(data).generator)
    return parser


def _add_data_place(add):
    names = ", ".join(name for name in Data.DATASETS if name != "folder")
    add("--data", default="shapes", help=f"{names}, or the path of a folder of images")
    add("--size", type=number(int, 8), metavar="PX", help="side to resize an image folder to; None: the row's")


def _add_data_flags(add):
    _add_data_place(add)
    scored = "what is scored: a validation split (cv where there is none), 3-fold on train, or test, for reports only"
    add("--eval", choices=["val", "cv", "test"], default="val", help=scored)
    views = "full: crop, flip, colour; crop: crop and flip; none: the images as they are"
    add("--aug", choices=["full", "crop", "none"], default="full", help=views)
    add("--color_s", type=number(float, 0, 2), metavar="S", help="strength of the colour jitter, 0 to about 1")
    add("--crop_min", type=number(float, 0.001, 1), metavar="A", help="smallest share of the area that a crop keeps")
    add("--gray_p", type=number(float, 0, 1), metavar="P", help="probability of a grey view")
    add("--blur_p", type=number(float, 0, 1), metavar="P", help="probability of a blurred view")


def _add_simclr_flags(parser):
    add = parser.add_argument_group("positives").add_argument
    add("--num_views", type=number(int, 2), default=2, metavar="M", help="views of each image in a step")
    loss = "with more than 2 views: mean over positives outside the logarithm (SupCon), or sum inside it"
    add("--loss", choices=["lout", "lin"], default="lout", help=loss)


def _add_isicle_flags(parser):
    """Add the flags of TrainISICLE.py: where the positives come from."""
    add = parser.add_argument_group("positives").add_argument
    pair = "views of a step: two restorations; the image and one; the image twice and one; --num_pos restorations; "
    pair += "as controls: one restoration, twice; what is restored, twice"
    pairs = ["gen_gen", "real_gen", "real_real_gen", "multi", "gen_twice", "corrupted"]
    add("--pair", choices=pairs, default="real_real_gen", help=pair)
    p_gen = "share of synthetic images where the pair has a restoration; the others are the image itself"
    add("--p_gen", type=number(float, 0, 1), default=0.5, metavar="P", help=p_gen)
    add("--gen_warmup", type=number(float, 0), default=0.0, metavar="E", help="epochs in which --p_gen rises from 0")
    add("--num_codes", type=number(int, 1), default=8, metavar="K", help="restorations of each image in the bank")
    add("--num_pos", type=number(int, 2), default=3, metavar="M", help="views of --pair multi")
    pick = "restorations of a step: random ones of the K, or those that the encoder finds least alike"
    add("--pick", choices=["random", "farthest"], default="random", help=pick)
    loss = "lout, lin: all views, mean over positives outside the logarithm or sum inside; ntxent, align: NT-Xent of "
    loss += "the first two views, plus NT-Xent or 2 - 2 cos of the first and every further one"
    add("--loss", choices=["ntxent", "lout", "lin", "align"], default="lout", help=loss)
    weight = "of what --loss ntxent and align add"
    add("--gen_weight", type=number(float, 0), default=1.0, metavar="W", help=weight)
    refresh = "epochs between two banks, each of new codes; 0: one bank"
    add("--refresh", type=number(int, 0), default=0, metavar="E", help=refresh)
    add(
        "--corrupt",
        metavar="SPEC",
        help="what the generator undoes, see TrainCamNet.py; None: any, else the data's own",
    )
    add("--generator", metavar="FILE|DIR", help="a run of TrainCamNet.py; None: the newest for the data, or a new one")
    bank = "positives of your own, .npy, uint8 (N, K, 3, H, W) in the order of the train split; no generator then"
    add("--bank", metavar="FILE", help=bank)
    where = "auto: on the device if the bank takes at most half of what is free, else mapped from the disk"
    parser.run.add_argument("--bank_storage", choices=["auto", "memory", "map"], default="auto", help=where)


def _add_model_flags(add):
    add("--backbone", choices=list(BACKBONES), help="encoder")
    stem = "first layer of a ResNet; small: 3x3, stride 1, no pooling; auto: small up to 64 pixels"
    add("--stem", choices=["auto", "small", "large"], default="auto", help=stem)
    add("--proj_dim", type=number(int, 1), metavar="D", help="length of a projection")
    add("--proj_hidden", type=number(int, 1), metavar="H", help="width of the projection head")
    add("--proj_norm", action=argparse.BooleanOptionalAction, help="batch normalisation in the projection head")
    add("--temp", type=number(float, 1e-3), metavar="T", help="temperature; lower weighs similar negatives more")


def _add_optimisation_flags(add):
    add("--bs", type=number(int, 2), metavar="N", help="images in a step, of all processes; what is left is dropped")
    add("--epochs", type=number(int, 1), metavar="E", help="passes over the data")
    add("--opt", choices=["SGD", "Adam"], help="optimizer; SGD with Nesterov momentum")
    add("--lr", type=number(float, 0), help="peak learning rate, as it is: it does not scale with --bs")
    add("--mm", type=number(float, 0, 0.9999), metavar="M", help="momentum; beta1 of Adam")
    add("--wd", type=number(float, 0), help="weight decay; biases and norm layers have none")
    add("--n_ramp", type=number(float, 0), metavar="E", help="epochs of linear warm-up before the cosine to 0")
    add("--lars", action="store_true", help="adapt the rate of every layer; over Adam as LAMB does")
    add("--trust", type=number(float, 0), default=0.001, metavar="C", help="trust coefficient of --lars")
    add("--seed", type=number(int, 0, SEEDS), default=0, help="of initial weights, order and views")


def _add_generator_flags(add):
    add("--net", choices=list(NETS), help="size of the generator: tiny for CPUs, small for a GPU, paper as published")
    corrupt = "what the generator undoes: gray, detail<k> (without the k x k lowest frequencies), down<k> (1/k of the "
    corrupt += "side), mask<f> (share hidden), joined by +"
    add("--corrupt", metavar="SPEC", help=corrupt)
    project = "make the corruption of every sample exactly c(x) (but for what detail<k> has to clamp to [0, 1])"
    add("--project", action=argparse.BooleanOptionalAction, default=True, help=project)
    mapping = "cumulative: styles see those of coarser levels, so that the levels agree (CHIMLE); None: the net's"
    add("--mapping", choices=["cumulative", "per_level"], help=mapping)
    level_input = (
        "finer levels see c(x) too, or the output before alone (super-resolution as published); None: the net's"
    )
    add("--level_input", choices=["both", "output"], help=level_input)
    init = "first weights of the style path: alive (he), or as published (ref), where styles change nothing at first"
    add("--init", choices=["he", "ref"], default="he", help=init)


def counts(text):
    """Check --m: integers of at least 1, joined by commas."""
    return ",".join(str(number(int, 1)(part)) for part in text.split(","))


def _add_imle_flags(add):
    add("--m", type=counts, metavar="M,..", help="codes searched on each level, coarse to fine; the last is repeated")
    add("--period", type=number(int, 1), metavar="N", help="images whose codes are searched at a time, then kept")
    add("--keep_previous", action="store_true", help="keep an image's last codes where no nearer ones are found")
    reject = "pass over candidates nearer than D to the target (RS-IMLE), since later codes are not searched"
    chunk = "candidates in one forward of the search: bounds the memory, changes nothing but rounding"
    add("--chunk", type=number(int, 1), default=1024, metavar="N", help=chunk)
    add("--reject", type=number(float, 0), default=0.0, metavar="D", help=reject)
    add("--distance", choices=["pixels", "squeeze", "alex", "vgg"], help="pixels, or LPIPS with this backbone")
    add(
        "--alpha",
        type=number(float, 0),
        default=0.1,
        help="weight of the pixels' squared error, which LPIPS hardly sees, beside it (published: 0)",
    )
    side = "LPIPS looks at images enlarged to this side; 0: as they are"
    add("--lpips_side", type=number(int, 0), default=64, metavar="PX", help=side)
    add("--lpips_weights", metavar="FILE", help="weights of the LPIPS backbone; None: torchvision's, downloaded once")


def _add_generator_optimisation(add):
    add("--periods", type=number(int, 1), metavar="P", help="times that codes are searched")
    add("--visits", type=number(int, 1), metavar="V", help="times that each image of a period is trained on")
    add("--bs", type=number(int, 1), metavar="N", help="images in a step")
    add("--lr", type=number(float, 0), help="peak learning rate of Adam; a cosine to 0")
    add(
        "--map_lr",
        type=number(float, 0),
        default=0.1,
        metavar="C",
        help="the mapping network, through which all styles go, learns at C times --lr (published: .01)",
    )
    add("--n_ramp", type=number(int, 0), default=100, metavar="N", help="steps of linear warm-up")
    add("--ema", type=number(float, 0, 0.99999), metavar="D", help="decay of the averaged weights, which are sampled")
    add("--seed", type=number(int, 0, SEEDS), default=0, help="of initial weights, order and codes")
    single = "also train the net on one code (m = 1), to compare with: it takes as long as the training itself"
    add("--single_code", action=argparse.BooleanOptionalAction, default=True, help=single)


def _add_run_flags(add, unit):
    add("--models_dir", default=str(Utils.ROOT / "Models"), metavar="DIR", help="folder of the run folders")
    add("--suffix", default="", help="added to the run folder's name")
    resume = "go on from a checkpoint, with its flags; auto: from the newest of this run, if there is one"
    add("--resume", metavar="FILE|auto", help=resume)
    add("--log_iter", type=number(int, 1), default=20, metavar="N", help="steps between logged lines")
    save = f"{unit} between checkpoints; 0: at the end"
    add("--save_iter", type=number(int, 0), default=10, metavar=unit[0].upper(), help=save)
    precision = "of the network; auto: bf16 where the hardware has it, else tf32, which CPUs ignore"
    add("--precision", choices=["auto", "bf16", "tf32", "fp32"], default="auto", help=precision)


# they leave what is learnt as it is, up to rounding; the others name the run folder and must agree when it is resumed
RUN_FLAGS = {
    *("device", "n_workers", "data_dir", "storage", "skip_bad", "eval", "models_dir", "suffix", "resume"),
    *("log_iter", "eval_iter", "save_iter", "sample_iter", "baselines", "precision", "compile", "small_stem"),
    *("chunk", "lpips_weights", "bank_storage"),
}


def hyper_parameters(args):
    """Return {flag: value} of the flags that decide what is learnt."""
    return {key: value for key, value in vars(args).items() if key not in RUN_FLAGS}


def parse(argv, build_parser):
    """Parse a training script's flags: as given; else as in the checkpoint of --resume FILE; else the recipe of --data.

    build_parser: data -> parser. Raises UserError where given flags contradict the checkpoint.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--data", default="shapes")
    early.add_argument("--resume")
    early = early.parse_known_args(argv)[0]
    if early.resume in (None, "auto"):
        return build_parser(early.data).parse_args(argv)
    stored = Utils.load_(early.resume).get("args", {})
    if "data" not in stored:
        raise Utils.UserError(f"--resume {early.resume}: it holds no run: give a checkpoint of this script")
    parser = build_parser(stored["data"])
    defaults = parser.parse_args([])
    hyper = hyper_parameters(defaults)
    of_this_start = ("device", "suffix", "resume")
    parser.set_defaults(**{key: stored[key] for key in vars(defaults) if key in stored and key not in of_this_start})
    args = parser.parse_args(argv)
    given = hyper_parameters(args)
    changed = [f"--{key} {given[key]} (it was {stored.get(key)})" for key in hyper if given[key] != stored.get(key)]
    if changed:
        raise Utils.UserError(
            f"--resume {early.resume}: other flags than that run's: {', '.join(changed)}: leave them out"
        )
    return args


# ---------------------------------------------------------------------------------------------------- what they build


def find_run(args, row, script):
    """Return (run folder, checkpoint to go on from or None). Raises UserError if the folder holds another run."""
    if args.resume not in (None, "auto"):
        return Path(args.resume).resolve().parent, Path(args.resume)
    folder = Path(args.models_dir) / Utils.run_name(script, row.name, hyper_parameters(args), args.suffix)
    if not args.resume:
        Utils.check_unused(folder)
        return folder, None
    checkpoint = Utils.newest_checkpoint(folder)
    data = Utils.load_(checkpoint)["args"]["data"] if checkpoint else args.data
    if Path(data).resolve() != Path(args.data).resolve():  # the folder's name holds but the last part of a path
        raise Utils.UserError(f"--data {args.data}: {folder} is a run on {data}: begin another with --suffix NAME")
    return folder, checkpoint


def splits_for(args, device):
    """Return the `Data.Splits` of a run's flags, on `device`."""
    splits = Data.get_data_splits(args.data, args.eval, file_options(args, device))
    train = splits.train.to(device)
    return splits._replace(train=train, test=train if splits.eval == "cv" else splits.test.to(device))


def train_split_for(args, device):
    """Return the train split of a run's flags, on `device`: all that a generator may see."""
    return Data.get_train_split(args.data, file_options(args, device)).to(device)


def file_options(args, device):
    """Return how a run's flags have image files read."""
    return Data.Options(
        data_dir=Path(args.data_dir),
        size=args.size,
        storage=args.storage,
        n_workers=args.n_workers,
        skip_bad=args.skip_bad,
        device=str(device),
    )


def views_for(args, aug=None):
    """Return the training `Augmentation` of a run's flags, or that of another --aug."""
    recipe = {key: getattr(args, key) for key in ("size", "crop_min", "gray_p", "blur_p")}
    return Data.get_ssl_data_augs(args.data, args.color_s, aug=aug or args.aug, **recipe)


def encoder_for(args):
    """Return the encoder of a run's flags as it was before training: the seed decides."""
    torch.manual_seed(args.seed)
    return build_encoder(args.backbone, args.small_stem)
