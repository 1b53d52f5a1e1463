"""Run folders: their names, what a run writes into them, and how it stops."""

import contextlib
import datetime
import hashlib
import json
import platform
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

import torch
import torchvision
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import save_image

import Utils
from Utils import UserError

NOT_FINITE = "loss or weights are not finite"
LONGEST_NAME = 240  # bytes of a run folder's name; file systems allow 255


def run_name(script, data, hyper, suffix=""):
    """Return SCRIPT-DATA-FLAG_VALUE-...-SUFFIX of all flags that are set; a hash ends a name that is too long.

    hyper: {flag: value}; 1 and 1.0 are the same value. Raises UserError on a suffix of more than 100 bytes.
    """
    if len(suffix.encode()) > 100:
        raise UserError(f"--suffix {suffix}: {len(suffix.encode())} bytes: no more than 100 fit")
    flags = []
    for key, value in hyper.items():
        value = str(value).removesuffix(".0")
        if key != "data" and value not in ("None", "False", "auto"):
            flags.append(f"{key}_{value}")
    name = re.sub(r"[^\w.+=-]", "~", "-".join([script, data, *flags]))
    suffix = re.sub(r"[^\w.+=-]", "~", f"-{suffix}") if suffix else ""
    room = LONGEST_NAME - len(suffix.encode())
    if len(name.encode()) > room:
        digest = hashlib.sha256(name.encode()).hexdigest()[:10]
        name = name.encode()[: room - 11].decode(errors="ignore") + "-" + digest
    return name + suffix


def find_run(args, hyper, data_name, script):
    """Return (run folder, checkpoint to continue from or None). Raises UserError if the folder holds another run.

    args: with models_dir, suffix, resume, data. hyper: {flag: value} of those that decide the result.
    """
    if args.resume not in (None, "auto"):
        return Path(args.resume).resolve().parent, Path(args.resume)
    folder = Path(args.models_dir) / run_name(script, data_name, hyper, args.suffix)
    if not args.resume:
        check_unused(folder)
        return folder, None
    checkpoint = Utils.newest_checkpoint(folder)
    data = Utils.load_(checkpoint)["args"]["data"] if checkpoint else args.data
    if Path(data).resolve() != Path(args.data).resolve():  # the folder's name holds only the last part of a path
        raise UserError(f"--data {args.data}: {folder} is a run on {data}: begin another with --suffix NAME")
    return folder, checkpoint


def check_unused(folder):
    """Raise UserError if a folder holds a run already."""
    if (Path(folder) / "args.json").exists():
        raise UserError(f"{folder} holds a run: --resume auto continues it, --suffix NAME begins another next to it")


def provenance(device):
    """Return what a number must come with: command, code revision, versions, hardware."""
    revision = ""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):  # no git, or no repository
        revision = subprocess.check_output(
            ["git", "describe", "--always", "--dirty"], cwd=Utils.ROOT, stderr=subprocess.DEVNULL, text=True
        ).strip()
    hardware = f"cpu, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    return {
        "command": shlex.join(["python", *sys.argv]),
        "revision": revision,
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "device": hardware,
    }


def farewell(folder):
    """Say where everything of a finished run is."""
    print(f"checkpoints, pictures, logs: {folder}\nTensorBoard: tensorboard --logdir {folder.parent}")


class Run:
    """A run folder: args.json, metrics.jsonl, TensorBoard event files, checkpoints, pictures."""

    TAGS: ClassVar = {"loss": "Loss/train", "lr": "LR", "knn": "Accuracy/knn", "linear": "Accuracy/linear"}

    def __init__(self, folder, args, device, resumed_step=None, writes=True):
        """Create the folder, or continue one (`resumed_step`: drop what was logged after it). writes: False in all but
        the first of several processes. Raises UserError if the folder holds a run that is not being resumed."""
        self.folder = Path(folder)
        self.writes = writes
        self.started = time.perf_counter()
        self.quiet = Utils.quiet() or not writes
        self.before = 0.0  # seconds of earlier starts
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
        Utils.write_json(record, {"args": Utils.plain(args), "starts": [*starts, provenance(device)]})
        self.metrics = self.folder / "metrics.jsonl"
        if resumed_step is not None and self.metrics.exists():
            self._drop_after(resumed_step)
        purge_step = None if resumed_step is None else resumed_step + 1  # from this step on, itself included
        self.board = SummaryWriter(self.folder, purge_step=purge_step)

    def _drop_after(self, step):
        kept = []
        for text in self.metrics.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # a kill can leave half a line
                line = json.loads(text)
                if line["step"] <= step:
                    kept.append(text)
                    self.before = line["seconds"]
        Utils.write_atomically(self.metrics, lambda scratch: scratch.write_text("".join(text + "\n" for text in kept)))

    def clock(self):
        """Return the seconds that this run has taken, earlier starts counted in."""
        return self.before + time.perf_counter() - self.started

    def log(self, step, epoch, group="Train", **values):
        """Append one object to metrics.jsonl and the same numbers to TensorBoard, there under GROUP/name or in TAGS."""
        if not self.writes:
            return
        line = {"step": step, "epoch": epoch, "seconds": round(self.clock(), 3), **values}
        try:
            with self.metrics.open("a") as handle:
                handle.write(json.dumps(line) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self.metrics}: {error}: free space there, then --resume auto") from error
        for name, value in values.items():
            self.board.add_scalar(self.TAGS.get(name, f"{group}/{name}"), value, step)

    def picture(self, name, image, step=0):
        """Write NAME.png and the same to TensorBoard. image: float (3, H, W) in [0, 1]."""
        save_image(image, self.folder / f"{name}.png")
        self.board.add_image(name, image, step)

    def failure(self, problem, causes):
        """Return the UserError of a run that learns nothing more, with its last good checkpoint."""
        last = Utils.newest_checkpoint(self.folder) or "none"
        return UserError(f"{problem}: likely causes: {causes}; last good checkpoint: {last}")

    def interrupted(self, checkpoint):
        """Say that a signal stopped the run."""
        print(f"interrupted: saved {checkpoint}; --resume auto continues", flush=True)

    def close(self):
        """Write out what TensorBoard has not."""
        if self.writes:
            self.board.close()
