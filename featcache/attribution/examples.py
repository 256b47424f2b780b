"""Which images and classes have their maps kept for pictures: --images and --examples."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from featcache.arguments import Expected
from featcache.attribution.batch import Source
from featcache.attribution.targets import Target
from featcache.errors import BadInput, nearest, shown
from featcache.store.manifest import split_of

# How many images a rule chooses where no number stands behind it.
COUNT = 3
BEST, WORST, RIGHT, WRONG = "best", "worst", "right", "wrong"
RULES = (BEST, WORST, RIGHT, WRONG)


EXAMPLES = Expected(
    "a number or a list of rules",
    lambda value: (
        isinstance(value, int | str) or (isinstance(value, list | tuple) and all(isinstance(v, str) for v in value))
    ),
)


class Rule(NamedTuple):
    """A rule by which examples are chosen once all is scored: one of RULES, and how many images it chooses at most."""

    word: str
    most: int


class Examples(NamedTuple):
    """What `--examples` says: the first images, and those of rules."""

    first: int
    rules: tuple[Rule, ...] = ()


class Measured(NamedTuple):
    """What rules look at, of one probe, for each of T targets.

    by: whose scores these are, for people. heading: of the score. scores: T floats, NaN where a map has none.
    probabilities: of the class. right: 1 where the probe says the class, else 0; both NaN where that is not known.
    higher_is_better: of the score.
    """

    probe: str
    by: str
    heading: str
    scores: Sequence[float]
    probabilities: Sequence[float]
    right: Sequence[float]
    higher_is_better: bool = True


def parse_examples(given: int | str | Sequence[str]) -> Examples:
    """Read a number of first images, or rules as in "best:3,worst:3,right,wrong", or both. Raises BadInput."""
    words = [str(given)] if isinstance(given, int) else given.split(",") if isinstance(given, str) else list(given)
    first, rules = 0, list[Rule]()
    for word in words:
        name, colon, count = word.strip().partition(":")
        number = count if colon else str(COUNT)
        if name.isascii() and name.isdigit() and not colon:
            first = int(name)
        elif name not in RULES:
            raise BadInput(
                f"--examples {shown(word)}: expected a number of first images, or rules of {', '.join(RULES)}, each with a "
                f"number behind it as in best:3{nearest(name, RULES)}"
            )
        elif not (number.isascii() and number.isdigit() and 1 <= int(number) <= 1000):
            raise BadInput(f"--examples {shown(word)}: how many images {name} chooses is a number from 1 to 1000")
        else:
            rules.append(Rule(name, int(number)))
    return Examples(first, tuple(dict.fromkeys(rules)))


def only(images: Iterable[str], source: Source, targets: Sequence[Target]) -> list[Target]:
    """Return the targets in some images, in their order in the split.

    images: ids. Raises BadInput for an id that the split does not have, and for an image in which nothing is explained.
    """
    split = source.split
    if source.name != split.name and not source.stored:
        raise BadInput(f"--images names images, and {source.name} are explained; take --examples or --limit")
    rows = {id: row for row, id in enumerate(split.ids)}
    wanted = list(dict.fromkeys(images))
    if not wanted:
        raise BadInput("--images: it names no image")
    for id in wanted:
        if id not in rows:
            raise BadInput(f"--images {shown(id)}: split {split.name} has no such image{_elsewhere(id, source)}")
    explained = {target.row for target in targets}
    for id in wanted:
        if rows[id] not in explained:
            raise BadInput(
                f"--images {shown(id)}: nothing is explained in this image: it shows no object that is not difficult where "
                "the backbone looks"
            )
    chosen = {rows[id] for id in wanted}
    return [target for target in targets if target.row in chosen]


def _elsewhere(id: str, source: Source) -> str:
    """Say in which split of the store an image is, or which id of this split is the nearest."""
    store, own = source.split.store, source.split.name
    for name in store.manifest.splits:
        if name not in (own, split_of(own)) and split_of(name) == name and id in store[name].ids:
            return f"; it is in split {name}: give --split {name}"
    return nearest(id, source.split.ids)


def choose(rules: Iterable[Rule], targets: Sequence[Target], measured: Measured) -> dict[int, str]:
    """Choose examples by rules: {number of a target: why it was chosen}, in the order of the rules.

    An image is chosen once by each rule.
    best and worst go by the score; right and wrong take the predictions with the highest and the lowest probability.
    """
    reasons: dict[int, list[str]] = {}
    for rule in rules:
        for number, reason in _chosen(rule, targets, measured):
            reasons.setdefault(number, []).append(reason)
    return {number: "; ".join(own) for number, own in reasons.items()}


def _chosen(rule: Rule, targets: Sequence[Target], measured: Measured) -> list[tuple[int, str]]:
    """Return the numbers of the targets that a rule chooses, with the reason."""
    by_score = rule.word in (BEST, WORST)
    values = np.asarray(measured.scores if by_score else measured.probabilities, float)
    fits = np.isfinite(values)
    if not by_score:
        fits &= np.asarray(measured.right) == (rule.word == RIGHT)
    highest = (rule.word == BEST) == measured.higher_is_better if by_score else rule.word == RIGHT
    order = np.argsort(-values if highest else values, kind="stable")
    chosen, rows = list[tuple[int, str]](), set[int]()
    for number in order[fits[order]].tolist():
        row = targets[number].row
        if len(rows) < rule.most and row not in rows:
            rows.add(row)
            percent = f"{100 * values[number]:.0f}%"
            if by_score:
                chosen.append(
                    (number, f"{'highest' if highest else 'lowest'} {measured.heading} ({percent}) of {measured.by}")
                )
            else:
                chosen.append((number, f"{rule.word} by probe {measured.probe} (probability {percent})"))
    return chosen


def missing(rules: Iterable[Rule], targets: Sequence[Target], measured: Measured) -> list[str]:
    """Say which rules found nothing, in a line for each."""
    lines = []
    for rule in rules:
        if not _chosen(rule, targets, measured):
            known = rule.word in (BEST, WORST) or not all(map(math.isnan, measured.right))
            why = "there is none" if known else "its logits need the feature that it reads, which the store lacks"
            lines.append(f"notice: --examples {rule.word}, by probe {measured.probe}: {why}")
    return lines
