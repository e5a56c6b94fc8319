"""Readers: one module per source, each of which returns a checked `Table`."""

from hpreliability.readers.consistent_hparams import from_consistent_hparams
from hpreliability.readers.designs import SparseCellWarning, from_runs
from hpreliability.readers.files import read
from hpreliability.readers.hydra_runs import from_hydra
from hpreliability.readers.optuna_studies import from_optuna
from hpreliability.readers.ray_results import from_ray_results
from hpreliability.readers.sb3_logs import from_sb3
from hpreliability.readers.tensorboard_events import from_tensorboard
from hpreliability.readers.wandb_exports import from_wandb_export

__all__ = [
    "SparseCellWarning",
    "from_consistent_hparams",
    "from_hydra",
    "from_optuna",
    "from_ray_results",
    "from_runs",
    "from_sb3",
    "from_tensorboard",
    "from_wandb_export",
    "read",
]
