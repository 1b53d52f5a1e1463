"""Benchmarks/Speed.py and Redrawn.py, run as their users run them: in a process of their own."""

import json
import os
import statistics
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from CamNet.Bank import read

ROOT = Path(__file__).resolve().parent.parent
AUGMENTATION = ["ours", "torchvision, PIL images", "torchvision v2, uint8 tensors", "kornia, batch"]
STEP = ["ours", "ours, ISICLE's pairs", "plain loop, PIL, fp32", "ours, fp32", "ours, without channels_last"]


def speed(*args):
    """Run `python ARGS` in the repository's folder."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *args], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """What a quick run prints, and what it writes."""
    out = tmp_path_factory.mktemp("speed") / "new" / "speed.json"
    tiny = ["--device", "cpu", "--bs", "8", "--size", "16", "--seconds", "0.05", "--threads", "1", "--workers", "1"]
    done = speed("-m", "Benchmarks.Speed", "--quick", *tiny, "--out", str(out))
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(out.read_text())


def test_every_variant_is_measured(result):
    rows = {"augmentation": {}, "step": {}, "step, 3 views": {}}
    for row in result[1]["rows"]:
        rows[row["part"]][row["variant"]] = row
        assert len(row["rounds"]) == 2 and min(row["rounds"]) > 0
        assert row["views_per_second"] == pytest.approx(statistics.median(row["rounds"]), abs=0.1)
    assert list(rows["augmentation"]) == AUGMENTATION[: None if find_spec("kornia") else -1]
    assert list(rows["step"]) == STEP and list(rows["step, 3 views"]) == STEP[:2]
    assert all(2**26 < row["peak_memory_bytes"] < 2**34 for row in rows["step"].values())


def test_ratios_are_of_the_same_round(result):
    content = result[1]
    assert list(content["ratios"]) == [f"{row['part']}: {row['variant']}" for row in content["rows"]]
    ours = {row["part"]: row["rounds"] for row in content["rows"] if row["variant"] == "ours"}
    for row, ratio in zip(content["rows"], content["ratios"].values()):
        rounds = [mine / its for mine, its in zip(ours[row["part"]], row["rounds"])]
        assert ratio == pytest.approx(statistics.median(rounds), abs=0.001)


def test_json_says_how_it_was_made(result):
    content = result[1]
    assert content["command"].startswith("python -m Benchmarks.Speed --quick --device cpu --bs 8")
    assert content["threads"] == {"augmentation": 1, "step": 1} and content["workers"] == 1
    assert content["device"].startswith("cpu") and content["versions"]["torch"] and content["revision"]
    assert "ru_maxrss" in content["notes"]["peak_memory_bytes"]


def test_table_shows_the_same(result):
    table, content = result
    lines = [line for line in table.splitlines() if line.startswith(("augmentation ", "step"))]
    for line, row in zip(lines, content["rows"], strict=True):
        assert row["variant"] in line and f"{row['views_per_second']:,.0f}" in line


def test_started_by_its_path_it_says_how_to():
    done = speed("Benchmarks/Speed.py")
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "python -m Benchmarks.Speed" in done.stderr


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """What Benchmarks.Search prints and writes, for a generator that was hardly trained."""
    folder = tmp_path_factory.mktemp("search")
    tiny = "--size 16 --m 12,6 --period 16 --visits 2 --periods 1 --bs 8 --no-single_code --device cpu"
    done = speed("TrainCamNet.py", *tiny.split(), "--models_dir", str(folder))
    assert done.returncode == 0, done.stderr
    run, out = next(folder.iterdir()), folder / "search.json"
    done = speed(
        *("-m", "Benchmarks.Search", str(run), "--images", "6", "--rounds", "2", "--device", "cpu", "--out", str(out))
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(out.read_text())


def test_search_is_measured_beside_the_plain_ways(searched):
    rows = {(row["part"], row["variant"]): row for row in searched[1]["rows"]}
    assert {part for part, _ in rows} == {"search", "sampling", "training"}
    assert all(row["images_per_second"] > 0 and row["ratio"] > 0 for row in rows.values())
    assert rows["search", "ours, fp32"]["same"] == 1
    assert rows["search", "as published"]["same"] >= 0.9  # rounding alone may decide between equally near codes
    assert all(str(row["variant"]) in searched[0] for row in rows.values())


def test_search_says_how_it_was_made(searched):
    content = searched[1]
    assert content["command"].startswith("python -m Benchmarks.Search ") and content["revision"]
    assert content["images"] == 6 and content["generator"]["m"] == "12,6"


def test_redrawn_positives_are_a_bank(tmp_path):
    file = tmp_path / "redrawn.npy"
    done = speed("-m", "Benchmarks.Redrawn", str(file), "--num_codes", "2")
    assert done.returncode == 0 and done.stdout == f"2 positives for each of 8000 images: {file}\n", done.stderr
    assert read(file, 8000, 32).shape == (8000, 2, 3, 32, 32)
    for words, reason in (
        (["-m", "Benchmarks.Redrawn", str(tmp_path / "no" / "redrawn.npy")], "cannot write"),
        (["-m", "Benchmarks.Redrawn", str(file), "--num_codes", "0"], "at least 1"),
        (["Benchmarks/Redrawn.py", str(file)], "python -m Benchmarks.Redrawn"),
    ):
        done = speed(*words)
        assert done.returncode and reason in done.stderr and "Traceback" not in done.stderr
    assert [each.name for each in tmp_path.iterdir()] == ["redrawn.npy"]
