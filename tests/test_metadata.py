"""What setup.cfg says twice is said alike."""

import configparser
import re

from folders import CHECKOUT


def test_the_extra_for_tests_has_all_that_the_others_have():
    settings = configparser.ConfigParser()
    settings.read(CHECKOUT / "setup.cfg")
    extras = {
        name: {line.strip() for line in lines.splitlines() if line.strip()}
        for name, lines in settings["options.extras_require"].items()
    }
    packages = {name: {line for line in lines if not line.startswith("featcache[")} for name, lines in extras.items()}
    others = extras.keys() - {"test", "all"}
    assert set.union(*(packages[name] for name in others)) <= packages["test"]
    (everything,) = extras["all"]
    assert set(re.split(r"[\[\], ]+", everything)[1:-1]) == others
