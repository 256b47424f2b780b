"""The documentation: every page is found from the README, and every link leads to a file."""

import re

import pytest
from folders import CHECKOUT

PAGES = sorted([*CHECKOUT.glob("*.md"), *CHECKOUT.glob("docs/**/*.md"), *CHECKOUT.glob("pipelines/**/*.md")])


def linked(page):
    """The files that a page links to, or shows; a heading after # is left off, links to the web are left out."""
    targets = re.findall(r"\]\(([^)#\s]+)", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M))
    return [(page.parent / target).resolve() for target in targets if "://" not in target]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(CHECKOUT)))
def test_links_lead_to_files(page):
    assert [target for target in linked(page) if not target.exists()] == []


def test_every_page_is_found_from_the_readme():
    found, pages = set(), [CHECKOUT / "README.md"]
    while pages:
        new = {file for file in linked(pages.pop()) if file.is_file()} - found
        found |= new
        pages += [file for file in new if file.suffix == ".md"]
    docs = {file for file in (CHECKOUT / "docs").rglob("*") if file.is_file()}
    assert docs and docs <= found, sorted(docs - found)
