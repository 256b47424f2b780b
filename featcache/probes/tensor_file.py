"""Files of tensors that notice when any of their bytes changes: safetensors whose metadata hold a checksum."""

import json
import zlib
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import safetensors
import safetensors.torch

# In the header, right before the checksum: eight hex digits, which count as zeros in it.
MARK = b'{"featcache":"{\\"crc32\\":\\"'
NOTHING = b"00000000"
# What reading a damaged file raises.
DAMAGE = (safetensors.SafetensorError, OSError, AttributeError, KeyError, TypeError, ValueError, RecursionError)


def pack_tensors(tensors, content):
    """Return the bytes of a file that holds {name: tensor} and, in its metadata, a dict of JSON values."""
    # One metadata key: safetensors does not keep the order of several, and the bytes should not vary.
    text = json.dumps({"crc32": NOTHING.decode()} | content, separators=(",", ":"))
    data = bytearray(safetensors.torch.save(tensors, metadata={"featcache": text}))
    at = data.index(MARK) + len(MARK)
    data[at : at + len(NOTHING)] = b"%08x" % zlib.crc32(data)
    return bytes(data)


@contextmanager
def open_tensors(path):
    """Yield the safetensors file at a path, and the dict in its metadata.

    All its bytes are compared with its checksum, once in a process; files of older versions have none. What is damaged
    raises one of DAMAGE.
    """
    status = Path(path).stat()
    is_sealed(path, status.st_mtime_ns, status.st_size)
    with safetensors.safe_open(path, "pt") as file:
        content = json.loads(file.metadata()["featcache"])
        content.pop("crc32", None)
        yield file, content


@lru_cache(maxsize=1 << 14)
def is_sealed(path, modified, size):
    """Whether a file has a checksum. Raises ValueError if it does not fit, OSError if there is no such file.

    modified, size: of the file, so that it is read again when it was written anew.
    """
    data = Path(path).read_bytes()
    at = data.find(MARK, 0, 1 << 10) + len(MARK)
    if at < len(MARK):
        return False
    rest = memoryview(data)
    crc = zlib.crc32(rest[at + len(NOTHING) :], zlib.crc32(NOTHING, zlib.crc32(rest[:at])))
    if b"%08x" % crc != data[at : at + len(NOTHING)]:
        raise ValueError("its bytes do not fit its checksum")
    return True
