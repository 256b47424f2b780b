"""What tests of attributions share: a run of their file's GRID on the small store, and copies of it."""

import shutil

import pytest

import featcache


@pytest.fixture(scope="module")
def trained(request, store, tmp_path_factory):
    """A finished run of the probes in the file's GRID."""
    return featcache.train_probes(request.module.GRID, store=store, run=tmp_path_factory.mktemp("runs") / "r")


@pytest.fixture
def run(trained, tmp_path):
    """The folder of a copy of it."""
    shutil.copytree(trained.path, tmp_path / "r")
    return tmp_path / "r"
