"""Test the program on one GPU, and measure what counting could not tell: about ten minutes.

    python -m Benchmarks.Gpu                        # writes Results/gpu.json
    python -m Benchmarks.Gpu --device cpu --quick   # every part in small, to see that it runs; writes nothing

Parts: copies from the host, steps and an epoch of SimCLR, steps of ISICLE, steps of CAM-Net, its search, the filling
of a bank, and the tests. Images and weights are random, so nothing is downloaded. Each part runs in its own process
with a time limit. A part that fails or takes too long has an "error" in its row, next to what it had measured before;
the others go on. The file is written after every part. Times are means over steps, after a few that warm up.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch

import Devices
import Flags
import Graphs
import Runs
import Signals
import TrainCamNet
import TrainISICLE
import TrainSimCLR
import Utils
from CamNet import Distances
from CamNet.Bank import Bank, fill
from CamNet.Codes import make_keys
from Flags import bounded
from Images.Split import Split

WARM_UP = Graphs.WARM_UP + 2  # steps before those that are timed


class Scale(NamedTuple):
    """How large everything is."""

    images: int  # of the split; an epoch of CIFAR-10 has 50,000
    size: int  # their side in pixels
    backbone: str
    bs: int
    net: str  # the generator
    candidates: str  # codes tried per level
    batches: tuple  # of the generator's training
    banks: tuple  # of the filling of a bank
    searched: int  # images
    warm_up: int  # steps before those that are timed
    seconds: float  # of a measurement
    matrix: int  # side of the matrices whose products keep the device busy
    tests: tuple  # arguments of pytest


WHOLE = ("-n", "8", "--dist", "worksteal")  # all tests, in so many processes
FULL = Scale(50_000, 32, "resnet18", 512, "small", "64,32,16", (32, 256), (256, 2048), 1024, WARM_UP, 3.0, 8192, WHOLE)
FEW = ("--noconftest", "Tests/test_make.py")  # tests that import little
QUICK = Scale(24, 16, "resnet8", 8, "tiny", "2,2", (4,), (4, 8), 8, 1, 0.0, 32, FEW)


class Bench:
    """The device, the scale, and what several parts need."""

    def __init__(self, device, scale):
        self.device = device
        self.scale = scale

    def milliseconds(self, step):
        """Return the mean time of step() in ms; it is repeated for `scale.seconds`."""
        for _ in range(self.scale.warm_up):
            step()
        Devices.wait(self.device)
        count = 0
        started = time.perf_counter()
        while not count or time.perf_counter() - started < self.scale.seconds:
            step()
            count += 1
        Devices.wait(self.device)
        return round(1000 * (time.perf_counter() - started) / count, 3)

    def split(self, count):
        """Return a split of random images without labels, on the device."""
        shape = (count, 3, self.scale.size, self.scale.size)
        images = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        return Split(images, torch.full((count,), -1), []).to(self.device)

    def flags(self, script, words):
        """Return the flags of a training script for the generated shapes, on the device and with the size at hand."""
        common = ["--data=shapes", f"--size={self.scale.size}", f"--device={self.device}"]
        return script.get_args([*common, *words.split()])


# ---------------------------------------------------------------------------------------------------- copies


def measure_copies(bench):
    """Yield whether copies from pageable and from pinned memory wait for a busy device.

    A copy that does not wait takes the host a few microseconds; one that waits takes as long as the device is busy.
    """
    matrix = torch.rand(bench.scale.matrix, bench.scale.matrix, device=bench.device)

    def seconds(copies):
        """Return the host's time for these copies, begun while the device is busy, and the time until all is done."""
        Devices.wait(bench.device)
        started = time.perf_counter()
        for _ in range(20):
            matrix @ matrix
        queued = time.perf_counter()
        for each in copies:
            each.to(bench.device, non_blocking=True)
        copied = time.perf_counter() - queued
        Devices.wait(bench.device)
        return copied, time.perf_counter() - started

    small = torch.zeros(1, device=bench.device)
    yield "launch_ms", bench.milliseconds(lambda: small.add_(1))
    seconds([])
    for kib in (4, 16, 63, 125, 1536):
        pageable = [torch.zeros(1024 * kib, dtype=torch.uint8) for _ in range(10)]
        pinned = [each.pin_memory() if bench.device.type == "cuda" else each for each in pageable]
        for name, copies in (("pageable", pageable), ("pinned", pinned)):
            seconds(copies)  # reserves the memory
            copied, whole = seconds(copies)
            yield f"{name}_{kib}_kib_ms", round(1000 * copied / len(copies), 4)
            yield f"{name}_{kib}_kib_waits", copied > whole / 2


# ---------------------------------------------------------------------------------------------------- encoders


def steps_of(trainer):
    """Return a function that takes the next step of a contrastive Trainer, epoch after epoch."""

    def endless():
        while True:
            for batch in trainer.batches():
                yield trainer.update(*batch)

    trainer.net.train()
    return partial(next, endless())


def simclr_trainer(bench, split, **changes):
    """Return SimCLR's Trainer with some flags changed."""
    scale = bench.scale
    words = f"--backbone {scale.backbone} --bs {scale.bs} --epochs 1000"
    args = argparse.Namespace(**vars(bench.flags(TrainSimCLR, words)) | changes)
    TrainSimCLR.adjust_flags(args, 1)
    return TrainSimCLR.Trainer(args, split, TrainSimCLR.SamePair(2), bench.device)


SPEED_UPS = {  # start of a measurement's name: flags
    "": {"cuda_graph": False, "compile": False},
    "graph_": {"cuda_graph": True, "compile": False},
    "compiled_": {"cuda_graph": False, "compile": True},
    "compiled_graph_": {"cuda_graph": True, "compile": True},
}


def speed_ups(device):
    """Return {start of a measurement's name: flags} of what can make a step faster: CUDA graphs need a GPU."""
    if device.type == "cuda":
        return SPEED_UPS
    return {name: flags for name, flags in SPEED_UPS.items() if not flags["cuda_graph"]}


def measure_simclr(bench):
    """Yield the time of SimCLR's step and epoch with each speed-up, and what --deterministic costs and gives."""
    split = bench.split(bench.scale.images)
    for name, flags in speed_ups(bench.device).items():
        torch.compiler.reset()
        started = time.perf_counter()
        step = steps_of(simclr_trainer(bench, split, **flags))
        for _ in range(bench.scale.warm_up):
            step()
        Devices.wait(bench.device)
        yield f"{name}start_s", round(time.perf_counter() - started, 1)
        yield f"{name}step_ms", bench.milliseconds(step)
        yield f"{name}epoch_s", epoch_seconds(bench, step)

    # the same steps twice
    torch.backends.cudnn.deterministic = True
    yield "deterministic_step_ms", bench.milliseconds(steps_of(simclr_trainer(bench, split)))
    states = []
    for _ in range(2):
        trainer = simclr_trainer(bench, split)
        step = steps_of(trainer)
        for _ in range(bench.scale.warm_up):
            step()
        states.append(trainer.net.state_dict())
    same = all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    yield "deterministic_same_bits", same
    torch.backends.cudnn.deterministic = False


def epoch_seconds(bench, step):
    """Return the time of as many steps as an epoch has."""
    Devices.wait(bench.device)
    started = time.perf_counter()
    for _ in range(bench.scale.images // bench.scale.bs):
        step()
    Devices.wait(bench.device)
    return round(time.perf_counter() - started, 3)


def measure_isicle(bench):
    """Yield the time of ISICLE's step by its default pair: bank in memory, left on disk, and --pick farthest."""
    scale = bench.scale
    split = bench.split(min(scale.images, 8 * scale.bs))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "bank.npy"
        images = torch.randint(256, (len(split), 8, 3, scale.size, scale.size), dtype=torch.uint8).numpy()
        np.save(file, images)
        variants = {"step": (True, "random"), "mapped": (False, "random"), "mapped_farthest": (False, "farthest")}
        for name, (on_device, pick) in variants.items():
            words = f"--backbone {scale.backbone} --bs {scale.bs} --epochs 1000 --pick {pick}"
            args = bench.flags(TrainISICLE, words)
            TrainSimCLR.adjust_flags(args, 1)
            positives = TrainISICLE.Restored(args)
            positives.bank = Bank(np.load(file, mmap_mode="r"), bench.device, on_device)
            trainer = TrainSimCLR.Trainer(args, split, positives, bench.device)
            yield f"{name}_ms", bench.milliseconds(steps_of(trainer))


# ---------------------------------------------------------------------------------------------------- the generator


def camnet(bench, bs, count, words=""):
    """Return (the generator's Trainer, a Period of `count` images whose codes are random)."""
    distance = "squeeze" if bench.scale.size >= 32 and Distances.is_at_hand("squeeze") else "pixels"
    words += f" --net {bench.scale.net} --corrupt gray+down2 --distance {distance} --bs {bs}"
    words += f" --candidates {bench.scale.candidates}"
    args = bench.flags(TrainCamNet, f"{words} --period {count} --no-single_code")
    generator = TrainCamNet.build_generator(args, bench.scale.size)
    measure = Distances.build_distance(distance, None, args.lpips_side, args.alpha).to(bench.device)
    counts = TrainCamNet.codes_per_level(args)
    split = bench.split(count + count // 9 + 2)  # a tenth is held out
    trainer = TrainCamNet.Trainer(args, split, generator, measure, counts, bench.device)
    rows = trainer.rows_of(0)
    keys = make_keys(0, rows).to(bench.device)
    period = TrainCamNet.Period(trainer, rows, trainer.images(rows), keys)
    period.keys = keys[:, None].expand(-1, len(trainer.net.sides)).contiguous()
    return trainer, period


def measure_camnet(bench):
    """Yield the time of the generator's training step with each speed-up."""
    for bs in bench.scale.batches:
        for name, flags in speed_ups(bench.device).items():
            if flags["compile"] and bs != bench.scale.batches[0]:
                continue  # the compiler takes minutes
            torch.compiler.reset()
            started = time.perf_counter()
            words = " ".join(f"--{flag}" for flag, is_on in flags.items() if is_on)
            trainer, period = camnet(bench, bs, bs, words)
            part = torch.arange(bs, device=bench.device)
            step = partial(trainer.update, period, part)
            for _ in range(bench.scale.warm_up):
                step()
            Devices.wait(bench.device)
            yield f"{name}start_of_{bs}_s", round(time.perf_counter() - started, 1)
            yield f"{name}step_of_{bs}_ms", bench.milliseconds(step)
    yield "distance", trainer.args.distance


def measure_search(bench):
    """Yield the time of the search per 1,000 images, for chunks of 1,024 and as is the default on CUDA."""
    count = bench.scale.searched
    for chunk in (TrainCamNet.CHUNK, TrainCamNet.CUDA_CHUNK):
        trainer, period = camnet(bench, bench.scale.batches[0], count, f"--chunk {chunk}")
        keys = period.keys[:, 0].contiguous()
        parts = torch.arange(count, device=bench.device).split(trainer.searched_at_once)

        def search(trainer=trainer, period=period, keys=keys, parts=parts):
            net = trainer.frozen()
            for part in parts:
                period.search(trainer, net, part, keys)

        yield f"chunk_{chunk}_s_per_1000", round(bench.milliseconds(search) / count, 4)


def measure_bank(bench):
    """Yield the time of filling a bank, per 1,000 images of 8 restorations."""
    trainer, _ = camnet(bench, bench.scale.batches[0], bench.scale.batches[0])
    split = bench.split(4 * bench.scale.banks[-1])
    with tempfile.TemporaryDirectory() as folder:
        for bs in bench.scale.banks:
            for name in ("warm_up", "bank"):
                started = time.perf_counter()
                file = Path(folder) / f"{name}-{bs}.npy"
                fill(file, trainer.ema, split, 8, 0, bench.device, trainer.autocast, bs=bs)
                seconds = time.perf_counter() - started
            yield f"batches_of_{bs}_s_per_1000", round(1000 * seconds / len(split), 4)


# ---------------------------------------------------------------------------------------------------- tests


def run_tests(bench, limit):
    """Yield the last line of pytest, and the tests that failed; also of tests that were interrupted at the limit."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *bench.scale.tests]
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(command, cwd=Utils.ROOT, stdout=out, stderr=out, start_new_session=True)
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGINT)  # pytest reports what it has done
            yield "interrupted_after_s", round(limit)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        out.seek(0)
        lines = out.read().splitlines()
    yield "exit_code", process.returncode
    yield "summary", next((line for line in reversed(lines) if " in " in line), "")
    yield "failed", [line for line in lines if line.startswith(("FAILED", "ERROR"))]


# ---------------------------------------------------------------------------------------------------- parts


PARTS = {  # name: (function, seconds that it may take)
    "copies": (measure_copies, 60),
    "simclr": (measure_simclr, 150),
    "isicle": (measure_isicle, 60),
    "camnet": (measure_camnet, 240),
    "search": (measure_search, 60),
    "bank": (measure_bank, 60),
    "tests": (run_tests, 300),
}


def compile_without_inductor(function, **_):
    """Stand for torch.compile on a CPU, where the compiler would take minutes: the graph is made, but not compiled."""
    return ORIGINAL_COMPILE(function, backend="eager")


ORIGINAL_COMPILE = torch.compile


def work(name, device, scale, limit, sender):
    """Run a part in its own process; send (name, value) of each measurement, then ("error", text) or None."""
    function, _ = PARTS[name]
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # CUDA graphs are captured on the current one
    bench = Bench(device, scale)
    more = (limit,) if name == "tests" else ()
    usual = torch.compile if device.type == "cuda" else compile_without_inductor
    try:
        with mock.patch.object(torch, "compile", usual):
            for measurement in function(bench, *more):
                sender.send(measurement)
        sender.send(None)
    except Exception as error:  # of any kind: the other parts go on
        traceback.print_exc()
        sender.send(("error", " ".join(f"{type(error).__name__}: {error}".split())[:500]))


def run_part(name, device, scale, limit):
    """Return the row of a part: its measurements, its seconds and, if it did not end well, its error."""
    started = time.monotonic()
    context = get_context("spawn" if device.type == "cuda" else "fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(name, device, scale, limit, sender))
    process.start()
    sender.close()
    row = {"part": name}
    grace = 60 if name == "tests" else 0  # to report what was interrupted
    while "error" not in row:
        left = started + limit + grace - time.monotonic()
        if not receiver.poll(max(0, left)):
            row["error"] = f"took more than {limit:.0f} s"
            break
        try:
            message = receiver.recv()
        except EOFError:
            process.join()
            row["error"] = f"its process ended with exit code {process.exitcode}"
            break
        if message is None:
            break
        key, value = message
        row[key] = value
        print(f"{name}: {key}: {value}", flush=True)
    if "error" in row:
        print(f"{name}: error: {row['error']}", flush=True)
    process.kill()
    process.join()
    row["seconds"] = round(time.monotonic() - started, 1)
    return row


# ---------------------------------------------------------------------------------------------------- script


def get_args(argv=None):
    """Parse the flags."""
    parser = Flags.plain_parser(__doc__)
    add = parser.add_argument
    add("--device", default="cuda", help="torch device, for example cuda:1; cpu: to see that every part runs")
    add("--minutes", type=bounded(float, 0), default=10.0, metavar="M", help="time for all parts together")
    add("--only", choices=list(PARTS), nargs="+", help="parts to run; default: all")
    add("--quick", action="store_true", help="everything in small")
    add(
        "--out",
        type=Flags.path,
        metavar="FILE",
        help="JSON to write; default: Results/gpu.json or, on a CPU or with --quick, nothing",
    )
    return parser.parse_args(argv)


@Signals.heartbeat("measuring")
def main(args):
    """Run the parts, write their rows; return 0, or 1 if a part has an error or a test failed."""
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise Utils.UserError(f"--device {args.device}: no GPU here: --device cpu --quick shows that every part runs")
    device = Devices.pick_device(args.device)
    made = Runs.provenance(device)
    made["command"] = shlex.join(["python", "-m", "Benchmarks.Gpu", *sys.argv[1:]])
    made["rows"] = []
    out = args.out
    if not out and device.type == "cuda" and not args.quick:
        out = Utils.ROOT / "Results" / "gpu.json"

    end = time.monotonic() + 60 * args.minutes
    for name in args.only or PARTS:
        limit = min(PARTS[name][1], end - time.monotonic())
        if limit <= 0:
            made["rows"].append({"part": name, "error": f"not begun: --minutes {args.minutes:g} were over"})
        else:
            made["rows"].append(run_part(name, device, QUICK if args.quick else FULL, limit))
        if out:
            Utils.write_json(Path(out), made)
    if out:
        print(f"written: {out}")
    return int(any("error" in row or row.get("exit_code") for row in made["rows"]))


if __name__ == "__main__":
    Utils.run_script(main, get_args)
