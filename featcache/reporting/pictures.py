"""Sheets as PNG files."""

import re
from collections.abc import Iterator, Sequence
from functools import cache
from os import PathLike
from pathlib import Path

import numpy as np

from featcache.atomic import local_path
from featcache.errors import BadInput, of_the_system, printable, without_middle
from featcache.probes.runs.run import open_run
from featcache.reporting.localisation import read_localisation
from featcache.reporting.overlay import key
from featcache.reporting.sheets import Sheet, read_sheets

try:
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont
    from PIL.PngImagePlugin import PngInfo
except ImportError:
    raise BadInput("pictures need matplotlib: pip install 'featcache[report]'") from None

# The folder in a run.
FOLDER = "pictures"
# A text in the files, by which they are known.
MARK = ("Software", "featcache")
# Sides of a map on a sheet, in pixels: smaller maps are enlarged by a whole factor, larger ones are made smaller.
LEAST, MOST = 192, 448
MARGIN, GAP = 20, 14
TITLE, TEXT, SMALL = 20, 15, 13
INK, GREY = (28, 36, 48), (85, 96, 110)
EXPLANATION = (
    "Every map has a scale of its own, to the 99.5th percentile of its absolute values.",
    "Boxes, or contours of masks: thick and green for the class explained, thin and white for others, dashed if difficult.",
)
COLOURED = (
    "In a column of colours, a pixel has the colour that the network looks for there, and is opaque where that speaks "
    "strongly for the class."
)


def write_pictures(run: str | PathLike, folder: str | PathLike | None = None) -> list[Path]:
    """Write the sheets of the maps that attribute kept as PNG files, and return their paths.

    run: folder. folder: where to write, by default `pictures` in the run. Sheets of before are deleted there; they are
    known by a mark inside. Raises BadInput.

        featcache.attribute("runs/voc", images=["000001", "000004"])
        write_pictures("runs/voc")
    """
    opened = open_run(run)
    place = opened.path / FOLDER if folder is None else check_folder(folder)
    sheets = read_sheets(opened, read_localisation(opened))
    paths = [place / f"{number:03d}-{_file_name(sheet)}.png" for number, sheet in enumerate(sheets, 1)]
    try:
        place.mkdir(parents=True, exist_ok=True)
        for old in filter(_is_sheet, place.glob("*.png")):
            old.unlink()
        mark = PngInfo()
        mark.add_text(*MARK)
        for path, sheet in zip(paths, sheets, strict=True):
            draw_sheet(sheet).save(path, pnginfo=mark)
    except OSError as error:
        raise BadInput(f"cannot write {place}: {of_the_system(error)}") from None
    return paths


def check_folder(folder: str | PathLike) -> Path:
    """Return the path of a folder for pictures, which need not exist. Raises BadInput for anything else."""
    place = local_path(folder, "--pictures")
    if place.exists() and not place.is_dir():
        raise BadInput(f"--pictures {place}: it is a file; name a folder")
    return place


def _is_sheet(path: Path) -> bool:
    """Whether a file is a sheet of before, and no picture of somebody else's."""
    try:
        with Image.open(path) as image:
            return image.info.get(MARK[0]) == MARK[1]
    except (OSError, SyntaxError, ValueError):
        return False


def _file_name(sheet: Sheet) -> str:
    """Name a sheet so that any file system takes it: letters, digits, points and dashes."""
    return without_middle(re.sub(r"[^\w.-]+", "_", sheet.title, flags=re.ASCII).strip("_."), 80)


def draw_sheet(sheet: Sheet) -> Image.Image:
    """Draw a sheet: the photograph on the left, beside it a row of maps for each probe, with a column for each method."""
    side = _side(sheet.size)
    photograph = 0 if sheet.picture is None else side + GAP
    left, step = MARGIN + photograph, side + GAP
    right = left + len(sheet.methods) * step
    width = max(right - GAP, 560) + MARGIN
    heads = [list(_wrapped(method, TEXT, side)) for method in sheet.methods]
    lines = max(len(panel.caption.splitlines()) for panel in sheet.panels.values())
    y = MARGIN
    texts: list[tuple[int, int, str, int, tuple[int, int, int]]] = []
    for text, size, colour in ((sheet.title, TITLE, INK), (sheet.reason, TEXT, GREY)):
        for line in _wrapped(text, size, width - 2 * MARGIN):
            texts.append((MARGIN, y, line, size, colour))
            y += _height(size)
    y += GAP
    for column, head in enumerate(heads):
        texts += [(left + column * step, y + n * _height(TEXT), line, TEXT, INK) for n, line in enumerate(head)]
    y += max(map(len, heads)) * _height(TEXT) + 4
    pasted: list[tuple[int, int, np.ndarray]] = []
    for row, (probe, name) in enumerate(sheet.probes.items()):
        for line in _wrapped(name, TEXT, width - MARGIN - left):
            texts.append((left, y, line, TEXT, GREY))
            y += _height(TEXT)
        y += 2
        if row == 0 and sheet.picture is not None:
            pasted.append((MARGIN, y, sheet.framed(sheet.picture, side)))
        for column, method in enumerate(sheet.methods):
            if panel := sheet.panels.get((probe, method)):
                x = left + column * step
                pasted.append((x, y, sheet.framed(panel.pixels, side)))
                for n, line in enumerate(panel.caption.splitlines()):
                    texts.append((x, y + side + 2 + n * _height(SMALL), line, SMALL, INK))
        y += side + 4 + lines * _height(SMALL) + GAP
    y = _explain(texts, pasted, y, width, sheet.coloured)
    drawn = Image.new("RGB", (width, y + MARGIN), "white")
    for x, top, pixels in pasted:
        drawn.paste(Image.fromarray(pixels), (x, top))
    pen = ImageDraw.Draw(drawn)
    for x, top, text, size, colour in texts:
        pen.text((x, top), text, fill=colour, font=_font(size))
    return drawn


def _explain(texts: list, pasted: list, y: int, width: int, coloured: bool) -> int:
    """Add the key of the colours, and what boxes and scales mean. Returns where they end."""
    bar = key(180, 12)
    beside = MARGIN
    for text in ("against the class", None, "for it"):
        if text is None:
            pasted.append((beside, y + 3, bar))
            beside += bar.shape[1] + 8
        else:
            texts.append((beside, y, text, SMALL, GREY))
            beside += round(_font(SMALL).getlength(text)) + 8
    y += _height(SMALL) + 4
    for sentence in (*EXPLANATION, *([COLOURED] if coloured else [])):
        for line in _wrapped(sentence, SMALL, width - 2 * MARGIN):
            texts.append((MARGIN, y, line, SMALL, GREY))
            y += _height(SMALL)
    return y


def _side(size: int) -> int:
    """Return the side at which maps of a size are drawn."""
    return size * -(-LEAST // size) if size < LEAST else min(size, MOST)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")), size)


def _height(size: int) -> int:
    """The height of a line of text, in pixels."""
    return round(1.4 * size)


def _wrapped(text: str, size: int, width: int) -> Iterator[str]:
    """Break text into lines of at most so many pixels, after spaces and colons, else anywhere."""
    line = ""
    for part in re.findall(r"[^\s:,_]*[\s:,_]*", printable(text)):
        for piece in _fitting(part, size, width):
            if line and _font(size).getlength((line + piece).rstrip()) > width:
                yield line.rstrip()
                line = ""
            line += piece
    if line:
        yield line.rstrip()


def _fitting(part: str, size: int, width: int) -> Sequence[str]:
    """Cut a word that is longer than a line."""
    most = max(1, int(len(part) * width / max(_font(size).getlength(part), 1)))
    return [part] if len(part) <= most else [part[at : at + most] for at in range(0, len(part), most)]
