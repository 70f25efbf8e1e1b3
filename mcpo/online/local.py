"""Answers of a model in this process, by transformers: prompts are read once, caches kept."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from mcpo.encode import Encoder, encode_prompt
from mcpo.evaluate.generate import Draw, generate_batch
from mcpo.online.plan import Answers, Prompt, SamplingPlan, cut_at_stop
from mcpo.records import Candidate

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LocalGenerator:
    """Samples with a Hugging Face causal LM.

    Args:
        model: as ``unpacked`` yields a policy's.
        encoder: of its tokenizer.
        batch_size: prompts at a time; each has all its answers in the batch.
        model_name: kept beside every answer.
        autocast: entered around every batch.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        encoder: Encoder,
        *,
        batch_size: int = 16,
        model_name: str | None = None,
        autocast: AbstractContextManager[object] | None = None,
    ) -> None:
        self._model = model
        self._encoder = encoder
        self._batch_size = batch_size
        self._model_name = model_name
        self._autocast = autocast or nullcontext()

    def sample(self, prompts: Sequence[Prompt], plan: SamplingPlan) -> Iterable[Answers]:
        """Prompts of like length together, so that little is padded.

        Batches are the caller's prompts in the order of their lengths, whatever order they came in;
        in another batch an answer may part from its twin at a near tie (``generate``).
        """
        ids = {
            each.row_id: encode_prompt(each.prompt, self._encoder, each.row_id) for each in prompts
        }
        ordered = sorted(prompts, key=lambda each: (len(ids[each.row_id]), each.row_id))
        for start in range(0, len(ordered), self._batch_size):
            yield from self._batch(ordered[start : start + self._batch_size], ids, plan)

    def _batch(
        self, prompts: Sequence[Prompt], ids: dict[str, tuple[int, ...]], plan: SamplingPlan
    ) -> Iterator[Answers]:
        draws = [
            [
                Draw(temperature=heat, seed=plan.seed_of(each.row_id, heat, index))
                for heat, index in plan.settings
            ]
            for each in prompts
        ]
        with self._autocast:
            groups = generate_batch(
                self._model,
                self._encoder,
                [ids[each.row_id] for each in prompts],
                draws,
                max_new_tokens=plan.max_new_tokens,
            )
        for each, group in zip(prompts, groups, strict=True):
            candidates = [
                Candidate(
                    text=completion.text, finished=completion.finished, model=self._model_name
                )
                for completion in group
            ]
            yield each, [cut_at_stop(candidate, plan.stop) for candidate in candidates]
