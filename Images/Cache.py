"""A cache of decoded image files on disk, so that every file is decoded only once.

For each folder of images and size there are <key>.npy, the images that can be decoded, uint8 (N, 3, S, S), and
<key>.json: the files that cannot, and checksums of both. The second is written last; streamed images have no .npy. The
key of a folder changes with its files, and then the old files are not read. All may be deleted at any time.
"""

import errno
import hashlib
import json
import os
import shutil
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import Locks
import Utils
from Distributed import is_first, notice
from Images.Decode import BadFile, Files, decode
from Utils import UserError, shown

FORMAT = 2  # raise it when decode() gives other pixels or the files get another layout
PART = 2**22  # bytes of the .npy file that one checksum covers
# why a file cannot be read for a time
PASSING = {os.strerror(number) for number in (errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE)}


def checksums(file):
    """Return the CRC-32 of every PART bytes of a file, read by several threads. Takes 0.5 s for a GiB on one core."""

    def of_part(start):
        with file.open("rb") as handle:
            handle.seek(start)
            return zlib.crc32(handle.read(PART))

    starts = range(0, file.stat().st_size, PART)
    hidden = None if is_first() else True  # None: hidden without a terminal
    with ThreadPoolExecutor() as threads:
        sums = threads.map(of_part, starts)
        return list(tqdm(sums, total=len(starts), desc="checking the image cache", delay=2, disable=hidden))


class NoCacheError(UserError):
    """The cache cannot be made: its disk is full, or must not be written."""


@contextmanager
def _disk_errors(folder, n_bytes):
    try:
        yield
    except OSError as error:
        message = f"{shown(folder)}: the image cache of {n_bytes:,} bytes cannot be made ({error.strerror or error})"
        remedy = "free space there, give another --data_dir, or pass --storage stream"
        raise NoCacheError(f"{message}: {remedy}") from error


class Cache:
    """The decoded images of some files, and which of them are bad, in a folder of such caches."""

    def __init__(self, root, paths, size, folder, n_workers, name):
        """root: the folder that all paths begin with. folder: where caches lie. name: what messages call the images."""
        self.root = root
        self.paths = paths
        self.size = size
        self.folder = folder
        self.n_workers = n_workers
        self.name = name
        self.n_bytes = len(paths) * 3 * size**2
        key = self._key()
        self.array = folder / f"{key}.npy"
        self.record = folder / f"{key}.json"
        self.lock = folder / f".{key}.lock"
        self._found = None

    def _key(self):
        """Return a hash of the place, the names, sizes and times of the files, and of the size of the images."""
        # with the place: two unpacked trees can have the same names, sizes and times, but other pixels
        digest = hashlib.sha256(b"%d %d %s" % (FORMAT, self.size, os.fsencode(self.root.resolve())))
        for path in self.paths:
            try:
                status = Path(path).stat()
                state = b"%d %d" % (status.st_size, status.st_mtime_ns)
            except OSError:
                state = b"unreadable"
            digest.update(b"\0%s\0%s" % (os.fsencode(path.removeprefix(str(self.root))), state))
        return digest.hexdigest()

    def load(self, skip_bad):
        """Return (images as a memory map, {index: reason} of the bad files); decode the files if there is no cache.

        The cache is checked when it is first read. BadFile at the first bad file unless skip_bad; NoCacheError if the
        disk has too little space or must not be written.
        """
        if self._found is None:
            self._found = self._read()
        if self._found is None:
            with _disk_errors(self.folder, self.n_bytes):
                self.folder.mkdir(parents=True, exist_ok=True)
                if not os.access(self.folder, os.W_OK):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            with Locks.locked(self.lock, f"decoding {self.name}"):
                self._found = self._read()  # another process may have made it in the meantime
                if self._found is None:
                    self._found = self._write(skip_bad)
        return self._found

    def find_bad(self, skip_bad):
        """Return {index: reason} of the bad files. All files are decoded to find them, once: the result is kept.

        BadFile at the first bad file unless skip_bad.
        """
        record = self._read_record()
        if record is not None:
            return record["bad"]
        bad = {}
        for _ in self._decoded(skip_bad, bad, "checking"):
            pass
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with Locks.locked(self.lock, f"decoding {self.name}"):
                if self._read_record() is None:  # otherwise another process has made the cache in the meantime
                    self._write_record(bad, [])
        except (OSError, UserError):
            notice(f"{self.name}: every start checks its files again: {shown(self.folder)} cannot be written")
        return bad

    def _read_record(self):
        """Return {"bad": {index: reason}, "checksums": those of the .npy file}, or None if no valid record is there."""
        try:
            text, checksum = self.record.read_text().split("\n")
            if f"{zlib.crc32(text.encode()):08x}" != checksum:
                raise ValueError("its checksum does not match")
            record = json.loads(text)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as error:
            self._discard(self.record, error)
            return None
        record["bad"] = {int(index): reason for index, reason in record["bad"].items()}
        for index, reason in record["bad"].items():
            if reason in PASSING and self._can_be_decoded(index):
                self._discard(self.record, f"{shown(self.paths[index])} could not be read before, and now it can")
                return None
        return record

    def _can_be_decoded(self, index):
        try:
            decode(self.paths[index], self.size)
        except BadFile:
            return False
        return True

    def _read(self):
        """Return what `load` does, or None if no valid cache is there."""
        record = self._read_record()
        if record is None:
            return None
        try:
            if checksums(self.array) != record["checksums"]:
                raise ValueError("its checksum does not match")
            return torch.from_numpy(np.load(self.array, mmap_mode="c")), record["bad"]
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            self._discard(self.array, error)
            return None

    def _discard(self, file, error):
        notice(f"{shown(file)}: decoding again, the cache cannot be used: {error}")
        with suppress(OSError):
            self.record.unlink()

    def _write(self, skip_bad):
        """Decode the files into the cache; return what `load` does."""
        with _disk_errors(self.folder, self.n_bytes):
            if shutil.disk_usage(self.folder).free < self.n_bytes + 2**20:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        Utils.remove_stale(self.folder)
        bad = {}
        Utils.write_atomically(self.array, lambda scratch: self._write_array(scratch, skip_bad, bad))
        self._write_record(bad, checksums(self.array))
        return torch.from_numpy(np.load(self.array, mmap_mode="c")), bad

    def _write_array(self, scratch, skip_bad, bad):
        """Append the images to the file, then put their header, whose length is fixed, before them."""
        n_kept = 0
        with _disk_errors(self.folder, self.n_bytes), scratch.open("wb") as file:
            self._write_header(file, len(self.paths))
            for images in self._decoded(skip_bad, bad, "decoding"):
                file.write(images.numpy().data)
                n_kept += len(images)
            file.seek(0)
            self._write_header(file, n_kept)

    def _write_header(self, file, n):
        # NumPy pads the header for arrays that grow: it is equally long for every n up to len(self.paths)
        header = {"descr": "|u1", "fortran_order": False, "shape": (n, 3, self.size, self.size)}
        np.lib.format.write_array_header_1_0(file, header)

    def _write_record(self, bad, sums):
        text = json.dumps({"bad": bad, "checksums": sums})
        content = f"{text}\n{zlib.crc32(text.encode()):08x}"
        Utils.write_text(self.record, content)

    def _decoded(self, skip_bad, bad, title):
        """Yield the images of each batch of files; put {index: reason} of those that do not decode into bad."""
        batches = torch.arange(len(self.paths)).split(64)
        with tqdm(total=len(self.paths), desc=f"{title} {self.name}", unit="image", disable=None) as bar:
            for indices, images, newly_bad in Files(self.paths, self.size).load(batches, self.n_workers):
                if newly_bad and not skip_bad:
                    index = min(newly_bad)
                    raise BadFile(self.paths[index], newly_bad[index])
                bad |= newly_bad
                yield images
                bar.update(len(indices) + len(newly_bad))
