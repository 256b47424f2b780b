"""What a store is a store of: every change counts, and is named; what changes nothing does not."""

import copy
import os
import shutil

import pytest
import torch
from extracting import SIZE, options
from folders import tree_hash
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import featcache
from featcache.store.manifest import difference, identity_hash, read_manifest


@pytest.fixture(scope="module")
def identity(store):
    """The identity of a real store."""
    return read_manifest(store).identity


def leaves(value, path=()):
    """Paths of all values in nested dicts and lists."""
    if isinstance(value, (dict, list)) and value:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [leaf for key, part in items for leaf in leaves(part, (*path, key))]
    return [path]


def shuffled(value, random):
    """The same dicts with their keys in another order, at every depth."""
    if not isinstance(value, dict):
        return value
    keys = list(value)
    random.shuffle(keys)
    return {key: shuffled(value[key], random) for key in keys}


@settings(deadline=None)
@given(choice=st.data(), other=st.integers() | st.text(max_size=4) | st.none(), random=st.randoms())
def test_any_field_changes_the_id_and_is_named(identity, choice, other, random):
    assert identity_hash(shuffled(identity, random)) == identity_hash(identity)
    changed = copy.deepcopy(identity)
    *way, last = choice.draw(st.sampled_from(leaves(identity)))
    place = changed
    for key in way:
        place = place[key]
    if place[last] == other:
        return
    place[last] = other
    assert identity_hash(changed) != identity_hash(identity)
    named = [key for key in (*way, last) if isinstance(key, str)]
    (line,) = difference(identity, changed)
    assert line.startswith(".".join(named) + ":")


@pytest.fixture
def own(scenes, checkpoint, tmp_path):
    """A dataset and a checkpoint of one's own, and a finished store of them."""
    shutil.copytree(scenes, tmp_path / "scenes")
    shutil.copy(checkpoint, tmp_path / "ckpt.pth")
    featcache.extract(
        tmp_path / "ckpt.pth", "voc", root=tmp_path / "scenes", size=SIZE, workers=0, batch_size=8,
        features="pooled", store=tmp_path / "s.zarr",
    )  # fmt: skip
    return tmp_path


def again(command, own, root="scenes", checkpoint="ckpt.pth"):
    return command("extract", *options(own / root, own / checkpoint, own / "s.zarr", features="pooled"))


def test_what_changes_nothing(own, command):
    weights = torch.load(own / "ckpt.pth", weights_only=True)
    torch.save({"state_dict": dict(reversed(weights.items())), "epoch": 7, "optimizer": {"lr": 0.1}}, own / "ckpt.pth")
    (own / "ckpt.pth").rename(own / "renamed.pth")
    (own / "scenes").rename(own / "moved")
    for file in (own / "moved").rglob("*.jpg"):
        os.utime(file, (0, 0))
    code, _, err = again(command, own, "moved", "renamed.pth")
    assert code == 0 and "is finished already" in err


def other_weight(own):
    weights = torch.load(own / "ckpt.pth", weights_only=True)
    weights["conv1.weight"][0, 0, 0, 0] += 1e-6
    torch.save(weights, own / "ckpt.pth")


def voc(own):
    return own / "scenes/VOCdevkit/VOC2007"


def other_label(own):
    file = voc(own) / "Annotations/000005.xml"
    text = file.read_text()
    first = text.split("<name>")[1].split("</name>")[0]
    other = next(digit for digit in ("one", "two", "three") if f"<name>{digit}<" not in text and digit != first)
    file.write_text(text.replace(f"<name>{first}<", f"<name>{other}<", 1))


def other_box(own):
    file = voc(own) / "Annotations/000005.xml"
    text = file.read_text()
    edge = text.split("<xmin>")[1].split("</xmin>")[0]
    file.write_text(text.replace(f"<xmin>{edge}<", f"<xmin>{int(edge) + 1}<", 1))


def other_image(own):
    image = voc(own) / "JPEGImages/000005.jpg"
    Image.open(image).convert("RGB").rotate(180).save(image, quality=60)


def one_more(own):
    for folder, suffix in (("JPEGImages", "jpg"), ("Annotations", "xml")):
        shutil.copy(voc(own) / f"{folder}/000005.{suffix}", voc(own) / f"{folder}/999999.{suffix}")
    for listed in (voc(own) / "ImageSets/Main").glob("train.txt"):
        listed.write_text(listed.read_text() + "999999\n")


@pytest.mark.process
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (other_weight, ["weights_sha256: "]),
        (other_label, ["dataset.splits.train: ", "train: labels of 1 images changed (first 000005)"]),
        (other_box, ["dataset.splits.train: ", "train: boxes changed"]),
        (other_image, ["dataset.splits.train: ", "train: image file of 1 images changed (first 000005)"]),
        (one_more, ["dataset.splits.train: ", "train: 1 images added (first 999999)"]),
    ],
)
def test_what_makes_another_store(own, command, change, named):
    change(own)
    code, _, err = again(command, own)
    assert code == 2 and all(words in err for words in named), err
    assert "splits.val" not in err


def test_a_lost_file_of_a_finished_store_is_made_anew(own, command):
    before = tree_hash(own / "s.zarr")
    (own / "s.zarr/train/labels/zarr.json").unlink()
    assert again(command, own)[0] == 0
    assert tree_hash(own / "s.zarr") == before


def test_format_and_compression_are_not_mixed(own, command):
    words = options(own / "scenes", own / "ckpt.pth", own / "s.zarr", features="pooled")
    code, _, err = command("extract", *words, "--format", "hdf5")
    assert code == 2 and 'format: "zarr" -> "hdf5"' in err and "featcache convert" in err
    code, _, err = command("extract", *words, "--compression", "zstd")
    assert code == 2 and 'compression: null -> "zstd"' in err
    hdf5 = options(own / "scenes", own / "ckpt.pth", own / "t.hdf5", features="pooled", compression="zstd")
    code, _, err = command("extract", *hdf5)
    assert code == 2 and "is not compressed" in err and not (own / "t.hdf5").exists()
