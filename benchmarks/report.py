"""Write docs/benchmarks.md, docs/benchmarks_step.md and their figures from the rows of results, and
from nothing else.

    python -m benchmarks.report

The last row of a cell counts; rows of other machines than that of the last row are left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from string import Template

from benchmarks import tables
from benchmarks.peers import INSTALL
from benchmarks.rows import FULL, Provenance, Row, latest, read
from benchmarks.step import rows as step_rows
from benchmarks.step import tables as step_tables

DOCS = Path(__file__).parents[1] / "docs"
PAGE = Path(__file__).with_name("page.md")
STEP_PAGE = Path(__file__).parent / "step" / "page.md"
NONE = "None yet."


def page(rows: Sequence[Row], figures: dict[str, str]) -> str:
    """The whole document."""
    shown = [f"![{text}](benchmarks/{name})" for name, text in figures.items()]
    return Template(PAGE.read_text()).substitute(
        install=INSTALL,
        provenance=provenance(rows) if rows else NONE,
        against=tables.ours_against_the_best(rows) if rows else NONE,
        figures="\n\n".join(shown) or NONE,
        tables=tables.all_shapes(rows) or NONE,
    )


def step_page(found: step_tables.Found, figures: dict[str, str]) -> str:
    """The whole document about steps."""
    shown = [f"![{text}](benchmarks/{name})" for name, text in figures.items()]
    rows = [row for arms in found.values() for row in arms.values()]
    versions = sorted({row.versions for row in rows})
    return Template(STEP_PAGE.read_text()).substitute(
        install=INSTALL,
        provenance="\n".join(
            [*origins([row.provenance for row in rows]), *(f"- {each}" for each in versions)]
        )
        if rows
        else NONE,
        pools=step_tables.by_pool(found) if rows else NONE,
        figures="\n\n".join(shown) or NONE,
        details=step_tables.details(found) or NONE,
    )


def provenance(rows: Sequence[Row]) -> str:
    """Machine, dates, commits and versions."""
    versions = sorted({(row.title, row.version) for row in rows})
    lines = [
        *origins([row.provenance for row in rows]),
        *sorted(
            {
                f"- {row.provenance.gpu}; Triton {row.provenance.triton}"
                for row in rows
                if row.provenance.gpu
            }
        ),
        *(f"- {title}: {version}" for title, version in versions),
    ]
    return "\n".join(lines)


def origins(found: Sequence[Provenance]) -> list[str]:
    """Machine, dates and commits."""
    first = found[0]
    dates = sorted(origin.date for origin in found)
    commits = dict.fromkeys(
        f"{origin.commit}{' with changes' if origin.dirty else ''}" for origin in found
    )
    return [
        f"- {first.cpu}, {', '.join(first.flags)}; {first.cores} cores, {first.threads} threads, "
        f"OMP_WAIT_POLICY={first.wait_policy}; torch {first.torch}",
        f"- {len(found)} rows, {dates[0]} to {dates[-1]}, commits {', '.join(commits)}",
    ]


def write_steps(results: Path, docs: Path) -> Path:
    """Write the page about steps and its figures from a file of rows."""
    from benchmarks.step.plots import draw

    found = step_rows.latest(step_rows.read(results))
    path = docs / "benchmarks_step.md"
    path.write_text(step_page(found, draw(found, docs / "benchmarks")))
    return path


def write(results: Path, docs: Path) -> Path:
    """Write the page and its figures from a file of rows."""
    # Here, so that reading tables needs no matplotlib.
    from benchmarks.plots import draw

    rows = latest(read(results))
    path = docs / "benchmarks.md"
    path.write_text(page(rows, draw(rows, docs / "benchmarks")))
    return path


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--results", type=Path, default=FULL, help="file of rows")
    parser.add_argument("--steps", type=Path, default=step_rows.FULL, help="file of rows of steps")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder to write to")
    options = parser.parse_args()
    print(f"wrote {write(options.results, options.docs)}")
    print(f"wrote {write_steps(options.steps, options.docs)}")


if __name__ == "__main__":
    main()
