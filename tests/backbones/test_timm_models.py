"""timm's recent families by `timm:NAME` from a local file: the features are those of timm's own forward pass."""

import pytest
import timm
import torch

from featcache.backbones.load import load_backbone
from featcache.errors import BadInput
from featcache.feature import parse_features

# {smallest network of a family, of two blocks where that can be chosen: (tokens before the patches, or None for maps;
# whether the first is a class token; another size that it takes, or None)}.
TRIED = {
    "vit_small_patch16_dinov3": (5, True, 128),
    "vit_tiny_patch16_dinov3_qkvb": (5, True, 128),
    "vit_base_patch16_siglip_224.v2_webli": (0, False, 448),
    "vit_base_patch32_siglip_gap_256.v2_webli": (0, False, 128),
    "naflexvit_base_patch16_siglip.v2_webli": (0, False, 192),
    "vit_pe_core_tiny_patch16_384": (1, True, 192),
    "vit_pe_spatial_tiny_patch16_512": (1, True, 256),
    "vit_pe_lang_large_patch14_448": (1, True, 224),
    "vit_base_patch16_radio_v3.c_radio": (8, True, 256),
    "naflexvit_base_patch16_radio_v3.c_radio": (8, True, 256),
    "vit_so400m_patch16_radio_v4": (10, True, 256),
    "aimv2_large_patch14_224": (0, False, 448),
    "eva02_tiny_patch14_224": (1, True, 448),
    "eva02_base_patch16_clip_224": (1, True, 448),
    "vit_huge_patch14_gap_224.in1k_ijepa": (0, False, 448),
    "fastvit_mci0": (None, False, 128),
    "vit_base_mci_224": (1, True, 448),
    "hiera_tiny_224": (0, False, None),
    "hieradet_small": (None, False, 128),
    "sam2_hiera_tiny": (None, False, 448),
}
OF_STAGES = ("fastvit", "hiera", "sam2")


@pytest.fixture
def two_blocks(monkeypatch):
    """Build timm's transformers with two blocks, which is enough to see what their layers are."""
    create = timm.create_model

    def shallow(name, **more):
        return create(name, **more | ({} if name.startswith(OF_STAGES) else {"depth": 2}))

    monkeypatch.setattr(timm, "create_model", shallow)
    return shallow


@pytest.mark.slow
@pytest.mark.parametrize("name", TRIED)
def test_a_file_of_every_family(name, two_blocks, tmp_path):
    check(name, two_blocks, tmp_path)


def check(name, create, tmp_path):
    prefix, cls, other = TRIED[name]
    torch.manual_seed(0)
    network = create(name).eval()
    torch.save(network.state_dict(), tmp_path / "x.pth")
    backbone = load_backbone(tmp_path / "x.pth", arch=f"timm:{name}", resize="own")
    size = backbone.preprocessing.size
    images = torch.randn(1, 3, size, size)
    word = "spatial" if prefix is None else "tokens"
    with torch.inference_mode():
        expected = network.forward_features(images)
        (got,) = backbone(images, parse_features(word, backbone.aliases, backbone.layers)).values()
    if backbone.architecture.nhwc:
        expected = expected.permute(0, 3, 1, 2)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    tokens = backbone.architecture.tokens
    assert (tokens and tokens.prefix, backbone.class_token) == (prefix, cls)
    if other is None:
        with pytest.raises(
            BadInput, match=f"--size 448: timm:{name} takes images of {size} pixels alone: --size {size}"
        ):
            load_backbone(tmp_path / "x.pth", arch=f"timm:{name}", size=448)
    else:
        backbone = load_backbone(tmp_path / "x.pth", arch=f"timm:{name}", size=other)
        with torch.inference_mode():
            (map_,) = backbone(
                torch.randn(1, 3, other, other), parse_features("spatial", backbone.aliases, backbone.layers)
            ).values()
        assert map_.shape[2] == map_.shape[3] == got.shape[-1] * other // size if prefix is None else map_.ndim == 4
    return backbone


@pytest.mark.process
def test_a_network_that_ends_with_a_block_has_no_blocks_before_its_norm(two_blocks, tmp_path):
    backbone = check("hiera_tiny_224", two_blocks, tmp_path)
    assert backbone.aliases == {"last": "blocks.11"}
