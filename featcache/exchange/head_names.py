"""How-to-Probe's heads: from the names that its mmpretrain modules give their tensors to featcache's, and back.

A single linear layer is `fc` (`fc0` in the multi-label heads), the layers of deeper heads are `fc{i}` and `bn{i}`, and
B-cos layers have a `.linear` in between. All are 1x1 convolutions.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, TypeVar

import torch

from featcache.errors import BadInput
from featcache.probes.heads.bcos import Bcos
from featcache.probes.heads.bn_linear import BnLinear
from featcache.probes.heads.head import UNIFORM_OFFSET, Head
from featcache.probes.heads.layered import LayeredHead, Layout
from featcache.probes.heads.linear import Linear
from featcache.probes.heads.mlp import Mlp

NAME = re.compile(r"(fc|bn)(\d*)\.(linear\.)?(weight|bias|running_mean|running_var|num_batches_tracked)")
B = 2.0
# The heads that How-to-Probe has.
PublishedHead = Linear | Mlp | Bcos
State = Mapping[str, torch.Tensor]
T = TypeVar("T")


def published_layer(head: Head, layer: str, multi_label: bool) -> str:
    """Return How-to-Probe's name of a layer of a head, where featcache's is `layer`, such as fc0."""
    if isinstance(head, Linear) and not multi_label:
        return "fc"
    return f"{layer}.linear" if isinstance(head, Bcos) else layer


def published_offset(head: PublishedHead, state: State, loss: str, multi_label: bool) -> float | str:
    """Return the logit offset of How-to-Probe's head of this form, which no tensor holds.

    It is -ln(C-1) for the B-cos heads of single-label data and for its MLPs without bias trained with BCE, and 0 for
    all others, among them the head of supervised pretraining (`fc.linear.weight`).
    """
    if multi_label or "fc.linear.weight" in state or isinstance(head, Linear):
        return 0.0
    return UNIFORM_OFFSET if isinstance(head, Bcos) or (not head.bias and loss == "bce") else 0.0


def _published_head(layers: int, hidden: int, norm: Any, bias: bool, bcos: bool, max_out: int) -> PublishedHead:
    """Return the head that How-to-Probe's layers are, its offset still 0."""
    if bcos:
        return Bcos(layers=layers, hidden=hidden, norm=norm, b=B, max_out=max_out)
    return Mlp(layers=layers, hidden=hidden, norm=norm, bias=bias) if layers > 1 else Linear(bias=bias)


def to_published(head: Head, weights: State, multi_label: bool) -> dict[str, torch.Tensor]:
    """Rename and reshape the weights of a probe as the state dict of the head that How-to-Probe would train.

    What it does not have, such as attention, keeps its names; a batch norm before a linear layer becomes part of the
    layer. Raises BadInput for a linear head that normalises its features, which no tensor would say.
    """
    if isinstance(head, Linear) and head.norm == "l2":
        raise BadInput("the head normalises its features (norm: l2), which a state dict cannot say: export to FILE.pt2")
    if isinstance(head, BnLinear):
        weight, bias = head.folded(dict(weights))
        head, weights = Linear(), {"fc0.weight": weight, "fc0.bias": bias}
    layout = head.layout if isinstance(head, LayeredHead) else Layout(bias=False)
    state = {}
    for name, value in weights.items():
        layer, _, kind = name.rpartition(".")
        if not re.fullmatch(r"fc\d+", layer):
            state[name] = value
            if layout.norm == "bnu" and kind == "running_var":
                # Every batch norm of theirs has this buffer; this one is never read.
                state[f"{layer}.running_mean"] = torch.zeros_like(value)
            continue
        published = published_layer(head, layer, multi_label)
        if kind == "weight" and layout.bias and f"{layer}.bias" not in weights:
            # Theirs has a bias even where batch norm takes it away again.
            state[f"{published}.bias"] = torch.zeros(len(value))
        state[f"{published}.{kind}"] = value[:, :, None, None] if kind == "weight" else value
    return state


def from_published(state: State, classes: int, path: str | PathLike) -> tuple[PublishedHead, dict[str, torch.Tensor]]:
    """Turn a head's state dict into (Head, weights), its offset still 0.

    A bias that batch norm follows is folded into the running mean. Raises BadInput, naming `path`, if the
    tensors are those of no head of How-to-Probe, or of a head for another number of classes.
    """
    layers, norms = _sorted(state, path)
    last = len(layers) - 1
    bcos = _alike([("linear" in layer) for layer in layers], "B-cos and plain layers", path)
    matrices = [_matrix(layer["weight"], f"{path}: head.fc{i}") for i, layer in enumerate(layers)]
    biased = _alike(["bias" in layer for layer in layers], "layers with and without bias", path)
    if bcos and biased:
        raise BadInput(f"checkpoint {path}: a B-cos head has no bias, and this one does")
    norm = _norm(norms, last, bcos, path)
    hidden, max_out = _widths(matrices, bcos, classes, path)
    weights = {}
    for i, layer in enumerate(layers):
        weights[f"fc{i}.weight"] = matrices[i]
        held = norms.get(i, {})
        if biased and norm == "bn" and i < last:
            held = held | {"running_mean": held["running_mean"] - layer["bias"]}
        elif biased:
            weights[f"fc{i}.bias"] = layer["bias"]
        for kind in ("weight", "bias", "running_mean", "running_var"):
            if kind in held and (norm == "bn" or kind in ("weight", "running_var")):
                weights[f"bn{i}.{kind}"] = held[kind]
    weights = {name: value.float().clone() for name, value in weights.items()}
    if not all(bool(torch.isfinite(value).all()) for value in weights.values()):
        raise BadInput(f"checkpoint {path}: its head holds numbers that are not finite; its training diverged")
    return _published_head(len(layers), hidden, norm, biased, bcos, max_out), weights


def _widths(matrices: Sequence[torch.Tensor], bcos: bool, classes: int, path: str | PathLike) -> tuple[int, int]:
    """Return (width of the hidden layers, 0 if there are none, and max_out) of layers with these weights."""
    outputs, inputs = zip(*(m.shape for m in matrices), strict=True)
    max_out = outputs[0] // inputs[1] if bcos and len(matrices) > 1 else 1
    if any(o != max_out * i for o, i in zip(outputs, [*inputs[1:], classes], strict=True)):
        raise BadInput(
            f"checkpoint {path}: its head has {outputs[-1]} outputs, layer by layer "
            f"{', '.join(f'{i} to {o}' for i, o in zip(inputs, outputs, strict=True))}; the store has {classes} classes"
        )
    return (_alike(inputs[1:], "hidden layers of several widths", path) if len(matrices) > 1 else 0), max_out


def _sorted(state: State, path: str | PathLike) -> tuple[list[dict[str, Any]], dict[int, dict[str, Any]]]:
    """Sort a state dict into layers and norms by their numbers: {kind: tensor}, with a key `linear` in B-cos layers."""
    parts: dict[str, dict[int, dict[str, Any]]] = {"fc": defaultdict(dict), "bn": defaultdict(dict)}
    unknown = []
    for name, value in state.items():
        match = NAME.fullmatch(name)
        if not match or (match[3] and match[1] == "bn"):
            unknown.append(f"head.{name}")
            continue
        place = parts[match[1]][int(match[2] or 0)]
        place[match[4]] = value
        if match[3]:
            place["linear"] = True
    if unknown:
        raise BadInput(
            f"checkpoint {path}: its head is none of How-to-Probe's, which have no {', '.join(unknown[:5])}"
            f"{f' and {len(unknown) - 5} more' if len(unknown) > 5 else ''}"
        )
    layers = parts["fc"]
    if sorted(layers) != list(range(len(layers))) or not layers or any("weight" not in v for v in layers.values()):
        raise BadInput(f"checkpoint {path}: layers of its head are missing (there are {', '.join(state) or 'none'})")
    return [layers[i] for i in range(len(layers))], dict(parts["bn"])


def _alike(values: Sequence[T], what: str, path: str | PathLike) -> T:
    """Return the one value of all layers. Raises BadInput if there are several."""
    if len(set(values)) > 1:
        raise BadInput(f"checkpoint {path}: its head mixes {what}, which none of How-to-Probe's does")
    return values[0]


def _matrix(weight: torch.Tensor, where: str) -> torch.Tensor:
    """Return the weight of a 1x1 convolution as [out, in]."""
    if weight.ndim == 4 and weight.shape[2:] == (1, 1):
        weight = weight[:, :, 0, 0]
    if weight.ndim != 2:
        raise BadInput(f"checkpoint {where}.weight has shape {tuple(weight.shape)}, and is no 1x1 convolution")
    return weight


def _norm(norms: Mapping[int, State], last: int, bcos: bool, path: str | PathLike) -> str:
    """Tell batch norm from the uncentred one, which has no bias, and a running mean that never moves."""
    if not norms:
        return "none"
    needed = {"weight", "running_mean", "running_var"}
    if sorted(norms) != list(range(last)) or any(needed - norm.keys() for norm in norms.values()):
        raise BadInput(f"checkpoint {path}: its head does not have one whole batch norm between any two layers")
    centred = _alike(["bias" in norm for norm in norms.values()], "batch norms with and without bias", path)
    if centred and bcos:
        raise BadInput(f"checkpoint {path}: its B-cos head has batch norms with bias, which How-to-Probe's have not")
    for i, norm in norms.items():
        if bool(norm["running_mean"].any()) > centred:
            raise BadInput(
                f"checkpoint {path}: head.bn{i} has no bias but a running mean; it is neither BatchNorm2d nor "
                "BatchNormUncentered2d"
            )
    return "bn" if centred else "bnu"
