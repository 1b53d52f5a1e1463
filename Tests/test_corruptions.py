"""Corruptions against loops in NumPy and torchvision, and projections against what they promise."""

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as reference
from scipy.fft import dctn, idctn

from CamNet.Corruptions import Corruption, pyramid

SIZE = 16
KEYS = torch.tensor([3, -1, 2**62, 0, 77])
SPECS = ["gray", "down2", "down4", "down16", "gray+down2", "gray+down16", "mask0.5", "gray+mask0.25", "down2+mask0.75"]
SPECS += ["down4+mask0.5", "gray+down4+mask0.5"]
CASES = [(spec, side) for spec in SPECS for side in (4, 8, 16)]


def pictures(seed=0, size=SIZE):
    """(5, 3, size, size): noise, noise near 0, saturated colors, black, white."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(5, 3, size, size, generator=generator)
    x[1] = x[1] ** 8
    x[2] = x[2].round()
    x[3], x[4] = 0, 1
    return x


def slow_luma(image):
    """(3, H, W) -> (1, H, W)."""
    return np.einsum("c,chw->hw", [0.299, 0.587, 0.114], image)[None]


def slow_means(image, side):
    """(C, H, H) -> (C, side, side): one block after the other."""
    block = image.shape[-1] // side
    out = np.zeros((len(image), side, side))
    for channel, row, column in np.ndindex(out.shape):
        area = image[channel, row * block : (row + 1) * block, column * block : (column + 1) * block]
        out[channel, row, column] = area.mean()
    return out


def slow_corruption(image, gray, side):
    """The picture of c(x) at one level, without a mask, in float64."""
    image = image.double().numpy()
    return slow_means(slow_luma(image) if gray else image, side)


def slow_known(known, side):
    """(r, r) -> (side, side), side a divisor of r: known if all of a block is."""
    return slow_means(known.double().numpy()[None], side)[0] == 1


def check_projection(corruption, result, images, condition):
    """Check a projection at any level: in [0, 1], agrees with the condition where known, unchanged elsewhere."""
    assert result.dtype == torch.float32
    assert result.min() >= 0
    assert result.max() <= 1
    side = result.shape[-1]
    small = min(side, corruption.resolution)
    for image, before, c in zip(result, images, condition):
        known = slow_known(c[-1], small) if corruption.masks else np.ones((small, small), bool)
        wanted = slow_means(c[: corruption.colors].double().numpy(), small)
        error = np.abs(slow_corruption(image, corruption.gray, small) - wanted)
        assert error[:, known].max(initial=0) <= 1e-6
        hidden = ~np.kron(known, np.ones((side // small, side // small), bool))
        assert torch.equal(image[:, hidden], before[:, hidden])


# specifications


@pytest.mark.parametrize(
    "spec, canonical, channels, resolution",
    [
        ("gray", "gray", 1, 16),
        ("down4", "down4", 3, 4),
        ("mask.5", "mask0.5", 4, 16),
        ("down02+gray", "gray+down2", 1, 8),
        ("mask0.250+down2+gray", "gray+down2+mask0.25", 2, 8),
    ],
)
def test_specifications_are_parsed_and_put_in_order(spec, canonical, channels, resolution):
    corruption = Corruption(spec, SIZE)
    assert (corruption.spec, corruption.size) == (canonical, SIZE)
    assert (corruption.channels, corruption.resolution) == (channels, resolution)
    assert corruption(pictures(), KEYS).shape == (5, channels, resolution, resolution)


@pytest.mark.parametrize(
    "spec", ["", "blur", "grey", "gray2", "detail", "down", "down2.0", "down-2", "mask", "mask-.5"]
)
@pytest.mark.parametrize("before", ["", "gray+down2+mask.5+"])
def test_unknown_parts_are_refused(spec, before):
    with pytest.raises(ValueError, match=r"^--corrupt .* is not gray, detail<k>, down<k> or mask<f>"):
        Corruption(before + spec, SIZE)


@pytest.mark.parametrize("spec", ["gray+gray", "down2+down4", "mask.5+gray+mask.5"])
def test_duplicate_parts_are_refused(spec):
    with pytest.raises(ValueError, match="twice"):
        Corruption(spec, SIZE)


@pytest.mark.parametrize("spec", ["down0", "down1", "down3", "down32", "gray+down5"])
def test_factor_must_divide(spec):
    with pytest.raises(ValueError, match=r"^--corrupt .* needs a divisor of the image's side 16"):
        Corruption(spec, SIZE)


@pytest.mark.parametrize("spec", ["mask0", "mask0.0", "mask1", "mask1.5", "mask0.001", "mask.999", "down16+mask.5"])
def test_share_must_hide_and_leave(spec):
    with pytest.raises(ValueError, match=r"^--corrupt .* hides \d+ of \d+ cells"):
        Corruption(spec, SIZE)


# the condition


def test_gray_is_torchvisions_up_to_its_rounded_weights():
    x = pictures()
    gray = Corruption("gray", SIZE)(x)
    torch.testing.assert_close(gray, reference.rgb_to_grayscale(x), rtol=0, atol=1.5e-4)
    assert gray[3].max() == 0
    assert gray[4].min() >= 1 - 1e-6
    assert gray.max() <= 1


@pytest.mark.parametrize("spec", SPECS)
def test_condition_equals_the_slow_one(spec):
    x = (pictures() * 255).round().to(torch.uint8)
    corruption = Corruption(spec, SIZE)
    condition = corruption(x, KEYS)
    assert condition.dtype == torch.float32
    assert condition.min() >= 0
    assert condition.max() <= 1
    torch.testing.assert_close(corruption(x / 255, KEYS), condition)
    for image, c in zip(x / 255, condition):
        wanted = slow_corruption(image, corruption.gray, corruption.resolution)
        wanted *= c[-1].numpy() if corruption.masks else 1
        np.testing.assert_allclose(c[: corruption.colors], wanted, atol=1e-6)


@pytest.mark.parametrize("spec, size, cells", [("mask0.5", 16, 8), ("mask.3", 42, 8), ("down4+mask.3", 16, 4)])
def test_masks_hide_exact_shares_of_whole_cells(spec, size, cells):
    corruption = Corruption(spec, size)
    condition = corruption(pictures(size=size) * 0.5 + 0.5, KEYS)
    known, r = condition[:, 3], corruption.resolution
    hidden = round(float(corruption.spec.split("mask")[1]) * cells**2)
    for mask in known:
        each = [[set() for _ in range(cells)] for _ in range(cells)]
        for row, column in np.ndindex(r, r):
            each[row * cells // r][column * cells // r].add(mask[row, column].item())
        each = [cell for line in each for cell in line]
        assert sorted(map(tuple, each)) == [(0.0,)] * hidden + [(1.0,)] * (cells**2 - hidden)
    assert torch.equal(condition[:, :3] > 0, (known > 0)[:, None].expand(-1, 3, -1, -1))


def test_a_key_decides_its_mask():
    corruption = Corruption("gray+down2+mask0.5", SIZE)
    masks = corruption(pictures(), KEYS)[:, -1]
    assert len({mask.numpy().tobytes() for mask in masks}) == 5
    assert torch.equal(corruption(pictures(1).flip(0), KEYS.flip(0))[:, -1].flip(0), masks)
    assert torch.equal(corruption(pictures(2)[:1], KEYS[3:4])[0, -1], masks[3])


def test_masks_hide_every_cell_equally_often():
    corruption = Corruption("mask0.25", 8)
    known = corruption(torch.ones(4000, 3, 8, 8), torch.arange(4000))[:, -1]
    assert (known.mean(0) - 0.75).abs().max() < 5 * (0.75 * 0.25 / 4000) ** 0.5


@pytest.mark.parametrize("keys", [None, KEYS[:4], KEYS.int(), KEYS[:, None]])
def test_masks_need_keys(keys):
    assert Corruption("gray", SIZE)(pictures(), keys).shape == (5, 1, SIZE, SIZE)
    with pytest.raises(ValueError, match=r"mask0.5 needs keys: int64 \(5,\)"):
        Corruption("mask0.5", SIZE)(pictures(), keys)


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 1, 16, 16), (3, 16, 16)])
def test_images_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"expected \(B, 3, 16, 16\)"):
        Corruption("down2", SIZE)(torch.zeros(shape))


# projection


@pytest.mark.parametrize("spec, side", CASES)
def test_projection_has_the_condition(spec, side):
    corruption = Corruption(spec, SIZE)
    for seed in range(3):
        condition = corruption(pictures(9 + seed).roll(seed, 0), KEYS)
        images = pictures(seed, side)
        check_projection(corruption, corruption.project(images, condition), images, condition)


@pytest.mark.parametrize("spec", SPECS)
def test_projection_does_not_change_images_that_agree(spec):
    corruption, x = Corruption(spec, SIZE), pictures()
    torch.testing.assert_close(corruption.project(x, corruption(x, KEYS)), x, rtol=0, atol=1e-6)
    for side, level in zip((4, 8), pyramid(x, (4, 8))):
        projected = corruption.project(level, corruption(x, KEYS))
        torch.testing.assert_close(projected, level, rtol=0, atol=1e-6, msg=f"side {side}")


def slow_around(center, deviation):
    """A group of values (n,) around its mean, with the largest factor that some value in [0, 1] allows."""
    room = [(1 - center if d > 0 else center) / abs(d) for d in deviation if d]
    return center + min([1.0, *room]) * deviation


def slow_project(image, condition, gray):
    """(3, H, H) in float64, one block and one pixel at a time."""
    field = slow_luma(image) if gray else image
    block = image.shape[-1] // condition.shape[-1]
    moved = np.zeros_like(field)
    for c, row, column in np.ndindex(condition.shape):
        area = c, slice(row * block, (row + 1) * block), slice(column * block, (column + 1) * block)
        deviation = field[area] - field[area].mean()
        moved[area] = slow_around(condition[c, row, column], deviation.ravel()).reshape(block, block)
    if not gray:
        return moved
    result = np.zeros_like(image)
    for row, column in np.ndindex(field.shape[1:]):
        result[:, row, column] = slow_around(moved[0, row, column], image[:, row, column] - field[0, row, column])
    return result


@pytest.mark.parametrize("spec", ["gray", "down2", "down4", "gray+down2", "gray+down4"])
def test_projection_keeps_as_much_as_fits(spec):
    corruption, images = Corruption(spec, SIZE), pictures(4)
    condition = corruption(pictures(5).roll(1, 0))
    result = corruption.project(images, condition)
    for image, c, r in zip(images.double().numpy(), condition.double().numpy(), result):
        np.testing.assert_allclose(r, slow_project(image, c, corruption.gray), atol=2e-6)


@pytest.mark.parametrize("spec, side", CASES)
def test_projection_has_finite_gradients(spec, side):
    corruption = Corruption(spec, SIZE)
    for shift in range(5):  # 0: noise is to agree with noise; other shifts: also black with white
        images = pictures(1, side).requires_grad_()
        result = corruption.project(images, corruption(pictures(3).roll(shift, 0), KEYS))
        (result - pictures(2, side)).square().sum().backward()
        assert images.grad.isfinite().all() and images.grad.abs().max() < 1000
        has_freedom = side > corruption.resolution or corruption.gray or corruption.masks
        if has_freedom and shift == 0:
            assert images.grad[0].abs().max() > 0.01


def test_projection_gradient_is_the_true_one():
    corruption = Corruption("gray+down2", 4)
    condition = corruption(pictures(6, 4)).double()
    x = (pictures(7, 4)[:2] * 0.9 + 0.05).requires_grad_()
    direction = pictures(8, 4)[:1] - 0.5
    weight = pictures(9, 4)[:2]
    slope = torch.autograd.grad((corruption.project(x, condition[:2]) * weight).sum(), x)[0]
    step = 1e-3
    with torch.no_grad():
        ahead = corruption.project(x + step * direction, condition[:2])
        behind = corruption.project(x - step * direction, condition[:2])
    numeric = ((ahead - behind) * weight).double().sum().item() / (2 * step)
    assert (slope * direction).sum().item() == pytest.approx(numeric, rel=2e-2)


def test_projection_under_autocast_stays_exact():
    corruption = Corruption("gray+down2", SIZE)
    condition, images = corruption(pictures(1)), pictures(2)
    with torch.autocast("cpu", torch.bfloat16):
        result = corruption.project(images.bfloat16(), corruption(pictures(1)))
    check_projection(corruption, result, images, condition)


def test_condition_of_a_coarser_level_equals_the_slow_one():
    corruption, x = Corruption("down2+mask0.25", SIZE), pictures()
    condition = corruption(x, KEYS)
    assert torch.equal(corruption.condition_at(condition, SIZE), condition)
    small = corruption.condition_at(condition, 4)
    for image, c, s in zip(x, condition, small):
        known = slow_known(c[-1], 4)
        assert 0 < known.sum() < 16 and np.array_equal(s[-1], known)
        np.testing.assert_allclose(s[:3], slow_corruption(image, False, 4) * known, atol=1e-6)


def test_levels_that_do_not_fit_are_refused():
    corruption = Corruption("gray+down2", 12)  # resolution 6
    condition = corruption(pictures(size=12))
    for side in (3, 6, 12):
        corruption.project(pictures(size=side), condition)
    for side in (4, 5, 8):
        with pytest.raises(ValueError, match=f"side {side} does not fit the condition's 6"):
            corruption.project(pictures(size=side), condition)


# pictures


def test_upsample_equals_torchvisions_resize():
    x = pictures()
    torch.testing.assert_close(Corruption("gray", SIZE).upsample(Corruption("gray", SIZE)(x)), reference_gray(x))
    corruption = Corruption("down4", SIZE)
    small = corruption(x)
    wanted = reference.resize(small, [SIZE, SIZE], reference.InterpolationMode.BICUBIC, antialias=False).clamp(0, 1)
    torch.testing.assert_close(corruption.upsample(small), wanted)
    gray = Corruption("gray+down2", SIZE)
    shown = gray.upsample(gray(x))
    assert shown.shape == (5, 3, SIZE, SIZE)
    assert torch.equal(shown[:, 0], shown[:, 2])


def reference_gray(x):
    return torch.from_numpy(np.stack([slow_luma(image.numpy()) for image in x])).float().expand(-1, 3, -1, -1)


def test_upsample_shows_hidden_cells_gray():
    for spec in ("mask0.5", "gray+down2+mask0.5"):
        corruption = Corruption(spec, SIZE)
        condition = corruption(torch.full((5, 3, SIZE, SIZE), 0.5), KEYS)
        torch.testing.assert_close(corruption.upsample(condition), torch.full((5, 3, SIZE, SIZE), 0.5))
        condition = corruption(pictures(), KEYS)
        hidden = condition[:, -1:].repeat_interleave(SIZE // corruption.resolution, 2)
        hidden = hidden.repeat_interleave(SIZE // corruption.resolution, 3).expand(-1, 3, -1, -1) == 0
        assert (corruption.upsample(condition)[hidden] == 0.5).all()


def test_pyramid_equals_the_slow_means():
    x = (pictures() * 255).round().to(torch.uint8)
    levels = pyramid(x, [4, 16, 8])
    assert [tuple(level.shape) for level in levels] == [(5, 3, 4, 4), (5, 3, 16, 16), (5, 3, 8, 8)]
    assert torch.equal(levels[1], x / 255)
    for level in levels:
        wanted = np.stack([slow_means(image.double().numpy() / 255, level.shape[-1]) for image in x])
        np.testing.assert_allclose(level, wanted, atol=1e-6)
    for side in (0, 3, 32):
        with pytest.raises(ValueError, match=f"side {side} of the pyramid does not divide"):
            pyramid(x, [4, side])


# detail<k>: all but the lowest frequencies


def slow_coarse(field, k):
    """(C, t, t) in float64 -> its k x k lowest frequencies alone, by SciPy's orthonormal DCT-II."""
    frequencies = dctn(field, axes=(1, 2), norm="ortho")
    frequencies[:, k:] = 0
    frequencies[:, :, k:] = 0
    return idctn(frequencies, axes=(1, 2), norm="ortho")


@pytest.mark.parametrize(
    "spec, gray, k", [("gray+detail4", True, 4), ("detail1", False, 1), ("detail15+gray", True, 15)]
)
def test_detail_equals_the_slow_one(spec, gray, k):
    corruption = Corruption(spec, SIZE)
    condition = corruption((255 * pictures()).byte())
    assert corruption.resolution == SIZE
    assert corruption.colors == corruption.channels == (1 if gray else 3)
    for image, c in zip((255 * pictures()).byte().double().numpy() / 255, condition):
        field = slow_luma(image) if gray else image
        np.testing.assert_allclose(c, (field - slow_coarse(field, k)) / 2 + 0.5, atol=2e-6)
    assert corruption.upsample(condition).shape == (5, 3, SIZE, SIZE)


@pytest.mark.parametrize("spec", ["gray+detail4", "detail2"])
def test_projection_takes_detail_from_the_condition_and_light_from_the_image(spec):
    corruption = Corruption(spec, SIZE)
    images = 0.4 + 0.2 * pictures(1)  # far from 0 and 1, so that nothing is clamped
    other = 0.4 + 0.2 * pictures(2).roll(1, 0)
    condition = corruption(other)
    result = corruption.project(images, condition)
    torch.testing.assert_close(corruption(result), condition, rtol=0, atol=1e-6)
    for before, after in zip(images.double().numpy(), result.double().numpy()):
        if corruption.gray:
            before = slow_luma(before)
            after = slow_luma(after)
        light = slow_coarse(before, corruption.taken)
        np.testing.assert_allclose(slow_coarse(after, corruption.taken), light, atol=1e-5)
    torch.testing.assert_close(corruption.project(images, corruption(images)), images, rtol=0, atol=1e-6)
    for side in (4, 8, 16):
        wild = corruption.project(pictures(3, side), corruption(pictures(4).roll(1, 0)))
        assert wild.shape == (5, 3, side, side)
        assert wild.min() >= 0
        assert wild.max() <= 1


def test_detail_is_as_exact_under_autocast_and_where_all_frequencies_of_a_side_are_taken():
    corruption = Corruption("gray+detail12", SIZE)
    faint = 0.4 + 0.2 * pictures()
    condition = corruption(faint.roll(1, 0))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(corruption(faint.roll(1, 0)), condition)
        assert (corruption(corruption.project(faint, condition)) - condition).abs().max() <= 1e-6
    small = pyramid(faint, [8])[0]
    torch.testing.assert_close(corruption.project(small, corruption(small.new_full((5, 3, SIZE, SIZE), 0.5))), small)


def test_detail_removes_light_of_low_frequency():
    corruption = Corruption("gray+detail4", SIZE)
    generator = torch.Generator().manual_seed(0)
    brightness = torch.rand(5, 1, 1, 1, generator=generator).expand(-1, -1, SIZE, SIZE)
    light = brightness * torch.linspace(0, 0.5, SIZE)
    light = torch.from_numpy(slow_coarse(light[:, 0].numpy(), 4))[:, None].float()
    faint = 0.3 * pictures()
    torch.testing.assert_close(corruption(faint + light), corruption(faint), rtol=0, atol=1e-6)


@pytest.mark.parametrize("spec", ["detail0", "gray+detail16", "detail4+down2", "gray+detail4+mask0.5"])
def test_detail_cannot_be_combined_with_down_or_mask(spec):
    with pytest.raises(ValueError, match=r"^--corrupt .*: detail\d+: give 1 to 15, without down or mask"):
        Corruption(spec, SIZE)
