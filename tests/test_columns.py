"""Rows that hold their text in other columns, as conversations, or not at all, and the files that people keep."""

import csv
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from test_data import load, word_tokenizer, words

from kdprune.data.columns import Columns
from kdprune.data.sources import InColumn, check_source, read_pieces
from kdprune.data.tokens import load_stream
from kdprune.errors import KDPruneError

ROWS = [words(i * 10, 10) for i in range(30)]
TEMPLATE = ("{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
            "<{{ m.role }}>{{ m.content }}{% endfor %}")


def texts(source: Any, **columns: Any) -> list[str]:
    return [text for text, _ in read_pieces(source, 0, Columns(**columns))]


def written(folder: Path, name: str, content: str, encoding: str = "utf-8") -> Path:
    (folder / name).write_text(content, encoding=encoding)
    return folder / name


def lines(rows: list[Any]) -> str:
    return "\n".join(map(json.dumps, rows))


def as_table(folder: Path) -> Path:
    with (folder / "rows.CSV").open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([["id", "text"], *enumerate(ROWS)])
    return folder / "rows.CSV"


def compressed(folder: Path) -> Path:
    (folder / "rows.JSONL.GZ").write_bytes(gzip.compress(lines([{"text": row} for row in ROWS]).encode()))
    return folder / "rows.JSONL.GZ"


def packed(folder: Path) -> Path:
    (folder / "rows.txt.xz").write_bytes(lzma.compress("\n<|endoftext|>\n".join(ROWS).encode("utf-8-sig")))
    return folder / "rows.txt.xz"


def columnar(folder: Path) -> Path:
    pq.write_table(pa.table({"content": ROWS}), folder / "rows.parquet")
    return folder / "rows.parquet"


def saved(folder: Path) -> Path:
    import datasets  # a second

    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"text": ROWS}).save_to_disk(str(folder / "saved"))
    return folder / "saved"


FILES: dict[str, Callable[[Path], Path]] = {
    "mark": lambda folder: written(folder, "a.jsonl", lines([{"text": row} for row in ROWS]), "utf-8-sig"),
    "mark in text": lambda folder: written(folder, "A.TXT", "\n<|endoftext|>\n".join(ROWS), "utf-8-sig"),
    "array": lambda folder: written(folder, "a.json", json.dumps([{"content": row} for row in ROWS])),
    "array of texts": lambda folder: written(folder, "a.json", json.dumps(ROWS)),
    "lines": lambda folder: written(folder, "a.json", lines([{"text": row} for row in ROWS])),
    "table": as_table, "compressed": compressed, "packed": packed, "columnar": columnar, "saved": saved,
}


@pytest.mark.parametrize("kind", FILES)
def test_files_that_people_have(kind: str, tmp_path: Path) -> None:
    found = FILES[kind](tmp_path)
    assert [text.strip() for text in texts(found)] == ROWS
    stream = load_stream(found, word_tokenizer())
    assert (stream.tokens, int(stream.ids[0, 0]), stream.skipped) == (330, 3, 0)
    check_source(found)


def test_a_folder_of_text_leaves_its_description_alone(tmp_path: Path) -> None:
    written(tmp_path, "rows.Jsonl", lines([{"text": row} for row in ROWS]))
    written(tmp_path, "infos.json", '{"version": "1"}')
    assert texts(tmp_path) == ROWS
    (tmp_path / "rows.Jsonl").unlink()
    with pytest.raises(KDPruneError, match=r"got version in .*expected a field 'text'"):
        texts(tmp_path)


@pytest.mark.parametrize(("row", "expected"), [
    ({"messages": [{"role": "user", "content": "w1"}, {"role": "gpt", "content": "w2"}]}, "<user>w1<assistant>w2"),
    ({"conversations": [{"from": "human", "value": "w1"}, {"from": "gpt", "value": "w2"}]}, "<user>w1<assistant>w2"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "w1"}]}]}, "<user>w1"),
    ({"prompt": "w1 ", "completion": "w2"}, "w1 w2"),
    ({"prompt": [{"role": "user", "content": "w1"}], "completion": [{"role": "assistant", "content": "w2"}]},
     "<user>w1<assistant>w2"),
    ({"messages": [{"role": "user", "content": "w1"}], "text": "w3"}, "w3"),
])
def test_conversations_go_through_the_chat_template(row: dict[str, Any], expected: str, tmp_path: Path) -> None:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE
    found = written(tmp_path, "a.jsonl", lines([row]))
    assert texts(found, tokenizer=tokenizer) == [expected]
    check_source(found)  # without a tokenizer


def test_a_named_column_wins_everywhere(tmp_path: Path) -> None:
    rows = [{"text": "w0", "body": row} for row in ROWS]
    source = written(tmp_path, "a.jsonl", lines(rows))
    assert texts(InColumn(source, "body")) == texts(InColumn(rows, "body")) == ROWS
    assert load(InColumn({str(source): 1.0}, "body")).tokens == 330
    assert load(InColumn(torch.ones(8, 16, dtype=torch.long), "body")).tokens == 128
    with pytest.raises(KDPruneError, match=r"got text, body in .*line 1, expected a field 'nothing', as --text-field"):
        check_source(InColumn(source, "nothing"))


def test_null_rows_are_skipped_counted_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[Any] = [{"text": row} for row in ROWS]
    rows[2], rows[5] = {"text": None}, None
    for source in (rows, written(tmp_path, "a.jsonl", lines(rows)), written(tmp_path, "a.json", json.dumps(rows))):
        found = load(source)
        assert (found.tokens, found.skipped) == (28 * 11, 2)
        assert load_stream(source, word_tokenizer()).skipped == 2
        name = source.name if isinstance(source, Path) else "30 texts"
        assert capsys.readouterr().err == f"kdprune: 2 rows of {name} without text, skipped\n" * 2
    table = written(tmp_path, "a.csv", "id,text\n" + "".join(f"{i},{row}\n" for i, row in enumerate(ROWS)) + "7,\n")
    assert load(table).skipped == 1


def test_data_sets_in_memory() -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"text": [*ROWS, None]})
    for source in (rows, rows.to_iterable_dataset(), datasets.DatasetDict({"test": datasets.Dataset.from_dict(
            {"text": ["w0"]}), "train": rows})):
        found = load(source)
        assert (found.tokens, found.skipped, found.source) == (330, 1, "data set")
    with pytest.raises(KDPruneError, match="got input_ids in the data set row 1"):
        check_source(datasets.Dataset.from_dict({"input_ids": [[1]]}))


@pytest.mark.parametrize(("row", "message"), [
    ({"messages": [{"role": "tool", "content": "w1"}]}, "chat template refuses .*row 1 .no tools"),
    ({"messages": [{"speaker": "a"}]}, "got a turn with speaker in .*expected role and content"),
    ({"messages": 7}, "got int in .*expected text, or a list of turns"),
    ({"text": b"w1"}, "got bytes"),
    ({"body": "w1"}, "got body in .*name the one that holds text with --text-field"),
    ({f"c{i}": "" for i in range(99)}, "c7 … in"),
])
def test_rows_that_hold_no_text(row: dict[str, Any], message: str) -> None:
    import datasets

    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE
    with pytest.raises(KDPruneError, match=message) as caught:
        load_stream(datasets.Dataset.from_list([row]), tokenizer)
    assert "\n" not in str(caught.value)


def test_conversations_need_a_chat_template() -> None:
    with pytest.raises(KDPruneError, match="the tokenizer has no chat template; give text"):
        load([{"messages": [{"role": "user", "content": "w1"}]}])
