"""CAM-Net: a cascade that restores corrupted images, in a different way for every code.

Peng et al. 2021, arXiv:2106.09015. "CHIMLE" below is Peng et al. 2022, arXiv:2211.14286.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from CamNet.Codes import make_keys, normals
from CamNet.Corruptions import Corruption

SLOPE = 0.2  # negative slope of every LeakyReLU
RESIDUAL = 0.2  # factor of every residual branch
SMALLEST = 4  # smallest working side of a level in pixels: instance norm is noise on fewer


@dataclass(frozen=True)
class Architecture:
    """Hyper-parameters of a generator. Tuples have one value per level, coarse to fine; the last one is repeated."""

    channels: tuple  # of a level's features
    growth: tuple  # channels that each convolution of a dense block adds
    blocks: int  # residual-in-residual dense blocks per level
    levels: int  # maximum; fewer where the image cannot be halved that often
    z_dim: int  # length of a level's style code
    w_dim: int  # length of a level's style
    map_depth: int  # linear layers from z to w
    noise: int = 5  # channels of a level's noise
    feature_scale: float = 0.1  # factor of the features that a level passes to the next one
    # "cumulative": the mapping network also sees the styles of coarser levels (CHIMLE); "per_level": it does not.
    mapping: str = "cumulative"
    # "both": finer levels see c(x) and the previous output; "output": the output alone, as published for
    # super-resolution.
    level_input: str = "both"
    # "he": initialization of the style layers that keeps the style alive; "ref": the published one, where the style
    # has no effect at step 0.
    init: str = "he"

    def of_level(self, values, level):
        """Return the value of a level, counted from 0."""
        return values[min(level, len(values) - 1)]


NETS = {
    "tiny": Architecture((32, 16), (16, 8), blocks=1, levels=2, z_dim=64, w_dim=128, map_depth=4),
    "small": Architecture((96, 64, 48), (64, 48, 32), blocks=4, levels=3, z_dim=128, w_dim=256, map_depth=4),
    "paper": Architecture(
        channels=(128, 64, 64, 64),
        growth=(256, 192, 128, 64),
        blocks=6,
        levels=4,
        z_dim=128,
        w_dim=512,
        map_depth=8,
        mapping="per_level",
        level_input="output",
    ),
}


class State(NamedTuple):
    """What a level passes to the next one; empty before the first level."""

    out: torch.Tensor | None = None  # (B, 3, r, r) in [-1, 1]
    features: torch.Tensor | None = None  # (B, C, r, r)
    styles: tuple = ()  # (B, w_dim) of each level so far


class WeightNorm(nn.Module):
    """Weight norm (Salimans and Kingma 2016, arXiv:1602.07868): each output's weight v is scaled to the length g.

    As torch's parametrizations.weight_norm, to the same bits, but fit to be compiled: torch 2.14 takes the gradient
    that arrives at a compiled torch._weight_norm for contiguous, and gives a wrong one where it is channels_last.
    """

    def forward(self, g, v):
        """Return the weight (out, in, 3, 3) for g (out, 1, 1, 1) and v (out, in, 3, 3)."""
        if torch.compiler.is_compiling():
            return v * (g / torch.linalg.vector_norm(v, dim=(1, 2, 3), keepdim=True))
        return torch._weight_norm(v, g, 0)

    def right_inverse(self, weight):
        """Return (g, v) of a weight."""
        return torch.norm_except_dim(weight, 2, 0), weight


def _conv(inputs, outputs):
    """Return a 3x3 convolution with weight norm and zero bias."""
    conv = nn.Conv2d(inputs, outputs, 3, padding=1)
    nn.init.zeros_(conv.bias)
    parametrize.register_parametrization(conv, "weight", WeightNorm(), unsafe=True)
    return conv


def _copied(module):
    """Return a copy of a module and of all modules in it; it shares their parameters, buffers and settings.

    copy.deepcopy takes five times as long: it copies the two dozen dictionaries that torch keeps in every module.
    """
    copied = object.__new__(type(module))
    vars(copied).update(vars(module))
    copied._parameters = dict(module._parameters)
    copied._modules = {name: _copied(child) for name, child in module._modules.items()}
    return copied


def _freeze(layer, dtype):
    """Give a convolution or linear layer its present weights as plain parameters of a type, without weight norm."""
    weight = layer.weight.detach().to(dtype, copy=True)
    bias = layer.bias.detach().to(dtype, copy=True)
    if parametrize.is_parametrized(layer):
        # torch's remove_parametrizations would also change the layers that this one is a copy of
        del layer.parametrizations
        layer.__class__ = nn.Conv2d
    is_cuda = weight.device.type == "cuda"
    if weight.ndim == 4 and is_cuda and dtype != torch.float32:  # else as weight norm makes it, to give the same bits
        weight = weight.contiguous(memory_format=torch.channels_last)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = nn.Parameter(bias, requires_grad=False)


class _OwnGradient(torch.autograd.Function):
    """The identity. Its gradient, which is a slice of that of torch.cat, is copied to a tensor of its own.

    On a CPU, operations on slices of few channels take ten times as long as the copy.
    """

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.contiguous(memory_format=torch.channels_last)


class DenseBlock(nn.Module):
    """Five convolutions, each of which sees the input and all previous outputs: (B, nf, r, r) -> the same shape."""

    def __init__(self, nf, growth):
        super().__init__()
        outputs = [growth] * 4 + [nf]
        self.convs = nn.ModuleList(_conv(nf + j * growth, channels) for j, channels in enumerate(outputs))

    def forward(self, x):
        seen = x
        for conv in self.convs[:-1]:
            new = F.leaky_relu(conv(seen), SLOPE, inplace=True)
            if x.device.type == "cpu" and torch.is_grad_enabled():
                seen = _OwnGradient.apply(seen)
                new = _OwnGradient.apply(new)
            seen = torch.cat([seen, new], dim=1)
        return torch.add(x, self.convs[-1](seen), alpha=RESIDUAL)


class StyledBlock(nn.Module):
    """A residual-in-residual dense block, followed by AdaIN (Huang and Belongie 2017, arXiv:1703.06868)."""

    def __init__(self, nf, growth, w_dim):
        super().__init__()
        self.dense = nn.Sequential(*(DenseBlock(nf, growth) for _ in range(3)))
        self.affine = nn.Linear(w_dim, 2 * nf)

    def forward(self, x, w):
        """Return x (B, nf, r, r) with the mean and deviation of each channel set by the style w (B, w_dim)."""
        x = torch.add(x, self.dense(x), alpha=RESIDUAL)
        gain, shift = self.affine(w)[:, :, None, None].chunk(2, dim=1)
        # Autocast on CUDA would return float32; the statistics inside group_norm are float32 either way. The CPU's
        # group_norm is several times slower on channels_last tensors than these copies; that of CUDA makes the first.
        with torch.autocast(x.device.type, enabled=False):
            x = F.group_norm(x.contiguous(), x.shape[1]).contiguous(memory_format=torch.channels_last)
        return torch.addcmul(shift.to(x.dtype), x, (1 + gain).to(x.dtype))


class Mapping(nn.Module):
    """The mapping network of a level: code z (B, z_dim) and `before` styles of coarser levels -> style w (B, w_dim)."""

    def __init__(self, arch, before):
        super().__init__()
        self.normalize = arch.init == "he"
        self.first = nn.Linear(arch.z_dim, arch.w_dim)
        inputs = [arch.w_dim * (1 + before)] + [arch.w_dim] * (arch.map_depth - 2)
        self.rest = nn.ModuleList(nn.Linear(features, arch.w_dim) for features in inputs)

    def forward(self, z, styles):
        if self.normalize:
            z = F.normalize(z, dim=1) * z.shape[1] ** 0.5
        w = torch.cat([F.leaky_relu(self.first(z), SLOPE), *styles], dim=1)
        for layer in self.rest:
            w = F.leaky_relu(layer(w), SLOPE)
        return w


class Level(nn.Module):
    """One level of the cascade: works at r pixels a side and returns images of 2r.

    inputs, head_inputs: channels of what it sees at r, and of what its head sees at 2r in addition (0: nothing);
    before: number of coarser styles that its mapping network sees.
    """

    def __init__(self, arch, level, inputs, head_inputs, before):
        super().__init__()
        nf = arch.of_level(arch.channels, level)
        growth = arch.of_level(arch.growth, level)
        self.mapping = Mapping(arch, before)
        self.first = _conv(inputs, nf)
        self.blocks = nn.ModuleList(StyledBlock(nf, growth, arch.w_dim) for _ in range(arch.blocks))
        self.last = _conv(nf, nf)
        self.head = nn.ModuleList([_conv(nf + head_inputs, nf), _conv(nf, nf)])
        self.to_rgb = _conv(nf, 3)

    def forward(self, inputs, seen_by_head, w):
        """Return (image in [-1, 1] (B, 3, 2r, 2r), features (B, nf, 2r, 2r)).

        inputs: (B, inputs, r, r); seen_by_head: (B, head_inputs, 2r, 2r) or None; w: (B, w_dim).
        """
        # Body: a residual branch of styled blocks at r pixels.
        first = self.first(inputs)
        x = first
        for block in self.blocks:
            x = block(x, w)
        x = first + self.last(x)

        # Twice the side. Autocast on CUDA would return float32.
        with torch.autocast(x.device.type, enabled=False):
            x = F.interpolate(x, scale_factor=2, mode="nearest")

        # Head: two convolutions at 2r pixels, then the image.
        if seen_by_head is not None:
            x = torch.cat([x, seen_by_head.to(x.dtype)], dim=1).contiguous(memory_format=torch.channels_last)
        for conv in self.head:
            x = F.leaky_relu(conv(x), SLOPE, inplace=True)
        return torch.tanh(self.to_rgb(x).float()), x


class Generator(nn.Module):
    """g(c(x), codes): a plausible image for every code. The code of a level is (z (B, z_dim), noise (B, c, r, r)).

    net: key of NETS; size: side of the images; corrupt: specification of a `Corruption`; project: change every output
    so that its corruption equals c(x); changes: other values for fields of `Architecture`.
    Raises ValueError where the size cannot be halved or the corruption does not fit it.
    """

    def __init__(self, net="tiny", size=32, corrupt="gray+down2", project=True, **changes):
        super().__init__()
        if net not in NETS:
            raise ValueError(f"--net {net}: choose from {', '.join(NETS)}")
        arch = replace(NETS[net], **changes)
        self.arch = arch
        self.corruption = Corruption(corrupt, size)
        self.project = project
        self.config = {"net": net, "size": size, "corrupt": self.corruption.spec, "project": project} | changes

        # The output sides of the levels, coarse to fine; a level works at half of its side.
        levels = arch.levels
        while levels and (size % 2**levels or size >> levels < SMALLEST):
            levels -= 1
        if not levels:
            raise ValueError(f"--size {size}: the generator halves it: choose an even number, {2 * SMALLEST} or more")
        self.sides = [size >> level for level in range(levels - 1, -1, -1)]
        self._check_sides()

        # The levels, each with the channels that it sees.
        self.levels = nn.ModuleList()
        for level, side in enumerate(self.sides):
            inputs = arch.noise
            if self._sees_condition(level):
                inputs += self.corruption.channels
            if level > 0:
                inputs += 3 + self.levels[-1].last.out_channels  # image and features of the previous level
            head_inputs = self.corruption.channels if self._head_sees_condition(side) else 0
            before = level if arch.mapping == "cumulative" else 0
            self.levels.append(Level(arch, level, inputs, head_inputs, before))
        self._initialize()

    def _check_sides(self):
        resolution = self.corruption.resolution
        for side in (self.sides[0] // 2, *self.sides):
            if side % resolution and resolution % side:
                flags = f"--corrupt {self.corruption.spec}"
                size = self.corruption.size
                raise ValueError(f"{flags}: {resolution} px do not fit a level of {side} px in --size {size}")

    def _sees_condition(self, level):
        """Return whether the body of a level sees c(x)."""
        return level == 0 or self.arch.level_input == "both"

    def _head_sees_condition(self, side):
        """Return whether c(x) is finer than the working side of the level with this output side."""
        return self.corruption.resolution >= side

    def _initialize(self):
        for level in self.levels:
            affines = [block.affine for block in level.blocks]
            for layer in [level.mapping.first, *level.mapping.rest, *affines]:
                nn.init.kaiming_normal_(layer.weight, a=SLOPE)
                nn.init.zeros_(layer.bias)
                if self.arch.init == "ref":
                    layer.weight.data.mul_(0.1)
            if self.arch.init == "he":
                for affine in affines:
                    nn.init.normal_(affine.weight, std=0.1 / self.arch.w_dim**0.5)

    @torch.no_grad()
    def frozen(self):
        """Return a copy that gives the same outputs faster, for use without gradients: in a search, or to sample.

        Its convolutions have plain weights, so that weight norm is not computed in every forward pass. Call it inside
        the autocast that the copy is used in: its weights have the type that autocast would cast them to.
        """
        frozen = _copied(self)
        weight = self.levels[0].mapping.first.weight
        dtype = (weight[:1] @ weight[:1].T).dtype  # what autocast computes matrix products in
        for module in list(frozen.modules()):
            if isinstance(module, (nn.Conv2d, nn.Linear)):  # all layers with parameters
                _freeze(module, dtype)
        return frozen

    def style_parameters(self):
        """Return the parameters of the mapping networks, which have their own learning rate."""
        return [parameter for level in self.levels for parameter in level.mapping.parameters()]

    def draw(self, keys, level):
        """Return the code (z, noise) of one level for int64 keys (B,), on their device.

        The numbers are standard normal, and follow from key and level alone (see `Codes.normals`).
        """
        arch = self.arch
        side = self.sides[level] // 2
        sizes = [arch.z_dim, arch.noise * side**2]
        z, noise = normals(make_keys(keys, level), sum(sizes)).split(sizes, dim=1)
        return z, noise.view(-1, arch.noise, side, side)

    def codes(self, keys):
        """Return the codes [(z, noise)], coarse to fine.

        keys: int64 (B,), one key per image for all levels; or (B, L), one key per image and level, as the search
        returns them. L may be smaller than the number of levels: then only the first L codes are returned.
        """
        if keys.ndim == 1:
            keys = keys[:, None].expand(-1, len(self.levels))
        return [self.draw(keys[:, level], level) for level in range(keys.shape[1])]

    def conditions(self, condition):
        """Return what each level sees of c(x) (B, C, r, r) in [0, 1], as a pair in [-1, 1].

        The pair is (c(x) at the level's working side, c(x) at its output side for the head or None).
        """
        condition = condition.float()
        pairs = []
        for side in self.sides:
            for_head = self._see(condition, side) if self._head_sees_condition(side) else None
            pairs.append((self._see(condition, side // 2), for_head))
        return pairs

    def _see(self, condition, side):
        """Return c(x) in [-1, 1] with another side: averaged to a smaller one, interpolated to a larger one."""
        x = 2 * self.corruption.condition_at(condition, side) - 1
        if x.shape[-1] == side:
            return x
        return F.interpolate(x, size=side, mode="bicubic", align_corners=False)

    def step(self, level, condition, seen, state, code):
        """Run one level; return (image, State after it).

        condition: c(x) in [0, 1]; seen: this level's pair of `conditions`; state: of the previous level; code: (z,
        noise) of this level. image: float32 (B, 3, s, s) in [0, 1], s the level's output side.
        """
        arch = self.arch
        module = self.levels[level]
        z, noise = code
        seen_by_body, seen_by_head = seen

        # The style.
        w = module.mapping(z, state.styles if arch.mapping == "cumulative" else ())

        # The inputs, in float32.
        inputs = [noise]
        if self._sees_condition(level):
            inputs.append(seen_by_body)
        if level > 0:
            inputs += [state.out, arch.feature_scale * state.features]
        inputs = torch.cat([x.float() for x in inputs], dim=1).contiguous(memory_format=torch.channels_last)

        # The level, then the projection.
        out, features = module(inputs, seen_by_head, w)
        image = (out + 1) / 2
        if self.project:
            image = self.corruption.project(image, condition)
            out = 2 * image - 1
        return image, State(out, features, (*state.styles, w))

    def forward(self, condition, codes):
        """Return the images of the first len(codes) levels, coarse to fine: float32 (B, 3, s, s) in [0, 1]."""
        seen = self.conditions(condition)
        state = State()
        images = []
        for level, code in enumerate(codes):
            image, state = self.step(level, condition, seen[level], state, code)
            images.append(image)
        return images

    @torch.inference_mode()
    def sample(self, condition, keys):
        """Return one restoration of each c(x) for int64 keys (B,) or (B, L): float32 (B, 3, S, S) in [0, 1]."""
        return self.forward(condition, self.codes(keys))[-1]
