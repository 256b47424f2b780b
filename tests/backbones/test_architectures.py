"""Architectures: told from tensors alone, and features equal to the source network's, to the bit."""

import re
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision import models
from torchvision.models.vision_transformer import interpolate_embeddings

from featcache.backbones import ARCHITECTURES
from featcache.backbones.families.positions import RULES, resize_positions
from featcache.backbones.load import load_backbone
from featcache.backbones.recognise import _without_memory, find_architecture, recognise
from featcache.errors import BadInput
from featcache.feature import parse_features

timm = pytest.importorskip("timm")
bcos = pytest.importorskip("bcos.models")
open_clip = pytest.importorskip("open_clip")
from bcos.modules import norms  # noqa: E402
from open_clip.modified_resnet import ModifiedResNet  # noqa: E402
from open_clip.transformer import QuickGELU  # noqa: E402
from open_clip.transformer import VisionTransformer as CLIPTransformer  # noqa: E402
from timm.layers import SwiGLUPacked, resample_abs_pos_embed  # noqa: E402
from timm.models.deit import VisionTransformerDistilled  # noqa: E402
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn  # noqa: E402

# Many networks, or many runs: longer together than the fast tests may take.
pytestmark = pytest.mark.process

# Networks of the same shapes, the one that is taken first.
TWINS = [
    *((f"resnet{depth}", f"resnet{depth}_caffe") for depth in (50, 101, 152)),
    *((f"clip_vit_{kind}", f"clip_vit_{kind}_gelu") for kind in ("b32", "b16", "l14", "h14", "g14", "bigg14")),
]
QUICK = {
    "resnet18", "resnet50", "resnet50_caffe", "resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2",
    "resnetv1c50", "resnetv1d101", "alexnet", "vgg16", "vgg16_bn", "squeezenet1_0", "convnext_tiny", "mobilenet_v2",
    "mobilenet_v3_large", "mnasnet0_75", "maxvit_t", "shufflenet_v2_x1_5", "googlenet", "inception_v3", "swin_s",
    "swin_v2_s", "vit_b_32", "vit_h_14", "vit_tiny_patch16", "vit_small_patch16",
    "clip_rn50", "clip_rn101_no_attnpool", "clip_vit_b32", "clip_vit_b32_gelu", "bcos_resnet34",
    "efficientnet_lite2",
}  # fmt: skip


def randomise(network):
    """Give every tensor of a network values that matter, batch-norm statistics included."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if name.endswith("running_var"):
                value.uniform_(0.5, 2, generator=generator)
            elif value.is_floating_point() and value.ndim < 2:
                value.add_(torch.randn(value.shape, generator=generator) * 0.1)
    return network.eval().to(memory_format=torch.channels_last)


def images_of(size, channels=3):
    images = torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1))
    return images.contiguous(memory_format=torch.channels_last)


def loaded(tmp_path, tensors, **options):
    torch.save(tensors, tmp_path / "x.pth")
    return load_backbone(tmp_path / "x.pth", **options)


def features_of(backbone, images, spec):
    with torch.inference_mode():
        return list(backbone(images, parse_features(spec, backbone.aliases, backbone.layers)).values())


@pytest.mark.process
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in ARCHITECTURES if n != "vit"]
)
def test_every_network_is_recognised_as_itself(name):
    with _without_memory():
        tensors = ARCHITECTURES[name].build().state_dict()
    told = recognise(tensors, "x.pth")
    twins = next((pair for pair in TWINS if name in pair), (name,))
    assert told.name == twins[0]
    others = [*twins[1:], *told.alike]
    heads = [f"heads: {told.heads}, a guess from the width"] if told.heads else []
    twin = [f"tensors cannot tell it from {', '.join(others)}: say so with --arch"] if others else []
    assert [line.partition(" (")[0] for line in told.note.split("\n") if line] == heads + twin
    # By its name, and without the classifier, it is found too.
    assert find_architecture(name, tensors).name == name
    bare = {k: v for k, v in tensors.items() if not k.startswith(told.classifier)}
    assert recognise(bare, "x.pth").name == twins[0]
    # By its name or without it, the input is the same; test_weights_input.py says which.
    size, presets = told.size, find_architecture(name, tensors)
    assert (size, told.mean, told.std) == (presets.size, presets.mean, presets.std)


def test_input_of_the_public_weights():
    for name, weights in (
        ("efficientnet_v2_l", models.EfficientNet_V2_L_Weights.IMAGENET1K_V1),
        ("swin_v2_t", models.Swin_V2_T_Weights.IMAGENET1K_V1),
        ("vit_h_14", models.ViT_H_14_Weights.IMAGENET1K_SWAG_E2E_V1),
    ):
        preset, found = weights.transforms(), ARCHITECTURES[name]
        assert [found.size] == preset.crop_size and found.interpolation == preset.interpolation.value
        assert (list(found.mean), list(found.std)) == (preset.mean, preset.std)


def flat_pool(network, maps):
    return torch.flatten(network.avgpool(maps), 1)


# From the last map to the logits, as each family's forward goes on.
TORCHVISION = {
    "resnet18": (64, lambda n, m: n.fc(flat_pool(n, m))),
    "alexnet": (64, lambda n, m: n.classifier(flat_pool(n, m))),
    "vgg11_bn": (32, lambda n, m: n.classifier(flat_pool(n, m))),
    "squeezenet1_1": (64, lambda n, m: torch.flatten(n.classifier(m), 1)),
    "convnext_tiny": (64, lambda n, m: n.classifier(n.avgpool(m))),
    "densenet121": (64, lambda n, m: n.classifier(torch.flatten(F.adaptive_avg_pool2d(m, (1, 1)), 1))),
    "efficientnet_b0": (64, lambda n, m: n.classifier(flat_pool(n, m))),
    "mobilenet_v2": (64, lambda n, m: n.classifier(torch.flatten(F.adaptive_avg_pool2d(m, (1, 1)), 1))),
    "mobilenet_v3_small": (64, lambda n, m: n.classifier(flat_pool(n, m))),
    "mnasnet0_5": (64, lambda n, m: n.classifier(m.mean([2, 3]))),
    "regnet_y_400mf": (64, lambda n, m: n.fc(n.avgpool(m).flatten(1))),
    "shufflenet_v2_x0_5": (64, lambda n, m: n.fc(m.mean([2, 3]))),
    "googlenet": (64, lambda n, m: n.fc(flat_pool(n, m))),
    "inception_v3": (75, lambda n, m: n.fc(flat_pool(n, m))),
    "swin_t": (64, lambda n, m: n.head(n.flatten(n.avgpool(m)))),
    "swin_v2_t": (64, lambda n, m: n.head(n.flatten(n.avgpool(m)))),
    "maxvit_t": (224, lambda n, m: n.classifier(m)),
}
SLOW = {"vgg11_bn", "convnext_tiny", "googlenet", "inception_v3", "swin_v2_t", "maxvit_t"}


@pytest.mark.process
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in TORCHVISION])
def test_torchvision_networks_to_the_bit(tmp_path, name):
    """The classifier, put on our last map, must give the logits that the untouched network gives."""
    size, classify = TORCHVISION[name]
    torch.manual_seed(0)
    network = randomise(ARCHITECTURES[name].build())
    tensors = {k: v for k, v in network.state_dict().items() if not k.startswith(ARCHITECTURES[name].classifier)}
    backbone = loaded(tmp_path, tensors, size=size, arch=name)
    images = images_of(size)
    last, pooled = features_of(backbone, images, "spatial,pooled")
    with torch.inference_mode():
        expected = network(images)
        assert torch.equal(classify(network, last), expected) and expected.std() > 1e-6
        assert torch.equal(pooled, last.mean((2, 3)))
        assert min(last.shape[2:]) >= 1 and last.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.process
def test_torchvision_vit_at_another_size(tmp_path):
    torch.manual_seed(0)
    source = models.vit_b_32(weights=None, image_size=128)
    nn.init.normal_(source.heads.head.weight, std=0.01)
    backbone = loaded(tmp_path, source.state_dict(), size=96)
    assert (
        backbone.arch == "vit_b_32" and "positions 4x4 resized to 3x3, bicubic, corners aligned" in backbone.load_report
    )
    expected = models.vit_b_32(weights=None, image_size=96).eval().to(memory_format=torch.channels_last)
    expected.load_state_dict(interpolate_embeddings(96, 32, source.state_dict()))
    cls, tokens = features_of(backbone, images_of(96), "cls,tokens")
    with torch.inference_mode():
        assert torch.equal(expected.heads(cls), expected(images_of(96)))
    assert torch.equal(tokens[:, 0], cls) and tokens.shape == (2, 10, 768)
    # Without --size the checkpoint's own grid says it.
    assert find_architecture("vit_b_32", source.state_dict()).size == 128


def rename(tensors, *pairs):
    for pattern, new in pairs:
        tensors = {re.sub(pattern, new, key): value for key, value in tensors.items()}
    return tensors


@pytest.mark.parametrize("kind", ["c", "d"])
def test_deep_stem_resnets_equal_timms(tmp_path, kind):
    torch.manual_seed(0)
    network = randomise(timm.create_model(f"resnet50{kind}", num_classes=0))
    tensors = rename(network.state_dict(), (r"^conv1\.", "stem."), (r"^bn1\.", "stem.7."))
    if kind == "d":
        # timm has a place for the pool in the first stage too, where nothing is to pool.
        tensors = rename(
            tensors, (r"^(layer1\.0\.downsample)\.1\.", r"\1.0."), (r"^(layer1\.0\.downsample)\.2\.", r"\1.1.")
        )
    backbone = loaded(tmp_path, tensors)
    assert backbone.arch == f"resnetv1{kind}50"
    stem, last = features_of(backbone, images_of(64), "feat1:spatial,last:spatial")
    with torch.inference_mode():
        assert torch.equal(stem, network.act1(network.bn1(network.conv1(images_of(64)))))
        assert torch.equal(last, network.forward_features(images_of(64)))


def test_caffe_style_strides_in_the_first_convolution(tmp_path):
    torch.manual_seed(0)
    network = randomise(models.resnet50(weights=None))

    def bottleneck(block, maps, stride):
        out = F.relu(block.bn1(F.conv2d(maps, block.conv1.weight, stride=stride)))
        out = F.relu(block.bn2(F.conv2d(out, block.conv2.weight, padding=1)))
        out = block.bn3(F.conv2d(out, block.conv3.weight))
        return F.relu(out + (block.downsample(maps) if block.downsample else maps))

    with torch.inference_mode():
        maps = network.maxpool(F.relu(network.bn1(network.conv1(images_of(64)))))
        for i, stage in enumerate((network.layer1, network.layer2, network.layer3, network.layer4)):
            for number, block in enumerate(stage):
                maps = bottleneck(block, maps, 2 if i and not number else 1)
    (caffe,) = features_of(loaded(tmp_path, network.state_dict(), arch="resnet50_caffe"), images_of(64), "spatial")
    plain = load_backbone(tmp_path / "x.pth")
    assert torch.equal(caffe, maps)
    assert not torch.allclose(caffe, features_of(plain, images_of(64), "spatial")[0])
    assert "tensors cannot tell it from resnet50_caffe, timm:resnetaa50, timm:resnetblur50: say so" in plain.load_report


def tiny_vit(make=VisionTransformer, size=32, **more):
    torch.manual_seed(0)
    settings = {"img_size": size, "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 2, "num_classes": 5} | more
    network = make(**settings)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    return network.eval().to(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"reg_tokens": 4, "no_embed_class": True, "init_values": 1.0, "size": 48},
        {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU, "mlp_ratio": 5.34375, "init_values": 1.0},
        {"make": VisionTransformerDistilled},
        {"class_token": False, "global_pool": "avg", "fc_norm": False},
        {"global_pool": "avg"},
        # A norm before the blocks is CLIP's, as timm makes it.
        {"qk_norm": True, "qkv_bias": False, "pre_norm": True, "norm_layer": partial(nn.LayerNorm, eps=1e-5)},
    ],
    ids=["plain", "registers", "swiglu", "distilled", "no-class", "fc-norm", "norms"],
)
def test_vits_are_read_off_their_shapes(tmp_path, kind):
    network = tiny_vit(**kind)
    size = kind.get("size", 32)
    backbone = loaded(tmp_path, network.state_dict())
    assert backbone.preprocessing.size == size and backbone.arch.startswith("vit_d64_l3_patch8")
    with torch.inference_mode():
        expected = network.forward_features(images_of(size))
        second = network.norm(network.blocks[1](network.blocks[0](_embedded(network, images_of(size)))))
    tokens, mean, map_, before = features_of(backbone, images_of(size), "tokens,patch_mean,spatial,last-1:tokens")
    prefix = network.num_prefix_tokens
    assert torch.equal(tokens, expected) and torch.equal(before, second)
    assert torch.equal(mean, expected[:, prefix:].mean(1))
    side = size // 8
    assert torch.equal(map_, expected[:, prefix:].transpose(1, 2).reshape(2, 64, side, side))
    if network.cls_token is not None:
        assert torch.equal(features_of(backbone, images_of(size), "cls")[0], expected[:, 0])


def _embedded(network, images):
    return network.norm_pre(network.patch_drop(network._pos_embed(network.patch_embed(images))))


def dinov2_names(network, registers):
    """The tensors of timm's network as DINOv2's code names and keeps them, with a class position of its own."""
    tensors = rename(network.state_dict(), (r"\.mlp\.fc1\.", ".mlp.w12."), (r"\.mlp\.fc2\.", ".mlp.w3."))
    tensors = {k: v for k, v in tensors.items() if not k.startswith("head.")}
    tensors["mask_token"] = torch.zeros(1, 64)
    if registers:
        tensors["register_tokens"] = tensors.pop("reg_token")
        tensors["pos_embed"] = torch.cat([torch.randn(1, 1, 64), tensors["pos_embed"]], 1)
    return tensors


def dinov2_tokens(network, tensors, images, side):
    """What DINOv2's code computes, step by step, on timm's blocks."""
    positions, old = tensors["pos_embed"], int((tensors["pos_embed"].shape[1] - 1) ** 0.5)
    patches = positions[:, 1:].reshape(1, old, old, 64).permute(0, 3, 1, 2)
    if side != old and "register_tokens" in tensors:
        patches = F.interpolate(patches, size=(side, side), mode="bicubic", antialias=True)
    elif side != old:
        scale = float(side + 0.1) / old
        patches = F.interpolate(patches, scale_factor=(scale, scale), mode="bicubic", antialias=False)
    positions = torch.cat([positions[:, :1], patches.permute(0, 2, 3, 1).reshape(1, -1, 64)], 1)
    rows = network.patch_embed.proj(images).flatten(2).transpose(1, 2)
    rows = torch.cat([tensors["cls_token"].expand(len(rows), -1, -1), rows], 1) + positions
    if "register_tokens" in tensors:
        rows = torch.cat([rows[:, :1], tensors["register_tokens"].expand(len(rows), -1, -1), rows[:, 1:]], 1)
    for block in network.blocks:
        rows = block(rows)
    return network.norm(rows)


@pytest.mark.parametrize("size", [48, 32])
@pytest.mark.parametrize("registers", [0, 4])
def test_dinov2_names_and_positions(tmp_path, registers, size):
    settings = {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU, "mlp_ratio": 5.34375, "init_values": 1.0}
    network = tiny_vit(size=48, reg_tokens=registers, no_embed_class=registers > 0, **settings)
    tensors = dinov2_names(network, registers)
    backbone = loaded(tmp_path, tensors, size=size)
    with torch.inference_mode():
        expected = dinov2_tokens(network, tensors, images_of(size), size // 8)
    (tokens,) = features_of(backbone, images_of(size), "tokens")
    assert torch.equal(tokens, expected)
    assert backbone.architecture.size == 224, "as its evaluation has it"
    if size == 32:
        how = RULES["antialias" if registers else "dino"]
        assert f"positions 6x6 resized to 4x4, bicubic, {how}" in backbone.load_report
    elif registers:
        # timm's own conversion of the official names is another witness.
        converted = checkpoint_filter_fn(dict(tensors), network)
        named = backbone.architecture.named(tensors)
        assert all(torch.equal(named[key], value) for key, value in converted.items())
        assert named.keys() - converted.keys() == {"mask_token"}
    chunked = rename(tensors, (r"^blocks\.(\d+)\.", r"blocks.0.\1."))
    assert loaded(tmp_path, chunked, size=size).weights_sha256 == backbone.weights_sha256


def test_mmpretrain_vits_are_renamed(tmp_path):
    network = tiny_vit(init_values=1.0)
    tensors = rename(
        {k: v for k, v in network.state_dict().items() if not k.startswith("head.")},
        (r"^patch_embed\.proj\.", "patch_embed.projection."), (r"^norm\.", "ln1."), (r"^blocks\.", "layers."),
        (r"^(layers\.\d+)\.norm(\d)\.", r"\1.ln\2."),
        (r"\.mlp\.fc1\.", ".ffn.layers.0.0."), (r"\.mlp\.fc2\.", ".ffn.layers.1."),
        (r"\.ls1\.gamma", ".attn.gamma1.weight"), (r"\.ls2\.gamma", ".ffn.gamma2.weight"),
    )  # fmt: skip
    assert "layers.2.ffn.layers.0.0.bias" in tensors and "layers.0.attn.gamma1.weight" in tensors
    backbone = loaded(tmp_path, tensors)
    with torch.inference_mode():
        assert torch.equal(features_of(backbone, images_of(32), "tokens")[0], network.forward_features(images_of(32)))


def test_hints_and_names_say_what_tensors_do_not(tmp_path):
    network = tiny_vit(embed_dim=384, depth=12, num_heads=12, patch_size=16, norm_layer=nn.LayerNorm)
    tensors = network.state_dict()
    assert recognise(tensors, "x").name == "vit_small_patch16"
    told = recognise(tensors, "x", {"heads": 12, "eps": 1e-5})
    assert told.name == "vit_small_patch16_heads12_eps1e-05" and told.note == "heads: 12, as --arch says"
    assert torch.equal(_run(told, tensors), network.forward_features(images_of(32)))
    assert find_architecture(told.name, tensors).name == told.name
    assert find_architecture("vit", tensors).name == "vit_small_patch16"
    six = _run(find_architecture("vit_small_patch16", tensors), tensors)
    backbone = loaded(tmp_path, tensors, arch="vit_small_patch16_heads12", size=32)
    (twelve,) = features_of(backbone, images_of(32), "tokens")
    assert not torch.allclose(six, twelve)
    assert torch.allclose(twelve, network.forward_features(images_of(32)), atol=1e-3)
    with pytest.raises(BadInput, match="--arch vit_base_patch16: by the shapes .* the checkpoint is vit_small_patch16"):
        find_architecture("vit_base_patch16", tensors)
    with pytest.raises(BadInput, match="--arch vit is read off a checkpoint's shapes"):
        load_backbone("random", arch="vit")


def test_shapes_that_no_network_has_are_one_line(tmp_path):
    whole = tiny_vit().state_dict()
    for key, value in {
        "pos_embed": torch.zeros(18, 64),
        "patch_embed.proj.weight": torch.zeros(()),
        "blocks.x.norm1.weight": torch.zeros(64),
    }.items():
        with pytest.raises(BadInput, match="cannot tell the architecture of x.pth"):
            recognise(whole | {key: value}, "x.pth")
    with pytest.raises(BadInput, match="cannot tell the architecture"):
        recognise(whole | {"pos_embed": torch.zeros(1, 19, 64)}, "x.pth")
    with pytest.raises(BadInput, match="5 does not divide 64, the width of the tokens"):
        recognise(whole, "x.pth", {"heads": 5})
    with pytest.raises(BadInput, match="tensors are not those of a ViT"):
        find_architecture("vit", {"conv1.weight": torch.zeros(1)})
    with pytest.raises(BadInput, match=r"does not fit vit_b_32: no key ends in 'encoder.layers.encoder_layer_0.ln_1.w"):
        loaded(tmp_path, whole, arch="vit_b_32")


def _run(architecture, tensors):
    network = architecture.build()
    network.load_state_dict({k: v for k, v in tensors.items() if not k.startswith("head.")})
    return architecture.trunk(network).eval()(images_of(32))


def test_other_input_sizes_must_fit_the_patches(tmp_path):
    tensors = tiny_vit().state_dict()
    with pytest.raises(BadInput, match="--size 36: vit_d64_l3_patch8_heads2 needs a multiple of its patch, 8 pixels"):
        loaded(tmp_path, tensors, size=36)
    positions = tensors["pos_embed"][0, 1:]
    assert torch.equal(
        resize_positions(positions, 6, "antialias"), resample_abs_pos_embed(tensors["pos_embed"], [6, 6])[0, 1:]
    )
    plain = F.interpolate(positions.T.reshape(1, 64, 4, 4), (6, 6), mode="bicubic")[0].flatten(1).T
    assert torch.equal(resize_positions(positions, 6, "plain"), plain)
    # Enlarged, each rule gives other numbers; the default is plain.
    (same,) = {rule for rule in RULES if torch.allclose(resize_positions(positions, 6, rule), plain)} - {"antialias"}
    assert same == "plain"
    assert torch.equal(loaded(tmp_path, tensors, size=48).trunk.pos_embed[0, 1:], plain)


@pytest.mark.parametrize("pool", [True, False])
def test_clip_resnets_equal_open_clips(tmp_path, pool):
    torch.manual_seed(0)
    network = randomise(ModifiedResNet([1, 2, 1, 1], 24, 8, image_size=64, width=16))
    tensors = {k: v for k, v in network.state_dict().items() if pool or not k.startswith("attnpool.")}
    backbone = loaded(tmp_path, tensors, size=64)
    assert backbone.arch == "clip_rn_w16_1-2-1-1" + ("" if pool else "_no_attnpool")
    assert (backbone.architecture.mean[0], backbone.architecture.interpolation) == (0.48145466, "bicubic")
    stem, second, last = features_of(backbone, images_of(64), "feat1:spatial,layer2:spatial,spatial")
    with torch.inference_mode():
        inner = network.forward_intermediates(images_of(64), indices=[0, 2, 4])["image_intermediates"]
        assert torch.equal(network.avgpool(stem), inner[0])
        assert torch.equal(second, inner[1]) and torch.equal(last, inner[2])
        if pool:
            assert torch.equal(features_of(backbone, images_of(64), "attnpool:pooled")[0], network(images_of(64)))
            larger = load_backbone(tmp_path / "x.pth", size=96)
            assert "positions 2x2 resized to 3x3" in larger.load_report
            assert features_of(larger, images_of(96), "attnpool:pooled")[0].shape == (2, 24)
    assert any("downsample.-1" in name for name in backbone.layers)


@pytest.mark.parametrize("activation", [QuickGELU, nn.GELU])
def test_clip_transformers_equal_open_clips(tmp_path, activation):
    torch.manual_seed(0)
    network = CLIPTransformer(32, 8, 64, 3, 1, 4.0, output_dim=24, act_layer=activation)
    # Frozen, as ours: torch's attention takes another kernel for parameters that could be trained.
    network = network.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    name = "clip_vit_d64_l3_patch8" + ("_gelu" if activation is nn.GELU else "")
    backbone = loaded(tmp_path, network.state_dict(), arch=name if activation is nn.GELU else None)
    assert backbone.arch == name
    cls, embedding, second = features_of(backbone, images_of(32), "cls,embedding:pooled,last-1:spatial")
    with torch.inference_mode():
        expected = network(images_of(32))
        inner = network.forward_intermediates(images_of(32), indices=[1], normalize_intermediates=True)
    assert torch.equal(embedding, expected) and torch.equal(cls @ network.proj, expected)
    assert torch.equal(second, inner["image_intermediates"][0])
    if activation is QuickGELU:
        assert f"tensors cannot tell it from {name}_gelu" in backbone.load_report
        tensors = network.state_dict()
        del tensors["proj"]
        assert torch.equal(features_of(loaded(tmp_path, tensors), images_of(32), "embedding:pooled")[0], cls)


@pytest.mark.parametrize("name", ["resnet18", "densenet121"])
def test_bcos_networks_equal_their_package(tmp_path, name):
    torch.manual_seed(0)
    network = randomise(getattr(bcos, name)(norm_layer=norms.NoBias(norms.BatchNormUncentered2d)))
    backbone = loaded(tmp_path, network.state_dict(), size=64)
    assert backbone.arch == f"bcos_{name}" and backbone.architecture.inverse
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    six = torch.cat([pixels, 1 - pixels], 1).contiguous(memory_format=torch.channels_last)
    head = network.fc if name == "resnet18" else network.classifier
    with torch.inference_mode():
        expected = network(six)
        for given in (pixels, six):
            (last,) = features_of(backbone, given, "spatial")
            logits = network.logit_layer(F.adaptive_avg_pool2d(head(last), (1, 1)).flatten(1))
            assert torch.equal(logits, expected)
    if name == "resnet18":
        assert torch.equal(last, network.forward_features(six)) and (last < 0).any()


@pytest.mark.process
@pytest.mark.parametrize(
    "name", ["test_vit", "test_resnet", "test_convnext", "test_efficientnet", "swin_tiny_patch4_window7_224"]
)
def test_timm_by_name(tmp_path, name):
    torch.manual_seed(0)
    network = randomise(timm.create_model(name))
    config = timm.data.resolve_model_data_config(network)
    backbone = loaded(tmp_path, network.state_dict(), arch=f"timm:{name}")
    size = config["input_size"][1]
    preset = backbone.architecture
    assert (preset.size, preset.mean, preset.std) == (size, config["mean"], config["std"])
    assert preset.interpolation == config["interpolation"]
    with torch.inference_mode():
        expected = network.forward_features(images_of(size))
    if expected.ndim == 3:
        assert torch.equal(features_of(backbone, images_of(size), "tokens")[0], expected)
        assert torch.equal(features_of(backbone, images_of(size), "cls")[0], expected[:, 0])
    else:
        expected = expected.permute(0, 3, 1, 2) if name.startswith("swin") else expected
        assert torch.equal(features_of(backbone, images_of(size), "spatial")[0], expected)
        assert {"feat2", "feat5"} <= backbone.aliases.keys()
    with pytest.raises(BadInput, match="did you mean 'test_vit'"):
        find_architecture("timm:test_vitt")


CODE = """
import torch
from torch import nn

class Patches(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Conv2d(3, 8, 16, stride=16)
        self.first = nn.Parameter(torch.zeros(1, 1, 8))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, images):
        rows = self.proj(images).flatten(2).transpose(1, 2)
        rows = self.norm(torch.cat([self.first.expand(len(rows), -1, -1), rows], 1))
        return self.head(rows[:, 0])

def patches():
    return Patches()

def convolutions():
    stem = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU())
    return nn.Sequential(stem, nn.AdaptiveAvgPool2d(1), nn.Flatten())

def fails():
    raise ValueError("no\\nnetwork")

def nothing():
    return 3

def narrow():
    return nn.Sequential(nn.Flatten(), nn.Linear(5, 5))
"""


def test_user_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_networks.py").write_text(CODE)
    torch.manual_seed(0)
    import sys

    monkeypatch.setattr(sys, "path", [*sys.path])
    backbone = load_backbone("random", arch="my_networks:patches")
    assert backbone.aliases["last"] == "norm" and backbone.class_token
    tensors = backbone.trunk.state_dict()
    assert "head.weight" in tensors, "no classifier is assumed"
    (cls, patches) = features_of(backbone, images_of(224), "cls,pooled")
    with torch.inference_mode():
        rows = backbone.trunk.proj(images_of(224)).flatten(2).transpose(1, 2)
        assert torch.equal(patches, backbone.trunk.norm(rows).mean(1)) and cls.shape == (2, 8)
    # A checkpoint without the head, and one with another: the head is left out.
    for extra in ({}, {"head.weight": torch.zeros(7, 8), "head.bias": torch.zeros(7)}):
        given = {k: v for k, v in tensors.items() if not k.startswith("head.")} | extra
        again = loaded(tmp_path, given, arch="my_networks:patches")
        assert "head.weight" not in again.trunk.state_dict() and "head" not in again.layers
        assert torch.equal(features_of(again, images_of(224), "cls")[0], cls)
    assert load_backbone("random", arch="my_networks:convolutions").aliases == {"last": "0"}
    for name, message in {
        "no_such_module:f": "No module named 'no_such_module'",
        "my_networks:patchs": "has no 'patchs'; did you mean 'patches'",
        "my_networks:fails": r"calling fails\(\) fails: ValueError: no$",
        "my_networks:nothing": "returns int, not a torch.nn.Module",
        "my_networks:narrow": r"does not run on \[B, 3, 224, 224\]",
    }.items():
        with pytest.raises(BadInput, match=message):
            find_architecture(name)
