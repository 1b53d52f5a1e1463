"""Image files of any kind as uint8 tensors of one size, singly or in batches by worker processes."""

import errno
import os
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch.utils.data import DataLoader

from Utils import UserError

# transpositions by the value of the EXIF tag less 2
TURNS = ["FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90"]


class BadFile(UserError):
    """A file that cannot be decoded; args: its path and the reason."""

    def __str__(self):
        path, reason = self.args
        return f"{shown(path)}: {reason}: repair or remove it, or pass --skip_bad"


def shown(path):
    """Return the path as one line that any terminal can print, also where its name is no valid text."""
    return os.fsencode(path).decode("utf-8", "replace").replace("\n", "?")


def _to_8_bit(image):
    """Return a greyscale image of 16 bits a pixel as mode L, or LA where one of its values stands for transparent."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("32-bit pixels, whose range is not known")
    clear = image.info.get("transparency")
    grey = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    if clear is not None:
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return grey


def _to_rgb(image):
    """Return a loaded image as RGB, transparent parts over white. ValueError for modes without a fixed range."""
    if image.mode == "F":
        raise ValueError("floating-point pixels, whose range is not known")
    if image.mode.startswith("I"):
        image = _to_8_bit(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _centre_box(lengths, size):
    """Return the square (left, top, right, bottom) that torchvision's Resize and CenterCrop show, in source pixels."""
    resized = [int(size * length / min(lengths)) for length in lengths]
    starts = [round((length - size) / 2) for length in resized]
    near = [start * length / new for start, length, new in zip(starts, lengths, resized)]
    far = [min((start + size) * length / new, length) for start, length, new in zip(starts, lengths, resized)]
    return (*near, *far)


def _pixels(path, size):
    """Do what decode() does, and raise whatever PIL raises."""
    with Image.open(path) as image:
        image.draft(None, (4 * size, 4 * size))
        image.load()
        turn = image.getexif().get(ExifTags.Base.Orientation, 1)
        image = _to_rgb(image)
    if turn in range(2, 9):
        image = image.transpose(Image.Transpose[TURNS[turn - 2]])
    if image.size != (size, size):
        # only the square is resized: the strips beside it would cost time, and a very long image its memory
        box = _centre_box(image.size, size)
        image = image.resize((size, size), Image.Resampling.BILINEAR, box, reducing_gap=3.0)
    return torch.from_numpy(np.array(image).transpose(2, 0, 1).copy())


def decode(path, size):
    """Return the first frame of an image file, upright, its centre square resized: uint8 (3, size, size).

    Reductions are antialiased; an image of size x size is not resampled; large JPEGs are decoded at a fraction. Raises
    BadFile if it fails.
    """
    try:
        return _pixels(path, size)
    except UnidentifiedImageError:
        reason = "empty file" if not Path(path).stat().st_size else "not an image that Pillow can read"
    except Exception as error:  # PIL's decoders raise nearly anything on a broken file
        if isinstance(error, MemoryError) or getattr(error, "errno", 0) in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
    raise BadFile(str(path), reason)


class Files:
    """A data set of which a list of indices is one item: (those that decode, their images, {index: reason})."""

    def __init__(self, paths, size):
        self.paths, self.size = paths, size

    def __getitem__(self, indices):
        images, bad = {}, {}
        for index in indices:
            try:
                images[index] = decode(self.paths[index], self.size)
            except BadFile as error:  # raised in the main process: from a worker it would come as a long traceback
                bad[index] = error.args[1]
        kept = [index for index in indices if index in images]
        pixels = [images[index] for index in kept] or [torch.empty(3, self.size, self.size, dtype=torch.uint8)]
        return torch.tensor(kept, dtype=torch.int64), torch.stack(pixels)[: len(kept)], bad

    def load(self, index_batches, n_workers, pin_memory=False):
        """Return the items of an iterable of index tensors, in its order."""
        batches = (batch.tolist() for batch in index_batches)
        # its own generator: the loader draws a seed, which must not move the random numbers of the training
        options = {"num_workers": n_workers, "pin_memory": pin_memory, "generator": torch.Generator()}
        return DataLoader(self, sampler=batches, batch_size=None, **options)
