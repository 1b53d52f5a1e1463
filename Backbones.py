"""Encoders and the projection head: images (B, 3, H, W) in [0, 1] -> features (B, F) -> projections (B, D)."""

import contextlib
import difflib
import zipfile
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

import Utils
from Lazy import LazyModule

torchvision = LazyModule("torchvision")

# Suggestions for --help: any other classification model of torchvision works as well.
BACKBONES = ("resnet8", "resnet18", "resnet34", "resnet50", "convnext_tiny", "vit_b_16", "efficientnet_b0")

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CLASSIFIERS = ("fc.", "classifier.", "head.", "heads.", "AuxLogits.", "aux1.", "aux2.")  # layers that encoders lack


class ResNet8(nn.Module):
    """A residual net of 3 stages that a CPU trains on 32-pixel images in minutes: stride-2 stem, widths 32, 64, 128.

    The layers are torchvision's; 0.3 million weights, 128 features.
    """

    def __init__(self, width=32):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        )
        self.stages = nn.Sequential(
            torchvision.models.resnet.BasicBlock(width, width),
            self._down(width, 2 * width),
            self._down(2 * width, 4 * width),
        )
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _down(width, out):
        shortcut = nn.Sequential(nn.Conv2d(width, out, 1, stride=2, bias=False), nn.BatchNorm2d(out))
        return torchvision.models.resnet.BasicBlock(width, out, stride=2, downsample=shortcut)

    def forward(self, x):
        """Return features (B, 4 width) of images (B, 3, H, W)."""
        return self.stages(self.stem(x)).mean(dim=(2, 3))


def build_encoder(name, small_stem, size, normalize=False):
    """Return an encoder with random weights and the attribute `num_features`, the length F of its output.

    name: "resnet8" or a classification model of torchvision, whose last layer becomes Identity. small_stem: give a
    ResNet of torchvision a 3x3 stem with stride 1 and no pooling (SimCLR, appendix B.9), for images of up to about
    64 pixels: the 7x7 stem and its pooling would quarter their side at once. resnet8 has one stem and ignores it.
    size: side of the images in pixels. normalize: let the encoder itself normalize the images by ImageNet's mean and
    standard deviation, as weights that were trained on ImageNet expect. Raises what `check_backbone` raises.
    """
    num_features = check_backbone(name, small_stem, size)
    encoder = _build(name, small_stem, size, normalize)
    encoder.num_features = num_features
    if normalize:
        encoder.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        encoder.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)
        encoder.register_forward_pre_hook(_normalize)
    return encoder


def _normalize(encoder, inputs):
    (images,) = inputs
    return (images - encoder.mean) / encoder.std


def load_weights(encoder, file):
    """Load weights to continue from: a state dict of torchvision, an encoder.pt, or a checkpoint of this repository.

    Layers of the classifier, which the encoder lacks, are left out. Raises ValueError if anything else does not fit.
    """
    if not Path(file).is_file():
        found = "it is a folder" if Path(file).is_dir() else "no such file"
        raise ValueError(f"--init {file}: {found}: give a .pt or .pth, such as encoder.pt in a run folder")
    try:
        if zipfile.is_zipfile(file):  # older files of torchvision are none
            Utils.check_archive(file)
        state = dict(torch.load(file, map_location="cpu", weights_only=True))
    except Exception as error:  # torch raises half a dozen types on damaged files
        reason = f"damaged, or no file of weights ({type(error).__name__})"
        raise ValueError(f"--init {file}: {reason}: give a .pt or .pth") from error
    state = state.get("encoder", state)
    if not isinstance(state, dict) or not Utils.all_finite(state.values()):
        raise ValueError(f"--init {file}: no weights, or some that are not finite: give another file")
    names = encoder.state_dict().keys()
    classifier = [name for name in state if name not in names and name.startswith(CLASSIFIERS)]
    try:
        encoder.load_state_dict({name: value for name, value in state.items() if name not in classifier})
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        remedy = "give the same --backbone and --stem, and for a transformer the same --size"
        raise ValueError(f"--init {file}: does not fit: {reason}: {remedy}") from error


def check_backbone(name, small_stem, size):
    """Return the length F of the output of such an encoder; takes no memory for weights and draws no random numbers.

    Raises ValueError, in one line, if the name is not known, if the model cannot have that stem, or if it does not take
    images of size x size pixels.
    """
    _check_name(name)
    if small_stem and name != "resnet8" and not is_resnet(name):
        raise ValueError(f"--backbone {name}: the small stem is for ResNets: leave out --stem, or give --stem large")
    try:
        with _without_values():
            encoder = _build(name, small_stem, size).to("meta").eval()
        images = torch.empty(2, 3, size, size, device="meta")
        with torch.no_grad():
            return encoder(images).shape[1]
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = str(error).split("\n")[0].strip(" .!")
        raise ValueError(
            f"--backbone {name}: does not take images of {size} px ({reason}): give --size N or another backbone"
        ) from error


@torch.no_grad()
def takes_size(encoder, size):
    """Return whether an encoder in evaluation mode takes images of size x size pixels."""
    device = next(encoder.parameters()).device
    try:
        encoder(torch.zeros(1, 3, size, size, device=device))
    except (RuntimeError, AssertionError):
        return False
    return True


def is_torchvision(name):
    """Return whether a backbone is a model of torchvision, not one of this repository."""
    return name in torchvision.models.list_models(module=torchvision.models)


def kept_bytes(name, small_stem, size):
    """Return how many bytes the forward pass of an image keeps for the backward pass, in float32, about.

    The arguments are those of `build_encoder`. Takes no memory and draws no random numbers.
    """
    with _without_values():
        encoder = _build(name, small_stem, size).to("meta")
        n_bytes = []

        def note(tensor):
            if not isinstance(tensor, nn.Parameter):
                n_bytes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            encoder(torch.empty(2, 3, size, size, device="meta"))
    return sum(n_bytes) // 4  # of two images; most tensors are noted twice, by the layers before and after them


def is_resnet(name):
    """Return whether a model is one of torchvision's ResNets, which can have the small stem."""
    return (
        is_torchvision(name)
        and torchvision.models.get_model_builder(name).__module__ == torchvision.models.resnet.__name__
    )


def stem_text(encoder):
    """Return what the stem of one of torchvision's ResNets is, in words; "" for other encoders."""
    if not isinstance(encoder, torchvision.models.ResNet):
        return ""
    if isinstance(encoder.maxpool, nn.Identity):
        return "3x3 stem, stride 1, no pooling"
    return "7x7 stem, stride 2, max-pooling"


def list_backbones():
    """Return the names of all backbones: resnet8, then torchvision's classification models."""
    return ["resnet8", *torchvision.models.list_models(module=torchvision.models)]


def model_options(name, size, normalize=False):
    """Return the keyword arguments that torchvision's model needs to be an encoder of images of that size.

    normalize: whether the images are normalized by ImageNet's mean and standard deviation.
    """
    if name.startswith("vit_"):
        return {"image_size": size}
    if name == "maxvit_t":
        return {"input_size": (size, size)}
    if name in ("googlenet", "inception_v3"):
        options = {"aux_logits": False, "init_weights": True}
        # torchvision's weights of these two expect another normalization, which the models themselves then change to
        return options | {"transform_input": True} if normalize else options
    return {}


def find_classifier(model):
    """Return the name of the layer of a torchvision model that has the 1000 outputs of ImageNet's classes."""
    found = None
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and layer.out_features == 1000:
            found = name
        if isinstance(layer, nn.Conv2d) and layer.out_channels == 1000:  # SqueezeNet's
            found = name
    return found


def classifier_name(name, size):
    """Return the name of the layer that is Identity in an encoder, "fc" or "classifier.2" for example."""
    with _without_values():
        return find_classifier(torchvision.models.get_model(name, weights=None, **model_options(name, size)))


def _check_name(name):
    names = list_backbones()
    if name in names:
        return
    near = difflib.get_close_matches(name.lower(), names, n=3)
    remedy = f"choose {', '.join(BACKBONES)} or another classification model of torchvision"
    if near:
        remedy = f"did you mean {' or '.join(near)}?"
    raise ValueError(f"--backbone {name}: not known: {remedy}")


@contextlib.contextmanager
def _without_values():
    """Give the modules made inside parameters on the meta device, and leave the random state as it was."""

    def to_meta(module, name, parameter):
        return None if parameter is None else nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    hook = register_module_parameter_registration_hook(to_meta)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        hook.remove()


def _build(name, small_stem, size, normalize=False):
    if name == "resnet8":
        return ResNet8()
    encoder = torchvision.models.get_model(name, weights=None, **model_options(name, size, normalize))
    encoder.set_submodule(find_classifier(encoder), nn.Identity())
    if small_stem:
        encoder.conv1 = nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")
        encoder.maxpool = nn.Identity()
    return encoder


def build_head(features, hidden, dim, norm=True):
    """Return the projection head g of SimCLR: Linear, BatchNorm if `norm`, ReLU, Linear: (B, features) -> (B, dim)."""
    layers = [nn.Linear(features, hidden, bias=not norm)]
    if norm:
        layers.append(nn.BatchNorm1d(hidden))
    layers.append(nn.ReLU(inplace=True))
    layers.append(nn.Linear(hidden, dim))
    return nn.Sequential(*layers)


class ContrastiveNet(nn.Module):
    """Encoder f, which is kept, and projection head g, which is discarded after training."""

    def __init__(self, encoder, head):
        super().__init__()
        self.encoder = encoder
        self.head = head

    def forward(self, x):
        """Return projections (B, D) of images (B, 3, H, W)."""
        return self.head(self.encoder(x))


def count_parameters(module):
    """Return the number of trainable weights in a module."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)
