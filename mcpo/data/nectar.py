"""Nectar's columns: ``prompt`` is a transcript, ``answers`` are ranked and rank 1 is best."""

from __future__ import annotations

from mcpo.data.conversation import parse_transcript
from mcpo.data.ranking import Ties, best_first
from mcpo.data.raw import RawRow
from mcpo.findings import Tally
from mcpo.records import Candidate, CandidateRow


def read_nectar(raw: RawRow, *, drop_second: bool, ties: Ties, tally: Tally) -> CandidateRow | None:
    """Rank 1 is chosen; rank 2 is too close to it to be a negative (``second_best``).

    Raises:
        ValueError: a column is missing or wrong.
    """
    text = raw.text("prompt")
    prompt = parse_transcript(text)
    if prompt is None:
        raise raw.wrong(
            "prompt", r"a transcript '\n\nHuman: ...\n\nAssistant: ' that waits for the assistant"
        )
    answers = [
        Candidate(
            text=entry.text("answer"),
            rank=entry.number("rank"),
            model=entry.optional_text("model"),
        )
        for entry in raw.entries("answers")
    ]
    kept: list[Candidate] = []
    for answer in answers:
        if drop_second and answer.rank == 2:
            tally.add("second_best", raw.row_id)
        else:
            kept.append(answer)
    if not kept:
        tally.add("empty_pool", raw.row_id)
        return None
    return best_first(raw, prompt, kept, ties=ties, tally=tally)
