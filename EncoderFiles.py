"""The encoder alone as a file, with the metadata that one needs to use it.

RUN/encoder.pt holds the weights as a plain state dict, which torchvision's model loads strictly once its classifier is
Identity; RUN/encoder.json holds the metadata.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

import Data
import Utils
from Backbones import IMAGENET_MEAN, IMAGENET_STD, build_encoder, stem_text
from Utils import UserError

NOT_SCORES = ("protocol", "pairs", "epoch")  # keys of evaluation.json


class Encoder(NamedTuple):
    """An encoder that was read from a file."""

    net: nn.Module  # on the CPU, in evaluation mode
    metadata: dict  # see `encoder_metadata`
    file: Path
    is_plain: bool  # whether the file holds the weights alone, or under the key "encoder"


def image_size(args):
    """Return the side in pixels of a run's images; checkpoints of older versions have only --size and --data."""
    size = getattr(args, "image_size", None) or args.size
    return size or Data.DATASETS.get(args.data, Data.DATASETS["folder"]).size


def encoder_metadata(encoder, args, epoch, result=None):
    """Return the metadata that one needs to use a run's encoder, as plain types.

    args: the run's flags. epoch: number of trained epochs. result: the content of evaluation.json, if there is one.
    """
    size = image_size(args)
    normalise = getattr(args, "normalise", False)
    normalisation = "normalised by ImageNet's mean and std" if normalise else "not normalised by a mean and a std"
    scores = {key: value for key, value in (result or {}).items() if key not in NOT_SCORES}
    return {
        "backbone": args.backbone,
        "small_stem": args.small_stem,
        "stem": stem_text(encoder) or f"that of {args.backbone}",
        "image_size": size,
        "num_features": encoder.num_features,
        "input": f"RGB, float32 (B, 3, {size}, {size}), {normalisation}",
        "mean": list(IMAGENET_MEAN) if normalise else None,
        "std": list(IMAGENET_STD) if normalise else None,
        "value_range": [0.0, 1.0],
        "resizing": f"shorter side to {size} px, bilinear with antialiasing, then the central square",
        "data": Path(args.data).name,
        "epoch": epoch,
        "scores": scores,
    }


def plain_weights(encoder):
    """Return the state dict of an encoder as contiguous tensors on the CPU."""
    return {name: value.detach().cpu().contiguous() for name, value in encoder.state_dict().items()}


def save_encoder(file, encoder, metadata):
    """Write the weights of an encoder to `file`, a .pt, and its metadata to the .json of the same name.

    Raises UserError on a full disk.
    """
    Utils.write_json(Path(file).with_suffix(".json"), metadata)
    Utils.write_atomically(file, lambda scratch: torch.save(plain_weights(encoder), scratch))


def load_encoder(path):
    """Return the `Encoder` of a run folder (its encoder.pt, otherwise its newest checkpoint) or of a .pt file.

    The file: a checkpoint, an encoder.pt with its .json next to it, or a .pt that Export.py wrote. Raises UserError on
    one that is missing, damaged, or none of these.
    """
    file = _find(Path(path))
    state = Utils.load_(file)
    is_plain = "encoder" not in state
    weights = state if is_plain else state["encoder"]

    # a checkpoint: its flags say what encoder it is
    if "args" in state and not is_plain:
        args = argparse.Namespace(**state["args"])
        encoder = _build(
            file, weights, args.backbone, args.small_stem, image_size(args), getattr(args, "normalise", False)
        )
        result = Utils.read_json(file.parent / "evaluation.json") or {}
        if result.get("epoch") != state["epoch"]:
            result = None
        return Encoder(encoder, encoder_metadata(encoder, args, state["epoch"], result), file, is_plain)

    # the weights alone: the metadata says it
    if is_plain:
        metadata = Utils.read_json(file.with_suffix(".json")) or {}
    else:
        metadata = state.get("metadata", {})
    if not {"backbone", "small_stem", "image_size"} <= metadata.keys():
        raise UserError(
            f"{file} does not say what encoder it holds: give a run of TrainSimCLR.py or TrainISICLE.py, or keep "
            "encoder.json next to encoder.pt"
        )
    normalise = metadata.get("mean") is not None
    encoder = _build(file, weights, metadata["backbone"], metadata["small_stem"], metadata["image_size"], normalise)
    return Encoder(encoder, metadata, file, is_plain)


def _find(path):
    if not path.is_dir():
        return path
    if (path / "encoder.pt").is_file():  # the run is finished
        return path / "encoder.pt"
    file = Utils.newest_checkpoint(path)
    if file is None:
        raise UserError(f"{path} holds no checkpoint: give another run folder, or a .pt file")
    return file


def _build(file, weights, backbone, small_stem, size, normalise):
    try:
        encoder = build_encoder(backbone, small_stem, size, normalise)
        encoder.load_state_dict(weights)
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{file} is not the {backbone} that it says it is: {reason}: use another file") from error
    return encoder.eval()
