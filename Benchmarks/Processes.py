"""Measure what several processes on one machine gain over threads, on a CPU: SimCLR, generator, bank.

    python -m Benchmarks.Processes              # minutes; table on screen, Results/processes-cpu.json

One process with one thread, one process with N threads, and N processes with one thread each (torchrun); N is the
number of cores. They take turns. All do the same: steps of TrainSimCLR.py, the search and the training steps of
TrainCamNet.py and the filling of a bank, by the recipes of the generated shapes, with images of noise.
"""

import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from functools import partial
from pathlib import Path

import torch

import Distributed
import Flags
import Runs
import Signals
import Utils
from Benchmarks.Floor import CPU, camnet_trainer, simclr_trainer
from Benchmarks.Gpu import steps_of
from CamNet.Bank import fill
from Flags import bounded

CODES = 8  # restorations of an image in the bank


def get_args(argv=None):
    """Parse the flags."""
    parser = Flags.plain_parser(__doc__)
    add = parser.add_argument
    add("--processes", type=bounded(int, 2), metavar="N", help="default: one for each core, at least 2")
    add("--images", type=bounded(int, 64), default=512, metavar="N", help="images that are searched and restored")
    add("--steps", type=bounded(int, 1), default=20, metavar="N", help="training steps")
    add("--rounds", type=bounded(int, 1), default=3, metavar="N", help="repetitions of all measurements")
    add("--out", type=Flags.path, default="Results/processes-cpu.json", metavar="FILE", help="JSON to write")
    add("--work", action="store_true", help="measure once in this process: so the script starts itself")
    args = parser.parse_args(argv)
    args.processes = args.processes or max(2, Utils.usable_cores())
    return args


# ---------------------------------------------------------------------------------------------------- work


def per_second(count, function):
    """Return `count` over the seconds of function(), from when all processes begin to when all are done."""
    Distributed.barrier()
    started = time.perf_counter()
    function()
    Distributed.barrier()
    return round(count / (time.perf_counter() - started), 1)


def work(args):
    """Measure in this process, together with the others of torchrun; the first one prints a line of JSON."""
    rank, world, _ = Distributed.start(CPU)
    speeds = {}

    def repeat(step):
        for _ in range(args.steps):
            step()

    # steps of SimCLR
    Distributed.notice("  steps of SimCLR")
    trainer = simclr_trainer(rank, world)
    step = steps_of(trainer)
    step()
    speeds["SimCLR, steps"] = per_second(args.steps * trainer.args.bs, partial(repeat, step))

    # the generator: search, then steps
    Distributed.notice("  generator")
    trainer, period = camnet_trainer(args.images)
    keys = period.keys[:, 0].contiguous()
    search = partial(trainer.search_codes, period, keys, Namespace(signal=None), "", quiet=True)
    speeds["generator, search"] = per_second(args.images, search)
    step = partial(trainer.update, period, torch.arange(trainer.bs))
    step()
    speeds["generator, steps"] = per_second(args.steps * trainer.bs, partial(repeat, step))

    # the bank
    Distributed.notice("  bank")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "bank.npy"
        together = {"first_only": Distributed.first_rank_only, "spread": Distributed.spread}
        bank = partial(fill, file, trainer.ema, trainer.split, CODES, 0, CPU, trainer.autocast, **together)
        speeds[f"bank, {CODES} restorations"] = per_second(len(trainer.split), bank)
    Distributed.say(json.dumps(speeds))
    return 0


# ---------------------------------------------------------------------------------------------------- measurement


def ways(count):
    """Return {name: (processes, threads of each)}."""
    return {
        "1 process, 1 thread": (1, 1),
        f"1 process, {count} threads": (1, count),
        f"{count} processes, 1 thread": (count, 1),
    }


def run(args, processes, threads):
    """Return {what: images per second} of so many processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    script = ["-m", "Benchmarks.Processes", "--work", f"--images={args.images}", f"--steps={args.steps}"]
    words = [sys.executable, *(launcher if processes > 1 else []), *script]
    env = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(words, cwd=Utils.ROOT, env=env, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise Utils.UserError(f"{shlex.join(words)}: exit code {done.returncode}: run it alone to see why")
    return json.loads(done.stdout.strip().splitlines()[-1])


@Signals.heartbeat("measuring")
def main(args):
    """Measure all ways in turns, print a table, write it; return the exit code."""
    if args.work:
        return work(args)
    made = Runs.provenance(CPU)
    made["command"] = shlex.join(["python", "-m", "Benchmarks.Processes", *sys.argv[1:]])
    found = {}  # {what: {way: [images per second]}}
    for turn in range(args.rounds):
        for name, (processes, threads) in ways(args.processes).items():
            speeds = run(args, processes, threads)
            for what, speed in speeds.items():
                found.setdefault(what, {}).setdefault(name, []).append(speed)
            text = ", ".join(f"{what} {speed:,.0f}" for what, speed in speeds.items())
            print(f"round {turn + 1}/{args.rounds}: {name}: images/s: {text}", flush=True)
    made["rows"] = []
    for what, by_way in found.items():
        speeds = {name: statistics.median(values) for name, values in by_way.items()}
        made["rows"].append({"what": what, "images_per_second": speeds, "rounds": by_way})
    Utils.write_json(Path(args.out), made)
    print(f"written: {args.out}")
    return 0


if __name__ == "__main__":
    Utils.set_threads()
    Utils.run_script(main, get_args)
