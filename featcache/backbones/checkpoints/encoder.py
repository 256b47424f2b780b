"""Which tensors of a checkpoint are the backbone: one rule for all the ways in which people save them.

An encoder is found by a key that only its family of networks has (its signature). Whatever stands before that key is
the encoder's prefix, and every tensor under the prefix belongs to it. So no list of prefixes has to be kept, and
`encoder_q` is never mistaken for `encoder`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch

from featcache.errors import BadInput, nearest

# Where a method trains two encoders, its authors evaluate one: what that one is called in reports, a word of its
# prefix, a word of the other's prefix.
PAIRS = (
    ("MoCo's query encoder", "encoder_q", "encoder_k"),
    ("MoCo's query encoder", "backbone", "encoder_k"),
    ("MoCo v3's base encoder", "base_encoder", "momentum_encoder"),
    ("MoCo v3's base encoder", "backbone", "momentum_encoder"),
    ("BYOL's online network", "backbone", "target_net"),
    ("BYOL's online network", "online_net", "target_net"),
    ("BYOL's online network", "online_network", "target_network"),
    ("BYOL's online network", "online_encoder", "target_encoder"),
    ("the encoder that is trained, not its moving average", "backbone", "momentum_backbone"),
    ("the encoder that is trained, not its moving average", "backbone", "backbone_momentum"),
    ("the encoder that is trained, not its moving average", "encoder", "momentum_encoder"),
    ("the teacher, which DINO's authors evaluate", "teacher", "student"),
)
# What a prefix that holds one of these words is called in reports; the first that fits.
METHODS = (
    ("VISSL", "_feature_blocks"),
    ("CLIP's image tower", "visual"),
    ("MoCo's query encoder", "encoder_q"),
    ("MoCo v3's base encoder", "base_encoder"),
    ("DINO or DINOv2's teacher", "teacher"),
)

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Encoder:
    """The tensors of one encoder in a checkpoint, under bare names.

    prefix: what stands before the bare names, without its last dot ("state_dict.module.encoder_q"; empty if nothing
    does). rule: how the encoder was chosen, for reports. method: the method whose layout this is, or None. others:
    full names of all other tensors of the file.
    """

    tensors: Tensors
    prefix: str
    rule: str
    method: str | None
    others: tuple[str, ...]


def find_encoder(
    content: Any,
    signatures: Sequence[str],
    is_network: Callable[[Tensors], bool],
    path: str | PathLike[str],
    weights_key: str | None = None,
    arch: str | None = None,
) -> Encoder:
    """Find the one encoder in the content of a checkpoint.

    content: as read_checkpoint returns it. signatures: keys to look for; if there is more than one, is_network decides
    whether the tensors around a key, under bare names, are those of a network. weights_key: words of the prefix to
    take, such as "teacher" or "state_dict_ema". arch: the architecture's name, if --arch gave it. Raises BadInput if
    there is no encoder, or more than one and no rule to choose.
    """
    flat = _flat(content, path)
    prefixes = _prefixes(flat, signatures)
    if len(signatures) > 1:
        prefixes = [prefix for prefix in prefixes if is_network(_under(flat, prefix))]
    if not prefixes:
        raise _no_encoder(path, list(flat), signatures, arch)
    choices = prefixes if weights_key is None else _with_key(prefixes, weights_key, path)
    choices, preferred = _prefer(choices)
    # Some save one encoder under two names (OpenMixup's `backbone` is its `encoder_q.0`).
    choices = [prefix for n, prefix in enumerate(choices) if not any(_same(flat, prefix, p) for p in choices[:n])]
    if len(choices) > 1:
        keys = ", ".join(f"--weights-key {_shortest_key(prefix, choices)}" for prefix in choices)
        raise BadInput(f"checkpoint {path} holds {len(choices)} encoders ({_listed(choices)}): choose one with {keys}")
    (prefix,) = choices
    method = preferred or next((name for name, word in METHODS if word in prefix.split(".")), None)
    if weights_key is not None:
        rule = f"as --weights-key {weights_key} says"
    else:
        rule = method or ("bare names" if not prefix else "the only encoder there")
    return Encoder(
        tensors=_under(flat, prefix),
        prefix=prefix,
        rule=rule,
        method=method,
        others=tuple(name for name in flat if not name.startswith(dotted(prefix))),
    )


def dotted(prefix: str) -> str:
    """Return what the names under a prefix begin with."""
    return f"{prefix}." if prefix else ""


def _flat(content: Any, path: str | PathLike[str]) -> Tensors:
    try:
        flat = dict(_tensors(content, ()))
    except RecursionError:
        raise BadInput(f"checkpoint {path} holds dicts within dicts without end; save its state_dict alone") from None
    if not flat:
        held = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise BadInput(f"checkpoint {path} holds no tensors by name (it holds: {held[:200]})")
    return flat


def _tensors(item: Any, parts: tuple[str, ...]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (dotted name, tensor) of all tensors in nested dicts with names for keys, except those of optimisers."""
    if isinstance(item, torch.Tensor):
        yield ".".join(parts), item
    elif isinstance(item, dict) and not (parts and "optim" in parts[-1].lower()):
        for key, value in item.items():
            if isinstance(key, str):
                yield from _tensors(value, (*parts, key))


def _no_encoder(path: str | PathLike[str], keys: list[str], signatures: Sequence[str], arch: str | None) -> BadInput:
    if arch is not None:
        return BadInput(
            f"checkpoint {path} does not fit {arch}: no key ends in {signatures[0]!r}, as the architecture's do "
            f"(keys: {few(keys, 4)})"
        )
    return BadInput(
        f"cannot tell the architecture of {path} from its keys ({few(keys, 4)}): no "
        "network that featcache knows has them; name it with --arch (also timm:NAME, or package.module:function)"
    )


def _prefixes(flat: Tensors, signatures: Sequence[str]) -> list[str]:
    """Return the prefixes of all signatures, except those within another one (a block of a stage)."""
    prefixes = dict.fromkeys(
        name[: -len(signature)].removesuffix(".")
        for signature in signatures
        for name in flat
        if name == signature or name.endswith(f".{signature}")
    )
    return [
        prefix
        for prefix in prefixes
        if not any(other != prefix and f"{prefix}.".startswith(dotted(other)) for other in prefixes)
    ]


def _with_key(prefixes: list[str], weights_key: str, path: str | PathLike[str]) -> list[str]:
    choices = [prefix for prefix in prefixes if _holds(prefix, weights_key)]
    if not choices:
        words = dict.fromkeys(word for prefix in prefixes for word in prefix.split("."))
        raise BadInput(
            f"--weights-key {weights_key}: no encoder of {path} lies under that name"
            f"{nearest(weights_key, words)} (encoders: {_listed(prefixes)})"
        )
    return choices


def _holds(prefix: str, key: str) -> bool:
    """Return whether the words of `key` stand in a prefix, one after another."""
    return f".{key.strip('.')}." in f".{prefix}."


def _prefer(prefixes: list[str]) -> tuple[list[str], str | None]:
    """Drop the other encoder of each of PAIRS. Return the prefixes that are left, and what the rule says of them."""
    for name, main, other in PAIRS:
        mains = [prefix for prefix in prefixes if _holds(prefix, main) and not _holds(prefix, other)]
        others = [prefix for prefix in prefixes if _holds(prefix, other)]
        if mains and others:
            return [prefix for prefix in prefixes if prefix not in others], name
    return prefixes, None


def _under(flat: Tensors, prefix: str) -> Tensors:
    """Return the tensors under a prefix, by bare names."""
    start = dotted(prefix)
    return {name.removeprefix(start): tensor for name, tensor in flat.items() if name.startswith(start)}


def _same(flat: Tensors, prefix: str, other: str) -> bool:
    """Return whether two prefixes hold the same names with the same values."""
    a, b = _under(flat, prefix), _under(flat, other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _listed(prefixes: list[str]) -> str:
    return ", ".join(f"{dotted(prefix)}*" for prefix in prefixes)


def _shortest_key(prefix: str, prefixes: list[str]) -> str:
    """Return the shortest --weights-key that picks this prefix alone."""
    parts = prefix.split(".")
    for length in range(1, len(parts) + 1):
        for start in range(len(parts) - length + 1):
            key = ".".join(parts[start : start + length])
            if [p for p in prefixes if _holds(p, key)] == [prefix]:
                return key
    return prefix


def few(keys: Iterable[object], most: int = 8) -> str:
    """List the first keys, and say how many more there are."""
    names = [str(key) for key in keys]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def grouped(names: Iterable[str], prefix: str) -> str:
    """List names of a checkpoint for people, grouped by the first word in which they leave the encoder's prefix.

    Groups of up to three names are listed whole, larger ones as "module.encoder_k.* (161)".
    """
    parts = prefix.split(".") if prefix else []
    groups: dict[str, list[str]] = {}
    for name in names:
        words = name.split(".")
        shared = next((n for n, (a, b) in enumerate(zip(words, parts, strict=False)) if a != b), len(parts))
        groups.setdefault(".".join(words[: shared + 1]), []).append(name)
    shown = [
        ", ".join(sorted(group)) if len(group) <= 3 else f"{key}.* ({len(group)})" for key, group in groups.items()
    ]
    return ", ".join(shown) or "none"
