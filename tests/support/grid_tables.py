"""The tables of docs/grid.md, made from the classes of the fields. Run as a script it writes them into the page."""

import re
import sys
from pathlib import Path

from featcache.probes.grids.schema import probe_table, table
from featcache.probes.identity import REGISTRIES

PAGE = Path(__file__).parents[2] / "docs/grid.md"
PLACE = re.compile(r"(<!-- fields: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


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
