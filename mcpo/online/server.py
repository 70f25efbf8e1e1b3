"""Answers of a model behind an OpenAI-compatible server: vLLM, SGLang, ``transformers serve``."""

from __future__ import annotations

import os
import shlex
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mcpo.online.plan import Answers, Prompt, SamplingPlan, cut_at_stop
from mcpo.records import Candidate


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerConfig:
    """Where the server is and how it is asked."""

    base_url: str
    """For example http://localhost:8000/v1."""
    model: str
    """The name the server knows the model by; ``{model}`` of a started one is its folder."""
    api_key_variable: str = "OPENAI_API_KEY"
    """The environment variable with the key, if the server wants one; written nowhere."""
    concurrency: int = 32
    """Requests under way at a time."""
    timeout_s: float = 600.0
    max_retries: int = 5
    """With back-off, of timeouts, lost connections, and the statuses 408, 409, 429 and 5xx."""


class GenerationError(RuntimeError):
    """A server did not answer; what it answered before is kept by the caller."""


class ServerGenerator:
    """Samples over HTTP, an answer per request, so that each has a seed of its own.

    A server that keeps prefixes reads a prompt once all the same. Answers do not depend on the
    order of requests as far as the server honours seeds.

    Raises:
        ModuleNotFoundError: the openai client is missing.
    """

    def __init__(self, config: ServerConfig) -> None:
        try:
            from openai import OpenAI
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "generation by a server needs the openai client, which is not installed; "
                "pip install 'mcpo[judge]'"
            ) from error
        self.config = config
        self._client = OpenAI(
            base_url=config.base_url,
            # A server of one's own asks for no key, and the client wants one.
            api_key=os.environ.get(config.api_key_variable, "none"),
            timeout=config.timeout_s,
            max_retries=config.max_retries,
        )

    def sample(self, prompts: Sequence[Prompt], plan: SamplingPlan) -> Iterable[Answers]:
        """As ``Generator``; prompts come in the order they are done.

        Raises:
            GenerationError: a request failed after all retries.
        """
        settings = plan.settings
        open_prompts: dict[str, dict[int, Candidate]] = {each.row_id: {} for each in prompts}
        pool = ThreadPoolExecutor(self.config.concurrency)
        try:
            work = {
                pool.submit(self._ask, prompt, plan, *setting): (prompt, place)
                for prompt in prompts
                for place, setting in enumerate(settings)
            }
            for done in as_completed(work):
                prompt, place = work[done]
                answers = open_prompts[prompt.row_id]
                answers[place] = done.result()
                if len(answers) == len(settings):
                    yield prompt, [answers[number] for number in range(len(settings))]
        finally:
            # An error, or a caller who wants no more, leaves nothing behind but what is under way.
            pool.shutdown(cancel_futures=True)

    def _ask(self, prompt: Prompt, plan: SamplingPlan, temperature: float, index: int) -> Candidate:
        messages: Any = prompt.prompt
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        request: dict[str, Any] = {
            "model": self.config.model,
            "messages": list(messages),
            "temperature": temperature,
            "max_tokens": plan.max_new_tokens,
            "seed": plan.seed_of(prompt.row_id, temperature, index),
        }
        if plan.stop:
            request["stop"] = list(plan.stop)
        try:
            response: Any = self._client.chat.completions.create(**request)
            choice = response.choices[0]
            text, reason = choice.message.content or "", choice.finish_reason
        # Whatever goes wrong in a request is one thing to the caller: there is no answer.
        except Exception as error:
            raise GenerationError(
                f"{self.config.model} at {self.config.base_url} did not answer prompt "
                f"{prompt.row_id!r} ({type(error).__name__}, after the client's retries); what was "
                "answered is kept: start again to ask for the rest"
            ) from error
        candidate = Candidate(text=text.strip(), finished=reason == "stop", model=self.config.model)
        return cut_at_stop(candidate, plan.stop)


@contextmanager
def serving(
    command: str, model: Path, base_url: str, log: Path, *, patience_s: float = 900.0
) -> Generator[None]:
    """A server started for these weights, until the block ends.

    Args:
        command: for example ``vllm serve {model} --port 8000``; no shell reads it.
        model: the checkpoint folder put in the place of ``{model}``.
        base_url: where it will answer; asked for its models until it does.
        log: file for what it prints.
        patience_s: how long it may take to come up.

    Raises:
        ValueError: the command has no place for the model.
        GenerationError: the server ended, or did not come up in time.
    """
    if "{model}" not in command:
        raise ValueError(f"a server's command must hold {{model}}, got {command!r}")
    words = [word.replace("{model}", str(model)) for word in shlex.split(command)]
    with log.open("ab") as output:
        process = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT)
    try:
        _wait_until_up(process, base_url, log, patience_s)
        yield
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_up(
    process: subprocess.Popen[bytes], base_url: str, log: Path, patience_s: float
) -> None:
    until = time.monotonic() + patience_s
    while time.monotonic() < until:
        if process.poll() is not None:
            raise GenerationError(
                f"the server ended with status {process.returncode} before it answered; see {log}"
            )
        try:
            with urllib.request.urlopen(f"{base_url}/models", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise GenerationError(
        f"the server did not answer at {base_url} in {patience_s:.0f} s; see {log}"
    )
