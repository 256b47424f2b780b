"""A probe's weights: names, shapes and initial values.

They go by the names `fc{i}.weight` [out, in], `fc{i}.bias`, and for batch norm `bn{i}.weight`, `.bias`,
`.running_mean`, `.running_var` (uncentred: `.weight`, `.running_var`); 1x1 convolutions in all but shape.
An attentive head has those of a torch.nn.MultiheadAttention, `attention.{query,key,value,out}.weight` and
`.bias`, and `attention.token`, its learned query, [in].
"""

import math

import torch

from featcache.errors import BadInput

# What a norm between layers holds, and the values that it begins with.
NORMS = {
    "bn": {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0},
    "bnu": {"weight": 1.0, "running_var": 1.0},
    "none": {},
}


def initial_weights(spec, dim, classes):
    """Draw a probe's weights from its own seed: U(-1/sqrt(in), 1/sqrt(in)), as torch's Linear and Conv2d.

    Returns {name: float32 tensor}. Drawn probe by probe, so that they do not depend on neighbours.
    """
    # Of an imported probe the weights are given, and only their names and shapes are asked for.
    generator = torch.Generator().manual_seed(spec.seed or 0)
    head = spec.head
    weights = _attention(head, dim, generator) if head.type == "attentive" else {}
    widths = [dim, *[head.hidden] * (head.layers - 1), classes]
    for i in range(head.layers):
        bound = 1 / math.sqrt(widths[i])
        outputs = widths[i + 1] * head.max_out
        weights[f"fc{i}.weight"] = torch.empty(outputs, widths[i]).uniform_(-bound, bound, generator=generator)
        # Batch norm takes away what such a bias adds, and Adam would drive it about on rounding noise.
        if head.bias and (head.norm != "bn" or i == head.layers - 1):
            weights[f"fc{i}.bias"] = torch.empty(outputs).uniform_(-bound, bound, generator=generator)
        if i < head.layers - 1:
            weights |= {f"bn{i}.{n}": torch.full((widths[i + 1],), v) for n, v in NORMS[head.norm].items()}
    return weights


def _attention(head, dim, generator):
    """As torch.nn.MultiheadAttention draws them, Xavier over the three products in one; the query from N(0, 0.02^2)."""
    if dim % head.heads:
        raise BadInput(f"head attentive: {head.heads} heads do not divide features of width {dim}")
    bounds = {"query": math.sqrt(6 / (4 * dim)), "out": 1 / math.sqrt(dim)}
    bounds |= {"key": bounds["query"], "value": bounds["query"]}
    weights = {"attention.token": torch.empty(dim).normal_(0, 0.02, generator=generator)}
    for name in ("query", "key", "value", "out"):
        bound = bounds[name]
        weights[f"attention.{name}.weight"] = torch.empty(dim, dim).uniform_(-bound, bound, generator=generator)
        # A bias of the keys moves all scores of a query alike, which the softmax takes away again.
        if name != "key":
            weights[f"attention.{name}.bias"] = torch.zeros(dim)
    return weights


def stacked_weights(specs, dim, classes, device):
    """Return {name: [P, ...]} of the initial weights of probes of one shape."""
    return side_by_side([initial_weights(spec, dim, classes) for spec in specs], device)


def side_by_side(weights, device):
    """Put the weights of probes of one shape, one {name: tensor} each, together: {name: [P, ...]} on a device."""
    return {name: torch.stack([w[name] for w in weights]).to(device) for name in weights[0]}
