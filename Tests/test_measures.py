"""The measures of a generator against loops in NumPy, and samples that differ in one half of their code alone."""

import contextlib
import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch

from CamNet import Measures
from CamNet.Codes import make_keys
from CamNet.Corruptions import Corruption
from CamNet.Distances import Pixels
from CamNet.Generator import Generator
from CamNet.Measures import (
    DIVERSITIES,
    best_of,
    consistency,
    diversity,
    histogram_diversity,
    perceptual_diversity,
    pixel_diversity,
    sample_grid,
    unfit,
)
from Images import Shapes

KEYS = torch.tensor([3, -1, 2**62])


def noise(n=3, k=5, side=8, seed=0):
    """(n, k, 3, side, side) in [0, 1]; each sample has colors of its own."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, k, 3, side, side, generator=generator) ** (
        0.2 + 4 * torch.rand(n, k, 3, 1, 1, generator=generator)
    )


def pictures(n=3, size=16, seed=0):
    """(n, 3, size, size) in [0, 1]: generated shapes."""
    labels = torch.arange(n) % len(Shapes.CLASSES)
    return Shapes.draw(labels, size, torch.Generator().manual_seed(seed)).float() / 255


def build(corrupt="gray+down2", size=16, **changes):
    """(generator, condition of 3 images)."""
    torch.manual_seed(0)
    generator = Generator("tiny", size, corrupt, **changes)
    return generator, generator.corruption(pictures(size=size), KEYS)


def slow_distance(a, b):
    return Pixels()(torch.from_numpy(a)[None].float(), torch.from_numpy(b)[None].float()).item()


def slow_pairs(samples, difference):
    """The mean of difference(a, b) over images and pairs, one after the other, in float64."""
    samples = samples.double().numpy()
    values = [difference(a, b) for image in samples for a, b in itertools.combinations(image, 2)]
    return sum(values) / len(values)


def slow_histogram(a, b):
    """The earth mover's distance of two images' histograms by scipy, as a share of the way from bin 1 to bin 16."""
    edges = np.arange(1, 16) / 16
    total = 0.0
    for x, y in zip(a, b):
        bins = [np.searchsorted(edges, values.ravel(), side="left") for values in (x, y)]
        total += scipy.stats.wasserstein_distance(*bins) / 15
    return total / 3


# diversity


def test_pixel_diversity_equals_the_slow_one():
    samples = noise()
    assert pixel_diversity(samples) == pytest.approx(slow_pairs(samples, lambda a, b: np.abs(a - b).mean()), rel=1e-5)


def test_perceptual_diversity_equals_the_slow_one():
    samples = noise()
    assert perceptual_diversity(samples, Pixels()) == pytest.approx(slow_pairs(samples, slow_distance), rel=1e-5)


def test_histogram_diversity_equals_the_slow_one():
    samples = noise()
    samples[0] = (samples[0] * 16).round() / 16  # on the edges of the bins
    assert histogram_diversity(samples) == pytest.approx(slow_pairs(samples, slow_histogram), rel=1e-5)


def test_histogram_diversity_sees_colors_and_not_places():
    samples = noise(2, 1)
    mirrored = torch.cat([samples, samples.flip(4), samples.transpose(3, 4)], dim=1)
    assert histogram_diversity(mirrored) == 0
    assert pixel_diversity(mirrored) > 0.05
    black_and_white = torch.stack([torch.zeros(2, 3, 8, 8), torch.ones(2, 3, 8, 8)], dim=1)
    assert histogram_diversity(black_and_white) == 1 == pixel_diversity(black_and_white)
    one_channel = black_and_white.clone()
    one_channel[:, 1, 1:] = 0
    assert histogram_diversity(one_channel) == pytest.approx(1 / 3)


def test_equal_samples_have_no_diversity():
    samples = noise(3, 1).expand(-1, 4, -1, -1, -1)  # the images differ: they are not compared
    found = diversity(samples, Pixels())
    assert list(found) == ["diversity_pixels", "diversity_histogram", "diversity_distance"]
    assert set(found.values()) == {0.0}


def test_diversity_names_every_measure():
    samples, distance = noise(), Pixels()
    wanted = (pixel_diversity(samples), histogram_diversity(samples), perceptual_diversity(samples, distance))
    assert len(set(wanted)) == 3
    assert diversity(samples, distance) == {f"diversity_{name}": value for name, value in zip(DIVERSITIES, wanted)}


def test_diversity_of_two_samples_is_their_difference():
    samples = noise(2, 2)
    a, b = samples.unbind(dim=1)
    assert pixel_diversity(samples) == pytest.approx((a - b).abs().mean().item())
    assert perceptual_diversity(samples, Pixels()) == pytest.approx(Pixels()(a, b).mean().item())
    assert pixel_diversity(samples.flip(1)) == pytest.approx(pixel_diversity(samples))


# nearness


def test_best_of_equals_the_slow_one():
    samples, targets = noise(4, 16), noise(4, 1, seed=1)[:, 0]
    d = [[slow_distance(a.numpy(), y.numpy()) for a in image] for image, y in zip(samples, targets)]
    found = best_of(Pixels(), samples, targets, (1, 2, 4, 7, 16))
    assert list(found) == [1, 2, 4, 7, 16]
    assert found == pytest.approx({k: sum(min(row[:k]) for row in d) / 4 for k in found}, rel=1e-5)
    values = list(found.values())
    assert values == sorted(values, reverse=True)
    assert values[-1] < values[0]
    assert list(best_of(Pixels(), samples, targets)) == [1, 4, 16]


def test_best_of_finds_the_target_itself():
    samples, targets = noise(2, 4), noise(2, 1, seed=1)[:, 0]
    samples[:, 2] = targets
    found = best_of(Pixels(), samples, targets, (1, 2, 3, 4))
    assert found[3] == found[4] == 0 < found[2]


# consistency


@pytest.mark.parametrize("spec", ["gray", "gray+down2", "down4", "gray+mask0.5", "down2+mask0.25"])
def test_consistency_equals_the_slow_one(spec):
    corruption, samples, keys = Corruption(spec, 8), noise(), KEYS
    condition = corruption(noise(seed=1)[:, 0], keys)
    total = 0.0
    for image, c, key in zip(samples, condition, keys):
        for x in image:
            total += (corruption(x[None], key[None])[0] - c).abs().double().mean().item() / 15
    assert consistency(corruption, samples, condition, keys) == pytest.approx(total, rel=1e-5)
    assert total > 0.01
    projected = torch.stack([corruption.project(x, condition) for x in samples.unbind(dim=1)], dim=1)
    assert consistency(corruption, projected, condition, keys) <= 1e-6


def test_consistency_by_hand():
    samples = torch.stack([torch.full((1, 3, 4, 4), value) for value in (0.25, 0.5)], dim=1)
    assert consistency(Corruption("gray+down2", 4), samples, torch.ones(1, 1, 2, 2)) == pytest.approx(0.625)


# samples


def test_quality_in_parts_is_that_of_all(monkeypatch):
    images = torch.randint(256, (5, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    held = Measures.HeldOut(torch.arange(5), images, Corruption("gray", 8), Pixels(), 0, contextlib.nullcontext)
    samples = torch.rand(5, 4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    whole = held.quality(samples, (1, 4))
    monkeypatch.setattr(Measures, "AT_ONCE", 2)
    assert held.quality(samples, (1, 4)) == pytest.approx(whole, rel=1e-5)


@torch.no_grad()
def test_the_grid_is_made_of_the_generators_images():
    generator, condition = build()
    grid = sample_grid(generator, condition, KEYS, 4)
    assert grid.shape == (3, 4, 3, 16, 16)
    assert grid.min() >= 0
    assert grid.max() <= 1
    for image, key in enumerate(KEYS):
        for j in range(4):
            one = generator.sample(condition[image : image + 1], make_keys(key[None], j))
            torch.testing.assert_close(grid[image, j], one[0], rtol=0, atol=1e-5)
    assert pixel_diversity(grid) > 1e-4
    torch.testing.assert_close(sample_grid(generator, condition, KEYS, 2), grid[:, :2])  # the first ones stay
    rows = [2, 0]
    torch.testing.assert_close(
        sample_grid(generator, condition[rows], KEYS[rows], 4), grid[rows], rtol=0, atol=1e-5
    )  # in any batch


@pytest.mark.parametrize("vary, varies", [("both", (1, 1)), ("style", (1, 0)), ("noise", (0, 1))])
@torch.no_grad()
def test_vary_holds_the_other_half_of_the_code(vary, varies):
    generator, condition = build(size=32, levels=3)
    seen, forward = [], generator.forward
    generator.forward = lambda condition, codes: (seen.append(codes), forward(condition, codes))[1]
    grid = sample_grid(generator, condition, KEYS, 4, vary)
    assert grid.shape == (3, 4, 3, 32, 32)
    assert len(seen) == 4
    first = generator.codes(make_keys(KEYS, 0))
    for j, codes in enumerate(seen):
        own = generator.codes(make_keys(KEYS, j))
        assert len(codes) == 3
        for code, fixed, drawn in zip(codes, first, own):
            for part in (0, 1):
                assert torch.equal(code[part], drawn[part] if varies[part] else fixed[part])
                assert j == 0 or torch.equal(code[part], fixed[part]) != varies[part]
    different = (grid[:, 1:] - grid[:, :1]).abs().amax((2, 3, 4))
    assert (different > 1e-4).all()  # and what varies shows
    torch.testing.assert_close(grid[:, 0], generator(condition, first)[-1])


@torch.no_grad()
def test_a_dead_style_varies_nothing():
    generator, condition = build(init="ref", map_depth=8)
    parts = {vary: sample_grid(generator, condition, KEYS, 3, vary) for vary in ("both", "style", "noise")}
    assert pixel_diversity(parts["style"]) < 1e-6 < 1e-4 < pixel_diversity(parts["noise"])
    assert pixel_diversity(parts["both"]) == pytest.approx(pixel_diversity(parts["noise"]), rel=1e-3)


def test_measures_of_bfloat16_samples_are_float32():
    generator, condition = build()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        grid = sample_grid(generator, condition, KEYS, 2)
        assert grid.dtype == torch.float32
        assert consistency(generator.corruption, grid, condition, KEYS) <= 1e-6
        low = diversity(grid, Pixels())
    assert low == pytest.approx(diversity(grid, Pixels()), rel=1e-5)


# fitness

GOOD = {
    "best_of_1": 0.3,
    "best_of_16": 0.1,
    "bicubic": 0.2,
    "diversity_pixels": 0.05,
    "diversity_distance": 0.28,
    "single_code_diversity_pixels": 0.01,
}


@pytest.mark.parametrize(
    "change, parts",
    [
        ({}, None),
        ({"single_code_diversity_pixels": None}, None),
        ({"single_code_diversity_pixels": None, "diversity_distance": 0.2}, ("67%", "less than 70%")),
        ({"single_code_diversity_pixels": None, "best_of_1": math.nan}, ("nan%",)),
        ({"best_of_16": 0.2}, ("0.2000", "bicubic")),
        ({"best_of_16": 0.3}, ("0.3000", "0.2000")),
        ({"best_of_16": math.nan}, ("nan",)),
        ({"single_code_diversity_pixels": 0.05}, ("0.0500", "one code")),
        ({"single_code_diversity_pixels": 0.07}, ("0.0500", "0.0700")),
        ({"diversity_pixels": math.nan}, ("differ",)),
        ({"diversity_pixels": 0.0, "single_code_diversity_pixels": None}, ("do not differ",)),
    ],
)
def test_unfit_says_why(change, parts):
    reason = unfit({name: value for name, value in (GOOD | change).items() if value is not None})
    if parts is None:
        assert reason is None
        return
    assert "\n" not in reason
    for part in parts:
        assert part in reason
