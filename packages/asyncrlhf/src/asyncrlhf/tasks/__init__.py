"""Tasks with verifiable rewards: prompts, gold rewards, and models to start from."""

from __future__ import annotations

from asyncrlhf.tasks.gsm8k import GSM8KReward, load_gsm8k
from asyncrlhf.tasks.synthetic_summary import GoldReward, SyntheticSummary

__all__ = ["GSM8KReward", "GoldReward", "SyntheticSummary", "load_gsm8k"]
