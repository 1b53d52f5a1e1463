"""Write a copy of an image folder in which each class holds its splits: SPLIT/CLASS/IMAGE becomes CLASS/SPLIT/IMAGE.

    python Data/InvertDirStructure.py --folder Data/miniImagenet          # copies the files
    python Data/InvertDirStructure.py --folder Data/miniImagenet --link   # hard links, which need no disk space

You do not need this to train: all scripts read both layouts.

Reads   FOLDER/{train,val,test}/CLASS/IMAGE. val may be called valid, validation or dev; val and test may be absent.
        Images in folders inside a class folder count too, such as CLASS/images/IMAGE in Tiny-ImageNet.
        Hidden files and folders (.DS_Store, .ipynb_checkpoints, __MACOSX, Thumbs.db, ...) and other files are skipped.
Writes  Data/camnet_data/<name of FOLDER>/CLASS/{train,validation,test}/IMAGE; --dest replaces Data/camnet_data.
        A hidden file next to it keeps the path of FOLDER, so that images of another folder with the same name are
        never added to it.

Everything is compared before anything is written. It is an error if two images would become the same file, if a target
file exists with other content, or if the target holds images that are not in FOLDER. A second run changes nothing.
After a stopped run, the same command completes the copy: a file is either absent or complete. The exit code after
SIGTERM is 0, as for the other scripts, and 130 after Ctrl-C.
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
import errno
import fcntl
import filecmp
import shutil
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path

from tqdm import tqdm

SPLITS = {"train": "train", "val": "validation", "test": "test"}
VALIDATION = ("val", "valid", "validation", "dev")
# SUFFIXES, IGNORED, shown and is_hidden are the same in SetupMiniImagenet.py; a test compares them.
SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".ppm", ".pgm", ".pbm", ".pnm", ".bmp", ".tif", ".tiff")
SUFFIXES += (".webp", ".gif", ".avif", ".avifs", ".apng", ".mpo", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx")
IGNORED = ("__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found")
IGNORED += ("thumbs.db", "ehthumbs.db", "desktop.ini")


class UserError(Exception):
    """An error that the user can fix: printed as one line, without a traceback."""


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


def is_image(path):
    return path.suffix.lower() in SUFFIXES and not is_hidden(path.name) and path.is_file()


def kind_of(path):
    """Return what a skipped file or folder is counted as: "hidden" or its ending."""
    return "hidden" if is_hidden(path.name) else path.suffix.lower() or "without ending"


def find_images(folder, skipped, above=()):
    """Yield the images in a folder and its subfolders, in order; count what is skipped by its kind."""
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in above:  # a link to a folder that holds it
        return
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not is_hidden(path.name):
            yield from find_images(path, skipped, (*above, here))
        elif is_image(path):
            yield path
        else:
            skipped[kind_of(path)] += 1


def find_splits(folder):
    """Return {split: its folder} of the splits that a folder holds."""
    found = {split: folder / split for split in ("train", "test") if (folder / split).is_dir()}
    validation = [folder / name for name in VALIDATION if (folder / name).is_dir()]
    if len(validation) > 1:
        names = " and ".join(path.name for path in validation)
        raise UserError(f"--folder {folder}: holds {names}, which are both a validation split; rename or move one")
    if validation:
        found["val"] = validation[0]
    return {split: found[split] for split in SPLITS if split in found}


def make_plan(folder, out):
    """Return {target: source}; per split its counts of classes, images, skipped and new files; and what was skipped."""
    plan = {}
    counts = {}
    skipped = Counter()
    for split, split_dir in find_splits(folder).items():
        count = counts[split] = {"classes": 0, "images": 0, "skipped": 0, "new": 0}
        skipped_before = skipped.total()
        for class_dir in sorted(split_dir.iterdir()):
            if is_hidden(class_dir.name) or not class_dir.is_dir():
                skipped[kind_of(class_dir)] += 1
                continue
            images = list(find_images(class_dir, skipped))
            count["images"] += len(images)
            count["classes"] += bool(images)
            for image in images:
                target = out / class_dir.name / SPLITS[split] / image.name
                if target in plan:
                    raise UserError(f"{plan[target]} and {image} would both become {target}; rename one of them")
                plan[target] = image
        count["skipped"] = skipped.total() - skipped_before
    if not counts.get("train", {}).get("images"):
        raise UserError(f"--folder {folder}: holds no image as train/CLASS/IMAGE; give a folder with this layout")
    return plan, counts, skipped


def find_problem(plan, todo, out):
    """Return why the target cannot hold the planned images, or None."""
    for path in sorted(out.glob("*/*/*")):
        label, split, _ = path.parts[-3:]
        if split in SPLITS.values() and not is_hidden(label) and is_image(path) and path not in plan:
            return f"{path} is not in --folder (left by another split?)"
    for target, image in plan.items():
        if target not in todo and not (target.is_file() and filecmp.cmp(image, target, shallow=False)):
            return f"{target} exists and differs from {image}"
    return None


def pending(plan, out, folder):
    """Return the part of the plan that is not written yet; refuse a target that does not fit the plan.

    A target that was made from another folder must hold the very same images: after a data set was moved it does, for
    another data set with the same name it does not.
    """
    todo = {target: image for target, image in plan.items() if not os.path.lexists(target)}
    problem = find_problem(plan, todo, out)
    record = record_of(out)
    source = Path(os.fsdecode(record.read_bytes())) if out.exists() and record.exists() else folder
    if source != folder and (problem or todo):
        problem = f"{out} was made from {source}, not from {folder}"
    if problem:
        raise UserError(f"--dest {out.parent}: {problem}; give another --dest DIR, or remove {out}")
    return todo


@contextmanager
def part_of(target):
    """Give the path of a hidden file; afterwards it becomes the target or, after an error or a signal, is removed."""
    part = target.with_name(f".{target.name}.part")
    try:
        yield part
        part.replace(target)
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def put(source, target, link):
    """Make target a complete file at once: a hard link or a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if not link:
        with part_of(target) as part:
            shutil.copy2(source, part)
        return
    try:
        os.link(source.resolve(), target)
    except OSError as e:
        if e.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
            raise
        reason = "another file system" if e.errno == errno.EXDEV else os.strerror(e.errno)
        raise UserError(f"--link: cannot hard-link {source} to {target} ({reason}); leave out --link to copy") from None


def record_of(out):
    """Return the file that holds the path of the folder that a target was made from."""
    return out.with_name(f".{out.name}.source")


def write_record(out, folder):
    """Write which folder the target is made from, unless the target has such a record."""
    record = record_of(out)
    if not (out.exists() and record.exists()):
        with part_of(record) as part:
            part.write_bytes(os.fsencode(folder))


def report(folder, out, plan, counts, skipped):
    """Print the counts, and what was not read."""
    for split, c in counts.items():
        state = f"{c['new']} new, {c['images'] - c['new']} already there"
        say(f"{split}: {c['classes']} classes, {c['images']} images ({state}), {c['skipped']} files skipped")
    read = find_splits(folder).values()
    others = [path for path in sorted(folder.iterdir()) if path not in read]
    files = sum(not path.is_dir() for path in others)
    say(f"{out}: {len(plan)} images; {files} files outside the splits skipped")
    if skipped:
        say("skipped by ending: " + ", ".join(f"{n} {kind}" for kind, n in skipped.most_common()))
    if folders := [path.name for path in others if path.is_dir() and not is_hidden(path.name)]:
        say(f"folders that are no split, not read: {', '.join(folders)}")


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
    folder = Path.cwd() / args.folder
    if not folder.is_dir():
        raise UserError(f"--folder {args.folder}: is not a folder; give a folder that holds train/CLASS/IMAGE")
    out = Path.cwd() / args.dest / (folder.name if folder.name not in ("", "..") else folder.resolve().name)
    real = folder.resolve()
    real_out = out.resolve()
    if real_out.is_relative_to(real) or real.is_relative_to(real_out):
        hint = "give another --dest DIR"
        raise UserError(f"--dest {args.dest}: {out} and --folder {folder}: one is inside the other; {hint}")
    # compare everything, then write
    plan, counts, skipped = make_plan(folder, out)
    lock(out.parent)
    todo = pending(plan, out, real)
    write_record(out, real)
    splits = {target: split for split, target in SPLITS.items()}
    for target, source in tqdm(todo.items(), desc=shown(folder.name), unit="image", disable=None):
        put(source, target, args.link)
        counts[splits[target.parent.name]]["new"] += 1
    report(folder, out, plan, counts, skipped)


def explain(error, dest):
    """Return an OSError as one line: the flag or file, the reason, the remedy."""
    reason = error.strerror or str(error)
    path = Path(os.fsdecode(error.filename)) if error.filename else dest
    full = Path.cwd() / dest
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"--dest {dest}: {reason}; free some space there, or give another --dest DIR"
    if error.errno == errno.EROFS or path in (dest, full, *full.parents) or full in path.parents:
        return f"--dest {dest}: {path}: {reason}; give a --dest DIR that you can write to"
    return f"{path}: {reason}; correct this and run the same command again"


def path(text):
    """The argparse type of paths: ~ stands for the home folder."""
    return Path(os.path.expanduser(text))  # noqa: PTH111 (pathlib raises RuntimeError where there is no such user)


def get_args(argv=None):
    P = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    P.add_argument("--folder", required=True, type=path, help="folder to read: FOLDER/{train,val,test}/CLASS/IMAGE")
    P.add_argument("--link", action="store_true", help="hard-link the files instead of copying (same file system only)")
    default = Path(__file__).resolve().parent / "camnet_data"
    P.add_argument(
        "--dest",
        type=path,
        metavar="DIR",
        default=default,
        help="where to write (default: camnet_data next to this script)",
    )
    return P, P.parse_args(argv)


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
