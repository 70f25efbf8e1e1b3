"""Engines on real processes, each beside one process on all rows; ``engine_ranks.py`` compares."""

from __future__ import annotations

import importlib.util
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
