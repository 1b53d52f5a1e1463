"""Runs: names of run folders, who may work in one, and logs that can be continued."""

import os
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torchvision
from helpers import count_lines, lines, one_line

import Runs
import Utils
from Images.Split import Split
from Runs import Run, provenance, run_name

HYPER = {"data": "x", "size": None, "bs": 8, "lr": 0.1, "stem": "auto", "lars": False, "gray_p": 0.0, "seed": 0}
CPU = torch.device("cpu")


# ---------------------------------------------------------------------------------------------------- names


def test_a_run_name_holds_suffix_then_what_differs_then_what_matters():
    name, _, digest = run_name("TrainX", "tiny", HYPER | {"gray_p": 0.5}, HYPER, "mine").rpartition("-")
    assert name == "TrainX-tiny-mine-gray_p_0.5-bs_8-lr_0.1-seed_0"
    assert len(digest) == 8


def test_a_run_name_tells_flags_and_places_apart():
    others = ({}, {"lr": 0.11}, {"lars": True}, {"stem": "small"}, {"gray_p": 0.5}, {"seed": 1}, {"data": "y/x"})
    names = {run_name("TrainX", "x", HYPER | other, HYPER) for other in others}
    names.add(run_name("TrainX", "x", HYPER, HYPER, "mine"))
    assert len(names) == len(others) + 1


def test_a_run_name_is_that_of_the_values_not_of_how_they_were_given():
    given = HYPER | {"stem": "".join(["au", "to"]), "bs": 8.0, "gray_p": 0}
    assert run_name("TrainX", "tiny", given, HYPER) == run_name("TrainX", "tiny", HYPER, HYPER)


def test_a_run_name_fits_a_file_system(tmp_path):
    long = HYPER | {f"flag_{k}": k + 0.123456 for k in range(30)}
    for suffix in ("", "s", "ü" * 30, "a/../b\n"):
        names = [run_name("TrainX", "日本語" * 20, long | {"flag_29": last}, HYPER, suffix) for last in (1, 2)]
        assert names[0] != names[1]
        for name in names:
            assert len(name) <= 160
            assert (tmp_path / name).parent == tmp_path
            (tmp_path / name).mkdir()
    one_line(lambda: run_name("TrainX", "x", HYPER, HYPER, "ü" * 31), "--suffix", "62 bytes")


# ---------------------------------------------------------------------------------------------------- folders


def found(models, data, resume="auto", images="of the images", given=(), **other):
    """Return the folder of a run on this data. images: the fingerprint of what the folder holds."""
    args = Namespace(models_dir=str(models), data=str(data), suffix="", resume=resume, given=given)
    hyper = HYPER | {"data": str(data)} | other
    return Runs.find_run(args, "TrainX", "tiny", hyper, HYPER, lambda: images)


def test_resume_auto_finds_the_run_whose_data_were_moved_and_no_other(tmp_path):
    (tmp_path / "old").mkdir()
    folder = found(tmp_path, tmp_path / "old")
    assert folder.parent == tmp_path
    folder.mkdir()
    Utils.write_json(folder / "args.json", {"args": HYPER | {"data": str(tmp_path / "old"), "suffix": ""}})

    assert found(tmp_path, tmp_path / "new") != folder  # the same flags on other images
    (tmp_path / "old").rmdir()
    assert found(tmp_path, tmp_path / "new") != folder  # no checkpoint says what it learned from
    parts = {name: {} for name in ("args", "encoder", "head", "random", "optimizer")}
    Utils.save_(folder / "3.pt", epoch=3, step=3, data_fingerprint="of the images", **parts)
    assert found(tmp_path, tmp_path / "new") == folder
    assert found(tmp_path, tmp_path / "new", images="of other images") != folder
    assert found(tmp_path, tmp_path / "new", lr=0.2) != folder
    assert found(tmp_path, tmp_path / "new", resume=None) != folder
    assert found(tmp_path, "anywhere", resume=str(folder / "3.pt")) == folder


def test_resume_auto_names_the_run_that_it_does_not_find(tmp_path, capsys):
    data = tmp_path / "x"
    data.mkdir()
    folder = found(tmp_path / "m", data)
    Run(folder, Namespace(**HYPER | {"data": str(data)}), CPU)
    assert found(tmp_path / "m", data, given=["lr"], bs=16) != folder
    assert f"--resume auto: no run of these flags: {folder} has --bs 8 (here 16)" in capsys.readouterr().err
    found(tmp_path / "m", data, given=["bs"], bs=16)  # asked for another one
    found(tmp_path / "m", tmp_path, bs=16)  # of other images
    found(tmp_path / "m", data, resume=None, bs=16)
    assert found(tmp_path / "m", data) == folder
    assert capsys.readouterr().err == ""


def test_a_folder_is_claimed_by_one_process_and_removed_if_nothing_was_written(tmp_path):
    folder = tmp_path / "run"
    with Runs.claimed(folder):
        assert f"{os.getpid()} on" in (folder / ".lock").read_text()
        one_line(lambda: Runs.claimed(folder).__enter__(), f"another process ({os.getpid()} on", "working on")
    assert not folder.exists()
    with Runs.claimed(folder):
        (folder / "args.json").write_text("{}")
    assert [path.name for path in folder.iterdir()] == ["args.json"]
    one_line(lambda: Runs.check_unused(folder), str(folder), "--resume auto", "--suffix")


def test_the_printed_command_can_be_pasted(capsys):
    Runs.farewell(Path("/home/me/my runs/x"))
    assert "tensorboard --logdir '/home/me/my runs'\n" in capsys.readouterr().out


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    one_line(lambda: Runs.claimed(tmp_path / "file" / "run").__enter__(), "cannot make", "--models_dir")


def test_the_data_of_a_checkpoint_are_known_by_their_images():
    images = torch.arange(5 * 3 * 4 * 4).view(5, 3, 4, 4).byte()
    split = Split(images, torch.zeros(5, dtype=torch.int64), ["a"])
    state = {"data_n": 5, "data_fingerprint": split.fingerprint()}
    Runs.check_data("1.pt", state, split, "x")
    Runs.check_data("1.pt", {}, split, "x")  # of a version that noted nothing
    fewer = Split(images[:4], split.labels[:4], ["a"])
    one_line(lambda: Runs.check_data("1.pt", state, fewer, "x"), "--data x had 5 images and has 4", "1.pt")
    other = Split(images.flip(0), split.labels, ["a"])
    one_line(lambda: Runs.check_data("1.pt", state, other, "x"), "--data x had other images", "--suffix")


# ---------------------------------------------------------------------------------------------------- logs


def test_a_run_logs_and_goes_on_where_it_was(tmp_path):
    run = Run(tmp_path / "run", Namespace(lr=0.1), CPU)
    for step in (1, 2, 3):
        run.log(step, 0, loss=step / 2)
    run.close()
    logged = [(line["step"], line["epoch"], line["loss"]) for line in lines(run.folder)]
    assert logged == [(1, 0, 0.5), (2, 0, 1), (3, 0, 1.5)]
    with run.metrics.open("a") as file:
        file.write('{"step": 4, "lo')  # what a kill leaves
    assert count_lines(run.folder, "metrics.jsonl") == 3
    again = Run(run.folder, Namespace(lr=0.1), CPU, resumed_step=2)
    again.log(3, 1, loss=9.0)
    again.close()
    assert [(line["step"], line["loss"]) for line in lines(again.folder)] == [(1, 0.5), (2, 1), (3, 9)]
    seconds = [line["seconds"] for line in lines(again.folder)]
    assert seconds == sorted(seconds)
    assert len(Utils.read_json(run.folder / "args.json")["starts"]) == 2
    assert Runs.logged_at(run.folder, 3)["loss"] == 9
    assert Runs.logged_at(run.folder, 4) == {}


def test_only_the_first_process_writes(tmp_path):
    run = Run(tmp_path / "run", Namespace(), CPU, writes=False)
    run.log(1, 0, loss=1.0)
    run.close()
    assert not any(tmp_path.iterdir())


def test_a_run_needs_no_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert shutil.which("git") is None
    assert provenance(CPU)["revision"] == ""


@pytest.mark.skipif(shutil.which("git") is None, reason="for git")
def test_a_revision_is_dirty_if_the_code_was_edited_not_if_results_were_written(tmp_path, monkeypatch):
    monkeypatch.setattr(Utils, "ROOT", tmp_path)
    for name in os.environ:
        if name.startswith("GIT_"):  # as in a hook: the repository of the tests
            monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    (tmp_path / "Results").mkdir()
    code = tmp_path / "code.py"
    figures = tmp_path / "Results" / "figures.json"
    for file in (code, figures):
        file.write_text("1")
    Runs.git("init")
    Runs.git("add", ".")
    Runs.git("-c", "user.name=me", "-c", "user.email=me@localhost", "commit", "-m", "both")
    commit = Runs.git("rev-parse", "--short", "HEAD")
    figures.write_text("2")
    assert provenance(CPU)["revision"] == commit
    code.write_text("2")
    assert provenance(CPU)["revision"] == f"{commit}-dirty"


@pytest.mark.parametrize("text", ["", "{", "[]", '"text"', '{"step": "x", "seconds": 1}', '{"step": 1}'])
def test_damaged_lines_of_a_log_are_passed_over(tmp_path, text):
    (tmp_path / "metrics.jsonl").write_text(f'{text}\n{{"step": 2, "seconds": 1, "loss": 3}}\n')
    assert Runs.read_metrics(tmp_path) == [{"step": 2, "seconds": 1.0, "loss": 3}]


def test_a_picture_is_whole_or_the_one_before(tmp_path, monkeypatch):
    file = tmp_path / "pairs.png"
    Runs.write_image(file, torch.zeros(3, 4, 4))
    before = file.read_bytes()

    def interrupted(image, scratch, **options):
        Path(scratch).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torchvision.utils, "save_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Runs.write_image(file, torch.ones(3, 4, 4))
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]
