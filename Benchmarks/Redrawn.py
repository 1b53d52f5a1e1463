"""Write the positives of a perfect generator of shapes: every outline where it is, all the rest drawn anew.

    python -m Benchmarks.Redrawn Data/redrawn.npy
    python TrainISICLE.py --bank Data/redrawn.npy --p_gen 1

Writes the bank of the train split, uint8 (N, K, 3, 32, 32), for --bank. A generator that learns from images has to find
out what the image keeps and what else it could have been; this one knows, since it made them.
"""

import argparse
import sys
from importlib.util import find_spec

import numpy as np

if find_spec("Images") is None:  # started by its path, Python looks for modules beside it only
    print("Redrawn.py: error: start it in the repository's folder, as python -m Benchmarks.Redrawn", file=sys.stderr)
    sys.exit(2)

import Flags
import Utils
from Images import Shapes


def get_args(argv=None):
    """Parse the flags."""
    form = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False, formatter_class=form)
    parser.add_argument("out", help="file to write, .npy")
    parser.add_argument("--num_codes", type=Flags.bounded(int, 1), default=8, metavar="K", help="of every image")
    return parser.parse_args(argv)


def main(args):
    """Draw, write whole, say where."""
    images = Shapes.redraw_split("train", args.num_codes).numpy()

    def write(scratch):
        with scratch.open("wb") as stream:  # given a name, np.save would add .npy to it
            np.save(stream, images)

    Utils.write_atomically(args.out, write)
    print(f"{images.shape[1]} positives for each of {len(images)} images: {args.out}")


if __name__ == "__main__":
    Utils.run_script(main, get_args)
