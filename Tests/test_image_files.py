"""Images: kinds of image, bad input, the cache, and streaming against memory."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import one_line, save

import Utils
from Images import Cache, Decode, Folders
from Images.Decode import decode
from Images.Folders import Options, check_same_classes, holds_images, list_folder, load_folder
from Images.Split import Split, StreamedSplit
from Utils import UserError

ROOT = Path(__file__).parents[1]
PHOTOS = Path(__file__).resolve().parents[2] / "shared" / "data" / "photos-9.tar"
BATCHES = [torch.tensor(batch) for batch in ([5, 0, 3], [1], [4, 2, 2])]


@pytest.fixture
def folder(tmp_path):
    """Six random 8 x 8 PNGs in the classes "a b" and "é", some of them in sub-folders, among hidden files."""
    random = np.random.default_rng(0)
    for name in ("a b/0.png", "a b/1.PNG", "a b/deep/er/2.png", "é/0.png", "é/x y ü.png", "é/z/9.png"):
        save(tmp_path / "images" / name, random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    for name in (".DS_Store", ".hidden/1.png", "é/._0.png", "é/Thumbs.db", "a b/notes.txt", ".loose.png"):
        path = tmp_path / "images" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    return tmp_path / "images"


@pytest.fixture
def load(folder, tmp_path):
    """load_folder of that folder at 8 pixels, in process, its cache in tmp_path/.cache."""
    usual = {"n_workers": 0, "storage": "memory", "data_dir": tmp_path}
    return lambda size=8, **options: load_folder(folder, size, Options(**(usual | options)))


# bad files


@pytest.mark.parametrize("n_workers", [0, 2])
@pytest.mark.parametrize("storage", ["memory", "stream"])
def test_a_bad_file_is_named(load, folder, storage, n_workers):
    (folder / "é/0.png").write_text("no")
    order = [torch.arange(3), torch.arange(3, 6)]
    one_line(
        lambda: list(load(storage=storage, n_workers=n_workers).batches(order)), str(folder / "é/0.png"), "--skip_bad"
    )


def test_skip_bad_in_memory(load, folder, capsys):
    whole = load()
    (folder / "a b/1.PNG").write_text("no")
    (folder / "é/0.png").write_text("")
    capsys.readouterr()
    for _ in range(2):  # decoded, then from the cache
        split = load(skip_bad=True)
        assert torch.equal(split.images, whole.images[[0, 2, 4, 5]]) and split.labels.tolist() == [0, 0, 1, 1]
        (line,) = capsys.readouterr().err.splitlines()
        assert "left out 2 of 6" in line and "1.PNG" in line
    one_line(load, "a b/1.PNG", "not an image", "--skip_bad")


@pytest.mark.parametrize("n_workers", [0, 2])
def test_skip_bad_when_streaming(load, folder, capsys, n_workers):
    (folder / "a b/1.PNG").write_text("no")
    (folder / "é/0.png").write_text("")
    split = load(storage="stream", skip_bad=True, n_workers=n_workers)
    found = [(indices.tolist(), len(images)) for _ in range(2) for indices, images in split.batches(BATCHES)]
    assert found == [([5, 0], 2), ([4, 2, 2], 3)] * 2 and sorted(split.bad) == [1, 3]
    assert split.labels.tolist() == [0, -1, 0, -1, 1, 1]  # so that a probe passes over them
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_only_bad_files(tmp_path):
    (tmp_path / "images/a").mkdir(parents=True)
    (tmp_path / "images/a/1.png").touch()
    options = Options(skip_bad=True, n_workers=0, data_dir=tmp_path)
    one_line(lambda: load_folder(tmp_path / "images", 8, options), "none of its 1")


def test_bad_files_leave_the_listing_as_it_is(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/1.png").touch()
    listing = list_folder(tmp_path)
    split = StreamedSplit(listing, 8, n_workers=0, skip_bad=True)
    assert list(split.batches([torch.tensor([0])])) == []
    assert split.labels.tolist() == [-1] and listing.labels.tolist() == [0]


# folders


def test_listing(folder):
    listing = list_folder(folder)
    assert [str(Path(path).relative_to(folder)) for path in listing.paths] == [
        *("a b/0.png", "a b/1.PNG", "a b/deep/er/2.png", "é/0.png", "é/x y ü.png", "é/z/9.png")
    ]
    assert listing.labels.tolist() == [0, 0, 0, 1, 1, 1] and listing.classes == ["a b", "é"]


def test_unlabelled_and_one_class(folder, tmp_path):
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
    one_line(lambda: list_folder(folder), "loose.png", "beside", "move")


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


def no_decode(*_):
    raise AssertionError("decoded")


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


@pytest.mark.parametrize("damage", ["short", "garbage", "record", "missing"])
def test_a_damaged_cache_is_made_again(load, tmp_path, capsys, damage):
    expected = load().images.clone()
    (array,), (record,) = (list((tmp_path / ".cache").glob(f"*{suffix}")) for suffix in (".npy", ".json"))
    if damage == "short":
        os.truncate(array, array.stat().st_size - 1)
    elif damage == "garbage":
        array.write_bytes(b"x" * 900)
    elif damage == "record":
        record.write_text('{"0": "gone"')
    else:
        record.unlink()
    assert torch.equal(load().images, expected)
    assert len(capsys.readouterr().err.splitlines()) == (damage != "missing")
    assert json.loads(record.read_text()) == {}


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
    assert [path.suffix for path in cache.iterdir()] == [".tmp"]
    for path in list((tmp_path / "images/a").iterdir())[20:]:
        path.unlink()
    split = load_folder(tmp_path / "images", 16, Options(n_workers=0, data_dir=tmp_path))
    assert len(split) == 20 and sorted(path.suffix for path in cache.iterdir()) == [".json", ".npy"]


def test_an_interrupt_leaves_nothing(load, tmp_path, monkeypatch):
    def interrupt(path, size):
        raise KeyboardInterrupt

    monkeypatch.setattr(Decode, "decode", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load()
    assert list((tmp_path / ".cache").iterdir()) == []


def test_others_temporaries_stay(load, tmp_path):
    (tmp_path / ".cache").mkdir()
    names = [f"k~{Cache.socket.gethostname()}~{os.getpid()}~0.tmp", "k~elsewhere~1~0.tmp", "k~elsewhere~2~0.tmp"]
    for name in names:
        (tmp_path / ".cache" / name).touch()
    os.utime(tmp_path / ".cache" / names[2], (1, 1))
    load()
    assert sorted(path.name for path in (tmp_path / ".cache").glob("*.tmp")) == sorted(names[:2])


def test_no_room(load, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Cache.shutil, "disk_usage", lambda folder: Cache.shutil._ntuple_diskusage(9, 9, 0))
        one_line(load, str(tmp_path / ".cache"), "1,152 bytes", "No space left", "--storage stream")
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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_the_gpu(load):
    memory, stream = load(device="cuda"), load(storage="stream", device="cuda")
    assert memory.images.is_cuda and not memory.labels.is_cuda
    for split in (memory, load(), stream):
        for indices, images in split.batches(BATCHES, "cuda"):
            assert images.is_cuda and not indices.is_cuda and torch.equal(images, memory.images[indices.cuda()])


def test_auto(load, monkeypatch, capsys):
    assert Utils.free_memory("cpu") > 2**20
    n_bytes = 6 * 3 * 8 * 8
    monkeypatch.setattr(Utils, "free_memory", lambda device: 2 * n_bytes)
    assert isinstance(load(storage="auto"), Split) and capsys.readouterr().err == ""
    monkeypatch.setattr(Utils, "free_memory", lambda device: 2 * n_bytes - 1)
    assert isinstance(load(storage="auto", data_dir=Path("/dev/null")), StreamedSplit)
    (line,) = capsys.readouterr().err.splitlines()
    assert "stream" in line and "1,152" in line
    assert isinstance(load(storage="memory"), Split)
    one_line(lambda: load(storage="disk"), "--storage disk", "auto, memory or stream")


def test_auto_counts_the_gpu(monkeypatch):
    for free, chosen in ((2000, "memory"), (1999, "stream"), (10**9, "memory")):
        monkeypatch.setattr(Utils, "free_memory", lambda device, free=free: free if device == "cuda" else 2000)
        assert Folders._storage("auto", 1000, "cuda", "") == chosen


def _rank(rank, folder, data_dir, address):
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    if rank == 1:
        Decode.decode = no_decode
    options = Options(storage="memory", n_workers=0, data_dir=data_dir)
    assert len(load_folder(folder, 8, options)) == 6
    with pytest.raises(UserError, match="skip_bad"):
        load_folder(folder / "../bad", 8, options)
    dist.destroy_process_group()


def test_rank_0_decodes(folder, tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/1.png").touch()
    arguments = (folder, tmp_path, f"file://{tmp_path}/meeting")
    torch.multiprocessing.start_processes(_rank, arguments, nprocs=2, start_method="fork")
