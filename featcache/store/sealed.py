"""JSON files that notice when any of their bytes changes."""

import json
import zlib
from collections.abc import Mapping
from typing import Any


def seal(content: Mapping[str, object]) -> bytes:
    """Return a mapping as the bytes of a JSON object whose last field `crc32` is that of the JSON without it."""
    body = json.dumps(content, indent=1)
    return (json.dumps({**content, "crc32": zlib.crc32(body.encode())}, indent=1) + "\n").encode()


def unseal(data: bytes) -> dict[str, Any]:
    """Return the content of sealed bytes. Raises ValueError unless they are exactly what `seal` makes of it."""
    try:
        content = json.loads(data)
        if not isinstance(content, dict) or "crc32" not in content:
            raise ValueError("no JSON object with a checksum")
        del content["crc32"]
        if seal(content) != data:
            raise ValueError("its checksum does not fit its content")
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None
    return content
