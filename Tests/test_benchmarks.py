"""Benchmarks/Speed.py, run in a fork of this process; Gpu.py, Search.py, Redrawn.py and Soak.py in this one."""

import contextlib
import functools
import importlib
import io
import json
import os
import statistics
import sys
import time
from importlib.util import find_spec

import pytest
import torch
from helpers import one_line

import Devices
import TrainCamNet
import Utils
from Benchmarks import Forks, Gpu, Redrawn, Search, Soak, Speed, Tables
from CamNet.Bank import read
from Images import Shapes

AUGMENTATION = ["ours", "torchvision, PIL images", "torchvision v2, uint8 tensors", "kornia, batch"]
STEP = ["ours", "ours, ISICLE's pairs", "plain loop, PIL, fp32", "ours, fp32", "ours, without channels_last"]
STEP += ["lightly"] if find_spec("lightly") and find_spec("lightning_utilities") else []


@pytest.fixture(scope="module", autouse=True)
def few_shapes():
    """Let there be 200 generated images to train on, in place of 8,000."""
    with pytest.MonkeyPatch.context() as patch:
        for split, count in {"train": 200, "val": 60, "test": 60}.items():
            patch.setitem(Shapes.SIZES, split, count)
        yield


WRITERS = ["Arms", "Chunks", "Collect", "Decoding", "Floor", "Gpu", "Kernels", "Picture", "Processes", "Search", "Soak"]


@pytest.mark.parametrize("name", [*WRITERS, "Speed"])
def test_the_file_to_write_can_lie_in_the_home_folder(name, monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    others = {"Arms": ["--data", "shapes"], "Collect": ["Models/run"], "Picture": ["shapes"]}
    get_args = importlib.import_module(f"Benchmarks.{name}").get_args
    assert get_args([*others.get(name, []), "--out=~/x"]).out == "/somewhere/x"


# ---------------------------------------------------------------------------------------------------- Speed


@pytest.fixture(scope="module")
def speed(tmp_path_factory):
    """What a quick run prints to standard output and to standard error, and what it writes."""
    folder = tmp_path_factory.mktemp("speed")
    out = folder / "new" / "speed.json"
    errors = folder / "errors"
    tiny = ["--device", "cpu", "--bs", "8", "--size", "16", "--seconds", "0.05", "--threads", "1", "--workers", "1"]

    def errors_apart():
        sys.stderr = errors.open("w", buffering=1)
        os.dup2(sys.stderr.fileno(), 2)

    child = Forks.Child(Speed, ["--quick", *tiny, "--out", str(out)], folder / "output", errors_apart)
    assert child.wait() == 0, errors.read_text()
    return child.output(), errors.read_text(), json.loads(out.read_text())


def test_every_variant_is_measured(speed):
    rows = {"augmentation": {}, "step": {}, "step, 3 views": {}}
    for row in speed[2]["rows"]:
        rows[row["part"]][row["variant"]] = row
        assert len(row["rounds"]) == 2
        assert min(row["rounds"]) > 0
        assert row["views_per_second"] == pytest.approx(statistics.median(row["rounds"]), abs=0.1)
    assert list(rows["augmentation"]) == AUGMENTATION[: None if find_spec("kornia") else -1]
    assert list(rows["step"]) == STEP
    assert list(rows["step, 3 views"]) == STEP[:2]
    assert all(2**26 < row["peak_memory_bytes"] < 2**34 for row in rows["step"].values())


def test_speed_says_what_it_measures_while_it_does(speed):
    lines = speed[1].splitlines()
    for row in speed[2]["rows"]:
        for turn, value in enumerate(row["rounds"]):
            assert f"{row['part']}, round {turn + 1}/2: {row['variant']}: {value:,.0f} views/s" in lines
    for name in STEP:
        said = [line.split(": ")[2] for line in lines if line.startswith(f"memory: {name}: ")]
        assert said[:-1] == ["images", "net", "step 1/3", "step 2/3", "step 3/3"]
        assert said[-1].endswith(" MiB")


def test_ratios_are_of_the_same_round(speed):
    content = speed[2]
    assert list(content["ratios"]) == [f"{row['part']}: {row['variant']}" for row in content["rows"]]
    ours = {row["part"]: row["rounds"] for row in content["rows"] if row["variant"] == "ours"}
    for row, ratio in zip(content["rows"], content["ratios"].values()):
        rounds = [mine / its for mine, its in zip(ours[row["part"]], row["rounds"])]
        assert ratio == pytest.approx(statistics.median(rounds), abs=0.001)


def test_json_says_how_it_was_made(speed):
    content = speed[2]
    assert content["command"].startswith("python -m Benchmarks.Speed --quick --device cpu --bs 8")
    assert content["threads"] == {"augmentation": 1, "step": 1}
    assert content["workers"] == 1
    assert content["device"].startswith("cpu")
    assert content["versions"]["torch"]
    assert content["revision"]
    assert "ru_maxrss" in content["notes"]["peak_memory_bytes"]


def test_table_shows_the_same(speed):
    lines = [line for line in speed[0].splitlines() if line.startswith(("augmentation ", "step"))]
    for line, row in zip(lines, speed[2]["rows"], strict=True):
        assert row["variant"] in line
        assert f"{row['views_per_second']:,.0f}" in line
    assert len(Tables.speed_table(speed[2]).splitlines()) == 4 + len(lines)
    assert ("pip install --no-deps lightly==" in speed[0]) == ("lightly" not in STEP)


COMMITTED = {
    "step: ours": 1.0,
    "step: ours, ISICLE's pairs": 1.0,
    "step: plain loop": 4.0,
    "step: ours, fp32": 1.6,
    "augmentation: kornia, batch": 5.0,
}


@pytest.fixture
def check(tmp_path, monkeypatch, capsys):
    """(ratios) -> (exit code, lines) of `--check` on a machine that measures these, compared with COMMITTED."""
    flags = {"backbone": "resnet8", "bs": 64, "size": 16, "threads": 0, "workers": 1}
    monkeypatch.setattr(Utils, "ROOT", tmp_path)
    file = tmp_path / "Results" / "speed-cpu.json"
    file.parent.mkdir()
    file.write_text(json.dumps({"device": "cpu of a friend", "flags": flags, "ratios": COMMITTED}))

    def run(ratios):
        def measured(args, device):
            assert (args.bs, args.size, args.workers, args.seconds) == (64, 16, 1, 1.0)
            return [], COMMITTED | ratios

        monkeypatch.setattr(Speed, "measure_all", measured)
        code = Speed.main(Speed.get_args(["--check", "--device", "cpu"]))
        assert [each.name for each in tmp_path.rglob("*.json")] == ["speed-cpu.json"]
        assert json.loads(file.read_text())["ratios"] == COMMITTED
        return code, capsys.readouterr().out.splitlines()

    return run


@pytest.mark.parametrize(
    "ratios",
    [{}, {"step: plain loop": 3.41}, {"step: plain loop": 9.0}, {"step: ours, ISICLE's pairs": 1.17}],
    ids=str,
)
def test_check_passes_where_nothing_fell_by_over_15_percent(check, ratios):
    code, lines = check(ratios)
    assert code == 0
    assert lines[-1] == "no ratio fell by over 15 %"
    assert not any(line.endswith("fell") for line in lines)
    assert any("cpu of a friend" in line for line in lines)


@pytest.mark.parametrize(
    "ratios",
    [
        {"step: plain loop": 3.39},
        {"step: ours, ISICLE's pairs": 1.19},  # ours / ISICLE's: ISICLE's became slower
        {"step: ours, fp32": 1.0, "augmentation: kornia, batch": 1.0},
    ],
    ids=str,
)
def test_check_prints_what_fell_and_exits_with_1(check, ratios):
    code, lines = check(ratios)
    assert code == 1
    assert lines[-1] == "fell by over 15 %: " + "; ".join(ratios)
    marked = [line for line in lines if line.endswith("fell")]
    assert len(marked) == len(ratios)
    for line, name in zip(marked, ratios):
        assert line.startswith(name)
        assert f"{COMMITTED[name]:.2f}" in line
        assert f"{ratios[name]:.2f}" in line


def test_check_says_what_was_not_measured(capsys):
    assert Speed.compare(COMMITTED, {"step: plain loop": 4.0}) == []
    assert capsys.readouterr().out.count("not measured") == 3


def test_check_needs_the_batch_of_the_committed_ratios(check, capsys):
    for words, problem in (("--bs 32", "are of 64"), ("--quick", "leave it out")):
        with pytest.raises(SystemExit):
            Speed.get_args(["--check", "--device", "cpu", *words.split()])
        assert problem in capsys.readouterr().err
    (Utils.ROOT / "Results" / "speed-cpu.json").unlink()
    with pytest.raises(Utils.UserError, match=r"speed-cpu\.json holds no ratios.*first run"):
        Speed.get_args(["--check", "--device", "cpu"])


# ---------------------------------------------------------------------------------------------------- Search


def search(*argv):
    """Run Benchmarks.Search in this process; return what it prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert Search.main(Search.get_args([str(word) for word in argv])) == 0
    return printed.getvalue()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with a generator that was hardly trained."""
    folder = tmp_path_factory.mktemp("search")
    tiny = "--size 16 --candidates 12,6 --period 16 --visits 2 --periods 1 --bs 8 --no-single_code --device cpu"
    assert TrainCamNet.main(TrainCamNet.get_args([*tiny.split(), "--models_dir", str(folder)])) == 0
    return folder


@pytest.fixture(scope="module")
def searched(models, tmp_path_factory):
    """What Benchmarks.Search prints and writes."""
    out = tmp_path_factory.mktemp("out") / "search.json"
    printed = search(next(models.iterdir()), "--images", 6, "--rounds", 2, "--device", "cpu", "--out", out)
    return printed, json.loads(out.read_text())


def test_search_is_compared_with_the_plain_ways(searched):
    rows = {(row["part"], row["variant"]): row for row in searched[1]["rows"]}
    assert {part for part, _ in rows} == {"search", "sampling", "training"}
    assert all(row["images_per_second"] > 0 and row["ratio"] > 0 for row in rows.values())
    assert rows["search", "ours, fp32"]["same"] == 1
    assert rows["search", "as published"]["same"] >= 0.9  # rounding alone may decide between equally near codes


def test_search_says_what_it_measures_while_it_does(searched):
    for row in searched[1]["rows"]:
        for title in ("warm-up", "round 1/2", "round 2/2"):
            assert f"{row['part']}, {title}: {row['variant']}: " in searched[0]


def test_search_says_how_it_was_made(searched):
    content = searched[1]
    assert content["command"].startswith("python -m Benchmarks.Search")
    assert content["revision"]
    assert content["images"] == 6
    assert content["generator"]["candidates"] == "12,6"
    command = "`python TrainCamNet.py --candidates 12,6 --bs 8`, then `python -m Benchmarks.Search"
    assert command in Tables.search_table(content)


def test_search_takes_the_newest_generator(models, tmp_path, monkeypatch):
    (tmp_path / "Models").symlink_to(models)
    monkeypatch.setattr(Utils, "ROOT", tmp_path)
    bench = Search.Bench(Search.get_args(["--images", "2"]), Devices.pick_device("cpu"))
    assert bench.counts == [12, 6]
    (tmp_path / "Models").unlink()
    with pytest.raises(Utils.UserError, match=r"run python TrainCamNet\.py"):
        Search.Bench(Search.get_args([]), Devices.pick_device("cpu"))


# ---------------------------------------------------------------------------------------------------- Gpu


def test_every_part_runs_on_a_cpu_in_small(tmp_path, capfd):
    out = tmp_path / "gpu.json"
    assert Gpu.main(Gpu.get_args(["--device", "cpu", "--quick", "--out", str(out)])) == 0
    content = json.loads(out.read_text())
    rows = {row.pop("part"): row for row in content["rows"]}
    assert list(rows) == list(Gpu.PARTS)
    assert not [name for name, row in rows.items() if "error" in row]
    for row in rows.values():
        assert all(value >= 0 for name, value in row.items() if name.endswith(("_ms", "_s", "_s_per_1000", "seconds")))
    assert rows["copies"]["pageable_16_kib_waits"] in (True, False)
    assert {"step_ms", "epoch_s", "compiled_step_ms", "deterministic_step_ms"} <= rows["simclr"].keys()
    assert rows["simclr"]["deterministic_same_bits"] is True
    assert {"step_ms", "mapped_ms", "mapped_farthest_ms"} <= rows["isicle"].keys()
    assert {"step_of_4_ms", "compiled_step_of_4_ms"} <= rows["camnet"].keys()
    assert {"chunk_1024_s_per_1000", "chunk_4096_s_per_1000"} <= rows["search"].keys()
    assert {"batches_of_4_s_per_1000", "batches_of_8_s_per_1000"} <= rows["bank"].keys()
    assert rows["tests"]["exit_code"] == 0
    assert " passed in " in rows["tests"]["summary"]
    assert content["command"].startswith("python -m Benchmarks.Gpu")
    assert content["device"].startswith("cpu")
    assert content["torch"] and content["revision"]
    assert f"bank: batches_of_8_s_per_1000: {rows['bank']['batches_of_8_s_per_1000']}" in capfd.readouterr().out


def fails(bench):
    yield "before", 1
    raise RuntimeError("CUDA error:\nlaunch failure")


def hangs(bench):
    yield "before", 2
    time.sleep(60)


def dies(bench):
    yield "before", 3
    os._exit(3)


def works(bench):
    yield "value", 4


def test_a_part_that_fails_leaves_its_error_and_the_others_go_on(tmp_path, monkeypatch, capfd):
    parts = {"fails": (fails, 60), "hangs": (hangs, 1), "dies": (dies, 60), "works": (works, 60)}
    monkeypatch.setattr(Gpu, "PARTS", parts)
    out = tmp_path / "gpu.json"
    args = Gpu.get_args(["--device", "cpu", "--quick", "--out", str(out)])
    assert Gpu.main(args) == 1
    rows = json.loads(out.read_text())["rows"]
    assert [(row["part"], row.get("before")) for row in rows] == [
        ("fails", 1),
        ("hangs", 2),
        ("dies", 3),
        ("works", None),
    ]
    errors = [
        "RuntimeError: CUDA error: launch failure",
        "took more than 1 s",
        "its process ended with exit code 3",
        None,
    ]
    assert [row.get("error") for row in rows] == errors
    assert rows[3]["value"] == 4
    args.minutes = 0.0
    assert Gpu.main(args) == 1
    rows = json.loads(out.read_text())["rows"]
    assert {row["error"] for row in rows} == {"not begun: --minutes 0 were over"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_it_says_so():
    with pytest.raises(Utils.UserError, match="no GPU here"):
        Gpu.main(Gpu.get_args([]))


def test_a_cpu_never_writes_the_results_of_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(Gpu, "PARTS", {"works": (works, 60)})
    monkeypatch.setattr(Utils, "ROOT", tmp_path)
    assert Gpu.main(Gpu.get_args(["--device", "cpu"])) == 0
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------- Redrawn


def test_redrawn_positives_are_a_bank(tmp_path, capsys):
    file = tmp_path / "redrawn.npy"
    Redrawn.main(Redrawn.get_args([str(file), "--num_codes", "2"]))
    assert capsys.readouterr().out == f"2 positives for each of 200 images: {file}\n"
    assert read(file, 200, 32).shape == (200, 2, 3, 32, 32)
    with pytest.raises(Utils.UserError, match="cannot write"):
        Redrawn.main(Redrawn.get_args([str(tmp_path / "no" / "redrawn.npy"), "--num_codes", "1"]))
    with pytest.raises(SystemExit):
        Redrawn.get_args([str(file), "--num_codes", "0"])
    assert "at least 1" in capsys.readouterr().err
    assert [each.name for each in tmp_path.iterdir()] == ["redrawn.npy"]


# ---------------------------------------------------------------------------------------------------- Soak


def test_soak_counts_and_continues_where_it_was(tmp_path, monkeypatch, capfd):
    tries = tmp_path / "tries"

    def attack(site, rng, index):
        with tries.open("a") as handle:  # from another process
            handle.write(f"{index} ")
        return Soak.Outcome("lost" if index == 1 else "")

    monkeypatch.setattr(Soak, "KINDS", {"a kind": (30, attack, "hits"), "another": (30, attack, "hits")})
    out = tmp_path / "soak.json"
    args = Soak.get_args(["--quick", "--only", "a kind", "--out", str(out)])
    assert Soak.main(args) == 1
    content = json.loads(out.read_text())
    (row,) = content["rows"]
    assert (row["kind"], row["tried"], row["passed"], row["hits"]) == ("a kind", 3, 2, 3)
    assert row["failures"] == [{"try": 1, "problem": "lost"}]
    assert content["revision"]
    row |= {"tried": 1, "passed": 1, "hits": 1, "failures": []}
    out.write_text(json.dumps(content))
    assert Soak.main(args) == 1
    assert tries.read_text() == "0 1 2 1 2 "
    assert "try 2: lost" in capfd.readouterr().out


def test_soak_tries_kinds_at_the_same_time(tmp_path, monkeypatch):
    reached = [tmp_path / "a", tmp_path / "b"]

    def attack(kind, site, rng, index):
        reached[kind].touch()
        end = time.monotonic() + 60
        while not all(path.exists() for path in reached):  # waits for the other process
            assert time.monotonic() < end
            time.sleep(0.005)
        return Soak.Outcome()

    kinds = {"a": (10, functools.partial(attack, 0), "hits"), "b": (10, functools.partial(attack, 1), "hits")}
    monkeypatch.setattr(Soak, "KINDS", kinds)
    out = tmp_path / "soak.json"
    assert Soak.main(Soak.get_args(["--quick", "--jobs", "2", "--out", str(out)])) == 0
    assert [(row["kind"], row["passed"]) for row in json.loads(out.read_text())["rows"]] == [("a", 1), ("b", 1)]


def test_soak_fails_if_one_of_its_processes_does(tmp_path, monkeypatch, capfd):
    def attack(site, rng, index):
        raise RuntimeError("of the attack itself")

    monkeypatch.setattr(Soak, "KINDS", {"a": (10, attack, "hits")})
    one_line(lambda: Soak.main(Soak.get_args(["--quick"])), "a process that makes tries has failed")
    assert "of the attack itself" in capfd.readouterr().err


def test_soak_notices_what_was_lost(tmp_path):
    site = Soak.Site(tmp_path)
    argv = site.argv("TrainSimCLR", tmp_path / "models")
    child = site.start("TrainSimCLR", argv)
    assert child.wait() == 0, child.output()
    state = Forks.state_of(tmp_path / "models")
    (folder,) = (tmp_path / "models").iterdir()
    metrics = folder / "metrics.jsonl"
    text = metrics.read_text()
    metrics.write_text("".join(text.splitlines(keepends=True)[1:]))
    (folder / "pairs.png").unlink()
    (folder / ".3.pt.1.tmp").write_text("")
    assert Forks.problem_of(Forks.state_of(tmp_path / "models"), state) == (
        "not the same: .3.pt.1.tmp, metrics.jsonl, pairs.png"
    )
    metrics.write_text(text.replace('"seconds": ', '"seconds": 1'))
    assert Forks.problem_of(Forks.state_of(tmp_path / "models"), state) == "not the same: .3.pt.1.tmp, pairs.png"
