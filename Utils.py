"""What every script needs: errors, devices and their memory, files that are written whole, checkpoints."""

import contextlib
import fcntl
import json
import os
import re
import resource
import signal
import sys
import time
import zipfile
from pathlib import Path

import torch

import Distributed

ROOT = Path(__file__).resolve().parent


class UserError(ValueError):
    """A mistake that its user can correct: one line with flag or file, value and remedy, shown without a traceback."""


@contextlib.contextmanager
def as_user_error():
    """Turn a ValueError of the libraries, whose messages are written for users, into a UserError."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error


# ---------------------------------------------------------------------------------------------------- scripts


def run_script(main, get_args):
    """Run `main(get_args())`: exit code 2 and one line on a user's error, 130 on Ctrl-C."""
    try:
        code = main(get_args())
    except UserError as error:
        if not Distributed.is_first():
            time.sleep(5)  # what all processes see is reported by the first: torchrun ends the others meanwhile
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        code = 2
    except torch.OutOfMemoryError as error:
        reason = str(error).split(". ")[0]
        print(f"{Path(sys.argv[0]).name}: error: {reason}: lower --bs", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.stdout.flush()
    sys.exit(code)


def quiet():
    """Return whether progress bars are out of place: standard error is no terminal."""
    return not sys.stderr.isatty()


def derived_seed(seed, index):
    """Return another seed for each index (int >= 0) of a run's seed: an epoch, a bank, a lap over the images."""
    return 1_000_003 * seed + index


class Interruption:
    """Catches SIGTERM and Ctrl-C so that a loop can finish its step and save; a second Ctrl-C stops at once."""

    def __enter__(self):
        self.signal = None
        self.before = {each: signal.signal(each, self._catch) for each in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _catch(self, number, frame):
        if self.signal == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.signal = number

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    @property
    def exit_code(self):
        """0 after SIGTERM, which a scheduler sends to a run that is to continue later; 130 after Ctrl-C."""
        return 130 if self.signal == signal.SIGINT else 0


# ---------------------------------------------------------------------------------------------------- devices


def pick_device(name):
    """Return the torch device of --device. Raises UserError when it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}: try --device auto") from error
    return device


def set_precision(name, device):
    """Return whether --precision `name` means bf16 on the device, and set whether cuDNN uses tf32."""
    torch.backends.cudnn.allow_tf32 = name != "fp32"
    if name != "auto":
        return name == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def precision_name(name, bf16):
    """Return what --precision `name` came to, in words."""
    return "bf16" if bf16 else name.replace("auto", "fp32")


def free_memory(device):
    """Return the bytes that are free on a device."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:  # what can be taken without swapping: files in the page cache, as a bank just written, are no hindrance
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def peak_memory(device):
    """Return the most bytes that this process has held: on the GPU, or of main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def fits(n_bytes, device):
    """Return whether that many bytes take at most half of what is free on a device."""
    return n_bytes <= free_memory(device) / 2


def is_held(storage, n_bytes, device):
    """Return whether a bank is held on the device: --bank_storage memory, or auto where it fits."""
    return storage == "memory" or (storage == "auto" and fits(n_bytes, device))


# ---------------------------------------------------------------------------------------------------- files


def write_atomically(file, write):
    """Call `write(scratch)` and move the result to `file`: all of it or nothing. Raises UserError where it fails.

    Scratch files that killed processes have left for the same `file` are removed.
    """
    file = Path(file)
    scratch = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        remove_stale(file.parent, f".{file.name}.*.tmp")
        write(scratch)
        with scratch.open("rb") as handle:
            os.fsync(handle.fileno())
        scratch.replace(file)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        raise UserError(f"cannot write {file}: {error}: free space there, or name another folder") from error
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)


def remove_stale(folder, pattern=".*.tmp"):
    """Remove the scratch files of `write_atomically` in a folder whose processes are gone."""
    for path in Path(folder).glob(pattern):
        number = re.fullmatch(r"\..*\.(\d+)\.tmp", path.name)
        if number and not is_alive(int(number[1])):
            with contextlib.suppress(OSError):
                path.unlink()


def is_alive(process):
    """Return whether a process of this machine is running."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's
        pass
    return True


def write_json(file, content):
    """Write plain values to `file` as JSON, atomically."""
    text = json.dumps(content, indent=1) + "\n"
    write_atomically(file, lambda scratch: scratch.write_text(text))


@contextlib.contextmanager
def locked(file, work):
    """Hold the lock FILE.lock, which one process has at a time; says so where it has to wait for another's `work`."""
    lock = Path(file).with_name(f".{Path(file).name}.lock")
    try:
        handle = lock.open("w")
    except OSError as error:
        raise UserError(f"cannot write {lock}: {error}: make its folder one that can be written to") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting: another process is {work}", flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


# ---------------------------------------------------------------------------------------------------- checkpoints


def save_(file, **parts):
    """Write {name: state} to `file`, atomically. parts: modules and optimizers (anything with a state_dict), and plain
    values: numbers, strings, tensors, lists and dictionaries of them, so that `weights_only=True` reads it back."""
    state = {name: part.state_dict() if hasattr(part, "state_dict") else part for name, part in parts.items()}
    write_atomically(file, lambda scratch: torch.save(state, scratch))


def load_(file, **parts):
    """Return what `save_` wrote, tensors on the CPU; load each named part strictly.

    Raises UserError on a file that is missing, damaged (its checksums are compared), or does not fit, naming what
    does not.
    """
    file = Path(file)
    if not file.is_file():
        raise UserError(f"no checkpoint {file}: give the path of a .pt file in a folder of Models/")
    try:
        check_archive(file)
        state = dict(torch.load(file, map_location="cpu", weights_only=True))
    except Exception as error:  # torch raises half a dozen types on damaged files
        raise UserError(
            f"{file} is damaged or no checkpoint of this repository ({type(error).__name__}): use another"
        ) from error
    for name, part in parts.items():
        try:
            part.load_state_dict(state[name])
        except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            reason = re.sub(r"\s+", " ", str(error))[:500]
            raise UserError(
                f"{file} does not fit: {name}: {reason}: give the flags that it was trained with"
            ) from error
    return state


def check_archive(file):
    """Raise BadZipFile where a file of torch.save is not what was written: torch.load compares no checksum."""
    with zipfile.ZipFile(file) as archive:
        damaged = archive.testzip()
    if damaged:
        raise zipfile.BadZipFile(f"wrong checksum of {damaged}")


def checkpoint_name(whole, inside):
    """Return the name of a checkpoint after that many whole epochs (or periods) and steps inside the next one."""
    return f"{whole}+{inside}.pt" if inside else f"{whole}.pt"


def newest_checkpoint(folder):
    """Return the furthest checkpoint of a run folder that can be read: EPOCH.pt or, inside an epoch, EPOCH+STEP.pt."""
    found = []
    for path in Path(folder).glob("*.pt"):
        if match := re.fullmatch(r"(\d+)(?:\+(\d+))?\.pt", path.name):
            found.append((int(match[1]), int(match[2] or 0), path))
    for _, _, path in sorted(found, reverse=True):
        try:
            load_(path)
            return path
        except UserError as error:
            print(f"passed over: {error}")
    return None


def all_finite(tensors):
    """Return whether all numbers of some tensors are finite; waits for the device."""
    return bool(torch.stack([tensor.isfinite().all() for tensor in tensors]).all())


def plain(args):
    """Return the flags as plain types, as checkpoints and args.json hold them."""
    values = {}
    for key, value in vars(args).items():
        values[key] = value if isinstance(value, (bool, int, float, type(None))) else str(value)
    return values
