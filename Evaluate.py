"""Score an encoder: kNN, linear probes, fine-tuning; beside chance, raw pixels and the untrained encoder.

    python Evaluate.py Models/RUN/40.pt                       # all it needs is in the file
    python Evaluate.py Models/RUN --eval test --finetune 20   # the newest checkpoint of a run

Writes RUN/evaluation.json (fractions of 1, with the protocol) and prints the same as a table.
"""

import contextlib
import copy
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import Data
import Flags
import Utils

PROTOCOL = {
    "features": "encoder output before the projection head, float32, evaluation mode, images without augmentation",
    "knn_metric": "cosine, votes weighted by exp(similarity / knn_temperature)",
    "knn_k": 20,
    "knn_temperature": 0.1,
    "linear": "softmax regression on standardised features, full batch, L-BFGS",
    "linear_l2": 1e-3,
    "linear_iterations": 100,
    "linear_aug_passes": 5,  # over train, each with new random views, all in one fit
    "folds": 3,
    "selection": "none: the last epoch, all images of the split",
}


@contextlib.contextmanager
def frozen(encoder):
    """Switch to evaluation mode and back, and prove that not one bit of weights and statistics changed in between."""
    before, mode = copy.deepcopy(encoder.state_dict()), encoder.training
    encoder.eval()
    try:
        yield
    finally:
        encoder.train(mode)
    changed = [name for name, value in encoder.state_dict().items() if not torch.equal(value, before[name])]
    if changed:
        raise AssertionError(f"evaluation changed the encoder: {', '.join(changed)}")


@torch.no_grad()
def extract(encoder, split, device, views=None, generator=None, bs=512):
    """Return features (N, F), float32 on `device`, of all images of a split; 0 where --skip_bad leaves one out.

    views: an `Augmentation` with its `generator`; None: the images as they are.
    """
    views, generator, features = views or Data.plain_views(split.size), generator or torch.Generator(), None
    for rows, images in split.batches(torch.arange(len(split)).split(bs), device):
        part = encoder(views(images, generator).contiguous(memory_format=torch.channels_last)).float()
        features = part.new_zeros(len(split), part.shape[1]) if features is None else features
        features[rows.to(device)] = part
    return features


def extract_both(encoder, splits, device):
    """Return the features of `splits.train` and of `splits.test`, which are the same under "cv"."""
    train = extract(encoder, splits.train, device)
    return train, train if splits.eval == "cv" else extract(encoder, splits.test, device)


def knn_accuracy(train, train_labels, test, test_labels, k=PROTOCOL["knn_k"], temperature=PROTOCOL["knn_temperature"]):
    """Return the accuracy, in [0, 1], of weighted cosine kNN (Wu et al. 2018, arXiv:1805.01978).

    train, test: features (N, F) and (M, F); labels int64 (N,) and (M,). k is cut to N.
    """
    train, test = F.normalize(train, dim=1), F.normalize(test, dim=1)
    classes, right = int(train_labels.max()) + 1, 0
    for x, y in zip(test.split(1024), test_labels.split(1024)):  # bounds the memory to 1024 N similarities
        nearest, rows = (x @ train.T).topk(min(k, len(train)), dim=1)  # (1024, k)
        votes = torch.zeros(len(x), classes, device=x.device)
        votes.scatter_add_(1, train_labels[rows], (nearest / temperature).exp())
        right += (votes.argmax(dim=1) == y).sum()
    return right.item() / len(test)


def fit_linear(train, train_labels, l2=PROTOCOL["linear_l2"], iterations=PROTOCOL["linear_iterations"]):
    """Return weight (C, F) and bias (C,) of softmax regression: mean cross-entropy + l2 / 2 |weight|^2 at its minimum.

    The objective is convex and the batch is everything, so there is no rate, no order and no seed to choose.
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
    """Return the accuracy, in [0, 1], of `fit_linear` on features standardised by train: (N, F), (M, F)."""
    mean, std = train.mean(dim=0), train.std(dim=0, correction=0) + 1e-6
    weight, bias = fit_linear((train - mean) / std, train_labels)
    return (((test - mean) / std @ weight.T + bias).argmax(dim=1) == test_labels).sum().item() / len(test)


def folds(splits):
    """Return [(train rows, test rows)]: the labelled images that a probe learns from, and is scored on.

    One pair for "val" and "test"; for "cv" three, all of `splits.train`, stratified: each class is dealt out evenly.
    """
    labels = splits.train.labels
    labelled = (labels >= 0).nonzero().flatten()
    if splits.eval != "cv":
        return [(labelled, (splits.test.labels >= 0).nonzero().flatten())]
    shuffled = labelled[torch.randperm(len(labelled), generator=torch.Generator().manual_seed(0))]
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    deal = torch.arange(len(by_class)) % PROTOCOL["folds"]
    return [(by_class[deal != k], by_class[deal == k]) for k in range(PROTOCOL["folds"])]


def mean_accuracy(probe, splits, train, test, passes=1):
    """Return a probe's accuracy, averaged over `folds`. train: (passes * N, F), pass after pass; test: (M, F)."""
    n, total, pairs = len(splits.train), 0.0, folds(splits)
    train_labels, test_labels = splits.train.labels.to(train.device), splits.test.labels.to(train.device)
    for rows, test_rows in pairs:
        all_rows = torch.cat([rows + k * n for k in range(passes)]).to(train.device)
        test_rows = test_rows.to(train.device)
        total += probe(train[all_rows], train_labels[all_rows % n], test[test_rows], test_labels[test_rows])
    return total / len(pairs)


def can_probe(splits):
    """Return whether labels of at least two classes are there to score with."""
    return len(splits.train.classes) > 1


def score(encoder, splits, device):
    """Return {"knn", "linear"}, fractions of 1: what is measured during training."""
    with frozen(encoder):
        features = extract_both(encoder, splits, device)
    probes = {"knn": knn_accuracy, "linear": linear_accuracy}
    return {name: mean_accuracy(probe, splits, *features) for name, probe in probes.items()}


def score_augmented(encoder, splits, device, views, seed=0):
    """Return the accuracy of a linear probe that learns from random views, and is scored on images as they are."""
    generator, passes = torch.Generator().manual_seed(seed), PROTOCOL["linear_aug_passes"]
    with frozen(encoder):
        train = torch.cat([extract(encoder, splits.train, device, views, generator) for _ in range(passes)])
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
    """Return the accuracy of a copy of the encoder trained further, with a linear layer on top, on the labelled images.

    SGD with Nesterov momentum .9, weight decay 5e-4, a cosine per step; views: the augmentation.
    """
    generator, total, pairs = torch.Generator().manual_seed(seed), 0.0, folds(splits)
    for rows, test_rows in pairs:
        net = nn.Sequential(copy.deepcopy(encoder), nn.Linear(encoder.features, len(splits.train.classes))).to(device)
        optimizer = torch.optim.SGD(net.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(rows) // bs))
        net.train()
        for _ in tqdm(range(epochs), "fine-tuning", unit="epoch", disable=Utils.quiet()):
            order = rows[torch.randperm(len(rows), generator=generator)]
            for indices, images in splits.train.batches(order.split(bs), device):
                x = views(images, generator).contiguous(memory_format=torch.channels_last)
                loss = F.cross_entropy(net(x), splits.train.labels[indices.cpu()].to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        net.eval()
        logits = extract(net, splits.test, device)[test_rows.to(device)]
        total += (logits.argmax(dim=1).cpu() == splits.test.labels[test_rows].cpu()).sum().item() / len(test_rows)
    return total / len(pairs)


def evaluate(encoder, untrained, splits, views, device, epoch):
    """Return the content of evaluation.json: every score with its protocol and with what it is to be compared to.

    untrained: the encoder as it was before training; None leaves out all but kNN, linear probe and chance.
    """
    beside = {}
    if untrained:
        beside = {f"untrained_{name}": value for name, value in score(untrained, splits, device).items()}
        beside |= {"linear_aug": score_augmented(encoder, splits, device, views)}
        beside |= {"pixels_knn": score_pixels(splits, device)}
    return {
        **score(encoder, splits, device),
        **beside,
        "chance": chance(splits),
        **{"n_test": int((splits.test.labels >= 0).sum()), "split": splits.eval, "epoch": epoch, "protocol": PROTOCOL},
    }


def table(result):
    """Return the scores of `evaluate` as text."""
    rows = [
        *[("kNN", "knn"), ("linear probe", "linear"), ("linear probe, learnt from augmented images", "linear_aug")],
        *[("fine-tuned", "finetune"), ("chance (commonest class)", "chance"), ("kNN on raw pixels", "pixels_knn")],
        *[("kNN, untrained encoder", "untrained_knn"), ("linear probe, untrained encoder", "untrained_linear")],
    ]
    rows += [("linear probe, other half of the train images", "label_real")]
    rows += [("the same, their synthetic views", "label_synthetic")]
    pairs = result.get("pairs", {})
    shown = result | pairs
    lines = [f"{title:44}{100 * shown[key]:6.2f} %" for title, key in rows if key in shown]
    if pairs:
        numbers = (f"{name.replace('_', ' ')} {value:.2f}" for name, value in pairs.items() if name[:5] != "label")
        lines.append(f"pairs: {', '.join(numbers)}")
    return "\n".join([f"epoch {result['epoch']}, split {result['split']}, {result['n_test']} images", *lines])


# ---------------------------------------------------------------------------------------------------- script


def get_args(argv=None):
    """Parse the flags."""
    parser = Flags.parser_for(__doc__)
    parser.add_argument("checkpoint", help="a .pt file, or a run folder: its newest")
    parser.add_argument("--eval", choices=["val", "cv", "test"], help="what is scored; if not given, as the run did")
    parser.add_argument("--data", help="another place of the same data, where the run's own is gone")
    epochs = {"type": Flags.number(int, 0), "default": 0, "metavar": "EPOCHS"}
    parser.add_argument("--finetune", **epochs, help="also fine-tune a copy; 0: do not")
    parser.add_argument("--out", help="where to write; if not given, evaluation.json beside the checkpoint")
    parser.set_defaults(n_workers=None, data_dir=None, storage=None, skip_bad=None)  # as the run had them
    return parser.parse_args(argv)


def main(args):
    """Score one checkpoint."""
    file = Path(args.checkpoint)
    if file.is_dir() and (file := Utils.newest_checkpoint(args.checkpoint)) is None:
        raise Utils.UserError(f"{args.checkpoint} holds no checkpoint: give a .pt file or another folder")
    state = Utils.load_(file)
    if not {"args", "encoder", "epoch"} <= state.keys():
        raise Utils.UserError(f"{file} holds no encoder: give a checkpoint of TrainSimCLR.py")
    run = type(args)(**{**state["args"], **{key: value for key, value in vars(args).items() if value is not None}})
    device = Utils.pick_device(args.device)
    untrained, encoder = Flags.encoder_for(run), Flags.encoder_for(run)
    Utils.load_(file, encoder=encoder)
    splits = Flags.splits_for(run, device)
    if not can_probe(splits):
        raise Utils.UserError(f"--data {run.data}: one class or no labels: there is nothing to score")
    encoder, untrained = (net.to(device, memory_format=torch.channels_last) for net in (encoder, untrained))
    result = evaluate(encoder, untrained, splits, Flags.views_for(run), device, state["epoch"])
    if args.finetune:
        result["finetune"] = fine_tune(encoder, splits, device, Flags.views_for(run, "crop"), args.finetune)
        result["protocol"] = {**PROTOCOL, "finetune_epochs": args.finetune}
    out = Path(args.out) if args.out else file.parent / "evaluation.json"
    result |= measured_by_training(out, state["epoch"])
    write_result(out, result)
    print(f"{file}\n{table(result)}\nwritten to {out}")


def measured_by_training(file, epoch):
    """Return what an evaluation.json of the same epoch holds of the pairs: it takes the run's data and generator."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # none, or none of ours: it is written anew
        before = json.loads(file.read_text())
        if before["epoch"] == epoch:
            return {"pairs": before["pairs"]}
    return {}


def write_result(file, result):
    """Write evaluation.json."""
    Utils.write_atomically(file, lambda scratch: scratch.write_text(json.dumps(result, indent=1) + "\n"))


if __name__ == "__main__":
    Utils.run_script(main, get_args)
