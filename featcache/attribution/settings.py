"""The settings of an attribution."""

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike

from torch import nn


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What `attribute` was asked for. Its docstring says what each field means."""

    run: str | PathLike[str]
    store: str | PathLike[str] | None
    probes: Sequence[str] | None
    rule: str | None
    methods: Sequence[str] | None
    scores: Sequence[str] | None
    protocol: str | None
    split: str | None
    backbone: str | PathLike[str] | nn.Module | None
    arch: str | None
    weights_key: str | None
    dataset: str | None
    root: str | PathLike[str] | None
    limit: int | None
    masks: str | PathLike[str] | Sequence[str | PathLike[str]] | None
    images: Sequence[str] | None
    examples: int | str | Sequence[str]
    seed: int
    memory: float | None
    sanity: bool
    parity: str | None
    save_maps: bool
    format: str
