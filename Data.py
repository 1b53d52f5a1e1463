"""The registry of data sets: one row of DATASETS each, and the splits and augmentations that follow from it."""

import http.client
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torchvision import datasets
from torchvision.datasets.utils import download_and_extract_archive

from Augmentations import Augmentation
from Distributed import first_rank_first, say
from Images import Shapes
from Images.Folders import Options, check_same_classes, holds_images, load_folder
from Images.Split import Split, StreamedSplit
from Utils import UserError

DEFAULT_OPTIONS = Options()
SPLITS = ("train", "val", "test")
INSIDE_OUT = {"train": "train", "val": "validation", "test": "test"}  # as Data/InvertDirStructure.py names them
TINY_IMAGENET = ("http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de")  # url, md5


class Splits(NamedTuple):
    """What a run learns from and what it is scored on."""

    train: Split | StreamedSplit  # labels of -1: no label, learnt from but not probed
    test: Split | StreamedSplit  # the split that is scored; `train` itself under "cv"
    eval: str  # "val", "test", or "cv": stratified 3-fold on train


@dataclass(frozen=True)
class Row:
    """All that the rest of the code may assume about a data set."""

    load: Callable  # (row, split, options) -> Split
    name: str
    size: int  # side of the square images, in pixels
    n_classes: int | None  # None: as many as there are class folders
    has_val: bool  # a validation split of its own; else hyper-parameters are chosen by cross-validation on train
    setup: str  # what puts the files in place
    recipe: dict = field(default_factory=dict)  # defaults of the encoder's training flags that suit it
    generator: dict = field(default_factory=dict)  # the same of TrainCamNet.py
    folder: Path | None = None  # where its files lie; None: data_dir / name
    splits: dict = field(default_factory=dict)  # names of split folders that differ: {"test": "val"}

    @property
    def small_images(self):
        """Whether encoders need the stem for small images."""
        return self.size <= 64


def _load_shapes(row, split, options):
    images, labels = Shapes.make_split(split, options.size or row.size)
    return Split(images, labels, Shapes.CLASSES, f"shapes/{split}")


def _has_splits(root):
    return any((root / each).is_dir() for each in SPLITS)


def _is_inside_out(root):
    """Return whether a folder holds CLASS/SPLIT/IMAGE, what Data/InvertDirStructure.py writes, and no SPLIT/CLASS."""
    return not _has_splits(root) and any(holds_images(root, f"CLASS/{each}/IMAGE") for each in INSIDE_OUT.values())


def _load_tree(row, split, options):
    """An ImageFolder tree: SPLIT/CLASS/IMAGE in its folder; that of a path may be CLASS/SPLIT/IMAGE, or train alone."""
    root, inner = row.folder or options.data_dir / row.name, ""
    folder = root / row.splits.get(split, split)
    if row.folder and _is_inside_out(root):
        folder, inner = root, INSIDE_OUT[split]
    elif split == "train" and row.folder and not _has_splits(root):
        folder = root
        if not holds_images(root, "CLASS/IMAGE") and not holds_images(root, "IMAGE"):
            raise UserError(
                f"--data {row.name}: no readable image in {root} as {{train,val,test}}/CLASS/IMAGE, as "
                "CLASS/{train,validation,test}/IMAGE or as CLASS/IMAGE: put them so; Data/README.md shows the layouts"
            )
    if not folder.is_dir():
        raise UserError(f"--data {row.name}: no folder {folder}: {row.setup}")
    return load_folder(folder, options.size or row.size, options, split=inner, name=f"{row.name}/{split}")


def _load_torchvision(build):
    """Return a loader of a torchvision data set that downloads itself; an ImageFolder tree in its place wins."""

    def load(row, split, options):
        root = options.data_dir / row.name
        if (root / "train").is_dir():
            return _load_tree(row, split, options)
        remedy = f"put images at {root}/{{train,test}}/CLASS/IMAGE"
        images, labels, classes = _fetch(row, root, lambda: build(root, split), remedy)
        images = torch.as_tensor(images)
        if images.shape[2] != row.size:
            raise UserError(f"--size {row.size}: {row.name} has {images.shape[2]} pixels; --size is for image folders")
        return Split(images, torch.as_tensor(labels, dtype=torch.int64), list(classes), f"{row.name}/{split}")

    return load


def _fetch(row, root, work, remedy):
    """Return what work() returns, which downloads what is not in root; of several processes rank 0 does so."""

    def guarded():
        try:
            return work()
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            reason = str(error).strip().split("\n")[0]
            raise UserError(
                f"--data {row.name}: not in {root}, and fetching it failed ({reason}): try again with a network, or "
                + remedy
            ) from error

    return first_rank_first(guarded)


def _load_cifar(dataset):
    def build(root, split):
        data = dataset(root, train=split == "train", download=True)
        return data.data.transpose(0, 3, 1, 2).copy(), data.targets, data.classes

    return _load_torchvision(build)


def _stl10(root, split):
    data = datasets.STL10(root, "train+unlabeled" if split == "train" else "test", download=True)
    return data.data, data.labels, data.classes


def _load_tiny_imagenet(row, split, options):
    """Download the official archive, and sort its val images into class folders, which that archive does not."""
    root, (url, md5) = options.data_dir / row.name, TINY_IMAGENET

    def work():
        if not (root / "train").is_dir():
            download_and_extract_archive(url, options.data_dir, md5=md5)
            (options.data_dir / "tiny-imagenet-200").rename(root)  # whole: an interrupted extraction is done again
        if (root / "val" / "images").is_dir():
            _sort_tiny_imagenet_val(root / "val")

    _fetch(row, root, work, f"move the folder tiny-imagenet-200 of {url} to {root}")
    return _load_tree(row, split, options)


def _sort_tiny_imagenet_val(folder):
    for line in (folder / "val_annotations.txt").read_text().splitlines():
        image, wnid = line.split("\t")[:2]
        source = folder / "images" / image
        if source.exists():  # an earlier, interrupted start may have moved it
            (folder / wnid).mkdir(exist_ok=True)
            source.rename(folder / wnid / image)
    (folder / "images").rmdir()


_CIFAR = {  # the best documented recipe for one GPU: github.com/dkobak/simclr-cifar10, 44b2500
    **{"backbone": "resnet18", "proj_hidden": 1024, "proj_dim": 128, "proj_norm": False, "temp": 0.5},
    **{"bs": 512, "epochs": 500, "opt": "SGD", "lr": 0.12, "mm": 0.9, "wd": 5e-4, "n_ramp": 0},
    **{"color_s": 0.5, "crop_min": 0.2, "gray_p": 0.1, "blur_p": 0.0},
}
_LARGE = {  # nearer to SimCLR's own for photographs, where blur helps; not tuned
    **_CIFAR,
    **{"bs": 256, "lr": 0.12, "n_ramp": 10, "proj_norm": True, "crop_min": 0.08, "gray_p": 0.2, "blur_p": 0.5},
}
# Chosen on the validation split, for as many epochs as leave the demonstration short.
_SHAPES = {
    **_CIFAR,
    **{"backbone": "resnet8", "bs": 256, "epochs": 15, "lr": 1.6, "n_ramp": 2},
    **{"proj_hidden": 256, "proj_norm": True, "temp": 0.2, "gray_p": 0.4},
}
_TINY = {  # for two CPU cores
    **{"net": "tiny", "corrupt": "gray+detail2", "distance": "pixels", "m": "16,16"},
    **{"period": 512, "visits": 16, "periods": 3, "bs": 64, "lr": 2e-3, "ema": 0.995, "save_iter": 1},
}
_SMALL = {  # for one GPU
    **{"net": "small", "corrupt": "gray+down2", "distance": "squeeze", "m": "64,32,16"},
    **{"period": 1024, "visits": 20, "periods": 50, "bs": 32, "lr": 2e-4, "ema": 0.999},
}
_TREE = "put images at {train,val,test}/CLASS/IMAGE in it; Data/README.md shows the layout"

DATASETS = {
    row.name: row
    for row in (
        Row(_load_shapes, "shapes", 32, 10, True, "nothing: it is generated", _SHAPES, _TINY),
        Row(_load_cifar(datasets.CIFAR10), "cifar10", 32, 10, False, "downloads itself", _CIFAR, _SMALL),
        Row(_load_cifar(datasets.CIFAR100), "cifar100", 32, 100, False, "downloads itself", _CIFAR, _SMALL),
        Row(_load_torchvision(_stl10), "stl10", 96, 10, False, "downloads itself", _LARGE, _SMALL),
        Row(
            _load_tiny_imagenet,
            "tinyImagenet",
            64,
            200,
            False,
            "downloads itself",
            _CIFAR,
            _SMALL,
            splits={"test": "val"},
        ),
        Row(_load_tree, "miniImagenet", 84, 100, True, "run `python Data/SetupMiniImagenet.py`", _LARGE, _SMALL),
        Row(_load_tree, "folder", 128, None, False, _TREE, _LARGE, _SMALL),
    )
}
no_val_split_datasets = [row.name for row in DATASETS.values() if not row.has_val]
small_image_datasets = [row.name for row in DATASETS.values() if row.small_images]


def get_row(data, size=None):
    """Return the row of a data set's name, or one made for the path of an image folder. Raises UserError on neither."""
    if data in DATASETS and data != "folder":
        return DATASETS[data] if size is None else replace(DATASETS[data], size=size)
    path = Path(data).expanduser()
    if not path.is_dir():
        names = ", ".join(name for name in DATASETS if name != "folder")
        raise UserError(
            f"--data {data}: neither a data set nor a folder: choose from {names}, or the path of a folder of images"
        )
    row, path = DATASETS["folder"], path.resolve()
    val = path.glob("[!.]*/validation") if _is_inside_out(path) else [path / "val"]
    has_val = any(each.is_dir() for each in val)
    return replace(row, name=path.name, folder=path, has_val=has_val, size=size or row.size)


def get_data_splits(data, eval="val", options=DEFAULT_OPTIONS):
    """Return the `Splits` of a data set: images uint8 (N, 3, H, W), labels int64 (N,).

    data: a key of DATASETS or the path of a folder of images. eval: what is scored: "val"; "test"; or "cv", stratified
    3-fold cross-validation on train. Without a validation split "val" falls back to "cv", with a notice.
    options: how files are read. Raises UserError, one line with the remedy, on data that is missing or unfit.
    """
    if eval not in ("val", "cv", "test"):
        raise UserError(f"--eval {eval}: choose val, cv or test")
    row = get_row(data, options.size)
    if eval == "val" and not row.has_val:
        say(f"{row.name} has no validation split: scoring by 3-fold cross-validation on train (--eval cv)")
        eval = "cv"
    train = row.load(row, "train", options)
    if eval == "cv":
        return Splits(train, train, eval)
    test = row.load(row, eval, options)
    check_same_classes(train, test)
    return Splits(train, test, eval)


def get_train_split(data, options=DEFAULT_OPTIONS):
    """Return the train split alone of a data set, as `get_data_splits` does: what a generator learns from."""
    row = get_row(data, options.size)
    return row.load(row, "train", options)


def get_ssl_data_augs(data, color_s=None, *, aug="full", size=None, crop_min=None, gray_p=None, blur_p=None):
    """Return the random views that SimCLR trains on, a batched `Augmentation`; None stands for the row's recipe.

    color_s: strength of the colour jitter, 0 to about 1: (.8, .8, .8, .2) times it, for four images of five.
    aug: "full"; "crop", crop and flip alone; or "none", the images as they are.
    crop_min: smallest share of the area that a crop keeps. gray_p, blur_p: probabilities of greyscale and of blur.
    """
    row = get_row(data, size)
    if aug == "none":
        return plain_views(row.size)
    recipe = {"color_s": color_s, "crop_min": crop_min, "gray_p": gray_p, "blur_p": blur_p}
    recipe = {key: row.recipe[key] if value is None else value for key, value in recipe.items()}
    crop_scale = (recipe["crop_min"], 1.0)
    if aug == "crop":
        return Augmentation(row.size, crop_scale=crop_scale, jitter_p=0.0, gray_p=0.0)
    strength = recipe["color_s"]
    jitter = (0.8 * strength, 0.8 * strength, 0.8 * strength, 0.2 * strength)
    return Augmentation(
        row.size, crop_scale=crop_scale, jitter=jitter, gray_p=recipe["gray_p"], blur_p=recipe["blur_p"]
    )


def plain_views(size):
    """Return the `Augmentation` that only scales images to [0, 1]: what evaluation sees."""
    return Augmentation(size, crop_scale=None, flip_p=0.0, jitter_p=0.0, gray_p=0.0)
