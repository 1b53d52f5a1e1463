"""A small data set in files, and the flags and the finished run that several test files start from.

The tests run on the CPU: a GPU is hidden from them, since a process that has used one cannot fork. Those of the GPU are
in test_cuda.py, which test_gpu.py starts in a process of its own.
"""

import gc
import os

if "ISICLE_TEST_GPU" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks for a GPU
    gc.disable()  # it would take a third of the time of all imports; see pytest_collection_finish

# isort: split
import json
import shutil
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import only_run, run, save_shapes

import Locks
import Signals
import TrainSimCLR
import Utils
from Benchmarks.Forks import Child

SMALL = "--size 32 --backbone resnet8 --bs 8 --epochs 3 --n_ramp 1 --lr 0.1 --proj_hidden 32 --blur_p 0"
OFTEN = "--log_iter 1 --save_iter 1 --eval_iter 0 --n_workers 0 --device cpu"

os.environ["OMP_NUM_THREADS"] = "1"  # one thread here and in all processes started: the same bits everywhere
# MKL keeps memory for each thread behind a lock, and forks have waited for that lock forever
os.environ.setdefault("MKL_DISABLE_FAST_MM", "1")
torch.set_num_threads(1)

OWN_PROCESS = ("test_pretend_device", "test_cuda")  # files that run only where they are named


@pytest.fixture(scope="session")
def made_once(tmp_path_factory, pytestconfig):
    """(name, make) -> the folder that make(folder) has filled in the first of pytest's processes that needs it."""
    base = tmp_path_factory.getbasetemp()
    if hasattr(pytestconfig, "workerinput"):  # one of several processes, each of which has its own folder
        base = base.parent

    def find_or_make(name, make):
        folder = base / name
        is_made = base / f"{name}.made"
        with Locks.locked(base / f"{name}.lock", f"making {name}"):
            if not is_made.exists():
                make(folder)
                is_made.touch()
        return folder

    return find_or_make


@pytest.fixture(scope="session")
def tree(made_once):
    """An ImageFolder tree of 10 classes: 240 images of 32 pixels in train, 60 each in val and test."""

    def make(folder):
        for seed, (split, each) in enumerate({"train": 24, "val": 6, "test": 6}.items()):
            save_shapes(folder / "tiny" / split, each, seed=seed)

    return made_once("data", make) / "tiny"


@pytest.fixture(scope="session")
def flags(tree):
    """(models_dir, *more) -> the flags of a run of 3 epochs of 30 steps that logs each step and saves each epoch."""
    small = [*f"--data {tree} {SMALL} {OFTEN}".split(), "--data_dir", str(tree.parent / "cache")]
    return lambda models_dir, *more: [*small, "--models_dir", str(models_dir), *more]


@pytest.fixture(scope="session")
def quick(flags):
    """The same as `flags` with images of 16 pixels, which take half the time."""
    return lambda models_dir, *more: flags(models_dir, "--size", "16", *more)


@pytest.fixture(scope="session")
def whole(quick, made_once, tmp_path_factory):
    """A finished run of the quick flags, made by a process of its own: .folder .models_dir .code .out .err .argv.

    Each of pytest's processes has a copy.
    """

    def make(folder):
        done = run("TrainSimCLR.py", *quick(folder))
        (folder / ".printed.json").write_text(json.dumps(vars(done)))

    original = made_once("whole", make)
    models_dir = shutil.copytree(original, tmp_path_factory.mktemp("copy") / "whole")
    printed = (models_dir / ".printed.json").read_text().replace(str(original), str(models_dir))
    return SimpleNamespace(
        folder=only_run(models_dir), models_dir=models_dir, argv=quick(models_dir), **json.loads(printed)
    )


@pytest.fixture
def cli(monkeypatch, capfd):
    """(argv, script) -> .code .out .err of a script with these flags, run in this process as its last lines run it.

    script: its module; TrainSimCLR where it is left out.
    """

    def run_here(argv, script=TrainSimCLR):
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, argv)])
        handlers = {number: signal.getsignal(number) for number in Signals.EXIT_CODES}
        capfd.readouterr()
        try:
            with pytest.raises(SystemExit) as caught:
                Utils.run_script(script.main, lambda: script.get_args(sys.argv[1:]))
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        out, err = capfd.readouterr()
        return SimpleNamespace(code=caught.value.code or 0, out=out, err=err)

    return run_here


@pytest.fixture
def fork(tmp_path):
    """(script, argv, prepare) -> Child; those that are left are killed at the end."""
    children = []

    def start_child(script, argv, prepare=None):
        children.append(Child(script, argv, tmp_path / f"child{len(children)}.log", prepare))
        return children[-1]

    yield start_child
    for child in children:
        child.kill()


def pytest_collection_finish(session):
    """Prepare this process for the tests that fork it."""
    # collect garbage from here on, but not among what the imports have made: forks share that memory
    gc.freeze()
    gc.enable()
    # the first gradient starts a thread for each device that torch knows, and a process with such threads cannot fork;
    # torch.export makes torch know a CUDA device where there is none: compute a gradient before it
    if not any(item.path.stem in OWN_PROCESS for item in session.items):
        torch.zeros(1, requires_grad=True).sum().backward()


def pytest_ignore_collect(collection_path, config):
    """Leave out the files that need a process of their own, unless they are named: see test_pretend.py, test_gpu.py."""
    is_named = any(collection_path.stem in argument for argument in config.invocation_params.args)
    return True if collection_path.stem in OWN_PROCESS and not is_named else None
