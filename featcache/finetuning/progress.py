"""How far fine-tuning is: a bar on a terminal, a line for every epoch elsewhere."""

import sys
import time

import click
from tqdm import tqdm


class Progress:
    """Counts the images of all configurations. total: of them. shown: whether this process tells anything."""

    def __init__(self, total: int, shown: bool):
        self.total, self.shown, self._began, self._done, self._skipped = total, shown, time.monotonic(), 0, 0
        self.name = ""
        on_terminal = sys.stderr.isatty()
        self._bar = tqdm(total=total, unit="img", unit_scale=True, desc="finetune", disable=not (shown and on_terminal))
        self._lines = shown and not on_terminal

    def begin(self, name: str) -> None:
        """Say which configuration is trained now."""
        self.name = name
        self._bar.set_description(name)

    def skip(self, images: int) -> None:
        """Count images that an earlier run of the command has trained on."""
        self._skipped += images
        self._bar.update(images)
        self._bar.unpause()

    def tell(self, images: int, line: str) -> None:
        """Count images, and tell a line if it is not empty."""
        self._done += images
        self._bar.update(images)
        if line and self._lines:
            rate = self._done / max(time.monotonic() - self._began, 1e-9)
            left = (self.total - self._skipped - self._done) / max(rate, 1e-9)
            click.echo(f"{self.name}: {line}; {rate:.3g} img/s, {left / 60:.1f} min left", err=True)
        elif line and self.shown:
            self._bar.set_postfix_str(line)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()
