"""Evaluate: the probes against slow references, what scoring leaves untouched, and the script."""

import copy
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import one_error, one_line, only_run, run, save_shapes
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import nn
from torchvision.transforms.functional import to_tensor

import Data
import Evaluate
import TrainSimCLR
from Backbones import build_encoder
from Images.Folders import list_folder
from Images.Split import Split, StreamedSplit
from Utils import UserError

CPU = torch.device("cpu")
SCORES = {"knn", "linear", "linear_aug", "chance", "pixels_knn", "untrained_knn", "untrained_linear"}
NAMES = SCORES | {"n_test", "split", "epoch", "protocol"}


@pytest.fixture
def clouds():
    """Features and labels of 300 and 200 points of 5 overlapping classes; the features differ in scale."""
    random = torch.Generator().manual_seed(0)
    centers, scales = torch.randn(5, 12, generator=random), torch.logspace(-1, 1, 12)

    def cloud(n):
        labels = torch.randint(5, (n,), generator=random)
        return (centers[labels] + torch.randn(n, 12, generator=random) + 0.5) * scales, labels

    return *cloud(300), *cloud(200)


def color_splits(eval="val", size=16):
    """Splits whose classes are the colors red, green and blue under noise: 90 images each to learn and to score."""
    random = torch.Generator().manual_seed(0)

    def split(n, unlabeled=0):
        labels = torch.arange(n) % 3
        images = torch.randint(0, 130, (n, 3, size, size), generator=random)
        images[torch.arange(n), labels] += 60
        labels[:unlabeled] = -1
        return Split(images.byte(), labels, ["red", "green", "blue"])

    train = split(100, unlabeled=10)
    return Data.Splits(train, train if eval == "cv" else split(90), eval)


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return build_encoder("resnet8", False, 16)


def state(module):
    """Return copies of all that a state dict holds."""
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(first, second):
    """Return whether two states have the same bits."""
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


# kNN


def slow_knn(train, train_labels, test, test_labels, k, temperature):
    """Return the accuracy that knn_accuracy is to have, image by image, in double precision."""
    train, test = (x.double().numpy() for x in (train, test))
    right = 0
    for x, label in zip(test, test_labels.tolist()):
        cosines = train @ x / np.linalg.norm(train, axis=1) / np.linalg.norm(x)
        votes = np.zeros(int(train_labels.max()) + 1)
        for row in np.argsort(-cosines)[:k]:
            votes[train_labels[row]] += np.exp(cosines[row] / temperature)
        right += votes.argmax() == label
    return right / len(test)


def test_features_are_computed_by_halves_where_memory_runs_out():
    x = torch.rand(7, 3, 4, 4)
    counts = []

    def net(x):
        counts.append(len(x))
        if len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return x.mean((2, 3))

    with torch.no_grad():
        assert torch.allclose(Evaluate.embed(net, x), x.mean((2, 3)))
    assert counts == [7, 4, 2, 2, 3, 2, 1]
    with pytest.raises(torch.OutOfMemoryError):  # a training step has other batch statistics by halves
        Evaluate.embed(net, x)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.1), (20, 0.1), (20, 1.0), (7, 0.5), (1000, 0.1)])
def test_knn(clouds, k, temperature):
    train, train_labels, test, test_labels = clouds
    accuracy = Evaluate.knn_accuracy(*clouds, k=k, temperature=temperature)
    assert accuracy == pytest.approx(slow_knn(*clouds, k, temperature))
    assert 0.3 < accuracy < 1

    def weigh(distances):  # cosine distance is 1 - similarity
        return np.exp((1 - distances) / temperature)

    theirs = KNeighborsClassifier(min(k, 300), metric="cosine", weights=weigh).fit(train, train_labels)
    assert accuracy == pytest.approx(theirs.score(test, test_labels))


def test_knn_in_parts(clouds):
    train, train_labels, test, test_labels = clouds
    many = test.repeat(8, 1), test_labels.repeat(8)  # more than are compared at a time
    assert Evaluate.knn_accuracy(train, train_labels, *many) == pytest.approx(Evaluate.knn_accuracy(*clouds))


# the linear probe


def objective(x, labels, weight, bias):
    """Return what fit_linear minimizes, in double precision."""
    x, weight, bias = x.double(), torch.as_tensor(weight).double(), torch.as_tensor(bias).double()
    l2 = Evaluate.PROTOCOL["linear_l2"]
    return (F.cross_entropy(x @ weight.T + bias, labels) + l2 / 2 * weight.square().sum()).item()


def test_the_linear_probe(clouds):
    train, train_labels, test, test_labels = clouds
    mean, std = train.mean(0), train.std(0, correction=0)
    x, y = (train - mean) / std, (test - mean) / std
    # scikit-learn minimizes C times the sum of the losses + |weight|^2 / 2
    theirs = LogisticRegression(C=1 / (Evaluate.PROTOCOL["linear_l2"] * len(x)), max_iter=10000, tol=1e-10)
    theirs.fit(x.double(), train_labels)
    assert Evaluate.linear_accuracy(*clouds) == pytest.approx(theirs.score(y.double(), test_labels), abs=0.01)
    ours = objective(x, train_labels, *Evaluate.fit_linear(x, train_labels))
    assert ours == pytest.approx(objective(x, train_labels, theirs.coef_, theirs.intercept_), rel=1e-3)


def test_the_linear_probe_ignores_scale_and_constants(clouds):
    train, train_labels, test, test_labels = clouds
    train, test = (torch.cat([3 - 5 * x, torch.full((len(x), 1), 7.0)], 1) for x in (train, test))
    assert Evaluate.linear_accuracy(train, train_labels, test, test_labels) == pytest.approx(
        Evaluate.linear_accuracy(*clouds), abs=0.01
    )


# folds


def test_folds_of_cross_validation():
    labels = torch.tensor([0] * 30 + [1] * 9 + [-1] * 20 + [2] * 7)[torch.randperm(66)]
    split = Split(torch.zeros(66, 3, 4, 4, dtype=torch.uint8), labels, ["a", "b", "c"])
    pairs = Evaluate.folds(Data.Splits(split, split, "cv"))
    assert len(pairs) == 3
    assert torch.cat([test for _, test in pairs]).unique().numel() == 46
    for train, test in pairs:
        assert not {*train.tolist()} & {*test.tolist()}
        assert len(train) + len(test) == 46
        assert labels[train].min() == labels[test].min() == 0
        assert (labels[test].bincount() - torch.tensor([10, 3, 7 / 3])).abs().max() < 1
    again = Evaluate.folds(Data.Splits(split, split, "cv"))
    assert all(torch.equal(a, b) for old, new in zip(pairs, again) for a, b in zip(old, new))


def test_folds_of_a_scored_split():
    splits = color_splits()
    ((train, test),) = Evaluate.folds(splits)
    assert train.tolist() == [*range(10, 100)]
    assert test.tolist() == [*range(90)]


# features


def test_features_are_in_order(encoder):
    split = color_splits().train
    encoder.eval()
    features = Evaluate.extract(encoder, split, CPU, bs=33)
    assert features.shape == (100, 128)
    assert features.dtype == torch.float32
    assert not features.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(features[70:80], encoder(split.images[70:80] / 255))


@pytest.mark.parametrize("n_workers", [0, 2])
def test_streamed_features_are_in_order(tmp_path, encoder, n_workers):
    listing = list_folder(save_shapes(tmp_path, 3))
    features = Evaluate.extract(encoder.eval(), StreamedSplit(listing, 16, n_workers), CPU, bs=7)
    images = torch.stack([to_tensor(Image.open(path)) for path in listing.paths])
    with torch.no_grad():
        expected = encoder(F.avg_pool2d(images, 2))
    assert features.shape == (30, 128)
    assert (features - expected).norm() < 0.1 * (features - expected.roll(1, 0)).norm()  # but for how it resizes


def test_images_without_a_label_are_not_scored(encoder):
    splits = color_splits("cv")
    result = Evaluate.evaluate(encoder, encoder, splits, Data.plain_views(16), CPU, 1)
    assert result["n_test"] == 90  # of 100


def test_frozen(encoder):
    encoder.train()
    x = torch.rand(4, 3, 16, 16)
    with Evaluate.frozen(encoder):
        assert not encoder.training
        assert not encoder.stem[1].training
        encoder(x)
    assert encoder.training
    assert encoder.stem[1].training
    with pytest.raises(AssertionError, match="running_mean"), Evaluate.frozen(encoder):
        encoder.train()
        encoder(x)
    with pytest.raises(AssertionError, match=r"stem\.0\.weight"), Evaluate.frozen(encoder), torch.no_grad():
        encoder.stem[0].weight[0, 0, 0, 0] += 1e-3
    with pytest.raises(ZeroDivisionError), Evaluate.frozen(encoder):
        _ = 1 / 0
    assert encoder.training


# scores


@pytest.mark.parametrize("eval", ["val", "cv"])
def test_score_leaves_everything_as_it_was(encoder, eval):
    splits, before, random = color_splits(eval), state(encoder), torch.get_rng_state()
    encoder.train()
    first, second = (Evaluate.score(encoder, splits, CPU) for _ in range(2))
    assert first == second
    assert first.keys() == {"knn", "linear"}
    assert torch.equal(torch.get_rng_state(), random)
    assert same(before, state(encoder))
    assert encoder.training
    assert first["linear"] > 0.8
    assert first["knn"] > 0.5


def test_neighbors_kept_are_those_of_a_slow_reference():
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.BatchNorm1d(5))
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(256, (30, 3, 2, 2), generator=rng, dtype=torch.uint8)
    version = (images[:9] / 255 + 0.3 * torch.rand(9, 3, 2, 2, generator=rng)).clamp(0, 1)
    itself, kept = Evaluate.neighbors_kept(encoder, images, [images[:9] / 255, version], k=4)
    assert encoder.training
    assert itself == 1

    with torch.no_grad():
        known = F.normalize(encoder.eval()(images / 255), dim=1).tolist()
        asked = F.normalize(encoder(version), dim=1).tolist()

    def neighbors(x, row):
        others = [other for other in range(30) if other != row]
        return set(sorted(others, key=lambda other: -sum(a * b for a, b in zip(x, known[other])))[:4])

    shared = [len(neighbors(asked[row], row) & neighbors(known[row], row)) / 4 for row in range(9)]
    assert 0.2 < kept < 1
    assert kept == pytest.approx(sum(shared) / 9)


@pytest.mark.parametrize("eval", ["val", "cv"])
def test_evaluate(encoder, eval):
    splits, views = color_splits(eval), Data.get_ssl_data_augs("shapes", size=16)
    before, untrained = state(encoder.train()), build_encoder("resnet8", False, 16)
    random = torch.get_rng_state()
    result = Evaluate.evaluate(encoder, untrained, splits, views, CPU, 7)
    assert result.keys() == NAMES
    assert (result["n_test"], result["split"], result["epoch"]) == (90, eval, 7)
    assert all(0 <= result[name] <= 1 for name in SCORES)
    assert result["chance"] == pytest.approx(1 / 3, abs=0.01)
    assert torch.equal(torch.get_rng_state(), random)
    assert same(before, state(encoder))
    assert encoder.training
    assert result["linear"] == Evaluate.score(encoder, splits, CPU)["linear"]
    assert result["untrained_knn"] == Evaluate.score(untrained, splits, CPU)["knn"]
    assert json.loads(json.dumps(result)) == result
    assert "worse than before" not in Evaluate.scores_table(result | {"linear": 0.5, "untrained_linear": 0.5})
    assert "worse than before" in Evaluate.scores_table(result | {"linear": 0.4, "untrained_linear": 0.5})
    table = Evaluate.scores_table({**result, "finetune": 0.5})
    assert "kNN" in table
    assert "90 images" in table
    assert len(table.splitlines()) == 9
    few = Evaluate.evaluate(encoder, None, splits, views, CPU, 7, baselines=False)
    beside = {"untrained_knn", "untrained_linear", "linear_aug", "pixels_knn"}
    assert few.keys() == NAMES - beside
    assert all(few[name] == result[name] for name in few)
    pairs = {"alignment": 0.25, "cosine_synthetic": 0.5, "label_synthetic": 0.75}
    table = Evaluate.scores_table({**few, "pairs": pairs})
    assert "75.00 %" in table
    assert table.endswith("pairs: alignment 0.25, cosine synthetic 0.50")


def test_pixels():
    splits = color_splits(size=48)
    train, test = (F.interpolate(split.images / 255, 32, mode="area").flatten(1) for split in splits[:2])
    labels = splits.train.labels
    expected = slow_knn(train[10:], labels[10:], test, splits.test.labels, 20, 0.1)
    assert Evaluate.score_pixels(splits, CPU) == pytest.approx(expected, abs=0.012)


def test_augmented_features_meet_their_labels():
    splits, mean = color_splits("cv"), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert Evaluate.score_augmented(mean, splits, CPU, Data.get_ssl_data_augs("shapes", size=16, aug="crop")) > 0.95


@pytest.mark.parametrize("eval", ["val", "cv"])
def test_fine_tuning(encoder, eval):
    before, views = state(encoder.eval()), Data.get_ssl_data_augs("shapes", size=16, aug="crop")
    assert Evaluate.fine_tune(encoder, color_splits(eval), CPU, views, epochs=25, bs=32) > 0.8  # chance: 0.33
    assert same(before, state(encoder))
    assert not encoder.training
    assert all(p.grad is None for p in encoder.parameters())


# the script


def test_a_last_batch_of_one_image_is_left_out_of_fine_tuning():
    torch.manual_seed(0)
    encoder = build_encoder("resnet8", False, 8)
    views = Data.get_ssl_data_augs("shapes", size=8, aug="crop")
    accuracy = Evaluate.fine_tune(encoder, color_splits(size=8), CPU, views, epochs=1, bs=89)  # of 90 images
    assert 0 <= accuracy <= 1


def test_every_fold_is_fine_tuned_from_the_same_encoder(encoder, monkeypatch):
    copied = []

    def noted(net):
        copied.append(net)
        return copy.deepcopy(net)

    monkeypatch.setattr(Evaluate, "copy", SimpleNamespace(deepcopy=noted))
    Evaluate.fine_tune(encoder, color_splits("cv"), CPU, Data.plain_views(16), epochs=1)
    assert copied == [encoder] * 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a run of one epoch on a tree of shapes."""
    root = tmp_path_factory.mktemp("run")
    save_shapes(root / "images" / "train", 24)
    save_shapes(root / "images" / "val", 6, seed=1)
    flags = f"--data {root / 'images'} --models_dir {root / 'Models'} --data_dir {root / 'Data'} --size 32"
    flags += " --backbone resnet8 --bs 32 --epochs 1 --n_ramp 0 --proj_hidden 32 --n_workers 0 --device cpu"
    assert TrainSimCLR.main(TrainSimCLR.get_args(flags.split())) == 0
    return only_run(root / "Models")


def evaluated(*arguments):
    """Run Evaluate.py in this process."""
    Evaluate.main(Evaluate.get_args([*map(str, arguments), "--device", "cpu"]))


def test_a_checkpoint_alone_is_scored_as_in_training_into_a_file_of_its_own(folder):
    kept = (folder / "evaluation.json").read_text()
    by_training = json.loads(kept)
    done = run("Evaluate.py", folder / "1.pt")
    assert (done.code, done.err) == (0, "")
    assert "linear probe" in done.out
    file = folder / "evaluation-1-val.json"
    assert str(file) in done.out
    result = json.loads(file.read_text())
    assert result.keys() == NAMES | {"data"}
    assert by_training.keys() == NAMES | {"pairs"}
    assert (result["n_test"], result["split"]) == (60, "val")
    for name in NAMES - {"protocol", "split"}:
        assert result[name] == pytest.approx(by_training[name], abs=0.02)
    assert (folder / "evaluation.json").read_text() == kept


def test_a_run_folder_and_other_flags(folder, tmp_path):
    evaluated(folder, "--eval", "cv", "--finetune", 1, "--out", tmp_path / "out.json")
    result = json.loads((tmp_path / "out.json").read_text())
    assert result.keys() == NAMES | {"data", "finetune"}
    assert result["split"] == "cv"
    assert result["protocol"]["finetune_epochs"] == 1
    assert result["protocol"]["labels"] == 1
    assert 0 < result["finetune"] < 1


def test_few_labels_are_the_same_share_of_each_class():
    splits = color_splits()
    few = Evaluate.with_few_labels(splits, 0.1)
    assert few.train.labels[few.train.labels >= 0].bincount().tolist() == [3, 3, 3]  # of 30 each
    kept = few.train.labels >= 0
    assert torch.equal(few.train.labels[kept], splits.train.labels[kept])
    assert (splits.train.labels >= 0).sum() == 90  # these have not changed
    assert torch.equal(few.test.labels, splits.test.labels)
    fewest = Evaluate.with_few_labels(splits, 1e-6).train.labels
    assert fewest[fewest >= 0].bincount().tolist() == [1, 1, 1]
    one_line(lambda: Evaluate.with_few_labels(color_splits("cv"), 0.1), "--labels 0.1", "--eval val or test")


def test_scores_of_other_data_or_few_labels_have_a_file_of_their_own(folder, monkeypatch):
    counts = []

    def scored(encoder, untrained, splits, views, device, epoch):
        counts.append((splits.train.labels >= 0).sum().item())
        return {"epoch": epoch, "split": "val", "n_test": 60}

    monkeypatch.setattr(Evaluate, "evaluate", scored)
    images = folder.parents[1] / "images"
    for labels in (1, 0.1):
        evaluated(folder, "--data", images, "--labels", labels)
    assert counts[1] == pytest.approx(0.1 * counts[0], abs=10)
    assert list(folder.glob("evaluation-1-val-images-??????-labels_0.1.json"))


def test_files_are_read_as_the_run_read_them(folder, monkeypatch):
    seen = []

    def heard(args, device):
        seen.append(vars(args))
        raise UserError("heard")

    monkeypatch.setattr(Evaluate.Flags, "splits_for", heard)
    for flags in ([], ["--data_dir", "here", "--n_workers", "3", "--storage", "stream", "--skip_bad"]):
        one_line(lambda flags=flags: evaluated(folder, *flags), "heard")
    names = ("data_dir", "n_workers", "storage", "skip_bad")
    assert [seen[0][name] for name in names] == [str(folder.parents[1] / "Data"), 0, "auto", False]
    assert [seen[1][name] for name in names] == ["here", 3, "stream", True]


def test_a_file_that_is_no_checkpoint_of_an_encoder_is_one_line(tmp_path, cli):
    one_error(cli([tmp_path / "none.pt"], script=Evaluate), "none.pt", "no checkpoint")
    one_line(lambda: evaluated(tmp_path), str(tmp_path), "holds no checkpoint", "give")
    (tmp_path / "text.pt").write_text("no")
    one_line(lambda: evaluated(tmp_path / "text.pt"), "text.pt", "damaged")
    torch.save({"conv1.weight": torch.ones(2)}, tmp_path / "encoder.pt")
    one_line(lambda: evaluated(tmp_path / "encoder.pt"), "encoder.pt is an encoder alone", "its run folder")
    for content, reason in (({"generator": 1}, "no encoder"), ([1], "no checkpoint"), (torch.ones(2), "no checkpoint")):
        torch.save(content, tmp_path / "other.pt")
        one_line(lambda: evaluated(tmp_path / "other.pt"), "other.pt", reason)


def test_a_probe_that_does_not_fit_on_a_gpu_is_computed_on_the_cpu():
    splits = color_splits()
    features = [split.images.float().mean((2, 3)) for split in (splits.train, splits.test)]
    tries = []

    def probe(*given):
        tries.append(1)
        if len(tries) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return Evaluate.linear_accuracy(*given)

    assert Evaluate.mean_accuracy(probe, splits, *features) == Evaluate.mean_accuracy(
        Evaluate.linear_accuracy, splits, *features
    )
    assert len(tries) == 2


def test_chance_is_the_share_of_the_commonest_class():
    labels = torch.tensor([0] * 7 + [1] * 2 + [-1])  # the last one has no label
    split = Split(torch.zeros(10, 3, 8, 8, dtype=torch.uint8), labels, ["a", "b"])
    assert Evaluate.chance(Data.Splits(split, split, "val")) == pytest.approx(7 / 9)


def test_a_checkpoint_is_one_under_any_name(folder, tmp_path):
    shutil.copy(folder / "1.pt", tmp_path / "encoder.pt")
    evaluated(tmp_path / "encoder.pt", "--data", folder.parents[1] / "images")
    (file,) = tmp_path.glob("evaluation-*.json")
    scores, expected = (json.loads(each.read_text()) for each in (file, folder / "evaluation.json"))
    assert (scores["knn"], scores["linear"]) == (expected["knn"], expected["linear"])


def test_images_that_the_encoder_does_not_take_are_one_line(folder, monkeypatch):
    monkeypatch.setattr(Evaluate, "takes_size", lambda encoder, size: size != 32)
    one_line(lambda: evaluated(folder), "images of 32 px", "resnet8", "does not take")


def test_fine_tuning_without_enough_memory_is_one_line(folder, tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(Evaluate, "fine_tune", full)
    one_line(lambda: evaluated(folder, "--finetune", "1"), "--finetune 1", "out of memory on cpu", "leave it out")


def test_scores_are_not_written_over_a_folder(folder, monkeypatch):
    monkeypatch.setattr(Evaluate, "evaluate", None)  # it is refused before the scores
    one_line(lambda: evaluated(folder, "--out", folder), "--out", "it is a folder")


def test_data_that_cannot_be_scored_is_one_line(folder, tmp_path):
    flat = tmp_path / "flat"
    save_shapes(tmp_path, 2, classes=["flat"] * 10)
    one_line(lambda: evaluated(folder, "--data", flat), str(flat), "too few labels")
    one_line(lambda: evaluated(folder, "--data", tmp_path / "gone"), "gone", "neither")
    one_line(lambda: evaluated(folder, "--eval", "test"), "no folder", "test")


def test_a_place_that_cannot_be_written_is_one_line(folder, monkeypatch):
    monkeypatch.setattr(Evaluate, "evaluate", lambda *rest: {"epoch": rest[-1], "split": "val", "n_test": 60})
    one_line(lambda: evaluated(folder, "--out", "/proc/where.json"), "where.json", "by --out FILE")


def test_a_place_that_does_not_exist_is_one_line_before_the_scores(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(Evaluate, "read_run", lambda args: pytest.fail("too late"))
    one_line(lambda: evaluated(folder, "--out", tmp_path / "no" / "where.json"), "where.json", "no folder", "make it")


def test_a_net_that_does_not_fit_is_one_line(folder, tmp_path):
    content = torch.load(folder / "1.pt", weights_only=True)
    content["args"]["backbone"] = "resnet18"
    torch.save(content, tmp_path / "1.pt")
    one_line(lambda: evaluated(tmp_path / "1.pt"), "does not fit", "encoder")


def test_files_of_other_scores_are_not_written_over(folder, tmp_path):
    kept = (folder / "1.pt").read_bytes()
    one_line(lambda: evaluated(folder, "--out", folder / "1.pt"), "1.pt", "there already")
    assert (folder / "1.pt").read_bytes() == kept
    one_line(lambda: evaluated(folder, "--out", folder / "evaluation.json"), "evaluation.json", "a run itself")

    def name(words, checkpoint="1.pt"):
        return Evaluate.file_name(Evaluate.get_args(["x", *words]), {"epoch": 1, "split": "val"}, Path(checkpoint))

    names = [name(words) for words in ([], ["--finetune", "2"], ["--labels", "0.1"], ["--data", "cifar10"])]
    names += [name([], "1+2.pt"), name(["--data", "a/images"]), name(["--data", "b/images"])]
    assert names[0] == "evaluation-1-val.json"
    assert names[3] == "evaluation-1-val-cifar10.json"
    assert len(set(names)) == len(names)


def test_a_run_is_not_scored_on_other_images_without_being_told(folder, tmp_path):
    content = torch.load(folder / "1.pt", weights_only=True)
    content["data_fingerprint"] = "of other images"
    torch.save(content, tmp_path / "1.pt")
    one_line(lambda: evaluated(tmp_path / "1.pt"), "had other images", "--data PATH")
    images = folder.parents[1] / "images"
    evaluated(tmp_path / "1.pt", "--data", images, "--out", tmp_path / "out.json")
    assert (tmp_path / "out.json").exists()


def test_without_the_weights_that_a_run_began_with_all_else_is_scored(folder, tmp_path, capsys):
    content = torch.load(folder / "1.pt", weights_only=True)
    content["args"]["init"] = "/gone/weights.pt"
    torch.save(content, tmp_path / "1.pt")
    evaluated(tmp_path / "1.pt", "--out", tmp_path / "out.json")
    assert "--init /gone/weights.pt: no such file anymore" in capsys.readouterr().out
    left_out = {"untrained_knn", "untrained_linear"}
    assert json.loads((tmp_path / "out.json").read_text()).keys() == (NAMES | {"data"}) - left_out
