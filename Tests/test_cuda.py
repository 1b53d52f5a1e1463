"""The program on a GPU: no step waits for the device, runs resume to the same bits, and the CPU gives the same."""

import shutil

import numpy as np
import pytest
import torch
from helpers import TORCHRUN, different, lines, losses, one_error, only_run, run

import Flags
import Graphs
import TrainSimCLR
import Utils
from Augmentations import Augmentation
from Benchmarks import Gpu
from CamNet import Codes
from CamNet.Codes import make_keys
from CamNet.Corruptions import Corruption

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA: run Tests/test_gpu.py")

GENERATOR = (
    "--net tiny --corrupt gray+down2 --distance pixels --candidates 4,2 --period 32 --visits 3 --periods 2 --bs 8"
)
ISICLE = ["--num_codes", "3", "--camnet", GENERATOR]


@pytest.fixture
def on_gpu(quick, tmp_path):
    """(*more) -> the quick flags on the GPU, in a folder of the test."""
    return lambda *more: [*quick(tmp_path / "models"), "--device", "cuda", *map(str, more)]


@pytest.fixture
def bench():
    """The parts of Benchmarks.Gpu, in small."""
    return Gpu.Bench(torch.device("cuda"), Gpu.QUICK)


def finished(*words):
    """Run Python with these words; return what it printed. It must not fail."""
    done = run(*words)
    assert done.code == 0, done.err
    assert "Traceback" not in done.err
    return done.out


def numbers(folder, name):
    """Return the values of a name in metrics.jsonl."""
    return [line[name] for line in lines(folder) if name in line]


def gradient_of(net):
    """Return the gradient of all weights, (n,)."""
    return torch.cat([parameter.grad.flatten() for parameter in net.parameters()])


def relative_error(value, wanted):
    """Return |value - wanted| / |wanted|."""
    assert wanted.norm() > 0
    return ((value - wanted).norm() / wanted.norm()).item()


# ---------------------------------------------------------------------------------------------------- waits


def without_waits(step):
    """Run a step twice; the second time, everything that waits for the device raises RuntimeError."""
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_check_sees_waits():
    x = torch.ones(3, device="cuda")
    with pytest.raises(RuntimeError, match="synchroniz"):
        without_waits(lambda: x.sum().item())


@pytest.mark.parametrize("num_views", [2, 3])
def test_no_step_of_simclr_waits(bench, num_views):
    trainer = Gpu.simclr_trainer(bench, bench.split(64))
    trainer.positives = TrainSimCLR.SamePair(num_views)
    without_waits(Gpu.steps_of(trainer))


def test_no_step_of_isicle_waits(bench, monkeypatch):
    """Of a bank in memory, one that stays on disk, and --pick farthest."""
    monkeypatch.setattr(bench, "milliseconds", without_waits)
    assert len(list(Gpu.measure_isicle(bench))) == 3


def test_no_step_of_camnet_waits(bench):
    trainer, period = Gpu.camnet(bench, 4, 8)
    part = torch.arange(4, device="cuda")
    without_waits(lambda: trainer.update(period, part))


# ---------------------------------------------------------------------------------------------------- as on the CPU


@pytest.mark.parametrize("settings", [{"blur_p": 0.5, "blur_kernel": 5, "solarize_p": 0.2}, {"crop_scale": None}])
def test_views_are_those_of_a_cpu(settings):
    augmentation = Augmentation(32, **settings)
    images = torch.randint(256, (200, 3, 32, 32), dtype=torch.uint8)
    params = augmentation.draw(200, 32, 32, torch.Generator().manual_seed(0))
    views = augmentation.apply(images.to("cuda"), params).cpu()
    torch.testing.assert_close(views, augmentation.apply(images, params), rtol=0, atol=1e-4)


def test_random_numbers_are_those_of_a_cpu():
    keys = make_keys(3, torch.arange(500))
    there = make_keys(3, torch.arange(500, device="cuda"))
    assert torch.equal(there.cpu(), keys)
    assert torch.equal(Codes.uniforms(there, 301).cpu(), Codes.uniforms(keys, 301))
    normals = Codes.normals(there, 301).cpu()
    torch.testing.assert_close(normals, Codes.normals(keys, 301), rtol=0, atol=5e-6)  # log, cos, sin round


@pytest.mark.parametrize("spec", ["gray", "detail2", "gray+down2", "down4+mask0.5", "gray+mask0.25"])
def test_corruptions_are_those_of_a_cpu(spec):
    corruption = Corruption(spec, 16)
    keys = torch.tensor([3, -1, 2**62, 0, 77])
    images = torch.rand(5, 3, 16, 16)
    condition = corruption(images, keys)
    there = corruption(images.to("cuda"), keys.to("cuda"))
    torch.testing.assert_close(there.cpu(), condition)
    others = torch.rand(5, 3, 16, 16)
    projected = corruption.project(others.to("cuda"), there).cpu()
    torch.testing.assert_close(projected, corruption.project(others, condition))


@pytest.mark.parametrize("storage", ["memory", "stream"])
def test_batches_of_files_are_those_of_a_cpu(quick, tmp_path, storage):
    args = TrainSimCLR.get_args([*quick(tmp_path), "--storage", storage])
    here = Flags.train_split_for(args, torch.device("cpu"))
    there = Flags.train_split_for(args, torch.device("cuda"))
    batches = torch.arange(20).split(8)
    for (_, mine), (rows, images) in zip(here.batches(batches), there.batches(batches, "cuda"), strict=True):
        assert images.is_cuda
        assert not rows.is_cuda
        assert torch.equal(images.cpu(), mine)


def test_the_first_step_is_that_of_a_cpu(quick, tmp_path):
    """Later steps differ: a net with batch normalization makes rounding errors larger in every step."""
    logged = []
    for name, device in (("a", "cpu"), ("b", "cuda")):
        folder = tmp_path / name
        finished("TrainSimCLR.py", *quick(folder), "--device", device, "--precision", "fp32")
        logged.append(losses(only_run(folder)))
    assert logged[1][1] == pytest.approx(logged[0][1], rel=1e-5)


def test_gradients_are_those_of_a_cpu(bench):
    here = Gpu.simclr_trainer(Gpu.Bench(torch.device("cpu"), Gpu.QUICK), bench.split(16).to("cpu"), precision="fp32")
    there = Gpu.simclr_trainer(bench, bench.split(16), precision="fp32")
    x = torch.rand(16, 3, 16, 16)
    for trainer in (here, there):
        trainer.net.train()
        loss, _ = trainer.loss_of(x.to(trainer.device))
        loss.backward()
    assert relative_error(gradient_of(there.net).cpu(), gradient_of(here.net)) < 1e-3


def test_features_are_those_of_a_cpu(on_gpu, tree, tmp_path):
    finished("TrainSimCLR.py", *on_gpu("--epochs", 2))
    folder = only_run(tmp_path / "models")
    features = []
    for device in ("cpu", "cuda"):
        file = tmp_path / f"{device}.npz"
        flags = ["--features", tree / "test", "--out", file, "--device", device]
        finished("Export.py", folder, *flags)
        features.append(np.load(file)["features"])
    assert features[0].std() > 1e-3
    np.testing.assert_allclose(features[1], features[0], rtol=1e-4, atol=1e-4)


def test_scores_are_those_of_a_cpu(on_gpu, tmp_path):
    finished("TrainSimCLR.py", *on_gpu())
    folder = only_run(tmp_path / "models")
    scores = []
    for device in ("cpu", "cuda"):
        file = tmp_path / f"{device}.json"
        finished("Evaluate.py", folder, "--eval", "test", "--device", device, "--out", file)
        scores.append(Utils.read_json(file))
    for name in ("knn", "linear", "pixels_knn"):
        assert scores[1][name] == pytest.approx(scores[0][name], abs=0.05)  # three of 60 images


def test_the_search_finds_the_codes_of_a_cpu(bench):
    found = []
    for device in ("cpu", "cuda"):
        here = Gpu.Bench(torch.device(device), Gpu.QUICK)
        trainer, period = Gpu.camnet(here, 4, 16, "--precision fp32 --chunk 64")
        everything = torch.arange(16, device=device)
        found.append(period.search(trainer, trainer.frozen(), everything, period.keys[:, 0].contiguous()))
    same = (found[1].keys.cpu() == found[0].keys).float().mean().item()
    assert same > 0.9  # two candidates can be equally near, up to rounding
    torch.testing.assert_close(found[1].distances.cpu(), found[0].distances, rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------------------------------------------- graphs, compiler


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_graph_of_simclr_gives_the_same_bits(bench, precision):
    torch.backends.cudnn.deterministic = True
    states = []
    for cuda_graph in (False, True):
        trainer = Gpu.simclr_trainer(bench, bench.split(64), precision=precision, cuda_graph=cuda_graph)
        step = Gpu.steps_of(trainer)
        losses = [step()[0].item() for _ in range(3 * Graphs.WARM_UP)]
        states.append([*trainer.net.state_dict().values(), torch.tensor(losses)])
    torch.backends.cudnn.deterministic = False
    assert trainer.graph.graph
    assert all(map(torch.equal, *states))


def test_a_graph_of_camnet_gives_the_same_bits(bench):
    """Also where a shorter last batch, which has no graph, comes between."""
    torch.backends.cudnn.deterministic = True
    states = []
    for cuda_graph in ("", "--cuda_graph"):
        trainer, period = Gpu.camnet(bench, 4, 10, cuda_graph)
        for _ in range(Graphs.WARM_UP):
            for part in torch.arange(10, device="cuda").split(4):
                trainer.update(period, part)
        states.append([*trainer.ema.state_dict().values(), trainer.total])
    torch.backends.cudnn.deterministic = False
    assert trainer.graph.graph
    assert all(map(torch.equal, *states))


def test_a_step_that_cannot_be_captured_goes_on_without_a_graph(capsys):
    weight = torch.nn.Parameter(torch.ones(3, device="cuda"))

    def loss_of(x):
        loss = (weight * x).sum()
        return (loss * loss.item(),)  # waits for the device

    graphed = Graphs.GraphedLoss(loss_of, [weight])
    x = torch.arange(3.0, device="cuda")
    for _ in range(2 * Graphs.WARM_UP):
        (loss,) = graphed(x)
        assert loss.item() == 9
        assert torch.equal(weight.grad, 3 * x)
    assert capsys.readouterr().err.count("no CUDA graph") == 1
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.dropout(x, 0.5, True).shape == (3,)  # random numbers are drawn as before


def test_random_numbers_differ_from_replay_to_replay():
    weight = torch.nn.Parameter(torch.ones(100_000, device="cuda"))
    graphed = Graphs.GraphedLoss(lambda x: (torch.dropout(weight * x, 0.5, True).sum(),), [weight])
    x = torch.ones(100_000, device="cuda")
    values = {graphed(x)[0].item() for _ in range(3 * Graphs.WARM_UP)}
    assert len(values) > 2 * Graphs.WARM_UP


def test_a_compiled_step_of_camnet_has_the_gradients_of_an_eager_one(bench):
    gradients = []
    for compiled in ("", "--compile"):
        torch.compiler.reset()
        trainer, period = Gpu.camnet(bench, 4, 8, f"--precision fp32 {compiled}")
        trainer.update(period, torch.arange(4, device="cuda"))
        gradients.append(gradient_of(trainer.net))
    assert relative_error(gradients[1], gradients[0]) < 1e-3


def test_a_compiled_step_of_simclr_has_the_gradients_of_an_eager_one(bench):
    x = torch.rand(16, 3, 16, 16, device="cuda")
    gradients = []
    for compiled in (False, True):
        torch.compiler.reset()
        trainer = Gpu.simclr_trainer(bench, bench.split(64), compile=compiled, precision="fp32")
        trainer.net.train()
        loss, _ = trainer.loss_of(x)
        loss.backward()
        gradients.append(gradient_of(trainer.net))
    assert relative_error(gradients[1], gradients[0]) < 1e-2


# ---------------------------------------------------------------------------------------------------- whole runs


def test_isicle_from_nothing_and_again(on_gpu, tmp_path):
    argv = on_gpu(*ISICLE)
    out = finished("TrainISICLE.py", *argv)
    assert "linear probe" in out
    folder = only_run(tmp_path / "models", "TrainISICLE-*")
    assert all(np.isfinite(numbers(folder, "loss")))
    assert "this run is complete" in finished("TrainISICLE.py", *argv, "--resume", "auto")


@pytest.mark.parametrize("script", ["TrainSimCLR.py", "TrainISICLE.py"])
def test_a_run_that_is_resumed_ends_in_the_same_bits(on_gpu, tmp_path, script):
    """With an encoder that draws random numbers on the GPU (stochastic depth)."""
    net = ["--backbone", "convnext_tiny", "--size", "32", "--lr", "0.01"]
    argv = on_gpu("--deterministic", *(ISICLE if script == "TrainISICLE.py" else net))
    finished(script, *argv)
    folder = only_run(tmp_path / "models", f"{script[:-3]}-*")
    shutil.copy(folder / "3.pt", tmp_path / "whole.pt")
    for file in ("3.pt", "encoder.pt", "evaluation.json"):
        (folder / file).unlink()
    finished(script, *argv, "--resume", "auto")
    assert not different(folder / "3.pt", tmp_path / "whole.pt")


def test_a_checkpoint_of_a_gpu_continues_on_a_cpu(on_gpu, tmp_path):
    argv = on_gpu()
    finished("TrainSimCLR.py", *argv)
    folder = only_run(tmp_path / "models")
    (folder / "3.pt").unlink()
    finished("TrainSimCLR.py", *argv, "--device", "cpu", "--resume", folder / "2.pt")
    assert (folder / "3.pt").exists()


def test_images_that_stream_give_the_same_bits(on_gpu, tmp_path):
    for storage in ("memory", "stream"):
        finished("TrainSimCLR.py", *on_gpu("--deterministic", "--storage", storage, "--n_workers", 2))
        (folder,) = (tmp_path / "models").glob("[!.]*")
        folder.rename(tmp_path / storage)
    assert not different(tmp_path / "memory" / "3.pt", tmp_path / "stream" / "3.pt")


OTHER_FLAGS = [
    "--compile",
    "--cuda_graph",
    "--compile --cuda_graph",
    "--lars --num_views 3 --loss ntxent",
    "--opt Adam --chunk_views 8",
]


@pytest.mark.parametrize("more", OTHER_FLAGS)
def test_other_flags_run(on_gpu, tmp_path, more):
    finished("TrainSimCLR.py", *on_gpu("--lr", "0.01", *more.split()))
    assert all(np.isfinite(numbers(only_run(tmp_path / "models"), "loss")))


def test_torchrun_uses_nccl(on_gpu, tmp_path):
    """With one process, since there may be one GPU."""
    words = [word.replace("=2", "=1") for word in TORCHRUN]
    finished(*words, "TrainSimCLR.py", *on_gpu("--compile"))
    assert (only_run(tmp_path / "models") / "3.pt").exists()


def test_out_of_memory_is_one_line(on_gpu, tmp_path):
    """Another program holds nearly all of the memory, as far as this one can tell."""
    code = (
        "import sys, torch, runpy; torch.cuda.set_per_process_memory_fraction(0.0005); "
        "sys.argv = sys.argv[1:]; sys.path.insert(0, '.'); runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    done = run("-c", code, "TrainSimCLR.py", *on_gpu("--size", 64, "--bs", 120, "--backbone", "resnet50"))
    one_error(done, "memory", "--bs")
