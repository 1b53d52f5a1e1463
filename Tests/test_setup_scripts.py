"""Data/SetupMiniImagenet.py and Data/InvertDirStructure.py, run as their users run them: in processes of their own."""

import csv
import hashlib
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
SETUP, INVERT = ROOT / "Data" / "SetupMiniImagenet.py", ROOT / "Data" / "InvertDirStructure.py"
REAL_LISTS = ROOT.parent / "shared" / "data" / "mini-imagenet-splits"
CLASS_SPLIT = {"n01": "train", "n02": "train", "n03": "val", "n04": "test"}
PER_CLASS = 10  # 6 train, 2 val, 2 test


def run(script, *args, ok=True, env=None):
    """Runs a script; where it must fail, returns its error after checking that it is one line and exit code 2."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "no_proxy": "127.0.0.1", **(env or {})}
    command = [sys.executable, str(script), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env)
    if ok:
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""  # no progress bar where stderr is no terminal
        return done.stdout
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert done.stderr.startswith(f"{script.name}: error: ")
    return done.stderr


def jpeg(number):
    f = io.BytesIO()
    Image.new("RGB", (8, 8), (number * 7 % 256, number * 31 % 256, number // 4 % 256)).save(f, "JPEG")
    return f.getvalue()


def stand_in(form="divided", per_class=PER_CLASS):
    """Returns {member name: content} of an archive in one of the forms that the script accepts."""
    files, lists = {}, {s: ["filename,label"] for s in ("train", "val", "test")}
    for c, (label, split) in enumerate(CLASS_SPLIT.items()):
        for i in range(per_class):
            name = f"{label}{i:08d}.jpg"
            lists[split].append(f"{name},{label}")
            folder = {"divided": f"{split}/{label}", "lead": f"mini/data/{split}/{label}", "plain": label}
            folder |= {"flat": "mini/images", "nested": f"{label}/images"}
            files[f"{folder[form]}/{name}"] = jpeg(c * per_class + i)
    if form == "flat":
        files |= {f"mini/{s}.csv": "\n".join([*rows, ""]).encode() for s, rows in lists.items()}
    return files


def pack(path, files):
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as z:
            for name, content in files.items():
                z.writestr(name, content)
    else:
        with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as t:
            for name, content in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                t.addfile(info, io.BytesIO(content))
    return path


def tree(folder):
    """Returns {path: (inode, modification time, content)} of all files below a folder."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    return {str(p.relative_to(folder)): (p.stat().st_ino, p.stat().st_mtime_ns, p.read_bytes()) for p in files}


def split_of(folder):
    """Returns {split: {(class, image)}} of an ImageFolder tree."""
    return {s: {(p.parent.name, p.name) for p in (folder / s).glob("*/*")} for s in ("train", "val", "test")}


def setup(archive, dest, *args, **kwargs):
    return run(SETUP, "--archive", archive, "--any_count", "--dest", dest, *args, **kwargs)


def is_clean(dest):
    """Whether nothing of a failed run is left."""
    return not dest.exists() or not [p for p in dest.iterdir() if p.name != "miniImagenet_downloads"]


# SetupMiniImagenet.py


@pytest.mark.parametrize("ending", ["zip", "tar", "tar.gz"])
@pytest.mark.parametrize("form", ["divided", "lead", "plain", "flat", "nested"])
def test_layouts_and_splits(tmp_path, form, ending):
    archive, dest = pack(tmp_path / f"mini.{ending}", stand_in(form)), tmp_path / "out"
    out = setup(archive, dest)
    splits = split_of(dest / "miniImagenet")
    assert {s: len(images) for s, images in splits.items()} == {"train": 24, "val": 8, "test": 8}
    assert all({c for c, _ in images} == set(CLASS_SPLIT) for images in splits.values())
    assert len(set.union(*splits.values())) == 40  # disjoint
    assert "expected: 100 classes x 600 = 60000 images; found: 4 classes, 40 images" in out
    few = dest / "miniImagenetFewShot"
    if form in ("plain", "nested"):
        assert not few.exists() and "--csv_dir" in out
        return
    few_splits = split_of(few)
    assert {s: {c for c, _ in v} for s, v in few_splits.items()} == {
        "train": {"n01", "n02"},
        "val": {"n03"},
        "test": {"n04"},
    }
    assert set.union(*few_splits.values()) == set.union(*splits.values())
    inodes = {p.stat().st_ino for p in (dest / "miniImagenet").glob("*/*/*")}
    assert {p.stat().st_ino for p in few.glob("*/*/*")} == inodes
    assert not [p for p in dest.iterdir() if p.name.startswith(".")]


def test_images_keep_their_content(tmp_path):
    files = stand_in("flat")
    setup(pack(tmp_path / "a.zip", files), tmp_path / "out")
    for path in (tmp_path / "out" / "miniImagenet").glob("*/*/*.jpg"):
        assert path.read_bytes() == files[f"mini/images/{path.name}"]
        assert path.name.startswith(path.parent.name)


def test_three_archives_named_by_their_split(tmp_path):
    """The form of the default download: train.tar, val.tar and test.tar with class folders."""
    files = stand_in("plain")
    archives = [
        pack(tmp_path / f"{s}.tar", {n: c for n, c in files.items() if CLASS_SPLIT[n[:3]] == s})
        for s in ("train", "val", "test")
    ]
    run(SETUP, "--archive", *archives, "--any_count", "--dest", tmp_path / "out")
    few = split_of(tmp_path / "out" / "miniImagenetFewShot")
    assert {s: {c for c, _ in v} for s, v in few.items()} == {"train": {"n01", "n02"}, "val": {"n03"}, "test": {"n04"}}


def test_seed_decides_the_split(tmp_path):
    archive = pack(tmp_path / "a.zip", stand_in("plain"))
    pack(tmp_path / "b.tar", dict(reversed(stand_in("divided").items())))
    splits = {}
    for name, args in {"0": [], "again": ["--seed", "0"], "1": ["--seed", "1"]}.items():
        setup(archive, tmp_path / name, *args)
        splits[name] = split_of(tmp_path / name / "miniImagenet")
    setup(tmp_path / "b.tar", tmp_path / "b")
    assert splits["0"] == splits["again"] == split_of(tmp_path / "b" / "miniImagenet") != splits["1"]
    assert "seed 0" in setup(archive, tmp_path / "0", "--seed", "1", ok=False)


def test_proportions_of_a_whole_class(tmp_path):
    files = {f"n01/{i}.jpg": jpeg(i % 5) for i in range(600)}
    setup(pack(tmp_path / "a.tar", files), tmp_path / "out")
    counts = {s: len(v) for s, v in split_of(tmp_path / "out" / "miniImagenet").items()}
    assert counts == {"train": 384, "val": 96, "test": 120}


def test_lists_given_later_make_the_few_shot_split(tmp_path):
    dest = tmp_path / "out"
    archive = pack(tmp_path / "a.zip", stand_in("plain"))
    setup(archive, dest)
    lists = tmp_path / "lists"
    lists.mkdir()
    for name, content in stand_in("flat").items():
        if name.endswith(".csv"):
            (lists / Path(name).name).write_bytes(content)
    before = tree(dest / "miniImagenet")
    setup(archive, dest, "--csv_dir", lists)
    after = tree(dest / "miniImagenet")
    assert all(after[name] == before[name] for name in before)
    assert {n for n in after if n not in before} == {f"few_shot_{s}.csv" for s in ("train", "val", "test")}
    assert len(split_of(dest / "miniImagenetFewShot")["train"]) == 20
    (lists / "val.csv").unlink()
    assert "val.csv" in setup(archive, tmp_path / "other", "--csv_dir", lists, ok=False)


def test_lists_that_share_classes_only_name_the_images(tmp_path):
    """Same-class lists in an archive label the flat images, but make no few-shot split."""
    files = stand_in("flat")
    rows = files["mini/train.csv"].decode() + files["mini/test.csv"].decode().split("\n", 1)[1]
    files["mini/train.csv"] = rows.encode()
    dest = tmp_path / "out"
    assert "few-shot split skipped" in setup(pack(tmp_path / "a.zip", files), dest)
    assert {c for c, _ in split_of(dest / "miniImagenet")["val"]} == set(CLASS_SPLIT)
    assert not (dest / "miniImagenetFewShot").exists()
    for name in ("train", "val", "test"):
        (tmp_path / f"{name}.csv").write_bytes(files[f"mini/{name}.csv"])
    assert "is in train.csv too" in setup(tmp_path / "a.zip", dest, "--csv_dir", tmp_path, ok=False)


def test_a_second_run_changes_nothing_and_force_rebuilds(tmp_path):
    archive, dest = pack(tmp_path / "a.tar.gz", stand_in()), tmp_path / "out"
    setup(archive, dest)
    before = tree(dest)
    assert setup(archive, dest).count("already there") == 2
    assert tree(dest) == before
    setup(archive, dest, "--force", "--seed", "3")
    after = tree(dest)
    assert after.keys() != before.keys() and len(after) == len(before)
    shutil.rmtree(dest / "miniImagenetFewShot")
    setup(archive, dest)
    assert tree(dest).keys() == after.keys()
    next((dest / "miniImagenet" / "train").glob("*/*")).unlink()
    assert "--force" in setup(archive, dest, ok=False)


def test_counts_that_differ_are_an_error(tmp_path):
    archive, dest = pack(tmp_path / "a.zip", stand_in()), tmp_path / "out"
    error = run(SETUP, "--archive", archive, "--dest", dest, ok=False)
    assert "60000" in error and "4 classes, 40 images" in error and "--any_count" in error
    assert is_clean(dest)


@pytest.mark.parametrize(
    "name", ["../evil.jpg", "/tmp/evil_isicle.jpg", "a/../../evil.jpg", "..\\evil.jpg", "C:\\evil.jpg"]
)
@pytest.mark.parametrize("ending", ["zip", "tar.gz"])
def test_members_that_leave_the_folder_are_refused(tmp_path, name, ending):
    dest = tmp_path / "in" / "out"
    archive = pack(tmp_path / f"a.{ending}", {**stand_in(), name: jpeg(1)})
    assert "evil" in setup(archive, dest, ok=False)
    assert is_clean(dest) and not list(tmp_path.rglob("*evil*")) and not Path("/tmp/evil_isicle.jpg").exists()


@pytest.mark.parametrize(
    ("kind", "target"),
    [(tarfile.SYMTYPE, "../../x"), (tarfile.SYMTYPE, "/etc/passwd"), (tarfile.LNKTYPE, "../x"), (tarfile.CHRTYPE, "")],
)
def test_links_and_devices_are_refused(tmp_path, kind, target):
    archive, dest = pack(tmp_path / "a.tar", stand_in()), tmp_path / "out"
    with tarfile.open(archive, "a") as t:
        info = tarfile.TarInfo("train/evil.jpg")
        info.type, info.linkname = kind, target
        t.addfile(info)
    assert "evil.jpg" in setup(archive, dest, ok=False)
    assert is_clean(dest)


def test_zip_links_are_refused_and_inner_tar_links_followed(tmp_path):
    archive = pack(tmp_path / "a.zip", stand_in())
    with zipfile.ZipFile(archive, "a") as z:
        info = zipfile.ZipInfo("train/evil.jpg")
        info.external_attr = 0o120777 << 16
        z.writestr(info, "/etc/passwd")
    assert "evil.jpg" in setup(archive, tmp_path / "out", ok=False)
    assert is_clean(tmp_path / "out")
    archive = pack(tmp_path / "b.tar", stand_in())
    with tarfile.open(archive, "a") as t:
        info = tarfile.TarInfo("train/n01/inner.jpg")
        info.type, info.linkname = tarfile.LNKTYPE, "train/n01/n0100000000.jpg"
        t.addfile(info)
    assert "41 images" in setup(archive, tmp_path / "out")


def test_a_label_cannot_leave_the_folder(tmp_path):
    files = stand_in("flat")
    files["mini/test.csv"] = b"filename,label\nn0400000000.jpg,../../evil\n"
    assert "evil" in setup(pack(tmp_path / "a.zip", files), tmp_path / "out", ok=False)
    assert is_clean(tmp_path / "out")


def test_bad_images(tmp_path):
    files = {**stand_in(), "train/n01/bad.jpg": b"<html>", "train/n01/empty.png": b"", "README.txt": b"x"}
    files |= {"__MACOSX/train/n01/._n0100000000.jpg": b"x", "train/n01/png_inside.JPEG": b"\x89PNG\r\n\x1a\n1234"}
    archive, dest = pack(tmp_path / "a.zip", files), tmp_path / "out"
    error = setup(archive, dest, ok=False)
    assert "bad.jpg" in error and "--skip_bad" in error and is_clean(dest)
    out = setup(archive, dest, "--skip_bad")
    assert "2 broken images" in out and "2 files that are no images" in out and "41 images" in out


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda f: {**f, "x/train/n01/n0100000000.jpg": jpeg(9)}, "two images"),
        (lambda f: {**f, "train/n05/a.jpg": jpeg(1)}, "n05"),
        (lambda f: {**f, "images/unknown.jpg": jpeg(1)}, "unknown.jpg"),
        (lambda f: {}, "found 0 classes"),
    ],
)
def test_trees_that_cannot_be_used(tmp_path, change, word):
    archive, dest = pack(tmp_path / "a.zip", change(stand_in())), tmp_path / "out"
    args = [] if word.startswith("found") else ["--any_count"]
    assert word in run(SETUP, "--archive", archive, "--dest", dest, *args, ok=False)
    assert is_clean(dest)


def test_files_that_are_no_whole_archive(tmp_path):
    good = pack(tmp_path / "good.tar.gz", stand_in()).read_bytes()
    for name, content in {"a.zip": b"<html>", "b.tar": b"", "c.tar.gz": good[: len(good) // 2]}.items():
        (tmp_path / name).write_bytes(content)
        assert name in setup(tmp_path / name, tmp_path / "out", ok=False)
        assert is_clean(tmp_path / "out")
    assert "--archive" in setup(tmp_path / "absent.zip", tmp_path / "out", ok=False)


def test_size_and_sha256(tmp_path):
    archive, dest = pack(tmp_path / "a.zip", stand_in()), tmp_path / "out"
    assert "sha256" in setup(archive, dest, "--sha256", "0" * 64, ok=False)
    assert "--size 7" in setup(archive, dest, "--size", "7", ok=False)
    assert "--sha256" in setup(archive, dest, "--sha256", "xyz", ok=False)
    assert "--sha256" in run(SETUP, "--sha256", "0" * 64, "--dest", dest, ok=False)
    assert is_clean(dest)
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    setup(archive, dest, "--sha256", digest.upper(), "--size", archive.stat().st_size)


def test_google_drive_out_of_reach(tmp_path):
    dead = dict.fromkeys(("https_proxy", "http_proxy", "HTTPS_PROXY", "HTTP_PROXY", "all_proxy"), "http://127.0.0.1:9")
    error = run(
        SETUP, "--dest", tmp_path, ok=False, env={**dead, "no_proxy": "", "NO_PROXY": "", "HOME": str(tmp_path)}
    )
    assert "Google Drive" in error and "--url" in error and "--archive" in error


@pytest.mark.parametrize("stage", [".miniImagenet.partial/raw", ".miniImagenet.partial/out/train", "miniImagenet"])
def test_a_kill_leaves_nothing_or_a_whole_result(tmp_path, stage):
    archive, dest = pack(tmp_path / "a.tar", stand_in(per_class=200)), tmp_path / "out"
    command = [sys.executable, SETUP, "--archive", archive, "--any_count", "--dest", dest]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (dest / stage).exists():
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    if (dest / "miniImagenet").exists():
        assert len(list((dest / "miniImagenet").glob("*/*/*"))) == 800
    else:
        assert (dest / ".miniImagenet.partial").exists()
    setup(archive, dest)
    assert sorted(p.name for p in dest.iterdir()) == ["miniImagenet", "miniImagenetFewShot"]
    assert all(len(list((dest / name).glob("*/*/*"))) == 800 for name in ("miniImagenet", "miniImagenetFewShot"))


def test_ctrl_c_ends_quietly_and_leaves_nothing(tmp_path):
    archive, dest = pack(tmp_path / "a.tar", stand_in(per_class=200)), tmp_path / "out"
    command = [sys.executable, SETUP, "--archive", archive, "--any_count", "--dest", dest]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (dest / ".miniImagenet.partial" / "raw").exists():
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGSTOP)
    assert "another run" in setup(archive, dest, ok=False)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130 and error == "" and is_clean(dest)


class Handler(BaseHTTPRequestHandler):
    """Serves one file; breaks off after server.stop bytes of a response where that is given."""

    def do_GET(self):
        content, start = self.server.content, 0
        self.server.ranges.append(self.headers.get("Range"))
        if self.path != "/mini.zip":
            self.send_error(404)
            return
        if self.server.with_range and self.headers.get("Range"):
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start:][: self.server.stop])
        self.close_connection = True

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path):
    s = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    s.content = pack(tmp_path / "served.zip", stand_in()).read_bytes()
    s.with_range, s.stop, s.ranges = True, None, []
    s.url = f"http://127.0.0.1:{s.server_port}/mini.zip"
    thread = threading.Thread(target=s.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield s
    s.shutdown()
    s.server_close()
    thread.join()


def test_download_breaks_off_and_resumes(tmp_path, server):
    dest, size = tmp_path / "out", len(server.content)
    server.stop = size // 10
    args = ["--url", server.url, "--any_count", "--dest", dest, "--size", size]
    error = run(SETUP, *args, ok=False)
    assert "--url" in error and "run the same command again" in error
    done = 4 * server.stop
    assert server.ranges == [None, *(f"bytes={i * server.stop}-" for i in (1, 2, 3))]
    assert [p.stat().st_size for p in (dest / "miniImagenet_downloads").iterdir()] == [done]
    server.stop, server.ranges = None, []
    run(SETUP, *args, "--sha256", hashlib.sha256(server.content).hexdigest())
    assert server.ranges == [f"bytes={done}-"]
    assert [p.suffix for p in (dest / "miniImagenet_downloads").iterdir()] == [".zip"]
    run(SETUP, *args, "--force")
    assert len(server.ranges) == 1  # what is here is not downloaded again


def test_download_from_a_server_without_ranges_restarts(tmp_path, server):
    server.with_range, server.stop = False, len(server.content) // 2
    args = ["--url", server.url, "--any_count", "--dest", tmp_path / "out"]
    run(SETUP, *args, ok=False)
    server.stop = None
    run(SETUP, *args, "--sha256", hashlib.sha256(server.content).hexdigest())


def test_download_errors_and_file_urls(tmp_path, server):
    args = ["--any_count", "--dest", tmp_path / "out"]
    assert "404" in run(SETUP, "--url", server.url + "x", *args, ok=False)
    assert "refused" in run(SETUP, "--url", "http://127.0.0.1:9/a.zip", *args, ok=False)
    assert "ftp" in run(SETUP, "--url", "ftp://127.0.0.1/a.zip", *args, ok=False)
    run(SETUP, "--url", (tmp_path / "absent.zip").as_uri(), *args, ok=False)
    run(SETUP, "--url", (tmp_path / "served.zip").as_uri(), *args)


def test_the_real_lists(tmp_path):
    """The published lists: 64/16/20 disjoint classes of 600; the flat form is laid out by them."""
    if not REAL_LISTS.is_dir():
        pytest.skip(f"{REAL_LISTS} is absent")
    labels = {}
    for split in ("train", "val", "test"):
        with (REAL_LISTS / f"{split}.csv").open(newline="") as f:
            for row in csv.DictReader(f):
                labels.setdefault(row["label"], {}).setdefault(split, []).append(row["filename"])
    assert all(len(of) == 1 and len(next(iter(of.values()))) == 600 for of in labels.values())
    counts = [sum(s in of for of in labels.values()) for s in ("train", "val", "test")]
    assert counts == [64, 16, 20]
    files = {f"images/{n}": jpeg(1) for of in labels.values() for ns in of.values() for n in ns[:3]}
    setup(pack(tmp_path / "images.tar", files), tmp_path / "out", "--csv_dir", REAL_LISTS)
    few = split_of(tmp_path / "out" / "miniImagenetFewShot")
    assert [len({c for c, _ in few[s]}) for s in ("train", "val", "test")] == [64, 16, 20]
    assert all(n.startswith(c) for images in few.values() for c, n in images)


# InvertDirStructure.py


@pytest.fixture
def folder(tmp_path):
    """An ImageFolder tree of 2 classes with 3 train, 2 val and 1 test images each."""
    for s, n in {"train": 3, "val": 2, "test": 1}.items():
        for label in ("a", "b"):
            (tmp_path / "mini" / s / label).mkdir(parents=True)
            for i in range(n):
                (tmp_path / "mini" / s / label / f"{s}{i}.jpg").write_bytes(jpeg(i))
    return tmp_path / "mini"


def invert(folder, *args, **kwargs):
    return run(INVERT, "--folder", folder, "--dest", Path(folder).parent / "camnet", *args, **kwargs)


@pytest.mark.parametrize("link", [False, True])
@pytest.mark.parametrize("slash", ["", "/"])
def test_invert(folder, link, slash):
    (folder / "train" / "stray.txt").write_text("x")
    (folder / "train" / "a" / "note.txt").write_text("x")
    (folder / "train" / "a" / ".hidden.jpg").write_bytes(jpeg(1))
    (folder / "labels.csv").write_text("x")
    source, out = tree(folder), folder.parent / "camnet" / "mini"
    args = ["--link"] if link else []
    printed = invert(f"{folder}{slash}", *args)
    assert "train: 2 classes, 6 images (6 new, 0 already there), 3 files skipped" in printed
    assert "12 images; 1 files outside" in printed
    names = {
        f"{c}/{'validation' if s == 'val' else s}/{n}": f"{s}/{c}/{n}"
        for s, c, n in (k.split("/") for k in source if k.endswith(".jpg") and "hidden" not in k)
    }
    made = tree(out)
    assert made.keys() == names.keys() and tree(folder) == source
    for name, old in names.items():
        assert made[name][2] == source[old][2]
        assert (made[name][0] == source[old][0]) is link
    assert "0 new, 6 already there" in invert(folder, *args)
    assert tree(out) == made
    invert(folder, *([] if link else ["--link"]))
    assert tree(out) == made


def test_invert_default_target_and_missing_splits(folder, tmp_path):
    (tmp_path / "Data").mkdir()
    script = Path(shutil.copy(INVERT, tmp_path / "Data"))
    shutil.rmtree(folder / "val")
    shutil.rmtree(folder / "test")
    assert "validation" not in run(script, "--folder", folder)
    assert len(list((tmp_path / "Data" / "camnet_data" / "mini").glob("*/train/*"))) == 6
    shutil.rmtree(folder / "train")
    assert "train/CLASS/IMAGE" in run(script, "--folder", folder, ok=False)
    assert "--folder" in run(script, "--folder", tmp_path / "absent", ok=False)
    assert "--folder" in run(script, ok=False)


def test_invert_flattens_nested_images(folder):
    (folder / "train" / "a" / "images").mkdir()
    (folder / "train" / "a" / "images" / "deep.JPEG").write_bytes(jpeg(5))
    invert(folder)
    assert (folder.parent / "camnet" / "mini" / "a" / "train" / "deep.JPEG").read_bytes() == jpeg(5)


def test_invert_refuses_collisions_before_it_writes(folder):
    (folder / "train" / "b" / "images").mkdir()
    (folder / "train" / "b" / "images" / "train0.jpg").write_bytes(jpeg(5))
    error = invert(folder, ok=False)
    assert str(folder / "train" / "b" / "train0.jpg") in error and "images/train0.jpg" in error
    assert not (folder.parent / "camnet").exists()


@pytest.mark.parametrize("where", ["b/validation/val1.jpg", "a/train/of_another_split.jpg"])
def test_invert_refuses_a_target_that_differs(folder, where):
    found = folder.parent / "camnet" / "mini" / where
    found.parent.mkdir(parents=True)
    found.write_bytes(jpeg(99))
    before = tree(folder.parent / "camnet")
    assert str(found) in invert(folder, ok=False)
    assert tree(folder.parent / "camnet") == before


def test_invert_keeps_out_of_its_source(folder):
    assert "--dest" in run(INVERT, "--folder", folder, "--dest", folder / "x", ok=False)
    assert "--dest" in run(INVERT, "--folder", folder, "--dest", folder.parent, ok=False)


def test_invert_link_across_file_systems(folder):
    shm = Path("/dev/shm")
    if not os.access(shm, os.W_OK) or shm.stat().st_dev == folder.stat().st_dev:
        pytest.skip("no second file system to write to")
    dest = shm / f"isicle_test_{os.getpid()}"
    try:
        error = run(INVERT, "--folder", folder, "--dest", dest, "--link", ok=False)
        assert "--link" in error and "another file system" in error
        run(INVERT, "--folder", folder, "--dest", dest)
        assert len(list(dest.rglob("*.jpg"))) == 12
    finally:
        shutil.rmtree(dest, ignore_errors=True)


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_invert_completes_after_a_kill(folder, sent):
    for i in range(1000):
        (folder / "train" / "a" / f"more{i}.jpg").write_bytes(jpeg(i))
    out = folder.parent / "camnet" / "mini"
    command = [sys.executable, INVERT, "--folder", folder, "--dest", out.parent]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not (out / "a" / "train").exists():
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(sent)
    _, error = process.communicate(timeout=30)
    assert process.returncode == (130 if sent == signal.SIGINT else -signal.SIGKILL) and error == b""
    for path in out.glob("*/*/[!.]*"):
        assert path.read_bytes() == (folder / "train" / path.parent.parent.name / path.name).read_bytes()
    invert(folder)
    assert sum(p.is_file() for p in out.rglob("*")) == 1012
