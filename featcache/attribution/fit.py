"""Whether the methods that are asked for can explain a backbone and its probes, and whether the scores fit the protocol."""

from collections.abc import Sequence

from featcache.attribution.batch import Source
from featcache.attribution.explained import Explained
from featcache.attribution.mask_stores import through_backbone
from featcache.attribution.methods import METHODS
from featcache.attribution.methods.masked import Masked
from featcache.attribution.methods.method import Method
from featcache.attribution.protocols.protocol import Protocol
from featcache.attribution.scores import SCORES
from featcache.attribution.scores.score import Score
from featcache.backbones.backbone import Backbone
from featcache.errors import BadInput
from featcache.ranks import say_once


def check_methods(methods: Sequence[Method], explained: Sequence[Explained], source: Source) -> None:
    """Raise BadInput, which names the methods that can, if one of the methods cannot explain the backbone or a probe."""
    backbone = source.backbone if source.network else None
    for method in methods:
        _check_backbone(method, explained, source)
        if backbone is not None and (reason := method.misfit(backbone)):
            raise _refused(
                method, f"{backbone.arch} {reason}", [kind for kind in _defaults() if _serves(kind, backbone)]
            )
        for one in explained:
            if reason := method.unfit(one.head.head, one.feature):
                fit = [kind for kind in _defaults() if not kind.unfit(one.head.head, one.feature)]
                able = [kind for kind in fit if backbone is None or _serves(kind, backbone)]
                raise _refused(method, f"probe {one.probe} {reason}", able)


def check_scores(scores: Sequence[Score], protocol: Protocol, backbone: bool) -> None:
    """Raise BadInput if a score stands there twice, looks at what the protocol does not have, or lacks the backbone.

    backbone: whether it was named.
    """
    if len({score.type for score in scores}) < len(scores):
        raise BadInput("--score: the same score stands there twice with different fields; run attribute for each")
    for score in scores:
        if score.regions and protocol.region not in score.regions:
            fit = [name for name, kind in SCORES.items() if not kind.regions or protocol.region in kind.regions]
            raise BadInput(
                f"--score {score.type} looks at {' or '.join(score.regions)}, and --protocol {protocol.type} has "
                f"{protocol.region or 'neither'}; scores that fit it: {', '.join(fit)}"
            )
        if score.runs_backbone and not backbone:
            raise BadInput(f"--score {score.type} runs the backbone: give --backbone, --dataset and --root")


def _refused(method: Method, reason: str, able: Sequence[Method]) -> BadInput:
    names = ", ".join(kind.type for kind in able)
    return BadInput(f"--method {method.type}: {reason}; methods that can explain it: {names}")


def _serves(method: Method, backbone: Backbone) -> bool:
    """Whether a method can explain a backbone, and has the packages that it needs."""
    try:
        return method.misfit(backbone) is None
    except BadInput:
        return False


def _check_backbone(method: Method, explained: Sequence[Explained], source: Source) -> None:
    """Raise BadInput if a method lacks the backbone that it runs for some heads, and say if it runs it for some alone."""
    left = through_backbone(method, explained, source.masked) if method.runs_backbone else []
    if left and source.network is None:
        if len(left) < len(explained) or (isinstance(method, Masked) and method.masking in source.masked):
            raise BadInput(
                f"--method {method.type}: probe {left[0].probe} reads {left[0].feature} by its positions, which the store of "
                "masked images lacks: give --backbone, --dataset and --root, or extract its masks with --features spatial"
            )
        masks = f", or --masks, a store of extract --masks {method.type}" if isinstance(method, Masked) else ""
        raise BadInput(f"--method {method.type} runs the backbone: give --backbone, --dataset and --root{masks}")
    if 0 < len(left) < len(explained):
        say_once(
            f"notice: --method {method.type}: {len(left)} of {len(explained)} heads read their map by its positions, which "
            "the store of masked images lacks, and go through the backbone"
        )


def _defaults() -> list[Method]:
    return [kind.model_validate({}) for kind in METHODS.values()]
