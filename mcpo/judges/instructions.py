"""What a language model that judges is told, and how its answer is read.

The instructions are a text file with three placeholders, ``{prompt}``, ``{answer_a}`` and
``{answer_b}``, each once; ``judges/pairwise.txt`` is the default. The answer must hold exactly one
of ``[[A]]``, ``[[B]]`` and ``[[tie]]``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from mcpo.judges.verdict import Comparison, Verdict

DEFAULT = Path(__file__).parent / "pairwise.txt"
_PLACEHOLDERS = ("prompt", "answer_a", "answer_b")
_PLACEHOLDER = re.compile(r"\{(" + "|".join(_PLACEHOLDERS) + r")\}")
_LABEL = re.compile(r"\[\[\s*(A|B|tie)\s*\]\]", re.IGNORECASE)
_VERDICTS = {"a": Verdict.FIRST, "b": Verdict.SECOND, "tie": Verdict.TIE}


@dataclass(frozen=True, slots=True)
class Instructions:
    """The text of the file."""

    template: str

    @classmethod
    def read(cls, path: Path = DEFAULT) -> Instructions:
        """From a file.

        Raises:
            FileNotFoundError: there is none.
            ValueError: a placeholder is missing or there twice.
        """
        if not path.is_file():
            raise FileNotFoundError(f"judge instructions must be a text file, got {path}")
        template = path.read_text(encoding="utf-8")
        counts = {name: template.count(f"{{{name}}}") for name in _PLACEHOLDERS}
        if set(counts.values()) != {1}:
            raise ValueError(
                f"judge instructions must hold each of {{prompt}}, {{answer_a}}, {{answer_b}} "
                f"once, and {path} holds {counts}"
            )
        return cls(template)

    def fill(self, comparison: Comparison) -> str:
        """The message to the judge.

        One pass over the template, so that a placeholder inside an answer stays the text it is.
        """
        values = {
            "prompt": comparison.prompt,
            "answer_a": comparison.first,
            "answer_b": comparison.second,
        }
        return _PLACEHOLDER.sub(lambda found: values[found[1]], self.template)


def parse(answer: str) -> Verdict:
    """The verdict in a judge's answer; abstain unless it holds exactly one label, however often.

    Answers that are judged may themselves contain labels and be quoted, which is why a judge that
    names two is not believed in either.
    """
    labels = {label.lower() for label in _LABEL.findall(answer)}
    return _VERDICTS[labels.pop()] if len(labels) == 1 else Verdict.ABSTAIN
