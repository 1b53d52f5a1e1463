"""Pre-train an encoder with ISICLE: the positive pair is one corrupted image, restored twice by a generator.

    python TrainISICLE.py                                   # generator, bank, encoder, scores: minutes on two cores
    python TrainISICLE.py --data cifar10 --pair real_real_gen --loss align
    python TrainISICLE.py --data PATH --bank positives.npy  # positives of your own
    tensorboard --logdir Models

Finds the newest generator that TrainCamNet.py made for the data, or trains one; fills the bank, K restorations of every
image; then trains by TrainSimCLR.py's loop, from which it differs in nothing but the source of positives below.
"""

import contextlib
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import Data
import Fitness
import Flags
import TrainCamNet
import TrainSimCLR
import Utils
from CamNet import Generator
from CamNet.Bank import Bank, fill, fingerprint, read, restore
from CamNet.Codes import make_keys, uniforms
from ImageFiles import first_rank_only
from Losses import multi_positive, nt_xent

REAL = {"gen_gen": 0, "real_gen": 1, "real_real_gen": 2, "multi": 0}  # views that are the image itself
PICK, SHARE = range(2)  # what random numbers are for: a part of their keys


def get_args(argv=None):
    """Parse the flags; see Flags.py for what they are."""
    return Flags.parse(argv, lambda data: Flags.contrastive_parser(__doc__, data, Flags.add_isicle_flags))


class Restored:
    """The source of positives: restorations from the bank, drawn anew in every step, beside the image where asked for.

    What is drawn follows from seed, step and image: neither a resumed run nor one on several processes differs.
    """

    def __init__(self, args, banks):
        """banks: epoch -> Bank."""
        self.args, self.banks, self.real = args, banks, REAL[args.pair]
        self.restored = {"gen_gen": 2, "multi": args.num_pos}.get(args.pair, 1)

    def __len__(self):
        return self.real + self.restored

    def share(self, trainer):
        """Return the probability of a restoration, where the pair has one, at the trainer's step."""
        warm = self.args.gen_warmup * trainer.steps_per_epoch
        return self.args.p_gen * min(1.0, (trainer.step + 1) / warm if warm else 1.0)

    def __call__(self, indices, images, trainer):
        """Return M batches uint8 (b, 3, H, W), the real ones first; see TrainSimCLR.SamePair."""
        views, share = [images] * self.real, self.share(trainer)
        if share == 0:
            return [images] * len(self)
        bank, keys = self.banks(trainer.epoch), make_keys(self.args.seed, trainer.step, indices.cpu())
        if self.args.pick == "farthest":
            columns = farthest(bank, indices, self.restored, images if self.real else None, trainer)
        else:
            columns = uniforms(make_keys(keys, PICK), bank.k).argsort(dim=1)[:, : self.restored]
        restored = bank.take(indices, columns).to(images.device)
        drawn = (uniforms(make_keys(keys, SHARE), self.restored) < share).to(images.device)
        for column in range(self.restored):
            views.append(torch.where(drawn[:, column, None, None, None], restored[:, column], images))
        return views

    def loss(self, z, args):
        """Return the loss of projections z (M, N, D)."""
        if args.loss in ("lout", "lin"):
            return multi_positive(z, args.temp, form=args.loss.removeprefix("l"))
        total = nt_xent(z[0], z[1], args.temp)
        for further in z[2:]:
            if args.loss == "align":  # CLSP (Zeng et al. 2024, arXiv:2408.16965): it is no negative to anything
                term = (2 - 2 * F.cosine_similarity(z[0], further, dim=1)).mean()
            else:
                term = nt_xent(z[0], further, args.temp)
            total = total + args.gen_weight * term / (len(z) - 2)
        return total


@torch.no_grad()
def farthest(bank, indices, count, images, trainer):
    """Return columns (b, count) of the bank: one after the other the least like those before, to the encoder.

    The first is the least like the image (b, 3, H, W), or, without one, like the mean of all restorations.
    """
    rows = torch.arange(bank.k).expand(len(indices), -1)
    batch = bank.take(indices, rows).flatten(0, 1)
    batch = torch.cat([batch, images]) if images is not None else batch
    encoder, mode = trainer.net.encoder, trainer.net.training
    encoder.eval()
    plain = Data.plain_views(batch.shape[-1])(batch, torch.Generator())
    features = F.normalize(encoder(plain.contiguous(memory_format=torch.channels_last)).float(), dim=1)
    encoder.train(mode)
    restored = features[: len(indices) * bank.k].view(len(indices), bank.k, -1)  # (b, K, F)
    seen = restored.mean(dim=1) if images is None else features[len(indices) * bank.k :]
    likeness = torch.einsum("bkf,bf->bk", restored, seen)
    columns = []
    for _ in range(count):
        column = likeness.argmin(dim=1, keepdim=True)  # (b, 1)
        columns.append(column)
        picked = restored.gather(1, column[:, :, None].expand(-1, -1, restored.shape[2]))[:, 0]
        own = torch.einsum("bkf,bf->bk", restored, picked)
        likeness = own if images is None and len(columns) == 1 else torch.maximum(likeness, own)
        likeness = likeness.scatter(1, torch.cat(columns, dim=1), 2.0)  # above every cosine: never twice
    return torch.cat(columns, dim=1)


class Banks:
    """epoch -> Bank: made by a generator and kept in its run's folder; a new one every --refresh epochs."""

    def __init__(self, args, split, device):
        self.args, self.split, self.device = args, split, device
        self.checkpoint = find_generator(args)
        state = Utils.load_(self.checkpoint)
        self.generator = Generator(**state["config"]).to(device, memory_format=torch.channels_last)
        Utils.load_(self.checkpoint, generator=self.generator)
        check_generator(self.checkpoint, state, args, split)
        self.fingerprint = fingerprint(self.generator.state_dict())[:8]
        self.bf16, self.number, self.bank = Utils.set_precision(args.precision, device), None, None

    def file(self, number):
        """Return where a bank lies: beside the generator; seed, size and generator are in its name."""
        name = f"bank-{self.fingerprint}-k{self.args.num_codes}-s{self.args.seed}"
        return self.checkpoint.parent / f"{name}-{number}.npy"

    def autocast(self):
        """Return the context of the run's precision."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def __call__(self, epoch):
        number = epoch // self.args.refresh if self.args.refresh else 0
        if number != self.number:
            first_rank_only(lambda: self.make(number))
            if self.number is not None:
                first_rank_only(lambda: self.remove(self.number))
            images = read(self.file(number), len(self.split), self.split.size)
            self.number, self.bank = number, Bank(images, self.device, self.args.bank_storage)
        return self.bank

    def make(self, number):
        """Fill the bank, with a word of how much and how long; an interrupted filling goes on."""
        file, k, seed = self.file(number), self.args.num_codes, make_seed(self.args.seed, number)
        if not file.exists():
            gib, seconds = len(self.split) * k * 3 * self.split.size**2 / 2**30, self.estimate(seed)
            print(
                f"bank: {k} restorations of {len(self.split)} images, {gib:.2f} GiB, about {seconds:.0f} s", flush=True
            )
        started = time.perf_counter()
        try:
            made = fill(file, self.generator, self.split, k, seed, self.device, self.autocast, quiet=Utils.quiet())
        except ValueError as error:
            raise Utils.UserError(str(error)) from error
        print(f"bank: {file}, {f'made in {time.perf_counter() - started:.0f} s' if made else 'found'}", flush=True)

    def estimate(self, seed, most=64):
        """Return the seconds that the filling may take, from a few images."""
        rows, images = next(iter(self.split.batches([torch.arange(min(most, len(self.split)))], self.device)))
        seconds = 0.0
        for _ in range(2):  # the first warms up
            started = time.perf_counter()
            restore(self.generator, images, rows, 1, seed, self.autocast).cpu()
            seconds = time.perf_counter() - started
        return seconds * self.args.num_codes * len(self.split) / len(rows)

    def remove(self, number):
        """Remove a bank that is not used any more."""
        file = self.file(number)
        file.unlink(missing_ok=True)
        file.with_name(file.name + ".json").unlink(missing_ok=True)


def make_seed(seed, number):
    """Return the seed of the codes of a bank."""
    return 1_000_003 * seed + number


def find_generator(args):
    """Return the checkpoint of --generator, or of the newest whole run for the data; trains one where there is none."""
    if args.generator:
        file = Path(args.generator)
        file = Utils.newest_checkpoint(file) if file.is_dir() else file
        if file is None:
            raise Utils.UserError(f"--generator {args.generator}: no checkpoint there: give a run of TrainCamNet.py")
        return file
    if not (found := newest_generator(args)):
        first_rank_only(lambda: train_generator(args))
        found = newest_generator(args)
    return Utils.newest_checkpoint(found)


def newest_generator(args):
    """Return the folder of the newest finished run of TrainCamNet.py for the data and the corruption, or None."""
    wanted = {"data": str(args.data), "size": args.size}
    if args.corrupt:
        wanted["corrupt"] = args.corrupt
    found = []
    for file in Path(args.models_dir).glob("TrainCamNet-*/generator.json"):
        with contextlib.suppress(OSError, ValueError, KeyError):
            flags = json.loads((file.parent / "args.json").read_text())["args"]
            if all(flags[name] == value for name, value in wanted.items()):
                found.append((file.stat().st_mtime, file.parent))
    return max(found)[1] if found else None


def train_generator(args):
    """Train a generator by the recipe of the data; an interrupted training goes on. UserError if it is interrupted."""
    shared = ("data", "size", "device", "n_workers", "data_dir", "storage", "models_dir", "precision", "corrupt")
    argv = [f"--{name}={value}" for name in shared if (value := getattr(args, name)) is not None]
    argv += ["--skip_bad"] * args.skip_bad + ["--resume=auto"]
    print(f"no generator for {args.data} yet: python TrainCamNet.py {' '.join(argv)}", flush=True)
    TrainCamNet.main(TrainCamNet.get_args(argv))
    if not newest_generator(args):
        raise KeyboardInterrupt


def check_generator(file, state, args, split):
    """Raise UserError if a generator is not for this data; warn if it is not fit for positives."""
    flags, config = state["args"], state["config"]
    wrong = {
        "--data": (flags["data"], args.data),
        "--size": (config["size"], split.size),
        "--corrupt": (config["corrupt"], args.corrupt or config["corrupt"]),
    }
    different = [f"{flag} {theirs} (here {ours})" for flag, (theirs, ours) in wrong.items() if theirs != ours]
    if different:
        raise Utils.UserError(f"--generator {file}: trained for {', '.join(different)}: give another, or none")
    print(f"generator: {file}")
    measures = file.parent / "generator.json"
    if measures.exists() and (reason := Fitness.unfit(json.loads(measures.read_text()))):
        print(f"warning: this generator is not fit for positives: {reason}")


def make_positives(args, splits, device):
    """Return the source of positives of a run's flags. Raises UserError on flags that do not go together."""
    source = Restored(args, None)
    if args.loss == "align" and len(source) == 2:
        raise Utils.UserError(f"--loss align: --pair {args.pair} has two views: use real_real_gen, or multi")
    if args.p_gen == 0:
        return source
    if args.bank:
        try:
            bank = Bank(read(args.bank, len(splits.train), splits.train.size), device, args.bank_storage)
        except ValueError as error:
            raise Utils.UserError(str(error)) from error
        source.banks, k = lambda epoch: bank, bank.k
    else:
        k = args.num_codes
    if k < source.restored:
        flag = f"--bank {args.bank}: it holds" if args.bank else "--num_codes:"
        raise Utils.UserError(
            f"{flag} {k} restorations of an image, and --pair {args.pair} takes {source.restored}: use "
            f"{source.restored} or more, or --pair real_gen"
        )
    if not args.bank:
        source.banks = Banks(args, splits.train, device)
        source.banks(0)
    return source


def main(args):
    """Find or train the generator, fill the bank, train, save, score; return the exit code."""
    return TrainSimCLR.main(args, make_positives, script=Path(__file__).stem)


if __name__ == "__main__":
    Utils.run_script(main, get_args)
