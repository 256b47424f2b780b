"""What heads, losses, solvers and schedules have in common: they are the parts of a probe."""

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from featcache.kinds import Kind

if TYPE_CHECKING:
    from featcache.probes.spec import ProbeSpec

# Types of fields with bounds.
Positive = Annotated[float, Field(gt=0)]
AtLeast0 = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
CountOr0 = Annotated[int, Field(ge=0)]


class Part(Kind):
    """Base of the parts that a probe consists of."""

    def conflict(self, spec: "ProbeSpec") -> str | None:
        """Return a line for the user if something else in the probe does not go with this part, else None."""
        return None
