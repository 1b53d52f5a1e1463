"""The distances against loops and against lpips.LPIPS itself, and the errors for weights that cannot be loaded."""

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
from helpers import real_file, refuses

from CamNet import Distances
from CamNet.Distances import FILES, LPIPS, MINIMUM, Patches, Pixels, build_distance, check_side
from Images import Shapes

REAL = "weights/squeezenet1_1_features.pth"  # in the folder ISICLE_REAL_DATA
ARCHITECTURES = {"squeeze": "squeezenet1_1", "alex": "alexnet", "vgg": "vgg16"}


def pictures(n=6, side=32, seed=0):
    """(n, 3, side, side) in [0, 1]: generated shapes."""
    labels = torch.arange(n) % len(Shapes.CLASSES)
    return Shapes.draw(labels, side, torch.Generator().manual_seed(seed)).float() / 255


def meta_features(net):
    """The parameters of the features of torchvision's network, as shapes only."""
    with torch.device("meta"):
        model = getattr(torchvision.models, ARCHITECTURES[net])(weights=None)
    return {name: value for name, value in model.state_dict().items() if name.startswith("features.")}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """{net: file with the features only}: random weights, scaled so that activations keep their size."""
    generator = torch.Generator().manual_seed(0)
    folder = tmp_path_factory.mktemp("weights")
    for net in MINIMUM:
        state = {}
        for name, value in meta_features(net).items():
            state[name] = torch.randn(value.shape, generator=generator)
            if value.ndim > 1:
                state[name] *= (2 / value[0].numel()) ** 0.5
            else:
                state[name].zero_()  # a bias
        torch.save(state, folder / f"{net}.pth")
    return {net: folder / f"{net}.pth" for net in MINIMUM}


@pytest.fixture(scope="module")
def build(files):
    """(name, **attributes) -> a copy of the distance with random weights, which is built once, and these attributes."""
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
    """Torch's cache is an empty folder and every download fails: (the folder of checkpoints, the requested URLs)."""
    asked = []

    def fail(url, *args, **kwargs):
        asked.append(url)
        raise urllib.error.URLError("Network is unreachable\nreally")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints", asked


# what holds for all of them


@pytest.mark.parametrize("name", Distances.NAMES)
def test_distances_are_symmetric_and_zero_for_equal_images_only(build, name):
    distance = build(name, side=32)
    x = pictures(3)
    y = x.roll(1, 0)
    d = distance(x, y)
    assert d.shape == (3,)
    assert d.dtype == torch.float32
    assert (d > 0).all()
    assert torch.equal(distance(x, x), torch.zeros(3))
    torch.testing.assert_close(distance(y, x), d)
    torch.testing.assert_close(distance(x[2:3], y[2:3]), d[2:3])  # other images in the batch have no effect


@pytest.mark.parametrize("name", Distances.NAMES)
def test_every_candidate_is_compared_with_its_own_target(build, name):
    distance = build(name, side=32)
    targets = pictures(2)
    candidates = pictures(6, seed=1)
    d = distance.between(distance.features(candidates), distance.features(targets))
    assert d.shape == (6,) and d.dtype == torch.float32
    slow = [distance(candidates[i : i + 1], targets[i // 3 : i // 3 + 1]).item() for i in range(6)]
    assert d.tolist() == pytest.approx(slow, rel=1e-4)
    with pytest.raises(ValueError, match="5 candidates for 2 targets"):
        distance.between(distance.features(candidates[:5]), distance.features(targets))


@pytest.mark.parametrize("name", Distances.NAMES)
@pytest.mark.parametrize("autocast", [False, True])
def test_constant_images_have_finite_distances_and_gradients(build, name, autocast):
    distance = build(name, side=32)
    levels = torch.tensor([0.0, 0.0, 1.0, 0.5]).view(4, 1, 1, 1)
    x = levels.expand(4, 3, 32, 32).clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        features = distance.features(x.bfloat16() if autocast else x)
        d = distance(x, levels.flip(0).expand(4, 3, 32, 32))
    assert all(feature.dtype == torch.float32 for feature in features)
    assert d.dtype == torch.float32
    assert d.isfinite().all()
    assert d.max() > 0
    d.sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("name", Distances.NAMES)
def test_the_gradient_reaches_the_images_only(build, name):
    distance = build(name, side=32)
    x = pictures(2).requires_grad_()
    targets = pictures(2, seed=1).requires_grad_()
    distance(x, targets).sum().backward()
    assert x.grad.abs().max() > 0
    assert targets.grad is None
    assert all(not p.requires_grad and p.grad is None for p in distance.parameters())


def test_targets_computed_in_inference_mode_can_be_used_in_training(build):
    distance = build("squeeze")
    x = pictures(2)
    with torch.inference_mode():
        cached = distance.features(pictures(2, seed=1))
    d = distance.between(distance.features(x.requires_grad_()), cached)
    d.sum().backward()
    torch.testing.assert_close(d, distance(x, pictures(2, seed=1)))
    assert x.grad.abs().max() > 0


# pixels


def slow_pixels(a, b):
    """Mean absolute difference over the scales, block by block in NumPy; the side is a power of two."""
    total = 0.0
    scales = 0
    side = a.shape[-1]
    while side >= 4:
        block = a.shape[-1] // side
        for c, row, column in np.ndindex(3, side, side):
            area = (c, slice(row * block, (row + 1) * block), slice(column * block, (column + 1) * block))
            total += abs(a[area].mean() - b[area].mean()) / (3 * side * side)
        side //= 2
        scales += 1
    return total / scales


@pytest.mark.parametrize("side", [4, 8, 16])
def test_pixels_equal_the_slow_ones(side):
    a, b = pictures(3, side), pictures(3, side, seed=1)
    slow = [slow_pixels(p, q) for p, q in zip(a.double().numpy(), b.double().numpy())]
    assert Pixels()(a, b).tolist() == pytest.approx(slow, rel=1e-5)


@pytest.mark.parametrize("side", [4, 8, 10])
def test_patches_equal_the_slow_ones(side):
    a, b = pictures(2, side), pictures(2, side, seed=1)
    for found, p, q in zip(Patches()(a, b).tolist(), a, b):
        scales = []
        for x, y in zip(Pixels().features(p[None]), Pixels().features(q[None])):
            squares = (x - y).double().square()[0]
            corners = range(0, x.shape[-1], 4)
            patches = [squares[:, i : i + 4, j : j + 4].mean() for i in corners for j in corners]
            scales.append(np.mean([(patch + 1e-8) ** 0.5 - 1e-4 for patch in patches]))
        assert found == pytest.approx(np.mean(scales), rel=1e-5)


@pytest.mark.parametrize(
    "side, sides", [(4, [4]), (5, [5]), (7, [7, 4]), (12, [12, 6]), (84, [84, 42, 21, 11, 6]), (32, [32, 16, 8, 4])]
)
def test_pixels_take_any_side(side, sides):
    features = Pixels().features(torch.ones(1, 3, side, side))
    assert [feature.shape[-1] for feature in features] == sides
    assert all((feature == 1).all() for feature in features)  # no padding enters the means
    assert Pixels()(torch.ones(1, 3, side, side), torch.zeros(1, 3, side, side)).item() == 1


# LPIPS


def original(net, file):
    """lpips.LPIPS with these weights, copied parameter by parameter."""
    with warnings.catch_warnings(action="ignore"):
        model = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    state = torch.load(file, weights_only=True)
    for name, parameter in model.net.named_parameters():
        parameter.data.copy_(state["features." + name.split(".", 1)[1]])
    return model


@pytest.mark.parametrize("net", MINIMUM)
@torch.no_grad()
def test_equals_the_lpips_package(files, build, net):
    x, y = pictures(2, 64), pictures(2, 64, seed=1)
    wanted = original(net, files[net])(x, y, normalize=True).flatten()
    torch.testing.assert_close(build(net, alpha=0.0)(x, y), wanted, rtol=1e-4, atol=0)
    wanted = wanted + 0.7 * (x - y).square().mean((1, 2, 3))
    torch.testing.assert_close(build(net, alpha=0.7)(x, y), wanted, rtol=1e-4, atol=0)


def test_equals_lpips_with_real_weights():
    file = real_file(REAL)
    distance = LPIPS("squeeze", file, side=64, alpha=0.0)
    model = original("squeeze", file)
    x = pictures(4, 64)
    noisy = (x + 0.02 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    for y in (noisy, x.flip(0), torch.zeros_like(x)):
        with torch.no_grad():
            wanted = model(x, y, normalize=True).flatten()
        torch.testing.assert_close(distance(x, y), wanted, rtol=1e-4, atol=1e-6)
    assert (distance(x, noisy) < distance(x, x.flip(0))).all()


def test_bfloat16_is_near_with_real_weights():
    distance = LPIPS("squeeze", real_file(REAL))
    x = pictures(4)
    y = pictures(4, seed=1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        low = distance(x, y)
    torch.testing.assert_close(low, distance(x, y), rtol=0.02, atol=0)


def test_small_images_are_enlarged_and_large_ones_stay(files):
    x, y = pictures(2, 20), pictures(2, 20, seed=1)
    plain = LPIPS("squeeze", files["squeeze"], side=0, alpha=0.0)
    distance = LPIPS("squeeze", files["squeeze"], side=40, alpha=0.0)
    both = LPIPS("squeeze", files["squeeze"], side=40, alpha=1.0)
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
    assert whole.training
    assert not any(module.training for module in distance.modules())
    assert list(distance.parameters())
    assert not any(p.requires_grad for p in distance.parameters())


def test_construction_is_silent_and_draws_nothing(files, capsys, recwarn):
    state = torch.get_rng_state()
    build_distance("squeeze", files["squeeze"])
    assert torch.equal(torch.get_rng_state(), state)
    assert capsys.readouterr() == ("", "")
    assert not recwarn.list


# sides


@pytest.mark.parametrize("net, minimum", MINIMUM.items())
def test_the_smallest_sides_are_exact(build, net, minimum):
    x = pictures(2, minimum)
    assert build(net, side=0)(x, x.flip(0)).isfinite().all()
    assert build(net, side=minimum)(pictures(2, 8), pictures(2, 8, seed=1)).isfinite().all()
    below = torch.rand(1, 3, minimum - 1, minimum - 1)
    refuses(lambda: build(net, side=0).features(below), "--lpips_side 0", f"{minimum - 1} px", f"{minimum} or more")
    with pytest.raises(RuntimeError, match="too small"):  # and the table is not too strict
        build(net, side=0).backbone(below)


@pytest.mark.parametrize("net, minimum", MINIMUM.items())
def test_check_side_refuses_sides_below_the_smallest(net, minimum):
    for side in (0, minimum, 64):
        check_side(net, side)
    for side in (-1, 1, minimum - 1):
        refuses(lambda side=side: check_side(net, side), f"--lpips_side {side}", net, f"{minimum} px or more")
        refuses(lambda side=side: LPIPS(net, None, side), f"--lpips_side {side}")
    check_side(net, minimum, 8)
    check_side(net, 0, minimum)
    refuses(lambda: check_side(net, 0, 8), "--lpips_side 0", "8 px", f"{minimum} or more")


# weights that cannot be loaded


@pytest.mark.parametrize("net", MINIMUM)
def test_no_network_is_an_error_with_a_way_out(offline, net):
    folder, asked = offline
    message = refuses(lambda: build_distance(net), f"--distance {net}", "--distance pixels", "needs no download")
    assert f"put {FILES[net]} into {folder}" in message
    assert "--lpips_weights FILE" in message
    assert "Network is unreachable" in message
    url = torchvision.models.get_model_weights(ARCHITECTURES[net]).IMAGENET1K_V1.url
    assert asked == [url]
    assert url.endswith("/" + FILES[net])


def test_a_cached_file_is_used_without_network(offline, files):
    folder, asked = offline
    folder.mkdir(parents=True)
    model = torchvision.models.squeezenet1_1(weights=None)
    model.load_state_dict(torch.load(files["squeeze"], weights_only=True), strict=False)
    torch.save(model.state_dict(), folder / FILES["squeeze"])
    x, y = pictures(2), pictures(2, seed=1)
    wanted = build_distance("squeeze", files["squeeze"])(x, y)
    assert torch.equal(build_distance("squeeze")(x, y), wanted)
    assert not asked
    assert torch.equal(build_distance("squeeze", folder / FILES["squeeze"])(x, y), wanted)  # a whole network as FILE


def test_a_damaged_cache_is_an_error(offline, files):
    folder, _ = offline
    folder.mkdir(parents=True)
    for content in (b"", b"<html>403</html>", files["squeeze"].read_bytes()[:-500], files["squeeze"].read_bytes()):
        (folder / FILES["squeeze"]).write_bytes(content)  # the last: an intact file, but without the classifier
        refuses(lambda: build_distance("squeeze"), f"delete {folder / FILES['squeeze']}", "--distance pixels")


def test_any_failure_of_a_download_is_an_error_with_a_way_out(offline, monkeypatch):
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
    """Return the state dict with this fault, which must be refused."""
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
def test_wrong_weights_are_refused(files, tmp_path, name):
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
def test_damaged_weights_are_refused(files, tmp_path, content):
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
def test_weights_of_another_network_are_refused(files, net, other):
    refuses(lambda: build_distance(net, files[other]), "not this network", FILES[net])


def test_features_without_their_prefix_are_accepted(files, tmp_path):
    state = torch.load(files["squeeze"], weights_only=True)
    torch.save({name.removeprefix("features."): value for name, value in state.items()}, tmp_path / "bare.pth")
    x, y = pictures(2), pictures(2, seed=1)
    bare = build_distance("squeeze", tmp_path / "bare.pth")
    assert torch.equal(bare(x, y), build_distance("squeeze", files["squeeze"])(x, y))


def test_unknown_names_and_bad_alpha_are_refused(files):
    assert isinstance(build_distance("pixels"), Pixels)
    refuses(lambda: build_distance("resnet"), "--distance resnet", "pixels, patches, squeeze, alex, vgg")
    for alpha in (-0.1, float("nan"), float("inf")):
        refuses(lambda alpha=alpha: build_distance("squeeze", files["squeeze"], alpha=alpha), "alpha", str(alpha))


def test_pixels_need_no_lpips(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    build_distance("pixels")
    refuses(lambda: build_distance("alex"), "--distance alex", "pip install lpips", "--distance pixels")
