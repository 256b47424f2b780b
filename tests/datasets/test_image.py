"""Every kind of image file that people have: decoded as torchvision does, or named."""

import io
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import picture
from PIL import Image
from torchvision.datasets.folder import pil_loader

from featcache.datasets.image import measure_image, open_image
from featcache.errors import BadInput


def rotated(path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(1).save(path, exif=exif)


WRITERS = {
    "rgb.jpg": lambda path: picture(1).save(path),
    "cmyk.jpg": lambda path: picture(1).convert("CMYK").save(path),
    "grey.jpg": lambda path: picture(1).convert("L").save(path),
    "progressive.jpg": lambda path: picture(1).save(path, progressive=True),
    "rotated.jpg": rotated,
    "palette.png": lambda path: picture(1).convert("P").save(path),
    "rgba.png": lambda path: picture(1).convert("RGBA").save(path),
    "la.png": lambda path: picture(1).convert("LA").save(path),
    "bits.png": lambda path: picture(1).convert("1").save(path),
    "lab.tif": lambda path: picture(1).convert("YCbCr").save(path),
    "animated.gif": lambda path: picture(1).save(path, save_all=True, append_images=[picture(2)]),
    "a.webp": lambda path: picture(1).save(path),
    "a.bmp": lambda path: picture(1).save(path),
    "misnamed.jpg": lambda path: picture(1).save(path, "PNG"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_pixels_are_those_of_torchvision(tmp_path, name):
    path = tmp_path / name
    WRITERS[name](path)
    image = open_image(path)
    assert image.mode == "RGB" and np.array_equal(image, pil_loader(path))
    assert image.size == (40, 30), "an EXIF rotation is not applied: boxes are in the file's own pixels"
    assert measure_image(path) == (path.stat().st_size, 30, 40)


def test_a_palette_with_transparency_gives_its_colours(tmp_path):
    image = picture(1).convert("P", palette=Image.Palette.ADAPTIVE)
    image.save(tmp_path / "a.png", transparency=bytes(range(256)))
    with Image.open(tmp_path / "a.png") as again:
        assert again.mode == "P" and isinstance(again.info["transparency"], bytes)
    assert np.array_equal(open_image(tmp_path / "a.png"), image.convert("RGB"))


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bits_keep_their_high_byte(tmp_path, suffix):
    wide = np.linspace(0, 65535, 1200).astype(np.uint16).reshape(30, 40)
    Image.fromarray(wide).save(tmp_path / f"a.{suffix}")
    assert np.array_equal(np.asarray(open_image(tmp_path / f"a.{suffix}"))[..., 0], wide >> 8)


def test_16_bit_colours_keep_their_high_byte(tmp_path):
    """PIL cannot write them: a PNG by hand."""
    import zlib

    wide = np.linspace(0, 65535, 30 * 40 * 3).astype(">u2").reshape(30, 40, 3)
    rows = b"".join(b"\0" + row.tobytes() for row in wide)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 40, 30, 16, 2, 0, 0, 0))
    parts = b"\x89PNG\r\n\x1a\n", header, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(b"".join(parts))
    assert np.array_equal(open_image(tmp_path / "a.png"), (wide >> 8).astype(np.uint8))


def truncated(path):
    picture(1).save(path)
    path.write_bytes(path.read_bytes()[:700])


def bomb(path):
    """A PNG header that promises 40,000 x 40,000 pixels."""
    picture(1).save(path, "PNG")
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack(">II", 40_000, 40_000)
    import zlib

    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.write_bytes(b""), "the file is empty"),
        (lambda path: path.write_text("<html>404</html>"), "not an image"),
        (truncated, "truncated"),
        (bomb, "decompression bomb"),
        (lambda path: Image.fromarray(np.ones((9, 9), np.float32)).save(path, "TIFF"), "floating-point"),
        (lambda path: Image.fromarray(np.full((9, 9), 70_000, np.int32)).save(path, "TIFF"), "more than 16 bits"),
        (lambda path: path.mkdir(), "Is a directory"),
        (lambda path: None, "image not found"),
    ],
)
def test_what_is_no_image_is_named(tmp_path, damage, reason):
    path = tmp_path / "a.jpg"
    damage(path)
    with pytest.raises(BadInput, match=reason) as caught:
        open_image(path)
    assert str(path) in caught.value.message and "\n" not in caught.value.message


@settings(max_examples=150, deadline=None)
@given(choice=st.data(), kind=st.sampled_from(["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"]))
def test_any_damage_is_bad_input_or_pixels(tmp_path_factory, choice, kind):
    file = io.BytesIO()
    picture(1).save(file, kind)
    content = bytearray(file.getvalue())
    for _ in range(choice.draw(st.integers(1, 4))):
        content[choice.draw(st.integers(0, len(content) - 1))] = choice.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / "a"
    cut = choice.draw(st.none() | st.integers(0, len(content)))
    path.write_bytes(content[:cut])
    for read in (open_image, measure_image):
        try:
            read(path)
        except BadInput as error:
            assert str(path) in error.message
