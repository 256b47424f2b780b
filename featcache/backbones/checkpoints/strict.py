"""Loading a checkpoint's tensors into a network: every tensor that features need must be there and fit."""

from dataclasses import dataclass
from os import PathLike

import torch
from torch import nn

from featcache.backbones.checkpoints.encoder import Tensors, few
from featcache.errors import BadInput

# Beginnings of names of what is trained beside a backbone, under the same prefix. Any other tensor that the network
# lacks is an error.
BYSTANDERS = (
    "head", "fc.", "classifier", "linear", "proj", "predict", "prototype", "queue", "decoder", "neck", "mask_token",
    "memory", "loss", "criterion", "logit", "probe", "n_averaged", "center", "mlp", "momentum", "metric",
)  # fmt: skip
# The dtypes in which weights, and counters, may be saved.
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int16, torch.int32, torch.int64, torch.uint8, torch.int8, torch.bool)


@dataclass(frozen=True)
class Loaded:
    """What was loaded.

    used: number of tensors taken. parameters: number of their elements. left_out: names of tensors that were not taken.
    absent: names of batch counters that the checkpoint lacks.
    """

    used: int
    parameters: int
    left_out: tuple[str, ...]
    absent: tuple[str, ...]


def load_strictly(
    network: nn.Module, tensors: Tensors, classifier: tuple[str, ...], path: str | PathLike[str], arch: str
) -> Loaded:
    """Load tensors into a network; all that features need must be there and fit.

    classifier: prefixes of the keys that features do not need. These are left out, and so are parts of training that
    lie beside the network's own. Raises BadInput that lists missing, unexpected and misshapen keys.
    """
    wanted = {k: v for k, v in network.state_dict().items() if not k.startswith(classifier)}
    own = {key.split(".")[0] for key in wanted}
    given = {k: v for k, v in tensors.items() if k in wanted}
    rest = [k for k in tensors if k not in wanted]
    unexpected = [
        k for k in rest if not k.startswith(classifier) and (k.split(".")[0] in own or not k.startswith(BYSTANDERS))
    ]
    # Networks saved before PyTorch 0.4.1 have no batch counters; they play no part in eval mode.
    optional = {k for k in wanted if k.endswith("num_batches_tracked")}
    missing = [k for k in wanted if k not in given and k not in optional]
    misshapen = [
        f"{k} {tuple(given[k].shape)}, expected {tuple(v.shape)}"
        for k, v in wanted.items()
        if k in given and given[k].shape != v.shape
    ]
    odd = {k: f"{k} {v.dtype} {v.layout}" for k, v in given.items() if _is_odd(v, wanted[k])}
    not_finite = [k for k, v in given.items() if k not in odd and v.is_floating_point() and not _is_finite(v)]
    problems = [
        f"{name}: {few(keys)}"
        for name, keys in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("wrong shape", misshapen),
            ("not plain numbers of 16 bits or more", list(odd.values())),
            ("not finite", not_finite),
        )
        if keys
    ]
    if problems:
        raise BadInput(f"checkpoint {path} does not fit {arch}; {'; '.join(problems)}")
    network.load_state_dict(given, strict=False)
    return Loaded(
        used=len(given),
        parameters=sum(v.numel() for v in given.values()),
        left_out=tuple(rest),
        absent=tuple(k for k in optional if k not in given),
    )


def _is_odd(tensor: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Return whether a tensor cannot stand for the network's own: quantised files have integers for weights."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        return True
    return tensor.dtype not in FLOATS if wanted.is_floating_point() else tensor.dtype not in INTEGERS


def _is_finite(tensor: torch.Tensor) -> bool:
    return bool(torch.isfinite(torch.stack(tensor.float().aminmax())).all()) if tensor.numel() else True
