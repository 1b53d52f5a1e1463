"""Export an encoder: the code that loads it elsewhere, its weights for other programs, or features of images.

    python Export.py Models/RUN                                        # prints the code that loads it in torchvision
    python Export.py Models/RUN --library timm                         # the same in timm, for ResNets
    python Export.py Models/RUN --out encoder.safetensors              # or .pt, .onnx: writes it and prints the code
    python Export.py Models/RUN --features FOLDER --out features.npz   # or .csv: a row for each image of --split
    torchrun --nproc_per_node=2 Export.py Models/RUN --features FOLDER --out features.npz   # the processes share them

RUN is a run folder of TrainSimCLR.py or TrainISICLE.py, or a .pt file in it.
"""

import Signals  # noqa: F401  first: see TrainSimCLR.py

# isort: split
import csv
import importlib.util
import json
import logging
import os
import re
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import Data
import Devices
import Distributed
import Evaluate
import Flags
import Utils
from Augmentations import to_float
from Backbones import classifier_name, is_resnet, is_torchvision, model_options, takes_size
from EncoderFiles import load_encoder, plain_weights
from Utils import UserError

WEIGHTS = (".safetensors", ".pt", ".onnx")
TABLES = (".npz", ".csv")
PACKAGES = {".safetensors": ("safetensors",), ".onnx": ("onnx", "onnxscript")}  # that must be installed to write them
OF_FEATURES = ("split", "size", "bs", "n_workers", "data_dir", "skip_bad")  # flags that need --features
ONNX_BYTES = 2**31  # protobuf files are smaller


def get_args(argv=None):
    """Parse the flags."""
    parser = Flags.plain_parser(__doc__)
    add = parser.add_argument
    add("run", metavar="RUN", help="a run folder of TrainSimCLR.py or TrainISICLE.py, or a .pt file in it")
    add(
        "--out",
        type=Flags.path,
        metavar="FILE",
        help="file to write: weights as .safetensors, .pt or .onnx; features as .npz or .csv",
    )
    add("--library", choices=["torchvision", "timm"], default="torchvision", help="library that the printed code uses")
    add("--features", metavar="DATA", help=f"images to write the features of: a folder, or {Flags.NAMES}")

    group = parser.add_argument_group("with --features")
    add = group.add_argument
    split = "split of DATA; all images of a folder without splits are train"
    add("--split", choices=["train", "val", "test"], default="train", help=split)
    size = "side that images are resized to; default: as in the training of the encoder"
    add("--size", type=Flags.bounded(int, 8), metavar="PX", help=size)
    add("--bs", type=Flags.bounded(int, 1), default=256, metavar="N", help="images per batch")
    Flags.add_reading(group, can_stream=False)
    args = parser.parse_args(argv)
    args.given = Flags.given_flags(parser, argv)
    return args


def main(args):
    """Print the code, write the encoder, or write features."""
    check_flags(args)
    out = Path(args.out) if args.out else None
    if out:
        check_out(out, TABLES if args.features else WEIGHTS)
    *_, device = Distributed.start(Devices.pick_device(args.device))
    encoder = load_encoder(args.run)
    if args.features:
        export_features(args, encoder, out, device)
    else:
        Distributed.first_rank_only(lambda: export_encoder(args, encoder, out))


def check_flags(args):
    """Raise UserError on flags that do not go together."""
    if args.features and not args.out:
        raise UserError(f"--features {args.features}: give --out FILE.npz or --out FILE.csv as well")
    if args.features and "library" in args.given:
        raise UserError(f"--library {args.library}: --features prints no code: leave out one of them")
    if not args.features:
        for name in OF_FEATURES:
            if name in args.given:
                raise UserError(f"--{name}: is only for --features DATA: give that as well, or leave it out")


def export_encoder(args, encoder, out):
    """Print the code that loads the encoder; write the encoder where `out` is given."""
    code = loading_code(encoder.metadata, out or encoder.file, args.library, encoder.is_plain and not out)
    if out:
        check_is_no_checkpoint(out, encoder.file)
        write_encoder(out, encoder)
        Distributed.notice(f"written to {Utils.shown(out)}; this code loads it:\n")
    print(code)


def check_out(out, endings):
    """Raise UserError if `out` cannot be written, or packages that its ending needs are not installed."""
    if out.suffix not in endings:
        raise UserError(f"--out {out}: ending not known: choose {', '.join(endings)}")
    Flags.check_folder_of(out)
    missing = [name for name in PACKAGES.get(out.suffix, ()) if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--out {out}: needs another package: pip install {' '.join(missing)}")
    try:
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise UserError(f"--out {out}: cannot write to {out.parent} ({error.strerror}): choose another") from error


def check_is_no_checkpoint(out, source):
    """Raise UserError where an encoder would be written over a file of its run."""
    if out.suffix != ".pt":
        return
    if out.resolve() == source.resolve() or (out.parent / "args.json").exists():
        raise UserError(f"--out {out}: checkpoints lie in {out.parent}: choose another folder or ending")


# ---------------------------------------------------------------------------------------------------- code


def loading_code(metadata, file, library, is_plain):
    """Return Python code that loads the encoder from `file` and computes features.

    metadata: of `EncoderFiles.encoder_metadata`. library: "torchvision" or "timm". is_plain: a .pt file holds the
    weights alone, not under the key "encoder". Raises UserError where timm has no such model.
    """
    size = metadata["image_size"]
    file = file.resolve()  # the code can be run in any folder
    if file.suffix == ".onnx":
        imports = ["import numpy", "import onnxruntime"]
        lines = [f"session = onnxruntime.InferenceSession({str(file)!r})"]
        images = f'images = numpy.random.rand(8, 3, {size}, {size}).astype("float32")'
        use = '(features,) = session.run(None, {"images": images})'
    else:
        imports, lines = _model_code(metadata, library)
        if file.suffix == ".safetensors":
            imports.append("from safetensors.torch import load_file")
            weights = f"load_file({str(file)!r})"
        else:
            key = "" if is_plain else '["encoder"]'
            weights = f'torch.load({str(file)!r}, map_location="cpu", weights_only=True){key}'
        lines += [f"model.load_state_dict({weights})", "model.eval()"]
        images = f"images = torch.rand(8, 3, {size}, {size})"
        use = "features = model(images)"
    title = f"# {metadata['backbone']} after {metadata['epoch']} epochs on {metadata['data']}"
    images += "  # your images instead: RGB in [0, 1]"
    if metadata.get("mean") is not None and file.suffix != ".onnx":  # an ONNX model normalizes by itself
        mean, std = (f"torch.tensor({metadata[name]}).view(3, 1, 1)" for name in ("mean", "std"))
        images += f"\nimages = (images - {mean}) / {std}"
    use += f"  # (8, {metadata['num_features']})"
    return "\n".join([title, *imports, "", *lines, images, use])


def _model_code(metadata, library):
    """Return (lines that import, lines that build the model without its weights)."""
    name = metadata["backbone"]
    size = metadata["image_size"]
    if library == "timm":
        if not is_resnet(name):
            raise UserError(f"--library timm: only ResNets of torchvision fit timm's, not {name}: leave it out")
        imports = ["import timm", "import torch"]
        lines = [f'model = timm.create_model("{name}", num_classes=0)']
    elif not is_torchvision(name):
        comment = f"torchvision has no {name}; a file.onnx does not need this repository"
        imports = ["import sys", "import torch", f"sys.path.insert(0, {str(Utils.ROOT)!r})  # {comment}"]
        imports.append("from Backbones import build_encoder")
        return imports, [f'model = build_encoder("{name}", small_stem={metadata["small_stem"]}, size={size})']
    else:
        imports = ["import torch", "import torchvision"]
        options = model_options(name, size, normalize=metadata.get("mean") is not None)
        options = ", ".join(f"{key}={value}" for key, value in options.items())
        layer = re.sub(r"\.(\d+)", r"[\1]", classifier_name(name, size))  # classifier.2 is classifier[2]
        lines = [f"model = torchvision.models.{name}({options})"]
        lines.append(f"model.{layer} = torch.nn.Identity()  # features instead of classes")
    if metadata["small_stem"]:
        lines.append("model.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)  # the stem for small images")
        lines.append("model.maxpool = torch.nn.Identity()")
    return imports, lines


# ---------------------------------------------------------------------------------------------------- weights


def write_encoder(out, encoder):
    """Write the weights and the metadata of an `EncoderFiles.Encoder` to a .safetensors, .pt or .onnx file."""
    weights = plain_weights(encoder.net)
    if out.suffix == ".pt":
        Utils.save_(out, encoder=weights, metadata=encoder.metadata)
        return
    # the other two formats hold only text: other values are written as JSON
    metadata = {}
    for key, value in encoder.metadata.items():
        metadata[key] = value if isinstance(value, str) else json.dumps(value)
    if out.suffix == ".safetensors":
        from safetensors.torch import save

        copies = {name: value.clone() for name, value in weights.items()}  # two layers may share their weights
        content = save(copies, {"format": "pt"} | metadata)
    else:
        content = onnx_bytes(out, encoder, metadata)
    Utils.write_atomically(out, lambda scratch: scratch.write_bytes(content))


def onnx_bytes(out, encoder, metadata):
    """Return an ONNX model: "images", float32 (B, 3, S, S), to "features", float32 (B, F), for any B."""
    n_bytes = sum(value.nbytes for value in encoder.net.state_dict().values())
    if n_bytes >= ONNX_BYTES:
        raise UserError(f"--out {out}: one ONNX file holds less than 2 GB, not {n_bytes:,} bytes: choose .safetensors")
    size = encoder.metadata["image_size"]
    Distributed.notice(f"tracing {encoder.metadata['backbone']} for ONNX")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                encoder.net,
                (torch.rand(2, 3, size, size),),
                input_names=["images"],
                output_names=["features"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                dynamo=True,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:  # a backbone of one's own can compute what ONNX cannot
        name = encoder.metadata["backbone"]
        raise UserError(f"--out {out}: torch.onnx cannot write {name}: choose .safetensors or .pt") from error
    program.model.metadata_props.update(metadata)
    return program.model_proto.SerializeToString()


# ---------------------------------------------------------------------------------------------------- features


class Table(NamedTuple):
    """Features of N images, in the order of their files."""

    features: np.ndarray  # float32 (N, F)
    paths: list  # N of them, relative to the folder; SPLIT/INDEX where the images are not files
    labels: np.ndarray  # int64 (N,); -1: no label
    classes: list  # their names


def export_features(args, encoder, out, device):
    """Write the features of --features DATA to `out`. Several processes share the batches."""
    Devices.set_precision("fp32", device)
    size = args.size or encoder.metadata["image_size"]
    check_size(encoder, size)
    root, split = open_split(args, size)
    Distributed.say(f"{split.name}: {len(split)} images of {size} px, on {device}")
    table = compute_features(encoder.net, split, root, device, args.bs)
    Distributed.first_rank_only(lambda: write_table(out, table, encoder.metadata))


def write_table(out, table, metadata):
    """Write a `Table` to a file, by its ending."""
    write = write_npz if out.suffix == ".npz" else write_csv
    Utils.write_atomically(out, lambda scratch: write(scratch, table, metadata))
    n, width = table.features.shape
    labels = f"of {len(table.classes)} classes" if table.classes else "without labels"
    print(f"features ({n}, {width}) {labels} written to {Utils.shown(out)}")


def check_size(encoder, size):
    """Raise UserError if the encoder does not take images of that size."""
    if not takes_size(encoder.net, size):
        raise UserError(
            f"--size {size}: {encoder.metadata['backbone']} of {encoder.file} does not take it: leave it out"
        )


def open_split(args, size):
    """Return (the folder that paths are relative to, the split); image files are decoded batch by batch."""
    options = Data.Options(
        data_dir=Path(args.data_dir),
        size=size,
        storage="stream",
        n_workers=args.n_workers,
        skip_bad=args.skip_bad,
    )
    try:
        row = Data.get_row(args.features, size)
        if args.split == "val" and not row.has_val:
            raise UserError(f"--split val: {row.name} has no validation split: choose train or test")
        Data.note_unread(row)
        return row.folder or options.data_dir / row.name, row.load(row, args.split, options)
    except UserError as error:
        raise UserError(str(error).replace("--data ", "--features ")) from error


@torch.no_grad()
def compute_features(net, split, root, device, bs):
    """Return the `Table` of a split, computed in batches of bs images; only the first process has its features."""
    net = net.to(device, memory_format=torch.channels_last)

    def embedded(own):
        for _, images in split.batches(own, device):
            yield (Evaluate.embed(net, to_float(images)).cpu(),)

    parts = []
    with tqdm(total=len(split), desc="features", unit="image", disable=Utils.quiet()) as bar:
        for (part,) in Distributed.spread(torch.arange(len(split)).split(bs), embedded):
            parts.append(part)
            bar.update(len(part))
    return Table(
        features=torch.cat(parts).numpy() if parts else None,
        paths=relative_paths(split, root),
        labels=split.labels.numpy(),
        classes=split.classes,
    )


def relative_paths(split, root):
    """Return the path of every image of a split, relative to the folder of the data set, with / between its parts."""
    if isinstance(split, Data.StreamedSplit):
        return [Path(os.path.relpath(path, root)).as_posix() for path in split.files.paths]
    return [f"{split.name}/{index}" for index in range(len(split))]


def write_npz(file, table, metadata):
    """Write the arrays features, paths, labels, classes, and the encoder's metadata as JSON."""
    with file.open("wb") as handle:
        np.savez(
            handle,
            features=table.features,
            paths=np.array(table.paths),
            labels=table.labels,
            classes=np.array(table.classes, dtype=str),
            metadata=np.array(json.dumps(metadata)),
        )


def write_csv(file, table, metadata):
    """Write the columns path, label, class, f0, f1, ...; 9 digits give every float32 back exactly."""
    header = ["path", "label", "class"]
    header += [f"f{column}" for column in range(table.features.shape[1])]
    with file.open("w", newline="", encoding="utf-8", errors="surrogateescape") as handle:
        writer = csv.writer(handle)
        writer.writerow(header)
        rows = zip(table.paths, table.labels.tolist(), table.features)
        for path, label, features in tqdm(rows, "writing", len(table.paths), unit="row", disable=Utils.quiet()):
            name = table.classes[label] if label >= 0 else ""
            cells = [f"{value:.9g}" for value in features.tolist()]
            writer.writerow([path, label, name, *cells])


if __name__ == "__main__":
    Utils.set_threads()
    Utils.run_script(main, get_args)
