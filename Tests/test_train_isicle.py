"""TrainISICLE.py, by running it: the pair, the bank, the generator that it finds or trains, and what it refuses."""

import json
import shutil
import signal
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    TORCHRUN,
    content,
    count_lines,
    finish,
    lines,
    losses,
    one_error,
    one_line,
    only_run,
    run,
    signal_when,
    start,
)

import Banks
import Flags
import Reports
import TrainCamNet
import TrainISICLE
import TrainSimCLR
import Utils
from Backbones import ResNet8
from CamNet.Corruptions import Corruption

GENERATOR = "--net tiny --distance pixels --m 4,2 --period 16 --visits 2 --periods 1 --bs 8 --no-single_code"


@pytest.fixture
def cli(cli):
    """(argv) -> .code .out .err of TrainISICLE.py with these flags, run in this process."""
    return partial(cli, script=TrainISICLE)


@pytest.fixture(scope="module")
def models(tree, tmp_path_factory):
    """A folder with a generator of the tiny tree."""
    folder = tmp_path_factory.mktemp("isicle")
    argv = f"{GENERATOR} --data {tree} --size 16 --models_dir {folder} --data_dir {tree.parent / 'cache'}".split()
    assert TrainCamNet.main(TrainCamNet.get_args(argv)) == 0
    return folder


@pytest.fixture(scope="module")
def generator(models):
    """The checkpoint of that generator."""
    return Utils.newest_checkpoint(next(models.glob("TrainCamNet-*")))


@pytest.fixture(scope="module")
def first(quick, models):
    """A finished run, made by its own process: .folder .argv .code .out .err."""
    argv = quick(models, "--num_codes", "3")
    done = run("TrainISICLE.py", *argv)
    assert done.code == 0, done.err
    (folder,) = models.glob("TrainISICLE-*")
    return SimpleNamespace(folder=folder, argv=argv, **vars(done))


# ---------------------------------------------------------------------------------------------------- a whole run


def test_a_run_makes_the_bank_and_ends_with_scores(first, models):
    assert "generator: " in first.out
    assert "made in" in first.out
    assert "kNN" in first.out
    assert (first.folder / "evaluation.json").exists()
    assert (first.folder / "3.pt").exists()
    (bank,) = models.glob("TrainCamNet-*/bank-*-k3-*.npy")
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
    done = cli([*first.argv, "--suffix", "again"])
    assert done.code == 0
    assert ", found" in done.out
    assert "made in" not in done.out
    (again,) = first.folder.parent.glob("TrainISICLE-*-again")
    assert losses(again) == losses(first.folder)


@pytest.mark.parametrize("views, pair", [(2, "gen_gen"), (3, "real_real_gen")])
def test_without_synthetic_images_the_run_is_simclrs_bit_for_bit(whole, quick, tmp_path, cli, views, pair):
    done = cli(quick(tmp_path / "isicle", "--p_gen", "0", "--pair", pair))
    assert done.code == 0, done.err
    ours = only_run(tmp_path / "isicle")  # no generator was trained
    theirs = whole.folder
    if views > 2:
        done = cli(quick(tmp_path / "simclr", "--num_views", str(views)), script=TrainSimCLR)
        assert done.code == 0, done.err
        theirs = only_run(tmp_path / "simclr")
    assert losses(ours) == losses(theirs)
    assert len(losses(ours)) == 90
    weights = Utils.load_(ours / "3.pt")["encoder"]
    for name, value in Utils.load_(theirs / "3.pt")["encoder"].items():
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
    return TrainISICLE.Bank(content.contiguous().numpy(), "cpu", on_device=True)


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
    assert positives.logged() == {"synthetic_share": pytest.approx(1 - sum(real) / len(real))}
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


def test_p_gen_rises_in_the_warm_up():
    rising = source(warmup_steps=20)
    assert [rising.probability(step) for step in (0, 9, 19, 50)] == pytest.approx([0.05, 0.5, 1.0, 1.0])


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
    assert torch.equal(one, other)
    grey = (images.float() * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1)
    half = grey.unflatten(1, (4, 2)).unflatten(3, (4, 2)).mean((2, 4))[:, None]
    wanted = F.interpolate(half, (8, 8), mode="bicubic").clamp(0, 255)
    assert (one.float() - wanted).abs().max() <= 1  # the same in all channels


class Angle(torch.nn.Module):
    """An encoder whose feature is a direction that follows from the brightness."""

    def forward(self, x):
        angle = 3 * x.mean((1, 2, 3))
        return torch.stack([angle.cos(), angle.sin()], dim=1)


def test_farthest_takes_the_least_alike():
    bank = bank_of([[10, 20, 30, 250], [200, 5, 190, 195]])
    columns = TrainISICLE.farthest(bank, torch.arange(2), 2, None, Angle())
    assert [sorted(pair) for pair in columns.tolist()] == [[0, 3], [0, 1]]
    image = torch.full((2, 3, 8, 8), 255, dtype=torch.uint8)
    columns = TrainISICLE.farthest(bank, torch.arange(2), 1, image, Angle())
    assert columns.tolist() == [[0], [1]]


def test_pick_farthest_asks_the_encoder_that_is_trained(quick, models, cli, monkeypatch):
    asked = []
    farthest = TrainISICLE.farthest

    def heard(bank, indices, count, images, encoder):
        asked.append(encoder)
        return farthest(bank, indices, count, images, encoder)

    monkeypatch.setattr(TrainISICLE, "farthest", heard)
    short = ("--epochs", "1", "--n_ramp", "0", "--bs", "60", "--no-baselines", "--suffix", "farthest")
    assert cli(quick(models, "--num_codes", "3", "--pick", "farthest", *short)).code == 0
    (folder,) = models.glob("TrainISICLE-*-farthest")
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


def test_label_preservation_of_images_themselves_and_of_noise():
    device = torch.device("cpu")
    split = Flags.splits_for(TrainSimCLR.get_args(["--device", "cpu"]), device).train
    encoder = ResNet8().eval()
    same = Reports.label_preservation(encoder, Made(lambda images: images), split, 0, device)
    assert same["label_real"] == same["label_synthetic"]
    assert same["label_real"] > 0.12  # an untrained net's features are worth a little
    black = Reports.label_preservation(encoder, Made(torch.zeros_like), split, 0, device)
    assert black["label_synthetic"] == pytest.approx(0.1, abs=0.02)


# ---------------------------------------------------------------------------------------------------- banks


def test_positives_of_ones_own_need_no_generator(quick, tmp_path, cli):
    images = np.random.default_rng(0).integers(0, 256, (240, 2, 3, 16, 16), dtype=np.uint8)
    np.save(tmp_path / "mine.npy", images)
    done = cli(quick(tmp_path / "m", "--bank", tmp_path / "mine.npy", "--epochs", "2", "--bs", "24"))
    assert done.code == 0, done.err
    assert only_run(tmp_path / "m").name.startswith("TrainISICLE-")


def test_refresh_makes_a_new_bank_every_e_epochs(quick, models, cli):
    done = cli(quick(models, "--num_codes", "2", "--refresh", "2", "--suffix", "fresh", "--bs", "24"))
    assert done.code == 0, done.err
    assert done.out.count("made in") == 2  # for epochs 0, 1 and for epoch 2; what is measured last has no own
    (bank,) = models.glob("TrainCamNet-*/bank-*-k2-*-refresh2-*.npy")  # the old one is gone
    assert bank.stem.endswith("-1")


def test_several_processes_change_the_bank_together(quick, models):
    argv = quick(models, "--num_codes", "2", "--refresh", "1", "--eval_iter", "1", "--epochs", "2", "--bs", "48")
    done = run(*TORCHRUN, "TrainISICLE.py", *argv, "--suffix", "two")
    assert done.code == 0, done.err
    assert done.out.count("made in") == 2
    assert done.out.count("generator: ") == 1
    (folder,) = models.glob("TrainISICLE-*-two")
    assert [line["epoch"] for line in lines(folder) if "cosine_synthetic" in line] == [1, 2]


def test_resume_with_other_positives_is_refused(first):
    args = TrainISICLE.get_args(first.argv)
    TrainSimCLR.check_flags(args, world=1)
    device = torch.device("cpu")
    positives = TrainISICLE.Restored(args)
    trainer = TrainSimCLR.Trainer(args, Flags.splits_for(args, device).train, positives, device)
    one_line(lambda: trainer.load(first.folder / "3.pt"), "another generator or bank", "--suffix")
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
    assert not (tmp_path / "m").exists()


def test_a_generator_of_other_data_is_refused(generator, tree):
    args = SimpleNamespace(data="cifar10", size=None, corrupt=None)
    one_line(lambda: Banks.load_generator(generator, args), "--data", "(here cifar10)")
    args = SimpleNamespace(data=str(tree), size=32, corrupt="gray")
    one_line(lambda: Banks.load_generator(generator, args), "--size 16 (here 32)", "gray+down2 (here gray)")


def test_an_unfit_generator_is_warned_of_once(generator, tree, tmp_path, capsys):
    shutil.copy(generator, tmp_path)
    measures = json.loads((generator.parent / "generator.json").read_text())
    Utils.write_json(tmp_path / "generator.json", measures | {"best_of_16": 9.0})
    Banks.load_generator(tmp_path / generator.name, SimpleNamespace(data=str(tree), size=16, corrupt=None))
    assert capsys.readouterr().out.count("warning: this generator is not fit") == 1


# ---------------------------------------------------------------------------------------------------- stages


def test_a_generator_is_trained_where_there_is_none(monkeypatch, tmp_path):
    asked = []

    def train(args):
        asked.append(args)
        folder = tmp_path / "TrainCamNet-x"
        folder.mkdir()
        (folder / "args.json").write_text(json.dumps({"args": {"data": "shapes", "size": None, "corrupt": "gray"}}))
        (folder / "generator.json").write_text("{}")
        Utils.save_(folder / "1.pt", step=1)

    monkeypatch.setattr(TrainCamNet, "main", train)
    args = TrainISICLE.get_args(["--models_dir", str(tmp_path), "--corrupt", "gray"])
    assert Banks.find_generator(args) is None
    assert TrainISICLE.train_generator(args) == tmp_path / "TrainCamNet-x" / "1.pt"
    assert (asked[0].corrupt, asked[0].models_dir, asked[0].resume) == ("gray", str(tmp_path), "auto")
    assert Banks.find_generator(args) == TrainISICLE.train_generator(args)
    assert len(asked) == 1  # the second time it is found
    monkeypatch.setenv("WORLD_SIZE", "2")
    one_line(lambda: TrainISICLE.train_generator(args), "torchrun", "first run python TrainCamNet.py --data=shapes")


# TrainISICLE.py with a generator for the tiny tree that is trained in seconds, and a bank that is filled slowly
SLOW = """
import sys, time
import Data
from CamNet import Bank
Data.DATASETS["folder"].generator.update(net="tiny", distance="pixels", m="4,2", period=16, visits=2, periods=3, bs=8)
Data.DATASETS["folder"].generator.update(save_iter=1, single_code=False)
Bank.SAVED_EVERY = 0
restore = Bank.restore
def slow(*arguments, **more):
    time.sleep(0.2)
    return restore(*arguments, **more)
Bank.restore = slow
Bank.fill.__kwdefaults__["bs"] = 16
import TrainISICLE, Utils
sys.argv[0] = "TrainISICLE.py"
Utils.run_script(TrainISICLE.main, TrainISICLE.get_args)
"""


def test_killed_in_any_stage_the_next_start_goes_on(quick, tmp_path):
    models = tmp_path / "m"
    argv = quick(models, "--num_codes", "2")

    def kill_when(condition):
        signal_when(start("-c", SLOW, *argv), signal.SIGKILL, condition)

    kill_when(lambda: any(models.glob("TrainCamNet-*/1.pt")))
    assert not any(models.glob("TrainCamNet-*/generator.json"))
    kill_when(lambda: any(models.glob("TrainCamNet-*/bank-*.part.json")))
    assert not any(models.glob("TrainCamNet-*/bank-*.npy"))
    kill_when(lambda: count_lines(models, "TrainISICLE-*/metrics.jsonl") >= 35)
    (folder,) = models.glob("TrainISICLE-*")

    before = content(folder)
    again = run("-c", SLOW, *argv)
    one_error(again, "--resume auto continues it")  # nothing is lost by starting as before
    assert content(folder) == before

    last = run("-c", SLOW, *argv, "--resume", "auto")
    assert last.code == 0, last.err
    assert "continuing at step 30" in last.out
    assert ", found" in last.out
    assert "made in" not in last.out
    whole = run("-c", SLOW, *argv, "--suffix", "whole")
    assert whole.code == 0, whole.err
    (uninterrupted,) = models.glob("TrainISICLE-*-whole")
    assert losses(folder) == losses(uninterrupted)


def test_two_started_at_a_time_share_generator_and_bank(quick, tmp_path):
    both = [start("-c", SLOW, *quick(tmp_path / "m", "--num_codes", "2", "--suffix", name)) for name in "ab"]
    done = [finish(process) for process in both]
    assert [each.code for each in done] == [0, 0], done
    assert sum("made in" in each.out for each in done) == 1
    assert sum("python TrainCamNet.py" in each.out for each in done) == 1
    assert any("waiting: another process is" in each.out for each in done)


def test_a_full_disk_is_one_line(quick, models, generator):
    argv = quick(models, "--num_codes", "5", "--generator", generator, "--suffix", "full")
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))"  # of a bank of 3.5 MiB
    done = run("-c", f"{limit}\n{SLOW}", *argv)
    one_error(done, "cannot write the bank")
    assert len(done.err.splitlines()) == 1
    assert not any(models.glob("TrainCamNet-*/bank-*-k5-*"))
    assert not any(models.glob("*-full"))
