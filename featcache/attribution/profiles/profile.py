"""What every profile is. The base class is the default, in which nothing is changed."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from featcache.attribution.batch import Batch, Source
from featcache.attribution.methods.method import Method
from featcache.attribution.protocols.protocol import Protocol
from featcache.attribution.scores.score import Judge, Score
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

    def scored(self, score: Score, method: Method, protocol: Protocol, batch: Batch, judge: Judge) -> Judge:
        """Return what scores the maps of a method in the place of a score's own Judge of a batch."""
        return judge
