"""How training and scoring divide the memory of a device."""

import math
from dataclasses import dataclass

import torch

from featcache.device import free_bytes
from featcache.errors import BadInput, shown
from featcache.probes.heads.head import Head


@dataclass(frozen=True)
class MemoryBudget:
    """Bytes of what is worked on at a time, and shares of the free memory.

    weights: one layer's weights of the probes that train together; the stack keeps several copies of them, and so does
    the optimizer. activations: the output of such a layer. losses: logits in one call of a loss. scores: logits and
    weights that are held during one pass over the features in scoring.
    """

    weights: int
    activations: int
    losses: int
    scores: int = 1 << 30

    @classmethod
    def of(cls, device: torch.device) -> "MemoryBudget":
        """Return the budget of a device."""
        return CPU if device.type == "cpu" else GPU

    @staticmethod
    def for_states(device: torch.device) -> int:
        """Return the bytes for the states of blocks that train on the same pass over the data."""
        return free_bytes(device) // 4

    @staticmethod
    def for_validation(device: torch.device) -> int:
        """Return the bytes for the features that validation reads after every epoch."""
        return free_bytes(device) // 4


# Weights and momentum should stay in the last-level cache, activations should leave room for other things, and what a
# loss computes element by element should stay in the second-level cache.
CPU = MemoryBudget(24 << 20, 256 << 20, 2 << 20)
# On a GPU a step costs its kernel launches, so blocks should be large, but leave room for features on a small GPU.
GPU = MemoryBudget(512 << 20, 512 << 20, 256 << 20)


@dataclass(frozen=True)
class FeatureMemory:
    """Bytes for training features. resident: for those that stay in memory. streamed: for all buffers of the others."""

    resident: float
    streamed: float

    @classmethod
    def of(cls, device: torch.device, asked: float | None = None, processes: int = 1) -> "FeatureMemory":
        """Return the memory for features on a device.

        asked: bytes, by default half of the free memory. processes: how many share this machine. Raises BadInput.
        """
        if asked is not None and not (isinstance(asked, int | float) and 1 <= asked < math.inf):
            raise BadInput(f"memory: expected a number of bytes, 1 or more, not {shown(asked)}")
        host = free_bytes(torch.device("cpu")) // 2 // processes
        resident = asked or (host if device.type == "cpu" else free_bytes(device) // 2)
        return cls(resident, min(resident, host))

    def buffer_rows(self, rows: int, size: int) -> int | None:
        """Return the rows of the shuffle buffer for an input, or None if it fits into memory. size: its bytes."""
        # One buffer is trained on while the next is read, each in a third of the memory; they lie on the host.
        return None if size <= self.resident else max(int(rows * (self.streamed / 3) / size), 1)


def state_bytes(head: Head, dim: int, classes: int, positions: int) -> int:
    """Return roughly how many bytes a probe takes in training: weights, gradients and at most two moments, float32."""
    return 16 * head.depth * head.footprint(dim, classes, positions)[0]
