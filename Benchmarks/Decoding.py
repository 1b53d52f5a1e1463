"""Measure how fast image files are decoded and resized, on one core: ours, plain Pillow, torchvision.io.

    python -m Benchmarks.Decoding                  # a minute; table on screen, Results/decoding-cpu.json
    python -m Benchmarks.Decoding --data FOLDER    # files of your own, JPEG only; writes nothing unless --out is given

Without --data, the files are JPEGs of the size of a photograph, made of the generated shapes. All variants make the
same center square; the difference is the mean absolute one to plain Pillow, in steps of 8 bits. Times are those of the
processor, so that other load on the machine counts little.
"""

import shlex
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import io
from torchvision.transforms import v2

import Flags
import Runs
import Signals
import Utils
from Flags import bounded
from Images import Shapes
from Images.Decode import _center_box, decode
from Images.Folders import list_folder

HEIGHT, WIDTH = 375, 500  # ImageNet's photographs are about this large
QUALITY = 95  # of the JPEGs
warnings.filterwarnings("ignore", module="torchvision.io")  # deprecated in torchvision 0.29


def get_args(argv=None):
    """Parse the flags."""
    parser = Flags.plain_parser(__doc__)
    add = parser.add_argument
    add("--data", metavar="FOLDER", help="folder of JPEGs, as CLASS/IMAGE or without classes")
    add("--images", type=bounded(int, 1), default=100, metavar="N", help="files, at most")
    add("--size", type=bounded(int, 1), default=128, metavar="PX", help="side of the decoded images")
    add("--rounds", type=bounded(int, 1), default=5, metavar="N", help="repetitions; the variants take turns")
    add(
        "--out",
        type=Flags.path,
        metavar="FILE",
        help="JSON to write; default: Results/decoding-cpu.json or, with --data, nothing",
    )
    return parser.parse_args(argv)


def write_files(folder, count):
    """Write JPEGs of generated shapes; return their paths."""
    labels = torch.arange(count) % len(Shapes.CLASSES)
    rng = torch.Generator().manual_seed(0)
    paths = []
    for index, label in enumerate(labels):
        image = Shapes.draw(label[None], WIDTH, rng)[0, :, :HEIGHT]
        paths.append(str(folder / f"{index}.jpg"))
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(paths[-1], quality=QUALITY)
    return paths


# ---------------------------------------------------------------------------------------------------- variants


def pillow(path, size):
    """Decode the whole image with Pillow, then resize the center square."""
    with Image.open(path) as image:
        image = image.convert("RGB")
    image = image.resize((size, size), Image.Resampling.BILINEAR, _center_box(image.size, size))
    return torch.from_numpy(np.array(image).transpose(2, 0, 1).copy())


def torchvision_io(path, size):
    """Decode the whole image with torchvision's libjpeg-turbo, then resize and crop it, antialiased."""
    image = io.decode_jpeg(io.read_file(path), io.ImageReadMode.RGB)
    image = v2.functional.resize(image, [size], antialias=True)
    return v2.functional.center_crop(image, [size, size])


VARIANTS = {"ours": decode, "Pillow": pillow, "torchvision.io": torchvision_io}


# ---------------------------------------------------------------------------------------------------- measurement


def measure(paths, size, rounds):
    """Return rows of images per second; the variants take turns, and the first turn is not counted."""
    speeds = {name: [] for name in VARIANTS}
    images = {}
    for turn in range(rounds + 1):
        for name, function in VARIANTS.items():
            started = time.process_time()
            images[name] = torch.stack([function(path, size) for path in paths])
            speed = len(paths) / (time.process_time() - started)
            print(f"{f'round {turn}/{rounds}' if turn else 'warm-up'}: {name}: {speed:,.0f} images/s", file=sys.stderr)
            if turn:
                speeds[name].append(speed)
    rows = []
    for name, values in speeds.items():
        ratio = statistics.median(ours / its for ours, its in zip(speeds["ours"], values))
        difference = (images[name].float() - images["Pillow"].float()).abs()
        row = {"variant": name, "images_per_second": round(statistics.median(values), 1), "ratio": round(ratio, 2)}
        row["difference"] = round(difference.mean().item(), 4)
        row["equal"] = round((difference == 0).float().mean().item(), 4)  # share of the values
        rows.append(row)
    return rows


@Signals.heartbeat("measuring")
def main(args):
    """Measure on one thread, print a table, write it; return the exit code."""
    torch.set_num_threads(1)
    made = Runs.provenance(torch.device("cpu"))
    made["command"] = shlex.join(["python", "-m", "Benchmarks.Decoding", *sys.argv[1:]])
    with tempfile.TemporaryDirectory() as folder:
        if args.data:
            paths = list_folder(args.data).paths[: args.images]
        else:
            paths = write_files(Path(folder), args.images)
        made["bytes_per_image"] = sum(Path(path).stat().st_size for path in paths) // len(paths)
        made["rows"] = measure(paths, args.size, args.rounds)
    made["size"] = args.size
    made["pixels"] = [WIDTH, HEIGHT]
    print(f"{'variant':18}{'images/s':>10}{'ours / it':>11}{'difference':>12}{'equal':>10}")
    for row in made["rows"]:
        speed = f"{row['images_per_second']:10,.0f}{row['ratio']:11.2f}"
        print(f"{row['variant']:18}{speed}{row['difference']:12.4f}{100 * row['equal']:9.1f} %")
    out = args.out or (None if args.data else Utils.ROOT / "Results" / "decoding-cpu.json")
    if out:
        Utils.write_json(Path(out), made)
        print(f"written: {out}")
    return 0


if __name__ == "__main__":
    Utils.run_script(main, get_args)
