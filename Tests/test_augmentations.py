"""Augmentations against torchvision: each operation, the whole pipeline, and the distributions of what is drawn."""

from itertools import permutations

import pytest
import torch
from scipy import stats
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as tv

import Augmentations
from Augmentations import Augmentation

ALPHA = 1e-3  # of a false alarm in any of this file's distribution tests, were their seeds not fixed
DISTRIBUTION_TESTS = 21
N_DRAWS = 10000
EVERYTHING = {"blur_p": 0.5, "blur_kernel": 5, "solarize_p": 0.2}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def integers(low, high, generator, n=None):
    """Uniform in low ... high, both included: one int, or a tensor (n,)."""
    values = torch.randint(low, high + 1, (n or 1,), generator=generator)
    return values if n else int(values)


def uint8_images(n, height=32, width=32, seed=0):
    return torch.randint(0, 256, (n, 3, height, width), generator=seeded(seed), dtype=torch.uint8)


def assert_close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


# ------------------------------------------------------------------------------------------ each operation


def torchvision_crop(image, top, left, height, width, size, flip, interpolation):
    box = (int(top), int(left), int(height), int(width))
    view = tv.resized_crop(image, *box, [size, size], InterpolationMode(interpolation), antialias=True).clamp(0, 1)
    return tv.horizontal_flip(view) if flip else view


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_resized_crop_equals_torchvision(interpolation):
    g, n = seeded(1), 3
    for _ in range(120):
        height, width, size = integers(1, 70, g), integers(1, 70, g), integers(1, 64, g)
        images = torch.rand(n, 3, height, width, generator=g)
        h, w = integers(1, height, g, n), integers(1, width, g, n)
        top, left = ((torch.rand(n, generator=g) * (room + 1)).long() for room in (height - h, width - w))
        flip = torch.rand(n, generator=g) < 0.5
        views = Augmentations.resized_crop(images, top, left, h, w, size, flip, interpolation)
        rows = zip(images, top, left, h, w, [size] * n, flip, [interpolation] * n)
        assert_close(views, torch.stack([torchvision_crop(*row) for row in rows]))


@pytest.mark.parametrize("size", [8, 32, 64])
def test_whole_images_are_resized_as_torchvision_does(size):
    images = torch.rand(2, 3, 40, 23, generator=seeded())
    aug = Augmentation(size, crop_scale=None, flip_p=0, jitter=None, gray_p=0)
    expected = torch.stack([tv.resize(image, [size, size], antialias=True) for image in images])
    assert_close(aug(images, seeded()), expected)


def test_to_float_divides_uint8_by_255_and_returns_float32_itself():
    images = uint8_images(4)
    floats = Augmentations.to_float(images)
    assert floats.dtype == torch.float32
    assert torch.equal(floats, images / 255)
    assert Augmentations.to_float(floats) is floats


COLOR = {  # in the order of ColorJitter's numbers, with the range of the factor or shift
    "adjust_brightness": (0, 2),
    "adjust_contrast": (0, 2),
    "adjust_saturation": (0, 2),
    "adjust_hue": (-0.5, 0.5),
}


def adjust(name, images, values):
    """One color operation, as the jitter applies it."""
    if name == "adjust_hue":
        return Augmentations.adjust_hue(images, values)
    operation = torch.full((len(images),), list(COLOR).index(name))
    return Augmentations._adjust_tone_(images.clone(), values, operation)


@pytest.mark.parametrize("name", COLOR)
@pytest.mark.parametrize("levels", [2, 4, 1 << 20])
def test_color_equals_torchvision(name, levels):
    """Few levels make many ties between channels, grays, blacks and whites: the corners of the hue's formula."""
    g = seeded(2)
    images = torch.rand(20, 3, 17, 11, generator=g).mul(levels - 1).round().div(levels - 1)
    low, high = COLOR[name]
    values = torch.rand(20, generator=g) * (high - low) + low
    values[:2] = torch.tensor([low, high])
    before = images.clone()
    actual = adjust(name, images, values)
    assert_close(actual, torch.stack([getattr(tv, name)(x, float(v)) for x, v in zip(images, values)]))
    assert torch.equal(images, before)


def test_a_mix_of_tone_operations_equals_each_alone():
    images = torch.rand(9, 3, 8, 8, generator=seeded())
    factor = torch.linspace(0, 2, 9)
    mixed = Augmentations._adjust_tone_(images.clone(), factor, torch.arange(9) % 3)
    for i, name in enumerate(list(COLOR)[:3]):
        assert_close(mixed[i::3], adjust(name, images[i::3], factor[i::3]), 1e-6)


def test_hue_written_in_place_has_the_same_bits():
    images = torch.rand(9, 3, 8, 8, generator=seeded())
    shift = torch.linspace(-0.5, 0.5, 9)
    expected = Augmentations.adjust_hue(images, shift)
    assert Augmentations.adjust_hue(images, shift, out=images) is images
    assert torch.equal(images, expected)


def test_gray_and_solarize_equal_torchvision():
    images = torch.rand(4, 3, 9, 9, generator=seeded())
    assert_close(Augmentations.to_gray(images), tv.rgb_to_grayscale(images, 3), 1e-6)
    assert_close(Augmentations.solarize(images, 0.3), tv.solarize(images, 0.3), 0)


@pytest.mark.parametrize(("height", "width", "kernel"), [(32, 32, 3), (17, 40, 9), (8, 9, 15), (5, 5, 1)])
def test_blur_equals_torchvision(height, width, kernel):
    images, sigma = torch.rand(5, 3, height, width, generator=seeded()), torch.linspace(0.1, 3, 5)
    expected = torch.stack([tv.gaussian_blur(x, kernel, float(s)) for x, s in zip(images, sigma)])
    assert_close(Augmentations.gaussian_blur(images, kernel, sigma), expected)


# ------------------------------------------------------------------------------------------ the whole pipeline


def torchvision_view(image, aug, row):
    """One image (3, H, W) in [0, 1] through torchvision's functions, with one row of drawn parameters."""
    box = [row[key] for key in ("top", "left", "height", "width")]
    x = torchvision_crop(image, *box, aug.size, row["flip"], aug.interpolation)
    for operation in row["order"] if row["jitter"] else ():
        name = list(COLOR)[operation]
        x = getattr(tv, name)(x, float(row[name.removeprefix("adjust_")]))
    x = tv.rgb_to_grayscale(x, 3) if row["gray"] else x
    x = tv.gaussian_blur(x, aug.blur_kernel, float(row["sigma"])) if row["blur"] else x
    x = tv.solarize(x, aug.solarize_threshold) if row["solarize"] else x
    return tv.normalize(x, aug.mean, aug.std) if aug.mean else x


@pytest.mark.parametrize(
    ("settings", "height", "width"),
    [
        ({}, 32, 32),
        (EVERYTHING, 40, 27),
        ({"interpolation": "bicubic", "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}, 20, 50),
        ({"crop_scale": None, "jitter": (0.8, 0.8, 0.8, 0.0), "gray_p": 1, "blur_p": 1}, 32, 32),
        ({"crop_scale": None, "jitter_p": 1, "flip_p": 1}, 48, 64),
    ],
)
def test_pipeline_equals_torchvision(settings, height, width):
    aug, images = Augmentation(32, **settings), uint8_images(64, height, width)
    params = aug.draw(64, height, width, seeded(3))
    rows = [{key: values[i] for key, values in params.items()} for i in range(64)]
    views = aug.apply(images, params)
    expected = torch.stack([torchvision_view(x / 255, aug, row) for x, row in zip(images, rows)])
    # rounding adds up over the operations, and normalizing magnifies it; solarizing is continuous at the threshold 0.5
    assert_close(views, expected, 2e-5 if aug.mean is None else 1e-4)


def test_identical_images_get_different_views():
    views = Augmentation(32)(uint8_images(1).repeat(16, 1, 1, 1), seeded())
    assert len(views.flatten(1).unique(dim=0)) == 16


def test_same_seed_gives_same_bits():
    aug, images = Augmentation(24, **EVERYTHING), uint8_images(50)
    assert torch.equal(aug(images, seeded(5)), aug(images, seeded(5)))
    assert not torch.equal(aug(images, seeded(5)), aug(images, seeded(6)))


def test_rows_and_chunks_equal_whole_batch(monkeypatch):
    aug, images = Augmentation(32, **EVERYTHING), uint8_images(60)
    params = aug.draw(60, 32, 32, seeded())
    whole = aug.apply(images, params)
    for rows in (slice(0, 1), slice(10, 37), torch.tensor([59, 3, 3, 0]), slice(0, 0)):
        assert_close(aug.apply(images[rows], {k: v[rows] for k, v in params.items()}), whole[rows], 1e-6)
    monkeypatch.setattr(Augmentations, "CHUNK_FLOATS", 5 * 3 * 32 * 32)
    assert_close(aug.apply(images, params), whole, 1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        EVERYTHING,
        {"crop_scale": None, "jitter": None},
        {"interpolation": "bicubic", "mean": (0.5,) * 3, "std": (0.2,) * 3},
    ],
)
@pytest.mark.parametrize("chunk", [Augmentations.CHUNK_FLOATS, 7 * 3 * 32 * 32])
def test_all_views_in_one_call_have_the_bits_of_each_alone(settings, chunk, monkeypatch):
    aug = Augmentation(32, **settings)
    batches = [uint8_images(100, seed=seed) for seed in range(3)]
    params = [aug.draw(100, 32, 32, seeded(seed)) for seed in range(3)]
    expected = torch.cat([aug.apply(images, drawn) for images, drawn in zip(batches, params)])
    monkeypatch.setattr(Augmentations, "CHUNK_FLOATS", chunk)
    assert torch.equal(aug.apply_all(batches, params), expected)


@pytest.mark.parametrize("settings", [{}, {"crop_scale": None}, EVERYTHING | {"interpolation": "bicubic"}])
def test_uint8_and_float_agree_in_range_and_stay_as_they_are(settings):
    aug, images = Augmentation(32, **settings), uint8_images(40)
    images[:3] = torch.tensor([0, 255, 128]).view(3, 1, 1, 1)
    params, floats = aug.draw(40, 32, 32, seeded()), images / 255
    before, views = floats.clone(), aug.apply(images, params)
    assert views.dtype == torch.float32 and views.min() >= 0 and views.max() <= 1
    assert_close(aug.apply(floats, params), views, 1e-6)
    assert torch.equal(floats, before)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(aug.apply(images, params), views)


def test_no_augmentation_is_division_by_255():
    aug, images = Augmentation(32, crop_scale=None, flip_p=0, jitter=None, gray_p=0), uint8_images(8)
    assert torch.equal(aug(images, seeded()), images / 255)
    assert "\n" not in repr(aug) and all(f"{key}=" in repr(aug) for key in vars(aug))
    assert "the images as they are" in str(aug)


def test_the_blur_kernel_is_a_tenth_of_the_side():
    assert [Augmentation(size).blur_kernel for size in (8, 32, 64, 224)] == [3, 3, 7, 23]


# ------------------------------------------------------------------------------------------ distributions


def same_numbers(ours, theirs):
    """Two-sample Kolmogorov-Smirnov at this file's error rate (Bonferroni)."""
    return stats.ks_2samp(ours, theirs).pvalue > ALPHA / DISTRIBUTION_TESTS


def same_counts(ours, theirs):
    """Chi-square test of homogeneity of two lists of labels."""
    labels = sorted(set(ours) | set(theirs))
    table = [[sample.count(label) for label in labels] for sample in (list(ours), list(theirs))]
    return stats.chi2_contingency(table).pvalue > ALPHA / DISTRIBUTION_TESTS


def torchvision_draws(transform, height=32, width=32, n=N_DRAWS, seed=1):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return [transform.make_params([torch.empty(3, height, width)]) for _ in range(n)]


@pytest.mark.parametrize(("height", "width"), [(32, 32), (50, 40)])
def test_boxes_have_torchvisions_distribution(height, width):
    theirs = torchvision_draws(v2.RandomResizedCrop(32, scale=(0.2, 1)), height, width)

    def same_boxes(**settings):
        ours = Augmentation(32, **settings).draw(N_DRAWS, height, width, seeded())
        samples = [(ours[k], [box[k] for box in theirs]) for k in ("top", "left", "height", "width")]
        samples.append((ours["width"] / ours["height"], [box["width"] / box["height"] for box in theirs]))
        samples.append((ours["width"] * ours["height"], [box["width"] * box["height"] for box in theirs]))
        return [same_numbers(*pair) for pair in samples]

    assert all(same_boxes())
    assert not all(same_boxes(crop_scale=(0.25, 1.0)))  # the test has the power to see small errors
    assert not all(same_boxes(crop_ratio=(0.8, 4 / 3)))


@pytest.mark.parametrize(("height", "width"), [(8, 200), (200, 8), (30, 40)])
def test_box_that_never_fits_is_torchvisions_central_one(height, width):
    settings = {"scale": (1, 1), "ratio": (1, 1)} if height == 30 else {"scale": (0.9, 1)}
    theirs = torchvision_draws(v2.RandomResizedCrop(32, **settings), height, width, n=1)[0]
    aug = Augmentation(32, crop_scale=settings["scale"], crop_ratio=settings.get("ratio", (3 / 4, 4 / 3)))
    ours = aug.draw(20, height, width, seeded())
    assert all((ours[key] == value).all() for key, value in theirs.items())


def test_boxes_lie_inside():
    ours = Augmentation(32, crop_scale=(0.01, 1)).draw(5000, 9, 13, seeded())
    for start, length, limit in (("top", "height", 9), ("left", "width", 13)):
        assert (ours[start] >= 0).all() and (ours[length] > 0).all() and (ours[start] + ours[length] <= limit).all()


def test_jitter_has_torchvisions_distribution():
    theirs = torchvision_draws(v2.ColorJitter(0.4, 0.8, 1.2, 0.1))
    ours = Augmentation(32, jitter=(0.4, 0.8, 1.2, 0.1)).draw(N_DRAWS, 32, 32, seeded())
    for name in ("brightness", "contrast", "saturation", "hue"):
        expected = [params[f"{name}_factor"] for params in theirs]
        assert same_numbers(ours[name], expected)
        assert not same_numbers((ours[name] - ours[name].mean()) * 1.1 + ours[name].mean(), expected)
    orders = ["".join(map(str, order)) for order in ours["order"].tolist()]
    assert set(orders) == {"".join(order) for order in permutations("0123")}
    assert same_counts(orders, ["".join(map(str, params["fn_idx"].tolist())) for params in theirs])
    assert not same_counts(["0123"] * 400 + orders[400:], ["".join(map(str, p["fn_idx"].tolist())) for p in theirs])


def test_masks_have_torchvisions_probabilities():
    """torchvision's transforms act or do not; on a lopsided, colored image the outcome shows which."""
    image = torch.arange(12.0).view(3, 2, 2) / 12
    acts = {
        "flip": v2.RandomHorizontalFlip(0.5),
        "gray": v2.RandomGrayscale(0.2),
        "jitter": v2.RandomApply([v2.RandomInvert(1)], 0.8),
    }
    ours = Augmentation(32).draw(N_DRAWS, 32, 32, seeded())
    with torch.random.fork_rng():
        torch.manual_seed(2)
        for name, transform in acts.items():
            theirs = [not torch.equal(transform(image), image) for _ in range(N_DRAWS)]
            assert same_counts(ours[name].tolist(), theirs)
            wrong = torch.rand(N_DRAWS, generator=seeded()) < getattr(Augmentation(32), f"{name}_p") - 0.1
            assert not same_counts(wrong.tolist(), theirs)


def test_sigma_has_torchvisions_distribution_and_masks_are_independent():
    theirs = [params["sigma"][0] for params in torchvision_draws(v2.GaussianBlur(3, (0.1, 2.0)))]
    ours = Augmentation(32, blur_p=0.5, solarize_p=0.2).draw(N_DRAWS, 32, 32, seeded())
    assert same_numbers(ours["sigma"], theirs)
    assert not same_numbers(ours["sigma"] * 0.9, theirs)
    masks = torch.stack([ours[key].float() for key in ("flip", "jitter", "gray", "blur", "solarize")])
    assert (torch.corrcoef(masks) - torch.eye(5)).abs().max() < 5 / N_DRAWS**0.5


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    "settings",
    [
        {"size": 0},
        {"size": 3.5},
        {"crop_scale": (1.0, 0.2)},
        {"crop_ratio": (0, 1)},
        {"flip_p": 1.5},
        {"gray_p": -0.1},
        {"jitter": (0.4, 0.4, 0.4)},
        {"jitter": (0.4, 0.4, 0.4, 0.6)},
        {"blur_sigma": (0, 1)},
        {"blur_p": 1, "blur_kernel": 4},
        {"solarize_threshold": 128},
        {"interpolation": "nearest"},
        {"std": (1, 1, 1)},
    ],
)
def test_bad_setting_is_named(settings):
    name = list(settings)[-1]
    with pytest.raises(ValueError, match=f"^{name} is .*must be"):
        Augmentation(**{"size": 32} | settings)


def test_bad_images_and_parameters_are_named():
    aug, images = Augmentation(32), uint8_images(4)
    for bad in (images[0], images[:, :1], images.permute(0, 2, 3, 1)):
        with pytest.raises(ValueError, match=r"images.shape is .*\(B, 3, H, W\)"):
            aug(bad, seeded())
    with pytest.raises(ValueError, match=r"images.dtype is torch.int64, but must be uint8 or float"):
        aug(images.long(), seeded())
    with pytest.raises(ValueError, match=r"length is .* 4"):
        aug.apply(images, aug.draw(5, 32, 32, seeded()))
    with pytest.raises(ValueError, match="interpolation is 'area'"):
        box = torch.zeros(4, dtype=torch.long)
        Augmentations.resized_crop(images, box, box, box + 32, box + 32, 8, interpolation="area")
    with pytest.raises(ValueError, match="kernel_size is 4"):
        Augmentations.gaussian_blur(images / 255, 4, torch.ones(4))
