"""What a training costs, in multiply-accumulates (MACs) of convolutions and matrix products; backward counts twice."""

from argparse import Namespace

import torch
from torch.utils.flop_counter import FlopCounterMode

import Data
import Flags
import TrainCamNet
import TrainISICLE
import Utils
from Backbones import build_head
from CamNet.Distances import build_distance
from CamNet.IMLE import Search


def count_macs(function, *inputs):
    """Return the multiply-accumulates of a call."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        function(*inputs)
    return counter.get_total_flops() // 2


def encoder_macs(flags, steps):
    """Return the MACs of training the encoder by these flags of TrainSimCLR.py or TrainISICLE.py, that many steps."""
    # encoder and head, one image
    encoder = Flags.encoder_for(flags).eval()
    size = flags.size or Data.get_row(flags.data).size
    forward = count_macs(encoder, torch.rand(1, 3, size, size))
    head = build_head(encoder.num_features, flags.proj_hidden, flags.proj_dim, flags.proj_norm).eval()
    projection = count_macs(head, torch.rand(1, encoder.num_features))

    # all views of an image
    views = flags.num_views if "num_views" in flags else len(TrainISICLE.Restored(flags))
    passes = 4 if flags.chunk_views else 3  # in chunks, the views go forward twice
    per_image = passes * views * (forward + projection)
    if getattr(flags, "pick", "random") == "farthest" and flags.pair != "corrupted":
        compared = flags.num_codes  # all restorations, and the image if the pair has it
        if TrainISICLE.PAIRS[flags.pair].real:
            compared += 1
        per_image += compared * forward
    return steps * flags.bs * per_image


def training_macs(record):
    """Return the MACs of the generator's search and training in a record of Benchmarks/Arms.py, without the banks."""
    images = record["steps"] // record["epochs"] * record["flags"]["bs"]  # of the train split, less the last few
    flags = {"lpips_weights": None} | Utils.current_flags(record["generator_flags"])
    return generator_macs(Namespace(**flags), images, 0)


def generator_macs(flags, n, k, banks=1):
    """Return the MACs of search and training by flags of TrainCamNet.py, and of banks of k restorations of n images."""
    # a forward up to each level, and the features of its output
    size = flags.size or Data.get_row(flags.data).size
    net = TrainCamNet.build_generator(flags, size).eval()
    keys = torch.zeros(1, dtype=torch.int64)
    condition = net.corruption(torch.rand(1, 3, size, size), keys)
    codes = net.codes(keys)
    upto = [0]
    for level in range(len(codes)):
        upto.append(count_macs(net, condition, codes[: level + 1]))
    distance = build_distance(flags.distance, flags.lpips_weights, flags.lpips_side, flags.alpha)
    features = [count_macs(distance.features, torch.rand(1, 3, side, side)) for side in net.sides]

    # search: each candidate runs its own level alone
    searched = 0
    samples = 2  # of an image in a step
    if flags.objective == "cimle":
        search = Search(TrainCamNet.codes_per_level(flags))
        samples = 1
        for level in range(len(codes)):
            searched += search.count(level) * (upto[level + 1] - upto[level] + features[level])

    trained = flags.visits * samples * 3 * (upto[-1] + sum(features))
    visited = min(flags.period, n - min(TrainCamNet.HELD_OUT, n // 10))
    return flags.periods * visited * (searched + trained) + banks * n * k * upto[-1]
