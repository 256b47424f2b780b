"""Whether the methods that are asked for can explain a backbone and its probes."""

from collections.abc import Sequence

from featcache.attribution.batch import Source
from featcache.attribution.explained import Explained
from featcache.attribution.mask_stores import through_backbone
from featcache.attribution.methods import METHODS
from featcache.attribution.methods.masked import Masked
from featcache.attribution.methods.method import Method
from featcache.errors import BadInput
from featcache.ranks import say_once


def check_methods(methods: Sequence[Method], explained: Sequence[Explained], source: Source) -> None:
    """Raise BadInput, which names the methods that can, if one of the methods cannot explain the backbone or a probe."""
    backbone = source.backbone if source.network else None
    for method in methods:
        _check_backbone(method, explained, source)
        if backbone is not None and (reason := method.misfit(backbone)):
            able = ", ".join(kind.type for kind in _defaults() if not kind.misfit(backbone))
            raise BadInput(f"--method {method.type}: {backbone.arch} {reason}; methods that can explain it: {able}")
        for one in explained:
            if reason := method.unfit(one.head.head, one.feature):
                able = ", ".join(
                    kind.type
                    for kind in _defaults()
                    if not kind.unfit(one.head.head, one.feature) and not (backbone and kind.misfit(backbone))
                )
                raise BadInput(
                    f"--method {method.type}: probe {one.probe} {reason}; methods that can explain it: {able}"
                )


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
