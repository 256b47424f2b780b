"""torchvision's classification networks other than the ResNets, family by family."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from featcache.backbones.architecture import Architecture, Fields, Hints, Tokens, last_blocks, without
from featcache.backbones.checkpoints.encoder import Tensors
from featcache.backbones.families.lookalikes import like_fixed
from featcache.backbones.families.positions import fit_positions
from featcache.backbones.families.torchvision_import import models
from featcache.backbones.families.torchvision_weights import customs, input_of
from featcache.errors import BadInput


def _stages(*paths: str) -> dict[str, str]:
    return {f"feat{number}": path for number, path in enumerate(paths, 1)}


# feat1 is the stem and feat2..feat5 the stages, or the last layers at strides 2 to 32.
FIVE = _stages("features.0", "features.1", "features.3", "features.5", "features.7")
STRIDES = _stages("features.1", "features.2", "features.3", "features.5", "features")
MOBILE = _stages("features.1", "features.3", "features.6", "features.13", "features")
BLOCKS = _stages("stem", *(f"trunk_output.block{i}" for i in range(1, 5)))
# Key of a layer that only the family has; prefixes of the classifier's keys; aliases. `last` is the map that the
# classifier pools.
FAMILIES: dict[str, tuple[str, tuple[str, ...], dict[str, str]]] = {
    "alexnet": ("features.0.weight", ("classifier.",), {"last": "features"}),
    "vgg": ("features.0.weight", ("classifier.",), {"last": "features"}),
    "squeezenet": ("features.0.weight", ("classifier.",), {"last": "features"}),
    "convnext": ("features.1.0.layer_scale", ("classifier.2.",), FIVE | {"last": "features"}),
    "efficientnet": ("features.1.0.block.0.0.weight", ("classifier.",), STRIDES | {"last": "features"}),
    "mobilenet_v2": ("features.1.conv.0.0.weight", ("classifier.",), MOBILE | {"last": "features"}),
    "mobilenet_v3": ("features.1.block.0.0.weight", ("classifier.",), {"last": "features"}),
    "mnasnet": ("layers.8.0.layers.0.weight", ("classifier.",), {"last": "layers"}),
    "regnet": ("trunk_output.block1.block1-0.f.a.0.weight", ("fc.",), BLOCKS | {"last": "trunk_output"}),
    "shufflenet": ("stage2.0.branch2.0.weight", ("fc.",), {"last": "conv5"}),
    "googlenet": ("inception3a.branch1.conv.weight", ("fc.", "aux1.", "aux2."), {"last": "inception5b"}),
    "inception": ("Conv2d_1a_3x3.conv.weight", ("fc.", "AuxLogits."), {"last": "Mixed_7c"}),
}  # fmt: skip
VIT_DEPTHS = {"b": 12, "l": 24, "h": 32}
# torchvision's own weights of googlenet and inception were trained on inputs in -1..1; the network converts an input
# that is normalised by ImageNet's mean and std to these.
OPTIONS = {
    "googlenet": {"init_weights": False, "transform_input": True},
    "inception": {"init_weights": False, "transform_input": True},
}
# Families in which more, or less, than the classifier is taken off.
TRUNKS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "convnext": lambda network: _without_linear(network),
    "googlenet": without("fc", "aux1", "aux2"),
    "inception": without("fc", "AuxLogits"),
}


def _without_linear(network: Any) -> nn.Module:
    # The norm before it stays, as classifier.0.
    network.classifier[2] = nn.Identity()
    return network


class MNASNet(models.MNASNet):  # type: ignore[misc]  # torchvision has no types
    """torchvision's network, which refuses tensors that come without the version of its layout; the second is assumed.

    The first had other shapes, except in mnasnet1_0, where both are the same.
    """

    def _load_from_state_dict(
        self, state_dict: Tensors, prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, {"version": self._version} | local_metadata, *rest)


class DenseNetTrunk(nn.Module):
    """`features`, and the ReLU that DenseNet's forward puts between them and the pool, as `relu`."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.features = network.features
        self.relu = nn.ReLU(inplace=True)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images [B, 3, H, W] to the last map."""
        return self.relu(self.features(images))


def architectures() -> dict[str, Architecture]:
    """Return the networks by torchvision's names."""
    made = {}
    for name in models.list_models(module=models):
        family = next((f for f in FAMILIES if name.startswith(f)), None)
        if family:
            signature, classifier, aliases = FAMILIES[family]
            trunk = TRUNKS.get(family) or without(classifier[0].split(".")[0])
            made[name] = _architecture(name, signature, classifier, aliases, trunk, **OPTIONS.get(family, {}))
            if family == "mnasnet":
                width = float(name.removeprefix(family).replace("_", "."))
                made[name] = replace(made[name], build=partial(MNASNet, width))
    return made | _densenets() | _swins() | _maxvit() | _vits()


def _names(family: str) -> list[str]:
    return [name for name in models.list_models(module=models) if name.startswith(family)]


def _architecture(
    name: str,
    signature: str,
    classifier: tuple[str, ...],
    aliases: dict[str, str],
    trunk: Callable[[Any], nn.Module],
    **options: bool,
) -> Architecture:
    return Architecture(
        name=name,
        build=partial(models.get_model, name, weights=None, **options),
        trunk=trunk,
        signature=signature,
        classifier=classifier,
        aliases=aliases,
        customs=partial(customs, name),
        alike=like_fixed(name),
        **input_of(name),
    )


def _densenets() -> dict[str, Architecture]:
    blocks = (f"features.denseblock{i}" for i in range(1, 4))
    aliases = _stages("features.relu0", *blocks, "relu") | {"last": "relu"}
    return {
        name: _architecture(name, "features.conv0.weight", ("classifier.",), aliases, DenseNetTrunk)
        for name in _names("densenet")
    }


def _swins() -> dict[str, Architecture]:
    """Return Swin v1 and v2 (Liu et al., ICCV 2021, CVPR 2022). Maps are [B, H, W, C]; `last` is the final norm's."""
    swins = {}
    for name in _names("swin"):
        made = _architecture(
            name, "features.1.0.attn.qkv.weight", ("head.",), FIVE | {"last": "norm"},
            without("permute", "avgpool", "flatten", "head"),
        )  # fmt: skip
        swins[name] = replace(made, nhwc=True)
    return swins


def _maxvit() -> dict[str, Architecture]:
    aliases = _stages("stem", *(f"blocks.{i}" for i in range(4))) | {"last": "blocks.3"}
    signature = "blocks.0.layers.0.layers.MBconv.layers.pre_norm.weight"
    made = _architecture("maxvit_t", signature, ("classifier.",), aliases, without("classifier"))
    return {"maxvit_t": replace(made, fit=partial(_only, made.size))}


def _only(wanted: int, network: nn.Module, size: int) -> str:
    if size != wanted:
        raise BadInput(
            f"--size {size}: maxvit_t takes images of {wanted} x {wanted} alone, for its windows fit no other"
        )
    return ""


def _vits() -> dict[str, Architecture]:
    """Return ViTs (Dosovitskiy et al., ICLR 2021). Their position grid tells the checkpoint's input size."""
    return {name: _vit(name, input_of(name)) for name in _names("vit")}


def _vit(name: str, preset: Fields) -> Architecture:
    size, patch = name.split("_")[1], _patch(name)
    blocks = [f"encoder.layers.encoder_layer_{i}" for i in range(VIT_DEPTHS[size])]
    return Architecture(
        name=name,
        build=partial(models.get_model, name, weights=None, image_size=preset["size"]),
        trunk=without("heads"),
        signature="encoder.layers.encoder_layer_0.ln_1.weight",
        classifier=("heads.",),
        aliases=last_blocks(blocks, "encoder.ln"),
        tokens=Tokens(prefix=1, cls=True, patch=patch),
        infer=partial(_infer_vit, name),
        fit=partial(_fit_vit, name, patch),
        customs=partial(customs, name),
        **preset,
    )


def _patch(name: str) -> int:
    return int(name.split("_")[2])


def _infer_vit(name: str, tensors: Tensors, hints: Hints) -> Architecture | None:
    positions, patches = tensors.get("encoder.pos_embedding"), tensors.get("conv_proj.weight")
    patch = _patch(name)
    if positions is None or patches is None or patches.shape[-1] != patch:
        return None
    return _vit(name, input_of(name, size=math.isqrt(positions.shape[1]) * patch))


def _fit_vit(name: str, patch: int, network: Any, size: int) -> str:
    note = fit_positions(network.encoder, "pos_embedding", size, patch, "corners", name)
    network.image_size = size
    return note
