"""Measure images per second of a generator: search for codes, sampling, training steps; ours and a plain version.

    python -m Benchmarks.Search                               # the newest generator in Models/
    python -m Benchmarks.Search Models/RUN --images 512       # a run folder of TrainCamNet.py

If there is no generator yet, python TrainCamNet.py makes one in minutes. Writes Results/search-DEVICE.json. Four ways
of searching the same codes by the same weights: ours (`CamNet.IMLE`), which runs the coarser levels once, for the
chosen codes; the same in fp32; with the coarser levels run again for every candidate; and as the published code does it
(github.com/niopeng/CAM-Net): the latter, in chunks of one image and 20 codes, for each of which the features of the
target are computed again, in fp32. The ways take turns. `same`: the share of the chosen codes that fp32 chooses, too.
"""

import argparse
import contextlib
import shlex
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch

import Devices
import Flags
import Runs
import Signals
import TrainCamNet
import Utils
from Benchmarks.Collect import newest_generator
from CamNet.Codes import make_keys
from CamNet.Corruptions import pyramid
from CamNet.Measures import AT_ONCE
from Flags import bounded

REFERENCE_CHUNK = 20  # codes of one image in a forward pass of the published code


def get_args(argv=None):
    """Parse the flags."""
    parser = Flags.plain_parser(__doc__)
    add = parser.add_argument
    add("run", nargs="?", help="run folder of TrainCamNet.py, or a checkpoint in it; default: the newest in Models/")
    add("--device", default="auto", help="torch device, for example cpu or cuda:1; auto: cuda if available")
    add("--images", type=bounded(int, 1), default=64, metavar="N", help="images of the train split to search")
    add("--rounds", type=bounded(int, 1), default=3, metavar="N", help="repetitions of all measurements")
    add("--out", type=Flags.path, metavar="FILE", help="JSON to write; default: Results/search-DEVICE.json")
    return parser.parse_args(argv)


# ---------------------------------------------------------------------------------------------------- the plain way


@torch.inference_mode()
def plain_search(generator, distance, condition, targets, keys, counts, images, codes, cached):
    """Return the chosen keys (B, L), running all levels for every candidate: the slow way, to compare with.

    condition: c(x) of B images; targets: a batch for each level; keys: int64 (B,). counts: candidates of each level;
    further levels use the last number. images, codes: how many of each go into one forward pass. cached: compute the
    features of a target once for each level.
    """
    chosen = torch.empty(len(keys), 0, dtype=torch.int64, device=keys.device)
    for level, target in enumerate(targets):
        count = counts[min(level, len(counts) - 1)]
        picked = []
        for rows in torch.arange(len(keys), device=keys.device).split(images):
            candidates = make_keys(keys[rows, None], level, torch.arange(count, device=keys.device))  # (b, m)
            features = distance.features(target[rows]) if cached else None
            distances = []
            for part in candidates.split(codes, dim=1):
                k = part.shape[1]
                if not cached:
                    features = distance.features(target[rows])
                whole = torch.cat([chosen[rows].repeat_interleave(k, 0), part.reshape(-1, 1)], dim=1)
                image = generator(condition[rows].repeat_interleave(k, 0), generator.codes(whole))[-1]
                distances.append(distance.between(distance.features(image), features).view(-1, k))
            best = torch.cat(distances, dim=1).argmin(dim=1, keepdim=True)
            picked.append(candidates.gather(1, best))
        chosen = torch.cat([chosen, torch.cat(picked)], dim=1)
    return chosen


# ---------------------------------------------------------------------------------------------------- measurement


class Bench:
    """A trained generator with images, and each way of using it as a function without arguments."""

    def __init__(self, args, device):
        # the run
        run = Path(args.run) if args.run else newest_generator(Utils.ROOT / "Models")
        file = Utils.newest_checkpoint(run) if run.is_dir() else run
        if file is None:
            raise Utils.UserError(f"{run} holds no checkpoint: give the folder of a run of TrainCamNet.py")
        stored = Utils.current_flags(Utils.load_(file)["args"])
        if "net" not in stored:
            raise Utils.UserError(f"{file} holds no generator: give a run of TrainCamNet.py")
        print(f"generator: {file}", flush=True)
        self.flags = argparse.Namespace(**stored)
        self.flags.device = str(device)
        self.flags.reject = 0.0  # the plain searches reject no candidate
        self.flags.keep_previous = False  # and keep no codes
        self.flags.compile = False
        self.flags.cuda_graph = False

        # its trainer, with some images
        split, generator, distance = TrainCamNet.build(self.flags, device)
        self.counts = TrainCamNet.codes_per_level(self.flags)
        self.trainer = TrainCamNet.Trainer(self.flags, split, generator, distance, self.counts, device)
        self.trainer.load(file)
        rows = torch.arange(min(args.images, len(split)))
        self.images = self.trainer.images(rows)
        self.keys = make_keys(self.flags.seed, rows).to(device)
        self.period = TrainCamNet.Period(self.trainer, rows, self.images, self.keys)
        self.period.keys = self.ours(bf16=False)  # what the training steps learn from
        self.targets = pyramid(self.images, self.trainer.net.sides)

    @contextlib.contextmanager
    def precision(self, bf16):
        """Let the trainer compute in bf16, or in fp32 without tf32."""
        bf16_before = self.trainer.bf16
        tf32_before = torch.backends.cudnn.allow_tf32
        self.trainer.bf16 = bf16
        torch.backends.cudnn.allow_tf32 = bf16
        yield self.trainer
        self.trainer.bf16 = bf16_before
        torch.backends.cudnn.allow_tf32 = tf32_before

    def all_rows(self):
        """Return the indices of all images."""
        return torch.arange(len(self.keys), device=self.keys.device)

    def ours(self, bf16):
        """Search as training does, in bf16 or fp32."""
        with self.precision(bf16) as trainer:
            return self.period.search(trainer, trainer.frozen(), self.all_rows(), self.keys).keys

    def plain(self, images, codes, cached, bf16):
        """Search as `plain_search` does."""
        with self.precision(bf16) as trainer, trainer.autocast():
            return plain_search(
                trainer.net,
                trainer.distance,
                self.period.condition,
                self.targets,
                self.keys,
                self.counts,
                images,
                codes,
                cached,
            )

    def train(self, bs, bf16):
        """Train one step on each image, in batches of bs."""
        with self.precision(bf16) as trainer:
            for part in self.all_rows().split(bs):
                trainer.update(self.period, part)

    def sample(self, bs, bf16):
        """Make one sample of each image, in batches of bs."""
        with self.precision(bf16) as trainer, trainer.autocast():
            for rows in self.all_rows().split(bs):
                trainer.ema.sample(self.period.condition[rows], self.keys[rows])

    def variants(self):
        """Return {part: {variant: function}}; the first of each part is ours. Training is last: it changes weights."""
        bf16 = self.trainer.bf16
        name = "bf16" if bf16 else "fp32"
        m = max(self.counts)
        batch = max(1, self.flags.chunk // m)
        search = {
            f"ours, {name}": partial(self.ours, bf16),
            "ours, fp32": partial(self.ours, False),
            f"prefix run again, {name}": partial(self.plain, batch, m, True, bf16),
            "as published": partial(self.plain, 1, REFERENCE_CHUNK, False, False),
        }
        sampling = {
            f"ours, {name}": partial(self.sample, AT_ONCE, bf16),
            "one by one, fp32": partial(self.sample, 1, False),
        }
        training = {
            f"ours, {name}": partial(self.train, self.flags.bs, bf16),
            "one by one, fp32": partial(self.train, 1, False),
        }
        return {"search": search, "sampling": sampling, "training": training}


def measure(bench, rounds, device):
    """Return rows of images per second: the variants take turns; the first turn warms up and is not counted."""
    rows = []
    for part, variants in bench.variants().items():
        speeds = {name: [] for name in variants}
        results = {}
        for turn in range(rounds + 1):
            for name, function in variants.items():
                Devices.wait(device)
                start = time.perf_counter()
                results[name] = function()
                Devices.wait(device)
                speed = len(bench.keys) / (time.perf_counter() - start)
                title = f"round {turn}/{rounds}" if turn else "warm-up"
                print(f"{part}, {title}: {name}: {speed:,.1f} images/s", flush=True)
                if turn:
                    speeds[name].append(speed)

        first = next(iter(speeds.values()))
        for name, values in speeds.items():
            row = {"part": part, "variant": name, "images_per_second": round(statistics.median(values), 2)}
            row["ratio"] = round(statistics.median(a / b for a, b in zip(first, values)), 2)
            if part == "search":
                same = results[name] == results["ours, fp32"]
                row["same"] = round(same.float().mean().item(), 4)
            rows.append(row)
    return rows


@Signals.heartbeat("measuring")
def main(args):
    """Measure, print a table, write it; return the exit code."""
    device = Devices.pick_device(args.device)
    made = Runs.provenance(device)
    made["command"] = shlex.join(["python", "-m", "Benchmarks.Search", *sys.argv[1:]])
    bench = Bench(args, device)
    rows = measure(bench, args.rounds, device)
    print(f"{'part':10}{'variant':28}{'images/s':>10}{'ours / it':>11}{'same codes':>12}")
    for row in rows:
        same = f"{100 * row['same']:.1f} %" if "same" in row else ""
        print(f"{row['part']:10}{row['variant']:28}{row['images_per_second']:10,.1f}{row['ratio']:11.2f}{same:>12}")
    made["images"] = len(bench.keys)
    made["rounds"] = args.rounds
    names = ("data", "net", "corrupt", "distance", "candidates", "bs", "chunk")
    made["generator"] = {name: getattr(bench.flags, name) for name in names}
    made["rows"] = rows
    out = Path(args.out or Utils.ROOT / "Results" / f"search-{device.type}.json")
    Utils.write_json(out, made)
    print(f"written: {out}")
    return 0


if __name__ == "__main__":
    Utils.run_script(main, get_args)
