"""Random numbers by key: against SplitMix64 in Python integers, against SciPy's distributions, in any batch."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch

from CamNet import Codes
from CamNet.Codes import make_keys, normals, uniforms

MASK = 2**64 - 1
SEEDS = (0, 1, 1234567, 2**63, MASK)
VECTORS = {  # seed: the first numbers of SplitMix64, as published
    1234567: [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ],
    0: [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC, 0x1B39896A51A8749B],
}


def mix(z):
    """SplitMix64's output function, on integers."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def splitmix(seed, count):
    """The first numbers of SplitMix64, one after the other."""
    state = seed
    numbers = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & MASK
        numbers.append(mix(state))
    return numbers


def slow_key(*parts):
    """make_keys of integers."""
    key = 0
    for part in parts:
        key = mix((key + 0x9E3779B97F4A7C15 + part) & MASK)
    return key


def signed(number):
    return number - 2**64 if number >> 63 else number


def key(seed):
    return torch.tensor([signed(seed)])


# bits


@pytest.mark.parametrize("seed", VECTORS)
def test_bits_equal_the_published_numbers(seed):
    assert splitmix(seed, 5) == VECTORS[seed]  # the reference of this file is right
    assert [number & MASK for number in Codes._bits(key(seed), 5)[0].tolist()] == VECTORS[seed]


@pytest.mark.parametrize("seed", SEEDS)
def test_bits_are_splitmix64(seed):
    assert Codes._bits(key(seed), 1000)[0].tolist() == [signed(number) for number in splitmix(seed, 1000)]


def test_shift_is_logical():
    numbers = [0, 1, -1, 2**63 - 1, -(2**63), -12345678901234567]
    for bits in (1, 27, 30, 31, 32, 63):
        assert Codes._shift(torch.tensor(numbers), bits).tolist() == [(number & MASK) >> bits for number in numbers]


# keys


@pytest.mark.parametrize("parts", [(0,), (5,), (-1, 7), (0, 0, 0), (2**62, -(2**63), 1, 2)])
def test_keys_equal_the_slow_ones(parts):
    wanted = signed(slow_key(*parts))
    assert make_keys(*parts).item() == wanted and make_keys(*parts).dtype == torch.int64
    tensors = [torch.tensor([part]) for part in parts]
    assert make_keys(*tensors).tolist() == [wanted]


def test_parts_of_keys_broadcast():
    rows, columns = torch.tensor([3, 0, -9]), torch.arange(4)
    keys = make_keys(11, rows[:, None], columns)
    assert keys.shape == (3, 4)
    for (i, row), (j, column) in itertools.product(enumerate(rows.tolist()), enumerate(columns.tolist())):
        assert keys[i, j].item() == signed(slow_key(11, row, column))


def test_keys_of_any_parts_are_distinct():
    seeds = torch.arange(4).view(-1, 1, 1, 1, 1)
    periods = torch.arange(5).view(-1, 1, 1, 1)
    images = torch.arange(50).view(-1, 1, 1)
    levels = torch.arange(4).view(-1, 1)
    keys = make_keys(seeds, periods, images, levels, torch.arange(40))
    assert keys.shape == (4, 5, 50, 4, 40)
    assert keys.unique().numel() == keys.numel()


def test_keys_depend_on_the_order_and_the_number_of_their_parts():
    values = [parts for n in (1, 2, 3) for parts in itertools.product(range(12), repeat=n)]
    assert len({make_keys(*parts).item() for parts in values}) == len(values)


def test_a_bit_of_a_key_changes_half_of_the_numbers_bits():
    keys = make_keys(torch.arange(64))
    bits = torch.arange(63)
    changed = Codes._bits(keys, 1) ^ Codes._bits((keys[:, None] ^ (1 << bits)).flatten(), 1).view(64, 63)
    share = torch.stack([(changed >> k) & 1 for k in range(64)]).float()
    assert share.mean().item() == pytest.approx(0.5, abs=0.01)
    assert share.mean(dim=(1, 2)).sub(0.5).abs().max() < 0.05  # every bit of the number
    assert share.mean(dim=(0, 1)).sub(0.5).abs().max() < 0.05  # every bit of the key


# numbers


def test_uniforms_equal_the_slow_ones():
    for seed in SEEDS:
        slow = [((number & (2**23 - 1)) + 0.5) / 2**23 for number in splitmix(seed, 100)]
        assert uniforms(key(seed), 100)[0].double().tolist() == slow  # float32 holds them exactly


@pytest.mark.parametrize("count", [1, 2, 7, 100])
def test_normals_equal_the_slow_ones(count):
    for seed in SEEDS:
        half = splitmix(seed, (count + 1) // 2)
        radius = [math.sqrt(-2 * math.log(((number & (2**23 - 1)) + 0.5) / 2**23)) for number in half]
        angle = [2 * math.pi * ((number >> 32 & (2**23 - 1)) + 0.5) / 2**23 for number in half]
        slow = [r * math.cos(a) for r, a in zip(radius, angle)] + [r * math.sin(a) for r, a in zip(radius, angle)]
        assert normals(key(seed), count)[0].tolist() == pytest.approx(slow[:count], abs=5e-6)


def test_uniforms_are_inside_the_open_interval():
    ends = torch.tensor([0, 0x7FFFFF, -1, 1 << 23, 0x3FFFFF])
    unit = Codes._to_unit(ends)
    assert unit.dtype == torch.float32
    assert unit.min() > 0
    assert unit.max() < 1
    assert unit.tolist() == [2**-24, 1 - 2**-24, 1 - 2**-24, 2**-24, 0.5 - 2**-24]
    assert normals(make_keys(torch.arange(2000)), 501).isfinite().all()


@pytest.mark.parametrize("by", ["position", "key"])
def test_uniforms_are_uniform(by):
    x = uniforms(make_keys(torch.arange(1)), 100_000) if by == "position" else uniforms(torch.arange(100_000), 1)
    x = x.flatten().double().numpy()
    assert x.mean() == pytest.approx(0.5, abs=4 / (12 * len(x)) ** 0.5)
    assert x.var() == pytest.approx(1 / 12, rel=0.01)
    assert scipy.stats.kstest(x, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(x[1:], x[:-1])[0, 1]) < 4 / len(x) ** 0.5


@pytest.mark.parametrize("by", ["position", "key"])
def test_normals_are_normal(by):
    x = normals(torch.tensor([5]), 100_000) if by == "position" else normals(torch.arange(100_000), 1)
    x = x.flatten().double().numpy()
    assert x.mean() == pytest.approx(0, abs=4 / len(x) ** 0.5)
    assert x.var() == pytest.approx(1, abs=4 * (2 / len(x)) ** 0.5)
    assert scipy.stats.kstest(x, "norm").pvalue > 1e-3
    assert scipy.stats.skew(x) == pytest.approx(0, abs=0.04) and scipy.stats.kurtosis(x) == pytest.approx(0, abs=0.08)


def test_the_halves_of_normals_are_independent():
    x = normals(make_keys(torch.arange(20)), 10_000).double()
    first, second = x[:, :5000].flatten().numpy(), x[:, 5000:].flatten().numpy()  # one radius, one angle for a pair
    for a, b in ((first, second), (first**2, second**2), (abs(first), second)):
        assert abs(np.corrcoef(a, b)[0, 1]) < 4 / len(a) ** 0.5
    angle = np.arctan2(second, first) / (2 * np.pi) + 0.5
    assert scipy.stats.kstest(angle, "uniform").pvalue > 1e-3


def test_neighboring_keys_are_independent():
    rows = normals(torch.arange(100), 2000)
    correlation = torch.corrcoef(rows.double()) - torch.eye(100)
    assert correlation.abs().max() < 6 / 2000**0.5


# numbers depend on the key only


@pytest.mark.parametrize("draw", [uniforms, normals])
@pytest.mark.parametrize("count", [1, 13, 200])
def test_batch_chunk_and_order_have_no_effect(draw, count):
    keys = make_keys(7, torch.arange(37))
    whole = draw(keys, count)
    order = torch.randperm(37, generator=torch.Generator().manual_seed(0))
    assert whole.shape == (37, count)
    assert whole.dtype == torch.float32
    assert torch.equal(draw(keys[order], count), whole[order])
    for chunk in (1, 3, 8, 36):
        assert torch.equal(torch.cat([draw(part, count) for part in keys.split(chunk)]), whole)
    assert torch.equal(draw(torch.stack([keys, keys], 1)[:, 0], count), whole)  # keys with gaps in memory


def test_torchs_own_generator_has_no_effect():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = normals(torch.arange(3), 9)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(normals(torch.arange(3), 9), first)


def test_autocast_has_no_effect():
    with torch.autocast("cpu", torch.bfloat16):
        low = normals(torch.arange(3), 50)
    assert torch.equal(low, normals(torch.arange(3), 50))
