"""Rows of GSM8K whose own answer is wrong or disputable.

They are used neither as a first question, whose answer becomes X, nor as a later one. The list,
``data/doubtful-rows.json``, was made for this library by reading the rows; it names each row's
fault in a sentence. It is not complete: of the train split only rows that came up were read.
"""

from __future__ import annotations

import json
from functools import lru_cache
from importlib.resources import files


@lru_cache(maxsize=1)
def doubtful_rows() -> dict[str, str]:
    """Problem id → what is wrong with it, in a sentence."""
    text = files("gsm_compose").joinpath("data", "doubtful-rows.json").read_text(encoding="utf-8")
    return {row["problem"]: row["why"] for row in json.loads(text)}
