"""What several test files use: image files, users' errors, run folders and their checkpoints, processes."""

import contextlib
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from Benchmarks.Forks import Child
from Images import Shapes
from Runs import Run
from Utils import UserError

ROOT = Path(__file__).parents[1]
TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node=2")  # two processes: run(*TORCHRUN, script, *flags)


# ---------------------------------------------------------------------------------------------------- image files


def save(path, pixels, **options):
    """Save an array or an image, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(path, **options)
    return path


def save_shapes(folder, each, size=32, seed=0, classes=Shapes.CLASSES):
    """Save `each` images of every class as FOLDER/CLASS/INDEX.png; return the folder."""
    labels = torch.arange(len(classes)).repeat_interleave(each)
    images = Shapes.draw(labels, size, torch.Generator().manual_seed(seed))
    for index, (image, label) in enumerate(zip(images, labels.tolist())):
        save(Path(folder) / classes[label] / f"{index:04}.png", image.permute(1, 2, 0).numpy())
    return Path(folder)


def real_file(name):
    """Return the path of a file in the folder that ISICLE_REAL_DATA names; skip the test where there is none."""
    folder = os.environ.get("ISICLE_REAL_DATA")
    if not folder:
        pytest.skip("needs real data: set ISICLE_REAL_DATA to a folder that holds data/ and weights/")
    path = Path(folder) / name
    if not path.exists():
        pytest.skip(f"needs {path}")
    return path


# ---------------------------------------------------------------------------------------------------- users' errors


def refuses(function, *parts, error=ValueError):
    """Return the message of the error that the call raises, a single line with these parts. CamNet has no UserError."""
    with pytest.raises(error) as caught:
        function()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    return message


def one_line(function, *parts):
    """Return the message of the UserError that the call raises, a single line with these parts."""
    return refuses(function, *parts, error=UserError)


def one_error(done, *parts, code=2):
    """Check that a script ended with this code and one line of error with these parts, and without a traceback."""
    assert done.code == code, done
    errors = [line for line in done.err.splitlines() if "error:" in line]
    assert len(errors) == 1, done.err
    assert "Traceback" not in done.err
    for part in parts:
        assert str(part) in errors[0]


# ---------------------------------------------------------------------------------------------------- run folders


def only_run(models_dir, pattern="[!.]*"):
    """Return the one run folder in it whose name is like this pattern."""
    (folder,) = models_dir.glob(pattern)
    return folder


def content(folder):
    """Return {path: (time, bytes)} of all files under a folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def lines(folder):
    """Return the objects of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder):
    """Return {step: loss}; a step that is logged twice fails."""
    logged = [(line["step"], line["loss"]) for line in lines(folder) if "loss" in line]
    assert len(dict(logged)) == len(logged)
    return dict(logged)


def flags_on_board(folder):
    """Return {flag: value} of a run in TensorBoard's HPARAMS; check that its columns begin with the important ones."""
    events = EventAccumulator(str(folder)).Reload()

    def read(tag):
        return HParamsPluginData.FromString(events.SummaryMetadata(f"_hparams_/{tag}").plugin_data.content)

    table = read("experiment").experiment
    columns = sorted(table.hparam_infos, key=lambda info: (not info.differs, info.name))  # as TensorBoard sorts them
    assert [info.name for info in columns[:5]] == ["data", "epochs", "lr", "pair", "seed"]
    assert {"backbone", "net", "corrupt", "periods"} <= {info.name for info in columns}
    scores = {info.name.tag for info in table.metric_infos}
    assert scores >= {"Accuracy/knn", "Accuracy/linear", "Train/best_of_1"}
    assert scores & set(events.Tags()["scalars"]), "no score of this run"
    shown = read("session_start_info").session_start_info.hparams
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in shown.items()}


def check_board(folder, group):
    """Check that TensorBoard shows all numbers of metrics.jsonl and no others; return the event files' content.

    group: of the lines without a loss.
    """
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    logged = {}
    for line in lines(folder):
        for name in line.keys() - {"step", "epoch", "seconds"}:
            tag = Run.TAGS.get(name, f"{'Train' if 'loss' in line else group}/{name}")
            unit = 100 if tag.startswith("Accuracy/") else 1  # shown in percent
            logged.setdefault(tag, {})[line["step"]] = unit * line[name]
    assert set(events.Tags()["scalars"]) == logged.keys()
    for tag, values in logged.items():
        shown = {event.step: event.value for event in events.Scalars(tag)}
        assert shown == pytest.approx(values, rel=1e-6, abs=1e-7), tag
    return events


# ---------------------------------------------------------------------------------------------------- checkpoints


def tensors(value, path=""):
    """Return {path: tensor} of all tensors in a checkpoint."""
    if isinstance(value, torch.Tensor):
        return {path: value}
    parts = {}
    if isinstance(value, dict):
        parts = value
    elif isinstance(value, list):
        parts = dict(enumerate(value))
    found = {}
    for name, part in parts.items():
        found |= tensors(part, f"{path}/{name}")
    return found


def different(file, other):
    """Return the names of the tensors (weights, optimizer, random state) that differ between two checkpoints."""
    mine = tensors(torch.load(file, weights_only=True))
    theirs = tensors(torch.load(other, weights_only=True))
    assert mine.keys() == theirs.keys()
    assert len(mine) > 60
    return [name for name in mine if not torch.equal(mine[name], theirs[name])]


# ---------------------------------------------------------------------------------------------------- processes


@contextlib.contextmanager
def no_file_larger_than(n_bytes):
    """Let every write beyond this size fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def start(*words, **options):
    """Start Python with these words on its command line, in the root of the repository."""
    command = [sys.executable, *map(str, words)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, **options)


def finish(process):
    """Wait for a process of `start`; return .code .out .err."""
    out, err = process.communicate(timeout=300)
    return SimpleNamespace(code=process.returncode, out=out, err=err)


def run(*words, **options):
    """Run Python with these words on its command line, in the root of the repository; return .code .out .err."""
    return finish(start(*words, **options))


class Forked:
    """Stands for subprocess.Popen(command of a script): a fork of this process, without a new start of Python."""

    def __init__(self, command, env, **_):
        self.folder = tempfile.TemporaryDirectory()
        pipe = Path(self.folder.name) / "lines"
        os.mkfifo(pipe)
        script = importlib.import_module(Path(command[1]).stem)
        self.child = Child(script, command[2:], pipe, partial(os.environ.update, env))
        self.stdout = pipe.open()
        self.returncode = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stdout.close()
        self.returncode = self.child.wait()
        self.folder.cleanup()

    def terminate(self):
        self.child.send(signal.SIGTERM)


def wait_for(condition, child):
    """Wait until condition() is true, while a child of the fixture `fork` runs."""
    end = time.monotonic() + 120
    while not condition():
        assert child.is_running(), child.output()
        assert time.monotonic() < end
        time.sleep(0.002)


def wait_for_next_second(folder):
    """Wait until TensorBoard names a new file by a later second than those in a folder.

    It reads them in the order of their names: of one second, that of a child after that of its parent.
    """
    last = max(int(path.name.split(".")[3]) for path in folder.glob("events.*"))
    while int(time.time()) <= last:
        time.sleep(0.01)


def count_lines(folder, pattern):
    """Return the number of whole lines in the files of a folder whose path is like this pattern."""
    return sum(file.read_bytes().count(b"\n") for file in folder.glob(pattern))
