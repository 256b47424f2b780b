"""Which architecture a name, or a set of tensors, stands for."""

import torch

from featcache.backbones import ARCHITECTURES
from featcache.errors import BadInput, nearest


def find_architecture(name):
    """Return the Architecture of that name. Raises BadInput with the nearest one."""
    if name not in ARCHITECTURES:
        raise BadInput(
            f"unknown architecture {name!r}{nearest(name, ARCHITECTURES)} (known: {', '.join(ARCHITECTURES)})"
        )
    return ARCHITECTURES[name]


def recognise(tensors, path):
    """Return the architecture whose tensors agree best in name and shape; the load then checks all."""
    family = [a for a in ARCHITECTURES.values() if a.signature in tensors]
    if not family:
        keys = ", ".join(list(tensors)[:5])
        raise BadInput(
            f"cannot tell the architecture of {path} from its keys ({keys}, ...): no known network has them; "
            f"say it with --arch (known: {', '.join(ARCHITECTURES)})"
        )

    def agreement(architecture):
        with torch.device("meta"):
            shapes = {k: v.shape for k, v in architecture.build().state_dict().items()}
        agreeing = sum(k in tensors and tensors[k].shape == shape for k, shape in shapes.items())
        return agreeing / len(shapes.keys() | tensors.keys())

    return max(family, key=agreement)
