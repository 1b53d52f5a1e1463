"""What SIGTERM, Ctrl-C and the end of a terminal (SIGHUP) do.

Exit codes: 0 after SIGTERM, which schedulers send to runs that continue later; 130 after Ctrl-C; 129 after SIGHUP.

The scripts import this file before all others. A signal then ends the program
    during the imports, which take seconds: at once, with one line;
    after `raise_on_signal`: by an exception, so that files are closed and locks released;
    inside `Deferred`, in a training loop: after the step, when everything is saved.
"""

import contextlib
import ctypes
import os
import signal
import sys
import time
from pathlib import Path

EXIT_CODES = {signal.SIGTERM: 0, signal.SIGINT: 130}
if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup lets it be ignored
    EXIT_CODES[signal.SIGHUP] = 129


class Terminated(SystemExit):
    """Raised by SIGTERM and SIGHUP: ends the program with the exit code of the signal."""


def _exit(signum, frame):
    with contextlib.suppress(OSError):  # the terminal may have ended
        os.write(2, b"interrupted: nothing had begun yet\n")
    os._exit(EXIT_CODES[signum])


def _raise(signum, frame):
    if signum == signal.SIGINT:
        raise KeyboardInterrupt
    raise Terminated(EXIT_CODES[signum])


def raise_on_signal():
    """From now on a signal raises KeyboardInterrupt or Terminated."""
    for signum in EXIT_CODES:
        signal.signal(signum, _raise)


class Deferred:
    """A context in which signals are only noted, so that a loop can finish its step and save.

    A second Ctrl-C ends the program at once.
    """

    def __enter__(self):
        self.signal = None  # the one that has arrived
        self.is_raising = False
        self.before = {signum: signal.signal(signum, self._note) for signum in EXIT_CODES}
        return self

    def _note(self, signum, frame):
        is_second = self.signal == signal.SIGINT == signum
        self.signal = signum
        if is_second or self.is_raising:
            _raise(signum, frame)

    def cut_short(self, work):
        """Return work(), or None if a signal came before or during it. For work that can be repeated later."""
        if self.signal is not None:
            return None
        self.is_raising = True
        try:
            return work()
        except (KeyboardInterrupt, Terminated):
            return None
        finally:
            self.is_raising = False

    def __exit__(self, *_):
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    @property
    def exit_code(self):
        """Return the exit code for the signal that has arrived."""
        return EXIT_CODES.get(self.signal, 0)  # None: it came to another process of the run


@contextlib.contextmanager
def heartbeat(what, every=10.0):
    """Say on standard error, every so many seconds, that a part of the program without a progress bar goes on.

    By an alarm and not by a thread, so that data loaders can fork meanwhile. Only the main thread can set one.
    """
    started = time.monotonic()

    def say(signum, frame):
        with contextlib.suppress(OSError):  # standard error may be closed
            os.write(2, f"{what}: {time.monotonic() - started:.0f} s so far\n".encode())

    before = signal.getsignal(signal.SIGALRM)
    try:
        signal.signal(signal.SIGALRM, say)
        signal.siginterrupt(signal.SIGALRM, False)  # libraries that wait for the network or a disk go on
        signal.setitimer(signal.ITIMER_REAL, every, every)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def end_with_parent(signum=signal.SIGTERM):
    """Let the system send a signal to this process when the one that started it, torchrun for example, dies (Linux
    only)."""
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(set_parent_death_signal, signum)


def _is_own_script():
    file = getattr(sys.modules["__main__"], "__file__", None)
    return file is not None and Path(file).resolve().is_relative_to(Path(__file__).resolve().parent)


if _is_own_script():  # not where another program, such as pytest, imports this file
    if "TORCHELASTIC_RUN_ID" in os.environ:  # of torchrun
        end_with_parent()
    for each in EXIT_CODES:
        signal.signal(each, _exit)
