"""What a command tells on standard error while it works: how far it is, and notices.

On a terminal a bar shows how far it is. Elsewhere, such as in the log of a Slurm job, a line every 30 seconds does,
without carriage returns. --json, --quiet or the environment's FEATCACHE_PROGRESS choose something else.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

import click

from featcache.errors import BadInput, shown

if TYPE_CHECKING:
    from tqdm import tqdm

T = TypeVar("T")
VARIABLE = "FEATCACHE_PROGRESS"
MODES = ("bar", "lines", "json", "quiet")
# Between two lines of a log, and between two looks at the bottleneck for a bar.
LINE_SECONDS, BAR_SECONDS = 30.0, 5.0
# What takes no longer leaves no line in a log.
SHORT_SECONDS = 2.0
# The rate is that of so many lines.
LINES = 10
# What is counted in such numbers that a bar writes 12.8M for 12,800,000.
SCALED = ("B", "step")

# The mode that an option of the command line chose, if any.
_chosen: list[str] = []


def choose(mode: str) -> None:
    """Choose one of MODES, whatever the environment says."""
    _chosen[:] = [mode]


@contextmanager
def choosing() -> Iterator[None]:
    """Forget at the end of the block what choose() has chosen in it."""
    before = list(_chosen)
    try:
        yield
    finally:
        _chosen[:] = before


def mode() -> str:
    """Return which of MODES holds. Raises BadInput if the environment names another."""
    chosen = _chosen[0] if _chosen else os.environ.get(VARIABLE)
    if not chosen:
        return "bar" if sys.stderr is not None and sys.stderr.isatty() else "lines"
    if chosen not in MODES:
        raise BadInput(f"the environment's {VARIABLE} is {shown(chosen)}, and must be one of {', '.join(MODES)}")
    return chosen


def say(line: str) -> None:
    """Print a notice, or a warning, which begins with `warning:` and is printed in quiet too."""
    how = mode()
    if how == "json":
        click.echo(json.dumps({"time": _now(), "message": line}), err=True)
    elif how != "quiet" or line.startswith("warning:"):
        click.echo(line, err=True)


def _is_first() -> bool:
    """Return whether this process is alone, or the first of those that share a command."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


class Progress:
    """How far a piece of work is, and which of its phases takes the longest.

    what: the work in a word. total: how much there is to do. unit: what is counted. done: how much is done already.
    fleeting: a bar comes after 2 s, and goes at the end. Of the processes that torchrun starts, only the first tells
    anything.

        with Progress("extract", len(images), unit="img") as progress:
            for batch in progress.waiting("decode", batches, "forward"):
                ...
                progress.update(len(batch))
    """

    def __init__(self, what: str, total: int, *, unit: str, done: int = 0, fleeting: bool = False) -> None:
        self.what, self.total, self.unit, self.done = what, total, unit, done
        self._fleeting, self._mode, self._note = fleeting, "quiet", ""
        self._bar: tqdm | None = None
        self._begun = time.monotonic()
        # What was done before; when how much was done, at the last lines.
        self._found, self._past = done, [(self._begun, done)]
        # The seconds of each phase that is over, the phase that is not, and since when. One tuple, since a thread reads it.
        self._timed: tuple[dict[str, float], str | None, float] = ({}, None, self._begun)
        # The seconds of each phase when the bottleneck was last told, and when that was.
        self._told, self._told_at = dict[str, float](), self._begun - BAR_SECONDS
        self._has_lines, self._ended = False, threading.Event()
        # A thread prints the lines, so that they come in time however long a step takes.
        self._thread = threading.Thread(target=self._print_lines, daemon=True)

    def __enter__(self) -> Self:
        """Begin to tell."""
        self._mode = mode() if _is_first() else "quiet"
        if self._mode == "bar":
            from tqdm import tqdm

            self._bar = tqdm(
                desc=self.what, total=self.total, initial=self.done, unit=self.unit, unit_scale=self.unit in SCALED,
                delay=SHORT_SECONDS if self._fleeting else 0, leave=not self._fleeting,
            )  # fmt: skip
        elif self._mode != "quiet":
            self._thread.start()
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        """Tell how long all took, unless it was short or an error ended it."""
        if self._bar is not None:
            self._bar.close()
        if self._thread.is_alive():
            self._ended.set()
            self._thread.join()
        took = time.monotonic() - self._begun
        if error_type is None and (self._mode == "json" or self._has_lines or took >= SHORT_SECONDS):
            self._print(ended=True)

    def update(self, count: int = 1) -> None:
        """Count what was done."""
        self.done += count
        if self._bar is not None:
            now = time.monotonic()
            if now - self._told_at >= BAR_SECONDS:
                name, _ = self._bottleneck(now)
                parts = (self._note, f"bottleneck: {name}" if name else "")
                self._bar.set_postfix_str("; ".join(filter(None, parts)), refresh=False)
            self._bar.total = self.total
            self._bar.update(count)

    def reach(self, done: int) -> None:
        """Say how much is done, by all processes together."""
        self.update(done - self.done)

    def skip(self, count: int) -> None:
        """Count what was done before and takes no time now, so that it does not raise the rate."""
        self.update(count)
        self._found, self._past = self._found + count, [(at, done + count) for at, done in self._past]
        if self._bar is not None:
            self._bar.unpause()

    def note(self, text: str) -> None:
        """Show a text beside the bar; in a log it comes at once, in a line of its own."""
        self._note = text
        if self._bar is not None:
            self._bar.set_postfix_str(text)
        else:
            self._print(note=text)

    def phase(self, name: str) -> None:
        """Say what this process does, or waits for, from now on; until then it was the phase before."""
        now = time.monotonic()
        self._timed = (self._spent(now), name, now)

    def waiting(self, phase: str, items: Iterable[T], otherwise: str) -> Iterator[T]:
        """Yield items. Waiting for one is a phase, and what is done with it is another."""
        self.phase(phase)
        for item in items:
            self.phase(otherwise)
            yield item
            self.phase(phase)
        self.phase(otherwise)

    def _spent(self, now: float) -> dict[str, float]:
        """Return the seconds of each phase until now."""
        spent, phase, since = self._timed
        return spent if phase is None else spent | {phase: spent.get(phase, 0.0) + now - since}

    def _bottleneck(self, now: float) -> tuple[str | None, float]:
        """Return the longest phase since the last time, and its share of all phases."""
        spent = self._spent(now)
        recent = {name: seconds - self._told.get(name, 0.0) for name, seconds in spent.items()}
        self._told, self._told_at = spent, now
        if not any(recent.values()):
            return None, 0.0
        name = max(recent, key=lambda phase: recent[phase])
        return name, recent[name] / sum(recent.values())

    def _print_lines(self) -> None:
        while not self._ended.wait(LINE_SECONDS):
            self._print()

    def _print(self, note: str = "", ended: bool = False) -> None:
        """Print a line of a log. ended: it is the last one, which is about all of the work."""
        if self._mode not in ("lines", "json"):
            return
        now, done = time.monotonic(), self.done
        since, before = (self._begun, self._found) if ended else self._past[0]
        self._past, self._has_lines = [*self._past, (now, done)][-LINES - 1 :], True
        if ended:
            self._told = {}
        rate = (done - before) / max(now - since, 1e-9)
        phase, share = self._bottleneck(now)
        print_line = self._as_json if self._mode == "json" else self._as_text
        # A log that cannot be written any more does not end the work.
        with suppress(OSError, ValueError):
            click.echo(print_line(now - self._begun, done, rate, phase, share, note, ended), err=True)

    def _as_json(
        self, took: float, done: int, rate: float, phase: str | None, share: float, note: str, ended: bool
    ) -> str:
        left = (self.total - done) / rate if rate > 0 else None
        line: dict[str, Any] = {
            "time": _now(), "what": self.what, "done": done, "total": self.total, "unit": self.unit,
            "rate": float(f"{rate:.6g}"), "elapsed_s": round(took, 1), "eta_s": None if left is None else round(left, 1),
            "bottleneck": phase, "share": round(share, 3) if phase else None, "ended": ended,
        }  # fmt: skip
        return json.dumps(line | ({"note": note} if note else {}))

    def _as_text(
        self, took: float, done: int, rate: float, phase: str | None, share: float, note: str, ended: bool
    ) -> str:
        divisor, unit = (1e6, "MB") if self.unit == "B" else (1, self.unit)
        parts = [f"{done / divisor:,.0f} of {self.total / divisor:,.0f} {unit}"]
        if self.total:
            parts[0] += f" ({100 * done / self.total:.0f}%)"
        if ended:
            parts[0] += f" in {_duration(took)}"
        parts.append(f"{_figures(rate / divisor)} {unit}/s")
        if not ended:
            parts.append(f"ETA {_duration((self.total - done) / rate) if rate > 0 else 'unknown'}")
        if phase:
            parts.append(f"bottleneck: {phase} ({100 * share:.0f}%)")
        # The zone is left out: people read this beside the clock of the machine.
        line = f"{datetime.now():%Y-%m-%d %H:%M:%S} {self.what}: {', '.join(parts)}"
        return f"{line}; {note}" if note else line


def _now() -> str:
    """Return the time with its zone, in ISO 8601."""
    return datetime.now().astimezone().isoformat(timespec="seconds")


def _duration(seconds: float) -> str:
    """Return a duration as h:mm:ss."""
    return str(timedelta(seconds=round(seconds)))


def _figures(number: float) -> str:
    """Return a number with three figures, or as a whole number if it has more."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"
