"""What every script needs: errors, devices, checkpoints, run folders, interruption."""

import contextlib
import datetime
import fcntl
import hashlib
import json
import os
import platform
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

import torch
import torchvision
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import save_image

import Distributed

ROOT = Path(__file__).resolve().parent
NAME_MAX = 240  # bytes of a run folder's name; file systems allow 255


class UserError(ValueError):
    """A mistake that its user can mend: one line with flag or file, value and remedy, shown without a traceback."""


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
        print(f"{Path(sys.argv[0]).name}: error: {reason}: lower --bs, or what else is held at a time", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.stdout.flush()
    sys.exit(code)


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
    """Return whether --precision `name` means bf16 on the device, and set whether cuDNN takes tf32."""
    torch.backends.cudnn.allow_tf32 = name != "fp32"
    if name != "auto":
        return name == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


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
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def fits(n_bytes, device):
    """Return whether that many bytes take at most half of what is free on a device."""
    return n_bytes <= free_memory(device) / 2


def is_held(storage, n_bytes, device):
    """Return whether a bank is held on the device: --bank_storage memory, or auto where it fits."""
    return storage == "memory" or (storage == "auto" and fits(n_bytes, device))


def quiet():
    """Return whether progress bars are out of place: standard error is no terminal."""
    return not sys.stderr.isatty()


# ---------------------------------------------------------------------------------------------------- checkpoints


def write_atomically(file, write):
    """Call `write(scratch)` and move the result to `file`: all of it or nothing. Raises UserError on a full disk."""
    file = Path(file)
    scratch = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        write(scratch)
        with scratch.open("rb") as handle:
            os.fsync(handle.fileno())
        scratch.replace(file)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        raise UserError(f"cannot write {file}: {error}: free space there, or name another folder") from error
    finally:
        scratch.unlink(missing_ok=True)


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


def save_(file, **parts):
    """Write {name: state} to `file`, atomically. parts: modules and optimizers (anything with a state_dict), and plain
    values: numbers, strings, tensors, lists and dictionaries of them, so that `weights_only=True` reads it back."""
    state = {name: part.state_dict() if hasattr(part, "state_dict") else part for name, part in parts.items()}
    write_atomically(file, lambda scratch: torch.save(state, scratch))


def load_(file, **parts):
    """Return what `save_` wrote, tensors on the CPU; load each named part strictly. Raises UserError on a file that is
    missing, damaged, or does not fit, naming what does not."""
    file = Path(file)
    if not file.is_file():
        raise UserError(f"no checkpoint {file}: give the path of a .pt file in a folder of Models/")
    try:
        state = dict(torch.load(file, map_location="cpu", weights_only=True))
    except Exception as error:  # torch raises half a dozen types on damaged files
        raise UserError(
            f"{file} is damaged or no checkpoint of this repository ({type(error).__name__}): use another"
        ) from error
    for name, part in parts.items():
        try:
            part.load_state_dict(state[name])
        except (KeyError, RuntimeError, ValueError) as error:
            reason = re.sub(r"\s+", " ", str(error))[:500]
            raise UserError(
                f"{file} does not fit: {name}: {reason}: give the flags that it was trained with"
            ) from error
    return state


def newest_checkpoint(folder):
    """Return the furthest checkpoint of a run folder that can be read: EPOCH.pt or, inside an epoch, EPOCH+STEP.pt."""
    found = [(re.fullmatch(r"(\d+)(?:\+(\d+))?\.pt", path.name), path) for path in Path(folder).glob("*.pt")]
    found = sorted((int(match[1]), int(match[2] or 0), path) for match, path in found if match)
    for _, _, path in reversed(found):
        try:
            load_(path)
            return path
        except UserError as error:
            print(f"passed over: {error}")
    return None


def plain(args):
    """Return the flags as plain types, as checkpoints and args.json hold them."""
    return {
        key: value if isinstance(value, (bool, int, float, type(None))) else str(value)
        for key, value in vars(args).items()
    }


# ---------------------------------------------------------------------------------------------------- runs


def run_name(script, data, hyper, suffix=""):
    """Return SCRIPT-DATA-FLAG_VALUE-...-SUFFIX of all flags that are set; a hash ends a name that is too long.

    1 and 1.0 are the same value. Raises UserError on a suffix of more than 100 bytes.
    """
    if len(suffix.encode()) > 100:
        raise UserError(f"--suffix {suffix}: {len(suffix.encode())} bytes: no more than 100 fit")
    values = {key: str(value).removesuffix(".0") for key, value in hyper.items() if key != "data"}
    flags = (f"{key}_{value}" for key, value in values.items() if value not in ("None", "False", "auto"))
    name = re.sub(r"[^\w.+=-]", "~", "-".join([script, data, *flags]))
    suffix = re.sub(r"[^\w.+=-]", "~", f"-{suffix}") if suffix else ""
    room = NAME_MAX - len(suffix.encode())
    if len(name.encode()) > room:
        digest = hashlib.sha256(name.encode()).hexdigest()[:10]
        name = name.encode()[: room - 11].decode(errors="ignore") + "-" + digest
    return name + suffix


def provenance(device):
    """Return what a number must come with: command, code revision, versions, hardware."""
    revision = ""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):  # no git, or no repository
        revision = subprocess.check_output(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, stderr=subprocess.DEVNULL, text=True
        ).strip()
    return {
        "command": shlex.join(["python", *sys.argv]),
        "revision": revision,
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu, {torch.get_num_threads()} threads",
    }


def check_unused(folder):
    """Raise UserError if a folder holds a run already."""
    if (Path(folder) / "args.json").exists():
        raise UserError(f"{folder} holds a run: --resume auto continues it, --suffix NAME begins another beside it")


class Run:
    """A run folder: args.json, metrics.jsonl, TensorBoard event files, checkpoints, pictures."""

    TAGS: ClassVar = {"loss": "Loss/train", "lr": "LR", "knn": "Accuracy/knn", "linear": "Accuracy/linear"}

    def __init__(self, folder, args, device, resumed_step=None, writes=True):
        """Create the folder, or continue one (`resumed_step`: drop what was logged after it). writes: False in all but
        the first of several processes. Raises UserError if the folder holds a run that is not being resumed."""
        self.folder, self.writes, self.started = Path(folder), writes, time.perf_counter()
        self.quiet, self.before = quiet() or not writes, 0.0  # before: seconds of earlier starts
        if not writes:
            return
        record = self.folder / "args.json"
        if resumed_step is None:
            check_unused(self.folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the run folder {self.folder}: {error}") from error
        starts = json.loads(record.read_text())["starts"] if record.exists() else []
        content = {"args": plain(args), "starts": [*starts, provenance(device)]}
        write_atomically(record, lambda scratch: scratch.write_text(json.dumps(content, indent=1) + "\n"))
        self.metrics = self.folder / "metrics.jsonl"
        if resumed_step is not None and self.metrics.exists():
            self._drop_after(resumed_step)
        purge = None if resumed_step is None else resumed_step + 1  # from this step on, itself included
        self.board = SummaryWriter(self.folder, purge_step=purge)

    def _drop_after(self, step):
        kept = []
        for text in self.metrics.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # a kill can leave half a line
                line = json.loads(text)
                if line["step"] <= step:
                    kept.append(text)
                    self.before = line["seconds"]
        write_atomically(self.metrics, lambda scratch: scratch.write_text("".join(text + "\n" for text in kept)))

    def clock(self):
        """Return the seconds that this run has taken, earlier starts counted in."""
        return self.before + time.perf_counter() - self.started

    def log(self, step, epoch, group="Train", **numbers):
        """Append one object to metrics.jsonl and the same numbers to TensorBoard, there under GROUP/name or in TAGS."""
        if not self.writes:
            return
        line = {"step": step, "epoch": epoch, "seconds": round(self.clock(), 3), **numbers}
        try:
            with self.metrics.open("a") as handle:
                handle.write(json.dumps(line) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self.metrics}: {error}: free space there, then --resume auto") from error
        for name, value in numbers.items():
            self.board.add_scalar(self.TAGS.get(name, f"{group}/{name}"), value, step)

    def picture(self, name, image, step=0):
        """Write NAME.png and the same to TensorBoard. image: float (3, H, W) in [0, 1]."""
        save_image(image, self.folder / f"{name}.png")
        self.board.add_image(name, image, step)

    def close(self):
        """Write out what TensorBoard has not."""
        if self.writes:
            self.board.close()


class Interruption:
    """Catches SIGTERM and Ctrl-C so that a loop can finish its step and save; a second Ctrl-C stops at once."""

    def __enter__(self):
        self.signal = None
        self.before = {s: signal.signal(s, self._catch) for s in (signal.SIGTERM, signal.SIGINT)}
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
        """0 after SIGTERM, which a scheduler sends to a run that is to go on later; 130 after Ctrl-C."""
        return 130 if self.signal == signal.SIGINT else 0
