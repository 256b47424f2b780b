"""Inputs that are columns of a wider one, so that features are held and read once, however many inputs have them."""

import itertools
from collections.abc import Iterable, Mapping

from featcache.feature import BESIDE
from featcache.probes.inputs.input import Input, Source
from featcache.probes.spec import ProbeSpec


def shared_inputs(specs: Iterable[ProbeSpec], buffers: Mapping[str, int | None] | None = None) -> dict[Source, Input]:
    """Return {what the specs read: the input of which it is columns, often its own}.

    Inputs with a feature in common are columns of one that has all their features, unless they pool differently, are of
    different images, or are read through buffers of different sizes. buffers: {name of a Source: rows of its shuffle
    buffer}, where that is known. An input of an optimizer that sees all images at once is kept as it is, because all of
    it must fit into memory.

        shared_inputs(specs)  # a -> a + b, a + b -> a + b, c -> c
    """
    full_batch: dict[Source, bool] = {}
    for spec in specs:
        source = Source.of(spec)
        full_batch[source] = full_batch.get(source, False) or spec.optimizer.full_batch
    groups: list[list[Source]] = []
    for source in full_batch:
        alone = full_batch[source]
        touching = [] if alone else [group for group in groups if _touches(source, group, full_batch, buffers)]
        others = [group for group in groups if group not in touching]
        groups = [*others, [*itertools.chain(*touching), source]]
    shared: dict[Source, Input] = {}
    for group in groups:
        # The widest first, so that most inputs are neighbouring columns.
        widest = sorted((source.input for source in group), key=lambda read: -len(read.parts))
        parts = dict.fromkeys(itertools.chain(*(read.parts for read in widest)))
        shared |= dict.fromkeys(group, Input(BESIDE.join(parts), widest[0].pooled))
    return {source: shared[source] for source in full_batch}


def _touches(
    source: Source, group: Iterable[Source], alone: Mapping[Source, bool], buffers: Mapping[str, int | None] | None
) -> bool:
    """Return whether an input has a feature in common with one of a group, and may be read together with it."""
    return any(
        not alone[other]
        and (other.sample, other.input.pooled) == (source.sample, source.input.pooled)
        and not set(other.input.parts).isdisjoint(source.input.parts)
        and (buffers is None or buffers.get(other.name) == buffers.get(source.name))
        for other in group
    )
