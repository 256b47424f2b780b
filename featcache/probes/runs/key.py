"""What all probes of a run have in common, and the key of each of its grids."""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class RunBasis:
    """What decides the weights of a probe, beside its spec. All probes of a run share it.

    splits: {role: the store's splits}. select, {"metric", "split"}, where the split may be FOLDS, so many "folds", and search, the fields of the grid's search or
    None, decide which weights are kept. parity: name of the grid's profile, or None.
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
        """Return the sha256 that identifies one grid of the run: over the basis, its groups of probes, and its rules.

        parity is left out of the basis here because it is one of the rules.
        """
        basis = self.to_json()
        del basis["parity"]
        asked = [basis, probes, *([rules] if rules else [])]
        return hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()
