"""The images of a split: uint8, in memory or decoded for every batch, with labels and the names of the classes."""

import hashlib

import torch

from Images.Decode import BadFile, Files
from Utils import UserError

FINGERPRINTED = 256  # images, at most, whose pixels a fingerprint covers


class _Images:
    """What splits in memory and streamed ones share."""

    _fingerprint = None

    def fingerprint(self):
        """Return a hash of the number, size and labels of the images, and of the pixels of 256, evenly spaced.

        It is the same in memory and streamed, on every device, and wherever the files lie. It is computed once.
        """
        if self._fingerprint is None:
            self._fingerprint = self._hash()
        return self._fingerprint

    def _hash(self):
        n_picked = min(len(self), FINGERPRINTED)
        picked = torch.arange(n_picked) * len(self) // max(n_picked, 1)
        digest = hashlib.sha256(f"{len(self)} {self.size}".encode())
        digest.update(self.labels.numpy().tobytes())
        for _, images in self.batches(picked.split(32)):
            digest.update(images.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


class Split(_Images):
    """Images in memory: images uint8 (N, 3, S, S), labels int64 (N,) with -1 = unlabeled, the classes' names."""

    def __init__(self, images, labels, classes, name=""):
        """ValueError where shapes, types or labels do not fit. The labels stay on the CPU."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images: uint8 (N, 3, H, W) expected, not {images.dtype} {tuple(images.shape)}")
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise ValueError(f"labels: int64 ({len(images)},) expected, not {labels.dtype} {tuple(labels.shape)}")
        if len(labels) and not -1 <= labels.min() <= labels.max() < len(classes):
            raise ValueError(f"labels: -1 to {len(classes) - 1} expected, not {labels.min()} to {labels.max()}")
        self.images = images
        self.labels = labels.cpu()
        self.classes = list(classes)
        self.name = name

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
            message = f"{self.name}: {self.images.nbytes:,} bytes of images do not fit on {device}"
            raise UserError(f"{message}: use --storage stream") from error
        return Split(images, self.labels, self.classes, self.name)

    def batches(self, index_batches, device="cpu"):
        """Yield (indices, their images uint8 (B, 3, S, S) on the device) of each int64 CPU tensor (B,) of indices."""
        device = torch.device(device)
        index_batches = list(index_batches)
        if not index_batches:
            return

        # all indices where the images are, by one copy that does not wait
        rows = torch.cat(index_batches)
        if self.images.is_cuda:
            rows = rows.pin_memory()
        rows = rows.to(self.images.device, non_blocking=self.images.is_cuda)

        for indices, part in zip(index_batches, rows.split([len(each) for each in index_batches])):
            images = self.images.index_select(0, part)
            if device.type == "cuda" and not images.is_cuda:
                images = images.pin_memory()
            # a copy to the CPU that does not block could be read before it has ended
            yield indices, images.to(device, non_blocking=device.type == "cuda")


class StreamedSplit(_Images):
    """Image files decoded for every batch: a Split without .images. All its files could be decoded when it was made."""

    def __init__(self, listing, size, n_workers=2, name=""):
        self.files = Files(listing.paths, size)
        self.labels = listing.labels.clone()
        self.classes = listing.classes
        self.size = size
        self.n_workers = n_workers
        self.name = name

    def __len__(self):
        return len(self.labels)

    def to(self, device):
        """Return itself: images are decoded for each batch, so there is nothing to move."""
        return self

    def batches(self, index_batches, device="cpu"):
        """Yield what Split's does. BadFile where a file has been damaged or removed since the start."""
        device = torch.device(device)
        for indices, images, bad in self.files.load(index_batches, self.n_workers, device.type == "cuda"):
            if bad:
                index = min(bad)
                remedy = "it was read at the start: put it back as it was, then start again with --resume auto"
                raise BadFile(self.files.paths[index], bad[index], remedy)
            yield indices, images.to(device, non_blocking=True)
