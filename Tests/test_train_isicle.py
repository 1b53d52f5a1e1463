"""TrainISICLE.py, by running it: the pair, the bank, the generator that it finds or trains, and what it refuses."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import one_line

import Banks
import Reports
import TrainCamNet
import TrainISICLE
import TrainSimCLR
import Utils
from Backbones import ContrastiveNet, ResNet8, build_head
from CamNet.Corruptions import Corruption
from Losses import nt_xent

ROOT = Path(__file__).parents[1]
GENERATOR = "--net tiny --distance pixels --m 4,2 --period 16 --visits 2 --periods 1 --bs 8 --no-single_code"


def run(script, argv, folder=ROOT):
    command = [sys.executable, str(ROOT / script), *argv]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def models(flags, tree, tmp_path_factory):
    """A folder with a generator of the tiny tree."""
    folder = tmp_path_factory.mktemp("isicle")
    place = ["--data", str(tree), "--size", "32", "--models_dir", str(folder), "--data_dir", str(tree.parent / "cache")]
    done = run("TrainCamNet.py", [*GENERATOR.split(), *place])
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def first(flags, models):
    """A finished run, made by its own process."""
    argv = flags(models, "--num_codes", "3")
    done = run("TrainISICLE.py", argv)
    return SimpleNamespace(argv=argv, folder=next(models.glob("TrainISICLE-*"), None), done=done)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_whole_run(first, models):
    assert first.done.returncode == 0, first.done.stderr
    assert "generator: " in first.done.stdout and "made in" in first.done.stdout and "kNN" in first.done.stdout
    assert (first.folder / "evaluation.json").exists() and (first.folder / "3.pt").exists()
    (bank,) = models.glob("TrainCamNet-*/bank-*.npy")
    assert np.load(bank).shape == (240, 3, 3, 32, 32)


def test_shows_what_the_pairs_are_worth(first):
    *training, scores = metrics(first.folder)
    result = json.loads((first.folder / "evaluation.json").read_text())
    shares = [line["synthetic_share"] for line in training]  # --p_gen .5 of the third view, in batches of 8
    assert sum(shares) / len(shares) == pytest.approx(0.5 / 3, abs=0.03)
    names = {
        "alignment",
        "uniformity",
        "embedding_std",
        "cosine_real",
        "cosine_synthetic",
        "label_real",
        "label_synthetic",
    }
    assert result["pairs"].keys() == names and {name: scores[name] for name in names} == result["pairs"]
    assert "their synthetic views" in first.done.stdout and "cosine synthetic" in first.done.stdout
    assert 0 <= scores["label_synthetic"] <= 1 and -1 <= scores["cosine_synthetic"] <= 1


def test_second_run_reuses_generator_and_bank(first):
    done = run("TrainISICLE.py", [*first.argv, "--suffix", "again"])
    assert done.returncode == 0 and ", found" in done.stdout and "made in" not in done.stdout
    (again,) = first.folder.parent.glob("TrainISICLE-*-again")
    assert [line.get("loss") for line in metrics(again)] == [line.get("loss") for line in metrics(first.folder)]


@pytest.mark.parametrize("views, pair", [(2, "gen_gen"), (3, "real_real_gen")])
def test_no_share_of_synthetic_images_is_simclr_bit_for_bit(whole, flags, tmp_path, views, pair):
    done = run("TrainISICLE.py", flags(tmp_path / "isicle", "--p_gen", "0", "--pair", pair))
    assert done.returncode == 0, done.stderr
    (folder,), other = (tmp_path / "isicle").iterdir(), whole.folder  # no generator was trained
    if views > 2:
        done = run("TrainSimCLR.py", flags(tmp_path / "simclr", "--num_views", str(views)))
        assert done.returncode == 0, done.stderr
        (other,) = (tmp_path / "simclr").iterdir()
    lines = [line["loss"] for line in metrics(folder) if "loss" in line]
    assert lines == [line["loss"] for line in metrics(other) if "loss" in line] and len(lines) == 90
    ours, theirs = Utils.load_(folder / "3.pt"), Utils.load_(other / "3.pt")
    assert all(torch.equal(ours["encoder"][name], value) for name, value in theirs["encoder"].items())


def source(pair="gen_gen", k=5, n=6, **more):
    """A `Restored` over a bank in which restoration j of image i is full of the value 10 i + j + 1."""
    values = {"p_gen": 1.0, "gen_warmup": 0, "num_pos": 3, "pick": "random", "loss": "lout", "gen_weight": 1.0}
    args = SimpleNamespace(pair=pair, seed=0, temp=0.5, **{**values, **more})
    content = (10 * torch.arange(n)[:, None] + torch.arange(k) + 1).byte()[:, :, None, None, None].expand(n, k, 3, 8, 8)
    bank = TrainISICLE.Bank(content.contiguous().numpy(), "cpu", on_device=True)
    positives = TrainISICLE.Restored(args, lambda epoch: bank)
    positives.start_epoch(0)
    return positives


def ask(positives, step=0, n=6, steps_per_epoch=10):
    trainer = SimpleNamespace(step=step, steps_per_epoch=steps_per_epoch)
    views = positives(torch.arange(n), torch.zeros(n, 3, 8, 8, dtype=torch.uint8), trainer)
    return torch.stack([view[:, 0, 0, 0] for view in views]).int()  # (M, n): 0 where a view is the image


@pytest.mark.parametrize(
    "pair, real",
    [
        *[("gen_gen", [0, 0]), ("real_gen", [1, 0]), ("real_real_gen", [1, 1, 0]), ("multi", [0] * 3)],
        ("gen_twice", [0, 0]),
    ],
)
def test_pairs(pair, real):
    positives = source(pair)
    views = ask(positives)
    assert len(views) == len(positives) == len(real)
    for view, is_real in zip(views, real):
        if is_real:
            assert (view == 0).all()
        else:
            assert ((view - 1) // 10 == torch.arange(6)).all()  # a restoration of its own image
    assert positives.numbers() == {"synthetic_share": pytest.approx(1 - sum(real) / len(real))}
    if pair == "gen_twice":
        assert torch.equal(*views)


def test_two_different_codes_drawn_anew_in_every_step():
    positives = source()
    draws = torch.stack([ask(positives, step) for step in range(200)])  # (steps, 2, n)
    assert (draws[:, 0] != draws[:, 1]).all()
    for image in range(6):  # all 20 ordered pairs of 5 codes come, about equally often
        pairs = {tuple(pair) for pair in draws[:, :, image].tolist()}
        assert len(pairs) == 20
    assert torch.equal(ask(positives, 7), ask(positives, 7))  # step and image decide
    alone = positives(torch.tensor([3]), torch.zeros(1, 3, 8, 8).byte(), SimpleNamespace(step=7, steps_per_epoch=10))
    assert [view[0, 0, 0, 0].item() for view in alone] == ask(positives, 7)[:, 3].tolist()  # not the batch


def test_share_and_warm_up():
    positives = source(p_gen=0.25)
    share = torch.cat([(ask(positives, step) > 0).flatten() for step in range(500)]).float().mean()
    assert share == pytest.approx(0.25, abs=0.02)
    assert 0 < positives.numbers()["synthetic_share"] < 0.8  # of the 12 last views
    rising = source(gen_warmup=2)
    trainer = SimpleNamespace(steps_per_epoch=10)
    shares = [rising.share(SimpleNamespace(step=step, **vars(trainer))) for step in (0, 9, 19, 50)]
    assert shares == pytest.approx([0.05, 0.5, 1.0, 1.0])


def test_corrupted_is_what_the_generator_sees():
    args = SimpleNamespace(pair="corrupted", seed=0, num_pos=3, p_gen=1.0)
    control = TrainISICLE.Corrupted(args, Corruption("gray+down2", 8))
    images = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    one, other = control(torch.arange(4), images, SimpleNamespace(step=0))
    grey = (images.float() * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1)
    want = torch.nn.functional.interpolate(
        grey.unflatten(1, (4, 2)).unflatten(3, (4, 2)).mean((2, 4))[:, None], (8, 8), mode="bicubic"
    )
    assert torch.equal(one, other) and len(control) == 2
    assert (one.float() - want.clamp(0, 255)).abs().max() <= 1  # the same in all channels


class Maker:
    """A source whose `synthetic` is a function of the images."""

    def __init__(self, make):
        self.make = make

    def synthetic(self, indices, images, trainer):
        return self.make(images)


def test_label_preservation_of_images_themselves_and_of_noise():
    args = TrainSimCLR.get_args(["--device", "cpu"])
    split = TrainSimCLR.Flags.splits_for(args, torch.device("cpu")).train
    net = ContrastiveNet(ResNet8(), build_head(128, 32, 16)).eval()
    trainer = SimpleNamespace(train_split=split, device=torch.device("cpu"), net=net)
    trainer.positives = Maker(lambda images: images)
    same = Reports.label_preservation(trainer)
    assert same["label_real"] == same["label_synthetic"] > 0.12  # an untrained net's features are worth a little
    trainer.positives = Maker(lambda images: torch.zeros_like(images))
    assert Reports.label_preservation(trainer)["label_synthetic"] == pytest.approx(0.1, abs=0.02)


def test_recipe_is_simclrs():
    for data in ("shapes", "cifar10", "stl10"):
        simclr, ours = (vars(script.get_args(["--data", data])) for script in (TrainSimCLR, TrainISICLE))
        shared = simclr.keys() & ours.keys()
        assert {"color_s", "temp", "lr"} < shared and all(ours[name] == simclr[name] for name in shared)


def test_losses():
    z = torch.randn(3, 8, 16, generator=torch.Generator().manual_seed(0))
    two = z[:2]
    for loss in ("lout", "lin", "ntxent"):
        positives = source(loss=loss)
        assert positives.loss(two, positives.args).item() == pytest.approx(nt_xent(*two, 0.5).item(), rel=1e-6)
    cosines = torch.nn.functional.cosine_similarity(z[0], z[2])
    align = source("real_real_gen", loss="align", gen_weight=0.5)
    assert align.loss(z, align.args).item() == pytest.approx(
        (nt_xent(*two, 0.5) + 0.5 * (2 - 2 * cosines).mean()).item()
    )
    third = source("real_real_gen", loss="ntxent", gen_weight=0.5)
    assert third.loss(z, third.args).item() == pytest.approx(
        (nt_xent(*two, 0.5) + 0.5 * nt_xent(z[0], z[2], 0.5)).item()
    )


def test_farthest_takes_the_least_alike():
    class Angle(torch.nn.Module):  # a feature whose direction follows from the brightness
        def forward(self, x):
            angle = 3 * x.mean((1, 2, 3))
            return torch.stack([angle.cos(), angle.sin()], dim=1)

    values = torch.tensor([[10, 20, 30, 250], [200, 5, 190, 195]])
    content = values.byte()[:, :, None, None, None].expand(2, 4, 3, 8, 8)
    bank = TrainISICLE.Bank(content.contiguous().numpy(), "cpu", on_device=True)
    net = SimpleNamespace(encoder=Angle(), training=True)
    columns = TrainISICLE.farthest(bank, torch.arange(2), 2, None, SimpleNamespace(net=net))
    assert [sorted(pair) for pair in columns.tolist()] == [[0, 3], [0, 1]]
    image = torch.full((2, 3, 8, 8), 255, dtype=torch.uint8)
    columns = TrainISICLE.farthest(bank, torch.arange(2), 1, image, SimpleNamespace(net=net))
    assert columns.tolist() == [[0], [1]]


def test_own_bank(flags, tmp_path):
    np.save(tmp_path / "mine.npy", np.random.default_rng(0).integers(0, 256, (240, 2, 3, 32, 32), dtype=np.uint8))
    done = run("TrainISICLE.py", flags(tmp_path / "m", "--bank", str(tmp_path / "mine.npy"), "--epochs", "2"))
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "m").iterdir())) == 1  # no generator


def test_new_banks_every_e_epochs(flags, models):
    done = run("TrainISICLE.py", flags(models, "--num_codes", "2", "--refresh", "2", "--suffix", "fresh"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("made in") == 2  # for epochs 0, 1 and for epoch 2; what is measured last has no own
    assert [path.stem[-1] for path in models.glob("TrainCamNet-*/bank-*-k2-*-refresh2-*.npy")] == [
        "1"
    ]  # the old one is gone


def test_several_processes_change_the_bank_together(flags, models):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "TrainISICLE.py"]
    argv = flags(models, "--num_codes", "2", "--refresh", "1", "--eval_iter", "1", "--epochs", "2", "--bs", "48")
    argv += ["--suffix", "two"]
    done = subprocess.run([*launcher, *argv], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("made in") == 2 and done.stdout.count("generator: ") == 1
    (folder,) = models.glob("TrainISICLE-*-two")
    assert [line["epoch"] for line in metrics(folder) if "cosine_synthetic" in line] == [1, 2]


def test_resume_with_other_positives_is_refused(first):
    args, cpu = TrainISICLE.get_args(first.argv), torch.device("cpu")
    TrainSimCLR.resolve(args, 1)
    positives = TrainISICLE.Restored(args, None)
    trainer = TrainSimCLR.Trainer(args, TrainSimCLR.Flags.splits_for(args, cpu).train, positives, cpu)
    one_line(lambda: trainer.load(first.folder / "3.pt"), "another generator or bank", "--suffix")
    positives.fingerprint = Utils.load_(first.folder / "3.pt")["positives"]
    trainer.load(first.folder / "3.pt")
    assert trainer.step == 90 and len(positives.fingerprint) == 8


@pytest.mark.parametrize(
    "more, parts",
    [
        ("--num_codes 1 --pair gen_gen", ["--num_codes: 1", "real_gen"]),
        ("--num_codes 2 --pair multi", ["--num_codes: 2", "takes 3"]),
        ("--loss align --pair gen_gen", ["--loss align", "real_real_gen"]),
        ("--bank nowhere.npy", ["--bank nowhere.npy", "numpy.save"]),
        ("--bank nowhere.npy --refresh 2", ["--bank nowhere.npy", "--refresh"]),
        ("--generator nowhere.pt", ["nowhere.pt"]),
        ("--generator ENCODER", ["it holds no generator"]),
        ("--corrupt gray --generator RUN", ["--corrupt gray+down2 (here gray)"]),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(flags, models, whole, tmp_path, more, parts):
    stands_for = {"RUN": str(next(models.glob("TrainCamNet-*"))), "ENCODER": str(whole.folder)}
    done = run("TrainISICLE.py", flags(tmp_path / "m", *(stands_for.get(word, word) for word in more.split())))
    assert done.returncode == 2 and "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1
    assert all(part in done.stderr for part in parts) and not (tmp_path / "m").exists()


def test_generator_of_other_data_is_refused(models):
    file = Utils.newest_checkpoint(next(models.glob("TrainCamNet-*")))
    state = Utils.load_(file)
    args = SimpleNamespace(data="cifar10", size=None, corrupt=None)
    one_line(lambda: Banks.load_generator(file, args), "--data", "(here cifar10)")
    args = SimpleNamespace(data=state["args"]["data"], size=16, corrupt="gray")
    one_line(lambda: Banks.load_generator(file, args), "--size 32 (here 16)", "gray+down2 (here gray)")


def test_unfit_generator_is_warned_of_once(models, capsys):
    file = Utils.newest_checkpoint(next(models.glob("TrainCamNet-*")))
    state, measures = Utils.load_(file), file.parent / "generator.json"
    before = measures.read_text()
    measures.write_text(json.dumps({**json.loads(before), "best_of_16": 9.0}))
    args = SimpleNamespace(data=state["args"]["data"], size=32, corrupt=None)
    Banks.load_generator(file, args)
    measures.write_text(before)
    assert capsys.readouterr().out.count("warning: this generator is not fit") == 1


def test_trains_a_generator_where_there_is_none(monkeypatch, tmp_path):
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
    assert Banks.train_generator(args) == tmp_path / "TrainCamNet-x" / "1.pt"
    assert asked[0].corrupt == "gray" and asked[0].models_dir == str(tmp_path) and asked[0].resume == "auto"
    assert Banks.find_generator(args) == Banks.train_generator(args) and len(asked) == 1  # the second time it is found
    monkeypatch.setenv("WORLD_SIZE", "2")
    one_line(lambda: Banks.train_generator(args), "torchrun", "first run python TrainCamNet.py --data=shapes")


# TrainISICLE.py with a generator for the tiny tree that is trained in seconds, and a bank that is filled slowly
SMALL = """
import sys, time
import Data
from CamNet import Bank
Data.DATASETS["folder"].generator.update(net="tiny", distance="pixels", m="4,2", period=16, visits=2, periods=3, bs=8)
Data.DATASETS["folder"].generator.update(save_iter=1, single_code=False)
Bank.SAVED_EVERY, restore = 0, Bank.restore
def slow(*arguments, **more):
    time.sleep(0.2)
    return restore(*arguments, **more)
Bank.restore = slow
Bank.fill.__kwdefaults__["bs"] = 16
import TrainISICLE, Utils
sys.argv[0] = "TrainISICLE.py"
Utils.run_script(TrainISICLE.main, TrainISICLE.get_args)
"""


def start(argv):
    command = [sys.executable, "-c", SMALL, *argv]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, **pipes)


def kill_when(process, condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def count_lines(models, pattern):
    return sum(len(file.read_text().splitlines()) for file in models.glob(pattern))


def test_killed_in_any_stage_the_next_start_goes_on(flags, tmp_path):
    argv, models = flags(tmp_path / "m", "--num_codes", "2"), tmp_path / "m"
    kill_when(start(argv), lambda: any(models.glob("TrainCamNet-*/1.pt")))
    assert not any(models.glob("TrainCamNet-*/generator.json"))
    process = start(argv)
    kill_when(process, lambda: any(models.glob("TrainCamNet-*/bank-*.part.json")))
    assert not any(models.glob("TrainCamNet-*/bank-*.npy"))
    kill_when(start(argv), lambda: count_lines(models, "TrainISICLE-*/metrics.jsonl") >= 35)
    out, err = start(argv).communicate()
    assert len(err.splitlines()) == 1 and "--resume auto continues it" in err  # nothing is lost by starting as before
    last = start([*argv, "--resume", "auto"])
    out, err = last.communicate()
    assert last.returncode == 0 and "going on at step 30" in out and ", found" in out and "made in" not in out
    whole = start([*argv, "--suffix", "whole"])
    assert whole.communicate() and whole.returncode == 0
    (folder,), (beside,) = (
        [path for path in models.glob("TrainISICLE-*") if path.name.endswith("-whole") == is_whole]
        for is_whole in (False, True)
    )
    assert [line.get("loss") for line in metrics(folder)] == [line.get("loss") for line in metrics(beside)]


def test_two_started_at_a_time_share_generator_and_bank(flags, tmp_path):
    both = [start(flags(tmp_path / "m", "--num_codes", "2", "--suffix", name)) for name in "ab"]
    outputs = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert (
        sum("made in" in out for out, _ in outputs) == 1
        and sum("python TrainCamNet.py" in out for out, _ in outputs) == 1
    )
    assert "waiting: another process is" in outputs[0][0] + outputs[1][0]


def test_full_disk_is_one_line(flags, models):
    generator = str(next(models.glob("TrainCamNet-*")))
    argv = flags(models, "--num_codes", "5", "--generator", generator, "--suffix", "full")
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))"  # of a bank of 3.5 MiB
    done = subprocess.run(
        [sys.executable, "-c", f"{limit}\n{SMALL}", *argv],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "cannot write the bank" in done.stderr
    assert not any(models.glob("TrainCamNet-*/bank-*-k5-*")) and not any(models.glob("*-full"))
