"""Shards: their rows, numbers and names, in a store of several splits and a view, and what their markers hold."""

import hashlib
import json
import string

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stores import write_store

from featcache.errors import BadInput
from featcache.feature import Feature
from featcache.store import manifest as manifest_module
from featcache.store.folder import open_folder
from featcache.store.manifest import plan, read_manifest
from featcache.store.marker import find_marker, ids_sha256, read_marker
from featcache.store.records import ids_array, ids_of
from featcache.store.shard import Shard, all_shards

ROWS = {"train": 23, "val": 5, "train@1": 23}


@pytest.fixture
def shards(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest_module, "CHUNK_ROWS", 4)
    monkeypatch.setattr(manifest_module, "SHARD_BYTES", 8 * 6)
    compute, storage = {"device": "cpu", "threads": 1, "batch_size": 8}, {"format": "zarr", "compression": None}
    shapes = {Feature("layer4", "pooled"): (3,)}
    manifest = plan({"arch": "toy"}, ROWS, shapes, "float16", {}, ["a"], "single-label", compute, storage)
    return all_shards(open_folder(tmp_path / "x.zarr"), manifest)


def test_shards_hold_every_row_once_in_order(shards):
    for split, rows in ROWS.items():
        own = [shard for shard in shards if shard.split == split]
        assert [shard.number for shard in own] == list(range(len(own))) and len(own) == (1 if split == "val" else 3)
        assert [row for shard in own for row in range(*shard.rows)] == list(range(rows))
        assert sum(map(len, own)) == rows


def test_each_shard_has_a_lock_and_files_of_its_own(shards):
    assert [shard.index for shard in shards] == list(range(len(shards)))
    assert len({shard.marker_name for shard in shards} | {s.file_name("layer4:pooled") for s in shards}) == 2 * len(
        shards
    )
    last = shards[-1]
    assert str(last) == "split train@1, shard 2 (rows 16 to 22)"
    assert last.marker_name == "commits/train@1/000002.json" and last.file_name("layer4:pooled").endswith("/c/2/0")


def test_a_marker_that_is_gone_is_none_or_an_error(tmp_path):
    write_store(tmp_path / "x.zarr")
    shard = Shard(open_folder(tmp_path / "x.zarr"), read_manifest(tmp_path / "x.zarr"), "train", 1)
    content = json.loads((tmp_path / "x.zarr" / shard.marker_name).read_text())
    content.pop("crc32")
    assert find_marker(shard) == read_marker(shard) == content
    (tmp_path / "x.zarr" / shard.marker_name).unlink()
    assert find_marker(shard) is None
    with pytest.raises(BadInput, match="000001.json is gone: the shard is not committed"):
        read_marker(shard)


@given(st.lists(st.text(string.ascii_letters + "é/ 0", min_size=1), min_size=1, max_size=9), st.integers(0, 3))
def test_ids_have_the_sha256_of_their_lines(ids, padding):
    array = np.pad(ids_array(ids), ((0, 0), (0, padding)))
    assert ids_of(array) == ids
    assert ids_sha256(array) == hashlib.sha256("".join(f"{i}\n" for i in ids).encode()).hexdigest()
