"""CAM-Net: a cascade that restores corrupted images, each code in another way (Peng et al. 2021, arXiv:2106.09015)."""

from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from CamNet.Codes import make_keys, normals
from CamNet.Corruptions import Corruption

SLOPE = 0.2  # of LeakyReLU, everywhere
RESIDUAL = 0.2  # what a residual branch is multiplied by
SMALLEST = 4  # pixels a side: instance norm is noise on less


@dataclass(frozen=True)
class Architecture:
    """What a generator is made of. channels, growth: of each level, coarse to fine; the last is repeated."""

    channels: tuple
    growth: tuple
    blocks: int  # residual-in-residual dense blocks in a level
    levels: int  # at most: fewer where the image is too small to be halved that often
    z_dim: int
    w_dim: int
    map_depth: int  # layers from z to w
    noise: int = 5  # channels
    feature_scale: float = 0.1  # of the features that a level hands to the next
    mapping: str = "cumulative"  # w sees the styles of the coarser levels too (CHIMLE); or "per_level"
    level_input: str = (
        "both"  # finer levels see c(x) and the output before, or that "output" alone, as published for super-resolution
    )
    init: str = "he"  # of the style path; "ref": the published one, dead at step 0

    def of_level(self, values, level):
        """Return the value of a level, from 0."""
        return values[min(level, len(values) - 1)]


NETS = {
    "tiny": Architecture((32, 16), (16, 8), blocks=1, levels=2, z_dim=64, w_dim=128, map_depth=4),
    "small": Architecture((96, 64, 48), (64, 48, 32), blocks=4, levels=3, z_dim=128, w_dim=256, map_depth=4),
    "paper": Architecture(
        *((128, 64, 64, 64), (256, 192, 128, 64)),
        **{"blocks": 6, "levels": 4, "z_dim": 128, "w_dim": 512, "map_depth": 8},
        **{"mapping": "per_level", "level_input": "output"},
    ),
}


class State(NamedTuple):
    """What a level hands to the next. out (B, 3, r, r) in [-1, 1], features (B, C, r, r), styles [(B, w_dim)]."""

    out: torch.Tensor | None = None
    features: torch.Tensor | None = None
    styles: tuple = ()

    def repeat(self, m):
        """Return the state of every image m times, one after the other."""
        if self.out is None:
            return self
        styles = tuple(w.repeat_interleave(m, 0) for w in self.styles)
        return State(self.out.repeat_interleave(m, 0), self.features.repeat_interleave(m, 0), styles)


def _conv(inputs, outputs):
    """Return a 3x3 convolution with weight norm (Salimans and Kingma 2016, arXiv:1602.07868) and a bias of 0."""
    conv = nn.Conv2d(inputs, outputs, 3, padding=1)
    nn.init.zeros_(conv.bias)
    return weight_norm(conv)


class DenseBlock(nn.Module):
    """Five convolutions, each of which sees all before it: (B, nf, r, r) -> the same shape."""

    def __init__(self, nf, growth):
        super().__init__()
        outputs = [growth] * 4 + [nf]
        self.convs = nn.ModuleList(_conv(nf + j * growth, width) for j, width in enumerate(outputs))

    def forward(self, x):
        seen = x
        for conv in self.convs[:-1]:
            seen = torch.cat([seen, F.leaky_relu(conv(seen), SLOPE, inplace=True)], dim=1)
        return torch.add(x, self.convs[-1](seen), alpha=RESIDUAL)


class StyledBlock(nn.Module):
    """A residual-in-residual dense block, then AdaIN (Huang and Belongie 2017, arXiv:1703.06868) by the style w."""

    def __init__(self, nf, growth, w_dim):
        super().__init__()
        self.dense = nn.Sequential(*(DenseBlock(nf, growth) for _ in range(3)))
        self.affine = nn.Linear(w_dim, 2 * nf)

    def forward(self, x, w):
        x = torch.add(x, self.dense(x), alpha=RESIDUAL)
        gain, shift = self.affine(w)[:, :, None, None].chunk(2, dim=1)
        return torch.addcmul(shift.to(x.dtype), F.group_norm(x, x.shape[1]), (1 + gain).to(x.dtype))


class Mapping(nn.Module):
    """From the code z (B, z_dim) of a level, and the styles of `before` coarser ones, to its style w (B, w_dim)."""

    def __init__(self, arch, before):
        super().__init__()
        self.normalise = arch.init == "he"
        self.first = nn.Linear(arch.z_dim, arch.w_dim)
        widths = [arch.w_dim * (1 + before)] + [arch.w_dim] * (arch.map_depth - 2)
        self.rest = nn.ModuleList(nn.Linear(width, arch.w_dim) for width in widths)

    def forward(self, z, styles):
        if self.normalise:
            z = F.normalize(z, dim=1) * z.shape[1] ** 0.5
        w = torch.cat([F.leaky_relu(self.first(z), SLOPE), *styles], dim=1)
        for layer in self.rest:
            w = F.leaky_relu(layer(w), SLOPE)
        return w


class Level(nn.Module):
    """One level of the cascade: works at r pixels a side, puts out 2r."""

    def __init__(self, arch, level, inputs, head_inputs, before):
        super().__init__()
        nf, growth = arch.of_level(arch.channels, level), arch.of_level(arch.growth, level)
        self.mapping = Mapping(arch, before)
        self.first = _conv(inputs, nf)
        self.blocks = nn.ModuleList(StyledBlock(nf, growth, arch.w_dim) for _ in range(arch.blocks))
        self.last = _conv(nf, nf)
        self.head = nn.ModuleList([_conv(nf + head_inputs, nf), _conv(nf, nf)])
        self.to_rgb = _conv(nf, 3)

    def forward(self, inputs, head_inputs, w):
        """Return (image in [-1, 1] (B, 3, 2r, 2r), features (B, nf, 2r, 2r))."""
        first = self.first(inputs)
        x = first
        for block in self.blocks:
            x = block(x, w)
        x = F.interpolate(first + self.last(x), scale_factor=2, mode="nearest")
        for conv, extra in zip(self.head, (head_inputs, [])):
            x = F.leaky_relu(conv(torch.cat([x, *extra], dim=1) if extra else x), SLOPE, inplace=True)
        return torch.tanh(self.to_rgb(x).float()), x


class Generator(nn.Module):
    """g(c(x), codes): one plausible image for each code. A code of a level: (z (B, z_dim), noise (B, c, r, r)).

    net: a key of NETS; size: side of the images; corrupt: the corruption's spec, see `Corruption`; project: make the
    corruption of every output equal c(x); changes: other values for fields of `Architecture`.
    ValueError where the size cannot be halved, or the corruption does not fit it.
    """

    def __init__(self, net="tiny", size=32, corrupt="gray+down2", project=True, **changes):
        super().__init__()
        if net not in NETS:
            raise ValueError(f"--net {net}: choose from {', '.join(NETS)}")
        arch = self.arch = Architecture(**{**asdict(NETS[net]), **changes})
        self.corruption = Corruption(corrupt, size)
        self.config = {"net": net, "size": size, "corrupt": self.corruption.spec, "project": project, **changes}
        self.project = project
        levels = arch.levels
        while levels and (size % 2**levels or size >> levels < SMALLEST):
            levels -= 1
        if not levels:
            raise ValueError(f"--size {size}: the generator halves it: choose an even number, {2 * SMALLEST} or more")
        self.sides = [size >> level for level in range(levels - 1, -1, -1)]  # of the outputs; a level works at half
        self._check_sides()
        condition, self.levels = self.corruption.channels, nn.ModuleList()
        for level, side in enumerate(self.sides):
            inputs = arch.noise + (condition if level == 0 or arch.level_input == "both" else 0)
            inputs += 3 + self.levels[-1].last.out_channels if level else 0
            head_inputs = condition * self._head_sees(side)
            before = level if arch.mapping == "cumulative" else 0
            self.levels.append(Level(arch, level, inputs, head_inputs, before))
        self._initialise()

    def _check_sides(self):
        resolution = self.corruption.resolution
        for side in (self.sides[0] // 2, *self.sides):
            if side % resolution and resolution % side:
                spec, size = self.corruption.spec, self.corruption.size
                raise ValueError(f"--corrupt {spec}: {resolution} px do not fit a level of {side} px in --size {size}")

    def _head_sees(self, side):
        """Return whether c(x) shows more than what a level of half this side works at."""
        return self.corruption.resolution >= side

    def _initialise(self):
        for level in self.levels:
            for layer in [level.mapping.first, *level.mapping.rest, *(block.affine for block in level.blocks)]:
                nn.init.kaiming_normal_(layer.weight, a=SLOPE)
                nn.init.zeros_(layer.bias)
                if self.arch.init == "ref":
                    layer.weight.data.mul_(0.1)
            if self.arch.init == "he":
                for block in level.blocks:
                    nn.init.normal_(block.affine.weight, std=0.1 / self.arch.w_dim**0.5)

    def style_parameters(self):
        """Return the parameters of the mapping networks, which learn at a rate of their own."""
        return [parameter for level in self.levels for parameter in level.mapping.parameters()]

    def draw(self, keys, level):
        """Return the code of a level for int64 keys (B,), on their device: `normals` of the key and the level."""
        side = self.sides[level] // 2
        numbers = normals(make_keys(keys, level), self.arch.z_dim + self.arch.noise * side**2)
        z, noise = numbers.split([self.arch.z_dim, self.arch.noise * side**2], dim=1)
        return z, noise.view(-1, self.arch.noise, side, side)

    def codes(self, keys):
        """Return the codes of all levels for int64 keys (B,)."""
        return [self.draw(keys, level) for level in range(len(self.levels))]

    def conditions(self, condition):
        """Return what each level sees of c(x) (B, C, r, r) in [0, 1]: [(at its working side, for its head or None)]."""
        condition = condition.float()
        return [
            (self._see(condition, side // 2), self._see(condition, side) if self._head_sees(side) else None)
            for side in self.sides
        ]

    def _see(self, condition, side):
        """Return c(x) in [-1, 1] at another side: averaged to a smaller one, interpolated to a larger one."""
        x = 2 * self.corruption.condition_at(condition, side) - 1
        return x if x.shape[-1] == side else F.interpolate(x, size=side, mode="bicubic", align_corners=False)

    def step(self, level, condition, seen, state, code):
        """Run one level. condition: c(x) in [0, 1]; seen: its entry of `conditions`; return (image in [0, 1], State).

        image: float32 (B, 3, s, s), s the level's output side.
        """
        (z, noise), module = code, self.levels[level]
        w = module.mapping(z, state.styles if self.arch.mapping == "cumulative" else ())
        inputs = [seen[0]] if level == 0 or self.arch.level_input == "both" else []
        if level:
            inputs += [state.out, self.arch.feature_scale * state.features]
        inputs = torch.cat([x.float() for x in (noise, *inputs)], dim=1)
        inputs = inputs.contiguous(memory_format=torch.channels_last)
        out, features = module(inputs, [] if seen[1] is None else [seen[1].to(inputs.dtype)], w)
        image = (out + 1) / 2
        if self.project:
            image = self.corruption.project(image, condition)
            out = 2 * image - 1
        return image, State(out, features, (*state.styles, w))

    def forward(self, condition, codes):
        """Return the images of the first len(codes) levels, float32 in [0, 1], coarse to fine."""
        seen, state, images = self.conditions(condition), State(), []
        for level, code in enumerate(codes):
            image, state = self.step(level, condition, seen[level], state, code)
            images.append(image)
        return images

    @torch.inference_mode()
    def sample(self, condition, keys):
        """Return one restoration, float32 (B, 3, S, S) in [0, 1], of each c(x) by the codes of int64 keys (B,)."""
        return self.forward(condition, self.codes(keys))[-1]
