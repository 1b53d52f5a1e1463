"""Flags: what the user gave, in every script the same way."""

import pytest
from helpers import content, one_error, one_line, save_shapes

import Data
import Flags
import TrainCamNet
import TrainISICLE
import TrainSimCLR

SCRIPTS = (TrainSimCLR, TrainISICLE, TrainCamNet)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_folder_of_images_means_the_same_from_every_place(tmp_path, monkeypatch, script):
    for name in ("images", "shapes"):
        (tmp_path / "data" / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "data")
    images = str((tmp_path / "data" / "images").resolve())
    assert script.get_args(["--data", "images"]).data == images
    assert script.get_args(["--data", "../data/images/"]).data == images
    # a name of a data set stays one
    assert script.get_args(["--data", "shapes"]).data == "shapes"


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("flag", ["--resume", "--data", "--device"])
def test_a_flag_without_its_value_is_one_line(cli, script, flag):
    done = cli([flag], script=script)
    one_error(done, f"argument {flag}: expected one argument")
    assert len(done.err.splitlines()) == 1


def test_paths_begin_with_the_home_folder_also_after_an_equals_sign(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    args = TrainISICLE.get_args(["--models_dir=~/a", "--data_dir=~/b", "--bank=~/c", "--generator=~/d", "--init=~/e"])
    found = [args.models_dir, args.data_dir, args.bank, args.generator, args.init]
    assert found == [f"/somewhere/{letter}" for letter in "abcde"]
    assert TrainCamNet.get_args(["--lpips_weights=~/f"]).lpips_weights == "/somewhere/f"


@pytest.mark.parametrize(
    ("layout", "place", "is_read"),
    [
        ("a", "", True),
        ("a", "runs", True),
        ("a", "a/runs", True),
        ("a", "a/../../runs", False),
        ("a", ".runs", False),
        ("train/a", "train/runs", True),
        ("train/a", "valid/runs", True),
        ("train/a", "runs", False),
    ],
)
def test_where_images_are_looked_for(layout, place, is_read, tmp_path):
    (tmp_path / "data" / layout).mkdir(parents=True)
    if layout.startswith("train"):
        (tmp_path / "data" / "valid").mkdir()
    assert Data.is_read(str(tmp_path / "data"), tmp_path / "data" / place) == is_read
    assert not Data.is_read("shapes", tmp_path)


@pytest.mark.parametrize("script", SCRIPTS)
def test_runs_among_the_images_are_refused(cli, script, tmp_path):
    save_shapes(tmp_path, 1, size=8)
    before = content(tmp_path)
    done = cli(["--data", tmp_path, "--models_dir", tmp_path / "runs", "--device", "cpu"], script=script)
    one_error(done, f"--models_dir {tmp_path / 'runs'}: it lies among the images", "name a folder outside")
    assert content(tmp_path) == before


@pytest.mark.parametrize("flag", ["--data", "--resume", "--models_dir", "--bank", "--generator", "--init"])
def test_an_empty_path_is_one_line(cli, flag):
    done = cli([flag, ""], script=TrainISICLE)
    one_error(done, f"{flag}: no path is given")
    assert len(done.err.splitlines()) == 1


@pytest.mark.parametrize("script", [TrainISICLE, TrainCamNet])
def test_a_checkpoint_of_another_script_is_named(whole, script):
    file = whole.folder / "3.pt"
    one_line(lambda: script.get_args(["--resume", str(file)]), str(file), "a run of TrainSimCLR.py: start that script")


@pytest.mark.parametrize(
    "script, words, told",
    [
        (TrainSimCLR, "--aug none --crop_min .3", "--crop_min 0.3 has no effect with --aug none"),
        (TrainSimCLR, "--aug crop --gray_p .1", "--gray_p 0.1 has no effect with --aug crop"),
        (TrainSimCLR, "--backbone resnet8 --stem small", "--stem small has no effect with --backbone resnet8"),
        (TrainSimCLR, "--trust .01", "--trust 0.01 has no effect without --lars"),
        (TrainSimCLR, "--gen_weight 3", "--gen_weight 3.0 has no effect with --loss lout"),
        (TrainISICLE, "--p_gen 0 --bank nowhere.npy", "--bank nowhere.npy has no effect with --p_gen 0"),
        (TrainISICLE, "--pair corrupted --pick farthest", "--pick farthest has no effect with --pair corrupted"),
        (TrainISICLE, "--num_pos 4", "--num_pos 4 has no effect with --pair real_real_gen"),
        (TrainCamNet, "--distance pixels --alpha 2", "--alpha 2.0 has no effect with --distance pixels"),
        (TrainSimCLR, "--aug full --gray_p .1", ""),
    ],
)
def test_flags_without_effect_are_told(capsys, script, words, told):
    args = script.get_args(words.split())
    script.note_unused(args)
    out = capsys.readouterr().out.strip()
    assert out.startswith(told)
    assert bool(out) == bool(told)
    args.resume = "1.pt"  # then all flags are those of that run
    script.note_unused(args)
    assert capsys.readouterr().out == ""


def test_help_shows_a_default_of_zero_but_none_of_a_switch(capsys):
    with pytest.raises(SystemExit):
        TrainSimCLR.get_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "the order of the images and the views (default: 0)" in text
    assert "all views at once (default: 0)" in text
    assert "layer-wise learning rates (LARS); with Adam as in LAMB --trust" in text
    assert "defaults: those of --data shapes on" in text


def test_a_file_flag_may_change_on_resume_and_others_may_not(whole, tmp_path):
    file = str(whole.folder / "3.pt")
    assert TrainSimCLR.get_args(["--resume", file, "--init", "other.pt"]).init == "other.pt"
    one_line(lambda: TrainSimCLR.get_args(["--resume", file, "--lr", "7"]), "--lr 7")
    assert TrainCamNet.get_args([]).init == "he"  # another flag of this name, which is no file
    assert set(Flags.FILE_FLAGS) <= set(vars(TrainISICLE.get_args([])))
