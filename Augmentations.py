"""Random views of image batches, on the device of the images; the parameters of every image are drawn separately.

Every operation takes a batch (B, 3, H, W) in [0, 1] and parameters (B,), and equals torchvision's function of the same
name applied to each image (`to_gray`: `rgb_to_grayscale`). `Augmentation` draws the parameters on the CPU with
torchvision's distributions, and sends all parameters of a call to a GPU in one copy, without waiting for it.

Bicubic interpolation, solarization and normalization have no flag: they are for callers from Python.
"""

import math
from dataclasses import KW_ONLY, dataclass

import torch

CONTRAST, SATURATION, HUE = 1, 2, 3  # torchvision's numbers for ColorJitter's operations; brightness is 0
JITTER = ("brightness", "contrast", "saturation", "hue")
INTERPOLATIONS = ("bilinear", "bicubic")
CHUNK_FLOATS = 2**19  # CPU: smaller chunks measured slower (more calls), larger ones too (memory is allocated again)


def _require(condition, name, value, allowed):
    if not condition:
        raise ValueError(f"{name} is {value!r}, but must be {allowed}")


def _check_images(images):
    _require(images.ndim == 4 and images.shape[1] == 3, "images.shape", tuple(images.shape), "(B, 3, H, W)")
    _require(images.dtype == torch.uint8 or images.is_floating_point(), "images.dtype", images.dtype, "uint8 or float")


def to_float(images):
    """Return uint8 images, or float images in [0, 1], as float32 in [0, 1]; float32 images are returned themselves."""
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


def _resize_weights(start, length, n_in, n_out, interpolation, flip=None):
    """Matrices (B, n_out, n_in) that resize `length` pixels of a line, from `start` on, to n_out pixels, antialiased.

    Where `flip` is true the output runs backwards. A pixel outside the box has an infinite distance, so weight 0.
    """
    start = start.view(-1, 1, 1)
    length = length.view(-1, 1, 1)
    scale = length / n_out
    stretch = scale.clamp(min=1)  # shrinking widens the kernel: every input pixel counts
    pixel = torch.arange(n_in, device=start.device) - start
    outside = (pixel < 0) | (pixel >= length)
    position = (pixel + 0.5).div_(stretch).masked_fill_(outside, torch.inf)
    target = torch.arange(n_out, device=start.device).view(1, -1, 1)
    if flip is not None:
        target = torch.where(flip.view(-1, 1, 1), n_out - 1 - target, target)
    weights = _interpolation_kernel((position - (target + 0.5) * (scale / stretch)).abs_(), interpolation)
    return weights.div_(weights.sum(-1, keepdim=True))


def _separable(x, rows, columns):
    """rows (B, h, H) @ x (B, 3, H, W) @ columns (B, w, W) transposed, for every channel: (B, 3, h, w) in [0, 1]."""
    x = torch.bmm(x.flatten(1, 2), columns.transpose(1, 2)).unflatten(1, (3, -1))
    return (rows.unsqueeze(1) @ x).clamp_(0, 1)


def resized_crop(images, top, left, height, width, size, flip=None, interpolation="bilinear"):
    """Return one box of each image, resized with antialiasing to float32 (B, 3, size, size) in [0, 1].

    images: uint8, or float in [0, 1]. top, left, height, width: int64 (B,), in pixels; the box lies inside the image.
    flip: bool (B,), whether to mirror; None: no image. The result is clamped, since bicubic interpolation overshoots.
    Resizing and mirroring are linear, so both are a product with dense matrices: fast for small images and on GPUs.
    """
    _check_images(images)
    _require(interpolation in INTERPOLATIONS, "interpolation", interpolation, f"one of {INTERPOLATIONS}")
    rows = _resize_weights(top, height, images.shape[2], size, interpolation)
    columns = _resize_weights(left, width, images.shape[3], size, interpolation, flip)
    return _separable(to_float(images), rows, columns)


def _luma(x):
    """Grayscale (B, 1, H, W) by ITU-R 601 with torchvision's digits."""
    red, green, blue = x.split(1, dim=1)
    return red.mul(0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def _adjust_tone_(x, factor, operation):
    """Adjust, in place, brightness, contrast or saturation of each image, as `operation` (B,) says.

    All three blend the image with a target: black, the mean of the grayscale image, the grayscale image. factor (B,):
    0 gives the target, 1 changes nothing.
    """
    gray = _luma(x)
    mean = gray.mean((-2, -1), keepdim=True).mul_(_per_image(operation == CONTRAST))
    target = gray.mul_(_per_image(operation == SATURATION)).add_(mean)
    return torch.lerp(target, x, _per_image(factor), out=x).clamp_(0, 1)


def adjust_hue(x, shift, out=None):
    """Turn the hue by `shift` (B,) in [-0.5, 0.5] of the color circle, at constant HSV saturation and value.

    On the hexagonal color circle, with red at 0, green at 1/3 and blue at 2/3, and chroma = max - min:
        hue     = sign(green - blue) * (1 + (green + blue - red - min) / chroma) / 6
        channel = max - chroma * clamp(6 * distance(hue + shift, channel's place) - 1, 0, 1)
    The distance is the shorter one around the circle. out: where to write the result; it may be x.
    """
    red, green, blue = x.split(1, dim=1)
    value = x.amax(1, keepdim=True)
    low = x.amin(1, keepdim=True)
    chroma = value - low
    distance = (green + blue).sub_(red).sub_(low).div_(chroma.clamp(min=1e-12)).add_(1)
    hue = distance.copysign_(green - blue).div_(6).add_(_per_image(shift))
    turn = hue - torch.arange(3, device=x.device).div(3).view(3, 1, 1)
    turn.sub_(turn.round()).abs_().mul_(6).sub_(1).clamp_(0, 1)
    return torch.sub(value, turn.mul_(chroma), out=out)


def to_gray(x):
    """Grayscale in all three channels."""
    return _luma(x).expand_as(x).contiguous()


def _blur_weights(n, kernel_size, sigma):
    """Band matrices (B, n, n) of a Gaussian of standard deviation sigma (B,), the line reflected at both ends."""
    radius = kernel_size // 2
    _require(kernel_size % 2 == 1 and 0 <= radius < n, "kernel_size", kernel_size, f"odd and in [1, {2 * n - 1}]")
    tap = torch.arange(-radius, radius + 1, device=sigma.device)
    place = torch.arange(n, device=sigma.device)
    bell = torch.softmax(-0.5 * (tap / sigma.view(-1, 1)) ** 2, dim=1)
    source = n - 1 - (n - 1 - (place + tap.view(-1, 1)).abs()).abs()
    return (bell @ (source.unsqueeze(2) == place).flatten(1).float()).unflatten(1, (n, n))


def gaussian_blur(x, kernel_size, sigma):
    """Gaussian blur with an odd kernel size, sigma (B,) > 0 in pixels, and reflected borders."""
    rows = _blur_weights(x.shape[2], kernel_size, sigma)
    columns = _blur_weights(x.shape[3], kernel_size, sigma)
    return _separable(x, rows, columns)


def solarize(x, threshold):
    """Inverts what is at least `threshold`."""
    return torch.where(x >= threshold, 1 - x, x)


def _change_rows_(x, rows, operation):
    """Replace, in place, the images x[rows] by operation(x[rows]); rows: int64 (b,) on the device of x."""
    if len(rows):
        x.index_copy_(0, rows, operation(x.index_select(0, rows)))


def send(tensors, device):
    """Return {name: CPU tensor} on the device, by a single copy; on CUDA from pinned memory, so without waiting."""
    if device.type == "cpu":
        return tensors
    # All bytes in one tensor, those of the widest types first: each tensor is then aligned.
    names = sorted(tensors, key=lambda name: -tensors[name].element_size())
    packed = torch.cat([tensors[name].flatten().contiguous().view(torch.uint8) for name in names])
    if device.type == "cuda":
        packed = packed.pin_memory()
    parts = packed.to(device, non_blocking=True).split([tensors[name].nbytes for name in names])
    return {name: part.view(tensors[name].dtype).view(tensors[name].shape) for name, part in zip(names, parts)}


@dataclass
class Augmentation:
    """SimCLR's random views of a whole batch (Chen et al. 2020); parameters are drawn for each image.

    Crop and resize to `size`, mirror, jitter (brightness, contrast, saturation, hue in an order drawn for each image),
    gray, blur, solarize, each with its probability; normalize. `crop_scale` None resizes the whole image; `jitter` None
    leaves the colors; `blur_kernel` None is a tenth of `size`, odd, at least 3; `mean` None does not normalize.

    size: in pixels. crop_scale: smallest and largest share of the area, in (0, 1]. crop_ratio: width / height, > 0.
    jitter: strengths of brightness, contrast and saturation (>= 0) and of hue (0 to 0.5). blur_kernel: odd, in pixels.
    blur_sigma: lowest and highest, in pixels, > 0. Names that end in _p: probabilities.
    Raises ValueError on other values.
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
        scale = self.crop_scale
        jitter = self.jitter or (0, 0, 0, 0)
        kernel = self.blur_kernel
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

    def __str__(self):
        """Return what is done to the images, in words."""
        parts = []
        if self.crop_scale:
            parts.append(f"crop from {self.crop_scale[0]:g} of the area")
        if self.flip_p:
            parts.append("flip")
        if self.jitter_p and self.jitter:
            parts.append(f"color jitter {', '.join(f'{amount:g}' for amount in self.jitter)}")
        for name, p in (("gray", self.gray_p), ("blur", self.blur_p), ("solarize", self.solarize_p)):
            if p:
                parts.append(f"{name} with probability {p:g}")
        return ", ".join(parts) or "the images as they are"

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
        low, high = self.crop_scale or (1, 1)
        thin, wide = self.crop_ratio
        area = uniform(low, high, 10) * (height * width)
        ratio = uniform(math.log(thin), math.log(wide), 10).exp_()
        h = (area / ratio).sqrt_().round_()
        w = (area * ratio).sqrt_().round_()
        fits = (h > 0) & (h <= height) & (w > 0) & (w <= width)
        first = fits & (fits.cumsum(1) == 1)
        found = fits.any(1)
        h = torch.where(found, (h * first).sum(1), min(height, round(width / thin)))
        w = torch.where(found, (w * first).sum(1), min(width, round(height * wide)))
        top = torch.where(found, uniform(0, 1) * (height - h + 1), (height - h) / 2)
        left = torch.where(found, uniform(0, 1) * (width - w + 1), (width - w) / 2)
        if self.crop_scale is None:
            top.zero_()
            left.zero_()
            h.fill_(height)
            w.fill_(width)
        return {"top": top.long(), "left": left.long(), "height": h.long(), "width": w.long()}

    def apply(self, images, params):
        """Return views of images (B, 3, H, W), uint8 or float in [0, 1], with the parameters that `draw` returned.

        The views are float32 (B, 3, size, size), in [0, 1] unless normalized. Raises ValueError on other shapes.
        """
        _check_images(images)
        n = len(images)
        lengths = {name: len(values) for name, values in params.items()}
        _require(set(lengths.values()) == {n}, "params' length", lengths, f"the number of images, {n}")
        views = torch.empty(n, 3, self.size, self.size, device=images.device)
        parts = round(views.numel() / CHUNK_FLOATS) if images.device.type == "cpu" else 1
        chunk = math.ceil(n / max(1, parts)) or 1  # of equal size, since each chunk costs the same calls
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            for start in range(0, n, chunk):
                rows = slice(start, start + chunk)
                self._write_views(views[rows], images[rows], {name: values[rows] for name, values in params.items()})
        return views

    def apply_all(self, batches, params):
        """Return views (M B, 3, size, size) of M batches, one after the other: what `apply` returns, in one call.

        batches: M of images (B, 3, H, W); params: M of what `draw` returned. On a GPU this starts
        M times fewer operations.
        """
        joined = {name: torch.cat([each[name] for each in params]) for name in params[0]}
        return self.apply(torch.cat(batches), joined)

    def _write_views(self, views, images, params):
        """Write the views of images into `views`. The CPU takes all decisions, so that nothing waits for a GPU."""
        # Sort the images by the round of the jitter that turns their hue (4: no jitter): each round is one operation.
        hue_round = torch.where(params["jitter"], (params["order"] == HUE).int().argmax(1), 4)
        order = hue_round.argsort(stable=True)
        ends = hue_round.bincount(minlength=5).cumsum(0).tolist()
        host = {name: values[order] for name, values in params.items()}

        # Collect what the device needs.
        table = {name: host[name] for name in ("top", "left", "height", "width", "flip")}
        for name in ("flip", "gray", "blur", "solarize"):
            table[f"{name}_rows"] = host[name].nonzero().flatten()
        table["order"] = order
        table["sigma"] = host["sigma"][table["blur_rows"]]
        table["operation"] = host["order"].T  # (4, B), by round
        table["factor"] = torch.stack([host[name] for name in JITTER]).gather(0, table["operation"])
        if self.mean is not None:
            table["mean"] = torch.tensor(self.mean).view(3, 1, 1)
            table["std"] = torch.tensor(self.std).view(3, 1, 1)
        table = send(table, images.device)

        # Work on the sorted images in place, and write them back in their own order.
        x = self._crop(images.index_select(0, table["order"]), table)
        self._jitter_(x, table, ends, turns_hue=bool(params["hue"].any()))
        _change_rows_(x, table["gray_rows"], to_gray)
        _change_rows_(x, table["blur_rows"], lambda x: gaussian_blur(x, self.blur_kernel, table["sigma"]))
        _change_rows_(x, table["solarize_rows"], lambda x: solarize(x, self.solarize_threshold))
        if self.mean is not None:
            x.sub_(table["mean"]).div_(table["std"])
        views.index_copy_(0, table["order"], x)

    def _crop(self, images, table):
        """Return the boxes of images, resized and mirrored; whole images of the right size are only mirrored."""
        if self.crop_scale is None and images.shape[2:] == (self.size, self.size):
            x = to_float(images)
            _change_rows_(x, table["flip_rows"], lambda x: x.flip(3))
            return x
        box = [table[name] for name in ("top", "left", "height", "width")]
        return resized_crop(images, *box, self.size, table["flip"], self.interpolation)

    def _jitter_(self, x, table, ends, turns_hue):
        """Jitter the images before ends[3] in place. Round r turns the hue of those from ends[r - 1] to ends[r].

        The images before and after these have their tone adjusted in that round.
        """
        start = 0
        for factor, operation, end in zip(table["factor"], table["operation"], ends):
            for rows in (slice(0, start), slice(end, ends[3])):
                if rows.start < rows.stop:
                    _adjust_tone_(x[rows], factor[rows], operation[rows])
            if start < end and turns_hue:
                adjust_hue(x[start:end], factor[start:end], out=x[start:end])
            start = end

    def __call__(self, images, generator):
        """Return new random views of images (B, 3, H, W): `apply` with parameters drawn from the generator."""
        _check_images(images)
        return self.apply(images, self.draw(len(images), *images.shape[2:], generator))
