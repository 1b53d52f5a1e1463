"""Benchmarks/Floor.py, Decoding.py, Chunks.py and Processes.py in small, in this process."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

import Utils
from Benchmarks import Chunks, Decoding, Floor, Processes, Tables


def run(benchmark, tmp_path, *words):
    """Run a benchmark; return what it writes."""
    out = tmp_path / "out.json"
    assert benchmark.main(benchmark.get_args([*words, "--out", str(out)])) == 0
    return json.loads(out.read_text())


# ---------------------------------------------------------------------------------------------------- Floor


def test_operations_are_counted_by_their_type_and_bytes():
    images = torch.zeros(2, 3, 8, 8)
    weight = torch.zeros(5, 3, 3, 3, requires_grad=True)
    one_way = 2 * 5 * 3 * 9 * 64
    with Floor.Count() as count:
        F.conv2d(images, weight, padding=1).sum().backward()
    assert count.macs == {"float32": 2 * one_way}  # the images need no gradient
    with Floor.Count() as count, torch.inference_mode():
        F.conv2d(images.bfloat16(), weight.bfloat16(), padding=1)
    assert count.macs == {"bfloat16": one_way}
    with Floor.Count() as count:
        images.bfloat16()
        images.expand(7, 2, 3, 8, 8).flatten(2)  # views
        torch.zeros(1).expand(10, 10) + torch.zeros(10, 10)
    assert count.n_bytes == 384 * (4 + 2) + 4 + 400 + (4 + 400 + 400)  # the cast, two fills, the sum
    assert not count.macs


def test_floors_and_profiles_of_all_stages(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Floor, "SIDE", 64)
    monkeypatch.setattr(Floor, "COPIED", 2**12)
    monkeypatch.setattr(Floor, "RATE_SECONDS", 0.0)
    monkeypatch.setattr(Floor, "AT_ONCE", 4)
    monkeypatch.setattr(Floor, "BATCH", 4)
    content = run(Floor, tmp_path, "--seconds", "0", "--rounds", "1", "--threads", "1")
    printed = capsys.readouterr().out
    assert [row["stage"].split(",")[0] for row in content["rows"]] == ["SimCLR"] * 2 + ["generator"] * 2 + ["bank"]
    for row in content["rows"]:
        products = sum(macs / content["rates"][dtype] for dtype, macs in row["macs"].items())
        assert row["products_floor"] == pytest.approx(products, abs=2e-5)
        assert row["bytes_floor"] == pytest.approx(row["bytes"] / content["rates"]["bandwidth"], abs=2e-5)
        assert row["seconds"] > 0
        assert row["macs"]
        assert math.isclose(sum(row["shares"].values()), 1, abs_tol=0.01)
        assert row["stage"] in printed
    views, step, *_ = content["rows"]
    assert views["shares"]["convolutions, backward"] == 0 < step["shares"]["convolutions, backward"]
    assert Tables.floor_table(content).count("| SimCLR, views of 256 images |") == 2


# ---------------------------------------------------------------------------------------------------- Decoding


def test_all_ways_of_decoding_make_nearly_the_same_images(tmp_path):
    content = run(Decoding, tmp_path, "--images", "3", "--size", "32", "--rounds", "1")
    rows = {row["variant"]: row for row in content["rows"]}
    assert list(rows) == list(Decoding.VARIANTS)
    assert all(row["images_per_second"] > 0 and row["difference"] < 3 for row in rows.values())
    assert (rows["Pillow"]["difference"], rows["Pillow"]["equal"]) == (0, 1)
    assert len(Tables.decoding_table(content).splitlines()) == 2 + len(rows) + 2


def test_own_files_are_decoded_and_nothing_is_written(tmp_path, monkeypatch, capsys):
    Decoding.write_files(tmp_path, 2)
    monkeypatch.setattr(Utils, "ROOT", tmp_path / "nowhere")
    assert Decoding.main(Decoding.get_args(["--data", str(tmp_path), "--size", "16", "--rounds", "1"])) == 0
    assert "written" not in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------- Chunks


class Here:
    """Stands for ProcessPoolExecutor: the work is done in this process."""

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, work, *args):
        return SimpleNamespace(result=lambda: work(*args))


def test_chunks_are_measured_against_the_whole_batch_and_one_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr(Chunks, "ProcessPoolExecutor", Here)
    content = run(Chunks, tmp_path, "--bs", "16", "--chunk_views", "8", "--steps", "1")
    assert [(row["bs"], row["chunk_views"]) for row in content["rows"]] == [(16, 0), (16, 8), (4, 0)]
    assert all(row["peak_memory_bytes"] >= row["before_bytes"] > 2**26 for row in content["rows"])
    assert "| 16 | 8 |" in Tables.chunks_table(content)


# ---------------------------------------------------------------------------------------------------- Processes

WHAT = ["SimCLR, steps", "generator, search", "generator, steps", "bank, 8 restorations"]


def test_a_process_measures_every_stage(capsys):
    assert Processes.main(Processes.get_args(["--work", "--images", "64", "--steps", "1"])) == 0
    speeds = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(speeds) == WHAT
    assert min(speeds.values()) > 0


def test_processes_take_turns_with_threads(tmp_path, monkeypatch):
    calls = []

    def measured(args, processes, threads):
        calls.append((processes, threads))
        return dict.fromkeys(WHAT, 100.0 * processes * threads)

    monkeypatch.setattr(Processes, "run", measured)
    content = run(Processes, tmp_path, "--processes", "2", "--rounds", "2")
    assert calls == [(1, 1), (1, 2), (2, 1)] * 2
    assert [row["what"] for row in content["rows"]] == WHAT
    assert content["rows"][0]["images_per_second"]["2 processes, 1 thread"] == 200
    assert "| generator, search | 100 | 200 (2.00 x) | 200 (2.00 x) |" in Tables.processes_table(content)
