"""The settings of an extraction."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from featcache.store.folder import Folder


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What `extract` was asked for. Its docstring says what each field means.

    place: the folder of a store without a name of its own. stem: the checkpoint's part in that name, among several.
    """

    backbone: str | os.PathLike[str] | torch.nn.Module
    arch: str | None
    weights_key: str | None
    dataset: str
    root: str | os.PathLike[str] | None
    splits: Sequence[str] | None
    size: int | None
    resize: str | None
    short_side: int | None
    interpolation: str | None
    mean: Sequence[float] | None
    std: Sequence[float] | None
    decoder: str
    views: int
    masks: str | None
    limit: int | None
    crop_scale: Sequence[float] | None
    seed: int
    features: str | Sequence[str] | None
    precision: str
    batch_size: int
    workers: int
    device: str | torch.device | None
    store: str | os.PathLike[str] | Folder | None
    format: str | None
    compression: str | None
    dtype: str
    place: str | os.PathLike[str] | None = None
    stem: str = ""
