"""What every head does: draw its weights, stand in a stack of its kind, and become a module of its own."""

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Protocol, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from featcache.errors import BadInput
from featcache.feature import Feature
from featcache.probes.gemm import PRECISIONS
from featcache.probes.part import Part, Positive

# With so many rows in a batch, a product is not held up by reading weights from memory.
MANY_ROWS = 1024
# With this logit offset, a B-cos head whose weights are all zero gives every class p = 1/C.
UNIFORM_OFFSET = "-ln(C-1)"
Offset = Annotated[float, Field(ge=-1e6, le=1e6)] | Literal["-ln(C-1)"]

# The gradient of a weight: a tensor of its shape, or two matrices (A, B) that stand for A B.
Gradient = Tensor | tuple[Tensor, Tensor]


class Stack(Protocol):
    """P heads of one shape side by side, which see the same features.

    weights: {name: [P, ...]}, which training changes. parameters: the ones that gradients train, in order.
    """

    weights: dict[str, Tensor]
    parameters: list[Tensor]

    def forward(self, features: Tensor, training: bool = False) -> Tensor:
        """Map features float32 [B, D] or [B, D, S] to logits [B, P, C]; with training, ready for backward()."""

    def backward(self, features: Tensor, logits: Tensor, gradient: Tensor) -> list[Gradient]:
        """Return the gradients of the parameters, given that of the logits, [B, P, C], after forward()."""


class Head(Part):
    """Base of all heads. The logits are divided by `temperature`, then `offset` is added to them."""

    temperature: Positive = Field(1.0, description="divides the logits")
    offset: Offset = Field(
        0.0, description="is added to the logits after the temperature; -ln(C-1) starts every class at 1/C"
    )

    # Precisions in which the products of a stack can be computed.
    precisions: ClassVar[tuple[str, ...]] = PRECISIONS
    # Whether it reads tokens, which have no position in a map.
    reads_tokens: ClassVar[bool] = False
    # Whether it has weights that are trained. A head without reads the training images whenever it predicts.
    trains: ClassVar[bool] = True

    @property
    def commutes(self) -> bool:
        """Whether pooling the features first gives the same logits, which is true of a plain linear layer alone."""
        return False

    @property
    def averages_features(self) -> bool:
        """Whether it averages the features over positions rather than the logits."""
        return False

    @property
    def shared(self) -> Hashable:
        """What the heads of one block have in common."""
        return self

    @property
    def scored_on_training(self) -> bool:
        """Whether it is scored on the images that it learns from."""
        return True

    def short_of(self, images: int) -> str | None:
        """Return a line for the user if it needs more training images than there are, else None."""
        return None

    @property
    def pools_first(self) -> bool:
        """Whether it may read the mean of the features over positions instead of the map."""
        return self.commutes or self.averages_features

    @classmethod
    def label_of(cls, fields: Mapping[str, Any]) -> str:
        """Return the name in tables of a head with these fields (numbers or text), such as linear or mlp-2 (256)."""
        return cls.word()

    @property
    def label(self) -> str:
        """Its name in tables."""
        return self.label_of(dict(self))

    @property
    def depth(self) -> int:
        """How many layers of weights it has."""
        return 1

    @property
    def narrowest(self) -> int:
        """Width of the narrowest feature that it can read."""
        return 1

    def first_width(self, classes: int) -> int:
        """Return the outputs of its first layer."""
        return classes

    def initial_weights(self, dim: int, classes: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw its weights: {name: float32 tensor}. dim: width of the features. Raises BadInput if it cannot read those."""
        raise NotImplementedError

    def stack(self, weights: dict[str, Tensor], precision: str) -> Stack:
        """Return a Stack of heads with the same fields as this one. weights: {name: [P, ...]}."""
        raise NotImplementedError

    def modules(self, weights: dict[str, Tensor]) -> dict[str, nn.Module]:
        """Return the layers that map [B, D, h, w] to logits [B, C, h, w] or [B, C, 1, 1]; pop their weights."""
        raise NotImplementedError

    def footprint(self, dim: int, classes: int, positions: int) -> tuple[int, int]:
        """Return roughly how many weights one layer has, and how many numbers the widest layer outputs for an image."""
        raise NotImplementedError

    def flops(self, dim: int, classes: int, positions: int) -> int:
        """Return the operations that one image costs in training, forward and backward."""
        raise NotImplementedError

    def in_cache(self, rows: int) -> bool:
        """Whether the weights of a stack should stay in the cache when it sees so many rows at a time."""
        return rows < MANY_ROWS

    def misfit(
        self, features: Sequence[Feature], width: int, positions: int, batch_size: int
    ) -> tuple[str, str] | None:
        """Return (field, reason) if it cannot train on features side by side with so many positions, else None.

        width: of all of them. batch_size: images of a mini-batch.
        """
        return None

    def resolved(self, classes: int, cells: int = 1) -> Self:
        """Return the head with numbers for what depends on the store. Raises BadInput if the offset -ln(C-1) is not finite.

        cells: how many neighbouring numbers of the feature are one channel's.
        """
        if isinstance(self.offset, float):
            return self
        if classes < 2:
            raise BadInput(f"offset {UNIFORM_OFFSET} needs at least two classes, and the store has {classes}")
        return self.model_copy(update={"offset": -math.log(classes - 1)})

    @property
    def shift(self) -> float:
        """The offset of a resolved() head as a number. Raises ValueError if it is still -ln(C-1)."""
        if not isinstance(self.offset, float):
            raise ValueError(f"offset {self.offset} has no value before resolved(classes)")
        return self.offset


def scaled(logits: Tensor, head: Head) -> Tensor:
    """Divide logits by the head's temperature and add its offset, in place."""
    if head.temperature != 1:
        logits /= head.temperature
    if head.shift:
        logits += head.shift
    return logits


def unscaled(gradient: Tensor, head: Head) -> Tensor:
    """Take a gradient of the logits back through scaled()."""
    return gradient if head.temperature == 1 else gradient / head.temperature
