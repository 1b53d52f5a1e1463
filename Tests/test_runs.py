"""Runs: names of run folders, and logs that can be continued."""

import json
import shutil
from argparse import Namespace

import torch
from helpers import lines, one_line

from Runs import Run, provenance, run_name

HYPER = {"data": "x", "size": None, "bs": 8, "lr": 0.1, "stem": "auto", "lars": False, "gray_p": 0.0, "seed": 0}


def test_run_name_tells_flags_apart():
    assert run_name("TrainX", "tiny", HYPER, "") == "TrainX-tiny-bs_8-lr_0.1-gray_p_0-seed_0"
    others = ({"lr": 0.11}, {"lars": True}, {"stem": "small"}, {"gray_p": 0.5}, {"seed": 1})
    names = {run_name("TrainX", "tiny", {**HYPER, **other}) for other in ({}, *others)}
    assert len(names) == 6


def test_run_name_is_that_of_the_values_not_of_how_they_were_given():
    given = {**HYPER, "stem": "".join(["au", "to"]), "bs": 8.0, "gray_p": 0}
    assert run_name("TrainX", "tiny", given) == run_name("TrainX", "tiny", HYPER)


def test_run_name_fits_a_file_system(tmp_path):
    long = {f"flag_{k}": k + 0.123456 for k in range(30)}
    for suffix in ("", "s", "ü" * 50, "a/../b\n"):
        names = [run_name("TrainX", "日本語" * 20, {**long, "flag_29": last}, suffix) for last in (1, 2)]
        assert names[0] != names[1]
        for name in names:
            assert len(name.encode()) <= 240
            assert (tmp_path / name).parent == tmp_path
            (tmp_path / name).mkdir()
    assert run_name("TrainX", "x", long, "ü" * 50).endswith("-" + "ü" * 50)
    one_line(lambda: run_name("TrainX", "x", HYPER, "ü" * 51), "--suffix", "102")


def test_run_logs_and_goes_on_where_it_was(tmp_path):
    args, device = Namespace(lr=0.1), torch.device("cpu")
    run = Run(tmp_path / "run", args, device)
    for step in (1, 2, 3):
        run.log(step, 0, loss=step / 2)
    run.close()
    logged = [(line["step"], line["epoch"], line["loss"]) for line in lines(run.folder)]
    assert logged == [(1, 0, 0.5), (2, 0, 1), (3, 0, 1.5)]
    with run.metrics.open("a") as file:
        file.write('{"step": 4, "lo')  # what a kill leaves
    one_line(lambda: Run(run.folder, args, device), str(run.folder), "--resume auto", "--suffix")
    again = Run(run.folder, args, device, resumed_step=2)
    again.log(3, 1, loss=9.0)
    again.close()
    assert [(line["step"], line["loss"]) for line in lines(again.folder)] == [(1, 0.5), (2, 1), (3, 9)]
    seconds = [line["seconds"] for line in lines(again.folder)]
    assert seconds == sorted(seconds)
    assert len(json.loads((run.folder / "args.json").read_text())["starts"]) == 2


def test_only_the_first_process_writes(tmp_path):
    run = Run(tmp_path / "run", Namespace(), torch.device("cpu"), writes=False)
    run.log(1, 0, loss=1.0)
    run.close()
    assert not any(tmp_path.iterdir())


def test_a_run_needs_no_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert shutil.which("git") is None
    assert provenance(torch.device("cpu"))["revision"] == ""
