"""Measure the memory and the speed of a large batch, with and without --chunk_views (gradient caching), on a CPU.

    python -m Benchmarks.Chunks             # two minutes; table on screen, Results/chunks-cpu.json

Steps of TrainSimCLR.py by the recipe of the generated shapes, with images of noise: a large batch at once, the same
batch in chunks, and a batch that is one chunk. Each in its own process, whose peak is the largest resident set.
"""

import multiprocessing
import shlex
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

import Devices
import Flags
import Runs
import Signals
import TrainSimCLR
import Utils
from Benchmarks.Gpu import FULL, Bench, steps_of
from Flags import bounded

CPU = torch.device("cpu")


def get_args(argv=None):
    """Parse the flags."""
    parser = Flags.plain_parser(__doc__)
    add = parser.add_argument
    add("--bs", type=bounded(int, 4), default=4096, metavar="N", help="images in a step of the large batch")
    add("--chunk_views", type=bounded(int, 4), default=512, metavar="N", help="views in a chunk")
    add("--steps", type=bounded(int, 1), default=2, metavar="N", help="steps that are timed, after one that is not")
    add("--out", type=Flags.path, default="Results/chunks-cpu.json", metavar="FILE", help="JSON to write")
    return parser.parse_args(argv)


def measure(bs, chunk_views, steps):
    """Return (peak memory before the first step, after the last, views per second). Call it in a new process."""
    Utils.keep_memory()  # as the scripts do
    words = f"--device cpu --epochs 1000 --bs {bs} --chunk_views {chunk_views}"
    flags = TrainSimCLR.get_args(words.split())
    TrainSimCLR.adjust_flags(flags, 1)
    trainer = TrainSimCLR.Trainer(flags, Bench(CPU, FULL).split(bs), TrainSimCLR.SamePair(2), CPU)
    step = steps_of(trainer)
    before = Devices.peak_memory(CPU)
    step()
    started = time.perf_counter()
    for _ in range(steps):
        step()
    speed = steps * bs * 2 / (time.perf_counter() - started)
    return before, Devices.peak_memory(CPU), round(speed, 1)


@Signals.heartbeat("measuring")
def main(args):
    """Measure, print a line for each row, write them; return the exit code."""
    made = Runs.provenance(CPU)
    made["command"] = shlex.join(["python", "-m", "Benchmarks.Chunks", *sys.argv[1:]])
    made["rows"] = []
    context = multiprocessing.get_context("spawn")  # a process that is forked begins with the memory of this one
    for bs, chunk_views in ((args.bs, 0), (args.bs, args.chunk_views), (args.chunk_views // 2, 0)):
        print(f"{bs} images, --chunk_views {chunk_views}", file=sys.stderr, flush=True)
        with ProcessPoolExecutor(1, context) as pool:
            before, peak, speed = pool.submit(measure, bs, chunk_views, args.steps).result()
        row = {"bs": bs, "chunk_views": chunk_views, "before_bytes": before, "peak_memory_bytes": peak}
        made["rows"].append(row | {"views_per_second": speed})
        print(f"{bs:6} images, --chunk_views {chunk_views}: {peak / 2**20:,.0f} MiB, {speed:,.0f} views/s", flush=True)
    Utils.write_json(Path(args.out), made)
    print(f"written: {args.out}")
    return 0


if __name__ == "__main__":
    Utils.run_script(main, get_args)
