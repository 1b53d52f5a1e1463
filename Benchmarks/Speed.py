"""Measure views per second of the augmentation and of a training step, compared with common implementations.

    python -m Benchmarks.Speed                              # two minutes; table on screen, Results/speed-DEVICE.json
    python -m Benchmarks.Speed --device cuda --backbone resnet18 --bs 512
    python -m Benchmarks.Speed --check                      # has anything become slower? Writes nothing

Augmentation, on one core: ours on a batch; torchvision on PIL images and, by its v2, on uint8 tensors, one image after
another; kornia on a batch. With --device cuda ours and kornia's are on the GPU. Step, data loading included:
`TrainSimCLR.Trainer`, also without some of its optimizations; a plain loop over a DataLoader; the same loop with the
transform, head and loss of lightly, if it is installed; then three views instead of two. All see the same images,
encoder and batch size, and take turns, so that other load on the machine affects them all.

--check compares the ratios with those in Results/speed-DEVICE.json and exits with 1 if one fell by over 15 %.
"""

import argparse
import contextlib
import multiprocessing
import os
import shlex
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path

import torch
from torchvision import transforms as v1
from torchvision.transforms import v2

import Devices
import Flags
import Runs
import Signals
import TrainISICLE
import TrainSimCLR
import Utils
from Backbones import BACKBONES
from Benchmarks.Alternatives import LIGHTLY, LightlyLoop, PlainLoop, kornia_transform, torchvision_transform
from CamNet.Bank import Bank
from Flags import bounded
from Images import Shapes

NOTES = {
    "peak_memory_bytes": "own process, 3 steps; CUDA: max_memory_allocated; CPU: ru_maxrss, without loader workers",
    "ratios": "views per second of ours / of the variant, in the same round; the median over rounds",
    "fp32": "on CUDA as torch has it by default: convolutions in tf32",
}
OF_BATCH = ("backbone", "bs", "size")  # flags on which a ratio depends
MOST_LOST = 0.15  # of a committed ratio, before --check fails
TWO_RESTORATIONS = ("--pair", "gen_gen", "--p_gen", "1")


def get_args(argv=None):
    """Parse the flags; --quick changes the defaults of others."""
    parser = Flags.plain_parser(__doc__)
    add = parser.add_argument
    add("--device", default="auto", help="torch device, for example cpu or cuda:1; auto: cuda if available")
    add("--backbone", default="resnet8", choices=list(BACKBONES), help="encoder")
    add("--bs", type=bounded(int, 2, Shapes.SIZES["train"]), default=256, metavar="N", help="images per step")
    add("--size", type=bounded(int, 8), default=32, metavar="PX", help="side of the images")
    add("--threads", type=bounded(int, 0), default=0, metavar="N", help="threads of torch in a step; 0: torch's choice")
    workers = "processes that the plain loop loads images with; 0: one for each core"
    add("--workers", type=bounded(int, 0), default=0, metavar="N", help=workers)
    add("--seconds", type=bounded(float, 0), default=10.0, metavar="S", help="seconds per variant, all rounds together")
    add("--rounds", type=bounded(int, 1), default=5, metavar="N", help="repetitions of all measurements")
    add(
        "--out",
        type=Flags.path,
        metavar="FILE",
        help="JSON to write; default: Results/speed-DEVICE.json or, with --quick, nothing",
    )
    add("--quick", action="store_true", help="a short test: --bs 32 --seconds 0.2 --rounds 2")
    check = "measure with the flags of the ratios in Results/ and --seconds 1, compare with these, write only --out; "
    check += "exit code 1 if one fell by over 15 %%"
    add("--check", action="store_true", help=check)
    args = parser.parse_args(argv)
    if args.quick and args.check:
        parser.error("--quick: its batch is not that of the committed ratios: leave it out with --check")
    if args.quick:
        parser.set_defaults(bs=32, seconds=0.2, rounds=2)
    if args.check:
        committed = read_committed(Devices.pick_device(args.device))
        flags = {name: committed["flags"][name] for name in (*OF_BATCH, "threads", "workers")}
        parser.set_defaults(seconds=1.0, **flags)
        args = parser.parse_args(argv)
        for name in OF_BATCH:
            if getattr(args, name) != flags[name]:
                parser.error(f"--{name} {getattr(args, name)}: the committed ratios are of {flags[name]}: leave it out")
        return args
    return parser.parse_args(argv)


def committed_file(device):
    """Return the file of the committed measurements on this type of device."""
    return Utils.ROOT / "Results" / f"speed-{device.type}.json"


def read_committed(device):
    """Return what an earlier run of this script wrote into Results/. Raises UserError if there is none."""
    file = committed_file(device)
    content = Utils.read_json(file, ("flags", "ratios"))
    if content is None:
        remedy = f"first run python -m Benchmarks.Speed --device {device.type}"
        raise Utils.UserError(f"--check: {Utils.shown(file)} holds no ratios to compare with: {remedy}")
    return content


def prepare(args, device):
    """Return TrainSimCLR.py's flags, with the recipe of the generated shapes, and those shapes."""
    given = ["--backbone", args.backbone, "--bs", str(args.bs), "--size", str(args.size)]
    flags = TrainSimCLR.get_args([*given, "--device", str(device), "--epochs", "1000000"])
    TrainSimCLR.adjust_flags(flags, 1)
    return flags, Flags.splits_for(flags, torch.device("cpu")).train


# ---------------------------------------------------------------------------------------------------- augmentation


def augmentation_variants(views, images, device):
    """Return {variant: function that makes float views of the uint8 images (B, 3, H, W)}."""
    rng = torch.Generator().manual_seed(0)
    local = images.to(device)
    tensors = list(images)
    pictures = [v1.functional.to_pil_image(image) for image in images]
    classical = torchvision_transform(v1, views, v1.ToTensor())
    modern = torchvision_transform(v2, views, v2.ToDtype(torch.float32, scale=True))
    variants = {
        "ours": lambda: views(local, rng),
        "torchvision, PIL images": lambda: torch.stack([classical(picture) for picture in pictures]),
        "torchvision v2, uint8 tensors": lambda: torch.stack([modern(tensor) for tensor in tensors]),
    }
    if find_spec("kornia"):
        mode = "resample" if device.type == "cuda" else "slice"  # slice, the default, crops one by one
        batched = kornia_transform(import_module("kornia.augmentation"), views, mode)
        variants["kornia, batch"] = lambda: batched(local.float().div_(255))
    else:
        print("kornia is not installed, so its row is left out: pip install -r requirements-dev.txt")
    return variants


# ---------------------------------------------------------------------------------------------------- steps


def our_step(flags, split, device, channels_last=True, positives=None, **changes):
    """Return a function that takes a step of the trainer as the script builds it, with some flags changed."""
    flags = argparse.Namespace(**(vars(flags) | changes))
    trainer = TrainSimCLR.Trainer(flags, split.to(device), positives or TrainSimCLR.SamePair(2), device)
    if not channels_last:  # one copy of the views more, a small part of a step
        augment = trainer.augment
        trainer.net.to(memory_format=torch.contiguous_format)
        trainer.augment = lambda batches: augment(batches).contiguous()
    trainer.net.train()

    def batches():
        while True:  # epoch after epoch
            yield from trainer.batches()

    stream = batches()
    return lambda: trainer.update(*next(stream))


def isicle_step(flags, split, device, pair=TWO_RESTORATIONS):
    """Return a function that takes a step of TrainISICLE.py with its flags `pair`, from a bank of noise."""
    own = TrainISICLE.get_args(list(pair))
    bank = torch.randint(256, (len(split), own.num_codes, 3, split.size, split.size), dtype=torch.uint8)
    positives = TrainISICLE.Restored(argparse.Namespace(**(vars(own) | vars(flags))))  # SimCLR's augmentation
    positives.bank = Bank(bank.numpy(), device, copied=True)
    return our_step(positives.args, split, device, positives=positives)


def step_variants(workers, device):
    """Return {variant: build}; build(flags, split, device) returns a function that takes a step."""
    variants = {
        "ours": our_step,
        "ours, ISICLE's pairs": isicle_step,
        "plain loop, PIL, fp32": partial(PlainLoop, workers=workers),
        "ours, fp32": partial(our_step, precision="tf32"),  # CPUs ignore tf32; see NOTES
        "ours, without channels_last": partial(our_step, channels_last=False),
    }
    if find_spec("lightly") and find_spec("lightning_utilities"):
        variants["lightly"] = partial(LightlyLoop, workers=workers)
    if device.type == "cuda":
        variants["ours, compiled"] = partial(our_step, compile=True)
    return variants


THREE_VIEWS = {
    "ours": partial(our_step, positives=TrainSimCLR.SamePair(3)),
    "ours, ISICLE's pairs": partial(isicle_step, pair=()),  # its default
}


# ---------------------------------------------------------------------------------------------------- measurement


def running(step):
    """Return the context in which a step can be taken."""
    return step.running() if isinstance(step, PlainLoop) else contextlib.nullcontext()


def measure(part, variants, views, args, device):
    """Return rows of views per second; the variants take turns, and each turn begins with a step that is not timed."""
    rounds = {name: [] for name in variants}
    for turn in range(args.rounds):
        for name, step in variants.items():
            with running(step):
                step()
                Devices.wait(device)
                count = 0
                start = time.perf_counter()
                while not count or time.perf_counter() - start < args.seconds / args.rounds:
                    step()
                    count += 1
                Devices.wait(device)
                speed = round(count * views / (time.perf_counter() - start), 1)
            rounds[name].append(speed)
            say(f"{part}, round {turn + 1}/{args.rounds}: {name}: {speed:,.0f} views/s")
    rows = []
    for name, values in rounds.items():
        median = round(statistics.median(values), 1)
        row = {"part": part, "peak_memory_bytes": None, "variant": name, "views_per_second": median, "rounds": values}
        rows.append(row)
    return rows


def say(text):
    """Print a line of progress; the table alone goes to standard output."""
    print(text, file=sys.stderr, flush=True)


def peak_memory(args, device, name):
    """Return the most bytes that three steps of a variant take. Call it in a new process."""
    torch.set_num_threads(args.threads or torch.get_num_threads())
    say(f"memory: {name}: images")
    flags, split = prepare(args, device)
    say(f"memory: {name}: net")
    step = step_variants(args.workers, device)[name](flags, split, device)
    with running(step):
        for count in range(3):
            say(f"memory: {name}: step {count + 1}/3")
            step()
    return Devices.peak_memory(device)


def measure_memory(args, device):
    """Return {variant of a step: bytes}. Call it first: what this process holds when it forks is counted as theirs."""
    context = multiprocessing.get_context("spawn" if device.type == "cuda" else "fork")
    memory = {}
    for name in step_variants(args.workers, device):
        with ProcessPoolExecutor(1, context) as pool:
            memory[name] = pool.submit(peak_memory, args, device, name).result()
        say(f"memory: {name}: {memory[name] / 2**20:,.0f} MiB")
    return memory


def measure_all(args, device):
    """Return (rows, ratios)."""
    memory = {} if args.check else measure_memory(args, device)

    # augmentation, on one thread
    say("images")
    flags, split = prepare(args, device)
    threads = args.threads or torch.get_num_threads()
    torch.set_num_threads(1)
    variants = augmentation_variants(Flags.augmentation_for(flags), split.images[: args.bs], device)
    rows = measure("augmentation", variants, args.bs, args, device)

    # steps
    say("nets of the steps")
    torch.set_num_threads(threads)
    variants = {name: build(flags, split, device) for name, build in step_variants(args.workers, device).items()}
    if "lightly" not in variants:
        print(f"lightly is not installed, so its row is left out: pip install --no-deps {LIGHTLY}")
    steps = measure("step", variants, 2 * args.bs, args, device)
    for row in steps:
        row["peak_memory_bytes"] = memory.get(row["variant"])
    variants = {name: build(flags, split, device) for name, build in THREE_VIEWS.items()}
    rows += steps + measure("step, 3 views", variants, 3 * args.bs, args, device)

    # ours against each other variant of its part, in the same round
    ours = {row["part"]: row["rounds"] for row in rows if row["variant"] == "ours"}
    ratios = {}
    for row in rows:
        in_rounds = [a / b for a, b in zip(ours[row["part"]], row["rounds"])]
        ratios[f"{row['part']}: {row['variant']}"] = round(statistics.median(in_rounds), 3)
    return rows, ratios


def print_table(rows, ratios):
    """Print the rows with their ratios."""
    print(f"{'part':14}{'variant':32}{'views/s':>10}{'ours / it':>11}{'peak MiB':>10}")
    for row, ratio in zip(rows, ratios.values()):
        memory = f"{row['peak_memory_bytes'] / 2**20:,.0f}" if row["peak_memory_bytes"] else ""
        print(f"{row['part']:14}{row['variant']:32}{row['views_per_second']:10,.0f}{ratio:11.2f}{memory:>10}")


def gain(name, ratio):
    """Return a ratio as a number that falls when our code becomes slower.

    In most rows it is ours / a variant. ISICLE's pairs are ours as well: there it is their speed / that of SimCLR's.
    """
    return 1 / ratio if name.endswith("ours, ISICLE's pairs") else ratio


def compare(committed, ratios):
    """Print each committed ratio next to the new one; return the names of those that fell by over MOST_LOST."""
    fallen = []
    print(f"{'ratio':48}{'committed':>10}{'now':>10}{'change':>10}")
    for name, before in committed.items():
        if name.endswith(": ours"):  # 1 by definition
            continue
        if name not in ratios:
            print(f"{name:48}{before:10.2f}{'not measured':>20}")
            continue
        change = gain(name, ratios[name]) / gain(name, before) - 1
        note = ""
        if change < -MOST_LOST:
            fallen.append(name)
            note = "  fell"
        print(f"{name:48}{before:10.2f}{ratios[name]:10.2f}{100 * change:+9.0f}%{note}")
    return fallen


def check(device, ratios):
    """Compare the ratios with the committed ones, and print which fell; return the exit code."""
    committed = read_committed(device)
    print(f"\ncompared with {Utils.shown(committed_file(device))}, of {committed.get('device', 'an unknown device')}")
    fallen = compare(committed["ratios"], ratios)
    if fallen:
        print(f"fell by over {100 * MOST_LOST:.0f} %: {'; '.join(fallen)}")
        return 1
    print(f"no ratio fell by over {100 * MOST_LOST:.0f} %")
    return 0


@Signals.heartbeat("measuring")
def main(args):
    """Measure, print a table, write it; return the exit code."""
    device = Devices.pick_device(args.device)
    args.workers = args.workers or len(os.sched_getaffinity(0))
    made = Runs.provenance(device)
    made["command"] = shlex.join(["python", "-m", "Benchmarks.Speed", *sys.argv[1:]])
    made["load_average_before"] = os.getloadavg()
    rows, ratios = measure_all(args, device)
    print_table(rows, ratios)

    made["workers"] = args.workers
    made["threads"] = {"augmentation": 1, "step": torch.get_num_threads()}
    installed = {package.name.lower(): package.version for package in metadata.distributions()}
    made["versions"] = {name: installed.get(name) for name in ("torch", "torchvision", "kornia", "lightly", "pillow")}
    made["flags"] = Utils.plain(args)
    made["rows"] = rows
    made["ratios"] = ratios
    made["notes"] = NOTES
    if args.out or not (args.quick or args.check):
        out = Path(args.out or committed_file(device))
        out.parent.mkdir(parents=True, exist_ok=True)
        Utils.write_json(out, made)
        print(f"written: {out}")
    return check(device, ratios) if args.check else 0


if __name__ == "__main__":
    Utils.set_threads()
    Utils.run_script(main, get_args)
