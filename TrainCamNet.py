"""Train CAM-Net, the generator of positives, by conditional implicit maximum likelihood; and measure it.

    python TrainCamNet.py                                        # generated shapes: minutes on two cores
    python TrainCamNet.py --data cifar10 --net small             # LPIPS; --data PATH takes any folder of images
    python TrainCamNet.py --data Data/camnet_data/miniImagenet   # what Data/InvertDirStructure.py wrote

Writes Models/RUN/: args.json, metrics.jsonl, TensorBoard events, PERIOD.pt, samples.png (rows: images; columns: x,
c(x), samples), generator.json; and single_code/, the training of the net that learns from one code. A period is: search
the best codes of some images, then train on them.
"""

import contextlib
import copy
import json
import sys
import time
import warnings
from pathlib import Path

import torch
from tqdm import tqdm

import Data
import Distributed
import Fitness
import Flags
import Utils
from Backbones import count_parameters
from CamNet import IMLE, Generator
from CamNet.Codes import make_keys, uniforms
from CamNet.Corruptions import pyramid
from CamNet.Distances import build_distance, check_side
from Optimizers import learning_rate

FEW = 32  # held-out images that are looked at after every period
SINGLE = "single_code"  # the folder, in a run's, of the net that learns from one code
FLIP, CODE = range(2)  # what random numbers are for: a part of their keys


def get_args(argv=None):
    """Parse the flags; see Flags.py for what they are."""
    return Flags.parse(argv, lambda data: Flags.camnet_parser(__doc__, data))


def build_generator(args, size):
    """Return the Generator of a run's flags, as it was before training: the seed decides."""
    torch.manual_seed(args.seed)
    changes = {key: getattr(args, key) for key in ("mapping", "level_input") if getattr(args, key)}
    return Generator(args.net, size, args.corrupt, args.project, init=args.init, **changes)


class Trainer:
    """All that a step changes, and how. Every random number follows from the seed, the period and the image."""

    def __init__(self, args, split, generator, distance, counts, device):
        self.args, self.split, self.distance, self.device = args, split, distance, device
        self.net = generator.to(device, memory_format=torch.channels_last)
        self.ema = copy.deepcopy(self.net).requires_grad_(False)  # the average of the weights: what is sampled
        style = self.net.style_parameters()
        known = {id(parameter) for parameter in style}
        others = [parameter for parameter in self.net.parameters() if id(parameter) not in known]
        groups = [{"params": others, "scale": 1.0}, {"params": style, "scale": args.map_lr}]
        self.optimizer = torch.optim.Adam(groups, args.lr, fused=True)
        self.search = IMLE.Search(counts, args.chunk, args.reject)
        shuffled = torch.randperm(len(split), generator=torch.Generator().manual_seed(args.seed))
        held_out = min(Fitness.HELD_OUT, len(split) // 10)
        self.held_out, self.rows = shuffled[:held_out], shuffled[held_out:]
        self.visited = min(args.period, len(self.rows))  # images in a period
        self.steps_per_period = args.visits * -(-self.visited // args.bs)
        self.steps, self.step = args.periods * self.steps_per_period, 0
        self.bf16 = Utils.set_precision(args.precision, device)
        self.chosen = torch.full((len(split), len(self.net.sides)), IMLE.NONE)  # the last keys of every image
        self.total = torch.zeros((), device=device)  # of the losses of the period at hand
        self.seconds = {"search": 0.0, "train": 0.0}

    @property
    def period(self):
        """Whole periods done."""
        return self.step // self.steps_per_period

    def autocast(self):
        """Return the context of the run's precision."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def save(self, folder):
        """Write PERIOD.pt, or PERIOD+STEP.pt inside a period; return its path."""
        inside = self.step % self.steps_per_period
        file = Path(folder) / (f"{self.period}+{inside}.pt" if inside else f"{self.period}.pt")
        state = {"step": self.step, "chosen": self.chosen, "seconds": self.seconds, "config": self.net.config}
        state["total"] = self.total
        parts = {"generator": self.ema, "net": self.net, "optimizer": self.optimizer}
        Utils.save_(file, args=Utils.plain(self.args), **state, **parts)
        return file

    def load(self, file):
        """Go on from what `save` wrote."""
        state = Utils.load_(file, generator=self.ema, net=self.net, optimizer=self.optimizer)
        before, now = len(state["chosen"]), len(self.chosen)
        if before != now:  # other images would be held out than were
            raise Utils.UserError(
                f"{file}: --data {self.args.data} had {before} images and has {now}: make it what it was, or begin "
                "another run with --suffix NAME"
            )
        self.step, self.chosen, self.seconds = state["step"], state["chosen"], state["seconds"]
        self.total = state["total"].to(self.device)

    def is_finite(self):
        """Return whether all weights are finite, and with them their averages; waits for the device."""
        return bool(torch.stack([weights.isfinite().all() for weights in self.ema.parameters()]).all())

    def rows_of(self, period):
        """Return the images of a period, int64 (n,): the rows one after the other, in a new order each time round."""
        rows = []
        for position in range(period * self.visited, (period + 1) * self.visited):
            lap, place = divmod(position, len(self.rows))
            if not rows or not place:
                generator = torch.Generator().manual_seed(1_000_003 * self.args.seed + lap)
                order = self.rows[torch.randperm(len(self.rows), generator=generator)]
            rows.append(order[place])
        return torch.stack(rows)

    def images(self, rows):
        """Return (rows, their images uint8 (n, 3, S, S) on the device); --skip_bad can leave some out."""
        found = list(self.split.batches(rows.split(512), self.device))
        if not found:
            raise Utils.UserError(f"--data {self.args.data}: too many bad images to train on: repair or remove them")
        return torch.cat([rows for rows, _ in found]), torch.cat([images for _, images in found])

    def prepare(self, interruption, title, quiet):
        """Return the `Period` at hand, its codes searched, or None if interrupted before they all were."""
        args, number = self.args, self.period
        rows, images = self.images(self.rows_of(number))
        if args.flip:
            flipped = uniforms(make_keys(args.seed, FLIP, number, rows), 1)[:, 0] < 0.5
            images = torch.where(flipped.to(images.device)[:, None, None, None], images.flip(3), images)
        keys = make_keys(args.seed, CODE, number, rows).to(self.device)
        started = time.perf_counter()
        period = Period(self, rows, images, keys)
        if self.step % self.steps_per_period:  # resumed inside: the codes were chosen by the weights of its start
            period.keys = self.chosen[rows].to(self.device)
            return period
        parts, found = torch.arange(len(rows), device=self.device).split(Fitness.AT_ONCE), []
        for part in tqdm(parts, f"{title}: search", leave=False, disable=quiet):
            found.append(period.search(self, part, keys))
            if interruption.signal is not None:
                return None
        period.keys, distances = (torch.cat(each) for each in zip(*found))
        self.chosen[rows] = period.keys.cpu()
        self.total = torch.zeros_like(self.total)
        period.distances = distances.mean(dim=0).tolist()
        self.seconds["search"] += time.perf_counter() - started
        return period

    def update(self, period, part):
        """Take one step on these images of the period; return the loss without waiting for the device."""
        with self.autocast():
            wanted = [[each[part] for each in features] for features in period.wanted]
            loss = IMLE.loss(self.net, self.distance, period.condition[part], wanted, period.keys[part])
        self.optimizer.zero_grad()
        loss.backward()
        lr = learning_rate(self.step, self.steps, min(self.args.n_ramp, self.steps // 2), self.args.lr)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        self.optimizer.step()
        self.step += 1
        self.total += loss.detach()
        decay = min(self.args.ema, self.step / (self.step + 10))  # an average of few weights is mostly the first ones
        new = [parameter.detach() for parameter in self.net.parameters()]
        torch._foreach_lerp_(list(self.ema.parameters()), new, 1 - decay)
        return loss.detach()

    def parts(self, count):
        """Yield the images, as indices (b,) into the period, of each step that is left of it."""
        per_lap, done = -(-count // self.args.bs), self.step % self.steps_per_period
        for index in range(done, self.steps_per_period):
            lap, place = divmod(index, per_lap)
            seed = 1_000_003 * self.args.seed + 1009 * self.period + lap
            order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
            yield order[place * self.args.bs : (place + 1) * self.args.bs].to(self.device)


class Period:
    """Some images with all that is the same while they are trained on. keys: their chosen codes, int64 (n, L)."""

    def __init__(self, trainer, rows, images, keys):
        self.keys, self.distances = None, None  # distances: mean over the images, of each level
        self.condition = trainer.net.corruption(images, keys)
        self.wanted = []
        with torch.no_grad(), trainer.autocast():
            for targets in pyramid(images, trainer.net.sides):
                parts = [trainer.distance.features(part) for part in targets.split(Fitness.AT_ONCE)]
                self.wanted.append([torch.cat(each) for each in zip(*parts)])
        self.previous = trainer.chosen[rows].to(trainer.device) if trainer.args.keep_previous else None

    def search(self, trainer, part, keys):
        """Return `IMLE.Found` for these images."""
        previous = None if self.previous is None else self.previous[part]
        wanted = [[each[part] for each in features] for features in self.wanted]
        with trainer.autocast():
            return trainer.search(trainer.net, trainer.distance, self.condition[part], wanted, keys[part], previous)


def train(trainer, run, interruption, title):
    """Train to the last period or to an interruption; return whether it was interrupted."""
    args = trainer.args
    while trainer.step < trainer.steps:
        started, bar = time.perf_counter(), f"{title} {trainer.period + 1}/{args.periods}"
        period = trainer.prepare(interruption, bar, run.quiet)
        if period is None:
            return True
        if period.distances:
            log = {f"search_level{level + 1}": value for level, value in enumerate(period.distances)}
            # under the step that it is for: a resumed run makes and logs both anew
            run.log(trainer.step + 1, trainer.period, **log)
        searched = logged = time.perf_counter()
        shown = trainer.step
        parts = list(trainer.parts(len(period.condition)))
        for part in tqdm(parts, f"{bar}: train", leave=False, disable=run.quiet):
            loss = trainer.update(period, part)
            if trainer.step % args.log_iter == 0:
                lr, value = trainer.optimizer.param_groups[0]["lr"], check_loss(trainer, run, loss)
                speed = (trainer.step - shown) * len(part) / (time.perf_counter() - logged)
                run.log(trainer.step, trainer.period, loss=value, lr=lr, views_per_second=round(speed, 1))
                logged, shown = time.perf_counter(), trainer.step
            if interruption.signal is not None:
                break
        mean = trainer.total / trainer.steps_per_period if trainer.is_finite() else float("nan")
        mean = check_loss(trainer, run, mean)  # before anything is saved
        trainer.seconds["train"] += time.perf_counter() - searched
        if interruption.signal is not None and trainer.step % trainer.steps_per_period:
            return True
        finish_period(trainer, run, title, mean, time.perf_counter() - started)
    return False


def check_loss(trainer, run, loss):
    """Return the loss as a number; waits for the device. UserError if it is not finite: the run learns nothing more."""
    loss, args = float(loss), trainer.args
    if not abs(loss) < float("inf"):
        raise Utils.UserError(
            f"loss or weights are not finite in period {-(-trainer.step // trainer.steps_per_period)}: likely causes: "
            f"--lr {args.lr:g} too high, --n_ramp {args.n_ramp} too short; last good checkpoint: "
            f"{Utils.newest_checkpoint(run.folder) or 'none'}"
        )
    return loss


def finish_period(trainer, run, title, loss, seconds):
    """Measure on a few images, save and show where it is due, and print the period's line."""
    args, period, last = trainer.args, trainer.period, trainer.step == trainer.steps
    few = Fitness.Held(trainer, FEW)
    numbers = {"period_loss": loss, **few.quality(few.samples(trainer, 4), (1, 4))}
    run.log(trainer.step, period, **numbers)
    if last or (args.save_iter and period % args.save_iter == 0):
        trainer.save(run.folder)
    if last or (args.sample_iter and period % args.sample_iter == 0):
        run.picture("samples", few.picture(trainer), period)
    numbers = "  ".join(f"{name.removeprefix('period_')} {value:.4f}" for name, value in numbers.items())
    tqdm.write(f"{title} {period}/{args.periods}  {seconds:.0f} s  {numbers}")


def resolve(args, device):
    """Return (train split, generator as it begins, distance), all of which fit together. Raises UserError."""
    row = Data.get_row(args.data, args.size)
    try:
        generator = build_generator(args, row.size)  # before the images are read, which can take long
        if args.distance != "pixels":
            check_side(args.distance, args.lpips_side, generator.sides[0])
        distance = build_distance(args.distance, args.lpips_weights, args.lpips_side, args.alpha).to(device)
    except ValueError as error:
        raise Utils.UserError(str(error)) from error
    split = Flags.train_split_for(args, device)
    if len(split) < 10:
        raise Utils.UserError(f"--data {args.data}: {len(split)} images: a generator needs 10 at the very least")
    return split, generator, distance


def finish_run(trainer, single, folder):
    """Measure and write generator.json."""
    text = json.dumps(Fitness.measure(trainer, single), indent=1) + "\n"
    Utils.write_atomically(folder / "generator.json", lambda scratch: scratch.write_text(text))


def is_complete(args, folder, checkpoint):
    """Return whether nothing is left to do for a run. Raises UserError if its checkpoint is not one to go on from."""
    if folder.name == SINGLE:
        raise Utils.UserError(
            f"--resume {args.resume}: the net that learns from one code goes on with its run: give a checkpoint of "
            f"{folder.parent}"
        )
    return checkpoint is not None and checkpoint.stem == str(args.periods) and (folder / "generator.json").exists()


def show_result(folder):
    """Print generator.json and where all is, and warn of a generator that is not fit for positives."""
    result = json.loads((folder / "generator.json").read_text())
    print(Fitness.table(result))
    if reason := Fitness.unfit(result):
        print(f"warning: this generator is not fit for positives: {reason}")
    print(f"checkpoints, pictures, logs: {folder}\nTensorBoard: tensorboard --logdir {folder.parent}")


@contextlib.contextmanager
def warnings_in_one_line():
    """Print what this file is warned of, as of memory that runs out in the search, without file, line and source."""
    with warnings.catch_warnings():
        usual = warnings.showwarning

        def show(message, category, filename, *rest):
            if Path(filename) == Path(__file__):
                tqdm.write(f"warning: {message}", file=sys.stderr)
            else:
                usual(message, category, filename, *rest)

        warnings.showwarning = show
        yield


def describe(args, trainer, folder):
    """Print what is about to happen, in the values that count."""
    net, precision = trainer.net, "bf16" if trainer.bf16 else args.precision.replace("auto", "fp32")
    print(f"{args.data}: {len(trainer.rows)} images of {trainer.split.size} px, on {trainer.device} in {precision}")
    sides = " -> ".join(str(side) for side in (net.sides[0] // 2, *net.sides))
    print(f"{args.net} generator: {count_parameters(net):,} weights, {sides} px, undoes {net.corruption.spec}")
    searched = ",".join(str(trainer.search.count(level)) for level in range(len(net.sides)))
    images = f"codes of {trainer.visited} images searched, {searched} on each level"
    print(f"{args.periods} periods: {images}, then {trainer.steps_per_period} steps of {args.bs} images")
    print(f"{f'going on at step {trainer.step}' if trainer.step else 'starting'}: {folder}", flush=True)


def run_stage(trainer, run, interruption, title):
    """Train; return whether it was interrupted, after saving and saying so."""
    stopped = train(trainer, run, interruption, title)
    if stopped:
        print(f"interrupted: saved {trainer.save(run.folder)}; --resume auto goes on", flush=True)
    return stopped


def main(args):
    """Train, train again on one code, measure; return the exit code."""
    device = Utils.pick_device(args.device)
    folder, checkpoint = Flags.find_run(args, Data.get_row(args.data, args.size), Path(__file__).stem)
    if is_complete(args, folder, checkpoint):
        print(f"this run is complete: measures from {folder / 'generator.json'}")
        show_result(folder)
        return 0
    split, generator, distance = resolve(args, device)
    counts = [int(count) for count in args.m.split(",")]
    single = Trainer(args, split, copy.deepcopy(generator), distance, [1], device) if args.single_code else None
    trainer = Trainer(args, split, generator, distance, counts, device)
    stages = [(trainer, folder, checkpoint, "period")]
    if single:
        second = folder / SINGLE
        stages.append((single, second, Utils.newest_checkpoint(second) if args.resume else None, "one code, period"))
    with Utils.Interruption() as interruption, warnings_in_one_line():
        for each, place, file, title in stages:
            if file:
                each.load(file)
            run = Utils.Run(place, args, device, resumed_step=each.step if args.resume else None)
            if each is trainer:
                describe(args, trainer, folder)
            with contextlib.closing(run):
                if run_stage(each, run, interruption, title):
                    return interruption.exit_code
        if interruption.signal is not None:
            print("interrupted: all is saved but the measures; --resume auto makes them", flush=True)
            return interruption.exit_code
        finish_run(trainer, single, folder)
    show_result(folder)
    return interruption.exit_code


def get_args_alone():
    """Parse the flags of the one process that there may be. Raises UserError under torchrun."""
    if Distributed.is_launched():
        raise Utils.UserError("torchrun: the generator is trained by one process: start it by python TrainCamNet.py")
    return get_args()


if __name__ == "__main__":
    Utils.run_script(main, get_args_alone)
