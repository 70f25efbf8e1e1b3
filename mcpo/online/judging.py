"""Who judges in a segment, and the rows that come of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from mcpo.judges.cache import AnswerCache
from mcpo.judges.instructions import DEFAULT
from mcpo.judges.llm import JudgeConfig, LanguageModelJudge
from mcpo.judges.scoring import FunctionJudge, RewardModelJudge, ScoringJudge, VerifiableJudge
from mcpo.online.config import OnlineConfig
from mcpo.online.plan import Prompt
from mcpo.online.prompts import load_checks
from mcpo.online.rows import Judged, by_scores, by_tournament
from mcpo.progress import progress
from mcpo.records import Candidate


def judged(
    config: OnlineConfig,
    prompts: Sequence[Prompt],
    groups: Sequence[Sequence[Candidate]],
    output_dir: Path,
    console: Console,
) -> Judged:
    """Rows of the groups by the configured judge.

    Raises:
        ValueError, FileNotFoundError, ModuleNotFoundError: the judge cannot be made.
        JudgeError: a language model did not answer; what it said is in ``judge_answers.sqlite``.
    """
    if config.judge != "llm":
        with progress(console, "judge", len(prompts)) as advance:
            return by_scores(prompts, groups, scoring_judge(config), lambda n: advance(n, ""))
    assert config.judge_model is not None
    settings = JudgeConfig(
        model=config.judge_model,
        base_url=config.judge_base_url,
        instructions=Path(config.judge_instructions) if config.judge_instructions else DEFAULT,
        both_orders=not config.judge_one_order,
        concurrency=config.judge_concurrency,
    )
    judge = LanguageModelJudge(settings, AnswerCache(output_dir / "judge_answers.sqlite"))
    # At most: equal and empty answers are not compared.
    most = sum(len(group) - 1 for group in groups)
    with progress(console, "judge", most) as advance:
        result = by_tournament(prompts, groups, judge, lambda n: advance(n, ""))
    usage = judge.usage
    console.print(
        f"judge: {usage.requests} requests, {usage.cached} answers kept from before, "
        f"{usage.prompt_tokens:,} + {usage.completion_tokens:,} tokens; {usage.contradicted} pairs "
        f"where the order decided, {usage.abstained} answers without a verdict",
        soft_wrap=True,
    )
    return result


def scoring_judge(config: OnlineConfig) -> ScoringJudge:
    """A judge that gives every answer a number."""
    if config.judge == "verifiable":
        return VerifiableJudge(load_checks(Path(config.prompts)))
    if config.judge == "reward":
        assert config.reward is not None
        return FunctionJudge.load(config.reward)
    assert config.reward_model is not None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForSequenceClassification.from_pretrained(config.reward_model)
    tokenizer = AutoTokenizer.from_pretrained(config.reward_model)
    return RewardModelJudge(model.to(device), tokenizer)
