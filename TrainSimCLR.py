"""Pre-train an encoder with SimCLR (Chen et al. 2020, arXiv:2002.05709), and score it.

    python TrainSimCLR.py                                   # generated shapes: minutes on two cores
    python TrainSimCLR.py --data cifar10 --epochs 100       # ResNet-18; --data PATH takes any folder of images
    torchrun --nproc_per_node=2 TrainSimCLR.py --data cifar10
    tensorboard --logdir Models

Writes Models/RUN/: args.json, metrics.jsonl, TensorBoard events, EPOCH.pt, pairs.png, evaluation.json. RUN is made of
the script's name, the data and the flags that decide what is learnt.
"""

import contextlib
import json
from pathlib import Path

import torch
from tqdm import tqdm

import Data
import Distributed
import Evaluate
import Flags
import Reports
import Utils
from Backbones import ContrastiveNet, build_head, count_parameters
from Losses import multi_positive, view_statistics
from Optimizers import build_optimizer, learning_rate, parameter_groups, set_learning_rate

COLLAPSED = 0.02  # embedding_std below this means that all images have one embedding; 1 is spread evenly


def get_args(argv=None):
    """Parse the flags; see Flags.py for what they are."""
    return Flags.parse(argv, lambda data: Flags.contrastive_parser(__doc__, data))


class SamePair:
    """SimCLR's source of positives: the image itself, M times; the augmentation makes the views differ."""

    fingerprint = ""  # of what the views are made from beside the images: a resumed run must have the same

    def __init__(self, num_views):
        self.num_views = num_views

    def __len__(self):
        return self.num_views

    def start_epoch(self, epoch):
        """Make ready for an epoch; all processes do so at the same time."""

    def __call__(self, indices, images, trainer):
        """Return M batches uint8 (b, 3, H, W) that share their meaning row by row; indices (b,) in the train split.

        trainer: the `Trainer` that asks, for its step and its net.
        """
        return [images] * self.num_views

    def synthetic(self, indices, images, trainer):
        """Return what a generator makes of the images, uint8 (b, 3, H, W), to be measured; None: there is none."""

    def numbers(self):
        """Return {name: number} of the last pairs, to be logged."""
        return {}

    def loss(self, z, args):
        """Return the loss of projections z (M, N, D)."""
        return multi_positive(z, args.temp, form=args.loss.removeprefix("l"))


class Trainer:
    """All that a step changes, and how: net, optimizer, random state, position."""

    def __init__(self, args, train_split, positives, device, rank=0, world=1):
        self.args, self.train_split, self.positives, self.device = args, train_split, positives, device
        self.rank, self.world = rank, world
        self.views = Flags.views_for(args)
        self.generator = torch.Generator().manual_seed(args.seed)  # of the views
        encoder = Flags.encoder_for(args)
        head = build_head(encoder.features, args.proj_hidden, args.proj_dim, args.proj_norm)
        self.net = ContrastiveNet(encoder, head).to(device, memory_format=torch.channels_last)
        self.forward = Distributed.wrap(self.net, device)
        groups = parameter_groups(self.net, args.wd)
        self.optimizer = build_optimizer(args.opt, groups, args.lr, args.mm, args.lars, args.trust)
        self.steps_per_epoch = len(train_split) // args.bs
        self.steps = args.epochs * self.steps_per_epoch
        self.step = 0
        self.bf16 = Utils.set_precision(args.precision, device)
        if args.compile == "yes" or (args.compile == "auto" and device.type == "cuda" and self.steps >= 2000):
            self.forward = torch.compile(self.forward)

    @property
    def epoch(self):
        """Whole epochs done."""
        return self.step // self.steps_per_epoch

    @property
    def step_in_epoch(self):
        """Steps done of the current epoch."""
        return self.step % self.steps_per_epoch

    def is_finite(self):
        """Return whether all weights and batch statistics are finite; waits for the device."""
        return bool(torch.stack([value.isfinite().all() for value in self.net.state_dict().values()]).all())

    def save(self, folder):
        """Write EPOCH.pt, or EPOCH+STEP.pt inside an epoch; return its path."""
        name = f"{self.epoch}+{self.step_in_epoch}.pt" if self.step_in_epoch else f"{self.epoch}.pt"
        random = {"views": self.generator.get_state(), "torch": torch.get_rng_state()}
        position = {"epoch": self.epoch, "step": self.step, "positives": self.positives.fingerprint}
        parts = {"encoder": self.net.encoder, "head": self.net.head, "optimizer": self.optimizer}
        Utils.save_(Path(folder) / name, args=Utils.plain(self.args), random=random, **position, **parts)
        return Path(folder) / name

    def load(self, file):
        """Go on from what `save` wrote."""
        state = Utils.load_(file, encoder=self.net.encoder, head=self.net.head, optimizer=self.optimizer)
        if state.get("positives", "") != self.positives.fingerprint:
            raise Utils.UserError(
                f"{file}: its positives came from another generator or bank: name that one by --generator or --bank, "
                "or begin another run with --suffix NAME"
            )
        self.step = state["step"]
        self.generator.set_state(state["random"]["views"])
        torch.set_rng_state(state["random"]["torch"])

    def batches(self):
        """Yield (indices, images) for each remaining step of the epoch: this process's share of the batch.

        Seed and epoch alone decide the order, so that an epoch can be entered anywhere.
        """
        order = torch.Generator().manual_seed(1_000_003 * self.args.seed + self.epoch)
        order = torch.randperm(len(self.train_split), generator=order)
        order = order[: self.steps_per_epoch * self.args.bs].view(self.steps_per_epoch, self.world, -1)
        return self.train_split.batches(list(order[self.step_in_epoch :, self.rank]), self.device)

    def augment(self, batches):
        """Return float views (M b, 3, H, W) of M uint8 batches; parameters are drawn for the batch of all processes."""
        start, views = self.rank * (self.args.bs // self.world), []
        for images in batches:
            mine = slice(start, start + len(images))  # --skip_bad can shorten a streamed batch
            params = self.views.draw(self.args.bs, *images.shape[2:], self.generator)
            views.append(self.views.apply(images, {name: value[mine] for name, value in params.items()}))
        return torch.cat(views).contiguous(memory_format=torch.channels_last)

    def update(self, indices, images, lap=lambda stage: None):
        """Take one step; return (loss, projections (M, N, D), views (M b, 3, H, W)) without waiting for the device.

        lap: is told the name of each stage that ends; see `Reports.Meter`.
        """
        lap("data")
        positives = self.positives(indices, images, self)
        x = self.augment(positives)
        lap("views")
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            z = self.forward(x)
        lap("forward")
        z = Distributed.gather(z.float().view(len(positives), -1, z.shape[1]))
        loss = self.positives.loss(z, self.args)
        lap("loss")
        self.optimizer.zero_grad()
        loss.backward()
        ramp = round(self.args.n_ramp * self.steps_per_epoch)
        set_learning_rate(self.optimizer, learning_rate(self.step, self.steps, ramp, self.args.lr))
        self.optimizer.step()
        self.step += 1
        lap("backward")
        return loss.detach(), z.detach(), x


def train_epoch(trainer, run, interruption):
    """Train to the end of the epoch or to an interruption; return (mean loss, whether interrupted)."""
    args, total, steps, stopped = trainer.args, torch.zeros((), device=trainer.device), 0, False
    trainer.net.train()
    trainer.positives.start_epoch(trainer.epoch)
    meter = Reports.Meter(trainer)
    title, count = f"epoch {trainer.epoch + 1}/{args.epochs}", trainer.steps_per_epoch
    bar = tqdm(desc=title, total=count, initial=trainer.step_in_epoch, unit="step", leave=False, disable=run.quiet)
    with bar:
        for indices, images in trainer.batches():
            shown = trainer.step == 0 or (trainer.step_in_epoch == 0 and is_scored(args, trainer.epoch + 1))
            loss, z, x = trainer.update(indices, images, meter.lap)
            total, steps = total + loss, steps + 1
            bar.update()
            if logged := trainer.step % args.log_iter == 0:
                log_step(trainer, run, loss, z, meter)
            if shown:
                Reports.show_pairs(run, x, len(z), trainer.step)
                meter.start()
            if trainer.world == 1 or logged:  # several processes must agree, and that waits for the device
                stopped = Distributed.any_process(interruption.signal is not None, trainer.device)
            if stopped:
                break
    mean = (total / steps).item()
    check_health(trainer, run, mean if trainer.is_finite() else float("nan"))  # before anything is saved
    return mean, stopped


def log_step(trainer, run, loss, z, meter):
    """Write a line of metrics.jsonl: the only place inside an epoch that waits for the device."""
    loss, statistics = loss.item(), {name: value.item() for name, value in view_statistics(z).items()}
    lr = trainer.optimizer.param_groups[0]["lr"]
    run.log(trainer.step, trainer.epoch, loss=loss, lr=lr, **meter.read(), **statistics, **trainer.positives.numbers())
    meter.start()
    check_health(trainer, run, loss, statistics["embedding_std"])


def check_health(trainer, run, loss, std=1.0):
    """Stop a run that learns nothing more: loss not finite or, after the first epoch, all embeddings equal."""
    finite = abs(loss) < float("inf")
    if finite and (std >= COLLAPSED or trainer.step <= trainer.steps_per_epoch):
        return
    args, last = trainer.args, Utils.newest_checkpoint(run.folder)
    problem = f"the embeddings collapsed (standard deviation {std:.4f})" if finite else "loss or weights are not finite"
    raise Utils.UserError(
        f"{problem} in epoch {-(-trainer.step // trainer.steps_per_epoch)}: likely causes: --lr {args.lr:g} too high, "
        f"--n_ramp {args.n_ramp:g} too short, --temp {args.temp:g} too low, or views that do not differ (--aug "
        f"{args.aug}); last good checkpoint: {last or 'none'}"
    )


def is_scored(args, epoch):
    """Return whether the encoder is scored after this epoch."""
    return epoch == args.epochs or bool(args.eval_iter and epoch % args.eval_iter == 0)


def finish_epoch(trainer, run, splits, loss):
    """Save and score where it is due, and print the epoch's line."""
    args, epoch, last = trainer.args, trainer.epoch, trainer.step == trainer.steps
    scores = {}
    if run.writes:
        if last or (args.save_iter and epoch % args.save_iter == 0):
            trainer.save(run.folder)
        if not last and is_scored(args, epoch):
            probed = Evaluate.can_probe(splits)
            scores = Evaluate.score(trainer.net.encoder, splits, trainer.device) if probed else {}
            run.log(trainer.step, epoch, group="Pairs", **scores, **Reports.measure_pairs(trainer, probed))
        text = "".join(f"  {name} {100 * value:.2f} %" for name, value in scores.items())
        tqdm.write(f"epoch {epoch}/{args.epochs}  loss {loss:.4f}  {run.clock():.0f} s{text}")
    Distributed.barrier()


def finish_run(trainer, run, splits, again):
    """Score the last epoch beside its baselines; write evaluation.json and what TensorBoard shows of it.

    again: the run was complete when this start resumed it; what it scored then is shown if it scored the same split.
    """
    if not Evaluate.can_probe(splits):
        if not again:
            run.log(trainer.step, trainer.epoch, group="Pairs", **Reports.measure_pairs(trainer, labelled=False))
        print("one class or no labels: nothing to score")
        return
    file = run.folder / "evaluation.json"
    if again and file.exists() and (result := json.loads(file.read_text()))["split"] == splits.eval:
        print(f"this run is complete: scores from {file}\n{Evaluate.table(result)}")
        return
    encoder, untrained = trainer.net.encoder, None
    if trainer.args.baselines:
        untrained = Flags.encoder_for(trainer.args).to(trainer.device, memory_format=torch.channels_last)
    result = Evaluate.evaluate(encoder, untrained, splits, trainer.views, trainer.device, trainer.epoch)
    result["pairs"] = Reports.measure_pairs(trainer, labelled=True)
    Evaluate.write_result(file, result)
    run.log(
        trainer.step, trainer.epoch, group="Pairs", **{key: result[key] for key in ("knn", "linear")}, **result["pairs"]
    )
    final = {f"Final/{name}": result[name] for name in ("knn", "linear", "linear_aug") if name in result}
    run.board.add_hparams(Flags.hyper_parameters(trainer.args), final, run_name=".")
    Reports.show_embedding(run, encoder, splits.test, trainer.device)
    print(Evaluate.table(result))


def resolve(args, world):
    """Return the row of the data, and settle what follows. Raises UserError on flags that do not go together."""
    row = Data.get_row(args.data, args.size)
    args.small_stem = args.stem == "small" or (args.stem == "auto" and row.small_images)
    if args.bs % world:
        raise Utils.UserError(f"--bs {args.bs}: not divisible by {world} processes: choose a multiple of {world}")
    if args.n_ramp >= args.epochs:
        raise Utils.UserError(f"--n_ramp {args.n_ramp:g}: nothing is left of --epochs {args.epochs} after it: lower it")
    return row


def describe(args, row, trainer, folder):
    """Print what is about to happen, in the values that count."""
    net, precision = trainer.net, "bf16" if trainer.bf16 else args.precision.replace("auto", "fp32")
    stem = "" if args.backbone == "resnet8" else f", {'3x3 stem, no pooling' if args.small_stem else '7x7 stem'}"
    print(f"{row.name}: {len(trainer.train_split)} images of {row.size} px, on {trainer.device} in {precision}")
    print(f"{args.backbone}{stem}: {count_parameters(net.encoder):,} weights, head {count_parameters(net.head):,}")
    print(f"{trainer.views}")
    optimizer = f"{args.opt}{' + LARS' if args.lars else ''}, lr {args.lr:g}"
    print(f"{trainer.steps} steps of {args.bs} images x {len(trainer.positives)} views, {optimizer}")
    print(f"{f'going on at step {trainer.step}' if trainer.step else 'starting'}: {folder}", flush=True)


def main(args, make_positives=None, script=Path(__file__).stem):
    """Train, save, score; return the exit code. make_positives: (args, splits, device) -> a source like `SamePair`."""
    rank, world, device = Distributed.start(Utils.pick_device(args.device))
    row = resolve(args, world)
    folder, checkpoint = Flags.find_run(args, row, script)
    splits = Flags.splits_for(args, device)
    if len(splits.train) < args.bs:
        raise Utils.UserError(f"--bs {args.bs}: more than the {len(splits.train)} images of {row.name}: lower it")
    positives = make_positives(args, splits, device) if make_positives else SamePair(args.num_views)
    trainer = Trainer(args, splits.train, positives, device, rank, world)
    if checkpoint:
        trainer.load(checkpoint)
    positives.start_epoch(trainer.epoch)  # before the run folder is made: this can take long
    done, stopped = trainer.step, False
    Distributed.barrier()  # all have looked into the folder before the first one writes
    run = Utils.Run(folder, args, device, resumed_step=done if args.resume else None, writes=rank == 0)
    if run.writes:
        describe(args, row, trainer, folder)
    with Utils.Interruption() as interruption, contextlib.closing(run):
        while trainer.step < trainer.steps and not stopped:
            loss, stopped = train_epoch(trainer, run, interruption)
            if not stopped:
                finish_epoch(trainer, run, splits, loss)
        if run.writes and stopped:
            print(f"interrupted: saved {trainer.save(folder)}; --resume auto goes on", flush=True)
        elif run.writes:
            finish_run(trainer, run, splits, again=done == trainer.step)
            print(f"checkpoints, pictures, logs: {folder}\nTensorBoard: tensorboard --logdir {folder.parent}")
    Distributed.stop()
    return interruption.exit_code if stopped else 0


if __name__ == "__main__":
    Utils.run_script(main, get_args)
