"""Random numbers that depend on their keys alone: not on the batch, on what was drawn before, or on the device (except
for the rounding of logarithm, sine and cosine).

A counter-based generator: each number is a hash of its key and its position, SplitMix64 (Steele, Lea, Flood 2014,
doi:10.1145/2660193.2660195). Sum and hash are int64 operations, which wrap around in the same way on all devices.
"""

import math
from enum import IntEnum

import torch

STEP, FIRST, SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15  # SplitMix64's constants, signed


class Purpose(IntEnum):
    """What the random numbers of a generator's run are for: the second part of their keys (seed, purpose, ...)."""

    FLIP = 0  # mirroring the training images of a period
    CODE = 1  # the candidates of the search
    MEASURE = 2  # codes and masks of the images that are held out
    BANK = 3  # codes and masks of the bank
    PAIR = 4  # the two samples of an image whose energy score is a step's loss


class StepPurpose(IntEnum):
    """What the random numbers of a step of the encoder are for: the last part of keys (seed, step, image, purpose)."""

    PICK = 0  # which restorations of the bank are seen
    SHARE = 1  # whether a restoration or the image is seen
    MASK = 2  # masks of c(x) itself


def _shift(x, bits):
    """Logical shift to the right: torch's own shift copies the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _hash(x):
    x = (x ^ _shift(x, 30)) * FIRST
    x = (x ^ _shift(x, 27)) * SECOND
    return x ^ _shift(x, 31)


def make_keys(*parts):
    """Return int64 keys, one for every combination of the parts: ints, or int64 tensors that broadcast."""
    parts = [torch.as_tensor(part) for part in parts]
    key = torch.zeros_like(sum(parts))
    for part in parts:
        key = _hash(key + STEP + part)
    return key


def _bits(keys, count):
    positions = torch.arange(1, count + 1, device=keys.device)
    return _hash(keys[:, None] + positions * STEP)


def _to_unit(bits):
    """The low 23 bits as float32 in (0, 1): the middles of 2^23 equal intervals, so that 0 and 1 are impossible."""
    return ((bits & 0x7FFFFF).float() + 0.5) / 0x800000


def uniforms(keys, count):
    """Return float32 (B, count) in (0, 1) for int64 keys (B,), on their device."""
    return _to_unit(_bits(keys, count))


def normals(keys, count):
    """Return standard normal float32 (B, count) for int64 keys (B,), on their device (Box and Muller 1958)."""
    bits = _bits(keys, (count + 1) // 2)
    radius = (-2 * _to_unit(bits).log()).sqrt()
    angle = 2 * math.pi * _to_unit(_shift(bits, 32))
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :count]
