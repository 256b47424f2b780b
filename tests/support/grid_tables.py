"""The tables of docs/grid.md, made from the classes of the fields. Run as a script it writes them into the page."""

import re
import sys
from pathlib import Path

from featcache.probes.grids.fields import MISSING, part_fields, probe_fields
from featcache.probes.identity import REGISTRIES

PAGE = Path(__file__).parents[2] / "docs/grid.md"
PLACE = re.compile(r"(<!-- fields: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
HEADINGS, RULE = "| field | values | default | meaning |", "| --- | --- | --- | --- |"


def table(kinds):
    """Return a Markdown table of the fields of our own kinds of one sort. Types that agree in a field share its row."""
    types = {}
    for kind in kinds.own:
        for name, field in part_fields(kind).items():
            types.setdefault(_row(name, field), []).append(f"`{kind.word()}`")
    rows = [f"{row} {'all' if len(words) == len(kinds.own) else ', '.join(words)} |" for row, words in types.items()]
    return "\n".join([f"{HEADINGS} types |", f"{RULE} --- |", *rows])


def probe_table():
    """Return a Markdown table of the fields of a probe other than sections."""
    return "\n".join([HEADINGS, RULE, *(_row(name, field) for name, field in probe_fields().items())])


def _row(name, field):
    return f"| `{name}` | {_values(field)} | {_default(field)} | {field.info.description or ''} |"


def _values(field):
    return field.expected.removeprefix("one of ").replace("True, False", "true, false")


def _default(field):
    if field.default is MISSING:
        return "required"
    words = {meaning: word for word, meaning in field.words}
    value = words.get(field.default, field.default) if not isinstance(field.default, tuple) else list(field.default)
    return "" if value is None else f"`{str(value).lower() if isinstance(value, bool) else value}`"


def with_tables(text):
    """The page with its tables as they should be."""

    def filled(place):
        name = place[2]
        content = probe_table() if name == "probe" else table(REGISTRIES[name])
        return f"{place[1]}\n{content}\n\n{place[3]}"

    return PLACE.sub(filled, text)


if __name__ == "__main__":
    sys.stdout.write(f"{PAGE}\n")
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
