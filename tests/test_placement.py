from __future__ import annotations

import pytest
import torch

from mcpo.config import ModelConfig
from mcpo.placement import place


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("no_cuda")
@pytest.mark.parametrize("native", [True, False])
def test_cpu_takes_bf16_where_it_is_native(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": native})
    placement = place(ModelConfig())
    assert placement.device == torch.device("cpu")
    assert placement.autocast_dtype == (torch.bfloat16 if native else None)
    assert "torch sees no CUDA device" in placement.reason
    assert ("natively" in placement.reason) == native


@pytest.mark.parametrize("bf16", [True, False])
def test_what_is_given_is_taken(bf16: bool) -> None:
    placement = place(ModelConfig(device="cpu", bf16=bf16))
    assert placement.autocast_dtype == (torch.bfloat16 if bf16 else None)
    assert f"bf16={str(bf16).lower()} was given" in placement.reason


def test_a_gpu_is_found_and_chosen_by_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    placement = place(ModelConfig(), local_rank=1)
    assert placement.device == torch.device("cuda", 1)
    assert placement.autocast_dtype == torch.bfloat16


def test_processes_get_gpus_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = ModelConfig(device="cuda", bf16=True)
    assert place(config, local_rank=1, local_world_size=2).device == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="each process needs a GPU of its own"):
        place(ModelConfig(device="cuda:1", bf16=True), local_rank=0, local_world_size=2)
    assert place(ModelConfig(device="cuda:1", bf16=True)).device == torch.device("cuda", 1)


@pytest.mark.usefixtures("no_cuda")
@pytest.mark.parametrize(
    ("device", "message"),
    [("tpu9", "device must be auto, cpu"), ("cuda:0", "torch sees no CUDA device; use cpu")],
)
def test_absent_devices_are_named(device: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        place(ModelConfig(device=device))
