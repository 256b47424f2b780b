"""From the image source of a record to its pixels."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, UnidentifiedImageError

from featcache.datasets.sources import ImageSource, open_source
from featcache.digest import image_digest
from featcache.errors import BadInput

# The formats that docs/datasets.md lists. PIL knows others, and hands some of them to other programs, such as
# Ghostscript.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")


def open_image(source: ImageSource, reduce: int = 1) -> Image.Image:
    """Decode one image to a PIL image in mode RGB. See read_image."""
    return read_image(source, reduce)[0]


def read_image(source: ImageSource, reduce: int = 1) -> tuple[Image.Image, bytes]:
    """Decode one image: (a PIL image in mode RGB, as torchvision's ImageFolder decodes it, and its digest).

    source: of a Record. reduce: 2, 4 or 8 decodes a JPEG at that part of its sides, rounded up, in the
    frequency domain, which is quicker and not exact; other formats are decoded whole. The high byte of
    16-bit pixels is kept, where PIL would clip them to white; transparency is dropped; an EXIF rotation
    is not applied, since boxes are in the file's own pixels. The digest, by which equal images are
    recognised, is the first 16 bytes of the sha256 of the encoded file.
    Raises BadInput, naming the source, when it is no readable image.
    """
    with _naming(source), open_source(source) as file, Image.open(file, formats=FORMATS) as image:
        if reduce > 1:
            image.draft("RGB", (image.width // reduce, image.height // reduce))
        image.load()
        # The file is in memory now, so that reading it again costs little.
        file.seek(0)
        digest = image_digest(file.read())
        # A conversion would copy an image that is RGB already, which takes a third of the time for large images.
        return image if image.mode == "RGB" else _to_rgb(image), digest


def measure_image(source: ImageSource) -> tuple[int, int, int]:
    """Return (length in bytes, height, width) of an image. Only the header of a file is read.

    Raises BadInput, naming the source, when that is not the header of an image.
    """
    with _naming(source), open_source(source) as file, Image.open(file, formats=FORMATS) as image:
        width, height = image.size
        return file.seek(0, os.SEEK_END), height, width


@contextmanager
def _naming(source: ImageSource) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise BadInput(f"image not found: {source}") from None
    except UnidentifiedImageError:
        with open_source(source) as file:
            reason = f"not an image of a known kind ({', '.join(FORMATS)})" if file.read(1) else "the file is empty"
        raise BadInput(f"unreadable image {source}: {reason}") from None
    # PIL's decoders raise anything from OSError to struct.error on a damaged file.
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            # The image is not to blame.
            raise
        raise BadInput(f"unreadable image {source}: {error or type(error).__name__}") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        wide = np.asarray(image)
        if wide.min() < 0 or wide.max() > 65535:
            raise ValueError("its pixels have more than 16 bits")
        return Image.fromarray((wide >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers")
    if image.mode == "P" and "transparency" in image.info:
        # The pixels are those of a direct conversion, but PIL does not warn.
        image = image.convert("RGBA")
    return image.convert("RGB")
