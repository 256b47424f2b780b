"""Attention heads of vision transformers, which tensors do not say: right for what is published, said, and by name."""

import math
import re
from functools import partial

import pytest
import torch
from torch import nn

from featcache.backbones.load import load_backbone
from featcache.backbones.recognise import find_architecture, recognise
from featcache.errors import BadInput
from featcache.feature import parse_features

timm = pytest.importorskip("timm")
open_clip = pytest.importorskip("open_clip")
from open_clip.transformer import QuickGELU  # noqa: E402
from open_clip.transformer import VisionTransformer as CLIPTransformer  # noqa: E402
from timm.models.vision_transformer import VisionTransformer  # noqa: E402


def test_every_tower_of_open_clip_has_its_heads():
    seen = set()
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)["vision_cfg"]
        width, narrow = config.get("width"), config.get("head_width", 64)
        if "timm_model_name" in config or isinstance(config["layers"], list) or (width, narrow) in seen:
            continue
        seen.add((width, narrow))
        with torch.device("meta"):
            tower = CLIPTransformer(224, config["patch_size"], width, 1, width // narrow, 4.0, output_dim=8)
        told = recognise(tower.state_dict(), name)
        assert told.heads == width // narrow, name
        assert told.note.startswith(f"heads: {told.heads}, a guess from the width\ntensors cannot tell it from")
    assert {width for width, _ in seen} >= {384, 512, 768, 896, 1024, 1280, 1408, 1664, 1792}


def vit(width, heads, side=4, **changed):
    """A network of two blocks with weights of its own, in timm's key layout."""
    torch.manual_seed(width + heads)
    network = VisionTransformer(
        img_size=16 * side, patch_size=16, embed_dim=width, depth=2, num_heads=heads, num_classes=0,
        norm_layer=partial(nn.LayerNorm, eps=1e-6), **changed,
    )  # fmt: skip
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.05)
    return network.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def fixed_positions(side, width, transposed=False):
    """[1, 1 + side * side, width] with the class token's zeros, as in MoCo v3's code; transposed as in MAE's."""
    frequencies = [10000 ** (-4 * i / width) for i in range(width // 4)]

    def waves(place):
        return [f(place * omega) for f in (math.sin, math.cos) for omega in frequencies]

    grid = [waves(x) + waves(y) if transposed else waves(y) + waves(x) for y in range(side) for x in range(side)]
    return torch.tensor([[[0.0] * width, *grid]])


def moco_v3(width, heads, transposed=False):
    network = vit(width, heads)
    network.pos_embed.copy_(fixed_positions(4, width, transposed))
    return network


def under(prefix, tensors):
    return {f"{prefix}{k}": v for k, v in tensors.items()}


def mmpretrains(tensors):
    """The names of mmpretrain's VisionTransformer."""
    for pattern, new in (
        (r"^patch_embed\.proj\.", "patch_embed.projection."), (r"^blocks\.(\d+)\.norm", r"layers.\1.ln"),
        (r"^blocks\.(\d+)\.mlp\.fc1", r"layers.\1.ffn.layers.0.0"), (r"^norm\.", "ln1."),
        (r"^blocks\.(\d+)\.mlp\.fc2", r"layers.\1.ffn.layers.1"), (r"^blocks\.", "layers."),
    ):  # fmt: skip
        tensors = {re.sub(pattern, new, k): v for k, v in tensors.items()}
    return tensors


def beside(*names):
    return {name: torch.zeros(2) for name in names}


POSITIONS, WIDTH = "a guess from the fixed position embeddings, which are MoCo v3's", "a guess from the width"
# name: (network, file's content from its tensors and those of a moving average, what the report says)
LAYOUTS = {
    "MoCo v3": (
        vit(384, 12),
        lambda a, b: {
            "state_dict": under("module.base_encoder.", a) | under("module.momentum_encoder.", b)
            | beside("module.predictor.0.weight", "module.base_encoder.head.0.weight")
        },
        "heads: 12, a guess from the names of the tensors, which are MoCo v3's (other ViTs of these shapes have 6: --arch",
    ),
    "MoCo v3, bare": (moco_v3(384, 12), lambda a, b: a, f"heads: 12, {POSITIONS} (other ViTs of these shapes have 6: --"),
    "MoCo v3, in half precision": (moco_v3(384, 12).bfloat16().float(), lambda a, b: a, f"heads: 12, {POSITIONS}"),
    "mmpretrain's MoCo v3": (
        moco_v3(384, 12),
        lambda a, b: {
            "state_dict": under("backbone.", mmpretrains(a)) | under("momentum_encoder.module.0.", mmpretrains(b))
            | beside("neck.fc0.weight", "head.predictor.fc0.weight")
        },
        f"heads: 12, {POSITIONS}",
    ),
    "mmpretrain's MoCo v3, the backbone": (
        moco_v3(384, 12), lambda a, b: {"state_dict": under("backbone.", mmpretrains(a))}, f"heads: 12, {POSITIONS}",
    ),
    "MoCo v3's ViT-L": (moco_v3(1024, 16), lambda a, b: a, f"heads: 16, {WIDTH}"),
    "MoCo v3's ViT-L in its training": (
        moco_v3(1024, 16),
        lambda a, b: under("module.base_encoder.", a) | under("module.momentum_encoder.", b) | beside("module.predictor.0"),
        f"heads: 16, {WIDTH}",
    ),
    "mmpretrain's MoCo v3, ViT-L": (
        moco_v3(1024, 16),
        lambda a, b: {
            "state_dict": under("backbone.", mmpretrains(a)) | under("momentum_encoder.module.0.", mmpretrains(b))
        },
        f"heads: 16, {WIDTH}",
    ),
    "MoCo v3's ViT-B": (moco_v3(768, 12), lambda a, b: under("module.base_encoder.", a), f"heads: 12, {WIDTH}"),
    "solo-learn's MoCo v3, ViT-Ti": (
        moco_v3(192, 12),
        lambda a, b: {"state_dict": under("backbone.", a) | under("momentum_backbone.", b) | beside("projector.0.weight")},
        f"heads: 12, {POSITIONS} (other ViTs of these shapes have 3: --arch",
    ),
    "solo-learn": (
        vit(384, 6),
        lambda a, b: {"state_dict": under("backbone.", a) | under("momentum_backbone.", b) | beside("projector.0.weight")},
        f"heads: 6, {WIDTH} (MoCo v3's and SLIP's ViTs of these shapes have 12: --arch vit_d384_l2_patch16_heads12)",
    ),
    "somebody's encoder and its moving average": (
        vit(384, 6),
        lambda a, b: under("encoder.", a) | under("momentum_encoder.", b) | beside("predictor.weight", "projector.weight"),
        f"heads: 6, {WIDTH} (MoCo v3's and SLIP's ViTs of these shapes have 12: --arch vit_d384_l2_patch16_heads12)",
    ),
    "MAE, whose fixed positions are transposed": (moco_v3(384, 6, transposed=True), lambda a, b: a, f"heads: 6, {WIDTH}"),
    "DINO": (
        vit(384, 6),
        lambda a, b: {"teacher": under("backbone.", a), "student": under("module.backbone.", b)}, f"heads: 6, {WIDTH}",
    ),
    "SLIP": (
        vit(384, 12),
        lambda a, b: {"state_dict": under("module.visual.", a) | beside("module.image_mlp.layer1.weight")},
        "heads: 12, a guess from the names of the tensors, which are SLIP's",
    ),
    "SigLIP's so400m": (vit(1152, 16, class_token=False, global_pool="avg", fc_norm=False), lambda a, b: a, "heads: 16, "),
    "a width of nobody's": (vit(200, 4), lambda a, b: a, f"heads: 4, {WIDTH}"),
    "norms of queries": (vit(384, 3, qk_norm=True), lambda a, b: a, "heads: 3, by the width of the queries' norm"),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_heads_of_every_layout(layout, tmp_path):
    network, build, said = LAYOUTS[layout]
    other = {k: v + 1 for k, v in network.state_dict().items()}
    torch.save(build(network.state_dict(), other), tmp_path / "vit.pth")
    backbone = load_backbone(tmp_path / "vit.pth", size=64)
    assert f"\n  {said}" in backbone.load_report
    assert torch.equal(tokens_of(backbone), forward(network))


def tokens_of(backbone):
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        (tokens,) = backbone(images, parse_features("tokens", backbone.aliases, backbone.layers)).values()
    return tokens


def forward(network):
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return network.forward_features(images.contiguous(memory_format=torch.channels_last))


def test_early_timms_small_vit():
    with torch.device("meta"):
        network = VisionTransformer(embed_dim=768, depth=8, num_heads=8, mlp_ratio=3)
    told = recognise(network.state_dict(), "x.pth")
    assert (told.name, told.heads) == ("vit_d768_l8_patch16_heads8", 8) and "heads: 8, a guess" in told.note


@pytest.mark.parametrize(
    ("width", "heads", "arch", "name"),
    [
        (1024, 16, "vit_d1024_l2_patch16_heads16", "vit_d1024_l2_patch16"),
        (1024, 8, "vit_d1024_l2_patch16_heads8", "vit_d1024_l2_patch16_heads8"),
        (384, 12, "vit_heads12", "vit_d384_l2_patch16_heads12"),
        (384, 6, "vit_d384_l2_patch16", "vit_d384_l2_patch16"),
        (1152, 18, "vit_d1152_l2_patch16", "vit_d1152_l2_patch16"),
        (200, 5, "vit_d200_l2_patch16_heads5", "vit_d200_l2_patch16_heads5"),
    ],
)
def test_names_say_the_heads(width, heads, arch, name, tmp_path):
    network = vit(width, heads)
    torch.save(network.state_dict(), tmp_path / "vit.pth")
    backbone = load_backbone(tmp_path / "vit.pth", arch=arch, size=64)
    assert backbone.arch == name and f"\n  heads: {heads}, as --arch says" in backbone.load_report
    assert torch.equal(tokens_of(backbone), forward(network))


def test_the_other_heads_are_picked_as_the_report_says(tmp_path):
    for network, other in ((vit(384, 6), 12), (moco_v3(384, 12), 6)):
        torch.save({"state_dict": under("encoder.", network.state_dict())}, tmp_path / "vit.pth")
        said = load_backbone(tmp_path / "vit.pth", size=64).load_report
        picked = load_backbone(tmp_path / "vit.pth", size=64, arch=re.search(r"--arch (\w+)\)", said)[1])
        assert picked.architecture.heads == other and f"heads: {other}, as --arch says" in picked.load_report


def test_large_networks_by_name():
    """The sizes of the papers, whole, without memory."""
    for width, depth, heads, name in ((1024, 24, 16, "vit_large_patch16"), (768, 12, 12, "vit_base_patch16")):
        with torch.device("meta"):
            tensors = VisionTransformer(embed_dim=width, depth=depth, num_heads=heads).state_dict()
        for asked in (name, f"{name}_heads{heads}", "vit"):
            assert (
                find_architecture(asked, tensors, {"words": {"base_encoder", "momentum_encoder", "predictor"}}).name
                == name
            )
        assert find_architecture(f"{name}_heads8", tensors).name == f"{name}_heads8"
        with pytest.raises(BadInput, match=rf"_heads5: 5 does not divide {width}"):
            find_architecture(f"{name}_heads5", tensors)


def test_names_with_heads_without_a_checkpoint():
    for name, heads in (("vit_tiny_patch16_heads12", 12), ("vit_tiny_patch16_heads3", 3), ("clip_vit_b32_heads8", 8)):
        found = find_architecture(name)
        assert found.heads == heads and found.name == name.removesuffix("_heads3")
    assert find_architecture("vit_tiny_patch16_heads12").build().blocks[0].attn.num_heads == 12
    assert find_architecture("clip_vit_b32_heads8_gelu").name == "clip_vit_b32_heads8_gelu"
    for name in ("resnet50_heads8", "vit_b_16_heads6", "clip_vit_b32_eps1e-06"):
        with pytest.raises(BadInput, match=f"unknown architecture '{name}'"):
            find_architecture(name)


def test_clip_towers_by_name(tmp_path):
    torch.manual_seed(0)
    tower = CLIPTransformer(64, 16, 128, 2, 4, 4.0, output_dim=24, act_layer=QuickGELU).eval().requires_grad_(False)
    torch.save({f"visual.{k}": v for k, v in tower.state_dict().items()}, tmp_path / "clip.pth")
    guessed = load_backbone(tmp_path / "clip.pth")
    assert "\n  heads: 2, a guess from the width\n" in guessed.load_report
    named = load_backbone(tmp_path / "clip.pth", arch=f"{guessed.arch}_heads4")
    assert "\n  heads: 4, as --arch says" in named.load_report
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.allclose(named.trunk(images), tower(images), atol=1e-6)
        assert not torch.allclose(guessed.trunk(images), tower(images), atol=1e-3)


def test_layers_and_extract_print_the_heads(tmp_path, command, scenes):
    torch.save(vit(384, 6).state_dict(), tmp_path / "vit.pth")
    code, _, err = command("layers", tmp_path / "vit.pth")
    said = "MoCo v3's and SLIP's ViTs of these shapes have 12: --arch vit_d384_l2_patch16_heads12"
    assert code == 0 and f"  heads: 6, a guess from the width ({said})" in err.split("\n")
    words = ["--dataset", "voc", "--root", scenes, "--size", 64, "--split", "val", "--workers", 0]
    words += ["--arch", "vit_d384_l2_patch16_heads12", "--store", tmp_path / "s.zarr"]
    code, _, err = command("extract", "--backbone", tmp_path / "vit.pth", *words)
    assert code == 0 and "  heads: 12, as --arch says" in err.split("\n")
    assert "  architecture: vit_d384_l2_patch16_heads12, as --arch says" in err.split("\n")
