"""Several processes against one: gradients, batch statistics, and whole runs under torchrun (gloo, on the CPU)."""

import functools
import json
import math
import os
import shutil
import signal
import socket
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.run
import torch.multiprocessing as mp
from helpers import ROOT, count_lines, losses, one_line, only_run, wait_for
from torch import nn
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import Distributed
import Evaluate
import Export
import Flags
import TrainCamNet
import TrainISICLE
import TrainSimCLR
import Utils
from Backbones import ContrastiveNet, build_encoder, build_head
from Benchmarks.Forks import draw_images, flags_of, problem_of, start_ranks, state_of
from Images import Shapes
from Images.Split import Split
from Losses import multi_positive, nt_xent


def _process(rank, world, port, work, file):
    """One of `world` forked processes: join the group, work, save what the work returns."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    Distributed.start(torch.device("cpu"))
    torch.save(work(rank, world), f"{file}{rank}")
    Distributed.stop()


def free_port():
    """A port of this machine that no process uses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def processes(world, work, tmp_path):
    """[what work(rank, world) returns in each of `world` processes]."""
    mp.start_processes(_process, (world, free_port(), work, tmp_path / "rank"), world, start_method="fork")
    return [torch.load(f"{tmp_path / 'rank'}{rank}") for rank in range(world)]


def golden_net(rank, world):
    """Ten steps on the numbers of lightly's tests/utils/test_dist__gather__losses.py: the weights they end in."""
    net = nn.Linear(5, 2, bias=False)
    net.weight.data = torch.arange(1, 11).view(2, 5) / 10
    x = torch.arange(80.0).view(8, 2, 5).chunk(world)[rank]
    other_view = torch.arange(32.0).view(8, 4).chunk(world)[rank]
    forward = Distributed.wrap(net, torch.device("cpu"))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for _ in range(10):
        optimizer.zero_grad()
        z = Distributed.gather(torch.stack([forward(x).flatten(1), other_view]))
        nt_xent(z[0], z[1], 0.5).backward()
        optimizer.step()
    return net.weight.data


@pytest.mark.parametrize("world", [1, 2, 4])
def test_gradients_through_gathered_negatives_end_in_lightlys_weights(world, tmp_path):
    expected = torch.tensor([[0.1675, 0.2676, 0.3678, 0.4679, 0.5680], [0.5763, 0.6742, 0.7721, 0.8700, 0.9679]])
    for weight in processes(world, golden_net, tmp_path):
        torch.testing.assert_close(weight, expected, rtol=0, atol=6e-5)


def one_step(rank, world):
    """(loss, gradients, state) of ResNet8 and its head, in float64, on this process's share of 12 images."""
    torch.manual_seed(0)
    encoder = build_encoder("resnet8", False, 16)
    net = ContrastiveNet(encoder, build_head(encoder.num_features, 16, 8)).double()
    x = torch.rand(3, 12, 3, 16, 16, generator=torch.Generator().manual_seed(1)).double() + 100  # 3 views, far from 0
    mine = x.chunk(world, dim=1)[rank].flatten(0, 1)
    forward = Distributed.wrap(net, torch.device("cpu"))
    all_reduce = Distributed.dist.all_reduce

    def checked(tensor, *more, **options):
        assert tensor.is_contiguous()  # as NCCL demands
        return all_reduce(tensor, *more, **options)

    Distributed.dist.all_reduce = checked
    z = Distributed.gather(forward(mine).view(3, -1, 8))
    loss = multi_positive(z, 0.5)
    loss.backward()
    Distributed.dist.all_reduce = all_reduce
    return loss.detach(), {name: each.grad for name, each in net.named_parameters()}, net.state_dict()


def test_loss_gradients_and_batch_statistics_are_those_of_one_process(tmp_path):
    loss, gradients, state = one_step(0, 1)
    assert loss > 1
    assert all(gradient.abs().sum() > 0 for gradient in gradients.values())
    for other_loss, other_gradients, other_state in processes(3, one_step, tmp_path):
        torch.testing.assert_close(other_loss, loss, rtol=1e-12, atol=0)
        assert other_state.keys() == state.keys()  # a checkpoint of three processes fits one
        for name in state:
            torch.testing.assert_close(other_state[name], state[name], rtol=1e-10, atol=1e-12, msg=name)
        for name, gradient in gradients.items():
            torch.testing.assert_close(other_gradients[name], gradient, rtol=1e-7, atol=1e-9, msg=name)


def chunked_step(rank, world):
    """(loss, gradients, state) after a step of the Trainer in two chunks: first and second views of 12 images."""
    flags = "--device cpu --size 16 --backbone resnet8 --proj_norm --bs 12 --epochs 1 --precision fp32 --lr 0"
    args = TrainSimCLR.get_args([*flags.split(), "--chunk_views", str(12 // world)])
    TrainSimCLR.adjust_flags(args, world)
    images = torch.randint(256, (24, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    split = Split(images, torch.zeros(24, dtype=torch.int64), ["one"])
    trainer = TrainSimCLR.Trainer(args, split, TrainSimCLR.SamePair(2), torch.device("cpu"), rank, world)
    trainer.net.train()
    loss, *_ = trainer.update(*next(trainer.batches()))
    return loss, {name: each.grad for name, each in trainer.net.named_parameters()}, trainer.net.state_dict()


def drawn(rank, world):
    """Random numbers of torch after a Trainer was made, and after it was made from a checkpoint."""
    flags = "--device cpu --size 16 --backbone resnet8 --bs 12 --epochs 1"
    args = TrainSimCLR.get_args(flags.split())
    TrainSimCLR.adjust_flags(args, world)
    images = torch.randint(256, (24, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    split = Split(images, torch.zeros(24, dtype=torch.int64), ["one"])
    trainer = TrainSimCLR.Trainer(args, split, TrainSimCLR.SamePair(2), torch.device("cpu"), rank, world)
    weights = trainer.net.state_dict()
    first = torch.rand(3)
    trainer.step = 1
    trainer.draw_apart()
    return first, torch.rand(3), weights


def test_dropout_differs_among_the_processes(tmp_path):
    first = drawn(0, 1)
    ranks = processes(2, drawn, tmp_path)
    assert torch.equal(ranks[0][0], first[0])  # the first process draws as one alone does
    assert not torch.equal(ranks[0][0], ranks[1][0])
    assert not torch.equal(ranks[1][0], ranks[1][1])  # others in another step
    for name, value in ranks[0][2].items():
        assert torch.equal(value, ranks[1][2][name])


def test_chunks_in_several_processes_are_those_of_one(tmp_path):
    loss, gradients, state = chunked_step(0, 1)
    assert all(gradient.abs().sum() > 0 for gradient in gradients.values())
    assert state["encoder.stem.1.num_batches_tracked"] == 2
    for other_loss, other_gradients, other_state in processes(2, chunked_step, tmp_path):
        torch.testing.assert_close(other_loss, loss, rtol=1e-5, atol=0)
        for name in state:
            torch.testing.assert_close(other_state[name], state[name], rtol=1e-4, atol=1e-5, msg=name)
        for name, gradient in gradients.items():
            assert (other_gradients[name] - gradient).norm() < 1e-3 * gradient.norm(), name


SEARCH = (
    "--net tiny --corrupt gray --distance pixels --period 30 --visits 2 --bs 4 --precision fp32 --lr 0 --device cpu"
)


def small_generator(*more):
    """A Trainer of 30 images of 8 pixels, of which 3 are held out; it searches 4 at once."""
    args = TrainCamNet.get_args([*SEARCH.split(), *more])
    labels = torch.arange(30) % 10
    split = Split(Shapes.draw(labels, 8, torch.Generator().manual_seed(0)), labels, Shapes.CLASSES)
    parts = (split, TrainCamNet.build_generator(args, 8), TrainCamNet.Distances.Pixels(), [6])
    trainer = TrainCamNet.Trainer(args, *parts, torch.device("cpu"))
    trainer.searched_at_once = 4
    return trainer


def searched(rank, world):
    """The codes of two periods of the same images: the second keeps those that it does not improve."""
    trainer = small_generator("--keep_previous", "--reject", "0.05")
    found = []
    for step in (0, trainer.steps_per_period):
        trainer.step = step
        period = trainer.next_period(SimpleNamespace(signal=None), "", quiet=True)
        assert torch.equal(trainer.chosen[trainer.rows_of(trainer.period)], period.keys)
        found.append(trainer.chosen.clone())
    return found, period.distances


@pytest.mark.parametrize("world", [2, 3])
def test_the_search_finds_the_same_codes_in_any_number_of_processes(world, tmp_path):
    codes, distances = searched(0, 1)
    assert [int((each != TrainCamNet.IMLE.NONE).all(dim=1).sum()) for each in codes] == [27, 27]
    assert 0 < (codes[0] != codes[1]).all(dim=1).sum() < 27
    for other_codes, other_distances in processes(world, searched, tmp_path):
        assert all(torch.equal(one, other) for one, other in zip(codes, other_codes))
        assert other_distances == distances


def generator_steps(rank, world):
    """(loss, gradients) of a step of four images and of the last one, of three; the weights and their average."""
    trainer = small_generator()
    period = trainer.next_period(SimpleNamespace(signal=None), "", quiet=True)
    steps = []
    for part in list(trainer.batches(27))[5:7]:
        loss = trainer.update(period, part)
        steps.append((loss, {name: each.grad.clone() for name, each in trainer.net.named_parameters()}))
    return steps, trainer.net.state_dict(), trainer.ema.state_dict(), trainer.total


def test_a_step_of_the_generator_is_that_of_one_process(tmp_path):
    steps, net, ema, total = generator_steps(0, 1)
    assert all(gradient.abs().sum() > 0 for _, gradients in steps for gradient in gradients.values())
    for other_steps, other_net, other_ema, other_total in processes(4, generator_steps, tmp_path):
        torch.testing.assert_close(other_total, total, rtol=1e-5, atol=0)
        assert all(torch.equal(other_net[name], net[name]) for name in net)  # the rate is 0
        assert all(torch.equal(other_ema[name], ema[name]) for name in ema)
        for (loss, gradients), (other_loss, other_gradients) in zip(steps, other_steps):
            torch.testing.assert_close(other_loss, loss, rtol=1e-5, atol=0)
            for name, gradient in gradients.items():
                assert (other_gradients[name] - gradient).norm() < 1e-4 * gradient.norm() + 1e-9, name
                assert other_gradients[name].stride() == gradient.stride()


def compiled_batches(rank, world):
    """The numbers of images that the compiled loss is given in a period: batches of four, a last one of three."""
    sizes = []

    def stand_in(function, dynamic):
        def compiled(net, distance, condition, wanted, codes):
            sizes.append(len(condition))
            return function(net, distance, condition, wanted, codes)

        return compiled

    torch.compile = stand_in  # in this process alone
    trainer = small_generator("--compile", "--visits", "1")
    period = trainer.next_period(SimpleNamespace(signal=None), "", quiet=True)
    for part in trainer.batches(27):
        trainer.update(period, part)
    return sizes


def test_the_compiler_sees_one_shape_in_each_process(tmp_path):
    assert processes(3, compiled_batches, tmp_path) == [6 * [2], 6 * [1], 6 * [1]]


def share(rank, world):
    """What gather and any_process give."""
    z = torch.arange(4.0).view(2, 2, 1)[:, rank : rank + 1]
    flags = [Distributed.any_process(flag) for flag in (False, rank == 1, True)]
    return Distributed.gather(z), flags


def test_gather_keeps_the_order_and_any_process_hears_each(tmp_path):
    for z, flags in processes(2, share, tmp_path):
        assert z.flatten().tolist() == [0, 1, 2, 3]
        assert z.shape == (2, 2, 1)
        assert flags == [False, True, True]


def download(file, rank, world):
    """Two machines of two processes: each notes when it works."""
    os.environ["LOCAL_RANK"] = str(rank % 2)

    def work():
        with file.open("a") as handle:
            handle.write(str(rank))

    Distributed.first_rank_first(work)


def test_the_first_process_of_each_machine_downloads_before_the_others(tmp_path):
    processes(4, functools.partial(download, tmp_path / "order"), tmp_path)
    order = (tmp_path / "order").read_text()
    assert (order[:2], sorted(order[2:])) == ("02", ["0", "1", "2", "3"])


def test_without_torchrun_nothing_is_distributed():
    net, z = nn.Linear(1, 1), torch.ones(2, 3, 4)
    assert Distributed.start(torch.device("cpu")) == (0, 1, torch.device("cpu"))
    assert Distributed.wrap(net, torch.device("cpu")) is net
    assert Distributed.gather(z) is z
    assert Distributed.any_process(True) is True


def refusals(rank, world):
    """What is said of the same images in all processes, and of others in each."""
    said = []
    for brightness in (7, rank):
        split = Split(
            torch.full((2, 3, 8, 8), brightness, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), ["one"]
        )
        try:
            Flags.check_machines(SimpleNamespace(data="photos"), split)
        except Utils.UserError as error:
            said.append(str(error))
    return said


def test_machines_with_other_images_are_refused(tmp_path):
    for said in processes(2, refusals, tmp_path):
        assert said == ["--data photos: the processes have different images: give every machine the same files"]


# ---------------------------------------------------------------------------------------------------- whole runs


def test_a_run_in_two_processes_has_the_losses_of_one(quick, tmp_path, cli):
    # Rounding grows with every step, the faster the higher the rate: to 4e-2 in 14 steps at .1, 2e-4 at .001.
    calm = ("--precision", "fp32", "--lr", "0.001", "--temp", "0.5", "--bs", "48", "--epochs", "2")
    assert cli(quick(tmp_path / "one", *calm)).code == 0
    ranks = start_ranks(TrainSimCLR, quick(tmp_path / "two", *calm), tmp_path)
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].output()
    for line in ("starting: ", "epoch 1/2  loss", "kNN on raw pixels"):
        assert ranks[0].output().count(line) == 1, line
    assert ranks[1].output() == ""
    assert "Warning" not in ranks[0].output()
    one = losses(only_run(tmp_path / "one"))
    folder = only_run(tmp_path / "two")
    two = losses(folder)
    assert list(one) == list(two) == list(range(1, 11))
    deviation = max(abs(two[step] / one[step] - 1) for step in one)
    print(f"largest relative deviation of {len(one)} losses: {deviation:.1e}")
    assert deviation < 1e-3
    assert len(list(folder.glob("events.*"))) == 1  # from one process
    assert len(json.loads((folder / "args.json").read_text())["starts"]) == 1


@pytest.mark.parametrize("more", [["--finetune", "1"], ["--eval", "cv"]])
def test_the_scores_of_three_processes_are_those_of_one(whole, tmp_path, cli, monkeypatch, more):
    monkeypatch.setattr(Evaluate.extract.__wrapped__, "__defaults__", (None, None, 50))  # images in a batch
    argv = [whole.folder, *more, "--device", "cpu", "--n_workers", "0", "--out"]
    ranks = start_ranks(Evaluate, [*argv, tmp_path / "three.json"], tmp_path, world=3)
    assert [rank.wait() for rank in ranks] == [0, 0, 0], ranks[0].output() + ranks[1].output()
    assert [rank.output() for rank in ranks[1:]] == ["", ""]
    assert cli([*argv, tmp_path / "one.json"], Evaluate).code == 0
    assert (tmp_path / "three.json").read_text() == (tmp_path / "one.json").read_text()


@pytest.mark.parametrize("name, bs", [("features.npz", 50), ("features.csv", 200)])  # 5 parts, 2 parts
def test_the_features_of_three_processes_are_those_of_one(whole, tree, tmp_path, cli, name, bs):
    argv = [whole.folder, "--features", tree, "--device", "cpu", "--n_workers", "0", "--bs", bs, "--out"]
    ranks = start_ranks(Export, [*argv, tmp_path / name], tmp_path, world=3)
    assert [rank.wait() for rank in ranks] == [0, 0, 0], ranks[0].output() + ranks[1].output()
    assert [rank.output() for rank in ranks[1:]] == ["", ""]
    content = (tmp_path / name).read_bytes()
    assert cli([*argv, tmp_path / name], Export).code == 0
    assert (tmp_path / name).read_bytes() == content


def test_a_dry_run_of_two_processes_is_told_once(tmp_path):
    argv = flags_of("TrainISICLE", draw_images(tmp_path / "data"), tmp_path / "models", "--size", "8", "--dry_run")
    ranks = start_ranks(TrainISICLE, argv, tmp_path)
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].output() + ranks[1].output()
    for line in ("dry run of the generator: no run folder was made", "dry run: no run folder was made"):
        assert ranks[0].output().count(line) == 1
    assert ranks[1].output() == ""
    assert not (tmp_path / "models").exists()


def begin(argv):
    """A process of a launcher: run TrainISICLE.py with these flags."""
    sys.argv = ["TrainISICLE.py", *argv]
    with pytest.raises(SystemExit) as caught:
        Utils.run_script(TrainISICLE.main, lambda: TrainISICLE.get_args(argv))
    return caught.value.code


BRIEF = "--corrupt gray --distance pixels --candidates 4 --period 16 --visits 1 --periods 1 --bs 8 --no-single_code"
SHORT = ("--size", "8", "--epochs", "1", "--n_ramp", "0", "--camnet", BRIEF)


def launch(machine, port, data, models_dir):
    """A machine: what `torchrun --nnodes 2 --rdzv_backend c10d` does, with a process that is forked."""
    config = LaunchConfig(
        min_nodes=2,
        max_nodes=2,
        nproc_per_node=1,
        run_id="test",
        rdzv_backend="c10d",
        rdzv_endpoint=f"127.0.0.1:{port}",
        start_method="fork",
    )
    argv = flags_of("TrainISICLE", data, models_dir, *SHORT, "--data_dir", models_dir / f"cache{machine}")
    assert list(elastic_launch(config, begin)(argv).values()) == [0]


def test_two_machines_end_in_the_bits_of_one(tmp_path):
    data = draw_images(tmp_path / "data")
    mp.start_processes(launch, (free_port(), data, tmp_path / "two"), 2, start_method="fork")
    assert all(any((tmp_path / "two" / f"cache{machine}" / ".cache").iterdir()) for machine in range(2))
    ranks = start_ranks(TrainISICLE, flags_of("TrainISICLE", data, tmp_path / "one", *SHORT), tmp_path)
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].output() + ranks[1].output()
    for cache in (tmp_path / "two").glob("cache*"):
        shutil.rmtree(cache)
    assert problem_of(state_of(tmp_path / "two"), state_of(tmp_path / "one")) == ""


def test_a_mistake_is_reported_once(quick, tmp_path):
    ranks = start_ranks(TrainSimCLR, quick(tmp_path / "models", "--bs", "33"), tmp_path)
    assert ranks[0].wait() == 2
    ranks[1].kill()  # as torchrun does
    assert ranks[1].output() == ""
    (error,) = ranks[0].output().splitlines()
    assert "error: --bs 33: it must be a multiple of the 2 processes: use 32" in error
    assert not (tmp_path / "models").exists()
    fewer = TrainSimCLR.get_args(["--bs", "2"])
    one_line(lambda: TrainSimCLR.adjust_flags(fewer, world=4), "--bs 2", "4 processes", "use 4")
    usual = TrainSimCLR.get_args(["--device", "cpu"])
    TrainSimCLR.adjust_flags(usual, world=7)
    assert usual.bs == 252  # 7 x 36, not over the recipe's 256


def test_sigterm_to_torchrun_saves_and_the_run_goes_on(quick, tmp_path, cli, fork):
    argv = quick(tmp_path / "models", "--precision", "fp32", "--epochs", "2", "--no-baselines")
    torchrun = SimpleNamespace(__name__="torchrun", get_args=list, main=torch.distributed.run.main)
    launcher = fork(torchrun, ["--nproc_per_node=2", ROOT / "TrainSimCLR.py", *argv])
    wait_for(lambda: count_lines(tmp_path, "models/*/metrics.jsonl") >= 5, launcher)
    launcher.send(signal.SIGTERM)
    launcher.wait()
    folder = only_run(tmp_path / "models")
    (saved,) = folder.glob("*+*.pt")
    assert f"interrupted: saved {saved}" in launcher.output()
    before = losses(folder)
    assert cli([*argv, "--resume", "auto"]).code == 0  # in one process
    after = losses(folder)
    assert before.items() <= after.items()
    assert after.keys() == set(range(1, 61))
    assert all(math.isfinite(loss) for loss in after.values())


def test_variables_of_another_launcher_do_not_start_a_group(monkeypatch, capsys):
    for name in Distributed.LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    cpu = torch.device("cpu")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert Distributed.start(cpu) == (0, 1, cpu)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    assert Distributed.start(cpu) == (0, 1, cpu)
    assert Distributed.is_first()
    assert "WORLD_SIZE is set, but not LOCAL_RANK, MASTER_ADDR, MASTER_PORT" in capsys.readouterr().err
