"""Building networks without drawing the values of their parameters, which a checkpoint replaces at once."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

# What fills a tensor in place: normal_, kaiming_uniform_, zero_, ...
NAMES = {*dir(torch.Tensor), *dir(nn.init)} - {"requires_grad_"}
FILLING = {name for name in NAMES if name.endswith("_") and not name.endswith("__")}


class Undrawn(TorchFunctionMode):
    """Within the block, parameters keep whatever was in their memory; buffers and other tensors are filled as ever.

    Drawing takes seconds for a large network. On the meta device nothing is drawn, but torch's compiler would be
    imported to find that out.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call func, unless it would fill a parameter."""
        kwargs = kwargs or {}
        if func.__name__ in FILLING:
            # torch.nn.init passes its tensor by name.
            tensor = args[0] if args else kwargs.get("tensor")
            if isinstance(tensor, nn.Parameter) or (isinstance(tensor, torch.Tensor) and tensor.is_meta):
                return tensor
        return func(*args, **kwargs)
