"""Locks in files, which only one process can have: whoever fills a bank, decodes images, or works on a run."""

import contextlib
import errno
import fcntl
import os
import socket
import time
from pathlib import Path

import Distributed
from Utils import UserError, is_alive, shown

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP)  # errors of file systems that have no locks


@contextlib.contextmanager
def locked(file, work, wait=True):
    """Hold a lock, which only one process can have. file: the lock's file; it holds the id of that process.

    If another process has the lock: print so and wait, or, without `wait`, raise UserError. work: what the process with
    the lock does, in words. The file is removed at the end; a killed process leaves it behind, unlocked.
    """
    handle = _acquire(Path(file), work, wait)
    with handle:
        handle.truncate(0)
        handle.write(f"{_holder()}\n")
        handle.flush()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                Path(file).unlink()


@contextlib.contextmanager
def locked_by_first(file, work):
    """Hold a lock for all processes of a run: the first of them has it, see `locked`."""
    with contextlib.ExitStack() as stack:

        def lock():
            stack.enter_context(locked(file, work))

        Distributed.first_rank_only(lock)
        yield


def remove_unlocked(file):
    """Remove the file of a lock that a killed process has left behind."""
    if Path(file).exists():
        with contextlib.suppress(UserError), locked(file, "", wait=False):
            pass


def _acquire(file, work, wait):
    """Return the open file of a lock that this process now has."""
    while True:
        try:
            handle = file.open("a+", errors="replace")
            is_free = _try_lock(handle)
        except OSError as error:
            raise UserError(f"cannot lock {shown(file)}: {error.strerror}: make its folder writable") from error
        if is_free is None:
            _check_holder(file, work)
            return handle
        if not is_free:
            handle.seek(0)
            holder = shown(handle.read().strip() or "unknown")
            if not wait:
                handle.close()
                raise UserError(f"another process ({holder}) is {work}: wait for it, or stop it")
            print(f"waiting: another process ({holder}) is {shown(work)}", flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        # the previous holder may have removed the file after it was opened here
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle.fileno()), file.stat()):
                return handle
        handle.close()


def _try_lock(handle, tries=3):
    """Return whether an open file could be locked, or None if its file system has no locks.

    Compare.py locks for an instant, so it is tried several times.
    """
    for _ in range(tries):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(0.05)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            return None
    return False


def _holder():
    """Return what the file of a lock that this process has says."""
    return f"{os.getpid()} on {socket.gethostname()}"


def _check_holder(file, work):
    """Raise UserError if a lock's file names another process that can still be running.

    This takes the place of a lock where there is none. Only a process of this machine can be seen to have ended.
    """
    holder = file.read_text(errors="replace").strip()
    process, _, host = holder.partition(" on ")
    is_other = process.isdecimal() and holder != _holder()
    if is_other and (host != socket.gethostname() or is_alive(int(process))):
        remedy = f"wait for it, or, if it has ended, remove {shown(file)}: this file system has no locks"
        raise UserError(f"another process ({shown(holder)}) is {work}: {remedy}")
