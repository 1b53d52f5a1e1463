"""Attack the training scripts many times, and count what they survive: kills, full disks, damage, two starts at once.

    python -m Benchmarks.Soak                     # about 300 tries; Results/soak.json
    python -m Benchmarks.Soak --quick             # a tenth of them
    python -m Benchmarks.Soak --only torchrun     # the kinds with that word

Runs are tiny, and most are forks of this process, which has imported everything. A try passes if the run ends, after
all restarts, in the same bits as a run that was not attacked: each tensor of each checkpoint, metrics.jsonl except for
times, scores, banks, pictures, what TensorBoard shows; and if no scratch file is left. Kinds are tried at the same time
by --jobs processes. The JSON is written after every try, and the next start continues it; a kind that was tried on
another revision is tried anew. Linux only; a full disk is a small file system in memory, which root alone can mount, or
else a limit of the length of files.
"""

import math
import multiprocessing
import os
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

import Flags
import Locks
import Runs
import TrainCamNet
import TrainISICLE
import TrainSimCLR
import Utils
from Benchmarks.Forks import Child, draw_images, flags_of, is_one_line, problem_of, state_of

SCRIPTS = {"TrainSimCLR": TrainSimCLR, "TrainISICLE": TrainISICLE, "TrainCamNet": TrainCamNet}
LAST = {"TrainSimCLR": "3.pt", "TrainISICLE": "3.pt", "TrainCamNet": "2.pt"}  # of a whole run
LONG = {  # flags of a run that is killed before its end
    "TrainSimCLR": ["--epochs", "5000", "--eval_iter", "0"],
    "TrainISICLE": ["--epochs", "5000", "--eval_iter", "0"],
    "TrainCamNet": ["--periods", "5000", "--sample_iter", "0", "--no-single_code"],
}


class Outcome(NamedTuple):
    """What became of a try. problem: what is wrong, in words, or ""; hits: how often the attack met its aim."""

    problem: str = ""
    hits: int = 1


class Site:
    """A folder in which tries are made: images, and runs that were left alone to compare with."""

    def __init__(self, root):
        self.root = Path(root)
        self.data = draw_images(self.root / "data")
        self.whole = {}  # name of a script: (folder of its run folders, state, seconds that it took)

    def argv(self, name, models_dir, *more):
        """Return the flags of a script's run on the images, to be resumed if it can be."""
        return flags_of(name, self.data, models_dir, "--resume", "auto", *more)

    def start(self, name, argv, prepare=None):
        """Return a new `Child`."""
        handle, log = tempfile.mkstemp(dir=self.root, suffix=".log")
        os.close(handle)
        return Child(SCRIPTS[name], argv, log, prepare)

    def left_alone(self, name):
        """Return (folder, state, seconds) of a whole run of a script, which is made once."""
        if name not in self.whole:
            folder = self.root / f"{name}-whole"
            for _ in range(2):  # the first one also decodes the images
                shutil.rmtree(folder, ignore_errors=True)
                started = time.monotonic()
                child = self.start(name, self.argv(name, folder))
                if child.wait():
                    raise Utils.UserError(f"{name} fails without an attack: {child.output()[-500:]}")
            self.whole[name] = folder, state_of(folder), time.monotonic() - started
        return self.whole[name]

    def fresh(self):
        """Return the path of a folder that is not there."""
        shutil.rmtree(self.root / "models", ignore_errors=True)
        return self.root / "models"

    def finish(self, name, models_dir):
        """Resume a run to its end; return what is wrong with what it leaves, or ""."""
        child = self.start(name, self.argv(name, models_dir))
        if child.wait():
            return f"resumed: exit code {child.code}: {child.output()[-300:]}"
        return problem_of(state_of(models_dir), self.left_alone(name)[1])


def run_folder(models_dir, name):
    """Return the run folder of a script, or None before it is there."""
    return next(Path(models_dir).glob(f"{name}-*"), None)


def check_checkpoints(folder):
    """Return which checkpoints of a run cannot be loaded, or ""."""
    for file in folder.glob("[0-9]*.pt"):
        try:
            Utils.load_(file)
        except Utils.UserError as error:
            return str(error)
    return ""


# ---------------------------------------------------------------------------------------------------- kills


def kill_while_saving(name, site, rng, index):
    """Kill a run up to 12 ms after it began to write a checkpoint. hits: kills before the checkpoint was whole."""
    models_dir = site.root / f"{name}-saving"  # one run, continued from try to try
    before = {file.name for file in models_dir.glob(f"{name}-*/[0-9]*.pt")}
    child = site.start(name, site.argv(name, models_dir, *LONG[name]))
    pattern = f"{name}-*/.[0-9]*.pt.*.{child.pid}.tmp"
    while child.is_running() and not next(models_dir.glob(pattern), None):
        pass
    time.sleep(rng.uniform(0, 0.012))
    child.kill()

    folder = run_folder(models_dir, name)
    if folder is None:
        return Outcome(f"it made no run folder: {child.output()[-300:]}")
    scratch = [path.name for path in folder.glob(".*.tmp")]
    files = {file.name for file in folder.glob("[0-9]*.pt")}
    steps = [line["step"] for line in Runs.read_metrics(folder) if "loss" in line]
    problem = check_checkpoints(folder)
    if child.code != -signal.SIGKILL:
        problem = f"it ended by itself: {child.output()[-300:]}"
    elif before - files:
        problem = f"lost: {before - files}"
    elif any(f".{child.pid}." not in each for each in scratch):
        problem = f"scratch files of an earlier process: {scratch}"
    elif steps != list(range(1, len(steps) + 1)):
        problem = "a step is missing in metrics.jsonl or is there twice"
    for file in sorted(folder.glob("[0-9]*.pt"), key=lambda file: int(file.stem))[:-3]:
        file.unlink()
    return Outcome(problem, len(scratch))


def kill_at_random(name, site, rng, index, times=3):
    """Kill a run up to three times, at any moment, then let it end. hits: kills that met a process."""
    models_dir = site.fresh()
    seconds = site.left_alone(name)[2]
    hits = 0
    for _ in range(times):
        child = site.start(name, site.argv(name, models_dir))
        time.sleep(rng.uniform(0, seconds))
        hits += child.is_running()
        child.kill()
    return Outcome(site.finish(name, models_dir), hits)


def start_twice(site, rng, index):
    """Start a script twice, at the same moment or up to 0.3 s apart. hits: 1 if one of the two was refused."""
    name = list(SCRIPTS)[index % 3]
    models_dir = site.fresh()
    argv = site.argv(name, models_dir) if index % 2 else flags_of(name, site.data, models_dir)
    children = [site.start(name, argv)]
    if index % 4 > 1:
        time.sleep(rng.uniform(0, 0.3))
    children.append(site.start(name, argv))
    winner, loser = sorted(children, key=lambda child: child.wait())
    if (winner.code, loser.code) != (0, 2):
        return Outcome(f"exit codes {winner.code} and {loser.code}", 0)
    if not is_one_line(loser.output()) or "another process" not in loser.output():
        return Outcome(f"it was told: {loser.output()[-300:]}")
    return Outcome(problem_of(state_of(models_dir), site.left_alone(name)[1]))


# ---------------------------------------------------------------------------------------------------- damage, disks


def flip_a_bit(site, rng, index):
    """Flip a bit of the newest checkpoint, for --resume auto or FILE, or of a bank. hits: flips that were noticed.

    A flip in the padding between tensors changes nothing; then the run must end as without it.
    """
    name = "TrainISICLE" if index % 5 == 4 else "TrainCamNet" if index % 5 == 3 else "TrainSimCLR"
    models_dir = shutil.copytree(site.left_alone(name)[0], site.fresh())
    folder = run_folder(models_dir, name)
    for each in (LAST[name], "evaluation.json", "generator.json"):
        (folder / each).unlink(missing_ok=True)
    file = next(models_dir.glob("*/bank-*.npy")) if name == "TrainISICLE" else Utils.newest_checkpoint(folder)
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)

    if name == "TrainISICLE" or index % 5 == 2:  # refused
        argv = site.argv(name, models_dir)
        child = site.start(name, argv if name == "TrainISICLE" else ["--resume", file, "--device", "cpu"])
        noticed = child.wait() == 2
        if child.code not in (0, 2) or (noticed and not is_one_line(child.output())):
            return Outcome(f"exit code {child.code}: {child.output()[-300:]}", 0)
        if noticed:
            file.unlink()
        return Outcome(site.finish(name, models_dir), int(noticed))
    child = site.start(name, site.argv(name, models_dir))
    if child.wait():
        return Outcome(f"exit code {child.code}: {child.output()[-300:]}", 0)
    noticed = "passed over" in child.output()
    return Outcome(problem_of(state_of(models_dir), site.left_alone(name)[1]), int(noticed))


def fill_the_disk(site, rng, index):
    """Run on a disk that has too little room, then make room and resume. hits: 1 if the disk was too small."""
    name = list(SCRIPTS)[index % 3]
    needed = sum(path.stat().st_size for path in site.left_alone(name)[0].rglob("*"))
    size = needed * (index + 1) // 20
    models_dir = site.fresh()
    models_dir.mkdir()
    is_mounted = mount(models_dir, f"size={size}")
    prepare = None if is_mounted else partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))
    child = site.start(name, site.argv(name, models_dir), prepare)
    try:
        child.wait()
        scratch = [path.name for path in models_dir.rglob(".*")]
        problem = "".join(check_checkpoints(folder) for folder in models_dir.iterdir())
        if child.code not in (0, 2) or (child.code == 2 and not is_one_line(child.output())):
            problem = f"exit code {child.code}: {child.output()[-500:]}"
        elif scratch:
            problem = f"left behind: {scratch}"
        if is_mounted:
            mount(models_dir, f"remount,size={100 * size}")
        return Outcome(problem or site.finish(name, models_dir), int(child.code == 2))
    finally:
        if is_mounted:
            subprocess.run(["umount", models_dir], check=True)


def mount(folder, options):
    """Mount a file system in memory on a folder, or change it; return whether that is allowed."""
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]
    return subprocess.run(command, capture_output=True).returncode == 0


# ---------------------------------------------------------------------------------------------------- torchrun


def kill_in_torchrun(victim, site, rng, index):
    """Kill the launcher, or a rank, of a torchrun of two; all of it must end within 20 s. hits: 1 if it was running."""
    models_dir = site.fresh()
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "TrainSimCLR.py"]
    words += map(str, site.argv("TrainSimCLR", models_dir, *LONG["TrainSimCLR"]))
    with (site.root / "torchrun.log").open("w") as log:
        launcher = subprocess.Popen(words, cwd=Utils.ROOT, stdout=log, stderr=log)
    end = time.monotonic() + 120
    steps = rng.randrange(1, 30)
    while launcher.poll() is None and time.monotonic() < end:
        folder = run_folder(models_dir, "TrainSimCLR")
        if folder and len(Runs.read_metrics(folder)) >= steps:
            break
        time.sleep(0.01)
    ranks = children(launcher.pid)
    if len(ranks) != 2:
        launcher.kill()
        return Outcome("it did not start", 0)
    os.kill(launcher.pid if victim == "launcher" else ranks[index % 2], signal.SIGKILL)

    end = time.monotonic() + 20
    while time.monotonic() < end and (launcher.poll() is None or any(map(is_running, ranks))):
        time.sleep(0.05)
    left = [rank for rank in ranks if is_running(rank)]
    for each in [*left, *([launcher.pid] if launcher.poll() is None else [])]:
        os.kill(each, signal.SIGKILL)
    code = launcher.wait()
    if left or code == 0:
        return Outcome(f"ranks {left} went on" if left else "the launcher said that all is well")
    with Locks.locked(folder / ".lock", "testing", wait=False):  # raises if a rank still works there
        return Outcome(check_checkpoints(folder))


def children(process):
    """Return the ids of the processes that a process has started; [] if it has ended."""
    try:
        return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:
        return []


def is_running(process):
    """Return whether a process, no child of this one, has not ended: it may be waited for still."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# ---------------------------------------------------------------------------------------------------- all kinds

KINDS = {  # title: (tries, attack, what a hit is)
    "killed while saving, TrainSimCLR": (40, partial(kill_while_saving, "TrainSimCLR"), "with the file incomplete"),
    "killed while saving, TrainISICLE": (30, partial(kill_while_saving, "TrainISICLE"), "with the file incomplete"),
    "killed while saving, TrainCamNet": (30, partial(kill_while_saving, "TrainCamNet"), "with the file incomplete"),
    "killed at random, TrainSimCLR": (20, partial(kill_at_random, "TrainSimCLR"), "kills"),
    "killed at random, TrainISICLE": (20, partial(kill_at_random, "TrainISICLE"), "kills"),
    "killed at random, TrainCamNet": (20, partial(kill_at_random, "TrainCamNet"), "kills"),
    "two starts at a time": (20, start_twice, "one refused"),
    "flipped bit": (100, flip_a_bit, "noticed"),
    "full disk": (20, fill_the_disk, "too small"),
    "torchrun, a rank killed": (5, partial(kill_in_torchrun, "rank"), "running"),
    "torchrun, the launcher killed": (5, partial(kill_in_torchrun, "launcher"), "running"),
}


def get_args(argv=None):
    """Parse the flags."""
    parser = Flags.plain_parser(__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="a tenth of the tries; writes nothing without --out")
    add("--only", default="", metavar="WORD", help="the kinds whose title has this word")
    add("--out", type=Flags.path, metavar="FILE", help="JSON to write; default: Results/soak.json")
    jobs = "kinds that are tried at the same time"
    add("--jobs", type=Flags.bounded(int, 1, 64), default=min(os.cpu_count(), 4), metavar="N", help=jobs)
    return parser.parse_args(argv)


def table(rows):
    """Return the counts as text."""
    lines = [f"{'':36}{'tried':>8}{'passed':>8}"]
    for row in rows:
        lines.append(f"{row['kind']:36}{row['tried']:8}{row['passed']:8}   {row['hits']} {row['hits_are']}")
    return "\n".join(lines)


def read_rows(out):
    """Return {kind: row} of earlier starts."""
    before = Utils.read_json(out, ("rows", "revision")) or {"rows": []}
    return {row["kind"]: {"revision": before["revision"]} | row for row in before["rows"]}


def make_tries(kind, site, row, tries):
    """Make the tries of a kind that its row lacks, and count them in it; yield after each."""
    for index in range(row["tried"], tries):
        outcome = KINDS[kind][1](site, random.Random(f"{kind} {index}"), index)
        row["tried"] += 1
        row["passed"] += not outcome.problem
        row["hits"] += outcome.hits
        if outcome.problem:
            row["failures"].append({"try": index, "problem": outcome.problem})
        print(f"{kind}, try {index + 1}: {outcome.problem or 'passed'}", flush=True)
        yield


def work(root, waiting, finished):
    """Make the tries of kinds until none is left: what each of the --jobs processes does.

    waiting: a queue of (kind, its row, number of tries), with None for the end. finished: a queue that gets the row
    after each try, and None at the end.
    """
    try:
        Path(root).mkdir()
        site = Site(root)
        for kind, row, tries in iter(waiting.get, None):
            for _ in make_tries(kind, site, row, tries):
                finished.put(row)
    finally:
        finished.put(None)


def new_rows(before, args, revision):
    """Return {kind: row} of the kinds that are to be tried: of earlier starts, or without a try."""
    rows = {}
    for kind, (_, _, aim) in KINDS.items():
        if args.only in kind:
            row = before.get(kind, {})
            if row.get("revision", "").removesuffix("-dirty") != revision:
                row = {"kind": kind, "tried": 0, "passed": 0, "hits": 0, "hits_are": aim}
                row |= {"revision": revision, "failures": []}
            rows[kind] = row
    return rows


def make_all(tasks, n_jobs, root):
    """Yield the row of a kind after each of its tries. UserError if one of the processes fails.

    tasks: (kind, its row, number of tries); the processes take one after the other. root: a folder to work in.
    """
    fork = multiprocessing.get_context("fork")
    waiting = fork.SimpleQueue()
    finished = fork.SimpleQueue()
    for task in [*tasks, *[None] * n_jobs]:
        waiting.put(task)
    jobs = [fork.Process(target=work, args=(f"{root}/{job}", waiting, finished)) for job in range(n_jobs)]
    for job in jobs:
        job.start()
    n_working = n_jobs
    while n_working:
        row = finished.get()
        if row is None:
            n_working -= 1
        else:
            yield row
    for job in jobs:
        job.join()
    if any(job.exitcode for job in jobs):
        raise Utils.UserError("a process that makes tries has failed: see its error above")


def main(args):
    """Make the tries that are missing; print the table; return 1 if one of them failed."""
    torch.set_num_threads(1)  # the same bits in every process, and safe to fork
    writes = bool(args.out or not args.quick)
    out = Path(args.out or Utils.ROOT / "Results" / "soak.json")
    made = Runs.provenance(torch.device("cpu"))
    made["command"] = shlex.join(["python", "-m", "Benchmarks.Soak", *sys.argv[1:]])
    revision = made["revision"].removesuffix("-dirty")  # the JSON itself is a change
    rows = read_rows(out) if writes else {}
    asked = new_rows(rows, args, revision)
    rows |= asked
    share = 10 if args.quick else 1
    tasks = [(kind, row, math.ceil(KINDS[kind][0] / share)) for kind, row in asked.items()]
    with tempfile.TemporaryDirectory(prefix="soak-", ignore_cleanup_errors=True) as root:
        for row in make_all(tasks, min(args.jobs, len(tasks)), root):
            rows[row["kind"]] = row
            made["rows"] = [rows[each] for each in KINDS if each in rows]
            if writes:
                Utils.write_json(out, made)
    print(table(rows.values()))
    return int(any(row["failures"] for row in rows.values()))


if __name__ == "__main__":
    Utils.run_script(main, get_args)
