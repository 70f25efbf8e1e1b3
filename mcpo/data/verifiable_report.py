"""Figures of the verifiable data set as Markdown: what was dropped, what passes, by kind."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mcpo.data.instructions import UNSEEN_KINDS
from mcpo.data.prompts import SPLITS, VerifiablePrompt
from mcpo.data.verifiable_rows import Graded, candidate_row, drop_reason

BEGIN = "<!-- figures: begin -->"
END = "<!-- figures: end -->"


@dataclass(kw_only=True, slots=True)
class _Tally:
    """How often something was passed, by temperature."""

    asked: Counter[float] = field(default_factory=Counter)
    passed: Counter[float] = field(default_factory=Counter)

    def add(self, temperature: float, passed: bool) -> None:
        """Count one check of one completion."""
        self.asked[temperature] += 1
        self.passed[temperature] += passed


def figures(prompts: Sequence[VerifiablePrompt], graded: Mapping[str, Sequence[Graded]]) -> str:
    """Both tables, and what the completions are like."""
    everything = [candidate for group in graded.values() for candidate in group]
    passing = [candidate.sample.num_tokens for candidate in everything if candidate.score == 1]
    failing = [candidate.sample.num_tokens for candidate in everything if candidate.score < 1]
    finished = [candidate.sample.finished for candidate in everything]
    return "\n".join(
        (
            _split_table(prompts, graded),
            "",
            f"{len(everything)} completions; those that pass every check have {_mean(passing):.1f} "
            f"tokens on average, the others {_mean(failing):.1f}; the model ended "
            f"{_mean(finished):.1%} itself.",
            "",
            _kind_table(prompts, graded),
        )
    )


def insert_figures(readme: str, report: str) -> str:
    """The text with the report in place of what stood between the two marks."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(
            f"README.md must hold the marks {BEGIN!r} and {END!r}, in this order, where the "
            "figures go; put them back or delete the file"
        )
    return f"{before}{BEGIN}\n\n{report}\n\n{END}{after}"


def _split_table(
    prompts: Sequence[VerifiablePrompt], graded: Mapping[str, Sequence[Graded]]
) -> str:
    lines = [
        "| split | prompts | rows | candidates per row | none passes | all pass | pass rate |",
        "|---|---|---|---|---|---|---|",
    ]
    for split in SPLITS:
        groups = [(p, graded[p.prompt_id]) for p in prompts if p.split == split]
        rows = [row for p, group in groups if (row := candidate_row(p, group)) is not None]
        sizes = [len(row["completions"]) for row in rows]
        reasons = Counter(drop_reason(group) for _, group in groups)
        passed = [candidate.score == 1 for _, group in groups for candidate in group]
        lines.append(
            f"| {split} | {len(groups)} | {len(rows)} | {_mean(sizes):.1f} "
            f"| {reasons['no completion passes']} | {reasons['all completions pass']} "
            f"| {_mean(passed):.1%} |"
        )
    return "\n".join(lines)


def _kind_table(prompts: Sequence[VerifiablePrompt], graded: Mapping[str, Sequence[Graded]]) -> str:
    tallies: defaultdict[str, _Tally] = defaultdict(_Tally)
    asked: Counter[tuple[str, str]] = Counter()
    for prompt in prompts:
        asked.update((check.kind, prompt.split) for check in prompt.checks)
        for candidate in graded[prompt.prompt_id]:
            for check, passed in zip(prompt.checks, candidate.passed, strict=True):
                tallies[check.kind].add(candidate.sample.temperature, passed)
    temperatures = sorted({t for tally in tallies.values() for t in tally.asked})
    heads = ["kind", *SPLITS, "pass rate", *(f"at {t}" for t in temperatures)]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for kind in sorted(tallies, key=lambda kind: (kind in UNSEEN_KINDS, kind)):
        tally = tallies[kind]
        cells = [f"{kind} (held-out only)" if kind in UNSEEN_KINDS else kind]
        cells += [str(asked[kind, split]) for split in SPLITS]
        cells.append(f"{tally.passed.total() / tally.asked.total():.1%}")
        cells += [f"{tally.passed[t] / max(1, tally.asked[t]):.1%}" for t in temperatures]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))
