"""Corruptions c(x), which remove information from images, and projections, which make any image agree with a c(x).

A corruption is gray, detail<k>, down<k>, mask<f>, or several of them joined by +. The generator sees its result, the
condition c(x).
"""

import math
import re

import torch
import torch.nn.functional as F

from CamNet.Codes import uniforms

# The kinds of corruption, in the order in which they apply, and the pattern of the number after each.
NUMBERS = {
    "gray": "",
    "detail": "[0-9]+",
    "down": "[0-9]+",
    "mask": r"[0-9]*\.?[0-9]+",
}
GRID = 8  # cells per side of a mask; fewer where the condition has fewer pixels
TINY = 1e-8  # below any difference between two pixel values: avoids 0 / 0 in `_around`


def _to_float(images):
    """Return float32 in [0, 1] from uint8, or from float in [0, 1]."""
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()


def _luma(x):
    """Return the luminance (B, 1, H, W) of RGB images by ITU-R 601.

    The weights add up to 1. Those of torchvision (0.2989 for red) do not, and would darken a gray image.
    """
    red, green, blue = x.split(1, dim=1)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def _spread(x, side):
    """Return (B, C, r, r) enlarged to (B, C, side, side) by repeating pixels; side is a multiple of r."""
    return x.repeat_interleave(side // x.shape[2], dim=2).repeat_interleave(side // x.shape[3], dim=3)


def _coarse(x, k):
    """Return the k x k lowest spatial frequencies of x (B, C, t, t): an orthogonal projection, by the DCT-II."""
    # The orthonormal basis (k, t) of the DCT-II.
    side = x.shape[-1]
    position = torch.arange(side, device=x.device)
    order = torch.arange(min(k, side), device=x.device)
    basis = torch.cos(math.pi / (2 * side) * (2 * position + 1) * order[:, None]) * (2 / side) ** 0.5
    basis = torch.cat([basis[:1] / 2**0.5, basis[1:]])

    # In float32: autocast would round the pixels to 8 bits.
    with torch.autocast(x.device.type, enabled=False):
        projection = basis.T @ basis
        return projection @ x.float() @ projection


def _around(center, deviation, dims):
    """Return center + s * deviation, with the largest s <= 1 that keeps it in [0, 1]; one s for each group of values.

    A group extends along dims. Its center is in [0, 1] and its deviations have the (weighted) mean 0, so the result has
    the mean `center`. Clamping instead would shift the mean. The final clamp only removes rounding errors.
    """
    room = torch.where(deviation > 0, 1 - center, center)
    largest = room / torch.maximum(deviation.abs(), room).clamp(min=TINY)  # s <= 1 that each value allows
    s = largest.amin(dims, keepdim=True)
    return (center + s * deviation).clamp(0, 1)


def _with_block_means(x, means):
    """Return x (B, C, t, t) changed so that its blocks have the given means (B, C, r, r); values in [0, 1]."""
    side = x.shape[-1] // means.shape[-1]
    blocks = x.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # (B, C, r, side, r, side)
    deviation = blocks - blocks.mean((3, 5), keepdim=True)
    return _around(means[:, :, :, None, :, None], deviation, (3, 5)).flatten(4).flatten(2, 3)


def _parse(spec):
    """Return {kind: its number as text} of a specification."""
    parts = {}
    for part in spec.split("+"):
        kinds = [kind for kind, pattern in NUMBERS.items() if re.fullmatch(kind + pattern, part)]
        if not kinds:
            raise ValueError(f"--corrupt {spec!r}: {part!r} is not gray, detail<k>, down<k> or mask<f>, joined by +")
        (kind,) = kinds
        if kind in parts:
            raise ValueError(f"--corrupt {spec!r}: {kind} is given twice; give each kind at most once")
        parts[kind] = part.removeprefix(kind)
    return parts


class Corruption:
    """The corruption `spec` of size x size images: first gray; then without low frequencies, or smaller; then masked.

    spec is one of these, or several joined by + in any order:
    gray: luminance by ITU-R 601.
    detail<k>: removes the k x k lowest spatial frequencies (light and large areas). The remaining detail is
        halved and centered at 0.5. Cannot be combined with down or mask.
    down<k>: means over blocks of k x k pixels; k >= 2 divides size.
    mask<f>: hides round(f * cells) of the cells of an 8 x 8 grid over the (smaller) image, 0 < f < 1.

    Attributes: spec, with its parts in the order above; size; resolution, size / k, the side of the condition; channels
    of the condition: 1 (gray) or 3, and 1 more with a mask. Raises ValueError on any other spec.
    """

    def __init__(self, spec, size):
        parts = _parse(spec)
        factor = int(parts.get("down", 1))
        fraction = float(parts.get("mask", 0))
        self.size = size

        # Down.
        if "down" in parts and (factor < 2 or size % factor):
            raise ValueError(f"--corrupt {spec!r}: down{factor} needs a divisor of the image's side {size}, 2 or more")
        self.resolution = size // factor

        # Detail.
        self.taken = int(parts.get("detail", 0))  # frequencies per side
        if "detail" in parts and (not 0 < self.taken < size or {"down", "mask"} & parts.keys()):
            raise ValueError(f"--corrupt {spec!r}: detail{self.taken}: give 1 to {size - 1}, without down or mask")

        # Gray.
        self.gray = "gray" in parts
        self.colors = 1 if self.gray else 3

        # Mask.
        self.masks = "mask" in parts
        self.channels = self.colors + self.masks
        self.cells = min(GRID, self.resolution)
        self.hidden = round(fraction * self.cells**2)
        if self.masks and not (0 < fraction < 1 and 0 < self.hidden < self.cells**2):
            hides = f"hides {self.hidden} of {self.cells**2} cells"
            raise ValueError(f"--corrupt {spec!r}: mask{parts['mask']} {hides}; give a share that hides some, not all")

        numbers = {"gray": "", "detail": self.taken, "down": factor, "mask": fraction}
        self.spec = "+".join(f"{kind}{numbers[kind]}" for kind in NUMBERS if kind in parts)

    def __call__(self, images, keys=None):
        """Return the condition c(x), float32 (B, channels, resolution, resolution) in [0, 1].

        With detail<k>, single values can lie outside: what remains of x without its low frequencies can exceed ±1.

        images: (B, 3, size, size), uint8 or float in [0, 1].
        keys: int64 (B,), needed for masks only: an image's mask follows from its key alone, on every device and in any
        batch. The last channel of a masked condition is 1 where a pixel is known; where it is hidden, all channels are
        0. Raises ValueError on other shapes.
        """
        if images.shape[1:] != (3, self.size, self.size):
            raise ValueError(f"images have the shape {tuple(images.shape)}: expected (B, 3, {self.size}, {self.size})")
        x = _to_float(images)
        if self.gray:
            x = _luma(x)
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
        """Return (B, 1, resolution, resolution), 1 where a pixel is known.

        Cells differ in size if their number does not divide the resolution.
        """
        # Hide the cells with the lowest random numbers. The sort is stable: ties are broken in the same way everywhere.
        order = uniforms(keys, self.cells**2).argsort(dim=1, stable=True)
        rank = order.argsort(dim=1)
        known = (rank >= self.hidden).view(-1, 1, self.cells, self.cells)

        # From cells to pixels.
        cell = torch.arange(self.resolution, device=keys.device) * self.cells // self.resolution
        return known[:, :, cell][..., cell].float()

    def condition_at(self, condition, side):
        """Return the condition of the image reduced to another side: (B, channels, r, r), r = min(side, resolution).

        Below its resolution the condition is averaged over blocks; a pixel is known only if its whole block is. At its
        resolution and above, it is returned unchanged. Raises ValueError if neither of side and resolution is a
        multiple of the other.
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
        """Return the images changed so that their corruption is the condition, up to rounding (1e-6).

        images: float (B, 3, t, t) in [0, 1]. condition: as made by this corruption from images of `size`. Returns
        float32 (B, 3, t, t) in [0, 1]; differentiable. Hidden pixels stay as they are. Raises ValueError if neither of
        t and the resolution is a multiple of the other.

        t may be the side of any level of a pyramid over `size`, e.g. size / 4, size / 2, size. The corruption at side t
        is gray, then the means over blocks of t / resolution pixels per side; where t <= resolution it is gray only,
        and the condition is reduced to t first (`condition_at`).

        Block means (of the luminance, if gray) are replaced by the condition, and the deviations from them are scaled
        by one s <= 1 per block and channel. Then, if gray, the colors' deviations from the luminance are scaled by one
        s <= 1 per pixel. With detail<k> the images keep their lowest frequencies and take the others from the
        condition; values outside [0, 1] are then clamped, so the agreement is not exact there, nor at smaller sides.
        """
        x = images.float()
        side = x.shape[-1]
        condition = self.condition_at(condition.float(), side)

        # The luminance or the colors that agree with the condition.
        field = _luma(x) if self.gray else x
        if self.taken:
            result = (_coarse(field, self.taken) + 2 * condition - 1).clamp(0, 1)
        else:
            result = _with_block_means(field, condition[:, : self.colors])

        # The colors around that luminance.
        if self.gray:
            result = _around(result, x - field, (1,))

        if self.masks:
            known = _spread(condition[:, -1:], side) > 0
            result = torch.where(known, result, x)
        return result

    def upsample(self, condition):
        """Return the condition as a picture, float32 (B, 3, size, size) in [0, 1]: what restorations are compared with.

        Bicubic, clamped; gray in all three channels; hidden cells are 0.5.
        """
        x = condition[:, : self.colors].float()
        if self.masks:
            x = torch.where(condition[:, -1:] > 0, x, 0.5)  # so that they do not darken the known pixels next to them
        if x.shape[-1] != self.size:
            x = F.interpolate(x, size=(self.size, self.size), mode="bicubic")
        x = x.clamp(0, 1)
        if self.masks:
            x = torch.where(_spread(condition[:, -1:], self.size) > 0, x, 0.5)
        return x.expand(-1, 3, -1, -1).contiguous()


def pyramid(images, sides):
    """Return the images at each side s of sides: float32 (B, 3, s, s) in [0, 1], means over blocks of pixels.

    images: (B, 3, S, S), uint8 or float in [0, 1]. Every level is computed from the full images, not from another
    level. Raises ValueError if a side does not divide S.
    """
    full = images.shape[-1]
    for side in sides:
        if not 0 < side <= full or full % side:
            raise ValueError(f"side {side} of the pyramid does not divide the image's side {full}: use a divisor of it")
    x = _to_float(images)
    return [F.avg_pool2d(x, full // side) for side in sides]
