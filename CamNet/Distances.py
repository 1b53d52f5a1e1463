"""Distances between images. The search minimizes them over codes, training over the generator's parameters.

Every distance is a module with three methods:
features(images): a list of float32 tensors, computed from images (B, 3, s, s) in [0, 1].
between(features, target_features): the distances (B * m,) of m candidates for each of B targets, in the order (target 0
    candidate 0, target 0 candidate 1, ...); each target's features are computed once.
forward(images, targets): both steps, for one image per target. The gradient flows to the images only.
"""

import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

NAMES = ("pixels", "patches", "squeeze", "alex", "vgg")
LEARNED = NAMES[2:]  # LPIPS on these backbones
MINIMUM = {"squeeze": 17, "alex": 31, "vgg": 16}  # smallest side of an image that survives the network's pooling
FILES = {"squeeze": "squeezenet1_1-b8a52dc0.pth", "alex": "alexnet-owt-7be5be79.pth", "vgg": "vgg16-397923af.pth"}
COARSEST = 4  # side of the last scale of `Pixels`, in pixels
EPSILON = 1e-8  # added to the squared length of features: keeps the gradient finite where all of them are 0


def _difference(features, target):
    """Return candidates (B * m, ...) minus their targets (B, ...): (B, m, ...). No target is copied."""
    if len(features) % len(target):
        raise ValueError(f"{len(features)} candidates for {len(target)} targets: every target needs the same number")
    return features.unflatten(0, (len(target), -1)) - target.unsqueeze(1)


def _unit(x):
    """Return x (B, C, H, W) scaled to length 1 over its channels, in float32; 0 where all channels are 0."""
    x = x.float()
    return x * (x.square().sum(dim=1, keepdim=True) + EPSILON).rsqrt()


class _Distance(nn.Module):
    def forward(self, images, targets):
        """Return the distances (B,) of images to targets, both (B, 3, s, s) in [0, 1]; no gradient to the targets."""
        with torch.no_grad():
            target_features = self.features(targets.detach())  # features may include the images themselves
        return self.between(self.features(images), target_features)


class Pixels(_Distance):
    """Mean absolute difference of pixels, averaged over the scales 1, 1/2, 1/4, ... down to 4 px; in [0, 1].

    Needs no download. Takes images of any side from 4 px; the last block of an odd side is smaller.
    """

    def features(self, images):
        """Return the images (B, 3, s, s) at each scale, as float32."""
        scales = [images.float()]
        while (scales[-1].shape[-1] + 1) // 2 >= COARSEST:
            scales.append(F.avg_pool2d(scales[-1], 2, ceil_mode=True))
        return scales

    def between(self, features, target_features):
        """Return the distances float32 (B * m,) from the features of B * m candidates and of B targets."""
        scales = [_difference(x, y).abs().mean((2, 3, 4)) for x, y in zip(features, target_features, strict=True)]
        return torch.stack(scales).mean(dim=0).flatten()


class Patches(Pixels):
    """Euclidean distance of 4 x 4 patches of pixels, averaged over the patches and over the scales of `Pixels`.

    In [0, 1]: of each patch the root of its mean squared difference. Unlike `Pixels` it compares the pixels of a patch
    together, so that the energy score sees whether their colors fit each other. Takes images of any side from 4 px.
    """

    def between(self, features, target_features):
        """Return the distances float32 (B * m,) from the features of B * m candidates and of B targets."""
        scales = []
        for x, y in zip(features, target_features, strict=True):
            squares = _difference(x, y).square().mean(dim=2).flatten(0, 1)  # over the colors: (B * m, s, s)
            means = F.avg_pool2d(squares[:, None], COARSEST, ceil_mode=True)
            lengths = (means + EPSILON).sqrt() - (torch.zeros_like(means) + EPSILON).sqrt()  # 0 for equal patches
            scales.append(lengths.mean((1, 2, 3)))
        return torch.stack(scales).mean(dim=0)


class LPIPS(_Distance):
    """Learned perceptual distance (Zhang et al. 2018, arXiv:1801.03924), version 0.1, plus alpha * pixel MSE.

    net: "squeeze", "alex" or "vgg".
    weights: file with torchvision's state dict of that network, complete or features only; None: download it.
    side: smaller images are first enlarged to this many pixels, bilinearly; 0: never.
    alpha: >= 0, weight of the mean squared difference of pixels in [0, 1].

    Frozen, and always in eval mode. Autocast affects the backbone only: features are normalized and compared in
    float32. Raises ValueError on other arguments and when the weights cannot be loaded.
    """

    def __init__(self, net, weights=None, side=64, alpha=0.1):
        super().__init__()
        check_side(net, side)
        if not 0 <= alpha < float("inf"):
            raise ValueError(f"alpha, the weight of the pixel error, is {alpha}: it must be 0 or more, and finite")
        model = _load_model(net, weights)
        self.net_name = net
        self.side = side
        self.alpha = alpha
        self.scaling = model.scaling_layer
        self.backbone = model.net
        for k, linear in enumerate(model.lins):
            weight = linear.model[-1].weight.detach().clamp(min=0)  # (1, C, 1, 1); LPIPS was trained with weights >= 0
            self.register_buffer(f"root{k}", weight.sqrt())
        self.requires_grad_(False).eval()

    def train(self, mode=True):
        """Stay in eval mode, also as part of a model that is trained."""
        return super().train(False)

    def features(self, images):
        """Return (B, C, H, W) for every layer, then the images. The layers' squared differences add up to LPIPS."""
        images = images.float()
        check_side(self.net_name, self.side, images.shape[-1])
        x = images
        if x.shape[-1] < self.side:
            x = F.interpolate(x, size=(self.side, self.side), mode="bilinear", align_corners=False)
        features = []
        for k, layer in enumerate(self.backbone(self.scaling(2 * x - 1))):
            features.append(_unit(layer) * self.get_buffer(f"root{k}"))
        return [*features, images]

    def between(self, features, target_features):
        """Return the distances float32 (B * m,) from the features of B * m candidates and of B targets."""
        squares = [_difference(x, y).square() for x, y in zip(features, target_features, strict=True)]
        total = self.alpha * squares[-1].mean((2, 3, 4))  # pixels
        for layer in squares[:-1]:
            total = total + layer.sum(dim=2).mean((2, 3))
        return total.flatten()


def check_side(net, side, image_side=None):
    """Raise ValueError unless `net` can process images of image_side px (None: any), enlarged to `side` (0: never)."""
    if net not in MINIMUM:
        raise ValueError(f"--distance {net}: choose {', '.join(NAMES)}")
    if side < 0 or 0 < side < MINIMUM[net]:
        raise ValueError(f"--lpips_side {side}: {net} needs {MINIMUM[net]} px or more (0 leaves images as they are)")
    if image_side is not None and max(side, image_side) < MINIMUM[net]:
        remedy = f"give --lpips_side {MINIMUM[net]} or more"
        raise ValueError(f"--lpips_side {side} leaves images at {image_side} px, too small for {net}: {remedy}")


def _load_model(net, weights):
    """Return lpips.LPIPS with trained weights. Raises ValueError where there are none."""
    try:
        import lpips  # imported here, so that `Pixels` works without it
    except ImportError as error:
        raise ValueError(f"--distance {net} needs lpips: pip install lpips, or use --distance pixels") from error
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):  # leaves the run's random state unchanged
            warnings.simplefilter("ignore")  # lpips calls torchvision with deprecated arguments
            model = lpips.LPIPS(net=net, pnet_rand=weights is not None, verbose=False)
        if weights is not None:
            _load_backbone(model.net, weights)
    except Exception as error:  # a download or a file of another origin can fail in any way
        raise ValueError(_explain(error, net, weights)) from error
    return model


def _explain(error, net, weights):
    """Return the line that tells the user why the weights could not be loaded, and the ways out."""
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    cached = Path(torch.hub.get_dir()) / "checkpoints" / FILES[net]
    start = f"--lpips_weights {weights}"
    remedy = f"put {cached.name} into {cached.parent}"
    if weights is None:
        start = f"--distance {net}: no weights of torchvision"
        if cached.exists():
            remedy = f"delete {cached}"
    others = "give --lpips_weights FILE, torchvision's state dict, or --distance pixels, which needs no download"
    return f"{start} ({reason}): {remedy}, {others}"


def _load_backbone(backbone, file):
    """Load the features of torchvision's network, strictly, into lpips' backbone, which splits them into slices."""
    # The state dict of `features`; what belongs to the classifier is not needed.
    state = {}
    for key, value in torch.load(file, map_location="cpu", weights_only=True).items():
        if not key.startswith("classifier."):
            state[key.removeprefix("features.")] = value

    # The names of the same parameters in lpips: "0.weight" -> "slice1.0.weight".
    names = {name.split(".", 1)[1]: name for name in backbone.state_dict()}
    different = sorted(state.keys() ^ names.keys())
    if different:
        raise ValueError(f"not this network: {len(different)} names are missing or extra, for example {different[0]}")
    if not all(value.isfinite().all() for value in state.values()):
        raise ValueError("it holds numbers that are not finite")
    backbone.load_state_dict({names[key]: value for key, value in state.items()})


def is_at_hand(name):
    """Return whether torchvision's weights for LPIPS on this backbone have been downloaded before."""
    return (Path(torch.hub.get_dir()) / "checkpoints" / FILES[name]).exists()


def build_distance(name, weights=None, side=64, alpha=0.1):
    """Return the distance of this name, one of NAMES; weights, side and alpha are for `LPIPS`."""
    if name == "pixels":
        return Pixels()
    if name == "patches":
        return Patches()
    return LPIPS(name, weights, side, alpha)
