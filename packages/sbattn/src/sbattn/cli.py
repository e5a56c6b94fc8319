"""`sbattn-repro`: train one small model, measure it, print what came of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from sbattn.errors import InvalidInputError, MissingExtraError
from sbattn.evaluation import between
from sbattn.experiment import Experiment, run
from sbattn.model import Attention
from sbattn.training import lines
from sbattn.writing import whole_file

_SAVE_EVERY = 20  # steps of these small models; what an interruption costs


def mqrar(
    attn: Attention = "stickbreaking",
    steps: int = 500,
    seed: int = 0,
    learning_rate: float = 3e-3,
    keys: int = 8,
    values: int = 16,
    length: int = 64,
    lengths: tuple[int, ...] = (64, 128, 256, 512, 1024),
    out: Path | None = None,
    device: str = "cpu",
    quiet: bool = False,
) -> None:
    """Associative recall with reassigned keys: accuracy by length of the sequence.

    Args:
        attn: the attention.
        steps: of training.
        seed: of weights and batches.
        learning_rate: at its highest.
        keys: how many there are.
        values: how many there are; a guess is right once in so many.
        length: tokens of a training sequence.
        lengths: tokens of the test sequences.
        out: folder for checkpoint and result; the same command goes on where it stopped.
        device: where to train.
        quiet: no progress.
    """
    content = {
        "training": {
            "steps": steps,
            "length": length,
            "learning_rate": learning_rate,
            "save_every": _SAVE_EVERY,
        },
        "recall": {"keys": keys, "values": values, "lengths": lengths},
    }
    found = _run(Experiment.from_mapping(content, attn, seed=seed, device=device), out, quiet)
    print(f"{'length':>8}{'accuracy':>10}{'loss':>10}   (chance {1 / values:.3f})")
    for row in found["recall"]:
        print(f"{row['length']:>8}{row['accuracy']:>10.4f}{row['loss']:>10.4f}")


def bytelm(
    attn: Attention = "stickbreaking",
    steps: int = 200,
    seed: int = 0,
    learning_rate: float = 3e-3,
    length: int = 256,
    test_length: int = 2048,
    text: Path | None = None,
    out: Path | None = None,
    device: str = "cpu",
    quiet: bool = False,
) -> None:
    """Byte-level language model: loss of the same held-out bytes by position in the context.

    Args:
        attn: the attention; the sliding window is half of the training length.
        steps: of training.
        seed: of weights and batches.
        learning_rate: at its highest.
        length: bytes of a training context; a multiple of 2.
        test_length: bytes of a test context; a multiple of half the training length.
        text: a file; without it, the sources of Python's standard library.
        out: folder for checkpoint and result; the same command goes on where it stopped.
        device: where to train.
        quiet: no progress.
    """
    block = max(1, length // 2)
    content = {
        "model": {"hidden_size": 128, "num_layers": 4, "num_heads": 4},
        "arms": {"swa": {"window": block}},
        "training": {
            "steps": steps,
            "batch_size": 16,
            "length": length,
            "learning_rate": learning_rate,
            "save_every": _SAVE_EVERY,
        },
        "text": {
            "path": None if text is None else str(text),
            "length": test_length,
            "block": block,
        },
    }
    found = _run(Experiment.from_mapping(content, attn, seed=seed, device=device), out, quiet)
    print(f"{'positions':>14}{'nats per byte':>15}   ({found['data']})")
    start, end = 0, block
    while start < test_length:
        end = min(end, test_length)
        loss = between(found["by_position"], block, start, end)
        print(f"{f'{start}–{end - 1}':>14}{loss:>15.4f}")
        start, end = end, 2 * end
    if "live" in found:
        for when in ("before", "after"):
            fractions = [f for layer in found["live"]["64"][when] for f in layer]
            print(f"live tiles {when} training: {sum(fractions) / len(fractions):.3f}")


def _run(experiment: Experiment, out: Path | None, quiet: bool) -> dict[str, Any]:
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    found = run(
        experiment,
        checkpoint=None if out is None else out / "checkpoint.pt",
        on_step=None if quiet else lines(),
    )
    if out is not None:
        with whole_file(out / "result.json") as file:
            file.write((json.dumps(found, indent=1) + "\n").encode())
    return found


def main() -> None:
    """The command `sbattn-repro mqrar|bytelm`."""
    try:
        import tyro
    except ImportError as error:
        raise MissingExtraError("tyro", "experiments") from error
    commands: dict[str, Any] = {"mqrar": mqrar, "bytelm": bytelm}
    try:
        tyro.extras.subcommand_cli_from_dict(commands, prog="sbattn-repro")
    except (InvalidInputError, FloatingPointError, OSError) as error:
        sys.exit(f"sbattn-repro: {error}")
    except KeyboardInterrupt:
        sys.exit("sbattn-repro: stopped; with --out, the same command goes on from its checkpoint")
