"""Measure views per second of the augmentation and of a whole training step, beside what is commonly used for them.

    python -m Benchmarks.Speed                              # table on screen, Results/speed-DEVICE.json
    python -m Benchmarks.Speed --device cuda --backbone resnet18 --bs 512

Augmentation, one core: `Augmentations` on a batch; torchvision on PIL images and, by its v2, on uint8 tensors, one by
one; kornia on a batch. With --device cuda the first and the last are on the GPU. Step, data loading counted in:
`TrainSimCLR.Trainer`, also without single parts of it; a plain loop over a DataLoader, in the manner of lightly's
SimCLR example; then three views instead of two. All see the same images, model, batch size and loss, and take turns:
other load hits them all.
"""

import argparse
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
from torch import nn
from torch.utils.data import DataLoader, RandomSampler
from torchvision import transforms as v1
from torchvision.transforms import v2

if find_spec("TrainSimCLR") is None:  # started by its path, Python looks for modules beside it only
    print("Speed.py: error: start it in the repository's folder, as python -m Benchmarks.Speed", file=sys.stderr)
    sys.exit(2)

import Flags
import Runs
import TrainISICLE
import TrainSimCLR
import Utils
from Backbones import BACKBONES, ContrastiveNet, build_head
from CamNet.Bank import Bank
from Images import Shapes
from Losses import nt_xent

NOTES = {
    "peak_memory_bytes": "own process, 3 steps; CUDA: max_memory_allocated; CPU: ru_maxrss, without loader workers",
    "ratios": "views per second of ours / of the variant, in the same round; the median over rounds",
    "fp32": "on CUDA as torch has it by default: convolutions in tf32",
}


def get_args(argv=None):
    """Parse the flags; --quick changes the defaults of others."""
    form = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False, formatter_class=form)
    add = parser.add_argument
    add("--device", default="auto", help="torch device, as cpu or cuda:1; auto: cuda if there is one")
    add("--backbone", default="resnet8", choices=list(BACKBONES), help="encoder")
    add("--bs", type=Flags.bounded(int, 2, Shapes.SIZES["train"]), default=256, metavar="N", help="images in a batch")
    add("--size", type=Flags.bounded(int, 8), default=32, metavar="PX", help="side of the images")
    add("--threads", type=Flags.bounded(int, 0), default=0, metavar="N", help="of torch in a step; 0: torch's own")
    add("--workers", type=Flags.bounded(int, 0), default=0, metavar="N", help="of the plain loop; 0: one for each core")
    add("--seconds", type=Flags.bounded(float, 0), default=10.0, metavar="S", help="per measurement, over all rounds")
    add("--rounds", type=Flags.bounded(int, 1), default=5, metavar="N", help="turns that every measurement takes")
    add("--out", metavar="FILE", help="JSON to write; None: Results/speed-DEVICE.json or, with --quick, nothing")
    add("--quick", action="store_true", help="to see that it works: --bs 32 --seconds 0.2 --rounds 2")
    if parser.parse_args(argv).quick:
        parser.set_defaults(bs=32, seconds=0.2, rounds=2)
    return parser.parse_args(argv)


def prepare(args, device):
    """Return TrainSimCLR.py's flags, with the recipe of the generated shapes, and those shapes."""
    given = ["--backbone", args.backbone, "--bs", str(args.bs), "--size", str(args.size), "--compile", "no"]
    flags = TrainSimCLR.get_args([*given, "--device", str(device), "--epochs", "1000000"])
    TrainSimCLR.check_flags(flags, 1)
    return flags, Flags.splits_for(flags, torch.device("cpu")).train


def torchvision_transform(t, views, last):
    """Return the per-image transform of module t (transforms or transforms.v2) with an `Augmentation`'s parameters."""
    crop = t.RandomResizedCrop(views.size, views.crop_scale, views.crop_ratio)
    jitter = t.RandomApply([t.ColorJitter(*views.jitter)], views.jitter_p)
    return t.Compose([crop, t.RandomHorizontalFlip(views.flip_p), jitter, t.RandomGrayscale(views.gray_p), last])


def kornia_transform(K, views, mode):
    """Return the same of kornia.augmentation for float batches, with parameters drawn for each image."""
    crop = K.RandomResizedCrop((views.size, views.size), views.crop_scale, views.crop_ratio, cropping_mode=mode)
    jitter = K.ColorJitter(*views.jitter, p=views.jitter_p)
    return nn.Sequential(crop, K.RandomHorizontalFlip(p=views.flip_p), jitter, K.RandomGrayscale(p=views.gray_p))


def augmentation_variants(views, images, device):
    """Return {variant: begin}; begin() returns a function that makes float views of the uint8 images (B, 3, H, W)."""
    generator, local = torch.Generator().manual_seed(0), images.to(device)
    tensors, pictures = list(images), [v1.functional.to_pil_image(image) for image in images]
    classical = torchvision_transform(v1, views, v1.ToTensor())
    modern = torchvision_transform(v2, views, v2.ToDtype(torch.float32, scale=True))
    variants = {
        "ours": lambda: views(local, generator),
        "torchvision, PIL images": lambda: torch.stack([classical(picture) for picture in pictures]),
        "torchvision v2, uint8 tensors": lambda: torch.stack([modern(tensor) for tensor in tensors]),
    }
    if find_spec("kornia"):
        mode = "resample" if device.type == "cuda" else "slice"  # slice, the default, crops one by one
        batched = kornia_transform(import_module("kornia.augmentation"), views, mode)
        variants["kornia, batch"] = lambda: batched(local.float().div_(255))
    else:
        print("kornia is not installed, so its row is left out: pip install -r requirements-dev.txt")
    return {name: lambda make=make: make for name, make in variants.items()}


def two_views(pictures, transform):
    """Return two float batches of views of PIL images: what a worker of the plain loop does."""
    return [torch.stack([transform(picture) for picture in pictures]) for _ in range(2)]


def our_step(flags, split, device, channels_last=True, positives=None, **changes):
    """Return begin() of the trainer as the script builds it, with some flags changed."""
    flags = argparse.Namespace(**{**vars(flags), **changes})
    trainer = TrainSimCLR.Trainer(flags, split.to(device), positives or TrainSimCLR.SamePair(2), device)
    if not channels_last:  # one copy of the views more, a small part of a step
        trainer.net.to(memory_format=torch.contiguous_format)
        trainer.augment = lambda batches, augment=trainer.augment: augment(batches).contiguous()
    trainer.net.train()
    stream = (batch for _ in iter(int, 1) for batch in trainer.batches())  # epoch after epoch
    return lambda: lambda: trainer.update(*next(stream))


def isicle_step(flags, split, device, pair=("--pair", "gen_gen", "--p_gen", "1")):
    """Return begin() of TrainISICLE.py's steps by its flags `pair`, from a bank of noise on the device."""
    own = TrainISICLE.get_args(list(pair))
    bank = torch.randint(256, (len(split), own.num_codes, 3, split.size, split.size), dtype=torch.uint8)
    bank = Bank(bank.numpy(), device, on_device=True)
    flags = argparse.Namespace(**{**vars(own), **vars(flags)})  # with SimCLR's augmentation
    positives = TrainISICLE.Restored(flags)
    positives.bank = bank
    return our_step(flags, split, device, positives=positives)


def plain_step(flags, split, device, workers):
    """Return begin() of the plain loop: it starts the workers and passes over what they prefetch meanwhile."""
    encoder = Flags.encoder_for(flags)
    net = ContrastiveNet(encoder, build_head(encoder.num_features, flags.proj_hidden, flags.proj_dim, flags.proj_norm))
    optimizer = torch.optim.SGD(net.to(device).parameters(), lr=0.06)
    collate = partial(two_views, transform=torchvision_transform(v1, Flags.augmentation_for(flags), v1.ToTensor()))
    pictures = [v1.functional.to_pil_image(image) for image in split.images]
    order = RandomSampler(pictures, replacement=True, num_samples=2**31)  # one epoch without an end
    loader = DataLoader(pictures, flags.bs, sampler=order, num_workers=workers, collate_fn=collate, drop_last=True)

    def step(stream):
        first, second = next(stream)
        optimizer.zero_grad()
        nt_xent(net(first.to(device)), net(second.to(device)), flags.temp).backward()
        optimizer.step()

    def begin():
        stream = iter(loader)
        for _ in range(loader.prefetch_factor * workers):
            next(stream)
        return partial(step, stream)

    return begin


def step_variants(workers, device):
    """Return {variant: build}; build(flags, split, device) returns a begin() as above."""
    variants = {"ours": our_step, "ours, ISICLE's pairs": isicle_step}
    variants["plain loop, PIL, fp32"] = partial(plain_step, workers=workers)
    variants["ours, fp32"] = partial(our_step, precision="tf32")  # CPUs ignore tf32; see NOTES
    variants["ours, without channels_last"] = partial(our_step, channels_last=False)
    if device.type == "cuda":
        variants["ours, compiled"] = partial(our_step, compile="yes")  # as the script does in long runs
    return variants


def measure(part, variants, views, args, device):
    """Return rows of views per second; the variants take turns, and each turn starts with a step that is not timed."""
    rounds = {name: [] for name in variants}
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    for _ in range(args.rounds):
        for name, begin in variants.items():
            step, count = begin(), 0
            step()
            wait()
            start = time.perf_counter()
            while not count or time.perf_counter() - start < args.seconds / args.rounds:
                step()
                count += 1
            wait()
            rounds[name].append(round(count * views / (time.perf_counter() - start), 1))
            del step  # which ends the workers of the plain loop
    row = {"part": part, "peak_memory_bytes": None}
    medians = {name: round(statistics.median(values), 1) for name, values in rounds.items()}
    return [{**row, "variant": name, "views_per_second": medians[name], "rounds": rounds[name]} for name in variants]


def peak_memory(args, device, name):
    """Return the most bytes that three steps of a variant take. To be called in a process of its own."""
    torch.set_num_threads(args.threads or torch.get_num_threads())
    step = step_variants(args.workers, device)[name](*prepare(args, device), device)()
    for _ in range(3):
        step()
    return Utils.peak_memory(device)


def measure_all(args, device):
    """Return (rows, ratios). Memory comes first: what this process holds when it forks would count in its children."""
    context, memory = multiprocessing.get_context("spawn" if device.type == "cuda" else "fork"), {}
    builders = step_variants(args.workers, device)
    for name in builders:
        with ProcessPoolExecutor(1, context) as pool:
            memory[name] = pool.submit(peak_memory, args, device, name).result()
    (flags, split), threads = prepare(args, device), args.threads or torch.get_num_threads()
    torch.set_num_threads(1)
    augmentations = augmentation_variants(Flags.augmentation_for(flags), split.images[: args.bs], device)
    rows = measure("augmentation", augmentations, args.bs, args, device)
    torch.set_num_threads(threads)
    variants = {name: build(flags, split, device) for name, build in builders.items()}
    steps = measure("step", variants, 2 * args.bs, args, device)
    rows += [{**row, "peak_memory_bytes": memory[row["variant"]]} for row in steps]
    builders = {"ours": partial(our_step, positives=TrainSimCLR.SamePair(3))}
    builders["ours, ISICLE's pairs"] = partial(isicle_step, pair=())  # its default
    variants = {name: build(flags, split, device) for name, build in builders.items()}
    rows += measure("step, 3 views", variants, 3 * args.bs, args, device)
    ours = {row["part"]: row["rounds"] for row in rows if row["variant"] == "ours"}
    pairs = {f"{row['part']}: {row['variant']}": zip(ours[row["part"]], row["rounds"]) for row in rows}
    return rows, {name: round(statistics.median(a / b for a, b in pair), 3) for name, pair in pairs.items()}


def main(args):
    """Measure, print a table, write it; return the exit code."""
    device = Utils.pick_device(args.device)
    args.workers = args.workers or len(os.sched_getaffinity(0))
    load, made, (rows, ratios) = os.getloadavg(), Runs.provenance(device), measure_all(args, device)
    print(f"{'part':14}{'variant':32}{'views/s':>10}{'ours / it':>11}{'peak MiB':>10}")
    for row, ratio in zip(rows, ratios.values()):
        memory = f"{row['peak_memory_bytes'] / 2**20:,.0f}" if row["peak_memory_bytes"] else ""
        print(f"{row['part']:14}{row['variant']:32}{row['views_per_second']:10,.0f}{ratio:11.2f}{memory:>10}")
    made |= {"command": shlex.join(["python", "-m", "Benchmarks.Speed", *sys.argv[1:]]), "load_average_before": load}
    made |= {"workers": args.workers, "threads": {"augmentation": 1, "step": torch.get_num_threads()}}
    installed = {package.name.lower(): package.version for package in metadata.distributions()}
    versions = {name: installed.get(name) for name in ("torch", "torchvision", "kornia", "pillow")}
    made |= {"versions": versions, "flags": Utils.plain(args), "rows": rows, "ratios": ratios, "notes": NOTES}
    if args.out or not args.quick:
        out = Path(args.out or Utils.ROOT / "Results" / f"speed-{device.type}.json")
        out.parent.mkdir(parents=True, exist_ok=True)
        Utils.write_json(out, made)
        print(f"written: {out}")
    return 0


if __name__ == "__main__":
    Utils.run_script(main, get_args)
