"""The generator: against its equations in slow float64, its parts and sizes, its codes, copies and checkpoints."""

import contextlib
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import refuses
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from CamNet import IMLE
from CamNet.Corruptions import pyramid
from CamNet.Distances import Pixels
from CamNet.Generator import NETS, DenseBlock, Generator, Mapping, State, StyledBlock, _OwnGradient
from Images import Shapes

SIZES = (16, 32, 64, 84, 96, 128, 256)
PUBLISHED = {"mapping": "per_level", "level_input": "output"}  # what distinguishes "paper", for smaller nets
KEYS = torch.tensor([3, -1, 2**62])


def pictures(n=3, size=16, seed=0):
    """(n, 3, size, size) in [0, 1]: generated shapes."""
    labels = torch.arange(n) % len(Shapes.CLASSES)
    return Shapes.draw(labels, size, torch.Generator().manual_seed(seed)).float() / 255


def build(corrupt="gray+down2", size=16, seed=0, net="tiny", **changes):
    """(generator, condition of 3 images)."""
    torch.manual_seed(seed)
    generator = Generator(net, size, corrupt, **changes)
    return generator, generator.corruption(pictures(size=size), KEYS)


def build_meta(*args, **changes):
    """A generator whose parameters have shapes only."""
    with torch.device("meta"):
        return Generator(*args, **changes)


@torch.no_grad()
def stir(generator):
    """Give every parameter, also those that start at 0 or tiny, values that change the output."""
    for name, parameter in generator.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.2)
        elif name.endswith("original0"):  # the length of a weight-normed convolution's weights
            parameter.mul_(0.5 + torch.rand_like(parameter))
        elif "affine" in name:
            nn.init.normal_(parameter, std=0.5 / parameter.shape[1] ** 0.5)
    return generator


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


# the equations of the cascade, in float64


def slow_leaky(x):
    return torch.where(x > 0, x, 0.2 * x)


def slow_conv(x, conv):
    """3x3 with zero padding, tap by tap; the weights by the formula of weight norm."""
    length = conv.parametrizations.weight.original0.double()
    direction = conv.parametrizations.weight.original1.double()
    weight = length * direction / direction.square().sum((1, 2, 3), keepdim=True).sqrt()
    side, padded = x.shape[-1], F.pad(x, (1, 1, 1, 1))
    total = conv.bias.double().view(1, -1, 1, 1)
    for i in range(3):
        for j in range(3):
            total = total + torch.einsum("oc,bchw->bohw", weight[:, :, i, j], padded[..., i : i + side, j : j + side])
    return total


def slow_linear(x, layer):
    return torch.einsum("oi,bi->bo", layer.weight.double(), x) + layer.bias.double()


def slow_dense(x, block):
    seen = [x]
    for conv in block.convs[:4]:
        seen.append(slow_leaky(slow_conv(torch.cat(seen, 1), conv)))
    return x + 0.2 * slow_conv(torch.cat(seen, 1), block.convs[4])


def slow_block(x, block, w):
    first, second, third = block.dense
    r = x + 0.2 * slow_dense(slow_dense(slow_dense(x, first), second), third)
    mean = r.mean((2, 3), keepdim=True)
    variance = (r - mean).square().mean((2, 3), keepdim=True)
    styles = slow_linear(w, block.affine)[:, :, None, None]
    gain, shift = styles[:, : x.shape[1]], styles[:, x.shape[1] :]
    return (1 + gain) * (r - mean) / (variance + 1e-5).sqrt() + shift


def slow_level(level, inputs, extra, w):
    """(tanh image, features) of one level."""
    h0 = slow_conv(inputs, level.first)
    x = h0
    for block in level.blocks:
        x = slow_block(x, block, w)
    h = h0 + slow_conv(x, level.last)
    h = h.repeat_interleave(2, 2).repeat_interleave(2, 3)
    h = slow_leaky(slow_conv(torch.cat([h, *extra], 1), level.head[0]))
    u = slow_leaky(slow_conv(h, level.head[1]))
    return torch.tanh(slow_conv(u, level.to_rgb)), u


def slow_mapping(mapping, z, styles, normalized):
    if normalized:
        z = z / z.square().mean(1, keepdim=True).sqrt()
    w = torch.cat([slow_leaky(slow_linear(z, mapping.first)), *styles], 1)
    for layer in mapping.rest:
        w = slow_leaky(slow_linear(w, layer))
    return w


def slow_see(condition, side):
    """c(x), without a mask, in [-1, 1] at another side."""
    x = 2 * condition - 1
    if side > x.shape[-1]:
        return F.interpolate(x, size=side, mode="bicubic", align_corners=False)
    block = x.shape[-1] // side
    return x.view(*x.shape[:2], side, block, side, block).mean((3, 5))


def slow_forward(generator, condition, codes):
    """The images of all levels in [0, 1]."""
    arch = generator.arch
    condition = condition.double()
    images = []
    styles = []
    out = None
    features = None
    for index, (z, noise) in enumerate(codes):
        level = generator.levels[index]
        side = generator.sides[index]
        before = styles if arch.mapping == "cumulative" else []
        w = slow_mapping(level.mapping, z.double(), before, arch.init == "he")
        styles.append(w)
        inputs = [noise.double()]
        if index == 0 or arch.level_input == "both":
            inputs.append(slow_see(condition, side // 2))
        if index:
            inputs += [out, 0.1 * features]
        extra = [slow_see(condition, side)] if generator.corruption.resolution >= side else []
        out, features = slow_level(level, torch.cat(inputs, 1), extra, w)
        if generator.project:
            out = 2 * generator.corruption.project((out.float() + 1) / 2, condition.float()).double() - 1
        images.append((out + 1) / 2)
    return images


@pytest.mark.parametrize("level", [0, 1])
@torch.no_grad()
def test_a_level_equals_its_equations(level):
    generator, _ = build("gray+down2", blocks=2)
    module = stir(generator).levels[level]
    inputs = torch.randn(2, module.first.in_channels, 8, 8)
    extra = torch.randn(2, module.head[0].in_channels - module.last.out_channels, 16, 16)
    w = torch.randn(2, generator.arch.w_dim)
    assert extra.shape[1] == (level == 0)  # with and without c(x) at the head
    out, features = module(inputs, extra if level == 0 else None, w)
    slow_out, slow_features = slow_level(module, inputs.double(), [extra.double()], w.double())
    torch.testing.assert_close(out.double(), slow_out, rtol=0, atol=1e-5)
    torch.testing.assert_close(features.double(), slow_features, rtol=1e-5, atol=1e-5)
    assert slow_out.std() > 0.05  # something to be equal to


@pytest.mark.parametrize(
    "corrupt, changes",
    [
        ("gray+down2", {}),
        ("gray", {"project": False, "blocks": 2}),
        ("down4", {"project": False, **PUBLISHED}),
        ("down4", {"project": False, "mapping": "per_level"}),
        ("down2", {"level_input": "output"}),
        ("gray+down4", {"project": False, "init": "ref"}),
    ],
)
@torch.no_grad()
def test_the_cascade_equals_its_equations(corrupt, changes):
    generator, condition = build(corrupt, **changes)
    codes = stir(generator).codes(KEYS)
    for image, slow in zip(generator(condition, codes), slow_forward(generator, condition, codes), strict=True):
        torch.testing.assert_close(image.double(), slow, rtol=0, atol=1e-5)


# shapes and structure


@pytest.mark.parametrize("corrupt", ["gray", "gray+down2", "down4", "gray+down2+mask0.5", "mask0.25"])
@torch.no_grad()
def test_images_codes_and_states_have_their_shapes_and_ranges(corrupt):
    generator, condition = build(corrupt, 32, levels=3)
    codes = stir(generator).codes(KEYS)
    arch = generator.arch
    assert generator.sides == [8, 16, 32]
    assert [z.shape for z, _ in codes] == [(3, arch.z_dim)] * 3
    assert [noise.shape for _, noise in codes] == [(3, 5, 4, 4), (3, 5, 8, 8), (3, 5, 16, 16)]
    images = generator(condition, codes)
    assert [image.shape for image in images] == [(3, 3, side, side) for side in generator.sides]
    for image in images:
        assert image.dtype == torch.float32
        assert image.min() >= 0
        assert image.max() <= 1
        assert image.std() > 0
    state = State()
    for level, (seen, code) in enumerate(zip(generator.conditions(condition), codes)):
        image, state = generator.step(level, condition, seen, state, code)
        torch.testing.assert_close(state.out, 2 * image - 1)
        assert torch.equal(image, images[level])
        assert len(state.styles) == level + 1
        assert state.features.shape == (3, arch.of_level(arch.channels, level), *image.shape[2:])


def test_the_paper_has_as_many_parameters_as_published():
    generator = build_meta("paper", 256, "down16")
    assert count(generator) == 209_050_072
    assert [round(count(level) / 1e6, 2) for level in generator.levels] == [112.01, 54.94, 29.68, 12.42]
    dense = [sum(count(block.dense) for block in level.blocks) for level in generator.levels]
    assert [round(number / 1e6, 2) for number in dense] == [108.86, 52.45, 27.23, 9.96]
    assert [count(level.mapping) for level in generator.levels] == [1_904_640] * 4
    affines = [sum(count(block.affine) for block in level.blocks) for level in generator.levels]
    assert affines == [787_968, 393_984, 393_984, 393_984]
    cumulative = build_meta("paper", 256, "down16", mapping="cumulative")  # CHIMLE's
    assert count(cumulative) == 210_622_936 == 209_050_072 + 512**2 * (0 + 1 + 2 + 3)


def test_the_paper_has_the_published_structure():
    generator = build_meta("paper", 256, "down16")
    assert generator.sides == [32, 64, 128, 256]  # of the outputs; working sides: half
    arch = generator.arch
    assert (arch.feature_scale, arch.noise, arch.z_dim, arch.w_dim) == (0.1, 5, 128, 512)
    assert (arch.mapping, arch.level_input) == ("per_level", "output")
    before = 3  # c(x) at the first level, then the output before it, and its features
    for level, nf, gc in zip(generator.levels, (128, 64, 64, 64), (256, 192, 128, 64), strict=True):
        assert (level.first.in_channels, level.first.out_channels) == (5 + before, nf)
        before = 3 + nf
        assert len(level.blocks) == 6
        for block in level.blocks:
            assert len(block.dense) == 3
            for dense in block.dense:
                assert [conv.in_channels for conv in dense.convs] == [nf + j * gc for j in range(5)]
                assert [conv.out_channels for conv in dense.convs] == [gc] * 4 + [nf]
            linears = [each for each in block.modules() if isinstance(each, nn.Linear)]
            assert [(each.in_features, each.out_features) for each in linears] == [(512, 2 * nf)]
        linears = [each for each in level.mapping.modules() if isinstance(each, nn.Linear)]
        assert [(each.in_features, each.out_features) for each in linears] == [(128, 512)] + [(512, 512)] * 7
        assert [(conv.in_channels, conv.out_channels) for conv in level.head] == [(nf, nf)] * 2
        assert (level.to_rgb.in_channels, level.to_rgb.out_channels) == (nf, 3)
    convs = [module for module in generator.modules() if isinstance(module, nn.Conv2d)]
    assert len(convs) == 4 * (6 * 3 * 5 + 5)
    for conv in convs:
        assert conv.kernel_size == (3, 3)
        assert conv.padding == (1, 1)
        assert conv.padding_mode == "zeros"
        parts = dict(conv.named_parameters())
        assert set(parts) == {"bias", "parametrizations.weight.original0", "parametrizations.weight.original1"}
        assert parts["parametrizations.weight.original0"].shape == (conv.out_channels, 1, 1, 1)


@torch.no_grad()
def test_the_codes_of_k_levels_give_the_first_k_outputs():
    generator, condition = build("gray+down2", 32, levels=3)
    codes = generator.codes(KEYS)
    whole = generator(condition, codes)
    assert len(whole) == 3
    assert generator(condition, []) == []
    for k in (1, 2):
        some = generator(condition, codes[:k])
        assert len(some) == k
        assert all(torch.equal(a, b) for a, b in zip(some, whole))


# how much style and noise change the output


def spreads(generator, condition):
    """{(part, level): change of the last output where only this part of this level's code is another one}.

    The largest change of a pixel, in the image where that is smallest.
    """
    codes = generator.codes(KEYS)
    image = generator(condition, codes)[-1]
    found = {}
    for level, (other_z, other_noise) in enumerate(generator.codes(KEYS + 1)):
        z, noise = codes[level]
        for part, code in {"style": (other_z, noise), "noise": (z, other_noise)}.items():
            changed = generator(condition, [*codes[:level], code, *codes[level + 1 :]])[-1]
            found[part, level] = (changed - image).abs().amax((1, 2, 3)).min().item()
    return found


@pytest.mark.parametrize("net, size", [("tiny", 16), ("tiny", 32), ("small", 16)])
@pytest.mark.parametrize("corrupt", ["gray+down2", "down4"])
@torch.no_grad()
def test_style_and_noise_change_the_output_at_step_0(net, size, corrupt):
    found = spreads(*build(corrupt, size, net=net))
    assert len(found) == 4
    assert min(found.values()) > 1e-4, found


@torch.no_grad()
def test_with_the_published_initialization_the_style_has_no_effect_at_step_0():
    """It multiplies the weights of each of the 8 layers from z to w, and of the affine layers, by 0.1."""
    found = spreads(*build("gray+down2", init="ref", map_depth=8))
    assert max(value for (part, _), value in found.items() if part == "style") < 1e-6, found
    assert min(value for (part, _), value in found.items() if part == "noise") > 1e-4, found


def train(generator, steps, lr=2e-3):
    """Take a few steps towards the images, with the same codes."""
    distance = Pixels()
    optimizer = torch.optim.Adam(generator.parameters(), lr)
    images = pictures(size=generator.corruption.size)
    condition = generator.corruption(images, KEYS)
    wanted = [distance.features(y) for y in pyramid(images, generator.sides)]
    keys = torch.stack([KEYS] * len(generator.sides), dim=1)
    for _ in range(steps):
        optimizer.zero_grad()
        IMLE.loss(generator, distance, condition, wanted, generator.codes(keys)).backward()
        optimizer.step()


def test_style_and_noise_change_the_output_after_a_short_training():
    generator, condition = build("gray+down2")
    train(generator, 12)
    with torch.no_grad():
        found = spreads(generator, condition)
    assert min(found.values()) > 1e-3, found


# the projection


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    "corrupt, size",
    [("gray", 16), ("gray+down2", 16), ("down4", 32), ("gray+down4+mask0.5", 32), ("mask0.25", 16), ("down4", 84)],
)
@torch.no_grad()
def test_with_projection_the_output_agrees_with_the_condition(corrupt, size, autocast):
    generator, condition = build(corrupt, size)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        projected = generator(condition, stir(generator).codes(KEYS))
        generator.project = False
        free = generator(condition, generator.codes(KEYS))
    assert (generator.corruption(projected[-1], KEYS) - condition).abs().max() <= 1e-6
    assert (generator.corruption(free[-1], KEYS) - condition).abs().mean() > 1e-2
    resolution = generator.corruption.resolution
    for image, side in zip(projected, generator.sides):  # at every level, the means of luminance or colors agree
        kept = generator.corruption.condition_at(condition, min(side, resolution))
        x = (image * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, True) if kept.shape[1] < 3 else image
        error = (F.avg_pool2d(x, side // kept.shape[-1]) - kept[:, : x.shape[1]]).abs()
        known = kept[:, -1:] if generator.corruption.masks else torch.ones_like(error)
        assert (error * known).max() <= 1e-6
        assert known.max() == 1


# copies, averages, checkpoints


def test_a_deep_copy_after_a_backward_pass_shares_nothing():
    generator, condition = build()
    train(generator, 1)
    assert all(parameter.grad is not None for parameter in generator.parameters())
    other = copy.deepcopy(generator)
    first = generator.sample(condition, KEYS)
    assert torch.equal(other.sample(condition, KEYS), first)
    train(other, 1)
    assert torch.equal(generator.sample(condition, KEYS), first)  # nothing is shared
    assert not torch.equal(other.sample(condition, KEYS), first)


def test_weights_can_be_averaged_by_lerp():
    generator, condition = build()
    train(generator, 1)
    average = copy.deepcopy(generator).requires_grad_(False)
    train(generator, 2)
    old = {name: parameter.detach().clone() for name, parameter in average.named_parameters()}
    new = [parameter.detach() for parameter in generator.parameters()]
    torch._foreach_lerp_(list(average.parameters()), new, 0.25)
    for name, parameter in generator.named_parameters():
        torch.testing.assert_close(average.get_parameter(name), 0.75 * old[name] + 0.25 * parameter)
    image = average.sample(condition, KEYS)
    whole = generator.sample(condition, KEYS)
    assert image.isfinite().all()
    assert not torch.equal(image, whole)
    torch._foreach_lerp_(list(average.parameters()), new, 1.0)
    torch.testing.assert_close(average.sample(condition, KEYS), whole)  # there are no buffers to average


@pytest.mark.parametrize("changes", [{}, {"init": "ref", **PUBLISHED}, {"project": False, "blocks": 2}])
def test_config_and_state_dict_restore_the_generator(tmp_path, changes):
    generator, condition = build(**changes)
    train(generator, 1)
    torch.save({"config": generator.config, "generator": generator.state_dict()}, tmp_path / "generator.pt")
    state = torch.load(tmp_path / "generator.pt", weights_only=True)
    torch.manual_seed(99)
    other = Generator(**state["config"])
    assert not torch.equal(other.sample(condition, KEYS), generator.sample(condition, KEYS))
    other.load_state_dict(state["generator"], strict=True)
    assert torch.equal(other.sample(condition, KEYS), generator.sample(condition, KEYS))
    assert other.arch == generator.arch
    assert other.config == generator.config


# the style


def test_the_style_depends_on_the_coarser_styles_if_cumulative():
    for mapping, sees in {"cumulative": True, "per_level": False}.items():
        generator, condition = build(mapping=mapping)
        widths = [level.mapping.rest[0].in_features // generator.arch.w_dim for level in generator.levels]
        assert widths == ([1, 2] if sees else [1, 1])
        with torch.no_grad():
            codes = stir(generator).codes(KEYS)
            seen = generator.conditions(condition)
            _, state = generator.step(0, condition, seen[0], State(), codes[0])
            image, after = generator.step(1, condition, seen[1], state, codes[1])
            moved = state._replace(styles=(state.styles[0] + 1,))
            other, moved_after = generator.step(1, condition, seen[1], moved, codes[1])
        assert torch.equal(image, other) != sees
        assert torch.equal(after.styles[1], moved_after.styles[1]) != sees


@torch.no_grad()
def test_the_length_of_z_has_no_effect():
    torch.manual_seed(0)
    z = 3 * torch.randn(1000, 128)
    arch = build_meta("small", 16).arch
    mapping = Mapping(arch, 0)
    for layer in [mapping.first, *mapping.rest]:
        nn.init.kaiming_normal_(layer.weight, a=0.2)
        nn.init.zeros_(layer.bias)
    w = mapping(z, [])
    torch.testing.assert_close(w, mapping(z / 3, []))
    torch.testing.assert_close(w, slow_mapping(mapping, z.double(), [], True).float(), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_initial_weights_keep_the_style_alive():
    generator, condition = build("gray+down2", 32, levels=3, w_dim=256)
    for level in generator.levels:
        for layer in [level.mapping.first, *level.mapping.rest]:
            wanted = math.sqrt(2 / (1 + 0.2**2) / layer.in_features)
            assert layer.weight.std().item() == pytest.approx(wanted, rel=0.05) and (layer.bias == 0).all()
        for block in level.blocks:
            assert block.affine.weight.std().item() == pytest.approx(0.1 / 16, rel=0.05)
            assert (block.affine.bias == 0).all()
        for conv in level.modules():
            if isinstance(conv, nn.Conv2d):
                assert (conv.bias == 0).all()
                bound = 1 / math.sqrt(9 * conv.in_channels)  # torch's own, which weight norm keeps
                assert conv.weight.abs().max().item() == pytest.approx(bound, rel=0.15)
    state = State()
    for level, (seen, code) in enumerate(zip(generator.conditions(condition), generator.codes(KEYS))):
        _, state = generator.step(level, condition, seen, state, code)
        assert 0.3 < state.styles[-1].std() < 3  # neither vanishes nor explodes, however many styles it sees


def test_style_parameters_are_those_of_the_mappings():
    generator, _ = build()
    found = {id(parameter) for parameter in generator.style_parameters()}
    wanted = {id(parameter) for name, parameter in generator.named_parameters() if ".mapping." in name}
    assert found == wanted
    assert len(generator.style_parameters()) == len(wanted) == 2 * 4 * 2
    assert not any("affine" in name for name, parameter in generator.named_parameters() if id(parameter) in found)


# sizes and errors

LEVELS = {
    "tiny": {16: 2, 32: 2, 64: 2, 84: 2, 96: 2, 128: 2, 256: 2},
    "small": {16: 2, 32: 3, 64: 3, 84: 2, 96: 3, 128: 3, 256: 3},
    "paper": {16: 2, 32: 3, 64: 4, 84: 2, 96: 4, 128: 4, 256: 4},
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("net", NETS)
def test_every_net_fits_every_size(net, size):
    generator = build_meta(net, size)
    levels = LEVELS[net][size]
    assert generator.sides == [size // 2**k for k in reversed(range(levels))]
    assert len(generator.levels) == levels
    assert generator.sides[0] // 2 >= 4
    assert generator.config == {"net": net, "size": size, "corrupt": "gray+down2", "project": True}


@pytest.mark.parametrize("corrupt", ["gray", "gray+down2", "down4"])
@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_tiny_runs_at_every_size(size, corrupt):
    generator = Generator("tiny", size, corrupt)
    condition = generator.corruption(pictures(1, size))
    image = generator.sample(condition, KEYS[:1])
    assert image.shape == (1, 3, size, size)
    assert image.dtype == torch.float32
    assert image.min() >= 0
    assert image.max() <= 1
    assert image.std() > 0.01


@pytest.mark.parametrize("size, sides", [(8, [8]), (10, [10]), (42, [42]), (20, [10, 20]), (24, [12, 24])])
def test_sizes_that_can_be_halved_once_or_twice(size, sides):
    generator, condition = build("gray", size)
    assert generator.sides == sides
    assert generator.sample(condition, KEYS).shape == (3, 3, size, size)


def test_a_net_size_or_corruption_that_does_not_fit_is_refused():
    refuses(lambda: Generator("huge", 32), "--net huge", "tiny, small, paper")
    for size in (33, 85):
        refuses(lambda size=size: Generator("tiny", size, "gray"), f"--size {size}", "even")
    for size in (2, 4, 6):
        refuses(lambda size=size: Generator("tiny", size, "gray"), f"--size {size}", "8 or more")
    refuses(lambda: Generator("tiny", 96, "down3"), "--corrupt down3", "32 px", "24 px", "--size 96")
    refuses(lambda: Generator("tiny", 84, "down7"), "--corrupt down7", "12 px", "21 px", "--size 84")
    refuses(lambda: Generator("tiny", 32, "blur"), "--corrupt", "blur")
    refuses(lambda: Generator("tiny", 32, "down5"), "--corrupt", "down5")


# codes and conditions


def test_codes_are_normal_and_follow_from_key_and_level_alone():
    generator, _ = build()
    codes = generator.codes(torch.arange(500))
    for level, (z, noise) in enumerate(codes):
        side = generator.sides[level] // 2
        assert z.shape == (500, generator.arch.z_dim)
        assert noise.shape == (500, 5, side, side)
        for part in (z, noise):
            assert part.mean().item() == pytest.approx(0, abs=0.03)
            assert part.std().item() == pytest.approx(1, abs=0.03)
        some_z, some_noise = generator.draw(torch.tensor([7, 499]), level)
        assert torch.equal(some_z, z[[7, 499]])
        assert torch.equal(some_noise, noise[[7, 499]])
    (z, noise), (other_z, _) = codes
    some_noise = noise.flatten(1)[:, : z.shape[1]]
    for other in (other_z, some_noise):  # the levels are independent, and so are style and noise
        assert abs(torch.corrcoef(torch.stack([z.flatten(), other.flatten()]))[0, 1]) < 4 / z.numel() ** 0.5


def test_codes_take_a_key_for_all_levels_or_one_for_each():
    generator, _ = build(size=32, levels=3)
    keys = torch.arange(12).view(4, 3)
    codes = generator.codes(keys)
    assert len(codes) == 3
    for level, (z, noise) in enumerate(codes):
        wanted_z, wanted_noise = generator.draw(keys[:, level], level)
        assert torch.equal(z, wanted_z)
        assert torch.equal(noise, wanted_noise)
    for k in (1, 2, 3):
        assert all(torch.equal(z, codes[level][0]) for level, (z, _) in enumerate(generator.codes(keys[:, :k])))
        assert len(generator.codes(keys[:, :k])) == k
    same = torch.stack([KEYS] * 3, dim=1)
    for (z, noise), (other_z, other_noise) in zip(generator.codes(KEYS), generator.codes(same), strict=True):
        assert torch.equal(z, other_z)
        assert torch.equal(noise, other_noise)


def test_levels_see_the_condition_at_the_sides_where_it_adds_detail():
    generator, condition = build("gray+down2", 32, levels=3)  # 16 px, for levels of 4, 8 and 16 px
    (small, large), (middle, same), (body, none) = generator.conditions(condition)
    assert [x.shape[-1] for x in (small, large, middle, same, body)] == [4, 8, 8, 16, 16] and none is None
    torch.testing.assert_close(small, slow_see(condition, 4))
    torch.testing.assert_close(large, slow_see(condition, 8))
    assert torch.equal(same, 2 * condition - 1)
    assert torch.equal(body, same)
    assert all(head is None for _, head in build("down4")[0].conditions(torch.rand(2, 3, 4, 4)))


@pytest.mark.parametrize("corrupt", ["gray+down2", "down4", "gray+mask0.5"])
@torch.no_grad()
def test_the_generator_uses_what_it_is_shown(corrupt):
    generator, condition = build(corrupt, project=False)
    codes = generator.codes(KEYS)
    seen, state = generator.conditions(condition), State()
    for level, code in enumerate(codes):
        image, after = generator.step(level, condition, seen[level], state, code)
        for part in (0, 1):
            if seen[level][part] is not None:
                changed = list(seen[level])
                changed[part] = -changed[part]
                other, _ = generator.step(level, condition, changed, state, code)
                assert (other - image).abs().max() > 1e-3
        state = after


# sampling


@pytest.mark.parametrize("corrupt", ["gray+down2", "gray+mask0.5"])
def test_sample_is_the_same_in_any_batch(corrupt):
    generator, _ = build(corrupt)
    keys = torch.arange(9)
    condition = generator.corruption(pictures(9), keys)
    whole = stir(generator).sample(condition, keys)
    torch.testing.assert_close(whole, generator(condition, generator.codes(keys))[-1].detach(), rtol=0, atol=1e-5)
    for rows in ([4], [8, 0, 4], [3, 3, 5, 6]):
        torch.testing.assert_close(generator.sample(condition[rows], keys[rows]), whole[rows], rtol=0, atol=1e-5)
    assert (generator.sample(condition, keys + 100) - whole).abs().amax((1, 2, 3)).min() > 1e-3


def test_sample_draws_nothing_and_makes_no_graph():
    generator, condition = build()
    state = torch.get_rng_state()
    first = generator.sample(condition, KEYS)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.is_inference()
    assert not first.requires_grad
    assert torch.equal(generator.sample(condition, KEYS), first)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("net", ["tiny", "small"])
def test_a_frozen_copy_gives_the_same_bits_without_weight_norm(net, bf16):
    generator, condition = build(net=net)
    stir(generator)
    before = copy.deepcopy(generator.state_dict())
    codes = generator.codes(KEYS)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        frozen = generator.frozen()
        for image, its_image in zip(generator(condition, codes), frozen(condition, codes), strict=True):
            assert torch.equal(image, its_image)
        with torch.profiler.profile() as profile:
            frozen(condition, codes)
    operations = {event.key for event in profile.key_averages()}
    assert "aten::conv2d" in operations
    assert "aten::_weight_norm" not in operations
    layers = [module for module in frozen.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    dtype = torch.bfloat16 if bf16 else torch.float32
    assert {parameter.dtype for layer in layers for parameter in layer.parameters()} == {dtype}
    assert not any(parameter.requires_grad for parameter in frozen.parameters())

    # the generator itself is as it was, and shares nothing with the copy
    mine = {parameter.data_ptr() for parameter in generator.parameters()}
    assert not mine & {parameter.data_ptr() for parameter in frozen.parameters()}
    assert generator.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in generator.state_dict().items())
    generator(condition, codes)[-1].sum().backward()


def test_bfloat16_is_near():
    generator, condition = build()
    exact = generator.sample(condition, KEYS)
    with torch.autocast("cpu", torch.bfloat16):
        low = generator.sample(condition, KEYS)
    assert low.dtype == torch.float32
    assert not torch.equal(low, exact)
    torch.testing.assert_close(low, exact, rtol=0, atol=0.03)


@contextlib.contextmanager
def cuda_autocast():
    """bfloat16 autocast of CUDA, also where there is no GPU: there torch.autocast would disable itself."""
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)


def test_activations_stay_bfloat16_under_the_autocast_of_cuda():
    """CUDA's autocast, unlike the CPU's, runs group_norm and interpolate in float32. Fake tensors need no GPU."""
    dtypes = []
    with FakeTensorMode(), torch.device("cuda"), torch.no_grad(), cuda_autocast():
        generator = Generator("tiny", 16)
        for module in generator.modules():
            if isinstance(module, (StyledBlock, nn.Conv2d)):
                module.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
        for level in generator.levels:  # its input is interpolated
            level.head[0].register_forward_hook(lambda module, inputs, output: dtypes.append(inputs[0].dtype))
        codes = [(torch.rand(2, 64), torch.rand(2, 5, side // 2, side // 2)) for side in generator.sides]
        images = generator(torch.rand(2, 1, 8, 8), codes)
    assert images[-1].device.type == "cuda"
    assert images[-1].dtype == torch.float32
    assert len(dtypes) > 40
    assert set(dtypes) == {torch.bfloat16}


def test_gradients_reach_every_parameter():
    generator, condition = build()
    image = stir(generator)(condition, generator.codes(KEYS))[-1]
    (image * torch.randn(image.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
    for name, parameter in generator.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name


def test_gradients_of_their_own_have_the_same_bits(monkeypatch):
    torch.manual_seed(0)
    block = DenseBlock(16, 8).to(memory_format=torch.channels_last)
    x = torch.rand(2, 16, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()

    def gradients():
        return torch.autograd.grad(block(x).square().sum(), [x, *block.parameters()])

    own = gradients()
    monkeypatch.setattr(_OwnGradient, "apply", lambda x: x)
    assert all(torch.equal(one, other) for one, other in zip(own, gradients(), strict=True))
