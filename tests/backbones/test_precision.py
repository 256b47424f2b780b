"""Precision: what is asked for is what runs, what it costs is measured, and said."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from extracting import options
from torch import nn

import featcache
from featcache.backbones import ARCHITECTURES
from featcache.backbones.backbone import Backbone
from featcache.backbones.load import load_backbone
from featcache.backbones.precision import PRECISIONS, check_precision, cosine_to_float32, running
from featcache.errors import BadInput
from featcache.extraction.fill import _cast
from featcache.feature import parse_features
from featcache.store.manifest import read_manifest
from featcache.store.sealed import seal, unseal

# Many networks, or many runs: longer together than the fast tests may take.
pytestmark = pytest.mark.process

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def backbone(checkpoint):
    return load_backbone(checkpoint, size=64)


@pytest.fixture(scope="module")
def images():
    torch.manual_seed(1)
    return torch.randn(4, 3, 64, 64)


def features(backbone, spec="pooled,spatial"):
    return parse_features(spec, backbone.aliases, backbone.layers)


def state_hash(module):
    digest = hashlib.sha256()
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        digest.update(f"{name} {tensor.dtype}".encode() + tensor.detach().numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("name", PRECISIONS)
def test_no_tensor_of_the_network_moves(backbone, images, name):
    before = state_hash(backbone)
    with running(name, CPU):
        results = backbone(images, features(backbone))
    assert state_hash(backbone) == before and len(list(backbone.buffers())) == 60
    assert all(values.dtype == torch.float32 and values.is_inference() for values in results.values())


def test_float32_is_the_plain_network_to_the_bit(backbone, images):
    with torch.no_grad():
        expected = backbone.trunk(images.contiguous(memory_format=torch.channels_last))
    with running("float32", CPU):
        assert torch.equal(backbone(images, features(backbone))["layer4:pooled"], expected)


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_half_precision_is_torchs_and_means_are_in_float32(backbone, images, name):
    with running(name, CPU):
        got = backbone(images, features(backbone))
    network = nn.Sequential(*list(backbone.trunk.children())[:-2])
    with torch.no_grad(), torch.autocast("cpu", PRECISIONS[name]):
        expected = network(images.contiguous(memory_format=torch.channels_last))
    assert expected.dtype == PRECISIONS[name]
    assert torch.equal(got["layer4:spatial"], expected.float())
    assert torch.equal(got["layer4:pooled"], expected.float().mean((2, 3)))


def test_torchs_settings_hold_for_the_duration_only():
    def now():
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

    before = now()
    with running("tf32", CPU):
        assert now() == ("high", True)
        with running("float32", CPU):
            assert now() == ("highest", False), "cuDNN's own default is tf32"
    with pytest.raises(KeyError), running("tf32", CPU):
        raise KeyError
    assert now() == before and not torch.is_inference_mode_enabled() and not torch.is_autocast_enabled("cpu")


def test_what_cannot_be_is_bad_input(scenes, checkpoint, tmp_path, command):
    for name, message in (("tf32", "tf32 is of NVIDIA GPUs, not of cpu"), ("bf61", "did you mean 'bf16'?")):
        words = options(scenes, checkpoint, tmp_path / "s.zarr", device="cpu", precision=name)
        code, _, err = command("extract", *words)
        assert code == 2 and message in err and not (tmp_path / "s.zarr").exists()
    for name in ("float32", "bf16", "fp16"):
        check_precision(name, CPU)


def test_cosine_by_hand(backbone, images):
    wanted, before = features(backbone, "layer1:pooled,spatial"), state_hash(backbone)
    cosine = cosine_to_float32(backbone, images, wanted, "bf16")
    assert state_hash(backbone) == before
    with running("float32", CPU):
        exact = backbone(images, wanted)
    with running("bf16", CPU):
        rough = backbone(images, wanted)
    cosines = [
        np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b)
        for name in exact
        for a, b in zip(*(r[name].double().flatten(1).numpy() for r in (exact, rough)), strict=True)
    ]
    assert cosine == pytest.approx(min(cosines), abs=1e-6) and 0.99 < cosine < 1
    assert cosine_to_float32(backbone, images, wanted, "float32") == pytest.approx(1, abs=1e-6)


class Delicate(nn.Module):
    """A network in which a great number is added and taken away again, if its checkpoint says so."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8)

    def forward(self, x):
        return self.bn1(self.conv1(x))


@pytest.fixture
def delicate(monkeypatch, tmp_path):
    """Path of a checkpoint of the architecture `delicate`, whose features need all digits of float32."""
    known = replace(
        ARCHITECTURES["resnet18"],
        name="delicate",
        build=Delicate,
        trunk=nn.Sequential,
        signature="conv1.weight",
        aliases={"last": "0"},
    )
    monkeypatch.setitem(ARCHITECTURES, "delicate", known)
    torch.manual_seed(0)
    network = Delicate()
    for tensor in (network.conv1.bias.data, network.bn1.running_mean):
        tensor.fill_(10_000)
    torch.save(network.state_dict(), tmp_path / "delicate.pth")
    return tmp_path / "delicate.pth"


def test_overflow_is_named(delicate, images):
    backbone = load_backbone(delicate, arch="delicate")
    backbone.trunk[0].conv1.weight.mul_(1e6)
    with pytest.raises(BadInput, match=r"--precision fp16: feature 0:\w+ overflows; use bf16"):
        cosine_to_float32(backbone, images, features(backbone), "fp16")


def test_a_store_says_what_its_precision_did(scenes, checkpoint, tmp_path, command):
    given = options(scenes, checkpoint, tmp_path / "s.zarr", split="val", dtype="float32")
    code, _, err = command("extract", *given, "--precision", "bf16")
    manifest = read_manifest(tmp_path / "s.zarr")
    assert code == 0 and manifest.identity["precision"] == "bf16"
    assert 0.99 < manifest.compute["cosine"] < 1
    said = "precision: bf16; on the first image every feature's cosine to float32 is at least"
    assert f"{said} {manifest.compute['cosine']:.6f}\n" in err and "warning: a cosine" not in err
    exact = featcache.extract(
        checkpoint, "voc", root=scenes, splits=["val"], size=64, dtype="float32", workers=0, batch_size=8,
        store=tmp_path / "exact.zarr",
    )  # fmt: skip
    assert read_manifest(exact).compute.keys() == {"device", "threads", "batch_size"}, "float32 is as it always was"
    for name in ("pooled", "spatial"):
        a, b = (featcache.open_store(p)["val"][name][:].reshape(20, -1) for p in (exact, tmp_path / "s.zarr"))
        cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        assert not np.array_equal(a, b) and cosines.min() > 0.999
        assert manifest.compute["cosine"] <= cosines[0] + 2e-6, "the first image's minimum over all features"
    code, _, err = command("extract", *given)
    assert code == 2 and 'precision: "bf16" -> "float32"' in err


def test_measuring_costs_a_few_images_whatever_the_batch_size(scenes, checkpoint, tmp_path, monkeypatch):
    """The images that the network sees, of which float32 takes 2 to 3 times as long as one in bf16."""
    seen, run = {}, Backbone.run

    def counting(self, images):
        halved = torch.is_autocast_enabled("cpu")
        seen[halved] = seen.get(halved, 0) + len(images)
        return run(self, images)

    monkeypatch.setattr(Backbone, "run", counting)
    given = dict(root=scenes, splits=["val"], size=64, workers=0, batch_size=20, store=tmp_path / "s.zarr")
    featcache.extract(checkpoint, "voc", precision="bf16", **given)
    # One more in float32 finds the shapes of the features, in every extraction.
    assert seen == {True: 20 + 1, False: 1 + 1}


def test_an_overflow_after_the_first_image_names_the_precision():
    values = torch.tensor([[1.0], [float("inf")]])
    with pytest.raises(BadInput, match=r"row 1 \(id b\): .* not finite in fp16; extract with --precision float32"):
        _cast(values, torch.float16, "x:pooled", 0, ["a", "b"], "fp16")


def test_a_store_of_folded_batch_norms_is_read_but_not_gone_on_with(scenes, checkpoint, tmp_path, command):
    """Earlier versions folded them, and said so in the manifest."""
    given = options(scenes, checkpoint, tmp_path / "s.zarr", precision="bf16", split="val")
    assert command("extract", *given)[0] == 0
    path = tmp_path / "s.zarr/manifest.json"
    content = unseal(path.read_bytes())
    content["compute"]["folded"] = True
    path.write_bytes(seal(content))
    assert len(featcache.open_store(tmp_path / "s.zarr")["val"]["pooled"][:]) == 20
    (tmp_path / "s.zarr/commits/val/000000.json").unlink()
    code, _, err = command("extract", *given)
    assert code == 2 and "with batch norms folded" in err and "choose another --store" in err


def test_a_low_cosine_is_a_warning(scenes, delicate, tmp_path, command):
    words = options(scenes, delicate, tmp_path / "s.zarr", arch="delicate", split="val", dtype="float32")
    code, _, err = command("extract", *words, "--precision", "bf16")
    assert code == 0
    assert "warning: a cosine below 0.99 may cost the probes accuracy; --precision float32 does not" in err
