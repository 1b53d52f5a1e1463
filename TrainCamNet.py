"""Train CAM-Net, the generator of restorations, by cIMLE or by the energy score; measure it.

    python TrainCamNet.py                                        # generated shapes: minutes on two cores
    python TrainCamNet.py --data cifar10 --distance squeeze      # LPIPS; its weights are downloaded once
    python TrainCamNet.py --data PATH                            # any folder of images
    python TrainCamNet.py --data Data/camnet_data/miniImagenet   # what Data/InvertDirStructure.py wrote
    torchrun --nproc_per_node=2 TrainCamNet.py --data cifar10    # they share the search, and each batch

Writes Models/RUN/: args.json, metrics.jsonl, TensorBoard events, PERIOD.pt, samples.png (rows: images; columns: x,
c(x), samples), generator.json; and single_code/, the same net trained on one code per image, to compare with.

A period is a number of training steps on some of the images. By cIMLE (conditional implicit maximum likelihood
estimation), codes of these images are searched first. The energy score needs no search.
"""

import Signals  # first: see TrainSimCLR.py

# isort: split
import argparse
import contextlib
import copy
import functools
import math
import sys
import time
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import Data
import Devices
import Distributed
import Flags
import Graphs
import Reports
import Runs
import Utils
from Backbones import count_parameters
from CamNet import IMLE, Distances, Energy, Measures
from CamNet.Codes import Purpose, make_keys, uniforms
from CamNet.Corruptions import pyramid
from CamNet.Generator import NETS, Generator
from CamNet.Measures import AT_ONCE, READ, SHOWN, HeldOut, fitness_table, unfit
from Distributed import say
from Flags import bounded
from Optimizers import learning_rate

HELD_OUT = 256  # images that the generator is measured on, at most a tenth of the data
FEW = 32  # of these images, which are measured after every period
CHUNK = 1024  # candidates in a forward pass of the search
CUDA_CHUNK = 4096  # on CUDA, where most of the time of a smaller one is launching kernels
SINGLE = "single_code"  # subfolder of a run: the same net, trained on one code per image


# ---------------------------------------------------------------------------------------------------- flags


def get_args(argv=None):
    """Parse the flags; the defaults are the generator's recipe of --data."""
    return Flags.parse(argv, build_parser)


def build_parser(data="shapes", device_type="cpu"):
    """Return the parser; the defaults are the generator's recipe in the row of `data` on the device."""
    parser = Flags.plain_parser(__doc__)
    group = parser.add_argument_group("data")
    Flags.add_data_place(group)
    flip = "flip a random half of the images horizontally, another half in every period"
    group.add_argument("--flip", action=argparse.BooleanOptionalAction, default=True, help=flip)
    add_generator_flags(parser.add_argument_group("generator"))
    add_search_flags(parser.add_argument_group("search and distance"), device_type)
    add_optimization_flags(parser.add_argument_group("optimization"))
    run = Flags.add_run_group(parser, "periods")
    sample = "periods between pictures; 0: only at the end"
    run.add_argument("--sample_iter", type=bounded(int, 0), default=5, metavar="P", help=sample)
    Flags.set_recipe(parser, Data.get_row(data).generator_recipe_for(device_type), data, device_type)
    return parser


def add_generator_flags(group):
    add = group.add_argument
    add("--net", choices=list(NETS), help="size of the generator: tiny for CPUs, small for a GPU, paper as published")
    corrupt = "corruption that the generator undoes: gray, detail<k> (removes the k x k lowest frequencies), down<k> "
    corrupt += "(1/k of the side), mask<f> (hides a fraction f); joined by +"
    add("--corrupt", metavar="SPEC", help=corrupt)
    project = "change each sample so that its corruption is exactly c(x) (detail<k>: except for clamped pixels)"
    add("--project", action=argparse.BooleanOptionalAction, default=True, help=project)
    mapping = "mapping networks; cumulative: they also see the styles of coarser levels (CHIMLE); default: the net's"
    add("--mapping", choices=["cumulative", "per_level"], help=mapping)
    level_input = "what finer levels see; both: c(x) and the coarser output; output: that output alone, as published "
    level_input += "for super-resolution; default: the net's"
    add("--level_input", choices=["both", "output"], help=level_input)
    init = "initial weights of the style layers; ref: as published, where styles have no effect at first"
    add("--init", choices=["he", "ref"], default="he", help=init)


def candidate_counts(text):
    """Check --candidates: integers of at least 1, joined by commas."""
    return ",".join(str(bounded(int, 1)(part)) for part in text.split(","))


def codes_per_level(args):
    """Return --candidates as a list."""
    return [int(count) for count in args.candidates.split(",")]


def add_search_flags(group, device_type):
    add = group.add_argument
    objective = (
        "cimle: search codes, then train on them; energy: the energy score of two random codes, without a search"
    )
    add("--objective", choices=["cimle", "energy"], default="cimle", help=objective)
    tried = "codes tried per level, coarse to fine, for example 64,32,16; further levels use the last number"
    add("--candidates", type=candidate_counts, metavar="M,..", help=tried)
    period = "images per period: their codes are searched, then trained on"
    add("--period", type=bounded(int, 1), metavar="N", help=period)
    add("--keep_previous", action="store_true", help="keep an image's previous codes if none nearer are found")
    chunk = "candidates in one forward pass of the search; bounds the memory, changes only rounding"
    usual = CUDA_CHUNK if device_type == "cuda" else CHUNK
    add("--chunk", type=bounded(int, 1), default=usual, metavar="N", help=chunk)
    reject = "skip candidates nearer to the target than D (RS-IMLE), so that the codes in training are more like those "
    reject += "in sampling; 0: skip none"
    add("--reject", type=bounded(float, 0), default=0.0, metavar="D", help=reject)
    distance = "pixels, patches, or LPIPS with this backbone; --objective energy: patches unless given, no LPIPS"
    add("--distance", choices=list(Distances.NAMES), help=distance)
    alpha = "weight of the squared pixel error that is added to LPIPS (published: 0)"
    add("--alpha", type=bounded(float, 0), default=0.1, help=alpha)
    side = "side to which smaller images are enlarged for LPIPS; 0: as they are"
    add("--lpips_side", type=bounded(int, 0), default=64, metavar="PX", help=side)
    weights = "file of torchvision's weights of the LPIPS backbone; default: they are downloaded once"
    add("--lpips_weights", type=Flags.path, metavar="FILE", help=weights)


def add_optimization_flags(group):
    add = group.add_argument
    add("--periods", type=bounded(int, 1), metavar="P", help="number of times that codes are searched, then trained on")
    add("--visits", type=bounded(int, 1), metavar="V", help="training steps on each image in a period")
    add("--bs", type=bounded(int, 1), metavar="N", help="images per step, over all processes")
    add("--lr", type=bounded(float, 0), help="peak learning rate of Adam; then a cosine to 0")
    map_lr = "learning rate of the mapping networks, which make the styles: C times --lr (published: 0.01)"
    add("--map_lr", type=bounded(float, 0), default=0.1, metavar="C", help=map_lr)
    add("--n_ramp", type=bounded(int, 0), default=100, metavar="N", help="steps of linear warm-up")
    ema = "decay of the moving average of the weights, which the samples are made with"
    add("--ema", type=bounded(float, 0, 0.99999), metavar="D", help=ema)
    seed = "seed of the initial weights, the order of the images and the codes"
    add("--seed", type=bounded(int, 0, Flags.LARGEST_SEED), default=0, help=seed)
    single = "also train the net on one code per image (m = 1), to compare with; takes as long as the training itself"
    add("--single_code", action=argparse.BooleanOptionalAction, default=True, help=single)


# ---------------------------------------------------------------------------------------------------- training


def build_generator(args, size):
    """Return the Generator of a run's flags, not yet trained; its weights follow from the seed."""
    torch.manual_seed(args.seed)
    changes = {key: getattr(args, key) for key in ("mapping", "level_input") if getattr(args, key)}
    return Generator(args.net, size, args.corrupt, args.project, init=args.init, **changes)


def searched_at_once(counts, chunk, device):
    """Return how many images are searched at once: on CUDA, as many as fill a chunk at every level."""
    if device.type == "cuda":
        return max(AT_ONCE, chunk // min(counts))
    return AT_ONCE


class Trainer:
    """What a step changes, and the step itself. All random numbers follow from the seed, the position and the image."""

    def __init__(self, args, split, generator, distance, counts, device):
        self.args = args
        self.split = split
        self.distance = distance
        self.device = device
        self.data_fingerprint = split.fingerprint()

        # the net, and the average of its weights, which samples are made with
        self.net = generator.to(device, memory_format=torch.channels_last)
        self.ema = copy.deepcopy(self.net).requires_grad_(False)

        # optimizer: the mapping networks learn at a rate of their own
        style = self.net.style_parameters()
        style_ids = {id(parameter) for parameter in style}
        others = [parameter for parameter in self.net.parameters() if id(parameter) not in style_ids]
        groups = [{"params": others, "scale": 1.0}, {"params": style, "scale": args.map_lr}]
        self.optimizer = torch.optim.Adam(groups, args.lr, fused=True)

        # images: some are held out to be measured, the others are trained on
        shuffled = torch.randperm(len(split), generator=torch.Generator().manual_seed(args.seed))
        n_held_out = min(HELD_OUT, len(split) // 10)
        self.held_out = shuffled[:n_held_out]
        self.rows = shuffled[n_held_out:]
        self.images_per_period = min(args.period, len(self.rows))
        self.bs = min(args.bs, self.images_per_period)  # images in a step, except for the last one of a visit

        # position
        self.steps_per_period = args.visits * math.ceil(self.images_per_period / args.bs)
        self.steps = args.periods * self.steps_per_period
        self.step = 0

        # search
        self.searches = args.objective == "cimle"
        self.search = IMLE.Search(counts, args.chunk, args.reject)
        self.searched_at_once = searched_at_once(counts, args.chunk, device)
        self.chosen = torch.full((len(split), len(self.net.sides)), IMLE.NONE)  # the last keys of every image

        # speed
        self.bf16 = Devices.set_precision(args.precision, device)
        self.eager_loss = IMLE.loss if self.searches else Energy.loss
        self.loss = torch.compile(self.eager_loss, dynamic=False) if args.compile else self.eager_loss
        self.graph = None
        if Graphs.can_capture(args.cuda_graph, device):
            self.graph = Graphs.GraphedLoss(self.loss_of, self.net.parameters())

        # for the log
        self.total = torch.zeros((), device=device)  # sum of the losses of the current period
        self.seconds = {"search": 0.0, "train": 0.0}

    @property
    def period(self):
        """Whole periods done."""
        return self.step // self.steps_per_period

    def autocast(self):
        """Return the context of the run's precision."""
        return Devices.autocast(self.device, self.bf16)

    def frozen(self):
        """Return the net as it is now, for the search; see `Generator.frozen`."""
        with self.autocast():
            return self.net.frozen()

    def save(self, folder):
        """Write PERIOD.pt, or PERIOD+STEP.pt inside a period; return its path."""
        file = Path(folder) / Utils.checkpoint_name(self.period, self.step % self.steps_per_period)
        Utils.save_(
            file,
            args=Utils.plain(self.args),
            config=self.net.config,
            step=self.step,
            data_n=len(self.split),
            data_fingerprint=self.data_fingerprint,
            chosen=self.chosen,
            total=self.total,
            seconds=self.seconds,
            generator=self.ema,
            net=self.net,
            optimizer=self.optimizer,
        )
        return file

    def load(self, file):
        """Continue from what `save` wrote."""
        state = Utils.load_(file)
        Utils.check_run(file, state)
        Runs.check_data(file, state, self.split, self.args.data)
        Utils.load_parts(file, state, generator=self.ema, net=self.net, optimizer=self.optimizer)
        self.step = state["step"]
        with Utils.fitting(file, "chosen, total or seconds"):
            self.chosen.copy_(state["chosen"].view_as(self.chosen))
            self.total.copy_(state["total"])
            self.seconds = {name: float(state["seconds"][name]) for name in self.seconds}

    def rows_of(self, period):
        """Return the rows of a period's images, int64 (n,): each pass over the data is in a new order."""
        rows = []
        for position in range(period * self.images_per_period, (period + 1) * self.images_per_period):
            lap, place = divmod(position, len(self.rows))
            if not rows or not place:
                rng = torch.Generator().manual_seed(Utils.derived_seed(self.args.seed, lap))
                order = self.rows[torch.randperm(len(self.rows), generator=rng)]
            rows.append(order[place])
        return torch.stack(rows)

    def images(self, rows):
        """Return images uint8 (n, 3, S, S) on the device; rows: int64 (n,)."""
        return torch.cat([images for _, images in self.split.batches(rows.split(512), self.device)])

    def next_period(self, interruption, title, quiet):
        """Return the current `Period`, with its codes if there is a search; None if a signal interrupted that."""
        args = self.args
        index = self.period

        # images, half of them mirrored, and their keys
        rows = self.rows_of(index)
        images = self.images(rows)
        if args.flip:
            is_flipped = uniforms(make_keys(args.seed, Purpose.FLIP, index, rows), 1)[:, 0] < 0.5
            images = torch.where(is_flipped.to(images.device)[:, None, None, None], images.flip(3), images)
        keys = make_keys(args.seed, Purpose.CODE, index, rows).to(self.device)
        started = time.perf_counter()
        period = Period(self, rows, images, keys)

        # resumed inside a period: its codes were searched before, by the weights at its start
        if self.step % self.steps_per_period:
            period.keys = self.chosen[rows].to(self.device)
            return period

        self.total = torch.zeros_like(self.total)
        if not self.searches:
            return period
        if not self.search_codes(period, keys, interruption, title, quiet):
            return None
        self.chosen[rows] = period.keys.cpu()
        self.seconds["search"] += time.perf_counter() - started
        return period

    def search_codes(self, period, keys, interruption, title, quiet):
        """Search the codes of a period; return whether no signal interrupted it. The processes share its parts.

        The result does not depend on how many they are: the parts, and so the shapes of all batches, are the same.
        """
        parts = torch.arange(len(keys), device=self.device).split(self.searched_at_once)
        rounds = math.ceil(len(parts) / Distributed.count())
        started = time.perf_counter()
        net = self.frozen()

        def search(own):
            for part in own:
                yield period.search(self, net, part, keys)

        found = []
        results = Distributed.spread(parts, search, to_all=True)
        for result in tqdm(results, f"{title}: search", len(parts), leave=False, disable=quiet):
            found.append(IMLE.Found(*result))
            seconds = (time.perf_counter() - started) * rounds
            if self.step == 0 and len(found) == 1 and seconds > 5 and Distributed.is_first():
                tqdm.write(f"the search of a period takes about {Reports.duration(seconds)}")
            if Distributed.any_process(interruption.signal is not None):
                return False
        period.keys = torch.cat([each.keys for each in found]).to(self.device)
        period.distances = torch.cat([each.distances for each in found]).mean(dim=0).tolist()
        return True

    def update(self, period, batch):
        """Take one step on these images of the period, indices (b,); return the loss without waiting for the device."""
        # loss and gradients of this process's share, then those of the batch
        own = Distributed.share(batch)
        self.optimizer.zero_grad()
        loss = self.backward(period, own, is_full=len(batch) == self.bs) if len(own) else self.total.new_zeros(())
        loss = Distributed.reduce_gradients(loss, self.net.parameters(), len(own) / len(batch))

        # a step of the optimizer
        lr = learning_rate(self.step, self.steps, min(self.args.n_ramp, self.steps // 2), self.args.lr)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        self.optimizer.step()
        self.step += 1
        self.total += loss

        # the average of the weights; early on it forgets faster, otherwise the initial weights would dominate
        decay = min(self.args.ema, self.step / (self.step + 10))
        new = [parameter.detach() for parameter in self.net.parameters()]
        torch._foreach_lerp_(list(self.ema.parameters()), new, 1 - decay)
        return loss

    def backward(self, period, batch, is_full):
        """Set the gradients of these images of the period, indices (b,); return their loss, detached.

        is_full: whether they are of a batch of the usual size. A shorter last one is neither compiled nor captured,
        since these are for one shape.
        """
        target_features = period.target_features_of(batch)
        if self.searches:
            keys = period.keys[batch]
        else:
            keys = Energy.make_pairs(self.args.seed, self.step, period.rows[batch])
        inputs = (period.condition[batch], target_features, keys)
        if self.graph and is_full:
            (loss,) = self.graph(*inputs)
        else:
            (loss,) = self.loss_of(*inputs, is_full)
            loss.backward()
        return loss.detach()

    def loss_of(self, condition, target_features, keys, is_full=True):
        """Return (loss,). keys: int64 (b, L), those found by the search, or (2 b,), see `Energy.make_pairs`.

        condition, target_features: see `IMLE.loss`; is_full: as in `backward`.
        """
        loss = self.loss if is_full else self.eager_loss
        with self.autocast():
            # codes are made outside of what is compiled: Triton refuses their 64-bit constants
            return (loss(self.net, self.distance, condition, target_features, self.net.codes(keys)),)

    def batches(self, count):
        """Yield the images of each remaining step of a period of `count` images, as indices (b,) into it."""
        steps_per_visit = math.ceil(count / self.args.bs)
        done = self.step % self.steps_per_period
        for index in range(done, self.steps_per_period):
            visit, place = divmod(index, steps_per_visit)
            seed = Utils.derived_seed(self.args.seed, 1009 * self.period + visit)
            order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
            yield order[place * self.args.bs : (place + 1) * self.args.bs].to(self.device)

    def held_out_images(self, most=HELD_OUT):
        """Return the first of the images that were held out, as `HeldOut`."""
        rows = self.held_out[:most]
        return HeldOut(rows, self.images(rows), self.net.corruption, self.distance, self.args.seed, self.autocast)


class Period:
    """The images of a period, and what is computed once for them. keys: their chosen codes, int64 (n, L), or None."""

    def __init__(self, trainer, rows, images, keys):
        self.rows = None if trainer.searches else rows.to(trainer.device)  # of the train split, for `Energy.make_pairs`
        self.keys = None
        self.distances = None  # of the chosen codes: mean over the images, of each level
        self.condition = trainer.net.corruption(images, keys)
        self.target_features = []  # for each level: a list of tensors (n, ...), see `Distances`
        with torch.no_grad(), trainer.autocast():
            for targets in pyramid(images, trainer.net.sides):
                parts = [trainer.distance.features(part) for part in targets.split(AT_ONCE)]
                self.target_features.append([torch.cat(each) for each in zip(*parts)])
        self.previous = trainer.chosen[rows].to(trainer.device) if trainer.args.keep_previous else None

    def target_features_of(self, batch):
        """Return the features of the targets of some images of the period, indices (b,)."""
        return [[each[batch] for each in features] for features in self.target_features]

    def search(self, trainer, net, batch, keys):
        """Return `IMLE.Found` for some images of the period, indices (b,); net: `Trainer.frozen`."""
        previous = None if self.previous is None else self.previous[batch]
        target_features = self.target_features_of(batch)
        with trainer.autocast():
            return trainer.search(net, trainer.distance, self.condition[batch], target_features, keys[batch], previous)


def train(trainer, run, interruption, title):
    """Train to the last period or to an interruption; return whether it was interrupted."""
    pace = Reports.Pace(trainer.step, trainer.steps, trainer.device)
    first_step = trainer.step
    began = time.perf_counter()
    while trainer.step < trainer.steps:
        # search
        started = time.perf_counter()
        bar = f"{title} {trainer.period + 1}/{trainer.args.periods}"
        period = trainer.next_period(interruption, bar, run.quiet)
        if period is None:
            return True
        log_search(trainer, run, period)
        searched = time.perf_counter()

        # train
        stopped = train_period(trainer, run, interruption, period, pace, title, searched - started)

        # weights that are not finite must not be saved
        finite = Utils.all_finite(trainer.ema.parameters())  # it has every NaN of the weights
        mean = check_loss(trainer, run, trainer.total / trainer.steps_per_period if finite else float("nan"))
        trainer.seconds["train"] += time.perf_counter() - searched
        if stopped and trainer.step % trainer.steps_per_period:
            return True
        now = time.perf_counter()
        left = (now - began) / (trainer.step - first_step) * (trainer.steps - trainer.step)
        times = Reports.times(now - started, left)
        Distributed.first_rank_only(partial(finish_period, trainer, run, title, mean, times))
        if stopped and trainer.step < trainer.steps:
            return True
    return False


def log_search(trainer, run, period):
    """Log the distances of the codes that a period's search has found, if there was one."""
    if period.distances:
        distances = {f"search_level{level + 1}": value for level, value in enumerate(period.distances)}
        # logged for the next step: a run that resumes here searches and logs it again
        run.log(trainer.step + 1, trainer.period, **distances)


def train_period(trainer, run, interruption, period, pace, title, search_seconds):
    """Take the remaining steps of a period; return whether they were interrupted.

    search_seconds: what the search of a period takes.
    """
    args = trainer.args
    number = trainer.period + 1
    logged_at = time.perf_counter()
    n_images = 0  # since then
    batches = list(trainer.batches(len(period.condition)))
    for batch in tqdm(batches, f"{title} {number}/{args.periods}: train", leave=False, disable=run.quiet):
        loss = trainer.update(period, batch)
        n_images += len(batch)
        if pace.tick(trainer.step) and run.writes:
            show_estimate(trainer, title, number, pace.left(trainer.step) + (args.periods - number) * search_seconds)
        if trainer.step % args.log_iter == 0 or trainer.step == 1:
            value = check_loss(trainer, run, loss)
            lr = trainer.optimizer.param_groups[0]["lr"]
            speed = n_images / (time.perf_counter() - logged_at)
            run.log(trainer.step, trainer.period, loss=value, lr=lr, views_per_second=round(speed, 1))
            logged_at = time.perf_counter()
            n_images = 0
        if Distributed.any_process(interruption.signal is not None):
            return True
    return False


def show_estimate(trainer, title, number, seconds):
    """Print how long the periods from this one on take, and the memory."""
    last = trainer.args.periods
    periods = f"{number} to {last}" if number < last else str(number)
    memory = Devices.peak_memory(trainer.device) / 2**30
    tqdm.write(f"{title} {periods}: about {Reports.duration(seconds)} in all; memory {memory:.1f} GiB")


def check_loss(trainer, run, loss):
    """Return the loss as a float; waits for the device. Raises UserError if it is not finite."""
    loss = float(loss)
    if not math.isfinite(loss):
        args = trainer.args
        place = f"period {math.ceil(trainer.step / trainer.steps_per_period)}, step {trainer.step}"
        causes = f"--lr {args.lr:g} too high, --n_ramp {args.n_ramp} too short"
        raise run.failure(f"{Runs.NOT_FINITE} in {place}", causes)
    return loss


def finish_period(trainer, run, title, loss, times):
    """Measure on a few images; save and draw samples if this period is one for it; print its line.

    times: what it took and what is left, in words.
    """
    args = trainer.args
    period = trainer.period
    is_last = trainer.step == trainer.steps
    few = trainer.held_out_images(FEW)
    values = {"period_loss": loss} | few.quality(few.samples(trainer.ema, 4), (1, 4))
    run.log(trainer.step, period, **values)
    if is_last:
        run.show_flags(Flags.hyper_parameters(args))
    if is_last or (args.sample_iter and period % args.sample_iter == 0):
        columns = ["x", "c(x)"]
        columns += [f"code {index + 1}" for index in range(SHOWN)]
        run.picture("samples", Reports.captioned(Reports.grid(few.shown(trainer.ema)), columns), period)
    if is_last or (args.save_iter and period % args.save_iter == 0):
        trainer.save(run.folder)  # last: what comes after a checkpoint is not made again after a kill
    text = "  ".join(f"{name.removeprefix('period_')} {value:.4f}" for name, value in values.items())
    tqdm.write(f"{title} {period}/{args.periods}  {times}  {text}")


# ---------------------------------------------------------------------------------------------------- script


SEARCHED = ("candidates", "keep_previous", "chunk", "reject", "single_code")  # flags of --objective cimle alone


def adjust_to_objective(args):
    """Adjust flags that were not given to --objective energy. Raises UserError if given ones contradict it."""
    if args.objective != "energy":
        return
    passed = Utils.names_a_file(args.resume)  # the flags are those of a run that passed this check
    for name in SEARCHED:
        if not passed and name in args.given and getattr(args, name) is not False:
            raise Utils.UserError(f"--{name}: --objective energy searches no codes: leave out one of them")
    args.single_code = False
    if "distance" not in args.given:
        args.distance = "patches"
    if args.distance in Distances.LEARNED:
        names = " or ".join(name for name in Distances.NAMES if name not in Distances.LEARNED)
        raise Utils.UserError(
            f"--distance {args.distance}: --objective energy learns only the mean by this distance, since it is a "
            f"squared one: choose {names}"
        )


def note_unused(args):
    """Print which given flags change nothing."""
    if args.distance not in Distances.LEARNED:
        Flags.note_unused(args, ["alpha", "lpips_side", "lpips_weights"], f"with --distance {args.distance}")


def adjust_distance(args):
    """Use the pixel distance if LPIPS would have to download its weights and the user did not ask for LPIPS."""
    if args.distance not in Distances.LEARNED or "distance" in args.given or args.lpips_weights:
        return
    if Distributed.any_process(not Distances.is_at_hand(args.distance)):
        say(
            f"--distance {args.distance} becomes pixels: the weights of {args.distance} are not on this machine "
            f"(--distance {args.distance} downloads them)"
        )
        args.distance = "pixels"


def build(args, device):
    """Return (train split, untrained generator, distance). Raises UserError if they do not fit together."""
    row = Data.get_row(args.data, args.size)
    Devices.check_room(4 * 3 * row.size**2, device, f"an image of --size {row.size}")
    counts = codes_per_level(args)
    images = searched_at_once(counts, args.chunk, device)
    keys = 4 * 8 * images * max(counts)  # int64, and what they are made from
    Devices.check_room(keys, device, f"--candidates {args.candidates}: the codes of {images} images")
    with Utils.as_user_error():
        generator = build_generator(args, row.size)  # before the images are read, which can take long
        if args.distance in Distances.LEARNED:
            Distances.check_side(args.distance, args.lpips_side, generator.sides[0])

        def load():
            return Distances.build_distance(args.distance, args.lpips_weights, args.lpips_side, args.alpha)

        distance = Distributed.first_rank_first(load).to(device)  # it can be a download
    split = Flags.train_split_for(args, device)
    if len(split) < 10:
        raise Utils.UserError(f"--data {args.data}: {len(split)} images: a generator needs 10 at the very least")
    return split, generator, distance


def measure(trainer, single):
    """Return the content of generator.json; single: the Trainer of the net that learned from one code, or None."""
    args = trainer.args
    held = trainer.held_out_images()

    # what the generator is worth, next to two draws of the color jitter in SimCLR's recipe for the data
    views = Data.get_ssl_data_augs(args.data, size=args.size)
    jitter = replace(views, crop_scale=None, flip_p=0.0, gray_p=0.0, blur_p=0.0)
    rng = torch.Generator().manual_seed(args.seed)
    jittered = torch.stack([jitter(held.images, rng) for _ in range(2)], dim=1)
    result = held.measure(trainer.ema, single and single.ema, jittered)

    # time and memory
    n_searched = trainer.period * trainer.images_per_period
    n_trained = n_searched * args.visits
    result["seconds_search_per_1000"] = 1000 * trainer.seconds["search"] / n_searched
    result["seconds_train_per_1000"] = 1000 * trainer.seconds["train"] / n_trained
    result["peak_memory_bytes"] = Devices.peak_memory(trainer.device)
    result["data_fingerprint"] = trainer.data_fingerprint
    result["distance"] = args.distance
    result["corrupt"] = trainer.net.corruption.spec
    result["fit"] = not unfit(result)
    return result


def find_state(args, folder, is_final):
    """Return the checkpoints to continue from, of the run and of its net of one code, and whether all is complete.

    Shows the measures of a complete run; is_final: see `main`. Raises UserError if the run cannot continue.
    """
    if folder.name == SINGLE:
        raise Utils.UserError(
            f"--resume {args.resume}: the net of one code is resumed together with its run: give a checkpoint of "
            f"{folder.parent}"
        )
    checkpoint = Runs.checkpoint_for(args, folder)
    if is_complete(args, folder, checkpoint):
        print(f"this run is complete: measures from {Utils.shown(folder / 'generator.json')}")
        show_result(folder, Utils.read_json(folder / "generator.json"), is_final)
        return checkpoint, None, True
    return checkpoint, Utils.newest_checkpoint(folder / SINGLE) if args.resume else None, False


def is_complete(args, folder, checkpoint):
    """Return whether the training of a run and its measures are complete."""
    is_trained = checkpoint is not None and checkpoint.stem == str(args.periods)
    return is_trained and Utils.read_json(folder / "generator.json", (*READ, "fit"), fitness_table) is not None


def finish_run(folder, trainer, single, is_final):
    """Measure the generator; print and write its measures. single: see `measure`; is_final: see `main`."""
    print("measuring", flush=True)
    with Signals.heartbeat("measuring"):
        result = measure(trainer, single)
    show_result(folder, result, is_final)  # before it is written: the disk may be full
    Utils.write_json(folder / "generator.json", result)


def show_result(folder, result, is_final):
    """Print the measures of a generator; if `is_final`, warn if it is not fit for positives, and say where it is."""
    result = {name: Utils.shown(value) if isinstance(value, str) else value for name, value in result.items()}
    print(fitness_table(result))
    if is_final:
        warning = Measures.warning(result)
        if warning:
            print(warning)
        Runs.farewell(folder)


@contextlib.contextmanager
def warnings_in_one_line():
    """Print the warning that memory ran out in the search without file, line and source."""
    with warnings.catch_warnings():
        usual = warnings.showwarning

        def show(message, category, filename, *rest):
            if issubclass(category, IMLE.OutOfMemoryWarning):
                tqdm.write(f"warning: {message}", file=sys.stderr)
            else:
                usual(message, category, filename, *rest)

        warnings.showwarning = show
        yield


def describe(args, trainer, folder):
    """Print the settings of the run, with the values that are used."""
    net = trainer.net
    precision = Devices.precision_name(args.precision, trainer.bf16, trainer.device)
    sides = " -> ".join(str(side) for side in (net.sides[0] // 2, *net.sides))
    searched = ",".join(str(trainer.search.count(level)) for level in range(len(net.sides)))
    images = f"codes of {trainer.images_per_period} images searched, {searched} on each level"
    if not trainer.searches:
        images = f"{trainer.images_per_period} images, two random codes of each in a step"
    data = Utils.shown(args.data)
    shape = f"{len(trainer.rows)} images of {trainer.split.size} px, {len(trainer.held_out)} more held out to measure"
    say(f"{data}: {shape}, on {trainer.device} in {precision}")
    say(f"{args.net} generator: {count_parameters(net):,} parameters, {sides} px, undoes {net.corruption.spec}")
    periods, steps = Reports.plural(args.periods, "period"), Reports.plural(trainer.steps_per_period, "step")
    say(f"{periods}: {images}, then {steps} of {trainer.bs} images")
    Runs.announce(folder, trainer.step, args.dry_run)


def prepare(args):
    """Adjust flags that were not given; return the device and the run folder. Raises UserError on what does not fit."""
    *_, device = Distributed.start(Devices.pick_device(args.device))
    torch.backends.cudnn.deterministic = args.deterministic
    Flags.check_models_dir(args)
    row = Data.get_row(args.data, args.size)
    args.image_size = row.size
    adjust_to_objective(args)
    adjust_distance(args)
    note_unused(args)
    usual = Flags.hyper_parameters(build_parser(args.data, device.type).parse_args([]))

    @functools.cache
    def fingerprint():
        return Flags.train_split_for(args, device).fingerprint()

    folder = Runs.find_run(args, Path(__file__).stem, row.name, Flags.hyper_parameters(args), usual, fingerprint)
    return device, folder


def main(args, is_final=True):
    """Train, train the same net on one code, measure; return 0. A signal ends the program after saving.

    is_final: False if another script goes on, which itself says where the generator is and whether it is fit.
    """
    device, folder = prepare(args)
    if args.dry_run:
        try_out(args, device, folder)
        return 0
    with Runs.claimed(folder), warnings_in_one_line():
        state = Distributed.first_rank_only(lambda: find_state(args, folder, is_final))
        checkpoint, single_checkpoint, complete = state
        if complete:
            return 0

        # images, and a trainer for each of the two trainings
        split, generator, distance = build(args, device)
        single = None
        if args.single_code:
            single = Trainer(args, split, copy.deepcopy(generator), distance, [1], device)
        trainer = Trainer(args, split, generator, distance, codes_per_level(args), device)
        stages = [(trainer, folder, checkpoint, "period")]
        if single:
            stages.append((single, folder / SINGLE, single_checkpoint, "one code, period"))

        # train
        for stage, stage_folder, stage_checkpoint, title in stages:
            if stage_checkpoint:
                stage.load(stage_checkpoint)
            if stage is trainer:
                describe(args, trainer, folder)
            run_stage(stage, args, stage_folder, title)

        Distributed.first_rank_only(lambda: finish_run(folder, trainer, single, is_final))
        return 0


def try_out(args, device, folder):
    """Print what the run would do, and its time and memory, from part of a search and a few steps; write nothing.

    Return the trainer, and the seconds that the run would take without a net of one code.
    """
    split, generator, distance = build(args, device)
    trainer = Trainer(args, split, generator, distance, codes_per_level(args), device)
    describe(args, trainer, folder)
    say(f"measuring {'part of a search and ' if trainer.searches else ''}a few steps")
    rows = trainer.rows_of(0)[: max(trainer.searched_at_once, trainer.bs)]
    images = trainer.images(rows)
    keys = make_keys(args.seed, Purpose.CODE, 0, rows).to(trainer.device)
    period = Period(trainer, rows, images, keys)
    everything = torch.arange(len(rows), device=trainer.device)

    search = 0.0
    if trainer.searches:
        searched = everything[: trainer.searched_at_once]
        if device.type == "cuda":  # the first search loads the kernels
            period.search(trainer, trainer.frozen(), searched, keys).keys.cpu()
        started = time.perf_counter()
        found = period.search(trainer, trainer.frozen(), searched, keys).keys
        found.cpu()  # waits for the device
        parts = trainer.images_per_period / len(searched)
        search = (time.perf_counter() - started) * parts / Distributed.count()
        # a step takes as long by other images' codes
        period.keys = found.repeat(math.ceil(len(rows) / len(found)), 1)[: len(rows)]

    pace = Reports.Pace(0, trainer.steps, trainer.device)
    while not pace.tick(trainer.step):
        trainer.update(period, everything[: trainer.bs]).item()
    seconds = args.periods * search + trainer.steps * pace.seconds
    memory = Devices.peak_memory(trainer.device) / 2**30
    twice = ", and less than that for the net of one code" if args.single_code else ""
    say(f"generator: about {Reports.duration(seconds)}{twice}; memory {memory:.1f} GiB")
    say("dry run of the generator: no run folder was made")
    return trainer, seconds


def run_stage(trainer, args, folder, title):
    """Train to the last period. After a signal: save, and end the program."""
    resumed_step = trainer.step if args.resume else None
    run = Runs.Run(folder, args, trainer.device, resumed_step, writes=Distributed.is_first())
    with contextlib.closing(run), Signals.Deferred() as interruption:
        stopped = train(trainer, run, interruption, title)
        if stopped:
            Distributed.first_rank_only(lambda: run.interrupted(trainer.save(folder)))
        elif Distributed.any_process(interruption.signal is not None):
            stopped = True
            say("interrupted after the last period: all of it is saved; --resume auto continues")
        if stopped:
            Distributed.stop()
            raise SystemExit(interruption.exit_code)


if __name__ == "__main__":
    Utils.set_threads()
    Utils.run_script(main, get_args)
