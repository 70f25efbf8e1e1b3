"""The command: compile, show a table, say what is wrong.

    python -m mcpo_kernels.targets                    everything; half an hour
    python -m mcpo_kernels.targets --quick            each kernel on each target once; a minute
    python -m mcpo_kernels.targets --target sm_90 --kernel forward_kernel --json rows.jsonl
    python -m mcpo_kernels.targets --page rows.jsonl  writes docs/targets.md from rows

What was compiled before is not compiled again as long as nothing that decides it has changed
(``kept.py``). Ends with 1 if anything does not pass, with 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from mcpo_kernels.targets import page
from mcpo_kernels.targets.build import versions
from mcpo_kernels.targets.cases import DTYPES, Case, Selection, cases
from mcpo_kernels.targets.devices import TARGETS
from mcpo_kernels.targets.verdict import (
    PIPELINED,
    Row,
    row_of,
    row_of_the_dead,
    tile_of,
    wide_of,
)
from mcpo_kernels.targets.workers import run_jobs

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    options = _parser().parse_args(arguments)
    if options.page:
        page.write(options.page)
        return 0
    wanted = Selection(
        targets=tuple(options.target or ()),
        kernels=tuple(options.kernel or ()),
        dtypes=tuple(options.dtype or ()),
        quick=options.quick,
    )
    console = Console(stderr=True)
    with console.status("listing launches"):
        found = list(cases(wanted))
    if not found:
        console.print("no launch is left; --kernel must name a kernel, such as forward_kernel")
        return 2
    origin = page.provenance(list(sys.argv[1:] if arguments is None else arguments), versions())
    rows: list[Row] = []
    status = 0
    try:
        for row in _with_progress(found, options, console):
            rows.append(row)
            if options.json:
                _append(row, origin, options.json)
    except KeyboardInterrupt:
        console.print(f"stopped after {len(rows)} of {len(found)}")
        status = 130
    rows.sort(key=lambda row: (row.kernel, list(TARGETS).index(row.target), str(row.config)))
    shown = rows if options.all or options.quick else [row for row in rows if not row.ok]
    # Wide enough for a row in a line where the output is a file.
    output = Console() if sys.stdout.isatty() else Console(width=200)
    output.print(table(shown))
    bad = sum(not row.ok for row in rows)
    output.print(f"{len(rows) - bad} of {len(rows)} pass")
    return status or int(bad > 0)


def table(rows: list[Row]) -> Table:
    """Rows as a table."""
    shown = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("kernel", "target", "dtype, head, shape", "tile"):
        shown.add_column(name, no_wrap=True)
    for name in (
        "regs",
        "spill B",
        "stack B",
        "shared KiB",
        "occ.",
        "tensor",
        "async",
        "16 B loads",
    ):
        shown.add_column(name, justify="right", no_wrap=True)
    shown.add_column("pipelined", no_wrap=True)
    shown.add_column("verdict", overflow="fold")
    for row in rows:
        shown.add_row(*_cells(row))
    return shown


def _cells(row: Row) -> tuple[str, ...]:
    config = row.config
    of = ", ".join(str(config[name]) for name in ("dtype", "head", "shape"))
    shared = "-" if row.shared_bytes is None else f"{row.shared_bytes / 1024:.0f}"
    return (
        row.kernel,
        row.target,
        f"{of}, {config['precision']}" if config.get("precision", "ieee") != "ieee" else of,
        tile_of(config),
        _number(row.registers),
        _number(row.spills),
        _number(row.stack),
        f"{shared}/{row.shared_limit // 1024}",
        "-" if row.occupancy is None else f"{row.occupancy:.0%}",
        f"{_number(row.tensor_core_ops)} {row.tensor_core_kind or ''}",
        _number(row.async_copies),
        wide_of(row.loads or {}),
        PIPELINED[row.pipelined],
        "[green]ok" if row.ok else f"[red]{'; '.join(row.why)}",
    )


def _with_progress(
    found: list[Case], options: argparse.Namespace, console: Console
) -> Iterator[Row]:
    columns = (
        TextColumn("compiling"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[bad]} do not pass"),
    )
    bad = 0
    work = partial(row_of, fresh=options.fresh)
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(found), bad=0)
        for row in run_jobs(work, found, options.jobs, row_of_the_dead):
            bad += not row.ok
            progress.update(task, advance=1, bad=bad)
            yield row


def _append(row: Row, origin: dict[str, str], path: Path) -> None:
    with path.open("a") as file:
        file.write(json.dumps(dataclasses.asdict(row) | {"provenance": origin}) + "\n")


def _number(value: int | None) -> str:
    return "-" if value is None else str(value)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mcpo_kernels.targets",
        description="Compile every Triton kernel for every target, without a GPU.",
    )
    parser.add_argument("--target", action="append", choices=TARGETS, help="may be repeated")
    parser.add_argument("--kernel", action="append", help="such as forward_kernel; may be repeated")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="may be repeated")
    parser.add_argument("--quick", action="store_true", help="one shape, bf16, default tiles")
    parser.add_argument("--all", action="store_true", help="show what passes too")
    parser.add_argument("--fresh", action="store_true", help="compile what was compiled before too")
    parser.add_argument("--json", type=Path, help="file that a line for each row is appended to")
    parser.add_argument(
        "--page", type=Path, help="write docs/targets.md from such a file, and stop"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    return parser


if __name__ == "__main__":
    sys.exit(main())
