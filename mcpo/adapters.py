"""LoRA training with peft: which weights train, how adapters are kept, and what replaces them.

The adapters are peft's own layers, put into the unmodified model by transformers' door, so packing,
recompute and decoding go through them as through any linear layer. The model that trains carries
the adapter ``POLICY``; a reference that is neither the base nor on disk is a frozen second adapter,
``REFERENCE``, never a second model. peft is imported when adapters are asked for.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mcpo.config import AdapterConfig

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel

POLICY, REFERENCE = "default", "reference"
WEIGHTS_FILE = "adapter_model.safetensors"
# What peft puts before the names of a model's weights in a file.
_PREFIX = "base_model.model."


def is_adapted(model: PreTrainedModel) -> bool:
    """Whether the model carries adapters, which then are all that trains."""
    return bool(getattr(model, "peft_config", None))


def attach(
    model: PreTrainedModel, config: AdapterConfig, *, seed: int, keep_reference: bool
) -> None:
    """Put LoRA layers into a model, before it becomes a policy; nothing else of it trains then.

    Args:
        model: changed in place.
        config: rank and places, or the folder of a trained adapter to go on from.
        seed: of the first values of a fresh adapter, whose other half begins at 0.
        keep_reference: also keep the adapter as it is now, frozen, under the name ``REFERENCE``.

    Raises:
        ModuleNotFoundError: peft is not installed.
        ValueError: no layer has one of the given names, the adapter is not one of plain LoRA, or it
            is to be merged and cannot be.
        FileNotFoundError: there is no adapter at ``adapter_name_or_path``.
    """
    settings = _loaded_settings(config) if config.adapter_name_or_path else _fresh_settings(config)
    settings.inference_mode = False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _inject(model, settings, POLICY)
    _refuse_unmatched(model, settings)
    if config.adapter_name_or_path:
        load(Path(config.adapter_name_or_path), model)
    if keep_reference:
        _inject(model, copy.deepcopy(settings), REFERENCE)
        model.set_adapter(POLICY)
        write(model, REFERENCE, read(model, POLICY))
    if config.merge_adapter:
        _refuse_tied(model)


def _fresh_settings(config: AdapterConfig) -> LoraConfig:
    lora_config = _peft().LoraConfig
    targets = list(config.lora_target_modules)
    return lora_config(
        task_type="CAUSAL_LM",
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=0.0,
        use_rslora=config.use_rslora,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
    )


def _loaded_settings(config: AdapterConfig) -> LoraConfig:
    folder = Path(str(config.adapter_name_or_path))
    for name in ("adapter_config.json", WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                "adapter_name_or_path must be a folder that peft wrote, with adapter_config.json "
                f"and {WEIGHTS_FILE}; got {str(folder)!r}, which has no {name}"
            )
    settings = _peft().PeftConfig.from_pretrained(str(folder))
    plain = (
        settings.peft_type == "LORA"
        and settings.bias == "none"
        and not settings.lora_bias
        and not settings.use_dora
        and not settings.modules_to_save
    )
    if not plain:
        raise ValueError(
            "adapter_name_or_path must hold plain LoRA, without DoRA, trained biases or whole "
            f"modules, got {settings.peft_type} in {str(folder)!r}; merge it into its base with "
            "peft and train from that folder"
        )
    return settings


def _inject(model: PreTrainedModel, settings: LoraConfig, name: str) -> None:
    try:
        with warnings.catch_warnings():
            # That there are several adapters, and that a tied head cannot be merged, which is
            # refused below.
            warnings.simplefilter("ignore", UserWarning)
            model.add_adapter(settings, name)
    except ValueError as error:
        raise ValueError(
            f"lora_target_modules must name linear layers of {type(model).__name__}, got "
            f"{settings.target_modules!r} ({error})"
        ) from error


def _refuse_unmatched(model: PreTrainedModel, settings: LoraConfig) -> None:
    """peft trains what it finds of a list of names and says nothing of the others."""
    asked = settings.target_modules
    if isinstance(asked, str) or asked is None:
        return
    peft_layer = import_module("peft.tuners.tuners_utils").BaseTunerLayer
    found = [name for name, module in model.named_modules() if isinstance(module, peft_layer)]
    unmatched = sorted(
        name for name in asked if not any(f".{layer}".endswith(f".{name}") for layer in found)
    )
    if unmatched:
        raise ValueError(
            f"lora_target_modules must each name a linear layer of {type(model).__name__}, got "
            f"{', '.join(unmatched)}, which is the name of none; all-linear stands for all but the "
            "head and goes alone"
        )


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ModuleNotFoundError(
            "use_peft and adapter_name_or_path need the package peft, which is not installed; run "
            "`pip install 'mcpo[peft]'`"
        ) from error
    return peft


def settings_of(model: PreTrainedModel) -> LoraConfig:
    """peft's configuration of the adapter that trains."""
    settings: Any = model.peft_config
    return settings[POLICY]


def read(model: PreTrainedModel, name: str = POLICY) -> dict[str, Tensor]:
    """The weights of an adapter, under names that do not hold the adapter's own."""
    # By default it also saves whole embeddings where a head has an adapter.
    return _peft().get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)


@torch.no_grad()
def write(model: PreTrainedModel, name: str, weights: Mapping[str, Tensor]) -> None:
    """Copy weights, as ``read`` names them, into an adapter.

    Raises:
        ValueError: there is one too many or too few.
    """
    own = read(model, name)
    shapes, given = (
        {(key, tuple(tensor.shape)) for key, tensor in each.items()} for each in (own, weights)
    )
    if shapes != given:
        raise ValueError(
            f"an adapter must have every weight of the model's, in its shape, and no other, got "
            f"{len(weights)} of {len(own)}; on one side alone: {sorted(shapes ^ given)[:3]}"
        )
    for key, tensor in own.items():
        # A dry run's have no numbers.
        if not weights[key].is_meta:
            # peft gives the tensors themselves.
            tensor.copy_(weights[key])


def save(model: PreTrainedModel, folder: Path) -> None:
    """Write the trained adapter as peft and transformers read it."""
    from safetensors.torch import save_file

    weights = {_PREFIX + name: tensor.contiguous() for name, tensor in read(model).items()}
    save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    settings = copy.deepcopy(settings_of(model))
    settings.inference_mode = True
    settings.save_pretrained(str(folder))


def load(folder: Path, model: PreTrainedModel) -> None:
    """Copy a saved adapter into the model's own.

    Raises:
        ValueError: its weights are not those of the model's adapter.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(folder / WEIGHTS_FILE)
    except SafetensorError as error:
        raise ValueError(
            f"{folder / WEIGHTS_FILE} must be a safetensors file, and cannot be read: {error}"
        ) from error
    try:
        write(model, POLICY, {name.removeprefix(_PREFIX): found[name] for name in found})
    except ValueError as error:
        raise ValueError(f"{folder / WEIGHTS_FILE} does not fit the model: {error}") from error


@contextmanager
def without_adapters(model: PreTrainedModel) -> Generator[None]:
    """The base model; between a forward and its backward this must not be called."""
    model.disable_adapters()
    try:
        yield
    finally:
        model.enable_adapters()


@contextmanager
def with_reference_adapter(model: PreTrainedModel) -> Generator[None]:
    """The base model with the frozen adapter; as ``without_adapters``."""
    model.set_adapter(REFERENCE)
    try:
        yield
    finally:
        model.set_adapter(POLICY)


def base_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """The weights without any adapter's, under the names they have in a model without adapters."""
    return {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in model.state_dict().items()
        if ".lora_" not in name
    }


@torch.no_grad()
def merged_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """The weights W + s B A of a model without adapters that computes the same.

    Raises:
        ValueError: an adapter sits on a weight that is tied to another, which would change too.
    """
    _refuse_tied(model)
    weights = base_weights(model)
    for name, layer in _lora_layers(model):
        weights[f"{name}.weight"] = weights[f"{name}.weight"] + layer.get_delta_weight(POLICY)
    return weights


def _refuse_tied(model: PreTrainedModel) -> None:
    tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
    for name, _ in _lora_layers(model):
        if f"{name}.weight" in tied:
            raise ValueError(
                f"an adapter on {name!r} cannot be merged, because its weight is tied to another "
                "(tie_word_embeddings); keep the adapter, with merge_adapter: false"
            )


def _lora_layers(model: PreTrainedModel) -> list[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return [each for each in model.named_modules() if isinstance(each[1], LoraLayer)]


def merged_model(model: PreTrainedModel) -> PreTrainedModel:
    """A model without adapters that computes the same; weights without an adapter are shared.

    Raises:
        ValueError: as ``merged_weights``.
    """
    from transformers import AutoModelForCausalLM

    weights = merged_weights(model)
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(model.config)
    plain.load_state_dict(weights, assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain
