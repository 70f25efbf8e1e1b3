"""Two models' answers side by side with the judge's verdicts, as one HTML file without scripts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from mcpo.evaluate.alpaca import Annotation, preferences, why_not_comparable
from mcpo.evaluate.win_rate import win_rate

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem;
  color: #1b1f24; background: #fff; }
article { border-top: 1px solid #d0d7de; padding: 1rem 0; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; }
.answer { border: 1px solid #d0d7de; border-radius: 6px; padding: .5rem .8rem; }
.answer.better { border-color: #1a7f37; box-shadow: inset 3px 0 #1a7f37; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: inherit; margin: .3rem 0; }
.note { color: #59636e; }
@media (max-width: 50rem) { .pair { grid-template-columns: 1fr; } }
@media (prefers-color-scheme: dark) {
  body { background: #0d1117; color: #e6edf3; }
  .answer, article { border-color: #30363d; }
  .note { color: #9198a1; }
}
"""


def side_by_side(annotations: Sequence[Annotation]) -> str:
    """The page; every text is escaped, so that an answer cannot bring markup or scripts.

    Args:
        annotations: of one model against one baseline, at least two with a verdict.
    """
    first = annotations[0]
    rate = win_rate(preferences(annotations))
    title = f"{first.generator_2} against {first.generator_1}"
    reason = why_not_comparable(annotations)
    lines = [
        f"<p>Win rate {rate.win_rate:.2f} % (s.e. {rate.stderr:.2f}), {rate.wins} wins, "
        f"{rate.losses} losses, {rate.draws} draws, {rate.abstained} without a verdict; judge: "
        f"{escape(first.annotator)}.</p>"
    ]
    if reason:
        lines.append(f'<p class="note">Not comparable with the leaderboard: {escape(reason)}.</p>')
    lines += [_question(number, each) for number, each in enumerate(annotations, start=1)]
    return (
        '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body>\n<h1>{escape(title)}</h1>\n" + "\n".join(lines) + "\n</body>\n</html>\n"
    )


def _question(number: int, annotation: Annotation) -> str:
    preference = annotation.preference
    if math.isnan(preference):
        verdict = "no verdict"
    else:
        verdict = (
            f"the judge prefers {escape(annotation.generator_2)} with {100 * preference:.1f} %"
        )
    return (
        f'<article id="q{number}"><h2>Question {number}</h2>'
        f"<pre>{escape(annotation.instruction)}</pre>"
        f'<p class="note">{verdict}</p><div class="pair">'
        + _answer(annotation.generator_2, annotation.output_2, better=preference > 0.5)
        + _answer(annotation.generator_1, annotation.output_1, better=preference < 0.5)
        + "</div></article>"
    )


def _answer(name: str, text: str, *, better: bool) -> str:
    mark = " better" if better else ""
    words = " (preferred)" if better else ""
    return (
        f'<section class="answer{mark}"><h3>{escape(name)}{words}</h3>'
        f'<p class="note">{len(text)} characters</p><pre>{escape(text)}</pre></section>'
    )
