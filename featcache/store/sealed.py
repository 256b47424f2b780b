"""JSON files that notice when any of their bytes changes."""

import json
import zlib


def seal(content):
    """Return the bytes of a dict as JSON, with a last field `crc32` over the JSON of the others."""
    body = json.dumps(content, indent=1)
    return (json.dumps(content | {"crc32": zlib.crc32(body.encode())}, indent=1) + "\n").encode()


def unseal(data):
    """Return the dict of sealed bytes. Raises ValueError unless they are just what `seal` made."""
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
