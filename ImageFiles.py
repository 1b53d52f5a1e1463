"""Images of ImageFolder trees as uint8 splits: decoded once into a cache and held in memory, or streamed."""

import os
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torchvision.datasets.folder import IMG_EXTENSIONS

from CamNet.Bank import free_memory
from Decode import BadFile, shown
from ImageCache import Cache, distributed, notice
from Splits import Split, StreamedSplit
from Utils import UserError

CACHE = Path(__file__).parent / "Data" / ".cache"


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


def _compare(reference, classes, reference_name, name):
    if classes == reference:
        return
    sides = {reference_name: {*reference} - {*classes}, name: {*classes} - {*reference}}
    parts = [f"only in {side}: {some(sorted(only))}" for side, only in sides.items() if only]
    found = "; ".join(parts) or "the same in another order"
    raise UserError(f"{name}: not the classes of {reference_name} ({found}): give both the same class folders")


def check_same_classes(train, other):
    """Raise UserError unless both splits have the same classes, that is, their labels mean the same."""
    _compare(train.classes, other.classes, train.name or "the training images", other.name or "the other images")


def _storage(asked, n_bytes, device, name):
    """Return "memory" or "stream", with a notice where "auto" takes "stream"."""
    if asked != "auto":
        return asked
    free = {"memory": free_memory("cpu")}
    if torch.device(device).type == "cuda":
        free[f"memory of {device}"] = free_memory(device)
    place = min(free, key=free.get)
    if n_bytes <= free[place] / 2:
        return "memory"
    notice(f"{name}: streamed: {n_bytes:,} bytes of images are more than half of the free {place}, {free[place]:,}")
    return "stream"


def first_rank_only(work):
    """Return what work() returns, or raise its UserError; of several processes rank 0 works while the others wait."""
    if not distributed():
        return work()
    # decoding may take longer than the time that the training's own group waits
    group = dist.new_group(backend="gloo", timeout=timedelta(days=1))
    answer = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = work()
        except UserError as error:
            answer[1] = str(error)
    dist.broadcast_object_list(answer, src=0, group=group)
    dist.destroy_process_group(group)
    if answer[1]:
        raise UserError(answer[1])
    return answer[0]


def first_rank_first(work):
    """Return what work() returns; of several processes rank 0 works first, and the others find what it has fetched."""
    if distributed():
        first_rank_only(lambda: (work(), None)[1])
    return work()


def load_folder(
    folder,
    size,
    *,
    split="",
    classes=None,
    storage="auto",
    n_workers=2,
    skip_bad=False,
    cache_dir=None,
    device="cpu",
    name="",
):
    """Return the images of a folder (see list_folder) as size x size: a Split on the device, or a StreamedSplit.

    split: see list_folder. classes: names that the folder must have, for example those of the training images.
    storage: "memory" (through a cache in cache_dir), "stream", or "auto": memory where they take at most half of what
    is free. UserError: see list_folder; bad files without skip_bad; other classes; no room for the cache or on the
    device.
    """
    if storage not in ("auto", "memory", "stream"):
        raise UserError(f"--storage {storage}: not known: choose auto, memory or stream")
    listing, name = list_folder(folder, split), name or shown(folder)
    if classes is not None:
        _compare(list(classes), listing.classes, "the training images", name)
    cache = Cache(Path(folder), listing.paths, size, Path(cache_dir or CACHE), n_workers, name)

    def prepare():
        chosen = _storage(storage, cache.n_bytes, device, name)
        if chosen == "memory" and cache.read() is None:
            cache.write(skip_bad)
        return chosen

    if first_rank_only(prepare) == "stream":
        return StreamedSplit(listing, size, n_workers, skip_bad, name)
    if (found := cache.read()) is None:  # another machine's rank, with a cache folder of its own
        cache.write(skip_bad)
        found = cache.read()
    return _as_split(found, listing, skip_bad, name).to(device)


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
