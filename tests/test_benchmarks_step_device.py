"""The benchmark of a step on a device that is not the CPU: the one that holds no numbers.

Torch refuses to add what is on two devices, "meta" among them, so a tensor that a step leaves on
the CPU is found here. Whether what is computed is right only a device with numbers can show.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.step import gate, memory, models, problem, session
from benchmarks.step.__main__ import main
from benchmarks.step.packed import PackedStep
from benchmarks.step.padded import PaddedStep
from benchmarks.step.points import QUICK
from benchmarks.step.problem import Problem
from mcpo_kernels.integrations import transformers

aten = torch.ops.aten


class ReadAsZero(TorchDispatchMode):
    """What is asked of a device without numbers is 0."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        on_meta = bool(args) and isinstance(args[0], torch.Tensor) and args[0].is_meta
        if func is aten._local_scalar_dense.default and on_meta:
            return 0
        if func is aten._to_copy.default and on_meta:
            to = torch.device(kwargs.get("device") or "meta")
            if to.type == "cpu":
                return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        return func(*args, **kwargs)


@pytest.fixture(scope="module")
def posed() -> Problem:
    model, _ = models.load("tiny")
    return problem.make(models.sharing(model), problem.synthetic_groups(QUICK[0], 97), "fp32")


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Autocast knows no such device, and which mask a row needs is read from its numbers."""
    monkeypatch.setattr(transformers, "_is_causal", lambda *_: True)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    with ReadAsZero():
        yield


STEPS: dict[str, Callable[[Problem, Any], Callable[[], torch.Tensor]]] = {
    "packed": lambda posed, model: PackedStep(posed, model, "none"),
    "padded": lambda posed, model: PaddedStep(
        posed.pairs(), model, checkpointed=False, naive=False
    ),
    "naive": lambda posed, model: PaddedStep(posed, model, checkpointed=True, naive=True),
}


@pytest.mark.parametrize("build", STEPS.values(), ids=STEPS)
def test_a_step_runs_where_its_model_is(build, posed, elsewhere):
    model, _ = models.load("tiny", "meta")
    loss = build(posed, model)()
    assert loss.is_meta
    assert all(weight.grad is not None and weight.grad.is_meta for weight in model.parameters())


def test_the_plain_step_runs_where_its_model_is(posed, elsewhere):
    model, _ = models.load("tiny", "meta")
    found = gate.plain_step(posed.pairs(), model, None, [])
    assert all(gradient.is_meta for gradient in found.gradients.values())
    # What tolerances are made of is compared with lengths, which are on the CPU.
    assert not any(logp_L.is_meta for logp_L in found.logps)


def test_a_problem_is_on_the_cpu_wherever_its_model_is(posed, elsewhere):
    model, _ = models.load("tiny", "meta")
    assert problem.make(model, posed.groups, "fp32").groups == posed.groups


def test_memory_of_a_gpu_is_what_its_allocator_counted(monkeypatch):
    model, _ = models.load("tiny")
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    held = iter([700, 1000])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: next(held))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: next(held))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2048)

    def step() -> torch.Tensor:
        # Gradients of the step before would count as held before.
        assert model.lm_head.weight.grad is None
        return torch.zeros(())

    assert memory.peak_on_gpu(step, model) == 2048 - 700
    ready = SimpleNamespace(
        arm=SimpleNamespace(name="a"), built=SimpleNamespace(step=step), model=model
    )
    monkeypatch.setattr(memory, "peak_on_gpu", lambda *_: 5)
    point = SimpleNamespace(device="cuda")
    arms: Any = (ready,)
    found = session.Session(point=point, problem=None, costs=None, arms=arms)  # type: ignore[arg-type]
    assert found.peaks() == {"a": 5}


def test_a_gpu_that_is_not_there_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--quick", "--device", "cuda"]) == 2
    assert "--device cuda needs a CUDA or ROCm device" in capsys.readouterr().err
