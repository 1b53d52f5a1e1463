"""TrainCamNet.py run as its users run it: what it writes, how it stops, and that it goes on in the same bits."""

import copy
import json
import math
import shutil
import signal
import urllib.request
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import (
    check_board,
    content,
    count_lines,
    different,
    flags_on_board,
    lines,
    one_error,
    only_run,
    real_file,
    run,
    save,
    save_shapes,
    tensors,
    wait_for,
    wait_for_next_second,
)
from PIL import Image
from torch._dynamo.testing import CompileCounterWithBackend

import Data
import TrainCamNet
import Utils
from Benchmarks.Forks import start_ranks
from CamNet import IMLE, Measures
from CamNet.Corruptions import Corruption
from Images import Shapes
from Images.Split import Split

FLAGS = (
    "--size 16 --net tiny --corrupt gray+down2 --distance pixels --candidates 4,4 --period 16 --visits 2 --periods 3 "
    "--bs 8 --lr 0.002 --ema 0.9 --n_ramp 2 --n_workers 0 --device cpu --log_iter 1 --sample_iter 2 --save_iter 1"
)
STEPS = 4  # in a period: visits * period / bs
ALONE = ("--no-single_code",)
SHORT = (*ALONE, "--periods", "1", "--visits", "1", "--bs", "16")  # one step
QUALITY = ("diversity_pixels", "diversity_histogram", "diversity_distance", "consistency")
NAMED = """best_of_1 best_of_4 best_of_16 bicubic single_code diversity_pixels jitter_diversity_pixels diversity_style
diversity_noise consistency seconds_search_per_1000 seconds_train_per_1000 peak_memory_bytes distance corrupt fit"""


def numbers(folder):
    """The lines of metrics.jsonl without what the hour and the machine decide."""
    timed = ("seconds", "views_per_second")
    return [{key: value for key, value in line.items() if key not in timed} for line in lines(folder)]


def measures(folder):
    """generator.json without what the hour and the machine decide."""
    result = json.loads((folder / "generator.json").read_text())
    return {key: value for key, value in result.items() if "seconds" not in key and "memory" not in key}


def check_close(found, expected, rel):
    """Two dictionaries agree up to what rounding changes: in histograms more, where it moves values to other bins."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, float):
            value = pytest.approx(value, rel=0.1 if "histogram" in name else rel, abs=1e-6)
        assert found[name] == value, name


def check_samples_on_board(folder):
    """TensorBoard shows the numbers of metrics.jsonl and the samples."""
    tags = check_board(folder, "Train").Tags()
    assert {"Loss/train", "Train/lr", "Train/best_of_1", "Train/search_level1"} <= set(tags["scalars"])
    assert tags["images"] == ["samples"]
    assert flags_on_board(folder)["corrupt"]


def check_same_run(folder, other, name="3.pt"):
    """The stage ended as the uninterrupted one did: the same bits, and each number logged once, in the same order."""
    assert different(folder / name, other / name) == []
    assert numbers(folder) == numbers(other)
    check_samples_on_board(folder)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """10 classes of 8 images of 16 pixels: 72 to train on, 8 held out."""
    root = tmp_path_factory.mktemp("data") / "tiny"
    save_shapes(root / "train", 8, size=16)
    return root


@pytest.fixture(scope="module")
def flags(tree):
    """(models_dir, *more) -> the flags of a run of 3 periods of 4 steps that logs all and saves each period."""
    first = ["--data", str(tree), "--data_dir", str(tree.parent / "cache"), *FLAGS.split()]
    return lambda models_dir, *more: [*first, "--models_dir", str(models_dir), *more]


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """A finished run and its baseline, made by their own process: .folder .models_dir .code .out .err .argv."""
    models_dir = tmp_path_factory.mktemp("whole")
    argv = flags(models_dir)
    done = run("TrainCamNet.py", *argv)
    return SimpleNamespace(folder=only_run(models_dir), models_dir=models_dir, argv=argv, **vars(done))


@pytest.fixture
def cli(cli):
    """(argv) -> .code .out .err of TrainCamNet.py with these flags, run in this process."""
    return partial(cli, script=TrainCamNet)


@pytest.fixture
def unfinished(whole, flags, tmp_path):
    """(*removed) -> (flags, folder) of a copy of the whole run without these files."""

    def make(*removed):
        folder = tmp_path / "models" / whole.folder.name
        shutil.copytree(whole.folder, folder)
        for name in removed:
            shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()
        return flags(folder.parent), folder

    return make


# ---------------------------------------------------------------------------------------------------- speed


def small_trainer(*more):
    """A trainer of 10 images of 8 pixels in batches of 4, 4 and 2, and the losses of its first period."""
    args = TrainCamNet.get_args([*FLAGS.split(), "--period", "10", "--bs", "4", "--visits", "3", *ALONE, *more])
    labels = torch.arange(20) % 10
    split = Split(Shapes.draw(labels, 8, torch.Generator().manual_seed(0)), labels, Shapes.CLASSES)
    generator = TrainCamNet.build_generator(args, 8)
    trainer = TrainCamNet.Trainer(args, split, generator, TrainCamNet.Distances.Pixels(), [4], torch.device("cpu"))
    period = trainer.next_period(SimpleNamespace(signal=None), "", quiet=True)
    parts = list(trainer.batches(10))
    assert [len(part) for part in parts] == 3 * [4, 4, 2]
    return trainer, torch.stack([trainer.update(period, part) for part in parts])


def test_the_mapping_has_a_rate_of_its_own():
    trainer, _ = small_trainer("--map_lr", "0.25")
    others, mapping = trainer.optimizer.param_groups
    assert mapping["lr"] == pytest.approx(0.25 * others["lr"])


def test_ema_is_the_mean_over_about_the_steps_so_far():
    trainer, _ = small_trainer()
    period = trainer.next_period(SimpleNamespace(signal=None), "", quiet=True)
    before = copy.deepcopy(trainer.ema)
    step = trainer.step
    trainer.update(period, next(trainer.batches(10)))
    decay = min(trainer.args.ema, (step + 1) / (step + 11))
    for old, mean, new in zip(before.parameters(), trainer.ema.parameters(), trainer.net.parameters()):
        torch.testing.assert_close(mean, decay * old + (1 - decay) * new.detach())


def test_ema_is_the_share_of_the_mean_before():
    trainer, _ = small_trainer("--ema", "0.3")
    period = trainer.next_period(SimpleNamespace(signal=None), "", quiet=True)
    before = copy.deepcopy(trainer.ema)
    trainer.update(period, next(trainer.batches(10)))
    for old, mean, new in zip(before.parameters(), trainer.ema.parameters(), trainer.net.parameters()):
        torch.testing.assert_close(mean, 0.3 * old + 0.7 * new.detach())


@pytest.mark.parametrize("flag, least, most", [("--flip", 0.1, 0.9), ("--no-flip", 0, 0)])
def test_half_of_the_images_are_mirrored_and_others_in_every_period(monkeypatch, flag, least, most):
    trainer, _ = small_trainer(flag)
    trainer.searches = False
    trainer.images_per_period = len(trainer.rows)
    seen = []

    def period(trainer, rows, images, keys):
        seen.append(dict(zip(rows.tolist(), images)))
        return SimpleNamespace(keys=None)

    monkeypatch.setattr(TrainCamNet, "Period", period)
    for index in range(3):
        trainer.step = index * trainer.steps_per_period
        trainer.next_period(SimpleNamespace(signal=None), "", quiet=True)
    mirrored = []
    for images in seen:
        mirrored.append({row for row in images if torch.equal(images[row], trainer.split.images[row].flip(2))})
        straight = {row for row in images if torch.equal(images[row], trainer.split.images[row])}
        assert len(mirrored[-1]) + len(straight) == len(images)
    assert all(least <= len(rows) / len(trainer.rows) <= most for rows in mirrored)
    if most:
        assert mirrored[0] != mirrored[1] or mirrored[1] != mirrored[2]


def test_flags_of_the_search_and_the_net_reach_them(monkeypatch):
    assert small_trainer("--reject", "0.05")[0].search.reject == 0.05
    words = [*FLAGS.split(), "--mapping", "per_level", "--level_input", "output", "--init", "ref"]
    net = TrainCamNet.build_generator(TrainCamNet.get_args(words), 16)
    assert net.config.items() >= {"mapping": "per_level", "level_input": "output", "init": "ref"}.items()

    class Asked(Exception):
        pass

    def build_distance(*given):
        raise Asked(given)

    monkeypatch.setattr(TrainCamNet.Distances, "build_distance", build_distance)
    words = "--data shapes --distance squeeze --lpips_weights w.pth --lpips_side 20 --alpha 0.5 --device cpu"
    with pytest.raises(Asked) as asked:
        TrainCamNet.build(TrainCamNet.get_args(words.split()), torch.device("cpu"))
    assert asked.value.args[0] == ("squeeze", "w.pth", 20, 0.5)


@pytest.mark.parametrize(
    "given, weights, is_there, distance",
    [
        ([], None, False, "pixels"),
        ([], None, True, "squeeze"),
        (["distance"], None, False, "squeeze"),
        ([], "w.pth", False, "squeeze"),
    ],
)
def test_lpips_without_its_weights_becomes_pixels(tmp_path, monkeypatch, capsys, given, weights, is_there, distance):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    if is_there:
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "checkpoints" / TrainCamNet.Distances.FILES["squeeze"]).touch()
    args = SimpleNamespace(distance="squeeze", given=given, lpips_weights=weights)
    TrainCamNet.adjust_distance(args)
    assert args.distance == distance
    assert ("squeeze becomes pixels" in capsys.readouterr().out) == (distance == "pixels")


def test_the_measures_are_those_of_the_averaged_net(monkeypatch):
    trainer, _ = small_trainer()
    trainer.seconds = {"search": 5.0, "train": 1.0}
    trainer.step = 2 * trainer.steps_per_period
    asked = []

    def measure(held, ema, single, jittered):
        asked.append((ema, single))
        return dict.fromkeys(NAMED.split(), 1.0)

    monkeypatch.setattr(TrainCamNet.HeldOut, "measure", measure)
    monkeypatch.setattr(TrainCamNet, "unfit", lambda result: "")
    result = TrainCamNet.measure(trainer, trainer)
    assert asked == [(trainer.ema, trainer.ema)]
    assert result["seconds_search_per_1000"] == pytest.approx(1000 * 5 / (2 * 10))


def test_every_period_and_every_visit_has_an_order_of_its_own(monkeypatch):
    trainer, _ = small_trainer()
    monkeypatch.setattr(trainer, "images_per_period", len(trainer.rows))
    assert trainer.rows_of(0).tolist() != trainer.rows_of(1).tolist()
    trainer.step = 0
    visits = torch.cat(list(trainer.batches(10))).view(3, 10).tolist()
    assert visits[0] != visits[1] != visits[2] != visits[0]


def test_the_compiled_step_is_one_graph_compiled_once_with_the_same_loss(monkeypatch):
    eager, losses = small_trainer("--precision", "fp32")
    assert eager.loss is IMLE.loss
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    graphs = CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=graphs))
    compiled, its_losses = small_trainer("--precision", "fp32", "--compile")
    assert compiled.loss is not IMLE.loss
    assert graphs.frame_count == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    torch.testing.assert_close(its_losses, losses, rtol=1e-3, atol=0)
    assert compiled.net.state_dict().keys() == eager.net.state_dict().keys()


def test_search_is_in_larger_chunks_on_cuda():
    assert TrainCamNet.build_parser("shapes", "cpu").get_default("chunk") == 1024
    assert TrainCamNet.build_parser("shapes", "cuda").get_default("chunk") == 4096
    on_cpu = partial(TrainCamNet.searched_at_once, device=torch.device("cpu"))
    on_cuda = partial(TrainCamNet.searched_at_once, device=torch.device("cuda"))
    assert on_cpu([64, 32, 16], 1024) == on_cpu([1], 1024) == 64
    assert on_cuda([64, 32, 16], 4096) == 256
    assert on_cuda([1], 4096) == 4096
    assert on_cuda([64], 16) == 64


# ---------------------------------------------------------------------------------------------------- a whole run


def test_a_run_says_what_it_does_in_few_lines(whole):
    assert whole.code == 0, whole.err
    assert whole.err == ""  # no progress bars, no warnings
    assert "\r" not in whole.out
    out = whole.out.splitlines()
    stages = [f"period {period}/3" for period in (1, 2, 3)]
    assert [line.split("  ")[0] for line in out if "  loss " in line] == [
        *stages,
        *(f"one code, {stage}" for stage in stages),
    ]
    assert len(out) < 30
    assert all("s left  loss" in line or "min left  loss" in line for line in out if line.startswith("period 1/3"))
    assert not any("left" in line for line in out if line.startswith("period 3/3"))
    assert out[-2].endswith(str(whole.folder))


def test_a_run_leaves_its_files(whole):
    stage = ["1.pt", "2.pt", "3.pt", "args.json", "metrics.jsonl", "samples.png"]
    for folder, more in ((whole.folder, ["generator.json", "single_code"]), (whole.folder / "single_code", [])):
        names = sorted(path.name for path in folder.iterdir() if "tfevents" not in path.name)
        assert names == sorted([*stage, *more])
        assert len(list(folder.glob("*tfevents*"))) == 1
        record = json.loads((folder / "args.json").read_text())
        flags = record["args"]
        assert (flags["candidates"], flags["corrupt"], len(record["starts"])) == ("4,4", "gray+down2", 1)
        assert "TrainCamNet.py --data" in record["starts"][0]["command"]
        for period in (1, 2, 3):
            state = torch.load(folder / f"{period}.pt", weights_only=True)
            assert (state["step"], state["args"]["lr"]) == (STEPS * period, 0.002)
        assert {"generator", "net", "optimizer", "chosen", "total", "config", "seconds"} <= state.keys()
        assert len(tensors(state)) > 300
        check_samples_on_board(folder)


def test_a_run_logs_every_step_and_measures_every_period(whole):
    for folder in (whole.folder, whole.folder / "single_code"):
        log = lines(folder)
        assert all({"step", "epoch", "seconds"} <= line.keys() for line in log)
        assert [line["seconds"] for line in log] == sorted(line["seconds"] for line in log)
        training = [line for line in log if "loss" in line]
        assert [line["step"] for line in training] == list(range(1, 3 * STEPS + 1))
        assert [line["epoch"] for line in training] == [step // STEPS for step in range(1, 3 * STEPS + 1)]
        assert all(0 < line["loss"] < 1 and line["views_per_second"] > 0 for line in training)
        means = [sum(line["loss"] for line in training[k : k + STEPS]) / STEPS for k in range(0, 3 * STEPS, STEPS)]
        assert [line["period_loss"] for line in log if "period_loss" in line] == pytest.approx(means, rel=1e-5)
        lr = [line["lr"] for line in training]
        assert lr[:2] == [0.001, 0.002]
        assert lr[2:] == sorted(lr[2:], reverse=True)
        assert lr[-1] == 0
        searches = [line for line in log if "search_level1" in line]
        assert [(line["step"], line["epoch"]) for line in searches] == [(1, 0), (STEPS + 1, 1), (2 * STEPS + 1, 2)]
        assert all(0 < line[f"search_level{level}"] < 1 for line in searches for level in (1, 2))
        periods = [line for line in log if "best_of_1" in line]
        assert [(line["step"], line["epoch"]) for line in periods] == [(STEPS, 1), (2 * STEPS, 2), (3 * STEPS, 3)]
        assert all(math.isfinite(line[name]) for line in periods for name in ("best_of_1", "best_of_4", *QUALITY))


def test_a_run_shows_held_out_images_and_their_samples(whole, tree):
    split = Data.get_train_split(str(tree), Data.Options(size=16, data_dir=tree.parent / "cache", n_workers=0))
    held_out = torch.randperm(80, generator=torch.Generator().manual_seed(0))[:8]
    corruption = Corruption("gray+down2", 16)
    condition = corruption(split.images[held_out])
    with Image.open(whole.folder / "samples.png") as picture:
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    pixels = pixels[:, -4 * (8 * 17 + 1) :][:, ::4, ::4]  # enlarged, under the names of the columns
    assert pixels.shape == (3, 8 * 17 + 1, 10 * 17 + 1)
    cells = pixels[:, 1:, 1:].unfold(1, 16, 17).unfold(2, 16, 17).permute(1, 2, 0, 3, 4)  # (rows, columns, 3, 16, 16)
    assert cells.shape[:2] == (8, 10)
    assert torch.equal(cells[:, 0], split.images[held_out])
    assert (cells[:, 1] - 255 * corruption.upsample(condition)).abs().max() < 1
    for column in range(2, 10):  # what the corruption keeps is kept, up to 8 bits a pixel
        assert (corruption(cells[:, column]) - condition).abs().max() < 1 / 255
        assert (cells[:, column].float() - cells[:, 0]).abs().mean() > 1
    assert all(not torch.equal(cells[:, column], cells[:, 2]) for column in range(3, 10))


def test_a_run_ends_with_all_measures(whole):
    result = json.loads((whole.folder / "generator.json").read_text())
    assert set(NAMED.split()) <= result.keys()
    words = ("distance", "corrupt", "fit", "n_images", "data_fingerprint")
    values = {key: value for key, value in result.items() if key not in words}
    assert all(isinstance(value, int | float) and 0 <= value < math.inf for value in values.values())
    assert (result["distance"], result["corrupt"], result["n_images"]) == ("pixels", "gray+down2", 8)
    assert result["fit"] is (Measures.unfit(result) is None)
    assert 0 < result["best_of_16"] <= result["best_of_4"] <= result["best_of_1"] < 1
    assert result["single_code_best_of_16"] <= result["single_code_best_of_4"] <= result["single_code"]
    assert {f"single_code_{name}" for name in QUALITY} | {f"jitter_{name}" for name in QUALITY[:3]} <= result.keys()
    assert 0.02 < result["bicubic"] < 0.5
    assert 0.05 < result["jitter_diversity_pixels"] < 0.5
    assert result["consistency"] < 1e-6 < result["bicubic_consistency"]
    assert all(result[f"diversity_{name}"] > 0.001 for name in ("pixels", "style", "noise"))
    assert 2**26 < result["peak_memory_bytes"] < 2**34
    assert f"{result['best_of_16']:.4f}" in whole.out
    assert f"{result['single_code']:.4f}" in whole.out


def test_every_image_takes_part_as_often_and_held_out_ones_never(flags, tmp_path):
    args = TrainCamNet.get_args(flags(tmp_path))
    device = torch.device("cpu")
    trainer = TrainCamNet.Trainer(args, *TrainCamNet.build(args, device), [4], device)
    held_out = set(trainer.held_out.tolist())
    assert len(held_out) == 8
    for periods in (range(9), range(9, 18)):  # two rounds: 2 * 72 images in 9 periods of 16
        rows = torch.cat([trainer.rows_of(period) for period in periods])
        assert all(len(trainer.rows_of(period)) == 16 for period in periods)
        assert rows.bincount(minlength=80).tolist() == [0 if row in held_out else 2 for row in range(80)]
    for trainer.step in (0, STEPS):
        parts = list(trainer.batches(16))
        assert [len(part) for part in parts] == [8] * STEPS
        assert torch.cat(parts).bincount().tolist() == [2] * 16  # --visits
        trainer.step += 3
        assert [part.tolist() for part in trainer.batches(16)] == [part.tolist() for part in parts[3:]]


# ---------------------------------------------------------------------------------------------------- two processes


def test_two_processes_train_the_generator_of_one(flags, whole, tmp_path):
    ranks = start_ranks(TrainCamNet, flags(tmp_path), tmp_path)
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].output() + ranks[1].output()
    assert ranks[1].output() == ""
    (folder,) = tmp_path.glob("TrainCamNet-*")
    assert folder.name == whole.folder.name
    assert len(ranks[0].output().splitlines()) == len(whole.out.splitlines())
    for name in ("", "single_code"):
        one, two = (each / name for each in (whole.folder, folder))
        assert len(list(two.glob("*tfevents*"))) == 1
        assert [line["step"] for line in lines(two)] == [line["step"] for line in lines(one)]
        for line, other in zip(numbers(one), numbers(two)):
            check_close(other, line, 0.02)
        chosen = [torch.load(each / "1.pt", weights_only=True)["chosen"] for each in (one, two)]
        assert torch.equal(*chosen)  # later codes depend on the weights, which differ by rounding
    check_close(measures(folder), measures(whole.folder), 0.1)


def test_a_run_of_two_processes_goes_on_in_one(flags, whole, tmp_path, cli):
    argv = flags(tmp_path / "models", *ALONE)
    ranks = start_ranks(TrainCamNet, argv, tmp_path)
    wait_for(lambda: count_lines(tmp_path, "models/*/metrics.jsonl") >= STEPS + 3, ranks[0])
    ranks[1].kill()
    assert ranks[0].wait() == 2
    one_error(SimpleNamespace(code=2, err=ranks[0].output()), "another process of this run has ended")
    assert cli([*argv, "--resume", "auto"]).code == 0
    assert measures(only_run(tmp_path / "models")).keys() < measures(whole.folder).keys()


# ---------------------------------------------------------------------------------------------------- a second start


def test_a_second_start_is_refused_and_touches_nothing(whole, cli):
    before = content(whole.folder)
    one_error(cli(whole.argv), whole.folder, "--resume auto", "--suffix")
    assert content(whole.folder) == before
    assert only_run(whole.models_dir) == whole.folder


@pytest.mark.parametrize("resume", ["auto", "FILE"])
def test_a_finished_run_shows_its_measures_and_changes_no_file(unfinished, cli, resume):
    argv, folder = unfinished()
    before = content(folder)
    done = cli([*argv, "--resume", "auto"] if resume == "auto" else ["--resume", str(folder / "3.pt")])
    assert (done.code, done.err) == (0, "")
    assert "complete" in done.out
    assert "  loss " not in done.out
    assert f"{json.loads((folder / 'generator.json').read_text())['best_of_16']:.4f}" in done.out
    assert content(folder) == before


def test_a_run_killed_before_its_measures_makes_them(unfinished, cli, whole):
    argv, folder = unfinished("generator.json")
    done = cli([*argv, "--resume", "auto"])
    assert done.code == 0
    assert "period 3/3" not in done.out
    assert measures(folder) == measures(whole.folder)


def test_a_damaged_checkpoint_is_passed_over(unfinished, cli, whole):
    argv, folder = unfinished("single_code/1.pt")
    file = folder / "3.pt"
    file.write_bytes(file.read_bytes()[:100_000])
    done = cli([*argv, "--resume", "auto"])
    assert done.code == 0
    assert "passed over" in done.out
    assert f"continuing at step {2 * STEPS}:" in done.out
    assert measures(folder) == measures(whole.folder)
    check_same_run(folder, whole.folder)


# ---------------------------------------------------------------------------------------------------- exact resume


@pytest.fixture
def interrupted(flags, tmp_path, cli, monkeypatch):
    """(signal, *more) -> (flags, folder, outcome) of a run that gets this signal in the second step of period 2."""

    def make(number, *more):
        update = TrainCamNet.Trainer.update

        def signaled(trainer, *args):
            loss = update(trainer, *args)
            if trainer.step == STEPS + 2:
                signal.raise_signal(number)
            return loss

        argv = flags(tmp_path, *more)
        with monkeypatch.context() as patched:
            patched.setattr(TrainCamNet.Trainer, "update", signaled)
            done = cli(argv)
        return argv, only_run(tmp_path), done

    return make


def test_sigterm_saves_inside_the_period_and_resume_auto_gives_the_same_bits(interrupted, whole, cli):
    argv, folder, done = interrupted(signal.SIGTERM, *ALONE)
    assert (done.code, done.err) == (0, "")
    assert sorted(path.name for path in folder.glob("*.pt")) == ["1+2.pt", "1.pt"]
    assert str(folder / "1+2.pt") in done.out
    assert not (folder / "generator.json").exists()
    done = cli([*argv, "--resume", "auto"])
    assert done.code == 0
    assert f"continuing at step {STEPS + 2}:" in done.out
    check_same_run(folder, whole.folder)


def test_sigkill_then_resume_auto_gives_the_same_bits(flags, whole, tmp_path, cli, fork):
    argv = flags(tmp_path / "models", *ALONE)
    child = fork(TrainCamNet, argv)
    in_period_2 = STEPS + 4  # lines: the search and the measures of period 1, the search of period 2, a step
    wait_for(lambda: count_lines(tmp_path, "models/*/metrics.jsonl") >= in_period_2, child)
    child.kill()
    assert child.code == -signal.SIGKILL
    folder = only_run(tmp_path / "models")
    assert (folder / "1.pt").exists()
    assert not (folder / "3.pt").exists()
    wait_for_next_second(folder)
    done = cli([*argv, "--resume", "auto"])
    assert done.code == 0
    assert "continuing at step" in done.out
    check_same_run(folder, whole.folder)


def energy_flags(flags, models_dir, *more):
    """The flags of a run by the energy score: without those of a search, and with the distance that it takes."""
    argv = flags(models_dir, "--objective", "energy", *more)
    for name in ("--candidates", "--distance"):
        place = argv.index(name)
        del argv[place : place + 2]
    return argv


@pytest.mark.parametrize(
    "more, parts",
    [
        ("--reject 0.1", ("--reject", "--objective energy")),
        ("--single_code", ("--single_code", "--objective energy")),
        ("--distance squeeze", ("--distance squeeze", "patches")),
    ],
)
def test_flags_that_contradict_the_energy_score_are_refused(flags, tmp_path, cli, more, parts):
    one_error(cli([*energy_flags(flags, tmp_path / "m"), *more.split()]), *parts)
    assert not (tmp_path / "m").exists()


def test_the_energy_score_needs_no_search_and_resumes_to_the_same_bits(flags, tmp_path, cli, monkeypatch):
    monkeypatch.setattr(IMLE.Search, "__call__", None)
    whole = cli(energy_flags(flags, tmp_path / "whole", "--bs", "7", "--visits", "4"))
    assert (whole.code, whole.err) == (0, "")
    assert "two random codes of each in a step" in whole.out

    # a signal in the middle of the second period
    update = TrainCamNet.Trainer.update

    def interrupted(trainer, *arguments):
        if trainer.step == 15:
            signal.raise_signal(signal.SIGTERM)
        return update(trainer, *arguments)

    argv = energy_flags(flags, tmp_path / "models", "--bs", "7", "--visits", "4")
    with monkeypatch.context() as patch:
        patch.setattr(TrainCamNet.Trainer, "update", interrupted)
        assert "1+4.pt" in cli(argv).out
    assert cli([*argv, "--resume", "auto"]).code == 0
    folder = only_run(tmp_path / "models")
    assert different(folder / "3.pt", only_run(tmp_path / "whole") / "3.pt") == []
    assert numbers(folder) == numbers(only_run(tmp_path / "whole"))
    assert json.loads((folder / "args.json").read_text())["args"]["distance"] == "patches"
    assert cli(["--resume", folder / "3.pt"]).code == 0


def test_a_signal_ends_a_run_whose_periods_have_one_step(flags, tmp_path, cli, monkeypatch):
    update = TrainCamNet.Trainer.update

    def interrupted(trainer, *arguments):
        if trainer.step == 1:
            signal.raise_signal(signal.SIGTERM)
        return update(trainer, *arguments)

    monkeypatch.setattr(TrainCamNet.Trainer, "update", interrupted)
    argv = energy_flags(flags, tmp_path / "m", "--bs", "16", "--visits", "1", "--periods", "9", "--save_iter", "0")
    done = cli(argv)
    assert done.code == 0
    assert "interrupted: saved" in done.out
    assert [file.name for file in only_run(tmp_path / "m").glob("*.pt")] == ["2.pt"]


def test_a_dry_run_measures_whole_steps(flags, tmp_path, cli, monkeypatch):
    update = TrainCamNet.Trainer.update
    sizes = set()

    def measured(trainer, period, batch):
        sizes.add(len(batch))
        return update(trainer, period, batch)

    monkeypatch.setattr(TrainCamNet.Trainer, "update", measured)
    monkeypatch.setattr(TrainCamNet, "AT_ONCE", 8)  # images that are searched at once
    assert cli([*flags(tmp_path / "m", *ALONE), "--period", "24", "--bs", "20", "--dry_run"]).code == 0
    assert sizes == {20}


def test_times_are_those_of_the_images_that_were_trained_on(flags, tmp_path, cli):
    argv = [*flags(tmp_path / "m", *ALONE), "--period", "10", "--bs", "8"]  # the second step of a visit has two images
    assert cli(argv).code == 0
    folder = only_run(tmp_path / "m")
    seconds = torch.load(folder / "3.pt")["seconds"]["train"]
    stored = json.loads((folder / "generator.json").read_text())["seconds_train_per_1000"]
    assert stored == pytest.approx(1000 * seconds / (3 * 2 * 10))  # periods, visits, images


def test_ctrl_c_at_the_single_code_and_resume_file_needs_no_other_flags(unfinished, whole, cli, fork):
    argv, folder = unfinished("generator.json", "single_code")
    child = fork(TrainCamNet, [*argv, "--resume", "auto"])
    wait_for(lambda: count_lines(folder, "single_code/metrics.jsonl") >= 2, child)
    child.send(signal.SIGINT)
    assert child.wait() == 130
    (saved,) = (folder / "single_code").glob("*+*.pt")
    assert f"interrupted: saved {saved}" in child.output()
    assert "Traceback" not in child.output()
    assert not (folder / "generator.json").exists()
    one_error(cli(["--resume", str(saved)]), saved, f"a checkpoint of {folder}")
    wait_for_next_second(folder / "single_code")
    assert cli(["--resume", str(folder / "3.pt")]).code == 0
    assert measures(folder) == measures(whole.folder)
    check_same_run(folder, whole.folder)
    check_same_run(folder / "single_code", whole.folder / "single_code")


@pytest.mark.parametrize("number, code, saved", [(signal.SIGTERM, 0, "1.pt"), (signal.SIGINT, 130, "0.pt")])
def test_a_signal_in_the_search_gives_the_search_up(flags, whole, tmp_path, cli, monkeypatch, number, code, saved):
    searches, search = [], IMLE.Search.__call__

    def interrupted(*args):
        searches.append(1)
        if len(searches) == int(saved[0]) + 1:
            signal.raise_signal(number)
        return search(*args)

    monkeypatch.setattr(IMLE.Search, "__call__", interrupted)
    done = cli(flags(tmp_path, *ALONE, "--save_iter", "0"))
    folder = only_run(tmp_path)
    assert done.code == code
    assert f"interrupted: saved {folder / saved}" in done.out
    assert [path.name for path in folder.glob("*.pt")] == [saved]
    assert cli([*flags(tmp_path, *ALONE), "--resume", "auto"]).code == 0
    check_same_run(folder, whole.folder)


def test_a_run_killed_in_its_first_period_begins_again(unfinished, whole, cli):
    argv, folder = unfinished("1.pt", "2.pt", "3.pt", "single_code/1.pt", "generator.json")
    log = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(log[:5]) + log[5][:20])  # a kill can leave half a line
    done = cli([*argv, "--resume", "auto"])
    assert done.code == 0
    assert "starting" in done.out
    check_same_run(folder, whole.folder)


def test_ctrl_c_at_the_measures_keeps_what_is_trained(unfinished, cli, monkeypatch, whole):
    argv, folder = unfinished("generator.json", "single_code/3.pt")
    finish_period = TrainCamNet.finish_period

    def interrupted(*args):
        signal.raise_signal(signal.SIGINT)
        return finish_period(*args)

    with monkeypatch.context() as patched:
        patched.setattr(TrainCamNet, "finish_period", interrupted)
        done = cli([*argv, "--resume", "auto"])
    assert done.code == 130
    assert "interrupted" in done.out
    assert not (folder / "generator.json").exists()
    assert cli([*argv, "--resume", "auto"]).code == 0
    assert measures(folder) == measures(whole.folder)


CONTRADICTING = {
    "--lr 0.1": ("--lr 0.1", "0.002"),
    "--size 32": ("--size 32", "16"),
    "--net small": ("--net small", "tiny"),
    "--candidates 8,8": ("--candidates 8,8", "4,4"),
    "--no-single_code": ("--single_code False",),
}


@pytest.mark.parametrize("other", CONTRADICTING)
def test_resume_with_another_flag_is_refused(whole, cli, other):
    before = content(whole.folder)
    done = cli(["--resume", str(whole.folder / "2.pt"), *other.split()])
    one_error(done, *CONTRADICTING[other])
    assert "--bs" not in done.err
    assert content(whole.folder) == before


def test_the_old_name_of_a_flag_keeps_its_value(unfinished, cli, whole):
    argv, folder = unfinished("generator.json")
    record = json.loads((folder / "args.json").read_text())
    record["args"]["m"] = record["args"].pop("candidates")
    (folder / "args.json").write_text(json.dumps(record))
    state = torch.load(folder / "3.pt", weights_only=True)
    state["args"] = record["args"]
    torch.save(state, folder / "3.pt")
    old = folder.rename(folder.with_name("TrainCamNet-tiny-of_another_version"))
    assert cli([*argv, "--resume", "auto"]).code == 0
    assert only_run(old.parent) == old  # found by its flags
    (old / "generator.json").unlink()
    (old / "args.json").write_text(json.dumps(record))

    done = cli(["--resume", str(old / "3.pt")])
    assert done.code == 0, done.err
    (note,) = [line for line in done.out.splitlines() if "of another version" in line]
    assert note.endswith("3.pt is of another version: its --m is --candidates 4,4 now")
    assert json.loads((old / "args.json").read_text())["args"]["candidates"] == "4,4"
    assert measures(old) == measures(whole.folder)


def test_resume_of_another_net_is_refused(unfinished, cli):
    argv, folder = unfinished("2.pt", "generator.json")
    state = torch.load(folder / "3.pt", weights_only=True)
    state["generator"].pop(next(iter(state["generator"])))
    torch.save(state, folder / "3.pt")
    before = content(folder)
    one_error(cli([*argv, "--resume", "auto"]), folder / "3.pt", "does not fit")
    assert content(folder) == before


def test_resume_after_the_data_has_changed_is_refused(unfinished, tree, tmp_path, cli):
    _, folder = unfinished("generator.json")
    other = shutil.copytree(tree, tmp_path / "other" / tree.name)
    shutil.copy(next(other.rglob("0000.png")), other / "train" / "disc" / "new.png")
    before = content(folder)
    one_error(cli(["--resume", folder / "3.pt", "--data", other]), folder / "3.pt", "80 images", "81")
    assert content(folder) == before


def test_a_run_whose_data_were_moved_goes_on(unfinished, tree, tmp_path, cli, whole):
    _, folder = unfinished("generator.json")
    moved = shutil.copytree(tree, tmp_path / "moved")
    assert cli(["--resume", folder / "3.pt", "--data", moved]).code == 0
    assert measures(folder) == measures(whole.folder)


def test_resume_of_no_generator_is_one_line(tree, tmp_path, cli):
    Utils.save_(tmp_path / "1.pt", args={"data": str(tree), "backbone": "resnet8"})
    one_error(cli(["--resume", str(tmp_path / "1.pt")]), tmp_path / "1.pt")
    one_error(cli(["--resume", str(tmp_path / "2.pt")]), tmp_path / "2.pt", "no checkpoint")
    assert [path.name for path in tmp_path.iterdir()] == ["1.pt"]


# ---------------------------------------------------------------------------------------------------- no influence


def test_how_a_run_is_watched_and_fed_changes_no_bit(flags, whole, tmp_path, cli):
    watched = ("--log_iter", "7", "--save_iter", "0", "--sample_iter", "0")
    done = cli(flags(tmp_path, *ALONE, *watched, "--chunk", "8", "--storage", "stream"))
    assert (done.code, done.err) == (0, "")
    folder = only_run(tmp_path)
    assert [path.name for path in folder.glob("*.pt")] == ["3.pt"]
    assert different(folder / "3.pt", whole.folder / "3.pt") == []
    assert [line["step"] for line in lines(folder) if "loss" in line] == [1, 7]
    expected, result = measures(whole.folder), measures(folder)
    assert not [name for name in result if name != "fit" and result[name] != expected[name]]
    assert not [name for name in result if name.startswith("single_code")]


def test_the_seed_decides(flags, tmp_path, cli):
    for seed in (1, 2):  # that the same seed gives the same bits is shown by the tests above
        assert cli(flags(tmp_path, *SHORT, "--seed", str(seed))).code == 0
    one, other = tmp_path.iterdir()
    assert different(one / "1.pt", other / "1.pt")
    assert numbers(one)[1] != numbers(other)[1]


def test_two_layouts_of_the_same_images_are_the_same_data(flags, tree, tmp_path, cli):
    inside_out = tmp_path / "inside-out"
    for path in (tree / "train").rglob("*.png"):
        target = inside_out / path.parent.name / "train" / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    for index, name in enumerate(("validation", "test")):  # images that a generator must not see
        target = save_shapes(tmp_path / name, 2, size=16, seed=index + 1)
        for path in target.iterdir():
            shutil.copytree(path, inside_out / path.name / name)
    plain, other = tmp_path / "plain", tmp_path / "other"
    for models_dir, data in ((plain, tree), (other, inside_out)):
        done = cli(flags(models_dir, *SHORT, "--data", str(data)))
        assert done.code == 0, done.err
        assert ": 72 images of 16 px" in done.out, done.err
    plain, other = only_run(plain), only_run(other)
    assert different(plain / "1.pt", other / "1.pt") == []
    assert numbers(plain) == numbers(other)
    assert measures(plain) == measures(other)


# ---------------------------------------------------------------------------------------------------- what goes wrong


def test_memory_that_runs_out_in_the_search_is_announced_once(flags, whole, tmp_path, cli, monkeypatch):
    nearest = IMLE.Search._nearest

    def small(self, generator, distance, level, images):
        if images.candidates.numel() > 24:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return nearest(self, generator, distance, level, images)

    monkeypatch.setattr(IMLE.Search, "_nearest", small)
    done = cli(flags(tmp_path, *ALONE))
    announced = [f"warning: out of memory in the search: continuing with --chunk {chunk}" for chunk in (32, 16)]
    assert done.code == 0
    assert done.err.splitlines() == announced  # in each of the three searches
    check_same_run(only_run(tmp_path), whole.folder)


def test_a_rate_that_explodes_stops_the_run(flags, tmp_path, cli):
    done = cli(flags(tmp_path, "--lr", "1e9"))
    one_error(done, "not finite", "--lr 1e+09", "--n_ramp 2", "last good checkpoint: none")
    assert not list(tmp_path.rglob("*.pt"))
    assert not list(tmp_path.rglob("generator.json"))


def test_weights_that_overflow_in_the_last_step_are_not_saved(flags, tmp_path, cli):
    done = cli(flags(tmp_path, *SHORT, "--lr", "1e39"))
    *_, line = lines(only_run(tmp_path))
    assert math.isfinite(line["loss"])
    one_error(done, "period 1, step", "not finite")
    assert not list(tmp_path.rglob("*.pt"))
    assert not list(tmp_path.rglob("generator.json"))


def test_a_loss_that_is_not_finite_names_the_last_good_checkpoint(flags, tmp_path, cli, monkeypatch):
    steps, usual = [], IMLE.loss

    def broken(*args):
        steps.append(1)
        return usual(*args) * (math.inf if len(steps) == STEPS + 3 else 1)

    monkeypatch.setattr(IMLE, "loss", broken)
    done = cli(flags(tmp_path, *ALONE, "--log_iter", "1000"))
    (saved,) = tmp_path.rglob("*.pt")
    assert saved.name == "1.pt"
    one_error(done, "period 2, step", f"last good checkpoint: {saved}")
    assert all(value.isfinite().all() for value in tensors(torch.load(saved, weights_only=True)).values())


BAD = {
    "--size 33": ("--corrupt", "down2", "33"),
    "--size 15 --corrupt gray": ("15",),
    "--size 4": ("--size", "at least 8"),
    "--corrupt blur": ("--corrupt", "blur", "mask<f>"),
    "--corrupt down5": ("--corrupt", "down5", "16"),
    "--corrupt down2+down2": ("--corrupt", "down", "twice"),
    "--distance squeeze --lpips_side 8": ("--lpips_side 8", "17"),
    "--distance squeeze --lpips_weights MISSING": ("--lpips_weights", "MISSING", "--distance pixels"),
    "--distance squeeze --lpips_weights DAMAGED": ("--lpips_weights", "DAMAGED", "--distance pixels"),
    "--candidates 0": ("--candidates", "at least 1"),
    "--objective energy": ("--candidates", "--objective energy"),
    "--candidates 4,x": ("--candidates", "'x'"),
    "--net huge": ("--net", "huge", "tiny"),
    "--data nosuch": ("--data nosuch", "cifar10"),
    "--data EMPTY": ("EMPTY", "no image"),
    "--data NEITHER": ("NEITHER", "no readable image", "CLASS/{train,validation,test}/IMAGE"),
    "--data NINE": ("--data", "NINE", "9 images"),
    "--data UNREADABLE": ("bad.png",),
    "--data shapes --storage stream --device cuda:99": ("--device cuda:99",),
    f"--suffix {'s' * 61}": ("--suffix", "60"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_flags_are_one_line_and_leave_nothing(flags, tree, tmp_path, cli, bad):
    (tmp_path / "EMPTY" / "train").mkdir(parents=True)
    save_shapes(tmp_path / "NINE" / "train", 1, size=16)
    next((tmp_path / "NINE").rglob("*.png")).rename(tmp_path / "tenth.png")
    for empty in [path for path in (tmp_path / "NINE" / "train").iterdir() if not any(path.iterdir())]:
        empty.rmdir()
    shutil.copytree(tree, tmp_path / "UNREADABLE")
    (tmp_path / "UNREADABLE" / "train" / "disc" / "bad.png").write_bytes(b"no image")
    (tmp_path / "DAMAGED").write_bytes(b"no weights")
    shutil.copytree(tree / "train", tmp_path / "NEITHER" / "one" / "too" / "deep")
    words = ("EMPTY", "NEITHER", "NINE", "UNREADABLE", "MISSING", "DAMAGED")
    given = [str(tmp_path / word) if word in words else word for word in bad.split()]
    done = cli(flags(tmp_path / "models", *given))
    one_error(done, *BAD[bad])
    assert done.out == ""
    assert not list((tmp_path / "models").rglob("*"))


def test_weights_that_cannot_be_downloaded_are_one_line(flags, tmp_path, cli, monkeypatch):
    monkeypatch.setattr(urllib.request, "_opener", None)  # it is kept, with the proxies that it was made with
    for name, value in {"TORCH_HOME": tmp_path / "hub", "https_proxy": "http://127.0.0.1:9", "no_proxy": ""}.items():
        monkeypatch.setenv(name, str(value))
    done = cli(flags(tmp_path / "models", "--distance", "squeeze"))
    one_error(done, "--distance squeeze", tmp_path / "hub", "--lpips_weights", "--distance pixels")
    assert not list((tmp_path / "models").rglob("*"))


@pytest.mark.parametrize("storage", ["memory", "stream"])
def test_bad_images_are_left_out_and_gray_ones_are_not(flags, tree, tmp_path, cli, storage):
    data = shutil.copytree(tree, tmp_path / "data")
    save(data / "train" / "disc" / "gray.png", np.full((16, 16), 90, dtype=np.uint8))
    (data / "train" / "disc" / "bad.png").write_bytes(b"no image")
    argv = flags(tmp_path / "models", *ALONE, "--periods", "1", "--period", "100", "--bs", "25", "--data", str(data))
    done = cli([*argv, "--skip_bad", "--storage", storage])
    assert done.code == 0, done.err
    assert done.err.count("\n") == 1, done.err
    assert "left out" in done.err, done.err
    assert "bad.png" in done.err, done.err
    state = torch.load(only_run(tmp_path / "models") / "1.pt", weights_only=True)
    assert len(state["chosen"]) == 81


def test_images_that_are_all_bad_are_one_line(flags, tmp_path, cli):
    for index in range(20):
        file = tmp_path / "data" / "train" / "class" / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"no image")
    argv = flags(tmp_path / "models", *SHORT, "--data", str(tmp_path / "data"), "--skip_bad")
    for storage in ("memory", "stream"):
        one_error(cli([*argv, "--storage", storage, "--suffix", storage]), "repair or re")


# ---------------------------------------------------------------------------------------------------- variants


def test_an_unfit_generator_is_warned_of(flags, tmp_path, cli):
    done = cli(flags(tmp_path, *SHORT[1:], "--lr", "0"))  # both stages end as they began: the same samples
    assert done.code == 0
    (warning,) = [line for line in done.out.splitlines() if "warning:" in line]
    assert "not fit for positives" in warning
    assert "one code" in warning
    assert json.loads((only_run(tmp_path) / "generator.json").read_text())["fit"] is False


@pytest.mark.parametrize(
    "more",
    [
        "--corrupt gray --no-project --no-flip --reject 0.05 --candidates 3",
        "--corrupt mask0.5+down2 --keep_previous --precision fp32 --periods 6",
        "--corrupt down4 --mapping per_level --level_input output --init ref --map_lr 1 --bs 1000",
        "--distance squeeze --lpips_weights REAL --lpips_side 20 --alpha 1",
    ],
)
def test_variants_train(flags, tmp_path, cli, more):
    if "REAL" in more:
        more = more.replace("REAL", str(real_file("weights/squeezenet1_1_features.pth")))
    done = cli(flags(tmp_path, *SHORT, *more.split()))
    assert (done.code, done.err) == (0, "")
    folder = only_run(tmp_path)
    result = json.loads((folder / "generator.json").read_text())
    assert all(math.isfinite(value) for value in result.values() if isinstance(value, int | float))
    assert (result["consistency"] < 1e-6) == ("--no-project" not in more)
    assert all(math.isfinite(line["loss"]) for line in lines(folder) if "loss" in line)
    with Image.open(folder / "samples.png") as picture:
        assert picture.width == 4 * (10 * 17 + 1)


def test_help_shows_the_recipe_of_the_data(cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # no line is broken inside what is looked for
    done = cli(["--data", "shapes", "--help"])
    assert (done.code, done.err) == (0, "")
    text = " ".join(done.out.split())
    assert "small for a GPU, paper as published (default: tiny)" in text
    assert "(default: 16,16)" in text
