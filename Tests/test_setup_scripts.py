"""Data/SetupMiniImagenet.py and Data/InvertDirStructure.py, run as their users run them.

Most runs are made in this process; those with signals, another environment or a full disk in one of their own.
"""

import contextlib
import csv
import fcntl
import functools
import hashlib
import importlib.util
import inspect
import io
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import warnings
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
SETUP, INVERT = ROOT / "Data" / "SetupMiniImagenet.py", ROOT / "Data" / "InvertDirStructure.py"
CLASS_SPLIT = {"n01": "train", "n02": "train", "n03": "val", "n04": "test"}
PER_CLASS = 10  # 6 train, 2 val, 2 test


def run(script, *args, ok=True, env=None, preexec_fn=None):
    """Run a script and return its output; if it must fail, its error: one line that is safe to print, exit code 2.

    env: more variables of its environment; preexec_fn: called in its process first. With one of them it has its own.
    """
    args = [str(each) for each in args]
    done = run_process(script, args, env, preexec_fn) if env or preexec_fn else run_here(script, args)
    assert all(line.isprintable() for line in (done.stdout + done.stderr).split("\n")), (done.stdout, done.stderr)
    if ok:
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""  # no progress bar where stderr is no terminal
        return done.stdout
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert done.stderr.startswith(f"{script.name}: error: ")
    return done.stderr


def run_process(script, args, env, preexec_fn):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "no_proxy": "127.0.0.1", **(env or {})}
    command = [sys.executable, str(script), *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=env, preexec_fn=preexec_fn)


def run_here(script, args):
    """Run a script in this process, without a new start of Python. A warning, which it would print, is an error."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    code = 0
    flock = fcntl.flock
    locks = []

    def noted(handle, operation):
        locks.append(handle)
        flock(handle, operation)

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error")
        for hidden in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", hidden)  # as Python does in a process of its own
        patch.setattr(fcntl, "flock", noted)
        patch.setenv("no_proxy", "127.0.0.1")
        patch.setattr(sys, "argv", [str(script), *args])
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        try:
            loaded(script).main(args)
        except SystemExit as error:
            code = error.code or 0
    for handle in locks:  # they are held until a process ends
        os.close(handle)
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode())
    return SimpleNamespace(returncode=code, stdout=texts[0], stderr=texts[1])


def load(script):
    """Return a script as a module."""
    spec = importlib.util.spec_from_file_location(script.stem, script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


loaded = functools.cache(load)  # for runs in this process


def jpeg(number):
    f = io.BytesIO()
    Image.new("RGB", (8, 8), (number * 7 % 256, number * 31 % 256, number // 4 % 256)).save(f, "JPEG")
    return f.getvalue()


def stand_in(form="divided", per_class=PER_CLASS):
    """Return {member name: content} of an archive in one of the forms that the script accepts."""
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


def packed(ending, files):
    """Return the bytes of a zip, tar or tar.gz archive of {member name: content}."""
    f = io.BytesIO()
    if ending == "zip":
        with zipfile.ZipFile(f, "w") as z:
            for name, content in files.items():
                z.writestr(name, content)
    else:
        with tarfile.open(fileobj=f, mode="w:gz" if ending == "gz" else "w") as t:
            for name, content in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                t.addfile(info, io.BytesIO(content))
    return f.getvalue()


def pack(path, files):
    path.write_bytes(packed(path.suffix.removeprefix("."), files))
    return path


def tree(folder):
    """Return {path: (inode, modification time, content)} of all files below a folder."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    return {str(p.relative_to(folder)): (p.stat().st_ino, p.stat().st_mtime_ns, p.read_bytes()) for p in files}


def split_of(folder):
    """Return {split: {(class, image)}} of an ImageFolder tree."""
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
    paths = list((tmp_path / "out" / "miniImagenet").glob("*/*/*.jpg"))
    assert len(paths) == 40
    for path in paths:
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

    # every class is shuffled by itself
    places = {label: set() for label in CLASS_SPLIT}
    for label, name in splits["0"]["test"]:
        places[label].add(name.removeprefix(label))
    assert len(set(map(frozenset, places.values()))) > 1


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


@pytest.mark.parametrize("name", ["../evil.jpg", "ROOT/evil.jpg", "a/../../evil.jpg", "..\\evil.jpg", "C:\\evil.jpg"])
@pytest.mark.parametrize("ending", ["zip", "tar.gz"])
def test_members_that_leave_the_folder_are_refused(tmp_path, name, ending):
    dest = tmp_path / "in" / "out"
    name = name.replace("ROOT", str(tmp_path))
    archive = pack(tmp_path / f"a.{ending}", {**stand_in(), name: jpeg(1)})
    assert "evil" in setup(archive, dest, ok=False)
    assert is_clean(dest) and not list(tmp_path.rglob("*evil*"))


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
    assert "1 files that are no images (1 .txt), 1 hidden files, 2 broken images" in out and "41 images" in out


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda f: {**f, "x/train/n01/n0100000000.jpg": jpeg(9)}, "two images"),
        (lambda f: {**f, "train/n05/a.jpg": jpeg(1)}, "n05"),
        (lambda f: {**f, "images/unknown.jpg": jpeg(1)}, "unknown.jpg"),
        (lambda f: {}, "no file in it"),
    ],
)
def test_trees_that_cannot_be_used(tmp_path, change, word):
    archive, dest = pack(tmp_path / "a.zip", change(stand_in())), tmp_path / "out"
    assert word in setup(archive, dest, ok=False)
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


@pytest.mark.parametrize("script, flag", [(SETUP, "csv_dir"), (SETUP, "dest"), (INVERT, "folder"), (INVERT, "dest")])
def test_paths_begin_with_the_home_folder_also_after_an_equals_sign(monkeypatch, script, flag):
    monkeypatch.setenv("HOME", "/somewhere")
    _, args = loaded(script).get_args(["--folder=x"] * (script == INVERT) + [f"--{flag}=~/a"])
    assert getattr(args, flag) == Path("/somewhere/a")


def test_google_drive_out_of_reach(tmp_path):
    dead = dict.fromkeys(("https_proxy", "http_proxy", "HTTPS_PROXY", "HTTP_PROXY", "all_proxy"), "http://127.0.0.1:9")
    error = run(
        SETUP, "--dest", tmp_path, ok=False, env={**dead, "no_proxy": "", "NO_PROXY": "", "HOME": str(tmp_path)}
    )
    assert "Google Drive" in error and "--url" in error and "--archive" in error


def stopped_at(place, dest, script, *words):
    """Return a process of a script, stopped when `place` exists; again, without `dest`, if it has ended before."""
    for _ in range(20):
        process = subprocess.Popen([sys.executable, script, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        while process.poll() is None and not place.exists():
            time.sleep(0.001)
        process.send_signal(signal.SIGSTOP)
        if process.poll() is None:
            return process
        process.communicate()
        shutil.rmtree(dest)
    raise AssertionError(f"{script} always ended before it could be stopped")


@pytest.mark.parametrize("stage", [".miniImagenet.partial/raw", ".miniImagenet.partial/out/train", "miniImagenet"])
def test_a_kill_leaves_nothing_or_a_whole_result(tmp_path, stage):
    archive, dest = pack(tmp_path / "a.tar", stand_in(per_class=200)), tmp_path / "out"
    process = stopped_at(dest / stage, dest, SETUP, "--archive", archive, "--any_count", "--dest", dest)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    if (dest / "miniImagenet").exists():
        assert len(list((dest / "miniImagenet").glob("*/*/*"))) == 800
    else:
        assert (dest / ".miniImagenet.partial").exists()
    setup(archive, dest)
    assert sorted(p.name for p in dest.iterdir()) == ["miniImagenet", "miniImagenetFewShot"]
    assert all(len(list((dest / name).glob("*/*/*"))) == 800 for name in ("miniImagenet", "miniImagenetFewShot"))


INTERRUPTED = "interrupted: the same command continues\n"
EXIT_CODES = {signal.SIGTERM: 0, signal.SIGINT: 130}


@pytest.mark.parametrize("sent", EXIT_CODES)
def test_a_signal_leaves_nothing(tmp_path, sent):
    archive, dest = pack(tmp_path / "a.tar", stand_in(per_class=200)), tmp_path / "out"
    words = ("--archive", archive, "--any_count", "--dest", dest)
    process = stopped_at(dest / ".miniImagenet.partial" / "raw", dest, SETUP, *words)
    assert "another run" in setup(archive, dest, ok=False)
    process.send_signal(sent)
    process.send_signal(signal.SIGCONT)
    _, error = process.communicate(timeout=30)
    assert process.returncode == EXIT_CODES[sent] and error.decode() == INTERRUPTED and is_clean(dest)


@pytest.mark.parametrize("sent", EXIT_CODES)
@pytest.mark.parametrize("script", [SETUP, INVERT])
def test_a_signal_during_the_imports(script, sent):
    process = subprocess.Popen([sys.executable, "-X", "importtime", script], stderr=subprocess.PIPE, text=True)
    line = ""
    while "argparse" not in line:  # the first import after the handlers
        line = process.stderr.readline()
    process.send_signal(sent)
    _, error = process.communicate(timeout=30)
    assert process.returncode == EXIT_CODES[sent] and INTERRUPTED in error and "Traceback" not in error


@pytest.mark.parametrize("stopped_by", ["signal", "kill"])
def test_force_that_is_stopped_between_two_renames_keeps_the_old_result(tmp_path, stopped_by):
    archive = pack(tmp_path / "a.tar", stand_in())
    setup(archive, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.glob("miniImagenet*/*/*/*")}
    module = load(SETUP)

    class Stopping(type(tmp_path)):
        def replace(self, target):
            if self.name == "out":
                os._exit(9) if stopped_by == "kill" else sys.exit(0)
            return super().replace(target)

    module.Path = Stopping
    process = os.fork()
    if process == 0:
        with contextlib.suppress(SystemExit):
            args = ["--archive", archive, "--any_count", "--dest", tmp_path, "--seed", "1", "--force"]
            module.main([str(each) for each in args])
        os._exit(0)
    os.waitpid(process, 0)
    assert (tmp_path / ".miniImagenet.partial").exists() == (stopped_by == "kill")
    assert "already there" in setup(archive, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.glob("miniImagenet*/*/*/*")} == before


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
    assert "http://[::1/x.zip" in run(SETUP, "--url", "http://[::1/x.zip", *args, ok=False)
    assert "404" in run(SETUP, "--url", server.url + "ü x", *args, ok=False)
    run(SETUP, "--url", (tmp_path / "absent.zip").as_uri(), *args, ok=False)
    run(SETUP, "--url", (tmp_path / "served.zip").as_uri(), *args)


def test_the_real_lists(tmp_path):
    """The published lists: 64/16/20 disjoint classes of 600; the flat form is laid out by them."""
    if "ISICLE_REAL_DATA" not in os.environ:
        pytest.skip("needs ISICLE_REAL_DATA, a folder that holds mini-imagenet-splits/{train,val,test}.csv")
    real_lists = Path(os.environ["ISICLE_REAL_DATA"]) / "mini-imagenet-splits"
    labels = {}
    for split in ("train", "val", "test"):
        with (real_lists / f"{split}.csv").open(newline="") as f:
            for row in csv.DictReader(f):
                labels.setdefault(row["label"], {}).setdefault(split, []).append(row["filename"])
    assert all(len(of) == 1 and len(next(iter(of.values()))) == 600 for of in labels.values())
    counts = [sum(s in of for of in labels.values()) for s in ("train", "val", "test")]
    assert counts == [64, 16, 20]
    files = {f"images/{n}": jpeg(1) for of in labels.values() for ns in of.values() for n in ns[:3]}
    setup(pack(tmp_path / "images.tar", files), tmp_path / "out", "--csv_dir", real_lists)
    few = split_of(tmp_path / "out" / "miniImagenetFewShot")
    assert [len({c for c, _ in few[s]}) for s in ("train", "val", "test")] == [64, 16, 20]
    assert all(n.startswith(c) for images in few.values() for c, n in images)


ODD_NAMES = {
    "a\x1b[31mred": "a\\x1b[31mred",
    "two\nlines": "two\\nlines",
    "a\rb": "a\\rb",
    "\u202egpj.x": "\\u202egpj.x",
    "line\u2028end": "line\\u2028end",
    "caf\udce9": "caf\\udce9",  # the byte E9, which is not UTF-8
}


@pytest.mark.parametrize("name", ODD_NAMES, ids=ascii)
def test_odd_names_are_set_up_and_shown_escaped(tmp_path, name):
    files = {f"{s}/{name}{s}/{name}{i}.jpg": jpeg(i) for s in ("train", "val", "test") for i in range(3)}
    archive = pack(tmp_path / f"{name}.tar", files)
    dest = tmp_path / f"out {name}"
    assert ODD_NAMES[name] in setup(archive, dest)
    assert setup(archive, dest).count("already there") == 2
    few = split_of(dest / "miniImagenetFewShot")
    assert few == {s: {(f"{name}{s}", f"{name}{i}.jpg") for i in range(3)} for s in ("train", "val", "test")}
    assert ODD_NAMES[name] in run(SETUP, "--archive", archive, "--dest", tmp_path / "other", ok=False)
    assert ODD_NAMES[name] in run(SETUP, "--archive", tmp_path / f"absent {name}", ok=False)
    assert ODD_NAMES[name] in run(SETUP, "--archive", archive, f"--{name}", ok=False)


@pytest.mark.parametrize("name", ODD_NAMES, ids=ascii)
@pytest.mark.parametrize(
    "member", ["train/n01/{}.jpg", "train/{}/a.jpg", "../{}.jpg", "/{}", "images/{}.jpg", "{0}/n01/n0100000000.jpg"]
)
def test_odd_names_in_errors(tmp_path, member, name):
    is_broken = member.startswith("train/n01")
    files = {**stand_in("lead"), member.format(name): b"<html>" if is_broken else jpeg(1)}
    if member.startswith("{"):
        files = {**stand_in("plain"), member.format(name): jpeg(1)}
    dest = tmp_path / "out"
    assert ODD_NAMES[name] in setup(pack(tmp_path / "a.tar", files), dest, ok=False)
    assert is_clean(dest)


def test_odd_names_in_lists_and_answers(tmp_path, server):
    files = {**stand_in("flat"), "mini/test.csv": b"filename,label\nn0400000000.jpg,\x1b[2J/x\n"}
    assert "\\x1b[2J" in setup(pack(tmp_path / "a.zip", files), tmp_path / "out", ok=False)
    server.content = b"\x1b]0;title\x07 \x1b[2J no archive\n" * 20
    assert "x1b]0;title" in run(SETUP, "--url", server.url, "--dest", tmp_path / "out", ok=False)
    assert is_clean(tmp_path / "out")


def test_the_scripts_agree_on_names():
    setup_script = load(SETUP)
    invert_script = load(INVERT)
    assert setup_script.SUFFIXES == invert_script.SUFFIXES
    assert setup_script.IGNORED == invert_script.IGNORED
    assert inspect.getsource(setup_script.Parser.error) == inspect.getsource(invert_script.Parser.error)
    first_lines = [
        path.read_text().partition("import os\n")[2].partition("import argparse")[0] for path in (SETUP, INVERT)
    ]
    assert first_lines[0] == first_lines[1]  # the handling of signals
    for name in ("shown", "say", "is_hidden", "lock"):
        assert inspect.getsource(getattr(setup_script, name)) == inspect.getsource(getattr(invert_script, name))


def image_of_each_ending():
    """Return {ending: the bytes of an image} for every ending that the scripts know."""
    formats = {".jp2": "JPEG2000", ".png": "PNG", ".bmp": "BMP", ".tif": "TIFF", ".tiff": "TIFF", ".webp": "WEBP"}
    formats |= {".gif": "GIF", ".avif": "AVIF", ".ppm": "PPM", ".pgm": "PPM", ".pbm": "PPM", ".pnm": "PPM"}
    formats |= dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"), "JPEG")
    formats |= dict.fromkeys((".j2k", ".j2c", ".jpc", ".jpf", ".jpx"), "JPEG2000") | {".avifs": "AVIF", ".apng": "PNG"}
    modes = {".pgm": "L", ".pbm": "1"}
    images = {}
    for suffix in load(SETUP).SUFFIXES:
        f = io.BytesIO()
        Image.new(modes.get(suffix, "RGB"), (8, 8)).save(f, formats[suffix])
        images[suffix] = f.getvalue()
    return images


def test_images_of_every_ending(tmp_path):
    images = image_of_each_ending()
    files = {f"{s}/{s}1/a{e}": images[e] for s in ("train", "val", "test") for e in images}
    out = setup(pack(tmp_path / "a.zip", {n.replace(".jf", ".JF"): c for n, c in files.items()}), tmp_path / "out")
    assert f"found: 3 classes, {3 * len(images)} images" in out
    assert "skipped: 0 files that are no images, 0 hidden files, 0 broken images" in out
    printed = run(INVERT, "--folder", tmp_path / "out" / "miniImagenet", "--dest", tmp_path / "camnet")
    assert f"{3 * len(images)} images" in printed


HIDDEN = ["._n.jpg", ".ipynb_checkpoints/n-checkpoint.jpg", ".thumbnails/n.jpg", "__MACOSX/._n.jpg", "__MACOSX/n.jpg"]
HIDDEN += [".DS_Store", "Thumbs.db", "desktop.ini", "@eaDir/n.jpg/thumb.jpg"]


@pytest.mark.parametrize("place", ["", "train/", "train/n01/", "few/", "few/val/", "few/val/n03/"])
def test_hidden_files_are_no_images(tmp_path, place):
    """Neither in an archive nor in a finished result."""
    in_archive = place.replace("few/", "")
    archive = pack(tmp_path / "a.zip", {**stand_in(), **{f"{in_archive}{name}": jpeg(999) for name in HIDDEN}})
    dest = tmp_path / "out"
    assert "found: 4 classes, 40 images" in setup(archive, dest)
    assert {c for c, _ in split_of(dest / "miniImagenet")["train"]} == set(CLASS_SPLIT)
    top = dest / ("miniImagenetFewShot" if place.startswith("few") else "miniImagenet")
    for name in HIDDEN:
        path = top / in_archive / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(999))
    printed = setup(archive, dest)
    assert printed.count("already there") == 2
    assert "miniImagenet: train 4 classes, 24 images" in printed
    assert "miniImagenetFewShot: train 2 classes, 20 images, val 1 classes, 10 images" in printed


def test_hidden_files_are_in_no_list_given_later(tmp_path):
    dest = tmp_path / "out"
    archive = pack(tmp_path / "a.zip", stand_in("plain"))
    setup(archive, dest)
    for name in (".ipynb_checkpoints/n.jpg", "n01/._n.jpg", "Thumbs.db"):
        (dest / "miniImagenet" / "train" / name).parent.mkdir(exist_ok=True)
        (dest / "miniImagenet" / "train" / name).write_bytes(jpeg(1))
    for name, content in stand_in("flat").items():
        if name.endswith(".csv"):
            (tmp_path / Path(name).name).write_bytes(content)
    setup(archive, dest, "--csv_dir", tmp_path)
    assert len(set.union(*split_of(dest / "miniImagenetFewShot").values())) == 40


PICKLE = pickle.dumps({"image_data": [1]})
INNER = {ending: packed(ending, stand_in("plain")) for ending in ("zip", "tar")}
UNUSABLE = {
    "tars.zip": (packed("zip", {f"mini/{s}.tar": INNER["tar"] for s in "abc"}), ["3 .tar", "--archive"]),
    "zips.tar": (packed("tar", {f"{s}.ZIP": INNER["zip"] for s in "abc"}), ["3 .zip", "--archive"]),
    "one.tar": (packed("tar", {"mini.zip": INNER["zip"]}), ["1 .zip", "--archive"]),
    "tgz.zip": (packed("zip", {"README": b"x", "mini.tar.gz": b"\x1f\x8b"}), ["1 .gz", "--archive"]),
    "pickles.zip": (packed("zip", {f"cache-{s}.pkl": PICKLE for s in "abc"}), ["3 .pkl", "not image files"]),
    "arrays.tar": (packed("tar", {"train.npz": b"PK", "val.npz": b"PK"}), ["2 .npz", "not image files"]),
    "texts.zip": (packed("zip", {"a.txt": b"x", "LICENSE": b"x"}), ["1 .txt", "CLASS/IMAGE"]),
    "lists.zip": (packed("zip", {"train.csv": b"filename,label\n"}), ["no file", "CLASS/IMAGE"]),
    "hidden.zip": (packed("zip", {"__MACOSX/n01/a.jpg": jpeg(1), ".x/b.jpg": jpeg(1)}), ["2 hidden"]),
    "empty.tar": (packed("tar", {}), ["no file in it"]),
    "page.zip": (b"<!DOCTYPE html><title>Quota exceeded</title>", ["web page", "Quota exceeded"]),
    "denied.tar": (b"Access denied\n", ["web page or text", "Access denied"]),
    "mini.rar": (b"Rar!\x1a\7\0xxxx", ["a RAR archive"]),
    "mini.7z": (b"7z\xbc\xaf\x27\x1cxxxx", ["a 7z archive"]),
    "mini.pkl": (PICKLE, ["a Python pickle"]),
    "cut.zip": (INNER["zip"][:-30], ["an incomplete zip"]),
    "nothing.zip": (b"", ["empty"]),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_archives_without_images(tmp_path, name):
    content, words = UNUSABLE[name]
    (tmp_path / name).write_bytes(content)
    error = setup(tmp_path / name, tmp_path / "out", ok=False)
    for word in [name, *words]:
        assert word in error
    assert is_clean(tmp_path / "out")
    setup(pack(tmp_path / "good.zip", stand_in()), tmp_path / "out")


def test_inner_archives_are_named_when_the_count_is_wrong(tmp_path):
    archive = pack(tmp_path / "a.zip", {**stand_in(), "more.tar": INNER["tar"]})
    error = run(SETUP, "--archive", archive, "--dest", tmp_path / "out", ok=False)
    assert "40 images" in error and "1 .tar" in error and "--archive" in error


def test_encrypted_archives(tmp_path):
    content = bytearray(packed("zip", stand_in()))
    at = content.index(b"PK\1\2")
    content[at + 8] |= 1  # the flag of an encrypted member
    (tmp_path / "a.zip").write_bytes(content)
    assert "encrypted" in setup(tmp_path / "a.zip", tmp_path / "out", ok=False)


@pytest.mark.parametrize("ending", ["zip", "tar"])
@pytest.mark.parametrize("form", ["divided", "flat"])
def test_backslashes_separate_folders(tmp_path, form, ending):
    """As in the zip files of .NET and of PowerShell 5."""
    files = {name.replace("/", "\\"): content for name, content in stand_in(form).items()}
    files |= {"mini\\": b"", "mini\\.hidden\\a.jpg": jpeg(1), "__MACOSX\\._a.jpg": b"x"}
    setup(pack(tmp_path / f"a.{ending}", files), tmp_path / "out")
    assert {c for c, _ in split_of(tmp_path / "out" / "miniImagenet")["val"]} == set(CLASS_SPLIT)
    assert len(set.union(*split_of(tmp_path / "out" / "miniImagenetFewShot").values())) == 40


@pytest.mark.parametrize("start", ["/home/me/", "//server/share/", "C:\\data\\", "D:/data/"])
def test_absolute_names_say_what_to_do(tmp_path, start):
    archive = pack(tmp_path / "a.tar", {start + name: content for name, content in stand_in().items()})
    error = setup(archive, tmp_path / "out", ok=False)
    for word in ("absolute names", start.split("/")[0], "nothing was extracted", "pack that folder"):
        assert word in error
    assert is_clean(tmp_path / "out")


@pytest.mark.parametrize(
    "text",
    [
        lambda name, label: f"{name}, {label}",
        lambda name, label: f" {name} ,\t{label} ",
        lambda name, label: f'{name}, "{label}"',
        lambda name, label: f'" {name}","{label} "\r',
    ],
)
@pytest.mark.parametrize("header", ["filename,label", "filename, label", " Filename , Label ", "\ufefffilename,label"])
def test_lists_with_blanks_around_values(tmp_path, text, header):
    for split in ("train", "val", "test"):
        rows = [header]
        for label in [label for label, s in CLASS_SPLIT.items() if s == split]:
            rows += [text(f"{label}{i:08d}.jpg", label) for i in range(PER_CLASS)]
        (tmp_path / f"{split}.csv").write_text("\n".join([*rows, " ", ""]), encoding="utf-8")
    files = {name: content for name, content in stand_in("flat").items() if name.endswith(".jpg")}
    setup(pack(tmp_path / "a.zip", files), tmp_path / "out", "--csv_dir", tmp_path)
    few = split_of(tmp_path / "out" / "miniImagenetFewShot")
    assert {s: {c for c, _ in v} for s, v in few.items()} == {"train": {"n01", "n02"}, "val": {"n03"}, "test": {"n04"}}


@pytest.mark.parametrize(
    "content", [b"", b"<html>", b"filename;label\n", b"n.jpg,n01\n", "filename,label".encode("utf-16")]
)
def test_files_that_are_no_lists(tmp_path, content):
    for split in ("train", "val", "test"):
        (tmp_path / f"{split}.csv").write_bytes(content)
    archive = pack(tmp_path / "a.zip", stand_in("plain"))
    error = setup(archive, tmp_path / "out", "--csv_dir", tmp_path, ok=False)
    for word in ("--csv_dir", "train.csv", "filename,label"):
        assert word in error
    assert is_clean(tmp_path / "out")


def test_blanks_in_names_of_images_are_kept(tmp_path):
    files = {f"{s}/{s} /  {i}.jpg": jpeg(i) for s in ("train", "val", "test") for i in range(3)}
    setup(pack(tmp_path / "a.tar", files), tmp_path / "out")
    assert ("val ", "  1.jpg") in split_of(tmp_path / "out" / "miniImagenetFewShot")["val"]


def test_a_page_is_no_download(tmp_path, server):
    """It is not kept, whether this run fetched it or an earlier one; nor is an archive that is damaged inside."""
    args = ["--url", server.url, "--any_count", "--dest", tmp_path / "out"]
    good = server.content
    server.content = b"<!DOCTYPE html><html><title>Too many requests</title></html>"
    error = run(SETUP, *args, ok=False)
    for word in ("--url", "web page", "Too many requests", "not kept"):
        assert word in error
    assert not list((tmp_path / "out" / "miniImagenet_downloads").iterdir())
    at = good.index(b"\xff\xd8\xff")
    server.content = good[: at + 20] + b"12345" + good[at + 25 :]
    assert "deleted" in run(SETUP, *args, ok=False)
    server.content = good
    run(SETUP, *args)
    (kept,) = (tmp_path / "out" / "miniImagenet_downloads").iterdir()
    kept.write_bytes(b"<html>")
    run(SETUP, *args, "--force")
    assert kept.read_bytes() == good


def allow_files_of(n_bytes):
    """Return what makes every file larger than this fail like on a full disk."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))


def test_disk_full_or_read_only(tmp_path):
    files = stand_in()
    archive = pack(tmp_path / "a.tar", files)
    error = setup(archive, tmp_path / "out", ok=False, preexec_fn=allow_files_of(100))
    assert f"--dest {tmp_path / 'out'}: File too large; free some space" in error
    assert is_clean(tmp_path / "out")
    if Path("/sys/kernel").is_dir():  # where nobody can make a folder, not even root
        assert "--dest /sys/kernel/isicle" in setup(archive, "/sys/kernel/isicle", ok=False)
        error = run(INVERT, "--folder", tmp_path / "in", "--dest", "/sys/kernel/isicle", ok=False)
        assert "--folder" in error  # which is absent
        setup(archive, tmp_path / "in")
        error = run(INVERT, "--folder", tmp_path / "in/miniImagenet", "--dest", "/sys/kernel/isicle", ok=False)
        assert "--dest /sys/kernel/isicle" in error and "can write to" in error


def test_no_space_and_other_reasons():
    for script in (SETUP, INVERT):
        module = load(script)
        dest = Path("/data/out")
        for reason in (OSError(28, "No space left on device"), OSError(122, "Disk quota exceeded", "/other/file")):
            told = module.explain(reason, dest)
            assert "--dest /data/out" in told and reason.strerror in told and "free some space" in told
        told = module.explain(OSError(30, "Read-only file system", b"/data/out/caf\xe9"), dest)
        assert "--dest /data/out" in told and "can write to" in told
        told = module.explain(OSError(13, "Permission denied", "/elsewhere/a.zip"), dest)
        assert "/elsewhere/a.zip: Permission denied" in told and "--dest" not in told


@pytest.mark.parametrize("script", [SETUP, INVERT])
def test_help_names_every_flag(script):
    printed = run(script, "--help", env={"PYTHONIOENCODING": "ascii", "COLUMNS": "120"})
    actions = load(script).get_args(["--folder", "x"] if script == INVERT else [])[0]._actions
    for action in actions:
        assert action.help and action.option_strings[-1] in printed
    assert printed.isascii()


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
    assert "12 images; 1 files outside" in printed and "skipped by ending: 2 .txt, 1 hidden" in printed
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


@pytest.mark.parametrize("sent", [signal.SIGKILL, *EXIT_CODES])
def test_invert_completes_after_a_kill(folder, sent):
    for i in range(1000):
        (folder / "train" / "a" / f"more{i}.jpg").write_bytes(jpeg(i))
    out = folder.parent / "camnet" / "mini"
    process = stopped_at(out / "a" / "train", out.parent, INVERT, "--folder", folder, "--dest", out.parent)
    assert "another run" in run(INVERT, "--folder", folder, "--dest", out.parent, ok=False)
    process.send_signal(sent)
    process.send_signal(signal.SIGCONT)
    _, error = process.communicate(timeout=30)
    assert process.returncode == EXIT_CODES.get(sent, -sent)
    if sent != signal.SIGKILL:
        assert error.decode() == INTERRUPTED and not list(out.rglob(".*"))
    for path in out.glob("*/*/[!.]*"):
        assert path.read_bytes() == (folder / "train" / path.parent.parent.name / path.name).read_bytes()
    invert(folder)
    assert sum(p.is_file() for p in out.rglob("*")) == 1012


def test_invert_skips_hidden_folders(folder):
    for place in ("train", "train/a", "val/b"):
        for name in HIDDEN:
            (folder / place / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / place / name).write_bytes(jpeg(1))
    (folder / "train" / "a" / ".thumbnails" / "train0.jpg").write_bytes(jpeg(1))
    printed = invert(folder)
    assert "train: 2 classes, 6 images" in printed and "validation" not in printed
    made = folder.parent / "camnet" / "mini"
    assert sorted(path.name for path in made.iterdir()) == ["a", "b"]
    (made / ".ipynb_checkpoints" / "train").mkdir(parents=True)
    (made / ".ipynb_checkpoints" / "train" / "n-checkpoint.jpg").write_bytes(jpeg(1))
    (made / "a" / "train" / "._n.jpg").write_bytes(jpeg(1))
    assert "0 new, 6 already there" in invert(folder)


@pytest.mark.parametrize("name", ODD_NAMES, ids=ascii)
def test_invert_odd_names(folder, name):
    (folder / "train" / "a").rename(folder / "train" / name)
    (folder / "train" / name / "train0.jpg").rename(folder / "train" / name / f"{name}.jpg")
    folder = folder.rename(folder.with_name(name))
    assert ODD_NAMES[name] in invert(folder)
    assert (folder.parent / "camnet" / name / name / "train" / f"{name}.jpg").read_bytes() == jpeg(0)
    assert "0 new, 6 already there" in invert(folder)
    (folder / "train" / name / "sub").mkdir()
    (folder / "train" / name / "sub" / f"{name}.jpg").write_bytes(jpeg(1))
    assert ODD_NAMES[name] in invert(folder, ok=False)
    assert ODD_NAMES[name] in run(INVERT, "--folder", folder / f"absent {name}", ok=False)


@pytest.mark.parametrize("name", ["valid", "validation", "dev"])
def test_invert_names_of_the_validation_split(folder, name):
    (folder / "val").rename(folder / name)
    (folder / "unlabeled").mkdir()
    printed = invert(folder)
    assert "val: 2 classes, 4 images" in printed and "not read: unlabeled" in printed
    assert len(list((folder.parent / "camnet" / "mini").glob("*/validation/*"))) == 4
    (folder / "val").mkdir()
    error = invert(folder, ok=False)
    assert "--folder" in error and "val" in error and name in error


@pytest.mark.parametrize("other", ["same names", "further names", "fewer"])
def test_invert_folders_of_one_name(folder, other):
    """Images of two folders never end up in one target, even where their names would fit."""
    second = Path(shutil.copytree(folder, folder.parent / "other" / "mini"))
    dest = folder.parent / "camnet"
    run(INVERT, "--folder", folder, "--dest", dest)
    if other == "same names":
        (second / "train" / "a" / "train0.jpg").write_bytes(jpeg(77))
    elif other == "further names":
        (second / "train" / "c").mkdir()
        (second / "train" / "c" / "new.jpg").write_bytes(jpeg(77))
    else:
        (second / "train" / "a" / "train0.jpg").unlink()
    before = tree(dest)
    error = run(INVERT, "--folder", second, "--dest", dest, ok=False)
    for word in (f"--dest {dest}", f"was made from {folder}", f"not from {second}", "another --dest"):
        assert word in error
    assert tree(dest) == before
    run(INVERT, "--folder", second, "--dest", dest / "other")
    shutil.rmtree(dest / "mini")
    run(INVERT, "--folder", second, "--dest", dest)


def test_invert_a_folder_that_was_moved(folder):
    """The same images at another place need no other target."""
    dest = folder.parent / "camnet"
    invert(folder)
    before = tree(dest)
    moved = folder.rename(folder.parent / "moved")
    second = moved.parent / "elsewhere" / "mini"
    shutil.move(moved, second)
    assert "0 new, 6 already there" in run(INVERT, "--folder", second, "--dest", dest)
    assert tree(dest) == before


def test_invert_on_a_full_disk(folder):
    large = folder / "train" / "a" / "large.bmp"
    Image.new("RGB", (99, 99)).save(large)
    error = invert(folder, ok=False, preexec_fn=allow_files_of(9000))
    dest = folder.parent / "camnet"
    assert f"--dest {dest}: File too large; free some space" in error
    assert not list(dest.rglob("*.part"))
    invert(folder)
    assert (dest / "mini" / "a" / "train" / "large.bmp").read_bytes() == large.read_bytes()


def test_invert_follows_links_once(folder):
    shutil.move(folder / "train" / "a", folder.parent / "real")
    (folder / "train" / "a").symlink_to(folder.parent / "real")
    (folder.parent / "real" / "sub").symlink_to(folder / "test" / "a")
    (folder.parent / "real" / "loop").symlink_to(folder.parent / "real")
    assert "train: 2 classes, 7 images" in invert(folder)
