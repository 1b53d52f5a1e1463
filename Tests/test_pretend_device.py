"""The whole program on the pretend device: no mismatch, the bits of the CPU in fp32, and what a step costs a GPU."""

import argparse
import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import save_shapes
from torch import nn

import Data
import Evaluate
import Export
import TrainCamNet
import TrainSimCLR
from Augmentations import Augmentation
from Benchmarks import Kernels
from Benchmarks.PretendDevice import KINDS, PretendCuda
from CamNet import Measures
from Images import Shapes
from Images.Split import Split

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
CUDA = torch.device("cuda")
# torch 2.11 rounds gradients of CamNet in another order on devices that are not its own
NEW_TORCH = torch.__version__ >= "2.14"
SIMCLR = "--backbone resnet8 --bs 8 --epochs 2 --proj_hidden 16 --precision fp32 --blur_p 0.5"
CAMNET = "--candidates 4 --period 16 --visits 1 --bs 8 --precision fp32 --no-single_code"


@pytest.fixture
def gpu():
    with PretendCuda(ROOT) as device:
        yield device


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------------------ the device itself


def line_of(function, offset):
    """The line that is `offset` below the function's first one, as the device reports it."""
    return f"Tests/{Path(__file__).name}:{function.__code__.co_firstlineno + offset}"


def index_left_on_host(x):
    return x[torch.arange(4)]


def mask_on_device(x):
    return x[x > 0.5]


def item_in_a_step(x):
    return x.sum().item()


def bool_of_a_device_tensor(x):
    return 1 if x.sum() > 0 else 0


def new_tensor_in_a_step(x):
    return x * x.new_tensor([1.0, 2.0, 3.0])


def blocking_copy(x):
    return x + torch.ones(3).to(x.device)


def copy_to_the_host(x):
    return x.cpu()


FAULTS = [
    index_left_on_host,
    mask_on_device,
    item_in_a_step,
    bool_of_a_device_tensor,
    new_tensor_in_a_step,
    blocking_copy,
    copy_to_the_host,
]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_waits_is_counted_with_its_line(gpu, fault):
    x = torch.rand(8, 3, generator=seeded()).to(CUDA)
    gpu.reset()
    expected = fault(x.cpu())
    gpu.reset()
    result = fault(x)
    assert gpu.count("waits") == 1, gpu.report()
    ((line, _),) = gpu.lines["waits"]
    assert line == line_of(fault, 1)
    result = result.cpu() if isinstance(result, torch.Tensor) else result
    torch.testing.assert_close(result, expected, rtol=0, atol=0)


def mask_left_on_host(x):
    return torch.where(torch.ones(8, 1, dtype=torch.bool), x, 0.0)


def sum_with_a_host_tensor(x):
    return x + torch.ones(3)


def product_with_a_host_tensor(x):
    return x @ torch.ones(3, 2)


def rows_left_on_host(x):
    return x.index_select(0, torch.arange(4))


@pytest.mark.parametrize(
    "fault", [mask_left_on_host, sum_with_a_host_tensor, product_with_a_host_tensor, rows_left_on_host]
)
def test_tensors_of_two_devices_raise_where_they_meet(gpu, fault):
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device") as caught:
        fault(torch.rand(8, 3).to(CUDA))
    lines = [f"Tests/{entry.path.name}:{entry.lineno + 1}" for entry in caught.traceback]
    assert line_of(fault, 1) in lines


def test_a_copy_is_pinned_or_pageable(gpu):
    x = torch.arange(6)
    x.pin_memory().to(CUDA, non_blocking=True)
    assert [gpu.count(kind) for kind in KINDS] == [0, 1, 0, 0]
    x.cuda(non_blocking=True)
    assert [gpu.count(kind) for kind in KINDS] == [0, 1, 1, 0]
    torch.tensor([1.0], device=CUDA)
    assert [gpu.count(kind) for kind in KINDS] == [0, 1, 2, 1]
    assert gpu.copied_bytes == 48 + 48 + 4


def test_views_and_empty_tensors_are_no_kernels(gpu):
    x = torch.zeros(4, 3, device=CUDA)
    gpu.reset()
    torch.empty(7, device=CUDA)
    x.T[1:].unsqueeze(0).detach()
    assert gpu.count("kernels") == 0
    y = x + 1
    assert gpu.count("kernels") == 1 and gpu.touched_bytes == 2 * 48
    assert y.device.type == "cuda" and y.is_cuda and torch.device(y.device).index == 0
    with pytest.raises(TypeError, match="cuda:0"):
        y.numpy()


@pytest.mark.parametrize(
    ("operation", "dtype"),
    [
        (lambda x: x @ x, torch.bfloat16),
        (lambda x: nn.functional.group_norm(x[None], 4), torch.float32),  # bfloat16 on the CPU
        (lambda x: torch.cat([x, x.bfloat16()]), torch.float32),
        (lambda x: x.bfloat16().softmax(0), torch.float32),
        (lambda x: x.bfloat16() + 1, torch.bfloat16),
    ],
)
def test_autocast_casts_as_cuda_does(gpu, operation, dtype):
    x = torch.rand(4, 4, device=CUDA)
    with torch.autocast("cuda", torch.bfloat16):
        assert operation(x).dtype == dtype
        with torch.autocast("cuda", enabled=False):
            assert (x @ x).dtype == torch.float32
    assert (x @ x).dtype == torch.float32


def test_nothing_of_the_device_stays_after_it():
    before = torch.cuda.is_available()
    with PretendCuda(ROOT):
        assert torch.cuda.is_available()
        assert torch.zeros(1, device="cuda").is_cuda
    assert torch.cuda.is_available() == before
    with torch.autocast("cpu", torch.bfloat16):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    assert not torch.ones(1).is_cuda


# ------------------------------------------------------------------------------------------ views


@pytest.mark.parametrize(
    ("settings", "kernels"),
    [
        ({}, 219),
        ({"blur_p": 0.5, "solarize_p": 0.2, "mean": (0.5,) * 3, "std": (0.2,) * 3}, 260),
        ({"interpolation": "bicubic", "jitter": None}, 81),
        ({"crop_scale": None, "flip_p": 0, "jitter": None, "gray_p": 0}, 5),
    ],
)
def test_views_of_a_step_are_one_pinned_copy_and_no_wait(gpu, settings, kernels):
    aug = Augmentation(32, **settings)
    images = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8, generator=seeded())
    params = [aug.draw(64, 32, 32, seeded(seed)) for seed in range(3)]
    on_device = images.to(CUDA)
    gpu.reset()
    views = aug.apply_all([on_device] * 3, params)
    assert gpu.count("waits") == 0 and gpu.count("pageable copies") == 0, gpu.report()
    assert gpu.count("pinned copies") == 1
    assert gpu.count("kernels") <= 1.1 * kernels
    assert torch.equal(views.cpu(), aug.apply_all([images] * 3, params))


# ------------------------------------------------------------------------------------------ SimCLR


def splits(device, n=32, size=32):
    """Train and test split of n shapes each."""
    labels = torch.arange(n) % 4
    parts = [Split(Shapes.draw(labels, size, seeded(seed)), labels, list("abcd")).to(device) for seed in range(2)]
    return Data.Splits(*parts, "test")


def simclr_trainer(device):
    """TrainSimCLR's Trainer with two views."""
    args = TrainSimCLR.get_args(SIMCLR.split())
    TrainSimCLR.adjust_flags(args, 1)
    args.small_stem = True
    torch.manual_seed(0)
    return TrainSimCLR.Trainer(args, splits(device).train, TrainSimCLR.SamePair(args.num_views), device)


def simclr_steps(trainer, count):
    """Take steps of the epoch at hand; return the last loss."""
    trainer.net.train()
    for (indices, images), _ in zip(trainer.batches(), range(count)):
        loss, *_ = trainer.update(indices, images)
    return loss.cpu()


def same_bits(one, other):
    """Whether two state_dicts hold the same bits, wherever their tensors are."""
    assert one.keys() == other.keys()
    return all(torch.equal(one[key].cpu(), other[key].cpu()) for key in one)


def test_simclr_learns_the_same_bits(gpu):
    here = simclr_trainer(CPU)
    there = simclr_trainer(CUDA)
    assert torch.equal(simclr_steps(here, 3), simclr_steps(there, 3))
    assert same_bits(here.net.state_dict(), there.net.state_dict())
    assert next(there.net.parameters()).is_cuda


def test_simclr_resumes_to_the_same_bits(gpu, tmp_path):
    whole = simclr_trainer(CUDA)
    simclr_steps(whole, 3)
    first = simclr_trainer(CUDA)
    simclr_steps(first, 2)
    second = simclr_trainer(CUDA)
    second.load(first.save(tmp_path))
    assert second.step == 2
    simclr_steps(second, 1)
    assert same_bits(whole.net.state_dict(), second.net.state_dict())
    on_cpu = simclr_trainer(CPU)
    on_cpu.load(whole.save(tmp_path))
    assert same_bits(whole.net.state_dict(), on_cpu.net.state_dict())


# ------------------------------------------------------------------------------------------ steps, as counted


def committed():
    """Return {(step, part): its row} of Results/kernels.json."""
    rows = json.loads((ROOT / "Results/kernels.json").read_text())["rows"]
    return {(row["step"], row["part"]): row for row in rows}


def assert_not_more(rows):
    """Fail where a part needs over 10 % more kernels, or more copies or waits, than is committed."""
    known = committed()
    for row in rows:
        before = known[row["step"], row["part"]]
        assert row["kernels"] <= 1.1 * before["kernels"], (row, before)
        for kind in KINDS[1:]:
            assert row[kind] <= before[kind], (row, before)


@pytest.mark.parametrize(
    ("step", "backbone", "kernels", "copies"),
    [
        ("SimCLR, 2 views", "resnet18", 520, 1),
        ("ISICLE, farthest, mapped", "resnet18", 680, 2),  # its encoder also picks the views
        # the net's own kernels are known from the first row: these are the others
        ("ISICLE, bank in memory", "resnet8", 313, 2),
        ("ISICLE, mapped bank", "resnet8", 313, 2),
        ("ISICLE, corrupted", "resnet8", 313, 2),
    ],
)
def test_a_contrastive_step_waits_for_nothing(gpu, monkeypatch, step, backbone, kernels, copies):
    monkeypatch.setattr(Kernels, "SIZE", 8)  # pixels: within 1 % as many kernels as with 32
    monkeypatch.setattr(Kernels, "RECIPE", (*Kernels.RECIPE, "--backbone", backbone))
    rows = Kernels.count_step(gpu, step, Kernels.CONTRASTIVE[step](16))
    total = {kind: sum(row[kind] for row in rows) for kind in KINDS}
    others = [row for row in rows if backbone == "resnet18" or row["part"] not in ("forward", "backward, optimizer")]
    assert sum(row["kernels"] for row in others) <= kernels
    assert total["pinned copies"] <= copies
    assert total["pageable copies"] == 0
    assert total["waits"] == 0
    assert_not_more(rows)


def test_a_step_of_camnet_waits_for_nothing(gpu):
    rows = Kernels.count_camnet(gpu, "CamNet, tiny", Kernels.CAMNETS["CamNet, tiny"](2))
    _, step, bank = rows
    assert step["waits"] == step["pageable copies"] == step["pinned copies"] == 0
    assert bank["waits"] == 2  # the keys go to the device, the restorations to the host
    assert_not_more(rows)


def test_a_step_that_needs_more_than_a_tenth_more_kernels_fails():
    row = committed()["SimCLR, 2 views", "views"]
    assert_not_more([row])
    with pytest.raises(AssertionError):
        assert_not_more([row | {"kernels": int(1.2 * row["kernels"])}])
    with pytest.raises(AssertionError):
        assert_not_more([row | {"waits": row["waits"] + 1}])


# ------------------------------------------------------------------------------------------ ISICLE

PAIRS = {
    "bank in memory": ([], True),
    "mapped bank": ([], False),
    "farthest": (["--pick", "farthest", "--pair", "gen_gen"], False),
    "corrupted": (["--pair", "corrupted", "--corrupt", "gray+mask0.5"], True),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_isicle_learns_the_same_bits(gpu, pair):
    words, on_device = PAIRS[pair]
    words = [*words, "--backbone", "resnet8", "--precision", "fp32", "--proj_hidden", "16"]
    here = Kernels.isicle_trainer(4, CPU, words, on_device)
    there = Kernels.isicle_trainer(4, CUDA, words, on_device)
    assert torch.equal(simclr_steps(here, 2), simclr_steps(there, 2))
    assert same_bits(here.net.state_dict(), there.net.state_dict())


# ------------------------------------------------------------------------------------------ files, scores, features


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of 24 image files in train, and 12 in test."""
    root = tmp_path_factory.mktemp("data") / "shapes"
    for seed, (split, each) in enumerate({"train": 6, "test": 3}.items()):
        save_shapes(root / split, each, 16, seed, Shapes.CLASSES[:4])
    return root


def streamed_trainer(folder, device):
    """TrainSimCLR's Trainer on image files that are decoded for each batch."""
    options = Data.Options(size=16, storage="stream", n_workers=0)
    row = Data.get_row(str(folder), 16)
    args = TrainSimCLR.get_args(SIMCLR.split())
    args.small_stem = True
    args.image_size = 16
    torch.manual_seed(0)
    split = row.load(row, "train", options).to(device)
    return TrainSimCLR.Trainer(args, split, TrainSimCLR.SamePair(args.num_views), device)


def test_streamed_files_give_the_same_bits(gpu, folder):
    here = streamed_trainer(folder, CPU)
    there = streamed_trainer(folder, CUDA)
    assert torch.equal(simclr_steps(here, 2), simclr_steps(there, 2))
    assert same_bits(here.net.state_dict(), there.net.state_dict())


def test_features_of_a_folder_are_the_same(gpu, folder, tmp_path):
    trainer = streamed_trainer(folder, CPU)
    file = trainer.save(tmp_path)
    features = []
    for device in ("cpu", "cuda"):
        out = tmp_path / f"{device}.npz"
        words = [file, "--features", folder, "--out", out, "--device", device, "--n_workers", "0", "--bs", "8"]
        Export.main(Export.get_args([str(word) for word in words]))
        features.append(np.load(out)["features"])
    assert features[0].shape == (24, trainer.net.encoder.num_features)
    assert np.array_equal(*features)


def test_all_scores_are_the_same(gpu, monkeypatch):
    monkeypatch.setattr(Evaluate.fit_linear, "__defaults__", (1e-3, 5))
    trainer = simclr_trainer(CPU)
    encoder = trainer.net.encoder
    views = trainer.augmentation
    results = []
    for device in (CPU, CUDA):
        net = copy.deepcopy(encoder).to(device)
        data = splits(device, 16, 16)
        result = Evaluate.evaluate(net, net, data, views, device, 1)
        torch.manual_seed(0)  # of the linear layer
        result["finetune"] = Evaluate.fine_tune(net, data, device, views, 2, bs=8)
        results.append(result)
    assert results[0] == results[1]
    assert {"knn", "linear", "linear_aug", "pixels_knn", "untrained_knn", "finetune"} <= results[0].keys()


# ------------------------------------------------------------------------------------------ CamNet


def camnet_trainer(device):
    """TrainCamNet's Trainer of the tiny net."""
    args = TrainCamNet.get_args(CAMNET.split())
    generator = TrainCamNet.build_generator(args, 16)
    distance = TrainCamNet.Distances.build_distance(args.distance, None, 0, args.alpha).to(device)
    return TrainCamNet.Trainer(args, splits(device, 32, 16).train, generator, distance, [4], device)


def camnet_search(trainer):
    """Search the codes of a period; return (period, the images of each of its steps)."""
    period = trainer.next_period(argparse.Namespace(signal=None), "", quiet=True)
    return period, list(trainer.batches(len(period.condition)))


def camnet_period(trainer):
    """Search the codes of a period and train on them; return (chosen keys, losses) on the CPU."""
    period, parts = camnet_search(trainer)
    losses = [trainer.update(period, part) for part in parts]
    return period.keys.cpu(), torch.stack(losses).cpu()


def test_camnet_searches_and_learns_the_same_bits_resumed_or_not(gpu, tmp_path):
    here = camnet_trainer(CPU)
    there = camnet_trainer(CUDA)
    for mine, theirs in zip(camnet_period(here), camnet_period(there)):
        assert torch.equal(mine, theirs)
    if NEW_TORCH:
        assert same_bits(here.ema.state_dict(), there.ema.state_dict())
    for mine, theirs in zip(here.ema.state_dict().values(), there.ema.state_dict().values()):
        torch.testing.assert_close(mine, theirs.cpu(), rtol=1e-5, atol=1e-7)

    resumed = camnet_trainer(CUDA)
    resumed.load(there.save(tmp_path))
    for mine, theirs in zip(camnet_period(there), camnet_period(resumed)):
        assert torch.equal(mine, theirs)
    assert same_bits(there.ema.state_dict(), resumed.ema.state_dict())


def test_camnet_is_measured_the_same(gpu, monkeypatch):
    monkeypatch.setattr(Measures, "KS", (1, 2))
    monkeypatch.setattr(Measures, "DIVERSE", 2)
    results = []
    for device in (CPU, CUDA):
        trainer = camnet_trainer(device)
        held = trainer.held_out_images()
        jittered = torch.rand(len(held.images), 2, 3, 16, 16, generator=seeded()).to(device)
        results.append(held.measure(trainer.ema, trainer.net, jittered))
    assert results[0] == results[1]
    assert results[0]["best_of_2"] > 0
