"""Perplexity, speed, cache size and samples against their definitions."""

import math

import pytest
import torch
from families import LAYERS, REPRESENTATIVES, WIRINGS, build
from tiny_checkpoint import CONTEXT, WORDS, Bench, random_ids, tiny_llama
from torch.nn import functional
from transformers import AutoTokenizer

import kdprune.evaluation.perplexity as measured
import kdprune.model.losses as losses_of
from kdprune.data.tokens import TokenSet, load_stream
from kdprune.errors import KDPruneError
from kdprune.evaluation.fidelity import DenseStates, fidelity
from kdprune.evaluation.perplexity import perplexity
from kdprune.evaluation.samples import compare_samples, continuation
from kdprune.evaluation.speed import compare_speed, kv_cache_bytes_per_token, speed
from kdprune.model.losses import batch_logits
from kdprune.testing import IDS

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model():
    return tiny_llama(2)


def token_set(ids: torch.Tensor, mask: torch.Tensor | None = None, bos: int | None = None) -> TokenSet:
    return TokenSet(ids, torch.ones_like(ids, dtype=torch.bool) if mask is None else mask, "test", bos)


@torch.no_grad()
def losses(model, row: torch.Tensor) -> torch.Tensor:
    """Loss of every token of a row but the first, all tokens before it in sight."""
    return functional.cross_entropy(model(row[None]).logits[0, :-1], row[1:], reduction="none")


# ------------------------------------------------------------------------------------------ perplexity


def test_rows_within_one_window_are_scored_whole(model) -> None:
    ids = random_ids(3, 20)
    expected = torch.cat([losses(model, row) for row in ids])
    found = perplexity(model, token_set(ids))
    assert (found.window, found.stride) == (CONTEXT, CONTEXT // 2)
    assert found.tokens == 3 * 19
    assert found.loss == pytest.approx(float(expected.mean()), rel=1e-5)
    assert found.value == pytest.approx(math.exp(found.loss))


@pytest.mark.parametrize(("window", "stride"), [(16, 8), (16, 5), (16, 16), (16, 1), (2, 1)])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_sliding_windows_score_every_token_once_with_its_context(model, window, stride, batch_size) -> None:
    row = random_ids(1, 51)[0]
    sums, done = [], 1
    while done < len(row):  # position by position: what each window sees, written down naively
        end = min(len(row), window + 1 if done == 1 else done + stride)
        seen = row[max(0, end - 1 - window):end]
        sums.append(float(losses(model, seen)[-(end - done):].double().sum()))
        done = end
    found = perplexity(model, token_set(row[None]), window, stride, batch_size=batch_size)
    assert found.tokens == 50
    assert found.loss == pytest.approx(sum(sums) / 50, rel=1e-5)
    assert found.sums == pytest.approx(sums, rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_fidelity_is_divergence_and_agreement_at_the_scored_positions(model, batch_size) -> None:
    ids, other = random_ids(3, 20), tiny_llama(2)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.2)
        p, q = (one(ids).logits[:, :-1].log_softmax(-1).double() for one in (model, other))
    found = fidelity(model, other, token_set(ids), batch_size=batch_size)
    assert found.divergence == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert found.divergence > 1e-3
    assert found.agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert found.dense == perplexity(model, token_set(ids), batch_size=batch_size)
    assert found.pruned == perplexity(other, token_set(ids), batch_size=batch_size)
    same = fidelity(model, model, token_set(ids))
    assert (same.divergence, same.agreement) == (pytest.approx(0, abs=1e-7), 1)


@pytest.mark.parametrize("room", [2**20, 5000, 0])
def test_what_is_known_of_the_dense_model_gives_the_same_bits_without_its_layers(model, room) -> None:
    known, texts, ran = DenseStates(room), [token_set(random_ids(4, 20, seed=seed)) for seed in range(2)], []
    batches = []
    for other in (tiny_llama(2), tiny_llama(3)):
        for text in texts:
            with model.model.layers[0].mlp.register_forward_hook(lambda *_: ran.append(1)):
                found = fidelity(model, other, text, 16, batch_size=2, known=known)
            assert found == fidelity(model, other, text, 16, batch_size=2)
        batches.append(len(ran))
    assert batches == [8, 8 + {2**20: 0, 5000: 7, 0: 8}[room]]


def test_padding_is_neither_scored_nor_seen(model) -> None:
    ids = random_ids(3, 20)
    plain = perplexity(model, token_set(ids))
    rubbish = random_ids(3, 7, seed=1)
    mask = torch.ones(3, 20, dtype=torch.bool)
    for padded, kept in (
        (torch.cat((ids, rubbish), 1), functional.pad(mask, (0, 7))),
        (torch.cat((rubbish, ids), 1), functional.pad(mask, (7, 0))),
    ):
        found = perplexity(model, token_set(padded, kept))
        assert (found.tokens, found.loss) == (plain.tokens, pytest.approx(plain.loss, rel=1e-6))


def test_every_window_starts_with_the_beginning_of_text(model) -> None:
    row = torch.cat((torch.tensor([0]), random_ids(1, 30)[0]))
    found = perplexity(model, token_set(row[None], bos=0), window=16, stride=16)
    # The second window has room for one token of context behind the leading one.
    first, second = losses(model, row[:17]), losses(model, torch.cat((row[:1], row[15:31])))
    assert found.tokens == 30
    assert found.loss == pytest.approx(float(torch.cat((first, second[2:])).mean()), rel=1e-5)


def test_the_head_sees_no_position_that_an_earlier_window_scored(model, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, tokens = [], token_set(random_ids(1, 51))
    with model.lm_head.register_forward_hook(lambda _, given, __: seen.append(given[0].shape[1])):
        few = perplexity(model, tokens, 16, 5, batch_size=1)
        assert seen == [16, *[5] * 6, 4]
        monkeypatch.setattr(losses_of, "last_logits", lambda *_: {})  # code that cannot be told
        assert perplexity(model, tokens, 16, 5, batch_size=1).sums == pytest.approx(few.sums, rel=1e-6)
        assert seen[8:] == [16] * 8


@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_the_last_logits_of_every_family_are_those_of_all(name) -> None:
    family, batch, seen = build(name), token_set(IDS), []
    with torch.no_grad(), family.get_output_embeddings().register_forward_hook(
            lambda _, given, __: seen.append(given[0].shape[-2])):
        torch.testing.assert_close(batch_logits(family, batch, 3), batch_logits(family, batch)[:, -3:])
    assert seen == [3, IDS.shape[1]]


def test_long_batches_are_cut_where_logits_are_large(model, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = token_set(random_ids(4, 40))
    whole = perplexity(model, tokens).loss
    monkeypatch.setattr(measured, "SLICE", 7 * WORDS)
    assert perplexity(model, tokens).loss == pytest.approx(whole, rel=1e-6)


def test_the_mode_is_as_before(model) -> None:
    fresh = tiny_llama(1, attention_dropout=0.5)
    tokens = token_set(random_ids(2, 20))
    expected = perplexity(fresh, tokens)
    assert perplexity(fresh.train(), tokens) == expected
    assert fresh.training


@pytest.mark.parametrize(("window", "stride", "message"), [
    (1, 1, "window 1, expected 2 to 64"), (65, 1, "window 65, expected 2 to 64"), (16, 17, "stride 17"),
    (16, 0, "stride 0"),
])
def test_windows_the_model_cannot_use(model, window: int, stride: int, message: str) -> None:
    with pytest.raises(KDPruneError, match=message):
        perplexity(model, token_set(random_ids(1, 20)), window, stride)


def test_nothing_to_score(model) -> None:
    with pytest.raises(KDPruneError, match="no token to score"):
        perplexity(model, token_set(random_ids(3, 1)))


def test_losses_that_are_not_finite() -> None:
    broken = tiny_llama(1)
    with torch.no_grad():
        broken.lm_head.weight[5] = math.nan
    with pytest.raises(KDPruneError, match="got a loss of nan in batch 0 of test"):
        perplexity(broken, token_set(random_ids(1, 20)))
    with torch.no_grad():
        broken.lm_head.weight.normal_(generator=torch.Generator().manual_seed(0)).mul_(1e5)
    with pytest.raises(KDPruneError, match="too large for a perplexity"):
        perplexity(broken, token_set(random_ids(1, 20)))


# ------------------------------------------------------------------------------------------ speed and cache


def test_speed_defaults_fit_a_short_context(model) -> None:
    found = compare_speed(model, tiny_llama(1), repeats=1)
    assert found.prompt + found.new_tokens <= CONTEXT
    assert (found.batch, found.device) == (1, "cpu")
    for pace in (found.dense, found.pruned):
        assert 0 < pace.decode < math.inf
        assert 0 < pace.prefill < math.inf


def test_fewer_layers_are_faster() -> None:
    found = compare_speed(tiny_llama(12), tiny_llama(1), prompt=32, new_tokens=8, repeats=3)
    assert found.pruned.decode > 1.5 * found.dense.decode
    assert found.pruned.prefill > 1.5 * found.dense.prefill


@pytest.mark.parametrize(("options", "message"), [
    ({"batch": 0}, "batch 0"), ({"prompt": 0}, "prompt 0"), ({"new_tokens": 0}, "new_tokens 0"),
    ({"repeats": 0}, "repeats 0"), ({"prompt": 60, "new_tokens": 5}, "60 [+] 5 tokens, expected at most 64"),
    ({"prompt": 64}, "64 [+] 1 tokens"),
])
def test_speed_counts(model, options: dict, message: str) -> None:
    with pytest.raises(KDPruneError, match=message):
        speed(model, **options)


@pytest.mark.parametrize("name", WIRINGS)
def test_cache_size_follows_from_the_config(name: str, tiny_model) -> None:
    model = tiny_model(name)
    heads = getattr(model.config, "num_key_value_heads", None) or model.config.num_attention_heads
    expected = 2 * LAYERS * heads * 8 * 4  # keys and values; heads of width 8; float32
    assert kv_cache_bytes_per_token(model) == expected
    assert kv_cache_bytes_per_token(model.bfloat16()) == expected // 2


# ------------------------------------------------------------------------------------------ samples


def test_samples_are_what_generate_gives(model, bench: Bench) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bench.model)
    prompt = "The house stands"
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    for _ in range(6):
        ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), 1)
    new = ids[0, len(tokenizer(prompt)["input_ids"]):]
    assert tokenizer.eos_token_id not in new
    [found] = compare_samples(model, tiny_llama(1), tokenizer, [prompt], new_tokens=6)
    assert found.dense == tokenizer.decode(new)
    assert found.pruned != found.dense
    assert found.prompt == prompt


def test_a_continuation_takes_what_the_context_leaves(model, bench: Bench) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bench.model)
    ids = load_stream(bench.heldout, tokenizer).ids[0]
    assert continuation(model, tokenizer, tokenizer.decode(ids[:30]))
    for prompt, options in (("", {}), (tokenizer.decode(ids[:200]), {}), ("A", {"new_tokens": CONTEXT})):
        with pytest.raises(KDPruneError, match=r"change the prompt") as caught:
            continuation(model, tokenizer, prompt, **options)
        assert "\n" not in str(caught.value)
