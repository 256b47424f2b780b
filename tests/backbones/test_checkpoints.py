"""Checkpoints: every way in which people save an encoder gives the same tensors; what is not sure is an error."""

import argparse
import json
import re
from functools import partial

import pytest
import safetensors.torch
import torch
from torchvision.models import resnet18

from featcache.backbones.load import load_backbone
from featcache.errors import BadInput
from featcache.feature import parse_features


@pytest.fixture(scope="module")
def trained():
    """Two ResNet-18s with batch-norm statistics that are not the initial ones: tensors without classifier."""

    def draw(seed):
        torch.manual_seed(seed)
        network = resnet18().train()
        with torch.no_grad():
            network(torch.randn(4, 3, 64, 64))
        return {k: v for k, v in network.state_dict().items() if not k.startswith("fc.")}

    return draw(0), draw(1)


def under(prefix, tensors):
    return {f"{prefix}{k}": v for k, v in tensors.items()}


def numbered(tensors):
    """Names of nn.Sequential(*resnet.children())."""
    places = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}
    return {places[k.split(".")[0]] + k[k.index(".") :]: v for k, v in tensors.items()}


def extra(*names):
    """Tensors of projectors, queues and the like."""
    return {name: torch.randn(4, 4) for name in names}


OPTIMIZER = {"state": {0: {"momentum_buffer": torch.randn(64, 3, 7, 7)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
CLASSIFIER = {"fc.weight": torch.randn(1000, 512), "fc.bias": torch.randn(1000)}

# name: (file's content from this encoder's tensors and those of another, words of the rule)
LAYOUTS = {
    "torchvision": (lambda a, b: a | CLASSIFIER, "bare names"),
    "torchvision in DDP": (lambda a, b: under("module.", a | CLASSIFIER), "the only encoder"),
    "torch.compile": (lambda a, b: {"model": under("_orig_mod.", a)}, "the only encoder"),
    "compiled in DDP": (lambda a, b: {"state_dict": under("module._orig_mod.", a)}, "the only encoder"),
    "timm": (lambda a, b: {"state_dict": a | CLASSIFIER, "arch": "resnet18", "epoch": 3}, "the only encoder"),
    "mmengine classifier": (
        lambda a, b: {
            "meta": {"epoch": 100, "cfg": "model = dict()"},
            "state_dict": under("backbone.", a) | extra("head.fc.weight", "head.fc.bias"),
            "message_hub": {"log_scalars": {}, "runtime_info": {}},
            "optimizer": OPTIMIZER,
            "param_schedulers": [{"gamma": 0.1}],
        },
        "the only encoder",
    ),
    "mmengine MoCo": (
        lambda a, b: {
            "meta": {},
            "state_dict": under("backbone.", a)
            | under("encoder_k.module.0.", b)
            | extra("neck.mlp.0.weight", "encoder_k.module.1.mlp.0.weight", "queue", "queue_ptr", "encoder_k.steps"),
        },
        "MoCo's query encoder",
    ),
    "mmengine BYOL": (
        lambda a, b: {
            "state_dict": under("backbone.", a)
            | under("target_net.module.0.", b)
            | extra("neck.fc0.weight", "target_net.module.1.fc0.weight", "head.predictor.fc0.weight"),
        },
        "BYOL's online network",
    ),
    "mmpretrain MoCo v3": (
        lambda a, b: {"state_dict": under("backbone.", a) | under("momentum_encoder.module.0.", b)},
        "MoCo v3's base encoder",
    ),
    "OpenMixup extract_backbone_weights": (lambda a, b: {"state_dict": a, "author": "openmixup"}, "the only encoder"),
    "OpenMixup MoCo": (
        lambda a, b: {
            "state_dict": under("backbone.", a) | under("encoder_q.0.", a) | under("encoder_k.0.", b) | extra("queue"),
        },
        "MoCo's query encoder",
    ),
    "MoCo v1, v2": (
        lambda a, b: {
            "epoch": 200,
            "arch": "resnet18",
            "state_dict": under("module.encoder_q.", a)
            | under("module.encoder_k.", b)
            | extra("module.encoder_q.fc.0.weight", "module.encoder_k.fc.0.weight", "module.queue", "module.queue_ptr"),
            "optimizer": OPTIMIZER,
        },
        "MoCo's query encoder",
    ),
    "MoCo v3": (
        lambda a, b: {
            "state_dict": under("module.base_encoder.", a)
            | under("module.momentum_encoder.", b)
            | extra("module.base_encoder.fc.0.weight", "module.momentum_encoder.fc.0.weight", "module.predictor.0.weight")
        },
        "MoCo v3's base encoder",
    ),
    "SimCLR": (
        lambda a, b: {"state_dict": under("backbone.", a) | extra("backbone.fc.0.weight", "backbone.fc.2.weight")},
        "the only encoder",
    ),
    "SimSiam": (
        lambda a, b: {
            "state_dict": under("module.encoder.", a) | extra("module.encoder.fc.0.weight", "module.predictor.0.weight")
        },
        "the only encoder",
    ),
    "BYOL, online and target": (
        lambda a, b: under("online_encoder.net.", a)
        | under("target_encoder.net.", b)
        | extra("online_predictor.net.0.weight"),
        "BYOL's online network",
    ),
    "SwAV": (
        lambda a, b: under("module.", a) | extra("module.projection_head.0.weight", "module.prototypes.weight"),
        "the only encoder",
    ),
    "Barlow Twins": (
        lambda a, b: {
            "epoch": 999,
            "model": under("module.backbone.", a) | extra("module.projector.0.weight", "module.bn.running_mean"),
            "optimizer": OPTIMIZER,
        },
        "the only encoder",
    ),
    "DINO": (
        lambda a, b: {
            "student": under("module.backbone.", b) | extra("module.head.mlp.0.weight"),
            "teacher": under("module.backbone.", a)
            | extra("module.head.mlp.0.weight", "module.head.last_layer.weight_g"),
            "optimizer": OPTIMIZER,
            "epoch": 100,
            "dino_loss": extra("center"),
        },
        "the teacher",
    ),
    "DINOv2 in FSDP": (
        lambda a, b: {"model": under("student.backbone.", b) | under("teacher.backbone.", a), "iteration": 9},
        "the teacher",
    ),
    "VISSL": (
        lambda a, b: {
            "classy_state_dict": {
                "base_model": {
                    "model": {"trunk": under("_feature_blocks.", a), "heads": extra("0.clf.0.weight")},
                    "meta": {},
                },
                "optimizer": OPTIMIZER,
            }
        },
        "VISSL",
    ),
    "solo-learn": (
        lambda a, b: {
            "state_dict": under("backbone.", a)
            | under("momentum_backbone.", b)
            | extra("classifier.weight", "projector.0.weight", "momentum_projector.0.weight"),
            "pytorch-lightning_version": "1.6",
            "optimizer_states": [OPTIMIZER],
            "hyper_parameters": {"lr": 0.3},
        },
        "not its moving average",
    ),
    "Lightning": (lambda a, b: {"state_dict": under("model.", a) | extra("criterion.weight")}, "the only encoder"),
    "lightly": (
        lambda a, b: {
            "state_dict": under("backbone.", numbered(a)) | under("backbone_momentum.", numbered(b)),
        },
        "not its moving average",
    ),
    "children of a ResNet": (lambda a, b: numbered(a), "bare names"),
    "only a moving average": (lambda a, b: {"state_dict_ema": under("ema.module.", a)}, "the only encoder"),
}  # fmt: skip


@pytest.mark.process
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_network_that_was_saved(layout, trained, tmp_path):
    build, rule = LAYOUTS[layout]
    torch.save(build(*trained), tmp_path / "ckpt.pth")
    backbone = load_backbone(tmp_path / "ckpt.pth")
    loaded = backbone.trunk.state_dict()
    assert backbone.arch == "resnet18"
    assert all(torch.equal(loaded[k], v) for k, v in trained[0].items())
    assert rule in backbone.load_report and "missing: none" in backbone.load_report
    network = resnet18()
    network.load_state_dict(trained[0], strict=False)
    network.fc = torch.nn.Identity()
    images = torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        expected = network.eval().to(memory_format=torch.channels_last)(images)
        assert torch.equal(backbone.trunk(images), expected)


def test_two_encoders_are_an_error_that_lists_the_keys(trained, tmp_path):
    a, b = trained
    path = tmp_path / "ckpt.pth"
    torch.save({"state_dict": under("module.", a), "state_dict_ema": under("module.", b)}, path)
    with pytest.raises(BadInput) as caught:
        load_backbone(path)
    for words in (
        "holds 2 encoders",
        "state_dict.module.*",
        "--weights-key state_dict,",
        "--weights-key state_dict_ema",
    ):
        assert words in caught.value.message
    for key, expected in (("state_dict", a), ("state_dict_ema", b), ("state_dict_ema.module", b)):
        backbone = load_backbone(path, weights_key=key)
        assert torch.equal(backbone.trunk.conv1.weight, expected["conv1.weight"])
        assert f"as --weights-key {key} says" in backbone.load_report
    with pytest.raises(BadInput, match=r"--weights-key state_dict_em: no encoder .*did you mean 'state_dict_ema'"):
        load_backbone(path, weights_key="state_dict_em")


def test_the_key_picks_against_the_rule(trained, tmp_path):
    teacher, student = trained
    content = {"teacher": under("module.backbone.", teacher), "student": under("module.backbone.", student)}
    torch.save(content, tmp_path / "dino.pth")
    backbone = load_backbone(tmp_path / "dino.pth", weights_key="student")
    assert torch.equal(backbone.trunk.conv1.weight, student["conv1.weight"])
    assert "left out: teacher.* (120)" in backbone.load_report, "what is left out is named"


def test_one_encoder_under_two_names_is_one(trained, tmp_path):
    torch.save({"model": trained[0], "state_dict": dict(trained[0])}, tmp_path / "twice.pth")
    assert torch.equal(load_backbone(tmp_path / "twice.pth").trunk.conv1.weight, trained[0]["conv1.weight"])


def test_encoder_k_alone_is_not_taken_for_encoder(trained, tmp_path):
    """A prefix `encoder` without its dot would turn encoder_q and encoder_k into q.* and k.*."""
    torch.save({"state_dict": under("encoder_k.", trained[0])}, tmp_path / "k.pth")
    assert "encoder_k.*" in load_backbone(tmp_path / "k.pth").load_report
    a, b = trained
    torch.save({"state_dict": under("encoder.", a) | under("encoder_q.", b)}, tmp_path / "three.pth")
    with pytest.raises(BadInput, match="holds 2 encoders"):
        load_backbone(tmp_path / "three.pth")


def test_a_missing_tensor_is_an_error_whatever_the_layout(trained, tmp_path):
    tensors = {k: v for k, v in trained[0].items() if k != "layer3.0.bn1.running_var"}
    torch.save({"state_dict": under("module.encoder_q.", tensors)}, tmp_path / "gap.pth")
    with pytest.raises(BadInput, match=r"gap\.pth does not fit resnet18; missing: layer3\.0\.bn1\.running_var"):
        load_backbone(tmp_path / "gap.pth")


def test_what_the_network_lacks_is_an_error_unless_it_is_of_training(trained, tmp_path):
    torch.save(trained[0] | {"adapter.weight": torch.zeros(3)}, tmp_path / "a.pth")
    with pytest.raises(BadInput, match=r"unexpected: adapter\.weight"):
        load_backbone(tmp_path / "a.pth")
    torch.save(trained[0] | {"projection_head.0.weight": torch.zeros(3), "queue": torch.zeros(3)}, tmp_path / "b.pth")
    assert "left out: projection_head.0.weight, queue" in load_backbone(tmp_path / "b.pth").load_report


def test_safetensors_whole_and_sharded(trained, tmp_path):
    tensors = under("backbone.", trained[0])
    safetensors.torch.save_file(tensors, tmp_path / "whole.safetensors")
    folder = tmp_path / "sharded"
    folder.mkdir()
    names = sorted(tensors)
    places = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        safetensors.torch.save_file({name: tensors[name] for name in part}, folder / file)
        places |= dict.fromkeys(part, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    single = tmp_path / "single"
    single.mkdir()
    safetensors.torch.save_file(tensors, single / "model.safetensors")
    prints = {load_backbone(tmp_path / name).weights_sha256 for name in ("whole.safetensors", "sharded", "single")}
    assert len(prints) == 1
    (folder / "model-00002-of-00002.safetensors").rename(tmp_path / "elsewhere")
    with pytest.raises(BadInput, match="lacks the shard model-00002-of-00002"):
        load_backbone(folder)
    index.write_text(json.dumps({"weight_map": {"a": "../single/model.safetensors"}}))
    with pytest.raises(BadInput, match=r"lacks the shard \.\./single"):
        load_backbone(folder)
    index.write_text("{")
    with pytest.raises(BadInput, match=r"damaged checkpoint .*index\.json"):
        load_backbone(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="is a folder; expected .*there: none"):
        load_backbone(tmp_path / "empty")


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_torchscript_archives_give_their_tensors(trained, tmp_path):
    """OpenAI publishes CLIP so. The archive's code is not run."""
    network = resnet18()
    network.load_state_dict(trained[0], strict=False)
    torch.jit.save(torch.jit.script(network.eval()), tmp_path / "script.pt")
    backbone = load_backbone(tmp_path / "script.pt")
    assert all(torch.equal(backbone.trunk.state_dict()[k], v) for k, v in trained[0].items())


def test_half_precision_is_widened(trained, tmp_path):
    torch.save({k: v.half() if v.is_floating_point() else v for k, v in trained[0].items()}, tmp_path / "half.pth")
    weight = load_backbone(tmp_path / "half.pth").trunk.conv1.weight
    assert weight.dtype == torch.float32 and torch.equal(weight, trained[0]["conv1.weight"].half().float())


def test_extract_prints_the_report(trained, scenes, tmp_path, command):
    torch.save({"state_dict": under("module.encoder_q.", trained[0]) | extra("module.queue")}, tmp_path / "moco.pth")
    words = ["--dataset", "voc", "--root", scenes, "--size", 64, "--split", "val", "--workers", 0]
    code, _, err = command("extract", "--backbone", tmp_path / "moco.pth", *words, "--store", tmp_path / "s.zarr")
    assert code == 0
    for line in (
        "  rule: MoCo's query encoder (state_dict.module.encoder_q.*)",
        "  architecture: resnet18, by tensor names and shapes",
        "  loaded: 120 tensors, 11.19 M values",
        "  left out: state_dict.module.queue",
        "  missing: none",
    ):
        assert line in err.split("\n")
    code, _, err = command(
        "extract",
        "--backbone",
        tmp_path / "moco.pth",
        "--weights-key",
        "teacher",
        *words,
        "--store",
        tmp_path / "t.zarr",
    )
    assert code == 2 and "--weights-key teacher: no encoder" in err


def tiny_vit(seed, **changed):
    """A small vision transformer of timm's with weights of its own."""
    vit = pytest.importorskip("timm.models.vision_transformer")
    chosen = {
        "img_size": 64,
        "patch_size": 16,
        "embed_dim": 128,
        "depth": 2,
        "num_heads": 2,
        "num_classes": 0,
    } | changed
    norm = partial(torch.nn.LayerNorm, eps=1e-6)
    torch.manual_seed(seed)
    network = vit.VisionTransformer(**chosen, norm_layer=norm).eval().requires_grad_(False)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return network


def renamed(tensors, *pairs):
    for pattern, new in pairs:
        tensors = {re.sub(pattern, new, k): v for k, v in tensors.items()}
    return tensors


def swapped(tensors):
    """DINOv2's own names, and its unused mask token."""
    return renamed(tensors, (r"^reg_token$", "register_tokens")) | {"mask_token": torch.zeros(1, 128)}


# name: (file's content from this encoder's tensors and those of another, arguments of the ViT, words of the rule)
VIT_LAYOUTS = {
    "timm or DeiT": (lambda a, b: {"model": a | {"head.weight": torch.zeros(10, 128), "head.bias": torch.zeros(10)}}, {}, None),
    "DINO, whole training state": (
        lambda a, b: {
            "student": under("module.backbone.", b) | extra("module.head.mlp.0.weight"),
            "teacher": under("backbone.", a) | extra("head.mlp.0.weight"),
            "args": argparse.Namespace(arch="vit_small", patch_size=16),
            "dino_loss": extra("center"),
        },
        {},
        "the teacher",
    ),
    "DINOv2": (lambda a, b: swapped(a), {"init_values": 1e-5}, "bare names"),
    "DINOv2's training": (
        lambda a, b: {"teacher": under("backbone.", swapped(a)) | extra("dino_head.mlp.0.weight")},
        {"init_values": 1e-5},
        "DINOv2's teacher",
    ),
    "MAE": (
        lambda a, b: {
            "model": a | extra("mask_token", "decoder_embed.weight", "decoder_pos_embed", "decoder_blocks.0.attn.qkv.weight"),
            "optimizer": OPTIMIZER,
            "args": argparse.Namespace(model="mae_vit_base_patch16"),
        },
        {},
        "the only encoder",
    ),
    "MoCo v3": (
        lambda a, b: {
            "state_dict": under("module.base_encoder.", a)
            | under("module.momentum_encoder.", b)
            | extra("module.base_encoder.head.0.weight", "module.predictor.0.weight")
        },
        {"embed_dim": 384, "num_heads": 12},
        "MoCo v3's base encoder",
    ),
    "mmpretrain": (
        lambda a, b: {
            "state_dict": under(
                "backbone.",
                renamed(
                    a,
                    (r"^patch_embed\.proj\.", "patch_embed.projection."),
                    (r"^blocks\.(\d+)\.norm", r"layers.\1.ln"),
                    (r"^blocks\.(\d+)\.mlp\.fc1", r"layers.\1.ffn.layers.0.0"),
                    (r"^blocks\.(\d+)\.mlp\.fc2", r"layers.\1.ffn.layers.1"),
                    (r"^blocks\.", "layers."),
                    (r"^norm\.", "ln1."),
                ),
            )
            | extra("head.layers.head.weight"),
        },
        {},
        "the only encoder",
    ),
    "VISSL": (
        lambda a, b: {"classy_state_dict": {"base_model": {"model": {"trunk": under("_feature_blocks.", a)}}}},
        {},
        "VISSL",
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", VIT_LAYOUTS)
def test_every_layout_of_a_vision_transformer_gives_the_network_that_was_saved(layout, tmp_path):
    build, changed, rule = VIT_LAYOUTS[layout]
    network, other = tiny_vit(0, **changed), tiny_vit(1, **changed)
    torch.save(build(network.state_dict(), other.state_dict()), tmp_path / "vit.pth")
    backbone = load_backbone(tmp_path / "vit.pth", size=64)
    assert (rule or "") in backbone.load_report
    images = torch.randn(2, 3, 64, 64)
    wanted = parse_features("last:tokens,cls,pooled,last2:cls", backbone.aliases, backbone.layers)
    with torch.inference_mode():
        got = backbone(images, wanted)
        tokens = network.to(memory_format=torch.channels_last).forward_features(
            images.contiguous(memory_format=torch.channels_last)
        )
    assert torch.equal(got["norm:tokens"], tokens) and torch.equal(got["norm:cls"], tokens[:, 0])
    assert torch.equal(got["norm:pooled"], tokens[:, 1:].mean(1))
    assert "blocks.0+norm:cls" in got


def test_clip_archives_give_the_image_tower(tmp_path):
    """OpenAI's names, text tower beside it, half precision."""
    open_clip = pytest.importorskip("open_clip")
    for vision in ({"layers": [1, 1, 1, 1], "width": 16, "image_size": 64}, {"layers": 2, "width": 64, "head_width": 32, "patch_size": 16, "image_size": 64}):  # fmt: skip
        torch.manual_seed(0)
        text = {"context_length": 8, "vocab_size": 32, "width": 32, "heads": 2, "layers": 1}
        model = open_clip.model.CLIP(embed_dim=32, vision_cfg=vision, text_cfg=text, quick_gelu=True).eval()
        tensors = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
        torch.save(tensors, tmp_path / "clip.pt")
        backbone = load_backbone(tmp_path / "clip.pt", size=64)
        assert "CLIP's image tower (visual.*)" in backbone.load_report and backbone.preprocessing.mean[0] == 0.48145466
        assert not any("transformer" in line and "missing" in line for line in backbone.load_report.split("\n"))


def test_bcos_checkpoints_of_the_package_of_lightning_and_of_mmengine(tmp_path):
    models = pytest.importorskip("bcos.models.resnet")
    torch.manual_seed(0)
    norm = pytest.importorskip("bcos.modules.norms").NoBias(
        pytest.importorskip("bcos.modules.norms").BatchNormUncentered2d
    )
    network = models.resnet18(pretrained=False, norm_layer=norm).eval().requires_grad_(False)
    tensors = network.state_dict()
    images = torch.rand(2, 6, 64, 64)
    layouts = {
        "release": tensors,
        "lightning": {"state_dict": under("model.", tensors)},
        "ema": {"state_dict": under("ema.module.", tensors)},
        "mmengine": {"state_dict": under("backbone.", {k: v for k, v in tensors.items() if not k.startswith("fc.")})},
    }
    prints = set()
    for name, content in layouts.items():
        torch.save(content, tmp_path / f"{name}.pth")
        backbone = load_backbone(tmp_path / f"{name}.pth")
        prints.add(backbone.weights_sha256)
        assert backbone.preprocessing.inverse and backbone.arch == "bcos_resnet18"
    assert len(prints) == 1
    with torch.inference_mode():
        got = backbone(images, parse_features("spatial", backbone.aliases, backbone.layers))["layer4:spatial"]
        network.to(memory_format=torch.channels_last)
        expected = network.get_feature_extractor()(images.contiguous(memory_format=torch.channels_last))
    assert torch.equal(got, expected)


def test_a_network_of_ones_own_is_found_in_any_layout(trained, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("from torchvision.models import resnet18\ndef build():\n    return resnet18()\n")
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": under("module.encoder_q.", trained[0]) | under("module.encoder_k.", trained[1])}, "c.pth")
    backbone = load_backbone("c.pth", arch="mine:build")
    assert torch.equal(backbone.trunk.conv1.weight, trained[0]["conv1.weight"])
    torch.save({"something": torch.zeros(3)}, "d.pth")
    with pytest.raises(BadInput, match=r"d\.pth does not fit mine:build: no key ends in"):
        load_backbone("d.pth", arch="mine:build")
