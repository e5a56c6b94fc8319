"""Train and measure one experiment: `python train.py --config 350m.toml --attn rope --data FILE`.

The same command goes on where it stopped. `--dry-run` only builds the model, without memory, and
prints its size; `--smoke` goes all the way in two steps on a tiny model and made-up tokens.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path

import numpy as np
import tyro

from sbattn.errors import InvalidInputError
from sbattn.experiment import Experiment, TextData, run
from sbattn.model import Attention
from sbattn.training import lines
from sbattn.writing import whole_file


def main(
    config: Path,
    attn: Attention = "stickbreaking",
    data: Path | None = None,
    out: Path | None = None,
    seed: int = 0,
    device: str | None = None,
    dry_run: bool = False,
    smoke: bool = False,
) -> None:
    """Train and measure one experiment.

    Args:
        config: a TOML file; see `sbattn.experiment.Experiment.from_mapping`.
        attn: the attention.
        data: the text, or the file of token ids, where the experiment learns one.
        out: folder for checkpoint and result.
        seed: of weights and batches.
        device: in place of the file's.
        dry_run: build on the meta device, print the number of parameters, and stop.
        smoke: two steps on a tiny model; token ids are made up.
    """
    overrides = {"seed": seed} if device is None else {"seed": seed, "device": device}
    experiment = Experiment.load(config, attn, **overrides)
    if dry_run:
        print(f"{attn}: {experiment.parameters():,} parameters")
        return
    if data is not None:
        if not isinstance(experiment.data, TextData):
            raise InvalidInputError(f"data: {config} learns recall and reads no file; got {data}")
        text = dataclasses.replace(experiment.data, path=str(data))
        experiment = dataclasses.replace(experiment, data=text)
    with tempfile.TemporaryDirectory() as scratch:
        if smoke:
            experiment = _with_made_up_tokens(experiment.smoke(), Path(scratch))
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
        found = run(
            experiment,
            checkpoint=None if out is None else out / "checkpoint.pt",
            on_step=lines(),
        )
    result = json.dumps(found, indent=1)
    if out is not None:
        with whole_file(out / "result.json") as file:
            file.write(f"{result}\n".encode())
    print(result)


def _with_made_up_tokens(experiment: Experiment, folder: Path) -> Experiment:
    """Where token ids are wanted, a file of random ones, long enough to hold out a test."""
    data = experiment.data
    if not isinstance(data, TextData) or data.vocab_size is None:
        return experiment
    path = folder / "tokens.bin"
    ids = np.random.default_rng(0).integers(data.vocab_size, size=60_000)
    ids.astype(data.token_dtype).tofile(path)
    return dataclasses.replace(
        experiment, data=dataclasses.replace(data, path=str(path), vocab_size=data.vocab_size)
    )


if __name__ == "__main__":
    tyro.cli(main)
