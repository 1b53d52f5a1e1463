"""TrainISICLE.py, by running it: the pair, the bank, the generator that it finds or trains, and what it refuses."""

import json
import os
import re
import shutil
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from helpers import (
    content,
    count_lines,
    different,
    flags_on_board,
    lines,
    losses,
    no_file_larger_than,
    one_error,
    one_line,
    only_run,
    wait_for,
)

import Banks
import Data
import Flags
import Reports
import TrainCamNet
import TrainISICLE
import TrainSimCLR
import Utils
from Augmentations import Augmentation
from Benchmarks.Forks import Child, start_ranks
from CamNet import Bank
from CamNet.Corruptions import Corruption
from Images.Split import Split

GENERATOR = (
    "--net tiny --corrupt gray+down2 --distance pixels --candidates 4,2 --period 16 --visits 2 --periods 1 --bs 8"
)


AUGMENTED = ("color_s", "crop_min", "gray_p", "blur_p")  # None: as in the recipe of the data


@pytest.fixture
def cli(cli):
    """(argv) -> .code .out .err of TrainISICLE.py with these flags, run in this process."""
    return partial(cli, script=TrainISICLE)


@pytest.fixture(scope="module")
def models(tree, tmp_path_factory):
    """A folder with a generator of the tiny tree."""
    folder = tmp_path_factory.mktemp("isicle")
    place = f"--data {tree} --size 16 --models_dir {folder} --data_dir {tree.parent / 'cache'}"
    TrainCamNet.main(TrainCamNet.get_args(f"{GENERATOR} --no-single_code {place}".split()))
    return folder


@pytest.fixture(scope="module")
def generator(models):
    """The checkpoint of that generator."""
    return Utils.newest_checkpoint(only_run(models, "TrainCamNet-*"))


@pytest.fixture(scope="module")
def split(quick):
    """The train split of the tiny tree."""
    args = TrainISICLE.get_args(quick("no run"))
    return Flags.train_split_for(args, torch.device("cpu"))


@pytest.fixture(scope="module")
def first(quick, models):
    """A finished run: .folder .argv .out."""
    argv = quick(models, "--num_codes", "3", "--p_gen", "0.5", "--suffix", "first")
    child = Child(TrainISICLE, argv, models / "first.log")
    assert child.wait() == 0, child.output()
    return SimpleNamespace(folder=only_run(models, "TrainISICLE-*-first-*"), argv=argv, out=child.output())


# ---------------------------------------------------------------------------------------------------- a whole run


def test_a_run_says_which_generator_it_has(first, models):
    (start,) = json.loads((first.folder / "args.json").read_text())["starts"]
    (bank,) = models.glob("TrainCamNet-*/bank-*-k3-s0-0.npy")
    assert bank.name.startswith(f"bank-{start['positives']}-")


def test_a_run_makes_the_bank_and_ends_with_scores(first, models):
    assert "generator: " in first.out
    assert "made in" in first.out
    assert "bank: 3 restorations of 240 images, 0.5 MiB, about" in first.out
    assert "kNN" in first.out
    assert (first.folder / "evaluation.json").exists()
    assert (first.folder / "3.pt").exists()
    (bank,) = models.glob("TrainCamNet-*/bank-*-k3-s0-0.npy")
    assert np.load(bank).shape == (240, 3, 3, 16, 16)


def test_a_run_shows_what_the_pairs_are_worth(first):
    *training, scores = lines(first.folder)
    shares = [line["synthetic_share"] for line in training]  # --p_gen .5 of the third view, in batches of 8
    assert sum(shares) / len(shares) == pytest.approx(0.5 / 3, abs=0.03)
    result = json.loads((first.folder / "evaluation.json").read_text())
    names = {"alignment", "uniformity", "embedding_std", "cosine_real", "cosine_synthetic"}
    names |= {"label_real", "label_synthetic"}
    assert result["pairs"].keys() == names
    assert {name: scores[name] for name in names} == result["pairs"]
    assert "probe on their restorations" in first.out
    assert "cosine synthetic" in first.out
    assert 0 <= scores["label_synthetic"] <= 1
    assert -1 <= scores["cosine_synthetic"] <= 1


def test_a_second_run_takes_the_same_generator_and_bank(first, cli):
    done = cli([*first.argv, "--suffix", "again", "--no-baselines"])
    assert done.code == 0
    assert ", found" in done.out
    assert "made in" not in done.out
    assert losses(only_run(first.folder.parent, "TrainISICLE-*-again-*")) == losses(first.folder)


@pytest.mark.parametrize("views, pair", [(2, "gen_gen"), (3, "real_real_gen")])
def test_without_synthetic_images_the_run_is_simclrs_bit_for_bit(quick, tmp_path, cli, views, pair):
    short = ("--epochs", "2", "--bs", "24", "--no-baselines")
    done = cli(quick(tmp_path / "isicle", *short, "--p_gen", "0", "--pair", pair))
    assert done.code == 0, done.err
    ours = only_run(tmp_path / "isicle")  # no generator was trained
    done = cli(quick(tmp_path / "simclr", *short, "--num_views", str(views)), script=TrainSimCLR)
    assert done.code == 0, done.err
    theirs = only_run(tmp_path / "simclr")
    assert losses(ours) == losses(theirs)
    assert len(losses(ours)) == 20
    weights = Utils.load_(ours / "2.pt")["encoder"]
    for name, value in Utils.load_(theirs / "2.pt")["encoder"].items():
        assert torch.equal(weights[name], value), name


def test_the_recipe_is_simclrs():
    for data in ("shapes", "cifar10", "stl10"):
        simclr = vars(TrainSimCLR.get_args(["--data", data]))
        ours = vars(TrainISICLE.get_args(["--data", data]))
        shared = simclr.keys() & ours.keys()
        assert {"color_s", "temp", "lr"} < shared
        assert {name: ours[name] for name in shared} == {name: simclr[name] for name in shared}


# ---------------------------------------------------------------------------------------------------- positives


def bank_of(values):
    """Return a Bank in which restoration j of image i is full of the value values[i, j]."""
    content = torch.as_tensor(values).byte()[:, :, None, None, None].expand(-1, -1, 3, 8, 8)
    return TrainISICLE.Bank(content.contiguous().numpy(), "cpu", copied=True)


def source(pair="gen_gen", k=5, n=6, warmup_steps=0, **more):
    """Return a `Restored` over a bank in which restoration j of image i is full of the value 10 i + j + 1."""
    values = {"p_gen": 1.0, "num_pos": 3, "pick": "random", "seed": 0} | more
    bank = bank_of(10 * torch.arange(n)[:, None] + torch.arange(k) + 1)
    positives = TrainISICLE.Restored(SimpleNamespace(pair=pair, **values), lambda epoch: bank, warmup_steps)
    positives.start_epoch(0)
    return positives


def ask(positives, step=0, rows=range(6)):
    """Return the values of the views of these images, (M, n): 0 where a view is the image."""
    rows = torch.tensor(rows)
    views = positives(rows, torch.zeros(len(rows), 3, 8, 8, dtype=torch.uint8), step)
    return torch.stack([view[:, 0, 0, 0] for view in views]).int()


@pytest.mark.parametrize(
    "pair, real",
    [
        ("gen_gen", [0, 0]),
        ("real_gen", [1, 0]),
        ("real_real_gen", [1, 1, 0]),
        ("multi", [0, 0, 0]),
        ("gen_twice", [0, 0]),
    ],
)
def test_a_pair_holds_the_image_and_restorations_of_it(pair, real):
    positives = source(pair)
    views = ask(positives)
    assert len(views) == len(positives) == len(real)
    for view, is_real in zip(views, real):
        if is_real:
            assert (view == 0).all()
        else:
            assert ((view - 1) // 10 == torch.arange(6)).all()  # a restoration of its own image
    assert positives.logged() == {"p_gen": 1.0, "synthetic_share": pytest.approx(1 - sum(real) / len(real))}
    if pair == "gen_twice":
        assert torch.equal(*views)


def test_two_different_codes_are_drawn_anew_in_every_step():
    positives = source()
    draws = torch.stack([ask(positives, step) for step in range(200)])  # (steps, 2, n)
    assert (draws[:, 0] != draws[:, 1]).all()
    for image in range(6):  # all 20 ordered pairs of 5 codes come
        pairs = {tuple(pair) for pair in draws[:, :, image].tolist()}
        assert len(pairs) == 20
    assert torch.equal(ask(positives, 7), ask(positives, 7))  # step and image decide
    assert torch.equal(ask(positives, 7, rows=[3]), ask(positives, 7)[:, 3:4])  # not the batch


def test_p_gen_is_the_share_of_restorations():
    positives = source(p_gen=0.25)
    share = torch.cat([(ask(positives, step) > 0).flatten() for step in range(500)]).float().mean()
    assert share == pytest.approx(0.25, abs=0.02)
    assert 0 < positives.logged()["synthetic_share"] < 0.8  # of the 12 last views


def test_which_restoration_comes_does_not_depend_on_whether_one_comes():
    positives = source("real_gen", p_gen=0.25)
    seen = torch.cat([ask(positives, step)[1] for step in range(2000)])
    counts = ((seen[seen > 0] - 1) % 10).bincount(minlength=5)
    assert scipy.stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_the_seed_decides_the_draws():
    def draws(**more):
        return torch.stack([ask(source(**more), step) for step in range(9)])

    assert not torch.equal(draws(seed=0), draws(seed=1))
    assert not torch.equal(draws(seed=0, p_gen=0.5) > 0, draws(seed=1, p_gen=0.5) > 0)


@pytest.mark.parametrize("epochs, first", [(2, 1), (5, 1), (10, 2), (15, 3), (100, 20)])
def test_auto_measures_after_a_fifth_of_the_epochs(monkeypatch, epochs, first):
    monkeypatch.setattr(TrainISICLE.Restored, "measured_p_gen", lambda self: 0.25)
    positives = TrainISICLE.Restored(TrainISICLE.get_args(["--p_gen", "auto", "--epochs", str(epochs)]))
    is_known = []
    for epoch in range(epochs):
        positives.start_epoch(epoch)
        is_known.append(positives.p_gen is not None)
    assert is_known.index(True) == first


def shares(folder):
    """The share of restorations among the views of each epoch, in order."""
    by_epoch = {}
    for line in lines(folder):
        if "synthetic_share" in line:
            by_epoch.setdefault(line["epoch"] - (line["step"] % 30 == 0), []).append(line["synthetic_share"])
    return [sum(values) / len(values) for values in by_epoch.values()]


def test_auto_measures_p_gen_after_the_first_epochs(quick, models, generator, tmp_path, cli):
    """And a run that is resumed before or after it ends in the same bits."""
    argv = ["--num_codes", "3", "--no-baselines"]
    shutil.copytree(models, tmp_path / "a", ignore=shutil.ignore_patterns("TrainISICLE-*"))
    done = cli(quick(tmp_path / "a", *argv))
    assert done.code == 0, done.err
    p_gen, kept, usual = map(float, re.search(r"auto: (\S+): .* keep (\d+)% .* views (\d+)%", done.out).groups())
    assert p_gen == pytest.approx(min(0.5, (kept / usual) ** 2), abs=0.05)
    folder = only_run(tmp_path / "a", "TrainISICLE-*")
    assert [line["p_gen"] for line in lines(folder) if "p_gen" in line] == [0.0] * 30 + [p_gen] * 60
    assert shares(folder) == pytest.approx([0, p_gen / 3, p_gen / 3], abs=0.06)
    assert torch.load(folder / "3.pt", weights_only=True)["p_gen"] == p_gen
    assert flags_on_board(folder)["p_gen"] == "auto"

    for last in ("1.pt", "2.pt"):
        copy = tmp_path / last
        shutil.copytree(tmp_path / "a", copy)
        other = only_run(copy, "TrainISICLE-*")
        for file in other.glob("[0-9].pt"):
            if file.name > last:
                file.unlink()
        done = cli([*quick(copy, *argv), "--resume", "auto"])
        assert done.code == 0, done.err
        assert ("auto: " in done.out) == (last == "1.pt")
        assert different(other / "3.pt", folder / "3.pt") == []


def test_auto_compares_restorations_with_random_views(monkeypatch):
    images = torch.randint(256, (6, 3, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    positives = source("real_gen", data="shapes", aug="full", size=8, **dict.fromkeys(AUGMENTED))
    positives.split = Split(images, torch.zeros(6, dtype=torch.int64), ["one"])
    positives.encoder = torch.nn.Linear(1, 1)
    seen = []

    def neighbors_kept(encoder, known, versions, k):
        seen.extend([known, *versions])
        return 0.8, 0.2

    monkeypatch.setattr(TrainISICLE.Evaluate, "neighbors_kept", neighbors_kept)
    assert positives.measured_p_gen() == pytest.approx(0.0625, abs=1e-3)  # (0.2 / 0.8)^2
    known, view, restored = seen
    assert sorted(known[:, 0, 0, 0].tolist()) == sorted(images[:, 0, 0, 0].tolist())
    assert not torch.equal(view, known / 255)
    values = (restored * 255).round()
    assert torch.equal(values, values[:, :1, :1, :1].expand_as(values))  # restorations of this bank have one value
    of_image = (values[:, 0, 0, 0].int() - 1) // 10
    assert torch.equal(images[of_image.long()], known)  # of its own image each


@pytest.mark.parametrize("more", ["--epochs 1 --n_ramp 0", "--pair gen_gen"])
def test_auto_is_a_half_where_nothing_can_be_measured(quick, more):
    positives = TrainISICLE.Restored(TrainISICLE.get_args(quick("nowhere", *more.split())))
    assert positives.args.p_gen == "auto"
    assert positives.p_gen == TrainISICLE.P_GEN_MAX


def test_p_gen_rises_in_the_warm_up():
    rising = source(warmup_steps=20)
    assert [rising.probability(step) for step in (0, 9, 19, 50)] == pytest.approx([0.05, 0.5, 1.0, 1.0])


def test_few_restorations_come_at_the_start_of_the_warm_up():
    rising = source(n=20, warmup_steps=20)
    rows = range(20)
    assert (ask(rising, 0, rows) > 0).float().mean() < 0.3  # p_gen 0.05
    assert (ask(rising, 19, rows) > 0).all()


def test_gen_warmup_is_in_epochs(quick, models):
    args = TrainISICLE.get_args(quick(models, "--gen_warmup", "1.5", "--p_gen", "0"))
    splits = SimpleNamespace(train=range(240))
    assert TrainISICLE.make_positives(args, splits, torch.device("cpu")).warmup_steps == 45


def test_corrupted_is_what_the_generator_sees():
    args = SimpleNamespace(pair="corrupted", seed=0, num_pos=3, p_gen=1.0)
    control = TrainISICLE.Corrupted(args, Corruption("gray+down2", 8))
    images = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    one, other = control(torch.arange(4), images, 0)
    assert len(control) == 2
    assert control.fingerprint == "gray+down2"  # a resumed run has the same
    assert control.logged() == {"p_gen": 1.0, "synthetic_share": 1.0}
    assert torch.equal(one, other)
    gray = (images.float() * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1)
    half = gray.unflatten(1, (4, 2)).unflatten(3, (4, 2)).mean((2, 4))[:, None]
    wanted = F.interpolate(half, (8, 8), mode="bicubic").clamp(0, 255)
    assert (one.float() - wanted).abs().max() <= 1  # the same in all channels


def test_seed_and_step_decide_the_mask_of_the_control():
    images = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def view(seed, step):
        args = SimpleNamespace(pair="corrupted", seed=seed, num_pos=3, p_gen=1.0)
        return TrainISICLE.Corrupted(args, Corruption("gray+mask0.5", 8))(torch.arange(4), images, step)[0]

    assert torch.equal(view(0, 0), view(0, 0))
    assert not torch.equal(view(0, 0), view(1, 0))
    assert not torch.equal(view(0, 0), view(0, 1))


class Angle(torch.nn.Module):
    """An encoder whose feature is a direction that follows from the brightness."""

    def forward(self, x):
        angle = 3 * x.mean((1, 2, 3))
        return torch.stack([angle.cos(), angle.sin()], dim=1)


def test_farthest_takes_the_least_alike():
    bank = bank_of([[10, 20, 30, 250], [200, 5, 190, 195]])
    candidates = bank.take(torch.arange(2), torch.arange(4).expand(2, -1))
    columns = TrainISICLE.farthest(candidates, 2, None, Angle())
    assert [sorted(pair) for pair in columns.tolist()] == [[0, 3], [0, 1]]
    image = torch.full((2, 3, 8, 8), 255, dtype=torch.uint8)
    columns = TrainISICLE.farthest(candidates, 1, image, Angle())
    assert columns.tolist() == [[0], [1]]


@pytest.mark.parametrize("has_image", [True, False])
def test_farthest_equals_the_slow_one(has_image):
    torch.manual_seed(0)
    encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 4))
    candidates = torch.randint(256, (9, 7, 3, 8, 8), dtype=torch.uint8)
    images = torch.randint(256, (9, 3, 8, 8), dtype=torch.uint8)
    columns = TrainISICLE.farthest(candidates, 3, images if has_image else None, encoder)
    with torch.no_grad():
        features = [F.normalize(encoder(each / 255), dim=1) for each in candidates]
        anchors = F.normalize(encoder(images / 255), dim=1)
    for own, image, found in zip(features, anchors, columns.tolist()):
        first = own @ (image if has_image else own.mean(dim=0))
        chosen = [first.argmin().item()]
        while len(chosen) < 3:
            seen = [own[column] for column in chosen] + ([image] if has_image else [])
            likeness = {}
            for column in set(range(7)) - set(chosen):
                likeness[column] = max((own[column] @ other).item() for other in seen)
            chosen.append(min(likeness, key=likeness.get))
        assert found == chosen


def test_pick_farthest_reads_the_bank_once():
    bank = bank_of([[10, 20, 30, 250], [200, 5, 190, 195]])
    restored = source(pick="farthest")
    restored.encoder = Angle()
    reads = []

    def take(rows, columns):
        reads.append(columns.shape)
        return bank.take(rows, columns)

    restored.bank = SimpleNamespace(k=bank.k, is_tensor=True, take=take)
    first, second = restored(torch.arange(2), torch.zeros(2, 3, 8, 8, dtype=torch.uint8), 0)
    assert reads == [(2, 4)]
    columns = TrainISICLE.farthest(bank.take(torch.arange(2), torch.arange(4).expand(2, -1)), 2, None, Angle())
    expected = bank.take(torch.arange(2), columns)
    assert torch.equal(torch.stack([first, second], dim=1), expected)


def test_pick_farthest_asks_the_encoder_that_is_trained(quick, models, cli, monkeypatch):
    asked = []
    farthest = TrainISICLE.farthest

    def heard(candidates, count, images, encoder):
        asked.append(encoder)
        return farthest(candidates, count, images, encoder)

    monkeypatch.setattr(TrainISICLE, "farthest", heard)
    short = ("--epochs", "1", "--n_ramp", "0", "--bs", "60", "--no-baselines", "--suffix", "farthest")
    assert cli(quick(models, "--num_codes", "3", "--pick", "farthest", *short)).code == 0
    folder = only_run(models, "TrainISICLE-*-farthest-*")
    assert len(asked) > 4  # the steps, and what is measured
    saved = Utils.load_(folder / "1.pt")["encoder"]
    for encoder in asked:
        for name, value in encoder.state_dict().items():
            assert torch.equal(value, saved[name]), name


class Made:
    """A source whose `synthetic` is a function of the images."""

    def __init__(self, make):
        self.make = make

    def synthetic(self, indices, images, step):
        return self.make(images)


def test_label_preservation_is_whole_for_the_images_and_chance_for_black_ones():
    device = torch.device("cpu")
    labels = torch.arange(300) % 3
    images = torch.randint(0, 130, (300, 3, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    images[torch.arange(300), labels] += 60  # the class is a color
    split = Split(images, labels, ["red", "green", "blue"])
    encoder = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    same = Reports.label_preservation(encoder, Made(lambda images: images), split, 0, device)
    assert same["label_real"] == same["label_synthetic"]
    assert same["label_real"] > 0.95
    black = Reports.label_preservation(encoder, Made(torch.zeros_like), split, 0, device)
    assert black["label_real"] == same["label_real"]
    assert black["label_synthetic"] == pytest.approx(1 / 3, abs=0.1)


def test_label_preservation_is_not_scored_on_what_the_probe_has_learned_from():
    random = torch.Generator().manual_seed(0)
    images = torch.randint(256, (300, 3, 8, 8), generator=random).byte()
    labels = torch.randint(3, (300,), generator=random)  # the probe can only learn 150 images by heart
    split = Split(images, labels, ["a", "b", "c"])
    found = Reports.label_preservation(torch.nn.Flatten(), Made(lambda x: x), split, 0, torch.device("cpu"))
    assert found["label_real"] < 0.6


# ---------------------------------------------------------------------------------------------------- banks


def test_positives_of_ones_own_need_no_generator(quick, tmp_path, cli):
    images = np.random.default_rng(0).integers(0, 256, (240, 2, 3, 16, 16), dtype=np.uint8)
    np.save(tmp_path / "mine.npy", images)
    done = cli(quick(tmp_path / "m", "--bank", tmp_path / "mine.npy", "--epochs", "2", "--bs", "24", "--no-baselines"))
    assert done.code == 0, done.err
    assert only_run(tmp_path / "m").name.startswith("TrainISICLE-")


def test_positives_of_ones_own_are_in_the_order_of_the_images(quick, split, tmp_path, cli):
    images = np.random.default_rng(0).integers(0, 256, (240, 1, 3, 16, 16), dtype=np.uint8)
    np.save(tmp_path / "mine.npy", images)
    argv = quick(tmp_path / "m", "--bank", tmp_path / "mine.npy", "--epochs", "2", "--bs", "60", "--no-baselines")
    splits = SimpleNamespace(train=split)
    positives = TrainISICLE.make_positives(
        TrainISICLE.get_args([str(word) for word in argv]), splits, torch.device("cpu")
    )
    rows = torch.tensor([200, 3, 77])
    _, mine = next(iter(split.batches([rows])))
    assert torch.equal(positives.synthetic(rows, mine, 0), torch.from_numpy(images)[rows, 0])

    # other positives are noticed on resume
    assert cli(argv).code == 0
    (only_run(tmp_path / "m") / "2.pt").unlink()
    np.save(tmp_path / "mine.npy", images[::-1])
    one_error(cli([*argv, "--resume", "auto"]), "another generator, bank or corruption")


def test_every_bank_and_every_seed_has_codes_of_its_own(monkeypatch, tmp_path):
    seeds = []
    monkeypatch.setattr(Banks, "fill", lambda *given, **_: seeds.append(given[4]))
    for seed in (0, 1):
        schedule = SimpleNamespace(
            args=SimpleNamespace(num_codes=2, seed=seed),
            file=lambda index: tmp_path / f"{index}.npy",
            announce=lambda *_: None,
            generator=None,
            split=None,
            device=None,
            autocast=None,
        )
        for index in (0, 1):
            Banks.BankSchedule.make(schedule, index)
    assert len(set(seeds)) == 4


def test_an_old_bank_is_given_up_before_the_next_one_is_made():
    held = []

    def next_bank(epoch):
        held.append(source.bank)
        return f"bank {epoch}"

    source = TrainISICLE.Restored(TrainISICLE.get_args(["--p_gen", "1"]), next_bank)
    for epoch in range(3):
        source.start_epoch(epoch)
        assert source.bank == f"bank {epoch}"
    assert held == [None, None, None]


def test_refresh_makes_a_new_bank_every_e_epochs(quick, models, cli):
    done = cli(quick(models, "--num_codes", "2", "--refresh", "2", "--suffix", "fresh", "--bs", "24", "--no-baselines"))
    assert done.code == 0, done.err
    assert done.out.count("made in") == 2  # for epochs 0, 1 and for epoch 2; what is measured last has no own
    (bank,) = models.glob("TrainCamNet-*/bank-*-k2-*-refresh2-*.npy")  # the old one is gone
    assert bank.stem.endswith("-1")


def test_several_processes_change_the_bank_together(quick, models, tmp_path):
    argv = quick(models, "--num_codes", "2", "--refresh", "1", "--eval_iter", "1", "--epochs", "2", "--bs", "48")
    first, second = start_ranks(TrainISICLE, [*argv, "--suffix", "two", "--no-baselines"], tmp_path)
    assert (first.wait(), second.wait()) == (0, 0), first.output() + second.output()
    assert first.output().count("made in") == 2
    assert first.output().count("generator: ") == 1
    assert second.output() == ""
    folder = only_run(models, "TrainISICLE-*-two-*")
    assert [line["epoch"] for line in lines(folder) if "cosine_synthetic" in line] == [1, 2]


def rows_done(bank):
    """Return how many rows are done, by the note of a bank that is being filled."""
    return (Utils.read_json(f"{bank}.json") or {"done": 0})["done"]


@pytest.mark.parametrize("victim", [0, 1])
def test_processes_fill_the_bank_of_one_and_go_on_after_a_kill(quick, models, tmp_path, cli, victim):
    argv = quick(models, "--num_codes", "3", "--epochs", "1", "--n_ramp", "0", "--bs", "240", "--no-baselines")
    argv += ["--seed", str(10 + victim), "--suffix", f"killed{victim}"]
    ranks = start_ranks(TrainISICLE, argv, tmp_path, world=3, prepare=slow_bank)
    name = f"*/bank-*-s1{victim}-*.npy.part"
    wait_for(lambda: any(rows_done(part) >= 48 for part in models.glob(name)), ranks[0])
    ranks[victim].kill()
    for rank in ranks[1:] if victim == 0 else ranks[:1]:
        assert rank.wait(60) != 0
    for rank in ranks:
        rank.kill()  # as torchrun does
    (part,) = models.glob(name)
    assert 48 <= rows_done(part) < 240

    ranks = start_ranks(TrainISICLE, [*argv, "--resume", "auto"], tmp_path, world=2, prepare=slow_bank)
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].output() + ranks[1].output()
    bank = part.with_suffix("")
    together = bank.read_bytes()
    bank.unlink()
    Bank.fill.__kwdefaults__["bs"] = 16
    try:
        assert cli([*argv, "--suffix", "one"]).code == 0
    finally:
        Bank.fill.__kwdefaults__["bs"] = None
    assert bank.read_bytes() == together


def test_resume_with_other_positives_is_refused(first):
    args = TrainISICLE.get_args(first.argv)
    TrainSimCLR.adjust_flags(args, world=1)
    device = torch.device("cpu")
    positives = TrainISICLE.Restored(args)
    trainer = TrainSimCLR.Trainer(args, Flags.splits_for(args, device).train, positives, device)
    one_line(lambda: trainer.load(first.folder / "3.pt"), "another generator, bank or corruption", "--suffix")
    positives.fingerprint = Utils.load_(first.folder / "3.pt")["positives"]
    assert len(positives.fingerprint) == 8
    trainer.load(first.folder / "3.pt")
    assert trainer.step == 90


# ---------------------------------------------------------------------------------------------------- what goes wrong


BAD = {
    "--num_codes 1 --pair gen_gen": ("--num_codes: 1", "real_gen"),
    "--num_codes 2 --pair multi": ("--num_codes: 2", "takes 3"),
    "--loss align --pair gen_gen": ("--loss align", "more than two views"),
    "--bank nowhere.npy": ("--bank nowhere.npy", "numpy.save"),
    "--bank nowhere.npy --refresh 2": ("--bank nowhere.npy", "--refresh"),
    "--bank ONE.npy --pair gen_gen": ("ONE.npy", "holds 1", "takes 2"),
    "--generator nowhere.pt": ("nowhere.pt",),
    "--generator ENCODER": ("it holds no generator",),
    "--generator EMPTY": ("EMPTY", "no checkpoint"),
    "--corrupt gray --generator RUN": ("--corrupt gray+down2 (here gray)",),
    "--pair corrupted --corrupt blur": ("--corrupt", "blur"),
    "--pair corrupted --p_gen 0 --corrupt blur": ("--corrupt", "blur"),
    "--pair corrupted --bank ONE.npy": ("ONE.npy", "--pair corrupted"),
    "--corrupt gray --camnet=--corrupt=gray+down2": ("--corrupt gray: ", "--camnet has --corrupt gray+down2"),
    "--p_gen much": ("--p_gen", "'much' is no number"),
    "--p_gen 2": ("--p_gen", "from 0 to 1"),
    "--corrupt blur": ("--corrupt 'blur'", "is not gray"),
    "--camnet=--corrupt=down5": ("--corrupt 'down5'", "16"),
    "--num_views 3": ("--num_views: this flag is one of TrainSimCLR.py",),
    "--camnet=--size=8": ("--camnet --size=8: --size", "give it to this script"),
    "--camnet=--lr": ("TrainISICLE.py --camnet: error: argument --lr: expected one argument",),
    "--camnet=--dry_run": ("--dry_run cannot be in it",),
    "--camnet='--periods": ("--camnet '--periods: No closing quotation", "quotation mark"),
    "--distance pixels": ("--distance: this flag is the generator's", "--camnet '--distance pixels'"),
    "--periods=3 --flip": ("--periods=3: ", "--camnet --periods=3"),
    "--no-flip --net tiny": ("--camnet --no-flip",),
    "--distanc pixels": ("--distanc: no such flag",),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_flags_are_one_line_and_write_nothing(quick, generator, whole, tmp_path, cli, bad):
    (tmp_path / "EMPTY").mkdir()
    np.save(tmp_path / "ONE.npy", np.zeros((240, 1, 3, 16, 16), dtype=np.uint8))
    places = {"RUN": generator.parent, "ENCODER": whole.folder}
    places |= {name: tmp_path / name for name in ("EMPTY", "ONE.npy")}
    done = cli(quick(tmp_path / "m", *(str(places.get(word, word)) for word in bad.split())))
    one_error(done, *BAD[bad])
    assert len(done.err.splitlines()) == 1
    assert not list((tmp_path / "m").rglob("*"))


def test_a_generator_that_was_trained_otherwise_is_refused(generator, split, tree):
    args = SimpleNamespace(data=str(tree), size=32, corrupt="gray")
    parts = ("--size 16 (here 32)", "gray+down2 (here gray)", "--periods 1 (here 5)")
    one_line(lambda: Banks.load_generator(generator, args, split, {"periods": 5}), *parts)


def test_a_generator_is_known_by_its_images_and_not_by_their_place(generator, split, tree, models, tmp_path, capsys):
    elsewhere = str(shutil.copytree(tree, tmp_path / "elsewhere"))
    args = SimpleNamespace(data=elsewhere, size=16, corrupt=None, generator=None, models_dir=str(models))
    assert Banks.find_generator(args, split, {}) == generator
    Banks.load_generator(generator, args, split, {})
    assert "other images" not in capsys.readouterr().out
    others = Split(split.images.flip(0), split.labels, split.classes)
    assert Banks.find_generator(args, others, {}) is None
    Banks.load_generator(generator, args, others, {})
    assert "warning: this generator was trained on other images" in capsys.readouterr().out


def test_an_unfit_generator_is_warned_of_once(generator, split, tree, tmp_path, capsys):
    shutil.copy(generator, tmp_path)
    measures = json.loads((generator.parent / "generator.json").read_text())
    Utils.write_json(tmp_path / "generator.json", measures | {"best_of_16": 9.0})
    args = SimpleNamespace(data=str(tree), size=16, corrupt=None)
    Banks.load_generator(tmp_path / generator.name, args, split, {})
    assert capsys.readouterr().out.count("warning: this generator is not fit") == 1


# ---------------------------------------------------------------------------------------------------- stages


def test_a_generator_is_trained_where_there_is_none(monkeypatch, split, tree, tmp_path):
    asked = []

    def train(args, is_final):
        asked.append(args)
        folder = tmp_path / "TrainCamNet-x"
        parts = {name: {} for name in ("config", "net", "optimizer", "seconds")}
        Utils.save_(
            folder / "1.pt", args={}, step=1, generator={}, chosen=torch.zeros(1), total=torch.zeros(1), **parts
        )
        Utils.write_json(folder / "args.json", {"args": Utils.plain(args) | {"image_size": 16}})
        Utils.write_json(folder / "generator.json", {"data_fingerprint": split.fingerprint()})

    (tmp_path / "TrainCamNet-x").mkdir()
    monkeypatch.setattr(TrainCamNet, "main", train)
    argv = ["--data", str(tree), "--size", "16", "--models_dir", str(tmp_path), "--corrupt", "gray", "--deterministic"]
    args = TrainISICLE.get_args([*argv, "--camnet", "--periods 7 --seed 3"])
    wanted = (args, split, *TrainISICLE.generator_flags(args))
    assert TrainISICLE.train_generator(*wanted) == tmp_path / "TrainCamNet-x" / "1.pt"
    found = (asked[0].corrupt, asked[0].models_dir, asked[0].resume, asked[0].periods, asked[0].seed)
    assert found == ("gray", str(tmp_path), "auto", 7, 3)
    assert asked[0].deterministic
    assert TrainISICLE.train_generator(*wanted) == tmp_path / "TrainCamNet-x" / "1.pt"
    assert len(asked) == 1  # the second time it is found

    other = TrainISICLE.get_args([*argv, "--camnet", "--periods 8"])
    _, flags = TrainISICLE.generator_flags(other)
    assert Banks.find_generator(other, split, flags) is None


def test_a_dry_run_says_what_it_takes_and_writes_nothing(quick, tmp_path, cli):
    small = "--net tiny --distance pixels --candidates 4,2 --period 16 --visits 2 --bs 8"
    done = cli(quick(tmp_path / "m", "--dry_run", "--camnet", small))
    assert (done.code, done.err) == (0, "")
    assert "generator: about" in done.out
    assert "bank: 8 restorations of 240 images" in done.out
    assert re.search("bank: 8 restorations .*, about [0-9]", done.out)
    assert "training takes about" in done.out
    assert "generator, bank and training: about" in done.out
    assert not (tmp_path / "m").exists()


def slow_bank():
    """Let banks be filled slowly, in parts of 16 restorations, each of them saved."""
    restore = Bank.restore

    def slow(*arguments, **more):
        time.sleep(0.05)
        return restore(*arguments, **more)

    Bank.SAVED_EVERY = 0
    Bank.restore = slow
    Bank.fill.__kwdefaults__["bs"] = 16


TRAINED = (
    "--camnet",
    "--net tiny --distance pixels --candidates 4,2 --period 16 --visits 2 --periods 3 --bs 8 --save_iter 1 "
    "--no-single_code",
)


def test_killed_in_any_stage_the_next_start_goes_on(quick, tmp_path, cli, fork):
    models = tmp_path / "m"
    argv = quick(models, "--num_codes", "2", "--bs", "24", "--no-baselines", *TRAINED)

    def kill_when(condition):
        child = fork(TrainISICLE, argv, slow_bank)
        wait_for(condition, child)
        child.kill()

    kill_when(lambda: any(models.glob("TrainCamNet-*/1.pt")))
    assert not any(models.glob("TrainCamNet-*/generator.json"))
    kill_when(lambda: any(models.glob("TrainCamNet-*/bank-*.part.json")))
    assert not any(models.glob("TrainCamNet-*/bank-*.npy"))
    kill_when(lambda: count_lines(models, "TrainISICLE-*/metrics.jsonl") >= 12)
    folder = only_run(models, "TrainISICLE-*")
    (folder / ".lock").unlink()  # which the killed process has left
    before = content(folder)
    one_error(cli(argv), "--resume auto continues it")  # nothing is lost by starting as before
    assert content(folder) == before

    last = cli([*argv, "--resume", "auto"])
    assert last.code == 0, last.err
    assert "continuing at step 10:" in last.out
    assert ", found" in last.out
    assert "made in" not in last.out
    whole = cli([*argv, "--suffix", "whole"])
    assert whole.code == 0, whole.err
    assert losses(folder) == losses(only_run(models, "TrainISICLE-*-whole-*"))


def test_two_started_at_a_time_share_generator_and_bank(quick, tmp_path, fork):
    argv = quick(tmp_path / "m", "--num_codes", "2", *TRAINED)
    argv += ["--epochs", "1", "--n_ramp", "0", "--bs", "60", "--no-baselines"]
    both = [fork(TrainISICLE, [*argv, "--suffix", name], slow_bank) for name in "ab"]
    assert [child.wait() for child in both] == [0, 0], both[0].output() + both[1].output()
    done = [child.output() for child in both]
    assert sum("made in" in each for each in done) == 1
    assert sum("python TrainCamNet.py" in each for each in done) == 1
    assert any("waiting: another process" in each for each in done)


def test_a_full_disk_is_one_line(quick, models, generator, cli):
    with no_file_larger_than(2**18):  # of a bank of 0.9 MiB
        done = cli(quick(models, "--num_codes", "5", "--generator", generator, "--suffix", "full"))
    one_error(done, "cannot write the bank")
    assert len(done.err.splitlines()) == 1
    assert not any(models.glob("TrainCamNet-*/bank-*-k5-*"))
    assert not any(models.glob("*-full-*"))


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "CUDA out of memory: lower --bs"),
        (Utils.UserError("the loss is not a number: lower --lr"), "the loss is not a number: lower --lr"),
    ],
)
def test_errors_of_the_generators_training_say_where_its_flags_go(error, told, quick, tmp_path, cli, monkeypatch):
    def update(self, period, batch):
        raise error

    monkeypatch.setattr(TrainCamNet.Trainer, "update", update)
    done = cli(quick(tmp_path / "m", *TRAINED))
    one_error(done, f"training the generator (its flags go into --camnet): {told}")


def test_a_bank_lies_in_models_dir_if_the_generators_folder_cannot_be_written(
    quick, tmp_path, generator, cli, monkeypatch
):
    is_allowed = os.access
    monkeypatch.setattr(os, "access", lambda place, mode: Path(place) != generator.parent and is_allowed(place, mode))
    before = sorted(generator.parent.iterdir())
    flags = ("--num_codes", "2", "--generator", generator, "--epochs", "1", "--n_ramp", "0", "--bs", "60")
    done = cli(quick(tmp_path / "m", *flags, "--no-baselines"))
    assert done.code == 0, done.err
    assert len(list((tmp_path / "m").glob("bank-*.npy"))) == 1
    assert sorted(generator.parent.iterdir()) == before


def test_a_run_is_resumed_with_its_own_generator_not_with_a_newer_one(first, models, quick, tmp_path, cli):
    shutil.copytree(models, tmp_path / "m")
    argv = quick(tmp_path / "m", "--num_codes", "3", "--p_gen", "0.5", "--suffix", "first", "--resume", "auto")
    data = f"--data {argv[argv.index('--data') + 1]} --size 16 --models_dir {tmp_path / 'm'}"
    TrainCamNet.main(TrainCamNet.get_args(f"{GENERATOR} --seed 1 --no-single_code --n_workers 0 {data}".split()))
    done = cli(argv)
    assert done.code == 0, done.err
    assert "this run is complete" in done.out


def test_a_run_that_was_moved_with_its_generator_goes_on(first, models, tmp_path, cli):
    shutil.copytree(models, tmp_path / "m")
    folder = tmp_path / "m" / first.folder.name
    for name in ("3.pt", "encoder.pt", "evaluation.json"):
        (folder / name).unlink()
    done = cli(["--resume", folder / "2.pt", "--device", "cpu"])
    assert done.code == 0, done.err
    assert f"generator: {tmp_path / 'm'}" in done.out
    assert "continuing at step" in done.out
    assert losses(folder) == losses(first.folder)


def test_a_generator_that_is_not_there_is_one_line(quick, tmp_path, cli):
    one_error(cli(quick(tmp_path / "m", "--generator", tmp_path / "no")), "--generator", "no checkpoint there")
    assert not (tmp_path / "m").exists()


def test_a_bank_that_was_moved_is_named_on_resume(quick, tmp_path, cli):
    bank = tmp_path / "mine.npy"
    np.save(bank, np.random.default_rng(0).integers(0, 256, (240, 1, 3, 16, 16), dtype=np.uint8))
    flags = ("--epochs", "2", "--bs", "60", "--no-baselines")
    assert cli(quick(tmp_path / "m", "--bank", bank, *flags)).code == 0
    file = only_run(tmp_path / "m") / "1.pt"
    bank.rename(tmp_path / "moved.npy")
    done = cli(["--resume", file, "--bank", tmp_path / "moved.npy"])
    assert done.code == 0, done.err
    assert "continuing at step 4" in done.out


def test_the_newest_generator_is_taken(quick, models, generator, split, tmp_path):
    for name, age in (("a", 20), ("b", 10), ("c", 30)):
        folder = tmp_path / f"{generator.parent.name}-{name}"
        shutil.copytree(generator.parent, folder)
        finished = (folder / "generator.json").stat().st_mtime - age
        os.utime(folder / "generator.json", (finished, finished))
    args = TrainISICLE.get_args(quick(tmp_path))
    assert Banks.find_generator(args, split, {}).parent.name.endswith("-b")


def test_a_bank_is_of_a_generator_and_of_the_images():
    def name(images):
        split = SimpleNamespace(fingerprint=lambda: images)
        args = SimpleNamespace(num_codes=2, seed=0, refresh=0)
        schedule = SimpleNamespace(fingerprint="g", split=split, args=args, folder=Path("Models/TrainCamNet-x"))
        return Banks.BankSchedule.file(schedule, 0)

    assert name("some") != name("others")
    assert name("some") == name("some")


def test_cosines_of_the_pairs():
    images = torch.randint(256, (20, 3, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    split = Split(images, torch.zeros(20, dtype=torch.int64), ["one"])
    net = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())  # the mean color
    positives = TrainSimCLR.SamePair(2)
    positives.synthetic = lambda indices, images, step: 255 - images

    def measured(augmentation):
        return Reports.measure_pairs(net, positives, split, augmentation, 0, torch.device("cpu"), labeled=False)

    plain = measured(Data.plain_views(8))
    colors = images.float().mean((2, 3)) / 255
    assert plain["cosine_real"] == pytest.approx(1)
    wanted = F.cosine_similarity(colors, 1 - colors).mean().item()
    assert plain["cosine_synthetic"] == pytest.approx(wanted, rel=1e-5)
    assert measured(Augmentation(8))["cosine_real"] < 0.9999

    def forward(x):
        if len(x) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return x.mean((2, 3))

    net.forward = forward  # by halves where memory runs out
    assert measured(Data.plain_views(8)) == pytest.approx(plain, abs=1e-6)


def test_the_pairs_are_measured_as_the_loss_sees_them():
    images = torch.randint(256, (20, 3, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    split = Split(images, torch.zeros(20, dtype=torch.int64), ["one"])
    net = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())  # the mean color

    class Turned(TrainSimCLR.SamePair):
        def __call__(self, indices, images, step):
            return [images, 255 - images]

    measured = Reports.measure_pairs(net, Turned(2), split, Data.plain_views(8), 0, torch.device("cpu"), labeled=False)
    colors = images.float().mean((2, 3)) / 255
    distance = 2 - 2 * F.cosine_similarity(colors, 1 - colors)
    assert measured["alignment"] == pytest.approx(distance.mean().item(), rel=1e-4)


def test_the_lock_of_a_generator_has_a_short_name(tmp_path):
    folders = [tmp_path / letter / ("x" * 245) for letter in "ab"]
    for folder in folders:
        folder.mkdir(parents=True)
    locks = {TrainISICLE.generator_lock(SimpleNamespace(models_dir=".", data=str(folder))) for folder in folders}
    assert len(locks) == 2
    assert all(len(lock.name) < 100 for lock in locks)
