"""The options of an online run: those of training and these."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mcpo.config import Config
from mcpo.config.options import option, require


@dataclass(frozen=True, kw_only=True, slots=True)
class OnlineConfig:
    """Segments, generation and judging."""

    prompts: str = option("", "JSONL of id, prompt and, for judge: verifiable, checks")
    segments: int = option(3, "parts of the run; at the start of each, answers are made anew")
    prompts_per_segment: int | None = option(
        None, "answered at the start of each; unset: as many as its steps have groups"
    )
    generator: Literal["local", "server"] = option(
        "local", "answers of this process, or of an OpenAI-compatible server"
    )
    temperatures: tuple[float, ...] = option((0.4, 0.7, 1.0), "of the answers")
    samples_per_temperature: int = option(2, "answers at each temperature")
    max_new_tokens: int = option(256, "at which an answer is cut")
    stop: tuple[str, ...] = option((), "an answer ends before the first of these")
    generation_batch_size: int = option(16, "prompts at a time, for generator: local")
    server_base_url: str | None = option(
        None, "for generator: server, such as http://localhost:8000/v1"
    )
    server_command: str | None = option(
        None, "starts a server on {model}, the policy's folder; unset: see the docs"
    )
    server_model: str = option("{model}", "the name the server knows the policy by")
    server_concurrency: int = option(32, "requests at a time")
    judge: Literal["verifiable", "reward", "reward_model", "llm"] = option(
        "verifiable", "checks, a function, a sequence classifier, or a language model by tournament"
    )
    reward: str | None = option(None, "for judge: reward, package.module:function")
    reward_model: str | None = option(None, "for judge: reward_model, a folder or name")
    judge_model: str | None = option(None, "for judge: llm, its name at the endpoint")
    judge_base_url: str | None = option(None, "of the judge's endpoint; its key: OPENAI_API_KEY")
    judge_instructions: str | None = option(None, "text file in place of the judge's own")
    judge_one_order: bool = option(False, "ask the judge once per pair, in an order by lot")
    judge_concurrency: int = option(8, "requests to the judge at a time")

    def __post_init__(self) -> None:
        for name in (
            "segments",
            "server_concurrency",
            "judge_concurrency",
            "generation_batch_size",
        ):
            require(getattr(self, name) >= 1, f"{name} must be at least 1", getattr(self, name))
        require(
            self.prompts_per_segment is None or self.prompts_per_segment >= 1,
            "prompts_per_segment must be at least 1",
            self.prompts_per_segment,
        )
        require(
            self.generator == "local" or self.server_base_url is not None,
            "generator: server needs server_base_url",
            self.server_base_url,
        )
        wanted = {"reward": "reward", "reward_model": "reward_model", "llm": "judge_model"}
        name = wanted.get(self.judge)
        require(
            name is None or getattr(self, name) is not None,
            f"judge: {self.judge} needs {name}",
            None,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class OnlineRun(Config):
    """Everything an online run is told."""

    online: OnlineConfig = field(default_factory=OnlineConfig)

    def __post_init__(self) -> None:
        # By name: a dataclass with slots is another class than the one that super() looks for.
        Config.__post_init__(self)
        require(bool(self.online.prompts), "prompts must name a file", self.online.prompts)
        require(
            not self.data.train_data,
            "an online run makes its training rows itself: leave out train_data",
            [source.path for source in self.data.train_data],
        )
        steps = self.optim.max_steps
        require(
            steps >= self.online.segments,
            "max_steps must be given, at least one for each segment, since there are no rows yet "
            "whose epochs could be counted",
            steps,
        )
