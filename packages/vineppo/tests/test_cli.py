"""The command `vineppo`: what it refuses, what it leaves, how it goes on."""

from __future__ import annotations

import json
import os
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

from vineppo import cli
from vineppo.commands import exact_bench, yaml_text
from vineppo.commands.plan import Weights, plan_of
from vineppo.commands.recipe import METHODS, Recipe, overridden
from vineppo.errors import InvalidInputError

PACKAGE = Path(__file__).parents[1]
RECIPES = sorted((PACKAGE / "experiments").glob("*/*.yaml"))
TINY = """\
method: vineppo
model: {tiny: {steps: 2, width: 8, layers: 1, heads: 2}}
task: {kind: chain_arithmetic, operands: 2, examples: 8}
training:
  output_dir: runs/tiny
  iterations: 2
  episodes_per_iteration: 4
  num_generations: 2
  mini_batch_size: 4
  num_epochs: 1
  num_rollouts: 2
  segmenter: fixed:4
  max_response_tokens: 8
  temperature: 1.0
  learning_rate: 1e-3
  unfinished_score: null
  stop: ['1', '2', '3', '4', '5']  # texts that so random a model comes upon
  save_every: 1
  progress: false
  use_cpu: true
evaluation: {examples: 3}
"""
# Settings that only VinePPO has, and those of the same run with another method.
OF_VINES = ("num_rollouts", "segmenter")
BENCH = "families: [short]\nbatches: 4\ngroup: 2\n"


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe of a second, in the current folder."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY, encoding="utf-8")
    return path


def run(*words: object) -> int:
    return cli.main([str(word) for word in words])


def content(method: str = "vineppo") -> dict[str, Any]:
    found = yaml_text.mapping_of(TINY, "TINY")
    if method != "vineppo":
        kept = {k: v for k, v in found["training"].items() if k not in OF_VINES}
        found = {**found, "method": method, "training": kept}
    return found


def written(path: Path, mapping: dict[str, Any]) -> Path:
    path.write_text(yaml_text.text_of(mapping), encoding="utf-8")
    return path


# --- dry run --------------------------------------------------------------------------------------


def test_there_are_recipes_of_both_sizes() -> None:
    assert {path.parent.name for path in RECIPES} == {"small", "full"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_passes_a_dry_run(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if path.stem == "exact-bench":
        assert exact_bench.read(path).seeds == 2
        return
    assert run("train", "--config", path, "--dry-run") == 0
    said = capsys.readouterr().out
    assert "critic" in said
    assert "missing here" in said


def test_the_recipe_of_the_paper_counts_as_the_paper_does() -> None:
    found = plan_of(Recipe.read(PACKAGE / "experiments" / "full" / "gsm8k-rho-1b.yaml"))
    assert found.steps_per_iteration == 16
    # 64 prompts, whose state all 8 answers share, and 24 further states of each answer; K = 9.
    assert found.most_states == 25
    assert found.rollouts(25) == (64 + 512 * 24) * 9


def test_a_critic_costs_weights_gradients_and_two_moments_of_a_copy() -> None:
    of_ppo = Recipe.of({**content("ppo"), "model": {"path": "absent", "parameters": 1000}})
    assert plan_of(of_ppo).memory() == {
        "policy": 4e3, "gradients": 4e3, "AdamW": 8e3, "reference": 4e3, "critic": 16e3,
    }  # fmt: skip
    of_vines = plan_of(Recipe.of({**content(), "model": {"path": "absent", "parameters": 1000}}))
    assert of_vines.weights == Weights(1000, 1000)
    assert "critic" not in of_vines.memory()
    assert of_vines.critic_memory() == 16e3


def test_a_dry_run_counts_prompts_in_tokens_and_leaves_nothing_behind(recipe: Path) -> None:
    found = plan_of(Recipe.read(recipe))
    assert (found.rows, found.evaluation_rows) == (8, 3)
    assert found.prompt_tokens == (7, 7.0)  # <bos> and a+b=?\n
    assert found.most_states == 2
    assert run("train", "--config", recipe, "--dry-run") == 0
    assert list(recipe.parent.iterdir()) == [recipe]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_its_settings_and_its_trainer(method: str) -> None:
    found = Recipe.of(content(method))
    assert isinstance(found.training, found.trainer_class().config_class)
    assert Recipe.of(yaml_text.mapping_of(yaml_text.text_of(found.content()), "x")) == found


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["training.lerning_rate=1"], r"training.lerning_rate: .* mean 'learning_rate'\? allowed:"),
        (["training.learning_rate=fast"], "training.learning_rate: expected a number, got 'fast'"),
        (["training.learning_rate=0"], "training.learning_rate: expected a number above 0"),
        (["training.iterations=1.5"], "training.iterations: expected a whole number"),
        (["training.num_rollouts=0"], "training.num_rollouts: .* at least 1, got 0"),
        (["training.segmenter=lines"], "training.segmenter: expected one of newline"),
        (["training.lr_schedule=cos"], "training.lr_schedule: expected one of linear"),
        (["training.adam_betas=[0.9]"], "training.adam_betas: expected a list of 2"),
        (["training.stop=abc"], "training.stop: expected a list, got 'abc'"),
        (["training.episodes_per_iteration=5"], "training.episodes_per_iteration: .* multiple"),
        (["training.eval_every=1", "evaluation=null"], "training.eval_every: .* evaluation"),
        (["training.max_response_tokens=4096"], r"task\[0\]: its prompt of .* positions"),
        (["method=vinepo"], "method: expected one of vineppo, ppo"),
        (["method=rloo"], "training.num_rollouts: there is no such name"),
        (["task=chain"], "task.kind: expected one of chain_arithmetic"),
        (["task.operand=3"], "task.operand: .* mean 'operands'"),
        (["task.operands=1"], "task.operands: expected at least 2, got 1"),
        (["task={operands: 3}"], "task.kind: there is no such name|task.operands: there is no"),
        (["task={kind: dataset, path: a, reward: b}"], "task.reward: expected module:function"),
        (
            ["task={kind: dataset, path: a, reward: 'nowhere:f'}", "model=m", "evaluation=null"],
            "task.reward: nowhere:f cannot be loaded",
        ),
        (["task={kind: dataset, path: a}"], "task.reward: expected a value, got none"),
        (
            ["task={kind: gsm8k, path: absent.jsonl}", "model=m", "evaluation=null"],
            "task.path: the file absent.jsonl is not here; give it, or task.rows",
        ),
        (["task={kind: gsm8k}"], "model.tiny: chain_arithmetic alone"),
        (["model={}"], "model.path: expected either .* got none"),
        (["model.path=folder"], "model.path: expected either .* got both"),
        (["model.tiny.widths=8"], "model.tiny.widths: .* mean 'width'"),
        (["model.tiny.steps=many"], "model.tiny.steps: expected a whole number"),
        (["model.tiny.width=7"], "model.tiny: "),
        (["model={path: m, dtype: float8}"], "model.dtype: expected one of float32"),
        (["rollouts=vlm"], "rollouts.kind: expected one of transformers, vllm"),
        (["rollouts.kind=servers"], "rollouts.urls: expected a value, got none"),
        (["rollouts={kind: servers, urls: [], port: 1}"], "rollouts.port: there is no such name"),
        (["rollouts={kind: ray, actor: 2}"], "rollouts.actor: .* mean 'actors'"),
        (["rollouts={kind: vllm, model: m}"], "rollouts.model: say it in the section model"),
        (["rollouts.max_batch_size=0"], "rollouts.max_batch_size: expected at least 1"),
        (["peft={rank: 4}"], "peft.rank: there is no such name"),
        (["evaluation.path=a"], "evaluation.path: chain_arithmetic reads no file"),
        (["nonsense.deep=1"], "nonsense: there is no such name"),
        (["method.deep=1"], "--set method.deep: method has no names below it"),
        (["learning_rate"], "--set learning_rate: expected name=value"),
        (["task.seed=["], "--set task.seed: .*"),
    ],
)
def test_what_does_not_fit_is_one_line_that_names_it(
    recipe: Path, changes: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if changes[0].startswith("peft"):
        pytest.importorskip("peft")
    sets = [word for change in changes for word in ("--set", change)]
    assert run("train", "--config", recipe, "--dry-run", *sets) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(said)
    assert list(recipe.parent.iterdir()) == [recipe]


def test_files_that_are_no_recipes_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.yaml"
    for text, message in (
        ("- a list", "expected keys with values"),
        ("method: ppo", "model: expected a value, got none"),
        ("methods: ppo", "did you mean 'method'? allowed: method, model"),
        ("task: [", "line 1"),
        ("task: a\ntask: b", "the key 'task' comes twice"),
    ):
        path.write_text(text, encoding="utf-8")
        assert run("train", "--config", path) == 2
        assert message in capsys.readouterr().err
    assert run("train", "--config", tmp_path / "absent.yaml") == 2
    assert "config: expected a YAML file" in capsys.readouterr().err
    assert run("train") == 2  # what it needs, tyro tells


def test_rows_that_are_none_are_refused_with_their_line(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("length.py").write_text("def score(completions, **_):\n    return []\n", encoding="utf-8")
    words = ["--set", "model=m", "--set", "evaluation=null", "--set",
             "task={kind: dataset, path: rows.jsonl, reward: 'length:score'}"]  # fmt: skip
    for text, message in (
        ("", "task.path: expected at least one row"),
        ('{"prompt": "a"}\n{"prompt": ', "line 2: expected one JSON object"),
        ('{"question": "a"}', "line 1: expected an object with a text or messages in 'prompt'"),
    ):
        Path("rows.jsonl").write_text(text, encoding="utf-8")
        assert run("train", "--config", recipe, "--dry-run", *words) == 2
        assert message in capsys.readouterr().err


def test_without_its_extra_the_command_names_it(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for package, loaded in (("tyro", "vineppo.commands.options"), ("yaml", "vineppo.commands")):
        with monkeypatch.context() as without:
            for name in [name for name in sys.modules if name.startswith(loaded)]:
                without.delitem(sys.modules, name)
            without.setitem(sys.modules, package, None)
            assert run("train", "--config", recipe) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert 'pip install "vineppo[cli]"' in said


def test_several_processes_sample_with_the_model_itself(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InvalidInputError, match=r"rollouts.kind: expected transformers .* 2 proc"):
        Recipe.of(overridden(yaml_text.mapping_of(TINY, "x"), "rollouts=vllm"))


# --- YAML -----------------------------------------------------------------------------------------


def test_numbers_and_words_are_read_as_people_mean_them() -> None:
    read = yaml_text.mapping_of(
        "{a: 1e-6, b: 3.0e-6, c: no, d: true, e: 010, f: -2, g: .5, h: null, i: 1_000, j: ~}", "x"
    )
    expected = {"a": 1e-6, "b": 3e-6, "c": "no", "d": True, "e": "010", "f": -2, "g": 0.5,
                "h": None, "i": "1_000", "j": None}  # fmt: skip
    assert read == expected
    assert {name: type(value) for name, value in read.items()} == {
        name: type(value) for name, value in expected.items()
    }
    assert yaml_text.mapping_of(yaml_text.text_of(read), "x") == read


# --- train ----------------------------------------------------------------------------------------


def test_a_run_is_resumed_as_if_it_had_never_stopped(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "--config", recipe]
    assert run(*command) == 0
    folder = Path("runs/tiny")
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    assert (result["iterations"], result["steps"]) == (2, 2)
    assert result["evaluation"].keys() >= {"eval_reward"}
    assert "runs/tiny" in capsys.readouterr().out
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert record["config"]["training.learning_rate"] == 1e-3

    # Once more from what the first iteration left, in another place.
    half = Path("half")
    for name in ("run.json", "metrics.jsonl", "checkpoint-1"):
        half.mkdir(exist_ok=True)
        (folder / name).rename(half / name)
    assert run(*command, "--set", "training.output_dir=half") == 2
    assert "go on with it by --resume" in capsys.readouterr().err
    assert run(*command, "--set", "training.output_dir=half", "--resume", "--set",
               "training.seed=1") == 2  # fmt: skip
    assert "seed" in capsys.readouterr().err
    assert run(*command, "--set", "training.output_dir=half", "--resume") == 0
    assert "on from checkpoint-1" in capsys.readouterr().err
    weights = "model/model.safetensors"
    assert (half / weights).read_bytes() == (folder / weights).read_bytes()

    assert run(*command, "--set", "training.output_dir=half", "--resume") == 0
    assert "is done already" in capsys.readouterr().err
    assert run("train", "--config", half / "config.yaml") == 2
    assert "holds a run that is done" in capsys.readouterr().err


def test_a_folder_with_other_files_is_left_alone(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("runs/tiny").mkdir(parents=True)
    Path("runs/tiny/thesis.tex").write_text("", encoding="utf-8")
    for more in ([], ["--resume"]):
        assert run("train", "--config", recipe, *more) == 2
        assert "holds other files" in capsys.readouterr().err
    assert [path.name for path in Path("runs/tiny").iterdir()] == ["thesis.tex"]


def test_a_reward_of_a_module_beside_the_recipe_scores_rows_of_a_file(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from vineppo.tasks import ChainArithmetic

    task = ChainArithmetic(operands=2)
    model = task.sft_model(steps=1, width=8, layers=1)
    model.save_pretrained("model")
    task.tokenizer().save_pretrained("model")
    beside = recipe.parent / "beside"
    beside.mkdir()
    (beside / "digits_reward.py").write_text(
        "def digits(completions, wanted, **_):\n"
        "    return [float(w in text) for text, w in zip(completions, wanted)]\n"
        "def broken(completions, **_):\n    raise KeyError('no such column')\n",
        encoding="utf-8",
    )
    rows = [{"text": f"{i}+{i}", "wanted": str(i)} for i in range(4)]
    Path("rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    task_section = {"kind": "dataset", "path": "rows.jsonl", "reward": "digits_reward:digits",
                    "prompt_column": "text", "template": "{prompt}=?\n"}  # fmt: skip
    path = written(
        beside / "rows.yaml",
        {**content("rloo"), "model": "model", "task": task_section,
         "evaluation": {"path": "rows.jsonl"}},
    )  # fmt: skip
    command = ["train", "--config", path, "--set", "training.iterations=1"]
    assert run(*command, "--set", "task.reward=digits_reward:broken") == 1
    said = capsys.readouterr().err
    assert "broken raised KeyError" in said
    assert "Traceback" not in said
    # Nothing was measured, so what the first batch refuted is mended in the same folder.
    assert run(*command) == 0
    again = ["--config", "runs/tiny/config.yaml", "--set", "training.output_dir=again"]
    assert run("train", *again) == 0  # its modules are found from anywhere


def test_ctrl_c_ends_with_one_line_and_the_same_command_goes_on(recipe: Path) -> None:
    (recipe.parent / "stopping.py").write_text(
        "import os, signal\n"
        "calls = 0\n"
        "def reward(completions, **_):\n"
        "    global calls\n"
        "    calls += 1\n"
        "    if calls == 2:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    return [float(len(text) % 3) for text in completions]\n",
        encoding="utf-8",
    )
    from vineppo.tasks import ChainArithmetic

    task = ChainArithmetic(operands=2)
    task.sft_model(steps=1, width=8, layers=1).save_pretrained("model")
    task.tokenizer().save_pretrained("model")
    Path("rows.jsonl").write_text('{"prompt": "1+1=?"}\n', encoding="utf-8")
    task_section = {"kind": "dataset", "path": "rows.jsonl", "reward": "stopping:reward"}
    path = written(
        recipe,
        {**content("rloo"), "model": "model", "task": task_section, "evaluation": None},
    )
    done = subprocess.run(
        [sys.executable, "-m", "vineppo", "train", "--config", str(path)],
        capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # Shells start what runs in the background with the signal ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == (
        "vineppo: interrupted after iteration 1; the same command with --resume goes on from "
        "runs/tiny/checkpoint-1"
    )
    assert run("train", "--config", path, "--resume") == 0
    assert json.loads(Path("runs/tiny/result.json").read_text(encoding="utf-8"))["iterations"] == 2


# --- eval-values ----------------------------------------------------------------------------------


def test_values_of_rollouts_and_of_a_critic_are_judged_and_written(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    written(recipe, content("ppo"))
    assert run("train", "--config", recipe, "--set", "training.iterations=1") == 0
    words = ["eval-values", "--config", recipe, "--truth-rollouts", 4, "--states", 6,
             "--prompts", 3, "--alternatives", 3, "--segmenter", "fixed:1"]  # fmt: skip
    capsys.readouterr()
    assert run(*words, "--checkpoint", "runs/tiny/checkpoint-1", "--critic", "--k", 1, 2,
               "--plots", "figures") == 0  # fmt: skip
    said = capsys.readouterr().out
    report = json.loads(Path("values.json").read_text(encoding="utf-8"))["reports"]
    assert list(report) == ["K = 1", "K = 2", "critic", "group mean", "constant 0.5"]
    assert all(name in said for name in report)
    assert {path.suffix for path in Path("figures").iterdir()} == {".svg"}

    # Without a checkpoint it is the model that the recipe starts from.
    assert run(*words, "--out", "other.json", "--k", 1, "--alternatives", 0) == 0
    assert "K = 1" in json.loads(Path("other.json").read_text(encoding="utf-8"))["reports"]


def test_the_critic_of_a_checkpoint_values_states_as_training_does(recipe: Path) -> None:
    import torch

    from vineppo.commands.critic import critic_of
    from vineppo.episodes import State
    from vineppo.policy import PolicyWithCritic
    from vineppo.tasks import ChainArithmetic

    task = ChainArithmetic(operands=2)
    policy = task.sft_model(steps=1, width=8, layers=1)
    module = PolicyWithCritic(policy, "copy")
    assert module.head is not None
    torch.nn.init.normal_(module.head.weight, generator=torch.Generator().manual_seed(0))
    from safetensors.torch import save_file

    Path("checkpoint").mkdir()
    state = {name: value.detach().clone() for name, value in module.named_parameters()}
    save_file(state, "checkpoint/trained.safetensors")
    ids = task.examples(1)[0]["prompt_ids"]
    states = [State(0, tuple(ids[:n]), ()) for n in range(1, len(ids))]
    found = critic_of(Path("checkpoint"), policy, batch_size=2)(states)
    with torch.no_grad():
        _, expected = module(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long))
    assert expected is not None
    assert found.values == pytest.approx(expected[0].double().numpy(), abs=1e-6)
    save_file({"policy.x": torch.ones(1)}, "checkpoint/trained.safetensors")
    with pytest.raises(InvalidInputError, match="--critic: checkpoint holds no critic"):
        critic_of(Path("checkpoint"), policy, batch_size=2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--k", "0"], "--k: expected at least 1, got 0"),
        (["--states", "0"], "--states: expected at least 1"),
        (["--truth-rollouts", "1"], "--truth-rollouts: expected at least 2"),
        (["--critic"], "--critic: expected --checkpoint with it"),
        (["--checkpoint", "nowhere"], "--checkpoint: expected a folder checkpoint-N"),
        (["--segmenter", "lines"], "--segmenter: expected one of newline"),
        (["--out", "no/such/folder.json"], "--out: expected a file in a folder that exists"),
    ],
)
def test_options_of_eval_values_that_do_not_fit_are_named_before_any_work(
    recipe: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("eval-values", "--config", recipe, *words) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert message in said
    assert list(recipe.parent.iterdir()) == [recipe]


# --- bench ----------------------------------------------------------------------------------------


def test_the_bench_prints_its_tables_and_keeps_its_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "bench.yaml"
    path.write_text(BENCH, encoding="utf-8")
    out = tmp_path / "out"
    assert run("bench", "--config", path, "--out", out) == 0
    said = capsys.readouterr().out
    assert "Gradient estimators" in said
    assert "When vines pay" in said
    (result,) = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert (result["family"], result["seed"]) == ("short", 0)
    assert any(file.suffix == ".svg" for file in out.iterdir())
    assert all("--ink:" in file.read_text(encoding="utf-8") for file in out.glob("*.svg"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("families=[shirt]", "bench.families: shirt: there is no such name; did you mean 'short'"),
        ("families=[]", "bench.families: expected at least one"),
        ("seeds=0", "bench.seeds: expected at least 1"),
        ("seed=1", "bench.seed: there is no such name; did you mean 'seeds'"),
    ],
)
def test_a_bench_that_does_not_fit_is_refused(
    change: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("bench", "--set", change) == 2
    assert message in capsys.readouterr().err


# --- the verifier of the recipe for MATH ----------------------------------------------------------


def test_the_reward_of_the_recipe_for_math_compares_what_is_boxed() -> None:
    import importlib.util

    path = PACKAGE / "experiments" / "full" / "math_answers.py"
    spec = importlib.util.spec_from_file_location("vineppo_math_answers", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    cases = [
        (r"so $\boxed{\dfrac{1}{2}}$.", r"\frac12", 1.0),
        (r"\boxed{1}, no: \boxed{\left( 3, \frac{\pi}{2} \right)}", r"(3,\frac{\pi}{2})", 1.0),
        (r"\boxed{x \text{ cm}}", r"x\text{ cm}", 1.0),
        (r"\boxed{5", "5", 0.0),
        ("5", "5", 0.0),
        (r"\boxed{0.5}", r"\frac12", 0.0),
    ]
    texts, answers, scores = zip(*cases, strict=True)
    assert module.reward(completions=list(texts), answer=list(answers)) == list(scores)
