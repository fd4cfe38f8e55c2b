"""The demo's output: at most 80 columns are needed; where the output is no terminal, it is plain text."""

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

from tensorfork.demo.sizes import format_seconds, format_speed

INDENT = (0, 0, 0, 2)
LABEL_WIDTH = 10
"""Columns of the word that a line begins with."""


class Screen:
    """Prints what the demo does."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)

    def title(self, text: str) -> None:
        """A heading for the steps that follow."""
        self._console.print()
        self._console.rule(text, align="left", style="cyan")

    def line(self, who: str, text: str) -> None:
        """What `who` did; wrapped lines are indented."""
        first, *rest = textwrap.wrap(text, max(20, self._console.width - LABEL_WIDTH - 1), break_on_hyphens=False)
        self._console.print(Text.assemble((f"{who:<{LABEL_WIDTH}} ", "bold"), first))
        for more in rest:
            self._console.print(Text(" " * (LABEL_WIDTH + 1) + more))

    @contextmanager
    def status(self, text: str) -> Iterator[None]:
        """Inside, a spinner with this text, where the output is a terminal."""
        with self._console.status(text) if self._console.is_terminal else nullcontext():
            yield

    @contextmanager
    def progress_bar(self, what: str) -> Iterator[Callable[[int, int], None]]:
        """Inside, a progress bar. Yields the function that updates it, given the bytes moved and the bytes in all."""
        columns = (
            TextColumn(f"{what:<{LABEL_WIDTH}}", style="bold"),
            BarColumn(bar_width=36),
            DownloadColumn(),
            TextColumn("{task.fields[speed]}"),
        )
        start = time.perf_counter()

        with Progress(*columns, console=self._console, disable=not self._console.is_terminal) as bar:
            task = bar.add_task(what, total=None, speed="")

            def update(nbytes: int, total: int) -> None:
                speed = format_speed(nbytes, time.perf_counter() - start)
                bar.update(task, completed=nbytes, total=total, speed=speed)

            yield update

    def phases(self, report: Mapping[str, Any]) -> None:
        """A table of a fork's phases and their seconds."""
        table = _table("phase", ">time", ">share", "")
        total = report["total"]
        for name, seconds in report["seconds"].items():
            speed = format_speed(report["nbytes"], seconds) if name == "transfer" else ""
            table.add_row(name, format_seconds(seconds), f"{seconds / total:.0%}", speed)
        table.add_section()
        table.add_row("all", format_seconds(total), "", format_speed(report["nbytes"], total), style="bold")
        self._show(table)

    def similarities(self, inputs: Sequence[str], seed: Sequence[float], fork: Sequence[float]) -> None:
        """A table of the cosines between the first input's vector and the others', as seed and fork computed them."""
        table = _table(f"cosine to {inputs[0]!r}", ">seed", ">fork")
        for text, in_seed, in_fork in zip(inputs[1:], seed[1:], fork[1:], strict=True):
            table.add_row(Text(text), f"{in_seed:.6f}", f"{in_fork:.6f}")
        self._show(table)

    def comparison(self, rows: Sequence[tuple[str, float, int]]) -> None:
        """A table of ways to get the same bytes. A row is its name, seconds and bytes; the fork's row is the first."""
        table = _table("the same bytes into a process", ">time", ">speed", ">beside the fork")
        for i, (what, seconds, nbytes) in enumerate(rows):
            compared = _compared(seconds, rows[0][1]) if i else ""
            table.add_row(what, format_seconds(seconds), format_speed(nbytes, seconds), compared)
        self._show(table)

    def conclusion(self, good: bool, text: str) -> None:
        """The verdict on the whole demo."""
        self._console.print()
        self.verdict(good, text)

    def verdict(self, good: bool, text: str) -> None:
        """A line in green or red."""
        self._console.print(Text(text), style="bold green" if good else "bold red")

    def _show(self, table: Table) -> None:
        self._console.print()
        self._console.print(Padding(table, INDENT, expand=False))
        self._console.print()


def _compared(seconds: float, fork: float) -> str:
    """How another way's seconds compare with the fork's."""
    if 0.95 < seconds / fork < 1.05:
        return "about the same"
    return f"{fork / seconds:.1f} x faster" if seconds < fork else f"{seconds / fork:.1f} x slower"


def _table(*columns: str) -> Table:
    """An empty table. A column whose name begins with > is aligned to the right."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="dim")
    for name in columns:
        table.add_column(name.removeprefix(">"), justify="right" if name.startswith(">") else "left")
    return table
