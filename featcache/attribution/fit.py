"""Whether the methods that are asked for can explain a backbone and its probes."""

from collections.abc import Sequence

from featcache.attribution.explained import Explained
from featcache.attribution.methods import METHODS
from featcache.attribution.methods.method import Method
from featcache.backbones.backbone import Backbone
from featcache.errors import BadInput


def check_methods(methods: Sequence[Method], explained: Sequence[Explained], backbone: Backbone | None) -> None:
    """Raise BadInput, which names the methods that can, if one of the methods cannot explain the backbone or a probe.

    backbone: None if none was named.
    """
    probes = [(one.probe, one.head.head, one.feature) for one in explained]
    for method in methods:
        if method.runs_backbone and backbone is None:
            raise BadInput(f"--method {method.type} runs the backbone: give --backbone, --dataset and --root")
        if backbone is not None and (reason := method.misfit(backbone)):
            able = ", ".join(kind.type for kind in _defaults() if not kind.misfit(backbone))
            raise BadInput(f"--method {method.type}: {backbone.arch} {reason}; methods that can explain it: {able}")
        for probe, head, reading in probes:
            if reason := method.unfit(head, reading):
                able = ", ".join(
                    kind.type
                    for kind in _defaults()
                    if not kind.unfit(head, reading) and not (backbone and kind.misfit(backbone))
                )
                raise BadInput(f"--method {method.type}: probe {probe} {reason}; methods that can explain it: {able}")


def _defaults() -> list[Method]:
    return [kind.model_validate({}) for kind in METHODS.values()]
