"""Folders of images: bad files, what is listed, the cache, and streaming against memory."""

import contextlib
import dataclasses
import errno
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import one_line, save
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

import Devices
import Locks
from Images import Cache, Decode, Folders
from Images.Decode import decode
from Images.Folders import Options, check_same_classes, holds_images, list_folder, load_folder
from Images.Split import Split, StreamedSplit
from Utils import UserError

ROOT = Path(__file__).parents[1]
BATCHES = [torch.tensor(batch) for batch in ([5, 0, 3], [1], [4, 2, 2])]


@pytest.fixture
def folder(tmp_path):
    """Six random 8 x 8 PNGs in the classes "a b" and "é", some of them in sub-folders, among hidden files."""
    random = np.random.default_rng(0)
    for name in ("a b/0.png", "a b/1.PNG", "a b/deep/er/2.png", "é/0.png", "é/x y ü.png", "é/z/9.png"):
        save(tmp_path / "images" / name, random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    for name in (".DS_Store", ".hidden/1.png", "é/._0.png", "é/Thumbs.db", "__MACOSX/é/._0.png", ".loose.png"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return tmp_path / "images"


@pytest.fixture
def load(folder, tmp_path):
    """load_folder of that folder at 8 pixels, in process, its cache in tmp_path/.cache."""
    usual = {"n_workers": 0, "storage": "memory", "data_dir": tmp_path}
    return lambda size=8, **options: load_folder(folder, size, Options(**(usual | options)))


def no_decode(*_):
    raise AssertionError("decoded")


# bad files


@pytest.mark.parametrize("n_workers", [0, 2])
@pytest.mark.parametrize("storage", ["memory", "stream"])
def test_a_bad_file_is_named(load, folder, storage, n_workers):
    (folder / "é/0.png").write_text("no")
    order = [torch.arange(3), torch.arange(3, 6)]
    one_line(
        lambda: list(load(storage=storage, n_workers=n_workers).batches(order)), str(folder / "é/0.png"), "--skip_bad"
    )


@pytest.mark.parametrize("n_workers", [0, 2])
@pytest.mark.parametrize("storage", ["memory", "stream"])
def test_bad_files_are_dropped_from_the_listing(load, folder, tmp_path, monkeypatch, capsys, storage, n_workers):
    whole = load(data_dir=tmp_path / "before")
    (folder / "a b/1.PNG").write_text("no")
    (folder / "é/0.png").write_text("")
    capsys.readouterr()
    good = [torch.tensor(batch) for batch in ([3, 0], [1, 2, 2])]
    with monkeypatch.context() as patch:
        for _ in range(2):  # decoded, then from what is kept of it
            split = load(skip_bad=True, storage=storage, n_workers=n_workers)
            assert len(split) == 4 and split.labels.tolist() == [0, 0, 1, 1]
            (line,) = capsys.readouterr().err.splitlines()
            assert "left out 2 of 6" in line and "1.PNG" in line
            patch.setattr(Decode, "decode", no_decode)
    for indices, images in split.batches(good):
        assert torch.equal(images, whole.images[torch.tensor([0, 2, 4, 5])[indices]])
    one_line(lambda: load(storage=storage), "a b/1.PNG", "not an image", "--skip_bad")


@pytest.mark.parametrize("storage", ["memory", "stream"])
def test_only_bad_files(tmp_path, storage):
    (tmp_path / "images/a").mkdir(parents=True)
    (tmp_path / "images/a/1.png").touch()
    options = Options(skip_bad=True, n_workers=0, data_dir=tmp_path, storage=storage)
    for _ in range(2):
        one_line(lambda: load_folder(tmp_path / "images", 8, options), "none of its 1")


@pytest.mark.parametrize("n_workers", [0, 2])
def test_a_file_that_goes_bad_while_it_is_streamed(load, folder, n_workers):
    split = load(storage="stream", n_workers=n_workers, skip_bad=True)
    (folder / "é/0.png").write_text("no")
    parts = str(folder / "é/0.png"), "not an image", "put it back", "--resume auto"
    one_line(lambda: list(split.batches([torch.arange(6)])), *parts)
    (folder / "é/0.png").unlink()
    one_line(lambda: list(split.batches([torch.arange(6)])), "é/0.png: No such file")


def test_streaming_checks_the_files_once(load, folder, tmp_path, monkeypatch, capsys):
    load(storage="stream")
    (record,) = (tmp_path / ".cache").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(Decode, "decode", no_decode)
        load(storage="stream")
    record.write_text(record.read_text().replace("{}", '{"0": "x"}'))  # a bad file that is none
    assert len(load(storage="stream", skip_bad=True)) == 6 and "decoding again" in capsys.readouterr().err
    load()  # the images join the record
    assert len(list((tmp_path / ".cache").glob("*.npy"))) == 1
    monkeypatch.setattr(Decode, "decode", no_decode)
    load(storage="stream")
    (tmp_path / "file").touch()
    monkeypatch.undo()
    assert len(load(storage="stream", data_dir=tmp_path / "file")) == 6  # no folder for the record
    assert "every start checks" in capsys.readouterr().err


# folders


def test_listing(folder):
    listing = list_folder(folder)
    assert [str(Path(path).relative_to(folder)) for path in listing.paths] == [
        *("a b/0.png", "a b/1.PNG", "a b/deep/er/2.png", "é/0.png", "é/x y ü.png", "é/z/9.png")
    ]
    assert listing.labels.tolist() == [0, 0, 0, 1, 1, 1] and listing.classes == ["a b", "é"]


def test_unlabeled_and_one_class(folder, tmp_path):
    flat = list_folder(folder / "a b/deep/er")
    assert flat.labels.tolist() == [-1] and flat.classes == [] and flat.labels.dtype == torch.int64
    one = list_folder(folder / "é/..//é/../a b/deep")
    assert one.labels.tolist() == [0] and one.classes == ["er"]
    split = load_folder(folder / "a b/deep/er", 8, Options(n_workers=0, data_dir=tmp_path))
    assert split.labels.tolist() == [-1] and split.classes == []


def test_a_folder_of_every_class(folder, tmp_path):
    listing = list_folder(folder / "..", "é")
    assert listing.paths == [str(folder / "../images/é" / name) for name in ("0.png", "x y ü.png", "z/9.png")]
    assert listing.labels.tolist() == [0, 0, 0] and listing.classes == ["images"]
    one_line(lambda: list_folder(folder, "deep"), "class folders without an image in deep: é", "remove or fill")
    one_line(lambda: list_folder(folder, "none"), str(folder), "no image in its CLASS/none", "fill")
    options = Options(storage="memory", n_workers=0, data_dir=tmp_path)  # its .cache is hidden: no class
    for split, n in (("a b", 3), ("é", 3), ("a b", 3)):
        images = torch.stack([decode(path, 8) for path in list_folder(tmp_path, split).paths])
        assert len(images) == n and torch.equal(load_folder(tmp_path, 8, options, split=split).images, images)
    assert len([*(tmp_path / ".cache").glob("*.npy")]) == 2


def test_where_images_lie(folder):
    found = ("CLASS/IMAGE", "CLASS/z/IMAGE", "CLASS/deep/er/IMAGE", "CLASS/FOLDER/FOLDER/IMAGE")
    assert all(holds_images(folder, pattern) for pattern in found)
    (folder / "é/folder.png").mkdir()
    others = ("IMAGE", "CLASS/deep/IMAGE", "CLASS/folder.png/IMAGE", "CLASS/none/IMAGE")
    assert not any(holds_images(folder, pattern) for pattern in others)


def test_folder_errors(folder, tmp_path):
    one_line(lambda: list_folder(tmp_path / "none"), str(tmp_path / "none"), "no such folder", "give")
    (tmp_path / "bare").mkdir()
    one_line(lambda: list_folder(tmp_path / "bare"), "bare", "no image", "fill")
    (folder / "empty").mkdir()
    one_line(lambda: list_folder(folder), "empty", "remove or fill")
    save(folder / "loose.png", np.zeros((8, 8), np.uint8))
    one_line(lambda: list_folder(folder), "loose.png", "next to", "move")


def test_other_endings_are_counted_in_one_notice(load, folder, capsys):
    for name in ("a b/a.txt", "a b/deep/b.TXT", "é/c.heic", "é/README", "é/desktop.ini", "é/.d.txt"):
        (folder / name).touch()
    load()
    (line,) = capsys.readouterr().err.splitlines()
    assert "images: left out" in line and line.endswith(".txt (2), no ending (1), .heic (1)")
    (folder / "new").mkdir()
    (folder / "new/0.heic").touch()
    one_line(lambda: list_folder(folder), "without an image: new", ".heic (2)")
    one_line(lambda: list_folder(folder / "new"), "no image", ".jfif", ".heic (1)")


def test_what_systems_leave_behind_is_no_data(folder, tmp_path):
    expected = list_folder(folder)
    names = (".ipynb_checkpoints/0-checkpoint.png", "é/.thumbnails/1.png", "__MACOSX/0.png", "__macosx/a/0.png")
    for name in (*names, "é/._x.jpg", "é/Thumbs.db", "desktop.ini", "é/ehthumbs.db", "é/.ipynb_checkpoints/1.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    assert list_folder(folder).paths == expected.paths and list_folder(folder).classes == expected.classes
    assert not list_folder(folder).left_out
    (tmp_path / "bare").mkdir()
    (folder / "__MACOSX").rename(tmp_path / "bare/__MACOSX")
    assert not holds_images(tmp_path / "bare", "CLASS/IMAGE") and holds_images(tmp_path / "bare/__MACOSX", "IMAGE")


def test_names_that_are_no_text_are_shown_escaped(folder, tmp_path):
    Path(os.fsdecode(os.fsencode(folder / "é") + b"\xff\x1b")).mkdir()
    save(next(path for path in folder.iterdir() if "\x1b" in path.name) / "0\udcff\n.png", np.zeros((8, 8), np.uint8))
    for storage in ("memory", "stream"):
        split = load_folder(folder, 8, Options(storage=storage, n_workers=0, data_dir=tmp_path))
        assert split.classes == ["a b", "é", r"é\xff\x1b"] and len(split) == 7


def test_a_link_to_a_folder_above_ends(folder):
    (folder / "é/loop").symlink_to(folder)
    assert len(list_folder(folder).paths) == 6


def test_a_pipe_is_no_image_and_odd_names_are_shown(folder):
    os.mkfifo(folder / "é/pipe.png")
    odd = os.fsencode(folder / "é") + b"/\xff\n.png"
    Path(os.fsdecode(odd)).touch()
    listing = list_folder(folder)
    assert len(listing.paths) == 7
    (path,) = (path for path in listing.paths if "\n" in path)
    one_line(lambda: decode(path, 8), "empty file").encode()


def test_class_sets(load):
    train = load()
    check_same_classes(train, load(storage="stream"))
    other = Split(train.images[:0], train.labels[:0], ["a b", *"cdefg"], "test")
    one_line(
        lambda: check_same_classes(train, other), "test", f"only in {train.name}: é", "c, d, e and 2 more", "give both"
    )
    fewer = Split(train.images[:0], train.labels[:0], ["a b"])
    one_line(lambda: check_same_classes(train, fewer), "the other images", "é")
    turned = Split(train.images[:0], train.labels[:0], ["é", "a b"])
    one_line(lambda: check_same_classes(train, turned), "another order")


# the cache


def test_the_second_call_reads_the_cache(load, tmp_path, monkeypatch):
    first = load()
    assert sorted(path.suffix for path in (tmp_path / ".cache").iterdir()) == [".json", ".npy"]
    monkeypatch.setattr(Decode, "decode", no_decode)
    second = load()
    assert torch.equal(first.images, second.images) and torch.equal(first.labels, second.labels)


@pytest.mark.parametrize("change", ["pixels", "time", "added", "size", "place"])
def test_a_change_decodes_again(load, folder, monkeypatch, change):
    load()
    options = {"size": 9} if change == "size" else {}
    if change == "pixels":
        save(folder / "é/0.png", np.zeros((8, 8), np.uint8))
    elif change == "time":
        os.utime(folder / "é/0.png", ns=(1, 1))
    elif change == "added":
        save(folder / "é/new.png", np.zeros((8, 8), np.uint8))
    elif change == "place":  # two trees that differ in nothing but their pixels
        folder.rename(folder.parent / "gone")
        folder.symlink_to(folder.parent / "gone")
    monkeypatch.setattr(Decode, "decode", no_decode)
    with pytest.raises(AssertionError, match="decoded"):
        load(**options)


def only(folder, pattern):
    """The one file that matches."""
    (path,) = folder.glob(pattern)
    return path


@pytest.mark.parametrize("damage", ["short", "garbage", "empty", "other images", "record", "empty record", "missing"])
def test_a_damaged_cache_is_made_again(load, tmp_path, capsys, damage):
    expected = load().images.clone()
    array = only(tmp_path / ".cache", "*.npy")
    record = only(tmp_path / ".cache", "*.json")
    before = array.read_bytes(), record.read_bytes()
    if damage == "short":
        os.truncate(array, array.stat().st_size - 1)
    elif damage == "garbage":
        array.write_bytes(b"x" * 900)
    elif damage == "empty":
        array.write_bytes(b"")
    elif damage == "other images":
        np.save(array, np.zeros((6, 3, 8, 8), np.uint8))
    elif damage == "record":
        record.write_text('{"0": "gone"')
    elif damage == "empty record":
        record.write_text("")
    else:
        record.unlink()
    assert torch.equal(load().images, expected)
    assert len(capsys.readouterr().err.splitlines()) == (damage != "missing")
    assert before == (array.read_bytes(), record.read_bytes())


def test_every_flipped_bit_is_noticed(load, tmp_path, capsys):
    expected = load().images.clone()
    random = np.random.default_rng(0)
    for suffix in (".npy", ".json"):
        path = only(tmp_path / ".cache", f"*{suffix}")
        whole = path.read_bytes()
        places = [*range(0, 128, 5), *random.integers(0, len(whole), 25)]
        for place in places:
            damaged = bytearray(whole)
            damaged[place % len(whole)] ^= 1 << random.integers(8)
            path.write_bytes(damaged)
            assert torch.equal(load().images, expected)
            assert "decoding again" in capsys.readouterr().err and path.read_bytes() == whole


def test_the_checksums_cover_every_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(Cache, "PART", 100)
    path = tmp_path / "file"
    data = bytearray(np.random.default_rng(0).bytes(350))
    path.write_bytes(data)
    expected = Cache.checksums(path)
    assert len(expected) == 4 and expected[3] == zlib.crc32(data[300:])
    for place in range(350):
        data[place] ^= 1
        path.write_bytes(data)
        assert Cache.checksums(path) != expected
        data[place] ^= 1


def test_the_cache_is_checked_once_per_start(load, monkeypatch):
    load()
    checked = []
    checksums = Cache.checksums
    monkeypatch.setattr(Cache, "checksums", lambda file: checked.append(file) or checksums(file))
    load()
    assert len(checked) == 1


def test_a_kill_while_decoding(tmp_path):
    pixels = np.random.default_rng(3).integers(0, 256, (400, 400, 3), dtype=np.uint8)
    first = save(tmp_path / "images/a/000.png", pixels)
    for index in range(1, 400):
        (tmp_path / f"images/a/{index:03}.png").hardlink_to(first)
    cache = tmp_path / ".cache"
    code = "from pathlib import Path; from Images.Folders import Options, load_folder; "
    code += f"options = Options(data_dir=Path({str(tmp_path)!r}), n_workers=0, storage='memory'); "
    code += f"load_folder({str(tmp_path / 'images')!r}, 16, options)"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    limit = time.monotonic() + 60
    while not any(path.stat().st_size for path in cache.glob("*.tmp")):
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert sorted(path.suffix for path in cache.iterdir()) == [".lock", ".tmp"]
    for path in list((tmp_path / "images/a").iterdir())[20:]:
        path.unlink()
    split = load_folder(tmp_path / "images", 16, Options(n_workers=0, data_dir=tmp_path))
    assert len(split) == 20 and not list(cache.glob("*.tmp"))
    assert sorted(path.suffix for path in cache.iterdir()) == [".json", ".lock", ".npy"]  # an empty file


def test_an_interrupt_leaves_nothing(load, tmp_path, monkeypatch):
    def interrupt(path, size):
        raise KeyboardInterrupt

    monkeypatch.setattr(Decode, "decode", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load()
    assert list((tmp_path / ".cache").iterdir()) == []


def test_a_second_process_waits_and_decodes_nothing(load, tmp_path, monkeypatch):
    locked = Locks.locked

    @contextlib.contextmanager
    def taken(file, work):
        """As if the lock had been another process's, which has made the cache in the meantime."""
        with monkeypatch.context() as patch:
            patch.setattr(Locks, "locked", locked)
            load()
        monkeypatch.setattr(Decode, "decode", no_decode)
        with locked(file, work):
            yield

    monkeypatch.setattr(Locks, "locked", taken)
    assert len(load()) == 6


def test_no_room(load, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Cache.shutil, "disk_usage", lambda folder: Cache.shutil._ntuple_diskusage(9, 9, 0))
        one_line(load, str(tmp_path / ".cache"), "1,152 bytes", "No space left", "--data_dir", "--storage stream")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, limits[1]))  # as a disk that fills up on the way
    try:
        one_line(load, str(tmp_path / ".cache"), "File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((tmp_path / ".cache").iterdir()) == []


def test_a_cache_folder_that_cannot_be(load, tmp_path):
    (tmp_path / "file").touch()
    one_line(lambda: load(data_dir=tmp_path / "file"), str(tmp_path / "file/.cache"), "Not a directory")


def test_where_no_cache_can_be_made_auto_streams(load, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert isinstance(load(data_dir=tmp_path / "file", storage="auto"), StreamedSplit)
    first, second = capsys.readouterr().err.splitlines()
    for part in ("streamed", "cannot be made (Not a directory)", "--data_dir"):
        assert part in first
    assert "every start checks" in second


# batches


@pytest.mark.parametrize("n_workers", [0, 2])
def test_memory_and_stream_agree(load, n_workers):
    memory, stream = load(n_workers=n_workers, size=5), load(n_workers=n_workers, size=5, storage="stream")
    assert isinstance(stream, StreamedSplit) and stream.to("cpu") is stream and not hasattr(stream, "images")
    assert len(memory) == len(stream) == 6 and memory.size == stream.size == 5
    assert torch.equal(memory.labels, stream.labels) and memory.classes == stream.classes
    torch.manual_seed(0)
    state = torch.get_rng_state()
    pairs = list(zip(memory.batches(iter(BATCHES)), stream.batches(iter(BATCHES)), strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    for batch, ((left, ours), (right, theirs)) in zip(BATCHES, pairs, strict=True):
        assert torch.equal(left, batch) and torch.equal(right, batch)
        assert ours.dtype == torch.uint8 and torch.equal(ours, theirs) and torch.equal(ours, memory.images[batch])


def test_split_checks_its_parts():
    images, labels = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([0, -1])
    split = Split(images, labels, ["a"], "n").to("cpu")
    assert len(split) == 2 and split.size == 4 and split.name == "n"
    wrong = [(images.float(), labels), (images[:, :1], labels), (images, labels[:1]), (images, labels.int())]
    for arguments in [*wrong, (images, labels + 1), (images, labels - 1)]:
        with pytest.raises(ValueError, match="expected"):
            Split(*arguments, ["a"])


def test_auto(load, monkeypatch, capsys):
    assert Devices.free_memory("cpu") > 2**20
    n_bytes = 6 * 3 * 8 * 8
    monkeypatch.setattr(Devices, "free_memory", lambda device: 2 * n_bytes)
    assert isinstance(load(storage="auto"), Split) and capsys.readouterr().err == ""
    monkeypatch.setattr(Devices, "free_memory", lambda device: 2 * n_bytes - 1)
    assert isinstance(load(storage="auto", data_dir=Path("/dev/null")), StreamedSplit)
    line, second = capsys.readouterr().err.splitlines()
    assert "stream" in line and "1,152" in line and "every start checks" in second
    assert isinstance(load(storage="memory"), Split)
    one_line(lambda: load(storage="disk"), "--storage disk", "auto, memory or stream")


def test_auto_counts_the_gpu(monkeypatch):
    for free, chosen in ((2000, "memory"), (1999, "stream"), (10**9, "memory")):
        monkeypatch.setattr(Devices, "free_memory", lambda device, free=free: free if device == "cuda" else 2000)
        assert Folders._storage("auto", 1000, "cuda", "") == chosen


def test_sizes_that_can_never_fit_are_refused_at_once(load):
    for size in (10**6, 10**9, 10**30):
        for storage in ("auto", "memory", "stream"):
            one_line(
                lambda size=size, storage=storage: load(size, storage=storage), f"--size {size}", "bytes", "smaller"
            )


def test_a_fingerprint_is_that_of_the_images_and_labels(load, folder, tmp_path):
    split = load()
    fingerprint = split.fingerprint()
    assert len(fingerprint) == 16 and fingerprint == load(storage="stream").fingerprint()
    assert fingerprint == load(storage="stream", n_workers=2).fingerprint()
    shutil.copytree(folder, tmp_path / "moved")
    options = Options(n_workers=0, data_dir=tmp_path)
    assert fingerprint == load_folder(tmp_path / "moved", 8, options).fingerprint()
    others = [load(9), Split(split.images[:5], split.labels[:5], split.classes)]
    others += [Split(split.images, split.labels.flip(0), split.classes)]
    others += [Split(split.images ^ 1, split.labels, split.classes)]
    assert len({fingerprint, *(other.fingerprint() for other in others)}) == 5


def test_a_fingerprint_covers_256_images_evenly():
    images = torch.zeros(1000, 3, 4, 4, dtype=torch.uint8)
    labels = torch.zeros(1000, dtype=torch.int64)
    expected = Split(images, labels, ["a"]).fingerprint()
    noticed = []
    for index in range(1000):
        images[index] = 1
        noticed.append(Split(images, labels, ["a"]).fingerprint() != expected)
        images[index] = 0
    assert sum(noticed) == 256 and max(len(run) for run in "".join(map(str, map(int, noticed))).split("1")) <= 3


def _rank(rank, folder, data_dir, address):
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    if rank == 1:
        Decode.decode = no_decode
    for storage in ("memory", "stream"):
        options = Options(storage=storage, n_workers=0, data_dir=data_dir)
        assert len(load_folder(folder, 8, options)) == 6
        with pytest.raises(UserError, match="skip_bad"):
            load_folder(folder / "../bad", 8, options)
        split = load_folder(folder / "../bad", 8, dataclasses.replace(options, skip_bad=True))
        assert split.labels.tolist() == [0, 0]  # in both processes, so that they take the same steps
    dist.destroy_process_group()


def test_rank_0_decodes(folder, tmp_path):
    for name in ("0.png", "2.png"):
        save(tmp_path / "bad" / name, np.zeros((8, 8), np.uint8))
        (tmp_path / "bad/a").mkdir(exist_ok=True)
        (tmp_path / "bad" / name).rename(tmp_path / "bad/a" / name)
    (tmp_path / "bad/a/1.png").touch()
    arguments = (folder, tmp_path, f"file://{tmp_path}/meeting")
    torch.multiprocessing.start_processes(_rank, arguments, nprocs=2, start_method="fork")


# workers


def in_a_worker(act):
    """A decode() that does something else in a worker process."""
    main = os.getpid()

    def decode_or_act(path, size):
        if os.getpid() != main:
            act()
        return decode(path, size)

    return decode_or_act


@pytest.mark.parametrize("storage", ["memory", "stream"])
def test_a_killed_worker_is_one_line(load, monkeypatch, storage):
    split = load(storage="stream", n_workers=2) if storage == "stream" else None
    monkeypatch.setattr(Decode, "decode", in_a_worker(lambda: os.kill(os.getpid(), signal.SIGKILL)))
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.1,))  # looks more often

    def read():
        for _ in (split or load(n_workers=2)).batches(BATCHES):
            pass

    one_line(read, "a process that decodes images", "--n_workers 0", "docker run --shm-size=1g")


def test_a_worker_without_memory_is_one_line(load, monkeypatch):
    def fail():
        raise MemoryError

    monkeypatch.setattr(Decode, "decode", in_a_worker(fail))
    one_line(lambda: load(n_workers=2), "a process that decodes images", "MemoryError", "--n_workers 0")


def test_workers_are_forked_whatever_pythons_default_is(load, monkeypatch):
    """They see what was changed in this process, so they have not imported anything anew."""
    gray = np.full((8, 8, 3), 77, dtype=np.uint8)
    split = load(storage="stream", n_workers=1)
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("forkserver", force=True)  # that of Python 3.14
    try:
        monkeypatch.setattr(Decode, "decode", lambda path, size: torch.from_numpy(gray).permute(2, 0, 1))
        for _, images in split.batches(BATCHES):
            assert (images == 77).all()
    finally:
        multiprocessing.set_start_method(before, force=True)


def test_a_killed_worker_interrupts_no_other_line(load):
    before = signal.getsignal(signal.SIGCHLD)
    for _ in load(storage="stream", n_workers=2).batches(BATCHES):
        assert signal.getsignal(signal.SIGCHLD) == before


@pytest.mark.parametrize("storage", ["memory", "stream"])
def test_without_shared_memory_images_take_another_way(load, tmp_path, monkeypatch, capsys, storage):
    def refuse(tensor):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    expected = load(data_dir=tmp_path / "before")
    monkeypatch.setattr(torch.Tensor, "share_memory_", refuse)
    Decode.notice_full_shm.cache_clear()
    split = load(storage=storage, n_workers=2)
    line, *others = capsys.readouterr().err.splitlines()
    assert "docker run --shm-size=1g" in line and not others
    for indices, images in split.batches(BATCHES):
        assert torch.equal(images, expected.images[indices])
    assert capsys.readouterr().err == ""  # once is enough


def test_workers_that_cannot_be_started(load, monkeypatch):
    def refuse(loader):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Decode.DataLoader, "__iter__", refuse)
    one_line(lambda: load(n_workers=2), "No space left on device", "--n_workers 0", "--shm-size")


@pytest.mark.parametrize("storage", ["memory", "stream"])
def test_a_file_that_could_not_be_read_for_a_time_is_read_again(load, folder, monkeypatch, capsys, storage):
    bad = str(folder / "é/0.png")

    def refused(path, size):
        if str(path) == bad:
            raise Decode.BadFile(path, os.strerror(errno.EACCES))
        return decode(path, size)

    with monkeypatch.context() as patch:
        patch.setattr(Decode, "decode", refused)
        patch.setattr(Cache, "decode", refused)
        for _ in range(2):
            assert len(load(skip_bad=True, storage=storage)) == 5
    assert len(load(skip_bad=True, storage=storage)) == 6
    assert f"{bad} could not be read before, and now it can" in capsys.readouterr().err


def test_a_check_of_files_leaves_the_cache_that_another_process_has_made(folder, tmp_path, monkeypatch):
    paths = list_folder(folder).paths
    cache, other = (Cache.Cache(folder, paths, 8, tmp_path / "c", 0, "images") for _ in range(2))
    decoded = cache._decoded

    def slow(*arguments):
        yield from decoded(*arguments)
        other.load(skip_bad=False)

    monkeypatch.setattr(cache, "_decoded", slow)
    assert cache.find_bad(skip_bad=False) == {}
    record = cache._read_record()
    assert record == other._read_record()
    assert record["checksums"]
