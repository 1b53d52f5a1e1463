"""Benchmarks/Arms.py, by running it on a small data set; its compute, counted by hand."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import TrainCamNet
import TrainISICLE
import TrainSimCLR
from Benchmarks import Arms, Collect

ROOT = Path(__file__).parents[1]
KEYS = {
    "arm",
    "seed",
    "linear",
    "knn",
    "steps",
    "epochs",
    "encoder_macs",
    "generator_macs",
    "command",
    "minutes",
    "device",
}
CHOSEN = "simclr_full,simclr_full_equal_compute,corrupted_only,gen_gen_full,isicle_full"
GENERATOR = "--net tiny --distance pixels --m 4,2 --period 16 --visits 2 --periods 1 --bs 8 --no-single_code"


@pytest.fixture(scope="module")
def arms(flags, tree, tmp_path_factory):
    """() -> what Arms prints, run over a few arms with two seeds; .out is the file."""
    folder = tmp_path_factory.mktemp("arms")
    place = ["--data", str(tree), "--models_dir", str(folder / "m")]
    cache = ["--data_dir", str(tree.parent / "cache"), "--size", "32"]
    done = subprocess.run(
        [sys.executable, "TrainCamNet.py", *GENERATOR.split(), *place, *cache], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr

    def run(*more):
        own = [*place, "--arms", CHOSEN, "--seeds", "2", "--jobs", "2", "--out", str(folder / "arms.json"), *more]
        words = [sys.executable, "-m", "Benchmarks.Arms", *own, "--", *flags(folder)[2:-2], "--epochs", "2"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=environment)

    return SimpleNamespace(run=run, out=folder / "arms.json", models=folder / "m")


@pytest.fixture(scope="module")
def done(arms):
    """What the first start printed and wrote."""
    first = arms.run()
    assert first.returncode == 0, first.stderr
    return first.stdout, json.loads(arms.out.read_text())


def test_every_run_is_recorded(done, tree):
    printed, records = done
    assert [(row["arm"], row["seed"]) for row in records] == [
        (arm, seed) for arm in CHOSEN.split(",") for seed in (0, 1)
    ]
    for row in records:
        assert row.keys() >= KEYS and row["split"] == "test" and row["n_test"] == 60
        assert row["command"].startswith("python Train") and f"--seed {row['seed']}" in row["command"]
        assert f"{row['arm']}, seed {row['seed']}: kNN {100 * row['knn']:.2f} %" in printed
    equal = {row["steps"] for row in records if row["arm"] != Arms.EQUAL}
    assert equal == {60}  # 2 epochs of 30 steps
    assert Collect.arms_table(records) in printed


def test_table_says_what_a_command_chose(done):
    row = done[1][-1]
    assert "--p_gen" not in Collect.arms_table([row])
    chosen = Collect.arms_table([row | {"command": f"{row['command']} --p_gen 0.5 --epochs 2 --corrupt gray"}])
    assert f"| {row['title']}, --p_gen 0.5, --corrupt gray | 1 |" in chosen


def test_runs_that_a_choice_was_made_by(done, arms):
    runs = sorted({file.parent for file in arms.models.glob("Train*/evaluation.json")})
    records = [Collect.collect(run) for run in runs]
    assert {row["flags"].get("corrupt") for row in records if "pair" not in row["flags"]} == {None}
    table = Collect.choice_table([row for row in records if row["flags"]["seed"] == 0])
    for row in [row for row in done[1] if row["seed"] == 0]:
        scores = f" | {100 * row['knn']:.1f} | {100 * row['linear']:.1f} |"
        (said,) = [line for line in table.splitlines() if line.endswith(scores)]
        words = shlex.split(row["command"])
        assert f"| `{words[1]}" in said and ("--pair" in said) == (words[1] == "TrainISICLE.py")
        assert (f"--epochs {row['epochs']}" in said) == (row["arm"] == Arms.EQUAL)  # that alone differs in it
    assert "--epochs 2" in table.splitlines()[-1] and "--bs" not in table


@pytest.mark.parametrize("file", ["", "3.pt"])
def test_choice_says_what_its_generator_is(tmp_path, file):
    camnet, run = tmp_path / "camnet", tmp_path / "run"
    for folder in (camnet, run):
        folder.mkdir()
    (camnet / "args.json").write_text(json.dumps({"args": {"corrupt": "gray+mask0.5", "periods": 7}}))
    start = dict.fromkeys(("command", "revision", "device", "torch", "torchvision", "python"), "")
    args = {"data": "shapes", "seed": 0, "corrupt": None, "generator": str(camnet / file)}
    (run / "args.json").write_text(json.dumps({"args": args, "starts": [start]}))
    (run / "metrics.jsonl").write_text('{"step": 1, "seconds": 60}\n')
    (run / "evaluation.json").write_text("{}")
    assert Collect.collect(run)["flags"].items() >= {"corrupt": "gray+mask0.5", "periods": 7}.items()


def test_compute_is_what_was_counted_by_hand(done):
    rows = {row["arm"]: row for row in done[1]}
    stem = 3 * 32 * 9 * 16**2  # stride 2
    blocks = 2 * 32 * 32 * 9 * 16**2 + (32 + 64) * 64 * 9 * 8**2 + 32 * 64 * 8**2
    blocks += (64 + 128) * 128 * 9 * 4**2 + 64 * 128 * 4**2
    head = 128 * 32 + 32 * 128  # --proj_hidden 32, --proj_dim 128
    for arm, views in (("simclr_full", 2), ("gen_gen_full", 2), ("isicle_full", 3), ("corrupted_only", 2)):
        assert rows[arm]["encoder_macs"] == 3 * views * 8 * 60 * (stem + blocks + head)
    assert rows["simclr_full"]["generator_macs"] == rows["corrupted_only"]["generator_macs"] == 0
    assert rows["gen_gen_full"]["generator_macs"] == rows["isicle_full"]["generator_macs"] > 0


def test_generator_is_charged_for_search_training_and_bank():
    flags = TrainCamNet.get_args(GENERATOR.split())
    base = Arms.generator_macs(flags, 240, 0)
    sample = (Arms.generator_macs(flags, 240, 1) - base) // 240  # of one restoration
    assert sample > 1e6 and Arms.generator_macs(flags, 240, 8, banks=3) == base + 3 * 240 * 8 * sample
    assert base > 16 * 2 * 3 * sample  # 16 images, trained on twice, forward and backward
    more = Arms.generator_macs(TrainCamNet.get_args([*GENERATOR.split(), "--m", "4,3"]), 240, 0)
    assert 16 * sample / 2 < more - base < 16 * sample  # one candidate more on the finer level, the dearer one
    assert Arms.generator_macs(TrainCamNet.get_args([*GENERATOR.split(), "--periods", "2"]), 240, 0) == 2 * base


def test_equal_compute_is_equal(done):
    rows = {row["arm"]: row for row in done[1]}
    ours = rows["isicle_full"]["encoder_macs"] + rows["isicle_full"]["generator_macs"]
    per_epoch = rows["simclr_full"]["encoder_macs"] / rows["simclr_full"]["epochs"]
    assert abs(rows[Arms.EQUAL]["encoder_macs"] - ours) <= per_epoch / 2


def test_started_again_it_runs_what_is_missing(arms, done):
    records = done[1]
    arms.out.write_text(json.dumps([row for row in records if (row["arm"], row["seed"]) != ("isicle_full", 1)]))
    again = arms.run()
    assert again.returncode == 0 and again.stdout.count(", seed ") == 1 and "isicle_full, seed 1: " in again.stdout
    assert json.loads(arms.out.read_text()) == records


def test_same_generator_for_every_arm(arms, done):
    assert len(list(arms.models.glob("TrainCamNet-*"))) == 1
    assert len(list(arms.models.glob("TrainCamNet-*/bank-*.npy"))) == 2  # one for each seed


def test_arms_are_what_their_scripts_take(tmp_path):
    for arm, (script, flags, _) in Arms.ARMS.items():
        module = {"TrainSimCLR.py": TrainSimCLR, "TrainISICLE.py": TrainISICLE}[script]
        parsed = module.get_args(shlex.split(flags))
        assert parsed.aug == (
            "full" if (script == "TrainSimCLR.py" and arm != "simclr_crop") or "full" in arm else "crop"
        )


def test_unknown_arm_is_one_line():
    command = [sys.executable, "-m", "Benchmarks.Arms", "--arms", "simclr_ful"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "simclr_full" in done.stderr


def test_failing_run_is_one_line(arms, tmp_path):
    failed = arms.run("--out", str(tmp_path / "arms.json"), "--isicle", f"--generator {tmp_path}")
    assert failed.returncode == 2 and len(failed.stderr.splitlines()) == 1 and "no checkpoint there" in failed.stderr
