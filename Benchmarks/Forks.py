"""Tiny runs of the training scripts in forks of this process, and what they write, without times: for Soak.py."""

import functools
import hashlib
import json
import os
import shlex
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchvision.utils import save_image
from tqdm import tqdm

import Signals
import Utils
from CamNet.Bank import fingerprint
from Images import Shapes

CLASSES = 3
COMMON = "--size 16 --bs 8 --log_iter 1 --save_iter 1 --n_workers 0 --device cpu"
ENCODER = "--backbone resnet8 --epochs 3 --n_ramp 1 --lr 0.1 --proj_hidden 32 --blur_p 0 --eval_iter 1 --no-baselines"
CAMNET = "--net tiny --corrupt gray --distance pixels --candidates 4,4 --period 16 --periods 2 --visits 2"
BANK = f"--num_codes 2 --camnet '{CAMNET} --bs 8 --log_iter 1 --save_iter 1'"
FLAGS = {"TrainSimCLR": ENCODER, "TrainISICLE": f"{ENCODER} {BANK}", "TrainCamNet": CAMNET}
LONG = {"TrainSimCLR": "--epochs 2000", "TrainISICLE": "--epochs 2000", "TrainCamNet": "--periods 2000"}
UNEQUAL = ("seconds", "views_per_second", "data_wait", "time_", "peak_memory")  # names of numbers of the machine
BOARD = ("scalars", "images", "tensors")  # what TensorBoard has of a run


def draw_images(folder, train=12, scored=4, size=16):
    """Write folder/{train,val,test}/CLASS/INDEX.png: images of three classes; return the folder."""
    for seed, (split, each) in enumerate({"train": train, "val": scored, "test": scored}.items()):
        labels = torch.arange(CLASSES).repeat_interleave(each)
        images = Shapes.draw(labels, size, torch.Generator().manual_seed(seed)) / 255
        for index, (image, label) in enumerate(zip(images, labels.tolist())):
            place = Path(folder) / split / Shapes.CLASSES[label]
            place.mkdir(parents=True, exist_ok=True)
            save_image(image, place / f"{index:03}.png")
    return Path(folder)


def flags_of(script, data, models_dir, *more):
    """Return the command line of a tiny run. script: its name; data: a folder of `draw_images`."""
    places = ["--data", data, "--data_dir", f"{data}-cache", "--models_dir", models_dir]
    return [*COMMON.split(), *shlex.split(FLAGS[script]), *map(str, places), *map(str, more)]


class Child:
    """A script with some flags, run as its last lines run it, in a fork of this process (no new imports)."""

    def __init__(self, script, argv, log, prepare=None):
        """script: its module. log: the file that all of its lines go to. prepare: called in the child first."""
        self.log = Path(log)
        self.code = None  # exit code once it has ended; -N where signal N ended it
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._become(script, [str(word) for word in argv], prepare)

    def _become(self, script, argv, prepare):
        code = 1
        Signals.end_with_parent(signal.SIGKILL)
        tqdm.set_lock(threading.RLock())  # tqdm's own one is shared by forks: one that is killed could hold it forever
        try:
            sys.stdout = sys.stderr = self.log.open("w", buffering=1)
            os.dup2(sys.stdout.fileno(), 1)
            os.dup2(sys.stdout.fileno(), 2)
            sys.argv = [f"{script.__name__}.py", *argv]
            if prepare:
                prepare()
            Utils.run_script(script.main, lambda: script.get_args(argv))
        except SystemExit as error:
            code = error.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def is_running(self):
        """Return whether it has not ended yet."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is None

    def wait(self, seconds=300):
        """Wait for its end and return its exit code; after that many seconds it is killed."""
        end = time.monotonic() + seconds
        while self.is_running():
            if time.monotonic() > end:
                self.send(signal.SIGKILL)
            time.sleep(0.005)
        return self.code

    def send(self, number):
        """Send it a signal if it runs."""
        if self.is_running():
            os.kill(self.pid, number)

    def kill(self):
        """Kill it, and wait for its end."""
        self.send(signal.SIGKILL)
        self.wait()

    def output(self):
        """Return all that it has written on its standard output and error."""
        return self.log.read_text(errors="replace")


def start_ranks(script, argv, folder, world=2, prepare=None):
    """Start a script in several processes that form a group, as torchrun does; return their `Child`s by rank.

    folder: for the files of their lines. prepare: called in each of them first.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = []
    for rank in range(world):
        environment = place | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        begin = functools.partial(_begin_rank, environment, prepare)
        ranks.append(Child(script, argv, Path(folder) / f"rank{rank}.log", begin))
    return ranks


def _begin_rank(environment, prepare):
    os.environ.update(environment)
    if prepare:
        prepare()


def is_one_line(text):
    """Return whether an output holds one line of error and no traceback."""
    return text.count("error: ") == 1 and "Traceback" not in text


# ---------------------------------------------------------------------------------------------------- what a run leaves


def state_of(models_dir):
    """Return {path in the folder: hash, or names} of all that runs have left in it, except for times and args.json."""
    state = {}
    for path in sorted(Path(models_dir).rglob("*")):
        name = str(path.relative_to(models_dir))
        if path.name.startswith("events."):
            state.setdefault(f"{path.parent.name}: in TensorBoard", set()).update(_shown_of(path))
        elif path.is_file() and path.name != "args.json":
            state[name] = _digest(path)
    return state


def _digest(path):
    if path.suffix == ".pt":
        return fingerprint(tensors_of(torch.load(path, weights_only=True)))
    content = path.read_bytes()
    if path.suffix in (".json", ".jsonl") and not path.name.endswith(".npy.json"):
        texts = content.splitlines() if path.suffix == ".jsonl" else [content]
        objects = [json.loads(text) for text in texts]
        equal = [{key: value for key, value in each.items() if not key.startswith(UNEQUAL)} for each in objects]
        content = json.dumps(equal).encode()
    return hashlib.sha256(content).hexdigest()


def _shown_of(path):
    events = EventAccumulator(str(path), size_guidance={"scalars": 1, "images": 1, "tensors": 1}).Reload()
    return {tag for kind in BOARD for tag in events.Tags()[kind]}


def tensors_of(value, path=""):
    """Return {path: tensor} of all tensors in the content of a checkpoint."""
    if isinstance(value, torch.Tensor):
        return {path: value}
    parts = dict(enumerate(value)) if isinstance(value, list) else value
    found = {}
    if isinstance(parts, dict):
        for name, part in parts.items():
            found |= tensors_of(part, f"{path}/{name}")
    return found


def problem_of(state, expected):
    """Return which files are missing, extra or different in one of two `state_of`, in a line; "" if they are equal."""
    names = sorted(state.keys() | expected.keys())
    wrong = [Path(name).name for name in names if state.get(name) != expected.get(name)]
    return f"not the same: {', '.join(wrong)}" if wrong else ""
