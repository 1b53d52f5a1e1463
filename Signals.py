"""What SIGTERM and Ctrl-C do. Exit codes: 0 after SIGTERM, which schedulers send to runs that continue later; else 130.

The scripts import this file before all others. A signal then ends the program
    while the imports take their seconds: at once, in one line;
    afterwards, by `raise_on_signal`: by an exception, so that files are closed and locks released;
    in a training loop, by `Deferred`: after the step, when everything is saved.
"""

import os
import signal
import sys
from pathlib import Path

EXIT_CODES = {signal.SIGTERM: 0, signal.SIGINT: 130}


class Terminated(SystemExit):
    """Raised by SIGTERM: ends the program with exit code 0."""


def _exit(number, frame):
    os.write(2, b"interrupted: nothing had begun yet\n")
    os._exit(EXIT_CODES[number])


def _raise(number, frame):
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise Terminated(EXIT_CODES[number])


def raise_on_signal():
    """From now on a signal raises KeyboardInterrupt or Terminated."""
    for number in EXIT_CODES:
        signal.signal(number, _raise)


class Deferred:
    """A context in which signals are only noted, so that a loop can finish its step and save; a second Ctrl-C stops at
    once."""

    def __enter__(self):
        self.signal = None  # the one that has come
        self.is_raising = False
        self.before = {number: signal.signal(number, self._note) for number in EXIT_CODES}
        return self

    def _note(self, number, frame):
        is_second = self.signal == signal.SIGINT == number
        self.signal = number
        if is_second or self.is_raising:
            _raise(number, frame)

    def cut_short(self, work):
        """Return work(), which a signal ends at once since it can be done again; None if one has come."""
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
        for number, handler in self.before.items():
            signal.signal(number, handler)

    @property
    def exit_code(self):
        """Return the exit code after the signal that has come."""
        return EXIT_CODES[self.signal]


def _is_own_script():
    file = getattr(sys.modules["__main__"], "__file__", None)
    return file is not None and Path(file).resolve().is_relative_to(Path(__file__).resolve().parent)


if _is_own_script():  # not where another program, such as pytest, imports this file
    for each in EXIT_CODES:
        signal.signal(each, _exit)
