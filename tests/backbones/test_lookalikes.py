"""Networks that compute something else on the same tensors: the report names them, and the tables are timm's."""

import pytest
import torch
from torch import nn

from featcache.backbones.checkpoints.strict import BYSTANDERS
from featcache.backbones.families.lookalikes import FIXED, VITS
from featcache.backbones.load import load_backbone
from featcache.backbones.recognise import find_architecture, recognise
from featcache.errors import BadInput

# Many networks, or many runs: longer together than the fast tests may take.
pytestmark = pytest.mark.process

timm = pytest.importorskip("timm")

LISTED = {name for _, names in VITS for name in names}
# Modules of timm whose networks have the keys of a ViT.
MODULES = ("vision_transformer", "deit", "eva", "vision_transformer_hybrid")
PRETRAINED = {tagged.partition(".")[0] for tagged in timm.list_pretrained()}
PUBLISHED = [name for module in MODULES for name in timm.list_models(module=module) if name in PRETRAINED]
# One of every width, of every kind at that width, and of those that are listed for one reason.
QUICK = {
    "test_vit", "test_vit3", "vit_tiny_patch16_224", "vit_small_patch16_224", "deit3_medium_patch16_224",
    "vit_betwixt_patch16_reg4_gap_256", "vit_base_patch16_siglip_224", "vit_base_patch16_plus_clip_240",
    "vit_large_patch14_clip_224", "vit_so400m_patch14_siglip_224", "vit_so400m_patch16_siglip_512",
    "vit_huge_patch14_224", "vit_giant_patch14_clip_224", "vit_giant_patch14_reg4_dinov2",
    "vit_giantopt_patch16_siglip_256", "vit_gigantic_patch14_clip_224", "vit_xsmall_patch16_clip_224",
    "vit_so150m2_patch16_reg1_gap_256", "vit_base_patch32_clip_quickgelu_224", "vit_small_patch16_rope_ape_224",
    "vit_base_patch16_rpn_224", "deit3_small_patch16_224",
}  # fmt: skip


def agrees(architecture, tensors):
    """Whether the load would take them: all that features need is there in its shape, and nothing unexpected."""
    with torch.device("meta"):
        wanted = {k: v.shape for k, v in architecture.build().state_dict().items()}
    wanted = {k: shape for k, shape in wanted.items() if not k.startswith(architecture.classifier)}
    given = architecture.named(tensors)
    parts = {key.split(".")[0] for key in wanted}
    rest = [key for key in given if key not in wanted and not key.startswith(architecture.classifier)]
    return all(key in given and given[key].shape == shape for key, shape in wanted.items()) and all(
        key.split(".")[0] not in parts and key.startswith(BYSTANDERS) for key in rest
    )


@pytest.mark.process
@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in PUBLISHED])
def test_a_published_vit_of_timm_has_its_heads_and_is_named_if_it_is_another(name):
    with torch.device("meta"):
        network = timm.create_model(name)
        tensors = network.state_dict()
        try:
            told = recognise(tensors, "x.pth")
        except BadInput:
            told = None
        if told is None or not agrees(told, tensors):
            assert name not in QUICK | LISTED
            pytest.skip("featcache reads it by its name alone")
        ours = told.build().blocks[0]
    block = network.blocks[0]
    assert told.heads == block.attn.num_heads
    assert told.note.startswith(f"heads: {told.heads}, a guess from the width")
    assert find_architecture(told.name, tensors).heads == told.heads
    same = type(block) is type(ours) and type(block.mlp.act) is type(ours.mlp.act)
    assert (same and getattr(network, "rope", None) is None) == (f"timm:{name}" not in told.alike)
    assert ("tensors cannot tell it from" in told.note) == bool(told.alike)


def test_only_published_networks_are_listed():
    assert set(PUBLISHED) >= LISTED | QUICK


def values_of(network, seed=0):
    """The same random tensors for every network of these names and shapes, batch-norm statistics included."""
    tensors = {}
    for key, value in sorted(network.state_dict().items()):
        generator = torch.Generator().manual_seed(seed + sum(map(ord, key)))
        drawn = torch.rand(value.shape, generator=generator) + 0.5
        if value.ndim > 1:
            drawn = nn.init.kaiming_normal_(torch.empty(value.shape), generator=generator)
        tensors[key] = drawn if value.is_floating_point() else value
    return tensors


FIXED_FAMILIES = ("resnet", "densenet", "inception_v3")
CANDIDATES = [name for module in FIXED_FAMILIES for name in timm.list_models(module=module) if name in PRETRAINED]
CHEAP = {"resnet18", "resnet50", "resnetaa50", "resnetblur50", "inception_v3"}


@pytest.mark.process
@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in CHEAP else pytest.mark.slow) for n in CANDIDATES])
def test_a_fixed_network_of_timm_that_is_another_is_named(name, tmp_path):
    with torch.device("meta"):
        tensors = timm.create_model(name).state_dict()
    try:
        told = recognise(tensors, "x.pth")
    except BadInput:
        told = None
    if told is None or not agrees(told, tensors):
        assert name not in CHEAP
        pytest.skip("featcache reads it by its name alone")
    network = timm.create_model(name).eval()
    network.load_state_dict(values_of(network))
    torch.save(network.state_dict(), tmp_path / "x.pth")
    backbone = load_backbone(tmp_path / "x.pth")
    pixels = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(1))

    def seen(of):
        return (pixels - torch.tensor(of.mean).view(3, 1, 1)) / torch.tensor(of.std).view(3, 1, 1)

    with torch.inference_mode():
        got = backbone.trunk(seen(backbone.preprocessing))
        # One set of weights of Inception v3 has another input than the network's others.
        for tagged in (name, "inception_v3.gluon_in1k") if name == "inception_v3" else (name,):
            maps = network.forward_features(seen(find_architecture(f"timm:{tagged}")))
            expected = maps.mean((2, 3)) if got.ndim == 2 else maps
            same = torch.allclose(got, expected, rtol=1e-3, atol=1e-3 * float(expected.std()))
            assert same == (f"timm:{tagged}" not in told.alike), tagged


def test_every_listed_fixed_network_is_timms():
    for name, others in FIXED.items():
        for other in others:
            assert other.partition(".")[0] in CANDIDATES and find_architecture(f"timm:{other}").size
            assert f"timm:{other}" in recognise(find_architecture(name).build().state_dict(), "x").note


def test_perception_encoders_are_not_taken_for_clips(tmp_path):
    """Their rotary positions are in no tensor."""
    with torch.device("meta"):
        shapes = timm.create_model("vit_pe_core_tiny_patch16_384").state_dict()
    torch.save({f"visual.trunk.{k}": torch.zeros(v.shape) for k, v in shapes.items()}, tmp_path / "pe.pth")
    with pytest.raises(BadInput, match="a Perception Encoder.*--arch.*timm:vit_pe_core"):
        load_backbone(tmp_path / "pe.pth")
    backbone = load_backbone(tmp_path / "pe.pth", arch="timm:vit_pe_core_tiny_patch16_384")
    assert backbone.arch == "timm:vit_pe_core_tiny_patch16_384"


def test_the_report_names_them(tmp_path, command):
    torch.save(timm.create_model("resnet50").state_dict(), tmp_path / "x.pth")
    code, _, err = command("layers", tmp_path / "x.pth")
    line = "  tensors cannot tell it from resnet50_caffe, timm:resnetaa50, timm:resnetblur50: say so with --arch"
    assert code == 0 and line in err.split("\n")
    code, _, err = command("layers", tmp_path / "x.pth", "--arch", "timm:resnetblur50")
    assert code == 0 and "cannot tell" not in err and "architecture: timm:resnetblur50, as --arch says" in err
