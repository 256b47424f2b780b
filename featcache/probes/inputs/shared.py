"""Inputs that are columns of a wider one, so that features are held and read once, however many inputs have them."""

import itertools
from collections.abc import Iterable, Mapping

from featcache.feature import BESIDE
from featcache.probes.inputs.input import Input
from featcache.probes.spec import ProbeSpec


def shared_inputs(specs: Iterable[ProbeSpec], buffers: Mapping[str, int | None] | None = None) -> dict[Input, Input]:
    """Return {input that the specs read: the input of which it is columns, often itself}.

    Inputs with a feature in common are columns of one that has all their features, unless they pool differently or are
    read through buffers of different sizes. buffers: {name of an input: rows of its shuffle buffer}, where that is known.
    An input of an optimizer that sees all images at once is kept as it is, because all of it must fit into memory.

        shared_inputs(specs)  # {Input("a"): Input("a + b"), Input("a + b"): Input("a + b"), Input("c"): Input("c")}
    """
    full_batch: dict[Input, bool] = {}
    for spec in specs:
        read = Input.of(spec)
        full_batch[read] = full_batch.get(read, False) or spec.optimizer.full_batch
    groups: list[list[Input]] = []
    for read in full_batch:
        touching = [] if full_batch[read] else [group for group in groups if _touches(read, group, full_batch, buffers)]
        others = [group for group in groups if group not in touching]
        groups = [*others, [*itertools.chain(*touching), read]]
    shared: dict[Input, Input] = {}
    for group in groups:
        # The widest first, so that most inputs are neighbouring columns.
        widest = sorted(group, key=lambda read: -len(read.parts))
        parts = dict.fromkeys(itertools.chain(*(read.parts for read in widest)))
        shared |= dict.fromkeys(group, Input(BESIDE.join(parts), group[0].pooled))
    return {read: shared[read] for read in full_batch}


def _touches(
    read: Input, group: Iterable[Input], alone: Mapping[Input, bool], buffers: Mapping[str, int | None] | None
) -> bool:
    """Return whether an input has a feature in common with one of a group, and may be read together with it."""
    return any(
        not alone[other]
        and other.pooled == read.pooled
        and not set(other.parts).isdisjoint(read.parts)
        and (buffers is None or buffers.get(other.name) == buffers.get(read.name))
        for other in group
    )
