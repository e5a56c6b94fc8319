"""The command `asyncrlhf`: what it prints, what it leaves, what it refuses, how it goes on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("decapod.lm")
pytest.importorskip("rich")
pytest.importorskip("transformers")
pytest.importorskip("tyro")
pytest.importorskip("yaml")

from asyncrlhf import cli
from asyncrlhf.commands import sweeping, yaml_text
from asyncrlhf.commands.options import parsed
from asyncrlhf.commands.plan import plan
from asyncrlhf.commands.recipe import Recipe, override
from asyncrlhf.errors import InvalidInputError
from asyncrlhf.schedule import simulate

PACKAGE = Path(__file__).parents[1]
RECIPES = sorted((PACKAGE / "experiments").glob("*/*.yaml"))
DOCS = PACKAGE.parents[1] / "docs" / "pages" / "asyncrlhf"
TINY = """\
model: {path: tiny, width: 16, layers: 1, heads: 2, sft_steps: 2}
task: {kind: synthetic_summary, train_prompts: 16, eval_prompts: 4}
rewards: gold
engine: {kind: hf, placement: inline}
args:
  output_dir: runs/tiny
  max_steps: 4
  per_device_train_batch_size: 2
  max_completion_length: 8
  learning_rate: 1e-3
  logging_steps: 1
  save_steps: 1
  use_cpu: true
  disable_tqdm: true
  seed: 3
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe of a second, in a folder that is the current one and on the path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY, encoding="utf-8")
    return path


def run(*words: str) -> int:
    return cli.main(list(words))


def content() -> dict[str, Any]:
    return yaml_text.read_mapping(TINY, "TINY")


# --- simulate -------------------------------------------------------------------------------------


def test_the_simulation_is_printed_as_ratio_and_as_time_saved(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["--g", "4", "--t", "3", "--r", "1", "--ahead", "1", "--rounds", "10"]
    assert run("simulate", *words) == 0
    rows = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines() if "│" in line]
    cells = [[cell.strip() for cell in row] for row in rows]
    expected = simulate(g=4, t=3, r=1, rounds=10)
    assert cells[0][:3] == ["0 (sync)", "80", "8"]
    assert cells[1][1] == f"{expected.makespan:g}" == "44"
    assert cells[1][-2:] == ["1.82×", "-45%"]


def test_the_simulation_needs_no_torch() -> None:
    code = (
        "import sys; from asyncrlhf.cli import main\n"
        "code = main(['simulate', '--g', '1', '--t', '1'])\n"
        "sys.exit(code or 'torch' in sys.modules or 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not DOCS.is_dir(), reason="the package without its repository")
def test_the_picture_of_the_documentation_is_what_the_command_draws(tmp_path: Path) -> None:
    page = (DOCS / "timeline.md").read_text(encoding="utf-8")
    command = next(line for line in page.splitlines() if line.startswith("asyncrlhf simulate"))
    words = command.split()[1:]
    drawn = tmp_path / "timeline.svg"
    words[words.index("--svg") + 1] = str(drawn)
    assert run(*words) == 0
    assert drawn.read_bytes() == (DOCS / "timeline.svg").read_bytes()


# --- dry run --------------------------------------------------------------------------------------


def test_there_are_recipes() -> None:
    assert {path.parent.name for path in RECIPES} == {"small", "full"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_passes_a_dry_run(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if "peft:" in path.read_text(encoding="utf-8"):
        pytest.importorskip("peft")
    assert run("train", str(path), "--dry-run") == 0
    assert "staleness" in capsys.readouterr().out


def test_the_recipe_for_summaries_counts_as_the_public_configuration() -> None:
    found = plan(Recipe.read(PACKAGE / "experiments" / "full" / "tldr-pythia-410m.yaml"))
    assert (found.prompts_per_step, found.steps, found.prompts) == (504, 256, 129_024)
    assert found.schedule.max_staleness == 1
    mathematics = plan(Recipe.read(PACKAGE / "experiments" / "full" / "gsm8k-rho-1b.yaml"))
    assert (mathematics.prompts_per_step, mathematics.steps, mathematics.prompts) == (
        252, 512, 129_024,
    )  # fmt: skip


def test_memory_is_counted_in_bytes_of_parameters() -> None:
    found = plan(Recipe.of({**content(), "model": {"path": "tiny", "parameters": 1000}}))
    assert found.memory() == {
        "policy": 4e3, "gradients": 4e3, "AdamW moments": 8e3, "reference": 4e3,
    }  # fmt: skip


def test_a_dry_run_leaves_nothing_behind(recipe: Path) -> None:
    assert run("train", str(recipe), "--dry-run") == 0
    assert list(recipe.parent.iterdir()) == [recipe]


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--args.learnin_rate", "1"], "args.learnin_rate: .* mean 'learning_rate'"),
        (["--lerning_rate", "1"], "args.lerning_rate: .* mean 'learning_rate'"),
        (["--learning_rate", "fast"], "args.learning_rate: expected a number, got 'fast'"),
        (["--max_steps", "1.5"], "args.max_steps: expected a whole number, got 1.5"),
        (["--loss", "dpo"], "args.loss: expected one of online_dpo"),
        (["--lr_scheduler_type", "linea"], "args.lr_scheduler_type: expected one of .*linear"),
        (["--num_generations", "1"], "args.num_generations: .* at least 2, got 1"),
        (["--max_steps", "5", "--epochs_per_round", "2"], "args.max_steps: .* multiple of the 2"),
        (["--engine", "hff"], "engine.kind: expected one of hf, .* got 'hff'"),
        (["--engine.placementt", "inline"], "engine.placementt: .* mean 'placement'"),
        (["--engine.placement", "outside"], "engine.placement: .* process, thread, inline"),
        (["--engine.threads", "[1]"], "engine.threads: expected a whole number or null"),
        (["--engine", "vllm_server"], "engine.base_url: expected the address"),
        (["--transport", "torch_dist"], "transport.kind: torch_dist .* a recipe starts none"),
        (["--transport", "vllm"], "transport.kind: vllm .* the engine is hf"),
        (["--transport", "directory"], "transport.path: expected a value, got none"),
        (["--task", "jsonl"], "task: needs 'path'"),
        (["--task.symbol", "3"], "task.symbol: .* mean 'symbols'"),
        (["--task.symbols", "1"], "symbols: expected 2 to 26, got 1"),
        (["--rewards", "[]"], "rewards: expected at least one"),
        (["--rewards", "no_such_module:f"], "rewards: no_such_module:f cannot be loaded"),
        (["--rewards", "./nowhere"], "rewards: ./nowhere is no folder"),
        (["--rewards", "proxy", "--model", "folder"], "rewards: proxy is made for"),
        (["--model.widthh", "8"], "model.widthh: .* mean 'width'"),
        (["--processes", "0"], "processes: expected at least 1"),
        (["--timing.generate", "1"], "timing: needs 'train'"),
        (["--nonsense.deep", "1"], "--nonsense: there is no such key"),
        (["--learning_rate"], "'--learning_rate': expected --key VALUE"),
        (["stray"], "'stray': expected --key VALUE"),
    ],
)
def test_what_does_not_fit_is_one_line_with_its_key(
    recipe: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", str(recipe), "--dry-run", *words) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(said)
    assert not Path("runs").exists()


def test_files_that_are_no_recipes_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for text, message in (
        ("- a list", "expected keys with values"),
        ("model: tiny", "task: expected a value, got none"),
        ("taskk: gsm8k", "taskk: there is no such key; did you mean 'task'?"),
        ("task: [", "line 1"),
        ("task: a\ntask: b", "the key 'task' is there twice"),
    ):
        path = tmp_path / "bad.yaml"
        path.write_text(text, encoding="utf-8")
        assert run("train", str(path)) == 2
        assert message in capsys.readouterr().err
    assert run("train", str(tmp_path / "none.yaml")) == 2
    assert run("report", str(tmp_path)) == 2
    assert "has no metrics.jsonl" in capsys.readouterr().err
    assert run("simulate", "--g", "1", "--t", "1", "--round", "5", "--svg", "a.png") == 2
    assert "did you mean --rounds?" in capsys.readouterr().err


def test_a_run_for_more_processes_than_there_are_is_refused(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", str(recipe), "--processes", "3") == 2
    assert "accelerate launch --num_processes 3" in capsys.readouterr().err


# --- recipes --------------------------------------------------------------------------------------


def test_numbers_and_words_are_read_as_people_mean_them() -> None:
    read = yaml_text.read_mapping("{a: 1e-4, b: 3.0e-6, c: no, d: true, e: 010, f: -2, g: .5}", "x")
    assert read == {"a": 1e-4, "b": 3e-6, "c": "no", "d": True, "e": "010", "f": -2, "g": 0.5}
    assert yaml_text.read_mapping(yaml_text.written(read), "x") == read


def test_a_recipe_survives_being_written(recipe: Path) -> None:
    first = Recipe.read(recipe, [("peft.r", "4"), ("timing", "{generate: 1.0, train: 2.0}")])
    again = Recipe.of(yaml_text.read_mapping(yaml_text.written(first.content()), "again"))
    assert again == first


def test_overrides_reach_sections_and_args() -> None:
    words = ["train", "a.yaml", "--resume", "--loss", "ppo", "--engine.max-batch-size=8"]
    found = parsed(words)
    assert found.overrides == (("loss", "ppo"), ("engine.max-batch-size", "8"))
    changed: dict[str, Any] = content()
    for name, text in found.overrides:
        changed = override(changed, name, text)
    assert changed["args"]["loss"] == "ppo"
    assert changed["engine"] == {"kind": "hf", "placement": "inline", "max_batch_size": 8}


# --- train, report --------------------------------------------------------------------------------


def test_a_run_leaves_all_that_is_needed_to_make_it_again(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", str(recipe), "--loss", "proximal_rloo") == 0
    folder = Path("runs/tiny")
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    assert result["steps"] == 4
    assert {"gold", "kl", "win_rate"} <= result["policy"].keys()
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert record["config"]["args.loss"] == "proximal_rloo"
    assert record["environment"]["packages"]["transformers"]
    said = capsys.readouterr().out
    assert "Times, staleness, sample size" in said
    assert (folder / "report.md").read_text(encoding="utf-8") in said

    assert run("train", str(folder / "recipe.yaml"), "--output_dir", "again") == 0
    weights = "model/model.safetensors"
    assert (folder / weights).read_bytes() == Path("again", weights).read_bytes()

    capsys.readouterr()
    assert run("train", str(recipe), "--loss", "proximal_rloo") == 2
    assert "--resume" in capsys.readouterr().err
    assert run("train", str(recipe), "--loss", "proximal_rloo", "--resume") == 0
    assert "is done" in capsys.readouterr().err


def test_an_interrupted_run_says_how_to_go_on_and_ends_as_an_undisturbed_one(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("stopping_reward.py").write_text(
        "import signal\n"
        "calls = 0\n"
        "def reward(completion_ids, **_):\n"
        "    global calls\n"
        "    calls += 1\n"
        "    if calls == 4:  # the first is a probe; then rounds 0, 1 and 2\n"
        "        signal.raise_signal(signal.SIGINT)\n"
        "    return [float(sum(ids) % 7) for ids in completion_ids]\n",
        encoding="utf-8",
    )
    command = ["train", str(recipe), "--rewards", "stopping_reward:reward"]
    # Shells start what runs in the background with the signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert run(*command) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    said = capsys.readouterr().err
    assert "interrupted after step 2" in said
    assert "--resume goes on from runs/tiny/checkpoint-2" in said
    assert run("report", "runs/tiny") == 0
    assert "The run is not done." in capsys.readouterr().out

    assert run(*command, "--seed", "4", "--resume") == 2
    assert "seed" in capsys.readouterr().err
    assert run(*command, "--resume") == 0
    said = capsys.readouterr().out
    assert "Attempt 2" in said
    assert run(*command, "--output_dir", "whole") == 0
    weights = "model/model.safetensors"
    assert Path("runs/tiny", weights).read_bytes() == Path("whole", weights).read_bytes()


def test_a_reward_that_fails_ends_the_run_with_its_name(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("failing_reward.py").write_text(
        "def ratio(completion_ids, **_):\n    return 1 / 0\n", encoding="utf-8"
    )
    assert run("train", str(recipe), "--rewards", "failing_reward:ratio") == 1
    said = capsys.readouterr().err
    assert "asyncrlhf: " in said
    assert "ratio" in said
    assert "Traceback" not in said


def test_rows_of_a_file_are_prompts_with_columns(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": f"{i} plus {i}", "sum": 2 * i} for i in range(8)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    Path("rows.jsonl").write_text(lines, encoding="utf-8")
    Path("column_reward.py").write_text(
        "def digits(completions, sum, **_):\n"
        "    return [float(str(s) in text) for text, s in zip(completions, sum)]\n",
        encoding="utf-8",
    )
    words = ["--task", "{kind: jsonl, path: rows.jsonl, prompt_column: text, drop_longer: 12}",
             "--task.template", "'{prompt} is '", "--task.eval_path", "rows.jsonl",
             "--rewards", "column_reward:digits", "--missing_eos_score", "null",
             "--max_steps", "1"]  # fmt: skip
    assert run("train", str(recipe), *words) == 0
    result = json.loads(Path("runs/tiny/result.json").read_text(encoding="utf-8"))
    assert "eval_reward" in result["policy"]


# --- sweep ----------------------------------------------------------------------------------------


def test_a_sweep_is_every_combination_in_a_folder_of_its_own(tmp_path: Path) -> None:
    grid = sweeping.axes(["loss=online_dpo,rloo", "minibatches_per_round=1,2"])
    found = sweeping.cells(content(), grid, tmp_path)
    assert [cell.label for cell in found][:2] == [
        "loss=online_dpo, minibatches_per_round=1",
        "loss=online_dpo, minibatches_per_round=2",
    ]
    assert len({cell.recipe.output_dir for cell in found}) == 4
    assert found[3].recipe.args["minibatches_per_round"] == 2
    with pytest.raises(InvalidInputError, match=r"got 'x' \(in loss=x\)"):
        sweeping.cells(content(), {"loss": ["x"]}, tmp_path)
    for word in ("loss", "loss=", "loss=a,,b", "loss=a,a"):
        with pytest.raises(InvalidInputError, match="over: "):
            sweeping.axes([word])


@pytest.mark.slow
def test_a_sweep_runs_what_is_missing_and_makes_a_table(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["sweep", str(recipe), "--over", "loss=online_dpo,rloo", "--out", "out",
             "--max_steps", "1"]  # fmt: skip
    assert run(*words) == 0
    table = Path("out/results.csv").read_text(encoding="utf-8").splitlines()
    assert len(table) == 3
    assert table[0].startswith("loss,")
    said = capsys.readouterr().out
    assert run(*words) == 0
    assert capsys.readouterr().out == said
