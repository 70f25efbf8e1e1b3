"""The five schemas: what each reader makes of good rows, and what it says of bad ones."""

import json

import pytest

from mcpo.data import RowOptions, SourceSpec, load_rows
from mcpo.findings import counts

NECTAR_PROMPT = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: more\n\nAssistant: "


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def completion(text, **known):
    return {"text": text, **known}


def answer(text, rank):
    return {"answer": text, "rank": rank, "model": "m"}


def response(text, score, **columns):
    return {"response": text, "overall_score": 0.0, "fine-grained_score": score, **columns}


CANDIDATES = {
    "id": "c",
    "prompt": "q",
    "completions": [
        completion("worst", rank=3, score=9.0),
        completion("best", rank=1, score=0.1, model="m"),
        completion("mid", rank=2, score=5.0),
    ],
    "checks": [1],
}
NECTAR = {
    "prompt": NECTAR_PROMPT,
    "answers": [answer("worst", 4.0), answer("best", 1.0), answer("mid", 3.0), answer("2nd", 2.0)],
}
ULTRAFEEDBACK = {
    "instruction": "q",
    "completions": [response("worst", 1.0), response("best", 4.5), response("mid", 2)],
}
PREFERENCE = {"prompt": "q", "chosen": "best", "rejected": ["mid", "worst"]}
RANKED_MESSAGES = {
    "id": "m",
    "prompt": [user("a"), assistant("b"), user("c")],
    "completions": [
        completion("mid", rank=2),
        completion("worst", rank=3),
        completion("best", rank=1),
    ],
}
SCHEMAS = {
    "candidates": CANDIDATES,
    "nectar": NECTAR,
    "ultrafeedback": ULTRAFEEDBACK,
    "preference": PREFERENCE,
    "ranked_messages": RANKED_MESSAGES,
}


@pytest.fixture
def load(tmp_path):
    """Read rows through a file; the findings come as counts."""

    def read(*rows, schema="auto", **options):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = SourceSpec(path=str(path), schema=schema)
        report = load_rows([source], options=RowOptions(**options))
        return report.rows, counts(report.findings)

    return read


def texts(row):
    return [candidate.text for candidate in row.candidates]


@pytest.mark.parametrize("schema", SCHEMAS)
@pytest.mark.parametrize("named", [True, False])
def test_the_best_is_chosen_and_the_pool_goes_from_better_to_worse(load, schema, named):
    (row,), _ = load(SCHEMAS[schema], schema=schema if named else "auto")
    assert texts(row) == ["best", "mid", "worst"]


def test_candidates_keep_what_is_known_of_them(load):
    (row,), found = load(CANDIDATES)
    assert (row.row_id, row.prompt) == ("c", "q")
    assert (row.chosen.rank, row.chosen.score, row.chosen.model) == (1.0, 0.1, "m")
    assert found == {}


def test_candidates_without_all_ranks_go_by_score(load):
    scored = [completion("low", score=1, rank=1), completion("high", score=2)]
    (row,), _ = load({"prompt": [user("q")], "completions": scored})
    assert texts(row) == ["high", "low"]
    assert row.prompt == (user("q"),)


@pytest.mark.parametrize("size", [1, 64])
def test_pools_are_ragged(load, size):
    ranked = [completion(f"t{rank}", rank=rank) for rank in range(size + 1, 0, -1)]
    (row,), _ = load({"prompt": "q", "completions": ranked})
    assert texts(row) == [f"t{rank}" for rank in range(1, size + 2)]


def test_nectar_is_parsed_into_turns_and_loses_its_second_best(load):
    (row,), found = load(NECTAR)
    assert row.prompt == (user("hi"), assistant("hello"), user("more"))
    assert found == {"second_best": 1}
    (row,), found = load(NECTAR, nectar_drop_second=False)
    assert texts(row) == ["best", "2nd", "mid", "worst"]
    assert found == {}


def test_nectar_drops_repeats_and_rows_without_rivals(load):
    repeated = {**NECTAR, "answers": [*NECTAR["answers"], answer("best", 7.0), answer("mid", 6.0)]}
    two = {**NECTAR, "answers": [answer("best", 1.0), answer("2nd", 2.0)]}
    rows, found = load(repeated, two)
    assert [texts(row) for row in rows] == [["best", "mid", "worst"]]
    assert found == {"second_best": 2, "repeated_completion": 2, "empty_pool": 1}


@pytest.mark.parametrize(
    ("prompt", "contents"),
    [
        ("\n\nHuman: a\n\nHuman: b\n\nAssistant: ", ["a\n\nHuman: b"]),
        ("\n\nHuman: Say 'Human: x'\nAssistant: y\n\nAssistant:", ["Say 'Human: x'\nAssistant: y"]),
        ("\n\nHuman: 1 \n2 = x?\n\nAssistant: ", ["1 \n2 = x?"]),
    ],
)
def test_nectar_takes_marks_that_open_no_turn_for_text(load, prompt, contents):
    (row,), _ = load({**NECTAR, "prompt": prompt})
    assert [turn["content"] for turn in row.prompt] == contents


@pytest.mark.parametrize(
    ("score_field", "best"),
    [("fine-grained_score", "f"), ("overall_score", "o"), ("aspect_mean", "a")],
)
def test_ultrafeedback_goes_by_the_score_that_is_asked_for(load, score_field, best):
    low = {"honesty": {"Rating": "1"}, "help": {"Rating": "2"}}
    high = {"honesty": {"Rating": "5"}, "help": {"Rating": "N/A"}, "gone": None}
    rated = [
        response("o", 1.0, overall_score=10.0, annotations=low),
        response("f", 5.0, annotations=low),
        response("a", 2.0, annotations=high),
    ]
    (row,), found = load({"instruction": "q", "completions": rated}, score_field=score_field)
    assert row.chosen.text == best
    assert found == {}


def test_ultrafeedback_leaves_out_what_nobody_rated(load):
    rated = [response("none", None), *ULTRAFEEDBACK["completions"]]
    rows, found = load(
        {"instruction": "q", "completions": rated}, {"instruction": "q", "completions": []}
    )
    assert [texts(row) for row in rows] == [["best", "mid", "worst"]]
    assert found == {"unrated_completion": 1, "empty_pool": 1}


TIED = {
    "instruction": "q",
    "completions": [response("low", 1), response("a", 5), response("b", 5), response("c", 5)],
}


@pytest.mark.parametrize(
    ("ties", "expected", "kinds"),
    [
        ("drop_rivals", ["a", "low"], {"tied_with_chosen": 2}),
        ("keep", ["a", "b", "c", "low"], {}),
        ("drop_row", None, {"tied_row": 1}),
    ],
)
def test_ties_at_the_top(load, ties, expected, kinds):
    rows, found = load(TIED, ULTRAFEEDBACK, ties=ties)
    assert [texts(row) for row in rows[:-1]] == ([expected] if expected else [])
    assert found == kinds


def test_a_row_where_all_tie_has_no_pool(load):
    all_tied = {"instruction": "q", "completions": TIED["completions"][1:]}
    rows, found = load(all_tied, ULTRAFEEDBACK)
    assert len(rows) == 1
    assert found == {"tied_with_chosen": 2, "empty_pool": 1}


TURNS = [{"role": "system", "content": "s"}, user("q")]


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "q", "chosen": "yes", "rejected": "no"}, "q"),
        ({"prompt": "q", "chosen": [assistant("yes")], "rejected": [assistant("no")]}, "q"),
        ({"prompt": TURNS, "chosen": [assistant("yes")], "rejected": [assistant("no")]}, TURNS),
        ({"prompt": TURNS, "chosen": "yes", "rejected": "no"}, TURNS),
        (
            {
                "prompt": TURNS,
                "chosen": [*TURNS, assistant("yes")],
                "rejected": [*TURNS, assistant("no")],
            },
            TURNS,
        ),
        ({"chosen": [*TURNS, assistant("yes")], "rejected": [*TURNS, assistant("no")]}, TURNS),
        (
            {
                "prompt": "q",
                "chosen": [*TURNS, assistant("yes")],
                "rejected": [[*TURNS, assistant("no")]],
            },
            TURNS,
        ),
        ({"prompt": None, "chosen": "q it is\nyes", "rejected": "q it is\nno"}, "q it is"),
        (
            {
                "chosen": "\n\nHuman: q\n\nAssistant: yes",
                "rejected": "\n\nHuman: q\n\nAssistant: no",
            },
            [user("q")],
        ),
        (
            {"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": "yes", "rejected": "no"},
            [user("q")],
        ),
    ],
    ids=lambda value: None,
)
def test_preference_finds_the_prompt_in_every_form(load, row, prompt):
    (got,), found = load(row)
    assert got.prompt == (tuple(prompt) if isinstance(prompt, list) else prompt)
    assert [text.strip() for text in texts(got)] == ["yes", "no"]
    assert found == {}


def test_an_implied_prompt_is_never_cut_inside_a_word(load):
    (row,), _ = load({"chosen": "ask: they went", "rejected": "ask: there it is"})
    assert row.prompt == "ask:"
    assert texts(row) == [" they went", " there it is"]


def test_preference_takes_several_rejected_and_their_scores(load):
    several = [[assistant("no")], [assistant("never")]]
    (row,), _ = load(
        {
            "prompt": TURNS,
            "chosen": [assistant("yes")],
            "rejected": several,
            "score_chosen": 8,
            "score_rejected": [5, 2.5],
        }
    )
    assert texts(row) == ["yes", "no", "never"]
    assert [one.score for one in row.candidates] == [8.0, 5.0, 2.5]


def test_preference_with_nothing_but_repeats_is_dropped(load):
    rows, found = load({"prompt": "q", "chosen": "same", "rejected": "same"}, PREFERENCE)
    assert len(rows) == 1
    assert found == {"repeated_completion": 1, "empty_pool": 1}


BAD = [
    ("candidates", {"completions": None}, "'completions' must be a list of objects, got None"),
    ("candidates", {"completions": ["x"]}, r"'completions\[0\]' must be an object, got str 'x'"),
    ("candidates", {"completions": []}, "'completions' must hold at least two, .* got 0"),
    (
        "candidates",
        {"completions": [completion("a", rank=1)]},
        "'completions' must hold at least two, the best and its pool, got 1",
    ),
    (
        "candidates",
        {"completions": [completion("a", rank=1), completion("b", score=1)]},
        "every completion must have a 'rank' .* got 1 ranks and 1 scores for 2 completions",
    ),
    (
        "candidates",
        {"completions": [completion("a", rank=1), completion(None, rank=2)]},
        r"completions\[1\]: column 'text' must be text, got None",
    ),
    (
        "candidates",
        {"completions": [completion("a", rank="1"), completion("b", rank=2)]},
        r"completions\[0\]: column 'rank' must be a finite number, got str '1'",
    ),
    (
        "candidates",
        {"completions": [completion("a", score=float("nan")), completion("b", score=2)]},
        r"completions\[0\]: column 'score' must be a finite number, got float nan",
    ),
    (
        "candidates",
        {"completions": [{"response": "a"}, {"response": "b"}]},
        r"completions\[0\] has no column 'text'; its columns are response",
    ),
    ("candidates", {"prompt": 7}, "'prompt' must be text or a list of messages, got int 7"),
    ("candidates", {"prompt": []}, "'prompt' must end with the user's turn, got no message last"),
    (
        "candidates",
        {"prompt": [user("a"), assistant("b")]},
        "column 'prompt' must end with the user's turn, got 'assistant' last",
    ),
    (
        "candidates",
        {"prompt": [{"role": "human", "content": "a"}]},
        r"prompt\[0\]: column 'role' must be one of system, .* got 'human'",
    ),
    (
        "candidates",
        {"prompt": [{"role": "user", "content": None}]},
        r"prompt\[0\]: column 'content' must be text, got None",
    ),
    ("candidates", {"id": 1.5}, "column 'id' must be text or a whole number, got float 1.5"),
    ("nectar", {"prompt": None}, "column 'prompt' must be text, got None"),
    ("nectar", {"prompt": "hi"}, "'prompt' must be a transcript .* got str 'hi'"),
    (
        "nectar",
        {"prompt": "\n\nHuman: a\n\nAssistant: b"},
        "'prompt' must be a transcript .* waits for the assistant",
    ),
    ("nectar", {"answers": [{"answer": "a"}]}, r"answers\[0\] has no column 'rank'"),
    ("ultrafeedback", {"instruction": ["q"]}, "'instruction' must be text, got list"),
    (
        "ultrafeedback",
        {"completions": [{"response": "a"}]},
        r"completions\[0\] has no column 'fine-grained_score'; its columns are response",
    ),
    ("preference", {"chosen": None}, "'chosen' must be text or a list of messages, got None"),
    ("preference", {"rejected": []}, "'rejected' must hold at least one, got none"),
    ("preference", {"rejected": ["a", 3]}, r"'rejected\[1\]' must be text or a list of messages"),
    (
        "preference",
        {"chosen": [user("q")]},
        "messages in column 'chosen' must end with the assistant's, got 'user' last",
    ),
    (
        "preference",
        {"chosen": [user("q"), assistant("a")], "rejected": [user("p"), assistant("b")]},
        "'chosen' and 'rejected' must hold the same conversation up to their last message",
    ),
    (
        "preference",
        {"chosen": [user("x"), assistant("a")], "rejected": [user("x"), assistant("b")]},
        "messages in column 'chosen' must begin with those of 'prompt'",
    ),
    ("preference", {"prompt": None}, "has no column 'prompt', and 'chosen' and 'rejected' do not"),
    (
        "preference",
        {"score_rejected": [1]},
        "'score_rejected' must be one score for each of 2 rejected, got list",
    ),
    ("ranked_messages", {"prompt": "q"}, "'prompt' must be a list of messages, got str 'q'"),
    (
        "ranked_messages",
        {"completions": [completion("a", score=1), completion("b", score=2)]},
        r"completions\[0\] has no column 'rank'",
    ),
]


@pytest.mark.parametrize(("schema", "change", "message"), BAD)
def test_a_bad_row_is_named_with_what_is_wrong(load, schema, change, message):
    with pytest.raises(ValueError, match=rf"rows\.jsonl line 2.*{message}"):
        load(SCHEMAS[schema], {**SCHEMAS[schema], **change}, schema=schema)


@pytest.mark.parametrize("schema", SCHEMAS)
def test_a_missing_column_is_named(load, schema):
    column = "answers" if schema == "nectar" else "chosen" if schema == "preference" else None
    column = column or "completions"
    row = {key: value for key, value in SCHEMAS[schema].items() if key != column}
    with pytest.raises(ValueError, match=rf"line 1 has no column '{column}'; its columns are .*"):
        load(row, schema=schema)


def test_candidates_say_which_texts_were_cut(load):
    ranked = [completion("one", rank=1), completion("two", rank=2), completion("three", rank=3)]
    ranked[1]["finished"] = False
    ranked[2]["finished"] = True
    (row,), _ = load({"prompt": "p", "completions": ranked})
    assert [candidate.finished for candidate in row.candidates] == [True, False, True]
    ranked[1]["finished"] = "no"
    with pytest.raises(ValueError, match=r"column 'finished' must be true or false, got str 'no'"):
        load({"prompt": "p", "completions": ranked})
