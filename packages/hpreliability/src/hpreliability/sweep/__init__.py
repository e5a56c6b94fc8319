"""Sweeps: what to run, running it so that nothing is lost, and the table of what came out."""

from __future__ import annotations

from hpreliability.sweep.calls import Train
from hpreliability.sweep.running import Sweep
from hpreliability.sweep.spec import SweepSpec
from hpreliability.sweep.trials import Trial

__all__ = ["Sweep", "SweepSpec", "Train", "Trial"]
