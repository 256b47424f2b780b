"""safetensors files whose metadata hold a description and a checksum over the whole file."""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from featcache.atomic import replacing

KEY = "featcache"
# The beginning of the description as the bytes of the file have it: the metadata is JSON within JSON.
_MARK, _NONE = b'"featcache":"{\\"crc32\\":\\"', b"00000000"
_PIECE = 4 << 20


def write_sealed(path: str | Path, tensors: dict[str, Tensor], content: Mapping[str, Any]) -> None:
    """Write {name: tensor} and a description, a dict of JSON values, whole or not at all.

    The description is the only metadata, as JSON under `featcache`: safetensors does not keep the order of several
    keys, and equal files should have equal bytes. Its first field, `crc32`, has 8 hex digits: the crc32 of the file
    with zeros in their place.
    """
    text = json.dumps({"crc32": _NONE.decode(), **content}, separators=(",", ":"))
    data = safetensors.torch.save(tensors, metadata={KEY: text})
    at = data.index(_MARK) + len(_MARK)
    with replacing(path) as file:
        for part in (data[:at], b"%08x" % zlib.crc32(data), memoryview(data)[at + len(_NONE) :]):
            file.write(part)


def read_content(path: str | Path) -> dict[str, Any]:
    """Return the description of a file, with its `crc32` if it has one. Tensors are not read, and nothing is checked.

    Raises ValueError, which says why, if it cannot be read.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            content = json.loads(file.metadata()[KEY])
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None
    except (safetensors.SafetensorError, OSError, KeyError, TypeError) as error:
        raise ValueError(f"it is no file of tensors with a description ({error})") from None
    if not isinstance(content, dict):
        raise ValueError("its description is no JSON object")
    return content


def unseal(path: str | Path) -> tuple[dict[str, Any], bool]:
    """Check every byte of a file. Returns its description without the `crc32`, and whether it had one.

    Raises ValueError, which says why, unless the bytes are those that were written. A file without a checksum, as
    earlier versions wrote them, cannot be checked.
    """
    content = read_content(path)
    if "crc32" not in content:
        return content, False
    if content.pop("crc32") != f"{_crc32(path):08x}":
        raise ValueError("its checksum does not fit its content")
    return content, True


def _crc32(path: str | Path) -> int:
    """Return the crc32 of a file with zeros in place of the one that it holds."""
    crc = 0
    with open(path, "rb") as file:
        for number, piece in enumerate(iter(lambda: file.read(_PIECE), b"")):
            # It stands at the beginning of the file.
            if number == 0 and (at := piece.find(_MARK)) >= 0:
                at += len(_MARK)
                piece = piece[:at] + _NONE + piece[at + len(_NONE) :]
            crc = zlib.crc32(piece, crc)
    return crc
