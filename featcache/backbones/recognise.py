"""Which architecture a name, or a set of tensors, stands for."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from os import PathLike

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from featcache.backbones.architecture import Architecture, Hints
from featcache.backbones.checkpoints.encoder import Tensors
from featcache.backbones.families import ARCHITECTURES
from featcache.backbones.families.timm_models import PREFIX, timm_architecture
from featcache.backbones.families.transformers_models import PREFIX as HF
from featcache.backbones.families.transformers_models import transformers_architecture
from featcache.backbones.families.user_code import user_architecture
from featcache.backbones.undrawn import Undrawn
from featcache.errors import BadInput, nearest

# What a name says beyond the tensors' shapes.
HEADS, EPS = re.compile(r"_heads([1-9]\d*)"), re.compile(r"_eps(\d+(?:\.\d+)?(?:e-\d+)?)")
HOW_TO_NAME = "a name, timm:NAME, hf:FOLDER_OR_NAME, or package.module:function of your own"


def find_architecture(name: str, tensors: Tensors | None = None, hints: Hints | None = None) -> Architecture:
    """Return the Architecture of a name: one of ours, `timm:NAME`, `hf:FOLDER_OR_NAME`, or `package.module:function`.

    tensors: of the checkpoint, from which the network gets its sizes (a ViT its position grid); with them every name
    that recognise returns is known. hints: what tensors do not say. Raises BadInput with the nearest name, or if the
    tensors are another network's.
    """
    family, asked = split_name(name)
    if name.startswith(PREFIX):
        own: Architecture | None = timm_architecture(name)
    elif name.startswith(HF):
        own = transformers_architecture(name)
    elif ":" in name:
        own = user_architecture(name)
    else:
        own = ARCHITECTURES.get(family)
    if own is not None and not asked and (tensors is None or own.infer is None):
        return own
    drawn = tensors is None
    if tensors is None:
        with _without_memory():
            tensors = own.build().state_dict() if own else {}
    hints = (hints or Hints()) | asked
    generic = own is not None and own.generic
    if not generic:
        hints.setdefault("heads", None)
    read = [a for a, _ in _readings([own] if own else ARCHITECTURES.values(), tensors, hints)]
    for architecture in read:
        # A name that says the usual number of heads is another spelling.
        names = {name, HEADS.sub("", name) if asked.get("heads") == architecture.heads else name}
        if architecture.name in names or (generic and family in names):
            return architecture
    if own is None or drawn or (asked and read and read[0].heads is None):
        known = [*ARCHITECTURES, *(a.name for a in read)]
        raise BadInput(f"unknown architecture {name!r}{nearest(name, known)} (--arch takes {HOW_TO_NAME})")
    if read:
        raise BadInput(f"--arch {name}: by the shapes of its tensors the checkpoint is {read[0].name}")
    if generic:
        raise BadInput(f"--arch {family}: the checkpoint's tensors are not those of {generic}")
    # The load lists what does not fit.
    return own


def split_name(name: str) -> tuple[str, Hints]:
    """Split a name that recognise returns into the family's, a key of ARCHITECTURES, and the hints that it adds."""
    if ":" in name:
        return name, {}
    heads, eps = HEADS.search(name), EPS.search(name)
    hints = Hints()
    if heads:
        hints["heads"] = int(heads[1])
    if eps:
        hints["eps"] = float(eps[1])
    return EPS.sub("", HEADS.sub("", name)), hints


def _readings(
    architectures: Iterable[Architecture], tensors: Tensors, hints: Hints
) -> Iterator[tuple[Architecture, Tensors]]:
    """Yield (architecture with the sizes that the tensors tell, tensors under its names) where a signature occurs."""
    for architecture in architectures:
        if any(key in tensors for key in (architecture.signature, *architecture.layouts)):
            named = architecture.named(tensors)
            try:
                read = architecture.infer(named, hints) if architecture.infer else architecture
            except (ValueError, IndexError, KeyError):
                # The family's keys, but some are missing, or have shapes that no network of the family has.
                read = None
            if read is not None:
                yield read, named


def is_network(tensors: Tensors) -> bool:
    """Return whether tensors under bare names are those of a network that recognise knows."""
    return any(True for _ in _readings(ARCHITECTURES.values(), tensors, {}))


def recognise(tensors: Tensors, path: str | PathLike[str], hints: Hints | None = None) -> Architecture:
    """Return the Architecture whose tensors agree best in name and shape; the load then checks all.

    Only networks of families whose signature occurs are built, on the meta device. Where several agree equally well,
    the first is taken and its note names the others. hints: what tensors do not say. The tensors may be in a foreign
    layout, see Architecture.named. Raises BadInput if no family has them.
    """
    candidates = {read.name: (read, named) for read, named in _readings(ARCHITECTURES.values(), tensors, hints or {})}
    if not candidates:
        keys = ", ".join(list(tensors)[:5])
        raise BadInput(
            f"cannot tell the architecture of {path} from its keys ({keys}, ...): no known network has them; "
            f"say it with --arch ({HOW_TO_NAME})"
        )
    agreement = {name: _agreement(read, named) for name, (read, named) in candidates.items()}
    best = max(agreement, key=agreement.__getitem__)
    read, _ = candidates[best]
    alike = [*(name for name in agreement if agreement[name] == agreement[best] and name != best), *read.alike]
    if alike:
        note = f"tensors cannot tell it from {', '.join(alike)}: say so with --arch"
        read = replace(read, note="\n".join(line for line in (read.note, note) if line))
    return read


def taken_for(tensors: Tensors, path: str | PathLike[str]) -> str | None:
    """Return the name of the architecture that tensors are taken for without --arch, or None if it cannot be told."""
    try:
        return recognise(tensors, path).name
    except BadInput:
        return None


def _agreement(architecture: Architecture, tensors: Tensors) -> float:
    """Return the share of all names, the network's and the tensors', that have the same shape in both."""
    registered = architecture is ARCHITECTURES.get(architecture.name)
    shapes = _registered_shapes(architecture.name) if registered else _shapes(architecture)
    agreeing = sum(key in tensors and tensors[key].shape == shape for key, shape in shapes.items())
    return agreeing / len(shapes.keys() | tensors.keys())


@cache
def _registered_shapes(name: str) -> dict[str, torch.Size]:
    return _shapes(ARCHITECTURES[name])


def _shapes(architecture: Architecture) -> dict[str, torch.Size]:
    """Return names and shapes of a network's tensors; none of its parameters takes memory."""
    with _without_memory():
        return {key: value.shape for key, value in architecture.build().state_dict().items()}


@contextmanager
def _without_memory() -> Iterator[None]:
    """Send every parameter of a network that is built here to the meta device, and draw no values for it.

    torch.device("meta") alone would do the same to the small tensors in which RegNet plans its widths.
    """

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        return None if parameter is None else nn.Parameter(parameter.to("meta"), requires_grad=False)

    hook = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]  # it may return a parameter
    try:
        with Undrawn():
            yield
    finally:
        hook.remove()
