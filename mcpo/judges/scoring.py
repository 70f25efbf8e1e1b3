"""Judges that give every answer a number: a program's checks, a function, a reward model."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch

from mcpo.data.instructions import passes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mcpo.evaluate.verifiable import VerifiableItem
    from mcpo.judges.tournament import Group

RewardFunction = Callable[[str, Sequence[str]], Sequence[float]]
"""From a prompt and its answers to a reward for each; larger is better."""


class ScoringJudge(Protocol):
    """Anything that scores the answers of groups."""

    def score(self, groups: Sequence[Group]) -> list[list[float]]:
        """One finite number per answer, larger is better."""
        ...


class FunctionJudge:
    """A reward function of the user's.

    Args:
        function: see ``RewardFunction``.
        name: what errors call it.
    """

    def __init__(self, function: RewardFunction, name: str = "the reward function") -> None:
        self._function = function
        self._name = name

    @classmethod
    def load(cls, path: str) -> FunctionJudge:
        """From an import path, ``package.module:function``.

        Raises:
            ValueError: the path has another form, or names nothing that can be called.
            ModuleNotFoundError: there is no such module.
        """
        module_name, _, name = path.partition(":")
        if not module_name or not name:
            raise ValueError(f"a reward must be named package.module:function, got {path!r}")
        found = getattr(importlib.import_module(module_name), name, None)
        if not callable(found):
            raise ValueError(f"a reward must name a function, and {path!r} is {found!r}")
        return cls(cast("RewardFunction", found), path)

    def score(self, groups: Sequence[Group]) -> list[list[float]]:
        """What the function returns.

        Raises:
            ValueError: not one finite number per answer.
        """
        scores: list[list[float]] = []
        for group in groups:
            texts = [answer.text for answer in group.answers]
            returned = [float(value) for value in self._function(group.prompt, texts)]
            if len(returned) != len(group.answers) or not all(map(math.isfinite, returned)):
                raise ValueError(
                    f"{self._name} must return one finite number per answer, got {returned} for "
                    f"{len(group.answers)} answers"
                )
            scores.append(returned)
        return scores


class VerifiableJudge:
    """The share of a prompt's checks that an answer passes.

    Args:
        items: the prompts with their checks; a group is found by the text of its prompt.
    """

    def __init__(self, items: Sequence[VerifiableItem]) -> None:
        self._items = {item.prompt: item for item in items}

    def score(self, groups: Sequence[Group]) -> list[list[float]]:
        """In [0, 1].

        Raises:
            ValueError: a prompt has no checks.
        """
        scores: list[list[float]] = []
        for group in groups:
            item = self._items.get(group.prompt)
            if item is None:
                raise ValueError(
                    "every prompt must have checks to be judged by them, and this one has none: "
                    f"{group.prompt[:80]!r}"
                )
            scores.append(
                [
                    sum(
                        passes(check, answer.text, finished=answer.finished)
                        for check in item.checks
                    )
                    / len(item.checks)
                    for answer in group.answers
                ]
            )
        return scores


class RewardModelJudge:
    """A Hugging Face sequence classifier with one label, reading prompt and answer as a chat.

    Args:
        model: in the device and dtype to compute in.
        tokenizer: its own; it must have a chat template.
        batch_size: answers per forward.

    Raises:
        ValueError: more than one label, or no chat template.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int = 8
    ) -> None:
        num_labels: Any = model.config.num_labels
        if num_labels != 1:
            raise ValueError(f"a reward model must have one label, got {num_labels}")
        if not tokenizer.chat_template:
            raise ValueError("a reward model's tokenizer must have a chat template, got none")
        self._model = model.eval()
        self._tokenizer: Any = tokenizer
        self._batch_size = batch_size

    @torch.inference_mode()
    def score(self, groups: Sequence[Group]) -> list[list[float]]:
        """The logits, as float32.

        Raises:
            ValueError: a reward is not finite.
        """
        chats = [
            [
                {"role": "user", "content": group.prompt},
                {"role": "assistant", "content": answer.text},
            ]
            for group in groups
            for answer in group.answers
        ]
        flat: list[float] = []
        for start in range(0, len(chats), self._batch_size):
            batch = self._tokenizer.apply_chat_template(
                chats[start : start + self._batch_size],
                padding=True,
                return_tensors="pt",
                return_dict=True,
            ).to(self._model.device)
            flat += self._model(**batch).logits[:, 0].float().tolist()
        if not all(map(math.isfinite, flat)):
            raise ValueError("a reward model must give finite rewards, got NaN or infinity")
        rest = iter(flat)
        return [[next(rest) for _ in group.answers] for group in groups]
