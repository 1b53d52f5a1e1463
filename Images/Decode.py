"""Image files of any kind as uint8 tensors of one size, singly or in batches by worker processes."""

import contextlib
import errno
import functools
import signal
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError
from torch.utils.data import DataLoader, get_worker_info

from Distributed import notice
from Utils import UserError, shown

# The only formats that Pillow may decode, and the endings of their files. Its other decoders are not reached, whatever
# a file is called: one of them starts Ghostscript.
FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "AVIF": (".avif", ".avifs"),
    "JPEG2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
}
SUFFIXES = frozenset(suffix for suffixes in FORMATS.values() for suffix in suffixes)

warnings.filterwarnings("ignore", module="PIL")  # mostly about EXIF blocks; what makes a file bad raises an error
PngImagePlugin.MAX_TEXT_CHUNK = 2**26  # bytes of a text or color profile: beyond Pillow's 1 MiB the pixels are refused

# transpositions by the value of the EXIF tag less 2
TURNS = ["FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90"]
BITS_PER_SAMPLE = 258  # a TIFF tag
MORE_SHM = "in Docker: docker run --shm-size=1g"


@functools.cache
def readable():
    """Return the FORMATS that the installed Pillow has: an older one lacks some."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


class BadFile(UserError):
    """A file that cannot be decoded; args: its path, the reason, and optionally the remedy."""

    def __str__(self):
        path, reason, *remedy = self.args
        remedy = remedy[0] if remedy else "repair or remove it, or pass --skip_bad"
        return f"{shown(path)}: {reason}: {remedy}"


def _to_8_bit(image):
    """Return an image of integers as mode L, or LA where one of its values stands for transparent.

    ValueError where the range of the integers is not known.
    """
    if image.mode == "I" and image.format not in ("PPM", "PNG"):  # those two have at most 16 bits, which Pillow scales
        raise ValueError("32-bit integer pixels, whose range is not known")
    bits = 16
    if image.format == "TIFF":
        bits = image.tag_v2.get(BITS_PER_SAMPLE, (16,))[0]
    values = np.asarray(image).astype(np.int64)
    largest = 2**bits - 1
    gray = Image.fromarray(((values * 255 + largest // 2) // largest).astype(np.uint8))
    clear = image.info.get("transparency")
    if clear is not None:
        gray.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return gray


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


def _orientation(image):
    """Return the EXIF orientation, 1 to 8; 1, upright, where there is none that can be read."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow raises nearly anything on a malformed block, and the pixels are fine
        return 1
    return value if isinstance(value, int) and 2 <= value <= 8 else 1


def _center_box(lengths, size):
    """Return the square (left, top, right, bottom) that torchvision's Resize and CenterCrop show, in source pixels."""
    near = []
    far = []
    for length in lengths:
        resized = int(size * length / min(lengths))
        start = round((resized - size) / 2)
        near.append(start * length / resized)
        far.append(min((start + size) * length / resized, length))
    return (*near, *far)


def _pixels(path, size):
    """Do what decode() does, and raise whatever Pillow raises."""
    with Image.open(path, formats=readable()) as image:
        image.draft(None, (4 * size, 4 * size))
        image.load()
        orientation = _orientation(image)
        image = _to_rgb(image)
    if orientation > 1:
        image = image.transpose(Image.Transpose[TURNS[orientation - 2]])
    if image.size != (size, size):
        # only the square is resized: the strips outside it would cost time, and a very long image memory
        box = _center_box(image.size, size)
        image = image.resize((size, size), Image.Resampling.BILINEAR, box, reducing_gap=3.0)
    return torch.from_numpy(np.array(image).transpose(2, 0, 1).copy())


def decode(path, size):
    """Return the first frame of an image file, upright, its center square resized: uint8 (3, size, size).

    Reductions are antialiased; an image of size x size is not resampled; large JPEGs are decoded at a fraction. Raises
    BadFile if it fails.
    """
    try:
        return _pixels(path, size)
    except UnidentifiedImageError:
        empty = not Path(path).stat().st_size
        reason = "empty file" if empty else f"not an image that can be read ({', '.join(readable())})"
    except Exception as error:  # Pillow's decoders raise nearly anything on a broken file
        if isinstance(error, MemoryError) or getattr(error, "errno", 0) in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
    raise BadFile(str(path), shown(reason))


def _hand_over(item):
    """Prepare an item of Files for sending it from a worker.

    Images travel in shared memory. Where /dev/shm is full, as in a container with Docker's 64 MB, they are sent through
    a pipe, as an array: torch would find it full in another thread, and the item would never arrive.
    """
    indices, images, bad = item
    if get_worker_info() is not None:
        try:
            images.share_memory_()
        except RuntimeError:
            images = images.numpy()
    return indices, images, bad


@contextlib.contextmanager
def _silent_destructors():
    """Let errors of destructors go unsaid: that of torch's loader fails where its constructor has failed."""
    before = sys.unraisablehook
    sys.unraisablehook = lambda _: None
    try:
        yield
    finally:
        sys.unraisablehook = before


def _items(loader):
    """Yield the items of a DataLoader. UserError where its workers cannot be started, or one fails or is killed."""
    before = signal.getsignal(signal.SIGCHLD)
    try:
        items = iter(loader)
        if loader.num_workers and threading.current_thread() is threading.main_thread():
            # torch's handler reports a killed worker by an error in whatever line is running, as in the middle of a
            # save; without it the next item raises the same error, within 5 seconds
            signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)
        yield from items
        return
    except (RuntimeError, OSError, MemoryError) as error:
        if not loader.num_workers:
            raise
        reason = shown(str(error).strip().splitlines()[-1])
        with _silent_destructors():
            error.__traceback__ = None  # the last that knows of a loader that could not be made whole
    # raised here, and not above, so that nothing holds the torch error's frames: the other workers end first
    items = None
    remedy = f"there is too little memory for --n_workers {loader.num_workers}: pass fewer, or --n_workers 0"
    raise UserError(f"a process that decodes images failed ({reason}): likely {remedy}; {MORE_SHM}")


@functools.cache
def notice_full_shm():
    """Print once that images are read in another way than through shared memory."""
    notice(f"/dev/shm is full, so that images are read more slowly: {MORE_SHM}, or pass --n_workers 0")


class Files:
    """A data set with one item for a list of indices: (those that decode, their images, {index: reason} of others)."""

    def __init__(self, paths, size):
        self.paths = paths
        self.size = size

    def __getitem__(self, indices):
        kept = []
        images = []
        bad = {}
        for index in indices:
            try:
                images.append(decode(self.paths[index], self.size))
                kept.append(index)
            except BadFile as error:  # raised in the main process: from a worker it would come as a long traceback
                bad[index] = error.args[1]
        if not images:
            return kept, torch.empty(0, 3, self.size, self.size, dtype=torch.uint8), bad
        return kept, torch.stack(images), bad

    def load(self, index_batches, n_workers, pin_memory=False):
        """Yield (indices int64 (b,), images uint8 (b, 3, S, S), {index: reason}) of each tensor of indices, in order.

        UserError where the workers cannot be started, or one of them fails or is killed.
        """
        readable()  # here, once, and not in every worker
        # what Python 3.14 does otherwise imports torch in every worker, which takes seconds
        start_method = "fork" if n_workers and sys.platform == "linux" else None
        loader = DataLoader(
            self,
            sampler=(batch.tolist() for batch in index_batches),
            batch_size=None,
            num_workers=n_workers,
            multiprocessing_context=start_method,
            collate_fn=_hand_over,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # the loader draws a seed, which must not change training's random numbers
        )
        for indices, images, bad in _items(loader):
            if isinstance(images, np.ndarray):
                notice_full_shm()
                images = torch.from_numpy(images)
                if pin_memory:
                    images = images.pin_memory()
            yield torch.tensor(indices, dtype=torch.int64), images, bad
