"""Backbones: sizes, stems, equality with torchvision's nets, every model of torchvision by name, heads."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models
from torchvision.transforms.v2 import functional as tv

import Backbones
from Backbones import ContrastiveNet, build_encoder, build_head, check_backbone, count_parameters

WIDTHS = {"resnet8": 128, "resnet18": 512, "resnet34": 512, "resnet50": 2048}
RESNETS = ["resnet18", "resnet34", "resnet50"]
TORCHVISION = models.list_models(module=models)

# one of each family that has its classifier, or its size, in another place: (size, length of the features)
FAMILIES = {
    "convnext_tiny": (32, 768),
    "densenet121": (32, 1024),
    "efficientnet_b0": (32, 1280),
    "googlenet": (32, 1024),
    "maxvit_t": (32, 512),
    "mobilenet_v3_small": (32, 1024),
    "regnet_y_400mf": (32, 440),
    "shufflenet_v2_x0_5": (32, 1024),
    "squeezenet1_1": (32, 512),
    "swin_t": (32, 768),
    "vit_b_16": (32, 768),
}
LENGTHS = {name: length for name, (_, length) in FAMILIES.items()} | {"vgg11_bn": 4096}


def seeded(build, *arguments, **options):
    """Return what build(...) makes from seed 3, in evaluation mode."""
    torch.manual_seed(3)
    return build(*arguments, **options).eval()


def composed(net, x):
    """Return the features of torchvision's ResNet, layer by layer, in torchvision's order."""
    x = net.maxpool(F.relu(net.bn1(net.conv1(x))))
    return net.avgpool(net.layer4(net.layer3(net.layer2(net.layer1(x))))).flatten(1)


def refused(*arguments):
    """Return the message of the ValueError that check_backbone and build_encoder raise, a single line."""
    with pytest.raises(ValueError) as caught:
        check_backbone(*arguments)
    with pytest.raises(ValueError) as again:
        build_encoder(*arguments)
    assert str(caught.value) == str(again.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def images():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


# ---------------------------------------------------------------------------------------------------- ResNets


@pytest.mark.parametrize("small_stem", [True, False])
@pytest.mark.parametrize("name", WIDTHS)
def test_num_features(name, small_stem, images):
    encoder = seeded(build_encoder, name, small_stem, 32)
    assert encoder.num_features == WIDTHS[name] == check_backbone(name, small_stem, 32)
    for x in (images, images[:, :, :, :24], F.interpolate(images, size=48)):
        features = encoder(x)
        assert features.shape == (2, WIDTHS[name])
        assert features.isfinite().all()
        assert features.std() > 0


@pytest.mark.parametrize("name", RESNETS)
def test_the_small_stem_keeps_the_resolution(name, images):
    encoder = seeded(build_encoder, name, True, 32)
    shapes = {}
    for part in ("conv1", "maxpool", "layer1"):
        getattr(encoder, part).register_forward_hook(lambda _, __, y, part=part: shapes.update({part: y.shape[2:]}))
    features = encoder(images)
    assert shapes == {"conv1": (32, 32), "maxpool": (32, 32), "layer1": (32, 32)}
    assert not [part for part in encoder.modules() if isinstance(part, nn.MaxPool2d)]
    assert encoder.conv1.weight.shape == (64, 3, 3, 3)
    assert encoder.conv1.bias is None
    assert torch.equal(features, composed(encoder, images))  # no ReLU is lost
    assert encoder.conv1.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.1)  # as torchvision


@pytest.mark.parametrize("name", RESNETS)
def test_the_large_stem_is_torchvisions(name, images):
    encoder = seeded(build_encoder, name, False, 32)
    theirs = seeded(getattr(models, name))
    ours, expected = encoder.state_dict(), theirs.state_dict()
    assert ours.keys() == {key for key in expected if not key.startswith("fc.")}
    assert all(torch.equal(value, expected[key]) for key, value in ours.items())
    assert torch.equal(encoder(images), composed(theirs, images))
    assert torch.equal(theirs.fc(encoder(images)), theirs(images))


def test_resnet8():
    encoder = seeded(build_encoder, "resnet8", True, 32)
    shapes = []
    for stage in (encoder.stem, *encoder.stages):
        stage.register_forward_hook(lambda _, __, y: shapes.append(tuple(y.shape[1:])))
    encoder(torch.rand(1, 3, 32, 32))
    assert shapes == [(32, 16, 16), (32, 16, 16), (64, 8, 8), (128, 4, 4)]
    assert 250_000 < count_parameters(encoder) < 350_000
    other = seeded(build_encoder, "resnet8", False, 32)
    assert all(torch.equal(value, encoder.state_dict()[key]) for key, value in other.state_dict().items())


def test_is_resnet():
    found = [name for name in Backbones.list_backbones() if Backbones.is_resnet(name)]
    assert {"resnet18", "resnet152", "resnext50_32x4d", "wide_resnet50_2"} <= {*found}
    assert all("resne" in name for name in found)
    assert "resnet8" not in found
    assert not Backbones.is_resnet("resnet19")


def test_stem_text():
    assert Backbones.stem_text(build_encoder("resnet18", True, 32)) == "3x3 stem, stride 1, no pooling"
    assert Backbones.stem_text(build_encoder("resnext50_32x4d", False, 32)) == "7x7 stem, stride 2, max-pooling"
    assert Backbones.stem_text(build_encoder("resnet8", True, 32)) == ""
    assert Backbones.stem_text(build_encoder("squeezenet1_1", False, 32)) == ""


# ---------------------------------------------------------------------------------------------------- any model


@pytest.fixture
def small_maxvit(monkeypatch):
    """Let MaxVit have one layer in each block, and windows of one pixel: with those of seven it needs 224 pixels."""
    build = models.maxvit._maxvit

    def build_small(**options):
        return build(**options | {"block_layers": [1, 1, 1, 1], "partition_size": 1})

    monkeypatch.setattr(models.maxvit, "_maxvit", build_small)


@pytest.mark.parametrize("name", FAMILIES)
def test_each_family(name, small_maxvit):
    size, width = FAMILIES[name]
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    encoder = seeded(build_encoder, name, False, size)
    assert encoder.num_features == width
    assert encoder(images).shape == (2, width)

    # torchvision's own, with its classifier as the only difference
    theirs = seeded(models.get_model, name, **Backbones.model_options(name, size))
    classifier = Backbones.find_classifier(theirs)
    ours, expected = encoder.state_dict(), theirs.state_dict()
    assert ours.keys() == {key for key in expected if not key.startswith(f"{classifier}.")}
    assert len(expected) - len(ours) == (1 if name == "maxvit_t" else 2)  # weight and bias, which MaxVit's has not
    assert all(torch.equal(value, expected[key]) for key, value in ours.items())
    before = []
    theirs.get_submodule(classifier).register_forward_pre_hook(lambda _, inputs: before.append(inputs[0]))
    logits = theirs(images)
    assert logits.shape == (2, 1000)
    if name == "squeezenet1_1":  # averages the map of the classifier's outputs; without one, that of its inputs
        before = [F.relu(before[0]).mean(dim=(2, 3))]
    torch.testing.assert_close(encoder(images), before[0], rtol=1e-5, atol=1e-6)

    encoder.train()(images).square().mean().backward()  # it can be trained
    assert all(p.grad is not None for p in encoder.parameters())


@pytest.mark.parametrize("name", TORCHVISION)
def test_every_model_of_torchvision_without_memory_or_random_numbers(name):
    before = torch.get_rng_state()
    length = check_backbone(name, Backbones.is_resnet(name), 224)
    assert length == LENGTHS[name] if name in LENGTHS else 400 <= length <= 8192
    assert torch.equal(torch.get_rng_state(), before)
    if not Backbones.is_resnet(name):
        assert "the small stem is for ResNets" in refused(name, True, 224)


def test_names_are_those_that_help_suggests():
    assert {*Backbones.BACKBONES} <= {*Backbones.list_backbones()}
    assert Backbones.list_backbones() == ["resnet8", *TORCHVISION]


def test_checking_leaves_no_hook_behind():
    refused("vit_b_16", False, 33)
    assert build_encoder("resnet18", True, 32).conv1.weight.device.type == "cpu"


@pytest.mark.parametrize("name", ["resnet19", "ResNet18", "convnext-tiny"])
def test_a_misspelled_name(name):
    near = {"resnet19": "resnet18", "ResNet18": "resnet18", "convnext-tiny": "convnext_tiny"}
    message = refused(name, False, 32)
    assert message.startswith(f"--backbone {name}: not known: did you mean ")
    assert near[name] in message


def test_an_unknown_name():
    message = refused("fasterrcnn", False, 32)
    assert all(name in message for name in Backbones.BACKBONES)
    assert "not known" in refused("fasterrcnn_resnet50_fpn", False, 32)  # torchvision's, but no classifier


@pytest.mark.parametrize("name, size", [("vit_b_16", 100), ("inception_v3", 64), ("alexnet", 32), ("maxvit_t", 96)])
def test_a_size_that_the_model_does_not_take(name, size):
    message = refused(name, False, size)
    assert message.startswith(f"--backbone {name}: does not take images of {size} px (")
    assert message.endswith("): give --size N or another backbone")


@torch.no_grad()
@pytest.mark.parametrize("name", ["alexnet", "mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1"])
def test_what_is_said_of_a_size_is_true(name):
    encoder = models.get_model(name).eval()
    encoder.set_submodule(Backbones.find_classifier(encoder), nn.Identity())
    for size in (16, 24, 32, 48):
        try:
            encoder(torch.rand(1, 3, size, size))
        except RuntimeError:
            assert f"does not take images of {size} px" in refused(name, False, size)
        else:
            check_backbone(name, False, size)


# ---------------------------------------------------------------------------------------------------- head, whole net


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "swin_t"])
def test_weights_are_loaded(name, tmp_path):
    theirs = models.get_model(name)
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    encoder = build_encoder(name, False, 32)
    Backbones.load_weights(encoder, tmp_path / "w.pth")
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name])


def test_an_encoder_that_normalizes_does_as_torchvision():
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    normalizing = seeded(build_encoder, "resnet8", True, 32, True).eval()
    plain = seeded(build_encoder, "resnet8", True, 32, False).eval()
    wanted = plain(tv.normalize(images, Backbones.IMAGENET_MEAN, Backbones.IMAGENET_STD))
    torch.testing.assert_close(normalizing(images), wanted)


@pytest.mark.parametrize("name, size", [("googlenet", 64), ("inception_v3", 75)])
def test_weights_of_imagenet_get_the_images_that_they_expect(name, size, tmp_path):
    options = {"aux_logits": True, "init_weights": False, "transform_input": True}  # as torchvision gives its weights
    theirs = seeded(models.get_model, name, **options).eval()
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    encoder = build_encoder(name, False, size, normalize=True).eval()
    Backbones.load_weights(encoder, tmp_path / "w.pth")
    theirs.fc = nn.Identity()
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    wanted = theirs(tv.normalize(images, Backbones.IMAGENET_MEAN, Backbones.IMAGENET_STD))
    torch.testing.assert_close(encoder(images), wanted)


def test_the_head():
    head = build_head(12, 7, 5)
    assert [type(layer) for layer in head] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    assert head[0].bias is None
    assert head[3].bias is not None
    assert head(torch.rand(4, 12)).shape == (4, 5)

    bare = build_head(12, 7, 5, norm=False)
    assert [type(layer) for layer in bare] == [nn.Linear, nn.ReLU, nn.Linear]
    x = torch.rand(4, 12)
    expected = F.relu(x @ bare[0].weight.T + bare[0].bias) @ bare[2].weight.T + bare[2].bias
    torch.testing.assert_close(bare(x), expected)
    assert bare(x[:1]).shape == (1, 5)


def test_the_whole_net(images):
    net = ContrastiveNet(build_encoder("resnet8", True, 32), build_head(128, 16, 8)).eval()
    assert torch.equal(net(images), net.head(net.encoder(images)))
    assert {key.split(".")[0] for key in net.state_dict()} == {"encoder", "head"}


def test_count_parameters():
    assert count_parameters(build_head(12, 7, 5)) == 12 * 7 + 2 * 7 + 7 * 5 + 5
    layer = nn.Linear(3, 2)
    layer.bias.requires_grad_(False)
    assert count_parameters(layer) == 6
    assert count_parameters(build_encoder("resnet18", False, 32)) == 11_176_512  # torchvision's 11,689,512 less its fc
    assert count_parameters(build_encoder("resnet50", False, 32)) == 23_508_032


@pytest.mark.parametrize("name, size, fits", [("alexnet", 16, False), ("alexnet", 64, True), ("resnet8", 8, True)])
def test_takes_size(name, size, fits):
    assert Backbones.takes_size(build_encoder(name, False, 64).eval(), size) == fits
