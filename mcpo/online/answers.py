"""Who answers in a segment: the policy in this process, or behind a server."""

from __future__ import annotations

from collections.abc import Generator as Yields
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import nn

from mcpo.encode import make_encoder
from mcpo.engine import rank
from mcpo.engine.ranks import wait_for_all
from mcpo.models import load_model
from mcpo.online.config import OnlineRun
from mcpo.online.local import LocalGenerator
from mcpo.online.plan import Generator
from mcpo.online.server import ServerConfig, ServerGenerator, serving
from mcpo.placement import Placement


@contextmanager
def generator_of(
    config: OnlineRun, policy: str, placement: Placement, folder: Path
) -> Yields[Generator]:
    """The configured one, for a policy given as a folder or a name, until the block ends.

    Raises:
        FileNotFoundError: there is no such model.
        GenerationError: a server does not come up.
    """
    online = config.online
    if online.generator == "local":
        # Sampling has no gradient and keeps no float32 weights, so the dtype of compute will do.
        dtype = placement.autocast_dtype or torch.float32
        model, tokenizer = load_model(policy, dtype=dtype)
        nn.Module.to(model, placement.device).eval()
        encoder = make_encoder(
            tokenizer, prompt_format=config.data.prompt_format, chat_template=None
        )
        yield LocalGenerator(
            model,
            encoder,
            batch_size=online.generation_batch_size,
            model_name=Path(policy).name,
        )
        return
    assert online.server_base_url is not None
    settings = ServerConfig(
        base_url=online.server_base_url,
        model=online.server_model.replace("{model}", policy),
        concurrency=online.server_concurrency,
    )
    # One server for all ranks, started by the first of them.
    started = (
        serving(online.server_command, Path(policy), settings.base_url, folder / "server.log")
        if online.server_command and rank() == 0
        else nullcontext()
    )
    with started:
        wait_for_all()
        yield ServerGenerator(settings)
        wait_for_all()
