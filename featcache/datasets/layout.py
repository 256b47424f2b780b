"""What the layouts share: finding folders and lists, and saying what was expected where they are missing."""

import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from featcache.errors import BadInput, shown

# The suffixes that torchvision's ImageFolder takes.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".zip", ".gz", ".7z")

# How annotations write true and false.
FLAGS = dict.fromkeys(("1", "1.0", "true", "yes"), True) | dict.fromkeys(
    ("", "0", "0.0", "false", "no", "unspecified"), False
)


def require_folder(root: Path) -> None:
    """Raise BadInput if the dataset's root is no folder."""
    if not root.is_dir():
        raise BadInput(f"dataset folder not found: {root} (give it with --root, or set FEATCACHE_DATA)")


def wrong_layout(root: Path, problem: str, tree: str, *places: Path) -> BadInput:
    """Return BadInput that says the problem, names archives still to be unpacked, and draws the expected layout.

    tree: lines below the root. places: more folders in which archives may lie.
    """
    packed = [str(p) for place in (root, *places) for p in archives(place)]
    if packed:
        more = f" and {len(packed) - 1} more" if len(packed) > 1 else ""
        problem += f"; unpack {packed[0]}{more}"
    drawn = [f"  {line}" for line in tree.strip("\n").split("\n")]
    return BadInput(f"{problem}; expected this layout:", f"{root}/", *drawn)


def archives(folder: str | Path) -> list[Path]:
    """Return the archive files in a folder, sorted."""
    folder = Path(folder)
    return sorted(p for p in folder.iterdir() if p.name.endswith(ARCHIVE_SUFFIXES)) if folder.is_dir() else []


def folders_in(folder: str | Path) -> list[str]:
    """Return the names of the folders in a folder, sorted, without hidden ones."""
    if not Path(folder).is_dir():
        return []
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if not e.name.startswith(".") and e.is_dir())


def holds_images(folder: str | Path) -> bool:
    """Return whether images lie directly in a folder."""
    with os.scandir(folder) as entries:
        return any(_is_image(entry.name) for entry in entries)


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")


def images_in(folder: str | Path) -> list[str]:
    """Return the paths of the images below a folder, in torchvision's order: by folder, then by name."""
    return [
        os.path.join(where, name)
        for where, _, names in sorted(os.walk(folder, followlinks=True))
        for name in sorted(names)
        if _is_image(name)
    ]


def images_by_class(folder: str | Path, classes: Sequence[str]) -> list[tuple[str, int]]:
    """Return [(path, class index)] of a folder of class folders.

    Raises BadInput for a class that is not in `classes`, for a class folder without an image, and
    for images beside the class folders: sorting them into folders was interrupted.
    """
    labelled: list[tuple[str, int]] = []
    if holds_images(folder):
        raise BadInput(f"{folder} holds images beside class folders: move them into the folders of their classes")
    for name in folders_in(folder):
        inside = images_in(os.path.join(folder, name))
        if name not in classes:
            raise BadInput(f"{folder} holds the class {name!r}, which the other splits lack")
        if not inside:
            raise BadInput(f"class folder without an image: {os.path.join(folder, name)}")
        label = classes.index(name)
        labelled += [(path, label) for path in inside]
    return labelled


def first_file(candidates: Iterable[Path]) -> Path | None:
    """Return the first path that is a file, or None."""
    return next((path for path in candidates if path.is_file()), None)


def read_text(path: str | Path) -> str:
    """Return the text of a file, without the byte order mark that Windows programs put first.

    Raises FileNotFoundError, and BadInput if it cannot be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read {path}: {error}") from None


def read_lines(path: str | Path) -> list[tuple[int, str]]:
    """Return [(line number, text)] of lines that are not blank. Raises BadInput if the file is empty or unreadable."""
    try:
        text = read_text(path)
    except FileNotFoundError:
        raise BadInput(f"file not found: {path}") from None
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise BadInput(f"{path} is empty")
    return lines


def read_list(path: str | Path, separator: str | None = None) -> list[tuple[int, str, int | None]]:
    """Return [(line number, image, label or None)] of a list with lines `image` or `image label`.

    separator: between image and label; white space by default. Raises BadInput for a label that is no number.
    """
    rows = []
    for number, line in read_lines(path):
        image, *label = line.rsplit(separator, 1)
        index = whole_number(label[0]) if label else None
        if label and index is None:
            raise BadInput(f"{path} line {number}: {shown(label[0])} is no class index")
        rows.append((number, image.strip(), index))
    return rows


def whole_number(text: str) -> int | None:
    """Return the whole number that plain digits write, perhaps after a minus sign; None if they are too many or none."""
    text = text.strip()
    digits = text.removeprefix("-")
    # Eighteen digits always fit into 64 bits, and int() reads no more than 4,300.
    return int(text) if digits.isascii() and digits.isdecimal() and len(digits) <= 18 else None


def read_json(path: str | Path) -> Any:
    """Parse a JSON file. Raises BadInput with the line of a syntax error."""
    try:
        return parse_json(read_text(path), f"broken JSON in {path}")
    except FileNotFoundError:
        raise BadInput(f"annotation not found: {path}") from None


def parse_json(text: str, where: str, line: int | None = None) -> Any:
    """Parse JSON. Raises BadInput for a text that is no JSON, or that Python cannot read.

    where: what the message begins with. line: number of the text's line, if it is one line of a file.
    """
    at = f", line {line}" if line else ""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise BadInput(f"{where}, line {line or error.lineno}: {error.msg}") from None
    except RecursionError:
        raise BadInput(f"{where}{at}: it is nested too deeply") from None
    except ValueError:
        # The only other error: Python reads no numbers of more than 4,300 digits.
        raise BadInput(f"{where}{at}: a number has too many digits") from None


def read_entries(
    parsed: Any, fields: Mapping[str, Mapping[str, type]], path: str | Path
) -> dict[str, list[dict[str, Any]]]:
    """Return the lists of entries of a parsed annotation file, {list: entries}, after a check of their fields.

    fields: {list: {field: type}} that every entry needs; ids must differ within a list. Raises BadInput, which names
    the list and the entry.
    """
    for key, needed in fields.items():
        entries = parsed.get(key) if isinstance(parsed, dict) else None
        if not isinstance(entries, list) or not (entries or key == "annotations"):
            raise BadInput(f"annotation {path}: {key!r} must be a list with entries")
        seen: set[Any] = set()
        for n, entry in enumerate(entries):
            for field, kind in needed.items():
                value = entry.get(field) if isinstance(entry, dict) else None
                if not isinstance(value, kind) or isinstance(value, bool) or value == "":
                    raise BadInput(f"annotation {path}: {key} entry {n} lacks {field!r}, or it is no {kind.__name__}")
            if "id" in needed:
                if entry["id"] in seen:
                    raise BadInput(f"annotation {path}: {key} id {shown(entry['id'])} comes twice")
                seen.add(entry["id"])
    return {key: parsed[key] for key in fields}


def check_references(
    annotations: Iterable[dict[str, Any]], known: Mapping[str, Collection[int]], path: str | Path
) -> None:
    """Raise BadInput unless everything that annotations refer to exists. known: {field: ids}."""
    for n, annotation in enumerate(annotations):
        for field, ids in known.items():
            if annotation[field] not in ids:
                which = annotation.get("id", n)
                raise BadInput(
                    f"annotation {path}: annotation {shown(which)} has an unknown {field}: {shown(annotation[field])}"
                )


def read_flag(value: Any) -> bool:
    """Return a flag of an annotation as bool: 0 or 1, true or false, yes or no. Empty and `Unspecified` are false.

    Many programs that write VOC's XML put `Unspecified` where nobody was asked. Raises ValueError for other words.
    """
    word = "" if value is None else str(value).strip().lower()
    if word not in FLAGS:
        raise ValueError(f"{shown(value)} is no flag")
    return FLAGS[word]


def known_splits(splits: Sequence[str] | None, known: Sequence[str], dataset: object) -> tuple[str, ...]:
    """Return the splits asked for, or all. Raises BadInput for one that the dataset does not have.

    dataset: its name, or where it lies, for the message.
    """
    for split in splits or ():
        if split not in known:
            raise BadInput(f"{dataset} has no split {split!r} (it has {', '.join(known)})")
    return tuple(splits or known)
