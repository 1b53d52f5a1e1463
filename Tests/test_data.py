"""Data and Shapes: every row, folders of every layout, the downloads from a local server, and what colors tell."""

import contextlib
import hashlib
import http.server
import io
import os
import pickle
import subprocess
import sys
import tarfile
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import one_line, real_file, save, save_shapes
from torchvision import datasets

import Data
import Evaluate
import Flags
import TrainSimCLR
from Images import Shapes
from Images.Split import Split, StreamedSplit

ROOT = Path(__file__).resolve().parents[1]
DEFAULTS = {"n_workers": 0, "size": 16}


def splits(data, eval="val", **options):
    """Data.get_data_splits, decoding in process, at 16 pixels unless given."""
    return Data.get_data_splits(str(data), eval, Data.Options(**(DEFAULTS | options)))


@pytest.fixture
def server(tmp_path):
    """Return (folder, address) of a server of that folder's files, on this machine only."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(folder))

        def handle(self):
            with contextlib.suppress(ConnectionError):  # torchvision looks for redirections, and hangs up
                super().handle()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
        yield folder, f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def md5(content):
    return hashlib.md5(content).hexdigest()


# the table


def test_the_lists_follow_from_the_rows():
    assert {"shapes", "cifar10", "cifar100", "stl10", "tinyImagenet", "miniImagenet", "folder"} <= Data.DATASETS.keys()
    for name, row in Data.DATASETS.items():
        assert row.name == name
        assert (name in Data.no_val_split_datasets) == (not row.has_val)
        assert (name in Data.small_image_datasets) == (row.size <= 64)


@pytest.mark.parametrize("device_type", ["cuda", "cpu"])
@pytest.mark.parametrize("data", Data.DATASETS)
def test_every_recipe_is_whole(data, device_type, tmp_path):
    data = str(tmp_path) if data == "folder" else data
    args = TrainSimCLR.build_parser(data, device_type).parse_args([])
    recipe = Data.get_row(data).recipe_for(device_type)
    missing = {key for key, value in Flags.hyper_parameters(args).items() if value is None} - {"size", "init"}
    assert not missing and recipe.keys() - {"size"} == Data.DATASETS["shapes"].recipe.keys()
    assert {key: getattr(args, key) for key in recipe} == recipe
    assert args.n_ramp < args.epochs


def test_what_is_no_data_set():
    one_line(lambda: splits("nowhere"), "--data nowhere", "shapes", "cifar10", "path")
    one_line(lambda: splits("folder"), "--data folder", "path")
    one_line(lambda: splits("shapes", "train"), "--eval train", "val, cv or test")
    one_line(lambda: splits("no\n\x1b[2J\udcff"), r"--data no\n\x1b[2J\xff: neither")
    for size in (10**6, 10**9, 10**30):
        one_line(lambda size=size: splits("shapes", size=size), f"--size {size}", "bytes", "smaller")


# shapes


@pytest.fixture(scope="module")
def shapes():
    return {eval: Data.get_data_splits("shapes", eval) for eval in ("val", "cv", "test")}


def test_shapes(shapes):
    train, val, test = shapes["val"].train, shapes["val"].test, shapes["test"].test
    for split, n in ((train, 8000), (val, 2000), (test, 2000)):
        assert split.images.dtype == torch.uint8 and split.images.shape == (n, 3, 32, 32)
        assert split.labels.dtype == torch.int64 and split.labels.bincount().tolist() == [n // 10] * 10
        assert split.classes == Shapes.CLASSES and len(split.images.flatten(1).unique(dim=0)) == n
    assert shapes["cv"].test is shapes["cv"].train and [splits.eval for splits in shapes.values()] == [*shapes]
    assert torch.equal(shapes["test"].train.images, train.images)  # the same bits in every call
    assert torch.equal(shapes["test"].train.labels, train.labels)
    assert not torch.equal(val.images, test.images) and not torch.equal(train.images[:2000], val.images)


def test_shapes_of_another_size_or_seed():
    labels = torch.arange(10)
    first, again, other = (Shapes.draw(labels, 20, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert first.shape == (10, 3, 20, 20) and torch.equal(first, again) and not torch.equal(first, other)


def test_redrawn_shapes_keep_their_outlines_and_nothing_else(monkeypatch):
    monkeypatch.setattr(Shapes, "SIZES", {"train": 600, "val": 20, "test": 20})  # two parts
    images, redrawn = Shapes.make_split("train", 16)[0], Shapes.redraw_split("train", 3, 16)
    assert redrawn.shape == (600, 3, 3, 16, 16) and redrawn.dtype == torch.uint8
    everything = torch.cat([images[:, None], redrawn], dim=1)
    means = everything.float().mean(dim=(3, 4)).flatten(2)  # of the colors
    assert all((means[:, i] - means[:, j]).abs().mean() > 20 for i in range(4) for j in range(i))
    monkeypatch.setattr(Shapes, "_set_contrast", lambda ground, figure, looks: (0 * ground, 0 * figure + 1))
    outlines = Shapes.make_split("train", 16)[0] > 127, Shapes.redraw_split("train", 3, 16) > 127
    assert 0.05 < outlines[0].float().mean() < 0.5
    for k in range(3):  # what noise turns over is little
        assert (outlines[1][:, k] != outlines[0]).float().mean() < 0.01
    assert (outlines[0][1:] != outlines[0][:-1]).float().mean() > 0.1


def test_colors_say_nothing_about_the_class(shapes):
    def colors(split):
        x = split.images.float().flatten(2) / 255
        edges = torch.linspace(0, 1, 9)
        bins = torch.bucketize(x, edges[1:-1])
        histogram = torch.stack([(bins == k).float().mean(2) for k in range(8)], 2).flatten(1)
        gray = x.mean(1)
        return torch.cat([x.mean(2), x.std(2), gray.mean(1, keepdim=True), gray.std(1, keepdim=True), histogram], 1)

    train, test = shapes["test"].train, shapes["test"].test
    accuracy = Evaluate.linear_accuracy(colors(train), train.labels, colors(test), test.labels)
    assert accuracy < 0.16  # chance is 0.1


def test_outlines_differ():
    axis = torch.linspace(-1, 1, 40)
    v, u = torch.meshgrid(axis, axis, indexing="ij")
    inside = torch.stack([Shapes.outline(name, u, v) < 0 for name in Shapes.CLASSES]).flatten(1)
    assert inside.any(1).all() and not inside.all(1).any() and len(inside.unique(dim=0)) == 10


# folders of images


def test_a_folder_with_all_splits(tmp_path):
    for seed, split in enumerate(Data.SPLITS):
        save_shapes(tmp_path / "images" / split, 2 + seed, seed=seed)
    found = {eval: splits(tmp_path / "images", eval, data_dir=tmp_path) for eval in ("val", "test", "cv")}
    assert [(len(each.train), len(each.test), each.eval) for each in found.values()] == [
        *((20, 30, "val"), (20, 40, "test"), (20, 20, "cv"))
    ]
    train = found["val"].train
    assert isinstance(train, Split) and train.images.shape == (20, 3, 16, 16)
    assert train.classes == sorted(Shapes.CLASSES) and (tmp_path / ".cache").is_dir()
    streamed = splits(tmp_path / "images", storage="stream", data_dir=tmp_path).test
    assert isinstance(streamed, StreamedSplit) and len(streamed) == 30


def test_a_folder_without_val_or_test(tmp_path, capsys):
    folder = save_shapes(tmp_path / "images/train", 2).parent
    found = splits(folder, data_dir=tmp_path)
    printed = "".join(capsys.readouterr())
    assert found.eval == "cv" and found.test is found.train and "no validation split" in printed
    one_line(lambda: splits(folder, "test", data_dir=tmp_path), "no folder", str(folder / "test"), "put images")


@pytest.mark.parametrize("name", ["val", "valid", "validation", "dev"])
def test_the_validation_split_by_its_other_names(tmp_path, capsys, name):
    for folder in ("train", name, "test"):
        save_shapes(tmp_path / "images" / folder, 2, seed=len(folder))
    assert Data.get_row(str(tmp_path / "images")).has_val
    found = splits(tmp_path / "images", data_dir=tmp_path)
    assert found.eval == "val" and len(found.test) == 20 and "".join(capsys.readouterr()) == ""
    same = splits(tmp_path / "images" / name, "cv", data_dir=tmp_path).train  # the folder alone, as class folders
    assert torch.equal(found.test.images, same.images)


def test_folders_that_are_not_read_are_named_once(tmp_path, capsys):
    for folder in ("train", "val", "validation", "car", "plane", ".hidden", "__MACOSX"):
        save_shapes(tmp_path / "images" / folder, 1, seed=len(folder))
    found = splits(tmp_path / "images", data_dir=tmp_path)
    (line,) = "".join(capsys.readouterr()).splitlines()
    assert line == "images: folders that are not read: car, plane, validation: its splits are train, val, test"
    assert torch.equal(found.test.images, splits(tmp_path / "images/val", "cv", data_dir=tmp_path).train.images)
    (tmp_path / "images/train").rename(tmp_path / "images/training")
    one_line(lambda: splits(tmp_path / "images", data_dir=tmp_path), "no folder", "its folders now: car, plane, train")


def test_classes_called_dev_are_classes_where_there_is_no_train(tmp_path, capsys):
    save_shapes(tmp_path / "images", 2, classes=["dev", "valid", "prod", *Shapes.CLASSES[:7]])
    found = splits(tmp_path / "images", data_dir=tmp_path)
    assert len(found.train) == 20 and found.eval == "cv" and "valid" in found.train.classes
    assert "not read" not in "".join(capsys.readouterr())


def test_without_labels_nothing_is_said_of_cross_validation(tmp_path, capsys):
    save(tmp_path / "flat/0.png", np.zeros((8, 8, 3), np.uint8))
    save_shapes(tmp_path / "one", 2, classes=["disc"])
    for name in ("flat", "one"):
        assert splits(tmp_path / name, data_dir=tmp_path).eval == "cv"
    assert "".join(capsys.readouterr()) == ""


def test_names_that_are_no_text(tmp_path, capsys):
    folder = save_shapes(tmp_path / "caf\udce9\n" / "train", 1, classes=["a\x1b", *Shapes.CLASSES[1:]]).parent
    found = splits(folder, data_dir=tmp_path)
    assert found.train.name == r"caf\xe9\n/train" and r"a\x1b" in found.train.classes
    assert r"caf\xe9\n has no validation split" in capsys.readouterr().out
    one_line(lambda: splits(folder, "test", data_dir=tmp_path), r"caf\xe9\n/test")


def test_class_folders_alone(tmp_path):
    folder = save_shapes(tmp_path / "images", 2)
    found = splits(folder, data_dir=tmp_path)
    assert len(found.train) == 20 and found.eval == "cv" and found.train.size == 16
    save_shapes(tmp_path / "other/test", 1)  # no class folders: a tree that lacks its train
    one_line(lambda: splits(tmp_path / "other", "cv", data_dir=tmp_path), "no folder", "train", "put images")


def invert(folder, dest):
    """Turn a tree inside out with Data/InvertDirStructure.py; return the folder that it writes."""
    command = [sys.executable, ROOT / "Data/InvertDirStructure.py", "--folder", folder, "--dest", dest]
    subprocess.run(command, check=True, capture_output=True)
    return dest / folder.name


@pytest.fixture
def both(tmp_path):
    """The same images of every split as a plain tree and inside out."""
    for seed, split in enumerate(Data.SPLITS):
        save_shapes(tmp_path / "images" / split, 2 + seed, seed=seed)
    return tmp_path / "images", invert(tmp_path / "images", tmp_path / "camnet_data")


@pytest.mark.parametrize("storage", ["memory", "stream"])
def test_a_tree_inside_out(both, tmp_path, storage):
    assert sorted(path.name for path in (both[1] / "star").iterdir()) == ["test", "train", "validation"]
    for eval in ("val", "test", "cv", "val"):  # the second time from the cache, in which every split has its own place
        plain, found = (splits(folder, eval, storage=storage, data_dir=tmp_path) for folder in both)
        assert found.eval == plain.eval == eval
        for ours, theirs in ((found.train, plain.train), (found.test, plain.test)):
            assert torch.equal(ours.labels, theirs.labels) and ours.classes == theirs.classes and len(ours)
            everything = [torch.arange(len(theirs))]
            assert torch.equal(*(next(split.batches(everything))[1] for split in (ours, theirs)))
    assert len([*tmp_path.glob(".cache/*.npy")]) == (6 if storage == "memory" else 0)


def test_inside_out_without_val_or_test(tmp_path, capsys):
    folder = invert(save_shapes(tmp_path / "images/train", 2).parent, tmp_path / "camnet_data")
    assert len(splits(folder, data_dir=tmp_path).train) == 20 and not Data.get_row(str(folder)).has_val
    assert "no validation split" in "".join(capsys.readouterr())
    one_line(lambda: splits(folder, "test", data_dir=tmp_path), str(folder), "no image in its CLASS/test", "fill")


def test_classes_that_are_not_in_every_split(both, tmp_path):
    for path in (both[1] / "star/validation").iterdir():
        path.unlink()
    one_line(lambda: splits(both[1], data_dir=tmp_path), "without an image in validation: star", "fill")
    (both[1] / "star/validation").rmdir()
    one_line(lambda: splits(both[1], data_dir=tmp_path), "without an image in validation: star", "fill")
    (both[1] / "star/train").rename(both[1] / "star/trian")
    one_line(lambda: splits(both[1], "cv", data_dir=tmp_path), "without an image in train: star", "fill")


def test_an_inverted_tree_names_what_it_does_not_read(both, tmp_path, capsys):
    (both[1] / "star/extra").mkdir()
    splits(both[1], data_dir=tmp_path)
    (line,) = "".join(capsys.readouterr()).splitlines()
    assert "not read: extra" in line
    for each in both[1].iterdir():
        (each / "validation").rename(each / "dev")
    assert len(splits(both[1], data_dir=tmp_path).test) == 30


def test_a_train_folder_means_the_plain_layout(both, tmp_path):
    save_shapes(both[1] / "train", 1)
    row = Data.get_row(str(both[1]))
    assert not row.has_val and len(splits(both[1], data_dir=tmp_path).train) == 10


@pytest.mark.parametrize(
    "image",
    [
        *("x/y/z/image.png", "x/y/image.png", "images/train/star/0.png", "training/star/0.png"),
        *(".x/train/0.png", "x/.train/0.png", "x/train/notes.txt", "x/.0.png", ""),
    ],
)
def test_neither_layout(tmp_path, image):
    if image:
        save(tmp_path / "images" / image, np.zeros((8, 8, 3), np.uint8), format="png")
    (tmp_path / "images/x/validation").mkdir(parents=True, exist_ok=True)
    for eval in ("val", "cv", "test"):
        message = one_line(lambda eval=eval: splits(tmp_path / "images", eval, data_dir=tmp_path), str(tmp_path))
        for layout in ("{train,val,test}/CLASS/IMAGE", "CLASS/{train,validation,test}/IMAGE", "put", "Data/README.md"):
            assert layout in message


def test_an_error_says_what_would_make_a_layout(tmp_path):
    black = np.zeros((8, 8, 3), np.uint8)
    for place in ("deep/inner/star", "named/Training/star", "named/Testing/star"):
        save(tmp_path / place / "0.png", black)
    found = [one_line(lambda name=name: splits(tmp_path / name, data_dir=tmp_path)) for name in ("deep", "named")]
    assert f"or give a folder in it: --data {tmp_path / 'deep' / 'inner'}" in found[0]
    assert "rename Testing to test, Training to train" in found[1]


def test_unlabeled_images_alone(tmp_path):
    save(tmp_path / "images/0.PNG", np.zeros((8, 8, 3), np.uint8))
    assert splits(tmp_path / "images", "cv", data_dir=tmp_path).train.labels.tolist() == [-1]


def test_other_classes_in_the_scored_split(tmp_path):
    save_shapes(tmp_path / "images/train", 1)
    save_shapes(tmp_path / "images/val", 1, classes=[*Shapes.CLASSES[:9], "M"])
    one_line(lambda: splits(tmp_path / "images", data_dir=tmp_path), "val", "only in", "L", "M")


@pytest.mark.parametrize("data", ["cifar10", "stl10", "tinyImagenet"])
def test_a_tree_in_the_place_of_a_download(tmp_path, data, capsys):
    test = "val" if data == "tinyImagenet" else "test"
    save_shapes(tmp_path / data / "train", 2)
    save_shapes(tmp_path / data / test, 1, seed=1)
    assert len(splits(data, "test", data_dir=tmp_path, size=None).test.images) == 10
    assert splits(data, data_dir=tmp_path).eval == "cv" and "no validation split" in "".join(capsys.readouterr())


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100"])
def test_each_cifar_is_read_as_torchvision_gives_it(name, tmp_path, monkeypatch):
    asked = []

    def dataset(root, train, download):
        asked.append((root, train, download))
        pixels = np.arange(2 * 32 * 32 * 3, dtype=np.uint8).reshape(2, 32, 32, 3)
        return SimpleNamespace(data=pixels, targets=[1, 0], classes=["x", "y"])

    monkeypatch.setattr(Data.torchvision.datasets, name, dataset)
    found = splits(name.lower(), "test", data_dir=tmp_path, size=None)
    assert asked == [(tmp_path / name.lower(), train, True) for train in (True, False)]
    assert found.train.classes == ["x", "y"]
    assert found.train.labels.tolist() == [1, 0]
    assert found.train.images[1, 2, 3, 4] == (3072 + 3 * (32 * 3 + 4) + 2) % 256


@pytest.mark.parametrize("data", ["cifar10", "cifar100", "stl10", "tinyImagenet"])
def test_half_a_tree_in_the_place_of_a_download(tmp_path, data):
    save_shapes(tmp_path / data / "train", 1)
    missing = tmp_path / data / ("val" if data == "tinyImagenet" else "test")
    message = one_line(
        lambda: splits(data, "test", data_dir=tmp_path), f"no folder {missing}", "put images there", "away"
    )
    assert "downloads itself" not in message


def test_mini_imagenet(tmp_path):
    message = one_line(lambda: splits("miniImagenet", data_dir=tmp_path), "Data/SetupMiniImagenet.py")
    assert str(tmp_path / "miniImagenet/train") in message and list(tmp_path.iterdir()) == []
    for split in Data.SPLITS:
        save_shapes(tmp_path / "miniImagenet" / split, 1)
    found = splits("miniImagenet", data_dir=tmp_path, size=None)
    assert found.eval == "val" and found.test.images.shape == (10, 3, 84, 84)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    archive = real_file("data/tiny-imagenet-25.tar.gz")
    folder = tmp_path_factory.mktemp("tiny")
    subprocess.run([sys.executable, archive.parent / "unpack.py", "tiny", folder], check=True)
    return folder


def test_real_images(tiny, tmp_path):
    found = Data.get_data_splits(str(tiny), options=Data.Options(size=64, n_workers=0, data_dir=tmp_path))
    assert found.eval == "val" and len(found.train.classes) == 25
    assert found.train.images.shape == (12500, 3, 64, 64) and found.test.images.shape == (1250, 3, 64, 64)
    assert found.train.labels.bincount().tolist() == [500] * 25 and found.test.labels.bincount().tolist() == [50] * 25
    again = Data.get_data_splits(str(tiny), options=Data.Options(size=64, n_workers=0, data_dir=tmp_path))
    assert torch.equal(found.test.images, again.test.images)


# downloads


def write_tar(archive, folder, contents):
    """Write {name: content} as files of one folder of an archive; return the archive's path."""
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in contents.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return archive


def cifar_files(classes=10):
    """Return {name: content} of a CIFAR-10 of 10 images a file, in the real format, and the images of all files."""
    random, contents, images = np.random.default_rng(0), {}, {}
    for name in [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]:
        images[name] = random.integers(0, 256, (10, 3, 32, 32), dtype=np.uint8)
        contents[name] = pickle.dumps({"data": images[name].reshape(10, 3072), "labels": [*range(classes)]})
    contents["batches.meta"] = pickle.dumps({"label_names": [f"class {k}" for k in range(classes)]})
    return contents, images


@pytest.fixture
def cifar(server, monkeypatch):
    """A stand-in CIFAR-10, served at the address that torchvision downloads from: its archive and its images."""
    folder, address = server
    contents, images = cifar_files()
    archive = write_tar(folder / "cifar-10-python.tar.gz", "cifar-10-batches-py", contents)
    sums = [[name, md5(content)] for name, content in contents.items()]
    meta = {"filename": "batches.meta", "key": "label_names", "md5": sums[6][1]}
    values = {"url": f"{address}/{archive.name}", "tgz_md5": md5(archive.read_bytes()), "meta": meta}
    for name, value in {**values, "train_list": sums[:5], "test_list": sums[5:6]}.items():
        monkeypatch.setattr(datasets.CIFAR10, name, value)
    return archive, images


def test_cifar10_downloads_itself(cifar, tmp_path):
    archive, images = cifar
    found = splits("cifar10", "test", data_dir=tmp_path, size=None)
    archive.unlink()  # the second call needs no network
    again = splits("cifar10", "cv", data_dir=tmp_path, size=None)
    expected = np.concatenate([images[f"data_batch_{k}"] for k in range(1, 6)])
    assert (found.train.images.numpy() == expected).all() and torch.equal(found.train.images, again.train.images)
    assert (found.test.images.numpy() == images["test_batch"]).all() and found.train.labels.dtype == torch.int64
    assert found.test.labels.tolist() == [*range(10)] and found.train.classes[9] == "class 9"
    one_line(lambda: splits("cifar10", "cv", data_dir=tmp_path, size=48), "--size 48", "32 pixels")


def test_a_corrupted_download_is_done_again(cifar, tmp_path):
    archive, _ = cifar
    whole = archive.read_bytes()
    for broken in (whole[:-7], b"<html>moved</html>", b""):
        archive.write_bytes(broken)
        one_line(lambda: splits("cifar10", data_dir=tmp_path, size=None), "--data cifar10", "orrupted", "try again")
    archive.write_bytes(whole)
    assert len(splits("cifar10", data_dir=tmp_path, size=None).train) == 50


def _rank(rank, data_dir, address):
    os.environ["LOCAL_RANK"] = str(rank)  # as torchrun does
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    if rank == 1:
        datasets.cifar.download_and_extract_archive = None
    assert len(splits("cifar10", data_dir=data_dir, size=None).train) == 50
    dist.destroy_process_group()


def test_rank_0_downloads(cifar, tmp_path):
    arguments = (tmp_path / "Data", f"file://{tmp_path}/meeting")
    torch.multiprocessing.start_processes(_rank, arguments, nprocs=2, start_method="fork")


def test_an_interrupted_extraction_is_done_again(cifar, tmp_path):
    splits("cifar10", data_dir=tmp_path, size=None)
    (batch,) = (tmp_path / "cifar10").rglob("data_batch_3")
    batch.write_bytes(batch.read_bytes()[:100])
    assert len(splits("cifar10", data_dir=tmp_path, size=None).train) == 50


@pytest.mark.parametrize("data", ["cifar10", "tinyImagenet"])
def test_no_network_blocks_nothing(cifar, tiny_zip, tmp_path, monkeypatch, data):
    with monkeypatch.context() as patch:
        patch.setattr(datasets.CIFAR10, "url", "http://127.0.0.1:1/cifar-10-python.tar.gz")
        patch.setattr(Data, "TINY_IMAGENET", ("http://127.0.0.1:1/tiny-imagenet-200.zip", "0"))
        for _ in range(2):
            one_line(lambda: splits(data, data_dir=tmp_path / "new", size=None), f"{tmp_path}/new", "refused", "try")
    assert len(splits(data, data_dir=tmp_path / "new", size=None).train) in (50, 6)


@pytest.mark.parametrize("answer", [b"HTTP/1.0 200 OK\r\nContent-Length: 1000\r\n\r\nxxx", b"no HTTP\r\n", b""])
def test_an_answer_that_breaks_off(tmp_path, monkeypatch, server, answer):
    def serve(handler):
        handler.wfile.write(answer)
        handler.close_connection = True

    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "do_GET", serve)
    monkeypatch.setattr(datasets.CIFAR10, "url", f"{server[1]}/cifar.tar.gz")
    one_line(lambda: splits("cifar10", data_dir=tmp_path), "--data cifar10", "try again")


WNIDS = ("n01", "n02", "n03")


@pytest.fixture
def tiny_zip(server, monkeypatch):
    """A stand-in tiny-imagenet-200.zip in the official layout: 6 training images, and 9 to validate with, unsorted."""
    folder, address = server
    archive, root = folder / "tiny-imagenet-200.zip", folder / "made/tiny-imagenet-200"
    notes = []
    for label, wnid in enumerate(WNIDS):
        gray = np.full((64, 64, 3), 80 * label, np.uint8)
        for index in range(2):
            save(root / f"train/{wnid}/images/{wnid}_{index}.JPEG", gray)
        (root / f"train/{wnid}/{wnid}_boxes.txt").write_text("boxes")
        for index in range(label, 9, 3):
            save(root / f"val/images/val_{index}.JPEG", gray)
            notes.append(f"val_{index}.JPEG\t{wnid}\t0\t0\t62\t62\n")
    (root / "val/val_annotations.txt").write_text("".join(notes))
    save(root / "test/images/test_0.JPEG", gray)
    with zipfile.ZipFile(archive, "w") as writer:
        for path in sorted(root.rglob("*")):
            writer.write(path, path.relative_to(root.parent))
    monkeypatch.setattr(Data, "TINY_IMAGENET", (f"{address}/{archive.name}", md5(archive.read_bytes())))
    return archive


def check_tiny(data_dir):
    """Load what tiny_zip holds and look at every image: its gray tells its class."""
    found = splits("tinyImagenet", "test", data_dir=data_dir, size=None)
    assert found.train.classes == found.test.classes == [*WNIDS]
    assert found.train.labels.tolist() == [0, 0, 1, 1, 2, 2] and found.test.labels.bincount().tolist() == [3, 3, 3]
    assert torch.equal((found.test.images[:, 0, 0, 0] / 80).round().long(), found.test.labels)


def test_tiny_imagenet_downloads_itself(tiny_zip, tmp_path):
    check_tiny(tmp_path)
    tiny_zip.unlink()
    check_tiny(tmp_path)


@pytest.mark.parametrize("moved", range(0, 10, 3))
def test_an_interruption_while_sorting(tiny_zip, tmp_path, monkeypatch, moved):
    rename, done = Path.rename, []

    def interrupted(path, target):
        if path.suffix == ".JPEG":
            if len(done) == moved:
                raise KeyboardInterrupt
            done.append(path)
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt) if moved < 9 else contextlib.nullcontext():
            splits("tinyImagenet", data_dir=tmp_path, size=None)
    check_tiny(tmp_path)


def test_an_interruption_while_extracting(tiny_zip, tmp_path, monkeypatch):
    def some(archive, folder):
        archive.extract("tiny-imagenet-200/train/n01/images/n01_0.JPEG", folder)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "extractall", some)
        with pytest.raises(KeyboardInterrupt):
            splits("tinyImagenet", data_dir=tmp_path, size=None)
    check_tiny(tmp_path)


def test_an_archive_unpacked_by_hand(tiny_zip, tmp_path):
    with zipfile.ZipFile(tiny_zip) as archive:
        archive.extractall(tmp_path)
    (tmp_path / "tiny-imagenet-200").rename(tmp_path / "tinyImagenet")
    tiny_zip.unlink()
    check_tiny(tmp_path)


def test_a_corrupted_tiny_imagenet(tiny_zip, tmp_path):
    whole = tiny_zip.read_bytes()
    tiny_zip.write_bytes(whole[:-50])
    one_line(lambda: splits("tinyImagenet", data_dir=tmp_path, size=None), "orrupted", "try again")
    tiny_zip.write_bytes(whole)
    check_tiny(tmp_path)


def test_stl10_downloads_itself(server, tmp_path, monkeypatch):
    folder, address = server
    random = np.random.default_rng(0)
    contents = {"class_names.txt": b"cat\ndog\n", "fold_indices.txt": b""}
    for name, labels in (("train", [1, 2, 2]), ("test", [2, 1]), ("unlabeled", [0] * 4)):
        contents[f"{name}_X.bin"] = random.bytes(3 * 96 * 96 * len(labels))
        contents[f"{name}_y.bin"] = bytes(labels)
    archive = write_tar(folder / "stl10_binary.tar.gz", "stl10_binary", contents)
    sums = {name: [name, md5(content)] for name, content in contents.items()}
    lists = {"train_list": ("train_X.bin", "train_y.bin", "unlabeled_X.bin"), "test_list": ("test_X.bin", "test_y.bin")}
    for key, names in lists.items():
        monkeypatch.setattr(datasets.STL10, key, [sums[name] for name in names])
    monkeypatch.setattr(datasets.STL10, "url", f"{address}/{archive.name}")
    monkeypatch.setattr(datasets.STL10, "tgz_md5", md5(archive.read_bytes()))
    found = splits("stl10", "test", data_dir=tmp_path, size=None)
    assert found.train.labels.tolist() == [0, 1, 1, -1, -1, -1, -1] and found.test.labels.tolist() == [1, 0]
    assert found.train.images.shape == (7, 3, 96, 96) and found.train.classes == ["cat", "dog"]
    stored = np.frombuffer(contents["unlabeled_X.bin"], np.uint8).reshape(4, 3, 96, 96)  # column by column
    assert (found.train.images[3:].numpy() == stored.transpose(0, 1, 3, 2)).all()


# views


def test_the_views_of_a_row():
    for data, row in Data.DATASETS.items():
        if data == "folder":
            continue
        views, strength = Data.get_ssl_data_augs(data), row.recipe["color_s"]
        assert views.size == row.size and views.crop_scale == (row.recipe["crop_min"], 1.0)
        assert views.jitter == pytest.approx((0.8 * strength,) * 3 + (0.2 * strength,)) and views.jitter_p == 0.8
        assert (views.gray_p, views.blur_p, views.flip_p) == (row.recipe["gray_p"], row.recipe["blur_p"], 0.5)


def test_flags_replace_the_recipe():
    assert Data.get_ssl_data_augs("shapes", 1.0).jitter == pytest.approx((0.8, 0.8, 0.8, 0.2))
    assert Data.get_ssl_data_augs("shapes", 0.0).jitter == (0.0, 0.0, 0.0, 0.0)
    views = Data.get_ssl_data_augs("cifar10", size=48, crop_min=0.5, gray_p=0.0, blur_p=1.0)
    assert (views.size, views.crop_scale, views.gray_p, views.blur_p) == (48, (0.5, 1.0), 0.0, 1.0)


def test_weaker_views():
    images = Shapes.draw(torch.arange(10), 32, torch.Generator().manual_seed(0))
    plain = images.float() / 255
    one_line(lambda: Data.get_ssl_data_augs("shapes", aug="crops"), "--aug crops", "full, crop or none")
    for views in (Data.get_ssl_data_augs("shapes", aug="none"), Data.plain_views(32)):
        assert torch.equal(views(images, torch.Generator()), plain)
    constant = torch.arange(30, dtype=torch.uint8).view(10, 3, 1, 1).expand(10, 3, 32, 32).contiguous()
    crop = Data.get_ssl_data_augs("shapes", aug="crop")
    torch.testing.assert_close(crop(constant, torch.Generator()), constant / 255)  # colors stay
    assert not torch.allclose(crop(images, torch.Generator()), plain)


@pytest.mark.parametrize("layout", ["SPLIT/CLASS", "CLASS/SPLIT"])
@pytest.mark.parametrize("is_loose", [True, False])
def test_images_next_to_the_splits_are_told(tmp_path, capsys, layout, is_loose):
    images = tmp_path / "images"
    for name in ("a", "b"):
        for split in ("train", "test"):
            folder = images / split / name if layout == "SPLIT/CLASS" else images / name / split
            save(folder / "0.png", np.zeros((8, 8, 3), np.uint8))
    if is_loose:
        save((images if layout == "SPLIT/CLASS" else images / "a") / "1.png", np.zeros((8, 8, 3), np.uint8))
    splits(images, "test", data_dir=tmp_path)
    place = "IMAGE" if layout == "SPLIT/CLASS" else "CLASS/IMAGE"
    assert (f"images next to its splits, as {place}, are not read" in capsys.readouterr().err) == is_loose
