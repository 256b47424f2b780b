"""Packages of somebody else that bring kinds to featcache, and processes that find them installed."""

import os
import subprocess
import sys
from pathlib import Path

PROJECT = """[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "{name}"
version = "1.0"
dependencies = ["featcache"]
"""


def install(folder, source, kinds, name="plugin"):
    """Write a package of one module, and install it into `folder`/site, beside those installed there before.

    source: of the module. kinds: {group of entry points: {name of a kind: its class in the source}}, such as
    {"featcache.heads": {"quadratic": "Quadratic"}}.
    """
    project = Path(folder) / name
    (project / name).mkdir(parents=True)
    (project / name / "__init__.py").write_text(source)
    text = PROJECT.format(name=name)
    for group, classes in kinds.items():
        text += f'\n[project.entry-points."{group}"]\n'
        text += "".join(f'{kind} = "{name}:{made}"\n' for kind, made in classes.items())
    (project / "pyproject.toml").write_text(text)
    offline = ["--quiet", "--disable-pip-version-check", "--no-index", "--no-deps", "--no-build-isolation"]
    site = Path(folder) / "site"
    subprocess.run([sys.executable, "-m", "pip", "install", *offline, "--target", site, project], check=True)


def with_plugins(folder, *words):
    """Run featcache where the packages of `folder`/site are installed: (exit code, stdout, stderr)."""
    done = subprocess.run(
        [sys.executable, "-m", "featcache", *map(str, words)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(folder) / "site")},
    )
    return done.returncode, done.stdout, done.stderr
