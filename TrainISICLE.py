"""Pre-train an encoder with ISICLE: a generator restores corrupted images, and its restorations are the positives.

    python TrainISICLE.py                                   # generator, bank, encoder, scores: minutes on two cores
    python TrainISICLE.py --pair gen_gen --p_gen 1          # the pair is always two restorations
    python TrainISICLE.py --data PATH --bank positives.npy  # positives of your own
    tensorboard --logdir Models

Finds the newest generator that TrainCamNet.py made for the data, or trains one; fills the bank, K restorations of every
image; then trains by TrainSimCLR.py's loop. Only the source of positives, below, differs from the baseline.
"""

import Signals  # noqa: F401  first: see TrainSimCLR.py

# isort: split
import shlex
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

import Banks
import Data
import Devices
import Distributed
import Evaluate
import Flags
import Locks
import Reports
import TrainCamNet
import TrainSimCLR
import Utils
from Augmentations import send, to_float
from CamNet.Bank import Bank, fingerprint_array, read, to_uint8
from CamNet.Codes import StepPurpose, make_keys, uniforms
from CamNet.Corruptions import Corruption
from Flags import bounded


class Pair(NamedTuple):
    """The views of a step: `real` times the image and `made` different restorations; this list `times` times."""

    real: int
    made: int | None  # None: --num_pos
    times: int
    what: str


PAIRS = {  # --pair NAME
    "real_real_gen": Pair(2, 1, 1, "the image twice and a restoration"),
    "real_gen": Pair(1, 1, 1, "the image and a restoration"),
    "gen_gen": Pair(0, 2, 1, "two different restorations"),
    "multi": Pair(0, None, 1, "--num_pos different restorations"),
    "gen_twice": Pair(0, 1, 2, "control: one restoration, twice"),
    "corrupted": Pair(0, 1, 2, "control: c(x), twice; no generator"),
}


# --p_gen auto, with a pair that has the image
P_GEN_MAX = 0.5
UNRESTORED = 0.2  # share of the epochs, the first ones, that have no restorations; then neighbors are compared
QUERIES = 500  # images whose nearest neighbors are compared with those of their restorations
NEIGHBORS_AMONG = 2000  # images among which neighbors are looked for

# ---------------------------------------------------------------------------------------------------- flags


def get_args(argv=None):
    """Parse the flags; the defaults are the recipe of --data."""
    return Flags.parse(argv, build_parser)


def build_parser(data="shapes", device_type="cpu"):
    """Return the parser: SimCLR's, with the flags of where the positives come from."""
    parser = TrainSimCLR.build_parser(data, device_type, __doc__, add_positives)
    parser.set_defaults(p_gen=Data.get_row(data).p_gen)
    parser.advice = advise
    return parser


def advise(words):
    """Return what to do with unknown words of a command line; "" unless they begin with a flag of the generator."""
    if words[0].split("=")[0] not in TrainCamNet.build_parser().flags():
        return ""
    has_value = len(words) > 1 and not words[1].startswith("--")
    flag = shlex.join(words[: 1 + has_value])
    return f"this flag is the generator's: give it by --camnet {shlex.quote(flag)}"


def probability(text):
    """The argparse type of --p_gen: a float from 0 to 1, or "auto"."""
    return text if text == "auto" else bounded(float, 0, 1)(text)


def add_positives(group):
    add = group.add_argument
    pairs = "; ".join(f"{name}: {pair.what}" for name, pair in PAIRS.items())
    add("--pair", choices=list(PAIRS), default="real_real_gen", help=f"views of a step; {pairs}")
    p_gen = "probability of each restoration of the pair; otherwise the image takes its place; auto: 0 in the first "
    p_gen += f"fifth of the epochs, then at most {P_GEN_MAX:g}, less where restorations have other nearest neighbors "
    p_gen += f"than their images; {P_GEN_MAX:g} for pairs without the image and in runs of one epoch"
    add("--p_gen", type=probability, default="auto", metavar="P", help=p_gen)
    add(
        "--gen_warmup",
        type=bounded(float, 0),
        default=0.0,
        metavar="E",
        help="epochs, from the first one on, in which the probability rises to --p_gen",
    )
    add("--num_codes", type=bounded(int, 1), default=8, metavar="K", help="restorations of each image in the bank")
    add("--num_pos", type=bounded(int, 2), default=3, metavar="M", help="views of --pair multi")
    pick = "which of the K restorations a step uses; farthest: those whose features differ most"
    add("--pick", choices=["random", "farthest"], default="random", help=pick)
    refresh = "epochs until the bank is made again with new codes; 0: one bank for the whole run"
    add("--refresh", type=bounded(int, 0), default=0, metavar="E", help=refresh)
    corrupt = "corruption that the generator undoes, such as gray+detail2; default: that of the newest generator for "
    corrupt += "this data, or the data set's recipe if there is none"
    add("--corrupt", metavar="SPEC", help=corrupt)
    generator = "a run of TrainCamNet.py; default: the newest one for this data, or a new one"
    add("--generator", type=Flags.path, metavar="FILE|DIR", help=generator)
    camnet = 'flags of TrainCamNet.py for the generator, in one string, for example "--periods 12 --distance pixels"'
    add("--camnet", default="", metavar="FLAGS", help=camnet)
    bank = "your own positives instead of a generator: .npy, uint8 (N, K, 3, H, W), in the order of the train split"
    add("--bank", type=Flags.path, metavar="FILE", help=bank)
    where = (
        "memory: on the device; map: read from the disk; auto: memory if the bank takes at most half of what is free"
    )
    add("--bank_storage", choices=["auto", "memory", "map"], default="auto", help=where)


# ---------------------------------------------------------------------------------------------------- positives


class Restored:
    """The source of positives: restorations drawn from the bank in each step, with the image if the pair has it.

    The draw depends only on seed, step and image, so it is the same in a resumed run and with several processes.
    """

    def __init__(self, args, bank_of_epoch=None, warmup_steps=0, split=None):
        """bank_of_epoch: epoch -> Bank; None: .bank stays as it is. warmup_steps: those of --gen_warmup. split: the
        train split, for --p_gen auto."""
        self.args = args
        self.pair = PAIRS[args.pair]
        self.made = args.num_pos if self.pair.made is None else self.pair.made  # different restorations per step
        self.split = split
        self.bank_of_epoch = bank_of_epoch
        self.warmup_steps = warmup_steps
        self.p_gen = args.p_gen  # probability of a restoration; None: not known yet
        if args.p_gen == "auto":
            self.p_gen = None if self.pair.real and args.epochs > 1 else P_GEN_MAX
        self.bank = None
        self.encoder = None  # the one that is trained; set by the Trainer
        self.fingerprint = ""  # identifies the generator or the bank; checked on resume
        self.seconds_before = 0.0  # estimated time for generator and bank, in a dry run
        self.synthetic_share = 0.0  # share of restorations in the last views

    def __len__(self):
        return (self.pair.real + self.made) * self.pair.times

    @property
    def captions(self):
        """What each view shows, in words."""
        restored = "restored" if self.args.p_gen == 1 else "restored or image"
        return (["image"] * self.pair.real + [restored] * self.made) * self.pair.times

    def start_epoch(self, epoch):
        """Take the bank of an epoch; see TrainSimCLR.SamePair."""
        if self.bank_of_epoch:
            self.bank = None  # room for a new one
            self.bank = self.bank_of_epoch(epoch)
        if self.p_gen is None and epoch >= UNRESTORED * self.args.epochs:
            self.p_gen = Distributed.first_rank_only(self.measured_p_gen)

    def measured_p_gen(self):
        """Return the probability of a restoration by what the encoder has learned so far; no label is used.

        p_gen = min(P_GEN_MAX, s^2). s: the share of an image's nearest neighbors that its restoration keeps, divided
        by the share that a random view keeps; see `Evaluate.neighbors_kept`.
        """
        rows = torch.randperm(len(self.split), generator=torch.Generator().manual_seed(0))[:NEIGHBORS_AMONG]
        parts = self.split.batches(list(rows.split(256)), next(self.encoder.parameters()).device)
        images = torch.cat([part for _, part in parts])
        asked = images[:QUERIES]
        view = Flags.augmentation_for(self.args)(asked, torch.Generator().manual_seed(0))
        restored = self.synthetic(rows[:QUERIES], asked, step=0)
        k = min(20, max(1, len(images) // 10))
        of_view, of_restored = Evaluate.neighbors_kept(self.encoder, images, [view, to_float(restored)], k)
        share = of_restored / max(of_view, 1e-6)
        p_gen = round(min(P_GEN_MAX, share**2), 3)
        print(
            f"--p_gen auto: {p_gen:g}: restorations keep {of_restored:.0%} of their images' nearest neighbors, "
            f"random views {of_view:.0%}",
            flush=True,
        )
        return p_gen

    def probability(self, step):
        """Return the probability of a restoration, where the pair has one."""
        progress = (step + 1) / self.warmup_steps if self.warmup_steps else 1.0
        return (self.p_gen or 0.0) * min(1.0, progress)

    def __call__(self, indices, images, step):
        """Return M batches uint8 (b, 3, H, W), the real ones first; see TrainSimCLR.SamePair."""
        p = self.probability(step)
        if p == 0:
            return [images] * len(self)

        # random numbers, drawn on the host
        keys = make_keys(self.args.seed, step, indices.cpu(), StepPurpose.SHARE)
        is_restored = uniforms(keys, self.made) < p  # (b, made)
        columns = self.columns(indices, step)

        # restorations, by one copy to the device: of the numbers, or of images that a mapped bank has read
        if self.bank.is_tensor:
            sent = send({"rows": indices, "columns": columns, "is_restored": is_restored}, images.device)
            restored = self.bank.take(sent["rows"], sent["columns"])
        else:
            sent = send({"taken": self.bank.take(indices, columns), "is_restored": is_restored}, images.device)
            restored = sent["taken"]
        if self.args.pick == "farthest":
            restored = self.farthest_of(restored, images)

        # with probability 1 - p the image takes the place of a restoration
        if p < 1:
            restored = torch.where(sent["is_restored"][:, :, None, None, None], restored, images[:, None])

        views = ([images] * self.pair.real + list(restored.unbind(dim=1))) * self.pair.times
        shares = is_restored.float().mean(dim=0).tolist()  # of restorations in each view
        self.synthetic_share = sum(shares * self.pair.times) / len(views)
        return views

    def columns(self, indices, step):
        """Return which restorations a step reads, int64 (b, c) on the CPU: random ones, or all to choose from."""
        if self.args.pick == "farthest":
            return torch.arange(self.bank.k).expand(len(indices), -1)
        keys = make_keys(self.args.seed, step, indices.cpu(), StepPurpose.PICK)
        return uniforms(keys, self.bank.k).argsort(dim=1)[:, : self.made]

    def farthest_of(self, candidates, images):
        """Return uint8 (b, made, 3, H, W): those of the candidates (b, K, 3, H, W) whose features differ most."""
        anchor = images if self.pair.real else None
        columns = farthest(candidates, self.made, anchor, self.encoder)
        rows = torch.arange(len(images), device=images.device)
        return candidates[rows[:, None], columns]

    def synthetic(self, indices, images, step):
        """Return the first restoration of each image, for measurements; see TrainSimCLR.SamePair."""
        if self.bank is None:
            return None
        first = torch.zeros(len(indices), 1, dtype=torch.int64)
        return self.bank.take(indices, first)[:, 0].to(images.device)

    def logged(self):
        """Return --p_gen as it is used, and the share of synthetic images among the last views, for the log."""
        return {"p_gen": self.p_gen or 0.0, "synthetic_share": self.synthetic_share}


class Corrupted(Restored):
    """A control without a generator: both views are always c(x), enlarged to the size of the image."""

    def __init__(self, args, corruption):
        super().__init__(args)
        self.corruption = corruption
        self.fingerprint = corruption.spec
        self.p_gen = 1.0
        self.synthetic_share = 1.0

    @property
    def captions(self):
        """What each view shows, in words."""
        return ["c(x)"] * 2

    def __call__(self, indices, images, step):
        """Return c(x), uint8 (b, 3, H, W), twice; see TrainSimCLR.SamePair."""
        return [self.synthetic(indices, images, step)] * 2

    def synthetic(self, indices, images, step):
        """Return c(x), uint8 (b, 3, H, W)."""
        keys = make_keys(self.args.seed, step, indices, StepPurpose.MASK)
        sent = send({"keys": keys}, images.device)
        return to_uint8(self.corruption.upsample(self.corruption(images, sent["keys"])))


@torch.no_grad()
def farthest(candidates, count, images, encoder):
    """Return columns int64 (b, count) of the candidates, uint8 (b, K, 3, H, W): those whose features differ most.

    The first has the lowest cosine similarity to the image, uint8 (b, 3, H, W), or, if images is None, to the mean of
    all restorations. Each further one has the lowest similarity to the nearest of those chosen before.
    """
    b, k = candidates.shape[:2]
    batch = candidates.flatten(0, 1)
    if images is not None:
        batch = torch.cat([batch, images])

    # features of all restorations and of what they are compared with
    with Evaluate.evaluation_mode(encoder):
        features = F.normalize(Evaluate.embed(encoder, to_float(batch)), dim=1)
    restored = features[: b * k].view(b, k, -1)  # (b, K, F)
    anchor = restored.mean(dim=1) if images is None else features[b * k :]
    likeness = torch.einsum("bkf,bf->bk", restored, anchor)

    # choose one after the other; likeness: to the most similar of those chosen before
    columns = []
    for _ in range(count):
        column = likeness.argmin(dim=1, keepdim=True)  # (b, 1)
        columns.append(column)
        picked = restored.gather(1, column[:, :, None].expand(-1, -1, restored.shape[2]))[:, 0]
        to_picked = torch.einsum("bkf,bf->bk", restored, picked)
        mean_was_the_anchor = images is None and len(columns) == 1
        likeness = to_picked if mean_was_the_anchor else torch.maximum(likeness, to_picked)
        likeness = likeness.scatter(1, torch.cat(columns, dim=1), 2.0)  # above every cosine: none is chosen twice
    return torch.cat(columns, dim=1)


# ---------------------------------------------------------------------------------------------------- generator, bank


REFUSED_IN_CAMNET = ("data", "size", "models_dir", "resume", "dry_run")  # flags of TrainCamNet.py


def _camnet_parser():
    """Return the parser of --camnet, whose errors say so."""
    parser = TrainCamNet.build_parser()
    parser.prog = f"{Path(__file__).name} --camnet"
    return parser


def generator_flags(args):
    """Return the words of --camnet, and {flag: value} of those that decide what the generator learns.

    Raises ValueError if the corruption that is asked for does not exist or fit.
    """
    words = Flags.words_in("camnet", args.camnet)
    own = [name for name in REFUSED_IN_CAMNET if name in Flags.given_flags(_camnet_parser(), words)]
    if own:
        raise Utils.UserError(f"--camnet {args.camnet}: --{own[0]} cannot be in it: give it to this script itself")
    given = Flags.parse([*words, f"--data={args.data}"], TrainCamNet.build_parser)
    asked = {name: value for name, value in Flags.hyper_parameters(given).items() if name in given.given}
    asked.pop("data")
    if args.corrupt and asked.get("corrupt", args.corrupt) != args.corrupt:
        raise Utils.UserError(f"--corrupt {args.corrupt}: --camnet has --corrupt {asked['corrupt']}: leave out one")
    spec = args.corrupt or asked.get("corrupt")
    if spec:
        Corruption(spec, Data.get_row(args.data, args.size).size)  # ValueError if it is none
    return words, asked


def generator_words(args, words):
    """Return the command line of TrainCamNet.py for the generator of a run; words: those of --camnet."""
    argv = [f"--data={args.data}"]
    if args.corrupt:
        argv.append(f"--corrupt={args.corrupt}")
    usual = TrainCamNet.get_args(argv)
    for name in ("size", "device", "n_workers", "data_dir", "storage", "models_dir", "precision"):
        if getattr(args, name) != getattr(usual, name):
            argv.append(f"--{name}={getattr(args, name)}")
    for name in ("skip_bad", "deterministic"):
        if getattr(args, name):
            argv.append(f"--{name}")
    return [*argv, "--no-single_code", *words]


def generator_lock(args):
    """Return the file of the lock that a run holds while it trains a generator."""
    name = Data.get_row(args.data).name[:40]
    return Path(args.models_dir) / f".generator-{name}-{Utils.short_hash(args.data)}.lock"


def train_generator(args, split, words, asked):
    """Train a generator by the recipe of the data, or continue one; return its checkpoint."""
    argv = [*generator_words(args, words), "--resume=auto"]
    command = shlex.join(["python", "TrainCamNet.py", *argv])
    with Locks.locked_by_first(generator_lock(args), f"training a generator for {args.data}"):
        found = Banks.find_generator(args, split, asked)
        if found:  # another run has trained it meanwhile
            return found
        Distributed.say(Utils.shown(f"no generator for {args.data} yet: it is trained first, as by {command}"))
        # a signal that ends the training also ends the program
        try:
            TrainCamNet.main(TrainCamNet.get_args(argv), is_final=False)
        except Exception as error:
            message = Utils.explain(error)
            if message is None:
                raise
            raise Utils.UserError(f"training the generator (its flags go into --camnet): {message}") from error
        found = Banks.find_generator(args, split, asked)
        if found is None:
            raise Utils.UserError(
                f"--data {args.data}: the generator of these flags was trained on other images: train a new one "
                "by --camnet '--suffix NAME'"
            )
        Distributed.say("the generator is ready; next come its bank and the encoder")
        return found


def check_flags(args):
    """Raise UserError on flags that do not go together."""
    if args.bank and args.pair == "corrupted":
        raise Utils.UserError(f"--bank {args.bank}: --pair corrupted needs no restorations: leave one of them out")
    if args.bank:
        for name in ("generator", "corrupt", "camnet", "refresh"):
            if getattr(args, name):
                raise Utils.UserError(
                    f"--bank {args.bank}: --{name} is for banks that a generator makes: leave one of them out"
                )


def note_unused(args):
    """Print which given flags of the positives change nothing."""
    of_restorations = ["gen_warmup", "num_codes", "pick", "refresh", "bank_storage"]
    if args.pair != "multi":
        Flags.note_unused(args, ["num_pos"], f"with --pair {args.pair}: only --pair multi has it")
    if args.pair == "corrupted":
        Flags.note_unused(args, ["p_gen", *of_restorations], "with --pair corrupted")
    elif args.p_gen == 0:
        Flags.note_unused(args, [*of_restorations, "generator", "bank", "corrupt", "camnet"], "with --p_gen 0")
    elif args.bank:
        Flags.note_unused(args, ["num_codes"], "with --bank")


def check_count(args, source, k, flag):
    """Raise UserError if a step needs more than the k restorations of an image."""
    if k < source.made:
        raise Utils.UserError(
            f"{flag} {k} restorations of an image, and --pair {args.pair} takes {source.made}: use {source.made} or "
            "more, or --pair real_gen"
        )


def check_disk(args, split):
    """Raise UserError if the bank is larger than the whole disk."""
    place = Path(args.models_dir).absolute()
    while not place.exists():
        place = place.parent
    total = shutil.disk_usage(place).total
    needed = len(split) * args.num_codes * 3 * split.size**2
    if needed > total:
        bank = f"--num_codes {args.num_codes}: the bank would take {needed / 2**30:,.0f} GiB"
        raise Utils.UserError(f"{bank}, and the disk of --models_dir has {total / 2**30:,.0f} GiB: lower it")


def make_positives(args, splits, device, fingerprint=""):
    """Return the source of positives of a run's flags. Raises UserError on flags that do not go together.

    fingerprint: see `TrainSimCLR.main`.
    """
    split = splits.train
    source = Restored(args, warmup_steps=args.gen_warmup * (len(split) // args.bs), split=split)
    TrainSimCLR.check_views(args, len(source))  # before a generator is trained
    note_unused(args)
    if args.p_gen == 0 and args.pair != "corrupted":
        return source
    check_flags(args)
    with Utils.as_user_error():
        # the control without a generator
        words, asked = generator_flags(args)
        if args.pair == "corrupted":
            spec = args.corrupt or fingerprint or Banks.corruption_for(args, split, asked)
            return Corrupted(args, Corruption(spec, split.size))

        # a bank that the user made
        if args.bank:
            return with_own_bank(args, split, device, source)

        # banks that a generator makes
        check_count(args, source, args.num_codes, "--num_codes:")
        check_disk(args, split)
        if args.dry_run:
            return try_out_bank(args, split, device, source, words, asked)
        Distributed.first_rank_only(lambda: Locks.remove_unlocked(generator_lock(args)))
        checkpoint = Banks.find_generator(args, split, asked, fingerprint)
        if checkpoint is None:
            checkpoint = train_generator(args, split, words, asked)
            Devices.release(device)
        schedule = Banks.BankSchedule(args, split, device, checkpoint, asked)
        source.bank_of_epoch = schedule
        source.fingerprint = schedule.fingerprint
        return source


def with_own_bank(args, split, device, source):
    """Return the source with the bank of --bank. Raises UserError if it does not fit the images or the pair."""
    try:
        images = read(args.bank, len(split), split.size)
    except ValueError as error:
        raise Utils.UserError(f"--bank {error}: save one by numpy.save") from error
    check_count(args, source, images.shape[1], f"--bank {args.bank}: it holds")
    source.bank = Bank(images, device, Devices.is_held(args.bank_storage, images.nbytes, device))
    source.fingerprint = fingerprint_array(images)
    return source


def try_out_bank(args, split, device, source, words, asked):
    """Return the source of a dry run: its bank holds black images instead of restorations."""
    checkpoint = Banks.find_generator(args, split, asked)
    if checkpoint:
        schedule = Banks.BankSchedule(args, split, device, checkpoint, asked)
        filling = 0.0 if schedule.file(0).exists() else schedule.estimate(args.seed)
    else:
        theirs = TrainCamNet.get_args([*generator_words(args, words), "--dry_run"])
        trainer, source.seconds_before = TrainCamNet.try_out(theirs, *TrainCamNet.prepare(theirs))
        filling = Banks.filling_seconds(args, split, device, trainer.ema, trainer.autocast, args.seed)
    filling /= Distributed.count()
    source.seconds_before += filling
    Distributed.say(f"bank: {Banks.describe_bank(args, split)}, about {Reports.duration(filling)}")
    black = torch.zeros((), dtype=torch.uint8, device=device)  # expanded it takes no more memory
    source.bank = Bank(black.expand(len(split), args.num_codes, 3, split.size, split.size), device, copied=False)
    source.p_gen = P_GEN_MAX if source.p_gen is None else source.p_gen  # to measure steps with restorations
    return source


def main(args):
    """Find or train the generator, fill the bank, train, save, score; return the exit code."""
    return TrainSimCLR.main(args, make_positives, script=Path(__file__).stem, build_parser=build_parser)


if __name__ == "__main__":
    Utils.set_threads()
    Utils.run_script(main, get_args)
