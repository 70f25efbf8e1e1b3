"""What test_engine_ranks.py runs: what a step of an engine takes of a process' memory.

torchrun --nproc-per-node 2 tests/engine_memory.py FILE ENGINE

Large blocks must go back to the system when they are freed (MALLOC_MMAP_THRESHOLD_), so that the
resident memory is what is held.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from engine_ranks import CPU, references_of, whole_persist_nothing, work_of
from transformers import LlamaConfig, LlamaForCausalLM

from mcpo.cli import launch_file, make_config, read_yaml
from mcpo.engine.choose import make_engine
from mcpo.policy import Policy
from mcpo.step import train_step

CONFIG = LlamaConfig(
    vocab_size=32000,
    hidden_size=512,
    intermediate_size=1536,
    num_hidden_layers=12,
    num_attention_heads=8,
    num_key_value_heads=8,
    tie_word_embeddings=False,
)


def resident(kind: str) -> int:
    """Bytes now ("VmRSS") or at most since the last ``forget`` ("VmHWM")."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(kind)]
    return int(line.split()[1]) * 1024


def forget() -> None:
    """Begin to look for the most anew."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")


def main(file: Path, name: str) -> None:
    config = make_config(read_yaml(launch_file(name)) | {"bf16": False})
    if config.scale.engine == "deepspeed":
        from mcpo.engine import zero

        whole_persist_nothing(zero)
    # Once through everything small, so that what libraries take for good is taken.
    before = resident("VmRSS")
    torch.manual_seed(0)
    policy = Policy(
        LlamaForCausalLM(CONFIG), head_impl="auto", autocast_dtype=None, recompute="selective"
    )
    sizes = {
        name: sum(weight.nbytes for weight in module.parameters())
        for name, module in (("all", policy), ("head", policy.model.lm_head))
    }
    references = references_of(policy)
    engine = make_engine(config.scale.engine, policy, config, CPU)
    del policy
    peaks = []
    for step in range(3):
        forget()
        work = work_of(step, (0, 1, 2, 3), engine.rank, engine.world_size)
        train_step(engine, work, references, config)
        peaks.append(resident("VmHWM") - before)
    gc.collect()
    found = {"name": name, **sizes, "peak": peaks[-1], "between": resident("VmRSS") - before}
    shares = engine.gather(found)
    if engine.rank == 0:
        file.write_text(json.dumps(shares))
        print(json.dumps(shares))


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main(Path(sys.argv[1]), sys.argv[2])
    dist.destroy_process_group()
