"""Corruptions c(x) that throw information away, and projections that make any image agree with what they kept.

A corruption is gray, detail<k>, down<k>, mask<f>, or several of them joined by +. The condition c(x) is what the
generator sees.
"""

import math
import re

import torch
import torch.nn.functional as F

from CamNet.Codes import uniforms

NUMBERS = {
    "gray": "",
    "detail": "[0-9]+",
    "down": "[0-9]+",
    "mask": r"[0-9]*\.?[0-9]+",
}  # after the kinds, in the order they apply
GRID = 8  # cells of a mask a side, or fewer where the condition has fewer pixels
TINY = 1e-8  # below any difference between two values of a picture: keeps 0 / 0 out of `_around`


def _to_float(images):
    """float32 in [0, 1] from uint8 or from float in [0, 1]."""
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()


def _luma(x):
    """Greyscale (B, 1, H, W) by ITU-R 601. The weights add up to 1: torchvision's .2989 would darken a grey image."""
    red, green, blue = x.split(1, dim=1)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def _spread(x, side):
    """(B, C, r, r) -> (B, C, side, side): every pixel repeated, side a multiple of r."""
    return x.repeat_interleave(side // x.shape[2], dim=2).repeat_interleave(side // x.shape[3], dim=3)


def _coarse(x, k):
    """The part of x (B, C, t, t) that its k x k lowest frequencies make up: an orthogonal projection, by the DCT-II."""
    side = x.shape[-1]
    line, order = torch.arange(side, device=x.device), torch.arange(min(k, side), device=x.device)
    basis = torch.cos(math.pi / (2 * side) * (2 * line + 1) * order[:, None]) * (2 / side) ** 0.5  # (k, t)
    basis = torch.cat([basis[:1] / 2**0.5, basis[1:]])
    with torch.autocast(x.device.type, enabled=False):  # it would round the pixels to 8 bits
        projection = basis.T @ basis
        return projection @ x.float() @ projection


def _around(centre, deviation, dims):
    """centre + s * deviation in [0, 1], with the largest s <= 1 that stays there, one for each group of values.

    A group lies along dims, its centre is in [0, 1] and its deviations have the (weighted) mean 0, so the result's mean
    is the centre. A clamp would move it. The one below removes rounding: what it cuts is already at the border.
    """
    room = torch.where(deviation > 0, 1 - centre, centre)
    share = room / torch.maximum(deviation.abs(), room).clamp(min=TINY)
    return (centre + share.amin(dims, keepdim=True) * deviation).clamp(0, 1)


def _with_block_means(x, means):
    """x (B, C, t, t), changed so that its blocks have the given means (B, C, r, r); all of it in [0, 1]."""
    side = x.shape[-1] // means.shape[-1]
    blocks = x.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # (B, C, r, side, r, side)
    deviation = blocks - blocks.mean((3, 5), keepdim=True)
    return _around(means[:, :, :, None, :, None], deviation, (3, 5)).flatten(4).flatten(2, 3)


def _parse(spec):
    """Return {kind: its number as text} of a specification."""
    parts = {}
    for part in spec.split("+"):
        kind = next((kind for kind, number in NUMBERS.items() if re.fullmatch(kind + number, part)), None)
        if kind is None:
            raise ValueError(f"--corrupt {spec!r}: {part!r} is not gray, detail<k>, down<k> or mask<f>, joined by +")
        if kind in parts:
            raise ValueError(f"--corrupt {spec!r}: {kind} is there twice; give each kind at most once")
        parts[kind] = part.removeprefix(kind)
    return parts


class Corruption:
    """The corruption `spec` of size x size images: always grey first, then smaller, then masked.

    spec, its parts in any order: "gray", luminance by ITU-R 601; "detail<k>", without the k x k lowest frequencies, of
    light and large areas: what is left is halved and stands around 0.5, and neither of the following goes with it;
    "down<k>", means over blocks of k x k pixels, k >= 2 a divisor of size; "mask<f>", round(f * cells) of the cells of
    an 8 x 8 grid over the small image hidden, 0 < f < 1.
    Attributes: spec, the same with its parts in order; size; resolution, size / k, the side of the condition; channels
    of the condition: 1 (gray) or 3, and 1 more with a mask. Raises ValueError on any other spec.
    """

    def __init__(self, spec, size):
        parts = _parse(spec)
        factor, share = int(parts.get("down", 1)), float(parts.get("mask", 0))
        if "down" in parts and (factor < 2 or size % factor):
            raise ValueError(f"--corrupt {spec!r}: down{factor} needs a divisor of the image's side {size}, 2 or more")
        self.taken = int(parts.get("detail", 0))  # frequencies a side
        if "detail" in parts and (not 0 < self.taken < size or {"down", "mask"} & parts.keys()):
            raise ValueError(
                f"--corrupt {spec!r}: detail{self.taken} needs 1 to {size - 1}, and no down or mask beside it"
            )
        self.size, self.resolution = size, size // factor
        self.gray, self.masks = "gray" in parts, "mask" in parts
        self.colors = 1 if self.gray else 3
        self.channels = self.colors + self.masks
        self.cells = min(GRID, self.resolution)
        self.hidden = round(share * self.cells**2)
        if self.masks and not (0 < share < 1 and 0 < self.hidden < self.cells**2):
            hides = f"hides {self.hidden} of {self.cells**2} cells"
            raise ValueError(f"--corrupt {spec!r}: mask{parts['mask']} {hides}; give a share in (0, 1), leave some")
        numbers = {"gray": "", "detail": self.taken, "down": factor, "mask": share}
        self.spec = "+".join(f"{kind}{numbers[kind]}" for kind in NUMBERS if kind in parts)

    def __call__(self, images, keys=None):
        """Return the condition c(x), float32 (B, channels, resolution, resolution) in [0, 1].

        images: (B, 3, size, size), uint8 or float in [0, 1]. keys: int64 (B,), needed by masks alone: an image's key
        decides its mask, on every device and in any batch. The last channel of a masked condition is 1 where a pixel is
        known and 0 where it is hidden; there the other channels are 0 too. Raises ValueError on other shapes.
        """
        if images.shape[1:] != (3, self.size, self.size):
            raise ValueError(f"images have the shape {tuple(images.shape)}: expected (B, 3, {self.size}, {self.size})")
        x = _to_float(images)
        x = _luma(x) if self.gray else x
        if self.taken:
            return (x - _coarse(x, self.taken)) / 2 + 0.5
        x = F.avg_pool2d(x, self.size // self.resolution).clamp(0, 1)
        if not self.masks:
            return x
        if keys is None or keys.shape != (len(x),) or keys.dtype != torch.int64:
            raise ValueError(f"corruption {self.spec} needs keys: int64 ({len(x)},), one for each image's mask")
        known = self._draw_known(keys).to(x.device)
        return torch.cat([x * known, known], dim=1)

    def _draw_known(self, keys):
        """(B, 1, resolution, resolution): 1 = known. Cells are unequal where their number does not divide the side."""
        order = uniforms(keys, self.cells**2).argsort(dim=1, stable=True)  # stable: equal numbers on all devices alike
        known = (order.argsort(dim=1) >= self.hidden).view(-1, 1, self.cells, self.cells)
        cell = torch.arange(self.resolution, device=keys.device) * self.cells // self.resolution
        return known[:, :, cell][..., cell].float()

    def condition_at(self, condition, side):
        """Return what the condition says of the image at another side: (B, channels, r, r), r = min(side, resolution).

        Below its resolution it is averaged over areas; a pixel is known only if all that go into it are. At or above it
        is itself. Raises ValueError if side and resolution are no multiples of each other.
        """
        if side % self.resolution and self.resolution % side:
            raise ValueError(f"side {side} does not fit the condition's {self.resolution}: use a multiple or divisor")
        if side >= self.resolution:
            return condition
        small = F.avg_pool2d(condition, self.resolution // side)
        if self.masks:
            known = -F.max_pool2d(-condition[:, -1:], self.resolution // side)  # the smallest of each block
            small = torch.cat([small[:, :-1] * known, known], dim=1)
        return small

    def project(self, images, condition):
        """Return images like the given ones whose corruption is the condition, up to rounding (1e-6).

        images: float (B, 3, t, t) in [0, 1]; condition: as made by this corruption from images of `size`. Returns
        float32 in [0, 1]; differentiable. t may be the side of any level of a pyramid over `size`, e.g. size / 4,
        size / 2, size. The corruption of level t is grey, then the means over blocks of t / resolution pixels a side;
        where t <= resolution it is grey alone and the condition is averaged over areas to t first (`condition_at`).
        Hidden pixels stay as they are. Raises ValueError if t and the resolution are no multiples of each other.

        Block means (of the luminance, if grey) are moved to the condition and the deviations from them scaled by one
        s <= 1 per block and channel; then, if grey, the colours' deviations from the luminance by one s <= 1 per pixel.
        With detail<k> the images keep their lowest frequencies and take the others from the condition; what then leaves
        [0, 1] is clamped, so that the agreement is not exact there, nor on smaller sides.
        """
        x, side = images.float(), images.shape[-1]
        condition = self.condition_at(condition.float(), side)
        field = _luma(x) if self.gray else x
        if self.taken:
            result = (_coarse(field, self.taken) + 2 * condition - 1).clamp(0, 1)
        else:
            result = _with_block_means(field, condition[:, : self.colors])
        if self.gray:
            result = _around(result, x - field, (1,))
        return torch.where(_spread(condition[:, -1:], side) > 0, result, x) if self.masks else result

    def upsample(self, condition):
        """Return the condition as a picture, float32 (B, 3, size, size) in [0, 1]; the baseline of all restorations.

        Bicubic, clamped; grey in all three channels; hidden cells 0.5.
        """
        x = condition[:, : self.colors].float()
        if self.masks:
            x = torch.where(condition[:, -1:] > 0, x, 0.5)  # before, so that no black bleeds into what is known
        x = F.interpolate(x, size=(self.size, self.size), mode="bicubic") if x.shape[-1] != self.size else x
        x = x.clamp(0, 1)
        if self.masks:
            x = torch.where(_spread(condition[:, -1:], self.size) > 0, x, 0.5)
        return x.expand(-1, 3, -1, -1).contiguous()


def pyramid(images, sides):
    """Return float32 (B, 3, s, s) in [0, 1] for each s of sides: means over areas of the full images.

    images: (B, 3, S, S), uint8 or float in [0, 1]. Each is made from the full images, not from another level. Raises
    ValueError if a side does not divide S.
    """
    full = images.shape[-1]
    for side in sides:
        if not 0 < side <= full or full % side:
            raise ValueError(f"side {side} of the pyramid does not divide the image's side {full}: use a divisor of it")
    x = _to_float(images)
    return [F.avg_pool2d(x, full // side) for side in sides]
