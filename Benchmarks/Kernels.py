"""Count what a step asks of a GPU, without a GPU: kernels, copies from the host, waits, bytes that kernels touch.

    python -m Benchmarks.Kernels            # a minute on one core; table on screen, Results/kernels.json

Steps of TrainSimCLR.py, TrainISICLE.py and TrainCamNet.py, by the recipes of CIFAR-10 on a GPU, run on the pretend
device of PretendDevice.py, with images of noise. The number of kernels depends on the net and on the flags, and on
--bs only where a batch is so small that it lacks some of the orders of the color jitter. The bytes depend on both.
"""

import argparse
import shlex
import sys
from pathlib import Path

import numpy as np
import torch

import Flags
import Runs
import Signals
import TrainCamNet
import TrainISICLE
import TrainSimCLR
import Utils
from Benchmarks.PretendDevice import KINDS, PretendCuda
from CamNet.Bank import Bank, restore
from CamNet.Corruptions import Corruption
from CamNet.Distances import build_distance
from Flags import bounded
from Images.Split import Split

SIZE = 32  # pixels
CUDA = torch.device("cuda")
RECIPE = ("--data", "cifar10", "--device", "cuda", "--epochs", "2")
CAMNET = ("--data", "cifar10", "--device", "cuda", "--distance", "pixels", "--no-single_code")
PARTS = {"data": "images", "views": "views", "forward": "forward", "loss": "loss", "backward": "backward, optimizer"}


def get_args(argv=None):
    """Parse the flags."""
    parser = Flags.plain_parser(__doc__)
    add = parser.add_argument
    add("--bs", type=bounded(int, 2), default=16, metavar="N", help="images in a step of SimCLR and ISICLE")
    images = "images in a step of CamNet, in its search and in the filling of the bank"
    add("--camnet_bs", type=bounded(int, 2), default=4, metavar="N", help=images)
    add("--out", type=Flags.path, default="Results/kernels.json", metavar="FILE", help="JSON to write")
    return parser.parse_args(argv)


class Counter:
    """The rows of one step: what was counted in each of its parts."""

    def __init__(self, gpu, step):
        self.gpu = gpu
        self.step = step
        self.rows = []
        gpu.reset()

    def end(self, part):
        """Note what was counted since the last part, and count anew."""
        row = {"step": self.step, "part": part}
        for kind in KINDS:
            row[kind] = self.gpu.count(kind)
        row["copied bytes"] = self.gpu.copied_bytes
        row["touched bytes"] = self.gpu.touched_bytes
        self.rows.append(row)
        self.gpu.reset()


# ---------------------------------------------------------------------------------------------------- steps


def noise_split(n, device):
    """Return a `Split` of n images of noise on the device."""
    images = torch.randint(256, (n, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Split(images, torch.zeros(n, dtype=torch.int64), ["noise"]).to(device)


def noise_bank(split, device, k=8, on_device=True):
    """Return a `Bank` of k restorations of each image, noise; on_device: on the device, or in the host's memory."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (len(split), k, 3, SIZE, SIZE), dtype=np.uint8)
    return Bank(images, device, on_device)


def simclr_trainer(bs, device, words=()):
    """Return the trainer of TrainSimCLR.py by the recipe of CIFAR-10 and flags `words`."""
    args = TrainSimCLR.get_args([*RECIPE, "--size", str(SIZE), "--bs", str(bs), *words])
    return _trainer(args, TrainSimCLR.SamePair(args.num_views), device)


def isicle_trainer(bs, device, words=(), on_device=True):
    """Return the trainer of TrainISICLE.py by the recipe of CIFAR-10 and flags `words`, with a bank of noise."""
    args = TrainISICLE.get_args([*RECIPE, "--p_gen", "0.5", "--size", str(SIZE), "--bs", str(bs), *words])
    if args.pair == "corrupted":
        return _trainer(args, TrainISICLE.Corrupted(args, Corruption(args.corrupt, SIZE)), device)
    positives = TrainISICLE.Restored(args)
    trainer = _trainer(args, positives, device)
    positives.bank = noise_bank(trainer.train_split, device, args.num_codes, on_device)
    return trainer


def _trainer(args, positives, device):
    TrainSimCLR.adjust_flags(args, world=1)
    torch.manual_seed(0)
    trainer = TrainSimCLR.Trainer(args, noise_split(2 * args.bs, device), positives, device)
    trainer.net.train()
    return trainer


def count_step(gpu, step, trainer):
    """Return the rows of the second step of a trainer: the first one also makes the optimizer's momentum."""
    stream = trainer.batches()
    trainer.update(*next(stream))
    counter = Counter(gpu, step)
    indices, images = next(stream)
    trainer.update(indices, images, lambda stage: counter.end(PARTS[stage]))
    return counter.rows


def camnet_trainer(bs, device, words=()):
    """Return the trainer of TrainCamNet.py by the recipe of CIFAR-10 and flags `words`, with the pixel distance."""
    args = TrainCamNet.get_args(
        [*CAMNET, "--bs", str(bs), "--period", str(2 * bs), "--candidates", "4", "--visits", "1", *words]
    )
    generator = TrainCamNet.build_generator(args, SIZE)
    distance = build_distance(args.distance, None, 0, args.alpha).to(device)
    counts = TrainCamNet.codes_per_level(args)
    return TrainCamNet.Trainer(args, noise_split(4 * bs, device), generator, distance, counts, device)


def count_camnet(gpu, step, trainer):
    """Return the rows of CamNet: the search of a period of one chunk, a step, and a restoration for the bank."""
    args = trainer.args
    rows = torch.arange(args.bs)
    images = trainer.images(rows)
    with trainer.autocast():
        sampler = trainer.ema.frozen()  # as the filling does, once for all images
    counter = Counter(gpu, step)
    period = trainer.next_period(argparse.Namespace(signal=None), "", quiet=True)
    counter.end("search, a chunk on each level")
    first, second = trainer.batches(args.period)
    trainer.update(period, first)  # makes the optimizer's averages
    gpu.reset()
    trainer.update(period, second)
    counter.end("training step")
    restore(sampler, images, rows, 1, args.seed, trainer.autocast).cpu()
    counter.end("bank, a restoration")
    return counter.rows


CONTRASTIVE = {  # {step: its trainer, of a batch size}
    "SimCLR, 2 views": lambda bs: simclr_trainer(bs, CUDA),
    "SimCLR, 3 views": lambda bs: simclr_trainer(bs, CUDA, ["--num_views", "3"]),
    "ISICLE, bank in memory": lambda bs: isicle_trainer(bs, CUDA),
    "ISICLE, mapped bank": lambda bs: isicle_trainer(bs, CUDA, on_device=False),
    "ISICLE, farthest": lambda bs: isicle_trainer(bs, CUDA, ["--pick", "farthest"]),
    "ISICLE, farthest, mapped": lambda bs: isicle_trainer(bs, CUDA, ["--pick", "farthest"], on_device=False),
    "ISICLE, corrupted": lambda bs: isicle_trainer(bs, CUDA, ["--pair", "corrupted", "--corrupt", "gray+mask0.5"]),
}
CAMNETS = {
    "CamNet, tiny": lambda bs: camnet_trainer(bs, CUDA, ["--net", "tiny"]),
    "CamNet, small": lambda bs: camnet_trainer(bs, CUDA, ["--net", "small"]),
}


# ---------------------------------------------------------------------------------------------------- script


@Signals.heartbeat("measuring")
def main(args):
    """Count, print a line for each row, write the rows; return the exit code."""
    with PretendCuda(Utils.ROOT) as gpu:
        rows = []
        for step, build in CONTRASTIVE.items():
            rows += count_step(gpu, step, build(args.bs))
        for step, build in CAMNETS.items():
            rows += count_camnet(gpu, step, build(args.camnet_bs))
    made = Runs.provenance(torch.device("cpu"))
    made["command"] = shlex.join(["python", "-m", "Benchmarks.Kernels", *sys.argv[1:]])
    made["bs"] = args.bs
    made["camnet_bs"] = args.camnet_bs
    made["rows"] = rows
    for row in rows:
        counts = "".join(f"{row[kind]:8,}" for kind in KINDS)
        print(f"{row['step']:26}{row['part']:32}{counts}{row['touched bytes'] / 2**20:10,.0f} MiB")
    out = Path(args.out)
    Utils.write_json(out, made)
    print(f"written: {out}")
    return 0


if __name__ == "__main__":
    Utils.run_script(main, get_args)
