"""TrainSimCLR.py run as its users run it: what it writes, how it stops, and that it goes on in the same bits."""

import json
import math
import re
import shutil
import signal
from functools import partial

import pytest
import torch
import torch._inductor.config
import torch._inductor.cpu_vec_isa
from helpers import (
    check_board,
    content,
    count_lines,
    different,
    flags_on_board,
    lines,
    losses,
    no_file_larger_than,
    one_error,
    only_run,
    save_shapes,
    wait_for,
    wait_for_next_second,
)
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import Backbones
import Data
import Export
import Flags
import Losses
import TrainSimCLR
from Images.Split import Split

SCORES = ("knn", "linear", "linear_aug", "chance", "pixels_knn", "untrained_knn", "untrained_linear")


@pytest.fixture
def unfinished(whole, quick, tmp_path):
    """(*checkpoints) -> (flags, folder) of a copy of the whole run with only these checkpoints left."""

    def make(*checkpoints):
        folder = tmp_path / "models" / whole.folder.name
        shutil.copytree(whole.folder, folder)
        for path in [*folder.glob("*.pt"), folder / "evaluation.json"]:
            if path.name not in checkpoints:
                path.unlink()
        return quick(folder.parent), folder

    return make


# ---------------------------------------------------------------------------------------------------- a whole run


def test_a_run_says_what_it_does_in_few_lines(whole):
    assert whole.code == 0, whole.err
    assert whole.err == ""  # no progress bars, no warnings
    assert "\r" not in whole.out
    out = whole.out.splitlines()
    assert [line.split("  ")[0] for line in out if line.startswith("epoch ") and "loss" in line] == [
        "epoch 1/3",
        "epoch 2/3",
        "epoch 3/3",
    ]
    first = float(re.search(r"epoch 1/3  loss (\S+)", whole.out)[1])
    assert first == pytest.approx(sum(loss for step, loss in losses(whole.folder).items() if step <= 30) / 30, abs=1e-4)
    assert len(out) < 25
    assert "tiny: 240 images of 16 px, 10 classes, scored on 60 images of the split val; on cpu" in whole.out
    assert f"python Export.py {whole.folder}" in out[-2]
    assert out[-3].endswith(str(whole.folder))


def test_a_run_records_its_flags_and_versions(whole, tree):
    record = json.loads((whole.folder / "args.json").read_text())
    assert record["args"]["lr"] == 0.1
    assert record["args"]["data"] == str(tree)
    assert record["args"]["opt"] == "SGD"
    (start,) = record["starts"]
    assert "TrainSimCLR.py --data" in start["command"]
    assert start["torch"] == torch.__version__
    assert {"revision", "started", "python", "torchvision", "device"} <= start.keys()


def test_a_run_logs_every_step_and_its_scores(whole):
    *training, scores = lines(whole.folder)
    assert [line["step"] for line in training] == list(range(1, 91))
    assert [line["epoch"] for line in training] == [step // 30 for step in range(1, 91)]
    for line in training:
        assert line["loss"] > 0
        assert line["views_per_second"] > 0
        assert 0 <= line["data_wait"] <= 1
        stages = [line[f"time_{stage}"] for stage in ("views", "forward", "loss", "backward")]
        assert min(stages) > 0
        assert line["data_wait"] + sum(stages) == pytest.approx(1, abs=1e-3)
    lr = [line["lr"] for line in training]
    assert lr[29] == pytest.approx(0.1)
    assert lr[0] < lr[10] < lr[29] > lr[50] > lr[89]
    assert [lr[0], lr[89]] == pytest.approx([0.1 / 30, 0], abs=1e-12)  # from the first step of the ramp to 0
    seconds = [line["seconds"] for line in training]
    assert seconds == sorted(seconds)
    result = json.loads((whole.folder / "evaluation.json").read_text())
    assert scores["step"] == 90
    assert scores["epoch"] == 3
    assert "seconds" in scores
    assert (scores["knn"], scores["linear"]) == (result["knn"], result["linear"])
    assert {name: scores[name] for name in result["pairs"]} == result["pairs"]
    assert result["pairs"].keys() == {"alignment", "uniformity", "embedding_std", "cosine_real"}


def test_a_run_ends_with_all_scores(whole):
    result = json.loads((whole.folder / "evaluation.json").read_text())
    assert all(0 <= result[name] <= 1 for name in SCORES)
    assert (result["n_test"], result["split"], result["epoch"], result["chance"]) == (60, "val", 3, 0.1)
    assert result["protocol"]["knn_k"] == 20
    assert f"{100 * result['linear']:.2f} %" in whole.out


def test_a_run_saves_what_can_be_read_without_trust(whole):
    assert sorted(path.name for path in whole.folder.glob("*.pt")) == ["1.pt", "2.pt", "3.pt", "encoder.pt"]
    for epoch in (1, 2, 3):
        state = torch.load(whole.folder / f"{epoch}.pt", weights_only=True)
        assert (state["epoch"], state["step"], state["args"]["lr"]) == (epoch, 30 * epoch, 0.1)
    assert different(whole.folder / "2.pt", whole.folder / "3.pt")
    with Image.open(whole.folder / "pairs.png") as pairs:
        assert pairs.width > 5 * (8 * 17 + 1)  # enlarged, with captions on the left
        assert pairs.height == 5 * (2 * 17 + 1)


def check_whole_board(folder):
    """TensorBoard shows the numbers of metrics.jsonl, the pairs, the flags, and lines to compare the scores with."""
    events = check_board(folder, "Pairs")
    assert {"Loss/train", "Train/lr", "Accuracy/knn", "Accuracy/linear"} <= set(events.Tags()["scalars"])
    assert "pairs" in events.Tags()["images"]
    assert losses(folder).keys() >= {1}, "no loss of the first step"
    shown = flags_on_board(folder)
    stored = json.loads((folder / "args.json").read_text())["args"]
    for name in ("epochs", "lr", "seed", "backbone"):
        assert shown[name] == stored[name]
    assert shown["data"] == f"tiny ({stored['data']})"
    result = json.loads((folder / "evaluation.json").read_text())
    for name in ("chance", "untrained", "pixels"):
        events = EventAccumulator(str(folder / name)).Reload()
        wanted = 100 * result["chance" if name == "chance" else f"{name}_knn"]
        assert [event.value for event in events.Scalars("Accuracy/knn")[:2]] == pytest.approx([wanted, wanted])


def test_tensorboard_shows_the_same_numbers(whole):
    check_whole_board(whole.folder)
    assert list(whole.folder.rglob("tensors.tsv")), "no embedding for the projector"


# ---------------------------------------------------------------------------------------------------- a second start


def test_a_second_start_is_refused_and_touches_nothing(whole, cli):
    before = content(whole.folder)
    one_error(cli(whole.argv), whole.folder, "--resume auto", "--suffix")
    assert content(whole.folder) == before
    assert only_run(whole.models_dir) == whole.folder


def test_a_finished_run_is_not_trained_again(unfinished, cli):
    argv, folder = unfinished("1.pt", "2.pt", "3.pt", "evaluation.json")
    before = content(folder)
    done = cli([*argv, "--resume", "auto"])
    assert done.code == 0
    assert "complete" in done.out
    assert "  loss " not in done.out
    after = content(folder)
    for name in ("1.pt", "2.pt", "3.pt", "evaluation.json"):
        assert after[name] == before[name]
    assert after["metrics.jsonl"][1] == before["metrics.jsonl"][1]


def test_a_run_killed_before_its_scores_is_scored(unfinished, cli, whole):
    argv, folder = unfinished("3.pt")
    assert cli([*argv, "--resume", "auto"]).code == 0
    assert (folder / "evaluation.json").read_text() == (whole.folder / "evaluation.json").read_text()


def test_a_dry_run_says_what_it_takes_and_writes_nothing(quick, tmp_path, cli):
    done = cli(quick(tmp_path / "models", "--dry_run"))
    assert (done.code, done.err) == (0, "")
    assert "90 steps of 8 images x 2 views" in done.out
    assert "training takes about" in done.out
    short = cli(quick(tmp_path / "models", "--dry_run", "--bs", "120", "--epochs", "1", "--n_ramp", "0"))
    assert re.search("2 steps .*training takes about [1-9]", short.out, re.DOTALL), short.out
    assert not (tmp_path / "models").exists()
    one_error(cli(quick(tmp_path / "models", "--dry_run", "--loss", "align")), "--loss align", "--num_views 3")


def test_an_epoch_whose_scoring_was_killed_is_scored(unfinished, cli):
    argv, folder = unfinished("1.pt", "2.pt")
    argv += ["--eval_iter", "1", "--no-baselines", "--resume", "auto"]
    assert cli(argv).code == 0
    assert [line["step"] for line in lines(folder) if "knn" in line] == [60, 90]  # 1.pt was not resumed


# ---------------------------------------------------------------------------------------------------- exact resume


@pytest.fixture
def interrupted(quick, tmp_path, cli, monkeypatch):
    """(signal) -> (flags, folder, outcome) of a run that gets this signal in its 35th step."""

    def make(number):
        log_step = TrainSimCLR.log_step

        def signaled(trainer, *rest):
            log_step(trainer, *rest)
            if trainer.step == 35:
                signal.raise_signal(number)

        argv = quick(tmp_path)
        with monkeypatch.context() as patched:
            patched.setattr(TrainSimCLR, "log_step", signaled)
            done = cli(argv)
        return argv, only_run(tmp_path), done

    return make


def check_same_run(folder, whole):
    """The run ended as the uninterrupted one did, bit for bit."""
    assert different(folder / "3.pt", whole.folder / "3.pt") == []
    assert losses(folder) == losses(whole.folder)
    assert (folder / "evaluation.json").read_text() == (whole.folder / "evaluation.json").read_text()
    check_whole_board(folder)


def test_sigkill_then_resume_auto_gives_the_same_bits(quick, whole, tmp_path, cli, fork):
    argv = quick(tmp_path / "models")
    child = fork(TrainSimCLR, argv)
    wait_for(lambda: count_lines(tmp_path, "models/*/metrics.jsonl") >= 40, child)
    child.kill()
    assert child.code == -signal.SIGKILL
    folder = only_run(tmp_path / "models")
    assert (folder / "1.pt").exists()
    assert not (folder / "3.pt").exists()
    wait_for_next_second(folder)
    done = cli([*argv, "--resume", "auto"])
    assert done.code == 0
    assert "continuing at step" in done.out
    check_same_run(folder, whole)


def test_sigterm_saves_inside_the_epoch_and_resume_auto_gives_the_same_bits(interrupted, whole, cli):
    argv, folder, done = interrupted(signal.SIGTERM)
    assert (done.code, done.err) == (0, "")
    assert sorted(path.name for path in folder.glob("*.pt")) == ["1+5.pt", "1.pt"]
    assert str(folder / "1+5.pt") in done.out
    assert not (folder / "evaluation.json").exists()
    assert losses(folder).keys() == set(range(1, 36))
    chance = EventAccumulator(str(folder / "chance")).Reload().Scalars("Accuracy/linear")
    assert [(point.step, round(point.value)) for point in chance] == [(0, 10), (90, 10)]  # shown from the start
    done = cli([*argv, "--resume", "auto"])
    assert done.code == 0
    assert "continuing at step 35:" in done.out
    check_same_run(folder, whole)


def test_ctrl_c_saves_and_resume_file_needs_no_other_flags(interrupted, whole, cli):
    _, folder, done = interrupted(signal.SIGINT)
    assert (done.code, done.err) == (130, "")
    assert str(folder / "1+5.pt") in done.out
    assert cli(["--resume", folder / "1+5.pt"]).code == 0
    assert different(folder / "3.pt", whole.folder / "3.pt") == []
    assert losses(folder).items() <= losses(whole.folder).items()


def test_a_damaged_checkpoint_is_passed_over(unfinished, whole, cli):
    argv, folder = unfinished("1.pt", "2.pt", "3.pt")
    (folder / "3.pt").write_bytes((folder / "3.pt").read_bytes()[:100_000])
    done = cli([*argv, "--resume", "auto"])
    assert done.code == 0
    assert "passed over" in done.out
    assert str(folder / "3.pt") in done.out
    assert "continuing at step 60" in done.out
    check_same_run(folder, whole)


def test_resume_auto_starts_where_there_is_nothing(quick, tmp_path, cli):
    done = cli(quick(tmp_path, "--resume", "auto", "--epochs", "1", "--n_ramp", "0", "--bs", "60", "--no-baselines"))
    assert done.code == 0
    assert "starting" in done.out
    assert (only_run(tmp_path) / "1.pt").exists()


def test_resume_with_another_flag_is_refused(whole, cli):
    before = content(whole.folder)
    done = cli(["--resume", str(whole.folder / "2.pt"), "--lr", "0.2", "--device", "cpu"])
    one_error(done, "--lr 0.2", "0.1")
    assert "--bs" not in done.err
    assert content(whole.folder) == before


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated"])
def test_resume_of_what_is_no_checkpoint_is_one_line(whole, tmp_path, cli, damage):
    file = tmp_path / "7.pt"
    if damage != "missing":
        file.write_bytes((whole.folder / "1.pt").read_bytes()[: 0 if damage == "empty" else 100_000])
    one_error(cli(["--resume", str(file)]), file)
    assert {path.name for path in tmp_path.iterdir()} <= {"7.pt"}


# ---------------------------------------------------------------------------------------------------- no influence


@pytest.mark.parametrize(
    "more, log_iter, scored, saved",
    [
        ("--eval_iter 1", 1, [1, 2, 3], [1, 2, 3]),
        ("--log_iter 7 --save_iter 0 --n_workers 2 --no-baselines", 7, [3], [3]),
        ("--log_iter 40 --save_iter 2 --eval_iter 2", 40, [2, 3], [2, 3]),
    ],
)
def test_how_a_run_is_watched_and_fed_changes_no_bit(quick, whole, tmp_path, cli, more, log_iter, scored, saved):
    done = cli(quick(tmp_path, "--storage", "stream", *more.split()))
    assert done.code == 0, done.err
    folder = only_run(tmp_path)
    assert folder.name == whole.folder.name
    assert different(folder / "3.pt", whole.folder / "3.pt") == []
    assert losses(folder).items() <= losses(whole.folder).items()
    logged = [step for step in range(1, 91) if step % log_iter == 0 or step == 1 or step % 30 == 0]
    assert list(losses(folder)) == logged  # the first one and the last one of an epoch as well
    scores = [line for line in lines(folder) if "knn" in line]
    assert [line["epoch"] for line in scores] == scored
    names = sorted(path.name for path in folder.glob("*.pt"))
    assert names == [*(f"{epoch}.pt" for epoch in saved), "encoder.pt"]
    in_table = 1 if "--no-baselines" in more else 3
    epochs = [line for line in done.out.splitlines() if "  loss " in line]
    assert len(epochs) == 3
    assert all(re.search(r"  waiting for images \d+ %(  knn|$)", line) for line in epochs)
    assert "waiting" not in whole.out  # its images are in memory
    assert done.out.count("linear ") == len(scores) - 1 + in_table  # the others stand in the lines of their epochs


def test_the_seed_decides(quick, tmp_path, cli):
    short = ("--epochs", "1", "--n_ramp", "0", "--bs", "120", "--no-baselines")
    for seed in (1, 2):  # that the same seed gives the same bits is shown by the tests above
        assert cli(quick(tmp_path, *short, "--seed", str(seed))).code == 0
    one, other = tmp_path.iterdir()
    assert different(one / "1.pt", other / "1.pt")
    assert losses(one)[1] != losses(other)[1]


# ---------------------------------------------------------------------------------------------------- what goes wrong


def all_finite(file):
    """Whether the weights and statistics of a checkpoint are finite."""
    state = torch.load(file, weights_only=True)
    return all(value.isfinite().all() for part in ("encoder", "head") for value in state[part].values())


def test_a_rate_that_explodes_stops_the_run(quick, tmp_path, cli):
    done = cli(quick(tmp_path, "--lr", "1e18"))
    one_error(done, "epoch 1, step", "not finite", "--lr 1e+18", "--n_ramp", "--temp", "last good checkpoint: none")
    assert not list(tmp_path.rglob("*.pt"))


def test_weights_that_overflow_in_the_last_step_are_not_saved(quick, tmp_path, cli):
    done = cli(quick(tmp_path, "--lr", "1e39", "--epochs", "1", "--n_ramp", "0", "--bs", "240"))
    (line,) = lines(only_run(tmp_path))
    assert math.isfinite(line["loss"])
    one_error(done, "epoch 1, step", "not finite")
    assert not list(tmp_path.rglob("*.pt"))


def test_a_loss_that_is_not_finite_names_the_last_good_checkpoint(quick, tmp_path, cli, monkeypatch):
    steps = []
    contrastive = Losses.contrastive

    def broken(*args):
        steps.append(1)
        return contrastive(*args) * (math.inf if len(steps) == 45 else 1)

    monkeypatch.setattr(Losses, "contrastive", broken)
    done = cli(quick(tmp_path, "--log_iter", "1000"))
    (saved,) = tmp_path.rglob("*.pt")
    assert saved.name == "1.pt"
    assert all_finite(saved)
    one_error(done, "epoch 2, step", f"last good checkpoint: {saved}")


def test_a_collapse_stops_the_run_after_its_first_epoch(quick, tmp_path, cli, monkeypatch):
    def collapsed(z):
        return {"embedding_std": torch.tensor(0.001)}

    monkeypatch.setattr(Losses, "view_statistics", collapsed)
    done = cli(quick(tmp_path))
    (saved,) = tmp_path.rglob("*.pt")
    causes = ("--temp 0.2", "--aug full")
    one_error(done, "collapsed", "0.0010", "epoch 2, step", *causes, f"last good checkpoint: {saved}")
    assert len(lines(only_run(tmp_path))) == 31


BAD = {
    "--data nosuch": ("--data nosuch", "cifar10"),
    "--data EMPTY": ("EMPTY", "no image"),
    "--data ONLYTRAIN --eval test": ("ONLYTRAIN/test",),
    "--bs 241": ("--bs 241", "240"),
    "--bs 0": ("--bs", "at least 2"),
    "--epochs 0": ("--epochs", "at least 1"),
    "FOLDER": ("FOLDER: a word without a flag",),
    "shapes": ("shapes: a word without a flag: images are given by --data shapes",),
    "--device gpu": ("--device gpu: torch has no such device",),
    "--pair gen_gen": ("--pair: this flag is one of TrainISICLE.py",),
    "--periods=3": ("--periods=3: this flag is one of TrainCamNet.py",),
    "--epoch 3": ("--epoch", "did you mean --epochs?"),
    "--batch_size 3": ("--batch_size: no such flag: did you mean --bs?",),
    "--nosuch 1": ("--nosuch: no such flag; --help",),
    "--data cifar": ("--data cifar", "did you mean cifar10?"),
    "--chunk_views -1": ("--chunk_views", "at least 0"),
    "--chunk_views 1": ("--chunk_views 1", "batch normalization", "use 3 or more, or 0"),
    "--n_ramp 3": ("--n_ramp 3", "--epochs 3", "use 0.3"),
    "--n_ramp nan": ("--n_ramp",),
    "--temp 0": ("--temp",),
    "--crop_min 2": ("--crop_min", "from 0.001 to 1"),
    "--lr fast": ("--lr", "'fast'"),
    "--opt LARS": ("--opt", "SGD"),
    "--device cuda:99": ("--device cuda:99", "--device auto"),
    "--models_dir FILE": ("FILE",),
    "--models_dir /proc/nowhere": ("/proc/nowhere",),
    f"--suffix {'s' * 61}": ("--suffix", "60"),
    f"--opt {'s' * 9999}": ("--opt", "choose from SGD, Adam"),
    f"--{'s' * 9999}": ("no such flag",),
    f"--lr {'s' * 9999}": ("--lr", "is no number"),
    f"--data {'s' * 9999}": ("File name too long",),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_flags_are_one_line_and_leave_nothing(quick, tree, tmp_path, cli, bad):
    models_dir, only_train = tmp_path / "models", tmp_path / "ONLYTRAIN"
    only_train.mkdir()
    (only_train / "train").symlink_to(tree / "train")
    (tmp_path / "EMPTY" / "train" / "class").mkdir(parents=True)
    (tmp_path / "FILE").write_text("")
    given = [str(tmp_path / word) if word in ("EMPTY", "ONLYTRAIN", "FILE") else word for word in bad.split()]
    done = cli(quick(models_dir, *given))
    one_error(done, *BAD[bad])
    assert len(done.err) < 1200
    assert not models_dir.exists()
    assert (tmp_path / "FILE").read_text() == ""


def test_a_full_disk_is_one_line_and_spares_the_last_checkpoint(unfinished, cli):
    argv, folder = unfinished("1.pt")
    before = (folder / "1.pt").read_bytes()
    with no_file_larger_than(len(before) // 2):
        done = cli([*argv, "--resume", "auto"])
    one_error(done, folder / "2.pt", "cannot write")
    assert [path.name for path in folder.glob("*.pt")] == ["1.pt"]
    assert not list(folder.glob(".*"))
    assert (folder / "1.pt").read_bytes() == before


# ---------------------------------------------------------------------------------------------------- variants


@pytest.mark.parametrize(
    "more",
    [
        "--num_views 3 --loss lin",
        "--lars --lr 1",
        "--lars --opt Adam --lr 1 --trust 0.1",
        "--opt Adam --lr 0.001 --no-proj_norm",
        "--aug none --gray_p 1",
        "--chunk_views 50",
    ],
)
def test_variants_train(quick, tmp_path, cli, more):
    short = ("--epochs", "1", "--n_ramp", "0", "--bs", "60", "--no-baselines")
    done = cli(quick(tmp_path, *short, *more.split()))
    assert done.code == 0, done.err
    folder = only_run(tmp_path)
    assert all(math.isfinite(line["loss"]) for line in lines(folder) if "loss" in line)
    assert all_finite(folder / "1.pt")
    views = 3 if "num_views" in more else 2
    with Image.open(folder / "pairs.png") as pairs:
        assert pairs.height == 5 * (views * 17 + 1)


def test_unlabeled_images_train_and_are_not_scored(quick, tree, tmp_path, cli):
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in (tree / "val").rglob("*.png"):
        shutil.copy(path, flat / f"{path.parent.name}-{path.name}")
    done = cli(quick(tmp_path / "models", "--data", str(flat), "--eval_iter", "1"))
    assert done.code == 0
    assert "too few labels: nothing to score" in done.out
    assert done.err == ""
    folder = only_run(tmp_path / "models")
    assert len(losses(folder)) == 3 * (60 // 8)
    measured = [line for line in lines(folder) if "loss" not in line]
    assert [line["epoch"] for line in measured] == [1, 2, 3]
    assert all("alignment" in line and "knn" not in line for line in measured)
    assert (folder / "3.pt").exists()
    assert not (folder / "evaluation.json").exists()


def first_losses(argv, steps):
    """The losses of the first steps of a run with these flags, without a run folder."""
    args = TrainSimCLR.get_args(argv)
    TrainSimCLR.adjust_flags(args, world=1)
    split = Flags.splits_for(args, "cpu").train
    trainer = TrainSimCLR.Trainer(args, split, TrainSimCLR.SamePair(2), torch.device("cpu"))
    trainer.net.train()
    return [trainer.update(*batch)[0].item() for batch, _ in zip(trainer.batches(), range(steps))]


def test_bf16_keeps_the_loss_to_two_percent(quick, tmp_path):
    same = ("--bs", "60", "--temp", "0.5", "--precision")
    full, half = (first_losses(quick(tmp_path, *same, kind), 4) for kind in ("fp32", "bf16"))
    assert half != full
    assert half == pytest.approx(full, rel=2e-2)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on the CPU: no g++")
@torch._inductor.config.patch(compile_threads=1)  # in this process, which has imported torch
def test_compile_keeps_the_loss_to_1e_4(quick, tmp_path, monkeypatch):
    def short_net(*_):  # without stages: the compiler takes ten seconds for each
        net = Backbones.ResNet8()
        net.stages = nn.Identity()
        net.num_features = 32
        return net

    monkeypatch.setattr(Flags, "build_encoder", short_net)
    # without vector instructions: to find out which ones there are, torch compiles half a dozen programs
    monkeypatch.setattr(torch._inductor.cpu_vec_isa, "valid_vec_isa_list", list)
    same = ("--bs", "60", "--precision", "fp32")
    plain, compiled = (first_losses(quick(tmp_path, *same, *kind), 2) for kind in ((), ("--compile",)))
    assert compiled == pytest.approx(plain, rel=1e-4)


# ---------------------------------------------------------------------------------------------------- chunks


@pytest.fixture
def small_trainer(monkeypatch):
    """(layers, --bs, *flags) -> Trainer of an encoder of these layers and a linear head, on 64 images of 16 pixels."""

    def make(layers, bs, *more):
        def build(*_):
            encoder = nn.Sequential(*layers())
            encoder.num_features = 32
            return encoder

        monkeypatch.setattr(Flags, "build_encoder", build)
        fixed = "--device cpu --size 16 --no-proj_norm --epochs 1 --precision fp32"
        args = TrainSimCLR.get_args([*fixed.split(), "--bs", str(bs), *more])
        TrainSimCLR.adjust_flags(args, world=1)
        images = torch.randint(256, (64, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        split = Split(images, torch.zeros(64, dtype=torch.int64), ["one"])
        trainer = TrainSimCLR.Trainer(args, split, TrainSimCLR.SamePair(2), torch.device("cpu"))
        trainer.net.train()
        return trainer

    return make


@pytest.fixture
def step(small_trainer):
    """(the same) -> (trainer after one step, its loss)."""

    def take(*description):
        trainer = small_trainer(*description)
        loss, *_ = trainer.update(*next(trainer.batches()))
        return trainer, loss

    return take


def plain_layers():
    """An encoder without batch normalization and dropout."""
    return [nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 7 * 7, 32)]


def chunk_layers():
    """An encoder whose output depends on the chunk and on random numbers."""
    return [nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.Flatten(), nn.Dropout(0.5), nn.Linear(8 * 7 * 7, 32)]


def check_gradients(trainer, other, **tolerance):
    """Two trainers have the same gradients, none of which is zero."""
    for (name, one), two in zip(trainer.net.named_parameters(), other.net.parameters()):
        assert two.grad.abs().sum() > 0, name
        torch.testing.assert_close(one.grad, two.grad, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def test_a_resumed_run_has_the_random_numbers_of_the_net_as_well(step, small_trainer, tmp_path):
    trainer, _ = step(chunk_layers, 16)  # with dropout
    file = trainer.save(tmp_path)
    batch = next(trainer.batches())
    trainer.update(*batch)
    torch.manual_seed(99)
    resumed = small_trainer(chunk_layers, 16)
    resumed.load(file)
    resumed.update(*next(resumed.batches()))
    assert all(map(torch.equal, trainer.net.state_dict().values(), resumed.net.state_dict().values()))


def test_seed_and_epoch_decide_the_order_and_the_seed_the_views(small_trainer):
    def drawn(seed):
        trainer = small_trainer(plain_layers, 16, "--seed", str(seed))
        orders = []
        for step in (0, trainer.steps_per_epoch):
            trainer.step = step
            orders.append([row for indices, _ in trainer.batches() for row in indices.tolist()])
        return orders, trainer.augment([trainer.train_split.images[:16]] * 2)

    (orders, views), (others, other_views) = drawn(0), drawn(1)
    assert orders[0] != orders[1]
    assert orders[0] != others[0]
    assert orders[1] != others[0]
    assert not torch.equal(views, other_views)


@pytest.mark.parametrize("chunk", [1, 3, 16, 31])
def test_chunks_give_the_gradient_of_the_whole_batch(step, chunk):
    whole, loss = step(plain_layers, 16)
    chunked, chunked_loss = step(plain_layers, 16, "--chunk_views", str(chunk))
    torch.testing.assert_close(chunked_loss, loss, rtol=1e-6, atol=0)
    check_gradients(chunked, whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("chunk", [32, 1000])
def test_one_chunk_has_the_bits_of_none(step, chunk):
    whole, loss = step(chunk_layers, 16)
    chunked, chunked_loss = step(chunk_layers, 16, "--chunk_views", str(chunk))
    assert torch.equal(chunked_loss, loss)
    check_gradients(chunked, whole, rtol=0, atol=0)


def test_both_passes_of_a_chunk_have_the_same_batch_statistics_and_dropout(step, small_trainer):
    chunked, loss = step(chunk_layers, 16, "--chunk_views", "12")
    state = torch.get_rng_state()

    # the same chunks, with one graph of all of them
    reference = small_trainer(chunk_layers, 16)
    _, images = next(reference.batches())
    views = reference.augment([images, images])
    z = torch.cat([reference.net(part) for part in views.tensor_split(3)])
    wanted = Losses.contrastive(z.view(2, 16, -1), reference.args.temp)
    wanted.backward()

    torch.testing.assert_close(loss, wanted.detach(), rtol=1e-6, atol=0)
    check_gradients(chunked, reference, rtol=1e-4, atol=1e-6)
    assert torch.equal(torch.get_rng_state(), state)
    assert chunked.net.encoder[1].num_batches_tracked == 3
    for one, two in zip(chunked.net.buffers(), reference.net.buffers()):
        assert torch.equal(one, two)


def most_saved(step, *flags):
    """The most bytes that a step holds for its backward pass at once, without weights and the loss's matrices."""
    held = [0, 0]  # now, at most

    class Saved:
        def __init__(self, tensor):
            self.tensor = tensor
            self.bytes = tensor.nbytes if tensor.ndim == 4 else 0  # of layers on images
            held[0] += self.bytes
            held[1] = max(held)

        def __del__(self):
            held[0] -= self.bytes

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        step(plain_layers, *flags)
    assert held[0] == 0
    return held[1]


def test_memory_is_that_of_one_chunk(step):
    one_chunk = most_saved(step, 8)
    assert most_saved(step, 64) > 7 * one_chunk
    assert most_saved(step, 64, "--chunk_views", "16") < 1.1 * one_chunk


def test_chunks_in_bf16_have_the_gradient_to_its_rounding(step):
    whole, loss = step(plain_layers, 16, "--precision", "bf16")
    chunked, chunked_loss = step(plain_layers, 16, "--precision", "bf16", "--chunk_views", "8")
    torch.testing.assert_close(chunked_loss, loss, rtol=1e-3, atol=0)
    for one, two in zip(chunked.net.parameters(), whole.net.parameters()):
        assert two.grad.norm() > 0
        assert (one.grad - two.grad).norm() < 0.03 * two.grad.norm()


def test_compiled_chunks_have_the_gradient_of_the_whole_batch(step, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # the compiler takes 25 seconds
    whole, loss = step(plain_layers, 16)
    chunked, chunked_loss = step(plain_layers, 16, "--chunk_views", "16", "--compile")
    torch.testing.assert_close(chunked_loss, loss, rtol=1e-5, atol=0)
    check_gradients(chunked, whole, rtol=1e-3, atol=1e-5)


# ---------------------------------------------------------------------------------------------------- flags


def test_help_shows_the_recipe_of_the_data(cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # no line is broken inside what is looked for
    done = cli(["--data", "cifar10", "--device", "cpu", "--help"])
    assert (done.code, done.err) == (0, "")
    text = " ".join(done.out.split())
    assert "--epochs E passes over the data (default: 100)" in text
    assert Data.DATASETS["cifar10"].on_cpu["epochs"] == 100


def weights_after(argv, steps=3):
    """Return all weights after some steps with these flags, (n,)."""
    args = TrainSimCLR.get_args(argv)
    TrainSimCLR.adjust_flags(args, world=1)
    split = Flags.splits_for(args, torch.device("cpu")).train
    trainer = TrainSimCLR.Trainer(args, split, TrainSimCLR.SamePair(args.num_views), torch.device("cpu"))
    trainer.net.train()
    for batch, _ in zip(trainer.batches(), range(steps)):
        trainer.update(*batch)
    return torch.cat([parameter.detach().flatten() for parameter in trainer.net.parameters()])


@pytest.mark.parametrize(
    "base, more",
    [
        ("--num_views 3", "--loss lin"),
        ("--num_views 3 --loss ntxent", "--gen_weight 3"),
        ("", "--wd 1"),
        ("", "--mm 0.1"),
        ("", "--color_s 0"),
        ("", "--crop_min 0.9"),
        ("", "--gray_p 1"),
        ("", "--blur_p 1"),
        ("", "--temp 1"),
        ("--lars", "--trust 1"),
        ("", "--aug crop"),
        ("--aug crop", "--aug none"),
        ("", "--opt Adam"),
        ("", "--normalize"),
    ],
)
def test_a_flag_changes_what_is_learned(quick, tmp_path, base, more):
    without, having = (weights_after(quick(tmp_path, *base.split(), *words.split())) for words in ("", more))
    assert not torch.equal(without, having)


@pytest.mark.parametrize(
    "stem, size, is_small", [("auto", 32, True), ("auto", 96, False), ("large", 32, False), ("small", 96, True)]
)
def test_the_stem(stem, size, is_small, tree):
    words = ["--data", str(tree), "--size", str(size), "--backbone", "resnet18", "--stem", stem]
    args = TrainSimCLR.get_args(words)
    TrainSimCLR.adjust_flags(args, world=1)
    assert args.small_stem == is_small


@pytest.mark.parametrize("n, changed", [(50_000, {"epochs": 39}), (300, {"bs": 128, "lr": 0.6}), (600, {})])
def test_flags_are_adjusted_to_the_number_of_images(n, changed):
    args = TrainSimCLR.get_args(["--data", "cifar10", "--device", "cpu"])
    wanted = {"bs": 256, "lr": 1.2, "epochs": 100} | changed
    TrainSimCLR.adjust_to_images(args, Data.get_row("cifar10"), n, 1, torch.device("cpu"))
    assert {name: getattr(args, name) for name in wanted} == pytest.approx(wanted)


def test_data_set_and_device_choose_the_defaults():
    cpu = ["--device", "cpu"]
    assert TrainSimCLR.get_args(cpu).epochs == 15
    assert TrainSimCLR.get_args([*cpu, "--data=cifar10"]).epochs == 100
    assert TrainSimCLR.get_args([*cpu, "--data", "cifar10", "--epochs", "7"]).epochs == 7
    assert TrainSimCLR.build_parser("cifar10", "cuda").get_default("epochs") == 100
    assert TrainSimCLR.build_parser("stl10", "cuda").get_default("epochs") == 500


@pytest.mark.parametrize(
    ("flags", "lr"),
    [("", 0.12), ("--epochs 499", 0.12), ("--epochs 500", 0.06), ("--epochs 1000", 0.06), ("--epochs 500 --lr 1", 1)],
)
def test_long_runs_on_a_gpu_have_a_lower_rate(flags, lr, capsys):
    argv = ["--data", "cifar10", *flags.split()]
    parser = TrainSimCLR.build_parser("cifar10", "cuda")
    args = parser.parse_args(argv)
    args.given = Flags.given_flags(parser, argv)
    TrainSimCLR.adjust_to_images(args, Data.get_row("cifar10"), 50_000, 1, torch.device("cuda"))
    assert args.lr == lr
    notice = "--lr 0.12 becomes 0.06: the recipe of cifar10 for 500 epochs and more"
    assert (notice in capsys.readouterr().out) == (lr == 0.06)


def test_long_runs_on_a_cpu_keep_their_rate():
    args = TrainSimCLR.get_args(["--data", "cifar10", "--epochs", "1000", "--device", "cpu"])
    TrainSimCLR.adjust_to_images(args, Data.get_row("cifar10"), 50_000, 1, torch.device("cpu"))
    assert args.lr == 1.2


def test_a_single_image_is_one_line(tmp_path, cli):
    save_shapes(tmp_path / "images", 1, classes=["a"])
    done = cli(["--data", tmp_path / "images", "--models_dir", tmp_path / "m"])
    one_error(done, "1 training image: give at least 2")
    assert not (tmp_path / "m").exists()


def test_a_complete_run_keeps_its_scores_whatever_split_is_asked_for(whole, cli):
    before = (whole.folder / "evaluation.json").read_bytes()
    done = cli([*whole.argv, "--resume", "auto", "--eval", "test"])
    one_error(done, "--eval test", "was scored on val", "python Evaluate.py", "--eval test")
    assert (whole.folder / "evaluation.json").read_bytes() == before


def test_a_checkpoint_outside_its_run_folder_is_not_resumed(whole, tmp_path, cli):
    shutil.copy(whole.folder / "1.pt", tmp_path)
    one_error(cli(["--resume", tmp_path / "1.pt"]), "1.pt", "put it back")
    assert [path.name for path in tmp_path.iterdir()] == ["1.pt"]
    one_error(cli(["--resume", whole.folder / "1.pt", "--suffix", "again"]), "--suffix again", "leave one of them out")


def test_training_begins_from_the_weights_of_init(whole, quick, tmp_path):
    args = TrainSimCLR.get_args(quick(tmp_path, "--init", str(whole.folder / "encoder.pt")))
    TrainSimCLR.adjust_flags(args, world=1)
    split = Flags.splits_for(args, torch.device("cpu")).train
    trainer = TrainSimCLR.Trainer(args, split, TrainSimCLR.SamePair(2), torch.device("cpu"))
    trained = torch.load(whole.folder / "encoder.pt")
    for name, value in trainer.net.encoder.state_dict().items():
        assert torch.equal(value, trained[name]), name


@pytest.mark.parametrize("fault, part", [("flip", "damaged"), ("nan", "not finite"), ("other", "does not fit")])
def test_bad_weights_for_init_are_one_line(whole, quick, tmp_path, cli, fault, part):
    file = tmp_path / "w.pt"
    weights = torch.load(whole.folder / "encoder.pt")
    name = next(name for name in weights if name.endswith("weight"))
    if fault == "nan":
        weights[name][0] = math.nan
    if fault == "other":
        weights["of another net"] = weights.pop(name)
    torch.save(weights, file)
    if fault == "flip":
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    one_error(cli(quick(tmp_path / "m", "--init", file)), f"--init {file}", part)
    assert not (tmp_path / "m").exists()


def test_a_run_goes_on_without_the_weights_that_it_began_with(whole, quick, tmp_path, cli):
    weights = shutil.copy(whole.folder / "encoder.pt", tmp_path / "w.pt")
    argv = quick(tmp_path / "m", "--init", weights, "--epochs", "2", "--bs", "60")
    assert cli(argv).code == 0
    (only_run(tmp_path / "m") / "2.pt").unlink()
    weights.unlink()
    done = cli([*argv, "--resume", "auto"])
    assert done.code == 0, done.err
    assert "no scores of the untrained encoder" in done.out
    assert "kNN on raw pixels" in done.out


@pytest.mark.parametrize("name", ["3.pt", "encoder.pt", "exported.pt"])
def test_an_encoder_that_was_trained_on_other_values_is_told(whole, quick, tmp_path, cli, name):
    file = whole.folder / name
    if name == "exported.pt":
        file = tmp_path / name
        assert cli([whole.folder, "--out", file], Export).code == 0
    argv = quick(tmp_path / "m", "--init", file, "--dry_run")
    assert "--normalize" not in cli(argv).err
    done = cli([*argv, "--normalize"])
    assert done.code == 0, done.err
    assert f"--init {file}: this encoder was trained without --normalize" in done.err


def test_a_folder_is_no_file_of_weights(whole, quick, tmp_path, cli):
    argv = quick(tmp_path / "m", "--init", whole.folder, "--dry_run")
    one_error(cli(argv), f"--init {whole.folder}: it is a folder", "such as encoder.pt")


def test_memory_is_that_of_a_chunk(monkeypatch):
    asked = []
    monkeypatch.setattr(TrainSimCLR.Devices, "check_room", lambda n_bytes, device, what: asked.append(n_bytes))

    def needed(*words):
        args = TrainSimCLR.get_args(["--device", "cpu", "--backbone", "resnet50", "--bs", "4096", *words])
        row = TrainSimCLR.adjust_flags(args, 1)
        TrainSimCLR.check_memory(args, row, 1, torch.device("cpu"))
        return asked[-1]

    whole, chunked, small = needed(), needed("--chunk_views", "64"), needed("--bs", "32")
    assert chunked < whole / 20
    assert chunked > small  # the images of all views
    assert needed("--chunk_views", "9999") == whole


def test_a_run_without_a_size_is_resumed_on_a_device_whose_recipe_has_one(whole, tmp_path):
    folder = shutil.copytree(whole.folder, tmp_path / whole.folder.name)
    state = torch.load(folder / "1.pt")
    state["args"]["size"] = None
    torch.save(state, folder / "1.pt")
    args = TrainSimCLR.get_args(["--resume", str(folder / "1.pt"), "--device", "cpu"])
    assert args.size is None
