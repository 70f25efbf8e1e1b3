"""Writes what a sweep found into docs/targets.md, from rows alone, with where they came from."""

from __future__ import annotations

import json
import subprocess
from collections import Counter, defaultdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from mcpo_kernels.targets.verdict import PIPELINED, tile_of, wide_of

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "targets.md"
BEGIN, END = "<!-- written by --page: begin -->", "<!-- written by --page: end -->"


def provenance(arguments: list[str], versions: dict[str, str]) -> dict[str, str]:
    """Of rows made from now on."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        # Where on this machine a file lies says nothing to others.
        "command": " ".join(["python -m mcpo_kernels.targets", *map(_name, arguments)]),
        "commit": _git("rev-parse", "--short", "HEAD") or "unknown",
        "dirty": "yes" if _git("status", "--porcelain", "--", "mcpo_kernels") else "no",
        **versions,
    }


def write(rows_file: Path, page: Path = PAGE) -> None:
    """Replace the part of the page between its two marks.

    Raises:
        ValueError: the page lacks a mark.
    """
    text = page.read_text()
    if BEGIN not in text or END not in text:
        raise ValueError(f"{page.name} must have the lines {BEGIN!r} and {END!r}; restore them")
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    page.write_text(f"{before}{BEGIN}\n{render(rows)}{END}{after}")


def render(rows: list[dict[str, Any]]) -> str:
    """The generated part."""
    return "\n".join([*_origins(rows), *_defaults(rows), *_counts(rows), *_reasons(rows), ""])


def _origins(rows: list[dict[str, Any]]) -> list[str]:
    origins = list(dict.fromkeys(json.dumps(row["provenance"], sort_keys=True) for row in rows))
    lines = ["Rows come from these runs:", ""]
    for number, text in enumerate(origins, 1):
        origin = json.loads(text)
        dirty = ", with changes that were not committed" if origin["dirty"] == "yes" else ""
        lines.append(
            f"{number}. `{origin['command']}`, {origin['date']}, commit {origin['commit']}{dirty}, "
            f"Triton {origin['triton']}, ptxas {origin['ptxas']} (sm_80, sm_89) and "
            f"{origin['ptxas-blackwell']} (sm_90, sm_100)"
        )
    return [*lines, ""]


def _defaults(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "Launches as they are without tuning, bf16:",
        "",
        "| kernel | target | head | tile, warps, stages | registers | spills "
        "| shared KiB (limit) | occupancy | tensor core instructions | async copies "
        "| loads of 16 bytes | pipelined | verdict |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    wanted = [row for row in rows if row["default"] and row["config"]["dtype"] == "bf16"]
    shown: set[str] = set()
    for row in sorted(wanted, key=lambda row: row["kernel"]):
        config = row["config"]
        tile = tile_of(config)
        key = f"{row['kernel']} {row['target']} {config['head']} {tile}"
        if key in shown or row["registers"] is None:
            continue
        shown.add(key)
        tensor = f"{row['tensor_core_ops']} {row['tensor_core_kind'] or ''}".strip()
        cells = (
            f"`{row['kernel']}`",
            row["target"],
            config["head"],
            tile,
            row["registers"],
            row["spills"],
            f"{row['shared_bytes'] / 1024:.0f} ({row['shared_limit'] // 1024})",
            f"{row['occupancy']:.0%}",
            tensor,
            row["async_copies"],
            wide_of(row["loads"] or {}),
            PIPELINED[row["pipelined"]],
            "ok" if row["ok"] else "; ".join(row["why"]),
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return [*lines, ""]


def _counts(rows: list[dict[str, Any]]) -> list[str]:
    targets = list(dict.fromkeys(row["target"] for row in rows))
    passed: dict[tuple[str, str, str], list[bool]] = defaultdict(list)
    for row in rows:
        passed[row["kernel"], row["config"]["dtype"], row["target"]].append(row["ok"])
    kinds = sorted({(kernel, dtype) for kernel, dtype, _ in passed})
    lines = [
        "How many configurations pass, of how many that were compiled:",
        "",
        f"| kernel | dtype | {' | '.join(targets)} |",
        f"|---|---|{'---|' * len(targets)}",
    ]
    for kernel, dtype in kinds:
        counts = [passed.get((kernel, dtype, target), []) for target in targets]
        cells = [f"{sum(count)} of {len(count)}" if count else "-" for count in counts]
        lines.append(f"| `{kernel}` | {dtype} | {' | '.join(cells)} |")
    return [*lines, ""]


def _reasons(rows: list[dict[str, Any]]) -> list[str]:
    reasons = Counter(
        "spills" if why.startswith("spills") else why.partition(":")[0]
        for row in rows
        for why in row["why"]
    )
    if not reasons:
        return ["Nothing failed."]
    return [
        "Why configurations do not pass:",
        "",
        *(f"- {reason}: {count}" for reason, count in reasons.most_common()),
    ]


def _name(argument: str) -> str:
    return Path(argument).name if "/" in argument else argument


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()
