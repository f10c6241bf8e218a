"""What models write after the same beginnings, against a loop without a cache, and its place in a comparison."""

from pathlib import Path

import pytest
import torch
from tiny_checkpoint import CONTEXT, Bench, no_drawing, random_ids, tiny_llama
from torch import Tensor
from transformers import MambaConfig, MambaForCausalLM, PreTrainedModel

import kdprune
from kdprune.data.tokens import TokenSet, load_stream
from kdprune.errors import KDPruneError
from kdprune.evaluation import generation
from kdprune.evaluation.generation import compared, continuations, prompts_of, repetition, sizes
from kdprune.report.comparison_records import Comparison
from kdprune.report.comparison_table import protocol

pytestmark = pytest.mark.usefixtures("one_thread")


@torch.no_grad()
def plainly(model: PreTrainedModel, prompts: Tensor, new_tokens: int) -> list[list[int]]:
    """Greedy continuations, each token from a pass over all that stands before it."""
    found = []
    for prompt in prompts.tolist():
        ids = list(prompt)
        for _ in range(new_tokens):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        found.append(ids[len(prompt):])
    return found


def text(ids: Tensor, source: str = "text", bos: int | None = None) -> TokenSet:
    return TokenSet(ids, torch.ones_like(ids, dtype=torch.bool), source, bos)  # type: ignore[arg-type]


def tiny_mamba() -> MambaForCausalLM:
    config = MambaConfig(vocab_size=320, hidden_size=16, num_hidden_layers=2, state_size=4, initializer_range=0.5)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MambaForCausalLM(config).eval()


@pytest.mark.parametrize("build", [tiny_llama, tiny_mamba])
def test_the_cache_changes_nothing(build: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "BATCH", 2)
    model, prompts = build().double().train(), random_ids(5, 9)
    model.generation_config.repetition_penalty = 50.0  # of checkpoints' own settings none counts
    found = continuations(model, prompts, 12)
    assert model.training
    assert found.tolist() == plainly(model.eval(), prompts, 12)


def test_an_end_of_text_ends_nothing() -> None:
    model = tiny_llama()
    first = int(continuations(model, random_ids(1, 9), 1))
    model.generation_config.eos_token_id = first
    assert continuations(model, random_ids(1, 9), 7).shape == (1, 7)


def test_measures_by_hand() -> None:
    dense = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 5, 6, 7, 8]])
    pruned = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 9, 4, 5, 9, 9, 9], [5, 5, 5, 5, 5, 5, 5, 5]])
    found = compared(dense, pruned, 3)
    assert (found.prompt, found.new_tokens) == (3, 8)
    assert found.same_beginning == [1, 2 / 8, 0]
    assert found.same_tokens == [1, 4 / 8, 1 / 8]
    assert found.repeated == [0, 0, 4 / 5]  # five runs of 5 5 5 5, the first of which is none again
    assert repetition(torch.tensor([1, 2, 3, 4, 1, 2, 3, 4, 1])) == pytest.approx(2 / 6)
    assert repetition(torch.tensor([1, 1, 1])) == 0


def test_prompts_are_spread_over_all_texts() -> None:
    first, second = text(torch.arange(100)[None], bos=0), text(torch.arange(200, 260).view(6, 10), "rows")
    found = prompts_of([first], 3, 10)  # nine pieces of ten after the leading token: 0, 3, 6
    assert found.tolist() == [[0, *range(start, start + 10)] for start in (1, 31, 61)]
    assert prompts_of([second], 3, 10).tolist() == second.ids[[0, 2, 4]].tolist(), "the beginnings of rows"
    both = prompts_of([text(torch.arange(40)[None]), second], 5, 10)
    assert both[:, 0].tolist() == [0, 10, 20, 200, 230]
    with pytest.raises(KDPruneError, match="got 60 tokens of rows, expected 7 prompts of 10 tokens in them"):
        prompts_of([second], 7, 10)


def test_sizes_fit_the_context() -> None:
    assert sizes(tiny_mamba()) == (64, 64)
    assert sizes(tiny_llama()) == (CONTEXT // 2 - 1, CONTEXT // 2)  # a beginning-of-text token has room


@no_drawing()
def test_a_comparison_has_both_models_continuations(bench: Bench, tmp_path: Path) -> None:
    given = {"calibration": bench.calibration, "heldout": bench.heldout, "samples": 12, "length": 32}
    found = kdprune.compare(str(bench.model), ["shortgpt:protect=0"], seeds=2, generate=3, output_dir=tmp_path / "out",
                            **given)
    outcome = kdprune.prune(str(bench.model), method="shortgpt", protect=0, **given)
    dense = tiny_llama()
    held = load_stream(bench.heldout, outcome.tokenizer, limit=found.dense.tokens + 1)
    prompts = prompts_of([held], 3, 31)
    wanted, written = (torch.tensor(plainly(model, prompts, 32)) for model in (dense, outcome.model))
    unit = found.units[0].generation
    assert unit is not None
    assert unit.same_beginning == compared(wanted, written, 31).same_beginning != [1, 1, 1]
    assert unit.repeated == [repetition(row) for row in written]
    assert found.dense.generation is not None
    assert found.dense.generation.repeated == [repetition(row) for row in wanted]
    assert found.dense.generation.same_tokens == [1, 1, 1]
    [row] = found.rows
    assert row.same_beginning.count == 2
    assert row.same_tokens.mean == pytest.approx(
        sum(sum(one.generation.same_tokens) / 3 for one in found.units) / 2)
    assert Comparison.load(tmp_path / "out") == found
    table = (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert "| same beginning | same tokens | repeated |" in table
    assert f"{100 * row.repeated.mean:.1f}" in table
    assert any("after 3 prompts of 31 tokens" in line for line in protocol(found))
    assert not any("prompts" in line for line in protocol(found, ["excess loss"]))


def test_too_little_text_is_told_before_any_work(bench: Bench) -> None:
    with pytest.raises(KDPruneError, match="expected 1000 prompts of 31 tokens"):
        kdprune.compare(str(bench.model), ["shortgpt"], generate=1000, calibration=bench.calibration,
                        heldout=bench.heldout, samples=12, length=32)
