"""Which checkpoints a command means."""

import os
import re
from collections.abc import Iterable, Sequence
from glob import glob, has_magic
from pathlib import Path

from featcache.errors import BadInput, of_the_system, shown


def checkpoint_files(words: Iterable[str | os.PathLike[str]]) -> list[str]:
    """Return the paths of checkpoints, each once.

    words: paths; patterns of paths, whose matches are put in order as people count (epoch_2 before epoch_10); text files
    (.txt) with such a word on each line, relative to the current folder. Raises BadInput for what names no file.
    """
    files: dict[str, None] = {}
    for word in words:
        text = os.fspath(word)
        if text.endswith(".txt"):
            files |= dict.fromkeys(checkpoint_files(_lines(text)))
        elif has_magic(text) and not os.path.lexists(text):
            matches = sorted(glob(text, recursive=True), key=_as_counted)
            if not matches:
                raise BadInput(
                    f"--backbone {shown(text)}: no file matches; put a pattern in quotes, relative to the current folder"
                )
            files |= dict.fromkeys(matches)
        elif not os.path.lexists(text):
            raise BadInput(f"--backbone {shown(text)}: there is no such file")
        else:
            files[text] = None
    if not files:
        raise BadInput("--backbone: no checkpoint is named")
    return list(files)


def names_several(words: Sequence[str]) -> bool:
    """Return whether words of --backbone mean a list of checkpoints, be it a list of one."""
    word = words[0]
    return len(words) > 1 or word.endswith(".txt") or (has_magic(word) and not os.path.lexists(word))


def stems(files: Sequence[str]) -> list[str]:
    """Return a short name for each checkpoint, without its suffix; with folders where names alone are not enough."""
    names = [Path(file).with_suffix("").parts for file in map(os.path.abspath, files)]
    length = next(
        n for n in range(1, 2 + max(map(len, names))) if len({name[-n:] for name in names}) == len(set(names))
    )
    # The suffix tells a.pth and a.safetensors apart no more; their ids do.
    return [re.sub(r"[^\w.-]+", "_", "_".join(name[-length:])).strip("_") for name in names]


def _lines(file: str) -> list[str]:
    """Return the lines of a list of checkpoints, without empty ones and comments."""
    try:
        lines = [line.strip() for line in Path(file).read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = of_the_system(error) if isinstance(error, OSError) else "it is no text"
        raise BadInput(f"--backbone {shown(file)}: cannot be read: {reason}") from None
    return [line for line in lines if line and not line.startswith("#")]


def _as_counted(path: str) -> list[tuple[int, str]]:
    """Return a key by which numbers in a path are put in order by their value."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path)]
