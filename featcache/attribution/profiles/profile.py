"""What every profile is. The base class is the default, in which nothing is changed."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from featcache.attribution.batch import Source
from featcache.attribution.methods.method import Method
from featcache.attribution.protocols.protocol import Protocol
from featcache.attribution.scores.localisation_score import LocalisationScore
from featcache.probes.heads.module import HeadModule


class Profile:
    """How methods, protocols and scores are used. A published evaluation overrides where it differs from the default."""

    def protocol(self, protocol: Protocol) -> Protocol:
        """Return the protocol to use in the place of one that was asked for."""
        return protocol

    def method(self, method: Method) -> Method:
        """Return the method to use in the place of one that was asked for. Its label stays."""
        return method

    def explaining(self, heads: Sequence[HeadModule], source: Source) -> AbstractContextManager[None]:
        """Return the context in which any method explains heads on the images of a source."""
        return nullcontext()

    def measure(
        self, score: LocalisationScore, method: Method, protocol: Protocol, maps: torch.Tensor, masks: torch.Tensor
    ) -> torch.Tensor:
        """Score the maps [N, S, S] of a method against masks [N, S, S], as LocalisationScore.measure_all does."""
        return score.measure_all(maps, masks)
