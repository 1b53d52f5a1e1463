"""Gets mini-ImageNet (100 classes x 600 images) and lays out its two splits.

    python Data/SetupMiniImagenet.py                            # from Google Drive, by gdown
    python Data/SetupMiniImagenet.py --url URL                  # from a web server (a broken download is resumed)
    python Data/SetupMiniImagenet.py --archive FILE [FILE ...]  # from zip, tar, tar.gz files already here
    ... --csv_dir DIR   # with the few-shot lists {train,val,test}.csv (filename,label) where no archive has them

Writes  Data/miniImagenet/{train,val,test}/CLASS/IMAGE         SAME classes in each split, 384/96/120 of each class's
                                                               600 images, drawn by --seed: for linear probes
        Data/miniImagenet/few_shot_{train,val,test}.csv        the class-disjoint lists, where known
        Data/miniImagenet/split.json                           the seed and the counts
        Data/miniImagenetFewShot/{train,val,test}/CLASS/IMAGE  64/16/20 DISJOINT classes, hard links to the same files
        Data/miniImagenet_downloads/                           what was downloaded; may be deleted afterwards

An archive may hold CLASS/IMAGE, {train,val,test}/CLASS/IMAGE, either of them under further folders, or images/IMAGE
with the lists. Work goes on in hidden .partial folders renamed at the end: a kill or a full disk leaves nothing or a
whole result. A finished result is recognised and only counted; --force rebuilds it.
"""

import argparse
import csv
import fcntl
import gzip
import hashlib
import io
import json
import lzma
import os
import random
import shutil
import stat
import sys
import tarfile
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections import Counter
from http.client import HTTPException
from pathlib import Path, PurePosixPath, PureWindowsPath

from tqdm import tqdm

SPLITS = ("train", "val", "test")
FOLDER_SPLIT = {"train": "train", "val": "val", "validation": "val", "test": "test"}
CLASSES, PER_CLASS = 100, 600
# The tar files that yaoyao-liu/mini-imagenet-tools links to ("Download tar files", mtl.yyliu.net/download). Drive ids
# and MD5 sums as two unrelated public loaders agree on them; 64, 16 and 20 class folders.
DRIVE = {
    "train": ("107FTosYIeBn5QbynR46YG91nHcJ70whs", "62af9b3c839974dad2d474e6325795af"),
    "val": ("1hSMUMj5IRpf-nQs1OwgiQLmGZCN0KDWl", "ab02f050b0bf66823e7acb0c1ac1bc6b"),
    "test": ("1yKyKgxcnGMIAnA_6Vr2ilbpHMc9COg-v", "318185fc3e3bf8bc57de887d9682c666"),
}
SUFFIXES, MAGIC = {".jpg", ".jpeg", ".png"}, (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")
BROKEN = (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, lzma.LZMAError)
BROKEN += (EOFError, KeyError, RuntimeError)  # a truncated file, a link to nothing, an encrypted zip


class UserError(Exception):
    """A mistake that its user can mend: told in one line, without a traceback."""


class Parser(argparse.ArgumentParser):
    """Tells an error in one line, without the usage text."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def check_file(path, kind, digest, size=None):
    """Compares a file's size and hash with what is expected of them."""
    if size is not None and path.stat().st_size != size:
        raise UserError(f"--size {size}: {path} has {path.stat().st_size} bytes; get the file again or mend the flag")
    if digest is not None:
        with path.open("rb") as f:
            found = hashlib.file_digest(f, kind).hexdigest()
        if found != digest.lower():
            raise UserError(f"{path}: {kind} is {found}, expected {digest}; delete the file and get it again")


def fetch(url, part):
    """Downloads url to part, from where part ends if the server can; returns whether it is complete."""
    start = part.stat().st_size if part.exists() else 0
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
    """Returns the file downloaded from url into folder; one that is already there is not downloaded again."""
    name = Path(urllib.parse.unquote(urllib.parse.urlparse(url).path)).name or "archive"
    target = folder / f"{hashlib.sha256(url.encode()).hexdigest()[:8]}_{name}"
    part = target.with_name(target.name + ".part")
    folder.mkdir(parents=True, exist_ok=True)
    reason = "the connection broke off"
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
        except (urllib.error.URLError, HTTPException, ConnectionError, TimeoutError) as e:
            reason = getattr(e, "reason", e)
    if not target.exists():
        raise UserError(f"--url {url}: {reason}; run the same command again (it resumes), or give --archive FILE")
    return target


def download_drive(folder):
    """Returns the three tar files from Google Drive, each checked by its MD5 sum."""
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
        check_file(target, "md5", md5)
    return [folder / f"{split}.tar" for split in DRIVE]


def check_member(archive, name, link=None, hard=False):
    """Refuses a member, or a link's target, that would lie outside the folder it is extracted to."""
    path = PureWindowsPath(name)
    if path.anchor or ".." in path.parts or "\0" in name:
        raise UserError(f"{archive}: member {name!r} leaves the target folder; nothing was extracted, do not trust it")
    if link is not None:
        joined = os.path.normpath(link if hard else PurePosixPath(name).parent / link)
        if PureWindowsPath(link).anchor or joined.startswith(".."):
            raise UserError(f"{archive}: member {name!r} links to {link!r}, outside; nothing was extracted")


def members(archive):
    """Yields (name, open function) for each file of an archive, after all of its members have been checked."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as z:
            for m in z.infolist():
                check_member(archive, m.filename)
                if (mode := m.external_attr >> 16) and stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
                    raise UserError(f"{archive}: member {m.filename!r} is a link or device; nothing was extracted")
            yield from ((m.filename, lambda m=m: z.open(m)) for m in z.infolist() if not m.is_dir())
        return
    try:
        t = tarfile.open(archive)  # noqa: SIM115 - closed by the with below
    except tarfile.TarError:
        raise UserError(f"{archive}: is no whole zip or tar archive; get it again or give another file") from None
    with t:
        for m in t.getmembers():
            check_member(archive, m.name, m.linkname if m.issym() or m.islnk() else None, m.islnk())
            if m.isdev():
                raise UserError(f"{archive}: member {m.name!r} is a device; nothing was extracted")
        yield from ((m.name, lambda m=m: t.extractfile(m) or io.BytesIO()) for m in t.getmembers() if not m.isdir())


def extract(archive, folder, skip_bad):
    """Extracts images and lists; returns how many files were neither, and how many broken images were left out."""
    counts = Counter()
    try:
        for name, opener in tqdm(members(archive), desc=archive.name, unit="file", disable=None):
            path = PurePosixPath(name)
            hidden = any(p.startswith(".") or p == "__MACOSX" for p in path.parts if p != ".")
            suffix = path.suffix.lower()
            if hidden or suffix not in SUFFIXES | {".csv"}:
                counts["other"] += 1
                continue
            with opener() as source:
                head = source.read(8)
                if suffix != ".csv" and not head.startswith(MAGIC):
                    if not skip_bad:
                        raise UserError(f"{archive}: {name} is no JPEG or PNG image; --skip_bad leaves such files out")
                    counts["bad"] += 1
                    continue
                target = folder / path
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("xb") as f:
                    f.write(head)
                    shutil.copyfileobj(source, f)
    except FileExistsError as e:
        raise UserError(f"{archive}: holds {Path(e.filename).relative_to(folder)} twice; repack it") from None
    except BROKEN as e:
        raise UserError(f"{archive}: cannot be read ({e}); get it again or give another file") from None
    return counts


def read_lists(folder, strict):
    """Returns {split: [(filename, label), ...]} from train.csv, val.csv, test.csv; None if they are not such lists."""
    lists, split_of = {}, {}
    for split in SPLITS:
        path = folder / f"{split}.csv"
        try:
            with path.open(newline="", encoding="utf-8-sig") as f:
                rows = [(r["filename"], r["label"]) for r in csv.DictReader(f)]
        except (OSError, KeyError, UnicodeDecodeError, csv.Error) as e:
            if strict:
                hint = f"it must be a list with the columns filename,label ({type(e).__name__})"
                raise UserError(f"--csv_dir {folder}: {path.name} cannot be used; {hint}") from None
            return None
        for name, label in rows:
            if any(not x or x.startswith(".") or len(PureWindowsPath(x).parts) != 1 for x in (name or "", label or "")):
                raise UserError(f"{path}: {name!r},{label!r} are no plain file and class names; mend the list")
            if split_of.setdefault(label, split) != split and strict:
                raise UserError(f"{path}: class {label} is in the {split_of[label]} list too; mend the lists")
        lists[split] = rows
    return lists


def find_class(parts, labels, nested):
    """Returns an image's class, or None: the list's where the folder is none, else the folder's name."""
    folders = [p for p in parts[2:-1] if p != "."]
    if nested and len(folders) > 1 and folders[-1].lower() == "images":
        folders.pop()
    if folders and folders[-1].lower() != "images" and folders[-1].lower() not in FOLDER_SPLIT:
        return folders[-1]
    return labels.get(parts[-1])


def collect(raw, lists):
    """Returns {class: {file name: path}} and {class: set of the splits it was found in} of what was extracted."""
    labels = {name: label for rows in (lists or {}).values() for name, label in rows}
    paths = sorted(p for p in raw.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    nested = len({p.parent for p in paths if p.parent.name.lower() == "images"}) > 1
    images, splits = {}, {}
    for path in paths:
        parts = path.relative_to(raw).parts
        label = find_class(parts, labels, nested)
        if label is None:
            hint = "give --csv_dir DIR with lists that name it"
            raise UserError(f"{Path(*parts[1:])}: is in no class folder and in no few-shot list; {hint}")
        other = images.setdefault(label, {}).setdefault(path.name, path)
        if other != path:
            raise UserError(f"{other.relative_to(raw)} and {path.relative_to(raw)}: two images of one class and name")
        found = next((FOLDER_SPLIT[p.lower()] for p in parts[-2::-1] if p.lower() in FOLDER_SPLIT), None)
        splits.setdefault(label, set()).add(found)
    return images, splits


def few_shot_lists(images, splits, lists):
    """Returns the class-disjoint lists of the images at hand, by the given lists or the archive's folders, or None."""
    by_list = {s: {label for _, label in rows} for s, rows in (lists or {}).items()}
    if lists and sum(map(len, by_list.values())) == len(set.union(*by_list.values())):
        of = {label: split for split, rows in lists.items() for _, label in rows}
    else:
        of = {label: next(iter(found)) for label, found in splits.items() if len(found) == 1}
        if len(of) < len(images) or set(of.values()) != set(SPLITS):
            return None
    if unknown := sorted(images.keys() - of.keys()):
        raise UserError(
            f"class {unknown[0]} is in none of the few-shot lists; give the --csv_dir that fits the archive"
        )
    return {s: [(n, c) for c in sorted(images) if of[c] == s for n in sorted(images[c])] for s in SPLITS}


def check_counts(images, any_count):
    """Tells what was expected and found, by {class: number of images}; differing counts are an error."""
    found = f"{len(images)} classes, {sum(images.values())} images"
    expected = f"{CLASSES} classes x {PER_CLASS} = {CLASSES * PER_CLASS} images"
    print(f"expected: {expected}; found: {found}")
    off = next((c for c, n in sorted(images.items()) if n != PER_CLASS), None)
    if not any_count and (len(images) != CLASSES or off is not None):
        more = f", class {off} has {images[off]}" if off is not None else ""
        raise UserError(f"expected {expected} but found {found}{more}; give a whole archive, or --any_count")


def lay_out(images, out, seed):
    """Moves the images to out/SPLIT/CLASS/IMAGE: 0.64/0.16/0.20 of each class, drawn by the seed and its name."""
    counts = Counter()
    for label, files in tqdm(sorted(images.items()), desc="same-class split", unit="class", disable=None):
        names, n = sorted(files), len(files)
        if n < 3:
            raise UserError(f"class {label} has {n} images; each class needs one for each of train, val and test")
        random.Random(f"{seed}/{label}").shuffle(names)
        test, val = max(1, round(0.20 * n)), max(1, round(0.16 * n))
        ends = {"train": names[test + val :], "val": names[test : test + val], "test": names[:test]}
        for split, chosen in ends.items():
            (out / split / label).mkdir(parents=True)
            counts[split] += len(chosen)
            for name in chosen:
                files[name].replace(out / split / label / name)
    return counts


def write_lists(lists, folder):
    """Writes few_shot_{train,val,test}.csv, each whole or not at all."""
    for split, rows in lists.items():
        part = folder / f".few_shot_{split}.part"
        with part.open("w", newline="", encoding="utf-8") as f:
            csv.writer(f, lineterminator="\n").writerows([("filename", "label"), *rows])
        part.replace(folder / f"few_shot_{split}.csv")


def build(args, main):
    """Makes the same-class split from the archives, in a partial folder renamed at the end."""
    downloads, seed = args.dest / "miniImagenet_downloads", args.seed or 0
    archives = args.archive or ([download(args.url, downloads)] if args.url else download_drive(downloads))
    partial, few, total = args.dest / ".miniImagenet.partial", args.dest / "miniImagenetFewShot", Counter()
    check_file(archives[0], "sha256", args.sha256, args.size)
    out = partial / "out"
    try:
        out.mkdir(parents=True)
        lists = read_lists(args.csv_dir, strict=True) if args.csv_dir else None
        for i, archive in enumerate(archives):
            total += extract(archive, partial / "raw" / str(i) / archive.name.split(".")[0], args.skip_bad)
        for path in sorted((partial / "raw").rglob("train.csv")):
            lists = lists or read_lists(path.parent, strict=False)
        images, splits = collect(partial / "raw", lists)
        print(f"skipped: {total['other']} files that are no images, {total['bad']} broken images")
        check_counts({c: len(files) for c, files in images.items()}, args.any_count)
        few_shot = few_shot_lists(images, splits, lists)
        counts = lay_out(images, out, seed)
        write_lists(few_shot or {}, out)
        record = {"seed": seed, "classes": len(images), **counts}
        (out / "split.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
        for old in [p for p in (few, main) if p.exists()]:  # --force: few first, for it can be made again from main
            old.replace(partial / f"old_{old.name}")
        out.replace(main)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def count_tree(folder):
    """Returns {split: {class: number of images}} of an ImageFolder tree."""
    tree = {s: sorted((folder / s).iterdir()) if (folder / s).is_dir() else [] for s in SPLITS}
    return {s: {d.name: sum(p.suffix.lower() in SUFFIXES for p in d.iterdir()) for d in ds} for s, ds in tree.items()}


def verify(args, main):
    """Checks a finished same-class split against its record and the known counts."""
    try:
        record = json.loads((main / "split.json").read_text(encoding="utf-8"))
        seed, expected = record["seed"], {s: record[s] for s in SPLITS}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{main}: exists, but its split.json is missing or broken; rebuild with --force") from None
    if args.seed is not None and seed != args.seed:
        raise UserError(
            f"--seed {args.seed}: {main} was drawn with seed {seed}; give that one, or rebuild with --force"
        )
    tree = count_tree(main)
    if expected != (found := {s: sum(tree[s].values()) for s in SPLITS}):
        raise UserError(f"{main}: holds {found} images, its split.json says {expected}; rebuild with --force")
    print(f"{main}: already there, nothing to do (seed {seed})")
    check_counts(Counter(tree["train"]) + Counter(tree["val"]) + Counter(tree["test"]), args.any_count)


def make_few_shot(main, few, partial):
    """Makes the class-disjoint split from the lists in main, as hard links to its images or, failing that, copies."""
    lists = {}
    for split in SPLITS:
        with (main / f"few_shot_{split}.csv").open(newline="", encoding="utf-8") as f:
            lists[split] = [(r["label"], r["filename"]) for r in csv.DictReader(f)]
    if few.exists():
        if count_tree(few) != {s: dict(Counter(label for label, _ in rows)) for s, rows in lists.items()}:
            raise UserError(f"{few}: differs from the few_shot lists in {main}; rebuild with --force")
        print(f"{few}: already there, nothing to do")
        return
    where = {(p.parent.name, p.name): p for p in main.glob("*/*/*")}
    try:
        for split, rows in lists.items():
            for label, name in tqdm(rows, desc=f"few-shot {split}", unit="image", disable=None):
                target = partial / split / label / name
                target.parent.mkdir(parents=True, exist_ok=True)
                try:
                    os.link(where[label, name], target)
                except OSError:
                    shutil.copy2(where[label, name], target)
        partial.replace(few)
    except KeyError as e:
        raise UserError(f"{main}: lacks the image {e} of its few_shot lists; rebuild with --force") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def run(args):
    main, few = args.dest / "miniImagenet", args.dest / "miniImagenetFewShot"
    partials = [args.dest / f".{folder.name}.partial" for folder in (main, few)]
    args.dest.mkdir(parents=True, exist_ok=True)
    try:
        fcntl.flock(os.open(args.dest, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)  # held until the process ends
    except BlockingIOError:
        raise UserError(f"--dest {args.dest}: another run is at work there; wait until it ends") from None
    for leftover in [p for p in partials if p.exists()]:
        shutil.rmtree(leftover)
    if main.exists() and not args.force:
        verify(args, main)
    elif few.exists() and not args.force:
        raise UserError(f"{few}: exists although {main} does not; remove it, or rebuild both with --force")
    else:
        build(args, main)
    if args.csv_dir and not (main / "few_shot_test.csv").exists():
        images = {}
        for path in main.glob("*/*/*"):
            images.setdefault(path.parent.name, []).append(path.name)
        write_lists(few_shot_lists(images, {}, read_lists(args.csv_dir, strict=True)), main)
    if (main / "few_shot_test.csv").exists():
        make_few_shot(main, few, partials[1])
    else:
        print("few-shot split skipped: no lists known; run again with --csv_dir DIR (train.csv, val.csv, test.csv)")
    for folder in [p for p in (main, few) if p.exists()]:
        found = {s: (len(classes), sum(classes.values())) for s, classes in count_tree(folder).items()}
        print(f"{folder}:", ", ".join(f"{s} {c} classes, {n} images" for s, (c, n) in found.items()))


def get_args(argv=None):
    P = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    source = P.add_mutually_exclusive_group()
    source.add_argument("--archive", type=Path, nargs="+", metavar="FILE", help="local zip, tar or tar.gz file(s)")
    source.add_argument("--url", help="http(s) or file URL of one archive (default: three tar files on Google Drive)")
    P.add_argument("--sha256", metavar="HEX", help="expected SHA-256 sum of the archive")
    P.add_argument("--size", type=int, metavar="BYTES", help="expected size of the archive")
    P.add_argument("--csv_dir", type=Path, metavar="DIR", help="folder with the few-shot lists, used before any other")
    P.add_argument("--seed", type=int, help="seed of the same-class split (default: 0)")
    P.add_argument("--any_count", action="store_true", help="accept other counts than 100 classes x 600 images")
    P.add_argument("--skip_bad", action="store_true", help="leave out empty files and files that are no JPEG or PNG")
    P.add_argument("--force", action="store_true", help="rebuild a finished result")
    P.add_argument("--dest", type=Path, default=Path(__file__).resolve().parent, help="target (default: this folder)")
    args = P.parse_args(argv)
    if (args.sha256 or args.size is not None) and not args.url and len(args.archive or []) != 1:
        P.error("--sha256 and --size: need --url URL or a single --archive FILE")
    if args.sha256 and (len(args.sha256) != 64 or set(args.sha256.lower()) - set("0123456789abcdef")):
        P.error(f"--sha256 {args.sha256}: is no SHA-256 sum; give 64 hexadecimal digits")
    if args.url and urllib.parse.urlparse(args.url).scheme not in ("http", "https", "file"):
        P.error(f"--url {args.url}: give an http, https or file URL")
    for path in args.archive or []:
        if not path.is_file():
            P.error(f"--archive {path}: is no file; give a zip, tar or tar.gz file")
    return P, args


def main(argv=None):
    P, args = get_args(argv)
    try:
        run(args)
    except UserError as e:
        P.error(str(e))
    except OSError as e:
        P.error(f"{e.filename or args.dest}: {e.strerror or e}; mend this and run the same command again")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
