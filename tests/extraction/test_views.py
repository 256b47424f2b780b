"""Augmented views: drawn as torchvision draws them, the same bytes on any machinery, rotated over the epochs."""

import re
import shutil
import signal
import subprocess
import time
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from extracting import SIZE, START, options, torchrun
from folders import tree_hash
from hypothesis import given, settings
from hypothesis import strategies as st
from parts import Head, Loss, Optimizer, Schedule
from PIL import Image
from skimage import data as photographs
from sklearn.metrics import average_precision_score
from torch.nn import functional as F
from torchvision.models import resnet18
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as TF

import featcache
from featcache.backbones.input.preprocessing import Preprocessing
from featcache.datasets import Augmentation, augmentation, read_dataset
from featcache.datasets.augmentation import MULTI_LABEL
from featcache.errors import BadInput
from featcache.extraction.images import DECODERS, load_input
from featcache.probes.grids.grid_file import Group
from featcache.probes.inputs.batches import epoch_order
from featcache.probes.inputs.input import Input
from featcache.probes.resolve import _views
from featcache.probes.runs.probe_file import load_probe
from featcache.probes.spec import ProbeSpec, spec_from_dict, spec_to_dict
from featcache.probes.weights import initial_weights

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
K = 3
SPEC = ProbeSpec("x", "layer4:pooled", Head("linear"), Loss("bce"), Optimizer("sgd", 0.1), Schedule(), 3, 8, 0, views=0)


def view_options(scenes, checkpoint, store, **more):
    return options(scenes, checkpoint, store, **{"features": "pooled", "dtype": "float32", "views": K} | more)


@pytest.fixture(scope="module")
def viewed(scenes, checkpoint, tmp_path_factory):
    """Path of a finished float32 store with K views, made with a shard for every few rows."""
    path = tmp_path_factory.mktemp("viewed") / "s.zarr"
    done = subprocess.run([*START, *view_options(scenes, checkpoint, path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "disk: " in done.stderr and " of them views" in done.stderr
    return path


class Tape:
    """Numbers [10, 4] for torch's uniform_ (area, then ratio) and randint (top, then left) of each try."""

    def __init__(self, tries):
        self.tries, self.uniforms, self.places = tries, 0, 0

    def uniform(self, low, high):
        number = self.tries[self.uniforms // 2, self.uniforms % 2]
        self.uniforms += 1
        return low + (high - low) * torch.tensor([number])

    def randint(self, low, high, size):
        number = self.tries[self.uniforms // 2 - 1, 2 + self.places]
        self.places += 1
        return torch.tensor([low + int(number * (high - low))])


@pytest.mark.parametrize("drawn", [Augmentation(), MULTI_LABEL, Augmentation((0.9, 1.0), (1.9, 2.1), 0.3)])
def test_crops_are_those_of_torchvision(monkeypatch, drawn):
    """torchvision's own get_params, fed with the numbers that ours used."""
    sizes = np.random.default_rng(0).integers(1, 900, (500, 2))
    sizes[:20], sizes[20:40] = [3, 900], [900, 3]  # so long that no try fits
    ours = drawn.draw(sizes, seed=5, view=2)
    numbers = np.random.default_rng((5, 2)).random((len(sizes), 41))
    for row, (height, width) in enumerate(sizes.tolist()):
        tape = Tape(numbers[row, :-1].reshape(10, 4))
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "uniform_", tape.uniform)
            patch.setattr(torch, "randint", tape.randint)
            image = torch.empty(3, height, width, device="meta")
            expected = RandomResizedCrop.get_params(image, list(drawn.scale), list(drawn.ratio))
        assert tuple(ours[row, :4].tolist()) == expected, (row, height, width)
        assert ours[row, 4] == (numbers[row, -1] < drawn.flip)
    assert (tape.uniforms, tape.places) > (0, 0)


@settings(deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 2000), st.integers(1, 2000)), min_size=1, max_size=30),
    seed=st.integers(0, 2**40),
    view=st.integers(1, 64),
    block=st.integers(1, 31),
)
def test_a_row_depends_on_nothing_but_seed_view_and_number(sizes, seed, view, block):
    sizes = np.array(sizes)
    whole = Augmentation().draw(sizes, seed, view)
    top, left, height, width, flip = whole.T
    assert (top >= 0).all() and (left >= 0).all() and (height > 0).all() and (width > 0).all()
    assert (top + height <= sizes[:, 0]).all() and (left + width <= sizes[:, 1]).all() and set(flip) <= {0, 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(augmentation, "BLOCK", block)
        assert np.array_equal(Augmentation().draw(sizes, seed, view), whole)
    assert np.array_equal(Augmentation().draw(sizes[:5], seed, view), whole[:5])


@pytest.mark.parametrize("size", [64, 224])
def test_a_view_is_torchvisions_crop_to_the_pixel(size):
    image = Image.fromarray(photographs.astronaut()).resize((500, 375))
    apply = Preprocessing(size, (0,) * 3, (1,) * 3, resize="crop").apply_view
    for top, left, height, width, flip in Augmentation().draw([(375, 500)] * 20, 0, 1).tolist():
        expected = TF.resized_crop(image, top, left, height, width, [size, size])
        expected = TF.pil_to_tensor(TF.hflip(expected) if flip else expected)
        assert torch.equal(apply(image, (left, top, left + width, top + height), bool(flip)), expected)


def test_views_lie_beside_the_split(viewed, scenes):
    store = featcache.open_store(viewed)
    train = store["train"]
    assert store.splits == ("train", "val", "test") and (train.views, store["val"].views) == (K, 0)
    assert train.view(0) is train and train.view(2) is store["train@2"] and train.view(2).view(0) is train
    for v in range(1, K + 1):
        view = train.view(v)
        assert view.ids == train.ids and np.array_equal(view.labels, train.labels) and len(view) == len(train)
        assert np.array_equal(view.augmentation, MULTI_LABEL.draw(train.sizes, 0, v))
        assert np.array_equal(view.sizes, train.sizes) and len(view.boxes) == len(train)
        assert np.abs(view["pooled"][:] - train["pooled"][:]).max() > 0.1
    for wrong in (K + 1, -1):
        with pytest.raises(BadInput, match=f"has {K} views, no {wrong}"):
            train.view(wrong)
    with pytest.raises(BadInput, match="train is not augmented"):
        _ = train.augmentation


def test_a_view_can_be_redrawn_from_its_parameters(viewed, scenes, checkpoint):
    """Plain torchvision, from what the store says of a view, against the features that it holds."""
    network = resnet18()
    network.load_state_dict(torch.load(checkpoint, weights_only=True))
    network.fc = torch.nn.Identity()
    network.eval().to(memory_format=torch.channels_last)
    records = read_dataset("voc", scenes, ["train"]).splits["train"]
    view = featcache.open_store(viewed)["train"].view(2)
    images = []
    for record, (top, left, height, width, flip) in zip(records, view.augmentation.tolist(), strict=True):
        image = TF.resized_crop(Image.open(record.image).convert("RGB"), top, left, height, width, [SIZE, SIZE])
        images.append(TF.normalize(TF.to_tensor(TF.hflip(image) if flip else image), MEAN, STD))
    with torch.inference_mode():
        expected = network(torch.stack(images).contiguous(memory_format=torch.channels_last)).numpy()
    assert np.abs(view["pooled"][:] - expected).max() <= 1e-5


@pytest.mark.process
def test_bytes_depend_on_neither_workers_nor_ranks_nor_kills(viewed, scenes, checkpoint, tmp_path):
    whole = tree_hash(viewed)
    words = view_options(scenes, checkpoint, tmp_path / "s.zarr", workers=2)
    process = subprocess.Popen([*START, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    commits = tmp_path / "s.zarr/commits"
    while not list(commits.glob("train@2/*.json")) and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with pytest.raises(BadInput, match="incomplete: split train@"):
        featcache.open_store(tmp_path / "s.zarr")
    finished = subprocess.run(torchrun(2, words), capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    assert tree_hash(tmp_path / "s.zarr") == whole


def test_identity_names_views_only_where_there_are_some(viewed, store, scenes, checkpoint, command):
    identity = featcache.open_store(store).manifest.identity
    assert "views" not in identity and "decoder" not in identity
    assert featcache.open_store(viewed).manifest.identity["views"] == {
        "count": K, "seed": 0, "splits": ["train"], "scale": [0.7, 1.0], "ratio": [3 / 4, 4 / 3], "flip": 0.5,
    }  # fmt: skip
    before = tree_hash(viewed)
    code, _, err = command("extract", *view_options(scenes, checkpoint, viewed))
    assert code == 0 and "is finished already" in err
    for change, named in (
        ({"seed": 1}, "views.seed: 0 -> 1"),
        ({"crop-scale": "0.08,1"}, "views.scale: [0.7, 1.0] -> [0.08, 1.0]"),
        ({"decoder": "draft"}, 'decoder: null -> "pillow-draft"'),
    ):
        code, _, err = command("extract", *view_options(scenes, checkpoint, viewed, **change))
        assert code == 2 and named in err, err
    assert tree_hash(viewed) == before


def test_convert_verify_repair_and_inspect_cover_views(viewed, scenes, checkpoint, tmp_path, command):
    shutil.copytree(viewed, tmp_path / "s.zarr")
    there = featcache.convert(tmp_path / "s.zarr", format="hdf5")
    old, new = featcache.open_store(viewed), featcache.open_store(there)
    for v in range(K + 1):
        assert np.array_equal(old["train"].view(v)["pooled"][:], new["train"].view(v)["pooled"][:])
    assert np.array_equal(old["train"].view(2).augmentation, new["train"].view(2).augmentation)
    assert featcache.convert(there, format="zarr", out=tmp_path / "back.zarr")
    assert tree_hash(tmp_path / "back.zarr") == tree_hash(viewed)
    code, out, _ = command("inspect", viewed)
    assert code == 0 and "views.count: 3" in out and "train@3" in out
    for file in ("train@2/layer4.pooled/c/1/0", "train@1/augmentation/c/0/0"):
        data = bytearray((tmp_path / "s.zarr" / file).read_bytes())
        data[9] ^= 1
        (tmp_path / "s.zarr" / file).write_bytes(data)
    code, out, _ = command("verify", tmp_path / "s.zarr", "--repair")
    assert code == 1 and "train@2/layer4.pooled/c/1/0: split train@2, shard 1" in out and "train@1/augmentation" in out
    assert command("extract", *view_options(scenes, checkpoint, tmp_path / "s.zarr"))[0] == 0
    assert tree_hash(tmp_path / "s.zarr") == tree_hash(viewed)


GROUP = {
    "features": "pooled", "head": "linear", "loss": "bce", "epochs": 5, "batch_size": 16, "seed": 1,
    "optimizer": {"type": "sgd", "lr": 0.3, "momentum": 0.9, "weight_decay": 1e-3},
}  # fmt: skip


def plain_training(train, views, spec):
    """One linear probe as one would write it with torch, on a view of its own in every epoch."""
    labels = torch.from_numpy(train.labels)
    model = torch.nn.Linear(512, labels.shape[1])
    start = initial_weights(spec, 512, labels.shape[1])
    model.weight.data, model.bias.data = start["fc0.weight"], start["fc0.bias"]
    optimizer = torch.optim.SGD(model.parameters(), 0.3, 0.9, weight_decay=1e-3)
    for epoch in range(5):
        view = train.view([1, 2, 3, 1, 2][epoch] if views == 3 else [1, 2, 1, 2, 1][epoch]) if views else train
        features = torch.from_numpy(view["pooled"][:])
        for rows in epoch_order(len(labels), 0, epoch).split(16):
            known = labels[rows] >= 0
            loss = F.binary_cross_entropy_with_logits(model(features[rows])[known], labels[rows][known].float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model


@pytest.mark.parametrize("room", [1.5, 100])
def test_training_rotates_the_views(viewed, tmp_path, monkeypatch, room):
    """Where one view and a half fit into memory, and where all do; never are two held that do not fit."""
    train = featcache.open_store(viewed)["train"]
    loads, alive, size = [], [], train["pooled"].nbytes
    load = Input.load

    def watched(self, opened, splits, device, view, rows):
        loads.append(view)
        result = load(self, opened, splits, device, view, rows)
        alive.append(weakref.ref(result))
        return result

    def free(_):
        return int(room * size) - size * sum(reference() is not None for reference in alive)

    monkeypatch.setattr(Input, "load", watched)
    for module in ("input", "resident"):
        monkeypatch.setattr(f"featcache.probes.inputs.{module}.free_bytes", free)
    run = featcache.train_probes({"probes": [GROUP | {"views": [0, 2, "all"]}]}, store=viewed, run=tmp_path / "r")
    assert loads == ([0, 1, 2, 3] if room == 100 else [0, 1, 2, 1, 2, 1, 2, 3, 1, 2])
    probes = {r["views"]: r["probe"] for r in run.scores}
    assert list(probes) == ["0", "2", "3"]
    for views, probe in probes.items():
        trained = load_probe(run.path, probe)
        expected = plain_training(train, int(views), trained.spec)
        assert (trained.weights["fc0.weight"] - expected.weight).abs().max() < 1e-5
        assert (trained.weights["fc0.bias"] - expected.bias).abs().max() < 1e-5


def test_scores_are_those_of_the_images_as_they_are(viewed, tmp_path):
    content = {"probes": [GROUP]}
    run = featcache.train_probes(content, store=viewed, run=tmp_path / "r")
    (probe,) = {r["probe"] for r in run.scores}
    trained = load_probe(run.path, probe)
    assert trained.spec.views == K, "all that the store has, where the grid says nothing"
    for role in ("train", "test"):
        split = featcache.open_store(viewed)[role]
        logits = torch.from_numpy(split["pooled"][:]) @ trained.weights["fc0.weight"].T + trained.weights["fc0.bias"]
        known = [(column >= 0, column == 1) for column in split.labels.T]
        values = [average_precision_score(y[k], logits[:, c][k]) for c, (k, y) in enumerate(known) if y.any()]
        assert run.row(probe, "map", role)["value"] == pytest.approx(np.mean(values), abs=1e-6)


def test_a_probe_without_views_keeps_its_id():
    assert SPEC.id == "ef7aa49fc4", "the id that it had before there were views"
    fields = spec_to_dict(SPEC)
    assert "views" not in fields
    assert spec_from_dict(fields) == SPEC, "a probe file from before there were views"
    assert len({replace(SPEC, views=views).id for views in (0, 1, 2, None)}) == 4


def refuse(**change):
    return {"probes": [GROUP | change]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (refuse(views=4), r"probes\[0\].views: 4 views asked for, and store .* has 3 of train; write views: 0"),
        (refuse(views=-1), r"probes\[0\].views: -1 is not a whole number of at least 0, or all"),
        (refuse(views="some"), "'some' is not a whole number of at least 0, or all"),
        (refuse(views=[3, "all"]), r"probes\[0\]: repeats a probe of probes\[0\]; features and views"),
        (refuse(optimizer="lbfgs"), "optimizer lbfgs trains on the images as they are: say views: 0"),
        (refuse() | {"splits": {"train": "train@1"}}, "no split 'train@1'"),
    ],
)
def test_grids_that_ask_for_other_views(viewed, tmp_path, content, message):
    with pytest.raises(BadInput, match=message):
        featcache.train_probes(content, store=viewed, run=tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_a_union_of_splits_has_the_views_of_all_or_none(viewed):
    opened, mixed, errors = featcache.open_store(viewed), {"train": 3, "val": 0}, []
    group = Group({}, "probes[7]")
    assert _views(SPEC, group, opened, mixed, errors) == 0 and not errors
    for views, words in ((None, "all views"), (2, "2 views")):
        assert _views(replace(SPEC, views=views), group, opened, mixed, errors) is None
        said = f"{words} asked for, and store .* has 3 of train, 0 of val; write views: 0"
        assert re.match(rf"probes\[7\].views: {said}", errors[-1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"views": -1}, "-1"),
        ({"split": "val,test"}, "of the splits val, test none is for that (their names begin with train)"),
        ({"views": 0, "crop-scale": "0.2,1"}, "say how many with --views"),
        ({"crop-scale": "0.2"}, "'0.2': expected two numbers, as in 0.08,1"),
        ({"crop-scale": "0.9,0.2"}, "crop scale 0.9 to 0.2"),
        ({"crop-scale": "0,1"}, "crop scale 0 to 1"),
        ({"crop-scale": "nan,1"}, "crop scale nan to 1"),
        ({"decoder": "fast"}, "fast"),
    ],
)
def test_wrong_options(scenes, checkpoint, tmp_path, command, change, message):
    code, _, err = command("extract", *view_options(scenes, checkpoint, tmp_path / "s.zarr", **change))
    assert code == 2 and message in err and "Traceback" not in err
    assert not (tmp_path / "s.zarr").exists()


def test_wrong_augmentations():
    for wrong in ({"ratio": (2, 1)}, {"ratio": (0, 1)}, {"flip": 1.5}, {"scale": (0.5, 1.1)}):
        with pytest.raises(BadInput, match="expected"):
            Augmentation(**wrong)
    assert Augmentation().draw(np.empty((0, 2)), 0, 1).shape == (0, 5)


@pytest.fixture
def large(tmp_path, scenes):
    """Records of one photograph, 1499 x 1001: as JPEG, as grey JPEG, and as PNG."""
    record = read_dataset("voc", scenes, ["val"]).splits["val"][0]
    picture = Image.fromarray(photographs.astronaut()).resize((1499, 1001))
    picture.save(tmp_path / "a.jpg", quality=90)
    picture.convert("L").save(tmp_path / "grey.jpg", quality=90)
    Image.open(tmp_path / "a.jpg").save(tmp_path / "a.png")
    return {
        name: replace(record, image=tmp_path / name, height=1001, width=1499) for name in ("a.jpg", "grey.jpg", "a.png")
    }


@pytest.mark.process
@pytest.mark.parametrize("rule", ["squash", "crop", "warp"])
@pytest.mark.parametrize("crop", [None, (100, 333, 701, 905, 1), (0, 0, 1001, 1499, 0), (3, 5, 200, 210, 1)])
def test_draft_decoding_is_close_and_only_for_jpegs(large, crop, rule):
    preprocessing = Preprocessing(64, (0,) * 3, (1,) * 3, resize=rule)
    exact, draft = (
        {name: load_input(record, preprocessing, decoder, crop).int() for name, record in large.items()}
        for decoder in DECODERS.values()
    )
    assert torch.equal(exact["a.png"], draft["a.png"]) and torch.equal(exact["a.png"], exact["a.jpg"])
    far = (exact["a.jpg"] - draft["a.jpg"]).abs().float()
    small = crop is not None and min(crop[2:4]) < 256
    assert far.max() == 0 if small else 0 < far.mean() < 1.5
    assert (exact["grey.jpg"] - draft["grey.jpg"]).abs().float().mean() < 1.5


def test_draft_decoding_notices_another_size(large):
    wrong = replace(large["a.jpg"], width=1501)
    for decoder in DECODERS.values():
        with pytest.raises(BadInput, match="its annotation says 1501x1001"):
            load_input(wrong, Preprocessing(64, (0,) * 3, (1,) * 3), decoder)


@pytest.mark.process
def test_attribution_decodes_as_the_store_was_decoded(scenes, checkpoint, tmp_path, command):
    root = tmp_path / "scenes"
    shutil.copytree(scenes, root)
    for file in root.rglob("*.xml"):
        words = re.sub(r"<(width|height|[xy]m..)>(\d+)<", lambda m: f"<{m[1]}>{4 * int(m[2])}<", file.read_text())
        file.write_text(words)
    for file in root.rglob("*.jpg"):
        Image.open(file).resize((1280, 960)).save(file)
    words = options(root, checkpoint, tmp_path / "s.zarr", features="pooled", decoder="draft", dtype="float32")
    assert command("extract", *words)[0] == 0
    store = featcache.open_store(tmp_path / "s.zarr")
    assert store.manifest.identity["decoder"] == "pillow-draft"
    run = featcache.train_probes({"probes": [GROUP]}, store=tmp_path / "s.zarr", run=tmp_path / "r")
    featcache.attribute(
        run.path, rule="best map", methods=["input_x_gradient"], limit=2, sanity=True,
        backbone=checkpoint, dataset="voc", root=root,
    )  # fmt: skip
    with np.load(tmp_path / "r/attribution.npz") as kept:
        record = next(r for r in read_dataset("voc", root, ["test"]).splits["test"] if r.id == kept["ids"][0])
        draft = load_input(record, Preprocessing(SIZE, (0,) * 3, (1,) * 3), "pillow-draft").permute(1, 2, 0)
        assert np.array_equal(kept["images"][0], draft.numpy())
        assert not np.array_equal(kept["images"][0], np.asarray(Image.open(record.image).resize((SIZE, SIZE), 2)))


@pytest.mark.parametrize("scale", [[0.5], [0.2, 0.5, 1]])
def test_a_crop_scale_is_two_numbers(scenes, checkpoint, tmp_path, scale):
    with pytest.raises(BadInput, match="expected two numbers"):
        featcache.extract(checkpoint, "voc", root=scenes, size=64, store=tmp_path / "s", views=1, crop_scale=scale)
