"""Judges: verdicts, tournaments, scores; a language model behind a server with every fault."""

import random
import re
import threading

import pytest
import torch
from judge_server import Reply, judge_server
from transformers import LlamaConfig, LlamaForSequenceClassification

from mcpo.data.instructions import Check
from mcpo.evaluate.verifiable import VerifiableItem
from mcpo.judges.cache import Answer, AnswerCache, key_of
from mcpo.judges.instructions import Instructions, parse
from mcpo.judges.llm import JudgeConfig, LanguageModelJudge
from mcpo.judges.scoring import FunctionJudge, RewardModelJudge, VerifiableJudge
from mcpo.judges.tournament import Group, num_comparisons, tournament
from mcpo.judges.verdict import Comparison, JudgeError, Verdict, combine_orders
from mcpo.records import Candidate

FIRST, SECOND, TIE, ABSTAIN = Verdict.FIRST, Verdict.SECOND, Verdict.TIE, Verdict.ABSTAIN


def group(*texts, prompt="Why?"):
    return Group(prompt=prompt, answers=tuple(Candidate(text=text) for text in texts))


class Better:
    """Prefers the larger number; counts what it was asked."""

    def __init__(self, margin=0.0):
        self.margin = margin
        self.calls = []

    def compare(self, comparisons, on_verdict=lambda _: None):
        self.calls.append(len(comparisons))
        verdicts = []
        for pair in comparisons:
            gap = float(pair.first) - float(pair.second)
            verdicts.append(TIE if abs(gap) <= self.margin else FIRST if gap > 0 else SECOND)
            on_verdict(1)
        return verdicts


# verdicts


@pytest.mark.parametrize(
    ("forward", "backward", "combined"),
    [
        (FIRST, SECOND, FIRST),
        (SECOND, FIRST, SECOND),
        (FIRST, FIRST, TIE),
        (SECOND, SECOND, TIE),
        (TIE, TIE, TIE),
        (FIRST, TIE, TIE),
        (ABSTAIN, SECOND, ABSTAIN),
        (FIRST, ABSTAIN, ABSTAIN),
    ],
)
def test_orders_must_agree(forward, backward, combined):
    assert combine_orders(forward, backward) is combined


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("Reason.\n[[A]]", FIRST),
        ("[[b]]", SECOND),
        ("[[ TIE ]]", TIE),
        ("[[A]] and again [[a]]", FIRST),
        ("[[A]] or [[B]]", ABSTAIN),
        ("[A]", ABSTAIN),
        ("Answer A is better.", ABSTAIN),
        ("[[C]]", ABSTAIN),
        ("", ABSTAIN),
    ],
)
def test_answers_are_read_strictly(answer, verdict):
    assert parse(answer) is verdict


def test_an_answer_cannot_smuggle_placeholders():
    text = Instructions("{prompt}|{answer_a}|{answer_b}").fill(
        Comparison(prompt="p {answer_a}", first="{prompt} {answer_b}", second="b")
    )
    assert text == "p {answer_a}|{prompt} {answer_b}|b"


def test_instructions_must_hold_each_placeholder_once(tmp_path):
    assert "{prompt}" in Instructions.read().template
    (tmp_path / "bad.txt").write_text("{prompt} {answer_a} {answer_a}")
    with pytest.raises(ValueError, match=r"each of \{prompt\}, \{answer_a\}, \{answer_b\} once"):
        Instructions.read(tmp_path / "bad.txt")
    with pytest.raises(FileNotFoundError, match="must be a text file"):
        Instructions.read(tmp_path)


# tournaments


@pytest.mark.parametrize("seed", range(5))
def test_a_transitive_judge_finds_the_best_in_n_minus_1_comparisons(seed):
    rng = random.Random(seed)
    groups = [
        group(*(str(value) for value in rng.sample(range(100), rng.randint(2, 7))))
        for _ in range(20)
    ]
    judge = Better()
    asked = []
    outcomes = tournament(groups, judge, asked.append)
    for each, outcome in zip(groups, outcomes, strict=True):
        values = [float(answer.text) for answer in each.answers]
        assert values[outcome.winner] == max(values)
        assert outcome.rivals == ()
        assert len(outcome.verdicts) == len(values) - 1
    assert sum(judge.calls) == num_comparisons(groups) == sum(asked)
    # A round of all groups is one call.
    assert len(judge.calls) == max(len(each.answers) for each in groups) - 1


def test_the_winner_stays_after_a_tie_and_its_equals_are_rivals():
    outcome = tournament([group("1", "5", "5.5", "2", "4.9")], Better(margin=1))[0]
    assert outcome.winner == 1
    assert outcome.rivals == (2, 4)
    assert outcome.verdicts == (SECOND, TIE, FIRST, TIE)


def test_nothing_decided_is_no_winner():
    outcome = tournament([group("1", "1", "1")], Better())[0]
    assert outcome.winner is None


def test_groups_of_one_are_refused():
    with pytest.raises(ValueError, match="at least 2 answers, got 1 in group 1"):
        tournament([group("1", "2"), group("3")], Better())
    assert tournament([], Better()) == []


# scores


def test_a_function_is_loaded_by_path_and_held_to_its_contract():
    judge = FunctionJudge(lambda prompt, answers: [len(answer) for answer in answers], "mine")
    assert judge.score([group("a", "bcd")]) == [[1.0, 3.0]]
    with pytest.raises(ValueError, match=r"mine must return one finite number.*got \[1.0\] for 2"):
        FunctionJudge(lambda prompt, answers: [1], "mine").score([group("a", "b")])
    with pytest.raises(ValueError, match="one finite number"):
        FunctionJudge(lambda prompt, answers: [float("nan")] * 2).score([group("a", "b")])
    assert FunctionJudge.load("math:fsum")
    with pytest.raises(ValueError, match=r"package\.module:function, got 'math'"):
        FunctionJudge.load("math")
    with pytest.raises(ValueError, match=r"must name a function, and 'math:pi' is 3\.14"):
        FunctionJudge.load("math:pi")
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        FunctionJudge.load("no_such_module:f")


def test_checks_score_the_share_that_passes_and_cut_answers_fail():
    item = VerifiableItem(
        item_id="1",
        prompt="Why?",
        topic="t",
        checks=(
            Check(kind="has_number", args={}),
            Check(kind="no_commas", args={}),
        ),
        unseen_kind=False,
    )
    judge = VerifiableJudge([item])
    answers = (
        Candidate(text="there are two"),
        Candidate(text="there are 2"),
        Candidate(text="there are 2", finished=False),
    )
    assert judge.score([Group(prompt="Why?", answers=answers)]) == [[0.5, 1.0, 0.0]]
    with pytest.raises(ValueError, match=r"must have checks.*has none: 'How"):
        judge.score([group("a", "b", prompt="How?")])


def test_a_reward_model_scores_a_batch_as_it_scores_one_by_one(tiny_tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_labels=1,
        pad_token_id=tiny_tokenizer.pad_token_id,
    )
    model = LlamaForSequenceClassification(config)
    groups = [group("w1", "w2 w3 w4 w5"), group("w6", "w7", "w8", prompt="w9 w10")]
    together = RewardModelJudge(model, tiny_tokenizer, batch_size=5).score(groups)
    alone = RewardModelJudge(model, tiny_tokenizer, batch_size=1).score(groups)
    assert [len(scores) for scores in together] == [2, 3]
    for some, others in zip(together, alone, strict=True):
        assert some == pytest.approx(others, abs=1e-5)
    assert len({round(score, 4) for scores in together for score in scores}) == 5
    model.config.num_labels = 2
    with pytest.raises(ValueError, match="must have one label, got 2"):
        RewardModelJudge(model, tiny_tokenizer)


# the cache


def test_the_cache_survives_and_is_shared_by_threads(tmp_path):
    cache = AnswerCache(tmp_path / "deep" / "answers.sqlite")
    answer = Answer(text="[[A]]", prompt_tokens=3, completion_tokens=2)
    assert cache.get({"a": 1, "b": 2}) is None

    def write(number):
        cache.put({"number": number}, answer)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    again = AnswerCache(cache.path)
    assert all(again.get({"number": number}) == answer for number in range(16))
    assert key_of({"a": 1, "b": 2}) == key_of({"b": 2, "a": 1}) != key_of({"a": 1, "b": 3})


# the language model


def config(server, **changes):
    return JudgeConfig(model="judge", base_url=server.base_url, timeout_s=5, **changes)


def pairs(count):
    return [
        Comparison(prompt=f"Q{number}", first=f"good {number}", second=f"bad {number}")
        for number in range(count)
    ]


def knows(message, before=0):
    """A judge that really prefers the good answer."""
    first = re.search(r"<<<ANSWER A\n(\w+)", message)[1]
    return Reply(text=f"Because.\n[[{'A' if first == 'good' else 'B'}]]")


def test_a_fair_judge_is_believed_and_a_biased_one_ties():
    with judge_server(knows) as server:
        judge = LanguageModelJudge(config(server))
        assert judge.compare(pairs(4)) == [FIRST] * 4
        swapped = [Comparison(prompt=p.prompt, first=p.second, second=p.first) for p in pairs(4)]
        assert judge.compare(swapped) == [SECOND] * 4
        assert (judge.usage.requests, judge.usage.contradicted) == (16, 0)
    with judge_server(lambda message, before: Reply(text="[[A]]")) as server:
        judge = LanguageModelJudge(config(server))
        assert judge.compare(pairs(3)) == [TIE] * 3
        assert judge.usage.contradicted == 3


def test_one_order_asks_once_and_its_coin_belongs_to_the_pair():
    with judge_server(lambda message, before: Reply(text="[[A]]")) as server:
        judge = LanguageModelJudge(config(server, both_orders=False))
        verdicts = judge.compare(pairs(40))
        assert len(server.requests) == 40
        # The judge always says A: which answer that is, the coin decides.
        assert {FIRST, SECOND} == set(verdicts)
        swapped = [Comparison(prompt=p.prompt, first=p.second, second=p.first) for p in pairs(40)]
        assert judge.compare(swapped) == [verdict.swapped for verdict in verdicts]


def test_verdicts_keep_the_order_of_the_pairs():
    def slow_first(message, before):
        reply = knows(message)
        reply.delay_s = 0.2 if "Q0" in message else 0.0
        return reply

    with judge_server(slow_first) as server:
        judge = LanguageModelJudge(config(server, concurrency=4))
        mixed = [*pairs(2), Comparison(prompt="Q9", first="bad 9", second="good 9")]
        assert judge.compare(mixed) == [FIRST, FIRST, SECOND]


def test_no_more_requests_are_under_way_than_allowed():
    def slow(message, before):
        reply = knows(message)
        reply.delay_s = 0.02
        return reply

    with judge_server(slow) as server:
        LanguageModelJudge(config(server, concurrency=3)).compare(pairs(8))
        assert max(server.busiest) == 3


def test_answers_are_cached_and_cost_is_counted(tmp_path):
    cache = AnswerCache(tmp_path / "answers.sqlite")
    with judge_server(knows) as server:
        settings = config(server, dollars_per_million_prompt_tokens=5.0)
        first = LanguageModelJudge(settings, cache)
        first.compare(pairs(3))
        second = LanguageModelJudge(settings, cache)
        assert second.compare(pairs(3)) == [FIRST] * 3
        assert len(server.requests) == 6
        assert (first.usage.prompt_tokens, first.usage.completion_tokens) == (600, 60)
        assert first.usage.dollars(settings) == pytest.approx(600 * 5e-6)
        assert (second.usage.requests, second.usage.cached) == (0, 6)
        # Another setting is another question.
        LanguageModelJudge(config(server, max_tokens=7), cache).compare(pairs(1))
        assert len(server.requests) == 8


@pytest.mark.parametrize(
    "fault",
    [
        Reply(status=429, headers={"Retry-After": "0"}),
        Reply(status=500),
        Reply(disconnect=True),
    ],
    ids=["429", "500", "disconnect"],
)
def test_faults_that_pass_are_retried(fault):
    with judge_server(lambda message, before: knows(message) if before else fault) as server:
        judge = LanguageModelJudge(config(server, max_retries=2))
        assert judge.compare(pairs(1)) == [FIRST]
        assert len(server.requests) == 4


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Reply(status=500), "1 of 3 comparisons have no answer of judge.*status 500.*are kept"),
        (Reply(delay_s=1.0), "1 of 3 comparisons.*[Tt]imed? ?out"),
        (Reply(disconnect=True), "1 of 3 comparisons.*Connection"),
        (Reply(text=None), "1 of 3 comparisons.*must have a text"),
        (Reply(raw=b"<html>busy</html>"), "1 of 3 comparisons"),
    ],
    ids=["500", "timeout", "disconnect", "no text", "no json"],
)
def test_faults_that_stay_are_errors_and_never_verdicts(fault, message, tmp_path):
    cache = AnswerCache(tmp_path / "answers.sqlite")
    broken = True

    def reply(text, before):
        return fault if broken and "Q1" in text else knows(text)

    with judge_server(reply) as server:
        settings = JudgeConfig(
            model="judge", base_url=server.base_url, timeout_s=0.3, max_retries=0
        )
        with pytest.raises(JudgeError, match=message):
            LanguageModelJudge(settings, cache).compare(pairs(3))
        asked = len(server.requests)
        broken = False
        # What was answered is not asked again.
        assert LanguageModelJudge(settings, cache).compare(pairs(3)) == [FIRST] * 3
        assert len(server.requests) == asked + 2


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_what_every_request_would_meet_ends_at_once(status):
    def reply(message, before):
        return Reply(status=status, delay_s=0.0 if "Q0" in message else 0.05)

    with judge_server(reply) as server:
        judge = LanguageModelJudge(config(server, concurrency=2))
        with pytest.raises(JudgeError, match=f"judge refuses every request.*{status}"):
            judge.compare(pairs(30))
        assert len(server.requests) < 30


def test_garbage_is_an_abstention_and_counted():
    with judge_server(lambda message, before: Reply(text="I like both!")) as server:
        judge = LanguageModelJudge(config(server))
        assert judge.compare(pairs(2)) == [ABSTAIN] * 2
        assert judge.usage.abstained == 4


def test_the_key_comes_from_the_environment_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("MY_KEY", "secret-of-mine")
    cache = AnswerCache(tmp_path / "answers.sqlite")
    with judge_server(knows) as server:
        settings = config(server, api_key_variable="MY_KEY")
        LanguageModelJudge(settings, cache).compare(pairs(1))
        assert server.keys[0] == "Bearer secret-of-mine"
    assert b"secret-of-mine" not in (tmp_path / "answers.sqlite").read_bytes()
    assert "secret" not in repr(settings)


def test_settings_are_checked():
    with pytest.raises(ValueError, match="concurrency must be at least 1, got 0"):
        JudgeConfig(model="judge", concurrency=0)


def test_a_tournament_by_a_language_model():
    with judge_server(knows) as server:
        outcome = tournament(
            [group("bad one", "good one", "bad two")], LanguageModelJudge(config(server))
        )[0]
    assert outcome.winner == 1
    assert outcome.verdicts == (SECOND, FIRST)
