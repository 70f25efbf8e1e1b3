"""AlpacaEval 2's files, under its own names: answers of a model, a judge's annotations of them.

``model_outputs.json`` is a list of {instruction, output, generator, dataset}; ``annotations.json``
a list of {instruction, output_1, generator_1, output_2, generator_2, annotator, preference}, 1 the
baseline and 2 the model, preference 1 + P(the model's answer is better); 0 and 1.5 are draws
(tatsu-lab/alpaca_eval).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

LEADERBOARD_JUDGE = "weighted_alpaca_eval_gpt4_turbo"
LEADERBOARD_BASELINE = "gpt4_1106_preview"
NUM_QUESTIONS = 805


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelOutput:
    """One answer of a model."""

    instruction: str
    output: str
    generator: str
    """The model's name."""
    dataset: str = "unknown"
    """Which part of the benchmark the question is from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Annotation:
    """One comparison of the model's answer with the baseline's."""

    instruction: str
    output_1: str
    """The baseline's answer."""
    generator_1: str
    output_2: str
    """The model's answer."""
    generator_2: str
    annotator: str
    preference: float
    """Probability that the model's answer is better, in [0, 1]; NaN without a verdict."""


def read_outputs(path: Path) -> list[ModelOutput]:
    """The answers of one model.

    Raises:
        ValueError: no list of answers, a missing name, or answers of several models.
    """
    rows = _read_list(path)
    wanted = ("instruction", "output", "generator")
    outputs = [
        ModelOutput(
            **{name: _text(row, name, path, number) for name in wanted},
            dataset=str(row.get("dataset", "unknown")),
        )
        for number, row in enumerate(rows)
    ]
    _one_name([output.generator for output in outputs], "generator", path)
    return outputs


def write_outputs(path: Path, outputs: Sequence[ModelOutput]) -> None:
    """The file that ``alpaca_eval --model_outputs`` reads."""
    rows = [
        {
            "dataset": output.dataset,
            "instruction": output.instruction,
            "output": output.output,
            "generator": output.generator,
        }
        for output in outputs
    ]
    path.write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_annotations(path: Path) -> list[Annotation]:
    """A judge's annotations of one model against one baseline.

    Raises:
        ValueError: no list of annotations, a missing name, a preference outside 0 and [1, 2], or
            more than one model, baseline or judge.
    """
    rows = _read_list(path)
    texts = ("instruction", "output_1", "generator_1", "output_2", "generator_2", "annotator")
    annotations = [
        Annotation(
            **{name: _text(row, name, path, number) for name in texts},
            preference=_probability(row.get("preference"), path, number),
        )
        for number, row in enumerate(rows)
    ]
    for name in ("generator_1", "generator_2", "annotator"):
        _one_name([getattr(annotation, name) for annotation in annotations], name, path)
    return annotations


def write_annotations(path: Path, annotations: Sequence[Annotation]) -> None:
    """The file that AlpacaEval keeps; a comparison without a verdict has preference null."""
    rows = [
        {
            "instruction": annotation.instruction,
            "output_1": annotation.output_1,
            "generator_1": annotation.generator_1,
            "output_2": annotation.output_2,
            "generator_2": annotation.generator_2,
            "annotator": annotation.annotator,
            "preference": None if math.isnan(annotation.preference) else 1 + annotation.preference,
        }
        for annotation in annotations
    ]
    path.write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def preferences(annotations: Sequence[Annotation]) -> NDArray[np.float64]:
    """[Q] in the order of the file."""
    return np.array([annotation.preference for annotation in annotations])


def why_not_comparable(annotations: Sequence[Annotation]) -> str | None:
    """What keeps these figures from standing beside the published leaderboard's; None if nothing
    does.
    """
    first = annotations[0]
    reasons = [
        f"{what} is {got}, not {published}"
        for what, got, published in (
            ("the judge", first.annotator, LEADERBOARD_JUDGE),
            ("the baseline", first.generator_1, LEADERBOARD_BASELINE),
            ("the number of questions", len(annotations), NUM_QUESTIONS),
        )
        if got != published
    ]
    return "; ".join(reasons) or None


def preference_of_logprobs(
    top_logprobs: Sequence[Mapping[str, Any]], *, model_is: str, baseline_is: str
) -> float:
    """Probability that the judge names the model, from the first token of its answer.

    AlpacaEval 2 names the answers "m" and "M", in random order, and weighs their probabilities
    against each other alone. A name that is not among the listed tokens has at most the probability
    of the last one listed, and gets that.

    Args:
        top_logprobs: {token, logprob} of the most probable tokens, as OpenAI's interface returns
            them.
        model_is: the token that stands for the model's answer.
        baseline_is: the token that stands for the baseline's.

    Returns:
        In [0, 1]; NaN if neither token is listed, which is no verdict.
    """
    logprob = {str(entry["token"]): float(entry["logprob"]) for entry in top_logprobs}
    if model_is not in logprob and baseline_is not in logprob:
        return math.nan
    least = min(logprob.values())
    gap = logprob.get(baseline_is, least) - logprob.get(model_is, least)
    return 1 / (1 + math.exp(gap)) if gap < 700 else 0.0


def _read_list(path: Path) -> list[Mapping[str, Any]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} must be one JSON list, as AlpacaEval writes it: {error}"
        ) from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows) or not rows:
        raise ValueError(
            f"{path} must be a JSON list of at least one object, as AlpacaEval writes it"
        )
    return rows


def _text(row: Mapping[str, Any], name: str, path: Path, number: int) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise ValueError(f"{path}, entry {number}: {name} must be a text, got {value!r}")
    return value


def _probability(value: object, path: Path, number: int) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{path}, entry {number}: preference must be a number, got {value!r}")
    if value == 0 or math.isnan(value):
        return 0.5 if value == 0 else math.nan
    if not 1 <= value <= 2:
        raise ValueError(
            f"{path}, entry {number}: preference must be 0 (a draw) or in [1, 2], got {value}"
        )
    return value - 1


def _one_name(names: Sequence[str], what: str, path: Path) -> None:
    if len(set(names)) > 1:
        raise ValueError(
            f"{path} must have one {what}, got {', '.join(sorted(set(names)))}; split the file"
        )
