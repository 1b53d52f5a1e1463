"""The bank: K restorations of every training image, made once, so that a synthetic view costs no more than a lookup.

On disk it is NAME.npy, uint8 (N, K, 3, H, W) in the order of the train split, which NumPy reads as it is, and beside it
NAME.npy.json, what it was made from. While it is being filled they are NAME.npy.part and NAME.npy.part.json, and the
second says how far it is.
"""

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from CamNet.Codes import Purpose, make_keys

SAVED_EVERY = 20.0  # seconds between two notes of how far the filling is


def fingerprint(state):
    """Return a hash of a state dict: of names, shapes and every number."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def fingerprint_array(images, most=256):
    """Return a hash of some rows, evenly spaced, and of the shape of an array or memory map."""
    digest = hashlib.sha256(str(images.shape).encode())
    digest.update(np.ascontiguousarray(images[:: max(1, len(images) // most)]).tobytes())
    return digest.hexdigest()[:8]


def fingerprint_images(split, most=256):
    """Return a hash of some images of a split, evenly spaced, and of their number."""
    rows = torch.arange(0, len(split), max(1, len(split) // most))
    digest = hashlib.sha256(str(len(split)).encode())
    for _, images in split.batches(rows.split(most), "cpu"):
        digest.update(images.contiguous().numpy().tobytes())
    return digest.hexdigest()


def read(file, n, size):
    """Return an .npy of positives, uint8 (n, K, 3, size, size), as a read-only memory map. ValueError if it is no such
    file or of another shape or type."""
    try:
        images = np.load(file, mmap_mode="r")
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--bank {file}: no array that NumPy can read ({reason}): save one by numpy.save") from error
    if images.dtype != np.uint8 or images.ndim != 5 or images.shape[0] != n or images.shape[2:] != (3, size, size):
        wanted = f"uint8 ({n}, K, 3, {size}, {size}), in the order of the train split"
        raise ValueError(f"--bank {file}: {images.dtype} {images.shape}, but needed is {wanted}")
    return images


def fill(file, generator, split, k, seed, device, autocast=contextlib.nullcontext, *, bs=256, quiet=True):
    """Fill `file` with k restorations of every image of the split, or go on where an interrupted call stopped.

    The codes follow from seed, image and number alone. autocast: makes the context that the generator runs in.
    Returns whether anything was to be done. ValueError if the file was made from something else (generator, corruption,
    k, seed or data), or if the disk is full.
    """
    file, shape = Path(file), (len(split), k, 3, split.size, split.size)
    made_from = {"generator": fingerprint(generator.state_dict()), **generator.config, "k": k, "seed": seed}
    made_from |= {"data": fingerprint_images(split), "shape": list(shape)}
    note, part, part_note = (file.with_name(file.name + end) for end in (".json", ".part", ".part.json"))
    if file.exists():
        _check(file, note, made_from)
        return False
    done = 0
    if part.exists() and part_note.exists():
        _check(part, part_note, made_from)
        done = json.loads(part_note.read_text())["done"]
    try:
        images = _open(part, shape, done)
        _write_note(part_note, made_from | {"done": done})
        saved, start = time.monotonic(), done
        bar = tqdm(desc="bank", total=len(split), initial=done, unit="image", disable=quiet)
        with bar:
            for rows, x in split.batches(torch.arange(start, len(split)).split(bs), device):
                images[rows.numpy()] = restore(generator, x, rows, k, seed, autocast).cpu().numpy()
                bar.update(len(rows))
                if time.monotonic() - saved > SAVED_EVERY:
                    images.flush()
                    _write_note(part_note, made_from | {"done": int(rows[-1]) + 1})
                    saved = time.monotonic()
        images.flush()
        _write_note(note, made_from)
        part.replace(file)
        part_note.unlink()
    except OSError as error:
        raise ValueError(f"cannot write the bank {part}: {error}: free space there, then start again") from error
    return True


@torch.inference_mode()
def restore(generator, images, rows, k, seed, autocast=contextlib.nullcontext):
    """Return uint8 (b, k, 3, S, S): k restorations of images uint8 (b, 3, S, S), the `rows` (b,) of the train split."""
    keys = make_keys(seed, Purpose.BANK, rows).to(images.device)
    condition = generator.corruption(images, keys)
    columns = []
    for index in range(k):
        with autocast():
            sample = generator.sample(condition, make_keys(keys, index))
        columns.append(to_uint8(sample))
    return torch.stack(columns, dim=1)


def to_uint8(images):
    """Return images of any shape in [0, 1] as uint8."""
    return (255 * images.float()).round_().clamp_(0, 255).byte()


def _open(part, shape, done):
    """Return the array in the file as a memory map; its whole room is taken at once, so that a full disk shows now."""
    if done:
        return np.lib.format.open_memmap(part, mode="r+")
    try:
        images = np.lib.format.open_memmap(part, mode="w+", dtype=np.uint8, shape=shape)
        with part.open("r+b") as handle:
            os.posix_fallocate(handle.fileno(), 0, os.fstat(handle.fileno()).st_size)
    except OSError:
        part.unlink(missing_ok=True)
        raise
    return images


def _check(file, note, made_from):
    try:
        before = json.loads(note.read_text())
    except (OSError, ValueError):
        before = {}
    different = [name for name, value in made_from.items() if before.get(name) != value]
    if different:
        raise ValueError(f"{file} was made from another {', '.join(different)}: delete it, or use another folder")


def _write_note(note, content):
    scratch = note.with_name(note.name + ".tmp")
    scratch.write_text(json.dumps(content) + "\n")
    scratch.replace(note)


class Bank:
    """Restorations uint8 (N, K, 3, H, W), on a device or as a memory map, from which views are picked."""

    def __init__(self, images, device, on_device):
        """images: a NumPy array or memory map. on_device: copy them to the device, or leave them where they are."""
        if on_device:
            images = torch.from_numpy(np.array(images)).to(device)
        self.images = images
        self.device = torch.device(device)
        self.k = images.shape[1]

    def __len__(self):
        return len(self.images)

    def take(self, rows, columns):
        """Return uint8 (b, c, 3, H, W) on the device: columns (b, c) of the restorations of rows (b,), both int64."""
        if isinstance(self.images, torch.Tensor):
            rows, columns = (each.to(self.images.device, non_blocking=True) for each in (rows, columns))
            return self.images[rows[:, None], columns]
        picked = torch.from_numpy(self.images[rows.cpu().numpy()[:, None], columns.cpu().numpy()])
        return picked.to(self.device)
