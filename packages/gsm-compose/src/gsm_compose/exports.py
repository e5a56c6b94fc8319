"""A benchmark as flat rows, as a Hugging Face dataset, as Parquet; and the guard of training data.

What these write is for *evaluation*, and every row and file carries the canary. Exports for
training are in `gsm_compose.integrations`; each goes through `require_training_split`, so that
items made of test questions do not become training data by accident.
"""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from gsm_compose.benchmark import CANARY, SCHEMA, Benchmark
from gsm_compose.card import dataset_card
from gsm_compose.errors import BenchmarkFormatError, LeakError, MissingExtraError, PromptError
from gsm_compose.items import Item
from gsm_compose.prompts import Condition, Message, PromptSpec, render, style_of
from gsm_compose.writing import write_text

if TYPE_CHECKING:
    import datasets
    import pyarrow

_HEADER_KEY: Final = b"gsm_compose"
LICENSE_FILE: Final = "LICENSE-gsm8k"
TRAINING_SPEC: Final = PromptSpec(shots=0)
"""Training asks without exemplars, and says in words which form the answer must have."""


def require_training_split(benchmark: Benchmark, what: str, *, allow_test_data: bool) -> None:
    """Refuse to make training data of test questions.

    Args:
        benchmark: what would be exported.
        what: name of the export, for the message.
        allow_test_data: True says in so many words that training on test questions is wanted, as
            in a study of contamination, or that the file is for validation only.

    Raises:
        LeakError: the benchmark is made of test questions and `allow_test_data` is not True.
    """
    # `is not True`: a truthy string from a configuration file is not saying it.
    if benchmark.split != "train" and allow_test_data is not True:
        raise LeakError(
            f"benchmark: {what} makes training data, expected a benchmark built from the train "
            f"split, got one of {len(benchmark)} items from the {benchmark.split} split. Build one "
            "from train; if training on test questions is really what you want, say "
            "allow_test_data=True."
        )


def to_rows(benchmark: Benchmark) -> list[dict[str, Any]]:
    """One flat record per item, with the nested hops beside the flat columns.

    Returns:
        Records with id, split, shape, n_hops, order, question (the composition's text), q1 and q2
        (each alone, numbers filled in), q2_original, gold_x, gold_final, ignored (the answer if X
        is ignored), problems (ids of the source rows), hops (see `gsm_compose.items.Hop`), canary.
    """
    return [_row(item) for item in benchmark]


def to_hf_dataset(benchmark: Benchmark) -> datasets.Dataset:
    """The rows of `to_rows` as a Hugging Face dataset with a fixed schema.

    Raises:
        MissingExtraError: the extra ``datasets`` is not installed.
    """
    hub = require_datasets()
    features = hub.Features.from_arrow_schema(_schema())
    return hub.Dataset.from_list(to_rows(benchmark), features=features, split=benchmark.split)


def to_parquet(benchmark: Benchmark, path: str | Path) -> None:
    """Write the rows of `to_rows` with the benchmark's header; `from_parquet` reads it back.

    Raises:
        MissingExtraError: the extra ``datasets`` is not installed.
        OSError: the folder does not exist or cannot be written; nothing is left behind.
    """
    arrow = require_pyarrow()
    header = {
        "schema": SCHEMA,
        "items": len(benchmark),
        "split": benchmark.split,
        "canary": CANARY,
        "settings": dict(benchmark.settings),
    }
    table = arrow.Table.from_pylist(to_rows(benchmark), schema=_schema())
    table = table.replace_schema_metadata({_HEADER_KEY: json.dumps(header).encode()})
    write_table(table, Path(path))


def from_parquet(path: str | Path) -> Benchmark:
    """Read what `to_parquet` wrote.

    Raises:
        BenchmarkFormatError: not Parquet, no header of this library, another schema version, or an
            item whose id is not the hash of its content.
        MissingExtraError: the extra ``datasets`` is not installed.
    """
    arrow = require_pyarrow()
    import pyarrow.parquet

    path = Path(path)
    try:
        table = pyarrow.parquet.read_table(path)
    except arrow.ArrowInvalid as error:
        raise BenchmarkFormatError(f"{path}: not a Parquet file, or a damaged one.") from error
    header = json.loads((table.schema.metadata or {}).get(_HEADER_KEY, b"{}"))
    if header.get("schema") != SCHEMA:
        raise BenchmarkFormatError(
            f"{path}: expected a header with schema {SCHEMA!r}, got {header.get('schema')!r}. "
            "Is this a file that `to_parquet` wrote? Other programs drop the header."
        )
    return Benchmark(items_of(table.to_pylist(), str(path)), header["settings"])


def from_hf_dataset(dataset: datasets.Dataset, settings: dict[str, Any] | None = None) -> Benchmark:
    """The benchmark of a dataset made by `to_hf_dataset`, or loaded from a folder of this library.

    Args:
        dataset: rows as `to_rows` makes them; further columns do not matter.
        settings: how it was built; datasets do not keep that.

    Raises:
        BenchmarkFormatError: a row is not an item, or its id is not the hash of its content.
    """
    return Benchmark(items_of(dataset.to_list(), "dataset"), settings or {})


def write_dataset_folder(benchmark: Benchmark, folder: str | Path) -> None:
    """Write a folder that ``datasets.load_dataset(folder)`` reads and that can be uploaded.

    It holds ``data/<split>.parquet``, the dataset card as ``README.md``, and the licence of GSM8K.

    Raises:
        MissingExtraError: the extra ``datasets`` is not installed.
        OSError: the folder cannot be written.
    """
    folder = Path(folder)
    (folder / "data").mkdir(parents=True, exist_ok=True)
    to_parquet(benchmark, folder / "data" / f"{benchmark.split}.parquet")
    write_license(folder)
    write_text(folder / "README.md", dataset_card(benchmark))


def write_license(folder: Path) -> None:
    """Put the licence of GSM8K beside data derived from it, as the licence demands."""
    text = files("gsm_compose").joinpath("data", LICENSE_FILE).read_text(encoding="utf-8")
    write_text(folder / LICENSE_FILE, text)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write records as JSON lines, whole or not at all."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_table(table: pyarrow.Table, path: Path) -> None:
    """Write a table as Parquet, whole or not at all."""
    import pyarrow.parquet

    temporary = path.with_name(f".{path.name}.partial")
    try:
        pyarrow.parquet.write_table(table, temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def items_of(rows: list[dict[str, Any]], source: str) -> tuple[Item, ...]:
    """The items of records made by `to_rows`.

    Raises:
        BenchmarkFormatError: a record is not an item; the message has `source` and its number.
    """
    found = []
    for number, row in enumerate(rows, start=1):
        try:
            record = {key: row[key] for key in ("id", "split", "shape", "hops", "order")}
            found.append(Item.from_record(record))
        except (KeyError, TypeError, ValueError) as error:
            raise BenchmarkFormatError(
                f"{source}, row {number}: not an item of this library: {error!r}."
            ) from error
    return tuple(found)


def render_messages(item: Item, condition: Condition, spec: PromptSpec) -> list[Message]:
    """The prompt as messages whatever ``spec.chat`` is, for trainers that know no other form."""
    messages = render(item, condition, replace(spec, chat=True))
    assert not isinstance(messages, str)  # chat=True
    return messages


def require_words(condition: Condition, spec: PromptSpec, what: str) -> None:
    """Refuse code where nothing would run it.

    Raises:
        PromptError: answers would be code.
    """
    if style_of(condition, spec) == "code":
        raise PromptError(
            f"{what}: expected answers in words, got condition {condition!r} in code, which would "
            "be compared as text. gsm_compose.evaluate and rewards.code_reward run code."
        )


def require_datasets(extra: str = "datasets") -> Any:
    """The package datasets, or MissingExtraError with the extra."""
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("datasets", extra) from error
    return datasets


def require_pyarrow() -> Any:
    """The package pyarrow, or MissingExtraError."""
    try:
        import pyarrow
    except ImportError as error:
        raise MissingExtraError("pyarrow", "datasets") from error
    return pyarrow


def _row(item: Item) -> dict[str, Any]:
    record = item.to_record()
    return {
        "id": item.id,
        "split": item.split,
        "shape": item.shape,
        "n_hops": len(item.hops),
        "order": list(item.order),
        "question": composition_text(item),
        "q1": item.q1.question,
        "q2": item.q2.question,
        "q2_original": item.q2.original,
        "gold_x": item.x,
        "gold_final": item.gold,
        "ignored": item.ignored,
        "problems": [hop.problem for hop in item.hops],
        "hops": record["hops"],
        "canary": CANARY,
    }


def _schema() -> pyarrow.Schema:
    """Fixed, so that a file does not depend on which fields its items happen to use."""
    arrow = require_pyarrow()
    text, number = arrow.string(), arrow.int64()
    link = {"source": number, "start": number, "end": number, "old": text, "old_value": number}
    hop = {
        "problem": text,
        "original": text,
        "question": text,
        "template": text,
        "links": arrow.list_(arrow.struct(list(link.items()))),
        "answer": number,
        "old_answer": number,
        "solution": text,
        "program": text,
    }
    columns = {
        "id": text,
        "split": text,
        "shape": text,
        "n_hops": number,
        "order": arrow.list_(number),
        "question": text,
        "q1": text,
        "q2": text,
        "q2_original": text,
        "gold_x": number,
        "gold_final": number,
        "ignored": number,
        "problems": arrow.list_(text),
        "hops": arrow.list_(arrow.struct(list(hop.items()))),
        "canary": text,
    }
    return arrow.schema(list(columns.items()))


def composition_text(item: Item) -> str:
    """The composition as a model reads it, without exemplars or instructions about the format."""
    (message,) = render_messages(item, "compositional", PromptSpec(shots=0, preamble=False))
    return message["content"]
