"""WebDataset: images and labels as neighbours in tar shards, read with the standard library."""

import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from featcache.datasets.labels import group_splits, index_labels
from featcache.datasets.layout import (
    IMAGE_SUFFIXES,
    folders_in,
    parse_json,
    require_folder,
    wrong_layout,
)
from featcache.datasets.record import Dataset, Record
from featcache.datasets.sources import TarMember
from featcache.errors import BadInput, shown

TREE = """
SPLIT/*.tar            (or SPLIT-0000.tar ... directly in ROOT)
  KEY.jpg, KEY.cls     (or KEY.json with a "label", or KEY.txt)
"""
# At the end of a shard's name, such as -0003 or -0003-of-0100.
NUMBER = re.compile(r"[-_.]?\d+([-_]of[-_]\d+)?$")
LABEL_SUFFIXES = ("cls", "json", "txt")


def read_webdataset(root: Path, splits: Sequence[str] | None = None) -> Dataset:
    """Read WebDataset shards. The image of a sample stays in its shard and is read by its offset.

    A sample's files share the path up to the first dot of the name: an image, and a label in .cls
    (index or name), .json (key label or labels; a list is multi-label) or .txt. Its id is its key, or
    SHARD/KEY in a split whose shards have keys in common.
    All shards are indexed, whichever splits are asked for, since their labels make the classes.
    Raises BadInput for a shard that is compressed, truncated or damaged, and for a sample without label.
    """
    require_folder(root)
    shards = _shards(root)
    if not shards:
        raise wrong_layout(root, f"no tar shards in {root}", TREE)
    samples = [
        (split, path.stem, *sample) for split, paths in shards.items() for path in paths for sample in _index(path)
    ]
    keys = Counter((split, key) for split, _, key, *_ in samples)
    repeating = {split for (split, _), count in keys.items() if count > 1}
    values = [label for *_, label in samples]
    classes, task, labels = index_labels(values, lambda n: str(samples[n][3]), f"labels of {root}: text")
    records = [
        (split, Record(f"{shard}/{key}" if split in repeating else key, image, label))
        for (split, shard, key, image, _), label in zip(samples, labels, strict=True)
    ]
    return group_splits("webdataset", classes, task, records, splits, root)


def _shards(root: Path) -> dict[str, list[Path]]:
    """Return {split: paths}: a folder is a split of its shards; in ROOT the word before a shard's number is its split."""
    shards = {split: sorted((root / split).glob("*.tar")) for split in folders_in(root)}
    shards = {split: paths for split, paths in shards.items() if paths}
    for path in sorted(root.glob("*.tar")):
        word = re.split(r"[-_.]", NUMBER.sub("", path.stem))[-1]
        shards.setdefault(word or "all", []).append(path)
    return shards


def _index(path: Path) -> Iterator[tuple[str, TarMember, Any]]:
    """Yield (key, TarMember, label) for each sample of a shard, in its order."""
    samples: dict[str, tuple[TarMember | None, dict[str, bytes]]] = {}
    try:
        with tarfile.open(path, "r:") as shard:
            for member in shard:
                # The bytes of a sparse file do not lie one after another.
                if not member.isreg() or member.issparse():
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                key, suffix = f"{folder}/{stem}".removeprefix("/").removeprefix("./"), suffix.lower()
                image, label = samples.get(key, (None, {}))
                if f".{suffix}" in IMAGE_SUFFIXES:
                    image = TarMember(str(path), member.name, member.offset_data, member.size)
                elif suffix in LABEL_SUFFIXES:
                    content: Any = shard.extractfile(member)
                    label = {**label, suffix: content.read()}
                samples[key] = image, label
            end = shard.offset
        with open(path, "rb") as file:
            file.seek(end)
            # A tar ends with blocks of zeros; one that was cut between two files lacks them.
            whole = file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
    except (tarfile.TarError, EOFError) as error:
        raise BadInput(f"{path} is no whole, uncompressed tar: {error}") from None
    if not whole:
        raise BadInput(f"{path} is cut off: the end of a tar is missing")
    without = [key for key, (image, label) in samples.items() if image is None and label]
    if without:
        raise BadInput(f"{path}: {len(without)} samples have a label and no image, the first is {shown(without[0])}")
    for key, (image, label) in samples.items():
        if image is not None:
            yield key, image, _label(f"{path}:{key}", label)


def _label(name: str, files: Mapping[str, bytes]) -> Any:
    """Return a sample's label. files: {suffix: content}."""
    for suffix in LABEL_SUFFIXES:
        if suffix not in files:
            continue
        try:
            text = files[suffix].decode("utf-8-sig").strip()
            value = parse_json(text, f"{name}.json") if suffix == "json" else text
        except UnicodeDecodeError as error:
            raise BadInput(f"{name}.{suffix}: {error}") from None
        if suffix != "json":
            return value
        for key in ("label", "labels"):
            if isinstance(value, dict) and key in value:
                return value[key]
    raise BadInput(f"{name} has no label: no .cls, no .txt, and no .json with the key label or labels")
