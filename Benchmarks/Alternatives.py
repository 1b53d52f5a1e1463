"""Common implementations of augmentation and training step, which Benchmarks/Speed.py compares with ours."""

import contextlib
from functools import partial

import torch
from torch import nn
from torch.utils.data import DataLoader, RandomSampler
from torchvision import transforms

import Flags
from Backbones import ContrastiveNet, build_head
from Losses import nt_xent


def torchvision_transform(t, views, last):
    """Return the per-image transform of module t (transforms or transforms.v2) with an `Augmentation`'s parameters."""
    crop = t.RandomResizedCrop(views.size, views.crop_scale, views.crop_ratio)
    jitter = t.RandomApply([t.ColorJitter(*views.jitter)], views.jitter_p)
    return t.Compose([crop, t.RandomHorizontalFlip(views.flip_p), jitter, t.RandomGrayscale(views.gray_p), last])


def kornia_transform(K, views, mode):
    """Return the same of kornia.augmentation for float batches, with parameters drawn for each image."""
    crop = K.RandomResizedCrop((views.size, views.size), views.crop_scale, views.crop_ratio, cropping_mode=mode)
    jitter = K.ColorJitter(*views.jitter, p=views.jitter_p)
    return nn.Sequential(crop, K.RandomHorizontalFlip(p=views.flip_p), jitter, K.RandomGrayscale(p=views.gray_p))


class PlainLoop:
    """A step of the plain loop: a DataLoader whose workers augment PIL images one by one, fp32, SGD."""

    def __init__(self, flags, split, device, workers):
        encoder = Flags.encoder_for(flags)
        head = build_head(encoder.num_features, flags.proj_hidden, flags.proj_dim, flags.proj_norm)
        self.net = ContrastiveNet(encoder, head).to(device)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.06)
        self.temperature = flags.temp
        self.device = device
        self.stream = None
        transform = torchvision_transform(transforms, Flags.augmentation_for(flags), transforms.ToTensor())
        pictures = [transforms.functional.to_pil_image(image) for image in split.images]
        self.loader = DataLoader(
            pictures,
            flags.bs,
            sampler=RandomSampler(pictures, replacement=True, num_samples=2**31),  # one endless epoch
            num_workers=workers,
            collate_fn=partial(two_views, transform=transform),
            drop_last=True,
        )

    @contextlib.contextmanager
    def running(self):
        """Run the workers, but only while this variant is measured. Their first batches, made before, are discarded."""
        self.stream = iter(self.loader)
        for _ in range(self.loader.prefetch_factor * self.loader.num_workers):
            next(self.stream)
        yield
        self.stream = None

    def __call__(self):
        first, second = next(self.stream)
        self.optimizer.zero_grad()
        nt_xent(self.net(first.to(self.device)), self.net(second.to(self.device)), self.temperature).backward()
        self.optimizer.step()


def two_views(pictures, transform):
    """Return two float batches of views of PIL images: what a worker of the plain loop does."""
    return [torch.stack([transform(picture) for picture in pictures]) for _ in range(2)]
