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
LARGEST_SIDE = 2**16  # of images, in pixels
# What a file must say of its encoder, with the types.
DESCRIBED = {"backbone": str, "small_stem": bool, "image_size": int, "normalize": bool, "data": str, "epoch": int}


class Encoder(NamedTuple):
    """An encoder that was read from a file."""

    net: nn.Module  # on the CPU, in evaluation mode
    metadata: dict  # see `encoder_metadata`
    file: Path
    is_plain: bool  # whether the file holds the weights alone, or under the key "encoder"


def encoder_metadata(encoder, described, epoch, result=None):
    """Return the metadata that one needs to use a run's encoder, as plain types.

    described: an object with the attributes of DESCRIBED, such as a run's flags. epoch: number of trained epochs.
    result: the content of evaluation.json, if there is one.
    """
    size = described.image_size
    normalize = described.normalize
    normalization = "normalized by ImageNet's mean and std" if normalize else "not normalized by a mean and a std"
    scores = {}
    for key, value in (result or {}).items():
        if key not in NOT_SCORES and isinstance(value, (int, float, str)):
            scores[key] = value
    return {
        "backbone": described.backbone,
        "small_stem": described.small_stem,
        "stem": stem_text(encoder) or f"that of {described.backbone}",
        "image_size": size,
        "num_features": encoder.num_features,
        "input": f"RGB, float32 (B, 3, {size}, {size}), {normalization}",
        "mean": list(IMAGENET_MEAN) if normalize else None,
        "std": list(IMAGENET_STD) if normalize else None,
        "value_range": [0.0, 1.0],
        "resizing": f"shorter side to {size} px, bilinear with antialiasing, then the central square",
        "data": Utils.shown(Path(described.data).name),
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
    Utils.write_tensors(file, plain_weights(encoder))


def load_encoder(path):
    """Return the `Encoder` of a run folder (its encoder.pt, otherwise its newest checkpoint) or of a .pt file.

    The file: a checkpoint, an encoder.pt with its .json next to it, or a .pt that Export.py wrote. Raises UserError on
    one that is missing, damaged, or none of these. The metadata are made again from what the file says of the encoder.
    """
    file = _find(Path(path))
    state = Utils.load_(file)
    is_plain = "encoder" not in state
    said, result = _said(file, state)
    described = _checked(file, {"normalize": False} | said)  # older versions did not normalize, nor say so
    encoder = _build(file, state if is_plain else state["encoder"], described)
    result = result if isinstance(result, dict) else {}
    return Encoder(encoder, encoder_metadata(encoder, described, described.epoch, result), file, is_plain)


def normalizes(file):
    """Return whether weights that --init can load were trained on normalized images; None if their file does not say.

    Those of this repository say it: a checkpoint, an encoder.pt by its .json, and a .pt that Export.py wrote.
    """
    state = torch.load(file, map_location="cpu", weights_only=True)
    return _said(Path(file), state)[0].get("normalize")


def _said(file, state):
    """Return what a file says of its encoder, with the names of DESCRIBED, and its scores. state: its content."""
    if "args" in state and "encoder" in state:
        return _said_by_checkpoint(file, state)
    said = state.get("metadata") if "encoder" in state else Utils.read_json(file.with_suffix(".json"))
    said = said if isinstance(said, dict) else {}
    if "mean" in said:
        said = said | {"normalize": said["mean"] is not None}
    return said, said.get("scores")


def _said_by_checkpoint(file, state):
    """Return what a checkpoint says of its encoder, with the names of DESCRIBED, and the scores of its epoch."""
    said = Utils.current_flags(state["args"]) if isinstance(state["args"], dict) else {}
    row = Data.DATASETS.get(str(said.get("data")), Data.DATASETS["folder"])
    older = {"normalize": False, "image_size": said.get("size") or row.size}  # what older versions did not note
    result = Utils.read_json(file.parent / "evaluation.json") or {}
    if result.get("epoch") != state.get("epoch"):
        result = {}
    return older | said | {"epoch": state.get("epoch")}, result


def _checked(file, said):
    """Return what a file says of its encoder as an object. Raises UserError on values that cannot be."""
    wrong = [name for name, kind in DESCRIBED.items() if type(said.get(name)) is not kind]
    if not wrong and not 1 <= said["image_size"] <= LARGEST_SIDE:
        wrong = ["image_size"]
    if wrong:
        raise UserError(
            f"{file} does not say what encoder it holds (no valid {', '.join(wrong)}): give a run of TrainSimCLR.py or "
            "TrainISICLE.py, or keep encoder.json next to encoder.pt"
        )
    return argparse.Namespace(**{name: said[name] for name in DESCRIBED})


def _find(path):
    if not path.is_dir():
        return path
    if (path / "encoder.pt").is_file():  # the run is finished
        return path / "encoder.pt"
    file = Utils.newest_checkpoint(path)
    if file is None:
        raise UserError(f"{path} holds no checkpoint: give another run folder, or a .pt file")
    return file


def _build(file, weights, described):
    name = described.backbone
    try:
        encoder = build_encoder(name, described.small_stem, described.image_size, described.normalize)
        encoder.load_state_dict(weights)
    except (ValueError, RuntimeError, TypeError, AttributeError) as error:
        name = Utils.shown(name)[:80]
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{file} is not the {name} that it says it is: {reason}: use another file") from error
    return encoder.eval()
