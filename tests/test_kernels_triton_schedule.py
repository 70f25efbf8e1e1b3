"""The launchers of the Triton kernels at a real size, with twins of the kernels in torch.

Same grid, tiles, splits, slabs, compaction and order of sums as on a device.
"""

from __future__ import annotations

import pytest
import torch
from conftest import ROOT

from mcpo_kernels.linear_logprob.triton import entry, tiles
from mcpo_kernels.testing import Shape, assert_within_budget, make_inputs

if not entry.INSTALLED:
    pytest.skip("triton is not installed", allow_module_level=True)

import triton_twin
from triton_twin import Twin

from mcpo_kernels.linear_logprob.triton import dlogits, forward, launch, products, roofline, rows

KERNELS = {
    "forward": forward,
    "merge": forward,
    "gather": rows,
    "scatter": rows,
    "dlogits": dlogits,
    "dhidden": products,
    "dweight": products,
}


@pytest.fixture
def twins(monkeypatch):
    """The tiles of an H100, on the CPU."""
    monkeypatch.setattr(entry, "INTERPRETED", True)
    monkeypatch.setattr(entry, "refusal", lambda *_: None)
    monkeypatch.setattr(launch, "family_of", lambda _: "sm90")
    found = {name: Twin(getattr(triton_twin, name)) for name in KERNELS}
    for name, module in KERNELS.items():
        monkeypatch.setattr(module, f"{name}_kernel", found[name])
    return found


@pytest.mark.parametrize(
    ("shape", "scratch_mib"),
    [
        (Shape(300, 96, 3001), 1),
        (Shape(512, 576, 6151), 2),
        pytest.param(Shape(512, 576, 49152), 16, marks=pytest.mark.slow),
    ],
    ids=["ragged", "part", "SmolLM2-135M"],
)
def test_the_schedule_is_within_the_budget(shape, scratch_mib, twins, monkeypatch):
    monkeypatch.setattr(tiles, "SCRATCH_MIB", scratch_mib)
    case = make_inputs(shape, torch.bfloat16, bias=True, softcap=30.0)
    # Enough rows without gradient for a whole block of them.
    case.grad[:200] = 0.0
    assert_within_budget("triton", case)

    tile = tiles.default_tiles("sm90", "16-bit")["forward"]
    blocks = -(-shape.num_tokens // tile.block_n)
    splits = forward.number_of_splits(shape.num_vocab, tile.block_v)
    assert 1 < splits <= tiles.MAX_SPLITS
    assert twins["forward"].launches == [blocks * splits]
    slabs = len(twins["dweight"].launches)
    assert slabs == len(twins["dlogits"].launches) == len(twins["dhidden"].launches) > 1
    assert len(twins["scatter"].launches) == 1


@pytest.mark.parametrize("num_vocab", [1, 7, 128, 50257, 128256, 151936, 262144, 2**31 - 1])
@pytest.mark.parametrize("block_v", [64, 128, 256])
def test_no_split_is_empty(num_vocab, block_v):
    splits = forward.number_of_splits(num_vocab, block_v)
    width = triton_twin.cdiv(triton_twin.cdiv(num_vocab, block_v), splits) * block_v
    assert 1 <= splits <= tiles.MAX_SPLITS
    assert (splits - 1) * width < num_vocab <= splits * width


@pytest.mark.parametrize("operands", tiles.OPERANDS)
@pytest.mark.parametrize("family", tiles.FAMILIES)
@pytest.mark.parametrize("kernel", tiles.KERNELS)
def test_the_default_tile_fits_and_is_in_the_space(kernel, family, operands):
    default = tiles.default_tiles(family, operands)[kernel]
    assert tiles.fits(default, kernel, family, operands)
    assert default in set(tiles.space(kernel, family, operands))
    # Panels of the filter must not be cut.
    assert kernel not in ("forward", "dlogits") or default.block_v % 64 == 0


def test_the_predicted_times_in_the_document_are_those_of_the_command():
    assert roofline.table() in (ROOT / "docs" / "triton.md").read_text()


def test_a_prediction_counts_every_product_and_byte():
    """One block of rows: each operand once, so the sums can be written down."""
    forward_work = roofline.forward("sm90", 128, 64, 1024)
    assert forward_work.flops == 2 * 128 * 64 * 1024
    assert forward_work.num_bytes == 2 * (1024 * 64 + 128 * 64) + 2 * 3 * 8 * 128 * 4
    backward_work = roofline.backward("sm90", 128, 64, 1024, 128)
    assert backward_work.flops == 3 * forward_work.flops
    dz, hidden, weight = 2 * 128 * 1024, 2 * 128 * 64, 2 * 1024 * 64
    sums = 128 * 64 * (2 * 4 + 4 + 2)
    assert backward_work.num_bytes == 3 * dz + 4 * hidden + 3 * weight + sums
    device = roofline.Device("one", "sm90", 1.0, 1.0)
    assert roofline.Work(1e9, 2e9).milliseconds(device) == (1.0, 2.0)
