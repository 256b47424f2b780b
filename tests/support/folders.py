"""Folders that tests compare, and those of earlier versions that lie in tests/data."""

import hashlib
import zipfile
from pathlib import Path

SUPPORT = Path(__file__).parent
DATA = SUPPORT.parent / "data"
CHECKOUT = SUPPORT.parent.parent


def tree_hash(root):
    """Hash of all paths and bytes below a folder."""
    digest = hashlib.sha256()
    for path in sorted(Path(root).rglob("*")):
        digest.update(str(path.relative_to(root)).encode())
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()


def unpack(name, folder):
    """Unpack tests/data/NAME.zip into a folder."""
    with zipfile.ZipFile(DATA / f"{name}.zip") as archive:
        archive.extractall(folder)
