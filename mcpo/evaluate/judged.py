"""From two models' answers to annotations, by any judge of pairs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from mcpo.evaluate.alpaca import Annotation, ModelOutput
from mcpo.judges.verdict import Comparison, PairwiseJudge, Verdict

PREFERENCES = {
    Verdict.FIRST: 1.0,
    Verdict.SECOND: 0.0,
    Verdict.TIE: 0.5,
    Verdict.ABSTAIN: math.nan,
}


def judge_outputs(
    outputs: Sequence[ModelOutput],
    baseline: Sequence[ModelOutput],
    judge: PairwiseJudge,
    judge_name: str,
    on_verdict: Callable[[int], None] = lambda _: None,
) -> list[Annotation]:
    """Compare every answer of a model with the baseline's to the same instruction.

    Raises:
        ValueError: the files answer other instructions, or one twice.
        JudgeError: of the judge.
    """
    answers = {output.instruction: output for output in baseline}
    mine = [output.instruction for output in outputs]
    if len(answers) != len(baseline) or len(set(mine)) != len(mine):
        raise ValueError("every instruction must be answered once per file, and one is there twice")
    missing = set(mine) ^ set(answers)
    if missing:
        raise ValueError(
            f"both files must answer the same instructions, and {len(missing)} are in one of them "
            f"alone, such as {min(missing)[:80]!r}"
        )
    verdicts = judge.compare(
        [
            Comparison(
                prompt=output.instruction,
                first=output.output,
                second=answers[output.instruction].output,
            )
            for output in outputs
        ],
        on_verdict,
    )
    return [
        Annotation(
            instruction=output.instruction,
            output_1=answers[output.instruction].output,
            generator_1=answers[output.instruction].generator,
            output_2=output.output,
            generator_2=output.generator,
            annotator=judge_name,
            preference=PREFERENCES[verdict],
        )
        for output, verdict in zip(outputs, verdicts, strict=True)
    ]
