"""The embedded data set: ten outlines, whose colors tell nothing about them, generated from a seed in seconds.

The class is the outline. Colors and textures of object and ground, position, scale, tilt, contrast and noise are drawn
independently of it. So an encoder that matches two crops by their colors, which is easier, learns nothing about the
class. This is the shortcut that SimCLR (Chen et al. 2020, section 3.1) describes for color histograms.
"""

import math

import torch

CLASSES = ["disc", "square", "triangle", "star", "cross", "ring", "crescent", "bars", "heart", "L"]
SIZES = {"train": 8000, "val": 2000, "test": 2000}  # images per split, the same number of each class
TEXTURES = 4  # plain, stripes, checks, gradient


def _box(u, v, width, height):
    """Signed distance to an upright rectangle with these half-sides: negative inside."""
    return torch.maximum(u.abs() - width, v.abs() - height)


def _triangle(u, v):
    # equilateral, one corner up; its center is 0.5 from each side
    u = u.abs()
    v = v - 0.15
    return torch.maximum(v - 0.5, (math.sqrt(3) * u - v - 1.0) / 2)


def _star(u, v):
    # fold the plane into one of the ten halves of a point: its corner lies at (1.05, 0), its notch at angle wedge / 2
    wedge = 2 * math.pi / 5
    angle = torch.atan2(u, -v)
    folded = (torch.remainder(angle + wedge / 2, wedge) - wedge / 2).abs()
    radius = torch.hypot(u, v)
    x = radius * torch.cos(folded)
    y = radius * torch.sin(folded)

    # the signed distance to the line from the corner to the notch
    notch_x = 0.45 * math.cos(wedge / 2)
    notch_y = 0.45 * math.sin(wedge / 2)
    normal_x = notch_y
    normal_y = 1.05 - notch_x
    return ((x - 1.05) * normal_x + y * normal_y) / math.hypot(normal_x, normal_y)


def _heart(u, v):
    u = u.abs()
    v = v - 0.1
    lobes = torch.hypot(u - 0.4, v + 0.33) - 0.48
    tip = torch.maximum((u + v - 0.75) / math.sqrt(2), -0.33 - v)
    return torch.minimum(lobes, tip)


def outline(name, u, v):
    """Return the signed distance, negative inside, of points (u right, v down) to an outline of about unit radius."""
    radius = torch.hypot(u, v)
    if name == "disc":
        return radius - 0.85
    if name == "square":
        return _box(u, v, 0.75, 0.75)
    if name == "triangle":
        return _triangle(u, v)
    if name == "star":
        return _star(u, v)
    if name == "cross":
        return torch.minimum(_box(u, v, 0.95, 0.3), _box(u, v, 0.3, 0.95))
    if name == "ring":
        return (radius - 0.7).abs() - 0.22
    if name == "crescent":
        return torch.maximum(radius - 0.95, 0.75 - torch.hypot(u - 0.45, v))
    if name == "bars":
        return _box(u.abs() - 0.55, v, 0.25, 0.9)
    if name == "heart":
        return _heart(u, v)
    return torch.minimum(_box(u + 0.45, v, 0.27, 0.9), _box(u, v - 0.63, 0.72, 0.27))  # L


def _textured(x, y, generator):
    """Return (n, 3, H, W): two random colors each, mixed plain, in stripes, in checks or as a gradient."""
    n = len(x)

    def uniform(low, high):
        return torch.empty(n, 1, 1).uniform_(low, high, generator=generator)

    kind = torch.randint(TEXTURES, (n, 1, 1), generator=generator)
    angle = uniform(0, math.pi)
    frequency = uniform(1.5, 4)
    phase = uniform(0, 2 * math.pi)
    along = x * torch.cos(angle) + y * torch.sin(angle)
    across = y * torch.cos(angle) - x * torch.sin(angle)
    wave = torch.sin(math.pi * frequency * along + phase)
    stripes = (0.5 + 3 * wave).clamp(0, 1)
    checks = (0.5 + 3 * wave * torch.sin(math.pi * frequency * across + phase)).clamp(0, 1)
    gradient = (0.5 + 0.5 * along).clamp(0, 1)
    mix = torch.zeros_like(along)  # kind 0: plain
    for k, texture in enumerate((stripes, checks, gradient), start=1):
        mix = torch.where(kind == k, texture, mix)
    first, second = torch.rand(2, n, 3, 1, 1, generator=generator)
    return torch.lerp(first, 0.4 * first + 0.6 * second, mix[:, None])


def _set_contrast(ground, figure, generator):
    """Shift the figure's brightness until it differs from the ground's, so that gray images show the outline, too."""
    difference = (figure - ground).mean(dim=(1, 2, 3), keepdim=True)
    sign = torch.where(difference < 0, -1.0, 1.0)
    wanted = torch.empty_like(difference).uniform_(0.2, 0.5, generator=generator)
    shift = (wanted - difference.abs()).clamp(min=0) * sign / 2
    return (ground - shift).clamp(0, 1), (figure + shift).clamp(0, 1)


def draw(labels, size, generator, looks=None):
    """Return images uint8 (N, 3, size, size), one of the outline of each label, everything else random.

    generator: torch.Generator for position, scale and tilt; looks: another one for the rest; None: the same one.
    """
    n = len(labels)
    looks = looks or generator

    # points (N, size, size) in the coordinates of the image, -1 to 1, and of the object
    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    x = x.expand(n, -1, -1)
    y = y.expand(n, -1, -1)
    center_x, center_y = torch.empty(2, n, 1, 1).uniform_(-0.3, 0.3, generator=generator)
    scale = torch.empty(n, 1, 1).uniform_(0.4, 0.75, generator=generator)
    tilt = torch.empty(n, 1, 1).uniform_(-math.pi / 6, math.pi / 6, generator=generator)
    u = ((x - center_x) * torch.cos(tilt) + (y - center_y) * torch.sin(tilt)) / scale
    v = ((y - center_y) * torch.cos(tilt) - (x - center_x) * torch.sin(tilt)) / scale

    # the fraction of each pixel that the outline covers
    distance = torch.empty(n, size, size)
    for k, name in enumerate(CLASSES):
        distance[labels == k] = outline(name, u[labels == k], v[labels == k])
    inside = (0.5 - distance * scale * size / 2).clamp(0, 1)[:, None]

    # colors and textures, then noise
    ground, figure = _set_contrast(_textured(x, y, looks), _textured(x, y, looks), looks)
    image = torch.lerp(ground, figure, inside)
    noise = torch.empty(n, 1, 1, 1).uniform_(0, 0.08, generator=looks)
    image += noise * torch.randn(image.shape, generator=looks)
    return image.mul_(255).round_().clamp_(0, 255).byte()


def _labels(split, seed):
    """Return the labels int64 (N,) of a split, in parts of 500 to bound the memory, and the generator to draw with."""
    generator = torch.Generator().manual_seed(1000 * seed + list(SIZES).index(split))
    n = SIZES[split]
    labels = (torch.arange(n) % len(CLASSES))[torch.randperm(n, generator=generator)]
    return labels.split(500), generator


def make_split(split, size=32, seed=0):
    """Return (images uint8 (N, 3, size, size), labels int64 (N,)) of "train", "val" or "test"."""
    parts, generator = _labels(split, seed)
    images = [draw(part, size, generator) for part in parts]
    return torch.cat(images), torch.cat(parts)


def redraw_split(split, k, size=32, seed=0):
    """Return uint8 (N, k, 3, size, size): the outlines of make_split at their places; the rest is drawn again, k times.

    They are the positives that a perfect generator would make.
    """
    parts, generator = _labels(split, seed)
    looks = torch.Generator().manual_seed(1000 * seed + len(SIZES))
    redrawn = []
    for part in parts:
        places = [generator.clone_state() for _ in range(k)]
        draw(part, size, generator)  # moves the generator to the next part
        copies = [draw(part, size, place, looks) for place in places]
        redrawn.append(torch.stack(copies, dim=1))
    return torch.cat(redrawn)
