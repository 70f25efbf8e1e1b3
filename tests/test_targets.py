"""The parts of the cross compiler, on texts and numbers; tests/test_targets_sweep.py compiles."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import triton

from mcpo_kernels.targets import kept, page
from mcpo_kernels.targets.build import Binary
from mcpo_kernels.targets.devices import TARGETS, blocks_per_processor
from mcpo_kernels.targets.listing import Listing, Loop, read_amdgcn, read_loops, read_sass
from mcpo_kernels.targets.verdict import judge
from mcpo_kernels.targets.workers import run_jobs

LOG = """ptxas info    : Function properties for f
    32 bytes stack frame, 24 bytes spill stores, 28 bytes spill loads
ptxas info    : Used 178 registers, used 1 barriers"""
SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;           /* 0x00000a00ff017624 */
                                                                    /* 0x000fc400078e00ff */
        /*0010*/              @!P0 LDGSTS.E.BYPASS.LTC128B.128 [R3], [R2.64], P1 ;
        /*0020*/                   LDGSTS.E.64 [R3], [R2.64] ;
        /*0030*/                   LDG.E.U16.CONSTANT R4, [R2.64] ;
        /*0040*/             @UP1  HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0050*/                   HMMA.16816.F32.BF16 R24, R4, R6, R24 ;
        /*0060*/                   LDG.E.128 R4, [R2.64] ;
"""
AMD = """
	buffer_load_dwordx4 v[2:5], v1, s[4:7], 0 offen
	buffer_load_ushort v9, v1, s[4:7], 0 offen
	global_load_dword v9, v1, s[4:5]
	v_mfma_f32_32x32x8_bf16 a[0:15], v[2:3], v[4:5], a[0:15]
    .private_segment_fixed_size: 8
    .sgpr_spill_count: 1
    .vgpr_count:     134
    .vgpr_spill_count: 2
"""
LOAD = (
    "ttg.async_copy_global_to_local %p, %b {{contiguity = 8 : i32}} : "
    "tensor<{tile}x!tt.ptr<bf16>, #l> -> <{tile}xbf16>"
)
DOT = "%d = ttng.warp_group_dot %a, %b, %c : !ttg.memdesc<128x64xbf16> -> tensor<128x128xf32>"


def representation(before: list[str], inside: list[str]) -> str:
    """A kernel with a loop of products inside a loop over the vocabulary."""
    lines = [
        '#loc = loc("kernel.py":1:0)',
        'module attributes {"ttg.num-warps" = 8 : i32} {',
        "  tt.func public @f(%h: !tt.ptr<bf16> {tt.divisibility = 16 : i32} loc(#loc),",
        '                    %n: i32 loc("n"(#loc))) attributes {noinline = false} {',
        "    %r = scf.for %v = %c0 to %n step %c1 iter_args(%m = %x) -> (f32)  : i32 {",
        *before,
        "      %s = scf.for %d = %c0 to %n step %c1 iter_args(%y = %x) -> (f32)  : i32 {",
        *inside,
        "        scf.if %q {",
        f"          {DOT} loc(#loc)",
        "        } else {",
        "        } loc(#loc)",
        "        scf.yield %d : f32 loc(#loc)",
        '      } loc("s"(#loc))',
        f"      {DOT} loc(#loc)",
        "      scf.yield %s : f32 loc(#loc)",
        "    } loc(#loc)",
        "    tt.return loc(#loc)",
        "  } loc(#loc)",
        "} loc(#loc)",
    ]
    return "\n".join(lines)


def test_figures_of_a_cuda_binary():
    assert read_sass(SASS, LOG) == Listing(
        registers=178,
        spills=28,
        stack=32,
        products={"mma": 1, "wgmma": 1},
        async_copies=2,
        loads={2: 1, 8: 1, 16: 2},
    )


def test_ptxas_that_says_nothing_is_refused():
    with pytest.raises(ValueError, match="ptxas must report registers and spills, got 'nothing'"):
        read_sass(SASS, "nothing")


def test_figures_of_an_amd_binary():
    assert read_amdgcn(AMD) == Listing(
        registers=134,
        spills=12,
        stack=8,
        products={"mfma": 1},
        async_copies=2,
        loads={2: 1, 4: 1, 16: 1},
    )


def test_an_assembly_without_metadata_is_refused():
    with pytest.raises(ValueError, match=r"the assembly must state \.vgpr_count"):
        read_amdgcn("")


def test_a_loop_is_pipelined_if_what_it_loads_is_loaded_before_it_too():
    hidden, weight = (
        f"        {LOAD.format(tile=tile)} loc(#loc)" for tile in ("128x64", "64x128")
    )
    both = ("128x64xbf16", "64x128xbf16")
    found = read_loops(representation([hidden, weight], [hidden, weight]))
    assert found == (Loop(tiles=both, pipelined=True, copied_bytes=16),)
    found = read_loops(representation([hidden], [hidden, weight]))
    assert found == (Loop(tiles=both, pipelined=False, copied_bytes=16),)


def test_a_plain_load_in_a_loop_of_products_is_seen():
    load = "        %t = tt.load %p, %m : tensor<64x128x!tt.ptr<f32>, #l> loc(#loc)"
    assert read_loops(representation([], [load])) == (Loop(tiles=("64x128xf32",), pipelined=False),)
    buffer = "        %t = amdg.buffer_load %p[%o], %m : !tt.ptr<f32> -> tensor<64x128xf32, #l>"
    assert read_loops(representation([buffer], [buffer]))[0].pipelined


# The table "Technical Specifications per Compute Capability": 65536 registers and 64 warps of an
# A100, 48 warps of sm_89; of CDNA 3 512 registers a lane.
@pytest.mark.parametrize(
    ("target", "takes", "blocks"),
    [
        ("sm_80", {"registers": 32, "shared": 0, "warps": 8}, 8),
        ("sm_80", {"registers": 128, "shared": 0, "warps": 8}, 2),
        ("sm_80", {"registers": 255, "shared": 0, "warps": 8}, 1),
        ("sm_80", {"registers": 129, "shared": 0, "warps": 4}, 3),
        ("sm_80", {"registers": 32, "shared": 80 * 1024, "warps": 8}, 2),
        ("sm_80", {"registers": 32, "shared": 82 * 1024, "warps": 8}, 1),
        ("sm_89", {"registers": 32, "shared": 0, "warps": 8}, 6),
        ("sm_89", {"registers": 32, "shared": 99 * 1024, "warps": 8}, 1),
        ("sm_89", {"registers": 32, "shared": 100 * 1024, "warps": 8}, 0),
        ("sm_100", {"registers": 32, "shared": 0, "warps": 4, "columns": 256}, 2),
        ("gfx942", {"registers": 128, "shared": 0, "warps": 8}, 2),
        ("gfx942", {"registers": 64, "shared": 32 * 1024, "warps": 4}, 2),
    ],
)
def test_how_many_blocks_a_processor_holds(target, takes, blocks):
    assert blocks_per_processor(TARGETS[target], **takes) == blocks


GOOD = Binary(
    listing=Listing(registers=128, spills=0, stack=0, products={"mma": 8}, loads={16: 4}),
    loops=(Loop(tiles=("128x64xbf16",), pipelined=True),),
    shared=65536,
    warps=8,
    tensor_columns=0,
)


def verdict(binary: Binary, target: str = "sm_80", **config: Any) -> Any:
    case = SimpleNamespace(
        target=TARGETS[target],
        launch=SimpleNamespace(kernel="f"),
        config={"dtype": "bf16"} | config,
        default=True,
    )
    return judge(case, binary)  # type: ignore[arg-type]


def changed(**listing: Any) -> Binary:
    return dataclasses.replace(GOOD, listing=dataclasses.replace(GOOD.listing, **listing))


def test_a_good_binary_passes():
    row = verdict(GOOD)
    assert row.ok
    assert row.why == ()
    assert (row.blocks, row.occupancy, row.tensor_core_ops) == (2, 0.25, 8)


@pytest.mark.parametrize(
    ("binary", "why"),
    [
        (changed(spills=4), "spills 4 bytes"),
        (dataclasses.replace(GOOD, shared=170_000), "shared memory 170000 > 166912 bytes"),
        (changed(registers=255, products={}), "no tensor core instruction"),
        (
            dataclasses.replace(GOOD, loops=(Loop(tiles=("64x64xbf16",), pipelined=False),)),
            "loads of 64x64xbf16 are not pipelined",
        ),
        (
            dataclasses.replace(GOOD, loops=(dataclasses.replace(GOOD.loops[0], copied_bytes=4),)),
            "tiles are copied by 4 bytes",
        ),
        (changed(loads={8: 4}), "no load of 16 bytes"),
        (dataclasses.replace(GOOD, warps=64, shared=0), "not one block fits a processor"),
    ],
)
def test_every_fault_is_named(binary, why):
    row = verdict(binary)
    assert not row.ok
    assert row.why == (why,)


def test_float32_as_it_is_needs_no_tensor_core():
    row = verdict(changed(products={}), dtype="fp32", precision="ieee")
    assert row.ok
    assert row.tensor_core_ops is None
    assert not verdict(changed(products={}), dtype="fp32", precision="tf32").ok


def test_only_tf32_may_load_a_tile_by_elements():
    loop = dataclasses.replace(GOOD.loops[0], copied_bytes=4)
    narrow = dataclasses.replace(changed(loads={4: 4}), loops=(loop,))
    assert verdict(narrow, dtype="fp32", precision="tf32x3").ok
    for dtype in ("fp32", "bf16"):
        assert verdict(narrow, dtype=dtype).why == (
            "tiles are copied by 4 bytes",
            "no load of 16 bytes",
        )


def test_a_kernel_without_products_needs_neither_loops_nor_tensor_cores():
    row = verdict(dataclasses.replace(changed(products={}, loads={4: 1}), loops=()))
    assert row.ok
    assert row.pipelined is None


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Kernels that were compiled, in a cache of their own."""
    seen: list[str] = []

    def build(launch: Any, target: Any) -> Binary:
        seen.append(f"{launch.kernel} {target.name}")
        return GOOD

    monkeypatch.setenv("MCPO_CACHE", str(tmp_path))
    monkeypatch.setattr(kept, "build", build)
    return seen


def launch(source: str = "a", identity: str = "i") -> Any:
    return SimpleNamespace(
        kernel="f", identity=identity, function=SimpleNamespace(cache_key=source)
    )


def test_what_was_compiled_is_kept_until_something_that_decides_it_changes(made, monkeypatch):
    def build(launch: Any, target: str = "sm_80", fresh: bool = False) -> Binary:
        return kept.build_once(launch, TARGETS[target], fresh=fresh)

    assert build(launch()) == build(launch()) == GOOD
    assert made == ["f sm_80"]
    build(launch(), fresh=True)
    build(launch(source="b"))
    build(launch(identity="j"))
    build(launch(), target="sm_90")
    assert len(made) == 5
    monkeypatch.setattr(kept, "_constant_parts", lambda: ["another version"])
    build(launch())
    assert len(made) == 6
    assert len(list(kept.folder().iterdir())) == 5


def test_the_versions_of_compilers_and_readers_decide_what_is_kept():
    version, tools, *sources = kept._constant_parts()
    assert version == triton.__version__
    assert "ptxas" in tools
    assert any("def read_sass" in source for source in sources)
    assert any("def build(" in source for source in sources)


def square_or_die(number: int) -> int | str:
    if number == 3:
        os._exit(7)
    return number * number


def test_a_process_that_dies_takes_one_job_with_it():
    found = run_jobs(square_or_die, range(6), 2, lambda job, code: f"{job} ended with {code}")
    assert sorted(map(str, found)) == ["0", "1", "16", "25", "3 ended with 7", "4"]


def row(**fields: Any) -> dict[str, Any]:
    origin = {
        "date": "2026-01-01T00:00:00+00:00",
        "command": "python -m mcpo_kernels.targets",
        "commit": "abc1234",
        "dirty": "no",
        "triton": "3.9.0",
        "ptxas": "12.9",
        "ptxas-blackwell": "13.4",
    }
    found = json.loads(json.dumps(dataclasses.asdict(verdict(GOOD, head="plain", num_warps=8))))
    found["config"]["num_stages"] = 3
    return found | {"provenance": origin} | fields


def test_the_page_is_written_from_rows_alone(tmp_path: Path):
    rows, target = tmp_path / "rows.jsonl", tmp_path / "page.md"
    bad = row(ok=False, why=["spills 8 bytes"], default=False)
    rows.write_text("".join(json.dumps(each) + "\n" for each in (row(), bad)))
    target.write_text(f"# Title\n{page.BEGIN}\nold\n{page.END}\nafter\n")
    page.write(rows, target)
    text = target.read_text()
    assert text.startswith("# Title\n")
    assert text.endswith(f"{page.END}\nafter\n")
    assert "old" not in text
    assert "commit abc1234, Triton 3.9.0, ptxas 12.9" in text
    assert (
        "| `f` | sm_80 | plain | -x-x- w8 s3 | 128 | 0 | 64 (163) | 25% | 8 mma | 0 "
        "| 4 of 4 | yes | ok |" in text
    )
    assert "| `f` | bf16 | 1 of 2 |" in text
    assert "- spills: 1" in text


def test_a_page_without_marks_is_refused(tmp_path: Path):
    rows, target = tmp_path / "rows.jsonl", tmp_path / "page.md"
    rows.write_text(json.dumps(row()))
    target.write_text("# Title\n")
    with pytest.raises(ValueError, match=r"page\.md must have the lines .* restore them"):
        page.write(rows, target)
