"""What every script needs: start and end, errors, atomic writing of files, checkpoints."""

import contextlib
import ctypes
import difflib
import errno
import functools
import glob
import hashlib
import json
import os
import re
import socket
import sys
import time
import zipfile
from pathlib import Path

import torch

import Distributed
import Signals

ROOT = Path(__file__).resolve().parent
LONGEST_LINE = 1000  # characters of an error


class UserError(ValueError):
    """A mistake that the user can correct: one line with flag or file, value and remedy, shown without a traceback."""


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
    """Run `main(get_args())` and exit: 0 or what main returns; 2 and one line on an error that the user can correct;
    after a signal, the code in Signals.py."""
    Signals.raise_on_signal()
    keep_memory()
    with contextlib.suppress(AttributeError):  # a stream of another program
        sys.stdout.reconfigure(errors="backslashreplace")  # paths need not be valid text
    with contextlib.redirect_stdout(Output(sys.stdout)), contextlib.redirect_stderr(Output(sys.stderr)):
        code = _exit_code(main, get_args)
        sys.stdout.flush()
    sys.exit(code)


def _exit_code(main, get_args):
    """Return the exit code of `run_script`."""
    try:
        code = main(get_args())
        Distributed.stop()
        return code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Signals.Terminated as signal:
        print("interrupted by SIGTERM" if signal.code == 0 else "interrupted", file=sys.stderr)
        return signal.code
    except Exception as error:
        message = explain(error)
        if message is None:
            raise
        if not Distributed.is_first():
            time.sleep(5)  # the first process reports the error; torchrun ends the others in the meantime
        print(f"{Path(sys.argv[0]).name}: error: {readable(message)}", file=sys.stderr)
        return 2


class Output:
    """A standard stream that can lose its reader: a pipe that closes, a terminal that ends. The script then goes on."""

    def __init__(self, stream):
        """stream: the text stream; None if the script was started without one."""
        self.stream = stream or Path(os.devnull).open("w")  # noqa: SIM115 (open as long as the script runs)

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        """Write a text, or drop it if nobody reads it; return its length."""
        with self._can_be_lost():
            self.stream.write(text)
        return len(text)

    def flush(self):
        """Write what is buffered."""
        with self._can_be_lost():
            self.stream.flush()

    @contextlib.contextmanager
    def _can_be_lost(self):
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.stream.fileno())  # what is still buffered, and all that follows
            os.close(null)


DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
RUNTIME_ERRORS = {  # part of the message of a RuntimeError: what it means, and the remedy
    "can't allocate memory": "out of memory: lower --bs, --size or the width of the net",
    "Storage size calculation overflowed": "more memory than there can be: lower the sizes",
    "unable to allocate shared memory": "shared memory is full: pass --n_workers 0, or docker run --shm-size=1g",
    "DataLoader worker": "a process that decodes images was killed, probably since memory or shared memory ran out: "
    "pass --n_workers 0, or docker run --shm-size=1g",
    "CUDA error: out of memory": "out of memory on the GPU: lower --bs",
    "ALLOC_FAILED": "out of memory on the GPU: lower --bs",  # of cuBLAS and cuDNN
}
OF_A_GROUP = ("gloo", "NCCL", "Connection closed by peer")  # the same of an error where processes communicate


def nearest(word, names):
    """Return the name that is closest to a misspelled word, or None if none is close."""
    return next(iter(difflib.get_close_matches(word, names, n=1)), None)


def explain(error):
    """Return the line that tells a user what an error means and what to do, or None for an error of the program."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return f"{str(error).split('. ')[0]}: lower --bs"  # its first sentence; figures and other advice follow
    if isinstance(error, MemoryError):
        return "out of memory: lower --bs, --size or the number of images that are held"
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        place = shown(error.filename) if error.filename else "a file"
        return (
            f"cannot write {place}: {error.strerror}: free space there, or name another folder; --resume auto continues"
        )
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM):
        place = shown(error.filename) if error.filename else "a file"
        return f"{place}: {error.strerror}: change its permissions, or name another file or folder"
    if isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
        return f"{shown(error.filename or 'a path')[:200]}: {error.strerror}: give another path"
    if isinstance(error, RuntimeError):
        for part, message in RUNTIME_ERRORS.items():
            if part in str(error):
                return message
        if any(part in str(error) for part in OF_A_GROUP):
            reason = " ".join(str(error).split())
            lost = "another process of this run has ended: see its error; --resume auto continues"
            return f"{lost} (if no process shows another error, it is this one: {reason[:200]} ... {reason[-200:]})"
    return None


def readable(message):
    """Return an error as one line that is safe to print; of a very long one, its beginning and its end."""
    line = shown(message)
    if len(line) > LONGEST_LINE:
        line = f"{line[: LONGEST_LINE // 2]} ... {line[-LONGEST_LINE // 2 :]}"
    return line


def shown(name):
    """Return a name that comes from outside (a path, a class) as one line that is safe to print and to write.

    Bytes that are not valid text, and characters that a terminal could act on (control characters, line breaks, changes
    of the writing direction), become escape sequences.
    """
    return "".join(each if each.isprintable() else _escaped(each) for each in os.fsdecode(name))


def _escaped(character):
    if "\udc80" <= character <= "\udcff":  # how Python holds a byte that is not valid text
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def expanded(path):
    """Return a path of the user's with ~ replaced by the home folder, which a shell does not do in --flag=~/path."""
    return os.path.expanduser(path)  # noqa: PTH111 (pathlib raises RuntimeError where there is no such user)


def names_a_file(resume):
    """Return whether a value of --resume is a file: neither "auto" nor nothing."""
    return resume not in (None, "", "auto")


def quiet():
    """Return whether to hide progress bars: standard error is no terminal, or another process shows them."""
    return not (sys.stderr.isatty() and Distributed.is_first())


def derived_seed(seed, index):
    """Return another seed for each index (int >= 0) of a run's seed: an epoch, a bank, a lap over the images."""
    return 1_000_003 * seed + index


# ---------------------------------------------------------------------------------------------------- this process


def usable_cores(root="/"):
    """Return the number of physical cores that this process may use, at least 1.

    CPUs that the scheduler allows, hyper-threads of one core counted once, and no more than a container's quota
    (cpu.max of cgroup v2, cpu.cfs_quota_us of v1; rounded down). root: where /sys is looked for.
    """
    cores = set()
    for cpu in os.sched_getaffinity(0):
        siblings = first_line(Path(root, f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"))
        cores.add(siblings or str(cpu))
    folder = Path(root, "sys/fs/cgroup")
    quota = first_line(folder / "cpu.max").split()
    if not quota:
        quota = [first_line(folder / "cpu" / name) for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")]
    n_cores = len(cores)
    if all(quota) and quota[0] not in ("max", "-1"):
        n_cores = min(n_cores, int(quota[0]) // int(quota[1]))
    return max(1, n_cores)


def first_line(file):
    """Return the first line of a file, or "" where there is none."""
    try:
        return file.read_text().split("\n")[0].strip()
    except OSError:
        return ""


def set_threads():
    """Let torch use one thread for each usable core, unless OMP_NUM_THREADS says how many (Linux only)."""
    if "OMP_NUM_THREADS" not in os.environ and hasattr(os, "sched_getaffinity"):
        torch.set_num_threads(usable_cores())


M_TRIM_THRESHOLD = -1  # of glibc's malloc.h
M_MMAP_THRESHOLD = -3
KEPT_BLOCK = 2**26  # bytes; with 2**30 the peak memory of a step of 8,192 views was a third higher


def keep_memory():
    """Let this process keep the main memory that it frees, up to 2 GiB, to use it again; blocks over 64 MiB go back.

    glibc would give it back to the system and ask for it anew in every step, which took a quarter of the search of
    TrainCamNet.py. Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt and mallopt(M_MMAP_THRESHOLD, KEPT_BLOCK):
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


# ---------------------------------------------------------------------------------------------------- files

STALE = 3600  # seconds since the last change of another machine's scratch file: it has been left behind


def short_hash(text):
    """Return eight characters that tell texts apart, for names of files."""
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:8]


@functools.cache
def machine():
    """Return a word for the machine, or container, in which the ids of processes mean what they mean here."""
    names = socket.gethostname()
    with contextlib.suppress(OSError):
        names += str(Path("/proc/self/ns/pid").readlink())  # of a container's own processes (Linux only)
    return short_hash(names)


def write_atomically(file, write):
    """Call `write(scratch)` and move the result to `file`: all of it or nothing. Raises UserError if that fails.

    Links are followed. A device or a pipe stays what it is: it is written to. Scratch files that killed processes have
    left for the same `file` are removed.
    """
    file = Path(file)
    scratch = None
    try:
        if file.exists() and not file.is_file() and not file.is_dir():
            write(file)
            return
        file = file.resolve()
        scratch = file.with_name(f".{file.name}.{machine()}.{os.getpid()}.tmp")
        remove_stale(file.parent, f".{glob.escape(file.name)}.*.tmp")
        write(scratch)
        with scratch.open("rb") as handle:
            os.fsync(handle.fileno())
        scratch.replace(file)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        reason = getattr(error, "strerror", None) or "not all of it could be written"
        raise UserError(f"cannot write {file}: {reason}: free space there, or name another folder") from error
    finally:
        if scratch:
            with contextlib.suppress(OSError):
                scratch.unlink(missing_ok=True)


def remove_stale(folder, pattern=".*.tmp"):
    """Remove the scratch files of `write_atomically` in a folder whose processes have ended.

    The folder may be shared: what another machine's process writes is judged by its age alone.
    """
    for path in Path(folder).glob(pattern):
        process = re.fullmatch(r"\..*?(?:\.([0-9a-f]{8}))?\.(\d+)\.tmp", path.name)
        if not process:
            continue
        is_here = process[1] in (machine(), None)  # None: of a version that did not note the machine
        with contextlib.suppress(OSError):
            is_left = not is_alive(int(process[2])) if is_here else time.time() - path.stat().st_mtime > STALE
            if is_left:
                path.unlink()


def is_alive(process):
    """Return whether a process of this machine, an id, is running."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's
        pass
    return True


def read_json(file, names=(), use=None):
    """Return the content of a JSON file that `write_json` wrote, an object; None if it is missing or damaged.

    names: keys that it must have. use: a function of the content, which fails if values are of another type.
    """
    try:
        content = json.loads(Path(file).read_text())
        if not isinstance(content, dict) or not content.keys() >= set(names):
            return None
        if use:
            use(content)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return None
    return content


def write_text(file, text):
    """Write a text to `file`, atomically."""
    write_atomically(file, lambda scratch: scratch.write_text(text))


def write_json(file, content):
    """Write plain values to `file` as JSON, atomically."""
    write_text(file, json.dumps(content, indent=1) + "\n")


# ---------------------------------------------------------------------------------------------------- checkpoints


def save_(file, **parts):
    """Write {name: state} to `file`, atomically. parts: modules and optimizers (anything with a state_dict), and plain
    values: numbers, strings, tensors, lists and dictionaries of them, so that `weights_only=True` reads it back."""
    state = {name: part.state_dict() if hasattr(part, "state_dict") else part for name, part in parts.items()}
    write_tensors(file, state)


def write_tensors(file, content):
    """Write tensors and plain values to `file` as torch.save does, atomically. Equal content gives equal bytes."""

    def write(scratch):
        with scratch.open("wb") as handle:  # given a name, torch.save would write it into the file
            torch.save(content, handle)

    write_atomically(file, write)


def load_(file, **parts):
    """Return what `save_` wrote, tensors on the CPU; load each named part strictly.

    Raises UserError if the file is missing, damaged (its checksums are compared), holds weights that are not finite, or
    does not fit.
    """
    file = Path(file)
    if not file.is_file():
        raise UserError(f"no checkpoint {shown(file)}: give the path of a .pt file in a folder of Models/")
    try:
        check_archive(file)
        state = dict(torch.load(file, map_location="cpu", weights_only=True))
    except Exception as error:  # torch raises half a dozen types on damaged files
        raise UserError(
            f"{shown(file)} is damaged or no checkpoint of this repository ({type(error).__name__}): use another"
        ) from error
    for name, part in state.items():
        if isinstance(part, dict) and not all_finite(part.values()):
            raise UserError(f"{shown(file)}: numbers in its {name} are not finite: use an earlier checkpoint")
    load_parts(file, state, **parts)
    return state


def load_parts(file, state, **parts):
    """Load each named part strictly from what `load_` returned for a file. Raises UserError if one does not fit."""
    for name, part in parts.items():
        with fitting(file, name):
            part.load_state_dict(state[name])


@contextlib.contextmanager
def fitting(file, name):
    """Turn an error into a UserError that a part of a checkpoint, its name, does not fit."""
    try:
        yield
    except (KeyError, IndexError, RuntimeError, ValueError, TypeError, AttributeError, OverflowError) as error:
        reason = re.sub(r"\s+", " ", str(error))[:500]
        raise UserError(
            f"{shown(file)} does not fit: {name}: {reason}: give the flags that it was trained with, or another file"
        ) from error


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
    """Return the latest checkpoint of a run folder that a run can continue from, or None.

    Checkpoints are EPOCH.pt or, inside an epoch, EPOCH+STEP.pt. Files that are damaged or not checkpoints of a run are
    passed over with a notice.
    """
    found = []
    for path in Path(folder).glob("*.pt"):
        if match := re.fullmatch(r"(\d+)(?:\+(\d+))?\.pt", path.name):
            found.append((int(match[1]), int(match[2] or 0), path))
    for _, _, path in sorted(found, reverse=True):
        try:
            check_run(path, load_(path))
            return path
        except UserError as error:
            print(f"passed over: {shown(str(error))}")
    return None


# What the checkpoint of a run holds, with its type: of TrainCamNet.py, and of the others.
GENERATOR_PARTS = {"config": dict, "generator": dict, "net": dict, "chosen": torch.Tensor, "total": torch.Tensor}
GENERATOR_PARTS |= {"args": dict, "step": int, "optimizer": dict, "seconds": dict}
ENCODER_PARTS = {"encoder": dict, "head": dict, "random": dict, "epoch": int}
ENCODER_PARTS |= {"args": dict, "step": int, "optimizer": dict}


def check_run(file, state):
    """Raise UserError unless a checkpoint holds all that a run continues from."""
    parts = GENERATOR_PARTS if "generator" in state else ENCODER_PARTS
    wrong = [name for name, kind in parts.items() if not isinstance(state.get(name), kind)]
    if wrong:
        lacks = f"it lacks {', '.join(wrong)}"
        raise UserError(f"{shown(file)} holds no run ({lacks}): give a checkpoint of the training scripts")


def all_finite(values):
    """Return whether all numbers of those values that are floating-point tensors are finite; waits for the device."""
    checks = [
        value.isfinite().all() for value in values if isinstance(value, torch.Tensor) and value.is_floating_point()
    ]
    return not checks or bool(torch.stack(checks).all())


RENAMED = {"m": "candidates", "normalise": "normalize"}  # flags of older versions: their names now


def current_flags(stored):
    """Return the flags that a checkpoint or args.json holds, {name: value}, as this version has them."""
    flags = {RENAMED.get(name, name): value for name, value in stored.items()}
    if flags.get("compile") in ("auto", "yes", "no"):  # it was a choice
        flags["compile"] = flags["compile"] == "yes"
    if "candidates" in flags:  # only TrainCamNet.py has it; older versions knew cimle alone
        flags.setdefault("objective", "cimle")
    if "camnet" in flags:  # a command line
        for before, now in RENAMED.items():
            flags["camnet"] = re.sub(rf"--{before}\b", f"--{now}", str(flags["camnet"]))
    return flags


def plain(args):
    """Return the flags as plain types, as checkpoints and args.json hold them."""
    values = {}
    for key, value in vars(args).items():
        if key != "given":  # only about this start
            values[key] = value if isinstance(value, (bool, int, float, type(None))) else str(value)
    return values
