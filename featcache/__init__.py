"""featcache: extract frozen features once, then train and explain whole grids of probes on the cache.

Every command has a Python function of the same name. Each is imported on first use, so that
`import featcache` (and `featcache --help`) does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# Function to module. What stands here stands below as an import too.
_FUNCTIONS = {
    "layers": "featcache.backbones.layers",
    "extract": "featcache.extraction.extract",
    "extract_many": "featcache.extraction.extract",
    "plan": "featcache.planning",
    "open_store": "featcache.store.reader",
    "inspect": "featcache.store.inspect",
    "inspect_dataset": "featcache.datasets.inspect",
    "verify": "featcache.probes.runs.verify",
    "convert": "featcache.store.convert",
    "train_probes": "featcache.probes.train",
    "plan_probes": "featcache.probes.plan",
    "sweep": "featcache.sweeping",
    "knn": "featcache.probes.knn",
    "svm": "featcache.probes.svm",
    "schema": "featcache.probes.grids.schema",
    "attribute": "featcache.attribution.attribute",
    "finetune": "featcache.finetuning.finetune",
    "plan_finetune": "featcache.finetuning.plan",
    "open_run": "featcache.probes.runs.run",
    "compare": "featcache.probes.compare",
    "compare_localisation": "featcache.reporting.compare_localisation",
    "report": "featcache.reporting.report",
    "export": "featcache.exchange.export",
    "import_probes": "featcache.exchange.import_probes",
}
__all__ = ["__version__", *_FUNCTIONS]

if TYPE_CHECKING:
    # Type checkers and editors do not run `__getattr__`: these imports tell them the functions' types.
    from featcache.attribution.attribute import attribute as attribute
    from featcache.backbones.layers import layers as layers
    from featcache.datasets.inspect import inspect_dataset as inspect_dataset
    from featcache.exchange.export import export as export
    from featcache.exchange.import_probes import import_probes as import_probes
    from featcache.extraction.extract import extract as extract
    from featcache.extraction.extract import extract_many as extract_many
    from featcache.finetuning.finetune import finetune as finetune
    from featcache.finetuning.plan import plan_finetune as plan_finetune
    from featcache.planning import plan as plan
    from featcache.probes.compare import compare as compare
    from featcache.probes.grids.schema import schema as schema
    from featcache.probes.knn import knn as knn
    from featcache.probes.plan import plan_probes as plan_probes
    from featcache.probes.runs.run import open_run as open_run
    from featcache.probes.runs.verify import verify as verify
    from featcache.probes.svm import svm as svm
    from featcache.probes.train import train_probes as train_probes
    from featcache.reporting.compare_localisation import compare_localisation as compare_localisation
    from featcache.reporting.report import report as report
    from featcache.store.convert import convert as convert
    from featcache.store.inspect import inspect as inspect
    from featcache.store.reader import open_store as open_store
    from featcache.sweeping import sweep as sweep
else:
    # Not for type checkers, which would believe that every attribute exists.
    def __getattr__(name: str) -> object:
        if name in _FUNCTIONS:
            return getattr(import_module(_FUNCTIONS[name]), name)
        raise AttributeError(f"module 'featcache' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
