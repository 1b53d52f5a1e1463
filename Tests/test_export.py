"""Export.py and EncoderFiles.py: other libraries compute the same features from what is printed and written."""

import csv
import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from helpers import one_line, save, save_shapes
from safetensors import safe_open
from torchvision.models import vision_transformer

import Backbones
import Data
import EncoderFiles
import Evaluate
import Export
import Utils
from Backbones import build_encoder, is_resnet
from Images import Shapes
from Images.Folders import Listing
from Images.Split import StreamedSplit

ROOT = Path(__file__).parents[1]
STEMS = [("resnet18", True), ("resnet18", False)]


def make_run(folder, backbone, small_stem, size=32, normalize=False):
    """Make a run folder with one checkpoint, as the trainer saves it, of an encoder that has seen images; return it."""
    torch.manual_seed(5)
    encoder = build_encoder(backbone, small_stem, size, normalize).train()
    with torch.no_grad():
        encoder(torch.rand(8, 3, size, size))
    encoder = encoder.to(memory_format=torch.channels_last)
    folder.mkdir(parents=True)
    args = {"backbone": backbone, "small_stem": small_stem, "size": size, "data": "/home/me/photos"}
    args["normalize"] = normalize
    rest = {"head": {}, "random": {}, "optimizer": {}}
    Utils.save_(folder / "7.pt", args=args, epoch=7, step=7, encoder=encoder, **rest)
    scores = {"knn": 0.5, "linear": 0.75, "split": "val", "n_test": 60}
    content = {**scores, "epoch": 7, "protocol": {"knn_k": 20}, "pairs": {"positive": 0.5}}
    (folder / "evaluation.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module", autouse=True)
def small_vit():
    """Let torchvision's vit_b_16 have two narrow layers, in our code and in what is printed: it has 86 M weights."""
    build = vision_transformer._vision_transformer
    narrow = {"num_layers": 2, "num_heads": 4, "hidden_dim": 64, "mlp_dim": 64}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vision_transformer, "_vision_transformer", lambda **options: build(**options | narrow))
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(backbone, small_stem, size) -> the folder of such a run, made once."""
    made = {}

    def run(backbone, small_stem, size=32):
        key = (backbone, small_stem, size)
        if key not in made:
            made[key] = make_run(tmp_path_factory.mktemp("runs") / backbone, *key)
        return made[key]

    return run


@pytest.fixture
def export(capfd):
    """(argv) -> what Export.py prints on standard output."""

    def run(*argv):
        capfd.readouterr()
        Export.main(Export.get_args([str(part) for part in argv]))
        return capfd.readouterr().out

    return run


def refused(*argv, parts):
    return one_line(lambda: Export.main(Export.get_args([str(part) for part in argv])), *parts)


def images_of(size):
    return torch.rand(5, 3, size, size, generator=torch.Generator().manual_seed(1))


@functools.cache
def loaded(folder):
    """Return the encoder of a run that no test changes."""
    return EncoderFiles.load_encoder(folder).net


def ours(folder, images):
    """Return the features that the trained encoder itself computes."""
    with torch.no_grad():
        return loaded(folder)(images)


def run_code(code):
    """Run printed code as it is, in a module of its own; return its variables."""
    assert len(code.strip().splitlines()) <= 13
    variables = {}
    exec(code, variables)
    assert variables["features"].shape[0] == 8
    return variables


@torch.no_grad()
def check_code(code, folder, size=32):
    """Check that the model of printed code computes our features, to 1e-5."""
    images = images_of(size)
    variables = run_code(code)
    torch.testing.assert_close(variables["model"](images), ours(folder, images), rtol=1e-5, atol=1e-5)
    return variables["model"]


# ---------------------------------------------------------------------------------------------------- code


@torch.no_grad()
@pytest.mark.parametrize("file", ["encoder.pt", "encoder.safetensors"])
def test_printed_code_normalizes_as_the_encoder_does(tmp_path, export, file):
    folder = make_run(tmp_path / "run", "resnet18", False, normalize=True)
    code = export(folder, "--out", tmp_path / file)
    images = "torch.linspace(0, 1, 8 * 3 * 32 * 32).view(8, 3, 32, 32)"
    assert "torch.rand(8, 3, 32, 32)" in code
    variables = run_code(code.replace("torch.rand(8, 3, 32, 32)", images))
    torch.testing.assert_close(variables["features"], ours(folder, eval(images)), rtol=1e-4, atol=1e-4)
    assert (variables["images"] < 0).any()


@pytest.mark.parametrize("normalize", [True, False])
def test_a_checkpoint_from_before_a_flag_was_renamed_says_the_same(tmp_path, normalize):
    folder = make_run(tmp_path / "run", "resnet8", False, normalize=normalize)
    metadata = EncoderFiles.load_encoder(folder / "7.pt").metadata
    assert (metadata["mean"] is not None) == normalize
    state = torch.load(folder / "7.pt")
    state["args"]["normalise"] = state["args"].pop("normalize")
    torch.save(state, folder / "7.pt")
    assert EncoderFiles.load_encoder(folder / "7.pt").metadata == metadata


@pytest.mark.parametrize("small_stem", [True, False])
def test_the_encoder_is_the_trained_one(small_stem, runs):
    folder = runs("resnet18", small_stem)
    encoder = build_encoder("resnet18", small_stem, 32)
    encoder.load_state_dict(torch.load(folder / "7.pt", weights_only=True)["encoder"])
    assert torch.equal(ours(folder, images_of(32)), encoder.eval()(images_of(32)))
    assert torch.equal(ours(folder / "7.pt", images_of(32)), encoder(images_of(32)))


@pytest.mark.parametrize(
    "backbone, small_stem, size",
    [
        ("resnet18", True, 32),
        ("resnet18", False, 64),
        ("resnet8", True, 32),
        ("convnext_tiny", False, 32),
        ("vit_b_16", False, 48),
        ("squeezenet1_1", False, 32),
    ],
)
def test_printed_code_of_torchvision(backbone, small_stem, size, runs, export):
    folder = runs(backbone, small_stem, size)
    code = export(folder)
    assert f"# {backbone} after 7 epochs on photos" in code
    check_code(code, folder, size)
    if backbone != "resnet8":
        assert not {"Backbones", "timm"} & {word.strip(".") for word in code.split()}


@pytest.mark.parametrize("backbone, small_stem", STEMS)
def test_printed_code_of_timm(backbone, small_stem, runs, export):
    folder = runs(backbone, small_stem)
    model = check_code(export(folder, "--library", "timm"), folder)
    assert type(model).__module__.startswith("timm.")


@pytest.mark.parametrize("backbone", ["resnet8", "squeezenet1_1"])
def test_timm_has_no_such_model(backbone, runs):
    refused(runs(backbone, False), "--library", "timm", parts=["--library timm", backbone, "leave it out"])


def test_every_resnet_has_its_name_in_timm():
    import timm  # slow, and needed here alone

    names = [name for name in torchvision.models.list_models() if is_resnet(name)]
    assert len(names) >= 10
    assert {*names} <= {*timm.list_models()}


# ------------------------------------------------------------------------------------------ a backbone of one's own


class Own(torch.nn.Module):
    """Two convolutions with the same weights; bessel: then a function that ONNX lacks."""

    def __init__(self, bessel):
        super().__init__()
        self.bessel = bessel
        self.first = torch.nn.Conv2d(3, 3, 3)
        self.second = torch.nn.Conv2d(3, 3, 3)
        self.second.weight = self.first.weight

    def forward(self, x):
        x = self.second(self.first(x)).mean(dim=(2, 3))
        return torch.special.bessel_j0(x) if self.bessel else x


@pytest.fixture
def own_run(monkeypatch, tmp_path):
    """(bessel) -> a run of such a net, which Backbones.py knows as docs/extending.md says."""
    names = Backbones.list_backbones()
    build = Backbones._build

    def run(bessel=False):
        def build_own(name, *rest):
            return Own(bessel) if name == "own" else build(name, *rest)

        monkeypatch.setattr(Backbones, "list_backbones", lambda: ["own", *names])
        monkeypatch.setattr(Backbones, "_build", build_own)
        return make_run(tmp_path / "runs" / "own", "own", False)

    return run


def test_a_backbone_of_ones_own(own_run, export, tmp_path):
    folder = own_run()
    code = export(folder)
    assert "from Backbones import" in code
    assert "torchvision." not in code
    check_code(code, folder)
    for ending in (".safetensors", ".pt"):
        check_code(export(folder, "--out", tmp_path / f"own{ending}"), folder)
    variables = run_code(export(folder, "--out", tmp_path / "own.onnx"))
    (features,) = variables["session"].run(None, {"images": images_of(32).numpy()})
    torch.testing.assert_close(torch.from_numpy(features), ours(folder, images_of(32)), rtol=1e-4, atol=1e-4)
    refused(folder, "--library", "timm", parts=["--library timm", "own", "leave it out"])


def test_a_backbone_that_onnx_cannot_hold(own_run, tmp_path):
    refused(own_run(bessel=True), "--out", tmp_path / "own.onnx", parts=["own.onnx", "cannot write own", ".pt"])
    assert not list(tmp_path.glob("*.onnx"))


# ---------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
@pytest.mark.parametrize("backbone, small_stem", STEMS)
def test_written_weights(backbone, small_stem, ending, runs, export, tmp_path):
    folder = runs(backbone, small_stem)
    out = tmp_path / f"my encoder's{ending}"
    check_code(export(folder, "--out", out), folder)
    check_code(export(folder, "--out", out, "--library", "timm"), folder)  # the same file
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    assert out.stat().st_size < 1.02 * 4 * 11_200_000


@pytest.mark.parametrize("backbone, small_stem", [*STEMS, ("resnet8", True), ("squeezenet1_1", False)])
def test_onnx(backbone, small_stem, runs, export, tmp_path):
    folder = runs(backbone, small_stem)
    variables = run_code(export(folder, "--out", tmp_path / "encoder.onnx"))
    for images in (images_of(32), images_of(32)[:1]):  # any number of them
        (features,) = variables["session"].run(None, {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(features), ours(folder, images), rtol=1e-4, atol=1e-4)
    metadata = variables["session"].get_modelmeta().custom_metadata_map
    assert metadata["backbone"] == backbone
    assert json.loads(metadata["scores"])["linear"] == 0.75
    assert [path.name for path in tmp_path.iterdir()] == ["encoder.onnx"]


def test_onnx_of_more_than_one_file_holds(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(Export, "ONNX_BYTES", 1_000_000)
    refused(runs("resnet8", True), "--out", tmp_path / "x.onnx", parts=["x.onnx", "2 GB", "choose .safetensors"])


def test_metadata(runs, export, tmp_path):
    export(runs("resnet18", True), "--out", tmp_path / "x.pt")
    metadata = torch.load(tmp_path / "x.pt", weights_only=True)["metadata"]
    assert metadata["stem"] == "3x3 stem, stride 1, no pooling"
    assert metadata["image_size"] == 32
    assert metadata["num_features"] == 512
    assert metadata["value_range"] == [0, 1]
    assert "not normalized" in metadata["input"]
    assert metadata["scores"] == {"knn": 0.5, "linear": 0.75, "split": "val", "n_test": 60}
    assert metadata["data"] == "photos"  # not where they lie

    export(runs("resnet18", True), "--out", tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        text = file.metadata()
    assert text["small_stem"] == "true"
    assert json.loads(text["scores"]) == metadata["scores"]


def test_scores_of_another_epoch_are_not_taken(tmp_path):
    folder = make_run(tmp_path / "run", "resnet8", True)
    assert EncoderFiles.load_encoder(folder).metadata["scores"]
    content = json.loads((folder / "evaluation.json").read_text())
    (folder / "evaluation.json").write_text(json.dumps({**content, "epoch": 6}))
    assert EncoderFiles.load_encoder(folder).metadata["scores"] == {}
    (folder / "evaluation.json").write_text("[")
    assert EncoderFiles.load_encoder(folder).metadata["scores"] == {}


def test_image_size_without_flag_is_that_of_the_data(tmp_path):
    folder = make_run(tmp_path / "run", "resnet8", True)
    state = torch.load(folder / "7.pt", weights_only=True)
    for size, data, expected in ((None, "stl10", 96), (None, "/not/here", 128), (40, "stl10", 40)):
        torch.save({**state, "args": {**state["args"], "size": size, "data": data}}, folder / "7.pt")
        assert EncoderFiles.load_encoder(folder).metadata["image_size"] == expected


# ---------------------------------------------------------------------------------------------------- encoder.pt


def make_finished(folder, backbone):
    """Make a run folder with encoder.pt and encoder.json; return it."""
    make_run(folder, backbone, True)
    encoder = EncoderFiles.load_encoder(folder)
    net = encoder.net.to(memory_format=torch.channels_last)
    EncoderFiles.save_encoder(folder / "encoder.pt", net, encoder.metadata)
    return folder


@pytest.fixture
def finished(tmp_path):
    """A run folder with encoder.pt and encoder.json, of a ResNet-18 with the small stem."""
    return make_finished(tmp_path / "run", "resnet18")


@pytest.fixture
def light(tmp_path):
    """The same with a resnet8."""
    return make_finished(tmp_path / "run", "resnet8")


def test_encoder_pt_is_a_plain_state_dict(finished, export):
    model = torchvision.models.resnet18()
    model.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = torch.nn.Identity()
    model.fc = torch.nn.Identity()
    weights = torch.load(finished / "encoder.pt", weights_only=True)
    model.load_state_dict(weights)
    assert all(value.is_contiguous() for value in weights.values())
    images = images_of(32)
    torch.testing.assert_close(model.eval()(images), ours(finished / "7.pt", images), rtol=1e-5, atol=1e-5)
    assert json.loads((finished / "encoder.json").read_text())["scores"]["linear"] == 0.75

    (finished / "7.pt").unlink()  # encoder.pt is enough
    code = export(finished)
    assert "encoder.pt" in code
    check_code(code, finished)
    assert EncoderFiles.load_encoder(finished / "encoder.pt").metadata["epoch"] == 7


def test_what_was_written_can_be_exported_again(runs, export, tmp_path):
    folder = runs("resnet18", True)
    export(folder, "--out", tmp_path / "x.pt")
    check_code(export(tmp_path / "x.pt", "--out", tmp_path / "y.safetensors"), folder)


def test_encoder_pt_alone_says_that_its_json_is_missing(finished):
    (finished / "encoder.json").unlink()
    refused(finished, parts=["encoder.pt does not say what encoder", "encoder.json next to encoder.pt"])


HOSTILE = {
    "backbone": ["resnet\n\x1b[2J" * 1000, 18, None, 10**400, {"a": 1}],
    "small_stem": [None, "yes", 1, []],
    "image_size": ["32", 32.0, 0, -1, 10**12, 10**400, True, [32], None],
    "epoch": ["7", [7], None, float("nan")],
    "data": [None, 3, ["photos"]],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_metadata_of_another_type_are_one_line(name, light, tmp_path):
    content = json.loads((light / "encoder.json").read_text())
    exported = torch.load(light / "encoder.pt", weights_only=True)
    checkpoint = torch.load(light / "7.pt", weights_only=True)
    for value in HOSTILE[name]:
        (light / "encoder.json").write_text(json.dumps({**content, name: value}))
        refused(light, parts=["encoder.pt"])
        if isinstance(value, int) and value > 2**64:  # torch.save cannot write it
            continue
        torch.save({"encoder": exported, "metadata": {**content, name: value}}, tmp_path / "x.pt")
        refused(tmp_path / "x.pt", parts=["x.pt"])
        if name not in ("epoch", "image_size"):
            torch.save({**checkpoint, "args": {**checkpoint["args"], name: value}}, light / "7.pt")
            refused(light / "7.pt", parts=["7.pt"])


def test_the_rest_of_the_metadata_is_made_again(light, export, tmp_path):
    content = json.loads((light / "encoder.json").read_text())
    hostile = {"num_features": [1], "mean": 3, "std": "\x1b", "stem": None, "input": {}}
    hostile |= {"data": "a\nb\x1b[2J", "scores": {"knn": 0.5, "linear": [1], "other": None}, "more": 1}
    (light / "encoder.json").write_text(json.dumps(content | hostile))
    code = export(light, "--out", tmp_path / "x.safetensors")
    assert "on a\\nb\\x1b[2J\n" in code
    metadata = EncoderFiles.load_encoder(light).metadata
    assert metadata["num_features"] == 128
    assert metadata["mean"] == list(Backbones.IMAGENET_MEAN)
    assert metadata["scores"] == {"knn": 0.5}


def test_flags_that_do_not_go_together_are_one_line(light, tmp_path):
    refused(light, "--split", "val", parts=["--split", "only for --features"])
    refused(light, "--out", tmp_path / "x.pt", "--bs", 8, parts=["--bs", "only for --features"])
    words = ["--features", "shapes", "--out", tmp_path / "x.npz", "--library", "timm"]
    refused(light, *words, parts=["--library timm", "--features prints no code"])


@pytest.mark.parametrize("parts", [{"encoder": 3}, {"encoder": {"a": 3}}, {"args": 3}, {"args": {"data": []}}, {}])
def test_a_file_of_other_content_is_one_line(parts, light):
    state = torch.load(light / "7.pt", weights_only=True)
    torch.save(state | parts if parts else {1: 2}, light / "7.pt")
    refused(light / "7.pt", parts=["7.pt"])


def test_another_encoder_than_it_says(finished):
    content = json.loads((finished / "encoder.json").read_text())
    (finished / "encoder.json").write_text(json.dumps({**content, "small_stem": False}))
    refused(finished, parts=["is not the resnet18 that it says it is", "conv1.weight", "use another"])
    (finished / "encoder.json").write_text(json.dumps({**content, "backbone": "resnet19"}))
    refused(finished, parts=["resnet19", "did you mean"])


# ---------------------------------------------------------------------------------------------------- features


@pytest.fixture
def drawings(tmp_path):
    """A folder of 10 classes with 3 images each, some in a folder of their class's, of several sizes."""
    folder = save_shapes(tmp_path / "drawings", 3, size=48)
    first = sorted((folder / "disc").iterdir())[0]
    first.parent.joinpath("a b").mkdir()
    first.rename(first.parent / "a b" / "ü.png")
    return folder


@torch.no_grad()
def expected_features(folder, split, bs=512):
    return Evaluate.extract(EncoderFiles.load_encoder(folder).net, split, torch.device("cpu"), bs=bs)


def read_csv(file):
    """Return (header, rows) of a table."""
    with file.open(newline="", encoding="utf-8") as handle:
        header, *rows = csv.reader(handle)
    return header, rows


def test_features_of_a_folder(drawings, runs, export, tmp_path):
    folder = runs("resnet8", True)
    cache = tmp_path / "cache"
    flags = ["--features", drawings, "--bs", 7, "--n_workers", 0, "--device", "cpu", "--data_dir", cache]
    printed = export(folder, *flags, "--out", tmp_path / "x.npz")
    assert "30 images of 32 px" in printed
    assert "features (30, 128) of 10 classes written to" in printed
    assert not [*cache.rglob("*.npy")]  # nothing is kept of the images

    table = np.load(tmp_path / "x.npz")
    files = sorted(drawings.rglob("*.png"))
    assert {*table["paths"].tolist()} == {path.relative_to(drawings).as_posix() for path in files}
    assert "disc/a b/ü.png" in table["paths"].tolist()
    assert table["classes"].tolist() == sorted(path.name for path in drawings.iterdir())
    assert [path.split("/")[0] for path in table["paths"]] == table["classes"][table["labels"]].tolist()
    assert table["labels"].dtype == np.int64
    assert table["features"].dtype == np.float32
    assert json.loads(str(table["metadata"]))["backbone"] == "resnet8"

    # in the order of the folder, and each row that of its own file
    split = Data.get_train_split(str(drawings), Data.Options(data_dir=cache, size=32, storage="memory", n_workers=0))
    expected = expected_features(folder, split).numpy()
    np.testing.assert_allclose(table["features"], expected, rtol=1e-5, atol=1e-5)
    assert abs(expected[0] - expected[1]).max() > 1e-2
    alone = Export.compute_features(
        EncoderFiles.load_encoder(folder).net,
        StreamedSplit(Listing([str(drawings / table["paths"][17])], torch.tensor([0]), ["any"], {}), 32, n_workers=0),
        drawings,
        torch.device("cpu"),
        bs=4,
    )
    np.testing.assert_allclose(alone.features[0], expected[17], rtol=1e-4, atol=1e-4)

    export(folder, *flags, "--out", tmp_path / "x.csv")
    header, rows = read_csv(tmp_path / "x.csv")
    assert header == ["path", "label", "class", *(f"f{column}" for column in range(128))]
    assert [row[0] for row in rows] == table["paths"].tolist()
    assert [int(row[1]) for row in rows] == table["labels"].tolist()
    assert [row[2] for row in rows] == table["classes"][table["labels"]].tolist()
    values = np.array([[float(value) for value in row[3:]] for row in rows], dtype=np.float32)
    assert np.array_equal(values, table["features"])  # to the last bit


def test_images_without_classes(drawings, runs, export, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for index, path in enumerate(sorted(drawings.rglob("*.png"))[:4]):
        path.rename(flat / f"{index}.png")
    flags = ["--features", flat, "--n_workers", 0, "--device", "cpu"]
    printed = export(runs("resnet8", True), *flags, "--out", tmp_path / "x.npz")
    assert "features (4, 128) without labels written to" in printed
    table = np.load(tmp_path / "x.npz")
    assert table["labels"].tolist() == [-1] * 4
    assert table["classes"].tolist() == []
    assert table["paths"].tolist() == ["0.png", "1.png", "2.png", "3.png"]
    export(runs("resnet8", True), *flags, "--out", tmp_path / "x.csv")
    assert [row[:3] for row in read_csv(tmp_path / "x.csv")[1]] == [[f"{k}.png", "-1", ""] for k in range(4)]


def test_folders_that_are_not_read_are_named(drawings, runs, capfd, tmp_path):
    (drawings / "train").mkdir()
    (drawings / "disc").rename(drawings / "train" / "disc")
    flags = ["--features", str(drawings), "--n_workers", "0", "--device", "cpu", "--out", str(tmp_path / "x.npz")]
    Export.main(Export.get_args([str(runs("resnet8", True)), *flags]))
    assert "folders that are not read: " in capfd.readouterr().err
    assert len(np.load(tmp_path / "x.npz")["paths"]) == 3


def test_a_run_and_its_data(whole, tree, export, tmp_path):
    """A run of TrainSimCLR.py: the features of its test split are those that it is scored on."""
    assert whole.code == 0, whole.err
    flags = ["--features", tree, "--split", "test", "--device", "cpu", "--n_workers", 1]
    export(whole.folder, *flags, "--out", tmp_path / "x.npz")
    table = np.load(tmp_path / "x.npz")
    size = json.loads((whole.folder / "encoder.json").read_text())["image_size"]
    options = Data.Options(data_dir=tmp_path, size=size, storage="memory", n_workers=0)
    expected = expected_features(whole.folder, Data.get_data_splits(str(tree), "test", options).test)
    np.testing.assert_allclose(table["features"], expected.numpy(), rtol=1e-5, atol=1e-5)
    assert all(path.startswith("test/") and (tree / path).is_file() for path in table["paths"].tolist())
    scores = json.loads(str(table["metadata"]))["scores"]
    assert scores["linear"] == json.loads((whole.folder / "evaluation.json").read_text())["linear"]
    assert "protocol" not in scores


def test_features_of_a_data_set_by_name(runs, export, tmp_path, monkeypatch):
    for split in Shapes.SIZES:
        monkeypatch.setitem(Shapes.SIZES, split, 40)
    flags = ["--features", "shapes", "--split", "val", "--device", "cpu", "--out", tmp_path / "x.npz"]
    export(runs("resnet8", True), *flags)
    table = np.load(tmp_path / "x.npz")
    assert table["paths"][:2].tolist() == ["shapes/val/0", "shapes/val/1"]
    split = Data.get_data_splits("shapes", "val").test
    assert table["labels"].tolist() == split.labels.tolist()
    expected = expected_features(runs("resnet8", True), split)
    np.testing.assert_allclose(table["features"], expected.numpy(), rtol=1e-5, atol=1e-5)


def test_bad_files(drawings, runs, capfd, tmp_path):
    bad = save(drawings / "disc" / "0000a.png", np.zeros((4, 4, 3), np.uint8))
    bad.write_bytes(b"nothing")
    flags = [runs("resnet8", True), "--features", drawings, "--n_workers", 0, "--out", tmp_path / "x.npz"]
    refused(*flags, parts=["0000a.png", "--skip_bad"])
    assert not (tmp_path / "x.npz").exists()
    capfd.readouterr()
    Export.main(Export.get_args([str(part) for part in (*flags, "--skip_bad", "--bs", 2)]))
    assert "left out 1 of 31 files" in capfd.readouterr().err
    table = np.load(tmp_path / "x.npz")
    assert len(table["features"]) == len(table["paths"]) == len(table["labels"]) == 30
    assert "disc/0000a.png" not in table["paths"].tolist()
    names = table["classes"][table["labels"]]
    assert [path.split("/")[0] for path in table["paths"]] == names.tolist()


def test_names_that_are_no_text(drawings, runs, export, tmp_path):
    first = sorted((drawings / "square").iterdir())[0]
    first.rename(first.parent / os.fsdecode(b"caf\xe9.png"))
    flags = [runs("resnet8", True), "--features", drawings, "--n_workers", 0]
    export(*flags, "--out", tmp_path / "x.npz")
    assert any(os.fsencode(path) == b"square/caf\xe9.png" for path in np.load(tmp_path / "x.npz")["paths"].tolist())
    export(*flags, "--out", tmp_path / "x.csv")
    assert b"square/caf\xe9.png," in (tmp_path / "x.csv").read_bytes()


def test_another_size(drawings, runs, export, tmp_path):
    flags = ["--features", drawings, "--n_workers", 0, "--size", 40, "--out", tmp_path / "x.npz"]
    assert "30 images of 40 px" in export(runs("resnet8", True), *flags)
    refused(runs("vit_b_16", False, 48), *flags, parts=["--size 40", "vit_b_16", "leave it out"])


# ---------------------------------------------------------------------------------------------------- mistakes

BAD_OUT = {
    "encoder.npz": [".safetensors, .pt, .onnx"],
    "encoder": ["ending not known"],
    "none/encoder.pt": ["no folder", "none", "make it first"],
    "folder.pt": ["is a folder"],
    "file/encoder.pt": ["no folder"],
}


@pytest.mark.parametrize("name", BAD_OUT)
def test_out_is_checked_before_anything_is_read(name, tmp_path):
    (tmp_path / "folder.pt").mkdir()
    (tmp_path / "file").touch()
    refused("no/such/run", "--out", tmp_path / name, parts=[f"--out {tmp_path / name}", *BAD_OUT[name]])


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    def deny(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Export.tempfile, "TemporaryFile", deny)
    refused("no/such/run", "--out", tmp_path / "x.pt", parts=["cannot write to", "Permission denied"])


@pytest.mark.parametrize("name, package", [("x.safetensors", "safetensors"), ("x.onnx", "onnxscript")])
def test_a_package_that_is_not_installed(name, package, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: None if wanted == package else find(wanted))
    refused("no/such/run", "--out", tmp_path / name, parts=["needs another package", f"pip install {package}"])


def test_a_checkpoint_is_not_written_over(tmp_path):
    folder = make_run(tmp_path / "run", "resnet8", True)
    before = (folder / "7.pt").read_bytes()
    refused(folder, "--out", folder / "7.pt", parts=["7.pt", "choose another folder"])
    (folder / "args.json").write_text("{}")
    refused(folder, "--out", folder / "encoder.pt", parts=["encoder.pt", "choose another folder"])
    assert (folder / "7.pt").read_bytes() == before
    assert not (folder / "encoder.pt").exists()


def test_features_need_a_file(runs):
    refused("no/such/run", "--features", "shapes", parts=["--features shapes", "--out FILE.npz"])


def test_features_in_an_unknown_format(tmp_path):
    refused("no/such/run", "--features", "shapes", "--out", tmp_path / "x.pt", parts=["x.pt", ".npz, .csv"])


def test_no_such_data(runs, tmp_path):
    out = ["--out", tmp_path / "x.npz"]
    refused(runs("resnet8", True), "--features", "no/where", *out, parts=["--features no/where", "neither a data set"])
    refused(runs("resnet8", True), "--features", "cifar10", "--split", "val", *out, parts=["--split val", "cifar10"])
    assert not (tmp_path / "x.npz").exists()


def test_no_run(tmp_path):
    refused(tmp_path / "none", parts=["none", "no checkpoint"])
    refused(tmp_path, parts=["holds no checkpoint"])
    Utils.save_(tmp_path / "1.pt", args={"data": "shapes"}, generator={})
    refused(tmp_path / "1.pt", parts=["does not say what encoder", "TrainSimCLR.py"])


def test_the_script(runs, tmp_path):
    """Standard output is a program; everything else goes to standard error."""
    command = [sys.executable, "Export.py", str(runs("resnet18", True)), "--out", str(tmp_path / "x.safetensors")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"written to {tmp_path / 'x.safetensors'}" in done.stderr
    check_code(done.stdout, runs("resnet18", True))
