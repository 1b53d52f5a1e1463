"""What several test files use: image files, folders of them, and the check of a user's error."""

import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from Images import Shapes
from Utils import UserError


def save(path, pixels, **options):
    """Save an array or an image, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(path, **options)
    return path


def save_shapes(folder, each, size=32, seed=0, classes=Shapes.CLASSES):
    """Save `each` images of every class as FOLDER/CLASS/INDEX.png; return the folder."""
    labels = torch.arange(len(classes)).repeat_interleave(each)
    images = Shapes.draw(labels, size, torch.Generator().manual_seed(seed))
    for index, (image, label) in enumerate(zip(images, labels.tolist())):
        save(Path(folder) / classes[label] / f"{index:04}.png", image.permute(1, 2, 0).numpy())
    return Path(folder)


def real_file(name):
    """Return the path of a file in the folder that ISICLE_REAL_DATA names; skip the test where there is none."""
    folder = os.environ.get("ISICLE_REAL_DATA")
    if not folder:
        pytest.skip("needs real data: set ISICLE_REAL_DATA to a folder that holds data/ and weights/")
    path = Path(folder) / name
    if not path.exists():
        pytest.skip(f"needs {path}")
    return path


def one_line(function, *parts):
    """Return the message of the UserError that the call raises, a single line with these parts."""
    with pytest.raises(UserError) as caught:
        function()
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)
    return str(caught.value)


def refuses(function, *parts):
    """Return the message of the ValueError that a call into CamNet raises, a single line with these parts."""
    with pytest.raises(ValueError) as caught:
        function()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    return message
