"""Kills, signals, damaged files, full disks, changed data, senseless flags: nothing is lost, nothing wrong is let in.

Most runs are forks of this process or are made in it: see Benchmarks/Forks.py. `make soak` does the same at length.
"""

import contextlib
import ctypes
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from helpers import content, count_lines, finish, lines, one_error, only_run, start, wait_for
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter
from torch.utils.tensorboard import SummaryWriter

import Banks
import CamNet.Bank
import Data
import Devices
import Evaluate
import Export
import Images.Cache
import Images.Decode
import Locks
import Reports
import Runs
import Signals
import TrainCamNet
import TrainISICLE
import TrainSimCLR
import Utils
from Benchmarks import Forks
from Benchmarks.Forks import Child, draw_images, is_one_line, problem_of, start_ranks, state_of
from CamNet.Generator import Generator

SCRIPTS = {"TrainSimCLR": TrainSimCLR, "TrainISICLE": TrainISICLE, "TrainCamNet": TrainCamNet}
CODES = {signal.SIGTERM: 0, signal.SIGINT: 130, signal.SIGHUP: 129}


def flags_of(script, data, models_dir, *more):
    """Return the command line of a tiny run on images of 8 pixels, where a generator has one level."""
    return Forks.flags_of(script, data, models_dir, "--size", "8", *more)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """36 images of three classes to train on, 12 to score."""
    return draw_images(tmp_path_factory.mktemp("faults") / "data")


@pytest.fixture(scope="module", autouse=True)
def bank_in_parts():
    """Let banks be filled in five parts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CamNet.Bank.fill.__kwdefaults__, "bs", 8)
        yield


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """name of a script -> its finished run: .models_dir, .state of it."""
    made = {}

    def finish_run(name):
        if name not in made:
            models_dir = tmp_path_factory.mktemp(name)
            child = Child(SCRIPTS[name], flags_of(name, data, models_dir), models_dir.parent / f"{name}.log")
            assert child.wait() == 0, child.output()
            made[name] = SimpleNamespace(models_dir=models_dir, state=state_of(models_dir))
        return made[name]

    return finish_run


@pytest.fixture
def copied(finished, data, tmp_path):
    """(name of a script, *names of files to remove) -> a copy of its finished run: .folder .models_dir .argv .state."""

    def copy(name, *removed):
        models_dir = shutil.copytree(finished(name).models_dir, tmp_path / "copied")
        (folder,) = models_dir.glob(f"{name}-*")
        for each in removed:
            (folder / each).unlink()
        argv = flags_of(name, data, models_dir, "--resume", "auto")
        return SimpleNamespace(folder=folder, models_dir=models_dir, argv=argv, state=finished(name).state)

    return copy


def check_same(run):
    """Check that a copied run has ended in what the finished one left."""
    assert problem_of(state_of(run.models_dir), run.state) == ""


# ---------------------------------------------------------------------------------------------------- one process


@pytest.mark.parametrize("resume", [[], ["--resume", "auto"]], ids=["new", "auto"])
def test_of_two_starts_one_trains(data, finished, tmp_path, fork, resume):
    argv = flags_of("TrainSimCLR", data, tmp_path / "models", *resume)
    children = [fork(TrainSimCLR, argv) for _ in range(2)]
    winner, loser = sorted(children, key=lambda child: child.wait())
    assert (winner.code, loser.code) == (0, 2), loser.output()
    assert is_one_line(loser.output())
    assert f"another process ({winner.pid} on" in loser.output()
    assert problem_of(state_of(tmp_path / "models"), finished("TrainSimCLR").state) == ""


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=list(SCRIPTS))
def test_a_run_that_another_process_works_on_is_left_alone(copied, cli, script):
    run = copied(script.__name__)
    with Locks.locked(run.folder / ".lock", "testing"):
        before = content(run.models_dir)
        one_error(cli(run.argv, script), f"another process ({os.getpid()} on", run.folder)
        assert content(run.models_dir) == before


def test_ranks_end_with_their_launcher(data, tmp_path):
    more = ["--epochs", "2000", "--save_iter", "0", "--eval_iter", "0"]
    argv = flags_of("TrainSimCLR", data, tmp_path / "models", *more)
    launcher = os.fork()
    if launcher == 0:
        start_ranks(TrainSimCLR, argv, tmp_path)
        time.sleep(300)
        os._exit(0)
    end = time.monotonic() + 60
    while not count_lines(tmp_path, "models/*/metrics.jsonl") and time.monotonic() < end:
        time.sleep(0.01)
    ranks = children_of(launcher)
    os.kill(launcher, signal.SIGKILL)
    os.waitpid(launcher, 0)
    assert len(ranks) == 2
    end = time.monotonic() + 15
    while any(map(runs, ranks)) and time.monotonic() < end:
        time.sleep(0.01)
    left = [rank for rank in ranks if runs(rank)]
    for rank in left:
        os.kill(rank, signal.SIGKILL)
    assert not left
    with Locks.locked(only_run(tmp_path / "models") / ".lock", "testing", wait=False):
        pass


def children_of(process):
    """Return the processes that a process has started."""
    return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def runs(process):
    """Return whether a process, no child of this one, has not ended; one that is not waited for has."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


# ---------------------------------------------------------------------------------------------------- damage


def flip(file, place):
    """Flip a bit of a file. place: a share of its length."""
    damaged = bytearray(file.read_bytes())
    damaged[int(place * len(damaged))] ^= 16
    file.write_bytes(damaged)


def set_nan(file):
    """Put NaN into a checkpoint's weights."""
    state = torch.load(file, weights_only=True)
    weight = next(iter(state.get("encoder", state.get("net")).values()))
    weight[(0,) * weight.ndim] = float("nan")
    torch.save(state, file)


def put(value):
    return lambda file: torch.save(value, file)


def change(name, value):
    """Return a function that puts another value into a checkpoint."""
    return lambda file: torch.save(torch.load(file, weights_only=True) | {name: value}, file)


DAMAGE = {
    "bit flipped": lambda file: flip(file, 0.3),
    "another bit flipped": lambda file: flip(file, 0.7),
    "NaN": set_nan,
    "one tensor": put({"x": torch.zeros(1)}),
    "a list": put([1, 2]),
    "flags of another type": change("args", 3),
    "step of another type": change("step", "4"),
    "no optimizer": change("optimizer", None),
    "no random state": change("random", None),
    "text": lambda file: file.write_text("weights"),
}


def test_damaged_checkpoints_are_passed_over(copied, tmp_path, capsys):
    run = copied("TrainSimCLR", "3.pt")
    for damage in DAMAGE.values():
        shutil.copy(run.folder / "2.pt", run.folder / "3.pt")
        damage(run.folder / "3.pt")
        assert Utils.newest_checkpoint(run.folder) == run.folder / "2.pt"
        assert capsys.readouterr().out.count("passed over: ") == 1


@pytest.mark.parametrize("damage", ["bit flipped", "NaN", "no random state"])
def test_a_damaged_checkpoint_is_passed_over_or_refused(copied, cli, damage):
    run = copied("TrainSimCLR", "3.pt", "evaluation.json")
    DAMAGE[damage](run.folder / "2.pt")
    before = content(run.folder)
    one_error(cli(["--resume", str(run.folder / "2.pt"), "--device", "cpu"]), "2.pt")
    assert content(run.folder) == before
    done = cli(run.argv)
    assert done.code == 0, done.err
    assert done.out.count("passed over: ") == 1
    assert "continuing at step 4" in done.out
    check_same(run)


@pytest.mark.parametrize("damage", ["bit flipped", "NaN", "one tensor"])
def test_a_damaged_generator_is_passed_over(copied, cli, damage):
    run = copied("TrainCamNet", "generator.json")
    DAMAGE[damage](run.folder / "2.pt")
    done = cli(run.argv, TrainCamNet)
    assert done.code == 0, done.err
    assert done.out.count("passed over: ") == 1
    check_same(run)


@pytest.mark.parametrize("damage", ["bit flipped", "NaN", "one tensor"])
def test_a_damaged_checkpoint_is_not_scored(copied, cli, damage):
    run = copied("TrainSimCLR")
    DAMAGE[damage](run.folder / "3.pt")
    one_error(cli([run.folder / "3.pt", "--device", "cpu"], Evaluate), "3.pt")


PARTS_OF_ANOTHER_TYPE = [
    ("TrainSimCLR", "random", {"views": 3, "torch": "x"}),
    ("TrainSimCLR", "optimizer", {"state": 3}),
    ("TrainCamNet", "seconds", {"search": "x"}),
    ("TrainCamNet", "chosen", torch.zeros(3)),
    ("TrainISICLE", "config", {"net": [3]}),
]


@pytest.mark.parametrize("name, key, value", PARTS_OF_ANOTHER_TYPE)
def test_a_part_of_another_type_is_one_line(copied, cli, name, key, value):
    run = copied(name)
    folder = only_run(run.models_dir, "TrainCamNet-*") if key == "config" else run.folder
    if key != "config":
        for done in ("evaluation.json", "generator.json"):
            (run.folder / done).unlink(missing_ok=True)
    newest = Utils.newest_checkpoint(folder)
    change(key, value)(newest)
    one_error(cli(run.argv, SCRIPTS[name]), newest, f"does not fit: {key}" if key in ("random", "config") else "")


FLAGS_OF_ANOTHER_TYPE = {"lr": [1], "bs": -1, "opt": "x", "aug": 3, "epochs": None, "lars": 1, "data": ["x"]}


@pytest.mark.parametrize("flag", FLAGS_OF_ANOTHER_TYPE)
def test_a_stored_flag_of_another_type_is_one_line(copied, cli, flag):
    file = copied("TrainSimCLR").folder / "2.pt"
    args = torch.load(file, weights_only=True)["args"]
    change("args", args | {flag: FLAGS_OF_ANOTHER_TYPE[flag]})(file)
    one_error(cli(["--resume", file, "--device", "cpu"]), file, "give" if flag == "data" else f"--{flag}")


@pytest.mark.parametrize("flag", ["seed", "size", "backbone", "small_stem", "color_s", "data", "init"])
def test_a_stored_flag_of_another_type_is_not_scored(copied, cli, flag):
    file = copied("TrainSimCLR").folder / "2.pt"
    args = torch.load(file, weights_only=True)["args"]
    change("args", args | {flag: ["x"]})(file)
    one_error(cli([file, "--device", "cpu"], Evaluate), file, f"--{flag}")


def test_weights_that_are_not_finite_are_no_good_checkpoint(copied, cli, monkeypatch):
    run = copied("TrainSimCLR", "3.pt", "evaluation.json")
    set_nan(run.folder / "2.pt")
    monkeypatch.setattr(TrainSimCLR.Losses, "contrastive", lambda z, *_: z.sum() * float("inf"))
    one_error(cli(run.argv), "epoch 2, step 5", f"last good checkpoint: {run.folder / '1.pt'}")


CONTENTS = ["", "{", "[1]", "null", '{"args": 3, "starts": 5}', '{"split": "val", "epoch": 3, "fit": true}', "\xff\0\n"]


@pytest.mark.parametrize(
    "name, text",
    [*[("TrainSimCLR", text) for text in CONTENTS], *[("TrainCamNet", text) for text in CONTENTS[-2:]]],
)
def test_damaged_side_files_are_made_again(copied, cli, name, text):
    run = copied(name)
    for each in ("args.json", "evaluation.json", "generator.json", "encoder.json"):
        if (run.folder / each).exists():
            (run.folder / each).write_text(text, encoding="latin1")
    done = cli(run.argv, SCRIPTS[name])
    assert done.code == 0, done.err
    check_same(run)
    assert json.loads((run.folder / "args.json").read_text())["args"]["seed"] == 0


@pytest.mark.parametrize(
    "name, file, key",
    [
        ("TrainSimCLR", "evaluation.json", "knn"),
        ("TrainSimCLR", "evaluation.json", "epoch"),
        ("TrainSimCLR", "evaluation.json", "pairs"),
        ("TrainCamNet", "generator.json", "best_of_16"),
        ("TrainCamNet", "generator.json", "peak_memory_bytes"),
    ],
)
def test_side_files_with_values_of_another_type_are_made_again(copied, cli, name, file, key):
    run = copied(name)
    note = run.folder / file
    note.write_text(json.dumps(json.loads(note.read_text()) | {key: "\x1b[2J"}))
    done = cli(run.argv, SCRIPTS[name])
    assert done.code == 0, done.err
    check_same(run)


def test_names_reach_the_terminal_escaped(copied, tmp_path, cli):
    run = copied("TrainSimCLR")
    models_dir = run.models_dir.rename(tmp_path / "a\x1b[2J\nb")
    folder = only_run(models_dir)
    argv = [*run.argv, "--models_dir", models_dir]
    ends = [cli([folder, "--device", "cpu"], Evaluate), cli([*argv, "--resume", "auto"])]
    (folder / "3.pt").write_bytes(b"")
    ends.append(cli([folder / "3.pt", "--device", "cpu"], Evaluate))
    ends.append(cli([*argv, "--resume", "auto"]))
    ends.append(cli([*argv, "--suffix", "other"]))
    assert [done.code for done in ends] == [0, 0, 2, 0, 0]
    for done in ends:
        assert "a\\x1b[2J\\nb" in done.out + done.err
        assert all(line.isprintable() for line in (done.out + done.err).splitlines())


def test_damaged_lines_of_metrics_are_dropped(copied, cli):
    run = copied("TrainSimCLR")
    metrics = run.folder / "metrics.jsonl"
    damaged = "\n".join([*CONTENTS, '{"step": "x"}', '{"step": 1, "seconds": null}', '{"step": 1e999, "seconds": 1}'])
    metrics.write_bytes(damaged.encode("latin1") + b"\n" + metrics.read_bytes())
    done = cli(run.argv)
    assert done.code == 0, done.err
    check_same(run)


@pytest.mark.parametrize("text", ["", "[1]", CONTENTS[-2]])
def test_a_damaged_note_of_a_generator_or_bank_is_one_line_or_a_new_one(copied, cli, text):
    run = copied("TrainISICLE")
    shutil.rmtree(run.folder)
    (note,) = run.models_dir.glob("*/bank-*.json")
    for each in (note, note.parent / "generator.json"):
        each.write_text(text, encoding="latin1")
    done = cli(run.argv, TrainISICLE)
    if done.code:
        one_error(done, note.with_suffix(""), "delete it")
    else:
        check_same(run)


def test_a_damaged_bank_is_refused(copied, cli):
    run = copied("TrainISICLE", "3.pt", "evaluation.json")
    (bank,) = run.models_dir.glob("*/bank-*.npy")
    flip(bank, 0.5)
    before = content(run.folder)
    one_error(cli(run.argv, TrainISICLE), bank, "damaged", "delete it")
    assert content(run.folder) == before
    bank.unlink()
    assert cli(run.argv, TrainISICLE).code == 0
    check_same(run)


PARTS = {
    "cut": lambda part, note: part.write_bytes(part.read_bytes()[:-5000]),
    "empty": lambda part, note: part.write_bytes(b""),
    "bit flipped": lambda part, note: flip(part, 0.1),
    "header flipped": lambda part, note: part.write_bytes(part.read_bytes().replace(b"(", b"[", 1)),
    "too far": lambda part, note: note.write_text(note.read_text().replace('"done": 24', '"done": 37')),
    "no number": lambda part, note: note.write_text(note.read_text().replace('"done": 24', '"done": "x"')),
    "no note": lambda part, note: note.write_text("[1]"),
}


@pytest.mark.parametrize("damage", PARTS)
def test_a_damaged_half_of_a_bank_is_filled_anew(copied, data, damage):
    run = copied("TrainISICLE")
    (bank,) = run.models_dir.glob("*/bank-*.npy")
    expected = bank.read_bytes()
    state = torch.load(bank.parent / "2.pt", weights_only=True)
    generator = Generator(**state["config"])
    generator.load_state_dict(state["generator"])
    split = Data.get_train_split(str(data), Data.Options(data_dir=data.parent / "data-cache", size=8))

    # as a kill leaves it after three of five parts
    images = np.load(bank)
    note = bank.with_name(bank.name + ".json")
    part = bank.rename(bank.with_name(bank.name + ".part"))
    part_note = note.rename(part.with_name(part.name + ".json"))
    crc = CamNet.Bank.checksum(images[:24])
    part_note.write_text(json.dumps(json.loads(part_note.read_text()) | {"done": 24, "crc": crc}))
    PARTS[damage](part, part_note)
    bf16 = Devices.set_precision("auto", torch.device("cpu"))  # as in the run
    autocast = partial(torch.autocast, "cpu", torch.bfloat16, enabled=bf16)
    assert CamNet.Bank.fill(bank, generator, split, 2, 0, "cpu", autocast)
    assert bank.read_bytes() == expected
    assert not part.exists()


def test_scratch_files_of_killed_processes_are_removed(copied, cli):
    run = copied("TrainSimCLR")
    dead = os.fork()
    if dead == 0:
        os._exit(0)
    os.waitpid(dead, 0)
    for name in (f".3.pt.{dead}.tmp", f".9+4.pt.{dead}.tmp", f".args.json.{dead}.tmp"):
        (run.folder / name).write_text("half")
    alive = run.folder / f".3.pt.{os.getppid()}.tmp"
    alive.write_text("half")
    assert cli(run.argv).code == 0
    assert [path for path in run.folder.iterdir() if path.name.startswith(".")] == [alive]
    alive.unlink()
    check_same(run)


# ---------------------------------------------------------------------------------------------------- the data


@contextlib.contextmanager
def moved(data, place):
    """Let the images lie in another place for a while; give that place."""
    data.rename(place)
    try:
        yield place
    finally:
        place.rename(data)


LAST = {"TrainSimCLR": "3.pt", "TrainCamNet": "2.pt"}  # checkpoints of finished runs


CHANGES = {
    "added": lambda file: shutil.copy(file, file.with_name("zzz.png")),
    "removed": lambda file: file.unlink(),
    "other pixels": lambda file: shutil.copy(file.with_name("001.png"), file),
}


@pytest.mark.parametrize("name", LAST)
def test_data_that_has_changed_is_refused(copied, data, cli, name):
    run = copied(name, LAST[name])
    before = content(run.folder)
    (first, *_) = sorted(data.glob("train/*/000.png"))
    kept = first.read_bytes()
    for change in CHANGES.values():
        change(first)
        try:
            one_error(cli(run.argv, SCRIPTS[name]), f"--data {data}", "images", "--suffix")
            one_error(cli(["--resume", run.folder / "1.pt", "--device", "cpu"], SCRIPTS[name]), f"--data {data}")
        finally:
            first.write_bytes(kept)
            first.with_name("zzz.png").unlink(missing_ok=True)
    assert content(run.folder) == before


def weights_of(state):
    """Return {name of a checkpoint: its hash} of a `state_of`, without the name of the run folder."""
    return {path.partition("/")[2]: value for path, value in state.items() if path.endswith(".pt")}


@pytest.mark.parametrize("how", ["auto", "file"])
@pytest.mark.parametrize("name", LAST)
def test_data_that_has_moved_is_accepted(copied, data, tmp_path, cli, name, how):
    run = copied(name, LAST[name])
    words = run.argv if how == "auto" else ["--resume", run.folder / "1.pt", "--device", "cpu"]
    with moved(data, tmp_path / "moved") as place:
        one_error(cli(words, SCRIPTS[name]), f"not in {data}", "--data NEW_PLACE")
        done = cli([*words, "--data", place], SCRIPTS[name])
    assert done.code == 0, done.err
    assert "continuing at step" in done.out
    assert weights_of(state_of(run.models_dir)) == weights_of(run.state)


def test_evaluation_asks_for_the_new_place_of_data_that_have_moved(copied, data, tmp_path, cli):
    argv = [copied("TrainSimCLR").folder, "--device", "cpu"]
    with moved(data, tmp_path / "moved") as place:
        one_error(cli(argv, Evaluate), f"not in {data}", "--data NEW_PLACE")
        assert cli([*argv, "--data", place], Evaluate).code == 0


# ---------------------------------------------------------------------------------------------------- kills


def rest(seconds):
    """Do nothing for a while. In short sleeps: a signal just before a sleep is handled by Python only after it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.01)


def hang(module, name, flag, times=1, seconds=300):
    """Return a function for Child: the `times`th call of module.name makes the file `flag` and then takes long."""

    def prepare():
        work = getattr(module, name)
        calls = []

        def slow(*args, **options):
            calls.append(1)
            if len(calls) == times:
                flag.touch()
                rest(seconds)
            return work(*args, **options)

        setattr(module, name, slow)

    return prepare


KILLED_AT = {
    "after a save": ("TrainSimCLR", TrainSimCLR, "score_epoch", 1),
    "after another save": ("TrainSimCLR", TrainSimCLR, "score_epoch", 2),
    "in the final scoring": ("TrainSimCLR", Evaluate, "evaluate", 1),
    "after evaluation.json": ("TrainSimCLR", Runs.Run, "show_flags", 1),
    "before the projector": ("TrainSimCLR", Reports, "show_embedding", 1),
    "before encoder.pt": ("TrainSimCLR", TrainSimCLR, "save_encoder", 1),
    "before a picture": ("TrainCamNet", Runs.Run, "picture", 1),
    "before the picture of one code": ("TrainCamNet", Runs.Run, "picture", 2),
    "after the measures": ("TrainCamNet", TrainCamNet, "show_result", 1),
    "after the generator": ("TrainISICLE", Banks, "newest_generator", 3),
    "in the bank": ("TrainISICLE", CamNet.Bank, "restore", 3),
}


@pytest.mark.parametrize("place", KILLED_AT)
def test_killed_anywhere_nothing_is_missing_after_a_resume(data, finished, tmp_path, fork, cli, place):
    name, module, function, times = KILLED_AT[place]
    argv = flags_of(name, data, tmp_path / "models", "--resume", "auto")
    flag = tmp_path / "reached"
    child = fork(SCRIPTS[name], argv, hang(module, function, flag, times))
    wait_for(flag.exists, child)
    child.kill()
    done = cli(argv, SCRIPTS[name])
    assert done.code == 0, done.err
    assert problem_of(state_of(tmp_path / "models"), finished(name).state) == ""


def test_pairs_of_unlabeled_images_are_measured_after_a_kill(data, tmp_path, fork, cli):
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in (data / "train").rglob("*.png"):
        shutil.copy(path, flat / f"{path.parent.name}-{path.name}")
    states = []
    for models_dir, is_killed in ((tmp_path / "whole", False), (tmp_path / "killed", True)):
        argv = flags_of("TrainSimCLR", flat, models_dir, "--resume", "auto")
        if is_killed:
            flag = tmp_path / "reached"
            child = fork(TrainSimCLR, argv, hang(TrainSimCLR, "finish_run", flag))
            wait_for(flag.exists, child)
            child.kill()
        assert cli(argv).code == 0
        states.append(state_of(models_dir))
    assert problem_of(*states) == ""
    assert "alignment" in lines(only_run(tmp_path / "whole"))[-1]


# ---------------------------------------------------------------------------------------------------- signals


def catches_signals(process):
    """Return whether a process has set its own handlers of SIGTERM and Ctrl-C."""
    status = Path(f"/proc/{process}/status").read_text()
    caught = int(next(line for line in status.splitlines() if line.startswith("SigCgt")).split()[1], 16)
    return all(caught >> (number - 1) & 1 for number in Signals.EXIT_CODES)


LAUNCHER = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "TrainSimCLR.py"])
time.sleep(60)
"""


def test_a_rank_whose_launcher_dies_during_its_imports_ends(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # of torchrun
    launcher = start("-c", LAUNCHER)
    end = time.monotonic() + 30
    while not children_of(launcher.pid) and time.monotonic() < end:
        time.sleep(0.001)
    (rank,) = children_of(launcher.pid)
    while not catches_signals(rank) and time.monotonic() < end:
        time.sleep(0.001)
    launcher.kill()
    end = time.monotonic() + 10
    while runs(rank) and time.monotonic() < end:
        time.sleep(0.001)
    assert not runs(rank)
    assert "nothing had begun yet" in finish(launcher).err


@pytest.mark.parametrize(
    "script, number",
    [
        ("TrainSimCLR.py", signal.SIGTERM),
        ("TrainISICLE.py", signal.SIGINT),
        ("TrainCamNet.py", signal.SIGTERM),
        ("Evaluate.py", signal.SIGTERM),
        ("Export.py", signal.SIGTERM),
        ("TrainSimCLR.py", signal.SIGHUP),
    ],
)
def test_a_signal_during_the_imports(script, number):
    if number not in Signals.EXIT_CODES:
        pytest.skip("the tests were started by nohup")
    process = start(script)
    while not catches_signals(process.pid):
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(number)
    done = finish(process)
    assert done.code == CODES[number]
    assert done.out == ""
    assert len(done.err.splitlines()) == 1, done.err


TERM = signal.SIGTERM
INT = signal.SIGINT
HUP = signal.SIGHUP
SIGNALED_AT = {
    "reading images": (TERM, "TrainSimCLR", Data, "get_data_splits", 1),
    "scoring an epoch": (INT, "TrainSimCLR", Evaluate, "score", 2),
    "scoring an epoch, end of the terminal": (HUP, "TrainSimCLR", Evaluate, "score", 2),
    "the final scoring": (TERM, "TrainSimCLR", Evaluate, "evaluate", 1),
    "the final scoring, Ctrl-C": (INT, "TrainSimCLR", Evaluate, "evaluate", 1),
    "reading the generator's images": (INT, "TrainCamNet", Data, "get_train_split", 1),
    "measuring": (TERM, "TrainCamNet", TrainCamNet, "measure", 1),
    "the generator's training": (TERM, "TrainISICLE", TrainCamNet.Trainer, "update", 6),
    "the generator's measures": (TERM, "TrainISICLE", TrainCamNet, "measure", 1),
    "the bank": (TERM, "TrainISICLE", CamNet.Bank, "restore", 4),
    "the bank, Ctrl-C": (INT, "TrainISICLE", CamNet.Bank, "restore", 4),
}


@pytest.mark.parametrize("place", SIGNALED_AT)
def test_a_signal_ends_a_script_wherever_it_is(data, finished, tmp_path, fork, cli, place):
    number, name, module, function, times = SIGNALED_AT[place]
    if number not in Signals.EXIT_CODES:
        pytest.skip("the tests were started by nohup")
    argv = flags_of(name, data, tmp_path / "models", "--resume", "auto")
    flag = tmp_path / "reached"
    seconds = 1 if function == "update" else 300  # a step is taken to its end
    child = fork(SCRIPTS[name], argv, hang(module, function, flag, times, seconds))
    wait_for(flag.exists, child)
    child.send(number)
    assert child.wait(30) == CODES[number], child.output()
    assert "Traceback" not in child.output()
    if function == "restore":
        (note,) = tmp_path.glob("models/*/*.part.json")
        assert json.loads(note.read_text())["done"] == 24
    if place.startswith("the generator"):
        assert not list(tmp_path.glob("models/TrainISICLE-*/*.pt"))
    done = cli(argv, SCRIPTS[name])
    assert done.code == 0, done.err
    for saved in tmp_path.glob("models/*/*+*.pt"):  # inside an epoch, which a run left alone does not write
        saved.unlink()
    assert problem_of(state_of(tmp_path / "models"), finished(name).state) == ""


LONG = {"TrainSimCLR": ("--epochs", "5000", "--eval_iter", "0"), "TrainCamNet": ("--periods", "5000")}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("name", LONG)
def test_a_signal_to_one_rank_ends_all_whatever_is_logged(data, tmp_path, name, number):
    models_dir = tmp_path / "models"
    argv = flags_of(name, data, models_dir, *LONG[name], "--log_iter", "100000")
    ranks = start_ranks(SCRIPTS[name], argv, tmp_path)
    wait_for(lambda: count_lines(models_dir, "*/metrics.jsonl"), ranks[0])
    ranks[1].send(number)
    assert [rank.wait(30) for rank in ranks] == [0, CODES[number]], ranks[0].output() + ranks[1].output()
    assert ranks[0].output().count("interrupted: saved") == 1
    assert Utils.newest_checkpoint(only_run(models_dir))


# ---------------------------------------------------------------------------------------------------- one line


def full_disk(*args, **options):
    raise OSError(28, os.strerror(28), "/full/file")


FULL_AT = {
    "pictures": (torchvision.utils, "save_image"),
    "TensorBoard": (SummaryWriter, "add_scalar"),
    "baselines": (SummaryWriter, "__enter__"),
    "the projector": (SummaryWriter, "add_embedding"),
    "evaluation.json": (Path, "write_text"),
}


@pytest.mark.parametrize("place", FULL_AT)
def test_a_full_disk_is_one_line_wherever_it_is_met(copied, cli, monkeypatch, place):
    run = copied("TrainSimCLR", "3.pt", "evaluation.json")
    target, name = FULL_AT[place]
    work = getattr(target, name)

    def fail(self, *args, **options):
        if place != "evaluation.json" or "evaluation" in self.name:
            full_disk()
        return work(self, *args, **options)

    monkeypatch.setattr(target, name, fail)
    done = cli(run.argv)
    one_error(done, "cannot write", "No space left", "free space")
    assert ("linear probe" in done.out) == (place in ("the projector", "evaluation.json"))
    monkeypatch.undo()
    monkeypatch.setattr(sys, "argv", sys.argv)
    assert cli(run.argv).code == 0
    check_same(run)


@pytest.mark.parametrize(
    "name, limit",
    [
        ("TrainSimCLR", 3_000),
        ("TrainSimCLR", 30_000),
        ("TrainSimCLR", 1_000_000),
        ("TrainCamNet", 30_000),
        ("TrainISICLE", 50_000),
    ],
)
def test_a_file_that_cannot_grow_is_one_line(data, tmp_path, fork, name, limit):
    argv = flags_of(name, data, tmp_path / "models")
    child = fork(SCRIPTS[name], argv, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert child.wait() == 2, child.output()
    assert is_one_line(child.output()), child.output()
    assert not [path for path in tmp_path.rglob(".*") if path.suffix == ".tmp"]


def test_scores_are_shown_where_nothing_can_be_written(copied, cli):
    run = copied("TrainSimCLR")
    places = ["--out", "/proc/scores.json", "--data_dir", "/proc/nowhere"]
    done = cli([run.folder, "--device", "cpu", *places], Evaluate)
    one_error(done, "cannot write /proc/scores.json", "--out")
    assert "linear probe" in done.out
    check_same(run)


HUGE = str(10**20)
SENSELESS = {
    "TrainSimCLR --device meta": "--device meta",
    "TrainISICLE --device meta": "--device meta",
    "TrainCamNet --device meta": "--device meta",
    "TrainSimCLR --size 2000000000": "2000000000 px",
    "TrainSimCLR --size 100000 --storage stream": "--size 100000",
    "TrainCamNet --size 2000000000": "--size 2000000000",
    "TrainSimCLR --num_views 100000000": "100000000 views",
    "TrainSimCLR --proj_dim 1000000000": "--proj_dim 1000000000",
    "TrainSimCLR --proj_hidden 1000000000": "--proj_hidden 1000000000",
    f"TrainSimCLR --proj_hidden {HUGE}": "--proj_hidden",
    "TrainCamNet --candidates 100000000": "--candidates",
    f"TrainCamNet --chunk {HUGE}": "--chunk",
    f"TrainISICLE --num_codes {HUGE}": "--num_codes",
    "TrainISICLE --num_codes 1000000000": "--num_codes",
    "TrainSimCLR --lr inf": "--lr",
    "TrainSimCLR --temp inf": "--temp",
    "TrainSimCLR --trust inf": "--trust",
    "TrainCamNet --alpha inf": "--alpha",
    "TrainCamNet --lr nan": "--lr",
    f"TrainSimCLR --epochs {HUGE}": "--epochs",
    "TrainSimCLR --n_workers 1000000": "--n_workers",
    f"Evaluate --n_workers {HUGE}": "--n_workers",
    "Evaluate --device meta": "--device meta",
}


@pytest.mark.parametrize("flags", SENSELESS)
def test_senseless_flags_are_refused_at_once(copied, data, tmp_path, cli, flags):
    name, *words = flags.split()
    models_dir = tmp_path / "models"
    argv = [*flags_of(name, data, models_dir), *words] if name in SCRIPTS else [copied("TrainSimCLR").folder, *words]
    started = time.monotonic()
    one_error(cli(argv, SCRIPTS.get(name, Evaluate)), SENSELESS[flags])
    assert time.monotonic() - started < 5
    assert not list(models_dir.glob("TrainSimCLR-*")) + list(models_dir.glob("TrainISICLE-*/*.pt"))


def test_a_models_dir_that_is_no_utf_8_is_one_line(data, tmp_path, fork):
    models_dir = tmp_path / os.fsdecode(b"caf\xe9")
    child = fork(TrainSimCLR, flags_of("TrainSimCLR", data, models_dir))
    assert child.wait() == 2
    assert is_one_line(child.output())
    assert "caf\\xe9: no valid UTF-8" in child.output()
    assert not models_dir.exists()


@pytest.mark.parametrize("where", ["suffix", "data", "class"])
def test_names_that_are_no_utf_8_train_and_are_shown_escaped(data, tmp_path, fork, where):
    odd = os.fsdecode(b"caf\xe9")
    own = shutil.copytree(data, tmp_path / (odd if where == "data" else "own"))
    if where == "class":
        for folder in own.glob("*/disc"):
            folder.rename(folder.with_name(odd))
    more = ["--suffix", odd] if where == "suffix" else []
    child = fork(TrainSimCLR, flags_of("TrainSimCLR", own, tmp_path / "models", "--baselines", *more))
    assert child.wait() == 0, child.output()
    assert "Traceback" not in child.output()
    assert ("caf\\xe9" in child.output()) == (where == "data")


def test_memory_that_runs_out_is_one_line(data, tmp_path, cli, monkeypatch):
    monkeypatch.setattr(TrainSimCLR.Trainer, "augment", lambda *_: torch.empty(2**55, dtype=torch.uint8))
    one_error(cli(flags_of("TrainSimCLR", data, tmp_path)), "out of memory: lower --bs")


def test_a_checkpoint_of_another_version_has_the_usual_flags(copied, cli):
    run = copied("TrainSimCLR", "3.pt", "evaluation.json")
    file = run.folder / "2.pt"
    state = torch.load(file, weights_only=True)
    for name in ("opt", "mm", "skip_bad"):
        del state["args"][name]
    torch.save(state, file)
    done = cli(["--resume", file, "--device", "cpu"])
    assert done.code == 0, done.err
    assert "is of another version: it lacks --opt SGD, --mm 0.9: these defaults are used" in done.out
    check_same(run)
    torch.save(state, file)
    done = cli([file, "--device", "cpu"], Evaluate)
    assert done.code == 0, done.err
    assert "is of another version: it lacks" in done.out


STREAMED = ["--storage", "stream", "--n_workers", "1"]
WITH_WORKERS = {
    "decoding": (TrainSimCLR, ["--n_workers", "1"]),
    "training": (TrainSimCLR, STREAMED),
    "training a generator": (TrainCamNet, STREAMED),
    "evaluation": (Evaluate, STREAMED),
    "features": (Export, ["--n_workers", "1"]),
}


@pytest.mark.parametrize("work", WITH_WORKERS)
def test_a_worker_that_is_killed_is_one_line(copied, data, tmp_path, cli, monkeypatch, work):
    script, more = WITH_WORKERS[work]
    if script is Evaluate:
        argv = [copied("TrainSimCLR").folder, "--device", "cpu", *more]
    elif script is Export:
        argv = [copied("TrainSimCLR").folder, "--features", data, "--out", tmp_path / "features.csv", *more]
    else:
        argv = flags_of(script.__name__, data, tmp_path / "models", *more)
    parent = os.getpid()
    decode = Images.Decode.decode
    is_checked = work == "decoding"  # streamed files are decoded at the start, to find those that are bad

    def killed(*args):
        if os.getpid() != parent and is_checked:
            os.kill(os.getpid(), signal.SIGKILL)
        return decode(*args)

    def check(cache, skip_bad):
        nonlocal is_checked
        is_checked = True
        return {}

    monkeypatch.setattr(Images.Decode, "decode", killed)
    monkeypatch.setattr(Images.Cache.Cache, "find_bad", check)
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.1,))  # looks more often
    one_error(cli([*argv, "--data_dir", tmp_path / "cache"], script), "--n_workers 0", "--shm-size")
    assert not (tmp_path / "features.csv").exists()


def small_shm(size):
    """Return a function for Child: give it a /dev/shm of its own, of this size."""

    def prepare():
        Images.Decode.notice_full_shm.cache_clear()  # another test may have printed it
        new_mounts = 0x20000  # CLONE_NEWNS of unshare(2)
        assert ctypes.CDLL(None).unshare(new_mounts) == 0
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", "/dev/shm"], check=True)

    return prepare


def can_mount():
    """Return whether this user may mount file systems, in a place that only one process sees."""
    words = ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"]
    return shutil.which("unshare") is not None and subprocess.run(words, capture_output=True).returncode == 0


@pytest.mark.skipif(not can_mount(), reason="needs root")
@pytest.mark.parametrize("size, code", [("4k", 2), ("48k", 0)])
def test_shared_memory_that_is_too_small(data, finished, tmp_path, fork, size, code):
    more = ["--n_workers", "1", "--data_dir", tmp_path / "cache"]
    argv = flags_of("TrainSimCLR", data, tmp_path / "models", *more)
    child = fork(TrainSimCLR, argv, small_shm(size))
    assert child.wait() == code, child.output()
    assert "Traceback" not in child.output()
    assert child.output().count("docker run --shm-size") == child.output().count("--n_workers 0") == 1
    if code == 2:
        assert is_one_line(child.output())
    else:
        assert problem_of(state_of(tmp_path / "models"), finished("TrainSimCLR").state) == ""


@pytest.mark.parametrize("name", ["TrainSimCLR", "TrainCamNet"])
def test_what_is_not_finite_is_told_with_its_step(data, tmp_path, cli, name):
    done = cli(flags_of(name, data, tmp_path, "--lr", "1e18", "--n_ramp", "0"), SCRIPTS[name])
    one_error(done, "not finite", "1, step ", "--lr 1e+18")
