"""The demo on a terminal: 80 columns are enough, and where it is not a terminal it is plain text."""

import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from tensorfork.demo.sizes import show_seconds, show_speed

INDENT = (0, 0, 0, 2)
MARK = 10
"""Columns of the word that a line begins with."""


class Screen:
    """Where the story is told."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)

    def title(self, text: str) -> None:
        """An act begins."""
        self._console.print()
        self._console.rule(text, align="left", style="cyan")

    def line(self, who: str, text: str) -> None:
        """What somebody did."""
        first, *rest = textwrap.wrap(text, max(20, self._console.width - MARK - 1), break_on_hyphens=False)
        self._console.print(Text.assemble((f"{who:<{MARK}} ", "bold"), first))
        for more in rest:
            self._console.print(Text(" " * (MARK + 1) + more))

    @contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """While something takes its time."""
        with self._console.status(text) if self._console.is_terminal else nullcontext():
            yield

    @contextmanager
    def moving(self, what: str) -> Iterator[Callable[[int, int], None]]:
        """A bar for bytes that move; gives what is to be called with those that have, and those there are."""
        columns = (
            TextColumn(f"{what:<{MARK}}", style="bold"),
            BarColumn(bar_width=36),
            DownloadColumn(),
            TextColumn("{task.fields[speed]}"),
        )
        since = time.perf_counter()

        with Progress(*columns, console=self._console, disable=not self._console.is_terminal) as bar:
            task = bar.add_task(what, total=None, speed="")

            def moved(nbytes: int, total: int) -> None:
                speed = show_speed(nbytes, time.perf_counter() - since)
                bar.update(task, completed=nbytes, total=total, speed=speed)

            yield moved

    def phases(self, report: Mapping[str, Any]) -> None:
        """Where a fork's time went."""
        table = _table("phase", ">time", ">share", "")
        total = report["total"]
        for name, seconds in report["seconds"].items():
            speed = show_speed(report["nbytes"], seconds) if name == "transfer" else ""
            table.add_row(name, show_seconds(seconds), f"{seconds / total:.0%}", speed)
        table.add_section()
        table.add_row("all", show_seconds(total), "", show_speed(report["nbytes"], total), style="bold")
        self._show(table)

    def similarities(self, inputs: Sequence[str], ours: Sequence[float], theirs: Sequence[float]) -> None:
        """What the models make of their inputs, on both sides."""
        table = _table(f"cosine to {inputs[0]!r}", ">seed", ">fork")
        for text, one, other in zip(inputs[1:], theirs[1:], ours[1:], strict=True):
            table.add_row(Text(text), f"{one:.6f}", f"{other:.6f}")
        self._show(table)

    def comparison(self, rows: Sequence[tuple[str, float, int]]) -> None:
        """Ways to the same bytes: each with what it is, its seconds, and its bytes. The fork comes first."""
        table = _table("the same bytes into a process", ">time", ">speed", ">beside the fork")
        for i, (what, seconds, nbytes) in enumerate(rows):
            beside = _beside(seconds, rows[0][1]) if i else ""
            table.add_row(what, show_seconds(seconds), show_speed(nbytes, seconds), beside)
        self._show(table)

    def end(self, good: bool, text: str) -> None:
        """The last word."""
        self._console.print()
        self.verdict(good, text)

    def verdict(self, good: bool, text: str) -> None:
        """What it comes to."""
        self._console.print(Text(text), style="bold green" if good else "bold red")

    def _show(self, table: Table) -> None:
        self._console.print()
        self._console.print(Padding(table, INDENT, expand=False))
        self._console.print()


def _beside(seconds: float, fork: float) -> str:
    """How another way's time compares."""
    if 0.95 < seconds / fork < 1.05:
        return "about the same"
    return f"{fork / seconds:.1f} x faster" if seconds < fork else f"{seconds / fork:.1f} x slower"


def _table(*columns: str) -> Table:
    """A column whose name begins with > is for numbers."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="dim")
    for name in columns:
        table.add_column(name.removeprefix(">"), justify="right" if name.startswith(">") else "left")
    return table
