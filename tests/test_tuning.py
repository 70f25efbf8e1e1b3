"""Tuned tiles on disk, with a timer that is made up and a GPU that is not there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mcpo_kernels import tune
from mcpo_kernels.linear_logprob.triton import tiles, tuning
from mcpo_kernels.linear_logprob.triton.tiles import Tile

DEVICE = torch.device("cuda", 0)
ARGUMENTS = (DEVICE, "sm90", torch.bfloat16, 4096)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for tiles, and a GPU by name."""
    monkeypatch.setenv("MCPO_CACHE", str(tmp_path))
    monkeypatch.delenv("MCPO_TUNE", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    tuning.forget()
    tuning._tune_once.cache_clear()
    return tmp_path / "tiles"


@pytest.fixture
def tuned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Kernels that were tuned; the last tile of a space is the fastest."""
    seen: list[str] = []

    def timer(device, dtype, hidden, key):
        seen.append(key.kernel)
        space = list(tiles.space(key.kernel, key.family, key.operands))
        return lambda tile: 10.0 - space.index(tile) / 100 if tile != space[1] else None

    monkeypatch.setattr(tune, "timer", timer)
    return seen


def key(kernel: str = "forward") -> tuning.Key:
    return next(each for each in tuning.keys(*ARGUMENTS) if each.kernel == kernel)


def last(kernel: str) -> Tile:
    return list(tiles.space(kernel, "sm90", "16-bit"))[-1]


def test_without_a_cache_launches_take_the_table(cache, tuned):
    assert tuning.tiles_for(*ARGUMENTS) == tiles.default_tiles("sm90", "16-bit")
    assert tuned == []
    assert not cache.exists()


def test_tuning_when_asked_is_kept_and_read(cache, tuned, monkeypatch):
    monkeypatch.setenv("MCPO_TUNE", "1")
    expected = {kernel: last(kernel) for kernel in tiles.KERNELS}
    assert tuning.tiles_for(*ARGUMENTS) == expected
    assert tuned == list(tiles.KERNELS)
    assert tuning.tiles_for(*ARGUMENTS) == expected
    # As in a new process, which does not ask.
    monkeypatch.delenv("MCPO_TUNE")
    tuning.forget()
    tuning._tune_once.cache_clear()
    assert tuning.tiles_for(*ARGUMENTS) == expected
    assert tuned == list(tiles.KERNELS)
    assert len(list(cache.iterdir())) == len(tiles.KERNELS)


def test_what_is_tuned_already_is_not_tuned_again(tuned, monkeypatch):
    tuning.save(key("dhidden"), last("dhidden"), {})
    monkeypatch.setenv("MCPO_TUNE", "1")
    tuning.tiles_for(*ARGUMENTS)
    assert tuned == ["forward", "dlogits", "dweight"]


def test_nothing_is_tuned_while_a_graph_is_captured(tuned, monkeypatch):
    monkeypatch.setenv("MCPO_TUNE", "1")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert tuning.tiles_for(*ARGUMENTS) == tiles.default_tiles("sm90", "16-bit")
    assert tuned == []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert tuning.tiles_for(*ARGUMENTS)["forward"] == last("forward")


def test_a_key_is_gpu_kernel_hidden_class_dtype_and_triton(monkeypatch):
    first = key()
    others = [
        key("dweight"),
        *tuning.keys(DEVICE, "sm90", torch.float16, 4096)[:1],
        *tuning.keys(DEVICE, "sm90", torch.bfloat16, 8192)[:1],
    ]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    others.append(key())
    fields = {name: getattr(first, name) for name in first.__slots__}
    others.append(tuning.Key(**fields | {"triton": "3.6.0"}))
    assert len({each.path for each in (first, *others)}) == len(others) + 1


def test_another_space_of_tiles_is_another_file(monkeypatch):
    before = key().path
    monkeypatch.setattr(tiles, "REGISTERS", 32)
    assert key().path != before


@pytest.mark.parametrize(
    ("num_hidden", "expected"),
    [(1, 512), (512, 512), (576, 1024), (4096, 4096), (5120, 8192), (20000, 8192)],
)
def test_hidden_sizes_share_a_tile_up_to_a_power_of_two(num_hidden, expected):
    assert tuning.hidden_class(num_hidden) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"tile": {}}',
        '{"tile": {"block_n": 1}}',
        json.dumps({"tile": Tile(1, 2, 3, 4, 5, 6)._asdict()}),
    ],
)
def test_a_broken_file_is_refused_with_what_to_do(cache, text):
    key().path.parent.mkdir(parents=True)
    key().path.write_text(text)
    with pytest.raises(ValueError, match=r"must hold a tile .* delete the file, or tune anew"):
        tuning.tiles_for(*ARGUMENTS)


def test_a_write_that_fails_leaves_the_old_tile(cache, monkeypatch):
    tuning.save(key(), last("forward"), {last("forward"): 1.0})

    def fail(self: Path, target: Path) -> Path:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", fail)
    default = tiles.default_tiles("sm90", "16-bit")["forward"]
    with pytest.raises(OSError, match="no space left"):
        tuning.save(key(), default, {})
    assert tuning.load(key()) == last("forward")


def test_two_writers_of_a_file_do_not_meet(cache, monkeypatch):
    """Not even with one process id, as on two machines that share a folder."""
    names: list[str] = []
    monkeypatch.setattr(Path, "replace", lambda self, target: names.append(self.name))
    for _ in range(2):
        tuning.save(key(), last("forward"), {})
    assert len(set(names)) == 2


def test_an_empty_variable_is_none(monkeypatch):
    monkeypatch.delenv("MCPO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert tuning.folder() == Path("~/.cache/mcpo/tiles").expanduser()


def test_of_one_tile_nothing_is_tuned(tuned, monkeypatch):
    monkeypatch.setenv("MCPO_TUNE", "1")
    found = tuning.tiles_for(DEVICE, "sm90", torch.float32, 4096)
    assert found == tiles.default_tiles("sm90", "fp32")
    assert tuned == []


def test_tiles_that_do_not_run_are_passed_over():
    space = [Tile(64, 64, 32, 4, 2, 8), Tile(128, 64, 32, 4, 2, 8), Tile(64, 128, 32, 4, 2, 8)]
    times = dict(zip(space, (None, 3.0, 2.0), strict=True))
    best, taken = tuning.fastest(space, times.__getitem__)
    assert best == space[2]
    assert taken == {space[1]: 3.0, space[2]: 2.0}
    with pytest.raises(RuntimeError, match="none of the tiles runs on this device"):
        tuning.fastest(space, lambda _: None)


def test_the_interpreter_has_its_own_tiles(tuned, monkeypatch):
    monkeypatch.setenv("MCPO_TUNE", "1")
    found = tuning.tiles_for(torch.device("cpu"), tiles.INTERPRETER, torch.float32, 64)
    assert found == tiles.default_tiles(tiles.INTERPRETER, "fp32")
    assert tuned == []


def test_the_command_without_a_gpu_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main(["--hidden", "4096"]) == 2
    assert "tuning needs a CUDA or ROCm device" in capsys.readouterr().err


def test_the_command_tunes_and_says_what_it_found(capsys, tuned, cache, monkeypatch):
    from mcpo_kernels.linear_logprob.triton import launch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(launch, "family_of", lambda _: "sm90")
    assert tune.main(["--hidden", "4096", "--hidden", "3000"]) == 0
    output = capsys.readouterr().out
    assert tuned == list(tiles.KERNELS)
    assert f"forward: {tuple(last('forward'))}" in output
    assert f"kept in {cache}" in output
