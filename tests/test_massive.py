"""Massive tokens: statistics against brute force; similarity and selection in a model with planted ones."""

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from families import build
from faults import in_two_processes
from torch import Tensor
from transformers import PreTrainedModel

from kdprune.data.tokens import TokenSet, load_tokens
from kdprune.errors import KDPruneError
from kdprune.kernel import massive
from kdprune.kernel.massive import MASSIVE, MassiveTokens, movers
from kdprune.methods.common.analysis import Scores, massive_layers, massive_line, score_layers
from kdprune.methods.kdp.kdp import KDP
from kdprune.methods.peers.linear import Linear
from kdprune.model.activations import layer_states
from kdprune.runtime.distributed import world
from kdprune.runtime.run import Run

pytestmark = pytest.mark.usefixtures("one_thread")

SINK = 5  # the token that becomes massive
WRITER, ERASER = 2, 4
FIT = {"kernel_epochs": 1, "refine_epochs": 1, "kernel_tokens": 64, "fill": False, "rank": 2}


def random_tokens(rows: int = 8, length: int = 24, sinks: int = 1) -> TokenSet:
    """Rows that begin with ``sinks`` sinks and have none behind; the last row is padded behind its first half."""
    ids = torch.randint(6, 64, (rows, length), generator=torch.Generator().manual_seed(0))
    ids[:, :sinks] = SINK
    mask = torch.ones_like(ids)
    mask[-1, length // 2 :] = 0
    return load_tokens({"input_ids": ids, "attention_mask": mask}, None, samples=None, length=length, seed=0)


@torch.no_grad()
def planted(writer: int = WRITER, eraser: int | None = ERASER, size: float = 300.0) -> PreTrainedModel:
    """A tiny Llama in which coordinate 0 is the sink's alone, and a channel of one layer's MLP, which opens for it,
    makes its coordinate 1 ``size`` times the median norm; a later layer takes that away again.
    """
    model = build("llama3")
    layers, embedding = model.model.layers, model.model.embed_tokens.weight
    usual = float(embedding.norm(dim=-1).median())
    embedding[:, 0] = 0
    embedding[SINK, 0] = 3 * usual
    for layer in layers:
        for name in (layer.self_attn.o_proj, layer.mlp.down_proj):
            name.weight[0] = 0
        layer.post_attention_layernorm.weight[0] = 1
    for index, times in ((writer, size), (eraser, 0.0)):
        if index is None:
            continue
        wanted = times * float(states_of(model, random_tokens())[index + 1].norm(dim=-1).median())
        mlp = layers[index].mlp
        for projection in (mlp.gate_proj, mlp.up_proj):
            projection.weight[0] = 0
            projection.weight[0, 0] = 1e4  # the more massive the state, the smaller its coordinate 0 behind the norm
        mlp.down_proj.weight[:, 0] = 0
        ends = []
        for weight in (0.0, 1e-6):
            mlp.down_proj.weight[1, 0] = weight
            ends.append(float(states_of(model, random_tokens())[index + 1][0, 1]))
        mlp.down_proj.weight[1, 0] = 1e-6 * (wanted - ends[0]) / (ends[1] - ends[0])
    return model


def states_of(model: PreTrainedModel, tokens: TokenSet) -> Tensor:
    """All states of real tokens, (S, n, d)."""
    [(_, states)] = layer_states(model, tokens, range(len(model.model.layers) + 1), len(tokens))
    return torch.stack([state[tokens.mask] for state in states.values()])


def scored(model: PreTrainedModel, tokens: TokenSet, batch_size: int = 4) -> Scores:
    return score_layers(model, tokens, Run(batch_size=batch_size), protect=0.0)


# ------------------------------------------------------------------------------------------ statistics


def slowly(states: Tensor) -> dict[str, np.ndarray]:
    """What ``MassiveTokens`` finds in one batch, token by token."""
    norms = np.linalg.norm(states.double().numpy(), axis=-1)
    medians = np.array([sorted(row)[(len(row) - 1) // 2] for row in norms])
    is_massive = norms > MASSIVE * medians[:, None]
    inside = [t for t in range(norms.shape[1]) if is_massive[:, t].any()]
    outside = [t for t in range(norms.shape[1]) if t not in inside]
    moves = np.linalg.norm(np.diff(states.double().numpy(), axis=0), axis=-1)
    rms = [np.sqrt(np.mean(moves[:, part] ** 2, axis=1)) for part in (inside, outside)]
    mean = norms[:, inside].mean(axis=1)
    return {"largest_norm": norms.max(axis=1), "median_norm": medians, "massive_share": is_massive.mean(axis=1),
            "massive_move": rms[0] / rms[1], "massive_growth": mean[1:] / mean[:-1], "left_out": np.array(len(inside))}


def test_statistics_are_those_taken_token_by_token() -> None:
    states = torch.randn(6, 101, 8, generator=torch.Generator().manual_seed(0)).cumsum(0)
    states[2:5, 7] *= 400
    states[3:, 9] *= 90
    found = MassiveTokens(6)
    mask = found.update(iter(states))
    assert mask.nonzero().flatten().tolist() == [7, 9]
    for name, expected in slowly(states).items():
        np.testing.assert_allclose(found.value()[name].numpy(), expected, rtol=1e-5, err_msg=name)


def test_a_ratio_that_falls_because_the_others_grow_is_no_erasing() -> None:
    states = torch.randn(1, 200, 8, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [1.0, 1.5, 2, 3, 4, 6, 8, 8])[:, None, None]
    states[1:7, 0] = 300  # written by layer 0, erased by layer 6; below τ times the median from h₄ on
    found = MassiveTokens(8)
    found.update(states)
    value = found.value()
    assert (value["massive_share"] > 0).tolist() == [False, True, True, True, True, True, False, False]
    assert movers(value["massive_move"].tolist(), value["massive_growth"].tolist()) == ([0], [6])


def test_without_massive_tokens_there_is_nothing() -> None:
    found = MassiveTokens(4)
    assert not found.update(torch.randn(4, 50, 8, generator=torch.Generator().manual_seed(0))).any()
    value = found.value()
    assert int(value["left_out"]) == 0
    assert value["massive_share"].tolist() == [0] * 4
    assert value["massive_move"].tolist() == [0] * 3
    assert value["massive_growth"].tolist() == [1] * 3


# ------------------------------------------------------------------------------------------ analysis


@pytest.mark.parametrize(("writer", "eraser"), [(1, 3), (2, 4), (4, None)])
def test_planted_layers_are_found(writer: int, eraser: int | None) -> None:
    model, tokens = planted(writer, eraser), random_tokens()
    states = states_of(model, tokens)
    found = scored(model, tokens, batch_size=8)
    assert massive_layers(found) == ([writer], [] if eraser is None else [eraser])
    for name, expected in slowly(states).items():
        value = found.left_out if name == "left_out" else found[name]
        np.testing.assert_allclose(value, expected, rtol=1e-4, err_msg=name)
    assert found.left_out == len(tokens)
    assert found.tokens == tokens.tokens - len(tokens)
    record = found.record()
    assert (record.writes, record.erases, record.left_out) == ([writer], [eraser][: eraser is not None], len(tokens))
    assert f"written in layer {writer}" in massive_line(found)
    assert scored(build("llama3"), tokens).record().writes == []
    assert massive_line(scored(build("llama3"), tokens)) == ""


def test_similarity_is_that_of_the_other_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = planted(), random_tokens()
    found = scored(model, tokens, batch_size=8)
    other = tokens.ids[tokens.mask] != SINK
    states = states_of(model, tokens)[:, other]
    cosine = torch.cosine_similarity(states[WRITER], states[WRITER + 1], dim=-1).mean()
    assert found["cosine"][WRITER, WRITER + 1] == pytest.approx(float(cosine), abs=1e-5)
    np.testing.assert_allclose(found["state_norm"], states.norm(dim=-1).mean(-1), rtol=1e-5)
    monkeypatch.setattr(massive, "MASSIVE", float("inf"))
    whole = scored(model, tokens, batch_size=8)
    assert whole["linear_cka"][WRITER + 1, ERASER] > 0.999  # sees nothing but the sink
    assert found["linear_cka"][WRITER, WRITER + 1] - whole["linear_cka"][WRITER, WRITER + 1] > 0.3
    assert whole.left_out == 0


def test_a_model_without_them_is_scored_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = build("llama3"), random_tokens()
    found = scored(model, tokens)
    monkeypatch.setattr(massive, "MASSIVE", float("inf"))
    for name, value in scored(model, tokens).items():
        np.testing.assert_array_equal(found[name], value)


def test_nearly_every_other_token_is_used() -> None:
    tokens = random_tokens(rows=16, length=24, sinks=2)
    assert tokens.tokens % 128
    assert scored(planted(), tokens, batch_size=12).tokens > 0.98 * (tokens.tokens - 32)


def process(folder: Path) -> None:
    found = scored(planted(), random_tokens(rows=10))
    torch.save((found.tensors(), found.tokens, found.left_out), folder / f"{world().rank}.pt")


def test_two_processes_find_the_same(tmp_path: Path) -> None:
    in_two_processes(functools.partial(process, tmp_path))
    alone = scored(planted(), random_tokens(rows=10))
    for rank in (0, 1):
        arrays, tokens, left_out = torch.load(tmp_path / f"{rank}.pt")
        assert (tokens, left_out) == (alone.tokens, alone.left_out)
        for name, value in alone.tensors().items():
            torch.testing.assert_close(arrays[name], value, rtol=1e-5, atol=2e-6)


# ------------------------------------------------------------------------------------------ selection


@pytest.mark.parametrize("method", [
    KDP(ratio=0.1, protect=0.0, **FIT), Linear(ratio=0.1, protect=0.0),
    KDP(ratio=0.1, protect=0.0, ranking="damage", **FIT),
], ids=["similarity", "linear", "damage"])
def test_no_block_is_put_over_such_a_layer(method: KDP | Linear) -> None:
    tokens = random_tokens(rows=20)
    model = planted(3, 5)
    blocks = method(model, tokens, Run(batch_size=4)).blocks
    assert blocks
    assert not {3, 5} & {layer for block in blocks for layer in block}


def test_named_blocks_are_taken_as_they_are() -> None:
    method = Linear(ratio=0.1, blocks=((2, 4),))
    assert method(planted(), random_tokens(), Run(batch_size=4)).blocks == [range(2, 4)]


@pytest.mark.parametrize("ranking", ["similarity", "damage"])
def test_a_ratio_out_of_reach_is_refused_with_the_largest(ranking: str) -> None:
    model, tokens = planted(2, 4), random_tokens(rows=20)  # of six layers 0, 1 are a block, no other two are left
    method = KDP(ratio=0.45, protect=0.0, ranking=ranking, **FIT)
    method.check(model, tokens)
    with pytest.raises(KDPruneError, match=r"layers 2, 4 allow, which write or erase .*blocks=") as caught:
        method(model, tokens, Run(batch_size=4))
    budget = method.budget(model)
    largest = budget.removal(range(2)) / budget.target.total
    assert f"at most {int(largest * 1e4) / 1e4:.4g}" in str(caught.value)
    assert "\n" not in str(caught.value)
