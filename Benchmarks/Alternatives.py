"""Common implementations of augmentation and training step, which Benchmarks/Speed.py compares with ours."""

import contextlib
from functools import partial
from importlib import import_module

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
        self.device = device
        self.stream = None
        encoder = Flags.encoder_for(flags)
        self.net = ContrastiveNet(encoder, self.head(flags, encoder.num_features)).to(device)
        self.loss = self.loss_function(flags)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.06)
        pictures = [transforms.functional.to_pil_image(image) for image in split.images]
        self.loader = DataLoader(
            pictures,
            flags.bs,
            sampler=RandomSampler(pictures, replacement=True, num_samples=2**31),  # one endless epoch
            num_workers=workers,
            collate_fn=partial(two_views, make=self.views(flags)),
            drop_last=True,
        )

    def head(self, flags, features):
        """Return the projection head."""
        return build_head(features, flags.proj_hidden, flags.proj_dim, flags.proj_norm)

    def loss_function(self, flags):
        """Return the loss of two batches of projections."""
        return partial(nt_xent, temperature=flags.temp)

    def views(self, flags):
        """Return a function that makes two float views of a PIL image."""
        transform = torchvision_transform(transforms, Flags.augmentation_for(flags), transforms.ToTensor())
        return partial(twice, transform)

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
        self.loss(self.net(first.to(self.device)), self.net(second.to(self.device))).backward()
        self.optimizer.step()


LIGHTLY = "lightly==1.6.0 lightning-utilities"  # the second is what the first needs here


class LightlyLoop(PlainLoop):
    """The same loop with the transform, the projection head and the loss of the package lightly."""

    def head(self, flags, features):
        return import_module("lightly.models.modules").SimCLRProjectionHead(features, flags.proj_hidden, flags.proj_dim)

    def loss_function(self, flags):
        return import_module("lightly.loss").NTXentLoss(flags.temp)

    def views(self, flags):
        ours = Flags.augmentation_for(flags)
        brightness, contrast, saturation, hue = ours.jitter
        return import_module("lightly.transforms").SimCLRTransform(
            input_size=ours.size,
            cj_prob=ours.jitter_p,
            cj_bright=brightness,
            cj_contrast=contrast,
            cj_sat=saturation,
            cj_hue=hue,
            min_scale=ours.crop_scale[0],
            random_gray_scale=ours.gray_p,
            gaussian_blur=ours.blur_p,
            hf_prob=ours.flip_p,
            normalize=None,
        )


def twice(transform, picture):
    """Return two random views of a PIL image."""
    return [transform(picture), transform(picture)]


def two_views(pictures, make):
    """Return two float batches of views of PIL images: what a worker of the plain loop does."""
    pairs = [make(picture) for picture in pictures]
    return [torch.stack(views) for views in zip(*pairs)]
