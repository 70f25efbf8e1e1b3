"""AlpacaEval's and Arena-Hard's files: read, written, refused; verdicts; the page."""

import json
import math
import re

import pytest

from mcpo.evaluate.alpaca import (
    LEADERBOARD_BASELINE,
    LEADERBOARD_JUDGE,
    Annotation,
    ModelOutput,
    preference_of_logprobs,
    preferences,
    read_annotations,
    read_outputs,
    why_not_comparable,
    write_annotations,
    write_outputs,
)
from mcpo.evaluate.arena import (
    Judgment,
    arena_score,
    parse_verdict,
    read_judgments,
    write_judgments,
)
from mcpo.evaluate.page import side_by_side


def annotation(preference, **changes):
    values = {
        "instruction": "Why?",
        "output_1": "Because.",
        "generator_1": LEADERBOARD_BASELINE,
        "output_2": "It depends.",
        "generator_2": "ours",
        "annotator": LEADERBOARD_JUDGE,
    }
    return Annotation(**(values | changes), preference=preference)


def test_outputs_and_annotations_survive_a_round_trip(tmp_path):
    outputs = [ModelOutput(instruction="Wo?", output="Überall\n", generator="m", dataset="d")]
    write_outputs(tmp_path / "outputs.json", outputs)
    assert read_outputs(tmp_path / "outputs.json") == outputs
    annotations = [annotation(0.25), annotation(1.0), annotation(math.nan)]
    write_annotations(tmp_path / "annotations.json", annotations)
    again = read_annotations(tmp_path / "annotations.json")
    assert preferences(again)[:2].tolist() == [0.25, 1.0]
    assert math.isnan(again[2].preference)
    assert [
        row["preference"] for row in json.loads((tmp_path / "annotations.json").read_text())
    ] == [
        1.25,
        2.0,
        None,
    ]


def test_both_draws_of_alpaca_eval_are_draws(tmp_path):
    rows = [
        {**as_row(annotation(0.5)), "preference": 0.0},
        {**as_row(annotation(0.5)), "preference": 1.5},
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    assert preferences(read_annotations(tmp_path / "a.json")).tolist() == [0.5, 0.5]


def as_row(each):
    return {name: getattr(each, name) for name in each.__slots__}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"instruction": "a"}, "must be a JSON list of at least one object"),
        ([], "must be a JSON list of at least one object"),
        (
            [{**as_row(annotation(0.5)), "preference": 0.7}],
            r"entry 0: preference.*\[1, 2\], got 0.7",
        ),
        ([{**as_row(annotation(0.5)), "preference": "A"}], "preference must be a number, got 'A'"),
        (
            [{**as_row(annotation(0.5)), "output_1": None}],
            "entry 0: output_1 must be a text, got None",
        ),
        (
            [
                {**as_row(annotation(0.5)), "preference": 1.5},
                {**as_row(annotation(0.5)), "preference": 1.5, "annotator": "other"},
            ],
            "must have one annotator, got other, weighted",
        ),
    ],
)
def test_other_files_are_refused(rows, message, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=message):
        read_annotations(tmp_path / "a.json")


def test_what_is_no_json_is_refused(tmp_path):
    (tmp_path / "a.json").write_text("[{")
    with pytest.raises(ValueError, match="one JSON list, as AlpacaEval writes it"):
        read_outputs(tmp_path / "a.json")


def test_only_the_leaderboards_judge_baseline_and_questions_compare():
    assert why_not_comparable([annotation(0.5)] * 805) is None
    reason = why_not_comparable([annotation(0.5, annotator="mine", generator_1="dpo")] * 3)
    assert reason is not None
    assert "judge is mine" in reason
    assert "baseline is dpo" in reason
    assert "number of questions is 3" in reason


def test_preference_weighs_the_two_names_alone():
    top = [{"token": t, "logprob": math.log(p)} for t, p in (("m", 0.6), ("M", 0.2), ("The", 0.1))]
    assert preference_of_logprobs(top, model_is="m", baseline_is="M") == pytest.approx(0.75)
    assert preference_of_logprobs(top, model_is="M", baseline_is="m") == pytest.approx(0.25)
    # A name that is not listed has at most the probability of the last one that is.
    assert preference_of_logprobs([top[0], top[2]], model_is="M", baseline_is="m") == pytest.approx(
        0.1 / 0.7
    )
    assert math.isnan(preference_of_logprobs([top[2]], model_is="M", baseline_is="m"))
    far = [{"token": "m", "logprob": 0.0}, {"token": "M", "logprob": -2000.0}]
    assert preference_of_logprobs(far, model_is="M", baseline_is="m") == 0.0


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("My final verdict is tie: [[A=B]]", "A=B"),
        ("[[b>>a]]", "A<<B"),
        ("first [[A>B]], on reflection [[B>A]].", "A<B"),
        ("[[ A>>B ]]", "A>>B"),
        ("[[A<<B]]", "A<<B"),
        ("A>B", None),
        ("[[A>>>B]]", None),
        ("[[A>A]]", None),
        ("", None),
    ],
)
def test_verdicts_are_read_strictly(answer, verdict):
    assert parse_verdict(answer) == verdict


def judgment(baseline_first, model_first, uid="q"):
    return Judgment(
        uid=uid,
        model="ours",
        judge="j",
        baseline="b",
        category="hard_prompt",
        baseline_first=baseline_first,
        model_first=model_first,
    )


def test_strong_wins_count_threefold_in_both_games():
    # The model strongly wins as B and weakly loses as A: three wins and one loss.
    assert judgment("A<<B", "A<B").outcomes == (0, 1, 1, 1)
    assert judgment("A=B", "A>>B").outcomes == (1, 1, 1, 0.5)
    assert judgment(None, "A>B").outcomes == ()


def test_the_score_is_the_mean_outcome():
    score = arena_score([judgment("A<<B", "A<B"), judgment("A>B", "A=B"), judgment(None, "A>B")])
    assert score.score == pytest.approx(100 * (3 + 0.5) / 6)
    assert (score.num_questions, score.skipped) == (2, 1)
    assert score.lower <= score.score <= score.upper
    with pytest.raises(ValueError, match="verdicts in both games, got none of 1"):
        arena_score([judgment(None, None)])


def test_the_interval_covers_the_truth_as_often_as_it_says():
    import numpy as np

    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        wins = rng.random(60) < 0.7
        # Both games agree: one question is one fact, however often it counts.
        rows = [judgment(*(("A<B", "A>B") if win else ("A>B", "A<B"))) for win in wins]
        score = arena_score(rows, num_bootstraps=300, seed=trial)
        covered += score.lower <= 70 <= score.upper
    # Binomial, 200 trials at 0.9: four standard deviations below the mean.
    assert covered >= 180 - 4 * math.sqrt(200 * 0.9 * 0.1)


def test_judgments_survive_a_round_trip_and_old_files_are_read(tmp_path):
    judgments = [judgment("A>>B", "A<B", "1"), judgment(None, "A=B", "2")]
    write_judgments(tmp_path / "j.jsonl", judgments)
    assert read_judgments(tmp_path / "j.jsonl") == judgments
    old = {"question_id": "1", "model": "m", "judge": "g", "games": [{"score": "B>A"}, None]}
    (tmp_path / "old.jsonl").write_text(json.dumps(old) + "\n")
    read = read_judgments(tmp_path / "old.jsonl")[0]
    assert (read.uid, read.baseline_first, read.model_first) == ("1", "A<B", None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "at least one judgment, got an empty file"),
        ("{", "line 1, must be JSON"),
        ('{"uid": "1"}', "a uid .or question_id. and two games"),
        ("[]", "a uid .or question_id. and two games"),
        (
            '{"uid": "1", "games": [{"score": "A"}, null]}',
            "a score must be A>>B.*or null, got 'A'",
        ),
        (
            '{"uid": "1", "model": "a", "games": [null, null]}\n'
            '{"uid": "1", "model": "b", "games": [null, null]}',
            "must have one model, got a, b",
        ),
    ],
)
def test_other_judgment_files_are_refused(text, message, tmp_path):
    (tmp_path / "j.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_judgments(tmp_path / "j.jsonl")


def test_the_page_shows_all_and_executes_nothing():
    page = side_by_side(
        [
            annotation(0.9, output_2="<script>alert(1)</script>", instruction="2 < 3?"),
            annotation(0.2),
            annotation(math.nan, generator_2="ours"),
        ]
    )
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "2 &lt; 3?" in page
    assert page.count('class="answer better"') == 2
    assert "no verdict" in page
    assert "1 wins, 1 losses, 0 draws, 1 without a verdict" in page
    assert "Not comparable with the leaderboard: the number of questions is 3, not 805" in page
    assert len(re.findall("<article", page)) == len(re.findall("</article>", page)) == 3
