"""The distances against loops and against lpips.LPIPS itself, and the errors for weights that cannot be had."""

import copy
import sys
import urllib.error
import warnings
from pathlib import Path

import lpips
import numpy as np
import pytest
import torch
import torchvision

from CamNet import Distances
from CamNet.Distances import FILES, LPIPS, MINIMUM, Pixels, build_distance, check_side
from Images import Shapes

REAL = Path(__file__).resolve().parents[2] / "shared" / "weights" / "squeezenet1_1_features.pth"
ARCHITECTURES = {"squeeze": "squeezenet1_1", "alex": "alexnet", "vgg": "vgg16"}
needs_real = pytest.mark.skipif(not REAL.exists(), reason=f"needs {REAL}")


def pictures(n=6, side=32, seed=0):
    """(n, 3, side, side) in [0, 1]: generated shapes."""
    labels = torch.arange(n) % len(Shapes.CLASSES)
    return Shapes.draw(labels, side, torch.Generator().manual_seed(seed)).float() / 255


def meta_features(net):
    """The shapes of the features of torchvision's network, without making its numbers."""
    with torch.device("meta"):
        model = getattr(torchvision.models, ARCHITECTURES[net])(weights=None)
    return {name: value for name, value in model.state_dict().items() if name.startswith("features.")}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """{net: file} of features alone, with random numbers of a size that keeps the signal alive."""
    generator, folder = torch.Generator().manual_seed(0), tmp_path_factory.mktemp("weights")
    for net in MINIMUM:
        state = {}
        for name, value in meta_features(net).items():
            fan_in = value[0].numel() if value.ndim > 1 else 1
            state[name] = torch.randn(value.shape, generator=generator) * (2 / fan_in) ** 0.5 * (value.ndim > 1)
        torch.save(state, folder / f"{net}.pth")
    return {net: folder / f"{net}.pth" for net in MINIMUM}


@pytest.fixture(scope="module")
def build(files):
    """(name, **attributes) -> the distance with random weights, made once, or a copy of it with other attributes."""
    made = {}

    def build(name, **attributes):
        if name not in made:
            made[name] = build_distance(name, files.get(name))
        distance = copy.copy(made[name])
        distance.__dict__.update(attributes)
        return distance

    return build


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """Torch's cache is an empty folder, and every download fails: (the checkpoints' folder, the addresses asked)."""
    asked = []

    def fail(url, *args, **kwargs):
        asked.append(url)
        raise urllib.error.URLError("Network is unreachable\nreally")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints", asked


def refuses(function, *parts):
    """Check that the call raises ValueError, a single line with these parts."""
    with pytest.raises(ValueError) as caught:
        function()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    return message


# what holds for all of them


@pytest.mark.parametrize("name", Distances.NAMES)
def test_is_a_distance(build, name):
    distance, x = build(name, side=32), pictures(3)
    y = x.roll(1, 0)
    d = distance(x, y)
    assert d.shape == (3,) and d.dtype == torch.float32 and (d > 0).all()
    assert torch.equal(distance(x, x), torch.zeros(3))
    torch.testing.assert_close(distance(y, x), d)
    torch.testing.assert_close(distance(x[2:3], y[2:3]), d[2:3])  # the batch plays no part


@pytest.mark.parametrize("name", Distances.NAMES)
def test_every_candidate_meets_its_own_target(build, name):
    distance, targets, candidates = build(name, side=32), pictures(2), pictures(6, seed=1)
    d = distance.between(distance.features(candidates), distance.features(targets))
    assert d.shape == (6,) and d.dtype == torch.float32
    slow = [distance(candidates[i : i + 1], targets[i // 3 : i // 3 + 1]).item() for i in range(6)]
    assert d.tolist() == pytest.approx(slow, rel=1e-4)
    with pytest.raises(ValueError, match="5 candidates for 2 targets"):
        distance.between(distance.features(candidates[:5]), distance.features(targets))


@pytest.mark.parametrize("name", Distances.NAMES)
@pytest.mark.parametrize("autocast", [False, True])
def test_constant_images_are_finite(build, name, autocast):
    distance = build(name, side=32)
    levels = torch.tensor([0.0, 0.0, 1.0, 0.5]).view(4, 1, 1, 1)
    x = levels.expand(4, 3, 32, 32).clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        features = distance.features(x.bfloat16() if autocast else x)
        d = distance(x, levels.flip(0).expand(4, 3, 32, 32))
    assert all(feature.dtype == torch.float32 for feature in features)
    assert d.dtype == torch.float32 and d.isfinite().all() and d.max() > 0
    d.sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("name", Distances.NAMES)
def test_gradient_reaches_the_images_alone(build, name):
    distance, x, targets = build(name, side=32), pictures(2).requires_grad_(), pictures(2, seed=1).requires_grad_()
    distance(x, targets).sum().backward()
    assert x.grad.abs().max() > 0 and targets.grad is None
    assert all(not p.requires_grad and p.grad is None for p in distance.parameters())


def test_cached_targets_of_inference_mode_serve_the_search(build):
    distance, x = build("squeeze"), pictures(2)
    with torch.inference_mode():
        cached = distance.features(pictures(2, seed=1))
    d = distance.between(distance.features(x.requires_grad_()), cached)
    d.sum().backward()
    torch.testing.assert_close(d, distance(x, pictures(2, seed=1)))
    assert x.grad.abs().max() > 0


# pixels


def slow_pixels(a, b):
    """Mean absolute difference over the scales, block by block in NumPy; the side is a power of two."""
    total, scales, side = 0.0, 0, a.shape[-1]
    while side >= 4:
        block = a.shape[-1] // side
        for c, row, column in np.ndindex(3, side, side):
            area = (c, slice(row * block, (row + 1) * block), slice(column * block, (column + 1) * block))
            total += abs(a[area].mean() - b[area].mean()) / (3 * side * side)
        side, scales = side // 2, scales + 1
    return total / scales


@pytest.mark.parametrize("side", [4, 8, 16])
def test_pixels_equal_the_slow_ones(side):
    a, b = pictures(3, side), pictures(3, side, seed=1)
    slow = [slow_pixels(p, q) for p, q in zip(a.double().numpy(), b.double().numpy())]
    assert Pixels()(a, b).tolist() == pytest.approx(slow, rel=1e-5)


@pytest.mark.parametrize(
    "side, sides", [(4, [4]), (5, [5]), (7, [7, 4]), (12, [12, 6]), (84, [84, 42, 21, 11, 6]), (32, [32, 16, 8, 4])]
)
def test_pixels_take_any_side(side, sides):
    features = Pixels().features(torch.ones(1, 3, side, side))
    assert [feature.shape[-1] for feature in features] == sides
    assert all((feature == 1).all() for feature in features)  # nothing is padded in
    assert Pixels()(torch.ones(1, 3, side, side), torch.zeros(1, 3, side, side)).item() == 1


# LPIPS


def original(net, file):
    """lpips.LPIPS with weights put into it slice by slice, by hand."""
    with warnings.catch_warnings(action="ignore"):
        model = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    state = torch.load(file, weights_only=True)
    for name, parameter in model.net.named_parameters():
        parameter.data.copy_(state["features." + name.split(".", 1)[1]])
    return model


@pytest.mark.parametrize("net", MINIMUM)
@torch.no_grad()
def test_equals_lpips(files, build, net):
    x, y = pictures(2, 64), pictures(2, 64, seed=1)
    wanted = original(net, files[net])(x, y, normalize=True).flatten()
    torch.testing.assert_close(build(net, alpha=0.0)(x, y), wanted, rtol=1e-4, atol=0)
    wanted = wanted + 0.7 * (x - y).square().mean((1, 2, 3))
    torch.testing.assert_close(build(net, alpha=0.7)(x, y), wanted, rtol=1e-4, atol=0)


@needs_real
def test_equals_lpips_with_real_weights():
    distance, model = LPIPS("squeeze", REAL, side=64, alpha=0.0), original("squeeze", REAL)
    x = pictures(4, 64)
    noisy = (x + 0.02 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    for y in (noisy, x.flip(0), torch.zeros_like(x)):
        with torch.no_grad():
            wanted = model(x, y, normalize=True).flatten()
        torch.testing.assert_close(distance(x, y), wanted, rtol=1e-4, atol=1e-6)
    assert (distance(x, noisy) < distance(x, x.flip(0))).all()


@needs_real
def test_bfloat16_is_near_with_real_weights():
    distance, x, y = LPIPS("squeeze", REAL), pictures(4), pictures(4, seed=1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        low = distance(x, y)
    torch.testing.assert_close(low, distance(x, y), rtol=0.02, atol=0)


def test_small_images_are_enlarged_and_large_ones_stay(files):
    x, y = pictures(2, 20), pictures(2, 20, seed=1)
    plain, distance, both = (LPIPS("squeeze", files["squeeze"], *more) for more in ((0, 0.0), (40, 0.0), (40, 1.0)))
    assert distance.features(x)[0].shape == plain.features(pictures(2, 40))[0].shape
    assert distance.features(pictures(2, 48))[0].shape == plain.features(pictures(2, 48))[0].shape
    larger = [torch.nn.functional.interpolate(each, scale_factor=2, mode="bilinear") for each in (x, y)]
    torch.testing.assert_close(distance(x, y), plain(*larger))
    pixels = both(x, y) - distance(x, y)  # at the images' own side
    torch.testing.assert_close(pixels, (x - y).square().mean((1, 2, 3)), rtol=1e-4, atol=1e-6)


def test_features_of_zeros_have_finite_gradients():
    x = torch.zeros(1, 8, 2, 2, requires_grad=True)
    (Distances._unit(x) - 1).square().sum().backward()
    assert x.grad.isfinite().all()
    assert torch.equal(Distances._unit(x), torch.zeros(1, 8, 2, 2))


def test_unit_length_is_exact_from_bfloat16():
    x = torch.rand(2, 300, 3, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        length = Distances._unit(x).square().sum(1)
    torch.testing.assert_close(length, torch.ones(2, 3, 3), rtol=0, atol=1e-5)


def test_stays_frozen_and_in_eval_mode(build):
    distance = build("alex")
    whole = torch.nn.Sequential(distance).train()
    assert whole.training and not any(module.training for module in distance.modules())
    assert list(distance.parameters()) and not any(p.requires_grad for p in distance.parameters())


def test_construction_is_silent_and_draws_nothing(files, capsys, recwarn):
    state = torch.get_rng_state()
    build_distance("squeeze", files["squeeze"])
    assert torch.equal(torch.get_rng_state(), state)
    assert capsys.readouterr() == ("", "") and not recwarn.list


# sides


@pytest.mark.parametrize("net, minimum", MINIMUM.items())
def test_minimum_sides(build, net, minimum):
    x = pictures(2, minimum)
    assert build(net, side=0)(x, x.flip(0)).isfinite().all()
    assert build(net, side=minimum)(pictures(2, 8), pictures(2, 8, seed=1)).isfinite().all()
    below = torch.rand(1, 3, minimum - 1, minimum - 1)
    refuses(lambda: build(net, side=0).features(below), "--lpips_side 0", f"{minimum - 1} px", f"{minimum} or more")
    with pytest.raises(RuntimeError, match="too small"):  # and the table is not too strict
        build(net, side=0).backbone(below)


@pytest.mark.parametrize("net, minimum", MINIMUM.items())
def test_check_side(net, minimum):
    for side in (0, minimum, 64):
        check_side(net, side)
    for side in (-1, 1, minimum - 1):
        refuses(lambda side=side: check_side(net, side), f"--lpips_side {side}", net, f"{minimum} px or more")
        refuses(lambda side=side: LPIPS(net, None, side), f"--lpips_side {side}")
    check_side(net, minimum, 8)
    check_side(net, 0, minimum)
    refuses(lambda: check_side(net, 0, 8), "--lpips_side 0", "8 px", f"{minimum} or more")


# weights that cannot be had


@pytest.mark.parametrize("net", MINIMUM)
def test_no_network_is_an_error_with_a_way_out(offline, net):
    folder, asked = offline
    message = refuses(lambda: build_distance(net), f"--distance {net}", "--distance pixels", "needs no download")
    assert f"put {FILES[net]} into {folder}" in message and "--lpips_weights FILE" in message
    assert "Network is unreachable" in message
    url = torchvision.models.get_model_weights(ARCHITECTURES[net]).IMAGENET1K_V1.url
    assert asked == [url] and url.endswith("/" + FILES[net])


def test_a_cached_file_serves_without_network(offline, files):
    folder, asked = offline
    folder.mkdir(parents=True)
    model = torchvision.models.squeezenet1_1(weights=None)
    model.load_state_dict(torch.load(files["squeeze"], weights_only=True), strict=False)
    torch.save(model.state_dict(), folder / FILES["squeeze"])
    x, y = pictures(2), pictures(2, seed=1)
    wanted = build_distance("squeeze", files["squeeze"])(x, y)
    assert torch.equal(build_distance("squeeze")(x, y), wanted) and not asked
    assert torch.equal(build_distance("squeeze", folder / FILES["squeeze"])(x, y), wanted)  # a whole network as FILE


def test_a_damaged_cache_is_an_error(offline, files):
    folder, _ = offline
    folder.mkdir(parents=True)
    for content in (b"", b"<html>403</html>", files["squeeze"].read_bytes()[:-500], files["squeeze"].read_bytes()):
        (folder / FILES["squeeze"]).write_bytes(content)  # the last: an intact file, but without the classifier
        refuses(lambda: build_distance("squeeze"), f"delete {folder / FILES['squeeze']}", "--distance pixels")


def test_other_failures_of_a_download(offline, monkeypatch):
    failures = [
        urllib.error.HTTPError("https://x", 403, "Forbidden", {}, None),
        ConnectionResetError(104, "reset"),
        RuntimeError('invalid hash value (expected "b8a52dc0", got "00000000")'),
        TimeoutError("timed out"),
    ]
    for failure in failures:

        def fail(*args, failure=failure, **kwargs):
            raise failure

        monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
        refuses(lambda: build_distance("squeeze"), type(failure).__name__, "--distance pixels")


def change(state, name):
    """State dicts that must not be loaded."""
    key = "features.0.weight"
    return {
        "missing": {k: v for k, v in state.items() if k != key},
        "extra": state | {"features.99.weight": torch.zeros(1)},
        "shape": state | {key: state[key][:-1]},
        "nan": state | {key: state[key] * float("nan")},
        "list": list(state.values()),
        "nested": {"state_dict": state},
        "numbers": dict.fromkeys(state, 1.0),
    }[name]


@pytest.mark.parametrize("name", ["missing", "extra", "shape", "nan", "list", "nested", "numbers"])
def test_wrong_weights(files, tmp_path, name):
    path = tmp_path / "wrong.pth"
    torch.save(change(torch.load(files["squeeze"], weights_only=True), name), path)
    parts = [f"--lpips_weights {path}", "--distance pixels", FILES["squeeze"], "--lpips_weights FILE"]
    refuses(lambda: build_distance("squeeze", path), *parts)


class RunsWhenRead:
    """What pickle turns into a call."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("content", [b"", b"<html>", "cut", "malicious", "folder", "absent"])
def test_damaged_weights(files, tmp_path, content):
    path = tmp_path / "damaged.pth"
    if content == "folder":
        path.mkdir()
    elif content == "malicious":
        torch.save({"features.0.weight": RunsWhenRead(tmp_path / "trace")}, path)
    elif content != "absent":
        path.write_bytes(files["squeeze"].read_bytes()[:-500] if content == "cut" else content)
    refuses(lambda: build_distance("squeeze", path), f"--lpips_weights {path}", "--distance pixels", "torchvision")
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("net, other", [("squeeze", "alex"), ("alex", "squeeze")])
def test_weights_of_another_network(files, net, other):
    refuses(lambda: build_distance(net, files[other]), "not this network", FILES[net])


def test_features_without_their_prefix(files, tmp_path):
    state = torch.load(files["squeeze"], weights_only=True)
    torch.save({name.removeprefix("features."): value for name, value in state.items()}, tmp_path / "bare.pth")
    x, y = pictures(2), pictures(2, seed=1)
    bare = build_distance("squeeze", tmp_path / "bare.pth")
    assert torch.equal(bare(x, y), build_distance("squeeze", files["squeeze"])(x, y))


def test_names_and_alpha(files):
    assert isinstance(build_distance("pixels"), Pixels)
    refuses(lambda: build_distance("resnet"), "--distance resnet", "pixels, squeeze, alex, vgg")
    for alpha in (-0.1, float("nan"), float("inf")):
        refuses(lambda alpha=alpha: build_distance("squeeze", files["squeeze"], alpha=alpha), "alpha", str(alpha))


def test_pixels_need_no_lpips(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    build_distance("pixels")
    refuses(lambda: build_distance("alex"), "--distance alex", "pip install lpips", "--distance pixels")
