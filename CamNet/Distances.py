"""Distances between images: what the search minimises over codes and the generator over its parameters.

Both are modules with one interface. `features(images)`: list of float32 tensors, of (B, 3, s, s) in [0, 1].
`between(features, target_features)`: (B,), or (B * m,) for m candidates of each of B targets, the candidate's number
running fastest; so a target's features are made once. `forward(images, targets)` does both; its gradient goes to the
images alone.
"""

import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

NAMES = ("pixels", "squeeze", "alex", "vgg")
MINIMUM = {
    "squeeze": 17,
    "alex": 31,
    "vgg": 16,
}  # the smallest side that leaves pixels after all pooling
FILES = {"squeeze": "squeezenet1_1-b8a52dc0.pth", "alex": "alexnet-owt-7be5be79.pth", "vgg": "vgg16-397923af.pth"}
COARSEST = 4  # pixels a side of the last scale of `Pixels`
EPSILON = 1e-8  # beside the squared length of features: no infinite gradient where all of them are 0


def _difference(features, target):
    """(B * m, ...) and (B, ...) -> (B, m, ...): every candidate less its target, which is not repeated in memory."""
    if len(features) % len(target):
        raise ValueError(f"{len(features)} candidates for {len(target)} targets: every target needs the same number")
    return features.unflatten(0, (len(target), -1)) - target.unsqueeze(1)


def _unit(x):
    """x (B, C, H, W) scaled to length 1 over its channels, in float32; 0 where all of them are."""
    x = x.float()
    return x * (x.square().sum(dim=1, keepdim=True) + EPSILON).rsqrt()


class _Distance(nn.Module):
    def forward(self, images, targets):
        """Return the distances (B,) of images to targets, both (B, 3, s, s) in [0, 1]; no gradient to the targets."""
        with torch.no_grad():
            target_features = self.features(targets.detach())  # of which the images may be a part
        return self.between(self.features(images), target_features)


class Pixels(_Distance):
    """Mean absolute difference of pixels, averaged over the scales 1, 1/2, 1/4, ... down to 4 px: no download needed.

    In [0, 1]. Takes any side from 4; the last block of an odd side is smaller.
    """

    def features(self, images):
        """Return the images (B, 3, s, s) at each scale, float32."""
        scales = [images.float()]
        while (scales[-1].shape[-1] + 1) // 2 >= COARSEST:
            scales.append(F.avg_pool2d(scales[-1], 2, ceil_mode=True))
        return scales

    def between(self, features, target_features):
        """Return float32 (B * m,), for features of B * m images and of B targets."""
        scales = [_difference(x, y).abs().mean((2, 3, 4)) for x, y in zip(features, target_features, strict=True)]
        return torch.stack(scales).mean(dim=0).flatten()


class LPIPS(_Distance):
    """Learned perceptual distance (Zhang et al. 2018, arXiv:1801.03924), version 0.1, plus alpha * pixel MSE.

    net: "squeeze", "alex" or "vgg"; weights: its state dict from torchvision, whole or features alone, or None for
    torchvision's download. Smaller images are first enlarged to `side` px, bilinearly; 0: never. alpha: >= 0, beside
    squared differences of values in [0, 1]. Frozen and in eval mode for good. Autocast reaches the backbone alone: unit
    length and distance are float32. Raises ValueError on other values and when the weights cannot be had.
    """

    def __init__(self, net, weights=None, side=64, alpha=0.1):
        super().__init__()
        check_side(net, side)
        if not 0 <= alpha < float("inf"):
            raise ValueError(f"alpha, the weight of the pixel error, is {alpha}: it must be 0 or more, and finite")
        model = _load_model(net, weights)
        self.net_name, self.side, self.alpha = net, side, alpha
        self.scaling, self.backbone = model.scaling_layer, model.net
        for k, linear in enumerate(model.lins):  # at least 0, by lpips' training
            self.register_buffer(f"root{k}", linear.model[-1].weight.detach().clamp(min=0).sqrt())  # (1, C, 1, 1)
        self.requires_grad_(False).eval()

    def train(self, mode=True):
        """Stay in eval mode, also as a part of a model that trains."""
        return super().train(False)

    def features(self, images):
        """Return for every layer (B, C, H, W), whose squared differences add up to LPIPS, and the images themselves."""
        images = images.float()
        check_side(self.net_name, self.side, images.shape[-1])
        x = images
        if x.shape[-1] < self.side:
            x = F.interpolate(x, size=(self.side, self.side), mode="bilinear", align_corners=False)
        layers = self.backbone(self.scaling(2 * x - 1))
        return [_unit(layer) * self.get_buffer(f"root{k}") for k, layer in enumerate(layers)] + [images]

    def between(self, features, target_features):
        """Return float32 (B * m,), for features of B * m images and of B targets."""
        *layers, pixels = [_difference(x, y).square() for x, y in zip(features, target_features, strict=True)]
        total = self.alpha * pixels.mean((2, 3, 4))
        for layer in layers:
            total = total + layer.sum(dim=2).mean((2, 3))
        return total.flatten()


def check_side(net, side, image_side=None):
    """Raise ValueError unless `net` can look at images of image_side px (None: any) that `side` enlarges (0: never)."""
    if net not in MINIMUM:
        raise ValueError(f"--distance {net}: choose {', '.join(NAMES)}")
    if side < 0 or 0 < side < MINIMUM[net]:
        raise ValueError(f"--lpips_side {side}: {net} needs {MINIMUM[net]} px or more (0 leaves images as they are)")
    if image_side is not None and max(side, image_side) < MINIMUM[net]:
        remedy = f"give --lpips_side {MINIMUM[net]} or more"
        raise ValueError(f"--lpips_side {side} leaves images at {image_side} px, too small for {net}: {remedy}")


def _load_model(net, weights):
    """Return lpips.LPIPS with trained weights, or raise ValueError: never with random ones."""
    try:
        import lpips  # here, so that `Pixels` works without it
    except ImportError as error:
        raise ValueError(f"--distance {net} needs lpips: pip install lpips, or use --distance pixels") from error
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):  # the run's random numbers are not ours
            warnings.simplefilter("ignore")  # lpips asks torchvision in a way that is out of date
            model = lpips.LPIPS(net=net, pnet_rand=weights is not None, verbose=False)
        if weights is not None:
            _load_backbone(model.net, weights)
    except Exception as error:  # a download and a foreign file can fail in any way; all of them end here
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        kept = Path(torch.hub.get_dir()) / "checkpoints" / FILES[net]
        start = f"--distance {net}: no weights of torchvision" if weights is None else f"--lpips_weights {weights}"
        remedy = f"delete {kept}" if weights is None and kept.exists() else f"put {kept.name} into {kept.parent}"
        others = "give --lpips_weights FILE, torchvision's state dict, or --distance pixels, which needs no download"
        raise ValueError(f"{start} ({reason}): {remedy}, {others}") from error
    return model


def _load_backbone(backbone, file):
    """Load the features of torchvision's network, strictly, into lpips' backbone, which holds them in slices."""
    state = torch.load(file, map_location="cpu", weights_only=True)
    state = {key.removeprefix("features."): value for key, value in state.items() if not key.startswith("classifier.")}
    names = {name.split(".", 1)[1]: name for name in backbone.state_dict()}  # "0.weight" -> "slice1.0.weight"
    if state.keys() != names.keys():
        strangers = sorted(state.keys() ^ names.keys())
        raise ValueError(f"not this network: {len(strangers)} names are missing or too many, {strangers[0]} among them")
    if not all(value.isfinite().all() for value in state.values()):
        raise ValueError("it holds numbers that are not finite")
    backbone.load_state_dict({names[key]: value for key, value in state.items()})


def build_distance(name, weights=None, side=64, alpha=0.1):
    """Return the distance `name`: "pixels", or `LPIPS` on "squeeze", "alex" or "vgg" with the other arguments."""
    return Pixels() if name == "pixels" else LPIPS(name, weights, side, alpha)
