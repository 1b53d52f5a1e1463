"""Random views of image batches, on the images' own device, with parameters of its own for every image.

Every operation takes a batch (B, 3, H, W) in [0, 1] and parameters (B,), and equals torchvision's function of the same
name applied image by image (`to_gray`: `rgb_to_grayscale`); none changes its input. `Augmentation` draws the parameters
on the host with torchvision's distributions and applies them without waiting for the device.
"""

import math
from dataclasses import KW_ONLY, dataclass

import torch

CONTRAST, SATURATION, HUE = 1, 2, 3  # torchvision's numbers for ColorJitter's operations; brightness is 0
JITTER = ("brightness", "contrast", "saturation", "hue")
INTERPOLATIONS = ("bilinear", "bicubic")
CHUNK_FLOATS = 2**20  # on the CPU: smaller chunks measured slower (more calls), much larger ones leave the cache


def _require(condition, name, value, allowed):
    if not condition:
        raise ValueError(f"{name} is {value!r}, but must be {allowed}")


def _check_images(images):
    _require(images.ndim == 4 and images.shape[1] == 3, "images.shape", tuple(images.shape), "(B, 3, H, W)")
    _require(images.dtype == torch.uint8 or images.is_floating_point(), "images.dtype", images.dtype, "uint8 or float")


def to_float(images):
    """float32 in [0, 1] from uint8 or from float in [0, 1]; float32 comes back as it is."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images.float()


def _per_image(values):
    """(B,) -> (B, 1, 1, 1), to broadcast over a batch."""
    return values.view(-1, 1, 1, 1)


def _interpolation_kernel(distance, interpolation):
    """Weight at a distance >= 0 in (stretched) pixels: a triangle, or Keys' cubic with a = -0.5, as in Pillow."""
    if interpolation == "bilinear":
        return 1 - distance.clamp_(max=1)
    d = distance.clamp_(max=2)
    return torch.where(d < 1, (1.5 * d - 2.5) * d * d + 1, ((2.5 - 0.5 * d) * d - 4) * d + 2)


def _resize_weights(start, length, n_in, n_out, flip, interpolation):
    """Matrices (B, n_out, n_in) that resize `length` pixels of a line, from `start` on, to n_out pixels, antialiased.

    Where `flip` is true the output runs backwards. A pixel outside the box has an infinite distance, so weight 0.
    """
    start, length, flip = (values.view(-1, 1, 1) for values in (start, length, flip))
    scale = length / n_out
    stretch = scale.clamp(min=1)  # shrinking widens the kernel: every input pixel counts
    pixel = torch.arange(n_in, device=start.device) - start
    position = (pixel + 0.5).div_(stretch).masked_fill_((pixel < 0) | (pixel >= length), torch.inf)
    target = torch.arange(n_out, device=start.device).view(1, -1, 1)
    target = torch.where(flip, n_out - 1 - target, target)
    weights = _interpolation_kernel((position - (target + 0.5) * (scale / stretch)).abs_(), interpolation)
    return weights.div_(weights.sum(-1, keepdim=True))


def _separable(x, rows, columns):
    """rows (B, h, H) @ x (B, 3, H, W) @ columns (B, w, W) transposed, for every channel: (B, 3, h, w) in [0, 1]."""
    x = torch.bmm(x.flatten(1, 2), columns.transpose(1, 2)).unflatten(1, (3, -1))
    return (rows.unsqueeze(1) @ x).clamp_(0, 1)


def resized_crop(images, top, left, height, width, size, flip=None, interpolation="bilinear"):
    """A box of every image, resized with antialiasing to float32 (B, 3, size, size) and mirrored where `flip` is true.

    images: uint8, or float in [0, 1]; box and flip: (B,), the box inside the image. Clamped to [0, 1], since bicubic
    overshoots. All of it is linear, hence a product with dense matrices: fast for small images and on GPUs.
    """
    _check_images(images)
    _require(interpolation in INTERPOLATIONS, "interpolation", interpolation, f"one of {INTERPOLATIONS}")
    upright = torch.zeros_like(top, dtype=torch.bool)
    rows = _resize_weights(top, height, images.shape[2], size, upright, interpolation)
    columns = _resize_weights(left, width, images.shape[3], size, upright if flip is None else flip, interpolation)
    return _separable(to_float(images), rows, columns)


def resize(images, size, interpolation="bilinear"):
    """Whole images, uint8 or float in [0, 1], resized with antialiasing to float32 (B, 3, size, size) in [0, 1]."""
    _check_images(images)
    zero = torch.zeros(len(images), dtype=torch.long, device=images.device)
    box = (zero, zero, zero + images.shape[2], zero + images.shape[3])
    return resized_crop(images, *box, size, interpolation=interpolation)


def _luma(x):
    """Greyscale (B, 1, H, W) by ITU-R 601 with torchvision's digits."""
    red, green, blue = x.split(1, dim=1)
    return red.mul(0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def _blend(x, target, factor):
    return torch.lerp(target, x, _per_image(factor)).clamp_(0, 1)


def adjust_brightness(x, factor):
    """Blends with black; factor (B,) >= 0, 1 changes nothing."""
    return _blend(x, x.new_zeros(()), factor)


def adjust_contrast(x, factor):
    """Blends with the mean of the greyscale image; factor (B,) >= 0, 1 changes nothing."""
    return _blend(x, _luma(x).mean((-2, -1), keepdim=True), factor)


def adjust_saturation(x, factor):
    """Blends with the greyscale image; factor (B,) >= 0, 1 changes nothing."""
    return _blend(x, _luma(x), factor)


def _adjust_tone(x, factor, operation):
    """Brightness, contrast or saturation, as `operation` (B,) says: all are blends, so one pass serves a mix."""
    gray = _luma(x)
    mean = gray.mean((-2, -1), keepdim=True).mul_(_per_image(operation == CONTRAST))
    return _blend(x, gray.mul_(_per_image(operation == SATURATION)).add_(mean), factor)


def adjust_hue(x, shift):
    """Turns the hue by `shift` (B,) in [-0.5, 0.5] of the colour circle at constant HSV saturation and value.

    On the hexagonal colour circle, in sixths, red's distance from a hue is 1 + (g + b - r - min) / chroma, on the side
    that the sign of g - b tells; each channel is the value less chroma * clamp(its distance - 1, 0, 1).
    """
    red, green, blue = x.split(1, dim=1)
    value, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    chroma = value - low
    distance = (green + blue).sub_(red).sub_(low).div_(chroma.clamp(min=1e-12)).add_(1)
    hue = distance.copysign_(green - blue).div_(6).add_(_per_image(shift))
    turn = hue - torch.arange(3, device=x.device).div(3).view(3, 1, 1)
    turn.sub_(turn.round()).abs_().mul_(6).sub_(1).clamp_(0, 1)
    return value - turn.mul_(chroma)


def to_gray(x):
    """Greyscale in all three channels."""
    return _luma(x).expand_as(x).contiguous()


def _blur_weights(n, kernel_size, sigma):
    """Band matrices (B, n, n) of a Gaussian of standard deviation sigma (B,), the line reflected at both ends."""
    radius = kernel_size // 2
    _require(kernel_size % 2 == 1 and 0 <= radius < n, "kernel_size", kernel_size, f"odd and in [1, {2 * n - 1}]")
    tap, place = torch.arange(-radius, radius + 1, device=sigma.device), torch.arange(n, device=sigma.device)
    bell = torch.softmax(-0.5 * (tap / sigma.view(-1, 1)) ** 2, dim=1)
    source = n - 1 - (n - 1 - (place + tap.view(-1, 1)).abs()).abs()
    return (bell @ (source.unsqueeze(2) == place).flatten(1).float()).unflatten(1, (n, n))


def gaussian_blur(x, kernel_size, sigma):
    """Gaussian blur with an odd kernel size, sigma (B,) > 0 and reflected borders."""
    return _separable(x, *(_blur_weights(n, kernel_size, sigma) for n in x.shape[2:]))


def solarize(x, threshold):
    """Inverts what is at least `threshold`."""
    return torch.where(x >= threshold, 1 - x, x)


def _on_rows(x, chosen, operation, *values):
    """x, changed in place to operation(x, *values) in the images where `chosen` (B,), a mask on the host, is true."""
    rows = chosen.nonzero().flatten().to(x.device, non_blocking=True)
    if not len(rows):
        return x
    return x.index_copy_(0, rows, operation(*(each.index_select(0, rows) for each in (x, *values))))


@dataclass
class Augmentation:
    """SimCLR's random views of a whole batch (Chen et al. 2020); every image gets parameters of its own.

    Crop and resize to `size`, mirror, jitter (brightness, contrast, saturation, hue in an order of the image's own),
    grey, blur, solarise, each with its probability; normalise. `crop_scale` None resizes the whole image; `jitter` None
    leaves the colours; `blur_kernel` None is a tenth of `size`, odd, at least 3; `mean` None does not normalise.
    """

    size: int
    _: KW_ONLY
    crop_scale: tuple | None = (0.2, 1.0)
    crop_ratio: tuple = (3 / 4, 4 / 3)
    flip_p: float = 0.5
    jitter: tuple | None = (0.4, 0.4, 0.4, 0.1)
    jitter_p: float = 0.8
    gray_p: float = 0.2
    blur_p: float = 0.0
    blur_kernel: int | None = None
    blur_sigma: tuple = (0.1, 2.0)
    solarize_p: float = 0.0
    solarize_threshold: float = 0.5
    interpolation: str = "bilinear"
    mean: tuple | None = None
    std: tuple | None = None

    def __post_init__(self):
        _require(isinstance(self.size, int) and self.size > 0, "size", self.size, "a positive integer")
        if self.blur_kernel is None:
            self.blur_kernel = max(3, self.size // 20 * 2 + 1)
        scale, jitter, kernel = self.crop_scale, self.jitter or (0, 0, 0, 0), self.blur_kernel
        blurs = not self.blur_p or (kernel % 2 == 1 and 0 < kernel < 2 * self.size)
        rules = {
            "crop_scale": (scale is None or 0 < scale[0] <= scale[1] <= 1, "None or 0 < low <= high <= 1"),
            "jitter": (len(jitter) == 4 and min(jitter) >= 0 and jitter[HUE] <= 0.5, f"{JITTER} >= 0, hue <= 0.5"),
            "blur_kernel": (blurs, f"odd and in [1, {2 * self.size - 1}]"),
            "interpolation": (self.interpolation in INTERPOLATIONS, f"one of {INTERPOLATIONS}"),
            "std": ((self.mean is None) == (self.std is None), "given if and only if mean is"),
        }
        for name, value in vars(self).items():
            if name.endswith(("_p", "_threshold")):
                rules[name] = (0 <= value <= 1, "in [0, 1]")
            elif name.endswith(("_ratio", "_sigma")):
                rules[name] = (0 < value[0] <= value[1], "0 < low <= high")
        for name, (valid, allowed) in rules.items():
            _require(valid, name, getattr(self, name), allowed)

    def draw(self, n, height, width, generator):
        """Parameters of n views of height x width images: CPU tensors of first dimension n, of which rows may be taken.

        Boxes top, left, height, width; masks flip, jitter, gray, blur, solarize; the jitter's brightness, contrast,
        saturation (factors), hue (a shift) and order (n, 4): 0 to 3 as they follow each other; the blur's sigma.
        """
        _require(generator.device.type == "cpu", "generator.device", generator.device, "the CPU, for any images")

        def uniform(low, high, *shape):
            return torch.rand(n, *shape, generator=generator, dtype=torch.float64).mul_(high - low).add_(low)

        params = self._draw_boxes(uniform, height, width)
        for name in ("flip", "jitter", "gray", "blur", "solarize"):
            params[name] = uniform(0, 1) < getattr(self, f"{name}_p")
        params["jitter"] &= self.jitter is not None
        for name, amount in zip(JITTER, self.jitter or (0, 0, 0, 0)):
            low, high = (-amount, amount) if name == "hue" else (max(0, 1 - amount), 1 + amount)
            params[name] = uniform(low, high).float()
        return params | {"order": uniform(0, 1, 4).argsort(1), "sigma": uniform(*self.blur_sigma).float()}

    def _draw_boxes(self, uniform, height, width):
        """Boxes (n,) as torchvision's RandomResizedCrop draws them: the first of 10 tries that fits, else central."""
        (low, high), (thin, wide) = self.crop_scale or (1, 1), self.crop_ratio
        area = uniform(low, high, 10) * (height * width)
        ratio = uniform(math.log(thin), math.log(wide), 10).exp_()
        h, w = (area / ratio).sqrt_().round_(), (area * ratio).sqrt_().round_()
        fits = (h > 0) & (h <= height) & (w > 0) & (w <= width)
        first, found = fits & (fits.cumsum(1) == 1), fits.any(1)
        h = torch.where(found, (h * first).sum(1), min(height, round(width / thin)))
        w = torch.where(found, (w * first).sum(1), min(width, round(height * wide)))
        top = torch.where(found, uniform(0, 1) * (height - h + 1), (height - h) / 2)
        left = torch.where(found, uniform(0, 1) * (width - w + 1), (width - w) / 2)
        if self.crop_scale is None:
            top, left, h, w = (torch.full_like(h, value) for value in (0, 0, height, width))
        return {"top": top.long(), "left": left.long(), "height": h.long(), "width": w.long()}

    def apply(self, images, params):
        """Views, float32 (B, 3, size, size) in [0, 1] unless normalised, of images (B, 3, H, W), uint8 or in [0, 1].

        Images whose hue turns in the same round of the jitter go together, so that every round is one operation. All
        that decides this is known on the host, so a GPU never has to be waited for.
        """
        _check_images(images)
        n, device = len(images), images.device
        lengths = {key: len(values) for key, values in params.items()}
        _require(set(lengths.values()) == {n}, "params' length", lengths, f"the number of images, {n}")
        hue_round = torch.where(params["jitter"], (params["order"] == HUE).int().argmax(1), 4)
        order = hue_round.argsort(stable=True)
        host = {key: values[order] for key, values in params.items()}
        host["factor"] = torch.stack([host[name] for name in JITTER], 1).gather(1, host["order"])
        local = {key: values.to(device, non_blocking=True) for key, values in host.items()}
        views = torch.empty(n, 3, self.size, self.size, device=device)
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            images = images.index_select(0, order.to(device, non_blocking=True))
            for turn, rows in self._chunks(hue_round.bincount(minlength=5).tolist(), device):
                parts = ({key: values[rows] for key, values in each.items()} for each in (host, local))
                views[rows] = self._view(images[rows], *parts, turn)
            return views.index_select(0, order.argsort().to(device, non_blocking=True))

    def _chunks(self, counts, device):
        """Pairs (group, slice) that cut a batch sorted into groups of `counts` images; on a GPU each group is whole."""
        step = max(1, CHUNK_FLOATS // (3 * self.size**2)) if device.type == "cpu" else max(1, *counts)
        end = 0
        for group, count in enumerate(counts):
            start, end = end, end + count
            yield from ((group, slice(i, min(i + step, end))) for i in range(start, end, step))

    def _view(self, images, host, local, hue_round):
        """Views of images that turn their hue in one round (4: no jitter); host, local: parameters there and here."""
        if self.crop_scale is None and images.shape[2:] == (self.size, self.size):
            x = _on_rows(to_float(images), host["flip"], lambda x: x.flip(3))
        else:
            box = (local[key] for key in ("top", "left", "height", "width"))
            x = resized_crop(images, *box, self.size, local["flip"], self.interpolation)
        for turn in range(4 if hue_round < 4 else 0):
            factor, operation = local["factor"][:, turn], local["order"][:, turn]
            if turn != hue_round:
                x = _adjust_tone(x, factor, operation)
            elif host["hue"].any():
                x = adjust_hue(x, factor)
        x = _on_rows(x, host["gray"], to_gray)
        x = _on_rows(x, host["blur"], lambda x, sigma: gaussian_blur(x, self.blur_kernel, sigma), local["sigma"])
        x = _on_rows(x, host["solarize"], lambda x: solarize(x, self.solarize_threshold))
        if self.mean is not None:
            mean, std = (torch.tensor(v).view(3, 1, 1).to(x.device, non_blocking=True) for v in (self.mean, self.std))
            x = x.sub_(mean).div_(std)
        return x

    def __call__(self, images, generator):
        """New random views of images (B, 3, H, W): `apply` with freshly drawn parameters."""
        _check_images(images)
        return self.apply(images, self.draw(len(images), *images.shape[2:], generator))
