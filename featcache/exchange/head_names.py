"""How-to-Probe's heads: the names that its mmpretrain modules give their tensors, to featcache's and back.

`fc` of a single linear layer (`fc0` in the multi-label heads), `fc{i}` and `bn{i}` of deeper ones, and
`.linear` between for B-cos layers; 1x1 convolutions all.
"""

import re
from collections import defaultdict

import torch

from featcache.errors import BadInput
from featcache.probes.heads.bcos import Bcos
from featcache.probes.heads.head import UNIFORM_OFFSET
from featcache.probes.heads.linear import Linear
from featcache.probes.heads.mlp import Mlp

NAME = re.compile(r"(fc|bn)(\d*)\.(linear\.)?(weight|bias|running_mean|running_var|num_batches_tracked)")
B = 2.0


def to_published(head, weights, multi_label):
    """Rename and reshape the weights of a probe as the state dict of the head that How-to-Probe would train."""
    state = {}
    for name, value in weights.items():
        layer, _, kind = name.rpartition(".")
        # How-to-Probe has no attention: it keeps its names.
        if layer.startswith(("bn", "attention")):
            state[name] = value
            if getattr(head, "norm", None) == "bnu" and kind == "running_var":
                # It is a buffer of every batch norm, and here one that nothing reads.
                state[f"{layer}.running_mean"] = torch.zeros_like(value)
            continue
        if head.type == "linear" and not multi_label:
            layer = "fc"
        linear = ".linear" if head.type == "bcos" else ""
        if kind == "weight" and head.bias and f"{name.removesuffix('weight')}bias" not in weights:
            # Theirs is there even where batch norm takes it away again.
            state[f"{layer}.bias"] = torch.zeros(len(value))
        state[f"{layer}{linear}.{kind}"] = value[:, :, None, None] if kind == "weight" else value
    return state


def from_published(state, classes, path):
    """Turn a head's state dict into (Head, weights), its offset still 0.

    A bias that batch norm follows is folded into the running mean. Raises BadInput, naming `path`, for
    tensors that are of no head of How-to-Probe, or not for so many classes.
    """
    layers, norms = _sorted(state, path)
    last = len(layers) - 1
    bcos = _alike([("linear" in layer) for layer in layers], "B-cos and plain layers", path)
    matrices = [_matrix(layer["weight"], f"{path}: head.fc{i}") for i, layer in enumerate(layers)]
    biased = _alike(["bias" in layer for layer in layers], "layers with and without bias", path)
    if bcos and biased:
        raise BadInput(f"checkpoint {path}: a B-cos head has no bias, and this one does")
    norm = _norm(norms, last, bcos, path)
    outputs, inputs = zip(*(m.shape for m in matrices), strict=True)
    max_out = outputs[0] // inputs[1] if bcos and last else 1
    if any(o != max_out * i for o, i in zip(outputs, [*inputs[1:], classes], strict=True)):
        raise BadInput(
            f"checkpoint {path}: its head has {outputs[-1]} outputs, layer by layer "
            f"{', '.join(f'{i} to {o}' for i, o in zip(inputs, outputs, strict=True))}; the store has {classes} classes"
        )
    hidden = _alike(inputs[1:], "hidden layers of several widths", path) if last else 0
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
    if bcos:
        return Bcos(layers=len(layers), hidden=hidden, norm=norm, b=B, max_out=max_out), weights
    if last:
        return Mlp(layers=len(layers), hidden=hidden, norm=norm, bias=biased), weights
    return Linear(bias=biased), weights


def published_offset(head, state, loss, multi_label):
    """The logit offset of How-to-Probe's head of this form, which no tensor holds.

    -ln(C-1) for the B-cos heads of single-label data and for its MLPs without bias trained with BCE; 0
    for all others, among them the head of supervised pretraining (`fc.linear.weight`).
    """
    if multi_label or "fc.linear.weight" in state or head.type == "linear":
        return 0.0
    return UNIFORM_OFFSET if head.type == "bcos" or (not head.bias and loss == "bce") else 0.0


def _sorted(state, path):
    """Sort a state dict into layers and norms: lists by number of {kind: tensor}, `linear` marking B-cos layers."""
    parts = {"fc": defaultdict(dict), "bn": defaultdict(dict)}
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


def _alike(values, what, path):
    if len(set(values)) > 1:
        raise BadInput(f"checkpoint {path}: its head mixes {what}, which none of How-to-Probe's does")
    return values[0]


def _matrix(weight, where):
    if weight.ndim == 4 and weight.shape[2:] == (1, 1):
        weight = weight[:, :, 0, 0]
    if weight.ndim != 2:
        raise BadInput(f"checkpoint {where}.weight has shape {tuple(weight.shape)}, and is no 1x1 convolution")
    return weight


def _norm(norms, last, bcos, path):
    """Tell batch norm from the uncentred one: that has no bias, and its running mean never moves."""
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
