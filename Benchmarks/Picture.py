"""Draw the pictures of README.md and Results/README.md.

    python -m Benchmarks.Picture method                             # the newest generator in Models/
    python -m Benchmarks.Picture method Models/RUN                  # a generator: a run folder of TrainCamNet.py
    python -m Benchmarks.Picture arms Results/arms-shapes.json      # a file of Benchmarks.Arms
    python -m Benchmarks.Picture shapes

method: x, c(x), restorations and the three views of the default pair. arms: linear accuracy and compute of each arm.
shapes: images of each class of the generated data. Needs matplotlib for arms.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
from torchvision.utils import make_grid

import Flags
import Reports
import Runs
import TrainISICLE
import Utils
from Augmentations import to_float
from Benchmarks import Tables
from Benchmarks.Collect import newest_generator
from CamNet.Codes import make_keys
from CamNet.Generator import Generator
from Images import Shapes

ROWS = 5  # images of the picture of the method
HEADS = ["x", "c(x)", "g(c(x), z1)", "g(c(x), z2)", "g(c(x), z3)"]
HEADS += ["view 1:\nx, augmented", "view 2:\nx, augmented", "view 3:\ng(c(x), z1), augmented"]
EACH = 20  # images of a class
MARKERS = {"SimCLR": ("o", "tab:blue"), "ISICLE": ("s", "tab:red"), "control": ("^", "tab:gray")}


def get_args(argv=None):
    """Parse the flags."""
    parser = Flags.plain_parser(__doc__)
    add = parser.add_argument
    add("what", choices=["method", "arms", "shapes"], help="picture to draw")
    source = "method: a run folder of TrainCamNet.py, default: the newest in Models/; arms: a JSON of Benchmarks.Arms"
    add("source", nargs="?", help=source)
    add(
        "--out",
        type=Flags.path,
        metavar="FILE",
        help="file to write; default: Results/method.png, Results/shapes.png, SOURCE.png",
    )
    args = parser.parse_args(argv)
    if args.what == "arms" and not args.source:
        raise Utils.UserError("arms: name the JSON file that Benchmarks.Arms has written")
    return args


# ---------------------------------------------------------------------------------------------------- method


@torch.no_grad()
def draw_method(run, file):
    """Draw rows of x, c(x), three restorations and three views, for a generator's run folder.

    The third view is a restoration, as it is in training with probability --p_gen. The images are the first ones of the
    train split whose third view is in color: --gray_p makes some of them gray.
    """
    # restorations
    cpu = torch.device("cpu")
    checkpoint = Utils.newest_checkpoint(run)
    state = Utils.load_(checkpoint) if checkpoint else {}
    if "config" not in state:
        raise Utils.UserError(f"{run} holds no generator: give a run folder of TrainCamNet.py")
    generator = Generator(**state["config"]).to(memory_format=torch.channels_last)
    Utils.load_parts(checkpoint, state, generator=generator)
    theirs = argparse.Namespace(**state["args"])
    split = Flags.train_split_for(theirs, cpu)
    rows, images = next(iter(split.batches([torch.arange(min(8 * ROWS, len(split)))], cpu)))
    keys = make_keys(0, rows)
    condition = generator.corruption(images, keys)
    restored = [generator.sample(condition, make_keys(keys, k)) for k in range(3)]

    # views
    flags = TrainISICLE.get_args(["--data", theirs.data] + ([f"--size={theirs.size}"] if theirs.size else []))
    augmentation = Flags.augmentation_for(flags)
    rng = torch.Generator().manual_seed(0)
    views = []
    for batch in (to_float(images), to_float(images), restored[0]):
        params = augmentation.draw(len(images), *images.shape[2:], rng)
        views.append(augmentation.apply(batch, params))
    shown = (~params["gray"]).nonzero().flatten()[:ROWS]  # params: of the third view

    columns = [to_float(images), generator.corruption.upsample(condition), *restored, *views]
    tiles = torch.stack([column[shown] for column in columns], dim=1)  # (ROWS, columns, 3, S, S)
    grid = make_grid(tiles.flatten(0, 1).float().clamp(0, 1), nrow=len(columns), padding=1, pad_value=1)
    Runs.write_image(file, Reports.captioned(grid, HEADS))


# ---------------------------------------------------------------------------------------------------- arms


def kind_of(title):
    """Return "SimCLR", "ISICLE" or, of other arms, "control"."""
    return next((kind for kind in MARKERS if title.startswith(kind)), "control")


def draw_arms(records, file):
    """Draw a row per arm: linear accuracy, mean and standard deviation over seeds, and next to it what it costs."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    # the best arm at the top
    groups = list(Tables.by_arm(records).values())
    groups.sort(key=lambda runs: statistics.mean(row["linear"] for row in runs))
    height = 1.4 + 0.42 * len(groups)
    figure, (left, right) = plt.subplots(1, 2, sharey=True, figsize=(11, height), layout="constrained")

    for place, runs in enumerate(groups):
        # accuracy
        values = [100 * row["linear"] for row in runs]
        mean = statistics.mean(values)
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        marker, color = MARKERS[kind_of(runs[0]["title"])]
        left.errorbar(mean, place, xerr=deviation, fmt=marker, color=color, capsize=3)
        left.annotate(f"{mean:.1f}", (mean, place), (0, 6), textcoords="offset points", ha="center", fontsize="small")

        # compute
        encoder, generator = Tables.compute_of(runs[0])
        right.barh(place, encoder, color=color, height=0.5)
        right.barh(place, generator, left=encoder, color=color, height=0.5, alpha=0.35, hatch="//")
        total = f" {encoder + generator:.1f}"
        if generator:
            total += f", generator {generator:.1f}"
        right.annotate(total, (encoder + generator, place), va="center", fontsize="small")

    first = records[0]
    left.set_yticks(range(len(groups)), [Tables.title_of(runs[0]) for runs in groups])
    left.margins(x=0.08)
    left.set_ylim(-0.6, len(groups) - 0.2)
    left.set_xlabel(f"linear probe accuracy\n% of {first['n_test']:,} {first['split']} images")
    right.set_xlabel("compute (10$^{12}$ multiply-accumulates,\ngenerator included: the hatched part)")
    right.set_xlim(0, 1.8 * max(sum(Tables.compute_of(runs[0])) for runs in groups))
    for axes in (left, right):
        axes.grid(alpha=0.3, axis="x")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    data = first["flags"]["data"]
    seeds = max(len(runs) for runs in groups)
    title = f"{Path(data).name}: SimCLR (circles), ISICLE (squares), controls (triangles); "
    figure.suptitle(title + f"mean ± standard deviation, {seeds} seeds")
    Utils.write_atomically(file, lambda scratch: figure.savefig(scratch, dpi=100, format="png"))
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------- shapes


def draw_shapes(file):
    """Draw images of each class of the generated data, a row per class."""
    images, labels = Shapes.make_split("train")
    rows = [images[labels == index][:EACH] for index in range(len(Shapes.CLASSES))]
    grid = make_grid(to_float(torch.cat(rows)), nrow=EACH, padding=1, pad_value=1)
    Runs.write_image(file, Reports.captioned(grid, rows=Shapes.CLASSES))


def main(args):
    """Draw one picture and say where it is."""
    results = Utils.ROOT / "Results"
    if args.what == "method":
        file = Path(args.out or results / "method.png")
        draw_method(Path(args.source) if args.source else newest_generator(Utils.ROOT / "Models"), file)
    elif args.what == "arms":
        source = Path(args.source)
        if not source.is_file():
            raise Utils.UserError(f"{source}: no such file: run python -m Benchmarks.Arms first")
        file = Path(args.out or source.with_suffix(".png"))
        draw_arms(json.loads(source.read_text()), file)
    else:
        file = Path(args.out or results / "shapes.png")
        draw_shapes(file)
    print(f"written: {file}")
    return 0


if __name__ == "__main__":
    Utils.run_script(main, get_args)
