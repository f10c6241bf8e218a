"""Text and token ids → token batches: what is kept, what is padding, what is refused."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import BatchEncoding, PreTrainedTokenizerFast

from kdprune.data.sources import check_source
from kdprune.data.tokens import (
    TokenSet,
    bundled_calibration,
    bundled_heldout,
    load_stream,
    load_tokens,
    parse_weighted,
)
from kdprune.errors import KDPruneError

BOS, EOS, PAD = 0, 1, 2
WORDS = 500


def word_tokenizer(leading: bool = False) -> PreTrainedTokenizerFast:
    """One token a word: "w7" → 10; ids 0, 1, 2 are bos, eos, pad."""
    vocabulary = {"<s>": BOS, "</s>": EOS, "<pad>": PAD} | {f"w{i}": i + 3 for i in range(WORDS)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    if leading:
        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def words(start: int, count: int) -> str:
    return " ".join(f"w{start + i}" for i in range(count))


def load(source: object, **options: object) -> TokenSet:
    settings = {"samples": None, "length": 32, "seed": 0} | options
    return load_tokens(source, word_tokenizer(), **settings)  # type: ignore[arg-type]


def as_set(tokens: TokenSet) -> set[int]:
    return set(tokens.ids[tokens.mask].tolist())


def test_documents_of_a_txt_file_are_joined_by_eos_and_cut(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(f"{words(0, 99)}\n<|endoftext|>\n{words(100, 199)}\n", encoding="utf-8")
    rows = load_stream(tmp_path / "a.txt", word_tokenizer()).ids[0].tolist()
    assert rows == [*range(3, 102), EOS, *range(103, 302), EOS]
    tokens = load(tmp_path / "a.txt")
    assert tokens.ids.shape == (10, 32)
    assert tokens.tokens == 300
    assert int((~tokens.mask).sum()) == 20
    padded = tokens.mask.sum(1).argmin()
    assert tokens.mask[padded].tolist() == [True] * 12 + [False] * 20, "padding is on the right"
    assert set(tokens.ids[~tokens.mask].tolist()) == {PAD}
    assert tokens.source == "a.txt"


def test_partial_row_is_dropped_when_full_rows_are_enough() -> None:
    assert load([words(0, 400)], length=8).mask.all()
    assert load([words(0, 400)], samples=3).mask.all()


def test_one_long_document_is_one_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdprune.data.readers.PIECE_CHARACTERS", 100)
    lines = "\n".join(words(i * 10, 10) for i in range(30))
    (tmp_path / "a.txt").write_text(f"{lines}\n<|endoftext|>\n{lines}", encoding="utf-8")
    ids = load_stream(tmp_path / "a.txt", word_tokenizer()).ids[0]
    assert ids.tolist() == [*range(3, 303), EOS] * 2


@pytest.mark.parametrize("name", ["line.txt", "row.jsonl", "row.parquet", "list"])
def test_what_is_one_line_or_row_is_tokenised_in_parts(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And reading stops where there is enough."""
    for module in ("readers", "tokenization"):
        monkeypatch.setattr(f"kdprune.data.{module}.PIECE_CHARACTERS", 4 * 25)
    monkeypatch.setattr("kdprune.data.tokenization.BATCH_CHARACTERS", 100)
    text = "".join(f"w{100 + index % 100} "[:5] for index in range(4000))[: 5 * 4000]
    (tmp_path / "line.txt").write_text(text, encoding="utf-8")
    (tmp_path / "row.jsonl").write_text(json.dumps({"text": text}), encoding="utf-8")
    pq.write_table(pa.table({"text": [text]}), tmp_path / "row.parquet")
    tokenizer, seen = word_tokenizer(), []

    def reading(texts: Any, **rest: Any) -> Any:
        seen.extend(texts if isinstance(texts, list) else [texts])
        return tokenizer(texts, **rest)

    reading.bos_token_id, reading.eos_token_id, reading.pad_token_id = None, EOS, None  # type: ignore[attr-defined]
    found = load_tokens([text] if name == "list" else tmp_path / name, reading, samples=2, length=32, seed=0)
    assert found.tokens == 64
    assert max(map(len, seen)) <= 100
    assert sum(map(len, seen)) < len(text) / 2


def test_half_a_surrogate_pair_is_no_text(tmp_path: Path) -> None:
    text = f"{words(0, 200)} \ud83d {words(200, 200)}"
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}), encoding="utf-8")
    assert set(range(3, 403)) <= as_set(load_stream(tmp_path / "a.jsonl", word_tokenizer()))


def test_same_seed_same_rows_other_seed_other_order() -> None:
    text = [words(0, 480)]
    first, again, other = load(text, samples=4), load(text, samples=4), load(text, samples=4, seed=1)
    assert first.ids.shape == (4, 32)
    assert torch.equal(first.ids, again.ids)
    assert not torch.equal(first.ids, other.ids)
    every = load(text)
    assert sorted(map(tuple, every.ids.tolist())) == sorted(map(tuple, load(text, seed=1).ids.tolist()))


def test_rows_start_with_bos_where_the_tokenizer_adds_it() -> None:
    tokens = load_tokens([words(0, 310)], word_tokenizer(leading=True), samples=None, length=32, seed=0)
    assert tokens.bos == BOS
    assert (tokens.ids[:, 0] == BOS).all()
    assert int((tokens.ids[tokens.mask] == BOS).sum()) == len(tokens)
    stream = load_stream([words(0, 310)], word_tokenizer(leading=True))
    assert stream.ids[0, 0] == BOS
    assert stream.ids.shape == (1, 312)
    assert load([words(0, 310)]).bos is None


def test_jsonl_parquet_and_a_directory_of_both(tmp_path: Path) -> None:
    with (tmp_path / "a.jsonl").open("w", encoding="utf-8") as file:
        for i in range(3):
            file.write(json.dumps({"text": words(i * 100, 99), "id": i}) + "\n\n")
    pq.write_table(pa.table({"text": [words(300, 99), words(400, 99)]}), tmp_path / "b.parquet")
    (tmp_path / ".hidden.txt").write_text("w499", encoding="utf-8")
    (tmp_path / "notes.md").write_text("w499", encoding="utf-8")
    assert load_stream(tmp_path / "a.jsonl", word_tokenizer()).tokens == 300
    assert load_stream(str(tmp_path / "b.parquet"), word_tokenizer()).ids[0, 0] == 303
    both = load_stream(tmp_path, word_tokenizer())
    assert both.tokens == 500
    assert 499 + 3 not in as_set(both)


def test_mixture_keeps_shares_of_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text(words(0, 320) + " " + words(0, 320), encoding="utf-8")
    (tmp_path / "b.txt").write_text(words(320, 160) + " " + words(320, 160), encoding="utf-8")
    a, b = str(tmp_path / "a.txt"), str(tmp_path / "b.txt")
    for source in ({a: 0.7, b: 0.3}, [(a, 7), (b, 3)]):
        tokens = load(source, samples=10)
        from_b = int((tokens.ids.max(1).values >= 323).sum())
        assert (len(tokens), from_b) == (10, 3)
        assert tokens.source == "a.txt (70%) + b.txt (30%)"
    scarce = load({a: 1, b: 3}, samples=100)
    assert len(scarce) == 13, "ten rows of b are three quarters of what there can be"
    assert int((scarce.ids.max(1).values >= 323).sum()) == 10
    assert "b.txt has 10 rows for 75% of the mixture, so that 13 of 30 rows are used" in capsys.readouterr().err
    assert len(load({a: 0.99, b: 0.01}, samples=10)) == 10
    (tmp_path / "c.txt").write_text("one word", encoding="utf-8")
    with pytest.raises(KDPruneError, match="from the rows that keep the shares of this mixture, expected at least 256"):
        load({a: 0.5, str(tmp_path / "c.txt"): 0.5}, samples=10)


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf"), "half", True])
def test_weights_must_be_positive_numbers(weight: object) -> None:
    with pytest.raises(KDPruneError, match=r"got weight .* expected a positive number"):
        load({"a.txt": weight, "b.txt": 1})


def test_weights_on_the_command_line(tmp_path: Path) -> None:
    odd = tmp_path / "run=1"
    odd.write_text("", encoding="utf-8")
    assert parse_weighted(["a.txt=0.7", "b.jsonl=3"]) == [("a.txt", 0.7), ("b.jsonl", 3.0)]
    assert parse_weighted(["a.txt", "org/name:en=2"]) == [("a.txt", 1.0), ("org/name:en", 2.0)]
    assert parse_weighted(["a.txt"]) == "a.txt"
    with pytest.raises(KDPruneError, match="got weight 0"):
        parse_weighted(["a.txt=0"])
    assert parse_weighted([str(odd)]) == str(odd)
    assert parse_weighted(["lr=fast.txt"]) == "lr=fast.txt"


def test_token_ids_are_taken_as_they_are() -> None:
    ids = torch.arange(64).reshape(4, 16)
    tokens = load_tokens(ids, None, samples=None, length=8, seed=0, vocabulary=64)
    assert torch.equal(tokens.ids, ids)
    assert tokens.mask.all()
    few = load_tokens(ids, None, samples=2, length=8, seed=0)
    assert len(few) == 2
    assert {tuple(row) for row in few.ids.tolist()} <= {tuple(row) for row in ids.tolist()}


def test_batch_encoding_keeps_left_padding_and_drops_empty_rows() -> None:
    mask = torch.ones(4, 16, dtype=torch.long)
    mask[0, :5] = 0
    mask[3] = 0
    batch = BatchEncoding({"input_ids": torch.full((4, 16), 7), "attention_mask": mask})
    tokens = load_tokens(batch, None, samples=None, length=8, seed=0)
    assert tokens.ids.shape == (3, 16)
    assert tokens.tokens == 43
    assert tokens.mask[0].tolist() == [False] * 5 + [True] * 11
    lists = load_tokens({"input_ids": [[7] * 16] * 4}, None, samples=None, length=8, seed=0)
    assert lists.tokens == 64


def test_batches_cover_every_row_once() -> None:
    tokens = load_tokens(torch.arange(70).reshape(7, 10), None, samples=None, length=8, seed=0)
    parts = list(tokens.batches(3))
    assert [len(part) for part in parts] == [3, 3, 1]
    assert torch.equal(torch.cat([part.ids for part in parts]), tokens.ids)
    with pytest.raises(KDPruneError, match="batch size 0"):
        next(tokens.batches(0))


def test_an_empty_name_in_a_mixture_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("What lies here was not named.")
    with pytest.raises(KDPruneError, match="got '', which does not exist"):
        check_source([("", 0.7), ("text.txt", 0.3)])


def test_bundled_text_is_there() -> None:
    assert bundled_calibration().stat().st_size > 100_000
    assert bundled_heldout().stat().st_size > 100_000


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (["w1 w2"], "got 3 tokens from 1 texts, expected at least 256"),
        ([], "no text"),
        (["  \n"], "no text"),
        ([1, 2], "got int at index 0"),
        ({}, "no text source"),
        (7, "got int, expected a file"),
        ("missing.txt", "does not exist"),
        ("no/such/dir", "does not exist"),
        ("data/missing.jsonl", "does not exist"),
        (torch.zeros(4, 16), "got token ids as float32 of shape"),
        (torch.zeros(64, dtype=torch.long), r"of shape \(64,\), expected"),
        (torch.zeros(0, 16, dtype=torch.long), "got 0 tokens"),
        (torch.zeros(2, 0, dtype=torch.long), "got 0 tokens"),
        (torch.zeros(2, 8, dtype=torch.long), "got 16 tokens"),
        (torch.full((4, 16), -1), "got token id -1"),
        (torch.full((4, 16), 100), "got token id 100 .* expected 0 to 99"),
        ({"input_ids": "x"}, "got input_ids that make no tensor"),
        ({"input_ids": [[1, 2], [3]]}, "got input_ids that make no tensor"),
        ({"input_ids": torch.ones(4, 16), "attention_mask": torch.ones(4, 16)}, "float32"),
        ({"input_ids": [[1] * 16] * 4, "attention_mask": [[1] * 8] * 4}, "attention_mask of shape"),
    ],
)
def test_bad_sources_get_one_line(source: object, message: str) -> None:
    with pytest.raises(KDPruneError, match=message) as caught:
        load(source, vocabulary=100)
    assert "\n" not in str(caught.value)


def test_bad_files_get_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n<|endoftext|>\n", encoding="utf-8")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1") * 300)
    (tmp_path / "broken.jsonl").write_text('{"text": "w1"}\n{"text": \n', encoding="utf-8")
    (tmp_path / "other.jsonl").write_text('{"body": "w1"}\n', encoding="utf-8")
    (tmp_path / "list.jsonl").write_text("[1]\n", encoding="utf-8")
    pq.write_table(pa.table({"body": ["w1"]}), tmp_path / "other.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 not really")
    (tmp_path / "table.csv").write_text("id;text\n1;w1\n", encoding="utf-8")
    (tmp_path / "table.xls").write_text("text\nw1\n", encoding="utf-8")
    (tmp_path / "deep.json").write_text("[" * 100_000, encoding="utf-8")
    (tmp_path / "digits.json").write_text(f'[{{"text": {"9" * 5000}}}]', encoding="utf-8")
    (tmp_path / "digits.jsonl").write_text(f'{{"text": {"9" * 5000}}}', encoding="utf-8")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "w1"}' * 9)[:-9])
    (tmp_path / "plain.txt.gz").write_bytes(b"w1")
    (tmp_path / "none").mkdir()
    expected = {
        "empty.txt": "no text in empty.txt",
        "latin.txt": "expected UTF-8",
        "broken.jsonl": "invalid JSON in .* line 2",
        "other.jsonl": "got body in .* line 1, expected a field 'text'",
        "list.jsonl": "got list",
        "other.parquet": "got body in .*other.parquet, expected a field .text.",
        "broken.parquet": "cannot read",
        "table.csv": "got id;text in .*table.csv, expected a field 'text'.*--text-field",
        "table.xls": "expected one of .txt, .jsonl, .parquet",
        "deep.json": "nested too deeply",
        "digits.json": "cannot be read .*digits",
        "digits.jsonl": "invalid JSON in .* line 1",
        "cut.jsonl.gz": "cannot read .*cut.jsonl.gz: Compressed file ended",
        "plain.txt.gz": "cannot read .*Not a gzipped file",
        "none": "without text",
    }
    for name, message in expected.items():
        with pytest.raises(KDPruneError, match=message) as caught:
            load(tmp_path / name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("options", "message"), [({"samples": 0}, "samples 0"), ({"length": 1}, "length 1")])
def test_counts_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(KDPruneError, match=message):
        load([words(0, 300)], **options)


def test_text_needs_a_tokenizer() -> None:
    with pytest.raises(KDPruneError, match="text without a tokenizer"):
        load_tokens(["w1"], None, samples=None, length=8, seed=0)


def test_hub_data_set_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(KDPruneError, match="cannot stream 'no-such-org/nothing:en'") as caught:
        load("no-such-org/nothing:en")
    assert "\n" not in str(caught.value)


def test_hub_data_set_is_streamed_and_shuffled_by_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub itself is out of reach of a test: a local data set stands in for what it returns."""
    import datasets  # a second

    rows = [{"text": words(i * 10, 10)} for i in range(40)]
    asked = []

    def load_dataset(name: str, config: str | None, streaming: bool) -> datasets.IterableDatasetDict:
        asked.append((name, config, streaming))
        return datasets.IterableDatasetDict({"train": datasets.Dataset.from_list(rows).to_iterable_dataset()})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    first, again, other = load("org/name:en"), load("org/name:en"), load("org/name:en", seed=1)
    assert asked[0] == ("org/name", "en", True)
    assert first.source == "org/name:en"
    assert first.tokens == 440
    assert torch.equal(first.ids, again.ids)
    assert as_set(first) == as_set(other)
    assert not torch.equal(first.ids, other.ids)
