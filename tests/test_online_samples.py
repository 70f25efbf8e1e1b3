"""Sampling for the online loop: seeds, stop strings, files, this process, a server with faults."""

import json
import socket
import sys
import threading
import urllib.request

import pytest
import torch
from conftest import build_model, build_tokenizer
from judge_server import Reply, judge_server

from mcpo.encode import encode_prompt, make_encoder
from mcpo.online.local import LocalGenerator
from mcpo.online.plan import Prompt, SamplingPlan, cut_at_stop
from mcpo.online.samples import count, read_work, sample_all
from mcpo.online.server import GenerationError, ServerConfig, ServerGenerator, serving
from mcpo.records import Candidate

PROMPTS = [Prompt(row_id=f"r{number}", prompt=f"w{number} w{number + 1}") for number in range(5)]


# plans


def test_every_answer_has_a_seed_of_its_own():
    plan = SamplingPlan(temperatures=(0.5, 1.0), samples_per_temperature=3)
    seeds = {plan.seed_of(p.row_id, *setting) for p in PROMPTS for setting in plan.settings}
    assert len(seeds) == 5 * 6
    assert max(seeds) < 2**63
    other = SamplingPlan(temperatures=(0.5, 1.0), samples_per_temperature=3, round=1)
    assert seeds.isdisjoint(
        other.seed_of(p.row_id, *setting) for p in PROMPTS for setting in other.settings
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperatures": ()}, "one or more numbers from 0 on"),
        ({"temperatures": (-0.1,)}, "one or more numbers from 0 on"),
        ({"samples_per_temperature": 0}, "samples_per_temperature must be at least 1, got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"stop": ("",)}, "must not be empty"),
        ({"temperatures": (0,)}, "temperature 0 gives one answer however often"),
    ],
)
def test_plans_that_make_no_sense_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        SamplingPlan(**values)


def test_the_first_stop_string_ends_an_answer():
    cut = Candidate(text="one two STOP three END", finished=False)
    assert cut_at_stop(cut, ("END", "STOP")) == Candidate(text="one two", finished=True)
    assert cut_at_stop(cut, ("none",)) is cut


# files


def sampled(prompts, plan, generator, work, on_prompt=lambda _: None):
    sample_all(prompts, plan, generator, work, on_prompt)
    found = read_work(work)
    return [found[prompt.row_id] for prompt in prompts]


class Scripted:
    """Answers in an order of its own and remembers what it was asked; fails when told."""

    def __init__(self, fail_after=None):
        self.asked = []
        self.fail_after = fail_after

    def sample(self, prompts, plan):
        for done, prompt in enumerate(reversed(prompts)):
            if done == self.fail_after:
                raise KeyboardInterrupt
            self.asked.append(prompt.row_id)
            yield (
                prompt,
                [
                    Candidate(text=f"{prompt.row_id}/{heat}/{index}")
                    for heat, index in plan.settings
                ],
            )


def test_an_interrupted_round_goes_on_and_ends_the_same(tmp_path):
    plan = SamplingPlan(temperatures=(0.5, 1.0))
    whole = sampled(PROMPTS, plan, Scripted(), tmp_path / "whole.jsonl")
    work = tmp_path / "work.jsonl"
    with pytest.raises(KeyboardInterrupt):
        sample_all(PROMPTS, plan, Scripted(fail_after=2), work)
    # A process that is killed may leave half a line.
    with work.open("ab") as file:
        file.write(b'{"id": "r0", "comple')
    rest = Scripted()
    progress = []
    assert sampled(PROMPTS, plan, rest, work, progress.append) == whole
    assert rest.asked == ["r2", "r1", "r0"]
    assert progress == [2, 1, 1, 1]
    assert [group[0].text for group in whole] == [f"r{number}/0.5/0" for number in range(5)]
    done = Scripted()
    assert sampled(PROMPTS, plan, done, work) == whole
    assert done.asked == []


def test_texts_of_any_kind_survive_the_file(tmp_path):
    class Odd:
        def sample(self, prompts, plan):
            yield prompts[0], [Candidate(text="a\nb\u2028c\x85 \U0001f600", finished=False)]

    plan = SamplingPlan(temperatures=(1.0,), samples_per_temperature=1)
    first = sampled(PROMPTS[:1], plan, Odd(), tmp_path / "w.jsonl")
    assert list(read_work(tmp_path / "w.jsonl").values()) == first


def test_two_prompts_of_one_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match="row id of its own"):
        sample_all([PROMPTS[0]] * 2, SamplingPlan(), Scripted(), tmp_path / "w.jsonl")


def test_answers_are_counted():
    found = count(
        [
            [Candidate(text="a"), Candidate(text="a"), Candidate(text="")],
            [Candidate(text="b", finished=False)],
        ]
    )
    assert (found.answers, found.empty, found.truncated, found.repeated) == (4, 1, 1, 1)


# this process


@pytest.fixture(scope="module")
def local():
    tokenizer = build_tokenizer()
    encoder = make_encoder(tokenizer, prompt_format="auto", chat_template=None)
    model = build_model().eval()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model, encoder


def test_local_answers_do_not_depend_on_the_order_of_prompts(local):
    plan = SamplingPlan(temperatures=(0.7, 1.3), max_new_tokens=8)
    generator = LocalGenerator(*local, batch_size=2, model_name="tiny")
    there = {prompt.row_id: answers for prompt, answers in generator.sample(PROMPTS, plan)}
    back = {prompt.row_id: answers for prompt, answers in generator.sample(PROMPTS[::-1], plan)}
    assert there == back
    assert {len(answers) for answers in there.values()} == {4}
    texts = [answer.text for answers in there.values() for answer in answers]
    assert len(set(texts)) > 10
    assert {answer.model for answers in there.values() for answer in answers} == {"tiny"}
    another = SamplingPlan(temperatures=(0.7, 1.3), max_new_tokens=8, round=1)
    again = {prompt.row_id: answers for prompt, answers in generator.sample(PROMPTS, another)}
    assert again != there


def test_local_answers_are_those_of_the_models_distribution(local):
    # One token after one prompt: frequencies against the softmax, chi squared.
    model, encoder = local
    plan = SamplingPlan(temperatures=(1.0,), samples_per_temperature=400, max_new_tokens=1)
    answers = next(iter(LocalGenerator(model, encoder).sample(PROMPTS[:1], plan)))[1]
    ids = torch.tensor([encode_prompt(PROMPTS[0].prompt, encoder, "r0")])
    with torch.no_grad():
        probability_V = model(ids).logits[0, -1].softmax(0)
    seen = torch.zeros(97)
    special = set(encoder.tokenizer.all_special_ids)
    for answer in answers:
        if answer.text:
            seen[encoder.tokenizer.convert_tokens_to_ids(answer.text)] += 1
    kept = torch.tensor([v for v in range(97) if v not in special])
    expected = probability_V[kept] * 400
    statistic = ((seen[kept] - expected) ** 2 / expected).sum()
    degrees = len(kept)
    assert float(statistic) < degrees + 4 * (2 * degrees) ** 0.5


# a server


def echo(message, before=0):
    return Reply(text=f"answer to {message}")


def server_config(server, **changes):
    return ServerConfig(base_url=server.base_url, model="m", timeout_s=5, **changes)


def test_a_server_is_asked_once_per_answer_with_its_seed(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "of-the-environment")
    plan = SamplingPlan(temperatures=(0.5, 1.0), max_new_tokens=9, stop=("END",))
    with judge_server(echo) as server:
        generator = ServerGenerator(server_config(server))
        got = {prompt.row_id: answers for prompt, answers in generator.sample(PROMPTS, plan)}
    assert set(got) == {prompt.row_id for prompt in PROMPTS}
    assert [answer.text for answer in got["r1"]] == ["answer to w1 w2"] * 4
    asked = {
        (body["messages"][0]["content"], body["temperature"]): body for body in server.requests
    }
    assert len(server.requests) == 20
    assert len({body["seed"] for body in server.requests}) == 20
    body = asked["w1 w2", 0.5]
    assert body["seed"] in {plan.seed_of("r1", 0.5, index) for index in range(2)}
    assert (body["max_tokens"], body["stop"], body["model"]) == (9, ["END"], "m")
    assert set(server.keys) == {"Bearer of-the-environment"}


def test_answers_find_their_place_whatever_the_order():
    plan = SamplingPlan(temperatures=(0.5, 1.0), samples_per_temperature=1)
    lock = threading.Lock()
    order = []

    def late_first(message, before):
        with lock:
            order.append(message)
            number = len(order)
        return Reply(text=f"{message} at {before}", delay_s=0.1 if number < 4 else 0.0)

    with judge_server(late_first) as server:
        generator = ServerGenerator(server_config(server, concurrency=4))
        got = {prompt.row_id: answers for prompt, answers in generator.sample(PROMPTS, plan)}
    for prompt in PROMPTS:
        assert all(answer.text.startswith(prompt.prompt) for answer in got[prompt.row_id])
    assert max(server.busiest) <= 4


@pytest.mark.parametrize(
    "fault", [Reply(status=429), Reply(status=503), Reply(disconnect=True)], ids=str
)
def test_a_servers_passing_faults_are_retried(fault):
    plan = SamplingPlan(temperatures=(1.0,), samples_per_temperature=1)
    with judge_server(lambda message, before: echo(message) if before else fault) as server:
        generator = ServerGenerator(server_config(server, max_retries=2))
        assert len(list(generator.sample(PROMPTS[:1], plan))) == 1


def test_a_server_that_fails_loses_nothing_that_was_answered(tmp_path):
    plan = SamplingPlan(temperatures=(1.0,), samples_per_temperature=1)
    broken = True

    def reply(message, before):
        return Reply(status=500) if broken and message.startswith("w3") else echo(message)

    with judge_server(reply) as server:
        generator = ServerGenerator(server_config(server, max_retries=0, concurrency=1))
        with pytest.raises(GenerationError, match=r"did not answer prompt 'r3' \(InternalServer"):
            sample_all(PROMPTS, plan, generator, tmp_path / "w.jsonl")
        broken = False
        asked = len(server.requests)
        groups = sampled(PROMPTS, plan, generator, tmp_path / "w.jsonl")
        assert len(server.requests) - asked == 2
    assert [group[0].text for group in groups] == [f"answer to {p.prompt}" for p in PROMPTS]


def test_a_server_is_started_for_the_weights_and_stopped(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = tmp_path / "serve.py"
    script.write_text(
        "import http.server, json, sys\n"
        "class Handler(http.server.BaseHTTPRequestHandler):\n"
        "    def log_message(self, *args): pass\n"
        "    def do_GET(self):\n"
        "        body = json.dumps({'data': sys.argv[1]}).encode()\n"
        "        self.send_response(200); self.end_headers(); self.wfile.write(body)\n"
        "http.server.HTTPServer(('127.0.0.1', int(sys.argv[2])), Handler).serve_forever()\n"
    )
    folder = tmp_path / "check point"
    command = f"{sys.executable} {script} {{model}} {port}"
    base_url = f"http://127.0.0.1:{port}"
    with (
        serving(command, folder, base_url, tmp_path / "log", patience_s=60),
        urllib.request.urlopen(f"{base_url}/models") as response,
    ):
        assert json.loads(response.read()) == {"data": str(folder)}
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"{base_url}/models", timeout=2)


def test_a_server_that_does_not_come_up_is_an_error(tmp_path):
    command = f"{sys.executable} -c 'raise SystemExit(3)' {{model}}"
    with (
        pytest.raises(GenerationError, match=r"ended with status 3 before it answered; see .*log"),
        serving(command, tmp_path, "http://127.0.0.1:9", tmp_path / "log"),
    ):
        pass
    slow = f"{sys.executable} -c 'import time; time.sleep(60)' {{model}}"
    with (
        pytest.raises(GenerationError, match="did not answer at http"),
        serving(slow, tmp_path, "http://127.0.0.1:9", tmp_path / "log", patience_s=0.3),
    ):
        pass
    with (
        pytest.raises(ValueError, match=r"must hold \{model\}, got 'vllm serve'"),
        serving("vllm serve", tmp_path, "http://127.0.0.1:9", tmp_path / "log"),
    ):
        pass
