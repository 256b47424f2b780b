"""The settings of a fine-tuning."""

import os
from dataclasses import dataclass
from typing import Any

import torch

from featcache.arguments import CHECKPOINT, MOST_WORKERS, NAME, PATH, Expected, whole
from featcache.finetuning.network import Source

# What the settings must be; see arguments.takes.
EXPECTED: dict[str, Expected] = {
    "backbone": CHECKPOINT, "dataset": NAME, "root": PATH, "arch": NAME, "weights_key": NAME, "head_from": PATH,
    "select": NAME, "workers": whole(0, MOST_WORKERS), "seed": whole(0, 2**32 - 1), "parity": NAME,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What `finetune` was asked for. Its docstring says what each field means."""

    backbone: str | os.PathLike[str]
    dataset: str
    recipe: str | os.PathLike[str] | dict[str, Any]
    root: str | os.PathLike[str] | None = None
    arch: str | None = None
    weights_key: str | None = None
    head_from: str | os.PathLike[str] | None = None
    select: str | None = None
    device: str | torch.device | None = None
    workers: int | None = None
    seed: int = 0
    parity: str | None = None

    @property
    def source(self) -> Source:
        """Where the backbone comes from."""
        return Source(self.backbone, self.arch, self.weights_key, self.seed)
