"""A set of items, and the file that holds it.

The file is JSON lines: a header, then one item a line. The header has the schema's version, the
number of items, the canary, and how the set was built, so that a truncated file, a file of another
version and a file with a changed item are all told from a good one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from gsm_compose.errors import BenchmarkFormatError
from gsm_compose.items import Item
from gsm_compose.writing import write_text

if TYPE_CHECKING:
    from datasets import Dataset

SCHEMA: Final = "gsm-compose/1"
CANARY: Final = (
    "gsm-compose canary f1d4c8de-1b52-4e57-9f0b-6d3a4be7a6c1: benchmark data, do not train"
)


@dataclass(frozen=True)
class Benchmark:
    """Items of one split, with the settings they were built with.

    Attributes:
        items: the compositions; ids are unique.
        settings: arguments of `build_benchmark` and what came of them (JSON values).
    """

    items: tuple[Item, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.items:
            raise BenchmarkFormatError("items: expected at least one item, got none.")
        splits = {item.split for item in self.items}
        if len(splits) > 1:
            raise BenchmarkFormatError(
                "items: expected items of one split, got both train and test. "
                "Keep them in two benchmarks."
            )
        if len({item.id for item in self.items}) < len(self.items):
            raise BenchmarkFormatError("items: expected every item once, some occur twice.")

    @property
    def split(self) -> Literal["train", "test"]:
        """Split of GSM8K that all questions come from."""
        return self.items[0].split

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Item]:
        return iter(self.items)

    def to_jsonl(self, path: str | Path) -> None:
        """Write header and items; the bytes depend on nothing but the content."""
        header = {
            "schema": SCHEMA,
            "items": len(self.items),
            "split": self.split,
            "canary": CANARY,
            "settings": dict(self.settings),
        }
        lines = [header, *(item.to_record() for item in self.items)]
        text = "".join(
            json.dumps(line, ensure_ascii=False, separators=(", ", ": ")) + "\n" for line in lines
        )
        write_text(Path(path), text)

    def stats(self) -> dict[str, Any]:
        """Counts, reuse and magnitudes of the answers, as JSON values."""
        from gsm_compose.describe import benchmark_stats

        return benchmark_stats(self)

    def card(self) -> str:
        """Dataset card: Markdown with YAML front matter."""
        from gsm_compose.card import dataset_card

        return dataset_card(self)

    def to_hf_dataset(self) -> Dataset:
        """A Hugging Face dataset, one row an item; see `gsm_compose.exports` for its columns.

        Raises:
            MissingExtraError: without the extra `datasets`.
        """
        from gsm_compose.exports import to_hf_dataset

        return to_hf_dataset(self)

    @classmethod
    def from_jsonl(cls, path: str | Path) -> Benchmark:
        """Read what `to_jsonl` wrote.

        Raises:
            BenchmarkFormatError: no header, another schema version, fewer items than the header
                says (truncated), a line that is not an item, or an item whose id is not the hash
                of its content. The message has file and line.
        """
        path = Path(path)
        # Not splitlines: questions may contain other characters that Unicode counts as line ends.
        lines = path.read_text(encoding="utf-8").split("\n")
        if lines and not lines[-1]:
            lines.pop()
        header = _header(path, lines[0] if lines else "")
        items = [_item(path, number, line) for number, line in enumerate(lines[1:], start=2)]
        if len(items) != header["items"]:
            raise BenchmarkFormatError(
                f"{path}: the header promises {header['items']} items, the file has {len(items)}. "
                "It was truncated or joined with another; copy or build it again."
            )
        return cls(tuple(items), header["settings"])


def _header(path: Path, line: str) -> dict[str, Any]:
    try:
        header = json.loads(line)
    except json.JSONDecodeError:
        header = None
    if not isinstance(header, dict) or "schema" not in header:
        raise BenchmarkFormatError(
            f"{path}, line 1: expected a header with the schema's version, got {line[:60]!r}. "
            "Is this a file that `gsm-compose build` wrote?"
        )
    if header["schema"] != SCHEMA:
        raise BenchmarkFormatError(
            f"{path}: expected schema {SCHEMA!r}, got {header['schema']!r}. "
            "Build the benchmark again with this version, or read it with the one that wrote it."
        )
    if not isinstance(header.get("items"), int) or not isinstance(header.get("settings"), dict):
        raise BenchmarkFormatError(f"{path}, line 1: the header lacks 'items' or 'settings'.")
    return header


def _item(path: Path, number: int, line: str) -> Item:
    try:
        return Item.from_record(json.loads(line))
    except json.JSONDecodeError as error:
        raise BenchmarkFormatError(
            f"{path}, line {number}: not JSON ({error.msg} at character {error.pos}). "
            "The file was truncated or edited."
        ) from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BenchmarkFormatError(f"{path}, line {number}: not an item: {error!r}.") from error
