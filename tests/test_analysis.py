"""Scores of a model's layers: which tokens they are taken over, and by how many processes."""

import functools
from pathlib import Path

import pytest
import torch
from families import build
from faults import in_two_processes
from torch import Tensor
from transformers import PreTrainedModel

from kdprune.data.tokens import TokenSet, load_tokens
from kdprune.errors import KDPruneError
from kdprune.kernel.similarity import LayerSimilarity, median_distances
from kdprune.methods.common.analysis import ENOUGH, score_layers, some_rows
from kdprune.model import activations
from kdprune.model.activations import layer_states
from kdprune.runtime.distributed import world
from kdprune.runtime.run import Run


def random_tokens(rows: int, length: int = 24) -> TokenSet:
    """Rows of which every third is padded behind its first half."""
    ids = torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[::3, length // 2 :] = 0
    return load_tokens({"input_ids": ids, "attention_mask": mask}, None, samples=None, length=length, seed=0)


def scored(model: PreTrainedModel, tokens: TokenSet, **options: int) -> tuple[dict[str, Tensor], int]:
    run = Run(options.get("seed", 0), options.get("batch_size", 4))
    scores = score_layers(model, tokens, run, protect=0.1, limit=options.get("limit", ENOUGH))
    return scores.tensors(), scores.tokens


def test_scores_of_a_batch_are_those_of_its_real_tokens() -> None:
    model, tokens = build("llama3"), random_tokens(6)  # 120 real tokens: one chunk
    found, count = scored(model, tokens, batch_size=6)
    [(_, states)] = layer_states(model, tokens, range(len(model.model.layers) + 1), 6)
    real = torch.stack([state[tokens.mask] for state in states.values()])
    expected = LayerSimilarity(median_distances(real))
    expected.update(real)
    assert count == tokens.tokens == real.shape[1]
    for name, value in expected.value().items():  # the shuffle changes nothing but rounding
        torch.testing.assert_close(found[name], value, rtol=0, atol=2e-6)


def test_of_a_large_set_random_rows_are_enough() -> None:
    tokens = random_tokens(60)
    some = some_rows(tokens, 500, Run())
    assert 500 - 24 < some.tokens <= 500
    kept = {tuple(row) for row in some.ids.tolist()}
    assert kept < {tuple(row) for row in tokens.ids.tolist()}
    assert kept != {tuple(row) for row in tokens.ids[: len(some)].tolist()}
    assert torch.equal(some_rows(tokens, 500, Run()).ids, some.ids)
    assert not torch.equal(some_rows(tokens, 500, Run(1)).ids[:5], some.ids[:5])
    assert some_rows(tokens, tokens.tokens, Run()) is tokens
    assert len(some_rows(tokens, 5, Run())) == 1
    model = build("llama3")
    assert scored(model, tokens, limit=500)[1] <= 500
    torch.testing.assert_close(scored(model, tokens, limit=500)[0], scored(model, some)[0], rtol=0, atol=0)


def test_fewer_rows_pass_at_once_where_states_are_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = build("llama3"), random_tokens(6)
    width, states = model.config.hidden_size, len(model.model.layers) + 1
    monkeypatch.setattr(activations, "STATES", 2 * 24 * width * 4 * states)  # two rows
    two = scored(model, tokens, batch_size=6)[0]
    torch.testing.assert_close(two, scored(model, tokens, batch_size=2)[0], rtol=0, atol=0)


def test_batches_of_too_few_tokens_are_told() -> None:
    ids = torch.arange(60).view(20, 3) % 50
    few = TokenSet(ids, torch.ones_like(ids, dtype=torch.bool), "few.txt")  # type: ignore[arg-type]
    with pytest.raises(KDPruneError, match=r"fewer than 4 tokens each from few\.txt"):
        scored(build("llama3"), few, batch_size=1)


# ------------------------------------------------------------------------------------------ processes


def process(folder: Path) -> None:
    model = build("llama3")
    found = {rows: scored(model, random_tokens(rows)) for rows in (3, 22)}  # of 3 rows the second process has none
    torch.save(found, folder / f"{world().rank}.pt")


def test_two_processes_share_the_batches_and_find_the_same(tmp_path: Path) -> None:
    in_two_processes(functools.partial(process, tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for rows in (3, 22):
        alone, tokens = scored(build("llama3"), random_tokens(rows))
        assert first[rows][1] == second[rows][1] == tokens
        for name, value in alone.items():
            assert torch.equal(first[rows][0][name], second[rows][0][name])
            torch.testing.assert_close(first[rows][0][name], value, rtol=0, atol=1e-6)
