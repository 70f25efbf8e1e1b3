"""Answers on disk as they come, so that an interrupted round goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mcpo.online.plan import Generator, OnPrompt, Prompt, SamplingPlan
from mcpo.records import Candidate


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """What the answers of a round are like."""

    answers: int
    empty: int
    truncated: int
    """Cut at ``max_new_tokens``."""
    repeated: int
    """Equal to another answer of the same prompt."""


def sample_all(
    prompts: Sequence[Prompt],
    plan: SamplingPlan,
    generator: Generator,
    work: Path,
    on_prompt: OnPrompt = lambda _: None,
) -> None:
    """Put the answers to every prompt on file; those that are there are not asked for again.

    Args:
        prompts: with different row ids.
        plan: what is sampled.
        generator: who answers.
        work: a file of this round, and of this process, alone, a line per prompt.
        on_prompt: called with 1 for each.

    Raises:
        ValueError: two prompts have one row id.
    """
    if len({prompt.row_id for prompt in prompts}) != len(prompts):
        raise ValueError("every prompt must have a row id of its own, and two share one")
    found = read_work(work)
    missing = [prompt for prompt in prompts if prompt.row_id not in found]
    if len(missing) < len(prompts):
        on_prompt(len(prompts) - len(missing))
    work.parent.mkdir(parents=True, exist_ok=True)
    with work.open("ab") as file:
        for prompt, candidates in generator.sample(missing, plan) if missing else ():
            file.write(_line(prompt, candidates))
            file.flush()
            os.fsync(file.fileno())
            on_prompt(1)


def read_work(work: Path) -> dict[str, list[Candidate]]:
    """What is on file; a line that was cut off by the end of a process is taken out."""
    if not work.exists():
        return {}
    whole, newline, cut_off = work.read_bytes().rpartition(b"\n")
    if cut_off:
        os.truncate(work, len(whole) + len(newline))
    rows: list[dict[str, Any]] = [json.loads(line) for line in whole.split(b"\n") if line]
    return {
        row["id"]: [Candidate(**completion) for completion in row["completions"]] for row in rows
    }


def count(groups: Sequence[Sequence[Candidate]]) -> Counts:
    """What to tell the user of the answers."""
    every = [candidate for group in groups for candidate in group]
    return Counts(
        answers=len(every),
        empty=sum(not candidate.text for candidate in every),
        truncated=sum(not candidate.finished for candidate in every),
        repeated=sum(len(group) - len({each.text for each in group}) for group in groups),
    )


def _line(prompt: Prompt, candidates: Sequence[Candidate]) -> bytes:
    completions = [
        {"text": each.text, "finished": each.finished, "model": each.model} for each in candidates
    ]
    row = {"id": prompt.row_id, "completions": completions}
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"
