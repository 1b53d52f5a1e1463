"""Decoded images kept in a file, so that they are decoded once.

A cache is <key>.npy (the images that decode, N x 3 x S x S) and <key>.json (the files that do not), written last: it is
whole or absent. Nothing reads the caches of folders that have changed since; the cache folder may be emptied any time.
Notices go to stderr.
"""

import errno
import hashlib
import json
import os
import secrets
import shutil
import socket
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from Distributed import notice
from Images.Decode import BadFile, Files, shown
from Utils import UserError

FORMAT = 1  # of the cache: raise it when decode() gives other pixels or the files get another layout


@contextmanager
def _disk_errors(folder, n_bytes):
    try:
        yield
    except OSError as error:
        message = f"{shown(folder)}: the image cache of {n_bytes:,} bytes cannot be made ({error.strerror or error})"
        raise UserError(f"{message}: make room or choose another folder, or pass --storage stream") from error


def _remove_stale(folder):
    """Remove what killed processes have left: this machine's by their number, another's once a day has passed."""
    for path in folder.glob("*.tmp"):
        _, host, pid, _ = path.name.rsplit("~", 3)
        try:
            stale = path.stat().st_mtime < time.time() - 86400
            if host == socket.gethostname():
                os.kill(int(pid), 0)
        except ProcessLookupError:
            stale = True
        except OSError:  # gone in the meantime, or another user's
            stale = False
        if stale:
            path.unlink(missing_ok=True)


@dataclass
class Cache:
    """The decoded images of the files, in a folder of such caches."""

    root: Path
    paths: list
    size: int
    folder: Path
    n_workers: int
    name: str

    def __post_init__(self):
        self.n_bytes = len(self.paths) * 3 * self.size**2
        # the place counts, too: unpacked trees can be alike in names, sizes and times, and differ in their pixels
        digest = hashlib.sha256(b"%d %d %s" % (FORMAT, self.size, os.fsencode(self.root.resolve())))
        for path in self.paths:
            try:
                status = Path(path).stat()
                state = b"%d %d" % (status.st_size, status.st_mtime_ns)
            except OSError:
                state = b"unreadable"
            digest.update(b"\0%s\0%s" % (os.fsencode(path.removeprefix(str(self.root))), state))
        self.key = digest.hexdigest()
        self.array, self.record = (self.folder / f"{self.key}{suffix}" for suffix in (".npy", ".json"))

    def read(self):
        """Return (images, mapped into memory; {index: reason} of the bad files), or None without a whole cache."""
        try:
            bad = {int(index): str(reason) for index, reason in json.loads(self.record.read_text()).items()}
            images = np.load(self.array, mmap_mode="c")
            if images.dtype != np.uint8 or images.shape != (len(self.paths) - len(bad), 3, self.size, self.size):
                raise ValueError(f"it holds {images.dtype} {images.shape}")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, TypeError, AttributeError, EOFError) as error:
            notice(f"{shown(self.array)}: decoding again, the cache cannot be read: {error}")
            return None
        return torch.from_numpy(images), bad

    def write(self, skip_bad):
        """Decode the files into the cache. BadFile at the first bad one unless skip_bad; UserError without room."""
        temporary = self.folder / f"{self.key}~{socket.gethostname()}~{os.getpid()}~{secrets.token_hex(4)}.tmp"
        try:
            with _disk_errors(self.folder, self.n_bytes):
                self.folder.mkdir(parents=True, exist_ok=True)
                _remove_stale(self.folder)
                if shutil.disk_usage(self.folder).free < self.n_bytes + 2**20:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                with temporary.open("wb") as file:
                    bad = self._decode_into(file, skip_bad)
                temporary.replace(self.array)
                with temporary.open("wb") as file:
                    file.write(json.dumps(bad).encode())
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(self.record)
        finally:
            with suppress(OSError):
                temporary.unlink()

    def _decode_into(self, file, skip_bad):
        """Append the images to the open file, then put their header before them; return {index: reason}."""
        all_bad, n_kept = {}, 0

        def put_header(number):
            header = {"descr": "|u1", "fortran_order": False, "shape": (number, 3, self.size, self.size)}
            np.lib.format.write_array_header_1_0(file, header)

        put_header(len(self.paths))
        with tqdm(total=len(self.paths), desc=f"decoding {self.name}", unit="image", disable=None) as bar:
            batches = torch.arange(len(self.paths)).split(64)
            for indices, images, bad in Files(self.paths, self.size).load(batches, self.n_workers):
                if bad and not skip_bad:
                    index = min(bad)
                    raise BadFile(self.paths[index], bad[index])
                all_bad |= bad
                file.write(images.numpy().data)
                n_kept += len(indices)
                bar.update(len(indices) + len(bad))
        file.seek(0)
        put_header(n_kept)  # of the same length: numpy pads its headers for arrays that grow
        file.flush()
        os.fsync(file.fileno())
        return all_bad
