"""What is damaged or hostile in a store is never used; what is gone is not passed for whole."""

import json
import shutil

import numpy as np
import pytest
from extracting import options
from folders import tree_hash
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import write_store

from featcache.errors import BadInput
from featcache.store.folder import open_folder
from featcache.store.manifest_fields import check_names
from featcache.store.reader import open_store
from featcache.store.sealed import seal, unseal
from featcache.store.verify import verify
from featcache.store.writer import check_whole, put_shard

KINDS = {"zarr": "x.zarr", "hdf5": "x.hdf5", "zstd": "z.zarr"}


def write(path, kind, **options):
    return write_store(path, compression="zstd" if kind == "zstd" else None, **options)


@pytest.fixture(params=KINDS)
def stored(request, tmp_path):
    """(kind, path, features) of a whole store."""
    path = tmp_path / KINDS[request.param]
    return request.param, path, write(path, request.param)


def shard_file(path, shard, feature="layer4.pooled"):
    return path / "train" / feature / (f"{shard:06d}.h5" if path.suffix == ".hdf5" else f"c/{shard}/0")


def flip_row(path, kind, row):
    """Flip a bit of the first value of a row, 8 rows a shard, 4 a chunk; of a compressed shard, of its chunk."""
    file = shard_file(path, row // 8)
    marker = json.loads((path / f"commits/train/{row // 8:06d}.json").read_text())
    chunk, within = divmod(row % 8, 4)
    at = marker["files"]["layer4:pooled"]["offset"] + (row % 8) * 6 + (4 * chunk if kind == "zarr" else 0)
    data = bytearray(file.read_bytes())
    if kind == "zstd":
        # Two chunks a shard, whose offsets and lengths the index at the end gives.
        at = int(np.frombuffer(data[-36:-4], "<u8").reshape(2, 2)[chunk, 0]) + 3
    data[at] ^= 1
    file.write_bytes(data)


READS = {
    "slice": lambda a: a[:],
    "part": lambda a: a[13:15],
    "step": lambda a: a[::3],
    "array": np.asarray,
    "to_torch": lambda a: a.to_torch(),
    "pieces": lambda a: list(a.pieces()),
    "batches": lambda a: list(a.batches(4)),
    "shuffled": lambda a: list(a.batches(4, shuffle=True)),
    "checked": lambda a: a.take([14], check=True),
}


@pytest.mark.parametrize("how", READS)
def test_a_flipped_bit_is_not_read(stored, how):
    kind, path, _ = stored
    flip_row(path, kind, 12)
    array = open_store(path)["train"]["pooled"]
    with pytest.raises(BadInput, match=r"damaged.* run featcache verify .* --repair, then the same extract again") as e:
        READS[how](array)
    assert "\n" not in str(e.value.message)
    if kind != "zstd":
        assert "rows 12 to 15 of split train" in e.value.message and shard_file(path, 1).name in e.value.message
        assert np.array_equal(array[:12], array.take(range(12)))


def test_rows_picked_by_number_say_that_they_are_not_checked(stored):
    kind, path, features = stored
    array = open_store(path)["train"]["pooled"]
    assert np.array_equal(array.take([3, -1], check=True), features["layer4:pooled"][[3, -1]])
    assert "not checked" in type(array).__doc__ and "check=True" in type(array).__doc__
    with pytest.raises(IndexError):
        array.take([23])


def test_a_chunk_is_checked_once_until_its_file_is_another(tmp_path, monkeypatch):
    from featcache.store import sources

    write(tmp_path / "x.zarr", "zarr")
    split, seen, real = open_store(tmp_path / "x.zarr")["train"], [], sources.crc_of
    monkeypatch.setattr(sources, "crc_of", lambda rows: seen.append(len(rows)) or real(rows))
    split["pooled"][:]
    assert seen == [4, 4, 4, 4, 4, 3]
    split["pooled"][:], list(split["pooled"].batches(4, shuffle=True))
    assert len(seen) == 6
    flip_row(tmp_path / "x.zarr", "zarr", 9)
    with pytest.raises(BadInput, match="rows 8 to 11"):
        split["pooled"][:]


def test_a_shard_of_another_place_is_not_taken_for_this_one(stored):
    """It fits its own checksums and its length, so that only the marker can tell."""
    kind, path, _ = stored
    if kind == "zstd":
        pytest.skip("of another length")
    shutil.copy(shard_file(path, 0), shard_file(path, 1))
    with pytest.raises(BadInput, match="rows 8 to 11"):
        open_store(path)["train"]["pooled"][:]


def test_a_compressed_shard_of_another_place(tmp_path):
    write(tmp_path / "z.zarr", "zstd")
    files = {f.stat().st_size: f for f in sorted((tmp_path / "z.zarr/train/layer4.pooled/c").glob("[01]/0"))}
    if len(files) > 1:
        # Made alike in length, which the marker then says too.
        for shard in (0, 1):
            marker = tmp_path / f"z.zarr/commits/train/{shard:06d}.json"
            content = unseal(marker.read_bytes())
            content["files"]["layer4:pooled"]["bytes"] = shard_file(tmp_path / "z.zarr", 0).stat().st_size
            marker.write_bytes(seal(content))
    shutil.copy(shard_file(tmp_path / "z.zarr", 0), shard_file(tmp_path / "z.zarr", 1))
    with pytest.raises(BadInput, match="damaged rows 8 to 11"):
        open_store(tmp_path / "z.zarr")["train"]["pooled"][:]


def test_every_file_beside_the_shards_is_compared_when_a_store_is_opened(stored):
    _, path, _ = stored
    manifest = open_store(path).manifest
    for name in manifest.files:
        data = (path / name).read_bytes()
        (path / name).write_bytes(data[:-5] + bytes([data[-5] ^ 1]) + data[-4:])
        with pytest.raises(BadInput, match=f"damaged file .*{name}.*--repair"):
            open_store(path)
        (path / name).write_bytes(data)
    open_store(path)


@pytest.mark.parametrize("command_line", [("convert", "--out", "other.zarr"), ("inspect",)])
def test_the_commands_stop_at_damage(stored, command, tmp_path, command_line):
    kind, path, _ = stored
    flip_row(path, kind, 12)
    word, *rest = command_line
    code, _, err = command(word, path, *(tmp_path / r if "." in r else r for r in rest))
    assert code == 2 and "--repair" in err and "Traceback" not in err


def craft(path, change):
    """Write a manifest anew, with its checksum, as an attacker can."""
    content = unseal((path / "manifest.json").read_bytes())
    change(content)
    (path / "manifest.json").write_bytes(seal(content))


def put(*keys, value):
    def change(content):
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


ODD = [None, True, -1, 1.5, "x", [], {}, [None], 10**300, "\ud800", {"a": []}]
FIELDS = [
    ("identity",), ("splits",), ("splits", "train"), ("splits", "train", "rows"), ("splits", "train", "shard_rows"),
    ("features",), ("features", "layer4:pooled"), ("features", "layer4:pooled", "shape"),
    ("features", "layer4:pooled", "dtype"), ("features", "layer4:pooled", "chunk_rows"), ("aliases",),
    ("aliases", "last"), ("classes",), ("task",), ("compute",), ("compute", "threads"), ("storage",),
    ("storage", "format"), ("storage", "compression"), ("files",), ("files", "train/zarr.json"),
    ("files", "zarr.json", "bytes"), ("files", "zarr.json", "crc32"), ("format",), ("version",), ("id",),
]  # fmt: skip


@pytest.mark.parametrize("field", FIELDS)
def test_a_manifest_of_other_types_is_one_line(tmp_path, field):
    path = tmp_path / "x.zarr"
    write(path, "zarr")
    before = (path / "manifest.json").read_bytes()
    for value in ODD:
        craft(path, put(*field, value=value))
        try:
            store = open_store(path)
            store["train"]["pooled"][:], store["train"].boxes, verify(path)
        except BadInput as error:
            assert "\n" not in error.message
        (path / "manifest.json").write_bytes(before)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, '{"version": ' + "9" * 5000 + "}", "[]", "null", ""]
)
def test_hostile_json_is_one_line(tmp_path, command, text):
    path = tmp_path / "x.zarr"
    write(path, "zarr")
    for name in ("commits/train/000001.json", "manifest.json"):
        (path / name).write_text(text)
        with pytest.raises(BadInput, match="damaged"):
            open_store(path)["train"]["pooled"][:]
        assert command("verify", path)[0] == 1


def test_labels_are_labels_of_the_classes(tmp_path):
    for single, classes in ((True, ["a"]), (False, ["a", "b"])):
        path = tmp_path / f"{single}.zarr"
        write(path, "zarr", single=single)
        craft(path, put("classes", value=classes))
        with pytest.raises(BadInput, match="damaged array train/labels"):
            open_store(path)


@pytest.mark.parametrize("name", ["../victim.txt", "/etc/passwd", "commits/train/000000.json", "manifest.json", "a\0b"])
def test_a_manifest_names_no_file_outside(tmp_path, command, name):
    path, victim = tmp_path / "x.zarr", tmp_path / "victim.txt"
    write(path, "zarr")
    victim.write_text("mine")
    craft(path, put("files", name, value={"bytes": 1, "crc32": 1}))
    code, _, err = command("verify", path, "--repair")
    assert code == 2 and "Traceback" not in err and victim.read_text() == "mine"
    assert (path / "commits/train/000000.json").exists()


def test_links_that_lead_out_are_not_followed(tmp_path):
    path, other = tmp_path / "x.zarr", tmp_path / "other"
    write(path, "zarr")
    before = tree_hash(path)
    shutil.move(path / "train", other)
    (path / "train").symlink_to(other)
    outside = tree_hash(other)
    with pytest.raises(BadInput, match="through a link"):
        open_store(path)
    assert verify(path) and verify(path, repair=True)
    write(path, "zarr")
    assert tree_hash(path) == before and tree_hash(other) == outside
    (tmp_path / "link.zarr").symlink_to(path)
    assert len(open_store(tmp_path / "link.zarr")["train"]["pooled"][:]) == 23


TEXT = st.text(max_size=12) | st.sampled_from(["..", ".", "", "/", "\\", "\0", "\ud800", "a/../../b", "/dev/zero",
    "CON", "commits", "commits/lock", "zarr.json", "index.h5", "train@1", "train@x", "a" * 10_000, "__x"])  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(parts=st.lists(TEXT, min_size=1, max_size=3))
def test_no_name_leaves_the_folder(tmp_path_factory, parts):
    root = tmp_path_factory.mktemp("names")
    (root / "victim").write_text("mine")
    folder, name = open_folder(root / "store"), "/".join(parts)
    for use in (folder.read, folder.size, folder.delete, folder.names, lambda n: folder.writing(n).__enter__()):
        try:
            use(name)
        except (BadInput, FileNotFoundError) as error:
            assert "\n" not in str(error)
    assert (root / "victim").read_text() == "mine" and {p.name for p in root.iterdir()} <= {"victim", "store"}
    shutil.rmtree(root)


@pytest.mark.parametrize(
    "split", ["commits", ".", "..", "zarr.json", "index.h5", "a@b", "train@1", "a/b", "/x", "", "\0"]
)
def test_splits_that_cannot_be_folders(split):
    with pytest.raises(BadInput):
        check_names([split], [])


def test_splits_that_one_file_system_takes_for_one():
    with pytest.raises(BadInput, match="'train' and 'Train'"):
        check_names(["train", "Train"], [])
    check_names(["train", "train@1", "val"], ["layer4:pooled", "blocks.11:grid(2,2,0)"])


def a_folder(path):
    path.unlink()
    (path / "in").mkdir(parents=True)


def a_file(path):
    shutil.rmtree(path)
    path.write_text("x")


def another_store(path):
    other = path.parent / f"other-{path.name}"
    write_store(other, rows=15)
    shutil.copy(other / "manifest.json", path / "manifest.json")


HARMS = {
    "folder for shard": lambda p: a_folder(shard_file(p, 1)),
    "folder for marker": lambda p: a_folder(p / "commits/train/000001.json"),
    "folder for lock": lambda p: a_folder(p / "commits/lock"),
    "folder for manifest": lambda p: a_folder(p / "manifest.json"),
    "file for commits": lambda p: a_file(p / "commits"),
    "file for markers": lambda p: a_file(p / "commits/train"),
    "file for split": lambda p: a_file(p / "train"),
    "file for feature": lambda p: a_file(p / "train/layer4.pooled"),
    "marker of another": lambda p: shutil.copy(p / "commits/train/000000.json", p / "commits/train/000001.json"),
    "manifest and shard": lambda p: (
        (p / "manifest.json").write_text("{"), shard_file(p, 1).write_bytes(b""), (p / "commits/lock").unlink()
    ),
    "manifest and metadata": lambda p: (
        (p / "manifest.json").write_text("{"), next(iter(p.glob("*.h5")), p / "zarr.json").write_text("")
    ),
    "no manifest": lambda p: ((p / "manifest.json").unlink(), flip_row(p, "zarr", 2)),
    "no commits": lambda p: shutil.rmtree(p / "commits"),
}  # fmt: skip


@pytest.mark.process
@pytest.mark.parametrize("harm", HARMS)
def test_repair_and_extract_mend_in_one_round(stored, harm):
    kind, path, _ = stored
    before = tree_hash(path)
    HARMS[harm](path)
    with pytest.raises(BadInput):
        check_whole(open_folder(path), open_store(path).manifest)
        open_store(path)["train"]["pooled"][:]
        raise BadInput("only the lock, which nobody reads") if harm == "folder for lock" else AssertionError
    assert verify(path, repair=True)
    write(path, kind)
    assert verify(path) == [] and tree_hash(path) == before


def test_what_is_gone_at_the_end_is_said(stored):
    _, path, _ = stored
    folder, manifest = open_folder(path), open_store(path).manifest
    check_whole(folder, manifest)
    for name in ("commits/train/000002.json", shard_file(path, 2).relative_to(path), *manifest.files, "manifest.json"):
        shutil.move(path / name, path.parent / "away")
        with pytest.raises(BadInput):
            check_whole(folder, manifest)
        shutil.move(path.parent / "away", path / name)
    shutil.rmtree(path)
    with pytest.raises(BadInput, match="not found"):
        check_whole(folder, manifest)


@pytest.mark.process
def test_nothing_is_trained_on_damage(store, tmp_path, command):
    """Another best probe was the smallest of the harms that one bit did."""
    copy = tmp_path / "s.zarr"
    shutil.copytree(store, copy)
    file = next(copy.glob("train/*.pooled/c/0/0"))
    data = bytearray(file.read_bytes())
    data[5] ^= 64
    file.write_bytes(data)
    grid = "probes: [{features: last:pooled, head: linear, loss: bce, optimizer: {type: sgd, lr: 1.0}, epochs: 1}]"
    (tmp_path / "grid.yaml").write_text(grid)
    words = ("train-probes", "--grid", tmp_path / "grid.yaml", "--store", copy, "--run", tmp_path / "run")
    code, _, err = command(*words)
    assert code == 2 and f"{file.relative_to(copy)}: damaged rows 0 to" in err and "--repair" in err, err
    assert not list((tmp_path / "run").rglob("*.safetensors"))
    shutil.copytree(store, copy, dirs_exist_ok=True)
    shutil.copy(copy / "val/labels/c/0/0", copy / "test/labels/c/0/0")
    code, _, err = command(*words)
    assert code == 2 and "damaged file" in err and "test/labels" in err, err


@pytest.mark.process
@pytest.mark.parametrize("gone", ["", "commits", "manifest.json", "val/labels/c/0/0", "commits/train/000000.json"])
def test_a_store_that_goes_while_it_is_written(scenes, checkpoint, tmp_path, monkeypatch, command, gone):
    path, real, done = tmp_path / "s.zarr", put_shard, []

    def deleting(*arguments):
        real(*arguments)
        if not done:
            done.append(True)
            shutil.rmtree(path / gone) if (path / gone).is_dir() else (path / gone).unlink()

    monkeypatch.setattr("featcache.extraction.fill.put_shard", deleting)
    words = ["extract", *options(scenes, checkpoint, path, features="pooled")]
    code, _, err = command(*words)
    assert code == 2 and "store: " not in err, err
    if "--repair" in err:
        command("verify", path, "--repair")
    code, _, err = command(*words)
    assert code == 0 and verify(path) == [], err
