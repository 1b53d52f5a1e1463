"""The bank: K restorations of every training image, made once, so that a synthetic view costs no more than a lookup.

On disk it is NAME.npy, uint8 (N, K, 3, H, W) in the order of the train split, a plain NumPy file; NAME.npy.json next to
it says what it was made from. While the bank is filled, they are called NAME.npy.part and NAME.npy.part.json, and the
second also holds the number of rows that are done.
"""

import contextlib
import hashlib
import json
import os
import time
import zlib
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from CamNet.Codes import Purpose, make_keys

BATCH = 256  # images in a forward pass
CUDA_PIXELS = 2048 * 32**2  # on CUDA: pixels in a forward pass, if they are more than those of BATCH images
CHECKED = 16 * 2**30  # bytes; the checksum of a bank up to this size is compared at every start, 0.5 s per GiB
SAVED_EVERY = 20.0  # seconds between two notes of the progress of the filling


def fingerprint(state):
    """Return a hash of a state dict: of names, shapes and all values."""
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
    """Return the positives in an .npy file, uint8 (n, K, 3, size, size), as a read-only memory map.

    ValueError if it is no such file, if its shape or type differ, or if it does not have the checksum in its note.
    """
    try:
        images = np.load(file, mmap_mode="r")
    except Exception as error:  # NumPy raises half a dozen types on damaged files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{file}: no array that NumPy can read ({reason})") from error
    shape = getattr(images, "shape", ())
    fits = len(shape) == 5 and shape[0] == n and shape[1] > 0 and shape[2:] == (3, size, size)
    if not fits or images.dtype != np.uint8:
        wanted = f"uint8 ({n}, K, 3, {size}, {size}), in the order of the train split"
        found = f"{getattr(images, 'dtype', type(images).__name__)} {shape}"
        raise ValueError(f"{file}: {found}, expected {wanted}")
    crc = _read_note(_note_of(Path(file))).get("crc")
    if crc is not None and images.nbytes <= CHECKED and crc != checksum(images):
        raise ValueError(f"{file}: it is damaged (wrong checksum)")
    return images


def checksum(images, crc=0, rows_at_once=256):
    """Return the CRC-32 of the rows of an array or memory map; crc: that of the rows before them."""
    for start in range(0, len(images), rows_at_once):
        crc = zlib.crc32(np.ascontiguousarray(images[start : start + rows_at_once]), crc)
    return crc


def call(work):
    """Return work(): `fill` in a single process."""
    return work()


def all_parts(parts, work):
    """Yield the results of work(parts): `fill` in a single process."""
    yield from work(parts)


def fill(
    file,
    generator,
    split,
    k,
    seed,
    device,
    autocast=contextlib.nullcontext,
    *,
    bs=None,
    quiet=True,
    first_only=call,
    spread=all_parts,
):
    """Fill `file` with k restorations of every image of the split, or continue where an interrupted call stopped.

    The codes follow from seed, image and index alone. autocast: makes the context that the generator runs in. bs:
    images in a forward pass, fewer where memory runs out; None: `batch_size` of the device. first_only, spread: what
    lets several processes fill it together, with the same bytes, see Distributed.py; only the first one touches the
    file.
    Returns whether there was work to do. ValueError if the file was made from something else (generator, corruption,
    k, seed or data), or if the disk is full.
    """
    shape = (len(split), k, 3, split.size, split.size)
    made_from = {"generator": fingerprint(generator.state_dict())} | generator.config
    made_from |= {"k": k, "seed": seed, "data": fingerprint_images(split), "shape": list(shape)}
    filling = _Filling(Path(file), shape, made_from)
    done = first_only(filling.start)
    if done is None:
        return False
    with autocast():
        generator = generator.frozen()

    step = bs or batch_size(device, split.size)
    at_once = step  # images in a forward pass

    def restored_of(rows, x):
        nonlocal at_once
        if len(rows) <= at_once:
            try:
                return restore(generator, x, rows, k, seed, autocast).cpu()
            except torch.OutOfMemoryError:  # of a GPU: from now on half as many at once
                if len(rows) == 1:
                    raise
            at_once = len(rows) // 2
        # one part after the other
        parts = []
        for some_rows, some_x in zip(rows.split(at_once), x.split(at_once)):
            parts.append(restored_of(some_rows, some_x))
        return torch.cat(parts)

    def restored(parts):
        for rows, x in split.batches(parts, device):
            yield rows, restored_of(rows, x)

    parts = [torch.arange(start, min(start + step, len(split))) for start in range(done, len(split), step)]
    with tqdm(desc="bank", total=len(split), initial=done, unit="image", disable=quiet) as bar, filling.kept():
        for rows, images in spread(parts, restored):
            filling.add(rows, images.numpy())
            bar.update(len(rows))
    first_only(filling.finish)
    return True


def batch_size(device, size):
    """Return how many images of a side in pixels go into a forward pass: more on CUDA, where launches take the time."""
    if torch.device(device).type != "cuda":
        return BATCH
    return max(BATCH, CUDA_PIXELS // size**2)


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


class _Filling:
    """A bank that is being filled: NAME.npy.part, and the note of its progress.

    ValueError where the disk is full.
    """

    def __init__(self, file, shape, made_from):
        self.file = file
        self.shape = shape
        self.made_from = made_from
        self.part = file.with_name(file.name + ".part")
        self.images = None  # a memory map
        self.done = 0  # rows
        self.crc = 0  # their checksum
        self.saved = time.monotonic()

    def start(self):
        """Open the file; return how many rows are done, or None where the bank is complete.

        An interrupted filling continues if what it wrote is intact. Otherwise a new file is made, and all of its space
        is allocated at once, so that a full disk is noticed now.
        """
        if self.file.exists():
            _check(self.file, self.made_from)
            return None
        note = _read_note(_note_of(self.part))
        if self.part.exists() and note:
            _check(self.part, self.made_from)
            with contextlib.suppress(Exception):  # a damaged file can fail in any way: then a new one is made
                self._continue(note)
        if self.images is None:
            with self._disk_errors():
                self._allocate()
        return self.done

    def _continue(self, note):
        images = np.lib.format.open_memmap(self.part, mode="r+")
        done = int(note["done"])
        is_intact = images.shape == self.shape and 0 <= done <= len(images)
        if is_intact and checksum(images[:done]) == note["crc"]:
            self.images = images
            self.done = done
            self.crc = note["crc"]

    def _allocate(self):
        try:
            self.images = np.lib.format.open_memmap(self.part, mode="w+", dtype=np.uint8, shape=self.shape)
            if hasattr(os, "posix_fallocate"):  # not on macOS, where a full disk is noticed later
                with self.part.open("r+b") as handle:
                    os.posix_fallocate(handle.fileno(), 0, os.fstat(handle.fileno()).st_size)
            self.save()
        except OSError:
            self.part.unlink(missing_ok=True)
            raise

    def add(self, rows, images):
        """Write the next rows; note the progress every SAVED_EVERY seconds."""
        self.images[rows.numpy()] = images
        self.crc = checksum(images, self.crc)
        self.done = int(rows[-1]) + 1
        if time.monotonic() - self.saved > SAVED_EVERY:
            self.save()

    def save(self):
        """Note the progress."""
        self.images.flush()
        _write_note(_note_of(self.part), self.made_from | {"done": self.done, "crc": self.crc})
        self.saved = time.monotonic()

    @contextlib.contextmanager
    def kept(self):
        """A context that notes the progress when it ends early: by a signal, or since another process has ended."""
        with self._disk_errors():
            try:
                yield
            except BaseException as error:
                if self.images is not None and not isinstance(error, OSError):
                    self.save()
                raise

    def finish(self):
        """Give both files their names."""
        with self._disk_errors():
            self.images.flush()
            _write_note(_note_of(self.file), self.made_from | {"crc": self.crc})
            self.part.replace(self.file)
            _note_of(self.part).unlink()

    @contextlib.contextmanager
    def _disk_errors(self):
        try:
            yield
        except OSError as error:
            message = f"cannot write the bank {self.part}: {error}: free space there, then start again"
            raise ValueError(message) from error


def _check(file, made_from):
    before = _read_note(_note_of(file))
    different = [name for name, value in made_from.items() if before.get(name) != value]
    if different:
        raise ValueError(f"{file} was made from another {', '.join(different)}: delete it, or use another folder")


def _note_of(file):
    return file.with_name(file.name + ".json")


def _read_note(note):
    """Return the content of a note; {} if it is missing or damaged."""
    try:
        content = json.loads(note.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write_note(note, content):
    scratch = note.with_name(note.name + ".tmp")
    with scratch.open("w") as handle:
        handle.write(json.dumps(content) + "\n")
        handle.flush()
        os.fsync(handle.fileno())
    scratch.replace(note)


def _copied(images, device, rows_at_once=1024):
    """Return an array or memory map as a tensor on a device; the host holds only some rows at a time."""
    copy = torch.empty(images.shape, dtype=torch.uint8, device=device)
    for start in range(0, len(images), rows_at_once):
        part = np.array(images[start : start + rows_at_once])
        copy[start : start + len(part)] = torch.from_numpy(part)
    return copy


class Bank:
    """Restorations uint8 (N, K, 3, H, W), on a device or as a memory map, from which views are picked."""

    def __init__(self, images, device, copied):
        """images: array, memory map or tensor. copied: copy an array to the device, or leave it where it is."""
        if copied:
            images = _copied(images, device)
        self.images = images
        self.device = torch.device(device)
        self.is_tensor = isinstance(images, torch.Tensor)  # on the device
        self.k = images.shape[1]

    def __len__(self):
        return len(self.images)

    def take(self, rows, columns):
        """Return uint8 (b, c, 3, H, W), where the bank is: columns (b, c) of the restorations of rows (b,), int64."""
        if not self.is_tensor:
            return torch.from_numpy(self.images[rows.cpu().numpy()[:, None], columns.cpu().numpy()])
        rows = rows.to(self.device, non_blocking=True)
        columns = columns.to(self.device, non_blocking=True)
        return self.images[rows[:, None], columns]
