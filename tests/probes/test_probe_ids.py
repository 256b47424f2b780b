"""Ids of probes stay what they are: a run's probes are found by them."""

import pytest
import yaml
from folders import DATA

from featcache.probes.grids.grid import parse_grid
from featcache.probes.identity import REGISTRIES
from featcache.probes.spec import spec_from_dict, spec_to_dict

PLAIN = {
    "name": "p",
    "features": "last:spatial",
    "head": "linear",
    "loss": "bce",
    "optimizer": {"type": "sgd", "lr": 0.1},
    "epochs": 5,
}
KNOWN = yaml.safe_load((DATA / "probe_ids.yaml").read_text())


def spec_of(group):
    (spec,) = parse_grid({"probes": [PLAIN | group]}).specs
    return spec


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: str(known["group"]))
def test_a_probes_id_stays(known):
    spec = spec_of(known["group"])
    assert spec.id == known["id"]
    assert spec_from_dict(spec_to_dict(spec)).id == known["id"], "and is the same when read from a file"


def test_every_kind_has_a_known_id():
    parts = [(name, getattr(spec_of(known["group"]), name)) for known in KNOWN for name in REGISTRIES]
    covered = {name: {part.type for own, part in parts if own == name and part} for name in REGISTRIES}
    assert covered == {name: {kind.word() for kind in kinds.own} for name, kinds in REGISTRIES.items()}
