"""Where the bytes of an image come from, if not from a file of its own.

A source has open(), which yields a binary file of the encoded image, and a str() for messages. It is
small and pickles, so that worker processes share nothing.
"""

import io
import os
from dataclasses import dataclass

import numpy as np


def open_source(source):
    """Open a Record's image, a path or a source, as a binary file."""
    return open(source, "rb") if isinstance(source, (str, os.PathLike)) else source.open()


@dataclass(frozen=True, slots=True)
class TarMember:
    """A file inside an uncompressed tar, found by its offset."""

    archive: str
    name: str
    offset: int
    length: int

    def __str__(self):
        return f"{self.archive}:{self.name}"

    def open(self):
        """A file that reads only what is asked for: a header costs no more than a header."""
        return io.BufferedReader(_Slice(self.archive, self.offset, self.length), 16384)


class _Slice(io.RawIOBase):
    def __init__(self, path, start, length):
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115
        self._start, self._length, self._at = start, length, 0

    def readable(self):
        return True

    def seekable(self):
        return True

    def seek(self, offset, whence=os.SEEK_SET):
        self._at = max(0, offset + (0, self._at, self._length)[whence])
        return self._at

    def readinto(self, buffer):
        count = max(0, min(len(buffer), self._length - self._at))
        self._file.seek(self._start + self._at)
        data = self._file.read(count)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self):
        self._file.close()
        super().close()


@dataclass(frozen=True, eq=False, slots=True)
class Pixels:
    """An image that lies decoded in an array. name: for messages. array: uint8 [3, H, W]."""

    name: str
    array: np.ndarray

    def __str__(self):
        return self.name

    def open(self):
        """The pixels as a PPM file."""
        _, height, width = self.array.shape
        return io.BytesIO(b"P6 %d %d 255\n" % (width, height) + self.array.transpose(1, 2, 0).tobytes())
