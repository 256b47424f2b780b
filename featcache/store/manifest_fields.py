"""What the fields of a manifest may hold: a store may come from anyone, and its names become files here."""

import math
import re
import unicodedata
from collections.abc import Collection, Iterable
from typing import Any

from featcache.errors import BadInput, shown
from featcache.feature import Feature, parse_feature
from featcache.names import BESIDE_SPLITS, COMMITS, MANIFEST, file_name, path_within, split_name
from featcache.store.dtype import STORED

TASKS = ("multi-label", "single-label")
COMPRESSIONS: dict[str, tuple[str | None, ...]] = {"zarr": (None, "zstd", "blosc"), "hdf5": (None,)}
# No store is nearly as large (128 TB): larger numbers are attempts to fill the memory.
MOST_SHARDS = 10**6
MOST_BYTES = 1 << 50


def check_fields(content: dict[str, Any]) -> None:
    """Check types, ranges and names of all fields of a manifest, which is a dict of JSON values. Raises BadInput."""
    _dict(content["identity"], "identity")
    _dict(content["identity"].get("preprocessing", {}), "identity.preprocessing")
    dataset = _dict(content["identity"].get("dataset", {}), "identity.dataset")
    _dict(dataset.get("splits", {}), "identity.dataset.splits")
    for field in ("features", "adds"):
        _texts(content["identity"].get(field, []), f"identity.{field}")
    if "masks" in content["identity"]:
        _text(_dict(content["identity"]["masks"], "identity.masks").get("type"), "identity.masks.type")
    if "views" in content["identity"]:
        views = _dict(content["identity"]["views"], "identity.views")
        _whole(views.get("count"), "identity.views.count", 1, MOST_SHARDS)
        _texts(views.get("splits"), "identity.views.splits")
    _check_features(content["features"])
    for split, geometry in _dict(content["splits"], "splits").items():
        where = f"split {shown(split)}"
        _keys(geometry, {"rows", "shard_rows"}, where)
        _whole(geometry["rows"], f"rows of {where}", 0, MOST_BYTES)
        size = _whole(geometry["shard_rows"], f"shard_rows of {where}", 1, MOST_BYTES)
        if geometry["rows"] > size * MOST_SHARDS:
            raise BadInput(f"{where} has more than {MOST_SHARDS} shards")
        if any(size % feature["chunk_rows"] for feature in content["features"].values()):
            raise BadInput(f"the shards of {where} are not whole chunks")
    adds = "adds" in content["identity"]
    check_names(content["splits"], content["features"], dataset.get("splits", {}) if adds else ())
    after = content.get("after")
    if after is not None and not (isinstance(after, str) and re.fullmatch("[0-9a-f]{64}", after)):
        raise BadInput(f"after is {shown(after)}, not the id of a store")
    for alias, layer in _dict(content["aliases"], "aliases").items():
        _text(layer, f"alias {shown(alias)}")
    _texts(content["classes"], "classes")
    if content["task"] not in TASKS:
        raise BadInput(f"task is {shown(content['task'])}, not one of {', '.join(TASKS)}")
    _check_compute(_dict(content["compute"], "compute"))
    storage = _keys(content["storage"], {"format", "compression"}, "storage")
    if not isinstance(storage["format"], str) or storage["compression"] not in COMPRESSIONS.get(storage["format"], ()):
        raise BadInput(f"storage is {shown(storage)}")
    for name, entry in _dict(content["files"], "files").items():
        _keys(entry, {"bytes", "crc32"}, f"file {shown(name)}")
        _whole(entry["bytes"], f"bytes of file {shown(name)}", 0, MOST_BYTES)
        _whole(entry["crc32"], f"crc32 of file {shown(name)}", 0, (1 << 32) - 1)
        first = path_within(name, "file").partition("/")[0]
        if first in (COMMITS, MANIFEST) or first not in (*BESIDE_SPLITS, *content["splits"]):
            raise BadInput(f"file {shown(name)} belongs to no split")


def check_names(splits: Collection[str], features: Iterable[str], others: Collection[str] = ()) -> None:
    """Check the names of splits, views and features, which become folders. Raises BadInput.

    others: names of splits that are not there themselves, but may have views.
    """
    for split in splits:
        base, at, view = split.partition("@")
        split_name(base)
        if at and (base not in (*splits, *others) or not re.fullmatch("[1-9][0-9]{0,5}", view)):
            raise BadInput(f"split {shown(split)}: `@` is kept for the views of a split; give it another name")
    _told_apart(splits, "splits")
    for name in features:
        layer, _, reduction = name.rpartition(":")
        if not layer or str(parse_feature(name, {})) != name:
            raise BadInput(f"feature {shown(name)} is not LAYER:REDUCTION")
        file_name(Feature(layer, reduction).folder, "feature", BESIDE_SPLITS)
    _told_apart([Feature(*name.rsplit(":", 1)).folder for name in features], "features")


def _told_apart(names: Iterable[str], what: str) -> None:
    """Raise BadInput for names that differ only by case or by how an accent is written: they can be the same file."""
    seen: dict[str, str] = {}
    for name in names:
        key = unicodedata.normalize("NFC", name).casefold()
        if key in seen:
            raise BadInput(
                f"{what} {shown(seen[key])} and {shown(name)} are one file on some file systems; rename one of them"
            )
        seen[key] = name


def _check_features(features: object) -> None:
    specs = _dict(features, "features")
    if not specs:
        raise BadInput("it names no features")
    for name, spec in specs.items():
        where = f"feature {shown(name)}"
        _keys(spec, {"shape", "dtype", "chunk_rows"}, where)
        if not isinstance(spec["dtype"], str) or spec["dtype"] not in STORED:
            raise BadInput(f"dtype of {where} is {shown(spec['dtype'])}")
        if not isinstance(spec["shape"], list) or not 1 <= len(spec["shape"]) <= 8:
            raise BadInput(f"shape of {where} is {shown(spec['shape'])}")
        for size in spec["shape"]:
            _whole(size, f"shape of {where}", 1, MOST_BYTES)
        _whole(spec["chunk_rows"], f"chunk_rows of {where}", 1, MOST_BYTES)
        if math.prod(spec["shape"]) * spec["chunk_rows"] > MOST_BYTES:
            raise BadInput(f"a chunk of {where} is larger than any memory")


def _check_compute(compute: dict[str, Any]) -> None:
    _text(compute.get("device", ""), "compute.device")
    if compute.get("threads") is not None:
        _whole(compute["threads"], "compute.threads", 1, 1 << 20)
    _whole(compute.get("batch_size", 1), "compute.batch_size", 1, 1 << 30)
    if not isinstance(compute.get("folded", False), bool):
        raise BadInput(f"compute.folded is {shown(compute['folded'])}")
    if not isinstance(compute.get("cosine", 1.0), int | float):
        raise BadInput(f"compute.cosine is {shown(compute['cosine'])}")


def _whole(value: object, where: str, least: int, most: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise BadInput(f"{where} is {shown(value)}, not a whole number from {least} to {most}")
    return value


def _text(value: object, where: str) -> None:
    if not isinstance(value, str):
        raise BadInput(f"{where} is {shown(value)}, not text")


def _texts(value: object, where: str) -> None:
    if not isinstance(value, list):
        raise BadInput(f"{where} is {shown(value)}, not a list")
    for text in value:
        _text(text, f"an entry of {where}")


def _dict(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadInput(f"{where} is {shown(value)}, not an object")
    return value


def _keys(value: object, keys: set[str], where: str) -> dict[str, Any]:
    fields = _dict(value, where)
    if fields.keys() != keys:
        raise BadInput(f"{where} has the fields {shown(sorted(fields))}, not {', '.join(sorted(keys))}")
    return fields
