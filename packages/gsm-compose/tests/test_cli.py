"""The command line, in this process and, where signals and exit codes matter, in its own."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from gsm_compose.benchmark import Benchmark
from gsm_compose.building import build_benchmark
from gsm_compose.cli import main
from gsm_compose.engine.problems import load_gsm8k
from gsm_compose.journal import questions
from gsm_compose.prompts import PromptSpec
from gsm_compose.results import Results

_ITEMS = 12
_PAPER = ("original", "modified", "compositional")


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """The command line in this process, which saves the start of another one."""

    def call(*arguments: object) -> Done:
        status = main([str(argument) for argument in arguments])
        return Done(status, *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 150 rows of the test split, as a file."""
    packed = files("gsm_compose").joinpath("data", "gsm8k-test.jsonl.gz").read_bytes()
    lines = gzip.decompress(packed).decode().split("\n")[:150]
    path = tmp_path_factory.mktemp("rows") / "rows-test.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def built(rows: Path) -> Benchmark:
    return build_benchmark(load_gsm8k(rows), _ITEMS)


@pytest.fixture
def file(built: Benchmark, tmp_path: Path) -> Path:
    built.to_jsonl(tmp_path / "benchmark.jsonl")
    return tmp_path / "benchmark.jsonl"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def _start(*arguments: object) -> subprocess.Popen[str]:
    """A command line of its own that hears Ctrl-C even if the tests were told not to."""
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from gsm_compose.cli import main; raise SystemExit(main())"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONIOENCODING": "utf-8"},
    )


def _one_line(done: Done) -> str:
    """The complaint, which is one line."""
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("gsm-compose: ")]
    assert done.stderr.splitlines()[-1] == line
    return line


# --- build ----------------------------------------------------------------------------------------


def test_build_writes_what_the_library_builds_and_says_its_hash(
    call: Callable[..., Done], rows: Path, built: Benchmark
) -> None:
    done = call("build", "--source", rows, "--n", _ITEMS, "--card")
    assert done.returncode == 0
    assert Benchmark.from_jsonl("benchmark.jsonl") == built
    assert hashlib.sha256(Path("benchmark.jsonl").read_bytes()).hexdigest() in done.stdout
    assert f"max_reuse {built.settings['max_reuse']}" in done.stdout
    assert Path("benchmark.md").read_text(encoding="utf-8") == built.card()
    assert "building 12 items from 150 rows" in done.stderr


def test_build_passes_every_option_on(call: Callable[..., Done], rows: Path) -> None:
    options = ("--hops", 3, "--reverse", "--ratio", "5/2", "--seed", 3, "--max-reuse", 2)
    done = call("build", "--source", rows, "--n", 6, *options, "--exclude", "gsm8k/test/1")
    assert done.returncode == 0
    assert Benchmark.from_jsonl("benchmark.jsonl").settings == {
        "n": 6,
        "hops": 3,
        "ratio": "5/2",
        "max_reuse": 2,
        "seed": 3,
        "shape": "chain",
        "reverse": True,
        "exclude": ["gsm8k/test/1"],
        "problems": 150,
    }
    fan = call("build", "--source", rows, "--n", 3, "--shape", "fan_in", "--out", "fan.jsonl")
    assert fan.returncode == 0
    assert {item.shape for item in Benchmark.from_jsonl("fan.jsonl")} == {"fan_in"}


def test_rows_to_leave_out_may_stand_in_a_file(
    call: Callable[..., Done], rows: Path, built: Benchmark
) -> None:
    used = sorted({hop.problem for item in built for hop in item.hops})[:3]
    Path("out.txt").write_text("\n".join(used) + "\n", encoding="utf-8")
    assert call("build", "--source", rows, "--n", 6, "--exclude", "out.txt").returncode == 0
    found = Benchmark.from_jsonl("benchmark.jsonl")
    assert found.settings["exclude"] == used
    assert not {hop.problem for item in found for hop in item.hops} & set(used)


def test_build_leaves_a_file_that_is_there_alone_unless_told(
    call: Callable[..., Done], rows: Path
) -> None:
    Path("benchmark.jsonl").write_text("mine", encoding="utf-8")
    refused = call("build", "--source", rows, "--n", 6)
    assert refused.returncode == 2
    assert "--force" in _one_line(refused)
    assert Path("benchmark.jsonl").read_text(encoding="utf-8") == "mine"
    assert call("build", "--source", rows, "--n", 6, "--force").returncode == 0
    assert len(Benchmark.from_jsonl("benchmark.jsonl")) == 6


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--n", 100_000), "at most"),
        (("--n", 0), "at least 1"),
        (("--ratio", "wide"), "5/2"),
        (("--ratio", "1/0"), "5/2"),
        (("--shape", "fan_in", "--hops", 2), "fan-in has 3"),
        (("--exclude", "gsm8k/test/151"), "Did you mean"),
        (("--exclude", "test/51"), "'gsm8k/test/51'"),
        (("--out", "nowhere/x.jsonl"), "nowhere does not exist"),
        (("--out", "."), "is a folder"),
        (("--out", "x.md", "--card"), "another ending"),
    ],
)
def test_a_build_that_cannot_be_is_one_line_and_leaves_nothing(
    call: Callable[..., Done], rows: Path, tmp_path: Path, arguments: tuple[Any, ...], words: str
) -> None:
    done = call("build", "--source", rows, *arguments)
    assert done.returncode == 2
    assert words in _one_line(done)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("test.jsonl", b"", "empty"),
        ("test.jsonl", b'{"question": "a"', "line 1"),
        ("rows.jsonl", b'{"question": "a", "answer": "#### 1"}\n', "split"),
        ("test.jsonl.gz", b"not packed", "gzip"),
        ("test.jsonl", b"\xff\xfe", "UTF-8"),
    ],
)
def test_bad_rows_are_one_line(
    call: Callable[..., Done], tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    (tmp_path / name).write_bytes(content)
    done = call("build", "--source", name)
    assert done.returncode == 2
    assert words in _one_line(done)


def test_missing_files_are_one_line(call: Callable[..., Done]) -> None:
    for arguments in (
        ("build", "--source", "test-rows.jsonl"),
        ("audit", "absent.jsonl"),
        ("eval", "absent.jsonl", "--engine", "simulated:"),
        ("report", "absent.jsonl", "answers.jsonl"),
        ("export", "absent.jsonl", "--to", "hf", "--out", "folder"),
    ):
        done = call(*arguments)
        assert done.returncode == 2
        assert "No such file" in _one_line(done)


def test_interrupted_build_ends_with_130_and_leaves_nothing(tmp_path: Path) -> None:
    process = _start("build", "--split", "train", "--n", 3000, "--card")
    assert process.stderr is not None
    for line in process.stderr:
        if "building" in line:
            break
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr.splitlines()[-1].startswith("gsm-compose: interrupted")
    assert "Traceback" not in stderr
    assert stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_the_module_runs_and_a_wrong_option_is_a_usage_error() -> None:
    run = [sys.executable, "-m", "gsm_compose"]
    helped = subprocess.run([*run, "--help"], capture_output=True, text=True)
    assert helped.returncode == 0
    assert "{build,audit,eval,report,export}" in helped.stdout
    assert subprocess.run([*run, "build", "--m", "3"], capture_output=True).returncode == 2


def test_the_command_line_starts_without_the_optional_packages() -> None:
    code = (
        "import sys; from gsm_compose.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "loaded = {'torch', 'transformers', 'matplotlib', 'decapod', 'datasets', 'scipy'}\n"
        "assert not loaded & set(sys.modules), loaded & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_reader_that_has_seen_enough_is_no_error(rows: Path) -> None:
    code = "import sys; from gsm_compose.cli import main; sys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "audit", "--source", str(rows)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert "Broken" not in process.stderr.read()
    process.stderr.close()
    process.wait(timeout=60)


# --- audit ----------------------------------------------------------------------------------------


def test_audit_of_rows_counts_what_the_library_counts(
    call: Callable[..., Done], rows: Path
) -> None:
    from gsm_compose.engine.yields import count_yields

    found = count_yields(load_gsm8k(rows))
    done = call("audit", "--source", rows)
    assert done.returncode == 0
    for line in found.rules:
        numbers = (line.rejects, line.left, line.questions, line.alone)
        row = next(row for row in done.stdout.splitlines() if row.startswith(f"{line.rule}  "))
        assert row.split()[-4:] == [str(number) for number in numbers]
    as_json = json.loads(call("audit", "--source", rows, "--json").stdout)
    assert as_json["programs"] == found.programs
    assert [line["left"] for line in as_json["rules"]] == [line.left for line in found.rules]


def test_audit_of_a_good_benchmark_runs_every_program_and_finds_nothing(
    call: Callable[..., Done], file: Path
) -> None:
    done = call("audit", file)
    assert done.returncode == 0
    assert f"{_ITEMS} programs run: no fault" in done.stdout
    assert "KS distance" in done.stdout
    as_json = json.loads(call("audit", file, "--json", "--no-execute").stdout)
    assert (as_json["clean"], as_json["executed"], as_json["faults"]) == (True, 0, {})


def test_audit_of_a_wrong_label_says_which_item_and_exits_1(
    call: Callable[..., Done], built: Benchmark, file: Path
) -> None:
    from dataclasses import replace

    item = built.items[3]
    wrong = replace(item, hops=(item.q1, replace(item.q2, answer=item.gold + 1)))
    Benchmark((*built.items[:3], wrong), built.settings).to_jsonl("wrong.jsonl")
    done = call("audit", "wrong.jsonl", "--no-execute")
    assert done.returncode == 1
    assert f"  {wrong.id} ({item.q1.problem} → {item.q2.problem}): " in done.stdout
    assert "1 with faults" in done.stdout


def test_audit_explains_every_number_of_a_row(call: Callable[..., Done]) -> None:
    done = call("audit", "--explain", "gsm8k/test/136", "gsm8k/train/3")
    assert done.returncode == 0
    train = done.stdout.partition("gsm8k/train/3")[2]
    assert "'120' at 19: may become X" in train
    assert "'12' at 66: rejected\n      used twice" in train
    assert "'half' at 150: rejected\n      not a plain number" in train
    found = json.loads(call("audit", "--explain", "gsm8k/train/3", "--json").stdout)
    assert [number["accepted"] for number in found[0]["numbers"]] == [True, False, False]


def test_an_unknown_row_is_told_with_the_nearest(call: Callable[..., Done]) -> None:
    done = call("audit", "--explain", "gsm8k/tset/418")
    assert done.returncode == 2
    assert "Did you mean 'gsm8k/test/418'?" in _one_line(done)


def test_a_truncated_or_foreign_benchmark_is_one_line(
    call: Callable[..., Done], file: Path
) -> None:
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    Path("short.jsonl").write_text("".join(lines[:-1]), encoding="utf-8")
    Path("torn.jsonl").write_text("".join(lines)[:-40], encoding="utf-8")
    Path("other.jsonl").write_text('{"schema": "other/1"}\n', encoding="utf-8")
    for name, words in (("short", "truncated"), ("torn", "line 13"), ("other", "schema")):
        done = call("audit", f"{name}.jsonl")
        assert done.returncode == 2
        assert words in _one_line(done)


# --- eval -----------------------------------------------------------------------------------------


def test_eval_of_a_simulated_reasoner_prints_the_gap_of_the_library(
    call: Callable[..., Done], built: Benchmark, file: Path
) -> None:
    engine = "simulated:e1=0.3,e2=0.3,distraction=0.3"
    done = call("eval", file, "--engine", engine, "--shots", 0, "--out", "answers.jsonl")
    assert done.returncode == 0
    results = Results.from_jsonl("answers.jsonl", built)
    assert results.gap().summary() in done.stdout
    assert results.label == engine
    record = json.loads(Path("answers.jsonl.run.json").read_text(encoding="utf-8"))
    assert record["benchmark"]["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()


def test_eval_with_and_without_preamble_shows_both_and_the_larger(
    call: Callable[..., Done], built: Benchmark, file: Path
) -> None:
    from gsm_compose.results import best_of

    done = call("eval", file, "--engine", "simulated:e1=0.2", "--preamble", "both", "-o", "a.jsonl")
    assert done.returncode == 0
    both = [Results.from_jsonl(name, built) for name in ("a.jsonl", "a-no-preamble.jsonl")]
    assert [results.spec.preamble for results in both] == [True, False]
    assert best_of(*both).summary() in done.stdout


def test_eval_asks_the_conditions_and_items_it_is_told(
    call: Callable[..., Done], file: Path
) -> None:
    arguments = ("eval", file, "--engine", "simulated:", "--limit", 4, "--conditions")
    done = call(*arguments, "modified", "original-q2")
    assert done.returncode == 0
    assert "modified" in done.stdout
    assert "without a number" in done.stdout
    found = Results.from_jsonl(
        "benchmark.simulated-.jsonl", Benchmark(Benchmark.from_jsonl(file).items[:4])
    )
    assert found.conditions == ("modified", "original-q2")
    assert call(*arguments, "all").returncode == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--engine", "gpt"), "server:URL"),
        (("--engine", "hf:"), "hf:PATH"),
        (("--engine", "simulated:e1=2"), "probability"),
        (("--engine", "simulated:e3=0.1"), "e3=0.1"),
        (("--engine", "simulated:seed=1"), "seed=1"),
        (("--engine", "server:localhost"), "http://"),
        (("--engine", "server:http://127.0.0.1:9/v1"), "model: expected"),
        (
            ("--engine", "server:http://127.0.0.1:9/v1", "--model", "m", "--api-key-env", "NO_KEY"),
            "'NO_KEY' is not set",
        ),
        (("--engine", "hf:absent/folder/of/model"), "cannot load"),
        (("--engine", "hf:x", "--samples", "3"), "--temperature"),
        (("--engine", "server:http://127.0.0.1:9/v1", "--temperature", "-1"), "temperature"),
        (("--engine", "simulated:", "--limit", "0"), "limit"),
        (("--engine", "simulated:", "--shots", "9"), "shots"),
        (("--engine", "simulated:", "--out", "no/where.jsonl"), "No such file"),
        (("--engine", "simulated:", "--out", "benchmark.jsonl"), "another file"),
    ],
)
def test_an_evaluation_that_cannot_begin_is_one_line(
    call: Callable[..., Done],
    file: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    words: str,
) -> None:
    pytest.importorskip("decapod.lm")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = call("eval", file, *arguments)
    assert done.returncode == 2
    assert words in _one_line(done)
    assert list(Path.cwd().iterdir()) == [file]


def test_without_decapod_the_error_names_the_extra(file: Path) -> None:
    code = (
        "import sys; sys.modules['decapod'] = None\n"
        "from gsm_compose.cli import main; sys.exit(main())"
    )
    arguments = ["eval", str(file), "--engine", "server:http://127.0.0.1:9/v1", "--model", "m"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert 'pip install "gsm-compose[lm]"' in done.stderr.splitlines()[-1]


def test_answers_drawn_at_another_temperature_are_not_continued(
    call: Callable[..., Done], file: Path
) -> None:
    arguments = ("eval", file, "--engine", "simulated:", "--out", "answers.jsonl")
    assert call(*arguments).returncode == 0
    before = Path("answers.jsonl").read_bytes()
    done = call(*arguments, "--temperature", 0.7)
    assert done.returncode == 2
    assert "temperature 0.0, got 0.7" in _one_line(done)
    other = call("eval", file, "--engine", "simulated:e1=0.5", "--out", "answers.jsonl")
    assert other.returncode == 2
    assert "another run" in _one_line(other)
    assert Path("answers.jsonl").read_bytes() == before


@pytest.fixture(scope="module")
def tiny(built: Benchmark, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of random weights on disk."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    lm = pytest.importorskip("decapod.lm")
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    texts = [item.q2.question for item in built] + ["Therefore X=1. Python {}()#"]
    tokenizer = lm.build_tokenizer(texts, "bpe", chat=True)
    lm.build_model(len(tokenizer), 32, 1, 2, max_positions=4096, init_std=0.2).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)
    return folder


def test_eval_of_a_model_on_disk_writes_what_its_engine_says(
    call: Callable[..., Done], built: Benchmark, file: Path, tiny: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from decapod.lm import SamplingParams, TextGenerator, TransformersEngine
    from gsm_compose.evaluation import evaluate

    options = ("--shots", 0, "--limit", 3, "--max-new-tokens", 6, "--temperature", 0.5)
    arguments = ("eval", file, "--engine", f"hf:{tiny}", *options, "--seed", 4)
    done = call(*arguments, "--out", "tiny.jsonl")
    assert done.returncode == 0, done.stderr
    few, spec = Benchmark(built.items[:3]), PromptSpec(shots=0)
    found = Results.from_jsonl("tiny.jsonl", few)
    assert found.label == "tiny-llama"
    assert "S_comp" in done.stdout
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    engine = TransformersEngine(AutoModelForCausalLM.from_pretrained(tiny), tokenizer)
    params = SamplingParams(6, 0.5, stop=("\nProblem:",))
    direct = evaluate(
        few, TextGenerator(engine, tokenizer, params, 4), _PAPER, spec, progress=False
    )
    assert [r.text for r in found.responses] == [r.text for r in direct.responses]
    chat = call(*arguments, "--chat", "--samples", 2, "--out", "chat.jsonl")
    assert chat.returncode == 0, chat.stderr
    assert len(Results.from_jsonl("chat.jsonl", few).responses[0].samples) == 2


def test_a_prompt_too_long_for_the_model_is_a_failure_that_keeps_what_there_is(
    call: Callable[..., Done], file: Path, tiny: Path
) -> None:
    done = call("eval", file, "--engine", f"hf:{tiny}", "--max-new-tokens", 9000, "--shots", 0)
    assert done.returncode == 1
    assert "generate failed: RequestError" in _one_line(done)


# --- eval against a server that fails -------------------------------------------------------------


class Loopback(ThreadingHTTPServer):
    """Answers with numbers that depend on the prompt alone; drops connections after `left`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.left: int | None = None
        self.delay = 0.0
        self.answered: list[str] = []
        self.keys: set[str | None] = set()
        self.lock = threading.Lock()

    @property
    def engine(self) -> str:
        return f"server:http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Loopback

    def log_message(self, *args: object) -> None:
        """Silence."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        time.sleep(self.server.delay)
        with self.server.lock:
            self.server.keys.add(self.headers.get("Authorization"))
            if self.server.left == 0:
                self.close_connection = True
                return
            if self.server.left is not None:
                self.server.left -= 1
            self.server.answered.append(body["prompt"])
        number = int(hashlib.sha256(body["prompt"].encode()).hexdigest(), 16) % 50
        text = f"The Q1 answer is {number}. The final answer is {number + 1}."
        content = json.dumps({"choices": [{"index": 0, "text": text}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def _serving() -> Iterator[Loopback]:
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
    pytest.importorskip("httpx")
    with _serving() as server:
        yield server


def _asking(server: Loopback, file: Path, out: str = "answers.jsonl") -> tuple[object, ...]:
    options = ("--model", "served", "--retries", 0, "--concurrency", 2, "--batch-size", 4)
    return ("eval", file, "--engine", server.engine, *options, "--shots", 0, "--out", out)


def _prompts(built: Benchmark) -> list[str]:
    return [str(q.prompt) for q in questions(built, _PAPER, PromptSpec(shots=0))]  # type: ignore[arg-type]


def test_an_endpoint_that_dies_in_the_middle_loses_nothing(
    call: Callable[..., Done],
    built: Benchmark,
    file: Path,
    server: Loopback,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MY_KEY", "secret-key")
    asking = (*_asking(server, file), "--api-key-env", "MY_KEY")
    server.left = 9
    died = call(*asking)
    assert died.returncode == 1
    line = _one_line(died)
    assert "9 of" in line
    assert "in answers.jsonl" in line
    assert "secret-key" not in died.stdout + died.stderr
    server.left = None
    assert call(*asking).returncode == 0
    # Every prompt was answered once, none twice, over both runs.
    assert sorted(server.answered) == sorted(_prompts(built))
    assert server.keys == {"Bearer secret-key"}
    assert "secret-key" not in Path("answers.jsonl.run.json").read_text(encoding="utf-8")
    assert call(*_asking(server, file, "whole.jsonl")).returncode == 0
    whole, resumed = (
        sorted(Path(name).read_bytes().splitlines()) for name in ("whole.jsonl", "answers.jsonl")
    )
    assert resumed == whole


def _until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


@pytest.mark.parametrize("blow", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_evaluation_goes_on_where_it_was(
    call: Callable[..., Done],
    built: Benchmark,
    file: Path,
    server: Loopback,
    blow: signal.Signals,
) -> None:
    server.delay = 0.05
    process = _start(*_asking(server, file))
    out = Path("answers.jsonl")
    _until(lambda: out.exists() and out.read_bytes().count(b"\n") > 5, process)
    process.send_signal(blow)
    _, stderr = process.communicate(timeout=60)
    if blow == signal.SIGINT:
        assert process.returncode == 130
        assert "prompts were answered and are in answers.jsonl" in stderr.splitlines()[-1]
        assert "Traceback" not in stderr
    kept = out.read_bytes()
    server.delay = 0.0
    assert call(*_asking(server, file)).returncode == 0
    assert out.read_bytes().startswith(kept[: kept.rindex(b"\n") + 1])
    found = Results.from_jsonl(out, built)
    assert found.conditions == _PAPER
    written = kept.count(b"\n") - 1
    # What was on disk was not asked again.
    assert len(server.answered) <= len(_prompts(built)) + 4
    assert len(set(server.answered)) == len(_prompts(built))
    assert written >= 5


# --- report ---------------------------------------------------------------------------------------


@pytest.fixture
def answers(call: Callable[..., Done], file: Path) -> list[Path]:
    for name, errors in (("a", "e1=0.1"), ("b", "e1=0.5,unparsable=0.3")):
        arguments = ("--shots", 0, "--label", f"model <{name}>", "-o", f"{name}.jsonl")
        assert call("eval", file, "--engine", f"simulated:{errors}", *arguments).returncode == 0
    return [Path("a.jsonl"), Path("b.jsonl")]


def test_report_writes_every_form_that_is_asked_for(
    call: Callable[..., Done], built: Benchmark, file: Path, answers: list[Path]
) -> None:
    done = call("report", file, *answers, "--json", "r.json", "--markdown", "r.md")
    assert (done.returncode, done.stdout.split()) == (0, ["r.md", "r.json"])
    found = json.loads(Path("r.json").read_text(encoding="utf-8"))
    assert list(found["models"]) == ["model <a>", "model <b>"]
    gap = Results.from_jsonl(answers[0], built).gap()
    assert found["models"]["model <a>"]["report"]["delta"]["value"] == gap.delta.value
    assert not Path("report.html").exists()


def test_report_is_a_page_by_default(
    call: Callable[..., Done], file: Path, answers: list[Path]
) -> None:
    pytest.importorskip("decapod.report")
    pytest.importorskip("matplotlib")
    done = call("report", file, *answers, "--title", "A & B")
    assert (done.returncode, done.stdout) == (0, "report.html\n")
    assert "<h1>A &amp; B</h1>" in Path("report.html").read_text(encoding="utf-8")


def test_report_reads_a_run_that_was_limited(call: Callable[..., Done], file: Path) -> None:
    arguments = ("--engine", "simulated:", "--limit", 4, "-o", "few.jsonl")
    assert call("eval", file, *arguments).returncode == 0
    assert call("report", file, "few.jsonl", "--json", "r.json").returncode == 0
    found = json.loads(Path("r.json").read_text(encoding="utf-8"))
    assert found["models"]["simulated:"]["report"]["n"] == 4


def test_report_of_unfinished_doubled_or_foreign_answers_is_one_line(
    call: Callable[..., Done], rows: Path, file: Path, answers: list[Path]
) -> None:
    text = answers[0].read_text(encoding="utf-8").splitlines(keepends=True)
    Path("part.jsonl").write_text("".join(text[:-3]), encoding="utf-8")
    call("build", "--source", rows, "--n", _ITEMS, "--seed", 9, "--out", "other.jsonl")
    for arguments, words in (
        ((file, "part.jsonl"), "missing"),
        ((file, "a.jsonl", "a.jsonl"), "twice"),
        (("other.jsonl", "a.jsonl"), "benchmark"),
        ((file,), "at least one file"),
        ((file, file), "twice"),
        ((file, "other.jsonl"), "schema"),
        ((file, "a.jsonl", "--out", "a.jsonl"), "is one of the files"),
    ):
        done = call("report", *arguments, "--json", "r.json")
        assert done.returncode == 2, arguments
        assert words in _one_line(done)
        assert not Path("r.json").exists()


# --- export ---------------------------------------------------------------------------------------

_EVALUATION = ("hf", "parquet", "lm-eval", "inspect")
_TRAINING = ("trl", "sft", "verl", "open-instruct")


@pytest.fixture(scope="session")
def train(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("train") / "train.jsonl"
    build_benchmark(load_gsm8k(split="train")[:120], 6).to_jsonl(path)
    return path


@pytest.mark.parametrize("to", [*_EVALUATION, *_TRAINING])
def test_every_export_writes_a_folder_with_the_licence_and_says_its_files(
    call: Callable[..., Done], train: Path, to: str
) -> None:
    pytest.importorskip("datasets")
    done = call("export", train, "--to", to, "--out", "deep/folder")
    assert done.returncode == 0, done.stderr
    files = sorted(str(p) for p in Path("deep/folder").rglob("*") if p.is_file())
    assert sorted(done.stdout.split()) == files
    assert "deep/folder/LICENSE-gsm8k" in files
    assert [path.name for path in Path("deep").iterdir()] == ["folder"]


def test_exports_for_training_are_read_by_datasets(call: Callable[..., Done], train: Path) -> None:
    datasets = pytest.importorskip("datasets")
    for to, column in (("trl", "gold_final"), ("sft", "completion"), ("verl", "reward_model")):
        assert call("export", train, "--to", to, "--out", to).returncode == 0
        found = datasets.load_dataset(to, cache_dir=f"cache-{to}")
        assert list(found) == ["train"]
        assert column in found["train"].column_names
        assert len(found["train"]) == 6


def test_the_exported_inspect_task_runs(
    call: Callable[..., Done], file: Path, built: Benchmark
) -> None:
    pytest.importorskip("inspect_ai")
    assert call("export", file, "--to", "inspect", "--out", "task").returncode == 0
    script = (
        "from inspect_ai import eval\n"
        "from inspect_ai.model import ModelOutput, ModelUsage, get_model\n"
        "def answer(*_):\n"
        "    output = ModelOutput.from_content('mockllm/model', 'The final answer is 1.')\n"
        "    output.usage = ModelUsage()\n"
        "    return output\n"
        "model = get_model('mockllm/model', custom_outputs=answer)\n"
        "(log,) = eval('task/compositional_gsm.py', model=model, log_dir='logs', display='none',\n"
        "              score_display=False, limit=3, task_args={'shots': 0})\n"
        "assert log.status == 'success', log.error\n"
        "print(len(log.samples))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "3"


@pytest.mark.parametrize("to", _TRAINING)
def test_test_questions_become_training_data_only_if_told(
    call: Callable[..., Done], file: Path, to: str
) -> None:
    pytest.importorskip("datasets")
    done = call("export", file, "--to", to, "--out", "folder")
    assert done.returncode == 2
    assert "test" in _one_line(done)
    assert not Path("folder").exists()
    assert call("export", file, "--to", to, "--out", "folder", "--allow-test-data").returncode == 0


def test_export_refuses_a_folder_with_files_unless_told(
    call: Callable[..., Done], file: Path
) -> None:
    Path("folder").mkdir()
    assert call("export", file, "--to", "lm-eval", "--out", "folder").returncode == 0
    Path("folder/mine.txt").write_text("mine", encoding="utf-8")
    arguments = ("export", file, "--to", "lm-eval", "--out", "folder", "--conditions", "modified")
    refused = call(*arguments)
    assert refused.returncode == 2
    assert "--force" in _one_line(refused)
    assert call(*arguments, "--force").returncode == 0
    assert Path("folder/mine.txt").read_text(encoding="utf-8") == "mine"
    assert "gsm_compose_original" not in Path("folder/gsm_compose.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--to", "hf", "--shots", "2"), "holds questions"),
        (("--to", "verl", "--conditions", "original", "modified"), "expected one"),
        (("--to", "lm-eval", "--style", "code"), "code"),
        (("--to", "lm-eval", "--chat"), "chat"),
        (("--to", "lm-eval", "--out", "mine.txt"), "is a file"),
    ],
)
def test_an_export_that_cannot_be_is_one_line_and_leaves_nothing(
    call: Callable[..., Done], train: Path, tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    Path("mine.txt").write_text("mine", encoding="utf-8")
    done = call("export", train, "--out", "folder", *arguments)
    assert done.returncode == 2
    assert words in _one_line(done)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_steps_are_told_on_a_terminal_and_elsewhere() -> None:
    from gsm_compose.commands.steps import steps

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream in (Terminal(), io.StringIO()):
        with steps(stream) as step:
            step("the first")
            step("the [second]")
        told = stream.getvalue()
        assert "the first" in told
        assert "the [second]" in told
    assert [line.split(" s  ")[1] for line in told.splitlines()] == [
        "the first",
        "the [second]",
        "done",
    ]
