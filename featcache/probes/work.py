"""How the probes of a grid are grouped for one pass over the features."""

from collections.abc import Iterator, Sequence

import torch

from featcache.probes.features import input_of, input_shape
from featcache.probes.spec import ProbeSpec
from featcache.probes.stack import blocks, room_of
from featcache.store.reader import Store


def work(
    specs: Sequence[ProbeSpec], store: Store, device: torch.device
) -> Iterator[tuple[list[list[ProbeSpec]], str, bool]]:
    """Yield (blocks, feature, pool) for each set of input that the specs ask for."""
    inputs: dict[tuple[str, bool], list[ProbeSpec]] = {}
    for spec in specs:
        inputs.setdefault(input_of(spec), []).append(spec)
    for (feature, pool), members in inputs.items():
        dim, positions = input_shape(store, feature, pool)
        yield blocks(members, dim, positions, len(store.classes), room_of(device)), feature, pool
