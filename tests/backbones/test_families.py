"""A family of networks is what its Architectures say: nothing else of featcache has to know it."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from featcache.backbones import ARCHITECTURES
from featcache.backbones.architecture import Architecture, without
from featcache.backbones.load import load_backbone
from featcache.errors import BadInput
from featcache.feature import parse_features

SIDE = 32


class Net(nn.Module):
    """Two convolutions and a classifier."""

    def __init__(self, width):
        super().__init__()
        self.first_of_family = nn.Conv2d(3, width, 3, stride=4)
        self.second = nn.Conv2d(width, 2 * width, 3)
        self.out = nn.Linear(2 * width, 5)

    def forward(self, images):
        """Map images [B, 3, H, W] to logits [B, 5], or to pooled features."""
        return self.out(self.second(self.first_of_family(images)).mean((2, 3)))


def family(width):
    def customs(architecture, checkpoint):
        if checkpoint is None:
            return {"short_side": SIDE}, {}
        named = "student" in checkpoint.encoder.prefix.split(".")
        origins = {"mean": "a guess: by the layout", "short_side": None}
        return ({"mean": (0.25, 0.5, 0.75), "short_side": 40} if named else {}), (origins if named else {})

    def infer(tensors, hints):
        return replace(family(len(tensors["first_of_family.weight"])), note=f"words: {sorted(hints.get('words', ()))}")

    return Architecture(
        name=f"net{width}", build=lambda: Net(width), trunk=without("out"), signature="first_of_family.weight",
        classifier=("out.",), aliases={"last": "second", "feat1": "first_of_family"}, size=SIDE, customs=customs, infer=infer,
        layouts={"0.weight": lambda tensors: {f"first_of_family{k[1:]}" if k[0] == "0" else k: v for k, v in tensors.items()}},
    )  # fmt: skip


@pytest.fixture
def net(monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "net8", family(8))
    torch.manual_seed(0)
    return Net(16)


def test_a_family_is_recognised_loaded_and_run_by_what_its_architecture_says(net, tmp_path):
    torch.save({f"module.{k}": v for k, v in net.state_dict().items()}, tmp_path / "x.pth")
    backbone = load_backbone(tmp_path / "x.pth", resize="own")
    assert backbone.arch == "net16" and backbone.layers == ["first_of_family", "second"]
    assert "architecture: net16, by tensor names and shapes" in backbone.load_report
    assert "left out: module.out.bias, module.out.weight" in backbone.load_report
    assert "words: ['module']" in backbone.load_report, "what the file's other names say reaches the family"
    assert backbone.preprocessing_report == () and backbone.preprocessing.mean == Architecture.mean
    images = torch.randn(2, 3, SIDE, SIDE)
    with torch.inference_mode():
        values = backbone(images, parse_features("pooled", backbone.aliases, backbone.layers))
        expected = net.second(net.first_of_family(images)).mean((2, 3))
    assert torch.allclose(values["second:pooled"], expected, atol=1e-6)


def test_a_familys_customs_tell_the_input_of_a_layout(net, tmp_path):
    torch.save({f"student.{k}": v for k, v in net.state_dict().items()}, tmp_path / "x.pth")
    backbone = load_backbone(tmp_path / "x.pth", resize="crop")
    assert backbone.preprocessing.mean == (0.25, 0.5, 0.75) and backbone.preprocessing.short == 40
    assert backbone.preprocessing_report == ("mean: a guess: by the layout (--mean to differ)",)
    assert load_backbone("random", arch="net8", resize="crop").preprocessing.short == SIDE
    assert load_backbone("random", arch="net8", resize="crop").preprocessing.mean == Architecture.mean


def test_a_familys_other_layout_and_its_misfits(net, tmp_path):
    renamed = {k.replace("first_of_family", "0"): v for k, v in net.state_dict().items()}
    torch.save(renamed, tmp_path / "x.pth")
    assert load_backbone(tmp_path / "x.pth").weights_sha256
    torch.save({k: v for k, v in net.state_dict().items() if k != "second.bias"}, tmp_path / "y.pth")
    with pytest.raises(BadInput, match="y.pth does not fit net16; missing: second.bias"):
        load_backbone(tmp_path / "y.pth")
