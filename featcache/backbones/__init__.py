"""Backbones: a checkpoint file in, a frozen network with named layers out."""

from featcache.backbones.families import ARCHITECTURES

__all__ = ["ARCHITECTURES"]
