"""What a pruned model must do, whoever made it: the tests that every kind of pruned model inherits."""

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from families import LAYERS
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, StaticCache

from kdprune.model.families import decoder_layers

IDS = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(5))  # longer than the sliding windows


@dataclass
class Case:
    """One model under the contract; tests leave it as it is. ``make`` prunes a fresh dense model in the same way."""

    name: str
    kind: str
    dense: PreTrainedModel
    before: Tensor  # logits of the dense model before it was pruned
    model: PreTrainedModel
    logits: Tensor
    make: Callable[[], PreTrainedModel]


def logits(model: PreTrainedModel, **kwargs: object) -> Tensor:
    with torch.no_grad():
        return model(**{"input_ids": IDS, **kwargs}).logits


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def padded(pad: int) -> dict[str, Tensor]:
    """The first sequence with ``pad`` tokens of padding on the left, beside the second without."""
    ids = torch.full((2, 12 + pad), 0)
    mask = torch.zeros_like(ids)
    ids[0, pad:], mask[0, pad:] = IDS[0], 1
    ids[1], mask[1] = IDS[1].repeat(2)[: 12 + pad], 1
    return {"input_ids": ids, "attention_mask": mask}


class Contract:
    """Subclasses in a test file are collected with the file's own ``case`` fixture."""

    def test_it_is_finite_and_its_depth_is_in_step(self, case: Case) -> None:
        assert torch.isfinite(case.logits).all()
        assert not torch.equal(case.logits, case.before)
        assert len(decoder_layers(case.model)) == case.model.config.num_hidden_layers
        types = getattr(case.model.config, "layer_types", None)
        assert types is None or len(types) == case.model.config.num_hidden_layers

    def test_the_dense_model_is_as_it_was(self, case: Case) -> None:
        assert torch.equal(logits(case.dense), case.before)
        assert len(decoder_layers(case.dense)) == case.dense.config.num_hidden_layers == LAYERS
        assert "kdp" not in case.dense.config.to_dict()

    def test_prefill_in_two_chunks(self, case: Case) -> None:
        with torch.no_grad():
            first = case.model(IDS[:, :7], use_cache=True)
            second = case.model(IDS[:, 7:], past_key_values=first.past_key_values, use_cache=True)
        close(torch.cat([first.logits, second.logits], dim=1), case.logits)

    def test_static_cache(self, case: Case) -> None:
        cache = StaticCache(config=case.model.config, max_cache_len=16)
        found = [logits(case.model, input_ids=part, past_key_values=cache, use_cache=True)
                 for part in (IDS[:, :9], IDS[:, 9:10], IDS[:, 10:11], IDS[:, 11:])]  # fmt: skip
        close(torch.cat(found, dim=1), case.logits)

    def test_left_padding(self, case: Case) -> None:
        batch = padded(5)
        positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        close(logits(case.model, **batch, position_ids=positions)[0, 5:], case.logits[0])

    def test_hidden_states_have_one_more_entry_than_layers(self, case: Case) -> None:
        with torch.no_grad():
            output = case.model(IDS, output_hidden_states=True)
        assert len(output.hidden_states) == case.model.config.num_hidden_layers + 1

    def test_generation_with_and_without_cache(self, case: Case) -> None:
        options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
        cached, uncached = (case.model.generate(**padded(3), **options, use_cache=use) for use in (True, False))
        assert torch.equal(cached, uncached)

    def test_copies_and_pickles_compute_the_same(self, case: Case) -> None:
        assert torch.equal(logits(copy.deepcopy(case.model)), case.logits)
        fresh = case.make()  # no model pickles once transformers has hooked its hidden states
        assert torch.equal(logits(pickle.loads(pickle.dumps(fresh))), case.logits)

    @pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")  # newer releases
    def test_backward_through_gradient_checkpointing(self, case: Case) -> None:
        def gradients(checkpointing: bool) -> dict[str, Tensor]:
            model = copy.deepcopy(case.model).train()
            if checkpointing:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model(IDS, labels=IDS, use_cache=False).loss.backward()
            return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

        plain, checkpointed = gradients(False), gradients(True)
        assert plain
        assert plain.keys() == checkpointed.keys()
        for name, gradient in plain.items():
            close(checkpointed[name], gradient)

    def test_plain_saving_and_loading(self, case: Case, tmp_path: Path) -> None:
        case.model.save_pretrained(tmp_path)
        loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert type(loaded) is type(case.model)
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert torch.equal(logits(loaded), case.logits)
        assert getattr(loaded.config, "kdp", None) == getattr(case.model.config, "kdp", None)
