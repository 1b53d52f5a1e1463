"""Compare runs in one table, best first, without TensorBoard.

    python Compare.py                               # all runs in Models
    python Compare.py Models/A Models/B             # these two
    python Compare.py Models --csv runs.csv         # a line per run, accuracies as fractions of 1
    python Compare.py Models --plot curves.png      # loss and scores of every run

Reads args.json, metrics.jsonl, evaluation.json and generator.json of each run folder and changes nothing in it.
Complete runs that differ in the seed alone are one row: mean ± standard deviation. The column `flags` shows the flags
in which the runs of a table differ. Runs of TrainCamNet.py have a table of their own, the lowest distance first.
"""

import argparse
import csv
import fcntl
import json
import os
import re
import signal
import statistics
import sys
from itertools import chain
from pathlib import Path

MODELS = Path(__file__).resolve().parent / "Models"
# Columns: a name in evaluation.json or generator.json, its head, its factor, its decimals.
SCORES = {"knn": ("kNN %", 100, 1), "linear": ("linear %", 100, 1), "minutes": ("minutes", 1, 1)}
MEASURES = {"best_of_16": ("best of 16", 1, 4), "diversity_pixels": ("diversity", 1, 4), "fit": ("fit", 1, 0)}
MEASURES["minutes"] = SCORES["minutes"]
# Curves: a name in metrics.jsonl, the label of its axis, its factor.
CURVES = {"loss": ("loss", 1), "knn": ("kNN accuracy, %", 100), "linear": ("linear probe accuracy, %", 100)}
GENERATOR_CURVES = {"best_of_4": ("distance, best of 4 samples", 1), "diversity_pixels": ("diversity, pixels", 1)}
# Flags.RUN_FLAGS without eval and suffix, which tell runs apart. Copied, because importing Flags.py takes seconds.
RUN_FLAGS = """device n_workers data_dir storage skip_bad models_dir resume log_iter eval_iter save_iter sample_iter
baselines precision compile deterministic cuda_graph small_stem image_size given dry_run chunk lpips_weights
bank_storage"""
RENAMED = {"m": "candidates", "normalise": "normalize"}  # a copy of Utils.RENAMED
OF_RUNS = (".pt", ".json", ".jsonl", ".npy")  # endings of the files that runs write


class UserError(ValueError):
    """A mistake that its user can fix: one line with flag or file, value and remedy, shown without a traceback."""


class Parser(argparse.ArgumentParser):
    """Reports an error in one line, without the usage text."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {escape(message)}\n")


class Run:
    """What the files of a run folder say. Missing or damaged files leave gaps. A generator's epochs are periods."""

    def __init__(self, folder):
        self.folder = folder
        self.problems = []  # with damaged files

        # Flags: those that decide what is learned, and which split is scored.
        record = next(self.objects("args.json"), {})
        args = record.get("args") if isinstance(record.get("args"), dict) else {}
        if not args:
            self.problems.append("args.json holds no flags")
        args = {RENAMED.get(name, name): value for name, value in args.items()}
        names = args.keys() - RUN_FLAGS.split()
        self.flags = {name: value for name, value in args.items() if name in names and value not in (None, "")}
        script = re.search("TrainSimCLR|TrainISICLE|TrainCamNet", f"{folder.name} {record.get('starts')}")
        self.script = script[0] if script else "?"
        self.is_generator = self.script == "TrainCamNet"
        starts = record.get("starts")
        start = starts[-1] if isinstance(starts, list) and starts and isinstance(starts[-1], dict) else {}
        if start.get("positives"):  # the generator that was found, which no flag has to name
            self.flags["positives"] = start["positives"]

        self.flags.pop("eval", None)  # the scores themselves say of which split they are

        # Progress: epochs done and wanted.
        last = next(self.objects("metrics.jsonl"), {})
        self.epoch = self.finite(last, "epoch")
        self.epochs = self.finite(args, "periods" if self.is_generator else "epochs")

        # Scores: those of SCORES or MEASURES that the files hold.
        is_complete = self.read_measures() if self.is_generator else self.read_scores(last)
        if (seconds := self.finite(last, "seconds")) is not None:
            self.scores["minutes"] = seconds / 60

        self.state = "?" if self.problems else "interrupted"
        if is_complete:
            self.state = "complete"
        if is_locked(folder / ".lock"):
            self.state = "running"

    def read_measures(self):
        """Read generator.json; return whether the run is complete."""
        result = next(self.objects("generator.json"), {})
        self.scores = {name: result[name] for name in MEASURES if self.finite(result, name) is not None}
        return bool(result)

    def read_scores(self, last):
        """Read the newest scores of an encoder; return whether the run is complete. last: that of metrics.jsonl."""
        newest = next((content for content in self.objects("metrics.jsonl") if "knn" in content), {})
        result = next(self.objects("evaluation.json"), {})
        measured = self.finite(result, "epoch")
        if measured is not None and measured >= (self.finite(newest, "epoch") or 0):
            newest = result
            self.flags["eval"] = result.get("split")
        self.scores = {name: newest[name] for name in SCORES if self.finite(newest, name) is not None}
        # The last line of a complete run is one of scores or, without labels, of pairs; lines of training have a loss.
        has_ended = self.epoch is not None and self.epoch == self.epochs and "loss" not in last
        return has_ended or (measured is not None and measured == self.epochs)

    def objects(self, name):
        """Yield the JSON objects in a file, the last first; .jsonl has one per line, incomplete ones are left out."""
        try:
            text = (self.folder / name).read_bytes()
        except OSError as error:
            if not isinstance(error, FileNotFoundError):
                self.problems.append(f"{name} cannot be read ({error.strerror})")
            return
        is_damaged = True
        for line in reversed(text.splitlines()) if name.endswith(".jsonl") else [text]:
            try:
                content = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(content, dict):
                is_damaged = False
                yield content
        if is_damaged and text:
            self.problems.append(f"{name} holds no JSON object")

    def finite(self, content, name):
        """Return a finite number of a JSON object, None if it has none."""
        value = content.get(name)
        if value is None or (isinstance(value, (int, float)) and abs(value) < 1e300):
            return value
        self.problems.append(f"{name} is {str(value)[:40]}")
        return None

    def curve(self, name, factor):
        """Return the steps of a value in metrics.jsonl, and the values times a factor."""
        lines = [line for line in self.objects("metrics.jsonl") if self.finite(line, name) is not None]
        lines = [line for line in reversed(lines) if self.finite(line, "step") is not None]
        return [line["step"] for line in lines], [factor * line[name] for line in lines]


def is_locked(file):
    """Return whether a process holds the lock file of a run."""
    try:
        with file.open() as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return isinstance(error, BlockingIOError)  # otherwise there is no such file, or it cannot be read
    return False


def holds_run(folder):
    """Return whether a folder is a run's; one that must not be entered counts as none."""
    try:
        return (folder / "args.json").exists()
    except PermissionError:
        return False


def find_runs(path):
    """Return the run folders at or directly inside a path. Raises UserError if it holds none."""
    try:
        folders = [path, *sorted(path.iterdir())]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}: give a run folder, or a folder of runs such as Models") from error
    runs = [folder for folder in folders if holds_run(folder)]
    if not runs:
        raise UserError(f"{path} holds no run: train one by python TrainSimCLR.py, or give another folder")
    return runs[:1] if runs[0] == path else runs


def group_by_seed(runs):
    """Return lists of complete runs that differ only in the seed, best first; each other run is a list of its own.

    A copy of a run is no further seed.
    """
    groups = {}
    for run in sorted(runs, key=lambda run: f"{run.flags.get('seed')!s:>10}"):
        alike = {name: value for name, value in run.flags.items() if name != "seed"}
        key = (run.folder.parent, run.script, json.dumps(alike, sort_keys=True))
        is_whole = run.state == "complete" and not run.problems
        seeds = [other.flags.get("seed") for other in groups.get(key, [])]
        is_copy = run.flags.get("seed") in seeds
        groups.setdefault(key if is_whole and not is_copy else run.folder, []).append(run)
    return sorted(groups.values(), key=rank)


def rank(group):
    """Return the key to sort groups by: encoders first; by data; by linear probe and kNN, or by distance."""
    best = [-mean(group, "linear", 0), -mean(group, "knn", 0), mean(group, "best_of_16", float("inf"))]
    return group[0].is_generator, str(group[0].flags.get("data")), *best


def mean(group, name, default):
    """Return the mean of a score over the runs that have it."""
    return statistics.mean([run.scores[name] for run in group if name in run.scores] or [default])


def spread(values, factor, digits):
    """Return mean ± standard deviation as text; for booleans, whether all are true."""
    if isinstance(values[0], bool):
        return "yes" if all(values) else "no"
    values = [factor * value for value in values]
    text = f"{statistics.mean(values):.{digits}f}"
    return f"{text} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else text


def escape(text):
    """Return a text with its control characters spelled out, so that a name cannot steer the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def differing_flags(groups):
    """Return the names of flags that have more than one value among the runs on the same data.

    Others that differ come with the data: they are of its recipe.
    """
    values = {}
    for run in chain.from_iterable(groups):
        for name, value in run.flags.items():
            values.setdefault((name, run.is_generator, run.flags.get("data")), set()).add(str(value))
    names = dict.fromkeys(name for (name, *_), seen in values.items() if len(seen) > 1)
    return [name for name in names if name not in ("seed", "epochs", "periods")]


def cells(group, differing, columns):
    """Return the cells of a row."""
    first = group[0]
    gap = "?" if first.problems else "-"
    done = f"{first.epoch or 0:g}"
    wanted = "?" if first.epochs is None else f"{first.epochs:g}"
    flags = "  ".join(f"{name} {first.flags[name]}" for name in differing if name in first.flags)
    row = [first.flags.get("data", gap), first.script, flags, done if done == wanted else f"{done}/{wanted}"]
    row.append(", ".join(str(run.flags.get("seed", gap)) for run in group))
    for name, (_, factor, digits) in columns.items():
        values = [run.scores[name] for run in group if name in run.scores]
        row.append(spread(values, factor, digits) if values else gap)
    return [escape(cell) for cell in [*row, first.state]]


def table(numbered, columns):
    """Return the text of a table with the folders below it. numbered: pairs of a row's number and its group."""
    differing = differing_flags(group for _, group in numbered)
    heads = [head for head, _, _ in columns.values()]
    rows = [["", "data", "script", "flags", "epochs", "seed", *heads, "state"]]
    rows += [[str(index), *cells(group, differing, columns)] for index, group in numbered]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    folders = [f"{index}  {escape(run.folder)}" for index, group in numbered for run in group]
    return "\n".join([*lines, "", *folders, ""])


def replace_file(flag, file, write):
    """Call `write(scratch)` and move the result to `file`: all of it or nothing. A device or a pipe is written to.

    As Utils.write_atomically, which would import torch.
    Raises UserError if that fails, or if the name is like those of a run's files. flag: the one that names it.
    """
    if file.suffix in OF_RUNS:
        raise UserError(f"{flag} {file}: files of runs end so: choose another name")
    scratch = None
    try:
        if file.exists() and not file.is_file():
            write(file)
            return
        file = file.resolve()
        scratch = file.with_name(f".{file.name}.{os.getpid()}.tmp")
        write(scratch)
        scratch.replace(file)
    except OSError as error:
        raise UserError(f"{flag} {file}: cannot write it: {error.strerror}: name another file") from error
    finally:
        if scratch:
            scratch.unlink(missing_ok=True)


def write_csv(file, groups):
    """Write a line per run: its folder, the flags in which the runs differ, and what the table shows."""
    flags = ["data", *differing_flags(groups), "seed"]
    names = list(SCORES | MEASURES)
    with file.open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["folder", "script", *flags, "epoch", "epochs", *names, "state"])
        for run in chain.from_iterable(groups):
            row = [run.folder, run.script, *[run.flags.get(name, "") for name in flags], run.epoch, run.epochs]
            row += [run.scores.get(name, "") for name in names]
            writer.writerow([escape(cell) for cell in [*row, run.state]])


def write_plot(file, groups):
    """Draw the curves of all runs as a PNG; each ends in the number of its row, which the legend explains."""
    try:
        from matplotlib.figure import Figure  # here, because everything else runs without it
    except ImportError:
        raise UserError("--plot needs matplotlib: python -m pip install matplotlib") from None
    differing = differing_flags(groups)
    panels = []
    for is_generator, curves in ((False, CURVES), (True, GENERATOR_CURVES)):
        numbered = [(index, group) for index, group in enumerate(groups, 1) if group[0].is_generator == is_generator]
        panels += [(numbered, name, *curves[name]) for name in curves if numbered]
    figure = Figure(figsize=(5 * len(panels), 4 + 0.2 * len(groups)), layout="constrained")
    legend = {}
    for axes, (numbered, name, title, factor) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        axes.set(xlabel="step", ylabel=title)
        for index, run in [(index, run) for index, group in numbered for run in group]:
            steps, values = run.curve(name, factor)
            (line,) = axes.plot(steps, values, color=f"C{index % 10}", marker="os^Dv*"[index % 6], markersize=4)
            data, script, flags, _, seeds, _ = cells(groups[index - 1], differing, {})
            legend[f"{index}  {data}  {script}  {flags}  seed {seeds}"] = line
            if steps:
                axes.annotate(f" {index}", (steps[-1], values[-1]), color=f"C{index % 10}")
    labels = [label.replace("$", r"\$") for label in legend]  # matplotlib takes text between dollars for mathematics
    figure.legend(legend.values(), labels, loc="outside lower left")
    figure.savefig(file, format="png")


def home_path(text):
    """The argparse type of paths: ~ stands for the home folder."""
    return Path(os.path.expanduser(text))  # noqa: PTH111 (pathlib raises RuntimeError where there is no such user)


def build_parser():
    """Return the parser."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("runs", nargs="*", type=Path, default=[MODELS], help="run folders, or folders of runs")
    parser.add_argument("--csv", type=home_path, metavar="FILE", help="write a line per run")
    parser.add_argument("--plot", type=home_path, metavar="FILE.png", help="draw the curves (needs matplotlib)")
    return parser


def get_args(argv=None):
    """Parse the flags."""
    return build_parser().parse_args(argv)


def main(argv=None):
    """Read the runs, print the tables, write the files."""
    parser = build_parser()
    args = parser.parse_args(argv)
    sys.stdout.reconfigure(errors="backslashreplace")  # for letters that its encoding lacks
    try:
        if args.plot and args.plot.suffix.lower() not in ("", ".png"):
            raise UserError(f"--plot {args.plot}: the picture is a PNG: let its name end in .png")
        # `Models/*` has a README.md as well
        paths = [path for path in args.runs if len(args.runs) == 1 or not path.is_file()]
        folders = dict.fromkeys(folder for path in paths or args.runs for folder in find_runs(path))
        runs = [Run(folder) for folder in folders]
        for run in runs:
            if run.problems:
                print(escape(f"notice: {run.folder}: {'; '.join(dict.fromkeys(run.problems))}"), file=sys.stderr)

        # Show them
        groups = group_by_seed(runs)
        for columns, is_generator in ((SCORES, False), (MEASURES, True)):
            numbered = [pair for pair in enumerate(groups, 1) if pair[1][0].is_generator == is_generator]
            if numbered:
                print(table(numbered, columns))

        if args.csv:
            replace_file("--csv", args.csv, lambda scratch: write_csv(scratch, groups))
        if args.plot:
            replace_file("--plot", args.plot, lambda scratch: write_plot(scratch, groups))
    except UserError as error:
        parser.error(str(error))


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `python Compare.py | head` ends quietly
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # so does Ctrl-C
    main()
