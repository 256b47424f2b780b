"""Which architecture a name, or a set of tensors, stands for."""

import re
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from featcache.backbones.families import ARCHITECTURES
from featcache.backbones.families.timm_models import PREFIX, timm_architecture
from featcache.backbones.families.user_code import user_architecture
from featcache.backbones.undrawn import Undrawn
from featcache.errors import BadInput, nearest

# The name under which the size of a ViT is read off its tensors.
GENERIC = "vit"
# What a name says besides the tensors' shapes.
HEADS, EPS = re.compile(r"_heads([1-9]\d*)"), re.compile(r"_eps(\d+(?:\.\d+)?(?:e-\d+)?)")
HOW_TO_NAME = "a name, timm:NAME, or package.module:function of your own"


def find_architecture(name, tensors=None, hints=None):
    """Return the Architecture of a name: one of ours, `timm:NAME`, or `package.module:function`.

    tensors: of the checkpoint, so that the network gets its sizes (a ViT its position grid); with them
    every name that recognise gives is known. hints: what tensors do not say, see recognise. Raises
    BadInput with the nearest name, or if the tensors are another network's.
    """
    family, said = split_name(name)
    if name.startswith(PREFIX):
        found = timm_architecture(name)
    elif ":" in name:
        found = user_architecture(name)
    else:
        found = ARCHITECTURES.get(family)
    if found is not None and not said and (tensors is None or found.infer is None):
        return found
    drawn = tensors is None
    if drawn:
        with _without_memory():
            tensors = found.build().state_dict() if found else {}
    hints = (hints or {}) | said
    if family != GENERIC:
        hints.setdefault("heads", None)
    read = [a for a, _ in _readings([found] if found else ARCHITECTURES.values(), tensors, hints)]
    for architecture in read:
        # A name that says the usual number of heads is another spelling.
        names = {name, HEADS.sub("", name) if said.get("heads") == architecture.heads else name}
        if names & {architecture.name, GENERIC}:
            return architecture
    if found is None or drawn or (said and read and read[0].heads is None):
        names = [*ARCHITECTURES, *(a.name for a in read)]
        raise BadInput(f"unknown architecture {name!r}{nearest(name, names)} (--arch takes {HOW_TO_NAME})")
    if read:
        raise BadInput(f"--arch {name}: by the shapes of its tensors the checkpoint is {read[0].name}")
    if family != GENERIC:
        # The load lists what does not fit.
        return found
    raise BadInput("--arch vit: the checkpoint's tensors are not those of a ViT in the layout of timm or DINOv2")


def split_name(name):
    """Split a name that recognise gives into the family's, a key of ARCHITECTURES, and what it says besides.

    Returns (str, {"heads": int, "eps": float} as far as they are there).
    """
    if ":" in name:
        return name, {}
    heads, eps = HEADS.search(name), EPS.search(name)
    said = ({"heads": int(heads[1])} if heads else {}) | ({"eps": float(eps[1])} if eps else {})
    return EPS.sub("", HEADS.sub("", name)), said


def _readings(architectures, tensors, hints):
    """Yield (architecture as the tensors tell its sizes, tensors under its names) of all whose signature is there."""
    for architecture in architectures:
        if any(key in tensors for key in (architecture.signature, *architecture.layouts)):
            named = architecture.named(tensors)
            try:
                read = architecture.infer(named, hints) if architecture.infer else architecture
            except (ValueError, IndexError, KeyError):
                # Keys of the family with shapes, or lacking others, as no network of it has.
                read = None
            if read is not None:
                yield read, named


def known(tensors):
    """Whether tensors under bare names are those of a network that recognise knows."""
    return any(True for _ in _readings(ARCHITECTURES.values(), tensors, {}))


def recognise(tensors, path, hints=None):
    """Return the Architecture whose tensors agree best in name and shape; the load then checks all.

    Only networks of families whose signature is there are built, on the meta device. Where several
    agree alike, the first is taken and its note names the others. hints: what the caller knows and
    tensors do not say: `heads` and `twelve_heads` (see vit.infer), `eps` of norms, `positions` (see positions.RULES). The tensors may be in
    a foreign layout; see Architecture.named. Raises BadInput if no family has them.
    """
    candidates = {read.name: (read, named) for read, named in _readings(ARCHITECTURES.values(), tensors, hints or {})}
    if not candidates:
        keys = ", ".join(list(tensors)[:5])
        raise BadInput(
            f"cannot tell the architecture of {path} from its keys ({keys}, ...): no known network has them; "
            f"say it with --arch ({HOW_TO_NAME})"
        )
    agreement = {name: _agreement(read, named) for name, (read, named) in candidates.items()}
    best = max(agreement, key=agreement.get)
    read, _ = candidates[best]
    alike = [*(name for name in agreement if agreement[name] == agreement[best] and name != best), *read.alike]
    if alike:
        note = f"tensors cannot tell it from {', '.join(alike)}: say so with --arch"
        read = replace(read, note="\n".join(line for line in (read.note, note) if line))
    return read


def _agreement(architecture, tensors):
    """Share of all names, the network's and the tensors', that have the same shape in both."""
    known = architecture is ARCHITECTURES.get(architecture.name)
    shapes = _known_shapes(architecture.name) if known else _shapes(architecture)
    agreeing = sum(key in tensors and tensors[key].shape == shape for key, shape in shapes.items())
    return agreeing / len(shapes.keys() | tensors.keys())


@cache
def _known_shapes(name):
    return _shapes(ARCHITECTURES[name])


def _shapes(architecture):
    """Names and shapes of a network's tensors; none of its parameters takes memory."""
    with _without_memory():
        return {key: value.shape for key, value in architecture.build().state_dict().items()}


@contextmanager
def _without_memory():
    """Send every parameter of a network that is built here to the meta device, and draw no values for it.

    torch.device("meta") alone would do the same to the small tensors in which RegNet plans its widths.
    """

    def to_meta(module, name, parameter):
        return None if parameter is None else nn.Parameter(parameter.to("meta"), requires_grad=False)

    hook = register_module_parameter_registration_hook(to_meta)
    try:
        with Undrawn():
            yield
    finally:
        hook.remove()
