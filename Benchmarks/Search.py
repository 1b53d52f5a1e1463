"""Measure the generator in images per second: the search for codes, a training step, sampling; ours and the plain way.

    python -m Benchmarks.Search Models/RUN                     # a trained generator; Results/search-DEVICE.json
    python -m Benchmarks.Search Models/RUN --device cuda --images 512

Search: with the coarser levels run once for the chosen code (`CamNet.IMLE`), in the run's precision; the same in fp32;
with the coarser levels run again for every candidate; and as the published code does it (github.com/niopeng/CAM-Net),
which also takes one image and 20 codes at a time, makes the target's features for each of these chunks, in fp32. All
search the same codes by the same weights, and take turns; `same` is the share of codes that are chosen as in fp32.
"""

import argparse
import contextlib
import shlex
import statistics
import sys
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch

if find_spec("TrainCamNet") is None:  # started by its path, Python looks for modules beside it only
    print("Search.py: error: start it in the repository's folder, as python -m Benchmarks.Search", file=sys.stderr)
    sys.exit(2)

import Flags
import Runs
import TrainCamNet
import Utils
from CamNet.Codes import make_keys
from CamNet.Corruptions import pyramid
from CamNet.Measures import AT_ONCE

REFERENCE_CHUNK = 20  # codes of one image in a forward of the published code


def get_args(argv=None):
    """Parse the flags."""
    form = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False, formatter_class=form)
    add = parser.add_argument
    add("run", help="folder of a run of TrainCamNet.py, or one of its checkpoints")
    add("--device", default="auto", help="torch device, as cpu or cuda:1; auto: cuda if there is one")
    add("--images", type=Flags.bounded(int, 1), default=64, metavar="N", help="images of the train split to search")
    add("--rounds", type=Flags.bounded(int, 1), default=3, metavar="N", help="turns that every measurement takes")
    add("--out", metavar="FILE", help="JSON to write; None: Results/search-DEVICE.json")
    return parser.parse_args(argv)


@torch.inference_mode()
def plain_search(generator, distance, condition, targets, keys, counts, images, codes, cached):
    """Return the chosen keys (B, L), running all levels for every candidate; the slow way, to compare with.

    images, codes: how many of each go into one forward. cached: make the features of a target once for each level.
    """
    chosen = torch.empty(len(keys), 0, dtype=torch.int64, device=keys.device)
    for level, target in enumerate(targets):
        picked = []
        for rows in torch.arange(len(keys), device=keys.device).split(images):
            count = torch.arange(counts[min(level, len(counts) - 1)], device=keys.device)
            candidates = make_keys(keys[rows, None], level, count)  # (b, m)
            wanted, d = distance.features(target[rows]) if cached else None, []
            for part in candidates.split(codes, dim=1):
                k = part.shape[1]
                whole = torch.cat([chosen[rows].repeat_interleave(k, 0), part.reshape(-1, 1)], dim=1)
                image = generator(condition[rows].repeat_interleave(k, 0), generator.codes(whole))[-1]
                features = wanted if cached else distance.features(target[rows])
                d.append(distance.between(distance.features(image), features).view(-1, k))
            best = torch.cat(d, dim=1).argmin(dim=1, keepdim=True)
            picked.append(candidates.gather(1, best))
        chosen = torch.cat([chosen, torch.cat(picked)], dim=1)
    return chosen


class Bench:
    """A trained generator with images, and each way of using it as a function without arguments."""

    def __init__(self, args, device):
        file = Path(args.run)
        file = Utils.newest_checkpoint(file) if file.is_dir() else file
        if file is None:
            raise Utils.UserError(f"{args.run} holds no checkpoint: give the folder of a run of TrainCamNet.py")
        stored = Utils.load_(file)["args"]
        if "net" not in stored:
            raise Utils.UserError(f"{file} holds no generator: give a run of TrainCamNet.py")
        same = {"device": str(device), "reject": 0.0, "keep_previous": False}  # the plain searches know neither
        self.flags = argparse.Namespace(**{**stored, **same})
        split, generator, distance = TrainCamNet.build(self.flags, device)
        self.counts = [int(count) for count in self.flags.m.split(",")]
        self.trainer = TrainCamNet.Trainer(self.flags, split, generator, distance, self.counts, device)
        self.trainer.load(file)
        rows, self.images = self.trainer.images(torch.arange(min(args.images, len(split))))
        self.keys = make_keys(self.flags.seed, rows).to(device)
        self.period = TrainCamNet.Period(self.trainer, rows, self.images, self.keys)
        self.period.keys = self.ours(bf16=False)  # what the training steps learn from
        self.targets = pyramid(self.images, self.trainer.net.sides)

    @contextlib.contextmanager
    def precision(self, bf16):
        """Let the trainer compute in bf16, or in fp32 without tf32."""
        before = self.trainer.bf16, torch.backends.cudnn.allow_tf32
        self.trainer.bf16, torch.backends.cudnn.allow_tf32 = bf16, bf16
        yield self.trainer
        self.trainer.bf16, torch.backends.cudnn.allow_tf32 = before

    def ours(self, bf16):
        """Search as training does, in bf16 or fp32."""
        everything = torch.arange(len(self.keys), device=self.keys.device)
        with self.precision(bf16) as trainer:
            return self.period.search(trainer, everything, self.keys).keys

    def plain(self, images, codes, cached, bf16):
        """Search without a shared prefix."""
        with self.precision(bf16) as trainer, trainer.autocast():
            arguments = (trainer.net, trainer.distance, self.period.condition, self.targets, self.keys, self.counts)
            return plain_search(*arguments, images, codes, cached)

    def train(self, bs, bf16):
        """Take one step on each image, bs at a time."""
        with self.precision(bf16) as trainer:
            for part in torch.arange(len(self.keys), device=self.keys.device).split(bs):
                trainer.update(self.period, part)

    def sample(self, bs, bf16):
        """Make one sample of each image, bs at a time."""
        with self.precision(bf16) as trainer, trainer.autocast():
            for rows in torch.arange(len(self.keys), device=self.keys.device).split(bs):
                trainer.ema.sample(self.period.condition[rows], self.keys[rows])

    def variants(self):
        """Return {(part, variant): function}; the first of each part is ours."""
        bf16, m = self.trainer.bf16, max(self.counts)
        ours = "ours, bf16" if bf16 else "ours, fp32"
        batch = max(1, self.flags.chunk // m)
        variants = {("search", ours): partial(self.ours, bf16), ("search", "ours, fp32"): partial(self.ours, False)}
        variants["search", f"prefix run again, {ours[-4:]}"] = partial(self.plain, batch, m, True, bf16)
        variants["search", "as published"] = partial(self.plain, 1, REFERENCE_CHUNK, False, False)
        variants["sampling", ours] = partial(self.sample, AT_ONCE, bf16)
        variants["sampling", "one by one, fp32"] = partial(self.sample, 1, False)
        variants["training", ours] = partial(self.train, self.flags.bs, bf16)  # last: it changes the weights
        variants["training", "one by one, fp32"] = partial(self.train, 1, False)
        return variants


def measure(bench, rounds, device):
    """Return rows of images per second: the variants take turns, after one turn that is not timed."""
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    variants, chosen = bench.variants(), {}
    speeds = {name: [] for name in variants}
    for part in ("search", "sampling", "training"):
        some = {name: run for name, run in variants.items() if name[0] == part}
        for turn in range(rounds + 1):
            for name, run in some.items():
                wait()
                start = time.perf_counter()
                result = run()
                wait()
                if turn:
                    speeds[name].append(len(bench.keys) / (time.perf_counter() - start))
                    chosen[name] = result
    rows = []
    for (part, variant), values in speeds.items():
        first = next(speeds[name] for name in speeds if name[0] == part)
        row = {"part": part, "variant": variant, "images_per_second": round(statistics.median(values), 2)}
        row["ratio"] = round(statistics.median(a / b for a, b in zip(first, values)), 2)
        if part == "search":
            same = chosen[part, variant] == chosen[part, "ours, fp32"]
            row["same"] = round(same.float().mean().item(), 4)
        rows.append(row)
    return rows


def main(args):
    """Measure, print a table, write it; return the exit code."""
    device = Utils.pick_device(args.device)
    made = Runs.provenance(device) | {"command": shlex.join(["python", "-m", "Benchmarks.Search", *sys.argv[1:]])}
    bench = Bench(args, device)
    rows = measure(bench, args.rounds, device)
    print(f"{'part':10}{'variant':28}{'images/s':>10}{'ours / it':>11}{'same codes':>12}")
    for row in rows:
        same = f"{100 * row['same']:.1f} %" if "same" in row else ""
        print(f"{row['part']:10}{row['variant']:28}{row['images_per_second']:10,.1f}{row['ratio']:11.2f}{same:>12}")
    flags = {key: getattr(bench.flags, key) for key in ("data", "net", "corrupt", "distance", "m", "bs", "chunk")}
    made |= {"images": len(bench.keys), "rounds": args.rounds, "generator": flags, "rows": rows}
    out = Path(args.out or Utils.ROOT / "Results" / f"search-{device.type}.json")
    Utils.write_json(out, made)
    print(f"written: {out}")
    return 0


if __name__ == "__main__":
    Utils.run_script(main, get_args)
