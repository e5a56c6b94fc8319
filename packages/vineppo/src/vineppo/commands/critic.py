"""PPO's critic out of a checkpoint, as a value function of states."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from vineppo.errors import InvalidInputError
from vineppo.policy import PolicyWithCritic
from vineppo.values import CriticValueEstimator

TRAINED: Final = "trained.safetensors"


def critic_of(checkpoint: Path, policy: Any, batch_size: int) -> CriticValueEstimator:
    """The critic that a checkpoint holds.

    Args:
        checkpoint: a folder that the PPO trainer wrote.
        policy: the checkpoint's own; its device is where values are computed.
        batch_size: states that go through the model together.

    Raises:
        InvalidInputError: there is no checkpoint, or one without a critic.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        trained = load_file(checkpoint / TRAINED)
    except (OSError, SafetensorError) as error:
        raise InvalidInputError(
            f"--critic: expected a checkpoint with {TRAINED}, got {checkpoint}: {error}"
        ) from error
    own = {name: v for name, v in trained.items() if name.startswith(("trunk.", "head."))}
    if not own:
        raise InvalidInputError(
            f"--critic: {checkpoint} holds no critic; expected a checkpoint of the method ppo "
            "without constant_value"
        )
    copied = any(name.startswith("trunk.") for name in own)
    module = PolicyWithCritic(policy, "copy" if copied else "shared").eval()
    expected = {name: parameter.shape for name, parameter in module.critic_parameters()}
    if expected != {name: value.shape for name, value in own.items()}:
        raise InvalidInputError(
            f"--critic: the critic in {checkpoint} is not one of this model: its names or shapes "
            "are others"
        )
    with torch.no_grad():
        for name, parameter in module.critic_parameters():
            parameter.copy_(own[name])

    def values(sequences: Sequence[Sequence[int]]) -> npt.NDArray[np.float64]:
        found = np.empty(len(sequences))
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            found[places] = _values(module, [sequences[i] for i in places])
        return found

    return CriticValueEstimator(values)


def _values(
    module: PolicyWithCritic, sequences: Sequence[Sequence[int]]
) -> npt.NDArray[np.float64]:
    """Value of the state that each sequence is."""
    # The module's values stand where a next token is chosen, so one is put behind the last: any,
    # because values do not look ahead.
    length = max(map(len, sequences)) + 1
    device = next(module.parameters()).device
    ids = torch.zeros(len(sequences), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(list(sequence))
        mask[row, : len(sequence) + 1] = 1
    with torch.no_grad():
        _, values = module(ids.to(device), mask.to(device))
    assert values is not None
    last = torch.tensor([len(sequence) - 1 for sequence in sequences], device=device)
    of_states: npt.NDArray[np.float64] = (
        values.gather(1, last[:, None])[:, 0].double().cpu().numpy()
    )
    return of_states
