"""Score an encoder by kNN, linear probes and fine-tuning, next to chance, raw pixels and the untrained encoder.

    python Evaluate.py Models/RUN/40.pt                       # flags and weights come from the file
    python Evaluate.py Models/RUN --eval test --finetune 20   # the newest checkpoint of a run
    torchrun --nproc_per_node=2 Evaluate.py Models/RUN        # the processes share the features

Writes RUN/evaluation-EPOCH-SPLIT.json (fractions of 1, with the protocol) and prints the scores as a table. The run's
own evaluation.json is not changed.
"""

import Signals  # first: see TrainSimCLR.py

# isort: split
import argparse
import contextlib
import copy
import math
import re
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import Data
import Devices
import Distributed
import Flags
import Runs
import Utils
from Augmentations import to_float
from Backbones import takes_size
from Images.Folders import DATA_DIR

PROTOCOL = {
    "features": "encoder output before the projection head, float32, evaluation mode, images without augmentation",
    "knn_metric": "cosine, votes weighted by exp(similarity / knn_temperature)",
    "knn_k": 20,
    "knn_temperature": 0.1,
    "linear": "softmax regression on standardized features, full batch, L-BFGS",
    "linear_l2": 1e-3,
    "linear_iterations": 100,
    "linear_aug_passes": 5,  # over train, each with new random views, all in one fit
    "folds": 3,
    "selection": "none: the weights of this epoch, all labeled images of the split",
}


@contextlib.contextmanager
def evaluation_mode(net):
    """Switch a net to evaluation mode and back."""
    mode = net.training
    net.eval()
    try:
        yield
    finally:
        net.train(mode)


@contextlib.contextmanager
def frozen(encoder):
    """Switch to evaluation mode and back. Raises AssertionError if a weight or statistic has changed in between."""
    before = copy.deepcopy(encoder.state_dict())
    # float32, as the protocol says: no tf32 in convolutions
    cudnn = torch.backends.cudnn
    exact = cudnn.flags(cudnn.enabled, cudnn.benchmark, cudnn.benchmark_limit, cudnn.deterministic, allow_tf32=False)
    with evaluation_mode(encoder), exact:
        yield
    changed = [name for name, value in encoder.state_dict().items() if not torch.equal(value, before[name])]
    if changed:
        raise AssertionError(f"evaluation changed the encoder: {', '.join(changed)}")


def embed(net, x):
    """Return the features float32 (B, F) of views x, float (B, 3, H, W).

    Without gradients: if a GPU runs out of memory, it computes one half after the other.
    """
    try:
        return net(x.contiguous(memory_format=torch.channels_last)).float()
    except torch.OutOfMemoryError:
        if len(x) == 1 or torch.is_grad_enabled():
            raise
    return torch.cat([embed(net, half) for half in x.chunk(2)])


@torch.no_grad()
def extract(encoder, split, device, views=None, rng=None, bs=512):
    """Return features (N, F), float32 on `device`, of all images of a split. Several processes share the batches.

    views: an `Augmentation`, drawn with `rng`, a torch.Generator; None: the images as they are.
    """
    parts = torch.arange(len(split)).split(bs)
    params = {}  # of each batch, by its first row: every process draws those of all
    if views:
        params = {int(rows[0]): views.draw(len(rows), split.size, split.size, rng) for rows in parts}

    def embedded(own):
        for rows, images in split.batches(own, device):
            x = views.apply(images, params[int(rows[0])]) if views else to_float(images)
            yield rows, embed(encoder, x)

    features = None
    results = Distributed.spread(parts, embedded, to_all=True)
    for rows, part in tqdm(results, "features", len(parts), leave=False, disable=Utils.quiet()):
        if features is None:
            features = torch.zeros(len(split), part.shape[1], device=device)
        first = int(rows[0])  # the rows of a batch follow one another: no index is copied to the device
        features[first : first + len(part)] = part.to(device)
    return features


def extract_both(encoder, splits, device):
    """Return the features of `splits.train` and of `splits.test`, which are the same under "cv"."""
    train = extract(encoder, splits.train, device)
    return train, train if splits.eval == "cv" else extract(encoder, splits.test, device)


def knn_accuracy(train, train_labels, test, test_labels, k=PROTOCOL["knn_k"], temperature=PROTOCOL["knn_temperature"]):
    """Return the accuracy, in [0, 1], of weighted cosine kNN (Wu et al. 2018, arXiv:1805.01978).

    train, test: features (N, F) and (M, F); labels int64 (N,) and (M,). k is cut to N.
    """
    train = F.normalize(train, dim=1)
    test = F.normalize(test, dim=1)
    classes = int(train_labels.max()) + 1
    right = 0
    for x, y in zip(test.split(1024), test_labels.split(1024)):  # at most 1024 N similarities in memory
        nearest, rows = (x @ train.T).topk(min(k, len(train)), dim=1)  # (1024, k)
        votes = torch.zeros(len(x), classes, device=x.device)
        votes.scatter_add_(1, train_labels[rows], (nearest / temperature).exp())
        right += (votes.argmax(dim=1) == y).sum()
    return right.item() / len(test)


@torch.no_grad()
def neighbors_kept(encoder, images, versions, k=20):
    """Return a share in [0, 1] for each set of versions: how many of an image's k nearest neighbors its version has.

    It is averaged over the images.

    images: uint8 (N, 3, S, S), among which neighbors are looked for, by cosine similarity of features in evaluation
    mode. versions: float (Q, 3, S, S) in [0, 1] each, of the first Q images. An image is no neighbor of its version.
    """

    def features(x):
        with evaluation_mode(encoder):
            return F.normalize(torch.cat([embed(encoder, part) for part in x.split(512)]), dim=1)

    known = features(to_float(images))
    k = min(k, len(known) - 1)

    def neighbors(x):
        return (x @ known.T).fill_diagonal_(-2).topk(k, dim=1).indices

    found = []
    for version in versions:
        own = neighbors(known[: len(version)])
        theirs = neighbors(features(version))
        found.append((theirs[:, :, None] == own[:, None]).any(dim=2).float().mean().item())
    return found


def fit_linear(train, train_labels, l2=PROTOCOL["linear_l2"], iterations=PROTOCOL["linear_iterations"]):
    """Return weight (C, F) and bias (C,) of softmax regression: mean cross-entropy + l2 / 2 |weight|^2 at its minimum.

    The objective is convex and the batch is all of train, so there is no rate, order or seed to choose.
    """
    weight = train.new_zeros(int(train_labels.max()) + 1, train.shape[1]).requires_grad_()
    bias = train.new_zeros(len(weight)).requires_grad_()
    solver = torch.optim.LBFGS([weight, bias], max_iter=iterations, history_size=10, line_search_fn="strong_wolfe")

    def objective():
        solver.zero_grad()
        loss = F.cross_entropy(train @ weight.T + bias, train_labels) + l2 / 2 * weight.square().sum()
        loss.backward()
        return loss

    solver.step(objective)
    return weight.detach(), bias.detach()


def linear_accuracy(train, train_labels, test, test_labels):
    """Return the accuracy, in [0, 1], of `fit_linear` on features standardized by train: (N, F), (M, F)."""
    mean = train.mean(dim=0)
    std = train.std(dim=0, correction=0) + 1e-6
    weight, bias = fit_linear((train - mean) / std, train_labels)
    predicted = ((test - mean) / std @ weight.T + bias).argmax(dim=1)
    return (predicted == test_labels).sum().item() / len(test)


def folds(splits):
    """Return [(train rows, test rows)]: the labeled images that a probe learns from, and is scored on.

    One pair for "val" and "test"; for "cv" three, all of `splits.train`, stratified: each class is divided evenly.
    """
    labels = splits.train.labels
    labeled = (labels >= 0).nonzero().flatten()
    if splits.eval != "cv":
        return [(labeled, (splits.test.labels >= 0).nonzero().flatten())]
    shuffled = labeled[torch.randperm(len(labeled), generator=torch.Generator().manual_seed(0))]
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    deal = torch.arange(len(by_class)) % PROTOCOL["folds"]
    return [(by_class[deal != k], by_class[deal == k]) for k in range(PROTOCOL["folds"])]


def mean_accuracy(probe, splits, train, test, passes=1):
    """Return a probe's accuracy, averaged over `folds`. train: (passes * N, F), pass after pass; test: (M, F).

    If a GPU runs out of memory, it is computed on the CPU.
    """
    try:
        return _mean_accuracy(probe, splits, train, test, passes)
    except torch.OutOfMemoryError:
        pass  # what took the memory is gone after this block
    return _mean_accuracy(probe, splits, train.cpu(), test.cpu(), passes)


def _mean_accuracy(probe, splits, train, test, passes):
    n = len(splits.train)
    train_labels = splits.train.labels.to(train.device)
    test_labels = splits.test.labels.to(train.device)
    pairs = folds(splits)
    total = 0.0
    for rows, test_rows in pairs:
        rows = torch.cat([rows + index * n for index in range(passes)]).to(train.device)
        test_rows = test_rows.to(train.device)
        total += probe(train[rows], train_labels[rows % n], test[test_rows], test_labels[test_rows])
    return total / len(pairs)


def with_few_labels(splits, share, seed=0):
    """Return the splits with a part of the labels of `train`: the same share of each class, at least one label.

    share: in (0, 1]; seed: decides which. Raises UserError under "cv", where the same labels are learned and scored.
    """
    if splits.eval == "cv":
        raise Utils.UserError(f"--labels {share:g}: cross-validation scores on these labels: give --eval val or test")
    train = copy.copy(splits.train)
    train.labels = torch.full_like(splits.train.labels, -1)
    rng = torch.Generator().manual_seed(seed)
    for label in range(len(train.classes)):
        rows = (splits.train.labels == label).nonzero().flatten()
        count = math.ceil(share * len(rows))
        kept = rows[torch.randperm(len(rows), generator=rng)[:count]]
        train.labels[kept] = label
    return splits._replace(train=train)


def can_probe(splits):
    """Return whether there are labels of at least two classes, and enough of them to score with."""
    n_labeled = int((splits.train.labels >= 0).sum())
    n_scored = int((splits.test.labels >= 0).sum())
    enough = n_labeled >= PROTOCOL["folds"] if splits.eval == "cv" else n_labeled > 0 and n_scored > 0
    return len(splits.train.classes) > 1 and enough


def score(encoder, splits, device):
    """Return {"knn", "linear"}, fractions of 1: what is measured during training."""
    with frozen(encoder):
        train, test = extract_both(encoder, splits, device)
    return {
        "knn": mean_accuracy(knn_accuracy, splits, train, test),
        "linear": mean_accuracy(linear_accuracy, splits, train, test),
    }


def score_augmented(encoder, splits, device, views, seed=0):
    """Return the accuracy of a linear probe that learns from random views and is scored on images as they are."""
    rng = torch.Generator().manual_seed(seed)
    passes = PROTOCOL["linear_aug_passes"]
    with frozen(encoder):
        train = torch.cat([extract(encoder, splits.train, device, views, rng) for _ in range(passes)])
        test = extract(encoder, splits.test, device)
    return mean_accuracy(linear_accuracy, splits, train, test, passes)


def score_pixels(splits, device):
    """Return the accuracy of kNN on the pixels themselves, images reduced to at most 32 x 32."""
    pixels = nn.Sequential(nn.AdaptiveAvgPool2d(min(32, splits.train.size)), nn.Flatten())
    return mean_accuracy(knn_accuracy, splits, *extract_both(pixels, splits, device))


def chance(splits):
    """Return the share of the commonest class in the scored split."""
    labels = splits.test.labels[splits.test.labels >= 0]
    return labels.bincount().max().item() / len(labels)


def fine_tune(encoder, splits, device, views, epochs, bs=256, lr=0.05, seed=0):
    """Return the accuracy of a copy of the encoder trained further, with a linear layer on top, on the labeled images.

    SGD with Nesterov momentum .9, weight decay 5e-4, a cosine per step; views: the augmentation. epochs: 1 or more;
    bs: images in a step; lr: at the start; seed: of views and order, while the layer's first weights follow torch's own
    random state. The accuracy, in [0, 1], is that of `splits.test`, or the mean over the folds of cross-validation.
    """
    rng = torch.Generator().manual_seed(seed)
    train_labels = splits.train.labels.to(device)
    pairs = folds(splits)
    total = 0.0
    for rows, test_rows in pairs:
        # a fresh copy
        linear = nn.Linear(encoder.num_features, len(splits.train.classes))
        net = nn.Sequential(copy.deepcopy(encoder), linear).to(device)
        optimizer = torch.optim.SGD(net.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
        n_batches = math.ceil(len(rows) / bs)
        if n_batches > 1 and len(rows) % bs == 1:  # batch normalization needs two images
            n_batches -= 1
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * n_batches)

        # trained
        net.train()
        for _ in tqdm(range(epochs), "fine-tuning", unit="epoch", disable=Utils.quiet()):
            order = rows[torch.randperm(len(rows), generator=rng)]
            for indices, images in splits.train.batches(order.split(bs)[:n_batches], device):
                logits = embed(net, views(images, rng))
                loss = F.cross_entropy(logits, train_labels[indices.to(device, non_blocking=True)])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()

        # scored
        net.eval()
        logits = extract(net, splits.test, device)[test_rows.to(device)]
        is_right = logits.argmax(dim=1).cpu() == splits.test.labels[test_rows].cpu()
        total += is_right.sum().item() / len(test_rows)
    return total / len(pairs)


def evaluate(encoder, untrained, splits, views, device, epoch, baselines=True):
    """Return the content of evaluation.json: the scores, what they are compared with, and the protocol.

    untrained: the encoder as it was before training; None: it is not scored. baselines: False: only kNN, linear probe
    and chance.
    """
    result = score(encoder, splits, device)
    if baselines:
        if untrained:
            result |= {f"untrained_{name}": value for name, value in score(untrained, splits, device).items()}
        result["linear_aug"] = score_augmented(encoder, splits, device, views)
        result["pixels_knn"] = score_pixels(splits, device)
    result["chance"] = chance(splits)
    result["n_test"] = int((splits.test.labels >= 0).sum())
    result["split"] = splits.eval
    result["epoch"] = epoch
    result["protocol"] = PROTOCOL
    return result


SAVED = ("knn", "linear", "chance", "n_test", "split", "epoch")  # what evaluation.json always holds
ROWS = {  # the printed table: {name in evaluation.json: title}
    "knn": "kNN",
    "linear": "linear probe",
    "linear_aug": "linear probe on augmented images",
    "finetune": "fine-tuned",
    "chance": "chance (commonest class)",
    "pixels_knn": "kNN on raw pixels",
    "untrained_knn": "kNN, untrained encoder",
    "untrained_linear": "linear probe, untrained encoder",
    "label_real": "label kept? probe on real train images",
    "label_synthetic": "label kept? probe on their restorations",
}


def scores_table(result):
    """Return the scores of `evaluate` as text."""
    pairs = result.get("pairs", {})
    shown = result | pairs
    lines = [f"epoch {result['epoch']:d}, split {Utils.shown(result['split'])}, {result['n_test']:d} images"]
    for name, title in ROWS.items():
        if name in shown:
            lines.append(f"{title:44}{100 * shown[name]:6.2f} %")
    if pairs:
        others = {Utils.shown(name).replace("_", " "): value for name, value in pairs.items() if name not in ROWS}
        values = [f"{name} {value:.2f}" for name, value in others.items()]
        lines.append(f"pairs: {', '.join(values)}")
    if result.get("linear", 0) < result.get("untrained_linear", 0):
        lines.append("The encoder is worse than before training: it needs more images, --epochs, or --init FILE.")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------- script


def get_args(argv=None):
    """Parse the flags."""
    parser = Flags.plain_parser(__doc__)
    add = parser.add_argument
    add("checkpoint", type=Flags.path, help="a .pt file, or a run folder, whose newest checkpoint is used")
    add("--eval", choices=["val", "cv", "test"], help="split that is scored; default: as in the run")
    data = "labeled images to score on: the run's own in another place, or others (transfer); default: the run's own"
    add("--data", help=data)
    labels = "share of each class's labels that probes and fine-tuning learn from"
    add("--labels", type=Flags.bounded(float, 1e-6, 1), default=1.0, metavar="SHARE", help=labels)
    finetune = "also fine-tune a copy of the encoder, for that many epochs"
    add("--finetune", type=Flags.bounded(int, 0), default=0, metavar="EPOCHS", help=finetune)
    add(
        "--out",
        type=Flags.path,
        metavar="FILE",
        help="file to write; default: evaluation-EPOCH-SPLIT.json next to the checkpoint",
    )
    Flags.add_reading(parser.add_argument_group("reading images (defaults: those of the run, except for --device)"))
    parser.set_defaults(n_workers=None, data_dir=None, storage=None, skip_bad=None)
    args = parser.parse_args(argv)
    if args.data is not None:
        args.data = Data.place(args.data)
    return args


def read_run(args):
    """Return (file, content, flags) of the checkpoint: its run's flags, where this command does not give others."""
    file = Path(args.checkpoint)
    if file.is_dir():
        file = Distributed.first_rank_only(partial(Utils.newest_checkpoint, file))
    if file is None:
        raise Utils.UserError(f"{args.checkpoint} holds no checkpoint: give a .pt file or another folder")
    state = Utils.load_(file)
    if not {"args", "encoder", "epoch"} <= state.keys():
        if file.name == "encoder.pt":
            raise Utils.UserError(f"{file} is an encoder alone: give its run folder, or EPOCH.pt in it")
        raise Utils.UserError(f"{file} holds no encoder: give a checkpoint of TrainSimCLR.py or TrainISICLE.py")
    Utils.check_run(file, state)
    given = {key: value for key, value in vars(args).items() if value is not None}
    stored = Utils.current_flags(state["args"])
    run = argparse.Namespace(**usual_flags(file, stored) | stored | given)
    if args.data:  # a folder's images are resized to what the encoder has seen; a named data set has its own size
        run.size = None if Data.is_named(args.data) else run.image_size
    else:
        Flags.check_place(run.data, file)
    return file, state, run


def main(args):
    """Score one checkpoint; return the exit code."""
    *_, device = Distributed.start(Devices.pick_device(args.device))
    if args.out:
        check_out(Path(args.out))
    file, state, run = read_run(args)

    # the encoder, as it was before training and as it is
    untrained = Flags.untrained_encoder(run, device)
    encoder = Flags.encoder_for(run, with_init=False)
    Utils.load_parts(file, state, encoder=encoder)
    encoder.to(device, memory_format=torch.channels_last)

    # the images
    splits = Flags.splits_for(run, device)
    if not args.data:
        Runs.check_data(file, state, splits.train, run.data, "name those to score on by --data PATH")
    size = splits.train.size
    with evaluation_mode(encoder):
        if not takes_size(encoder, size):
            raise Utils.UserError(
                f"--data {run.data}: images of {size} px, which {run.backbone} of {file} does not take: give images of "
                f"{run.image_size} px"
            )
    if args.labels < 1:
        splits = with_few_labels(splits, args.labels)
    if not can_probe(splits):
        raise Utils.UserError(
            f"--data {run.data}: fewer than two classes, or too few labels: there is nothing to score"
        )

    # scores
    beat = Signals.heartbeat("scoring") if Distributed.is_first() else contextlib.nullcontext()
    with beat:
        result = evaluate(encoder, untrained, splits, Flags.augmentation_for(run), device, state["epoch"])
    if args.finetune:
        crop = Flags.augmentation_for(run, aug="crop")
        tuned = partial(fine_tune, encoder, splits, device, crop, args.finetune)
        try:
            result["finetune"] = Distributed.first_rank_only(tuned)
        except torch.OutOfMemoryError as error:
            reason = f"out of memory on {device}: use a device with more memory, or leave it out"
            raise Utils.UserError(f"--finetune {args.finetune}: {reason}") from error
    result["data"] = Utils.shown(run.data)
    result["protocol"] = PROTOCOL | {"labels": args.labels, "finetune_epochs": args.finetune}
    Distributed.say(f"{Utils.shown(file)}\n{scores_table(result)}")  # before it is written: the disk may be full
    out = Path(args.out) if args.out else file.parent / file_name(args, result, file)
    try:
        Distributed.first_rank_only(lambda: Utils.write_json(out, result))
    except Utils.UserError as error:
        raise Utils.UserError(f"{error} by --out FILE") from error
    Distributed.say(f"written to {Utils.shown(out)}")
    return 0


def check_out(out):
    """Raise UserError where --out has no folder, or would be written over something else than such scores."""
    Flags.check_folder_of(out)
    if out.resolve().name == "evaluation.json":
        raise Utils.UserError(f"--out {out}: this name is for the scores of a run itself: choose another")
    if out.is_file() and out.stat().st_size and Utils.read_json(out, ("split", "epoch", "protocol")) is None:
        raise Utils.UserError(f"--out {out}: it is there already, and holds no such scores: choose another")


def file_name(args, result, checkpoint):
    """Return the name of the file for some scores; never evaluation.json, which holds the run's own."""
    inside = re.fullmatch(r"\d+(\+\d+)", checkpoint.stem)  # a checkpoint inside an epoch
    name = f"evaluation-{result['epoch']}{inside[1] if inside else ''}-{result['split']}"
    if args.data:
        name += f"-{re.sub(r'[^A-Za-z0-9_.-]', '~', Path(args.data).name)}"
        if not Data.is_named(args.data):  # other folders can have the same name
            name += f"-{Utils.short_hash(args.data)[:6]}"
    if args.labels < 1:
        name += f"-labels_{args.labels:g}"
    if args.finetune:
        name += f"-finetune_{args.finetune}"
    return f"{name}.json"


NUMBER = (int, float)
# types of these flags; other flags: the type of their default
KINDS = {"size": (int, type(None)), "init": (str, type(None)), "seed": int}


def usual_flags(file, stored):
    """Return the defaults of flags that a checkpoint of another version may lack; print those that are used.

    Raises UserError on stored values of another type.
    """
    row = Data.DATASETS.get(str(stored.get("data", "shapes")), Data.DATASETS["folder"])
    usual = {"data": "shapes", "size": None, "eval": "val", "aug": "full", "seed": 0, "small_stem": row.small_images}
    usual |= {"image_size": stored.get("size") or row.size, "init": None, "normalize": False}
    usual |= {"n_workers": 2, "data_dir": str(DATA_DIR), "storage": "auto", "skip_bad": False}
    usual |= row.recipe_for("cuda")
    for key, value in usual.items():
        kinds = KINDS.get(key, NUMBER if type(value) in NUMBER else type(value))
        if not isinstance(stored.get(key, value), kinds):
            raise Utils.UserError(f"{file}: no value that --{key} can have: use another checkpoint")
    missing = [f"--{key} {value}" for key, value in usual.items() if key not in stored]
    if missing:
        lacks = f"it lacks {', '.join(missing)}: these defaults are used"
        Distributed.say(f"{Utils.shown(file)} is of another version: {lacks}")
    return usual


if __name__ == "__main__":
    Utils.set_threads()
    Utils.run_script(main, get_args)
