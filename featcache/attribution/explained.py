"""A probe that is explained, and how sure it is of images."""

from dataclasses import dataclass

import numpy as np
import torch

from featcache.attribution.methods.method import Method
from featcache.attribution.reading import Reading
from featcache.probes.heads.module import HeadModule
from featcache.probes.inputs.input import Input
from featcache.store.reader import Split


@dataclass(frozen=True, eq=False)
class Explained:
    """A probe to explain: its id, its head as a module, and what its head reads while it is explained.

    reads: what the probe reads of the store. note: stands behind the method in tables where head and backbone are not
    those of the run, as for a sanity check.
    """

    probe: str
    head: HeadModule
    feature: Reading
    reads: Input
    note: str = ""

    def named(self, method: Method) -> str:
        """Return what a method on this head is called in tables."""
        return f"{method.label} ({self.note})" if self.note else method.label

    @torch.no_grad()
    def confidence(self, split: Split, device: torch.device, link: str | None = None) -> np.ndarray:
        """Return the probability of each image's label where it is the probe's first choice, else 0: float32 [N].

        split: of single-label data. link: how logits become probabilities, by default as the loss of the probe says.
        """
        labels, parts = torch.from_numpy(split.labels).to(device), list[torch.Tensor]()
        for features in self.reads.chunks(split.store, [split.name], device):
            logits = self.head(features.reshape(*features.shape[:2], -1, 1))
            own = logits.softmax(1) if (link or self.head.link) == "softmax" else logits.sigmoid()
            done = sum(map(len, parts))
            right = own.gather(1, labels[done : done + len(own), None])[:, 0]
            parts.append(right * (logits.argmax(1) == labels[done : done + len(own)]))
        return torch.cat(parts).cpu().numpy()
