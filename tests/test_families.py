"""Families without a row of the table, and what single rows say: layers by number, joined heads, experts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import EXPERTS, LAYERS, build
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import kdprune
from kdprune.cli.families_page import markdown
from kdprune.errors import KDPruneError
from kdprune.evaluation.flops import forward_flops
from kdprune.methods import METHODS
from kdprune.methods.peers.drop import SLEB, ShortGPT
from kdprune.methods.peers.linear import Linear
from kdprune.methods.peers.llm_pruner import LLMPruner
from kdprune.model.activations import behind_norm, layer_states
from kdprune.model.families import decoder_layers, family_of, inactive_parameters
from kdprune.model.streaming import load_streamed
from kdprune.model.surgery import Drop, apply_edits, ordinary_layer
from kdprune.planning.plan import plan
from kdprune.testing import (
    CALIBRATION,
    IDS,
    close,
    edits_of,
    logits_of,
    run_method,
    saved_and_loaded,
    with_random_weights,
)
from kdprune.testing.reference import reference_logits

pytestmark = pytest.mark.usefixtures("one_thread")
_SMALL: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64,
    "intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}


_LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
           "linear_value_head_dim": 8, "head_dim": 8}
_LLAMA4 = {"num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 48, "head_dim": 8}
_ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "moe_intermediate_size": 16}


def unknown(model_type: str, **options: Any) -> PreTrainedModel:
    """A model of a family that the table lacks."""
    config = AutoConfig.for_model(model_type, **{**_SMALL, **options})
    return with_random_weights(AutoModelForCausalLM.from_config(config))


def test_the_page_of_families_is_current() -> None:
    page = Path(__file__).parents[1] / "docs" / "families.md"
    assert page.read_text(encoding="utf-8") == markdown()


# ------------------------------------------------------------------------------------------ no row


@pytest.mark.parametrize(("model_type", "options"), [
    ("cohere", {}),  # parallel sublayers
    ("codegen", {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, "rotary_dim": 4}),  # tuples
    ("gpt_oss", {"num_local_experts": 4, "head_dim": 8, "sliding_window": 4}),  # windows on every other layer
    ("qwen3_5_text", {**_LINEAR, "num_hidden_layers": 8}),  # linear attention and attention, by config.layer_types
    ("gpt_neo", {"num_layers": 4, "num_heads": 4, "attention_types": [[["global"], 4]]}),  # numbers called layer_id
    ("mamba", {"state_size": 4}),  # states instead of keys and values; layer_types follow from the count
])
@pytest.mark.parametrize("method", [ShortGPT, SLEB])
def test_layers_of_an_unknown_family_are_dropped(
    model_type: str, options: dict[str, Any], method: type, tmp_path: Path
) -> None:
    model = unknown(model_type, **options)
    assert family_of(model).inferred
    edits = run_method(method(ratio=0.2), model).edits
    pruned = apply_edits(model, edits)
    assert torch.equal(logits_of(pruned), reference_logits(model, edits))
    ids, options = CALIBRATION.ids[:1], {"max_new_tokens": 4, "do_sample": False, "eos_token_id": -1}
    written = [pruned.generate(ids, use_cache=cached, **options) for cached in (True, False)]
    assert torch.equal(*written)
    assert type(saved_and_loaded(pruned, tmp_path)) is type(model)


@pytest.mark.parametrize("model_type", ["cohere", "gpt_oss"])
def test_the_final_norm_of_an_unknown_family_is_found(model_type: str) -> None:
    model = unknown(model_type, **({} if model_type == "cohere" else {"num_local_experts": 4, "head_dim": 8}))
    tokens = CALIBRATION.select(slice(9, 12))
    with torch.no_grad():
        hidden = model(input_ids=tokens.ids, attention_mask=tokens.mask.long(), output_hidden_states=True).hidden_states
    [(batch, states)] = layer_states(model, tokens, [4], 3)
    found = behind_norm(model, batch, states[4])
    torch.testing.assert_close(found[tokens.mask], hidden[-1][tokens.mask])
    assert not torch.allclose(found, states[4], atol=1e-2)


def test_an_unknown_family_is_pruned_from_a_checkpoint_and_refused_in_one_line_otherwise(tmp_path: Path) -> None:
    unknown("cohere").save_pretrained(tmp_path / "model")
    rows = CALIBRATION.ids % 60 + 1
    given: dict[str, Any] = {"calibration": rows, "heldout": rows[:4], "ratio": 0.2}
    with pytest.raises(KDPruneError, match=r"unknown model family 'cohere'.*shortgpt.*docs/add-a-family\.md") as error:
        kdprune.prune(tmp_path / "model", method="linear", **given)
    assert "\n" not in str(error.value)
    with pytest.raises(KDPruneError, match=r"a cohere model, whose family has no row .* give it more memory"):
        load_streamed(tmp_path / "model", device="cpu")
    result = kdprune.prune(tmp_path / "model", method="shortgpt", **given)
    result.save(tmp_path / "pruned")
    assert json.loads((tmp_path / "pruned" / "config.json").read_text(encoding="utf-8"))["model_type"] == "cohere"
    with pytest.raises(KDPruneError, match="unknown model family 'cohere'"):
        plan(tmp_path / "model" / "config.json")


@pytest.mark.parametrize(("model_type", "options"), [
    ("glm4_moe", {"first_k_dense_replace": 1, **_ROUTED}),
    ("deepseek_v3", {"first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
                     "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4, "n_group": 2, "topk_group": 1,
                     **_ROUTED}),
    ("llama4_text", {**_LLAMA4, "interleave_moe_layer_step": 2}),
    ("llama4_text", {**_LLAMA4, "interleave_moe_layer_step": 1}),  # a list of who has experts, by number
    ("diffllama", {"head_dim": 8}),  # a constant of every layer's attention
    ("jamba", {"num_experts": 2, "num_experts_per_tok": 1, "attn_layer_period": 2, "attn_layer_offset": 1,
               "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 4}),
])
def test_layers_that_differ_by_number_are_not_dropped_unknown(model_type: str, options: dict[str, Any]) -> None:
    model = unknown(model_type, **options)
    with pytest.raises(KDPruneError, match=f"unknown model family '{model_type}', whose layers differ") as error:
        ShortGPT(ratio=0.2).check(model, CALIBRATION)
    assert "\n" not in str(error.value)


def test_a_model_of_the_code_beside_a_checkpoint_is_refused() -> None:
    """Its layers are of other classes than those that edits look for."""
    model = build("llama3")
    model.config.__class__ = type("Remote", (type(model.config),), {"model_type": "kdp_llama"})
    with pytest.raises(KDPruneError, match=r"of the code beside its checkpoint, .*after `import kdprune`"):
        family_of(model)


def test_a_model_whose_layers_may_be_dropped_may_not_be_pruned_otherwise() -> None:
    """One model in turn, as a comparison has it: what is found for one method holds for that alone."""
    model = unknown("cohere")
    for _ in range(2):
        ShortGPT(ratio=0.2).check(model, CALIBRATION)
        with pytest.raises(KDPruneError, match="unknown model family 'cohere'"):
            METHODS["kdp"](ratio=0.2).check(model, CALIBRATION)
        with pytest.raises(KDPruneError, match="unknown model family 'cohere'"):
            METHODS["linear"](ratio=0.2).check(model, CALIBRATION)


@pytest.mark.parametrize("model_type", ["qwen3_5_text", "gpt_oss", "mamba", "mpt"])
def test_an_unknown_family_is_planned_in_one_line_and_pruned_whole(model_type: str, tmp_path: Path) -> None:
    """What its layers cannot do without running is not asked of an outline; its state or cache is measured."""
    options: dict[str, dict[str, Any]] = {
        "qwen3_5_text": {**_LINEAR, "num_hidden_layers": 8},
        "gpt_oss": {"num_local_experts": 4, "head_dim": 8, "sliding_window": 4},
        "mamba": {"state_size": 4},
        "mpt": {"d_model": 32, "n_layers": 4, "n_heads": 4, "max_seq_len": 64, "expansion_ratio": 2}}
    model = unknown(model_type, **options[model_type])
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(KDPruneError, match=f"unknown model family '{model_type}'.*families_page") as error:
        plan(tmp_path / "model")
    assert "\n" not in str(error.value)
    rows = CALIBRATION.ids % 60 + 1
    result = kdprune.prune(
        tmp_path / "model", tmp_path / "pruned", method="shortgpt", calibration=rows, heldout=rows[:4], ratio=0.2,
        work_dir="none")
    assert result.results.layers.pruned == len(decoder_layers(result.model))
    assert result.results.layers.pruned < result.results.layers.dense
    cache = result.metrics["kv_cache_bytes_per_token"]
    assert (cache["dense"] == 0) == (model_type == "mamba")
    assert result.results.speed is not None


def test_what_fails_inside_an_unknown_architecture_is_said_in_one_line() -> None:
    """Qwen3.5 without a layer of full attention counts no cache, and transformers raises a ValueError."""
    model, rows = unknown("qwen3_5_text", **_LINEAR), CALIBRATION.ids % 60 + 1
    with pytest.raises(KDPruneError, match="family 'qwen3_5_text', whose code says: `get_seq_length`") as error:
        kdprune.prune(model, method="shortgpt", blocks=((3, 4),), calibration=rows, heldout=rows[:4], work_dir="none")
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------ layers by number


def test_lists_of_the_config_follow_the_layers(tmp_path: Path) -> None:
    smollm = apply_edits(build("smollm3"), [Drop(range(1, 3))])
    assert smollm.config.no_rope_layers == [1, 0, 1, 1]
    experts = apply_edits(build("qwen3_moe"), [Drop(range(1, 3))])
    assert experts.config.mlp_only_layers == [1, 3]
    saved_and_loaded(smollm, tmp_path)
    model = build("qwen3_moe")
    model.config.decoder_sparse_step = 2
    with pytest.raises(KDPruneError, match=r"config\.decoder_sparse_step makes every layer depend on its number"):
        apply_edits(model, [Drop(range(1))])


# ------------------------------------------------------------------------------------------ heads and experts


def falcon_with_slopes() -> PreTrainedModel:
    """Falcon-RW: ALiBi, sequential sublayers."""
    model = build("falcon-sequential")
    config = type(model.config)(**{**model.config.to_dict(), "alibi": True})
    return with_random_weights(AutoModelForCausalLM.from_config(config))


def test_heads_with_slopes_or_joined_by_a_norm_go_together(tmp_path: Path) -> None:
    for model in (build("olmo2"), build("bloom"), build("stablelm-parallel"), falcon_with_slopes()):
        with pytest.raises(KDPruneError, match="whose heads are joined"):
            ordinary_layer(model, 1, groups=1)
    falcon = falcon_with_slopes()
    edits = edits_of(falcon, "mixed")
    pruned = apply_edits(falcon, edits)
    close(logits_of(pruned), reference_logits(falcon, edits))
    saved_and_loaded(pruned, tmp_path)
    [*_, edit] = run_method(LLMPruner(ratio=0.2, keep_first=1, keep_last=1), falcon).edits
    assert edit.width["groups"] == 4  # type: ignore[union-attr]


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_count_where_they_are_active(name: str, tmp_path: Path) -> None:
    model = build(name)
    experts = [layer.mlp.experts for layer in decoder_layers(model) if hasattr(layer.mlp, "experts")]
    each = sum(p.numel() for p in experts[0].parameters()) // 4
    assert inactive_parameters(model) == len(experts) * each * 2  # two of four
    model.config.save_pretrained(tmp_path)
    found = plan(tmp_path, kernel="linear", context="none", ratio=0.2, samples=8, length=16, dtype="float32")
    assert found.dense.parameters == model.num_parameters()
    assert found.dense.active == model.num_parameters() - inactive_parameters(model)
    pruned = apply_edits(model, run_method(Linear(ratio=0.2, protect=0.0), model).edits)
    assert found.pruned.layers == pruned.config.num_hidden_layers < LAYERS
    with pytest.raises(KDPruneError, match=r"mixtures of experts.*kernel linear"):
        plan(tmp_path)


@pytest.mark.parametrize("name", EXPERTS)
def test_operations_of_experts(name: str) -> None:
    """Against torch's count of what runs: every token goes through two experts."""
    from torch.utils.flop_counter import FlopCounterMode

    model = build(name)
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(IDS, use_cache=False)
    assert forward_flops(model, *IDS.shape, logits=IDS.shape[1]) == counter.get_total_flops()
