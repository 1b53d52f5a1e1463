"""Pre-train an encoder with SimCLR (Chen et al. 2020, arXiv:2002.05709), and score it.

    python TrainSimCLR.py                                   # generated shapes: minutes on two cores
    python TrainSimCLR.py --data cifar10 --epochs 100       # ResNet-18 on a GPU, a small net on a CPU
    python TrainSimCLR.py --data PATH                       # any folder of images
    torchrun --nproc_per_node=2 TrainSimCLR.py --data cifar10
    tensorboard --logdir Models

Writes Models/RUN/: checkpoints, encoder.pt, scores, logs; Models/README.md lists the files. RUN is made of the script's
name, the data and the flags that decide what is learned.
"""

import Signals  # first: a signal during the other imports then ends the program with one line

# isort: split
import argparse
import contextlib
import math
import shlex
import time
from pathlib import Path

import torch
from tqdm import tqdm

import Data
import Devices
import Distributed
import Evaluate
import Flags
import Graphs
import Losses
import Reports
import Runs
import Utils
from Backbones import (
    BACKBONES,
    ContrastiveNet,
    build_head,
    check_backbone,
    count_parameters,
    is_resnet,
    kept_bytes,
    stem_text,
)
from Distributed import say
from EncoderFiles import encoder_metadata, normalizes, save_encoder
from Flags import bounded
from Images.Split import StreamedSplit
from Optimizers import build_optimizer, learning_rate, parameter_groups, set_learning_rate

COLLAPSED = 0.02  # embedding_std: below this nearly all images have the same embedding; 1: spread evenly


# ---------------------------------------------------------------------------------------------------- flags


def get_args(argv=None):
    """Parse the flags; the defaults are the recipe of --data."""
    return Flags.parse(argv, build_parser)


def add_num_views(group):
    group.add_argument("--num_views", type=bounded(int, 2), default=2, metavar="M", help="views of each image per step")


def build_parser(data="shapes", device_type="cpu", doc=__doc__, add_positives=add_num_views):
    """Return the parser of a contrastive script; the defaults are the recipe of the row of `data` on the device.

    add_positives: a function that adds the flags of the source of positives to an argument group.
    """
    parser = Flags.plain_parser(doc)
    add_data_flags(parser.add_argument_group("data and views"))
    add_positives(parser.add_argument_group("positives"))
    add_model_flags(parser.add_argument_group("model and loss"))
    add_optimization_flags(parser.add_argument_group("optimization"))
    add_run_flags(Flags.add_run_group(parser, "epochs"))
    Flags.set_recipe(parser, Data.get_row(data).recipe_for(device_type), data, device_type)
    return parser


def add_data_flags(group):
    Flags.add_data_place(group)
    add = group.add_argument
    scored = (
        "split to score; val: validation split, or cv if there is none; cv: 3-fold cross-validation on train; test: "
    )
    scored += "only for numbers that are reported"
    add("--eval", choices=["val", "cv", "test"], default="val", help=scored)
    aug = "full: crop, flip, color jitter, grayscale, blur; crop: crop and flip; none: the images as they are"
    add("--aug", choices=["full", "crop", "none"], default="full", help=aug)
    add("--color_s", type=bounded(float, 0, 2), metavar="S", help="strength of the color jitter, 0 to about 1")
    add("--crop_min", type=bounded(float, 0.001, 1), metavar="A", help="smallest part of the area that a crop keeps")
    add("--gray_p", type=bounded(float, 0, 1), metavar="P", help="probability of a gray view")
    add("--blur_p", type=bounded(float, 0, 1), metavar="P", help="probability of a blurred view")


def add_model_flags(group):
    add = group.add_argument
    backbone = f"encoder: {', '.join(BACKBONES)}, or any other classification model of torchvision"
    add("--backbone", metavar="NAME", help=backbone)
    stem = "first layer of a ResNet; small: 3x3, stride 1, no pooling; auto: small up to 64 pixels"
    add("--stem", choices=["auto", "small", "large"], default="auto", help=stem)
    init = "weights to continue from: torchvision's for this backbone, an encoder.pt or a checkpoint"
    add("--init", type=Flags.path, metavar="FILE", help=init)
    normalize = "normalize images by ImageNet's mean and standard deviation, as weights trained on it expect"
    add("--normalize", "--normalise", action="store_true", help=normalize)
    add("--proj_dim", type=bounded(int, 1), metavar="D", help="dimensions of a projection")
    add("--proj_hidden", type=bounded(int, 1), metavar="H", help="hidden units of the projection head")
    add("--proj_norm", action=argparse.BooleanOptionalAction, help="batch normalization in the projection head")
    loss = "; ".join(f"{name}: {form.what}" for name, form in Losses.FORMS.items())
    add("--loss", choices=list(Losses.FORMS), default="lout", help=loss)
    weight = "weight of the views after the second, with --loss ntxent or align"
    add("--gen_weight", type=bounded(float, 0), default=1.0, metavar="W", help=weight)
    add("--temp", type=bounded(float, 1e-3), metavar="T", help="temperature; if low, similar negatives weigh more")


def add_optimization_flags(group):
    add = group.add_argument
    batch = "images per step, over all processes; the incomplete last batch is dropped"
    add("--bs", type=bounded(int, 2), metavar="N", help=batch)
    chunk = "most views in a forward pass of a process (gradient caching): the net needs memory for N views only, and "
    chunk += "a second forward pass; batch normalization takes its statistics from N views; 0: all views at once"
    add("--chunk_views", type=bounded(int, 0), default=0, metavar="N", help=chunk)
    add("--epochs", type=bounded(int, 1), metavar="E", help="passes over the data")
    add("--opt", choices=["SGD", "Adam"], help="optimizer; SGD has Nesterov momentum")
    add("--lr", type=bounded(float, 0), help="peak learning rate; a --bs that you give does not change it")
    add("--mm", type=bounded(float, 0, 0.9999), metavar="M", help="momentum of SGD; beta1 of Adam")
    add("--wd", type=bounded(float, 0), help="weight decay; none on biases and norm layers")
    add("--n_ramp", type=bounded(float, 0), metavar="E", help="epochs of linear warm-up before the cosine to 0")
    add("--lars", action="store_true", help="layer-wise learning rates (LARS); with Adam as in LAMB")
    add("--trust", type=bounded(float, 0), default=0.001, metavar="C", help="trust coefficient of --lars")
    seed = "seed of the initial weights, the order of the images and the views"
    add("--seed", type=bounded(int, 0, Flags.LARGEST_SEED), default=0, help=seed)


def add_run_flags(group):
    add = group.add_argument
    add("--eval_iter", type=bounded(int, 0), default=10, metavar="E", help="epochs between scores; 0: only at the end")
    baselines = "at the end, also score raw pixels, the untrained encoder, and a probe on augmented images"
    add("--baselines", action=argparse.BooleanOptionalAction, default=True, help=baselines)


# ---------------------------------------------------------------------------------------------------- positives


class SamePair:
    """SimCLR's source of positives: the image itself, M times; the augmentation makes the views differ.

    Every source of positives has the members below; len(source) is M, the number of views in a step.
    """

    encoder = None  # the encoder in training; set by the Trainer
    fingerprint = ""  # identifies generator or bank; a checkpoint with another one is refused; "": images only
    p_gen = None  # the probability of a restoration, saved in checkpoints; None: not measured (yet)
    seconds_before = 0.0  # estimated time for generator and bank, in a dry run

    def __init__(self, num_views):
        self.num_views = num_views

    def __len__(self):
        return self.num_views

    @property
    def captions(self):
        """What each view shows, in words."""
        return ["image"] * self.num_views

    def start_epoch(self, epoch):
        """Prepare for an epoch; all processes call this at the same time."""

    def __call__(self, indices, images, step):
        """Return M batches uint8 (b, 3, H, W) that show the same image row by row.

        indices: int64 (b,), rows of the train split; images: theirs, uint8 (b, 3, H, W); step: number of the step.
        """
        return [images] * self.num_views

    def synthetic(self, indices, images, step):
        """Return a synthetic view of each image, uint8 (b, 3, H, W), for measurements; None: there is no generator."""

    def logged(self):
        """Return {name: value} of the last views, for the log."""
        return {}


def same_pair(args, splits, device, fingerprint):
    """Return SimCLR's source of positives; see `main`."""
    return SamePair(args.num_views)


# ---------------------------------------------------------------------------------------------------- training


class Trainer:
    """What a step changes (net, optimizer, random state, position), and the step itself."""

    def __init__(self, args, train_split, positives, device, rank=0, world=1, with_init=True):
        """with_init: False if `load` follows, so that the file of --init is not needed anymore."""
        check_views(args, len(positives))
        self.args = args
        self.train_split = train_split
        self.positives = positives
        self.device = device
        self.rank = rank
        self.world = world
        self.data_fingerprint = train_split.fingerprint()
        Devices.forget_peak(device)  # that of a generator's training

        # views
        self.augmentation = Flags.augmentation_for(args)
        self.rng = torch.Generator().manual_seed(args.seed)  # random numbers of the views

        # position
        self.steps_per_epoch = len(train_split) // args.bs
        self.steps = args.epochs * self.steps_per_epoch
        self.step = 0
        self.pace = Reports.Pace(self.step, self.steps, device)

        # net and optimizer
        encoder = Flags.encoder_for(args, with_init)
        head = build_head(encoder.num_features, args.proj_hidden, args.proj_dim, args.proj_norm)
        self.net = ContrastiveNet(encoder, head).to(device, memory_format=torch.channels_last)
        groups = parameter_groups(self.net, args.wd)
        self.optimizer = build_optimizer(args.opt, groups, args.lr, args.mm, args.lars, args.trust)
        positives.encoder = encoder  # --pick farthest and --p_gen auto compare its features
        views = len(positives) * (args.bs // world)  # views of a step in this process
        self.chunks = math.ceil(views / (args.chunk_views or views))
        check_chunks(args, self.net, views // self.chunks)

        self.draw_apart()

        # speed
        self.bf16 = Devices.set_precision(args.precision, device)
        self.forward = Distributed.wrap(self.net, device, args.compile)
        self.graph = None
        if self.chunks == 1 and Graphs.can_capture(args.cuda_graph, device):
            self.graph = Graphs.GraphedLoss(self.loss_of, self.net.parameters())

    def draw_apart(self):
        """Let each process have random numbers of its own for dropout; views are drawn for all of them together."""
        if self.rank:
            torch.manual_seed(Utils.derived_seed(self.args.seed, self.step * self.world + self.rank))

    @property
    def epoch(self):
        """Whole epochs done."""
        return self.step // self.steps_per_epoch

    @property
    def step_in_epoch(self):
        """Steps done of the current epoch."""
        return self.step % self.steps_per_epoch

    def save(self, folder):
        """Write EPOCH.pt, or EPOCH+STEP.pt inside an epoch; return its path."""
        file = Path(folder) / Utils.checkpoint_name(self.epoch, self.step_in_epoch)
        Utils.save_(
            file,
            args=Utils.plain(self.args),
            random={"views": self.rng.get_state(), **Devices.random_states(self.device)},
            epoch=self.epoch,
            step=self.step,
            data_n=len(self.train_split),
            data_fingerprint=self.data_fingerprint,
            positives=self.positives.fingerprint,
            p_gen=self.positives.p_gen,
            encoder=self.net.encoder,
            head=self.net.head,
            optimizer=self.optimizer,
        )
        return file

    def load(self, file):
        """Continue from what `save` wrote. Raises UserError if that was another run."""
        state = Utils.load_(file)
        Utils.check_run(file, state)
        Runs.check_data(file, state, self.train_split, self.args.data)
        if state.get("positives", "") != self.positives.fingerprint:
            raise Utils.UserError(
                f"{file}: its positives came from another generator, bank or corruption: continue by --resume {file} "
                "with that --generator or --bank, or begin another run with --suffix NAME"
            )
        Utils.load_parts(file, state, encoder=self.net.encoder, head=self.net.head, optimizer=self.optimizer)
        if state.get("p_gen") is not None:
            with Utils.fitting(file, "p_gen"):
                self.positives.p_gen = min(1.0, max(0.0, float(state["p_gen"])))
        self.step = state["step"]
        self.pace = Reports.Pace(self.step, self.steps, self.device)
        with Utils.fitting(file, "random"):
            self.rng.set_state(state["random"]["views"])
            Devices.set_random_states(self.device, state["random"])
        self.draw_apart()

    def batches(self):
        """Yield (indices, images) for each remaining step of the epoch: this process's share of the batch.

        The order depends only on seed and epoch, so that a run can resume at any step of an epoch.
        """
        order_rng = torch.Generator().manual_seed(Utils.derived_seed(self.args.seed, self.epoch))
        order = torch.randperm(len(self.train_split), generator=order_rng)
        order = order[: self.steps_per_epoch * self.args.bs].view(self.steps_per_epoch, self.world, -1)
        return self.train_split.batches(list(order[self.step_in_epoch :, self.rank]), self.device)

    def augment(self, batches):
        """Return float views (M b, 3, H, W) of M uint8 batches; parameters are drawn for the batch of all processes."""
        start = self.rank * (self.args.bs // self.world)
        params = []
        for images in batches:
            drawn = self.augmentation.draw(self.args.bs, *images.shape[2:], self.rng)
            params.append({name: value[start : start + len(images)] for name, value in drawn.items()})
        return self.augmentation.apply_all(batches, params).contiguous(memory_format=torch.channels_last)

    def update(self, indices, images, lap=lambda stage: None):
        """Take one step; return (loss, projections (M, N, D), views (M b, 3, H, W)) without waiting for the device.

        lap: is called with the name of each stage when it ends; see `Reports.Meter`.
        """
        # views of the images
        lap("data")
        x = self.augment(self.positives(indices, images, self.step))
        lap("views")

        # gradients of the loss over the batch of all processes
        if self.graph:
            loss, z = self.graph(x)
        elif self.chunks > 1:
            loss, z = self.backward_in_chunks(x, lap)
        else:
            loss, z = self.loss_of(x, lap)
            self.optimizer.zero_grad()
            loss.backward()

        # a step of the optimizer
        ramp = round(self.args.n_ramp * self.steps_per_epoch)
        set_learning_rate(self.optimizer, learning_rate(self.step, self.steps, ramp, self.args.lr))
        self.optimizer.step()
        self.step += 1
        lap("backward")
        return loss.detach(), z.detach(), x

    def loss_of(self, x, lap=lambda stage: None):
        """Return (loss, projections (M, N, D)) of the batch of all processes, for this one's views (M b, 3, H, W)."""
        own = self.project(x)  # (M b, D)
        lap("forward")
        return self.compare(own, lap)

    def compare(self, own, lap):
        """Return (loss, projections (M, N, D)) of the batch of all processes, for this one's projections (M b, D)."""
        z = Distributed.gather(own.view(len(self.positives), -1, own.shape[1]))
        loss = Losses.contrastive(z, self.args.temp, self.args.loss, self.args.gen_weight)
        lap("loss")
        return loss, z

    def project(self, x):
        """Return the projections float32 (B, D) of views (B, 3, H, W)."""
        with Devices.autocast(self.device, self.bf16):
            return self.forward(x).float()

    def backward_in_chunks(self, x, lap):
        """As `loss_of`, and set the gradients, for chunks of the views (gradient caching, Gao et al. 2021).

        arXiv:2101.06983. First all chunks without a graph, for the gradient of the loss by the projections; then each
        chunk with a graph, for that of the weights.
        """
        chunks = x.tensor_split(self.chunks)  # as equal as possible
        own = self.project_without_graph(chunks)
        lap("forward")
        loss, z = self.compare(own, lap)
        self.optimizer.zero_grad()
        loss.backward()
        self.backward_chunks(chunks, own.grad)
        return loss, z

    @torch.no_grad()
    def project_without_graph(self, chunks):
        """Return the projections float32 (M b, D) of chunks of views, as a leaf whose gradient the loss can fill.

        `backward_chunks` draws the same random numbers, for dropout, and it alone updates the running statistics.
        """
        buffers = list(self.net.buffers())
        before = [buffer.clone() for buffer in buffers]
        cards = [] if self.device.type == "cpu" else [self.device]
        with torch.random.fork_rng(cards, device_type=self.device.type):
            z = torch.cat([self.project(chunk) for chunk in chunks])
        for buffer, value in zip(buffers, before):
            buffer.copy_(value)
        return z.requires_grad_()

    def backward_chunks(self, chunks, gradient):
        """Add the gradient of the weights, chunk by chunk. gradient: of the loss by the projections, (M b, D)."""
        unsynced = self.forward.no_sync if self.world > 1 else contextlib.nullcontext  # DistributedDataParallel's
        parts = gradient.tensor_split(len(chunks))
        with unsynced():
            for chunk, part in zip(chunks[:-1], parts[:-1]):
                self.project(chunk).backward(part)
        self.project(chunks[-1]).backward(parts[-1])  # with several processes, this one averages the sums of them


def train_epoch(trainer, run, interruption):
    """Train to the end of the epoch or to an interruption.

    Returns (mean loss, share of the time in which it waited for images, whether it was interrupted).
    """
    args = trainer.args
    total = torch.zeros((), device=trainer.device)
    steps = 0
    stopped = False
    trainer.net.train()
    trainer.positives.start_epoch(trainer.epoch)
    meter = Reports.Meter(trainer.device, trainer.step)
    title = f"epoch {trainer.epoch + 1}/{args.epochs}"
    count = trainer.steps_per_epoch
    bar = tqdm(desc=title, total=count, initial=trainer.step_in_epoch, unit="step", leave=False, disable=run.quiet)
    with bar:
        for indices, images in trainer.batches():
            # a picture at the start, and in each epoch that is scored
            first_of_scored_epoch = trainer.step_in_epoch == 0 and is_scored(args, trainer.epoch + 1)
            is_shown = trainer.step == 0 or first_of_scored_epoch

            loss, z, x = trainer.update(indices, images, meter.lap)
            total = total + loss
            steps += 1
            bar.update()
            show_pace(trainer, run, bar)

            # the first step, the last one of an epoch, and every --log_iter
            if trainer.step % args.log_iter == 0 or trainer.step == 1 or trainer.step_in_epoch == 0:
                log_step(trainer, run, loss, z, meter)
            if is_shown:
                Reports.show_pairs(run, x, trainer.positives.captions, trainer.step)
                meter.start(trainer.step)
            stopped = Distributed.any_process(interruption.signal is not None)
            if stopped:
                break

    # weights that are not finite must not be saved
    mean = (total / steps).item()
    finite = Utils.all_finite(trainer.net.state_dict().values())
    check_health(trainer, run, mean if finite else float("nan"))
    wait = meter.waited / meter.elapsed if meter.elapsed else 0.0
    return mean, wait, stopped


def show_pace(trainer, run, bar):
    """Print once how long the training takes; from then on show the remaining time in the progress bar."""
    pace = trainer.pace
    if pace.tick(trainer.step) and run.writes:
        tqdm.write(estimate(trainer))
    if pace.seconds is not None:
        bar.set_postfix_str(f"run: {Reports.duration(pace.left(trainer.step))} left", refresh=False)


def estimate(trainer):
    """Return how long the training takes, when the next checkpoint comes, and the memory, in words."""
    left = trainer.pace.left(trainer.step)
    save_iter = trainer.args.save_iter or trainer.args.epochs
    to_checkpoint = min(
        save_iter * trainer.steps_per_epoch - trainer.step % (save_iter * trainer.steps_per_epoch),
        trainer.steps - trainer.step,
    )
    checkpoint = Reports.duration(to_checkpoint * trainer.pace.seconds)
    memory = Devices.peak_memory(trainer.device) / 2**30
    return f"training takes about {Reports.duration(left)}; next checkpoint in {checkpoint}; memory {memory:.1f} GiB"


def log_step(trainer, run, loss, z, meter):
    """Write a line of metrics.jsonl. Waits for the device; other steps do so only if they draw a picture."""
    loss = loss.item()
    statistics = {name: value.item() for name, value in Losses.view_statistics(z).items()}
    lr = trainer.optimizer.param_groups[0]["lr"]
    speed = meter.read(trainer.step, views_per_step=trainer.args.bs * len(trainer.positives))
    run.log(trainer.step, trainer.epoch, loss=loss, lr=lr, **speed, **statistics, **trainer.positives.logged())
    meter.start(trainer.step)
    check_health(trainer, run, loss, statistics["embedding_std"])


def check_health(trainer, run, loss, std=1.0):
    """Raise UserError if the loss is not finite or, after the first epoch, if the embeddings have collapsed."""
    args = trainer.args
    is_finite = math.isfinite(loss)
    has_collapsed = std < COLLAPSED and trainer.step > trainer.steps_per_epoch
    if is_finite and not has_collapsed:
        return
    place = f"epoch {math.ceil(trainer.step / trainer.steps_per_epoch)}, step {trainer.step}"
    problem = f"the embeddings collapsed (standard deviation {std:.4f})" if is_finite else Runs.NOT_FINITE
    causes = f"--lr {args.lr:g} too high, --n_ramp {args.n_ramp:g} too short, --temp {args.temp:g} too low, "
    causes += f"or views that do not differ (--aug {args.aug})"
    raise run.failure(f"{problem} in {place}", causes)


def is_scored(args, epoch):
    """Return whether the encoder is scored after this epoch."""
    return epoch == args.epochs or bool(args.eval_iter and epoch % args.eval_iter == 0)


def finish_epoch(trainer, run, splits, loss, wait, interruption):
    """Save and score if this epoch is one for it; print its line; return whether a signal has arrived."""
    args = trainer.args
    epoch = trainer.epoch
    is_last = trainer.step == trainer.steps
    if run.writes:
        if is_last or (args.save_iter and epoch % args.save_iter == 0):
            trainer.save(run.folder)
        scores = {}
        if not is_last:
            with Distributed.alone():
                scores = interruption.cut_short(lambda: score_epoch(trainer, run, splits)) or {}
        text = "".join(f"  {name} {100 * value:.2f} %" for name, value in scores.items())
        if isinstance(trainer.train_split, StreamedSplit):
            text = f"  waiting for images {100 * wait:.0f} %{text}"
        left = None if trainer.pace.seconds is None else trainer.pace.left(trainer.step)
        times = Reports.times(run.clock(), left)
        tqdm.write(f"epoch {epoch}/{args.epochs}  loss {loss:.4f}  {times}{text}")
    Distributed.barrier()
    return Distributed.any_process(interruption.signal is not None)


def score_epoch(trainer, run, splits):
    """Score the encoder if --eval_iter asks for it after this epoch; log and return the scores."""
    if not is_scored(trainer.args, trainer.epoch):
        return {}
    can_probe = Evaluate.can_probe(splits)
    with Signals.heartbeat("scoring"):
        scores = Evaluate.score(trainer.net.encoder, splits, trainer.device) if can_probe else {}
        pairs = measure_pairs(trainer, can_probe)
    run.log(trainer.step, trainer.epoch, group="Pairs", **scores, **pairs)
    return scores


def is_unscored(trainer, folder):
    """Return whether the resumed checkpoint was not scored, because the run was killed after saving it."""
    is_boundary = 0 < trainer.step < trainer.steps and trainer.step_in_epoch == 0
    if not is_boundary or not is_scored(trainer.args, trainer.epoch):
        return False
    return Distributed.first_rank_only(lambda: "cosine_real" not in Runs.logged_at(folder, trainer.step))


def measure_pairs(trainer, labeled):
    """Return the measures of the pairs at the trainer's step; see `Reports.measure_pairs`."""
    return Reports.measure_pairs(
        net=trainer.net,
        positives=trainer.positives,
        split=trainer.train_split,
        augmentation=trainer.augmentation,
        step=trainer.step,
        device=trainer.device,
        labeled=labeled,
    )


def finish_run(trainer, run, splits, again):
    """Score the last epoch and its baselines; write the scores to evaluation.json and TensorBoard; return them.

    again: the run was already complete when it was resumed; its old scores are shown if they are of the same split.
    """
    # data without labels: only the pairs can be measured
    logged = Runs.logged_at(run.folder, trainer.step)
    if not Evaluate.can_probe(splits):
        if "cosine_real" not in logged:
            run.log(trainer.step, trainer.epoch, group="Pairs", **measure_pairs(trainer, labeled=False))
            run.show_flags(Flags.hyper_parameters(trainer.args))
        print("fewer than two classes, or too few labels: nothing to score")
        return {}

    # a complete run that was resumed
    file = run.folder / "evaluation.json"
    result = Utils.read_json(file, Evaluate.SAVED, Evaluate.scores_table) or {}
    if again and result.get("split") == splits.eval and "knn" in logged:
        print(f"this run is complete: scores from {Utils.shown(file)}\n{Evaluate.scores_table(result)}")
        return result

    if again and "knn" in logged and result.get("split"):
        command = f"python Evaluate.py {shlex.quote(str(run.folder))} --eval {splits.eval}"
        raise Utils.UserError(
            f"--eval {splits.eval}: this complete run was scored on {result['split']}: other scores: {command}"
        )

    # scores
    print("scoring", flush=True)
    encoder = trainer.net.encoder
    baselines = trainer.args.baselines
    untrained = Flags.untrained_encoder(trainer.args, trainer.device) if baselines else None
    with Signals.heartbeat("scoring"):
        result = Evaluate.evaluate(
            encoder, untrained, splits, trainer.augmentation, trainer.device, trainer.epoch, baselines
        )
        result["pairs"] = measure_pairs(trainer, labeled=True)
    print(Evaluate.scores_table(result))  # before they are written: the disk may be full

    # files, what TensorBoard shows, and last the log: what it lacks is scored again after a kill
    Utils.write_json(file, result)
    scores = {name: result[name] for name in ("knn", "linear")}
    run.show_flags(Flags.hyper_parameters(trainer.args))
    if untrained:
        run.baseline("untrained", {name: result[f"untrained_{name}"] for name in scores}, trainer.step)
    if baselines:
        run.baseline("pixels", {"knn": result["pixels_knn"]}, trainer.step)
    Reports.show_embedding(run, encoder, splits.test, trainer.device)
    new = scores | result["pairs"]
    is_logged = all(logged.get(name) == value for name, value in new.items())
    if not is_logged:
        run.log(trainer.step, trainer.epoch, group="Pairs", **new)
    return result


# ---------------------------------------------------------------------------------------------------- script


def adjust_flags(args, world):
    """Return the row of the data; adjust flags that were not given. Raises UserError on flags that do not fit."""
    row = Data.get_row(args.data, args.size)
    can_be_small = args.backbone == "resnet8" or is_resnet(args.backbone)
    args.image_size = row.size
    args.small_stem = args.stem == "small" or (args.stem == "auto" and row.small_images and can_be_small)
    with Utils.as_user_error():
        check_backbone(args.backbone, args.small_stem, row.size)
    if args.bs % world:
        Flags.adjust(args, "bs", max(args.bs // world, 1) * world, f"it must be a multiple of the {world} processes")
    return row


def check_memory(args, row, world, device):
    """Raise UserError on sizes that can never fit, before images are read and memory is taken."""
    # the weights of the head, with gradients and momentum
    features = check_backbone(args.backbone, args.small_stem, row.size)
    weights = 3 * 4 * args.proj_hidden * (features + args.proj_dim)
    Devices.check_room(weights, device, f"a head of --proj_hidden {args.proj_hidden} and --proj_dim {args.proj_dim}")

    # this process's views, and half of what the net keeps of those of a forward pass, as it is in bf16
    bs = args.bs if "bs" in args.given else 2  # the images may be fewer
    count = getattr(args, "num_views", 2)
    views = bs * count // world
    at_once = min(views, args.chunk_views or views)
    needed = views * (4 * 3 * row.size**2 + 2 * args.proj_hidden)
    needed += at_once * kept_bytes(args.backbone, args.small_stem, row.size) // 2
    Devices.check_room(needed, device, f"--size {row.size}: {bs} x {count} views")


def adjust_to_images(args, row, n, world, device):
    """Adjust flags that were not given to the n training images. Raises UserError if given flags do not fit them."""
    # the rate of a long run
    for name, value in row.long_recipe_for(device.type, args.epochs).items():
        if name not in args.given:
            Flags.adjust(args, name, value, f"the recipe of {row.name} for {Data.LONG} epochs and more")

    if n < max(2, world):
        found = Reports.plural(n, "training image")
        raise Utils.UserError(f"--data {args.data}: {found}: give at least {max(2, world)}")

    # a batch of at most half of the images, with a learning rate for it
    if n < args.bs or (n < 2 * args.bs and "bs" not in args.given):
        before = args.bs
        half = 2 ** int(math.log2(max(2, n // 2)))
        Flags.adjust(args, "bs", half // world * world, f"{row.name} has {n} images")
        if "lr" not in args.given:
            Flags.adjust(args, "lr", args.lr * args.bs / before, f"it was for --bs {before}")
    if args.bs < max(2, world):
        raise Utils.UserError(f"--data {args.data}: {n} images are too few for {world} processes: start fewer")

    # as many epochs as two cores do in about half an hour
    epochs = max(1, int(Data.CPU_PIXELS / (n * row.size**2)))
    if device.type == "cpu" and "epochs" not in args.given and epochs < args.epochs:
        Flags.adjust(args, "epochs", epochs, f"{n:,} images of {row.size} px on a CPU; give --epochs for more")
    if args.n_ramp >= args.epochs:
        Flags.adjust(args, "n_ramp", args.epochs / 10, f"--epochs {args.epochs} leaves nothing after it")


def check_views(args, count):
    """Raise UserError if the loss needs more views than there are."""
    if args.loss == "align" and count == 2:
        more = "--pair real_real_gen" if "pair" in args else "--num_views 3"
        raise Utils.UserError(f"--loss align: it is for more than two views: choose --loss lout, or {more}")


def check_init(args):
    """Raise UserError if the weights of --init do not fit, before anything that takes long."""
    if not args.init:
        return
    Flags.encoder_for(args)
    normalized = normalizes(args.init)
    if normalized is not None and normalized != args.normalize:
        expected = "with" if normalized else "without"
        Distributed.notice(f"--init {Utils.shown(args.init)}: this encoder was trained {expected} --normalize")


def note_unused(args):
    """Print which given flags change nothing."""
    if args.loss in ("lout", "lin"):
        Flags.note_unused(args, ["gen_weight"], f"with --loss {args.loss}")
    if args.backbone == "resnet8":
        Flags.note_unused(args, ["stem"], "with --backbone resnet8, which has one stem")
    if not args.lars:
        Flags.note_unused(args, ["trust"], "without --lars")
    if args.aug != "full":
        Flags.note_unused(args, ["color_s", "gray_p", "blur_p"], f"with --aug {args.aug}")
    if args.aug == "none":
        Flags.note_unused(args, ["crop_min"], "with --aug none")


def check_chunks(args, net, smallest):
    """Raise UserError if a chunk of --chunk_views has a single view and the net has batch normalization."""
    has_batch_norm = any(isinstance(layer, torch.nn.modules.batchnorm._BatchNorm) for layer in net.modules())
    if args.chunk_views and smallest < 2 and has_batch_norm:
        raise Utils.UserError(
            f"--chunk_views {args.chunk_views}: batch normalization needs more than one view in every chunk: "
            "use 3 or more, or 0"
        )


def describe(args, row, splits, trainer, folder):
    """Print the settings of the run, with the values that are used."""
    net = trainer.net
    precision = Devices.precision_name(args.precision, trainer.bf16, trainer.device)
    stem = stem_text(net.encoder)
    optimizer = f"{args.opt}{' + LARS' if args.lars else ''}, lr {args.lr:g}"
    n = Reports.plural(len(splits.train), "image")
    steps = Reports.plural(trainer.steps, "step")
    say(f"{row.name}: {n} of {row.size} px, {labels_text(splits)}; on {trainer.device} in {precision}")
    encoder = f"{args.backbone}, {stem}" if stem else args.backbone
    say(f"{encoder}: {count_parameters(net.encoder):,} parameters, head {count_parameters(net.head):,}")
    say(f"views: {trainer.augmentation}")
    say(f"{steps} of {args.bs} images x {len(trainer.positives)} views, {optimizer}")
    Runs.announce(folder, trainer.step, args.dry_run)


def labels_text(splits):
    """Return what the images are scored by, in words."""
    if not Evaluate.can_probe(splits):
        return "too few labels to score by"
    classes = Reports.plural(len(splits.train.classes), "class")
    if splits.eval == "cv":
        return f"{classes}, scored by cross-validation"
    return f"{classes}, scored on {Reports.plural(len(splits.test), 'image')} of the split {splits.eval}"


def main(args, make_positives=same_pair, script=Path(__file__).stem, build_parser=build_parser):
    """Train, save, score; return the exit code.

    make_positives: (args, splits, device, fingerprint) -> a source like `SamePair`. fingerprint: that of the positives
    of the checkpoint from which the run continues; "" if it is new. build_parser: the script's.
    """
    # device, images, run folder
    rank, world, device = Distributed.start(Devices.pick_device(args.device))
    torch.backends.cudnn.deterministic = args.deterministic
    Flags.check_models_dir(args)
    row = adjust_flags(args, world)
    check_memory(args, row, world, device)
    splits = Flags.splits_for(args, device)
    adjust_to_images(args, row, len(splits.train), world, device)
    note_unused(args)
    usual = Flags.hyper_parameters(build_parser(args.data, device.type).parse_args([]))
    folder = Runs.find_run(args, script, row.name, Flags.hyper_parameters(args), usual, splits.train.fingerprint)
    if args.dry_run:
        is_new = not Utils.names_a_file(args.resume)
        if is_new:
            check_init(args)
        positives = make_positives(args, splits, device, "")
        trainer = Trainer(args, splits.train, positives, device, rank, world, with_init=is_new)
        return try_out(args, row, splits, folder, trainer)

    # only one process, or group of processes, works on a run
    with Runs.claimed(folder):
        checkpoint = Distributed.first_rank_only(lambda: Runs.checkpoint_for(args, folder))
        fingerprint = ""
        if checkpoint:
            fingerprint = Utils.load_(checkpoint).get("positives", "")
        else:
            check_init(args)
        positives = make_positives(args, splits, device, fingerprint)
        trainer = Trainer(args, splits.train, positives, device, rank, world, with_init=checkpoint is None)
        if checkpoint:
            trainer.load(checkpoint)
        return pretrain(args, row, folder, splits, trainer)


def try_out(args, row, splits, folder, trainer):
    """Print what the run would do, and its time and memory, from a few real steps; write nothing."""
    trainer.positives.start_epoch(0)
    describe(args, row, splits, trainer, folder)
    trainer.net.train()
    started = time.perf_counter()
    while trainer.pace.seconds is None and trainer.step < trainer.steps:
        for indices, images in trainer.batches():
            trainer.update(indices, images)[0].item()  # waits for the device
            if trainer.pace.tick(trainer.step):
                break
    if trainer.pace.seconds is None:  # the whole run is shorter than that measurement
        trainer.pace.seconds = (time.perf_counter() - started) / trainer.steps
    trainer.step = 0
    say(estimate(trainer))
    before = trainer.positives.seconds_before
    if before:
        together = before + trainer.pace.left(0)
        say(f"generator, bank and training: about {Reports.duration(together)} together")
    say("dry run: no run folder was made")
    return 0


def pretrain(args, row, folder, splits, trainer):
    """Train to the end or to a signal, then score; return the exit code."""
    # the bank, before anything is written, since making it can take long; an epoch that is still to be scored needs its
    # own one
    first_step = trainer.step
    unscored = is_unscored(trainer, folder)
    trainer.positives.start_epoch(trainer.epoch - 1 if unscored else trainer.epoch)

    resumed_step = first_step if args.resume else None
    positives = trainer.positives.fingerprint
    run = Runs.Run(folder, args, trainer.device, resumed_step, writes=trainer.rank == 0, positives=positives)
    with contextlib.closing(run):
        describe(args, row, splits, trainer, folder)
        if run.writes and Evaluate.can_probe(splits):
            run.baseline("chance", dict.fromkeys(("knn", "linear"), Evaluate.chance(splits)), trainer.steps)
        if run.writes and unscored:
            with Distributed.alone():
                score_epoch(trainer, run, splits)

        # train
        stopped = False
        with Signals.Deferred() as interruption:
            while trainer.step < trainer.steps and not stopped:
                loss, wait, stopped = train_epoch(trainer, run, interruption)
                if not stopped:
                    stopped = finish_epoch(trainer, run, splits, loss, wait, interruption)
            if run.writes and stopped:
                run.interrupted(trainer.save(folder))

        # score
        if run.writes and not stopped:
            with Distributed.alone():
                result = finish_run(trainer, run, splits, again=first_step == trainer.step)
            metadata = encoder_metadata(trainer.net.encoder, args, trainer.epoch, result)
            save_encoder(folder / "encoder.pt", trainer.net.encoder, metadata)
            Runs.farewell(folder)
    return interruption.exit_code if stopped else 0


if __name__ == "__main__":
    Utils.set_threads()
    Utils.run_script(main, get_args)
