"""The arithmetic in which a backbone runs, and what that does to its features."""

import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from featcache.backbones.backbone import Backbone
from featcache.device import multiplying, why_not
from featcache.errors import BadInput, nearest
from featcache.feature import Feature

# The dtype of matrix products and convolutions; tf32 is a mode of float32.
PRECISIONS = {"float32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# The most by which folding may move a feature, as a share of its largest value.
FOLDED_WITHIN = 1e-5


def check_precision(precision: str, device: torch.device) -> None:
    """Raise BadInput for an unknown precision, and for one that the device cannot do."""
    if precision not in PRECISIONS:
        raise BadInput(
            f"--precision {precision}: unknown{nearest(precision, PRECISIONS)} (known: {', '.join(PRECISIONS)})"
        )
    if reason := why_not(precision, device):
        raise BadInput(f"--precision {precision} {reason}")


@contextmanager
def running(precision: str, device: torch.device) -> Iterator[None]:
    """Run inference in a precision within the block.

    bf16 and fp16 are torch's autocast: weights stay as they are, and operations that need it stay in float32.
    """
    dtype = PRECISIONS[precision]
    with multiplying(precision), torch.inference_mode():
        if dtype is torch.float32:
            yield
        else:
            with torch.autocast(device.type, dtype):
                yield


def measure(
    backbone: Backbone, images: torch.Tensor, features: Sequence[Feature], precision: str
) -> dict[str, bool | float]:
    """Compare a precision with float32 on a batch, and see whether batch norms can be folded.

    images: normalised float32 [B, C, H, W], on the backbone's device. Returns {"folded": whether folding leaves every
    feature in float32 within FOLDED_WITHIN of its largest value, "cosine": to float32, the minimum over features and
    images}, both plain JSON. Raises BadInput if a value overflows.
    """
    with running("float32", images.device):
        exact = backbone(images, features)
    plain, folded = backbone.trunk, fold_batch_norm(backbone.trunk, layers_of(features))
    try:
        if folded is not None:
            backbone.trunk = folded
            with running("float32", images.device):
                near = backbone(images, features)
            if any((near[k] - exact[k]).abs().max() > FOLDED_WITHIN * exact[k].abs().max() for k in exact):
                folded, backbone.trunk = None, plain
        with running(precision, images.device):
            values = backbone(images, features)
    finally:
        backbone.trunk = plain
    for name in values:
        if exact[name].isfinite().all() and not values[name].isfinite().all():
            raise BadInput(f"--precision {precision}: feature {name} overflows; use bf16 or float32")
    cosine = min(float(_cosine(values[name], exact[name]).min()) for name in values)
    return {"folded": folded is not None, "cosine": round(cosine, 6)}


def _cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the cosine in float64 of [B, ...] and [B, ...], row by row: [B], 1 where both are zero."""
    a, b = a.double().flatten(1), b.double().flatten(1)
    both_zero = (a == 0).all(1) & (b == 0).all(1)
    return torch.where(both_zero, 1, nn.functional.cosine_similarity(a, b, eps=1e-300))


def layers_of(features: Iterable[Feature]) -> list[str]:
    """Return the paths of the modules whose outputs features are made of; of a layer written A+B, both."""
    return [path for feature in features for path in feature.layer.split("+")]


def fold_batch_norm(trunk: nn.Module, layers: Sequence[str]) -> nn.Module | None:
    """Return a copy of a network in eval mode whose convolutions do the batch norms' work, or None if none can.

    A norm becomes an identity of the same name where it alone sees its convolution's output: no other module does, and
    the output is not asked for. layers: paths of the modules whose outputs are asked for. Weights are computed in
    float64.
    """
    pairs = [
        (conv, norm)
        for conv, norm in _pairs(trunk)
        if not any(_within(conv, layer) and not _within(norm, layer) for layer in layers)
    ]
    if not pairs:
        return None
    folded = copy.deepcopy(trunk)
    for conv_name, norm_name in pairs:
        conv: Any = folded.get_submodule(conv_name)
        norm: Any = folded.get_submodule(norm_name)
        scale = (norm.running_var.double() + norm.eps).rsqrt()
        shift = -norm.running_mean.double()
        if conv.bias is not None:
            shift = shift + conv.bias.double()
        if norm.affine:
            scale = scale * norm.weight.double()
        shift = shift * scale
        if norm.affine:
            shift = shift + norm.bias.double()
        weight = conv.weight.double() * scale.view(-1, 1, 1, 1)
        conv.weight = nn.Parameter(weight.to(conv.weight.dtype), requires_grad=False)
        conv.bias = nn.Parameter(shift.to(conv.weight.dtype), requires_grad=False)
        parent, _, name = norm_name.rpartition(".")
        setattr(folded.get_submodule(parent), name, nn.Identity())
    return folded


def _within(name: str, layer: str) -> bool:
    return name == layer or name.startswith(f"{layer}.")


def _pairs(trunk: nn.Module) -> list[tuple[str, str]]:
    """Return [(name of a convolution, name of the batch norm that alone sees its output)]."""
    modules = dict(trunk.named_modules())
    norms = {
        name for name, module in modules.items() if type(module) is nn.BatchNorm2d and module.running_var is not None
    }
    if not norms:
        return []
    try:
        nodes = fx.Tracer().trace(trunk).nodes
    except Exception:  # noqa: BLE001 - a network's own code may object to being traced in any way
        return _neighbours(modules, norms)
    uses = Counter(str(node.target) for node in nodes if node.op in ("call_module", "get_attr"))
    pairs: list[tuple[str, str]] = []
    for node in nodes:
        norm = str(node.target)
        if node.op == "call_module" and norm in norms and uses[norm] == 1:
            (source,) = node.all_input_nodes
            conv = _convolution(source, modules)
            if conv and uses[conv] + uses[f"{conv}.weight"] == 1 and len(source.users) == 1:
                pairs.append((conv, norm))
    return pairs


def _convolution(node: fx.Node, modules: Mapping[str, nn.Module]) -> str | None:
    """Return the name of the Conv2d that a node of a traced graph runs with its weight as it is, or None.

    A subclass with a forward of its own, such as one that pads as TensorFlow does, is traced into: then the node is the
    function conv2d. B-cos's convolutions normalise the weight first, and so give None.
    """
    name: str | None = None
    if node.op == "call_module":
        name = str(node.target)
        if type(modules[name]).forward is not nn.Conv2d.forward:
            return None
    elif node.op == "call_function" and node.target is F.conv2d:
        weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
        if isinstance(weight, fx.Node) and weight.op == "get_attr" and len(weight.users) == 1:
            path, _, word = str(weight.target).rpartition(".")
            name = path if word == "weight" else None
    return name if name is not None and isinstance(modules.get(name), nn.Conv2d) else None


def _neighbours(modules: Mapping[str, nn.Module], norms: set[str]) -> list[tuple[str, str]]:
    """Return what _pairs does where a network cannot be traced: neighbours in an nn.Sequential."""
    pairs: list[tuple[str, str]] = []
    for name, module in modules.items():
        if type(module).forward is nn.Sequential.forward:
            children = [f"{name}.{child}".lstrip(".") for child, _ in module.named_children()]
            for conv, norm in zip(children, children[1:], strict=False):
                if norm in norms and getattr(type(modules.get(conv)), "forward", None) is nn.Conv2d.forward:
                    pairs.append((conv, norm))
    return pairs
