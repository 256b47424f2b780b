"""What a run is a run of."""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class RunBasis:
    """What decides the weights of a probe of a given id: it is the same for all probes of a run.

    splits: {role: the store's splits}. select: {"metric", "split"}; search: fields of the grid's search, or None; both
    decide which weights are kept. parity: name of the grid's profile.
    """

    store_id: str
    seed: int
    splits: dict[str, list[str]]
    select: dict[str, str]
    search: dict[str, Any] | None
    parity: str | None

    def to_json(self) -> dict[str, Any]:
        """Return the fields as run.json has them."""
        return asdict(self)

    def key(self, probes: Any, rules: dict[str, Any]) -> str:
        """Return the sha256 that stands for one grid in the run: over the basis, its groups of probes, and its rules.

        The name of the profile is among the rules.
        """
        basis = self.to_json()
        del basis["parity"]
        asked = [basis, probes, *([rules] if rules else [])]
        return hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()
