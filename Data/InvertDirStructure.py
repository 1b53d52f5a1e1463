"""Turns an ImageFolder tree inside out for CaMNet: SPLIT/CLASS/IMAGE becomes CLASS/SPLIT/IMAGE.

    python Data/InvertDirStructure.py --folder Data/miniImagenet          # copies
    python Data/InvertDirStructure.py --folder Data/miniImagenet --link   # hard links, no further disk space

Reads   FOLDER/{train,val,test}/CLASS/IMAGE (val and test may be absent). Images deeper in a class folder, such as
        CLASS/images/IMAGE in Tiny-ImageNet, count too; hidden files and files that are no images are skipped.
Writes  Data/camnet_data/<name of FOLDER>/CLASS/{train,validation,test}/IMAGE (--dest replaces Data/camnet_data).

Everything is compared before anything is written: two sources for one target, a target with other content, and
images in the target that FOLDER does not hold (an older split would leak) are errors. A second run changes nothing;
after a kill the next run completes the tree, for a file is either absent or whole.
"""

import argparse
import errno
import filecmp
import os
import shutil
import sys
from pathlib import Path

from tqdm import tqdm

SPLITS = {"train": "train", "val": "validation", "test": "test"}
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}


class UserError(Exception):
    """A mistake that its user can mend: told in one line, without a traceback."""


class Parser(argparse.ArgumentParser):
    """Tells an error in one line, without the usage text."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def is_image(path):
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def make_plan(folder, out):
    """Returns {target: source} and, per split, its counts of classes, images and skipped files."""
    plan, counts = {}, {}
    for split in [s for s in SPLITS if (folder / s).is_dir()]:
        count = counts[split] = {"classes": 0, "images": 0, "skipped": 0, "new": 0}
        for class_dir in sorted((folder / split).iterdir()):
            if not class_dir.is_dir():
                count["skipped"] += 1
                continue
            files = [f for f in sorted(class_dir.rglob("*")) if not f.is_dir()]
            images = [f for f in files if is_image(f)]
            count["skipped"] += len(files) - len(images)
            count["images"] += len(images)
            count["classes"] += bool(images)
            for image in images:
                target = out / class_dir.name / SPLITS[split] / image.name
                if target in plan:
                    raise UserError(f"{plan[target]} and {image} would both become {target}: rename one of them")
                plan[target] = image
    if not counts.get("train", {}).get("images"):
        raise UserError(f"--folder {folder}: holds no image as train/CLASS/IMAGE; give an ImageFolder tree")
    return plan, counts


def pending(plan, out):
    """Returns the part of the plan that is yet to be written; refuses a target that does not fit the plan."""
    for found in sorted(out.glob("*/*/*")):
        if found.parent.name in SPLITS.values() and is_image(found) and found not in plan:
            raise UserError(
                f"{found}: is not in --folder (left by another split?); remove {out} or give another --dest"
            )
    todo = {}
    for target, source in plan.items():
        if not os.path.lexists(target):
            todo[target] = source
        elif not target.is_file() or not filecmp.cmp(source, target, shallow=False):
            raise UserError(f"{target}: exists and differs from {source}; remove {out} or give another --dest")
    return todo


def put(source, target, link):
    """Makes target a whole file at once: a hard link, or a copy under a hidden name that is then renamed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if not link:
        part = target.with_name(f".{target.name}.part")
        try:
            shutil.copy2(source, part)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
        return
    try:
        os.link(source.resolve(), target)
    except OSError as e:
        if e.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
            raise
        reason = "another file system" if e.errno == errno.EXDEV else os.strerror(e.errno)
        raise UserError(f"--link: cannot hard-link {source} to {target} ({reason}); leave out --link to copy") from None


def get_args(argv=None):
    P = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    P.add_argument("--folder", required=True, type=Path, help="ImageFolder tree to read: FOLDER/{train,val,test}/CLASS")
    P.add_argument("--link", action="store_true", help="hard-link instead of copying (same file system only)")
    default = Path(__file__).resolve().parent / "camnet_data"
    P.add_argument("--dest", type=Path, default=default, help="target root (default: camnet_data beside this script)")
    return P, P.parse_args(argv)


def run(args):
    folder = Path.cwd() / args.folder
    if not folder.is_dir():
        raise UserError(f"--folder {args.folder}: is no folder; give an ImageFolder tree with train/CLASS/IMAGE")
    out = Path.cwd() / args.dest / (folder.name if folder.name not in ("", "..") else folder.resolve().name)
    real, real_out = folder.resolve(), out.resolve()
    if real_out.is_relative_to(real) or real.is_relative_to(real_out):
        raise UserError(f"--dest {args.dest}: {out} and --folder {folder} lie in each other; give another --dest")
    plan, counts = make_plan(folder, out)
    todo = pending(plan, out)
    splits = {v: k for k, v in SPLITS.items()}
    for target, source in tqdm(todo.items(), desc=folder.name, unit="image", disable=None):
        put(source, target, args.link)
        counts[splits[target.parent.name]]["new"] += 1
    for split, c in counts.items():
        state = f"{c['new']} new, {c['images'] - c['new']} already there"
        print(f"{split}: {c['classes']} classes, {c['images']} images ({state}), {c['skipped']} files skipped")
    stray = sum(not p.is_dir() for p in folder.iterdir())
    print(f"{out}: {len(plan)} images; {stray} files outside the splits skipped")


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
