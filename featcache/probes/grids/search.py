"""Searches, which decide which probes of a grid train to the end."""

from typing import Annotated, Literal

from pydantic import Field

from featcache.kinds import Kind, Registry


class Halving(Kind):
    """Successive halving (Jamieson & Talwalkar, AISTATS 2016).

    All probes train for a share `first` of their epochs, then the best 1/factor of them go on, and so on.
    """

    type: Literal["halving"] = "halving"
    factor: Annotated[float, Field(gt=1, le=100)] = Field(3.0, description="one of so many probes goes on")
    first: Annotated[float, Field(gt=0, le=1)] = Field(
        0.1, description="share of the epochs before the first comparison"
    )


SEARCHES: Registry[Halving] = Registry(Halving, "featcache.searches", "search", [Halving])
