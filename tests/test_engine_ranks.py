"""Engines on real processes, each beside one process on all rows; ``engine_ranks.py`` compares."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from conftest import torchrun

WITH_DEEPSPEED = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)


@pytest.mark.parametrize(
    "names",
    [
        "fsdp2",
        pytest.param("zero3", marks=WITH_DEEPSPEED),
        pytest.param("zero1 zero2 zero3_offload", marks=[WITH_DEEPSPEED, pytest.mark.slow]),
    ],
)
def test_two_ranks_are_one_process(names: str, tmp_path: Path) -> None:
    torchrun({}, 2, job=f"tests/engine_ranks.py {tmp_path} {names}")


@pytest.mark.slow
def test_three_ranks_are_one_process(tmp_path: Path) -> None:
    """Nothing divides by three, and a rank has no rows in two steps of three."""
    torchrun({}, 3, job=f"tests/engine_ranks.py {tmp_path} fsdp2")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shards_of_gradient"), [("fsdp2", 1), pytest.param("zero3", 0, marks=WITH_DEEPSPEED)]
)
def test_a_step_never_holds_a_whole_gradient(
    name: str, shards_of_gradient: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside what stays, a step takes shards of a gradient and a few copies of the largest weight.

    That is the head: gathered, its gradient, the input of the reduction and its share of the sum;
    half a copy more is left for the activations. ZeRO keeps its shards of gradients between steps.
    """
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "1000000")
    file = tmp_path / "memory.json"
    torchrun({}, 2, job=f"tests/engine_memory.py {file} {name}")
    for rank in json.loads(file.read_text()):
        allowed = shards_of_gradient * rank["all"] / 2 + 4 * rank["head"]
        # Else a whole gradient beside its shards would go unnoticed.
        assert allowed < (1 + shards_of_gradient / 2) * rank["all"]
        assert rank["peak"] - rank["between"] <= allowed, rank
        assert rank["between"] < (4 if name == "zero3" else 3) * rank["all"], rank
