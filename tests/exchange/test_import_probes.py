"""How-to-Probe's mmpretrain checkpoints as probes of a run: the same logits, and no invented training."""

import csv
import math
import re
import shutil
import sys
import types

import numpy as np
import pytest
import torch
from bcos.models.resnet import resnet18 as bcos_resnet18
from bcos.modules import BcosConv2d, LogitLayer
from bcos.modules.norms import BatchNormUncentered2d, NoBias
from folders import tree_hash
from parts import Head, Loss
from sklearn.metrics import average_precision_score
from torch import nn
from torchvision.models import resnet18

import featcache
from featcache.backbones import ARCHITECTURES
from featcache.backbones.architecture import Architecture
from featcache.errors import BadInput
from featcache.exchange.head_names import from_published, published_offset, to_published
from featcache.probes.heads.module import HeadModule
from featcache.probes.runs.probe_file import load_probe
from featcache.probes.runs.run import select
from featcache.probes.spec import imported_spec
from featcache.probes.weights import initial_weights
from featcache.store.sealed import seal, unseal

C, H = 10, 12


class PublishedHead(nn.Module):
    """How-to-Probe's heads by structure and names: `fc`, `fc{i}` with `bn{i}` between, `.linear` in B-cos layers."""

    def __init__(self, dim, depth, bcos=False, bias=False, norm=None, name="fc{}", offset=0.0):
        super().__init__()
        widths = [dim, *[H] * (depth - 1), C]
        self.order = []
        for i in range(depth):
            layer = BcosConv2d(widths[i], widths[i + 1]) if bcos else nn.Conv2d(widths[i], widths[i + 1], 1, bias=bias)
            self.order.append(name.format(i))
            self.add_module(name.format(i), layer)
            if i < depth - 1:
                self.order.append(f"bn{i}")
                self.add_module(f"bn{i}", norm(widths[i + 1]))
                self.order += [] if bcos else [None]
        self.logits = LogitLayer(logit_bias=offset or None)

    def forward(self, maps):
        for name in self.order:
            maps = maps.relu() if name is None else getattr(self, name)(maps)
        return self.logits(maps.mean((2, 3)))


BNU = NoBias(BatchNormUncentered2d)
# Name, the head, its spec, and the offset for the COCO and VOC heads, which is 0.
HEADS = {
    "linear": (dict(depth=1, bias=True, name="fc"), Head("linear")),
    "linear-no-bias": (dict(depth=1, name="fc0"), Head("linear", bias=False)),
    "std-2-bias": (dict(depth=2, bias=True, norm=nn.BatchNorm2d), Head("mlp", 2, H, "bn")),
    "std-3": (dict(depth=3, norm=BNU), Head("mlp", 3, H, "bnu", False)),
    "std-2-bias-bnu": (dict(depth=2, bias=True, norm=BNU), Head("mlp", 2, H, "bnu")),
    "bcos-1": (dict(depth=1, bcos=True), Head("bcos", 1, 0, "none", False, b=2.0)),
    "bcos-3": (dict(depth=3, bcos=True, norm=BNU), Head("bcos", 3, H, "bnu", False, b=2.0)),
    "bcos-old": (dict(depth=1, bcos=True, name="fc"), Head("bcos", 1, 0, "none", False, b=2.0)),
}


def trained_head(dim, maps, **settings):
    """A head whose norms have seen data."""
    head = PublishedHead(dim, **settings).train()
    with torch.no_grad():
        for _ in range(3):
            head(maps)
    return head.eval()


def mm_checkpoint(path, backbone, head, **more):
    """Write what mmengine's CheckpointHook does of an ImageClassifier, as far as it loads without code."""
    state = {f"backbone.{k}": v for k, v in backbone.items() if not k.startswith("fc.")}
    state |= {f"head.{k}": v for k, v in head.items()}
    content = {
        "meta": {"epoch": 50, "iter": 3900, "experiment_name": "probe", "time": "20240501_101112", "seed": None,
                 "mmengine_version": "0.8.4", "cfg": "model = dict()", "dataset_meta": {"classes": ["a", "b"]}},
        "state_dict": state,
        "message_hub": {"log_scalars": {}, "runtime_info": {"epoch": 49, "max_epochs": 50}, "resumed_keys": {}},
        "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.003, "params": [0]}]},
        "param_schedulers": [{"step_size": 6, "gamma": 0.1, "last_step": 50}],
        **more,
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


@pytest.fixture(scope="module")
def heads(store):
    """{name: head in eval mode} on the last map of ResNet-18."""
    maps = torch.from_numpy(featcache.open_store(store)["train"]["spatial"][:])
    torch.manual_seed(5)
    return {name: trained_head(maps.shape[1], maps, **settings) for name, (settings, _) in HEADS.items()}


@pytest.fixture(scope="module")
def files(checkpoint, heads, tmp_path_factory):
    """{name: checkpoint}, each in a folder of its own as work_dirs has them."""
    backbone, root = torch.load(checkpoint, weights_only=True), tmp_path_factory.mktemp("work_dirs")
    return {name: mm_checkpoint(root / name / "epoch_50.pth", backbone, h.state_dict()) for name, h in heads.items()}


@pytest.fixture(scope="module")
def run(store, files, tmp_path_factory):
    """A run of all of them, imported in two goes."""
    folder = tmp_path_factory.mktemp("runs") / "r"
    first = [path for name, path in files.items() if name != "std-3"]
    featcache.import_probes(first, store=store, run=folder, loss="bce")
    return featcache.import_probes(files["std-3"], store=store, run=folder, loss="ce")


@pytest.fixture(scope="module")
def ids(run):
    """{name: id of the probe}."""
    return {r["name"].removesuffix("/epoch_50"): r["probe"] for r in run.scores}


@pytest.mark.parametrize("name", HEADS)
def test_logits_and_scores_are_those_of_the_published_head(run, ids, store, heads, name):
    probe = load_probe(run.path, ids[name])
    assert probe.spec.head == HEADS[name][1]
    test = featcache.open_store(store)["test"]
    maps = torch.from_numpy(test["spatial"][:])
    with torch.inference_mode():
        expected = heads[name](maps)
        torch.testing.assert_close(HeadModule(probe.spec.head, probe.weights)(maps), expected, rtol=1e-5, atol=1e-5)
    values = []
    for c in range(C):
        known = test.labels[:, c] != -1
        if (test.labels[:, c] == 1).any():
            values.append(average_precision_score(test.labels[known, c] == 1, expected[known, c].numpy()))
    assert run.row(ids[name], "map", "test")["value"] == pytest.approx(np.mean(values), abs=1e-6)


def test_what_is_not_known_is_not_invented(run, ids, files):
    with open(run.path / "scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert sum(row["metric"] == "map" for row in rows) == len(HEADS) * 3
    unknown = ("epoch", "epochs", "batch_size", "seed", "views", "optimizer.lr", "optimizer.momentum",
               "optimizer.weight_decay", "schedule.gamma", "schedule.warmup_epochs")  # fmt: skip
    assert all(row[field] == "" for row in rows for field in unknown)
    assert {row["optimizer.type"] for row in rows} == {row["schedule.type"] for row in rows} == {"imported"}
    assert {row["probe"] for row in rows if row["loss.type"] == "ce"} == {ids["std-3"]}
    assert run.summary["seed"] is None and run.summary["diverged"] == []
    assert {e["file"] for e in run.summary["imported"]} == {str(path) for path in files.values()}
    assert {r["features"] for r in run.scores if r["head.type"] == "linear"} == {"layer4:pooled"}
    assert (run.path / "history.csv").read_text() == "probe,epoch,loss\n"


def test_the_run_is_one_like_any_other(run, ids, files, checkpoint, store, tmp_path, command):
    shutil.copytree(run.path, tmp_path / "r")
    assert len(select(run, "best map per head,loss")) == 4
    code, out, _ = command("attribute", "--run", tmp_path / "r", "--select", "best map per head", "--limit", 4)
    assert code == 0 and set(re.findall("^[0-9a-f]{10} +([^ ]+)", out, re.MULTILINE)) <= {
        "linear",
        "mlp-2",
        "mlp-3",
        "bcos-1",
        "bcos-3",
    }
    code, _, _ = command("report", "--run", tmp_path / "r", "--out", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert code == 0 and "imported (" in page and "bcos-3 (12)" in page and "Learning rate" not in page
    merge = ("export", "--run", tmp_path / "r", "--probe", ids["bcos-3"], "--backbone", checkpoint)
    assert command(*merge, "--to", tmp_path / "again/merged.pth")[0] == 0
    merged, source = (
        torch.load(p, weights_only=True)["state_dict"] for p in (tmp_path / "again/merged.pth", files["bcos-3"])
    )
    assert all(torch.equal(merged[k], v) for k, v in source.items() if not k.endswith("num_batches_tracked"))
    code, out, _ = command("import-probes", tmp_path / "again/merged.pth", "--store", store, "--run", tmp_path / "q",
                           "--loss", "bce")  # fmt: skip
    assert code == 0 and ids["bcos-3"] in out, "what was exported is imported as the same probe"


def test_the_same_again_and_a_kill_in_between(run, files, store, tmp_path):
    shutil.copytree(run.path, tmp_path / "r")
    summary = unseal((tmp_path / "r/run.json").read_bytes())
    del summary["key"]
    summary["imported"] = summary["imported"][:2]
    (tmp_path / "r/run.json").write_bytes(seal(summary))
    with pytest.raises(BadInput, match="not finished"):
        featcache.open_run(tmp_path / "r")
    for names, loss in (([n for n in files if n != "std-3"], "bce"), (["std-3"], "ce")):
        again = featcache.import_probes([files[n] for n in names], store=store, run=tmp_path / "r", loss=loss)
    assert again.scores == run.scores and tree_hash(tmp_path / "r/probes") == tree_hash(run.path / "probes")


def test_trained_and_imported_probes_do_not_mix(run, files, store, tmp_path, command):
    grid = {"probes": [{"features": "pooled", "head": "linear", "loss": "bce", "epochs": 1,
                        "optimizer": {"type": "sgd", "lr": 0.1}}]}  # fmt: skip
    before = tree_hash(run.path)
    with pytest.raises(BadInput, match="holds imported probes; train into another --run"):
        featcache.train_probes(grid, store=store, run=run.path)
    assert tree_hash(run.path) == before
    trained = featcache.train_probes(grid, store=store, run=tmp_path / "t")
    with pytest.raises(BadInput, match="holds probes that were trained here"):
        featcache.import_probes(files["linear"], store=store, run=trained.path, loss="bce")
    assert command("report", "--run", run.path, "--run", trained.path, "--out", tmp_path / "both.html")[0] == 0


def test_the_offset_can_be_said(files, store, tmp_path, command):
    words = ("import-probes", files["bcos-1"], "--store", store, "--run", tmp_path / "r", "--loss", "bce")
    assert command(*words, "--offset", "-ln(C-1)")[0] == 0
    assert command(*words, "--offset", "-1.5")[0] == 0
    offsets = [float(r["head.offset"]) for r in featcache.open_run(tmp_path / "r").scores if r["metric"] == "map"]
    assert offsets == [-math.log(9)] * 3 + [-1.5] * 3
    code, _, err = command(*words, "--offset", "ln(C)")
    assert code == 2 and "--offset: 'ln(C)' is not a number" in err


# How-to-Probe's single-label heads: form, bias, loss, offset.
SINGLE = [
    ("linear", False, "bce", 0.0), ("linear", True, "ce", 0.0), ("mlp", False, "bce", "-ln(C-1)"),
    ("mlp", False, "ce", 0.0), ("mlp", True, "bce", 0.0), ("mlp", True, "ce", 0.0),
    ("bcos", False, "bce", "-ln(C-1)"), ("bcos", False, "ce", "-ln(C-1)"),
]  # fmt: skip


@pytest.mark.parametrize(("form", "bias", "loss", "offset"), SINGLE)
def test_offsets_are_those_of_the_published_heads(form, bias, loss, offset):
    head = Head(form, *((2, H) if form == "mlp" else ()), bias=bias)
    assert published_offset(head, {}, loss, multi_label=False) == offset
    assert published_offset(head, {}, loss, multi_label=True) == 0
    assert published_offset(head, {"fc.linear.weight": None}, loss, multi_label=False) == 0


@pytest.mark.parametrize("multi_label", [True, False])
@pytest.mark.parametrize(
    "head", [h for _, h in HEADS.values()] + [Head("bcos", 2, H, "none", False, b=2.0, max_out=3)], ids=str
)
def test_names_there_and_back(head, multi_label):
    weights = initial_weights(imported_spec("x", "pooled", head, Loss("bce"), "0"), 7, C)
    state = to_published(head, weights, multi_label)
    again, back = from_published(state, C, "x.pth")
    assert again == head and back.keys() == weights.keys()
    assert all(torch.equal(back[k], v) for k, v in weights.items())


def spoil(state, **change):
    return {k: v for k, v in (state | change).items() if v is not None}


@pytest.mark.process
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("linear", {"layers.head.weight": torch.zeros(3)}, "none of How-to-Probe's, which have no head.layers.head.weight"),
        ("linear", {"fc.weight": torch.zeros(7, 512, 1, 1)}, "has 7 outputs, layer by layer 512 to 7; the store has 10 classes"),
        ("linear", {"fc.weight": torch.zeros(10, 500, 1, 1)}, "must be (10, 512)"),
        ("linear", {"fc.weight": torch.zeros(10, 512, 3, 3)}, "is no 1x1 convolution"),
        ("linear", {"fc.bias": torch.zeros(3)}, "fc0.bias of its head is (3,); on layer4:pooled it must be (10,)"),
        ("linear", {"fc.weight": torch.full((10, 512), torch.nan)}, "not finite"),
        ("std-3", {"fc1.weight": None}, "layers of its head are missing"),
        ("std-3", {"bn1.weight": None}, "one whole batch norm between any two layers"),
        ("std-3", {"bn1.bias": torch.zeros(H)}, "mixes batch norms with and without bias"),
        ("std-3", {"bn1.running_mean": torch.ones(H)}, "head.bn1 has no bias but a running mean"),
        ("std-3", {"fc0.bias": torch.zeros(H)}, "mixes layers with and without bias"),
        ("bcos-3", {f"fc{i}.bias": torch.zeros(1) for i in range(3)}, "a B-cos head has no bias"),
        ("bcos-3", {f"bn{i}.bias": torch.zeros(H) for i in range(2)}, "B-cos head has batch norms with bias"),
        ("bcos-3", {"fc0.linear.weight": None, "fc0.weight": torch.zeros(H, 512, 1, 1)}, "mixes B-cos and plain layers"),
        ("bcos-1", {"fc0.linear.weight": torch.zeros(30, 512, 1, 1)}, "has 30 outputs"),
    ],
    ids=lambda x: x[:40] if isinstance(x, str) else "",
)  # fmt: skip
def test_heads_that_are_not_understood_are_refused(heads, checkpoint, store, tmp_path, name, change, message):
    backbone = torch.load(checkpoint, weights_only=True)
    path = mm_checkpoint(tmp_path / "x.pth", backbone, spoil(heads[name].state_dict(), **change))
    with pytest.raises(BadInput) as caught:
        featcache.import_probes(path, store=store, run=tmp_path / "r", loss="bce")
    assert message in caught.value.message and "x.pth" in caught.value.message
    assert not (tmp_path / "r").exists()


class HistoryBuffer:
    """What a message hub pickles."""


def test_mmengines_history_buffers_are_no_hindrance(heads, files, checkpoint, store, tmp_path, monkeypatch):
    """Every checkpoint of a real training has them; the reader lets them lie."""
    module = types.ModuleType("mmengine.logging.history_buffer")
    module.HistoryBuffer = type("HistoryBuffer", (), {"__module__": module.__name__})
    for name in ("mmengine", "mmengine.logging"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    history = module.HistoryBuffer()
    history._log_history = np.zeros(3)
    backbone, state = torch.load(checkpoint, weights_only=True), heads["linear"].state_dict()
    path = mm_checkpoint(tmp_path / "x.pth", backbone, state, message_hub={"log_scalars": {"train/loss": history}})
    for name in ("mmengine", "mmengine.logging", module.__name__):
        monkeypatch.delitem(sys.modules, name)
    with_history, without = (
        featcache.import_probes(source, store=store, run=tmp_path / folder, loss="bce").scores[0]["probe"]
        for source, folder in ((path, "a"), (files["linear"], "b"))
    )
    assert with_history == without


def test_other_checkpoints_are_refused(heads, files, checkpoint, store, tmp_path, command):
    state = heads["linear"].state_dict()
    other = mm_checkpoint(tmp_path / "other.pth", resnet18().state_dict(), state)
    backbone = torch.load(checkpoint, weights_only=True)
    code = mm_checkpoint(tmp_path / "code.pth", backbone, state, message_hub={"log_scalars": {"loss": HistoryBuffer()}})
    bare = mm_checkpoint(tmp_path / "bare.pth", backbone, {})
    words = ("import-probes", files["bcos-1"], "--store", store, "--run", tmp_path / "r", "--loss", "bce")
    for path, parts in (
        (other, ("holds another backbone", featcache.open_store(store).manifest.identity["weights_sha256"])),
        (code, ("needs code execution to load", "HistoryBuffer", "convert it in a sandbox")),
        (bare, ("holds no head",)),
        (tmp_path / "nowhere.pth", ("not found",)),
    ):
        done, _, err = command(*words, path)
        assert done == 2 and all(part in err for part in (str(path), *parts)) and "Traceback" not in err
        assert not (tmp_path / "r").exists(), "the good one before it was not written either"
    with pytest.raises(BadInput, match="--loss: 'bcf' is not one of bce, ce; did you mean 'bce'"):
        featcache.import_probes(files["linear"], store=store, run=tmp_path / "r", loss="bcf")


class WithInverse(nn.Module):
    """The B-cos package's ResNet up to its last map; appends 1 - x, as How-to-Probe's does."""

    def __init__(self, network):
        super().__init__()
        for name in ("conv1", "bn1", "pool", "layer1", "layer2", "layer3", "layer4"):
            self.add_module(name, getattr(network, name))

    def forward(self, images):
        for module in self.children():
            images = module(torch.cat([images, 1 - images], 1) if module is self.conv1 else images)
        return images


@pytest.fixture
def bcos_architecture(monkeypatch):
    """Add B-cos's ResNet-18 with uncentred batch norm as an architecture of a user's."""

    def build():
        return bcos_resnet18(pretrained=False, in_chans=6, norm_layer=BNU, num_classes=C)

    name = "test_bcos_resnet18"
    signature, aliases = "layer4.0.conv1.linear.weight", {"last": "layer4"}
    made = Architecture(name, build, WithInverse, signature, ("fc.",), aliases, mean=(0,) * 3, std=(1,) * 3)
    monkeypatch.setitem(ARCHITECTURES, name, made)
    return name


@pytest.mark.slow
@pytest.mark.process
def test_a_b_cos_backbone_and_its_heads(scenes, bcos_architecture, tmp_path):
    """Also with a head of B-cos layers on top, from import to the program that runs alone."""
    torch.manual_seed(0)
    network = ARCHITECTURES[bcos_architecture].build().eval()
    path = tmp_path / "pretrained.pth"
    torch.save(network.state_dict(), path)
    store = featcache.extract(path, "voc", root=scenes, arch=bcos_architecture, features="spatial", size=64,
                              dtype="float32", workers=0, batch_size=16, store=tmp_path / "s.zarr")  # fmt: skip
    data = featcache.open_store(store)
    maps = torch.from_numpy(data["train"]["spatial"][:])
    heads = {n: trained_head(512, maps, **HEADS[n][0]) for n in ("bcos-3", "linear")}
    files = [mm_checkpoint(tmp_path / f"{n}.pth", network.state_dict(), h.state_dict()) for n, h in heads.items()]
    run = featcache.import_probes(files, store=store, run=tmp_path / "r", loss="bce")
    images = torch.rand(3, 3, 64, 64)
    for row in [r for r in run.scores if r["split"] == "test"]:
        head = heads[row["name"].rpartition("/")[2]]
        target = tmp_path / f"{row['probe']}.pt2"
        featcache.export(run=run.path, probe=row["probe"], backbone=path, to=target)
        with torch.inference_mode():
            expected = head(WithInverse(network)(images))
            got = torch.export.load(target).module()(images)
        assert row["features"] == "layer4:spatial", "the store has no pooled features"
        assert (got - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_store_of_trainval_and_test(checkpoint, scenes, heads, tmp_path):
    """As How-to-Probe splits VOC: trainval has the role of train, and is what a choice looks at."""
    root = shutil.copytree(scenes, tmp_path / "data")
    lists = root / "VOCdevkit/VOC2007/ImageSets/Main"
    both = "".join((lists / f"{split}.txt").read_text() for split in ("train", "val"))
    (lists / "trainval.txt").write_text(both)
    settings = {"root": root, "arch": "resnet18", "features": "pooled", "size": 64, "workers": 0, "dtype": "float32"}
    path = mm_checkpoint(tmp_path / "x.pth", torch.load(checkpoint, weights_only=True), heads["linear"].state_dict())
    store = featcache.extract(checkpoint, "voc", splits=["trainval", "test"], store=tmp_path / "s.zarr", **settings)
    run = featcache.import_probes(path, store=store, run=tmp_path / "r", loss="bce")
    assert run.summary["rows"] == {"train": 60, "test": 20} and run.summary["select"]["split"] == "train"
    assert select(run, "best map") == [run.scores[0]["probe"]]
    mlp = mm_checkpoint(tmp_path / "m.pth", torch.load(checkpoint, weights_only=True), heads["std-3"].state_dict())
    with pytest.raises(BadInput, match="the store holds no feature 'layer4:spatial'"):
        featcache.import_probes(mlp, store=store, run=tmp_path / "q", loss="bce")
    only = featcache.extract(checkpoint, "voc", splits=["test"], store=tmp_path / "t.zarr", **settings)
    with pytest.raises(BadInput, match="has nothing but test to choose probes by"):
        featcache.import_probes(path, store=only, run=tmp_path / "q", loss="bce")
