"""What is trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mcpo.config.options import option, require
from mcpo.data.mixture import SourceSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Rows and tokens."""

    train_data: tuple[SourceSpec, ...] = option(
        (), "files, datasets, dataset:split; in YAML also {path, schema, split, fraction, max_rows}"
    )
    eval_data: tuple[SourceSpec, ...] = option((), "held-out groups for preference accuracy")
    score_field: Literal["overall_score", "fine-grained_score", "aspect_mean"] = option(
        "fine-grained_score", "which score ranks an ultrafeedback completion"
    )
    ties: Literal["drop_rivals", "drop_row", "keep"] = option(
        "drop_rivals", "where several are best: drop the chosen one's equals, the row, or nothing"
    )
    bad_rows: Literal["error", "drop"] = option(
        "error", "whether a row that cannot be read stops the run or is counted"
    )
    nectar_drop_second: bool = option(True, "leave out Nectar's rank 2, as the paper does")
    drop_top_k: int = option(0, "best ranked candidates left out of each pool trained on")
    max_pool_size: int | None = option(
        None, "candidates kept of each pool trained on, drawn by seed and row id; unset: all"
    )
    noise_candidate: Literal["none", "add", "only"] = option(
        "none", "the chosen one with two tokens switched: add it to each pool, or train on it only"
    )
    max_length: int | None = option(1024, "most tokens of a prompt with one completion")
    max_prompt_length: int | None = option(None, "most tokens of a prompt")
    too_long: Literal["drop", "truncate_completion", "truncate_prompt", "error"] = option(
        "truncate_completion", "what to do with a sequence over max_length"
    )
    prompt_format: Literal["auto", "chat", "plain"] = option(
        "auto", "chat template for plain-text prompts; auto: if the tokenizer has one"
    )
    chat_template: str | None = option(
        None, "file with a Jinja chat template in place of the tokenizer's own"
    )

    def __post_init__(self) -> None:
        for name, least in (
            ("max_length", 2),
            ("max_prompt_length", 1),
            ("max_pool_size", 1),
        ):
            value = getattr(self, name)
            require(value is None or value >= least, f"{name} must be at least {least}", value)
        require(self.drop_top_k >= 0, "drop_top_k must be 0 or more", self.drop_top_k)
        require(
            self.noise_candidate != "only" or (self.drop_top_k, self.max_pool_size) == (0, None),
            "noise_candidate: only replaces the pool, and needs drop_top_k and max_pool_size unset",
            (self.drop_top_k, self.max_pool_size),
        )
