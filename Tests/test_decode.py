"""Decoding: every kind of image, bad and hostile files, and names that are safe to print."""

import runpy
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import one_line, real_file, save
from PIL import EpsImagePlugin, Image

from Images import Decode
from Images.Decode import FORMATS, SUFFIXES, decode
from Images.Folders import IGNORED, Options, list_folder, load_folder
from Utils import shown

ROOT = Path(__file__).parents[1]


def pixel(path, size=4):
    """The color of the top left pixel."""
    return decode(path, size)[:, 0, 0].tolist()


# decode


@pytest.mark.parametrize("size", [16, 7, 31])
@pytest.mark.parametrize(("width", "height"), [(16, 16), (40, 16), (9, 200), (1, 1), (3, 500)])
def test_any_shape_becomes_a_square(tmp_path, width, height, size):
    path = save(tmp_path / "a.png", np.full((height, width, 3), (10, 20, 30), np.uint8))
    image = decode(path, size)
    assert image.dtype == torch.uint8 and image.shape == (3, size, size)
    assert (image == torch.tensor([10, 20, 30], dtype=torch.uint8)[:, None, None]).all()


def test_an_image_of_the_size_is_untouched(tmp_path):
    pixels = np.random.default_rng(1).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    assert (decode(save(tmp_path / "a.png", pixels), 8).numpy() == pixels.transpose(2, 0, 1)).all()


def test_the_center_is_shown(tmp_path):
    pixels = np.zeros((4, 12, 3), np.uint8)
    pixels[:, 4:8] = 200
    assert (decode(save(tmp_path / "a.png", pixels), 4) == 200).all()


def test_gray_and_palette(tmp_path):
    assert pixel(save(tmp_path / "l.png", np.full((4, 4), 77, np.uint8))) == [77] * 3
    bits = Image.new("1", (4, 4), 1)
    assert pixel(save(tmp_path / "1.png", bits)) == [255] * 3
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    assert pixel(save(tmp_path / "p.png", palette)) == [10, 200, 30]
    assert pixel(save(tmp_path / "clear.png", palette, transparency=1)) == [255] * 3
    assert pixel(save(tmp_path / "half.png", palette, transparency=bytes([255, 128]))) == [132, 227, 142]


def test_transparent_parts_are_white(tmp_path):
    assert pixel(save(tmp_path / "rgba.png", Image.new("RGBA", (4, 4), (10, 20, 30, 0)))) == [255] * 3
    assert pixel(save(tmp_path / "solid.png", Image.new("RGBA", (4, 4), (10, 20, 30, 255)))) == [10, 20, 30]
    assert pixel(save(tmp_path / "la.png", Image.new("LA", (4, 4), (0, 51)))) == [204] * 3
    assert pixel(save(tmp_path / "key.png", Image.new("RGB", (4, 4), (1, 2, 3)), transparency=(1, 2, 3))) == [255] * 3


def test_cmyk(tmp_path):
    path = save(tmp_path / "a.jpg", Image.new("CMYK", (16, 16), (0, 255, 255, 0)), quality=95)
    assert np.allclose(pixel(path, 16), [255, 0, 0], atol=4)


@pytest.mark.parametrize(("value", "gray"), [(0, 0), (256, 1), (32896, 128), (40000, 156), (65535, 255)])
def test_16_bits_are_scaled(tmp_path, value, gray):
    values = np.full((4, 4), value, np.uint16)
    assert Image.open(save(tmp_path / "a.png", values)).mode == "I;16"
    assert pixel(tmp_path / "a.png") == [gray] * 3
    assert pixel(save(tmp_path / "a.tif", values)) == [gray] * 3
    (tmp_path / "a.pgm").write_bytes(b"P5 4 4 65535\n" + values.astype(">u2").tobytes())
    assert pixel(tmp_path / "a.pgm") == [gray] * 3


def test_a_transparent_value_of_16_bits(tmp_path):
    path = save(tmp_path / "a.png", np.full((4, 4), 500, np.uint16), transparency=500)
    assert pixel(path) == [255] * 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(tmp_path, orientation):
    stored = np.zeros((16, 32, 3), np.uint8)
    stored[:8, :, 0] = stored[:, :16, 1] = 240
    exif = Image.Exif()
    exif[274] = orientation
    path = save(tmp_path / "a.jpg", stored, exif=exif, quality=95, subsampling=0)
    upright = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.transpose(1, 0, 2),
        6: np.rot90(stored, -1),
        7: np.rot90(stored, 2).transpose(1, 0, 2),
        8: np.rot90(stored),
    }[orientation]
    expected = decode(save(tmp_path / "upright.png", np.ascontiguousarray(upright)), 16)
    assert (decode(path, 16).int() - expected.int()).abs().max() < 12


def test_a_turned_tiff_is_turned_once(tmp_path):
    stored = np.zeros((4, 4, 3), np.uint8)
    stored[:2] = 255
    path = save(tmp_path / "a.tif", stored, tiffinfo={274: 6})
    assert (decode(path, 4).numpy() == np.rot90(stored, -1).transpose(2, 0, 1)).all()


@pytest.mark.parametrize("kind", ["gif", "png", "webp", "tiff"])
def test_first_frame(tmp_path, kind):
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    path = tmp_path / "a.png"  # the content counts
    options = {"lossless": True} if kind == "webp" else {}
    frames[0].save(path, format=kind, save_all=True, append_images=frames[1:], **options)
    assert pixel(path) == [255, 0, 0]


def test_webp(tmp_path):
    assert pixel(save(tmp_path / "a.webp", Image.new("RGBA", (4, 4), (9, 8, 7, 255)), lossless=True)) == [9, 8, 7]


# bad files


def bad_files(folder):
    """{name: part of the reason} of files that cannot be decoded, made in the folder."""
    noise = np.random.default_rng(2).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for name in ("truncated.png", "truncated.jpg"):
        path = save(folder / name, noise)
        path.write_bytes(path.read_bytes()[:1500])
    broken = save(folder / "broken.png", noise)
    data = bytearray(broken.read_bytes())
    data[200:4000] = bytes(3800)
    broken.write_bytes(data)
    (folder / "empty.png").touch()
    (folder / "text.jpg").write_text("not an image")
    (folder / "folder.png").symlink_to(folder / "nowhere")
    save(folder / "float.tif", np.ones((8, 8), np.float32))
    save(folder / "wide.tif", np.full((8, 8), 70000, np.int32))
    save(folder / "narrow.tif", np.full((8, 8), 200, np.int32))
    return {
        "truncated.png": "truncated",
        "truncated.jpg": "truncated",
        "broken.png": "",
        "empty.png": "empty file",
        "text.jpg": "not an image",
        "folder.png": "No such file",
        "float.tif": "floating-point",
        "wide.tif": "32-bit",
        "narrow.tif": "32-bit",  # as 16 bits it would be black
    }


def test_bad_files(tmp_path):
    for name, reason in bad_files(tmp_path).items():
        one_line(lambda name=name: decode(tmp_path / name, 8), str(tmp_path / name), reason, "repair", "--skip_bad")


def test_decompression_bomb_and_no_permission(tmp_path, monkeypatch):
    path = save(tmp_path / "a.png", np.zeros((8, 8, 3), np.uint8))
    with monkeypatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
        one_line(lambda: decode(path, 8), str(path), "decompression bomb")

    def refuse(path, formats):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(Image, "open", refuse)
    one_line(lambda: decode(path, 8), str(path), "Permission denied")


def test_running_out_of_handles_is_no_bad_file(tmp_path, monkeypatch):
    def refuse(path, formats):
        raise OSError(24, "Too many open files", path)

    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(OSError, match="Too many"):
        decode(tmp_path / "a.png", 8)


# formats


def test_the_endings_are_those_that_pillow_registers_for_the_formats():
    registered = {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS or name == "MPO"}
    assert registered - {".pfm"} == SUFFIXES  # .pfm: floating-point pixels, which are refused


def test_the_script_that_inverts_trees_lists_the_same_files():
    script = runpy.run_path(str(ROOT / "Data/InvertDirStructure.py"))
    assert set(script["SUFFIXES"]) == SUFFIXES and set(script["IGNORED"]) == set(IGNORED)


def test_every_ending_is_listed_and_decoded(tmp_path):
    for suffix in SUFFIXES:
        save(tmp_path / f"a/0{suffix}", Image.new("RGB", (16, 16), (200, 200, 200)))
        save(tmp_path / f"a/1{suffix.upper()}", Image.new("RGB", (16, 16), (200, 200, 200)))
    listing = list_folder(tmp_path)
    assert len(listing.paths) == 2 * len(SUFFIXES) and not listing.left_out
    for path in listing.paths:
        assert all(abs(value - 200) < 6 for value in pixel(path, 16)), path


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_other_formats_are_refused_whatever_the_file_is_called(tmp_path, monkeypatch, suffix):
    def run_ghostscript(*_, **__):
        raise AssertionError("Ghostscript was started")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", run_ghostscript)
    path = tmp_path / f"a{suffix}"
    for name in ("BLP", "DDS", "DIB", "EPS", "ICO", "IM", "MSP", "PCX", "QOI", "SGI", "TGA", "XBM"):
        mode = {"BLP": "P", "MSP": "1", "XBM": "1"}.get(name, "RGB")
        Image.new(mode, (16, 16)).save(path, name)
        one_line(lambda: decode(path, 8), str(path), "not an image that can be read", "JPEG")


# metadata


def tiff_block(*entries):
    """The EXIF block that holds these directory entries."""
    count = struct.pack("<H", len(entries))
    return b"II*\0" + struct.pack("<I", 8) + count + b"".join(entries) + struct.pack("<I", 0)


def entry(kind, count, value, tag=274):
    """A directory entry of the orientation."""
    return struct.pack("<HHI", tag, kind, count) + value.ljust(4, b"\0")


TURNED = tiff_block(entry(3, 1, b"\6\0"))
BLOCKS = {
    "blank": b"",
    "garbage": b"hello world, no tiff at all",
    "no header": TURNED[8:],
    "cut": TURNED[:14],
    "offset": b"II*\0" + struct.pack("<I", 99999),
    "text": tiff_block(entry(2, 2, b"6\0")),
    "byte": tiff_block(entry(7, 1, b"\6")),
    "fraction": tiff_block(entry(5, 1, struct.pack("<I", 26))) + struct.pack("<II", 6, 1),
    "unknown type": tiff_block(entry(99, 1, b"\6")),
    "zero": tiff_block(entry(3, 1, b"\0")),
    "nine": tiff_block(entry(3, 1, b"\11")),
}


@pytest.mark.parametrize("kind", ["png", "webp", "jpg"])
def test_an_unreadable_exif_block_leaves_the_image_as_it_is(tmp_path, kind):
    random = np.random.default_rng(0)
    image = Image.fromarray(random.integers(0, 256, (24, 32, 3), dtype=np.uint8))
    options = {"lossless": True} if kind == "webp" else {}
    expected = decode(save(tmp_path / f"bare.{kind}", image, **options), 24)
    for name, block in BLOCKS.items():
        path = save(tmp_path / f"{name}.{kind}", image, exif=b"Exif\0\0" + block, **options)
        assert torch.equal(decode(path, 24), expected), name
    path = save(tmp_path / f"turned.{kind}", image, exif=b"Exif\0\0" + TURNED, **options)
    assert torch.equal(decode(path, 24), expected.rot90(-1, (1, 2)))


def test_12_bits_are_scaled(tmp_path):
    values = [(256, 1, 4), (257, 1, 2), (258, 1, 12), (259, 1, 1), (262, 1, 1), (273, 1, 0), (277, 1, 1), (278, 1, 2)]
    start = 8 + 2 + 12 * (len(values) + 1) + 4
    fields = b"".join(struct.pack("<HHII", tag, 3, 1, start if tag == 273 else value) for tag, _, value in values)
    fields += struct.pack("<HHII", 279, 3, 1, 12)
    data = bytes.fromhex("FFFFFF 800800 FFFFFF 800800")  # two pixels in three bytes: twice 4095, twice 2048, ...
    header = b"II*\0" + struct.pack("<IH", 8, len(values) + 1)
    (tmp_path / "a.tif").write_bytes(header + fields + struct.pack("<I", 0) + data)
    with Image.open(tmp_path / "a.tif") as image:
        assert image.mode == "I;16"
    assert decode(tmp_path / "a.tif", 2).shape == (3, 2, 2)
    with Image.open(tmp_path / "a.tif") as image:
        assert Decode._to_rgb(image).getpixel((0, 0)) == (255, 255, 255)
        assert Decode._to_rgb(image).getpixel((2, 0)) == (128, 128, 128)


def test_pillow_warns_of_nothing(tmp_path):
    path = save(tmp_path / "a.jpg", np.zeros((8, 8, 3), np.uint8), exif=b"Exif\0\0" + BLOCKS["cut"])
    code = f"from Images.Decode import decode; decode({str(path)!r}, 8)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == ""


# names


SHOWN = {
    "a b/é 猫": "a b/é 猫",
    "two\nlines\r\t": r"two\nlines\r\t",
    "\x1b]0;title\x07\x1b[2J": r"\x1b]0;title\x07\x1b[2J",
    "\x9b31m\x7f\x00": r"\x9b31m\x7f\x00",
    "gnp.\u202ecod\u2066": r"gnp.\u202ecod\u2066",
    "line\u2028paragraph\u2029\x85": r"line\u2028paragraph\u2029\x85",
    "caf\udce9": r"caf\xe9",
    b"caf\xe9.png": r"caf\xe9.png",
    Path("a\n.png"): r"a\n.png",
}


@pytest.mark.parametrize("name", SHOWN)
def test_shown(name):
    assert shown(name) == SHOWN[name] and shown(SHOWN[name]) == SHOWN[name]
    assert shown(name).isprintable() and shown(name).encode()


def test_the_name_of_a_bad_file_is_escaped(tmp_path):
    path = tmp_path / "a\x1b[2J\nb.png"
    path.write_bytes(b"no")
    assert r"a\x1b[2J\nb.png: not an image" in one_line(lambda: decode(path, 8))


# photographs


def test_photographs(tmp_path):
    from torchvision import transforms
    from torchvision.datasets.folder import default_loader

    with tarfile.open(real_file("data/photos-9.tar")) as tar:
        tar.extractall(tmp_path, filter="data")
    folder = tmp_path / "imagenet-mini-18/train"
    split = load_folder(folder, 64, Options(n_workers=2, data_dir=tmp_path))
    assert split.images.shape == (294, 3, 64, 64) and len(split.classes) == 9
    show = transforms.Compose([transforms.Resize(64), transforms.CenterCrop(64), transforms.PILToTensor()])
    theirs = torch.stack([show(default_loader(path)) for path in list_folder(folder).paths])
    distances = (split.images.float() - theirs.float()).abs().mean((1, 2, 3))
    assert distances.mean() < 0.2 and distances.max() < 2
