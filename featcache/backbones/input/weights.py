"""The input of the weights at hand: what the checkpoint says itself, then the customs of the package that wrote it."""

from dataclasses import replace
from typing import Any

from featcache.backbones.architecture import Architecture, Checkpoint, Fields, Origins
from featcache.backbones.input.stated import stated_input


def with_input(architecture: Architecture, checkpoint: Checkpoint, content: Any) -> Architecture:
    """Return the Architecture with the input of a checkpoint, and in `origins` where each of its fields is from.

    content: of the checkpoint, as read_checkpoint returns it.
    """
    fields, origins = _customs(architecture, checkpoint)
    stated, stated_origins, notices = stated_input(checkpoint.path, content)
    if architecture.inverse:
        for field in ("mean", "std", "bgr"):
            stated.pop(field, None), stated_origins.pop(field, None)
    if "size" in stated and "short_side" not in stated:
        # A short side goes with the size it was made for.
        fields, origins = fields | {"short_side": None}, origins | {"short_side": None}
    known = {field: origin for field, origin in (architecture.origins | origins | stated_origins).items() if origin}
    note = "; ".join(line for line in (architecture.note, *notices) if line)
    return replace(architecture, **fields | stated, origins=known, note=note)


def without_weights(architecture: Architecture) -> Architecture:
    """Return the Architecture with the input of random weights."""
    return replace(architecture, **_customs(architecture, None)[0])


def _customs(architecture: Architecture, checkpoint: Checkpoint | None) -> tuple[Fields, Origins]:
    return architecture.customs(architecture, checkpoint) if architecture.customs else ({}, {})
