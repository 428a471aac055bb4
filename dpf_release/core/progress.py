"""A progress line on standard error: a live bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

LOG_EVERY_SECONDS = 15.0


def announce(text: str) -> None:
    """A line on standard error."""
    Console(stderr=True).print(text, markup=False, highlight=False, soft_wrap=True)


class Progress:
    """Counts what is done; shows rate, time left and the latest facts (a loss, say)."""

    def __init__(self, title: str, total: int, unit: str = "images", shown: bool = True) -> None:
        self._title, self._total, self._unit = title, total, unit
        self._done = self._before = 0
        self._started = self._logged = time.monotonic()
        self._facts = ""
        self._console = Console(stderr=True, quiet=not shown)
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(title, total=total, facts="")

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._bar.stop()
        if kind is None and not self._console.is_terminal:
            self._log()

    def skip(self, count: int) -> None:
        """What was done before this run: it counts as done, but not towards the rate."""
        self._before += count
        self.advance(count)

    def advance(self, count: int, **facts: float) -> None:
        """That many more are done; the facts replace the ones shown."""
        self._done += count
        if facts:
            self._facts = " ".join(f"{name} {value:.4g}" for name, value in facts.items())
        self._bar.update(self._task, advance=count, facts=f"{self._facts} {self._rate:.0f} {self._unit}/s")
        if not self._console.is_terminal and time.monotonic() - self._logged > LOG_EVERY_SECONDS:
            self._log()

    @property
    def _rate(self) -> float:
        return (self._done - self._before) / max(time.monotonic() - self._started, 1e-9)

    def _log(self) -> None:
        self._logged = time.monotonic()
        left = (self._total - self._done) / max(self._rate, 1e-9)
        text = (
            f"{self._title}: {self._done}/{self._total} {self._unit}, {self._facts + ', ' if self._facts else ''}"
            f"{self._rate:.0f} {self._unit}/s, {left:.0f} s left"
        )
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
