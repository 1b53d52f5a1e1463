"""Images of ImageFolder trees as uint8 splits: decoded once into a cache and held in memory, or streamed."""

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

import Devices
from Distributed import first_rank_only, notice
from Images.Cache import Cache, NoCacheError
from Images.Decode import SUFFIXES, BadFile
from Images.Split import Split, StreamedSplit
from Utils import UserError, shown

DATA_DIR = Path(__file__).resolve().parents[1] / "Data"
# What systems put next to images, in small letters; hidden names aside. Data/InvertDirStructure.py has the same.
IGNORED = ("__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found")
IGNORED += ("thumbs.db", "ehthumbs.db", "desktop.ini")


@dataclass(frozen=True)
class Options:
    """How image files are found and read: see the flags of the same names."""

    data_dir: Path = DATA_DIR  # holds the data sets, and .cache/ of decoded images
    size: int | None = None  # None: the size of the data set's row
    storage: str = "auto"
    n_workers: int = 2
    skip_bad: bool = False
    device: str = "cpu"


class Listing(NamedTuple):
    """The image files of a folder: N paths as str, their labels (int64, -1 = unlabeled), the names of the classes."""

    paths: list
    labels: torch.Tensor
    classes: list
    left_out: Counter  # of files with the ending of no image: {".txt": 3}


def some(names, most=3):
    """Return the first names of a list in words, safe to print."""
    text = ", ".join(shown(name) for name in names[:most])
    if len(names) > most:
        text += f" and {len(names) - most} more"
    return text


def is_hidden(name):
    """Return whether a file or folder is no part of the data: hidden, or made by an operating system."""
    return name.startswith(".") or name.lower() in IGNORED


def is_image(name):
    """Return whether a name ends as that of an image file."""
    return os.path.splitext(name)[1].lower() in SUFFIXES  # noqa: PTH122 (a Path for every file takes long)


def folders_in(folder):
    """Return the names of the folders in a folder in order, hidden ones left out. UserError if it is not readable."""
    try:
        return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not is_hidden(entry.name))
    except OSError as error:
        raise UserError(f"{shown(folder)}: {error.strerror}: make the folder readable") from error


def _images_under(folder, left_out, above=()):
    """Yield the paths of the image files under a folder in order; count the endings of the others in left_out."""
    status = Path(folder).stat()
    here = (status.st_dev, status.st_ino)
    if here in above:  # a link to a folder that holds it
        return
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if is_hidden(entry.name):
            continue
        if entry.is_dir():
            yield from _images_under(entry.path, left_out, (*above, here))
        # a broken link is listed, and later found bad; a pipe is not listed, whatever its name
        elif entry.is_file() or not Path(entry.path).exists():
            if is_image(entry.name):
                yield entry.path
            else:
                left_out[Path(entry.name).suffix.lower() or "no ending"] += 1


def holds_images(folder, pattern):
    """Return whether an image file matches the pattern, "CLASS/IMAGE" for example: CLASS and IMAGE are any names."""
    wildcards = "/".join("*" if part.isupper() else part for part in pattern.split("/"))
    for path in Path(folder).glob(wildcards):
        hidden = any(is_hidden(part) for part in path.relative_to(folder).parts)
        if is_image(path.name) and not hidden and not path.is_dir():
            return True
    return False


def _endings(left_out):
    counts = ", ".join(f"{shown(ending)} ({n})" for ending, n in left_out.most_common(8))
    more = f" and {len(left_out) - 8} more endings" if len(left_out) > 8 else ""
    return counts + more


def list_folder(folder, split=""):
    """Return the Listing of a folder of CLASS/**/IMAGE, classes in order of name, or of images only (unlabeled).

    split: the name of a folder in every class folder, whose images alone are listed: CLASS/SPLIT/**/IMAGE.
    UserError: no such folder, no image in it, a class without image, images next to class folders, not readable.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{shown(folder)}: no such folder: give the folder that holds the class folders")
    classes = folders_in(folder)
    left_out = Counter()
    try:
        roots = [folder / name / split for name in classes] if split else [folder]
        paths = [path for root in roots if root.is_dir() for path in _images_under(root, left_out)]
    except OSError as error:
        raise UserError(f"{shown(error.filename)}: {error.strerror}: make the folder readable") from error
    others = f"; other files in it: {_endings(left_out)}" if left_out else ""
    if not paths:
        place = f"its CLASS/{split}" if split else "it"
        endings = ", ".join(sorted(SUFFIXES))
        raise UserError(f"{shown(folder)}: no image in {place}: fill it with files of {endings}{others}")
    if not classes:
        return Listing(paths, torch.full((len(paths),), -1), classes, left_out)
    return _labeled(folder, paths, classes, split, left_out)


def _labeled(folder, paths, classes, split, left_out):
    """Return the Listing of paths whose first folder is their class. UserError where they do not fit the classes."""
    start = len(str(folder).rstrip(os.sep)) + 1
    tops = [path[start:].split(os.sep, 1)[0] for path in paths]
    loose = sorted(set(tops) - set(classes))
    if loose:
        found = f"images ({some(loose)}) next to folders ({some(classes)})"
        raise UserError(f"{shown(folder)}: {found}: move the images into class folders, or the folders away")
    empty = sorted(set(classes) - set(tops))
    if empty:
        place = f" in {split}" if split else ""
        others = f"; other files in the folder: {_endings(left_out)}" if left_out else ""
        found = f"class folders without an image{place}: {some(empty)}"
        raise UserError(f"{shown(folder)}: {found}: remove or fill them{others}")
    label_of = {name: label for label, name in enumerate(classes)}
    return Listing(paths, torch.tensor([label_of[name] for name in tops]), classes, left_out)


def check_same_classes(train, other):
    """Raise UserError unless both splits have the same classes, that is, their labels mean the same."""
    if train.classes == other.classes:
        return
    train_name = train.name or "the training images"
    other_name = other.name or "the other images"
    only_in_train = sorted(set(train.classes) - set(other.classes))
    only_in_other = sorted(set(other.classes) - set(train.classes))
    found = []
    if only_in_train:
        found.append(f"only in {train_name}: {some(only_in_train)}")
    if only_in_other:
        found.append(f"only in {other_name}: {some(only_in_other)}")
    reason = "; ".join(found) or "the same in another order"
    raise UserError(
        f"{other_name}: not the classes of {train_name} ({reason}): give both the same class folders, or score by "
        "--eval cv"
    )


def check_size(size, n_bytes):
    """Raise UserError where images of this size in pixels take more main memory than is free: at least n_bytes."""
    free = Devices.free_memory("cpu")
    if n_bytes > free:
        needed = f"images of this size take {n_bytes:,} bytes or more, and {free:,} are free"
        raise UserError(f"--size {size}: {needed}: choose a smaller one")


def _storage(asked, n_bytes, device, name):
    """Return "memory" or "stream"; print a notice if "auto" means "stream"."""
    if asked != "auto":
        return asked
    places = ["cpu"] if torch.device(device).type == "cpu" else ["cpu", device]  # a cache is read through main memory
    for place in places:
        if not Devices.has_room(n_bytes, place):
            free = f"{Devices.free_memory(place):,} bytes that are free on {place}"
            notice(f"{name}: streamed: its images, {n_bytes:,} bytes, take more than half of the {free}")
            return "stream"
    return "memory"


def load_folder(folder, size, options, *, split="", name=""):
    """Return the images of a folder (see list_folder) as size x size: a Split on the device, or a StreamedSplit.

    options: see `Options`. storage: "memory" (through a cache in data_dir/.cache), "stream", or "auto": memory where
    the images take at most half of what is free and the cache can be made. Both hold the same images: bad files are
    found first.
    split: see list_folder. name: what messages call the folder.
    UserError: see list_folder; bad files without skip_bad; no room for the cache or on the device; size too large.
    """
    if options.storage not in ("auto", "memory", "stream"):
        raise UserError(f"--storage {options.storage}: not known: choose auto, memory or stream")
    check_size(size, 2 * 3 * 4 * size**2)  # two float32 views of a single image
    listing = list_folder(folder, split)
    name = name or shown(folder)
    if listing.left_out:
        notice(f"{name}: left out, since their endings are not those of images: {_endings(listing.left_out)}")
    cache = Cache(Path(folder), listing.paths, size, options.data_dir / ".cache", options.n_workers, name)

    def prepare():
        """Return the storage, and {index: reason} of the bad files where that is "stream"."""
        storage = _storage(options.storage, cache.n_bytes, options.device, name)
        if storage == "memory":
            try:
                cache.load(options.skip_bad)
                return storage, None
            except NoCacheError as error:
                if options.storage == "memory":  # asked for
                    raise
                notice(f"{name}: streamed, which is slower: {error}")
        return "stream", cache.find_bad(options.skip_bad)

    storage, bad = first_rank_only(prepare)
    if storage == "stream":
        return StreamedSplit(_good(listing, bad, options.skip_bad, name), size, options.n_workers, name)
    images, bad = cache.load(options.skip_bad)  # on another machine than the first process's this can decode again
    kept = _good(listing, bad, options.skip_bad, name)
    return Split(images, kept.labels, kept.classes, name).to(options.device)


def _good(listing, bad, skip_bad, name):
    """Return the Listing of the good files, with class names that are safe to print. Raises what `load_folder` does."""
    n = len(listing.paths)
    if bad and not skip_bad:
        index = min(bad)
        raise BadFile(listing.paths[index], bad[index])
    if len(bad) == n:
        raise UserError(f"{name}: none of its {n} image files can be decoded: repair or replace them")
    if bad:
        paths = [listing.paths[index] for index in sorted(bad)]
        notice(f"{name}: left out {len(bad)} of {n} files that cannot be decoded: {some(paths)}")
    kept = [index for index in range(n) if index not in bad]
    paths = [listing.paths[index] for index in kept]
    classes = [shown(name) for name in listing.classes]
    return listing._replace(paths=paths, labels=listing.labels[kept], classes=classes)
