"""Images of ImageFolder trees as uint8 splits: decoded once into a cache and held in memory, or streamed."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torchvision.datasets.folder import IMG_EXTENSIONS

import Utils
from Distributed import first_rank_only, notice
from Images.Cache import Cache
from Images.Decode import BadFile, shown
from Images.Split import Split, StreamedSplit
from Utils import UserError

DATA_DIR = Path(__file__).resolve().parents[1] / "Data"


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
    """The image files of a folder: N paths as str, their labels (int64, -1 = unlabelled), the names of the classes."""

    paths: list
    labels: torch.Tensor
    classes: list


def some(names, most=3):
    names = [shown(name) for name in names]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _images_under(folder, above=()):
    """Yield the paths of the image files under a folder in order, hidden ones left out."""
    status = Path(folder).stat()
    here = (status.st_dev, status.st_ino)
    if here in above:  # a link to a folder that holds it
        return
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _images_under(entry.path, (*above, here))
        # a broken link is listed, and a bad file; a pipe with the name of an image is neither
        elif entry.name.lower().endswith(IMG_EXTENSIONS) and (entry.is_file() or not Path(entry.path).exists()):
            yield entry.path


def holds_images(folder, pattern):
    """Return whether an image file matches the pattern, "CLASS/IMAGE" for example: CLASS and IMAGE are any names."""
    pattern = "/".join("[!.]*" if part.isupper() else part for part in pattern.split("/"))
    return any(path.name.lower().endswith(IMG_EXTENSIONS) and not path.is_dir() for path in Path(folder).glob(pattern))


def list_folder(folder, split=""):
    """Return the Listing of a folder of CLASS/**/IMAGE, classes in order of name, or of images only (unlabelled).

    split: the name of a folder in every class folder, whose images alone are listed: CLASS/SPLIT/**/IMAGE.
    UserError: no such folder, no image in it, a class without image, images beside class folders, not readable.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{shown(folder)}: no such folder: give the folder that holds the class folders")
    try:
        classes = sorted(each.name for each in folder.iterdir() if each.is_dir() and not each.name.startswith("."))
        roots = [folder / name / split for name in classes] if split else [folder]
        paths = [path for root in roots if root.is_dir() for path in _images_under(root)]
    except OSError as error:
        raise UserError(f"{shown(error.filename)}: {error.strerror}: make the folder readable") from error
    if not paths:
        place = f"its CLASS/{split}" if split else "it"
        raise UserError(f"{shown(folder)}: no image in {place}: fill it with files of {', '.join(IMG_EXTENSIONS)}")
    if not classes:
        return Listing(paths, torch.full((len(paths),), -1), classes)
    start = len(str(folder).rstrip(os.sep)) + 1
    tops = [path[start:].split(os.sep, 1)[0] for path in paths]
    numbers = {name: number for number, name in enumerate(classes)}
    if loose := sorted({*tops} - {*classes}):
        found = f"images ({some(loose)}) beside folders ({some(classes)})"
        raise UserError(f"{shown(folder)}: {found}: move the images into class folders, or the folders away")
    if empty := sorted({*classes} - {*tops}):
        found = f"class folders without an image{split and f' in {split}'}: {some(empty)}"
        raise UserError(f"{shown(folder)}: {found}: remove or fill them")
    return Listing(paths, torch.tensor([numbers[name] for name in tops]), classes)


def check_same_classes(train, other):
    """Raise UserError unless both splits have the same classes, that is, their labels mean the same."""
    if train.classes == other.classes:
        return
    train_name = train.name or "the training images"
    other_name = other.name or "the other images"
    only_in_train = sorted({*train.classes} - {*other.classes})
    only_in_other = sorted({*other.classes} - {*train.classes})
    found = []
    if only_in_train:
        found.append(f"only in {train_name}: {some(only_in_train)}")
    if only_in_other:
        found.append(f"only in {other_name}: {some(only_in_other)}")
    reason = "; ".join(found) or "the same in another order"
    raise UserError(f"{other_name}: not the classes of {train_name} ({reason}): give both the same class folders")


def _storage(asked, n_bytes, device, name):
    """Return "memory" or "stream", with a notice where "auto" takes "stream"."""
    if asked != "auto":
        return asked
    places = ["cpu"] if torch.device(device).type == "cpu" else ["cpu", device]  # a cache is read through main memory
    for place in places:
        if not Utils.fits(n_bytes, place):
            free = f"{Utils.free_memory(place):,} bytes that are free on {place}"
            notice(f"{name}: streamed: its images, {n_bytes:,} bytes, take more than half of the {free}")
            return "stream"
    return "memory"


def load_folder(folder, size, options, *, split="", name=""):
    """Return the images of a folder (see list_folder) as size x size: a Split on the device, or a StreamedSplit.

    options: see `Options`. storage: "memory" (through a cache in data_dir/.cache), "stream", or "auto": memory where
    the images take at most half of what is free. split: see list_folder. name: what messages call the folder.
    UserError: see list_folder; bad files without skip_bad; no room for the cache or on the device.
    """
    if options.storage not in ("auto", "memory", "stream"):
        raise UserError(f"--storage {options.storage}: not known: choose auto, memory or stream")
    listing = list_folder(folder, split)
    name = name or shown(folder)
    cache = Cache(Path(folder), listing.paths, size, options.data_dir / ".cache", options.n_workers, name)

    def prepare():
        chosen = _storage(options.storage, cache.n_bytes, options.device, name)
        if chosen == "memory" and cache.read() is None:
            cache.write(options.skip_bad)
        return chosen

    if first_rank_only(prepare) == "stream":
        return StreamedSplit(listing, size, options.n_workers, options.skip_bad, name)
    found = cache.read()
    if found is None:  # the first process is on another machine, with a cache folder of its own
        cache.write(options.skip_bad)
        found = cache.read()
    return _as_split(found, listing, options.skip_bad, name).to(options.device)


def _as_split(found, listing, skip_bad, name):
    images, bad = found
    if bad and not skip_bad:
        index = min(bad)
        raise BadFile(listing.paths[index], bad[index])
    if not len(images):
        raise UserError(f"{name}: none of its {len(bad)} image files can be decoded: repair or replace them")
    if bad:
        paths = [listing.paths[index] for index in sorted(bad)]
        notice(f"{name}: left out {len(bad)} of {len(listing.paths)} files that cannot be decoded: {some(paths)}")
    kept = [index for index in range(len(listing.paths)) if index not in bad]
    return Split(images, listing.labels[kept], listing.classes, name)
