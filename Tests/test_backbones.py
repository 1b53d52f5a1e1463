"""Backbones: sizes, stems, equality with torchvision's nets, heads."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import resnet

from Backbones import BACKBONES, ContrastiveNet, build_encoder, build_head, count_parameters

FEATURES = {"resnet8": 128, "resnet18": 512, "resnet34": 512, "resnet50": 2048}
TORCHVISION = [name for name in BACKBONES if name != "resnet8"]


def seeded(build, *arguments, **options):
    """Return what build(...) makes from seed 3, in evaluation mode."""
    torch.manual_seed(3)
    return build(*arguments, **options).eval()


def composed(net, x):
    """Return the features of torchvision's net, layer by layer, in torchvision's order."""
    x = net.maxpool(F.relu(net.bn1(net.conv1(x))))
    return net.avgpool(net.layer4(net.layer3(net.layer2(net.layer1(x))))).flatten(1)


@pytest.fixture
def images():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("small_stem", [True, False])
@pytest.mark.parametrize("name", BACKBONES)
def test_features(name, small_stem, images):
    encoder = seeded(build_encoder, name, small_stem)
    assert encoder.features == FEATURES[name]
    for x in (images, images[:, :, :, :24], F.interpolate(images, size=48)):
        features = encoder(x)
        assert features.shape == (2, FEATURES[name]) and features.isfinite().all() and features.std() > 0


@pytest.mark.parametrize("name", TORCHVISION)
def test_the_small_stem_keeps_the_resolution(name, images):
    encoder, shapes = seeded(build_encoder, name, True), {}
    for part in ("conv1", "maxpool", "layer1"):
        getattr(encoder, part).register_forward_hook(lambda _, __, y, part=part: shapes.update({part: y.shape[2:]}))
    features = encoder(images)
    assert set(shapes.values()) == {(32, 32)} and len(shapes) == 3
    assert not [part for part in encoder.modules() if isinstance(part, nn.MaxPool2d)]
    assert encoder.conv1.weight.shape == (64, 3, 3, 3) and encoder.conv1.bias is None
    assert torch.equal(features, composed(encoder, images))  # no ReLU is lost
    assert encoder.conv1.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.1)  # as torchvision


@pytest.mark.parametrize("name", TORCHVISION)
def test_the_large_stem_is_torchvisions(name, images):
    encoder, theirs = seeded(build_encoder, name, False), seeded(getattr(resnet, name))
    ours, expected = encoder.state_dict(), theirs.state_dict()
    assert ours.keys() == {key for key in expected if not key.startswith("fc.")}
    assert all(torch.equal(value, expected[key]) for key, value in ours.items())
    assert torch.equal(encoder(images), composed(theirs, images))
    assert torch.equal(theirs.fc(encoder(images)), theirs(images))


def test_the_small_net():
    encoder, shapes = seeded(build_encoder, "resnet8", True), []
    for stage in (encoder.stem, *encoder.stages):
        stage.register_forward_hook(lambda _, __, y: shapes.append(tuple(y.shape[1:])))
    encoder(torch.rand(1, 3, 32, 32))
    assert shapes == [(32, 16, 16), (32, 16, 16), (64, 8, 8), (128, 4, 4)]
    assert 250_000 < count_parameters(encoder) < 350_000
    other = seeded(build_encoder, "resnet8", False)
    assert all(torch.equal(value, encoder.state_dict()[key]) for key, value in other.state_dict().items())


def test_the_head():
    head = build_head(12, 7, 5)
    assert [type(layer) for layer in head] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    assert head[0].bias is None and head[3].bias is not None and head(torch.rand(4, 12)).shape == (4, 5)
    bare = build_head(12, 7, 5, norm=False)
    assert [type(layer) for layer in bare] == [nn.Linear, nn.ReLU, nn.Linear]
    x = torch.rand(4, 12)
    expected = F.relu(x @ bare[0].weight.T + bare[0].bias) @ bare[2].weight.T + bare[2].bias
    torch.testing.assert_close(bare(x), expected)
    assert bare(x[:1]).shape == (1, 5)


def test_the_whole_net(images):
    net = ContrastiveNet(build_encoder("resnet8", True), build_head(128, 16, 8)).eval()
    assert torch.equal(net(images), net.head(net.encoder(images)))
    assert {key.split(".")[0] for key in net.state_dict()} == {"encoder", "head"}


def test_count_parameters():
    assert count_parameters(build_head(12, 7, 5)) == 12 * 7 + 2 * 7 + 7 * 5 + 5
    layer = nn.Linear(3, 2)
    layer.bias.requires_grad_(False)
    assert count_parameters(layer) == 6
    assert count_parameters(build_encoder("resnet18", False)) == 11_176_512  # torchvision's 11,689,512 less its fc
    assert count_parameters(build_encoder("resnet50", False)) == 23_508_032
