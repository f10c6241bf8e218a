"""Sweep, calibration and generation of the results book: their arithmetic, and real runs on a tiny model."""

import json
import lzma
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tiny_checkpoint import Bench
from torch.nn import functional

from kdprune.data import TokenSet, load_stream
from kdprune.errors import KDPruneError
from kdprune.model.loading import load_model, load_tokenizer

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

pytest.importorskip("rouge_score")
import calibration
import generation
import generation_page
import pruned_models
import sweep

pytestmark = pytest.mark.usefixtures("one_thread")
PEER, RIGID = "linearpatch:protect=0", "shortgpt:blocks=1-3"


def ran(module: ModuleType, monkeypatch: pytest.MonkeyPatch, bench: Bench, file: Path, *options: object) -> list[dict]:
    """The records after the script ran on the tiny model."""
    monkeypatch.setattr(sys, "argv", list(map(str, [
        module.__name__, "--model", bench.model, "--text", bench.calibration, "--quick", "--file", file, *options])))
    module.main()
    return json.loads(file.read_text())


def test_documents_are_cut_and_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruned_models, "LONGEST", 5)
    whole, packed = tmp_path / "a.txt", tmp_path / "a.txt.xz"
    text = "first one\n<|endoftext|>\n\n<|endoftext|>\ntwo\n<|endoftext|>\nthree\n"
    whole.write_text(text)
    packed.write_bytes(lzma.compress(text.encode()))
    for file in (whole, packed):
        assert pruned_models.documents(file, 100) == ["first", "two", "three"]
        assert pruned_models.documents(file, 6) == ["first", "two"]
    with pytest.raises(KDPruneError, match="does not exist"):
        pruned_models.documents(tmp_path / "b.txt", 1)


def test_sweep_measures_once_and_shows_what_is_missing(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    file, kept = tmp_path / "sweep.json", tmp_path / "kept"
    asked = ("--methods", PEER, RIGID, "--ratios", 0.2, "--pruned", kept, "--name", "one")
    records = ran(sweep, monkeypatch, bench, file, *asked)
    assert [record["method"] for record in records] == [PEER, RIGID]
    assert records[0]["net_ratio"] >= 0.2
    for record in records:
        assert record["excess_loss"] == pytest.approx(math.log(record["perplexity"] / record["dense"]), abs=1e-3)
    page = file.with_suffix(".md").read_text()
    assert "Not measured yet: KDP `refine_epochs=15` (10%, 20%, 25%, 30%, 40%, 50%)" in page
    assert "| KDP `refine_epochs=15` | — |" in page
    assert file.with_suffix(".svg").is_file()
    # What was measured is not measured again; what was pruned is found again and gives the same figure.
    monkeypatch.setattr(pruned_models, "apply_edits", lambda *_: pytest.fail("pruned again"))
    assert ran(sweep, monkeypatch, bench, file, *asked) == records
    again = ran(sweep, monkeypatch, bench, tmp_path / "again.json", *asked)
    assert [r["excess_loss"] for r in again] == [r["excess_loss"] for r in records]


def test_sweep_says_what_a_method_cannot(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "sweep.json"
    ran(sweep, monkeypatch, bench, file, "--methods", "shortgpt", "--ratios", 0.99)
    [record] = ran(sweep, monkeypatch, bench, file, "--render")
    page = file.with_suffix(".md").read_text()
    assert "excess_loss" not in record
    assert record["unreachable"] in page
    assert "| cannot |" in page


def test_calibration_by_tokens_and_domain(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = bench.calibration.read_text()
    for part, half in zip(("wikinews_en", "gutenberg"), (text[: len(text) // 2], text[len(text) // 2:]), strict=True):
        (tmp_path / f"{part}-00.txt.xz").write_bytes(lzma.compress(half.encode()))
    file = tmp_path / "calibration.json"
    records = ran(calibration, monkeypatch, bench, file, "--methods", PEER, "--tokens", 512, 1024, "--train", tmp_path,
                  "--heldout", tmp_path)
    assert [(r["part"], r["calibrated"]) for r in records] == [
        ("domains", "news"), ("domains", "books"), ("tokens", 512), ("tokens", 1024)]
    domains, tokens = records[:2], records[2:]
    assert [record["rows"] * record["row"] for record in tokens] == [512, 1024]
    assert all(set(record["measured"]) == {"news", "books"} for record in domains)
    # Both calibrations are compared with the dense model on the same text.
    assert domains[0]["measured"]["news"]["dense"] == domains[1]["measured"]["news"]["dense"]
    assert domains[0]["measured"]["news"]["perplexity"] != domains[1]["measured"]["news"]["perplexity"]
    with pytest.raises(KDPruneError, match=r"wikinews\*"):
        calibration.file_of(tmp_path / "none", "news")


def test_greedy_continuations_are_the_likeliest_tokens(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "NEW", 6)
    model, tokenizer = load_model(bench.model), load_tokenizer(bench.model)
    prompts = load_stream(bench.heldout, tokenizer).ids[0, :40].view(4, 10)
    found = generation.continuations(model, tokenizer, prompts, None)
    logits_of_all = []
    for prompt, text in zip(prompts, found, strict=True):
        ids, logits = prompt, []
        for _ in range(6):
            last = model(ids[None]).logits[0, -1]
            if int(last.argmax()) == tokenizer.eos_token_id:
                break
            logits.append(last)
            ids = torch.cat([ids, last.argmax()[None]])
        assert text.tolist() == ids[10:].tolist()
        logits_of_all += logits
    loss = functional.cross_entropy(torch.stack(logits_of_all), torch.cat(found)).item()
    assert generation.surprise(model, prompts, found) == pytest.approx(math.exp(loss), rel=1e-4)


def test_spans_hold_no_end_of_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "PROMPT", 3)
    monkeypatch.setattr(generation, "NEW", 2)
    ids = torch.arange(1, 43)[None]
    held_out = TokenSet(ids, torch.ones_like(ids, dtype=torch.bool), "text")  # type: ignore[arg-type]
    found = generation.spans(held_out, 3, end=7)  # in the second of eight spans
    assert found.tolist() == [list(range(1, 6)), list(range(21, 26)), list(range(36, 41))]
    with pytest.raises(KDPruneError, match="got 7 spans"):
        generation.spans(held_out, 8, end=7)


def test_prefix_repetition_and_lead() -> None:
    text = torch.tensor([1, 2, 3, 4, 1, 2, 3, 4])
    assert generation.same_prefix(text, torch.tensor([1, 2, 9, 4])) == 2
    assert generation.same_prefix(text, text[:3]) == 3
    assert generation.repeated(text) == pytest.approx(1 / 5)  # five runs of four, 1234 twice
    assert generation.repeated(text[:3]) == 0
    records = [{"method": method, "seed": 0, "rouge": {"true": {"rouge1": [value, value + 0.5]}}}
               for method, value in (("kdp", 0.3), ("shortgpt", 0.1))]
    assert generation_page.lead(records, "kdp", "shortgpt", "true", "rouge1") == "+0.200 (+0.200 … +0.200)"


def test_generation_runs(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "PROMPT", 16)
    monkeypatch.setattr(generation, "NEW", 12)
    file = tmp_path / "generation.json"
    records = ran(generation, monkeypatch, bench, file, "--methods", PEER, RIGID)
    assert [record["method"] for record in records] == ["chance", "dense", PEER, RIGID]
    dense = records[1]
    assert set(dense["rouge"]["dense"]["rougeL"]) == {1.0}
    assert dense["of_dense_text"] == dense["under_dense"]
    assert all(0 <= score <= 1 for record in records for score in record["rouge"]["true"]["rouge1"])
    page = file.with_suffix(".md").read_text()
    assert "Not measured yet: ShortGPT, LinearPatch, Streamline-FFN, KDP `refine_epochs=15`." in page
