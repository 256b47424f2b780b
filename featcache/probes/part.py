"""What heads, losses, solvers and schedules have in common: they are the parts of a probe."""

from typing import Annotated, Any, ClassVar, Protocol

from pydantic import Field

from featcache.kinds import Kind

# Types of fields with bounds.
Positive = Annotated[float, Field(gt=0)]
AtLeast0 = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
CountOr0 = Annotated[int, Field(ge=0)]


class Whole(Protocol):
    """What a part may know about the probe that it belongs to. The other parts are of any kind."""

    @property
    def head(self) -> Any: ...
    @property
    def loss(self) -> Any: ...
    @property
    def optimizer(self) -> Any: ...
    @property
    def seed(self) -> int | None: ...
    @property
    def views(self) -> int | None: ...
    @property
    def precision(self) -> str: ...
    @property
    def keep(self) -> str: ...
    @property
    def patience(self) -> int: ...
    @property
    def fold(self) -> str | None: ...


class Part(Kind):
    """Base of the parts that a probe consists of."""

    # Whether its share of a training step may be recorded once and repeated on a GPU (a CUDA graph): it always works on
    # the same memory, nothing in it depends on values that the CPU would have to look at, and it changes no state in
    # Python but in Rule.advance().
    capturable: ClassVar[bool] = False

    def conflict(self, spec: Whole) -> str | None:
        """Return a line for the user if something else in the probe does not go with this part, else None."""
        return None
