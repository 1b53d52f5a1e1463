"""The images of a split: uint8, in memory or decoded for every batch, with labels and the names of the classes."""

import hashlib
import sys

import torch

from Images.Decode import BadFile, Files, shown
from Utils import UserError


class _Fingerprint:
    def fingerprint(self, most=256):
        """Return a hash of the number of images, of their labels and of the pixels of some, evenly spaced."""
        rows = torch.arange(0, len(self), max(1, len(self) // most))
        digest = hashlib.sha256(str(len(self)).encode())
        digest.update(self.labels.numpy().tobytes())
        for _, images in self.batches(rows.split(most), "cpu"):
            digest.update(images.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


class Split(_Fingerprint):
    """Images in memory: images uint8 (N, 3, S, S), labels int64 (N,) with -1 = unlabelled, the classes' names."""

    def __init__(self, images, labels, classes, name=""):
        """ValueError where shapes, types or labels do not fit. The labels stay on the CPU."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images: uint8 (N, 3, H, W) expected, not {images.dtype} {tuple(images.shape)}")
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise ValueError(f"labels: int64 ({len(images)},) expected, not {labels.dtype} {tuple(labels.shape)}")
        if len(labels) and not -1 <= labels.min() <= labels.max() < len(classes):
            raise ValueError(f"labels: -1 to {len(classes) - 1} expected, not {labels.min()} to {labels.max()}")
        self.images, self.labels, self.classes, self.name = images, labels.cpu(), list(classes), name

    def __len__(self):
        return len(self.images)

    @property
    def size(self):
        """Return the height of the images in pixels."""
        return self.images.shape[2]

    def to(self, device):
        """Return the split with its images on the device. UserError where its memory does not hold them."""
        try:
            images = self.images.to(device)
        except torch.OutOfMemoryError as error:
            message = (
                f"{self.name}: {self.images.nbytes:,} bytes of images do not fit on {device}: use --storage stream"
            )
            raise UserError(message) from error
        return Split(images, self.labels, self.classes, self.name)

    def batches(self, index_batches, device="cpu"):
        """Yield (indices, their images uint8 (B, 3, S, S) on the device) of each int64 CPU tensor (B,) of indices."""
        device = torch.device(device)
        for indices in index_batches:
            images = self.images.index_select(0, indices.to(self.images.device, non_blocking=True))
            if device.type == "cuda" and not images.is_cuda:
                images = images.pin_memory()
            # a copy to the CPU that does not block could be read before it is there
            yield indices, images.to(device, non_blocking=device.type == "cuda")


class StreamedSplit(_Fingerprint):
    """Image files decoded for every batch: a Split without .images. Its length counts the bad files as well."""

    def __init__(self, listing, size, n_workers=2, skip_bad=False, name=""):
        self.labels, self.classes, self.size, self.name = listing.labels.clone(), listing.classes, size, name
        self.files, self.n_workers, self.skip_bad, self.bad = Files(listing.paths, size), n_workers, skip_bad, {}

    def __len__(self):
        return len(self.labels)

    def to(self, device):
        """Return itself: its images are nowhere."""
        return self

    def batches(self, index_batches, device="cpu"):
        """Yield what Split's does. Bad files are an error (BadFile); with skip_bad they are left out of the batch.

        They are then noted in .bad, and their labels become -1. A batch of which nothing is left is left out.
        """
        device = torch.device(device)
        for indices, images, bad in self.files.load(index_batches, self.n_workers, device.type == "cuda"):
            for index, reason in bad.items():
                error = BadFile(self.files.paths[index], reason)
                if not self.skip_bad:
                    raise error
                if not self.bad:
                    first = f"the first: {shown(error.args[0])}: {reason}"
                    print(f"{self.name}: files that cannot be decoded are left out, {first}", file=sys.stderr)
                self.bad[index], self.labels[index] = reason, -1
            if len(indices):
                yield indices, images.to(device, non_blocking=True)
