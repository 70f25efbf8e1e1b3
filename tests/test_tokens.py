import string
from dataclasses import replace

import pytest
from tokenizers import Tokenizer, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from mcpo.encode import encode_prompt, make_encoder
from mcpo.findings import counts, describe
from mcpo.records import Candidate, CandidateRow, TokenizedGroup
from mcpo.tokens import TokenConfig, token_hash, tokenize

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(template=CHATML, adds_bos=False, eos="<|im_end|>"):
    """Characters, but for the one merge ``ab``: small enough to foresee every id."""
    letters = [*string.printable, "ab"]
    model = BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[("a", "b")])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(model), bos_token="<s>", eos_token=eos
    )
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    if adds_bos:
        fast.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", fast.bos_token_id)]
        )
    fast.chat_template = template
    return fast


def row(prompt="q", chosen="yes", pool=("no",), row_id="r"):
    return CandidateRow(
        row_id=row_id,
        prompt=prompt,
        chosen=Candidate(text=chosen),
        pool=tuple(Candidate(text=text) for text in pool),
    )


def text(tokenizer, ids):
    return "".join(tokenizer.convert_ids_to_tokens(list(ids)))


def texts(tokenizer, group):
    return text(tokenizer, group.prompt_ids), [text(tokenizer, ids) for ids in group.candidate_ids]


def run(tokenizer, *rows, **options):
    """Texts of the groups and counts of the findings."""
    report = tokenize(rows, tokenizer, TokenConfig(**options))
    return [texts(tokenizer, group) for group in report.groups], counts(report.findings)


QUESTION = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"


def test_a_chat_completion_ends_with_one_eos_and_nothing_behind():
    groups, found = run(make_tokenizer(), row())
    assert groups == [(QUESTION, ["yes<|im_end|>", "no<|im_end|>"])]
    assert found == {}


def test_a_conversation_is_rendered_whole():
    prompt = (
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "v"},
    )
    groups, _ = run(make_tokenizer(), row(prompt))
    assert groups[0][0] == (
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nu<|im_end|>\n"
        "<|im_start|>assistant\na<|im_end|>\n<|im_start|>user\nv<|im_end|>\n<|im_start|>assistant\n"
    )


def test_plain_text_is_joined_as_it_is_and_closed_with_eos():
    groups, found = run(make_tokenizer(), row("q: ", "yes"), prompt_format="plain")
    assert groups == [("q: ", ["yes<|im_end|>", "no<|im_end|>"])]
    assert found == {}


def test_auto_is_plain_without_a_template_and_a_template_can_be_given():
    bare = make_tokenizer(template=None)
    assert run(bare, row())[0][0][0] == "q"
    assert run(bare, row(), chat_template=CHATML)[0][0][0] == QUESTION


def test_bos_comes_first_once_where_the_tokenizer_wants_it():
    tokenizer = make_tokenizer(adds_bos=True)
    groups, found = run(tokenizer, row(), prompt_format="plain")
    assert groups[0][0] == "<s>q"
    assert found == {}
    groups, found = run(tokenizer, row("<s>q"), prompt_format="plain")
    assert groups[0][0] == "<s>q"
    assert found == {"doubled_bos": 1}


def test_a_template_that_writes_bos_twice_is_found():
    groups, found = run(make_tokenizer(template="<s><s>" + CHATML, adds_bos=True), row())
    assert groups[0][0] == "<s>" + QUESTION
    assert found == {"doubled_bos": 1}


def test_a_merge_across_the_border_is_counted_and_tokenized_apart():
    tokenizer = make_tokenizer()
    report = tokenize([row("qa", "bc", ("cc",))], tokenizer, TokenConfig(prompt_format="plain"))
    assert counts(report.findings) == {"prompt_not_prefix": 1}
    group = report.groups[0]
    # Joined text would hold one token "ab" over the border.
    assert tokenizer.convert_ids_to_tokens(list(group.prompt_ids)) == ["q", "a"]
    assert tokenizer.convert_ids_to_tokens(list(group.candidate_ids[0])) == ["b", "c", "<|im_end|>"]


def test_a_template_that_rewrites_an_answered_prompt_keeps_the_completion():
    template = CHATML.replace("{{ m['content'] }}", "{{ messages | length }}{{ m['content'] }}")
    groups, found = run(make_tokenizer(template), row())
    assert groups == [
        (
            "<|im_start|>user\n1q<|im_end|>\n<|im_start|>assistant\n",
            ["yes<|im_end|>", "no<|im_end|>"],
        )
    ]
    assert found == {"prompt_not_prefix": 2}


def test_a_template_that_does_not_close_its_turns_gets_eos():
    open_template = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}\n{% endfor %}"
    groups, found = run(make_tokenizer(open_template), row())
    assert [c[-10:] for c in groups[0][1]] == ["<|im_end|>", "<|im_end|>"]
    assert found == {"missing_eos": 2}


def test_an_end_of_turn_that_is_not_eos_ends_the_completion():
    groups, found = run(make_tokenizer(eos="<s>"), row())
    assert groups[0][1] == ["yes<|im_end|>", "no<|im_end|>"]
    assert found == {}


def test_eos_is_the_end_among_other_special_tokens_of_the_template():
    template = CHATML.replace("<|im_end|>\n{% endfor", "<s><|im_end|><|im_start|>\n{% endfor")
    groups, found = run(make_tokenizer(template), row())
    assert groups[0][1] == ["yes<s><|im_end|>", "no<s><|im_end|>"]
    assert found == {}


@pytest.mark.parametrize("prompt_format", ["chat", "plain"])
def test_eos_in_the_text_is_not_doubled_and_one_inside_is_counted(prompt_format):
    rows = row(chosen="yes<|im_end|>", pool=("n<|im_end|>o",))
    groups, found = run(make_tokenizer(), rows, prompt_format=prompt_format)
    assert groups[0][1] == ["yes<|im_end|>", "n<|im_end|>o<|im_end|>"]
    assert found == {"doubled_eos": 1, "eos_inside": 1}


def test_empty_completions_are_dropped_and_an_empty_chosen_drops_the_row():
    rows = [row(pool=("", "no", " \n")), row(chosen="", row_id="e"), row(pool=("",), row_id="p")]
    groups, found = run(make_tokenizer(), *rows)
    assert [len(g[1]) for g in groups] == [2]
    assert found == {"empty_completion": 3, "empty_chosen": 1, "empty_pool": 1}


def test_an_empty_prompt_needs_bos():
    rows = [row(""), row("q", row_id="s")]
    groups, found = run(make_tokenizer(), *rows, prompt_format="plain")
    assert [g[0] for g in groups] == ["q"]
    assert found == {"empty_prompt": 1}
    assert run(make_tokenizer(adds_bos=True), rows[0], prompt_format="plain")[0][0][0] == "<s>"


def test_rejected_equal_to_chosen_is_dropped():
    groups, found = run(make_tokenizer(), row(pool=("yes", "no")))
    assert groups[0][1] == ["yes<|im_end|>", "no<|im_end|>"]
    assert found == {"same_as_chosen": 1}


def test_all_identical_after_the_cut_drops_the_row():
    rows = [row("q", "same here", ("same there",)), row("q", "x", ("y",), "s")]
    groups, found = run(make_tokenizer(), *rows, prompt_format="plain", max_length=6)
    assert groups == [("q", ["x<|im_end|>", "y<|im_end|>"])]
    assert found == {"truncated_completion": 2, "all_identical": 1}


def test_rivals_that_the_cut_makes_equal_are_one_rival():
    rows = row("q", "other", ("same here", "else", "same there", "same where"))
    groups, found = run(make_tokenizer(), rows, prompt_format="plain", max_length=6)
    assert groups == [("q", ["other", "same ", "else<|im_end|>"])]
    assert found == {"truncated_completion": 4, "same_as_rival": 2}


LONG = row("12345", "abcdefgh", ("xy", "xyzxyzxyz"))


def test_truncate_completion_cuts_the_end_and_eos_with_it():
    groups, found = run(make_tokenizer(), LONG, prompt_format="plain", max_length=10)
    assert groups == [("12345", ["abcdef", "xy<|im_end|>", "xyzxy"])]
    assert found == {"truncated_completion": 2}


def test_truncate_prompt_cuts_its_front_for_the_longest_candidate():
    options = {"prompt_format": "plain", "too_long": "truncate_prompt"}
    groups, found = run(make_tokenizer(), LONG, **options, max_length=12)
    assert groups == [("45", ["abcdefgh<|im_end|>", "xy<|im_end|>", "xyzxyzxyz<|im_end|>"])]
    assert found == {"truncated_prompt": 1}
    # No prompt would be left for the candidate of ten tokens.
    groups, found = run(make_tokenizer(), LONG, **options, max_length=10)
    assert groups == [("45", ["abcdefgh<|im_end|>", "xy<|im_end|>"])]
    assert found == {"truncated_prompt": 1, "completion_too_long": 1}


def test_drop_leaves_out_what_does_not_fit():
    options = {"prompt_format": "plain", "too_long": "drop"}
    rows = [LONG, row("1" * 20, row_id="p"), row("1", "2" * 20, row_id="c")]
    groups, found = run(make_tokenizer(), *rows, **options, max_length=14)
    assert groups == [("12345", ["abcdefgh<|im_end|>", "xy<|im_end|>"])]
    assert found == {"completion_too_long": 1, "prompt_too_long": 1, "chosen_too_long": 1}


def test_the_prompt_limit_stands_alone():
    options = {"prompt_format": "plain", "max_length": None, "max_prompt_length": 3}
    groups, found = run(make_tokenizer(), LONG, row(row_id="s"), **options)
    assert [g[0] for g in groups] == ["q"]
    assert found == {"prompt_too_long": 1}
    groups, found = run(make_tokenizer(), LONG, **options, too_long="truncate_prompt")
    assert groups[0][0] == "345"
    assert found == {"truncated_prompt": 1}


def test_nothing_is_found_where_all_fits_exactly():
    _, found = run(make_tokenizer(), row(), prompt_format="plain", max_length=5, too_long="error")
    assert found == {}


def test_examples_name_the_first_rows_of_each_kind():
    rows = [row(pool=("no", ""), row_id=f"r{i}") for i in range(5)]
    report = tokenize(rows, make_tokenizer(), TokenConfig())
    assert report.findings[0].examples == ("r0", "r1", "r2")
    assert describe(report.findings) == "empty_completion 5 (row r0, r1, r2)"
    assert describe(()) == "nothing was dropped or changed"


def test_rows_keep_their_order_across_tokenizer_calls():
    rows = [row(f"q{i}", row_id=str(i)) for i in range(600)]
    report = tokenize(rows, make_tokenizer(), TokenConfig(prompt_format="plain"))
    assert [g.row_id for g in report.groups] == [str(i) for i in range(600)]
    assert text(make_tokenizer(), report.groups[599].prompt_ids) == "q599"


def test_the_hash_follows_tokens_and_borders_but_not_names():
    group = TokenizedGroup(row_id="a", prompt_ids=(1, 2), candidate_ids=((3,), (4, 5)))
    assert token_hash(group) == token_hash(replace(group, row_id="b"))
    others = [
        replace(group, prompt_ids=(1,), candidate_ids=((2, 3), (4, 5))),
        replace(group, candidate_ids=((3, 4), (5,))),
        replace(group, candidate_ids=((4, 5), (3,))),
        replace(group, prompt_ids=(1, 7)),
    ]
    assert len({token_hash(one) for one in (group, *others)}) == 5


def no_eos():
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    return tokenizer


TURNS = ({"role": "user", "content": "u"},)
REFUSING = "{% if messages[0]['content'] == 'u' %}{{ raise_exception('no u here') }}{% endif %}"


@pytest.mark.parametrize(
    ("tokenizer", "one", "options", "message"),
    [
        (no_eos(), row(), {}, "the tokenizer must have an EOS token"),
        (
            make_tokenizer(None),
            row(),
            {"prompt_format": "chat"},
            "'chat' needs a chat template and the tokenizer has none",
        ),
        (make_tokenizer(None), row(TURNS), {}, "row 'r' holds a conversation, which needs a chat"),
        (
            make_tokenizer(REFUSING + CHATML),
            row(TURNS),
            {},
            r"row 'r' .* refuses \(no u here\); its roles are \['user'\]",
        ),
        (
            make_tokenizer("{{ messages[0]['content'] }}"),
            row(),
            {},
            "must write the text of the user's turn and of the assistant's, got 'zqxjkvb' for",
        ),
        (
            make_tokenizer(),
            row("12345"),
            {"prompt_format": "plain", "max_length": 5, "too_long": "error"},
            "row 'r' has a prompt of 5 tokens where 4 fit",
        ),
        (
            make_tokenizer(),
            row(),
            {"prompt_format": "plain", "max_length": 4, "too_long": "error"},
            "row 'r' has a completion of 4 tokens where its prompt leaves room for 3",
        ),
        (
            make_tokenizer(),
            row(chosen=""),
            {},
            r"no row is left of 1 after tokenization: empty_chosen 1 \(row r\)",
        ),
    ],
)
def test_what_cannot_be_tokenized_says_why(tokenizer, one, options, message):
    with pytest.raises(ValueError, match=message):
        tokenize([one], tokenizer, TokenConfig(**options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 1}, "max_length must be at least 2, .* got 1"),
        ({"max_prompt_length": 0}, "max_prompt_length must be at least 1, got 0"),
        ({"too_long": "cut"}, r"too_long must be one of \('drop', .* got 'cut'"),
        ({"prompt_format": "x"}, r"prompt_format must be one of \('auto', .* got 'x'"),
    ],
)
def test_config_values_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        TokenConfig(**options)


def test_a_candidate_marked_as_cut_gets_no_eos():
    cut = replace(row(), pool=tuple(replace(rival, finished=False) for rival in row().pool))
    groups, found = run(make_tokenizer(), cut)
    assert groups[0][1] == ["yes<|im_end|>", "no"]
    assert found == {"unfinished": 1}


@pytest.mark.parametrize("adds_bos", [True, False], ids=["bos", "no-bos"])
@pytest.mark.parametrize("prompt_format", ["auto", "chat", "plain"])
@pytest.mark.parametrize("prompt", ["q ab", "<s>q"])
def test_a_prompt_alone_has_the_ids_it_is_trained_with(prompt, prompt_format, adds_bos):
    """Evaluation prompts as training does, whatever the format and the tokenizer's BOS."""
    tokenizer = make_tokenizer(adds_bos=adds_bos)
    config = TokenConfig(prompt_format=prompt_format)
    (group,) = tokenize([row(prompt)], tokenizer, config).groups
    encoder = make_encoder(tokenizer, prompt_format=prompt_format, chat_template=None)
    assert encode_prompt(prompt, encoder, "r") == group.prompt_ids
    begins = text(tokenizer, group.prompt_ids).removeprefix("<s>")
    assert begins.startswith("q" if prompt_format == "plain" else "<|im_start|>user")


def test_a_conversation_alone_has_the_ids_it_is_trained_with():
    tokenizer = make_tokenizer()
    (group,) = tokenize([row(TURNS)], tokenizer, TokenConfig()).groups
    encoder = make_encoder(tokenizer, prompt_format="auto", chat_template=None)
    assert encode_prompt(TURNS, encoder, "r") == group.prompt_ids
    bare = make_encoder(make_tokenizer(None), prompt_format="auto", chat_template=None)
    with pytest.raises(ValueError, match="row 'held-1' holds a conversation, which needs a chat"):
        encode_prompt(TURNS, bare, "held-1")


def test_groups_share_one_object_per_id():
    """A tokenizer makes a new object for every number above 256, and groups are kept in memory."""
    model = BPE(vocab={c: 1000 + i for i, c in enumerate(string.printable)}, merges=[])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), eos_token="!")
    rows = [row("abc", "cab", ("bca",), row_id=str(number)) for number in range(600)]
    groups = tokenize(rows, tokenizer, TokenConfig()).groups
    ids = [i for g in groups for run in (g.prompt_ids, *g.candidate_ids) for i in run]
    assert len(ids) == 600 * (3 + 4 + 4)
    assert len({id(i) for i in ids}) == len(set(ids)) == 4
