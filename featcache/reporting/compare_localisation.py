"""`featcache compare --localisation`: whether the maps of one probe, or of one method, score better than those of another."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from featcache.arguments import NAME, NAMES, PATHS, listed, takes
from featcache.attribution.results import IDENTITY
from featcache.attribution.scores.score import Score
from featcache.attribution.task import RANDOM_BACKBONE, RANDOM_HEAD, REGION
from featcache.errors import BadInput, nearest
from featcache.probes.compare import Paths, choose_probes
from featcache.probes.runs.probe_file import find_probes, load_specs
from featcache.probes.runs.run import Run, open_run
from featcache.probes.scores.jackknife import paired_test
from featcache.progress import say
from featcache.reporting.localisation import FEW, MARK, Localisation, mean_with_influences, read_localisation
from featcache.reporting.table import percent

# What a map of one side has in common with that of the other: the split, the image and the class.
MAP = IDENTITY[2:]
# A probe and a method, which make one side's maps.
Side = tuple[str, str]
MapRow = dict[str, Any]
NEITHER = (math.nan, math.nan)


@dataclass(frozen=True)
class LocalisationComparison:
    """Two sides, each a probe and a method, on one score, over the maps for which both have it.

    score: its heading. maps: how many they are; empty: on how many more at least one side has no score. scores, chance:
    the means of both sides, and of uniform maps. The difference is first - second, with its 95% interval and p value; see
    jackknife.paired_test. All are NaN if maps is 0.
    """

    sides: tuple[Side, Side]
    score: str
    maps: int
    empty: int
    scores: tuple[float, float]
    chance: tuple[float, float]
    difference: float
    low: float
    high: float
    p: float


@takes(runs=PATHS, probes=NAMES, rule=NAME, methods=NAMES)
def compare_localisation(
    runs: Paths,
    probes: Sequence[str] | None = None,
    rule: str | None = None,
    methods: Sequence[str] | None = None,
) -> list[LocalisationComparison]:
    """Compare the maps of two probes, or of two methods on one probe, image by image, by all scores that both have.

    runs: folder of a run that `attribute` has explained, or of two runs of the same images. probes, rule: as in compare;
    two, or one with two methods. methods: as attribution.csv calls them; by default all that both probes have. The test
    is paired over images, which may have maps of several classes. Raises BadInput.

        featcache.compare_localisation("runs/voc", rule="best map per loss", methods=["gradcam"])
    """
    opened = [open_run(run) for run in listed(runs)]
    if len(opened) > 2:
        raise BadInput("compare takes one or two runs")
    chosen = choose_probes(opened, probes, rule, one_is_enough=methods is not None and len(methods) == 2)
    tables = [_read(run) for run in opened] * (3 - len(opened))
    _check_alike(opened, tables)
    maps = [_by_side(table) for table in tables[:2]]
    result = []
    for one, other in _sides(opened, chosen, methods, maps):
        first, second = maps[0][one], maps[1][other]
        common = [key for key in first if key in second]
        if not common:
            raise BadInput(
                f"{' of '.join(one[::-1])} and {' of '.join(other[::-1])} have no map of the same image and class"
            )
        _check_same_objects(opened, tables, [(first[key], second[key]) for key in common])
        for score in (score for score in tables[0].scores if score in tables[1].scores):
            rows = [first[key] for key in common], [second[key] for key in common]
            result.append(LocalisationComparison((one, other), score.heading, *_compare(score, *rows)))
    if not result:
        raise BadInput(f"{' and '.join(str(run.path) for run in opened)} have no score of maps in common")
    if any(score.runs_backbone for score in tables[0].scores) and len(set(_links(opened, chosen))) > 1:
        say("note: one probe gives a softmax, the other sigmoids; scores of probabilities do not compare them fairly")
    return result


def _links(runs: Sequence[Run], probes: Sequence[str]) -> list[str]:
    """Return how the logits of each probe become probabilities."""
    places = zip([*runs] * (3 - len(runs)), probes, strict=False)
    return [next(load_specs(run.path, [probe], find_probes(run.path))).loss.link for run, probe in places]


def _check_alike(runs: Sequence[Run], tables: Sequence[Localisation]) -> None:
    """Raise BadInput unless two runs' maps were scored in the same way. Runs of earlier versions do not say how."""
    first, second = (table.facts for table in tables[:2])
    if not (first and second):
        return
    shared = [{text.partition(":")[0]: text for text in facts["scores"]} for facts in (first, second)]
    ways = [("parity", first["parity"] or "none", second["parity"] or "none")]
    ways += [("score", text, shared[1][name]) for name, text in shared[0].items() if name in shared[1]]
    for field, one, other in ways:
        if one != other:
            raise BadInput(
                f"runs {runs[0].path} and {runs[-1].path} cannot be compared: --{field} was {one} in one and {other} in the "
                "other; attribute both alike"
            )


def _check_same_objects(
    runs: Sequence[Run], tables: Sequence[Localisation], pairs: Sequence[tuple[MapRow, MapRow]]
) -> None:
    """Raise BadInput if maps of one id and class are about other objects. Images prepared differently may differ."""
    first, second = (table.facts.get("preprocessing") for table in tables[:2])
    for one, other in pairs if first == second else ():
        if one.get(REGION, 0) != other.get(REGION, 0):
            raise BadInput(
                f"runs {runs[0].path} and {runs[-1].path} cannot be compared: class {one['class']} of image {one['id']} covers "
                f"{one[REGION]:.0f} pixels in one and {other[REGION]:.0f} in the other, so these are other images"
            )


def _compare(score: type[Score], first: Sequence[MapRow], second: Sequence[MapRow]) -> tuple[Any, ...]:
    """Return the fields of a LocalisationComparison from `maps` on, for rows of the same maps."""
    column, level = score.columns
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if a[column] is not None and b[column] is not None]
    if not pairs:
        return 0, len(first), NEITHER, NEITHER, *(math.nan,) * 4
    sides = list(zip(*pairs, strict=True))
    means = [mean_with_influences(side, column) for side in sides]
    chance = [mean_with_influences(side, level)[0].item() for side in sides]
    scores = [mean.item() for mean, _ in means]
    test = paired_test(*((mean.item(), influence) for mean, influence in means))
    return len(pairs), len(first) - len(pairs), tuple(scores), tuple(chance), *test


def _read(run: Run) -> Localisation:
    """Read a run's maps. Raises BadInput if it has none."""
    if not (run.path / run.attribution_table).exists():
        raise BadInput(f"run {run.path} has no {run.attribution_table}: run featcache attribute first")
    return read_localisation(run)


def _by_side(table: Localisation) -> dict[Side, dict[tuple[str, ...], MapRow]]:
    """Return the rows of each side by their maps."""
    sides: dict[Side, dict[tuple[str, ...], MapRow]] = {}
    for row in table.rows:
        sides.setdefault((row["probe"], row["method"]), {})[tuple(row[name] for name in MAP)] = row
    return sides


def _sides(
    runs: Sequence[Run],
    probes: Sequence[str],
    methods: Sequence[str] | None,
    maps: Sequence[dict[Side, dict[tuple[str, ...], MapRow]]],
) -> list[tuple[Side, Side]]:
    """Return the sides to compare. Raises BadInput for another number of methods, and for maps that are not there."""
    both = [*probes] * (3 - len(probes))
    places = [*runs] * (3 - len(runs))
    held = [[method for one, method in own if one == probe] for own, probe in zip(maps, both, strict=True)]
    for run, probe, known in zip(places, both, held, strict=True):
        if not known:
            raise BadInput(
                f"{run.attribution_table} of run {run.path} has no maps of probe {probe}: attribute it first"
            )
    if methods is None:
        random = tuple(f"({note})" for note in (RANDOM_HEAD, RANDOM_BACKBONE))
        shared = [method for method in held[0] if method in held[1] and not method.endswith(random)]
        if not shared:
            raise BadInput(f"probes {' and '.join(both)} have no method in common; name one of each with --method")
        return [((both[0], method), (both[1], method)) for method in shared]
    if len(methods) not in (1, 2):
        raise BadInput(f"--localisation takes one or two methods, not {len(methods)}")
    pair = [*methods] * (3 - len(methods))
    for run, method, known in zip(places, pair, held, strict=True):
        if method not in known:
            raise BadInput(
                f"--method {method}: {run.attribution_table} of run {run.path} has no such maps{nearest(method, known)} (it has: "
                f"{', '.join(known)})"
            )
    return [((both[0], pair[0]), (both[1], pair[1]))]


def comparison_rows(comparisons: Sequence[LocalisationComparison]) -> tuple[list[str], list[list[str]]]:
    """Return (columns, rows of strings) for the comparisons of two sides, which the columns are called by."""
    probes, methods = zip(*comparisons[0].sides, strict=True)
    by_method = len({comparison.sides for comparison in comparisons}) > 1
    names, common = [f"{probe} {method}" for probe, method in comparisons[0].sides], "score"
    if by_method:
        names = list(probes)
    elif methods[0] == methods[1]:
        names, common = list(probes), f"score, {methods[0]}"
    elif probes[0] == probes[1]:
        names, common = list(methods), f"score, {probes[0]}"
    columns = [common, *(["method"] if by_method else []), *names]
    columns += ["uniform map %", "difference [95%]", "p", "maps", "empty"]
    rows = []
    for c in comparisons:
        mark = f" {MARK}" if c.maps < FEW * (c.maps + c.empty) else ""
        rows.append([f"{c.score} %", *([c.sides[0][1]] if by_method else []), *map(percent, c.scores)])
        # Chance is the same for both, but for scores of probabilities.
        rows[-1] += [" / ".join(dict.fromkeys(map(percent, c.chance))), percent(c.difference, c.low, c.high) + mark]
        rows[-1] += ["-" if math.isnan(c.p) else f"{c.p:.3f}", str(c.maps), str(c.empty)]
    return columns, rows
