"""`featcache attribute`: explain chosen probes of a run, and score where their maps point."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from featcache.arguments import CHECKPOINT, NAME, NAMES, PATH, takes, whole
from featcache.attribution.batch import Batch, Source, in_batches, open_network
from featcache.attribution.methods import DEFAULT_METHODS, METHODS
from featcache.attribution.methods.method import Method
from featcache.attribution.results import IDENTITY, Result, columns_of, write_results
from featcache.attribution.scores import DEFAULT_SCORES, LOCALISATION_SCORES
from featcache.attribution.scores.localisation_score import LocalisationScore
from featcache.attribution.targets import Target, find_targets
from featcache.backbones.input.preprocessing import Preprocessing
from featcache.device import choose_device, multiplying
from featcache.errors import BadInput
from featcache.feature import Feature, parse_beside
from featcache.kinds import K, Registry
from featcache.probes.heads.module import HeadModule
from featcache.probes.runs.probe_file import find_probes, load_probes
from featcache.probes.runs.run import Run, best, open_run, select, store_of
from featcache.probes.spec import ProbeSpec
from featcache.store.reader import Store


@dataclass(frozen=True, eq=False)
class Explained:
    """A probe to explain: its id, its head as a module, and the map that its head reads."""

    probe: str
    head: HeadModule
    feature: Feature


@multiplying("float32")
@takes(
    store=PATH, probes=NAMES, rule=NAME, methods=NAMES, split=NAME, backbone=CHECKPOINT, arch=NAME, weights_key=NAME, dataset=NAME,
    root=PATH, limit=whole(), examples=whole(), seed=whole(), scores=NAMES,
)  # fmt: skip
def attribute(
    run: str | PathLike,
    store: str | PathLike | None = None,
    probes: Sequence[str] | None = None,
    rule: str | None = None,
    methods: Sequence[str] | None = None,
    split: str | None = None,
    backbone: str | PathLike | None = None,
    arch: str | None = None,
    weights_key: str | None = None,
    dataset: str | None = None,
    root: str | PathLike | None = None,
    limit: int | None = None,
    examples: int = 6,
    device: str | None = None,
    seed: int = 0,
    scores: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Explain every class that has a box which is not difficult, and score the maps.

    run: folder. store: path, by default the run's. probes: ids; by default those that `rule` selects
    (see featcache.probes.runs.run.select), and without a rule the best of each loss by the run's own metric, or
    all where nothing was chosen. methods, scores: names of METHODS and LOCALISATION_SCORES (docs/attribution.md);
    some methods run the backbone, and need backbone, dataset and root. split: of the store, by default the one that
    the run is scored on. limit: only the first images of the split that have such a class. examples: number of
    images whose maps are kept for the report. seed: draws the weights of backbone="random".
    Writes attribution.csv (a row for each probe, method, image and class) and attribution.npz into the
    run; returns the rows, in which a map without a score has NaN. Raises BadInput.

        rows = featcache.attribute("runs/voc", rule="best map per loss", limit=100)
        featcache.report("runs/voc")
    """
    finished = open_run(run)
    chosen_methods = _named(METHODS, DEFAULT_METHODS if methods is None else methods, "--method")
    chosen_scores = _named(LOCALISATION_SCORES, DEFAULT_SCORES if scores is None else scores, "--score")
    opened, chosen_device = store_of(finished, store), choose_device(device)
    explained = _load(finished, opened, _chosen(finished, probes, rule), chosen_device)
    preprocessing = Preprocessing(**opened.manifest.identity["preprocessing"])
    data = opened[split or _scored_split(finished)]
    targets = find_targets(data, preprocessing, limit)
    network = None
    if backbone is not None:
        network = open_network(data, preprocessing, chosen_device, backbone, arch, weights_key, dataset, root, seed)
    for method in chosen_methods:
        if method.runs_backbone and network is None:
            raise BadInput(f"--method {method.type} runs the backbone: give --backbone, --dataset and --root")
    source = Source(data, preprocessing, chosen_device, network)
    kept = sorted({target.row for target in targets})[:examples]
    results = [
        result
        for method in chosen_methods
        for result in _explain(method, explained, targets, source, chosen_scores, kept)
    ]
    write_results(finished.path, columns_of(chosen_scores), results, kept, source)
    return [result.row for result in results]


def _named(registry: Registry[K], names: Iterable[str], option: str) -> list[K]:
    """Return the kinds of these names, each once. Raises BadInput, which begins with the option."""
    return [registry.named(name, option).model_validate({}) for name in dict.fromkeys(names)]


def _chosen(run: Run, probes: Sequence[str] | None, rule: str | None) -> list[str]:
    """Return the ids of the probes to explain, each once."""
    return list(dict.fromkeys(probes or (select(run, rule) if rule else best(run, "loss"))))


def _load(run: Run, store: Store, probes: Sequence[str], device: torch.device) -> list[Explained]:
    """Load probes onto a device. Raises BadInput if one is damaged, or has no map to point into."""
    files = find_probes(run.path)
    trained = [probe for name in probes for probe in load_probes(run.path, [name], files)]
    heads = [HeadModule(probe.spec.head, probe.weights).to(device) for probe in trained]
    features = [_map_of(probe.spec, store) for probe in trained]
    return [Explained(p.spec.id, head, feature) for p, head, feature in zip(trained, heads, features, strict=True)]


def _map_of(spec: ProbeSpec, store: Store) -> Feature:
    """Return the map that a probe's feature is the mean of. Raises BadInput if the probe reads anything else."""
    first, *others = parse_beside(spec.features, store.manifest.aliases)
    if others:
        raise BadInput(
            f"probe {spec.id} saw {spec.features} side by side: there is no one map to point into; attribute probes that "
            "read one feature"
        )
    feature = store.manifest.feature(first)
    if feature.kind not in ("pooled", "patch_mean", "spatial"):
        raise BadInput(f"probe {spec.id} saw {feature}, which is no mean of a map: there is nothing to point at")
    return Feature(feature.layer, "spatial")


def _scored_split(run: Run) -> str:
    """Return the split of the store that a run is scored on. Raises BadInput if it is a union of splits."""
    names = run.summary["splits"][run.scored_on]
    if len(names) > 1:
        raise BadInput(f"run {run.path} is scored on {' and '.join(names)}: name one with --split")
    return names[0]


def _explain(
    method: Method,
    explained: Sequence[Explained],
    targets: Sequence[Target],
    source: Source,
    scores: Sequence[LocalisationScore],
    kept: Sequence[int],
) -> Iterator[Result]:
    """Yield a Result for every map: by batches of images, then by probes, then by targets."""
    with tqdm(total=len(targets) * len(explained), unit="map", desc=method.type) as progress:
        for part in in_batches(targets):
            # Heads that read the same map share work. Of their maps only what is kept stays in memory.
            batch, results = Batch(part, source), {}
            levels = [score.uniform(batch.masks) for score in scores]
            for feature in dict.fromkeys(one.feature for one in explained):
                alike = [one for one in explained if one.feature == feature]
                for probe, maps in _maps(method, alike, feature, batch):
                    cells = _cells(scores, maps, batch.masks, levels)
                    results[probe] = list(_results(probe, method, cells, maps, batch, kept))
            for one in explained:
                yield from results[one.probe]
            progress.update(len(part) * len(explained))


def _maps(
    method: Method, explained: Sequence[Explained], feature: Feature, batch: Batch
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (probe, its maps [T, S, S] on the CPU). Raises BadInput for maps of another shape, as a plugin's may be."""
    expected = (len(batch.targets), batch.size, batch.size)
    maps = method.explain([one.head for one in explained], feature, batch)
    for one, values in zip(explained, maps, strict=True):
        if tuple(values.shape) != expected:
            raise BadInput(f"--method {method.type}: its maps are {tuple(values.shape)}, and must be {expected}")
        yield one.probe, values.cpu()


def _cells(
    scores: Sequence[LocalisationScore], maps: torch.Tensor, masks: torch.Tensor, levels: Sequence[torch.Tensor]
) -> dict[str, list[float]]:
    """Return {column of attribution.csv: its values for the T maps}. levels: what uniform maps score, float64 [T]."""
    cells: dict[str, list[float]] = {}
    for score, level in zip(scores, levels, strict=True):
        cells |= dict(zip(score.columns, (score.measure(maps, masks).tolist(), level.tolist()), strict=True))
    return cells


def _results(
    probe: str,
    method: Method,
    cells: Mapping[str, Sequence[float]],
    maps: torch.Tensor,
    batch: Batch,
    kept: Sequence[int],
) -> Iterator[Result]:
    """Yield the Results of one probe's maps [T, S, S] of a batch. cells: {column: its scores of the T maps}."""
    split = batch.source.split
    for number, target in enumerate(batch.targets):
        identity = (probe, method.type, split.name, split.ids[target.row], split.store.classes[target.label])
        row = dict(zip(IDENTITY, identity, strict=True)) | {column: cells[column][number] for column in cells}
        yield Result(row, maps[number].numpy().astype(np.float32) if target.row in kept else None)
