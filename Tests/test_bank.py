"""CamNet/Bank.py: what is filled, what is found again, what is refused; and that a kill loses nothing."""

import json
import os
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import wait_for

import Devices
from CamNet import Bank
from CamNet.Codes import Purpose, make_keys
from CamNet.Generator import Generator
from Images import Shapes
from Images.Split import Split


@pytest.fixture(scope="module")
def generator():
    torch.manual_seed(0)
    return Generator("tiny", 16, "gray+down2")


@pytest.fixture(scope="module")
def split():
    labels = torch.arange(10).repeat(3)
    return Split(Shapes.draw(labels, 16, torch.Generator().manual_seed(0)), labels, Shapes.CLASSES)


def fill(file, generator, split, k=3, seed=0, **more):
    return Bank.fill(file, generator, split, k, seed, torch.device("cpu"), bs=8, **more)


def test_bank_holds_samples_of_every_image(tmp_path, generator, split):
    assert fill(tmp_path / "b.npy", generator, split)
    images = np.load(tmp_path / "b.npy")
    assert images.dtype == np.uint8
    assert images.shape == (30, 3, 3, 16, 16)
    for row, number in ((0, 0), (17, 2), (29, 1)):  # one by one, as the sampling itself makes them
        key = make_keys(0, Purpose.BANK, torch.tensor([row]))
        condition = generator.corruption(split.images[row : row + 1], key)
        sample = generator.sample(condition, make_keys(key, number))[0]
        assert np.abs(images[row, number] / 255 - sample.numpy()).max() <= 0.5 / 255 + 1e-5
    differ = np.abs(images[:, 0].astype(int) - images[:, 1]).mean(axis=(1, 2, 3))
    assert differ.min() > 0.1  # in steps of 1 / 255, of a net that has learned nothing
    corrupted = generator.corruption(torch.from_numpy(images[:, 1]))
    assert (corrupted - generator.corruption(split.images)).abs().max() < 0.6 / 255  # but for the rounding to uint8


def test_second_call_finds_it_and_codes_follow_from_the_seed(tmp_path, generator, split):
    assert fill(tmp_path / "a.npy", generator, split)
    assert not fill(tmp_path / "a.npy", generator, split)
    fill(tmp_path / "b.npy", generator, split)
    fill(tmp_path / "c.npy", generator, split, seed=1)
    a, b, c = (np.load(tmp_path / f"{name}.npy") for name in "abc")
    assert (a == b).all()
    assert (a != c).any()
    assert sorted(path.name for path in tmp_path.iterdir() if path.name[0] == "a") == ["a.npy", "a.npy.json"]


@pytest.mark.parametrize("what", ["generator", "corrupt", "k", "seed", "data"])
def test_bank_of_something_else_is_refused(tmp_path, generator, split, what):
    file = tmp_path / "b.npy"
    fill(file, generator, split)
    before = file.read_bytes()
    arguments = {"k": 3, "seed": 0}
    if what == "generator":
        torch.manual_seed(1)
        generator = Generator("tiny", 16, "gray+down2")
    elif what == "corrupt":
        generator = Generator("tiny", 16, "gray")
    elif what == "data":
        split = Split(split.images.flip(0), split.labels, split.classes)
    else:
        arguments[what] += 1
    with pytest.raises(ValueError, match=rf"^\S+ was made from another .*{what}.*: delete it") as caught:
        fill(file, generator, split, **arguments)
    assert "\n" not in str(caught.value)
    assert file.read_bytes() == before


def test_killed_filling_goes_on_where_it_was(tmp_path, generator, split, monkeypatch, fork):
    file, note = tmp_path / "b.npy", tmp_path / "b.npy.part.json"

    def fill_slowly(_):
        restore = Bank.restore

        def slow(*arguments):
            time.sleep(0.1)
            return restore(*arguments)

        Bank.SAVED_EVERY = 0
        Bank.restore = slow
        Bank.fill(file, generator, split, 3, 0, torch.device("cpu"), bs=2)

    child = fork(SimpleNamespace(__name__="filling", get_args=list, main=fill_slowly), [])
    wait_for(lambda: note.exists() and json.loads(note.read_text())["done"] >= 6, child)
    child.kill()
    done = json.loads(note.read_text())["done"]
    assert not file.exists()
    assert 6 <= done < 30
    seen = []
    restore = Bank.restore

    def heard(generator, images, rows, *more):
        seen.extend(rows.tolist())
        return restore(generator, images, rows, *more)

    monkeypatch.setattr(Bank, "restore", heard)
    assert fill(file, generator, split)
    assert seen == list(range(done, 30))
    fill(tmp_path / "whole.npy", generator, split)
    assert np.abs(np.load(file).astype(int) - np.load(tmp_path / "whole.npy")).max() <= 1  # batches round differently


def test_memory_that_runs_out_leaves_the_same_bank(tmp_path, generator, split, monkeypatch):
    fill(tmp_path / "whole.npy", generator, split)
    restore = Bank.restore
    counts = []

    def small(generator, images, rows, *more):
        counts.append(len(rows))
        if len(rows) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return restore(generator, images, rows, *more)

    monkeypatch.setattr(Bank, "restore", small)
    fill(tmp_path / "small.npy", generator, split)
    assert counts[:4] == [8, 4, 2, 1]
    assert set(counts[3:]) == {1}
    whole = np.load(tmp_path / "whole.npy").astype(int)
    assert abs(whole - np.load(tmp_path / "small.npy")).max() <= 1


def test_a_filling_that_was_killed_at_its_very_end_is_finished(tmp_path, generator, split, monkeypatch):
    file = tmp_path / "b.npy"
    monkeypatch.setattr(Bank, "SAVED_EVERY", 0)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Bank.Path, "replace", interrupt_at(file.with_name("b.npy.part"), Bank.Path.replace))
        fill(file, generator, split)
    assert json.loads(file.with_name("b.npy.part.json").read_text())["done"] == len(split)
    assert fill(file, generator, split)
    fill(tmp_path / "whole.npy", generator, split)
    assert file.read_bytes() == (tmp_path / "whole.npy").read_bytes()


def interrupt_at(path, replace):
    """Return Path.replace, interrupted at this path."""

    def replace_others(self, target):
        if self == path:
            raise KeyboardInterrupt
        return replace(self, target)

    return replace_others


def test_full_disk_is_told_before_anything_is_made(tmp_path, generator, split, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ValueError, match=r"cannot write the bank .*No space left on device.*: free space"):
        fill(tmp_path / "b.npy", generator, split)
    assert list(tmp_path.iterdir()) == []


def test_read_refuses_what_does_not_fit(tmp_path):
    good = tmp_path / "good.npy"
    np.save(good, np.zeros((5, 2, 3, 8, 8), np.uint8))
    assert Bank.read(good, 5, 8).shape == (5, 2, 3, 8, 8)
    bad = {"float": np.zeros((5, 2, 3, 8, 8), np.float32), "flat": np.zeros((5, 3, 8, 8), np.uint8)}
    for name, array in bad.items():
        np.save(tmp_path / f"{name}.npy", array)
    (tmp_path / "text.npy").write_text("no array")
    cases = [("good", 6, 8), ("good", 5, 16), ("float", 5, 8), ("flat", 5, 8), ("text", 5, 8), ("absent", 5, 8)]
    for name, n, size in cases:
        with pytest.raises(ValueError, match=rf"^\S+{name}.npy: ") as caught:
            Bank.read(tmp_path / f"{name}.npy", n, size)
        assert "\n" not in str(caught.value)


def test_batches_are_larger_on_cuda_and_smaller_for_large_images():
    assert Bank.batch_size("cpu", 32) == Bank.batch_size("cpu", 8) == 256
    assert Bank.batch_size("cuda", 32) == Bank.batch_size(torch.device("cuda", 1), 32) == 2048
    assert Bank.batch_size("cuda", 64) == 512
    assert Bank.batch_size("cuda", 128) == 256


@pytest.mark.parametrize("storage", ["memory", "map"])
def test_take_picks_rows_and_columns(tmp_path, storage):
    images = np.random.default_rng(0).integers(0, 256, (7, 4, 3, 8, 8), dtype=np.uint8)
    np.save(tmp_path / "b.npy", images)
    bank = Bank.Bank(Bank.read(tmp_path / "b.npy", 7, 8), "cpu", storage == "memory")
    assert (bank.k, len(bank)) == (4, 7)
    assert isinstance(bank.images, torch.Tensor) == (storage == "memory")
    rows, columns = torch.tensor([6, 0, 6]), torch.tensor([[0, 3], [1, 2], [2, 0]])
    taken = bank.take(rows, columns)
    for i in range(3):
        for j in range(2):
            assert (taken[i, j].numpy() == images[rows[i], columns[i, j]]).all()


def test_a_bank_is_copied_to_the_device_in_parts(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (7, 2, 3, 8, 8), dtype=np.uint8)
    np.save(tmp_path / "b.npy", images)
    for rows_at_once in (3, 7, 100):
        copy = Bank._copied(Bank.read(tmp_path / "b.npy", 7, 8), "cpu", rows_at_once)
        assert (copy.numpy() == images).all()


def test_auto_storage_looks_at_what_is_free(monkeypatch):
    for free, held in ((200, True), (199, False)):
        monkeypatch.setattr(Devices, "free_memory", lambda device, free=free: free)
        assert Devices.is_held("auto", 100, "cpu") == held
    assert Devices.is_held("memory", 100, "cpu")
    assert not Devices.is_held("map", 1, "cpu")
