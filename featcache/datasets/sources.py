"""Where the bytes of an image come from, if not from a file of its own."""

import io
import os
from dataclasses import dataclass
from typing import IO, Any, Protocol

import numpy as np


class Source(Protocol):
    """Where an image is. str() names it in messages. A source is small and pickles, so that workers share nothing."""

    def open(self) -> IO[bytes]:
        """Return a binary file of the encoded image."""


ImageSource = str | os.PathLike[str] | Source


def open_source(source: ImageSource) -> IO[bytes]:
    """Open a Record's image, a path or a source, as a binary file."""
    return open(source, "rb") if isinstance(source, (str, os.PathLike)) else source.open()


@dataclass(frozen=True, slots=True)
class TarMember:
    """A file inside an uncompressed tar, found by its offset."""

    archive: str
    name: str
    offset: int
    length: int

    def __str__(self) -> str:
        return f"{self.archive}:{self.name}"

    def open(self) -> IO[bytes]:
        """Open a file that reads only what is asked for, so that measuring an image reads only its header."""
        return io.BufferedReader(_Slice(self.archive, self.offset, self.length), 16384)


class _Slice(io.RawIOBase):
    def __init__(self, path: str, start: int, length: int) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115
        self._start, self._length, self._at = start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(0, offset + (0, self._at, self._length)[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._length - self._at))
        self._file.seek(self._start + self._at)
        data = self._file.read(count)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


@dataclass(frozen=True, eq=False, slots=True)
class Pixels:
    """An image that lies decoded in an array. name: for messages. array: uint8 [3, H, W]."""

    name: str
    array: np.ndarray

    def __str__(self) -> str:
        return self.name

    def open(self) -> IO[bytes]:
        """Open the pixels as a PPM file."""
        _, height, width = self.array.shape
        return io.BytesIO(b"P6 %d %d 255\n" % (width, height) + self.array.transpose(1, 2, 0).tobytes())
