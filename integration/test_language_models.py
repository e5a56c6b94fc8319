"""A benchmark of gsm-compose, answered by an engine of decapod, from their wheels."""

from __future__ import annotations

from pathlib import Path

import pytest

import gsm_compose as gc
from decapod.lm import (
    SamplingParams,
    TextGenerator,
    TransformersEngine,
    build_model,
    build_tokenizer,
)


@pytest.fixture(scope="module")
def benchmark() -> gc.Benchmark:
    return gc.build_benchmark(gc.load_gsm8k("test")[:120], n=6)


def test_a_model_is_evaluated_and_the_gap_comes_out(
    benchmark: gc.Benchmark, tmp_path: Path
) -> None:
    spec = gc.PromptSpec(shots=1)
    texts = [str(gc.render(item, "compositional", spec)) for item in benchmark]
    tokenizer = build_tokenizer(texts, kind="bpe", vocab_size=400)
    model = build_model(len(tokenizer), max_positions=4096)
    generate = TextGenerator(
        TransformersEngine(model, tokenizer), tokenizer, SamplingParams(max_new_tokens=8), seed=0
    )
    out = tmp_path / "answers.jsonl"
    results = gc.evaluate(benchmark, generate, spec=spec, out=out, progress=False)
    report = results.gap()
    assert report.n == 6
    assert report.delta.value == report.s_comp.value - report.s1.value * report.s2.value
    again = gc.evaluate(
        benchmark,
        lambda prompts: pytest.fail(f"{len(prompts)} prompts were asked again"),
        spec=spec,
        out=out,
        progress=False,
    )
    assert again.responses == results.responses


def test_training_data_of_test_questions_needs_the_explicit_flag(benchmark: gc.Benchmark) -> None:
    from gsm_compose.integrations.trl_data import grpo_dataset

    with pytest.raises(gc.GSMComposeError, match="allow_test_data"):
        grpo_dataset(benchmark)
    assert len(grpo_dataset(benchmark, allow_test_data=True)) == 6
