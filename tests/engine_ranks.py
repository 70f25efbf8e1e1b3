"""What test_engine_ranks.py runs: an engine on several ranks, beside one process on all rows.

torchrun --nproc-per-node 2 tests/engine_ranks.py FOLDER ENGINE...
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import build_model, build_tokenizer
from test_step import GROUPS

from mcpo import checkpoint, step
from mcpo.checkpoint import TrainState
from mcpo.cli import launch_file, make_config, read_yaml
from mcpo.config import Config
from mcpo.encode import make_encoder
from mcpo.engine import Engine, choose
from mcpo.engine.fsdp2 import FSDP2Engine, gathered
from mcpo.engine.single import SingleEngine
from mcpo.engine.whole import on_host
from mcpo.evaluate.generate import greedy
from mcpo.optimizer import build_optimizer
from mcpo.order import rank_share
from mcpo.pack import pack
from mcpo.policy import Policy, group_logps, unpacked
from mcpo.reference_cache import ReferenceLogps
from mcpo.self_check import FLOAT32_UNITS, check_packing
from mcpo.step import StepWork, train_step

Make = Callable[[Policy, Config], Engine]
CPU = torch.device("cpu")
EPS = torch.finfo(torch.float32).eps
# As in test_run.py: AdamW that is gradient descent, which neither hides a factor nor makes a full
# step of the rounding of a gradient near 0.
DESCENT = {"adam_epsilon": 1e6, "learning_rate": 1e5, "adam_beta1": 0, "max_grad_norm": 0.5}
# The rows of each step: of two ranks both have some, one has one more, one has none.
STEPS = ((0, 1, 2, 3), (4, 5, 0), (2,))


def policy_of(recompute: str, *, tied: bool, seed: int = 0, dtype: Any = None) -> Policy:
    model = build_model(seed, tied=tied)
    if dtype is not None:
        # As a model is that was trained in that type: its weights lose nothing when they are cast.
        for weight in model.parameters():
            weight.data = weight.data.to(dtype).float()
    return Policy(model, head_impl="auto", autocast_dtype=dtype, recompute=recompute)


def alone(config: Config, recompute: str, *, tied: bool, dtype: Any = None) -> SingleEngine:
    policy = policy_of(recompute, tied=tied, dtype=dtype).train()
    return SingleEngine(policy, build_optimizer(policy, config.optim), CPU)


def references_of(policy: Policy) -> ReferenceLogps:
    batch = pack(GROUPS, share_prefix=True)
    with torch.no_grad():
        logp_PC = group_logps(policy(batch), batch).tolist()
    rows = zip(GROUPS, logp_PC, strict=True)
    return ReferenceLogps(logps={g.row_id: tuple(row[: g.num_candidates]) for g, row in rows})


def work_of(number: int, rows: tuple[int, ...], rank: int = 0, size: int = 1) -> StepWork:
    """A group is a micro-batch, so ranks differ in their number of them."""
    mine = rank_share(rows, rank, size)
    batches = tuple(pack([GROUPS[row]], share_prefix=True) for row in mine or rows[:1])
    return StepWork(
        step=number, batches=batches, num_prompts=len(rows), weight=1.0 if mine else 0.0
    )


class Draws(list[list[int]]):
    """The negatives of every prompt in the order they are drawn."""

    def __init__(self) -> None:
        self._original = step.sample_negatives

    def __enter__(self) -> Draws:
        step.sample_negatives = self._note
        return self

    def __exit__(self, *_: object) -> None:
        step.sample_negatives = self._original

    def _note(self, *arguments: Any, **options: Any) -> Any:
        draw = self._original(*arguments, **options)
        self += draw.negative_PM.tolist()
        return draw


def compare_metrics(mine: dict[str, float], theirs: dict[str, float], what: object) -> None:
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        # Of sums of at most some hundred log-probs, in another order.
        assert abs(mine[name] - value) <= FLOAT32_UNITS * EPS * (100 + abs(value)), (what, name)


def check_update(engine: Engine, config: Config, recompute: str, *, tied: bool) -> SingleEngine:
    """Three steps of all ranks are those of one process; returns that process' engine."""
    what = (type(engine).__name__, config.scale, recompute, tied)
    one = alone(config, recompute, tied=tied)
    references = references_of(one.policy)
    for number, rows in enumerate(STEPS):
        with Draws() as expected:
            wanted = train_step(one, work_of(number, rows), references, config)
        work = work_of(number, rows, engine.rank, engine.world_size)
        with Draws() as drawn:
            got = train_step(engine, work, references, config)
        real = drawn[: len(work.batches)] if work.weight else []
        assert [row for share in engine.gather(real) for row in share] == expected, what
        compare_metrics(got, wanted, what)
        assert wanted["grad_norm"] > 0
    start = build_model(tied=tied).state_dict()
    whole = engine.whole_state()
    for name, weight in one.policy.model.state_dict().items():
        moved = float((weight - start[name]).norm())
        # The bound of test_run.py.
        allowed = EPS * (len(STEPS) * float(weight.norm()) + FLOAT32_UNITS * moved)
        assert moved > 100 * allowed, (what, name)
        assert allowed <= 1e-6 * float(weight.norm()), (what, name)
        assert float((whole[name] - weight).norm()) <= allowed, (what, name)
    return one


def check_bf16(make: Make, config: Config, *, tied: bool) -> None:
    """The log-probabilities are those of one process, bit for bit, and so is what rounding does."""
    one = alone(config, "light", tied=tied, dtype=torch.bfloat16)
    engine = make(policy_of("light", tied=tied, dtype=torch.bfloat16), config)
    dtypes: list[torch.dtype] = []
    engine.policy.model.lm_head.register_forward_hook(
        lambda head, *_: dtypes.append(head.weight.dtype)
    )
    rounding = [check_packing(each.policy, GROUPS, share_prefix=True) for each in (engine, one)]
    assert rounding[0] == rounding[1] > 1e-3
    assert set(dtypes) == {
        torch.bfloat16 if config.scale.engine == "fsdp2" and not tied else torch.float32
    }
    references = references_of(one.policy)
    rows = STEPS[0]
    wanted = train_step(one, work_of(0, rows), references, config)
    got = train_step(engine, work_of(0, rows, engine.rank, engine.world_size), references, config)
    assert got["logps/chosen"] == wanted["logps/chosen"]
    # A replay may round a product otherwise than the forward of other rows did, once.
    eps = torch.finfo(torch.bfloat16).eps
    assert got["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=eps)


def check_uneven_forwards(engine: Engine, one: SingleEngine) -> None:
    """Ranks make different numbers of forwards, packed and plain, and answer as one process."""
    batch = pack(GROUPS, share_prefix=True)
    with torch.no_grad():
        expected = one.policy(batch)
        with engine.together():
            for _ in range(3 * engine.rank):
                error = (engine.policy(batch) - expected).abs().max()
                # Weights are off by a rounding each.
                assert error <= FLOAT32_UNITS * EPS * 100
    encoder = make_encoder(build_tokenizer(), prompt_format="plain", chat_template=None)
    prompts = [group.prompt_ids for group in GROUPS]

    def answers(policy: Policy, some: list[tuple[int, ...]]) -> list[str]:
        with unpacked(policy) as model:
            written = greedy(model, encoder, some, max_new_tokens=6, batch_size=2)
        return [completion.text for completion in written]

    # Rank 0 has five of the six prompts, the others one between them.
    first, second = prompts[:5], prompts[5:]
    with engine.together():
        mine = answers(engine.policy, second if engine.rank else first)
    wanted = answers(one.policy, second if engine.rank else first)
    assert mine == wanted


def check_files(make: Make, engine: Engine, config: Config, folder: Path) -> None:
    """A checkpoint comes back bit for bit, and goes on to the same bits; exports are alike."""
    state = TrainState(step=3, wall_s=0.0, num_tokens=0.0, identity={})
    tokenizer = build_tokenizer()
    saved = checkpoint.save(engine, folder, state, tokenizer=tokenizer, training={}, keep=2)
    again = make(policy_of("light", tied=True, seed=1), config)
    again.load(saved)
    for group in again.optimizer.param_groups:
        group["lr"] = config.optim.learning_rate
    compare_bits(engine, again)
    references = references_of(alone(config, "none", tied=True).policy)
    work = work_of(3, STEPS[0], engine.rank, engine.world_size)
    metrics = [train_step(each, work, references, config) for each in (engine, again)]
    assert metrics[0] == metrics[1]
    compare_bits(engine, again)
    checkpoint.save_model(engine, tokenizer, folder / "model")
    state_dict = on_host(engine.whole_state(), keep=True)
    if engine.rank == 0:
        one = alone(config, "none", tied=True)
        one.policy.model.load_state_dict(state_dict)
        checkpoint.save_model(one, tokenizer, folder / "expected")
        for path in (folder / "expected").iterdir():
            assert path.read_bytes() == (folder / "model" / path.name).read_bytes(), path
    engine.barrier()


def compare_bits(first: Engine, second: Engine) -> None:
    mine, theirs = first.whole_state(), second.whole_state()
    for name in mine:
        assert torch.equal(mine[name], theirs[name]), name


def check(name: str, folder: Path, config: Config) -> None:
    """Everything that is promised of one engine."""

    def make(policy: Policy, config: Config) -> Engine:
        return choose.make_engine(config.scale.engine, policy, config, CPU)

    for recompute, tied in (("none", False), ("selective", False), ("full", True), ("light", True)):
        engine = make(policy_of(recompute, tied=tied), config)
        one = check_update(engine, config, recompute, tied=tied)
    check_uneven_forwards(engine, one)
    check_files(make, engine, config, folder / name)
    for tied in (True, False):
        check_bf16(make, config, tied=tied)


def check_exchange(folder: Path, names: list[str]) -> None:
    """What one sharding engine wrote, the others take up bit for bit."""

    def engine_of(name: str) -> Engine:
        config = make_config(read_yaml(launch_file(name)) | DESCENT)
        return choose.make_engine(
            config.scale.engine, policy_of("light", tied=True, seed=1), config, CPU
        )

    def moment(engine: Engine) -> torch.Tensor:
        head = engine.policy.model.lm_head.weight
        if isinstance(engine, FSDP2Engine):
            return gathered(engine.optimizer.state[head]["exp_avg_sq"])
        return engine.moment(head, "exp_avg_sq")

    source = folder / names[0] / "checkpoint-3"
    for number, name in enumerate(["fsdp2", *names]):
        engine = engine_of(name)
        engine.load(source)
        if number == 0:
            first = engine
            state = TrainState(step=3, wall_s=0.0, num_tokens=0.0, identity={})
            tokenizer = build_tokenizer()
            source = checkpoint.save(
                engine, folder / "exchanged", state, tokenizer=tokenizer, training={}, keep=1
            )
        compare_bits(first, engine)
        assert torch.equal(moment(first), moment(engine)), name
        assert moment(first).abs().max() > 0
        steps = {float(state["step"]) for state in engine.optimizer.state.values()}
        assert steps == {3.0}, name


def whole_persist_nothing(zero: Any) -> None:
    """DeepSpeed keeps small weights whole, and those of a tiny model are all small."""
    original = zero.zero_settings

    def settings(*arguments: Any) -> dict[str, Any]:
        made = original(*arguments)
        made["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return made

    zero.zero_settings = settings


def main(folder: Path, names: list[str]) -> None:
    for name in names:
        values = read_yaml(launch_file(name)) | DESCENT
        if values["engine"] == "deepspeed":
            from mcpo.engine import zero

            whole_persist_nothing(zero)
        check(name, folder, make_config(values))
        if values["engine"] == "fsdp2":
            check(f"{name}-whole", folder, make_config(values | {"whole_gradients": True}))
    if len(names) > 1:
        check_exchange(folder, names)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main(Path(sys.argv[1]), sys.argv[2:])
    dist.destroy_process_group()
