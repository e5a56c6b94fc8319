"""The client against a real HTTP server of this process, with faults."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from decapod.lm import (
    EngineError,
    Request,
    RequestError,
    SamplingParams,
    ServerEngine,
    ServerError,
    ServerTextGenerator,
    TextGenerator,
    TransformersEngine,
    build_model,
    build_tokenizer,
    sample_requests,
)

TOKENIZER = build_tokenizer(["abcdefghijklmnopqrstuvwxyz 0123456789?"], chat=True, add_bos=True)
ENGINE = TransformersEngine(build_model(len(TOKENIZER), init_std=0.1), TOKENIZER)


class Loopback(ThreadingHTTPServer):
    """An OpenAI-compatible server around the tiny model.

    ``faults`` holds what to do with the next requests instead of answering them: a status, one of
    the names in :meth:`Handler.do_POST`, or fields to change in the answer. ``always`` does it with
    all of them.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults: list[int | str | dict] = []
        self.always: int | str | dict | None = None
        self.dies_after: int | None = None
        self.gives_token_ids = True
        self.bodies: list[dict] = []
        self.authorizations: list[str | None] = []
        self.delay = 0.0
        self.usage: dict | None = None
        self.in_flight = self.most_in_flight = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Loopback

    def log_message(self, *args) -> None:
        """Silence."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.bodies.append(body)
            server.authorizations.append(self.headers.get("Authorization"))
            server.in_flight += 1
            server.most_in_flight = max(server.most_in_flight, server.in_flight)
            fault = server.faults.pop(0) if server.faults else server.always
            if server.dies_after is not None:
                server.dies_after -= 1
                fault = "drop" if server.dies_after < 0 else fault
        try:
            time.sleep(server.delay)
            if isinstance(fault, int):
                self.send(fault, b'{"error": "made to fail"}', {"Retry-After": "0.05"})
            elif fault == "drop":
                self.close_connection = True
            elif fault == "half":
                self.send(200, b'{"choices": [', {"Content-Length": "500"})
                self.close_connection = True
            elif fault == "slow":
                time.sleep(1.0)
                self.close_connection = True
            elif isinstance(fault, dict):
                self.answer(body, fault)
            elif fault == "nonsense":
                self.send(200, b"<html>welcome</html>")
            else:
                self.answer(body)
        finally:
            with server.lock:
                server.in_flight -= 1

    def answer(self, body: dict, changes: dict | None = None) -> None:
        chat = self.path.endswith("/chat/completions")
        prompt = body["messages"] if chat else body["prompt"]
        if chat:
            text = TOKENIZER.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
            ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
        else:
            ids = TOKENIZER(prompt)["input_ids"] if isinstance(prompt, str) else prompt
        params = SamplingParams(
            body["max_tokens"],
            body["temperature"],
            body["top_p"],
            body.get("top_k", 0),
            tuple(body.get("stop_token_ids", ())),
            tuple(body.get("stop", ())),
            body.get("ignore_eos", False),
        )
        try:
            with self.server.lock:
                answer = ENGINE.generate([Request(tuple(ids), params, body["seed"])])[0]
        except RequestError as error:
            self.send(400, json.dumps({"error": str(error)}).encode())
            return
        text = TOKENIZER.decode(list(answer.token_ids), skip_special_tokens=True)
        for stop in params.stop:
            text = text.partition(stop)[0]
        choice = {"index": 0, "finish_reason": answer.finish_reason}
        choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        if "logprobs" in body:
            choice["logprobs"] = {"token_logprobs": answer.logprobs}
        if body.get("return_token_ids") and self.server.gives_token_ids:
            choice["token_ids"] = answer.token_ids
        choice |= changes or {}
        content = {"choices": [choice], "usage": self.server.usage}
        self.send(200, json.dumps(content).encode())

    def send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        given = {"Content-Type": "application/json", "Content-Length": str(len(content))}
        for name, value in (given | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def running() -> Iterator[Loopback]:
    server = Loopback()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def server() -> Iterator[Loopback]:
    with running() as server:
        yield server


def client(server: Loopback, **options) -> ServerEngine:
    return ServerEngine(server.url, "tiny", **{"backoff": 0.01, "concurrency": 4, **options})


def some_requests(n: int = 10) -> list[Request]:
    return sample_requests([[5, 6, 7 + i] for i in range(n)], SamplingParams(8), seed=1)


# --- answers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(12, 0.0),
        SamplingParams(12, 0.8, top_p=0.9, top_k=9, stop_token_ids=(11, 12)),
        SamplingParams(30, stop=("a", "b"), ignore_eos=True),
    ],
)
def test_answers_by_token_ids_are_those_of_the_engine_behind_the_server(server, params) -> None:
    requests = sample_requests([[5, 6], [7], [8, 9, 10]], params, n=3)
    answers = client(server).generate(requests)
    for answer, direct in zip(answers, ENGINE.generate(requests), strict=True):
        assert answer.token_ids == direct.token_ids
        assert answer.logprobs == pytest.approx(direct.logprobs, abs=1e-5)
        assert (answer.finish_reason, answer.id) == (direct.finish_reason, direct.id)


@pytest.mark.parametrize(
    ("usage", "counted"),
    [
        ({"prompt_tokens": 3, "prompt_tokens_details": {"cached_tokens": 2}}, 20),
        ({"prompt_tokens": 3, "prompt_tokens_details": {"cached_tokens": None}}, 0),
        ({"prompt_tokens": 3, "prompt_tokens_details": None}, 0),
        (None, 0),
    ],
)
def test_cached_tokens_of_prompts_are_counted_where_the_server_tells(
    server, usage, counted
) -> None:
    server.usage = usage
    engine = client(server)
    engine.generate(some_requests(10))
    assert engine.cached_prompt_tokens == counted


def test_texts_and_chats_are_those_of_the_text_generator_with_the_same_seed(server) -> None:
    params = SamplingParams(20, stop=("a", "5"))
    prompts = ["what is 1", [{"role": "user", "content": "hello"}], "what is 1", "b" * 40]
    ours = TextGenerator(ENGINE, TOKENIZER, params, seed=3)(prompts)
    assert ServerTextGenerator(client(server), params, seed=3)(prompts) == ours


def test_only_fields_that_are_set_are_sent_beyond_the_common_ones(server) -> None:
    ServerTextGenerator(client(server), SamplingParams(4))(["a"])
    assert set(server.bodies[0]) == {
        "model", "prompt", "max_tokens", "temperature", "top_p", "seed"
    }  # fmt: skip


def test_extra_fields_are_added_and_none_removes_one(server) -> None:
    server.always = 400
    extra = {"seed": None, "user": "me", "top_p": 0.5}
    with pytest.raises(ServerError):
        client(server, extra_body=extra).generate(some_requests(1))
    assert "seed" not in server.bodies[0]
    assert (server.bodies[0]["user"], server.bodies[0]["top_p"]) == ("me", 0.5)


def test_the_key_is_sent_and_never_shown(server) -> None:
    server.always = 401
    with pytest.raises(ServerError) as caught:
        client(server, api_key="sesame").generate(some_requests(1))
    assert server.authorizations == ["Bearer sesame"]
    assert "sesame" not in str(caught.value)


def test_order_is_kept_and_concurrency_is_bounded(server) -> None:
    server.delay = 0.02
    requests = some_requests(24)
    answers = client(server, concurrency=3).generate(requests)
    assert [answer.id for answer in answers] == list(range(24))
    assert [a.token_ids for a in answers] == [a.token_ids for a in ENGINE.generate(requests)]
    assert 1 < server.most_in_flight <= 3


# --- faults ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [408, 429, 500, 503, "drop", "half", "slow"])
def test_a_passing_fault_is_tried_again_and_changes_nothing(server, fault) -> None:
    requests = some_requests(6)
    server.faults = [fault, fault]
    answers = client(server, timeout=0.5 if fault == "slow" else 30).generate(requests)
    assert [a.token_ids for a in answers] == [a.token_ids for a in ENGINE.generate(requests)]
    assert len(server.bodies) == 8


def test_a_server_that_asks_to_wait_is_given_the_time(server) -> None:
    server.faults = [429]
    waits = []

    class Patient(threading.Event):
        def wait(self, timeout=None):
            waits.append(timeout)
            return super().wait(timeout)

    import httpx

    engine = client(server, backoff=0.0)
    with httpx.Client() as http:
        body = {"prompt": [5], "max_tokens": 1, "temperature": 0, "top_p": 1, "seed": 0}
        engine._post(http, f"{server.url}/completions", body, Patient())
    assert waits == [0.05]


def test_a_lasting_fault_names_address_status_tries_and_what_was_finished(server) -> None:
    server.faults = ["answer"] * 2 + [500] * 100
    with pytest.raises(ServerError) as caught:
        client(server, concurrency=1, retries=2).generate(some_requests(5))
    error = caught.value
    assert isinstance(error, EngineError)
    assert (error.url, error.status, error.total) == (f"{server.url}/completions", 500, 5)
    for word in (server.url, "status 500", "made to fail", "after 3 tries", "2 of 5"):
        assert word in str(error)
    assert sorted(error.finished) == [0, 1]


def test_after_one_request_failed_for_good_no_new_ones_are_sent(server) -> None:
    server.always = 500
    with pytest.raises(ServerError):
        client(server, concurrency=2, retries=1, backoff=0.05).generate(some_requests(40))
    assert len(server.bodies) <= 8


def test_what_a_server_finished_before_it_died_is_kept_and_the_rest_asked_again() -> None:
    requests = some_requests(20)
    with running() as first:
        first.dies_after = 9
        with pytest.raises(ServerError, match="no answer") as caught:
            client(first, retries=1).generate(requests)
    error = caught.value
    assert error.status is None
    assert 0 < len(error.finished) < 20
    rest = [request for i, request in enumerate(requests) if i not in error.finished]
    with running() as second:
        answers = dict(error.finished)
        for answer in client(second).generate(rest):
            answers[answer.id] = answer
    whole = ENGINE.generate(requests)
    assert [answers[i].token_ids for i in range(20)] == [answer.token_ids for answer in whole]


def test_texts_finished_before_the_end_are_kept_too(server) -> None:
    server.faults = ["answer"] * 3 + [500] * 100
    prompts = [f"what is {i}" for i in range(6)]
    generate = ServerTextGenerator(client(server, concurrency=1, retries=0), SamplingParams(8))
    with pytest.raises(ServerError) as caught:
        generate(prompts)
    server.faults = []
    assert [caught.value.finished[i] for i in range(3)] == generate(prompts)[:3]


def test_nothing_listening_is_no_answer() -> None:
    with running() as server:
        url = server.url
    with pytest.raises(ServerError, match="ConnectError") as caught:
        ServerEngine(url, "tiny", retries=1, backoff=0.01).generate(some_requests(2))
    assert caught.value.status is None
    assert caught.value.finished == {}


def test_the_error_is_that_of_the_request_that_failed_first(server) -> None:
    server.faults = [429, 401]
    server.delay = 0.05
    with pytest.raises(ServerError) as caught:
        client(server, concurrency=2, backoff=5.0).generate(some_requests(2))
    assert caught.value.status == 401


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_a_refusal_is_not_tried_again(server, status) -> None:
    server.always = status
    with pytest.raises(ServerError, match=f"status {status}.*made to fail"):
        client(server).generate(some_requests(1))
    assert len(server.bodies) == 1


def test_what_the_server_says_about_a_prompt_that_is_too_long_is_told(server) -> None:
    with pytest.raises(ServerError, match=r"status 400.*512 positions"):
        client(server).generate([Request((5,) * 600, SamplingParams(4))])


def test_a_server_without_token_ids_is_named_as_such(server) -> None:
    server.gives_token_ids = False
    with pytest.raises(ServerError, match=r"does not return token ids.*ServerTextGenerator"):
        client(server).generate(some_requests(1))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"token_ids": [5]}, "1 token ids and 8 log-probabilities"),
        ({"finish_reason": "abort"}, "ended it early: finish_reason is 'abort'"),
        (
            {"token_ids": [5] * 9, "logprobs": {"token_logprobs": [-1.0] * 9}},
            "9 tokens, 8 asked for",
        ),
    ],
)
def test_an_answer_whose_fields_do_not_fit_is_refused(server, changes, words) -> None:
    server.always = changes
    params = SamplingParams(8, ignore_eos=True)
    with pytest.raises(ServerError, match=words):
        client(server).generate([Request((5, 6), params)])


def test_silence_is_told_from_other_faults(server) -> None:
    for fault, timeout in (("slow", 0.2), ("drop", 30)):
        server.always = fault
        with pytest.raises(ServerError) as caught:
            client(server, retries=0, timeout=timeout).generate(some_requests(1))
        assert caught.value.timed_out == (fault == "slow")


def test_paths_that_only_some_servers_have_can_be_asked_with_the_same_care(server) -> None:
    server.faults = [503]
    body = {"prompt": [5], "max_tokens": 2, "temperature": 0, "top_p": 1, "seed": 0}
    found = client(server).post_all([("completions", body)] * 2, lambda i, c: (i, c["text"]))
    assert [index for index, _ in found] == [0, 1]
    assert len(server.bodies) == 3


def test_an_answer_that_cannot_be_read_is_shown(server) -> None:
    server.always = "nonsense"
    with pytest.raises(ServerError, match=r"cannot read the answer.*<html>welcome"):
        client(server).generate(some_requests(1))


# --- bad input ------------------------------------------------------------------------------------


def test_empty_prompts_are_refused_before_anything_is_sent(server) -> None:
    engine = client(server)
    with pytest.raises(RequestError, match=r"requests\[1\].*at least one token"):
        engine.generate([Request((5,), SamplingParams(4)), Request((), SamplingParams(4))])
    with pytest.raises(RequestError, match=r"requests\[1\].*a text or messages"):
        ServerTextGenerator(engine, SamplingParams(4))(["a", ""])
    assert server.bodies == []
    assert engine.generate([]) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"base_url": "localhost:8000"}, "base_url: .*http://"),
        ({"concurrency": 0}, "concurrency: expected at least 1"),
        ({"retries": -1}, "retries: expected at least 0"),
        ({"timeout": 0}, "timeout"),
    ],
)
def test_bad_options_are_refused(options, words) -> None:
    with pytest.raises(ValueError, match=words):
        ServerEngine(**{"base_url": "http://127.0.0.1:1/v1", "model": "tiny", **options})
