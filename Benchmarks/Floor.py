"""Measure how far from the limit of this CPU each stage is, and what stands between.

    python -m Benchmarks.Floor                  # minutes; table on screen, Results/floor-cpu.json

The floor of a stage is the time of its multiply-accumulates at the rate of large matrix products, in the precision
that each of them is computed in, plus the time of the bytes that all other operations read and write at the bandwidth
of a large copy, as if no operation were fused with another. Rates are measured in the same rounds as the stages, and
of all rounds the best counts, since other work on the machine only slows them. The profile is the share of each kind of
operation in the time of a stage; the rest is Python and autograd.

Stages, by the recipes of the generated shapes: the views of a step of TrainSimCLR.py, the rest of that step, the search
of TrainCamNet.py, a step of it, and the restorations of a bank.
"""

import re
import shlex
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import Flags
import Runs
import Signals
import TrainCamNet
import TrainSimCLR
import Utils
from Benchmarks.Gpu import FULL, Bench
from CamNet.Bank import BATCH, restore
from CamNet.Codes import make_keys
from CamNet.Distances import build_distance
from CamNet.Measures import AT_ONCE
from Flags import bounded

CPU = torch.device("cpu")
SIDE = 2048  # of the matrices whose product shows the rate
COPIED = 2**28  # bytes of the copy that shows the bandwidth
RATE_SECONDS = 0.5  # for each of them in a round
KINDS = {  # kind of operation: its names, tried in this order
    "convolutions, backward": r"convolution_backward",
    "convolutions and products": r"convolution|aten::(add|b)?mm$|linear",
    "normalization": r"(batch|group|weight)_norm|vector_norm|norm_except",
    "optimizer": r"_fused_|_foreach_",
    "copies and layout": r"copy_|_to_copy|contiguous|clone|cat\b|stack|index|gather|fill_|zero_|repeat_interleave",
    "other operations": r"aten::",
}
FREE = ("empty", "new_empty", "detach", "alias", "_unsafe_view", "_reshape_alias", "lift_fresh")  # touch no bytes


def get_args(argv=None):
    """Parse the flags."""
    parser = Flags.plain_parser(__doc__)
    add = parser.add_argument
    add("--threads", type=bounded(int, 0), default=0, metavar="N", help="threads of torch; 0: torch's choice")
    add("--seconds", type=bounded(float, 0), default=5.0, metavar="S", help="seconds per stage, all rounds together")
    add("--rounds", type=bounded(int, 1), default=5, metavar="N", help="repetitions of all measurements")
    add("--out", type=Flags.path, default="Results/floor-cpu.json", metavar="FILE", help="JSON to write")
    return parser.parse_args(argv)


# ---------------------------------------------------------------------------------------------------- stages


def simclr_trainer(rank=0, world=1):
    """Return the trainer of TrainSimCLR.py by the recipe of the generated shapes, with images of noise."""
    flags = TrainSimCLR.get_args(["--device=cpu", "--epochs=100000"])
    TrainSimCLR.adjust_flags(flags, world)
    split = Bench(CPU, FULL).split(2 * flags.bs)
    return TrainSimCLR.Trainer(flags, split, TrainSimCLR.SamePair(2), CPU, rank, world)


def camnet_trainer(count):
    """Return (the trainer of TrainCamNet.py by that recipe, a Period of `count` images of noise with random codes)."""
    flags = TrainCamNet.get_args(["--device=cpu", f"--period={count}", "--no-single_code"])
    generator = TrainCamNet.build_generator(flags, FULL.size)
    distance = build_distance("pixels")
    split = Bench(CPU, FULL).split(count + count // 9 + 2)  # a tenth is held out
    trainer = TrainCamNet.Trainer(flags, split, generator, distance, TrainCamNet.codes_per_level(flags), CPU)
    rows = trainer.rows_of(0)
    keys = make_keys(0, rows)
    period = TrainCamNet.Period(trainer, rows, trainer.images(rows), keys)
    period.keys = keys[:, None].expand(-1, len(trainer.net.sides)).contiguous()
    return trainer, period


def stages():
    """Return {stage: function that does it once}."""
    simclr = simclr_trainer()
    simclr.net.train()
    indices, images = next(iter(simclr.batches()))
    views = partial(simclr.augment, [images, images])
    made = views()

    def step_without_views():
        simclr.augment = lambda batches: made
        simclr.update(indices, images)

    camnet, period = camnet_trainer(AT_ONCE)
    part = torch.arange(AT_ONCE)
    keys = period.keys[:, 0].contiguous()
    net = camnet.frozen()
    rows = torch.arange(BATCH) % len(camnet.split)
    pictures = camnet.images(rows)
    return {
        f"SimCLR, views of {len(images)} images": views,
        f"SimCLR, the rest of the step of {len(images)}": step_without_views,
        f"generator, search for {AT_ONCE} images": lambda: period.search(camnet, net, part, keys),
        f"generator, step of {AT_ONCE}": lambda: camnet.update(period, part),
        f"bank, a restoration of {BATCH} images": lambda: restore(net, pictures, rows, 1, 0, camnet.autocast),
    }


# ---------------------------------------------------------------------------------------------------- floor


class Count(TorchDispatchMode):
    """Counts, inside `with`, the multiply-accumulates by type, and the bytes that all other operations touch."""

    def __init__(self):
        super().__init__()
        self.macs = Counter()
        self.n_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with self:  # in inference mode, an operation that is made of others comes here as a whole
            out = func.decompose(*args, **kwargs)
        if out is not NotImplemented:
            return out
        out = func(*args, **kwargs)
        packet = func._overloadpacket
        if packet in flop_registry:
            flops = flop_registry[packet](*args, **kwargs, out_val=out)
            self.macs[str(args[0].dtype).removeprefix("torch.")] += flops // 2
        elif not func.is_view and packet.__name__.removesuffix("_like") not in FREE:
            tensors = [each for each in tree_leaves((args, kwargs, out)) if isinstance(each, torch.Tensor)]
            self.n_bytes += sum(held_bytes(each) for each in {id(each): each for each in tensors}.values())
        return out


def held_bytes(tensor):
    """Return the bytes of a tensor; what is repeated without a copy counts once."""
    n_bytes = tensor.element_size()
    for length, stride in zip(tensor.shape, tensor.stride()):
        n_bytes *= length if stride or not length else 1
    return n_bytes


def rate(dtype):
    """Return the multiply-accumulates per second of a large matrix product."""
    matrix = torch.rand(SIDE, SIDE).to(dtype)
    return SIDE**3 / seconds(lambda: matrix @ matrix, RATE_SECONDS)


def bandwidth():
    """Return the bytes per second that a large copy reads and writes."""
    source = torch.zeros(COPIED, dtype=torch.uint8)
    target = torch.ones_like(source)
    return 2 * COPIED / seconds(lambda: target.copy_(source), RATE_SECONDS)


def seconds(function, least):
    """Return the mean time of function(), repeated for at least so many seconds, after a call that is not timed."""
    function()
    count = 0
    started = time.perf_counter()
    while not count or time.perf_counter() - started < least:
        function()
        count += 1
    return (time.perf_counter() - started) / count


def profile_once(function):
    """Return {kind of operation: seconds of it in function()}; "Python, autograd": the rest."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        started = time.perf_counter()
        function()
        whole = time.perf_counter() - started
    found = dict.fromkeys(KINDS, 0.0)
    for event in profiler.key_averages():
        kind = next((kind for kind, names in KINDS.items() if re.search(names, event.key)), None)
        if kind:
            found[kind] += event.self_cpu_time_total / 1e6
    found["Python, autograd"] = max(0.0, whole - sum(found.values()))
    return found


def shares(function, tries):
    """Return {kind of operation: its share in the time of function()}, in the fastest of some tries."""
    found = min((profile_once(function) for _ in range(tries)), key=lambda seconds: sum(seconds.values()))
    whole = sum(found.values())
    return {kind: round(part / whole, 3) for kind, part in found.items()}


# ---------------------------------------------------------------------------------------------------- script


@Signals.heartbeat("measuring")
def main(args):
    """Measure, print a table, write it; return the exit code."""
    torch.set_num_threads(args.threads or torch.get_num_threads())
    made = Runs.provenance(CPU)
    made["command"] = shlex.join(["python", "-m", "Benchmarks.Floor", *sys.argv[1:]])
    measured = {"bfloat16": [], "float32": [], "bandwidth": []}
    work = stages()
    times = {name: [] for name in work}
    for turn in range(args.rounds):
        for dtype in (torch.bfloat16, torch.float32):
            measured[str(dtype).removeprefix("torch.")].append(rate(dtype))
        measured["bandwidth"].append(bandwidth())
        for name, function in work.items():
            times[name].append(seconds(function, args.seconds / args.rounds))
            print(f"round {turn + 1}/{args.rounds}: {name}: {1000 * times[name][-1]:,.1f} ms", flush=True)
    rates = {name: max(values) for name, values in measured.items()}
    made["rates"] = {name: round(value) for name, value in rates.items()}

    made["rows"] = []
    for name, function in work.items():
        with Count() as count:
            function()
        products = sum(macs / rates[dtype] for dtype, macs in count.macs.items())
        row = {"stage": name, "seconds": round(min(times[name]), 5), "macs": dict(count.macs)}
        row |= {"bytes": count.n_bytes, "products_floor": round(products, 5)}
        row |= {"bytes_floor": round(count.n_bytes / rates["bandwidth"], 5), "shares": shares(function, args.rounds)}
        made["rows"].append(row)
    print_table(made)
    Utils.write_json(Path(args.out), made)
    print(f"written: {args.out}")
    return 0


def print_table(made):
    """Print the floors and the profiles."""
    print(", ".join(f"{name} {value / 1e9:,.0f}" for name, value in made["rates"].items()), "10^9 a second")
    for row in made["rows"]:
        floor = row["products_floor"] + row["bytes_floor"]
        times = f"{1000 * row['seconds']:8.1f} ms, floor {1000 * row['products_floor']:6.1f} + "
        print(f"{row['stage']:40}{times}{1000 * row['bytes_floor']:6.1f} ms, {row['seconds'] / floor:5.1f} x")
        print("    " + ", ".join(f"{kind} {100 * share:.0f} %" for kind, share in row["shares"].items()))


if __name__ == "__main__":
    Utils.set_threads()
    Utils.run_script(main, get_args)
