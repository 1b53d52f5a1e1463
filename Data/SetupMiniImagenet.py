"""Get mini-ImageNet (100 classes of 600 images) and write its two splits.

    python Data/SetupMiniImagenet.py                            # download from Google Drive, with gdown
    python Data/SetupMiniImagenet.py --url URL                  # download one archive; resumes a broken download
    python Data/SetupMiniImagenet.py --archive FILE [FILE ...]  # zip or tar (.gz, .bz2, .xz) files that you have
    ... --csv_dir DIR   # the few-shot lists train.csv, val.csv, test.csv (filename,label), if no archive holds them

Writes  Data/miniImagenet/{train,val,test}/CLASS/IMAGE         the SAME 100 classes in each split, for linear probes:
                                                               384/96/120 images of each class, drawn by --seed
        Data/miniImagenet/few_shot_{train,val,test}.csv        the lists of the few-shot split, if they are known
        Data/miniImagenet/split.json                           the seed and the numbers of images
        Data/miniImagenetFewShot/{train,val,test}/CLASS/IMAGE  64/16/20 DISJOINT classes: hard links to the same files
        Data/miniImagenet_downloads/                           the downloaded archives; they may be deleted afterwards

An archive may hold CLASS/IMAGE, {train,val,test}/CLASS/IMAGE, either of them inside further folders, or images/IMAGE
with the lists. Hidden files and folders (.DS_Store, .ipynb_checkpoints, __MACOSX, Thumbs.db, ...) are skipped.
A stopped run leaves no incomplete result: the work is done in hidden .partial folders, which are renamed at the end.
The same command then starts again; the exit code after SIGTERM is 0, as for the other scripts, and 130 after Ctrl-C.
Running the script again only counts the images of a finished result; --force rebuilds it.
"""

import os
import signal
import sys

if __name__ == "__main__":  # first, for the other imports take a while

    def end(signum, frame):
        """End the script at a signal. What it has half done is removed, and no second signal interrupts that."""
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.SIG_IGN)
        os.write(2, b"interrupted: the same command continues\n")
        sys.exit(130 if signum == signal.SIGINT else 0)

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)

# isort: split
import argparse
import csv
import errno
import fcntl
import hashlib
import io
import json
import lzma
import random
import re
import shutil
import stat
import struct
import tarfile
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections import Counter
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path, PurePosixPath, PureWindowsPath

from tqdm import tqdm

SPLITS = ("train", "val", "test")
FOLDER_SPLIT = {"train": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val", "test": "test"}
CLASSES = 100
PER_CLASS = 600
# The tar files that yaoyao-liu/mini-imagenet-tools links to ("Download tar files", mtl.yyliu.net/download). Drive ids
# and MD5 sums as two unrelated public loaders agree on them; 64, 16 and 20 class folders.
DRIVE = {
    "train": ("107FTosYIeBn5QbynR46YG91nHcJ70whs", "62af9b3c839974dad2d474e6325795af"),
    "val": ("1hSMUMj5IRpf-nQs1OwgiQLmGZCN0KDWl", "ab02f050b0bf66823e7acb0c1ac1bc6b"),
    "test": ("1yKyKgxcnGMIAnA_6Vr2ilbpHMc9COg-v", "318185fc3e3bf8bc57de887d9682c666"),
}
# SUFFIXES, IGNORED, is_hidden and shown are the same in InvertDirStructure.py; a test compares them.
SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".ppm", ".pgm", ".pbm", ".pnm", ".bmp", ".tif", ".tiff")
SUFFIXES += (".webp", ".gif", ".avif", ".avifs", ".apng", ".mpo", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx")
IGNORED = ("__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found")
IGNORED += ("thumbs.db", "ehthumbs.db", "desktop.ini")
# the first bytes of JPEG, PNG, GIF, BMP, PNM, TIFF, WebP, AVIF, JPEG 2000
IMAGE_START = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|BM|P[1-6]\s|II[*+]\0|MM\0[*+]|RIFF....WEBP"
    rb"|....ftyp(avi[fs]|mif1|msf1)|\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51",
    re.DOTALL,
)
ARCHIVES = {".tar", ".tgz", ".gz", ".bz2", ".xz", ".zip", ".7z", ".rar", ".zst"}
ARRAYS = {".pkl", ".pickle", ".npy", ".npz", ".h5", ".hdf5", ".mat", ".pt", ".pth", ".tfrecord", ".tfrecords"}
# files that are no archive that this script can read, by their first bytes
KINDS = {
    b"Rar!": "a RAR archive",
    b"7z\xbc\xaf": "a 7z archive",
    b"\x80": "a Python pickle",
    b"\x89HDF": "an HDF5 file",
}
KINDS |= {b"PK": "an incomplete zip archive", b"\x1f\x8b": "a gzip file that is damaged or holds no tar"}
# what reading a damaged archive raises
DAMAGED = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error)
DAMAGED += (EOFError, KeyError, ValueError, OverflowError, MemoryError, OSError)
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UserError(Exception):
    """An error that the user can fix: printed as one line, without a traceback."""


class DamagedArchive(UserError):
    """An archive that cannot be read to its end."""


class NoList(UserError):
    """A file that is no few-shot list."""


def shown(text):
    """Return the text as one line that is safe to print.

    Names come from archives and disks. Control characters, escape sequences, line breaks, changes of the writing
    direction and bytes that are not UTF-8 are written as \\x1b, \\n, \\u202e, ...
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def say(text):
    print(shown(text))


class Parser(argparse.ArgumentParser):
    """Print an error as one line, without the usage text."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {shown(message)}\n")


def is_hidden(name):
    """Return whether a file or folder is never an image or a class: what file managers and notebooks leave behind."""
    return name.startswith(".") or name.lower() in IGNORED


def check_file(path, kind, digest, size=None):
    """Compare a file's size and hash with the expected ones."""
    if size is not None and path.stat().st_size != size:
        found = path.stat().st_size
        raise UserError(f"--size {size}: {path} has {found} bytes; correct the flag, or delete the file and run again")
    if digest is not None:
        with path.open("rb") as f:
            found = hashlib.file_digest(f, kind).hexdigest()
        if found != digest.lower():
            raise UserError(f"{path}: {kind} is {found}, expected {digest}; delete the file and get it again")


def fetch(url, part):
    """Download url to part, from where part ends if the server can; return whether it is complete."""
    start = part.stat().st_size if part.exists() else 0
    url = urllib.parse.quote(url, safe="%:/?#[]@!$&'()*+,;=~")  # only what a URL cannot hold
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    with urllib.request.urlopen(request, timeout=60) as r:
        resumed = r.status == 206 and r.headers.get("Content-Range", "").startswith(f"bytes {start}-")
        if r.status == 206 and not resumed:
            part.unlink(missing_ok=True)
            return False
        start = start if resumed else 0
        total = start + int(r.headers["Content-Length"]) if r.headers["Content-Length"] else None
        with (
            part.open("ab" if resumed else "wb") as f,
            tqdm(total=total, initial=start, unit="B", unit_scale=True, desc="download", disable=None) as bar,
        ):
            while chunk := r.read(1 << 16):
                f.write(chunk)
                bar.update(len(chunk))
    return total is None or part.stat().st_size == total


def download(url, folder, tries=4):
    """Return the file downloaded from url into folder; an archive that is already there is not downloaded again."""
    name = Path(urllib.parse.unquote(urllib.parse.urlparse(url).path)).name or "archive"
    target = folder / f"{hashlib.sha256(url.encode()).hexdigest()[:8]}_{name}"
    part = target.with_name(target.name + ".part")
    folder.mkdir(parents=True, exist_ok=True)
    if target.exists() and not is_archive(target):
        target.unlink()
    reason = "the connection was lost"
    for _ in range(0 if target.exists() else tries):
        try:
            if fetch(url, part):
                part.replace(target)
                break
        except urllib.error.HTTPError as e:
            reason = f"{e.code} {e.reason}"
            if e.code != 416:
                break
            part.unlink(missing_ok=True)
        except (urllib.error.URLError, HTTPException, ConnectionError, TimeoutError, ValueError) as e:
            reason = getattr(e, "reason", e)
    if not target.exists():
        raise UserError(f"--url {url}: {reason}; run the same command again to resume, or give --archive FILE")
    keep_archive(target, f"--url {url}")
    return target


def download_drive(folder):
    """Return the three tar files from Google Drive, each checked by its MD5 sum."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, (drive_id, md5) in DRIVE.items():
        target = folder / f"{split}.tar"
        try:
            import gdown

            if not target.exists():
                gdown.download(id=drive_id, output=str(target), quiet=not sys.stderr.isatty(), resume=True, timeout=60)
        except Exception as e:
            reason = str(e).strip().splitlines()[0][:150] if str(e).strip() else type(e).__name__
            hint = "give --url URL or --archive FILE instead, or try again later"
            raise UserError(f"Google Drive: {target.name} could not be downloaded ({reason}); {hint}") from None
        keep_archive(target, "Google Drive")
        check_file(target, "md5", md5)
    return [folder / f"{split}.tar" for split in DRIVE]


def is_tar(path):
    try:
        return tarfile.is_tarfile(path)
    except DAMAGED:
        return False


def is_archive(path):
    return is_tar(path) or zipfile.is_zipfile(path)


def describe(path):
    """Return what a file is that is not an archive, and what to do."""
    with path.open("rb") as f:
        start = f.read(256)
    for first, kind in KINDS.items():
        if start.startswith(first):
            return f"{kind}; give a zip or tar archive of the image files"
    if start and b"\0" not in start:
        text = " ".join(start.decode("utf-8", "replace").split())[:60]
        return f"a web page or text that begins with {text!r}; get the archive itself, with a browser for example"
    return "not a zip or tar archive; get it again or give another file" if start else "empty; get it again"


def keep_archive(path, source):
    """Delete a download that is no archive, such as a web page, and say what it was."""
    if not is_archive(path):
        what = describe(path)
        path.unlink()
        raise UserError(f"{source}: the file was not kept, because it is {what}")


def check_member(archive, name, link=None, hard=False):
    """Refuse a member, or the target of a link, that would lie outside the folder it is extracted to."""
    path = PureWindowsPath(name)
    if ".." in path.parts or "\0" in name:
        raise UserError(f"{archive}: member {name} leaves the target folder; nothing was extracted; do not trust it")
    if path.anchor:
        hint = "unpack it into an empty folder yourself, pack that folder, and give the new file"
        raise UserError(f"{archive}: holds absolute names such as {name}; nothing was extracted; {hint}")
    if link is not None:
        joined = os.path.normpath(link if hard else PurePosixPath(name).parent / link)
        if PureWindowsPath(link).anchor or joined.startswith(".."):
            hint = "do not trust it"
            raise UserError(f"{archive}: member {name} links to {link}, outside; nothing was extracted; {hint}")


def zip_members(archive):
    """Yield (name, function that opens it) for each file of a zip archive, after checking all members."""
    with zipfile.ZipFile(archive) as z:
        for m in z.infolist():
            check_member(archive, m.filename)
            if (mode := m.external_attr >> 16) and stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
                hint = "pack it again without links"
                raise UserError(f"{archive}: member {m.filename} is a link or device; nothing was extracted; {hint}")
            if m.flag_bits & 1:
                raise UserError(
                    f"{archive}: is encrypted; unpack it, pack the folder without a password, and give that"
                )
        for m in z.infolist():
            if not m.is_dir():
                yield m.filename, lambda m=m: z.open(m)


def tar_members(archive):
    """Yield (name, function that opens it) for each file of a tar archive, after checking all members."""
    with tarfile.open(archive) as t:
        for m in t.getmembers():
            check_member(archive, m.name, m.linkname if m.issym() or m.islnk() else None, m.islnk())
            if m.isdev():
                raise UserError(f"{archive}: member {m.name} is a device; nothing was extracted; do not trust it")
        for m in t.getmembers():
            if not m.isdir():
                yield m.name, lambda m=m: t.extractfile(m) or io.BytesIO()


def members(archive):
    """Yield (path, function that opens it) for each file of an archive; a backslash separates folders like a slash."""
    if is_tar(archive):  # first: a tar that holds zip files ends like a zip
        files = tar_members(archive)
    elif zipfile.is_zipfile(archive):
        files = zip_members(archive)
    else:
        raise UserError(f"{archive}: is {describe(archive)}")
    for name, opener in files:
        name = name.replace("\\", "/")
        if not name.endswith("/"):
            yield PurePosixPath(name), opener


def extract(archive, folder, skip_bad):
    """Extract images and lists; return how many other files there were: "hidden", "broken", or by their ending."""
    left_out = Counter()
    try:
        for path, opener in tqdm(members(archive), desc=shown(archive.name), unit="file", disable=None):
            suffix = path.suffix.lower()
            if any(is_hidden(part) for part in path.parts):
                left_out["hidden"] += 1
                continue
            if suffix not in SUFFIXES and suffix != ".csv":
                left_out[suffix or "no ending"] += 1
                continue
            with opener() as source:
                start = source.read(16)
                if suffix != ".csv" and not IMAGE_START.match(start):
                    if not skip_bad:
                        raise UserError(f"{archive}: {path} is not an image; --skip_bad leaves such files out")
                    left_out["broken"] += 1
                    continue
                target = folder / path
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("xb") as f:
                    f.write(start)
                    shutil.copyfileobj(source, f)
    except (FileExistsError, NotADirectoryError) as e:
        raise UserError(f"{archive}: holds {Path(e.filename).relative_to(folder)} twice; repack it") from None
    except DAMAGED as e:
        if getattr(e, "errno", None) not in (None, errno.EINVAL):  # of the disk
            raise
        raise DamagedArchive(f"{archive}: cannot be read ({e}); get it again or give another file") from None
    except RuntimeError as e:  # a compression method that Python does not have, links in a circle
        raise UserError(
            f"{archive}: cannot be read ({e}); unpack it, pack the folder as zip or tar, and give that"
        ) from None
    return left_out


def count_words(left_out):
    """Return {"hidden": 2, ".tar": 3} as "2 hidden, 3 .tar"; only the six most frequent ones."""
    return ", ".join(f"{n} {kind}" for kind, n in left_out.most_common(6))


def advise(left_out):
    """Return what to do about archives that hold other files instead of images."""
    if left_out.keys() & ARCHIVES:
        return "unpack it, and give the archives in it to --archive"
    if left_out.keys() & ARRAYS:
        return "these are arrays, not image files: get an archive of the image files"
    return "give an archive of CLASS/IMAGE, {train,val,test}/CLASS/IMAGE, or images/IMAGE with lists"


def read_list(path, flag="", own=False):
    """Return [(file name, label), ...] of a list with the columns filename and label.

    Blanks around the values are removed, except in a list that this script wrote (own): there they are part of a name.
    """
    with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as f:
        rows = [row for row in csv.reader(f, skipinitialspace=not own) if row]
    if not own:
        rows = [[cell.strip() for cell in row] for row in rows if "".join(row).strip()]
    header = [cell.lower() for cell in rows[0]] if rows else []
    if not {"filename", "label"} <= set(header):
        raise NoList(f"{flag}{path}: is not a few-shot list; its first line must name the columns filename,label")
    name_column = header.index("filename")
    label_column = header.index("label")
    pairs = []
    for row in rows[1:]:
        row += [""] * (len(header) - len(row))
        pair = (row[name_column], row[label_column])
        for value in pair:
            if not value or is_hidden(value) or "\0" in value or len(PureWindowsPath(value).parts) != 1:
                hint = "correct the list: one file name and one class name a line, without folders"
                raise UserError(f"{flag}{path}: {','.join(pair)} are not a plain file and class name; {hint}")
        pairs.append(pair)
    return pairs


def read_lists(folder, flag=""):
    """Return {split: [(file name, label), ...]} of train.csv, val.csv and test.csv in a folder.

    The lists that --csv_dir names (flag) must divide the classes; those found in an archive may not.
    """
    lists = {}
    split_of = {}
    for split in SPLITS:
        path = folder / f"{split}.csv"
        try:
            lists[split] = read_list(path, flag)
        except (OSError, csv.Error) as e:
            reason = getattr(e, "strerror", None) or e
            raise NoList(f"{flag}{folder}: {path.name} cannot be used ({reason}); give all three lists") from None
        for _, label in lists[split]:
            if split_of.setdefault(label, split) != split and flag:
                raise UserError(f"{flag}{path}: class {label} is in {split_of[label]}.csv too; correct the lists")
    return lists


def find_lists(raw):
    """Return the first few-shot lists among the extracted files, or None."""
    for path in sorted(raw.rglob("train.csv")):
        try:
            return read_lists(path.parent)
        except NoList:
            continue
    return None


def find_class(parts, labels, nested):
    """Return an image's class, or None: the name of its folder if that names a class, else what the lists say."""
    folders = [p for p in parts[2:-1] if p != "."]
    if nested and len(folders) > 1 and folders[-1].lower() == "images":
        folders.pop()
    if folders and folders[-1].lower() != "images" and folders[-1].lower() not in FOLDER_SPLIT:
        return folders[-1]
    return labels.get(parts[-1])


def collect(raw, lists):
    """Return {class: {file name: path}} and {class: set of the splits it was found in} of what was extracted."""
    labels = {name: label for rows in (lists or {}).values() for name, label in rows}
    paths = sorted(p for p in raw.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    nested = len({p.parent for p in paths if p.parent.name.lower() == "images"}) > 1
    images = {}
    splits = {}
    for path in paths:
        parts = path.relative_to(raw).parts
        label = find_class(parts, labels, nested)
        if label is None:
            hint = "correct the lists" if lists else "give --csv_dir DIR with lists that name it"
            raise UserError(f"{Path(*parts[1:])}: is in no class folder and in no few-shot list; {hint}")
        other = images.setdefault(label, {}).setdefault(path.name, path)
        if other != path:
            raise UserError(
                f"{other.relative_to(raw)} and {path.relative_to(raw)}: two images of one class and name; rename one"
            )
        found = next((FOLDER_SPLIT[p.lower()] for p in parts[-2::-1] if p.lower() in FOLDER_SPLIT), None)
        splits.setdefault(label, set()).add(found)
    return images, splits


def few_shot_lists(images, splits, lists):
    """Return the class-disjoint lists of these images, by the given lists or the folders of the archive, or None."""
    by_list = {s: {label for _, label in rows} for s, rows in (lists or {}).items()}
    if lists and sum(map(len, by_list.values())) == len(set.union(*by_list.values())):
        split_of = {label: split for split, rows in lists.items() for _, label in rows}
    else:
        split_of = {label: next(iter(found)) for label, found in splits.items() if len(found) == 1}
        if len(split_of) < len(images) or set(split_of.values()) != set(SPLITS):
            return None
    if unknown := sorted(images.keys() - split_of.keys()):
        hint = "give --csv_dir DIR with the lists of this archive"
        raise UserError(f"class {unknown[0]} is in none of the few-shot lists; {hint}")
    found = {split: [] for split in SPLITS}
    for label in sorted(images):
        found[split_of[label]] += [(name, label) for name in sorted(images[label])]
    return found


def check_counts(images, left_out, any_count):
    """Print what was expected and found, by {class: number of images}; other numbers are an error."""
    found = f"{len(images)} classes, {sum(images.values())} images"
    expected = f"{CLASSES} classes x {PER_CLASS} = {CLASSES * PER_CLASS} images"
    say(f"expected: {expected}; found: {found}")
    wrong = [name for name, n in sorted(images.items()) if n != PER_CLASS]
    if any_count or (len(images) == CLASSES and not wrong):
        return
    if wrong:
        found += f", class {wrong[0]} has {images[wrong[0]]}"
    if left_out.keys() & (ARCHIVES | ARRAYS):
        found += f", and {count_words(left_out)} files; {advise(left_out)}"
    raise UserError(f"expected {expected} but found {found}; give a complete archive, or --any_count")


def lay_out(images, out, seed):
    """Move the images to out/SPLIT/CLASS/IMAGE: 0.64/0.16/0.20 of each class, drawn by the seed and its name."""
    counts = Counter()
    for label, files in tqdm(sorted(images.items()), desc="same-class split", unit="class", disable=None):
        names = sorted(files)
        n = len(files)
        if n < 3:
            raise UserError(
                f"class {label} has {n} images; give it at least three, one for each of train, val and test"
            )
        random.Random(f"{seed}/{label}".encode("utf-8", "surrogateescape")).shuffle(names)
        test = max(1, round(0.20 * n))
        val = max(1, round(0.16 * n))
        ends = {"train": names[test + val :], "val": names[test : test + val], "test": names[:test]}
        for split, chosen in ends.items():
            (out / split / label).mkdir(parents=True)
            counts[split] += len(chosen)
            for name in chosen:
                files[name].replace(out / split / label / name)
    return counts


def write_lists(lists, folder):
    """Write few_shot_{train,val,test}.csv, each complete or not at all."""
    for split, rows in lists.items():
        part = folder / f".few_shot_{split}.part"
        with part.open("w", newline="", encoding="utf-8", errors="surrogateescape") as f:
            # csv does not quote a carriage return by itself
            quoting = csv.QUOTE_ALL if any("\r" in value for row in rows for value in row) else csv.QUOTE_MINIMAL
            csv.writer(f, lineterminator="\n", quoting=quoting).writerows([("filename", "label"), *rows])
        part.replace(folder / f"few_shot_{split}.csv")


def read_archives(args, archives, raw):
    """Extract the archives to raw; return {class: {file name: path}} and the few-shot lists (None: not known)."""
    lists = read_lists(args.csv_dir, "--csv_dir ") if args.csv_dir else None
    left_out = Counter()
    for i, archive in enumerate(archives):
        name = archive.name.lstrip(".").split(".")[0] or "archive"
        try:
            left_out += extract(archive, raw / str(i) / name, args.skip_bad)
        except DamagedArchive as e:
            if not args.url:
                raise
            archive.unlink()
            raise UserError(f"{e}; the download was deleted, run the same command to get it again") from None
    lists = lists or find_lists(raw)
    images, splits = collect(raw, lists)
    if not images:
        names = ", ".join(str(path) for path in archives)
        inside = f"no image in it, but these files: {count_words(left_out)}" if left_out else "no file in it"
        raise UserError(f"{names}: {inside}; {advise(left_out)}")
    hidden = left_out.pop("hidden", 0)
    broken = left_out.pop("broken", 0)
    kinds = f" ({count_words(left_out)})" if left_out else ""
    say(f"skipped: {left_out.total()} files that are no images{kinds}, {hidden} hidden files, {broken} broken images")
    check_counts({name: len(files) for name, files in images.items()}, left_out, args.any_count)
    return images, few_shot_lists(images, splits, lists)


def build(args, main):
    """Make the same-class split from the archives, in a partial folder that is renamed at the end."""
    downloads = args.dest / "miniImagenet_downloads"
    archives = args.archive or ([download(args.url, downloads)] if args.url else download_drive(downloads))
    check_file(archives[0], "sha256", args.sha256, args.size)
    partial = args.dest / ".miniImagenet.partial"
    out = partial / "out"
    few = args.dest / "miniImagenetFewShot"
    seed = args.seed or 0
    try:
        out.mkdir(parents=True)
        images, few_shot = read_archives(args, archives, partial / "raw")
        counts = lay_out(images, out, seed)
        write_lists(few_shot or {}, out)
        record = {"seed": seed, "classes": len(images)} | counts
        (out / "split.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
        for old in [p for p in (few, main) if p.exists()]:  # --force: few first, for it can be made again from main
            old.replace(partial / f"old_{old.name}")
        out.replace(main)
    finally:
        put_back(partial, main, few)
        shutil.rmtree(partial, ignore_errors=True)


def put_back(partial, main, few):
    """Give the old results their places again where --force was stopped before the new one was in place."""
    if not main.exists():
        for old in (main, few):
            with suppress(FileNotFoundError):
                (partial / f"old_{old.name}").replace(old)


def class_folders(folder):
    """Yield (split, class folder, names of its images) of folder/SPLIT/CLASS/IMAGE, without what is hidden."""
    for split in SPLITS:
        classes = sorted((folder / split).iterdir()) if (folder / split).is_dir() else []
        for path in classes:
            if path.is_dir() and not is_hidden(path.name):
                names = [image.name for image in path.iterdir() if not is_hidden(image.name)]
                yield split, path, [name for name in names if name.lower().endswith(SUFFIXES)]


def count_tree(folder):
    """Return {split: {class: number of images}} of a tree of folder/SPLIT/CLASS/IMAGE."""
    tree = {split: Counter() for split in SPLITS}
    for split, path, names in class_folders(folder):
        tree[split][path.name] += len(names)
    return tree


def verify(args, main):
    """Check a finished same-class split against its record and the known counts."""
    try:
        record = json.loads((main / "split.json").read_text(encoding="utf-8"))
        seed = record["seed"]
        expected = {s: record[s] for s in SPLITS}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{main}: exists, but its split.json is missing or damaged; rebuild with --force") from None
    if args.seed is not None and seed != args.seed:
        hint = "give that seed, or rebuild with --force"
        raise UserError(f"--seed {args.seed}: {main} was drawn with seed {seed}; {hint}")
    tree = count_tree(main)
    found = {s: tree[s].total() for s in SPLITS}
    if found != expected:
        raise UserError(f"{main}: holds {found} images, its split.json says {expected}; rebuild with --force")
    say(f"{main}: already there, nothing to do (seed {seed})")
    check_counts(tree["train"] + tree["val"] + tree["test"], Counter(), args.any_count)


def make_few_shot(main, few, partial):
    """Make the class-disjoint split from the lists in main, as hard links to its images or, failing that, copies."""
    lists = {split: read_list(main / f"few_shot_{split}.csv", own=True) for split in SPLITS}
    if few.exists():
        if count_tree(few) != {split: Counter(label for _, label in rows) for split, rows in lists.items()}:
            raise UserError(f"{few}: differs from the few_shot lists in {main}; rebuild with --force")
        say(f"{few}: already there, nothing to do")
        return
    where = {(name, path.name): path / name for _, path, names in class_folders(main) for name in names}
    try:
        for split, rows in lists.items():
            for name, label in tqdm(rows, desc=f"few-shot {split}", unit="image", disable=None):
                source = where[name, label]
                target = partial / split / label / name
                target.parent.mkdir(parents=True, exist_ok=True)
                try:
                    os.link(source, target)
                except OSError:
                    shutil.copy2(source, target)
        partial.replace(few)
    except KeyError as e:
        raise UserError(f"{main}: lacks the image {e} of its few_shot lists; rebuild with --force") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def lock(dest):
    """Make a folder and lock it until this process ends. UserError if another run works there."""
    dest.mkdir(parents=True, exist_ok=True)
    try:
        fcntl.flock(os.open(dest, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"--dest {dest}: another run is working there; wait until it ends") from None
    except OSError as e:
        if e.errno not in (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP):  # file systems without locks
            raise


def run(args):
    main = args.dest / "miniImagenet"
    few = args.dest / "miniImagenetFewShot"
    partials = [args.dest / f".{folder.name}.partial" for folder in (main, few)]
    # only one run here; remove what a killed one has left
    lock(args.dest)
    put_back(partials[0], main, few)
    for leftover in [p for p in partials if p.exists()]:
        shutil.rmtree(leftover)
    # the same-class split
    if main.exists() and not args.force:
        verify(args, main)
    elif few.exists() and not args.force:
        raise UserError(f"{few}: exists although {main} does not; remove it, or rebuild both with --force")
    else:
        build(args, main)
    # the few-shot split
    if args.csv_dir and not (main / "few_shot_test.csv").exists():
        images = {}
        for _, path, names in class_folders(main):
            images.setdefault(path.name, []).extend(names)
        write_lists(few_shot_lists(images, {}, read_lists(args.csv_dir, "--csv_dir ")), main)
    if (main / "few_shot_test.csv").exists():
        make_few_shot(main, few, partials[1])
    else:
        say("few-shot split skipped: no lists found; run again with --csv_dir DIR (train.csv, val.csv, test.csv)")
    for folder in [p for p in (main, few) if p.exists()]:
        tree = count_tree(folder)
        say(f"{folder}: " + ", ".join(f"{s} {len(tree[s])} classes, {tree[s].total()} images" for s in SPLITS))


def explain(error, dest):
    """Return an OSError as one line: the flag or file, the reason, the remedy."""
    reason = error.strerror or str(error)
    path = Path(os.fsdecode(error.filename)) if error.filename else dest
    written = path in (dest, *dest.parents) or dest in path.parents
    if error.errno in NO_SPACE:
        return f"--dest {dest}: {reason}; free some space there, or give another --dest DIR"
    if written or error.errno == errno.EROFS:
        return f"--dest {dest}: {path}: {reason}; give a --dest DIR that you can write to"
    return f"{path}: {reason}; correct this and run the same command again"


def path(text):
    """The argparse type of paths: ~ stands for the home folder."""
    return Path(os.path.expanduser(text))  # noqa: PTH111 (pathlib raises RuntimeError where there is no such user)


def get_args(argv=None):
    P = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    source = P.add_mutually_exclusive_group()
    source.add_argument(
        "--archive", type=path, nargs="+", metavar="FILE", help="zip, tar or tar.gz files that you have"
    )
    source.add_argument("--url", help="http(s) or file URL of one archive (default: three tar files on Google Drive)")
    P.add_argument("--sha256", metavar="HEX", help="expected SHA-256 sum of the archive")
    P.add_argument("--size", type=int, metavar="BYTES", help="expected size of the archive")
    P.add_argument(
        "--csv_dir", type=path, metavar="DIR", help="folder of the few-shot lists; used instead of any other"
    )
    P.add_argument("--seed", type=int, help="seed of the same-class split (default: 0)")
    P.add_argument("--any_count", action="store_true", help="accept any number of classes and of images")
    P.add_argument("--skip_bad", action="store_true", help="leave out empty files and files that are not images")
    P.add_argument("--force", action="store_true", help="rebuild a finished result")
    default = Path(__file__).resolve().parent
    P.add_argument("--dest", type=path, metavar="DIR", default=default, help="where to write (default: this folder)")
    args = P.parse_args(argv)
    if (args.sha256 or args.size is not None) and not args.url and len(args.archive or []) != 1:
        P.error("--sha256 and --size: need --url URL or a single --archive FILE")
    if args.sha256 and (len(args.sha256) != 64 or set(args.sha256.lower()) - set("0123456789abcdef")):
        P.error(f"--sha256 {args.sha256}: is not a SHA-256 sum; give 64 hexadecimal digits")
    if args.url:
        try:
            scheme = urllib.parse.urlparse(args.url).scheme
        except ValueError as e:
            P.error(f"--url {args.url}: {e}; give an http, https or file URL")
        if scheme not in ("http", "https", "file"):
            P.error(f"--url {args.url}: give an http, https or file URL")
    for archive in args.archive or []:
        if not archive.is_file():
            P.error(f"--archive {archive}: is not a file; give a zip, tar or tar.gz file")
    return P, args


def main(argv=None):
    sys.stdout.reconfigure(errors="backslashreplace")  # for a terminal that knows fewer characters
    P, args = get_args(argv)
    try:
        run(args)
    except UserError as e:
        P.error(str(e))
    except OSError as e:
        P.error(explain(e, args.dest))


if __name__ == "__main__":
    main()
