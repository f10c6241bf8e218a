"""Answers that share the reading of their context, against lm-eval's own passes over context and answer."""

from typing import Any

import pytest
import torch
from families import CONFIGS, build
from pruned import prune
from test_generation import tiny_mamba
from transformers import AutoTokenizer, PreTrainedModel

from kdprune.evaluation.task_loading import silenced

harness = pytest.importorskip("lm_eval.models.huggingface")
from kdprune.evaluation.shared_contexts import Request, SharedContexts  # noqa: E402 - it needs lm-eval

pytestmark = pytest.mark.usefixtures("one_thread")
LONGEST = 24  # tokens that the models are said to have room for


@pytest.fixture(scope="module")
def tokenizer(bundled: PreTrainedModel) -> Any:
    return AutoTokenizer.from_pretrained(bundled.name_or_path)


def asked() -> list[Request]:
    """Contexts of 1, 6 and 9 tokens with up to five answers of up to four, one twice, in no order; one too long."""
    draw = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(1, 60, (count,), generator=draw).tolist()

    pairs = [(context, tokens(count))
             for context, counts in ((tokens(6), (1, 4, 2)), (tokens(9), (3,)), (tokens(1), (2, 1, 4, 3, 4)),
                                     (tokens(6), (1, 1)), (tokens(LONGEST), (3, 2)))
             for count in counts]
    pairs += [pairs[1]]
    return [(None, *pairs[place]) for place in torch.randperm(len(pairs), generator=draw).tolist()]


def both(model: PreTrainedModel, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any, list[int], int]:
    """Ours, lm-eval's, the requests that ours left to lm-eval, by length, and the tokens that ours had read."""
    with silenced():
        wrapped = SharedContexts(pretrained=model, tokenizer=tokenizer, batch_size=3, max_length=LONGEST)
    theirs_of, left, read = harness.HFLM._loglikelihood_tokens, [], []

    def told(self: Any, requests: list[Request], *rest: Any) -> Any:
        left.extend(len(context) + len(answer) for _, context, answer in requests)
        return theirs_of(self, requests, *rest)

    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"].numel()) if "input_ids" in kwargs else None,
        with_kwargs=True)
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(harness.HFLM, "_loglikelihood_tokens", told)
        ours = wrapped._loglikelihood_tokens(asked(), disable_tqdm=True)
    hook.remove()
    return ours, theirs_of(wrapped, asked(), disable_tqdm=True), left, sum(read)


def same(ours: list[tuple[float, bool]], theirs: list[tuple[float, bool]]) -> None:
    assert [score for score, _ in ours] == pytest.approx([score for score, _ in theirs], rel=2e-5, abs=2e-5)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


@pytest.mark.parametrize("name", CONFIGS)
def test_scores_are_lm_evals(name: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for model in (build(name), prune(build(name), "mixed")):
        ours, theirs, left, read = both(model, tokenizer, monkeypatch)
        same(ours, theirs)
        assert sorted(left) == [LONGEST + 2, LONGEST + 3]
        # a look at the cache; contexts; answers but for their last tokens, in batches of three padded to the longest
        assert read == 1 + (9 + 2 * 6 + 1) + 2 + 2 * 3 + (3 * 3 + 1)


def test_a_state_space_model_reads_as_lm_eval_does(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs, left, read = both(tiny_mamba(), tokenizer, monkeypatch)
    same(ours, theirs)
    assert (len(left), read) == (len(asked()), 1)
