"""featcache: extract frozen features once, then train and explain whole grids of probes on the cache.

Every command has a Python twin of the same name. They are imported on first use, so that
`import featcache` (and `featcache --help`) does not wait for torch.
"""

from importlib import import_module

__version__ = "0.1.0"

_TWINS = {
    "layers": "featcache.backbones.layers",
    "extract": "featcache.extraction.extract",
    "open_store": "featcache.store.reader",
    "inspect": "featcache.store.inspect",
    "inspect_dataset": "featcache.datasets.inspect",
    "verify": "featcache.probes.runs.verify",
    "convert": "featcache.store.convert",
    "train_probes": "featcache.probes.train",
    "plan_probes": "featcache.probes.plan",
    "attribute": "featcache.attribution.attribute",
    "open_run": "featcache.probes.runs.run",
    "compare": "featcache.probes.compare",
    "report": "featcache.reporting.report",
    "export": "featcache.exchange.export",
    "import_probes": "featcache.exchange.import_probes",
}
__all__ = ["__version__", *_TWINS]


def __getattr__(name):
    if name in _TWINS:
        return getattr(import_module(_TWINS[name]), name)
    raise AttributeError(f"module 'featcache' has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
