"""The kNN head: nothing is trained, the nearest training images vote."""

from collections.abc import Hashable, Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from featcache.errors import BadInput
from featcache.probes.heads.head import Head, Stack
from featcache.probes.part import Count, Positive, Whole

NO_WEIGHTS = (
    "a kNN probe has no weights: it votes with the training images, so that there is nothing to export, and no map to "
    "point into; take a probe with a head that is trained"
)
# With a temperature below this, rounding of the similarities to float32 would show in the votes.
COLDEST = 0.02


class Knn(Head):
    """The k nearest training images vote with their labels."""

    type: Literal["knn"] = "knn"
    k: Count = Field(20, description="how many of the nearest training images vote")
    temperature: Positive = Field(0.07, description="T of the weights exp(s / T); other weights have none")
    weights: Literal["exp", "uniform", "inverse"] = Field(
        "exp", description="of a vote: exp(s / T) of the similarity s, 1, or 1 / distance"
    )
    distance: Literal["cosine", "euclidean", "dot"] = Field(
        "cosine", description="what is near: s is the cosine, minus the Euclidean distance, or the dot product"
    )
    leave_one_out: bool = Field(
        False, description="whether the training images are scored too, each without itself as a neighbour"
    )

    trains: ClassVar[bool] = False
    precisions: ClassVar[tuple[str, ...]] = ("float32",)

    @property
    def averages_features(self) -> bool:
        """A map is averaged over its positions, which gives the pooled feature."""
        return True

    @property
    def scored_on_training(self) -> bool:
        """See Head.scored_on_training."""
        return self.leave_one_out

    @property
    def shared(self) -> Hashable:
        """See Head.shared. Neighbours that are found once serve every k, temperature and weighting."""
        return self.type, self.distance, self.leave_one_out

    @classmethod
    def label_of(cls, fields: Mapping[str, Any]) -> str:
        """See Head.label_of."""
        return f"knn ({fields['k']})"

    def conflict(self, spec: Whole) -> str | None:
        """See Part.conflict."""
        if self.weights == "inverse" and self.distance == "dot":
            return "weights inverse divide by a distance, and a dot product is none: take distance cosine or euclidean"
        if spec.optimizer.trains:
            return f"a knn head is not trained: say optimizer: none, not {spec.optimizer.type}"
        if self.offset != 0:
            return "a knn head has no offset"
        if spec.views:
            return "a knn head remembers the images as they are: say views: 0"
        if spec.keep != "last" or spec.patience:
            return "a knn head has no epochs to choose from: leave out keep and patience"
        if spec.loss != type(spec.loss)(difficult=spec.loss.difficult):
            return "a knn head is not trained: of its loss, it reads the type and difficult alone"
        return None

    def short_of(self, images: int) -> str | None:
        """See Head.short_of."""
        others = images - 1 if self.leave_one_out else images
        if self.k <= others:
            return None
        without = ", each without itself," if self.leave_one_out else ""
        return f"k is {self.k}, and there are {images} training images{without} to choose neighbours from; take a smaller k"

    @property
    def needs_exact(self) -> bool:
        """Whether its votes depend on more digits of a similarity than a product in float32 gives."""
        if self.weights == "uniform":
            return False
        return self.weights == "inverse" or self.distance != "cosine" or self.temperature < COLDEST

    def vote_weights(self, similarities: Tensor) -> Tensor:
        """Return the weights of the votes of neighbours, float64 [n, k], up to a factor for each of the n images.

        similarities: float32 [n, k], falling. Where a neighbour is at distance 0, `inverse` counts only such neighbours,
        as scikit-learn's weights="distance" does.
        """
        s = similarities.double()
        if self.weights == "uniform":
            return torch.ones_like(s)
        if self.weights == "exp":
            return ((s - s[:, :1]) / self.temperature).exp()
        distances = (1 - s if self.distance == "cosine" else -s).clamp(min=0)
        return torch.where(distances[:, :1] == 0, (distances == 0).double(), 1 / distances)

    def initial_weights(self, dim: int, classes: int, generator: torch.Generator) -> dict[str, Tensor]:
        """See Head.initial_weights. There are none."""
        return {}

    def stack(self, weights: dict[str, Tensor], precision: str) -> Stack:
        """See Head.stack. Raises TypeError: what predicts is a NeighbourPredictor."""
        raise TypeError("kNN probes have no weights to be stacked")

    def modules(self, weights: dict[str, Tensor]) -> dict[str, nn.Module]:
        """See Head.modules. Raises BadInput."""
        raise BadInput(NO_WEIGHTS)

    def footprint(self, dim: int, classes: int, positions: int) -> tuple[int, int]:
        """See Head.footprint. Any number of them may share a block."""
        return 1, 1

    def flops(self, dim: int, classes: int, positions: int) -> int:
        """See Head.flops."""
        return 0
