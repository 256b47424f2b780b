"""Layers and their reductions: what a feature's name means, from the parser to the store and the probe."""

import copy
import json

import h5py
import numpy as np
import pytest
import torch
import zarr
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torchvision.models import swin_t

import featcache
from featcache.backbones import ARCHITECTURES
from featcache.backbones.architecture import Architecture, Tokens
from featcache.backbones.backbone import Backbone
from featcache.backbones.input.preprocessing import Preprocessing
from featcache.backbones.layers import layers
from featcache.backbones.load import load_backbone
from featcache.errors import BadInput
from featcache.feature import Feature, parse_feature, parse_features
from featcache.store.manifest import feature_of

timm = pytest.importorskip("timm")
from timm.models.vision_transformer import VisionTransformer  # noqa: E402

SIDE = 32


@pytest.fixture(scope="module")
def vit():
    """A tiny ViT with a class token and four registers, as a Backbone."""
    return load_tiny(reg_tokens=4)


@pytest.fixture(scope="module")
def vit_checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    network = VisionTransformer(img_size=SIDE, patch_size=8, embed_dim=32, depth=3, num_heads=1)
    path = tmp_path_factory.mktemp("vit") / "vit.pth"
    torch.save(network.state_dict(), path)
    return path


def load_tiny(**settings):
    torch.manual_seed(0)
    network = VisionTransformer(img_size=SIDE, patch_size=8, embed_dim=32, depth=3, num_heads=1, **settings)
    found = ARCHITECTURES["vit"].infer(network.state_dict(), {})
    return Backbone(found, network, Preprocessing(SIDE, found.mean, found.std), "tiny")


def features_of(backbone, spec, images=None):
    wanted = parse_features(spec, backbone.aliases, backbone.layers)
    with torch.inference_mode():
        return list(backbone(torch.randn(2, 3, SIDE, SIDE) if images is None else images, wanted).values())


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 20))
def test_grids_have_one_spelling(kernel, stride, padding):
    if padding > kernel // 2:
        with pytest.raises(BadInput, match="at most half the kernel"):
            parse_feature(f"x:grid({kernel},{stride},{padding})", {})
        return
    feature = parse_feature(f" x : grid( {kernel}, {stride},{padding} )", {})
    assert str(feature) == f"x:grid({kernel},{stride},{padding})" and feature.window == (kernel, stride, padding)
    assert feature.folder == f"x.grid-{kernel}-{stride}-{padding}"
    assert feature_of(str(feature)) == feature
    assert parse_features(f"x:{feature.reduction},y:pooled", {}) == (feature, Feature("y", "pooled"))
    assert parse_feature(f"x:grid({kernel})", {}).window == (kernel, kernel, 0)


@pytest.mark.parametrize(
    "text",
    ["grid", "grid()", "grid(0)", "grid(2,0)", "grid(2,1,1,1)", "grid(2", "grid(a)", "pooled(2)", "gird(2)", "x:"],
)
def test_wrong_reductions_are_one_line(text):
    with pytest.raises(BadInput) as caught:
        parse_features(text, {"last": "x"})
    assert "grid(k,s,p)" in caught.value.message or "a grid needs" in caught.value.message


def test_axes_have_names_of_their_own():
    features = [
        Feature("a", r) for r in ("pooled", "cls", "patch_mean", "spatial", "tokens", "grid(2,2,0)", "grid(2,1,0)")
    ]
    axes = [axis for feature in features for axis in feature.axes]
    assert len(set(axes)) == len(axes)
    assert Feature("a", "grid(2,1,0)").axes == ("a.grid-2-1-0.channel", "a.grid-2-1-0.y", "a.grid-2-1-0.x")
    assert Feature("b+n", "tokens").axes == ("b+n.tokens.token", "b+n.tokens.channel")


def test_grids_of_the_multi_head_protocol():
    """Kernels, strides and paddings of Goyal et al. (ICCV 2019) for ResNet-50: 12, 6, 4, 3 and 2 positions a side."""
    backbone = load_backbone("random", arch="resnet50")
    windows = [(10, 10, 4), (16, 8, 0), (13, 5, 0), (8, 3, 0), (6, 1, 0)]
    spec = ",".join(f"feat{i}:grid({k},{s},{p})" for i, (k, s, p) in enumerate(windows, 1))
    images = torch.randn(1, 3, 224, 224)
    grids = features_of(backbone, spec, images)
    assert [tuple(g.shape[1:]) for g in grids] == [(64, 12, 12), (256, 6, 6), (512, 4, 4), (1024, 3, 3), (2048, 2, 2)]
    maps = features_of(backbone, ",".join(f"feat{i}:spatial" for i in range(1, 6)), images)
    for grid, map_, (kernel, stride, padding) in zip(grids, maps, windows, strict=True):
        assert torch.equal(grid, torch.nn.AvgPool2d(kernel, stride, padding)(map_))
    # The zeros around count, by hand for the corner of the stem.
    corner = maps[0][0, :, :6, :6].double().sum((1, 2)) / 100
    assert torch.allclose(grids[0][0, :, 0, 0].double(), corner, rtol=1e-5)
    with pytest.raises(BadInput, match=r"layer4:grid\(8,1,0\): a window of 8 is larger than the map of 7 x 7"):
        features_of(backbone, "grid(8,1,0)", images)


def test_tokens_by_hand(vit):
    images = torch.randn(2, 3, SIDE, SIDE)
    with torch.inference_mode():
        tokens = vit.trunk(images)  # [2, 1 + 4 + 16, 32]
    spec = "tokens,cls,patch_mean,pooled,spatial,grid(2,2,0)"
    everything, cls, mean, pooled, map_, grid = features_of(vit, spec, images)
    assert torch.equal(everything, tokens) and torch.equal(cls, tokens[:, 0])
    patches = tokens[:, 5:]
    assert torch.equal(mean, patches.mean(1)) and torch.equal(pooled, mean)
    by_hand = torch.stack([patches[:, 4 * y + x] for y in range(4) for x in range(4)], 2).reshape(2, 32, 4, 4)
    assert torch.equal(map_, by_hand) and torch.equal(grid, F.avg_pool2d(by_hand, 2))
    # The embedded patches have neither class token nor registers.
    (embedded,) = features_of(vit, "patch_embed:spatial", images)
    with torch.inference_mode():
        assert torch.allclose(embedded, vit.trunk.patch_embed.proj(images), atol=1e-6)
    with pytest.raises(
        BadInput, match=r"patch_embed:cls: layer patch_embed .* tokens without a class token \(0 before"
    ):
        features_of(vit, "patch_embed:cls")
    with pytest.raises(BadInput, match="yields tokens without a class token"):
        features_of(load_tiny(class_token=False, global_pool="avg", fc_norm=False), "cls")


def test_last_blocks_go_through_the_final_norm(vit):
    images = torch.randn(2, 3, SIDE, SIDE)
    with torch.inference_mode():
        expected = vit.trunk.get_intermediate_layers(images, n=3, norm=True, return_prefix_tokens=True)
    wanted = parse_features("last3:cls", vit.aliases, vit.layers)
    assert [str(f) for f in wanted] == ["blocks.0+norm:cls", "blocks.1+norm:cls", "norm:cls"]
    got = features_of(vit, "last3:cls", images)
    for ours, (_, prefix) in zip(got, expected, strict=True):
        assert torch.equal(ours, prefix[:, 0])
    plain, normed = features_of(vit, "blocks.1:tokens,last-1:tokens", images)
    with torch.inference_mode():
        assert torch.equal(vit.trunk.norm(plain), normed) and not torch.equal(plain, normed)
    with pytest.raises(BadInput, match="no 'last-3'; its last 3 blocks have names"):
        parse_features("last4:cls", vit.aliases, vit.layers)
    with pytest.raises(BadInput, match="no 'last-1'; it is no transformer"):
        parse_features("last2:pooled", {"last": "layer4"}, ["layer4"])
    with pytest.raises(BadInput, match="patch_embed.proj of .* does not take what norm yields"):
        features_of(vit, "norm+patch_embed.proj:tokens")


def test_maps_with_channels_last_are_turned():
    torch.manual_seed(0)
    network = swin_t(weights=None).eval().to(memory_format=torch.channels_last)
    expected = {}
    for path in ("features.0.0", "features.1", "norm"):
        network.get_submodule(path).register_forward_hook(lambda m, i, o, path=path: expected.update({path: o}))
    images = torch.randn(2, 3, 64, 96)
    found = ARCHITECTURES["swin_t"]
    with torch.inference_mode():
        network(images.contiguous(memory_format=torch.channels_last))
    seen = dict(expected)
    stem, first, last = features_of(
        Backbone(found, network, Preprocessing(64, found.mean, found.std), ""),
        "features.0.0:spatial,feat2:spatial,spatial", images,
    )  # fmt: skip
    assert torch.equal(stem, seen["features.0.0"]) and stem.shape == (2, 96, 16, 24)
    assert torch.equal(first, seen["features.1"].permute(0, 3, 1, 2)) and first.shape == (2, 96, 16, 24)
    assert torch.equal(last, seen["norm"].permute(0, 3, 1, 2)) and last.shape == (2, 768, 2, 3)


def test_errors_say_what_a_layer_yields(vit, checkpoint):
    resnet = load_backbone(checkpoint)
    with pytest.raises(BadInput, match=r"yields a map \[B, C, H, W\], which allows pooled, spatial, grid"):
        features_of(resnet, "cls")
    with pytest.raises(BadInput, match="no layer 'fc'"):
        features_of(resnet, "fc:pooled")
    with pytest.raises(BadInput, match="no layer 'blocks.7'; did you mean 'blocks"):
        features_of(vit, "blocks.7+norm:cls")
    with pytest.raises(BadInput, match="no layer 'nrm'; did you mean 'norm'"):
        features_of(vit, "blocks.1+nrm:cls")
    with pytest.raises(BadInput, match="more than one '\\+'"):
        features_of(vit, "blocks.1+norm+norm:cls")
    with pytest.raises(BadInput, match="does not run its module head_drop"):
        features_of(vit, "head_drop:pooled")
    with pytest.raises(BadInput, match="yields no tensor of images"):
        features_of(vit, "blocks.0.attn.q_norm:pooled")


class Odd(torch.nn.Module):
    """Layers that yield other things than tensors of images."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 8, stride=8)
        self.pair = Pair()
        self.lost = torch.nn.Flatten(0)
        self.sequence = torch.nn.Flatten(2)

    def forward(self, images):
        maps = self.conv(images)
        self.pair(maps)
        self.lost(maps)
        return self.sequence(maps)


class Pair(torch.nn.Module):
    def forward(self, maps):
        return maps, maps


def test_only_tensors_of_images_are_listed():
    odd = Architecture("odd", Odd, lambda n: n, "conv.weight", ("fc.",), {"last": "conv"})
    backbone = Backbone(odd, Odd(), Preprocessing(SIDE, odd.mean, odd.std), "")
    assert [(layer.path, layer.aliases, layer.shape, layer.reductions) for layer in layers(backbone)] == [
        ("conv", ("last",), (4, 4, 4), ("pooled", "spatial", "grid(k,s,p)")),
        ("sequence", (), (4, 16), ("tokens",)),
    ]
    assert backbone.architecture.tokens is None and Tokens(1, True, 8).cls


@pytest.mark.parametrize("arch", ["resnet18", "clip_rn50", "regnet_y_400mf", "bcos_resnet18", "efficientnet_lite0"])
def test_listed_shapes_and_reductions_are_true(arch):
    """All that the table promises of the named layers works, with that shape."""
    backbone = load_backbone("random", arch=arch, size=64)
    listed = layers(backbone)
    assert {alias for layer in listed for alias in layer.aliases} == set(backbone.aliases)
    images = torch.rand(1, 3, 64, 64)
    for layer in listed:
        if layer.aliases:
            assert features_of(backbone, f"{layer.path}:spatial", images)[0].shape[1:] == layer.shape


def test_copies_run_on_their_own(vit):
    """The trunk of a ViT ends before timm's classifier; so must that of a copy, on its own tensors."""
    twin = copy.deepcopy(vit)
    with torch.no_grad():
        twin.trunk.norm.weight.mul_(2)
        twin.trunk.norm.bias.mul_(2)
    images = torch.randn(2, 3, SIDE, SIDE)
    assert torch.equal(features_of(twin, "tokens", images)[0], 2 * features_of(vit, "tokens", images)[0])
    for arch in ("vit_tiny_patch16", "timm:test_vit"):
        model = load_backbone("random", arch=arch)
        inputs = torch.randn(1, 3, model.preprocessing.size, model.preprocessing.size)
        assert torch.equal(copy.deepcopy(model).trunk(inputs), model.trunk(inputs))


def test_every_reduction_of_every_layer_works(vit):
    for layer in featcache.layers(vit):
        for reduction in layer.reductions:
            (values,) = features_of(vit, f"{layer.path}:{reduction.replace('(k,s,p)', '(2)')}")
            assert len(values) == 2
            if reduction == "tokens" or len(layer.shape) == 1:
                assert values.shape[1:] == layer.shape


def test_layers_command(vit_checkpoint, command):
    code, out, err = command("layers", vit_checkpoint, "--size", 48)
    assert code == 0 and "vit_d32_l3_patch8" in err and "positions 4x4 resized to 6x6" in err
    lines = [line.split() for line in out.splitlines()]
    assert ["norm", "last", "37", "x", "32", "pooled", "patch_mean", "cls", "spatial", "grid(k,s,p)", "tokens"] in lines
    assert any(line[:2] == ["blocks.1+norm", "last-1"] for line in lines)
    code, out, _ = command("layers", "random", "--arch", "resnet18")
    assert code == 0 and "512 x 7 x 7" in out
    code, _, err = command("layers", "random", "--arch", "timm:test_vit", "--size", 96)
    assert code == 0 and "\n  made to fit 96 pixels by timm, bicubic and anti-aliased\n" in err
    code, _, err = command("layers", "random", "--arch", "resnet81")
    assert code == 2 and "did you mean 'resnet18'" in err


@pytest.mark.parametrize("format", ["zarr", "hdf5"])
def test_stores_hold_every_reduction(scenes, vit_checkpoint, tmp_path, format):
    spec = "spatial,cls,patch_mean,tokens,grid(2,1,0),last2:cls"
    settings = {"root": scenes, "size": SIDE, "dtype": "float32", "workers": 0, "splits": ["val"]}
    path = featcache.extract(vit_checkpoint, "voc", features=spec, store=tmp_path / f"s.{format}", **settings)
    opened = featcache.open_store(path)["val"]
    assert {str(f) for f in opened.store.manifest.features} == {
        "norm:spatial", "norm:cls", "norm:patch_mean", "norm:tokens", "norm:grid(2,1,0)", "blocks.1+norm:cls",
    }  # fmt: skip
    tokens = opened["tokens"][:]
    assert tokens.shape == (20, 17, 32)
    np.testing.assert_array_equal(opened["cls"][:], tokens[:, 0])
    np.testing.assert_array_equal(opened["spatial"][:], tokens[:, 1:].transpose(0, 2, 1).reshape(20, 32, 4, 4))
    assert opened["last:grid(2, 1)"].shape == (20, 32, 3, 3) and opened["last-1:cls"].shape == (20, 32)
    if format == "zarr":
        plain = zarr.open(path, mode="r")["val"]
        array = plain["norm.grid-2-1-0"]
        assert array.metadata.dimension_names[1:] == tuple(Feature("norm", "grid(2,1,0)").axes)
        np.testing.assert_array_equal(plain["blocks.1+norm.cls"][:], opened["last-1:cls"][:])
    else:
        with h5py.File(tmp_path / "s.hdf5" / "index.h5") as file:
            np.testing.assert_array_equal(file["val/norm.cls"][:], tokens[:, 0])


def test_probes_on_tokens_and_grids(scenes, vit_checkpoint, tmp_path):
    """cls and patch_mean train as vectors, a grid as one long vector; tokens are refused."""
    settings = {"root": scenes, "size": SIDE, "dtype": "float32", "workers": 0}
    spec = "cls,patch_mean,spatial,tokens,grid(2,2,0)"
    store = featcache.extract(vit_checkpoint, "voc", features=spec, store=tmp_path / "s.zarr", **settings)

    def train(features, head="linear", name="run"):
        group = {"features": features, "head": head, "loss": "bce", "epochs": 2, "batch_size": 16}
        grid = {"probes": [group | {"optimizer": {"type": "sgd", "lr": 0.1}}]}
        return featcache.train_probes(grid, store, run=tmp_path / name)

    from featcache.probes.runs.probe_file import load_probe

    run = train(["cls", "patch_mean", "spatial", "grid(2,2,0)"])
    by_feature = {row["features"]: row for row in run.scores if row["split"] == "test" and row["metric"] == "map"}
    widths = {
        name: load_probe(run.path, row["probe"]).weights["fc0.weight"].shape[1] for name, row in by_feature.items()
    }
    assert widths == {"norm:cls": 32, "norm:patch_mean": 32, "norm:spatial": 32, "norm:grid(2,2,0)": 32 * 4}
    assert by_feature["norm:patch_mean"]["value"] == pytest.approx(by_feature["norm:spatial"]["value"], abs=1e-6)
    test = featcache.open_store(store)["test"]
    probe = load_probe(run.path, by_feature["norm:grid(2,2,0)"]["probe"])
    flat = torch.from_numpy(test["grid(2,2,0)"][:]).flatten(1)
    from featcache.probes.engine.predict import Predictor

    logits = Predictor([probe.spec], [probe.weights], len(test.store.classes), "cpu")(flat)
    by_hand = flat @ probe.weights["fc0.weight"].T + probe.weights["fc0.bias"]
    assert torch.allclose(logits.reshape(by_hand.shape), by_hand, atol=1e-5)
    mlp = {"type": "mlp", "hidden": 4}
    assert train("cls", mlp, "mlp").scores
    with pytest.raises(BadInput, match="a head of type mlp on norm:patch_mean is another model"):
        train("patch_mean", mlp, "refused")
    with pytest.raises(
        BadInput, match="only an attentive head reads norm:tokens; take norm:cls, :patch_mean or :spatial"
    ):
        train("tokens", name="refused")
    with pytest.raises(
        BadInput,
        match=r"--method gradcam: probe \w+ reads norm:cls, which is no map of the image; methods that can .* smoothgrad",
    ):
        featcache.attribute(run.path, probes=[by_feature["norm:cls"]["probe"]])
    assert featcache.attribute(run.path, probes=[by_feature["norm:patch_mean"]["probe"]], examples=0)


def test_default_features_have_the_class_token(scenes, vit_checkpoint, checkpoint, tmp_path):
    settings = {"root": scenes, "size": SIDE, "workers": 0, "splits": ["val"]}
    for source, features in (
        (vit_checkpoint, ["norm:cls", "norm:pooled", "norm:spatial"]),
        (checkpoint, ["layer4:pooled", "layer4:spatial"]),
    ):
        path = featcache.extract(source, "voc", store=tmp_path / f"{source.stem}.zarr", **settings)
        assert (
            json.loads((tmp_path / f"{source.stem}.zarr" / "manifest.json").read_text())["identity"]["features"]
            == features
        )
        assert featcache.open_store(path).id
