"""Stages 1 and 2 for a run: its groups in token space, and what was dropped on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from mcpo.config import Config, DataConfig, KernelConfig
from mcpo.data.mixture import SourceSpec
from mcpo.data.rows import RowOptions, load_rows
from mcpo.findings import describe
from mcpo.losses import LOSSES
from mcpo.mismatched import with_mismatched
from mcpo.records import TokenizedGroup
from mcpo.static_negatives import check_external_scores, fix_negatives
from mcpo.tokens import TokenConfig, tokenize


@dataclass(frozen=True, kw_only=True, slots=True)
class Groups:
    """The tokenized groups of a run."""

    train: tuple[TokenizedGroup, ...]
    held_out: tuple[TokenizedGroup, ...]
    """Empty if the run names no eval_data."""
    report: str
    """A few lines for a person: how many, how long, what was dropped or cut and why."""


def load_groups(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    kernel: KernelConfig | None = None,
) -> Groups:
    """Read and tokenize the training and held-out sources.

    A ``chat_template`` of the configuration becomes the tokenizer's own. What changes pools (the
    options of ``data`` that do, and static sampling) changes those that are trained on alone, so
    that runs are compared on the same held-out groups.

    Raises:
        ValueError: no training source is named, a source cannot be read, nothing is left, a row
            is both trained on and held out (its id, or its prompt with its chosen completion), or
            rows lack the scores that ``kernel`` asks for.
        FileNotFoundError: a file is not there.
    """
    if not config.train_data:
        raise ValueError(
            "train_data must name at least one file or dataset, got none; "
            "set it in the YAML file or with --train_data FILE"
        )
    if config.chat_template is not None:
        # On the tokenizer: held-out prompts are rendered, and the model is saved, with the same.
        tokenizer.chat_template = _read_template(config.chat_template)
    train, train_report = _groups_of(config.train_data, config, tokenizer, seed)
    whole = replace(config, drop_top_k=0, max_pool_size=None, noise_candidate="none")
    held_out, eval_report = (
        _groups_of(config.eval_data, whole, tokenizer, seed) if config.eval_data else ((), "")
    )
    _refuse_leakage(train, held_out)
    report = f"train: {train_report}"
    kernel = kernel or KernelConfig()
    if kernel.score == "external":
        check_external_scores(train)
    if kernel.sampling == "static":
        before = sum(group.num_candidates - 1 for group in train)
        train = fix_negatives(train, kernel, seed)
        after = sum(group.num_candidates - 1 for group in train)
        report += f"\nsampling: static: {after:,} of {before:,} negatives were drawn for good"
    if held_out:
        report += f"\nheld out: {eval_report}"
    return Groups(train=train, held_out=held_out, report=report)


def for_losses(groups: Groups, config: Config) -> Groups:
    """Training groups with what the losses need of them: mismatched completions, for ``kto``.

    Raises:
        ValueError: a loss needs scores and a row has none, or ``kto`` has a single row.
    """
    bare = [group.row_id for group in groups.train if None in (group.scores or (None,))]
    for name in config.loss.loss_type:
        if LOSSES[name].ratings and bare:
            raise ValueError(
                f"{name} needs a score of every completion (ranks are no scores, and a noise "
                f"candidate has none), and {len(bare)} of {len(groups.train)} rows lack them, row "
                f"{bare[0]!r} first; add them to the data, or take a loss without ratings"
            )
    if "kto" not in config.loss.loss_type:
        return groups
    return replace(groups, train=with_mismatched(groups.train, config.data.max_length))


def _refuse_leakage(train: Sequence[TokenizedGroup], held_out: Sequence[TokenizedGroup]) -> None:
    """Stop where a held-out row is trained on, be it under another id."""
    shared = {group.row_id for group in train} & {group.row_id for group in held_out}
    if shared:
        raise ValueError(
            "rows must be either trained on or held out, got the same ids in train_data and "
            f"eval_data: {sorted(shared)[:3]}; give them other ids or other files"
        )
    # Prompts alone may repeat, with other answers; the pool may differ by how it was drawn.
    trained = {(group.prompt_ids, group.candidate_ids[0]): group.row_id for group in train}
    leaked = [
        (trained[group.prompt_ids, group.candidate_ids[0]], group.row_id)
        for group in held_out
        if (group.prompt_ids, group.candidate_ids[0]) in trained
    ]
    if leaked:
        pairs = ", ".join(f"{in_train!r} and {held!r}" for in_train, held in leaked[:3])
        raise ValueError(
            "rows must be either trained on or held out, got the same prompt and chosen completion "
            f"in train_data and eval_data, {len(leaked)} times: {pairs}; drop them from one side"
        )


def _groups_of(
    sources: Sequence[SourceSpec],
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
) -> tuple[tuple[TokenizedGroup, ...], str]:
    options = RowOptions(
        nectar_drop_second=config.nectar_drop_second,
        score_field=config.score_field,
        ties=config.ties,
        bad_rows=config.bad_rows,
        drop_top_k=config.drop_top_k,
        max_pool_size=config.max_pool_size,
    )
    loaded = load_rows(sources, options=options, seed=seed)
    tokenized = tokenize(
        loaded.rows,
        tokenizer,
        TokenConfig(
            max_length=config.max_length,
            max_prompt_length=config.max_prompt_length,
            too_long=config.too_long,
            prompt_format=config.prompt_format,
            noise_candidate=config.noise_candidate,
            seed=seed,
        ),
    )
    groups = tokenized.groups
    candidates = sum(group.num_candidates for group in groups)
    tokens = sum(len(ids) for group in groups for ids in group.candidate_ids)
    report = (
        f"{len(groups)} groups, {candidates / len(groups):.1f} candidates each, "
        f"{tokens / candidates:.0f} tokens a candidate"
    )
    findings = (*loaded.findings, *tokenized.findings)
    return groups, f"{report}; {describe(findings)}" if findings else report


def _read_template(path: str) -> str:
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"chat_template must name a file with a Jinja template, got {path!r}, which is not "
            f"there (looked from {Path.cwd()})"
        )
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"chat_template must be a text file in UTF-8, {path}: {error}") from error
