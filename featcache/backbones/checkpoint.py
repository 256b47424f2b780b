"""Which tensors of a checkpoint are the backbone: one resolver for all the ways in which people save them.

An encoder is found by a key that only its family of networks has (its signature): whatever stands
before that key is the way to it, and every tensor there belongs to it. So no list of prefixes has to
be kept, and `encoder_q` is never mistaken for `encoder`.
"""

from dataclasses import dataclass

import torch

from featcache.errors import BadInput, nearest

# Of two encoders of a method, the one that its authors evaluate: words, that one, the other.
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
# Said of a way that holds one of these words; the first that fits.
FAMILIES = (
    ("VISSL", "_feature_blocks"),
    ("CLIP's image tower", "visual"),
    ("MoCo's query encoder", "encoder_q"),
    ("MoCo v3's base encoder", "base_encoder"),
    ("DINO or DINOv2's teacher", "teacher"),
)
# Parts of training beside a backbone that share its way; anything else that the network lacks is an error.
BYSTANDERS = (
    "head", "fc.", "classifier", "linear", "proj", "predict", "prototype", "queue", "decoder", "neck", "mask_token",
    "memory", "loss", "criterion", "logit", "probe", "n_averaged", "center", "mlp", "momentum", "metric",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Encoder:
    """The tensors of one encoder in a checkpoint, under bare names.

    way: words before the bare names, joined by dots ("state_dict.module.encoder_q"; empty if none).
    rule: for people, how it was chosen. method: the one whose layout it is, or None. others: names of all
    other tensors of the file, the whole way.
    """

    tensors: dict
    way: str
    rule: str
    method: str | None
    others: tuple[str, ...]


# What weights, and what counters, may be saved as.
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
WHOLE = (torch.int16, torch.int32, torch.int64, torch.uint8, torch.int8, torch.bool)


def find_encoder(content, signatures, known, path, weights_key=None, arch=None):
    """Find the one encoder in the content of a checkpoint.

    content: as read_checkpoint gives it. signatures: names of keys; with more than one, known tells
    whether the tensors around it, under bare names, are a network's. weights_key: words of the way to
    take, such as "teacher" or "state_dict_ema". arch: the architecture's name, if --arch gave it. Raises BadInput if
    there is none, or more than one and no rule to choose.
    """
    try:
        flat = {name: tensor for name, tensor in _tensors(content, ())}
    except RecursionError:
        raise BadInput(f"checkpoint {path} holds dicts within dicts without end; save its state_dict alone") from None
    if not flat:
        held = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise BadInput(f"checkpoint {path} holds no tensors by name (it holds: {held[:200]})")
    ways = _ways(flat, signatures)
    if len(signatures) > 1:
        ways = [way for way in ways if known(_under(flat, way))]
    if not ways:
        keys = list(flat)
        if arch is not None:
            raise BadInput(
                f"checkpoint {path} does not fit {arch}: no key ends in {signatures[0]!r}, as the architecture's do "
                f"(keys: {_few(keys, 4)})"
            )
        raise BadInput(
            f"cannot tell the architecture of {path} from its keys ({_few(keys, 4)}): no "
            "network that featcache knows has them; name it with --arch (also timm:NAME, or package.module:function)"
        )
    choices = ways
    if weights_key is not None:
        choices = [way for way in ways if _holds(way, weights_key)]
        if not choices:
            words = dict.fromkeys(word for way in ways for word in way.split("."))
            raise BadInput(
                f"--weights-key {weights_key}: no encoder of {path} lies under that name"
                f"{nearest(weights_key, words)} (encoders: {_shown(ways)})"
            )
        rule = f"as --weights-key {weights_key} says"
    choices, preferred = _prefer(choices)
    # Some save one encoder under two names (OpenMixup's `backbone` is its `encoder_q.0`).
    choices = [way for n, way in enumerate(choices) if not any(_same(flat, way, other) for other in choices[:n])]
    if len(choices) > 1:
        keys = ", ".join(f"--weights-key {_key_of(way, choices)}" for way in choices)
        raise BadInput(f"checkpoint {path} holds {len(choices)} encoders ({_shown(choices)}): choose one with {keys}")
    (way,) = choices
    family = next((words for words, part in FAMILIES if part in way.split(".")), None)
    if weights_key is None:
        rule = preferred or family or ("bare names" if not way else "the only encoder there")
    prefix = f"{way}." if way else ""
    return Encoder(
        tensors=_under(flat, way),
        way=way,
        rule=rule,
        method=preferred or family,
        others=tuple(name for name in flat if not name.startswith(prefix)),
    )


def _tensors(item, parts):
    """Yield (dotted name, tensor) of all tensors in nested dicts with names for keys, but of optimisers."""
    if isinstance(item, torch.Tensor):
        yield ".".join(parts), item
    elif isinstance(item, dict) and not (parts and "optim" in parts[-1].lower()):
        for key, value in item.items():
            if isinstance(key, str):
                yield from _tensors(value, (*parts, key))


def _ways(flat, signatures):
    """Return the way to every place where a signature stands, but for places within another (a block of a stage)."""
    ways = dict.fromkeys(
        name[: -len(signature)].removesuffix(".")
        for signature in signatures
        for name in flat
        if name == signature or name.endswith(f".{signature}")
    )
    return [
        way
        for way in ways
        if not any(other != way and f"{way}.".startswith(f"{other}." if other else "") for other in ways)
    ]


def _holds(way, key):
    """Whether the words of `key` stand in a way, one after another."""
    return f".{key.strip('.')}." in f".{way}."


def _prefer(ways):
    """Drop the moving averages that PAIRS names; return what is left, and the words of the rule."""
    for words, main, other in PAIRS:
        mains = [way for way in ways if _holds(way, main) and not _holds(way, other)]
        others = [way for way in ways if _holds(way, other)]
        if mains and others:
            return [way for way in ways if way not in others], words
    return ways, None


def _under(flat, way):
    """The tensors of a way, by bare names."""
    prefix = f"{way}." if way else ""
    return {name.removeprefix(prefix): tensor for name, tensor in flat.items() if name.startswith(prefix)}


def _same(flat, way, other):
    """Whether two ways hold the same names with the same values."""
    a, b = _under(flat, way), _under(flat, other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _shown(ways):
    return ", ".join(f"{way}.*" if way else "*" for way in ways)


def _key_of(way, ways):
    """The shortest key that picks this way alone."""
    parts = way.split(".")
    for length in range(1, len(parts) + 1):
        for start in range(len(parts) - length + 1):
            key = ".".join(parts[start : start + length])
            if [w for w in ways if _holds(w, key)] == [way]:
                return key
    return way


@dataclass(frozen=True)
class Loaded:
    """What a load did. used: tensors taken; parameters: their elements. left_out: names. absent: batch counters."""

    used: int
    parameters: int
    left_out: tuple[str, ...]
    absent: tuple[str, ...]


def load_strictly(network, tensors, classifier, path, arch):
    """Load tensors into a network; all that features need must be there and fit.

    classifier: prefixes of the keys that features do not need. Left out are these, and parts of
    training that lie beside the network's own. Returns what was Loaded. Raises BadInput that lists
    missing, unexpected and misshapen keys.
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
    endless = [k for k, v in given.items() if k not in odd and v.is_floating_point() and not _is_finite(v)]
    problems = [
        f"{name}: {_few(keys)}"
        for name, keys in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("wrong shape", misshapen),
            ("not plain numbers of 16 bits or more", odd.values()),
            ("not finite", endless),
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


def _is_odd(tensor, wanted):
    """Whether a tensor is of another kind than the network's own: whole numbers stand for weights in quantised files."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        return True
    return tensor.dtype not in FLOATS if wanted.is_floating_point() else tensor.dtype not in WHOLE


def _is_finite(tensor):
    return bool(torch.isfinite(torch.stack(tensor.float().aminmax())).all()) if tensor.numel() else True


def _few(keys, most=8):
    keys = [str(key) for key in keys]
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")


def grouped(names, way):
    """Names of a checkpoint for people: by the first word in which they leave the encoder's way.

    Up to three are listed, more become "module.encoder_k.* (161)".
    """
    parts, groups = way.split(".") if way else [], {}
    for name in names:
        words = name.split(".")
        shared = next((n for n, (a, b) in enumerate(zip(words, parts, strict=False)) if a != b), len(parts))
        groups.setdefault(".".join(words[: shared + 1]), []).append(name)
    shown = [
        ", ".join(sorted(found)) if len(found) <= 3 else f"{key}.* ({len(found)})" for key, found in groups.items()
    ]
    return ", ".join(shown) or "none"
