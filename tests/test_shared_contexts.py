"""Answers that share the reading of their context, against lm-eval's own passes over context and answer."""

from typing import Any

import pytest
import torch
from families import CONFIGS, build
from pruned import prune
from test_generation import tiny_mamba
from transformers import AutoTokenizer, Phi3Config, Phi3ForCausalLM, PreTrainedModel

from kdprune.evaluation.shared_contexts import STEP, Request, SharedContexts
from kdprune.evaluation.task_loading import silenced

harness = pytest.importorskip("lm_eval.models.huggingface")

pytestmark = pytest.mark.usefixtures("one_thread")
LONGEST = 24  # tokens that the models are said to have room for


@pytest.fixture(scope="module")
def tokenizer(bundled: PreTrainedModel) -> Any:
    return AutoTokenizer.from_pretrained(bundled.name_or_path)


def asked() -> list[Request]:
    """Contexts of 1, 6, 8 and 9 tokens with up to five answers of up to four, one twice, in no order; one too long."""
    draw = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(1, 60, (count,), generator=draw).tolist()

    pairs = [(context, tokens(count))
             for context, counts in ((tokens(6), (1, 4, 2)), (tokens(9), (3, 1, 1)), (tokens(1), (2, 1, 4, 3, 4)),
                                     (tokens(6), (1, 1)), (tokens(8), (1, 2, 1)), (tokens(LONGEST), (3, 2)))
             for count in counts]
    pairs += [pairs[1]]
    return [(None, *pairs[place]) for place in torch.randperm(len(pairs), generator=draw).tolist()]


def both(model: PreTrainedModel, tokenizer: Any, requests: list[Request]) -> tuple[Any, Any, list[int], list[int]]:
    """Ours, lm-eval's, the requests that ours left to lm-eval, by length, and the tokens that ours had read a pass."""
    with silenced():
        wrapped = type("SharedHFLM", (SharedContexts, harness.HFLM), {})(
            pretrained=model, tokenizer=tokenizer, batch_size=3, max_length=LONGEST)
    theirs_of, left, read = harness.HFLM._loglikelihood_tokens, [], []

    def told(self: Any, requests: list[Request], *rest: Any) -> Any:
        left.extend(len(context) + len(answer) for _, context, answer in requests)
        return theirs_of(self, requests, *rest)

    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"].numel()) if "input_ids" in kwargs else None,
        with_kwargs=True)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(harness.HFLM, "_loglikelihood_tokens", told)
        ours = wrapped._loglikelihood_tokens(requests, disable_tqdm=True)
    hook.remove()
    return ours, theirs_of(wrapped, requests, disable_tqdm=True), sorted(left), read


def same(ours: list[tuple[float, bool]], theirs: list[tuple[float, bool]]) -> None:
    assert [score for score, _ in ours] == pytest.approx([score for score, _ in theirs], rel=2e-5, abs=2e-5)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


@pytest.mark.parametrize("name", CONFIGS)
def test_scores_are_lm_evals(name: str, tokenizer: Any) -> None:
    for model in (build(name), prune(build(name), "mixed")):
        ours, theirs, left, read = both(model, tokenizer, asked())
        same(ours, theirs)
        assert left == [LONGEST + 2, LONGEST + 3]
        # A look at the cache; by length contexts, then answers but for their last tokens, in batches of three that are
        # padded to the longest.
        assert read == [1, 9, 2, 8, 1, 2 * 6, 2 * 3, 1, 3 * 3, 1]


@pytest.mark.parametrize("name", CONFIGS)
def test_contexts_of_about_one_length_go_together(
    name: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(STEP, "cpu", 4)
    ours, theirs, left, read = both(prune(build(name), "mixed"), tokenizer, asked())
    same(ours, theirs)
    assert left == [LONGEST + 2, LONGEST + 3]
    # Eight tokens of the two of eight and nine; one more, or an answer, or both, behind them.
    assert read == [1, 2 * 8, 3 * 3, 1, 2 * 6, 2 * 3, 1, 3 * 3, 1]


def test_what_ties_is_read_once_and_a_context_that_saves_nothing_by_lm_eval(tokenizer: Any) -> None:
    model = build("llama3")
    twice: list[Request] = [(None, [5, 6, 7, 8], answer) for answer in ([9, 10], [3], [9, 10])]
    ours, theirs, left, _ = both(model, tokenizer, twice)
    same(ours, theirs)
    assert (left, ours[0]) == ([], ours[2])
    long_answers: list[Request] = [(None, [5], list(range(1, 1 + count))) for count in (20, 2, 2)]
    ours, theirs, left, _ = both(model, tokenizer, long_answers)
    same(ours, theirs)
    assert left == [3, 3, 21]


def test_rotations_that_depend_on_the_length_are_left_to_lm_eval(tokenizer: Any) -> None:
    config = Phi3Config(
        vocab_size=4096, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        pad_token_id=0, max_position_embeddings=LONGEST, original_max_position_embeddings=8, rope_parameters={
            "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ours, theirs, left, _ = both(Phi3ForCausalLM(config).eval(), tokenizer, asked())
    same(ours, theirs)
    assert left == [9, 9, 10, 10, 10, 10, 10, 12, LONGEST + 2, LONGEST + 3]


def test_a_state_space_model_reads_as_lm_eval_does(tokenizer: Any) -> None:
    ours, theirs, left, read = both(tiny_mamba(), tokenizer, asked())
    same(ours, theirs)
    assert (len(left), read) == (len(asked()), [1])


@pytest.mark.parametrize("request_", [(None, [], [5]), (None, [5], [])])
def test_what_lm_eval_refuses_it_refuses(request_: Request, tokenizer: Any) -> None:
    with pytest.raises(AssertionError):
        both(build("llama3"), tokenizer, [(None, [5, 6], [7]), request_])
