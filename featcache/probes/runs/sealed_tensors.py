"""safetensors files that notice when any of their bytes changes, and say in their metadata what they are of."""

import json
import zlib

import safetensors
import safetensors.torch

from featcache.atomic import replacing

KEY = "featcache"
# As it stands in the file, where the metadata is JSON within JSON.
_MARK, _NONE = b'"featcache":"{\\"crc32\\":\\"', b"00000000"
_PIECE = 4 << 20


def write_sealed(path, tensors, content):
    """Write {name: tensor} and a dict of JSON values, whole or not at all.

    The dict is the only metadata, as JSON under `featcache`: safetensors does not keep the order of several keys, and
    the bytes should not vary. Its first field is a `crc32`, 8 hex digits, over the file with zeros in their place.
    """
    text = json.dumps({"crc32": _NONE.decode()} | content, separators=(",", ":"))
    data = safetensors.torch.save(tensors, metadata={KEY: text})
    at = data.index(_MARK) + len(_MARK)
    with replacing(path) as file:
        for part in (data[:at], b"%08x" % zlib.crc32(data), memoryview(data)[at + len(_NONE) :]):
            file.write(part)


def read_content(path):
    """Return the dict of a file, its `crc32` included if it has one, without a look at the tensors.

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


def unseal(path):
    """Check every byte of a file. Returns its dict without the `crc32`, and whether it had one.

    Raises ValueError, which says why, unless the bytes are those that were written; of a file without a checksum, as
    earlier versions wrote them, nothing is known.
    """
    content = read_content(path)
    if "crc32" not in content:
        return content, False
    if content.pop("crc32") != f"{_crc32(path):08x}":
        raise ValueError("its checksum does not fit its content")
    return content, True


def _crc32(path):
    """The crc32 of a file whose own one counts as zeros."""
    crc, at = 0, None
    with open(path, "rb") as file:
        while piece := file.read(_PIECE):
            if at is None and (at := piece.find(_MARK)) >= 0:
                at += len(_MARK)
                piece = piece[:at] + _NONE + piece[at + len(_NONE) :]
            crc = zlib.crc32(piece, crc)
    return crc
