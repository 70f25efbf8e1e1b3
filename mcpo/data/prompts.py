"""Prompts of the verifiable data set: a request from a list of topics, one or two instructions.

A topic belongs to one split only, and the kinds in ``UNSEEN_KINDS`` are asked for in the held-out
split alone: a better pass rate there shows that following instructions was learnt, not just these.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mcpo.data.instructions import KINDS, PAIRS, UNSEEN_KINDS, Arg, Check

SPLITS = ("train", "validation", "heldout")
TOPICS_FILE = Path(__file__).resolve().parents[2] / "recipes" / "data" / "verifiable_topics.yaml"
# Of the topics of a category; the rest are for training.
_VALIDATION_TOPICS = 4
_HELDOUT_TOPICS = 10
_PROMPTS_PER_TOPIC = {"train": 4, "validation": 2, "heldout": 2}
# One prompt in so many has two instructions.
_PAIR_EVERY = 5
_LENGTH_HINTS = (
    "Answer in one or two short sentences.",
    "Keep it to one or two sentences.",
    "Be brief.",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifiablePrompt:
    """A prompt with the checks its answer must pass."""

    prompt_id: str
    split: str
    topic: str
    """The request without its instructions; several prompts may share it."""
    text: str
    checks: tuple[Check, ...]

    @property
    def unseen_kind(self) -> bool:
        """Whether a check is of a kind that no training prompt asks for."""
        return any(check.kind in UNSEEN_KINDS for check in self.checks)


def read_topics(path: Path = TOPICS_FILE) -> dict[str, list[str]]:
    """Category to requests, as the file lists them."""
    import yaml

    topics: dict[str, list[str]] = yaml.safe_load(path.read_text(encoding="utf-8"))
    everything = [topic for listed in topics.values() for topic in listed]
    twice = sorted({topic for topic in everything if everything.count(topic) > 1})
    if twice:
        raise ValueError(
            f"{path}: every topic must be listed once, or splits overlap; twice: {twice}"
        )
    return topics


def split_topics(topics: Mapping[str, Sequence[str]], seed: int) -> dict[str, list[str]]:
    """Deal the topics of every category out to the splits."""
    dealt: dict[str, list[str]] = {split: [] for split in SPLITS}
    for category in sorted(topics):
        shuffled = random.Random(f"{seed}/{category}").sample(
            topics[category], k=len(topics[category])
        )
        heldout_end = _VALIDATION_TOPICS + _HELDOUT_TOPICS
        dealt["validation"] += shuffled[:_VALIDATION_TOPICS]
        dealt["heldout"] += shuffled[_VALIDATION_TOPICS:heldout_end]
        dealt["train"] += shuffled[heldout_end:]
    return dealt


def build_prompts(seed: int, topics: Mapping[str, Sequence[str]]) -> list[VerifiablePrompt]:
    """All prompts of all splits; a function of its arguments alone."""
    prompts: list[VerifiablePrompt] = []
    for split, listed in split_topics(topics, seed).items():
        rng = random.Random(f"{seed}/{split}")
        asked = listed * _PROMPTS_PER_TOPIC[split]
        for index, (topic, kinds) in enumerate(
            zip(asked, _deal_kinds(rng, split, asked), strict=True)
        ):
            checks = tuple(Check(kind=kind, args=rng.choice(KINDS[kind].choices)) for kind in kinds)
            prompts.append(
                VerifiablePrompt(
                    prompt_id=f"{split}-{index:04d}",
                    split=split,
                    topic=topic,
                    text=phrase(rng, topic, checks),
                    checks=checks,
                )
            )
    return prompts


def _deal_kinds(rng: random.Random, split: str, topics: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Kinds for each prompt: all equally often, now and then a pair, none twice for one topic."""
    singles = [(kind,) for kind in KINDS if kind not in UNSEEN_KINDS]
    if split == "heldout":
        singles += [(kind,) for kind in UNSEEN_KINDS] * 2
    used: dict[str, set[tuple[str, ...]]] = {topic: set() for topic in topics}
    pending: list[tuple[str, ...]] = []
    for topic in topics:
        # A second turn is begun early, so that there is always something left to choose from.
        if len(pending) < len(singles):
            pairs = rng.sample(PAIRS, k=len(singles) // (_PAIR_EVERY - 1))
            pending += rng.sample(singles + pairs, k=len(singles) + len(pairs))
        chosen = next(index for index, kinds in enumerate(pending) if kinds not in used[topic])
        used[topic].add(pending[chosen])
        yield pending.pop(chosen)


def phrase(rng: random.Random, topic: str, checks: Sequence[Check]) -> str:
    """The request, how long the answer should be (unless a check says so), the instructions."""
    parts = [topic]
    if not any(KINDS[check.kind].sets_length for check in checks):
        parts.append(rng.choice(_LENGTH_HINTS))
    parts += [put_in_words(rng.choice(KINDS[check.kind].phrasings), check.args) for check in checks]
    return " ".join(parts)


def put_in_words(phrasing: str, args: Mapping[str, Arg]) -> str:
    """Fill in the arguments; "(s)" after a count becomes a plural where there is more than one."""
    plural = "" if args.get("count") == 1 else "s"
    return phrasing.format(**args).replace("(s)", plural)
