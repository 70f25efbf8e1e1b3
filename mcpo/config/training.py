"""How it is minimised, and what becomes of the run."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Literal

from mcpo.config.options import option, require


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """AdamW and its schedule."""

    learning_rate: float = option(1e-6, "peak learning rate")
    weight_decay: float = option(0.0, "of matrices; biases and norms are never decayed")
    adam_beta1: float = option(0.9, "decay of the first moment")
    adam_beta2: float = option(0.999, "decay of the second moment")
    adam_epsilon: float = option(1e-8, "added to the root of the second moment")
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm")
    lr_scheduler_type: str = option("linear", "any schedule of transformers.get_scheduler")
    warmup_ratio: float = option(0.1, "share of the steps spent warming up")
    num_train_epochs: float = option(1.0, "passes over the rows, unless max_steps is set")
    max_steps: int = option(-1, "optimizer steps; -1: num_train_epochs decides")
    per_device_train_batch_size: int = option(4, "groups (a prompt and its candidates) per device")
    gradient_accumulation_steps: int = option(1, "batches per optimizer step")
    max_tokens_per_micro_batch: int = option(
        4096, "a batch is cut into packed sequences of at most this many tokens; same update"
    )

    def __post_init__(self) -> None:
        for name in (
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "max_tokens_per_micro_batch",
        ):
            require(getattr(self, name) >= 1, f"{name} must be at least 1", getattr(self, name))
        for name in ("learning_rate", "num_train_epochs", "adam_epsilon"):
            value = getattr(self, name)
            require(0 < value < inf, f"{name} must be positive and finite", value)
        require(self.max_grad_norm > 0, "max_grad_norm must be positive", self.max_grad_norm)
        require(0 <= self.weight_decay < inf, "weight_decay must be 0 or more", self.weight_decay)
        for name in ("adam_beta1", "adam_beta2"):
            require(0 <= getattr(self, name) < 1, f"{name} must be in [0, 1)", getattr(self, name))
        require(0 <= self.warmup_ratio <= 1, "warmup_ratio must be in [0, 1]", self.warmup_ratio)
        require(
            self.max_steps == -1 or self.max_steps >= 1,
            "max_steps must be -1 or at least 1",
            self.max_steps,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Where results go, how often, and what is checked."""

    output_dir: str = option("runs/default", "checkpoints, metrics and summary")
    seed: int = option(0, "of the order of rows and of the draws")
    resume: bool = option(False, "continue from the newest checkpoint in output_dir, or start")
    overwrite_output_dir: bool = option(False, "replace an earlier run there; resume goes first")
    save_steps: int = option(0, "steps between checkpoints; 0: none but on Ctrl-C")
    save_total_limit: int = option(2, "newest checkpoints kept")
    eval_steps: int = option(0, "steps between evaluations on eval_data; 0: only at the end")
    logging_steps: int = option(1, "steps between logged lines")
    report_to: Literal["none", "tensorboard", "wandb"] = option("none", "tracker besides the files")
    reference_cache_dir: str | None = option(
        None, "where reference log-probs are kept; unset: the user's cache folder"
    )
    self_check: bool = option(True, "compare packed with plain forwards before training")
    dry_run: bool = option(False, "print rows, tokens, steps and memory, then stop")
    heldout_prompts: str | None = option(
        None, "prompts with checks, decoded greedily before and after training"
    )
    heldout_max_new_tokens: int = option(96, "for the held-out prompts")
    heldout_batch_size: int = option(32, "for the held-out prompts")

    def __post_init__(self) -> None:
        for name in ("logging_steps", "heldout_max_new_tokens", "heldout_batch_size"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1", getattr(self, name))
        require(0 <= self.seed < 2**63, "seed must be from 0 to 2**63 - 1", self.seed)
        require(self.save_steps >= 0, "save_steps must be 0 or more", self.save_steps)
        require(self.eval_steps >= 0, "eval_steps must be 0 or more", self.eval_steps)
        require(
            self.save_total_limit >= 1, "save_total_limit must be at least 1", self.save_total_limit
        )
