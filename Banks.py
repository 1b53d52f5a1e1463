"""The banks of restorations that TrainISICLE.py trains on, and the generator that fills them: found, or trained."""

import contextlib
import json
import shlex
import sys
import time
from pathlib import Path

import torch

import Data
import Fitness
import TrainCamNet
import Utils
from CamNet import Generator
from CamNet.Bank import Bank, fill, fingerprint, read, restore
from CamNet.Corruptions import Corruption
from Distributed import first_rank_only, is_launched, say


class Banks:
    """epoch -> Bank: made by a generator and kept in its run's folder; a new one every --refresh epochs."""

    def __init__(self, args, split, device):
        self.args, self.split, self.device = args, split, device
        self.checkpoint = find_generator(args) or train_generator(args)
        state = load_generator(self.checkpoint, args)
        self.generator = Generator(**state["config"]).to(device, memory_format=torch.channels_last)
        Utils.load_(self.checkpoint, generator=self.generator)
        self.fingerprint = fingerprint(self.generator.state_dict())[:8]
        self.bf16, self.number, self.bank = Utils.set_precision(args.precision, device), None, None

    def file(self, number):
        """Return where a bank lies: beside the generator; generator, K and seed are in its name, and --refresh, since
        such banks are removed after their use."""
        name = f"bank-{self.fingerprint}-k{self.args.num_codes}-s{self.args.seed}"
        name += f"-refresh{self.args.refresh}" if self.args.refresh else ""
        return self.checkpoint.parent / f"{name}-{number}.npy"

    def autocast(self):
        """Return the context of the run's precision."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def __call__(self, epoch):
        last = self.args.epochs - 1  # a complete run, scored again, needs no further bank
        number = min(epoch, last) // self.args.refresh if self.args.refresh else 0
        if number != self.number:
            first_rank_only(lambda: self.make(number))
            if self.number is not None:
                first_rank_only(lambda: self.remove(self.number))
            try:
                images = read(self.file(number), len(self.split), self.split.size)
            except ValueError as error:
                raise Utils.UserError(f"{error}; or delete it") from error
            self.bank = None  # room for the next one
            self.number = number
            self.bank = Bank(images, self.device, Utils.is_held(self.args.bank_storage, images.nbytes, self.device))
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
            with Utils.locked(file, f"filling {file}"):
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
    """Return the checkpoint of --generator, or else of the newest finished run for the data and --corrupt, or None."""
    if not args.generator:
        return newest_generator(args)
    file = Path(args.generator)
    file = Utils.newest_checkpoint(file) if file.is_dir() else file
    if file is None:
        raise Utils.UserError(f"--generator {args.generator}: no checkpoint there: give a run of TrainCamNet.py")
    return file


def newest_generator(args):
    """Return the checkpoint of the newest finished run of TrainCamNet.py for the data and --corrupt, or None."""
    found = []
    for file in Path(args.models_dir).glob("TrainCamNet-*/generator.json"):
        with contextlib.suppress(OSError, ValueError, KeyError):
            flags = json.loads((file.parent / "args.json").read_text())["args"]
            if not differences(flags, args):
                found.append((file.stat().st_mtime, file.parent))
    whole = (Utils.newest_checkpoint(folder) for _, folder in sorted(found, reverse=True))
    return next((checkpoint for checkpoint in whole if checkpoint), None)


def differences(flags, args):
    """Return in what a generator, made with these flags of TrainCamNet.py, is not the one that is asked for."""
    size, theirs = (Data.get_row(args.data, each).size for each in (args.size, flags["size"]))
    corrupt = args.corrupt and Corruption(args.corrupt, size).spec
    wanted = {
        "--data": (flags["data"], args.data, Path(flags["data"]).resolve() == Path(args.data).resolve()),
        "--size": (theirs, size, theirs == size),
        "--corrupt": (flags["corrupt"], corrupt, corrupt in (None, Corruption(flags["corrupt"], theirs).spec)),
    }
    return [f"{flag} {theirs} (here {ours})" for flag, (theirs, ours, same) in wanted.items() if not same]


def train_generator(args):
    """Train a generator by the recipe of the data, or go on doing so; return its checkpoint. Exits if interrupted."""
    shared = ("data", "size", "device", "n_workers", "data_dir", "storage", "models_dir", "precision", "corrupt")
    argv = [f"--{name}={value}" for name in shared if (value := getattr(args, name)) is not None]
    argv += ["--skip_bad"] * args.skip_bad + ["--resume=auto"]
    if is_launched():
        command = shlex.join(["python", "TrainCamNet.py", *argv])
        raise Utils.UserError(f"--generator: none for {args.data} yet, and torchrun trains none: first run {command}")
    models = Path(args.models_dir)
    try:
        models.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Utils.UserError(f"--models_dir {models}: {error}: name another folder") from error
    with Utils.locked(models / f"generator-{Data.get_row(args.data).name}", f"training a generator for {args.data}"):
        if found := newest_generator(args):  # another process has trained it meanwhile
            return found
        print(f"no generator for {args.data} yet: python TrainCamNet.py {' '.join(argv)}", flush=True)
        code = TrainCamNet.main(TrainCamNet.get_args(argv))
        found = newest_generator(args)
    if code or not found:
        sys.exit(code)
    return found


def load_generator(file, args):
    """Return what a generator's checkpoint holds; warn if unfit. UserError if it is none, or not for this data."""
    state = Utils.load_(file)
    if not {"config", "generator", "args"} <= state.keys():
        raise Utils.UserError(f"--generator {file}: it holds no generator: give a run of TrainCamNet.py")
    if different := differences(state["args"], args):
        raise Utils.UserError(f"--generator {file}: trained for {', '.join(different)}: give another, or none")
    say(f"generator: {file}")
    measures = file.parent / "generator.json"
    if measures.exists() and (reason := Fitness.unfit(json.loads(measures.read_text()))):
        say(f"warning: this generator is not fit for positives: {reason}")
    return state


def corruption_for(args):
    """Return the corruption of --corrupt, or else of the generator that would be used, or else of the data's recipe."""
    if args.corrupt:
        return args.corrupt
    file = find_generator(args)
    return load_generator(file, args)["config"]["corrupt"] if file else Data.get_row(args.data).generator["corrupt"]
