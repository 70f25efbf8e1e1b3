"""A language model as a judge, behind any OpenAI-compatible endpoint (vLLM, SGLang, a provider).

Each pair is asked in both orders, as judges favour a place; see ``combine_orders``. Retries with
back-off are the openai client's own. A comparison that still has no answer fails the call, after
all others are answered and kept, so asking again costs what is missing.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcpo.judges.cache import Answer, AnswerCache
from mcpo.judges.instructions import DEFAULT, Instructions, parse
from mcpo.judges.verdict import Comparison, JudgeError, Verdict, combine_orders

if TYPE_CHECKING:
    from openai import AsyncOpenAI


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgeConfig:
    """Which model judges, and how it is asked."""

    model: str
    """Its name at the endpoint."""
    base_url: str | None = None
    """For example http://localhost:8000/v1; None is the openai client's default."""
    api_key_variable: str = "OPENAI_API_KEY"
    """The environment variable with the key. Keys are read from there alone and never written."""
    instructions: Path = DEFAULT
    """A text file, see ``Instructions``."""
    both_orders: bool = True
    """False asks once, in an order that is random by the pair's content: half the price."""
    temperature: float = 0.0
    max_tokens: int = 512
    concurrency: int = 8
    """Requests under way at a time."""
    timeout_s: float = 120.0
    max_retries: int = 5
    """Of timeouts, lost connections, and the statuses 408, 409, 429 and 5xx."""
    dollars_per_million_prompt_tokens: float = 0.0
    dollars_per_million_completion_tokens: float = 0.0

    def __post_init__(self) -> None:
        for name in ("max_tokens", "concurrency"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(kw_only=True, slots=True)
class Usage:
    """What a judge was asked and what it cost, so far."""

    requests: int = 0
    """Sent, without the client's repeats."""
    cached: int = 0
    """Answered from disk."""
    abstained: int = 0
    """Answers that hold no verdict, or two."""
    contradicted: int = 0
    """Pairs whose two orders name different answers."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    """Both of the requests alone: what is on disk is paid for."""

    def dollars(self, config: JudgeConfig) -> float:
        """The price by the configured rates."""
        return (
            self.prompt_tokens * config.dollars_per_million_prompt_tokens
            + self.completion_tokens * config.dollars_per_million_completion_tokens
        ) / 1e6


class LanguageModelJudge:
    """Compares answers by asking a language model.

    Args:
        config: which one, and how.
        cache: where its answers are kept; None asks anew every time.

    Raises:
        ModuleNotFoundError: the openai client is missing.
        FileNotFoundError, ValueError: of the instructions.
    """

    def __init__(self, config: JudgeConfig, cache: AnswerCache | None = None) -> None:
        try:
            import openai
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "an LLM judge needs the openai client, which is not installed; "
                "pip install 'mcpo[judge]'"
            ) from error
        self.config = config
        self.usage = Usage()
        self._instructions = Instructions.read(config.instructions)
        self._cache = cache
        self._fatal: tuple[type[Exception], ...] = (
            openai.AuthenticationError,
            openai.PermissionDeniedError,
            openai.NotFoundError,
            openai.BadRequestError,
        )

    def compare(
        self,
        comparisons: Sequence[Comparison],
        on_verdict: Callable[[int], None] = lambda _: None,
    ) -> list[Verdict]:
        """One verdict each, in order, whatever the order of the answers.

        Raises:
            JudgeError: a request was refused, or failed after all retries.
        """
        return asyncio.run(self._compare_all(comparisons, on_verdict))

    async def _compare_all(
        self, comparisons: Sequence[Comparison], on_verdict: Callable[[int], None]
    ) -> list[Verdict]:
        from openai import AsyncOpenAI

        gate = asyncio.Semaphore(self.config.concurrency)
        async with AsyncOpenAI(
            base_url=self.config.base_url,
            # A server of one's own asks for no key, and the client wants one.
            api_key=os.environ.get(self.config.api_key_variable, "none"),
            timeout=self.config.timeout_s,
            max_retries=self.config.max_retries,
        ) as client:

            async def one(comparison: Comparison) -> Verdict:
                verdict = await self._verdict(client, gate, comparison)
                on_verdict(1)
                return verdict

            results = await self._gather([one(comparison) for comparison in comparisons])
        failures = [result for result in results if isinstance(result, BaseException)]
        if failures:
            raise JudgeError(
                f"{len(failures)} of {len(comparisons)} comparisons have no answer of "
                f"{self.config.model}; the first failure: {_say(failures[0])}. "
                + ("The other answers are kept; ask again" if self._cache else "Ask again")
            ) from failures[0]
        return [result for result in results if isinstance(result, Verdict)]

    async def _gather(self, work: Sequence[Any]) -> list[Verdict | BaseException]:
        """All results; what every request would meet, such as a wrong key, ends it at once."""
        tasks = [asyncio.ensure_future(each) for each in work]
        if not tasks:
            return []
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            for task in tasks:
                error = task.exception() if task.done() else None
                if isinstance(error, self._fatal):
                    raise JudgeError(
                        f"{self.config.model} refuses every request: {_say(error)}"
                    ) from error
            return await asyncio.gather(*tasks, return_exceptions=True)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _verdict(
        self, client: AsyncOpenAI, gate: asyncio.Semaphore, pair: Comparison
    ) -> Verdict:
        swapped = Comparison(prompt=pair.prompt, first=pair.second, second=pair.first)
        if not self.config.both_orders:
            if _coin(pair):
                return (await self._ask(client, gate, swapped)).swapped
            return await self._ask(client, gate, pair)
        forward, backward = await asyncio.gather(
            self._ask(client, gate, pair), self._ask(client, gate, swapped)
        )
        decided = {Verdict.FIRST, Verdict.SECOND}
        self.usage.contradicted += forward == backward and forward in decided
        return combine_orders(forward, backward)

    async def _ask(self, client: AsyncOpenAI, gate: asyncio.Semaphore, pair: Comparison) -> Verdict:
        request: dict[str, Any] = {
            "model": self.config.model,
            "messages": [{"role": "user", "content": self._instructions.fill(pair)}],
            "temperature": self.config.temperature,
            "max_tokens": self.config.max_tokens,
        }
        answer = self._cache.get(request) if self._cache else None
        if answer is not None:
            self.usage.cached += 1
        else:
            async with gate:
                answer = _answer_of(await client.chat.completions.create(**request))
            self.usage.requests += 1
            self.usage.prompt_tokens += answer.prompt_tokens
            self.usage.completion_tokens += answer.completion_tokens
            if self._cache:
                self._cache.put(request, answer)
        verdict = parse(answer.text)
        self.usage.abstained += verdict is Verdict.ABSTAIN
        return verdict


def _answer_of(response: Any) -> Answer:
    """The text of a response.

    Raises:
        JudgeError: it has none, as from a server that is no chat endpoint.
    """
    choices = getattr(response, "choices", None)
    if not choices or not isinstance(choices[0].message.content, str):
        raise JudgeError(f"a chat completion must have a text, got {str(response)[:200]!r}")
    usage = getattr(response, "usage", None)
    return Answer(
        text=choices[0].message.content,
        prompt_tokens=usage.prompt_tokens if usage else 0,
        completion_tokens=usage.completion_tokens if usage else 0,
    )


def _coin(pair: Comparison) -> bool:
    """A fair coin that belongs to the pair, whichever of its answers stands first."""
    ends = sorted((pair.first, pair.second))
    heads = hashlib.sha256("\0".join((pair.prompt, *ends)).encode()).digest()[0] % 2 == 0
    return heads == (pair.first == ends[0])


def _say(error: BaseException) -> str:
    """Type and first line, short enough for one line; never the request, which holds prompts."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200] if text else 'no message'}"
