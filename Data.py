"""The registry of data sets: one row of DATASETS each, and the splits and augmentations that follow from it."""

import http.client
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch

from Augmentations import Augmentation
from Distributed import first_rank_first, notice, say
from Images import Shapes
from Images.Folders import (
    Options,
    check_same_classes,
    check_size,
    folders_in,
    holds_images,
    is_hidden,
    load_folder,
    some,
)
from Images.Split import Split, StreamedSplit
from Lazy import LazyModule
from Utils import UserError, expanded, nearest, shown

torchvision = LazyModule("torchvision")

DEFAULT_OPTIONS = Options()
SPLITS = ("train", "val", "test")
VAL_FOLDERS = ("val", "valid", "validation", "dev")  # the first one that a user's folder has is its validation split
INSIDE_OUT = {"train": "train", "val": "validation", "test": "test"}  # as Data/InvertDirStructure.py names them
TINY_IMAGENET = ("http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de")  # url, md5


class Splits(NamedTuple):
    """What a run learns from and what it is scored on."""

    train: Split | StreamedSplit  # label -1: none; such images are learned from but not probed
    test: Split | StreamedSplit  # the split that is scored; `train` itself under "cv"
    eval: str  # "val", "test", or "cv": stratified 3-fold on train


@dataclass(frozen=True)
class Row:
    """All that the rest of the code may assume about a data set."""

    load: Callable  # (row, split, options) -> Split
    name: str
    size: int  # side of the square images, in pixels
    has_val: bool  # whether it has a validation split; otherwise flags are chosen by cross-validation on train
    recipe: dict  # defaults of the encoder's training flags that suit it
    generator_recipe: dict  # defaults of the flags of TrainCamNet.py
    on_cpu: dict = field(default_factory=dict)  # what differs in the recipe where there is no GPU
    generator_on_cpu: dict = field(default_factory=dict)
    on_long: dict = field(default_factory=dict)  # what differs on a GPU in runs of LONG epochs or more
    setup: str = ""  # for image folders: what the user should do if the folder of a split is missing
    folder: Path | None = None  # of `--data PATH`: where its files lie; None: data_dir / name
    splits: dict = field(default_factory=dict)  # names of split folders that differ: {"test": "val"}
    p_gen: float | str = "auto"  # default of this flag of TrainISICLE.py

    def recipe_for(self, device_type):
        """Return the defaults of the encoder's training flags on a type of device, such as "cuda"."""
        return self.recipe | (self.on_cpu if device_type == "cpu" else {})

    def long_recipe_for(self, device_type, epochs):
        """Return what differs in the recipe in a run of that many epochs."""
        return self.on_long if device_type != "cpu" and epochs >= LONG else {}

    def generator_recipe_for(self, device_type):
        """Return the defaults of the flags of TrainCamNet.py on a type of device."""
        return self.generator_recipe | (self.generator_on_cpu if device_type == "cpu" else {})

    @property
    def small_images(self):
        """Whether encoders need the stem for small images."""
        return self.size <= 64


def _load_shapes(row, split, options):
    size = options.size or row.size
    check_size(size, 3 * size**2 * Shapes.SIZES[split])
    images, labels = Shapes.make_split(split, size)
    return Split(images, labels, Shapes.CLASSES, f"shapes/{split}")


def _has_splits(root):
    return any((root / each).is_dir() for each in SPLITS)


def _is_inside_out(root):
    """Return whether a folder holds CLASS/SPLIT/IMAGE, what Data/InvertDirStructure.py writes, and no SPLIT/CLASS."""
    return not _has_splits(root) and any(holds_images(root, f"CLASS/{each}/IMAGE") for each in INSIDE_OUT.values())


def _split_folders(root):
    """Return the names of the folders in the place of SPLIT, in SPLIT/CLASS or CLASS/SPLIT; [] without splits."""
    if _has_splits(root):
        return folders_in(root)
    names = set()
    if _is_inside_out(root):
        for each in folders_in(root):
            names.update(folders_in(root / each))
    return sorted(names)


def _read_folders(row):
    """Return the names of the folders of a user's splits."""
    return ["train", row.splits.get("val", "val"), "test"]


def note_unread(row):
    """Print what next to a user's splits is not read: folders, such as other classes next to "train", and images."""
    if not row.folder:
        return
    read = _read_folders(row)
    unread = [name for name in _split_folders(row.folder) if name not in read]
    if unread:
        notice(f"{row.name}: folders that are not read: {some(unread, 8)}: its splits are {', '.join(read)}")
    places = []  # where images would lie next to the splits
    if _has_splits(row.folder):
        places = ["IMAGE"]
    elif _is_inside_out(row.folder):
        places = ["IMAGE", "CLASS/IMAGE"]
    loose = [place for place in places if holds_images(row.folder, place)]
    if loose:
        notice(f"{row.name}: images next to its splits, as {' and '.join(loose)}, are not read: move them into a split")


def _load_tree(row, split, options):
    """Load SPLIT/CLASS/IMAGE; of --data PATH also CLASS/SPLIT/IMAGE, or a tree without splits, which is all train."""
    root = row.folder or options.data_dir / row.name
    folder = root / row.splits.get(split, split)
    inner = ""
    if row.folder and _is_inside_out(root):
        folder = root
        inner = row.splits.get(split, INSIDE_OUT[split])
    elif row.folder and split == "train" and not _has_splits(root):
        folder = root
        if not holds_images(root, "CLASS/IMAGE") and not holds_images(root, "IMAGE"):
            raise UserError(
                f"--data {row.name}: no readable image in {shown(root)} as {{train,val,test}}/CLASS/IMAGE, as "
                "CLASS/{train,validation,test}/IMAGE, as CLASS/IMAGE or as IMAGE: put them so"
                f"{_nearest_layout(root)}; Data/README.md shows the layouts{_what_is_in(root)}"
            )
    if not folder.is_dir():
        raise UserError(f"--data {row.name}: no folder {shown(folder)}: {row.setup}{_what_is_in(root)}")
    return load_folder(folder, options.size or row.size, options, split=inner, name=f"{row.name}/{split}")


def _nearest_layout(root):
    """Return what would give a folder without a known layout one; "" if that is not known."""
    names = folders_in(root)
    renamed = {name: split for name in names for split in SPLITS if name.lower().startswith(split)}
    if renamed:
        return ": rename " + ", ".join(f"{shown(name)} to {split}" for name, split in renamed.items())
    for name in names:
        if _has_splits(root / name) or holds_images(root / name, "CLASS/IMAGE"):
            return f", or give a folder in it: --data {shown(root / name)}"
    return ""


def _what_is_in(root):
    names = folders_in(root) if root.is_dir() else []
    return f" (its folders now: {some(names, 5)})" if names else ""


def _load_torchvision(build):
    """Return a loader of a torchvision data set that downloads itself, unless an ImageFolder tree is in its place."""

    def load(row, split, options):
        root = options.data_dir / row.name
        if (root / "train").is_dir():
            return _load_tree(row, split, options)
        remedy = f"put images at {shown(root)}/{{train,test}}/CLASS/IMAGE"
        images, labels, classes = _fetch(row, root, lambda: build(root, split), remedy)
        images = torch.as_tensor(images)
        if images.shape[2] != row.size:
            raise UserError(f"--size {row.size}: {row.name} has {images.shape[2]} pixels; --size is for image folders")
        return Split(images, torch.as_tensor(labels, dtype=torch.int64), list(classes), f"{row.name}/{split}")

    return load


def _fetch(row, root, work, remedy):
    """Return work(), which downloads what is missing in root; with several processes, rank 0 downloads."""

    def guarded():
        try:
            return work()
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            reason = str(error).strip().split("\n")[0]
            raise UserError(
                f"--data {row.name}: not in {shown(root)}, and the download failed ({shown(reason)}): try again with a "
                f"network and a --data_dir that you can write to, or {remedy}"
            ) from error

    return first_rank_first(guarded)


def _load_cifar(name):
    def build(root, split):
        dataset = getattr(torchvision.datasets, name)
        data = dataset(root, train=split == "train", download=True)
        return data.data.transpose(0, 3, 1, 2).copy(), data.targets, data.classes

    return _load_torchvision(build)


def _stl10(root, split):
    data = torchvision.datasets.STL10(root, "train+unlabeled" if split == "train" else "test", download=True)
    return data.data, data.labels, data.classes


def _load_tiny_imagenet(row, split, options):
    """Download the official archive, and sort its val images into class folders, unlike the archive."""
    root = options.data_dir / row.name
    url, md5 = TINY_IMAGENET

    def work():
        if not (root / "train").is_dir():
            torchvision.datasets.utils.download_and_extract_archive(url, options.data_dir, md5=md5)
            (options.data_dir / "tiny-imagenet-200").rename(root)  # at the end: an interrupted extraction is repeated
        if (root / "val" / "images").is_dir():
            _sort_tiny_imagenet_val(root / "val")

    _fetch(row, root, work, f"move the folder tiny-imagenet-200 of {url} to {shown(root)}")
    return _load_tree(row, split, options)


def _sort_tiny_imagenet_val(folder):
    for line in (folder / "val_annotations.txt").read_text().splitlines():
        image, wnid = line.split("\t")[:2]
        source = folder / "images" / image
        if source.exists():  # an earlier, interrupted start may have moved it
            (folder / wnid).mkdir(exist_ok=True)
            source.rename(folder / wnid / image)
    (folder / "images").rmdir()


# The best documented recipe for one GPU: github.com/dkobak/simclr-cifar10, 44b2500, for 100 epochs of CIFAR-10 with
# ResNet-18. Decided on paper: nothing of it has been measured here.
_CIFAR = {
    "backbone": "resnet18",
    "proj_hidden": 1024,
    "proj_dim": 128,
    "proj_norm": False,
    "temp": 0.5,
    "bs": 512,
    "epochs": 100,
    "opt": "SGD",
    "lr": 0.12,
    "mm": 0.9,
    "wd": 5e-4,
    "n_ramp": 0,
    "color_s": 0.5,
    "crop_min": 0.2,
    "gray_p": 0.1,
    "blur_p": 0.0,
}
# The same source takes half the rate for 1,000 epochs, where .12 gained nothing. It names no rate for its 500 epochs;
# half is the default of its script.
LONG = 500  # epochs
_CIFAR_LONG = {"lr": 0.06}
# For photographs: nearer to SimCLR's own recipe, with blur; not tuned.
_LARGE = _CIFAR | {
    "bs": 256,
    "epochs": 500,
    "n_ramp": 10,
    "proj_norm": True,
    "crop_min": 0.08,
    "gray_p": 0.2,
    "blur_p": 0.5,
}
# Chosen on the validation split, for few epochs, so that the demonstration is short.
_SHAPES = _CIFAR | {
    "backbone": "resnet8",
    "bs": 256,
    "epochs": 15,
    "lr": 1.6,
    "n_ramp": 2,
    "proj_hidden": 256,
    "proj_norm": True,
    "temp": 0.2,
    "gray_p": 0.4,
}
# A generator for two CPU cores.
_TINY = {
    "net": "tiny",
    "corrupt": "gray+detail2",
    "distance": "pixels",
    "candidates": "16,16",
    "period": 512,
    "visits": 16,
    "periods": 3,
    "bs": 64,
    "lr": 2e-3,
    "ema": 0.995,
    "save_iter": 1,
}
# A generator for one GPU; what it is worth has not been measured. On the GPU of Results/gpu.json a step takes as long
# for 32 images as for 256, since launching its kernels takes the time: so 128 images, at twice the rate for 32.
_SMALL = {
    "net": "small",
    "corrupt": "gray+down2",
    "distance": "squeeze",
    "candidates": "64,32,16",
    "period": 1024,
    "visits": 20,
    "periods": 50,
    "bs": 128,
    "lr": 4e-4,
    "ema": 0.999,
}
# For a CPU: the small net; --epochs is cut to what two cores do in about half an hour (CPU_PIXELS). The learning rate
# and the temperature were chosen by cross-validation on CIFAR-10 (Results/choice-cifar10.json).
_ON_CPU = {
    "backbone": "resnet8",
    "proj_hidden": 256,
    "proj_norm": True,
    "temp": 0.2,
    "bs": 256,
    "epochs": 100,
    "lr": 1.2,
    "n_ramp": 2,
}
_TINY_10 = _TINY | {"corrupt": "gray+detail4", "periods": 10}
_TINY_6 = _TINY | {"corrupt": "gray+detail4", "periods": 6}
_OWN = {"size": 64}  # one's own images on a CPU
CPU_PIXELS = 2e9  # images x pixels x epochs that two cores train the small net on in about half an hour

_PUT = "put images at {train,val,test}/CLASS/IMAGE; Data/README.md shows the layout"
_DOWNLOAD = "put images there as CLASS/IMAGE, or move away the folder that it is missing from, to download the data set"
_SET_UP = "run `python Data/SetupMiniImagenet.py`"

_ROWS = [  # loader, name, size, has_val, recipe, generator_recipe, on_cpu, generator_on_cpu, on_long, setup
    Row(_load_shapes, "shapes", 32, True, _SHAPES, _TINY, p_gen=0.5),  # chosen on its validation split
    Row(_load_cifar("CIFAR10"), "cifar10", 32, False, _CIFAR, _SMALL, _ON_CPU, _TINY_10, _CIFAR_LONG, _DOWNLOAD),
    Row(_load_cifar("CIFAR100"), "cifar100", 32, False, _CIFAR, _SMALL, _ON_CPU, _TINY_10, _CIFAR_LONG, _DOWNLOAD),
    Row(_load_torchvision(_stl10), "stl10", 96, False, _LARGE, _SMALL, _ON_CPU, _TINY_6, {}, _DOWNLOAD),
    Row(
        _load_tiny_imagenet,
        "tinyImagenet",
        64,
        False,
        _CIFAR,
        _SMALL,
        _ON_CPU,
        _TINY_6,
        _CIFAR_LONG,
        _DOWNLOAD,
        splits={"test": "val"},
    ),
    Row(_load_tree, "miniImagenet", 84, True, _LARGE, _SMALL, _ON_CPU, _TINY_6, {}, _SET_UP),
    Row(_load_tree, "folder", 128, False, _LARGE, _SMALL, _ON_CPU | _OWN | {"epochs": 200}, _TINY_6 | _OWN, {}, _PUT),
]
DATASETS = {row.name: row for row in _ROWS}
no_val_split_datasets = [row.name for row in _ROWS if not row.has_val]
small_image_datasets = [row.name for row in _ROWS if row.small_images]


def is_named(data):
    """Return whether --data is the name of a data set, and not the path of a folder."""
    return data in DATASETS and data != "folder"


def place(data):
    """Return --data as runs keep it, so that it means the same wherever a script is started.

    A name of a data set stays; the path of a folder becomes absolute.
    """
    if not data:  # as of a shell variable that is not set
        raise UserError("--data: no path is given")
    path = Path(expanded(data))
    return data if is_named(data) or not path.is_dir() else str(path.resolve())


def is_read(data, folder):
    """Return whether images in a folder, which need not exist, would be taken for those of --data PATH."""
    row = get_row(data)
    folder = Path(folder).resolve()
    if not row.folder or not folder.is_relative_to(row.folder):
        return False
    parts = folder.relative_to(row.folder).parts
    if any(is_hidden(part) for part in parts):
        return False
    return not _has_splits(row.folder) or (bool(parts) and parts[0] in _read_folders(row))


def get_row(data, size=None):
    """Return the row of a named data set, or a new one for the path of an image folder; UserError if it is neither."""
    if is_named(data):
        row = DATASETS[data]
        return row if size is None else replace(row, size=size)
    path = Path(expanded(data))
    if not path.is_dir():
        names = [name for name in DATASETS if name != "folder"]
        near = nearest(str(data), names)
        meant = f"did you mean {near}? " if near else ""
        raise UserError(
            f"--data {shown(data)}: neither a data set nor a folder: {meant}choose from {', '.join(names)}, or the "
            "path of a folder of images"
        )
    path = path.resolve()
    row = DATASETS["folder"]
    row = replace(row, name=shown(path.name), folder=path, size=size or row.size)
    folders = _split_folders(path)
    for name in VAL_FOLDERS:
        if name in folders:
            return replace(row, has_val=True, splits={"val": name})
    return row


def get_data_splits(data, eval="val", options=DEFAULT_OPTIONS):
    """Return the `Splits` of a data set: images uint8 (N, 3, H, W), labels int64 (N,).

    data: a key of DATASETS or the path of a folder of images. eval: what is scored: "val"; "test"; or "cv", stratified
    3-fold cross-validation on train. Without a validation split "val" falls back to "cv", with a notice.
    options: how files are read. Raises UserError, one line with the remedy, on data that is missing or unfit.
    """
    if eval not in ("val", "cv", "test"):
        raise UserError(f"--eval {eval}: choose val, cv or test")
    row = get_row(data, options.size)
    note_unread(row)
    train = row.load(row, "train", options)
    if eval == "val" and not row.has_val:
        if len(train.classes) > 1:
            say(f"{row.name} has no validation split: scoring by 3-fold cross-validation on train (--eval cv)")
        eval = "cv"
    if eval == "cv":
        return Splits(train, train, eval)
    test = row.load(row, eval, options)
    check_same_classes(train, test)
    return Splits(train, test, eval)


def get_train_split(data, options=DEFAULT_OPTIONS):
    """Return only the train split of `get_data_splits`: the images that a generator learns from."""
    row = get_row(data, options.size)
    note_unread(row)
    return row.load(row, "train", options)


def get_ssl_data_augs(data, color_s=None, *, aug="full", size=None, crop_min=None, gray_p=None, blur_p=None):
    """Return the random views that SimCLR trains on, a batched `Augmentation`; None stands for the row's recipe.

    color_s: strength of the color jitter, 0 to about 1: (.8, .8, .8, .2) times it, for four images of five.
    aug: "full"; "crop", crop and flip alone; or "none", the images as they are.
    crop_min: smallest share of the area that a crop keeps. gray_p, blur_p: probabilities of grayscale and of blur.
    Raises UserError if `data` or `aug` is not known.
    """
    if aug not in ("full", "crop", "none"):
        raise UserError(f"--aug {shown(aug)}: choose full, crop or none")
    row = get_row(data, size)
    if aug == "none":
        return plain_views(row.size)
    given = {"color_s": color_s, "crop_min": crop_min, "gray_p": gray_p, "blur_p": blur_p}
    recipe = row.recipe | {name: value for name, value in given.items() if value is not None}
    crop_scale = (recipe["crop_min"], 1.0)
    if aug == "crop":
        return Augmentation(row.size, crop_scale=crop_scale, jitter_p=0.0, gray_p=0.0)
    strength = recipe["color_s"]
    return Augmentation(
        row.size,
        crop_scale=crop_scale,
        jitter=(0.8 * strength, 0.8 * strength, 0.8 * strength, 0.2 * strength),
        gray_p=recipe["gray_p"],
        blur_p=recipe["blur_p"],
    )


def plain_views(size):
    """Return the `Augmentation` that only scales images to [0, 1]: what evaluation sees."""
    return Augmentation(size, crop_scale=None, flip_p=0.0, jitter_p=0.0, gray_p=0.0)
