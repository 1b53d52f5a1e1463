"""Encoders and the projection head: images (B, 3, H, W) in [0, 1] -> features (B, F) -> projections (B, D)."""

from torch import nn
from torchvision.models import resnet
from torchvision.models.resnet import BasicBlock


class ResNet8(nn.Module):
    """A residual net of 3 stages that a CPU trains on 32-pixel images in minutes: stride-2 stem, widths 32, 64, 128.

    The layers are torchvision's; 0.3 million weights, 128 features.
    """

    def __init__(self, width=32):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        self.stages = nn.Sequential(
            BasicBlock(width, width),
            self._down(width, 2 * width),
            self._down(2 * width, 4 * width),
        )
        self.num_features = 4 * width
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _down(width, out):
        shortcut = nn.Sequential(nn.Conv2d(width, out, 1, stride=2, bias=False), nn.BatchNorm2d(out))
        return BasicBlock(width, out, stride=2, downsample=shortcut)

    def forward(self, x):
        """Return features (B, 4 width) of images (B, 3, H, W)."""
        return self.stages(self.stem(x)).mean(dim=(2, 3))


def _torchvision(build):
    def make(small_stem):
        encoder = build(weights=None)
        encoder.num_features = encoder.fc.in_features
        encoder.fc = nn.Identity()
        if small_stem:
            encoder.conv1 = nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False)
            nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")
            encoder.maxpool = nn.Identity()
        return encoder

    return make


BACKBONES = {
    "resnet8": lambda small_stem: ResNet8(),
    "resnet18": _torchvision(resnet.resnet18),
    "resnet34": _torchvision(resnet.resnet34),
    "resnet50": _torchvision(resnet.resnet50),
}


def build_encoder(name, small_stem):
    """Return an encoder with an attribute `features`, the length F of its output.

    name: a key of BACKBONES. small_stem: for torchvision's nets, a 3x3 stride-1 stem without max-pool (SimCLR,
    appendix B.9), for images of up to about 64 pixels; the 7x7 stem throws three quarters of such an image away.
    """
    return BACKBONES[name](small_stem)


def build_head(features, hidden, dim, norm=True):
    """Return the projection head g of SimCLR: Linear, BatchNorm if `norm`, ReLU, Linear: (B, features) -> (B, dim)."""
    middle = [nn.BatchNorm1d(hidden)] if norm else []
    return nn.Sequential(
        nn.Linear(features, hidden, bias=not norm), *middle, nn.ReLU(inplace=True), nn.Linear(hidden, dim)
    )


class ContrastiveNet(nn.Module):
    """Encoder f, which is kept, and projection head g, which is thrown away after training."""

    def __init__(self, encoder, head):
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, x):
        """Return projections (B, D) of images (B, 3, H, W)."""
        return self.head(self.encoder(x))


def count_parameters(module):
    """Return the number of trainable numbers in a module."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)
