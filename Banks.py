"""The banks of restorations that TrainISICLE.py trains on, and the generator that fills them."""

import contextlib
import os
import time
from functools import partial
from pathlib import Path

import torch

import Data
import Devices
import Distributed
import Locks
import Runs
import Utils
from CamNet import Measures
from CamNet.Bank import Bank, batch_size, fill, fingerprint, read, restore
from CamNet.Corruptions import Corruption
from CamNet.Generator import Generator
from Distributed import first_rank_only, say


class BankSchedule:
    """epoch -> Bank: filled by a generator and kept in its run folder; a new one every --refresh epochs."""

    def __init__(self, args, split, device, checkpoint, asked):
        """split: the train split; checkpoint: the generator's file, of a run of TrainCamNet.py; asked: see
        `find_generator`."""
        self.args = args
        self.split = split
        self.device = device
        self.checkpoint = checkpoint
        state = load_generator(checkpoint, args, split, asked)
        with Utils.fitting(checkpoint, "config"):
            generator = Generator(**state["config"])
        self.generator = generator.to(device, memory_format=torch.channels_last)
        Utils.load_parts(checkpoint, state, generator=self.generator)
        self.fingerprint = fingerprint_of(self.generator.state_dict())
        self.bf16 = Devices.set_precision(args.precision, device)
        self.folder = first_rank_only(self.find_folder)  # of the banks
        self.index = None  # of the current bank
        self.bank = None

    def find_folder(self):
        """Return the folder of the banks: the generator's, or --models_dir if that one cannot be written."""
        folder = self.checkpoint.parent
        return folder if os.access(folder, os.W_OK) else Path(self.args.models_dir)

    def file(self, index):
        """Return the file of a bank.

        Its name holds generator, images, K and seed; and --refresh, since banks with this flag are removed after use.
        """
        name = f"bank-{self.fingerprint}-{self.split.fingerprint()[:8]}-k{self.args.num_codes}-s{self.args.seed}"
        if self.args.refresh:
            name += f"-refresh{self.args.refresh}"
        return self.folder / f"{name}-{index}.npy"

    def autocast(self):
        """Return the context of the run's precision."""
        return Devices.autocast(self.device, self.bf16)

    def __call__(self, epoch):
        last = self.args.epochs - 1  # a complete run that is resumed needs no further bank
        index = min(epoch, last) // self.args.refresh if self.args.refresh else 0
        if index == self.index:
            return self.bank
        self.make(index)
        if self.index is not None:
            first_rank_only(lambda: self.remove(self.index))
        try:
            images = read(self.file(index), len(self.split), self.split.size)
        except ValueError as error:
            raise Utils.UserError(f"{error}: delete it; it is then made again") from error
        self.bank = None  # room for the next one
        self.bank = Bank(images, self.device, Devices.is_held(self.args.bank_storage, images.nbytes, self.device))
        self.index = index
        return self.bank

    def make(self, index):
        """Fill the bank, or continue an interrupted filling; print its size and how long it takes."""
        file = self.file(index)
        k = self.args.num_codes
        seed = Utils.derived_seed(self.args.seed, index)
        processes = Distributed.count()
        first_rank_only(lambda: self.announce(index, seed, processes))
        started = time.perf_counter()
        lock = file.with_name(f".{file.name}.lock")
        with Utils.as_user_error(), Locks.locked_by_first(lock, f"filling {file}"):
            made = fill(
                file,
                self.generator,
                self.split,
                k,
                seed,
                self.device,
                self.autocast,
                quiet=Utils.quiet(),
                first_only=first_rank_only,
                spread=Distributed.spread,
            )
        outcome = f"made in {time.perf_counter() - started:.0f} s" if made else "found"
        say(f"bank: {Utils.shown(file)}, {outcome}")

    def announce(self, index, seed, processes):
        """Print the size of a bank that is not there yet, and how long so many processes take to fill it."""
        if self.file(index).exists():
            return
        print(
            f"bank: {describe_bank(self.args, self.split)}, about {self.estimate(seed) / processes:.0f} s", flush=True
        )

    def estimate(self, seed):
        """Return the seconds that the filling takes in one process."""
        return filling_seconds(self.args, self.split, self.device, self.generator, self.autocast, seed)

    def remove(self, index):
        """Remove a bank that is not used anymore."""
        file = self.file(index)
        file.unlink(missing_ok=True)
        file.with_name(file.name + ".json").unlink(missing_ok=True)


def filling_seconds(args, split, device, generator, autocast, seed):
    """Return the seconds that one process takes to fill a bank, estimated from a few images."""
    few = batch_size(device, split.size) if device.type == "cuda" else 64  # a small batch takes a GPU as long
    rows, images = next(iter(split.batches([torch.arange(min(few, len(split)))], device)))
    with autocast():
        frozen = generator.frozen()
    for _ in range(2):  # the first warms up
        started = time.perf_counter()
        restore(frozen, images, rows, 1, seed, autocast).cpu()
        seconds = time.perf_counter() - started
    return seconds * args.num_codes * len(split) / len(rows)


def describe_bank(args, split):
    """Return how many restorations the bank holds, and its size, in words."""
    mib = len(split) * args.num_codes * 3 * split.size**2 / 2**20
    size = f"{mib:,.1f} MiB" if mib < 1000 else f"{mib / 1024:,.1f} GiB"
    return f"{args.num_codes} restorations of {len(split):,} images, {size}"


def find_generator(args, split, asked, fingerprint=""):
    """Return the checkpoint of --generator, or else of the newest finished run for these images, or None.

    split: the train split; asked: {flag of TrainCamNet.py: value} that the generator must have been trained with.
    fingerprint: that of the generator of a run that is resumed, which is taken if it is still there.
    """
    if not args.generator:
        return first_rank_only(lambda: newest_generator(args, split, asked, fingerprint))
    file = Path(args.generator)
    if file.is_dir():
        file = first_rank_only(partial(Utils.newest_checkpoint, file))
    if file is None or not file.exists():
        raise Utils.UserError(f"--generator {args.generator}: no checkpoint there: give a run of TrainCamNet.py")
    return file


def newest_generator(args, split, asked, fingerprint):
    """Return the checkpoint of the newest finished run of TrainCamNet.py that `find_generator` looks for, or None."""
    found = []
    for file in Path(args.models_dir).glob("TrainCamNet-*/generator.json"):
        flags = Runs.stored_flags(file.parent)
        data = (Utils.read_json(file) or {}).get("data_fingerprint")
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # a folder of other content
            if data == split.fingerprint() and not differences(flags, args, asked):
                found.append((file.stat().st_mtime, file.parent))
    newest = None
    for _, folder in sorted(found, reverse=True):
        checkpoint = Utils.newest_checkpoint(folder)
        if checkpoint and (not fingerprint or fingerprint_of(Utils.load_(checkpoint)["generator"]) == fingerprint):
            return checkpoint
        newest = newest or checkpoint
    return newest


def fingerprint_of(state):
    """Return what tells generators apart, by the state dict of one."""
    return fingerprint(state)[:8]


def differences(flags, args, asked):
    """Return how a generator, made with these flags of TrainCamNet.py, differs from the one that is asked for."""
    found = []
    size = Data.get_row(args.data, args.size).size
    its_size = flags["image_size"]
    if its_size != size:
        found.append(f"--size {its_size} (here {size})")
    asked = asked | ({"corrupt": args.corrupt} if args.corrupt else {})
    for name, value in asked.items():
        its_value = flags[name]
        if name == "corrupt":  # one corruption can be written in several ways
            value = Corruption(value, size).spec
            its_value = Corruption(its_value, its_size).spec
        if value != its_value:
            found.append(f"--{name} {its_value} (here {value})")
    return found


def load_generator(file, args, split, asked):
    """Return what a generator's checkpoint holds; warn if it is unfit or was trained on other images.

    Raises UserError if it is no generator, or not the one that is asked for.
    """
    state = Utils.load_(file)
    if not {"config", "generator", "args"} <= state.keys():
        raise Utils.UserError(f"--generator {file}: it holds no generator: give a run of TrainCamNet.py")
    try:
        different = differences(Utils.current_flags(state["args"]), args, asked)
    except KeyError as error:
        raise Utils.UserError(f"--generator {file}: of another version: it lacks {error}: train a new one") from error
    except (TypeError, AttributeError) as error:
        raise Utils.UserError(f"--generator {file}: its flags are damaged ({error}): train a new one") from error
    if different:
        raise Utils.UserError(f"--generator {file}: trained for {', '.join(different)}: give another, or none")
    say(f"generator: {Utils.shown(file)}")
    if state.get("data_fingerprint") != split.fingerprint():
        say(f"warning: this generator was trained on other images ({Utils.shown(state['args']['data'])})")
    measures = Utils.read_json(file.parent / "generator.json", Measures.READ, Measures.unfit)
    warning = Measures.warning(measures) if measures else None
    if warning:
        say(warning)
    return state


def corruption_for(args, split, asked):
    """Return the corruption of --corrupt, or else of the generator that would be used, or else of the data's recipe."""
    if args.corrupt:
        return args.corrupt
    file = find_generator(args, split, asked)
    if file:
        return load_generator(file, args, split, asked)["config"]["corrupt"]
    return Data.get_row(args.data).generator_recipe["corrupt"]
