"""Write the positives of a perfect generator of shapes: the same outline in its place, all else drawn again.

    python -m Benchmarks.Redrawn Data/redrawn.npy
    python TrainISICLE.py --bank Data/redrawn.npy --p_gen 1

Writes the bank of the train split, uint8 (N, K, 3, 32, 32), for --bank. A generator that learns from images has to find
out what may change without changing the class; this one knows, since it drew the images.
"""

import numpy as np

import Flags
import Utils
from Images import Shapes


def get_args(argv=None):
    """Parse the flags."""
    parser = Flags.plain_parser(__doc__)
    parser.add_argument("out", help="file to write, .npy")
    count = "positives of each image"
    parser.add_argument("--num_codes", type=Flags.bounded(int, 1), default=8, metavar="K", help=count)
    return parser.parse_args(argv)


def main(args):
    """Draw the positives, write them, and say where they are."""
    images = Shapes.redraw_split("train", args.num_codes).numpy()

    def write(scratch):
        with scratch.open("wb") as stream:  # np.save adds .npy to a name without it
            np.save(stream, images)

    Utils.write_atomically(args.out, write)
    print(f"{images.shape[1]} positives for each of {len(images)} images: {args.out}")


if __name__ == "__main__":
    Utils.run_script(main, get_args)
