"""The dense model in 8 or 4 bits: near enough to collect states from, and nothing that is pruned comes from it.

Needs bitsandbytes (pip install kdprune[quantised]); skipped where it is missing.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import EARLIER, build
from methods import quick
from test_forms import gemma, llava
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import kdprune
from kdprune.errors import KDPruneError
from kdprune.model import quantised
from kdprune.model.activations import layer_states
from kdprune.model.families import decoder_layers
from kdprune.model.quantised import LOAD_IN, check_load_in, load_quantised
from kdprune.model.surgery import apply_edits
from kdprune.runtime.run import Run
from kdprune.testing import CALIBRATION

pytestmark = pytest.mark.usefixtures("one_thread")
HERE = ("8bit", "4bit")
# Root-mean-square error of a decoded weight matrix, relative to it: steps of max/127, and NF4's of 64 normal values.
WEIGHT_ERROR = {8: 0.02, 4: 0.11}


def needs(load_in: str) -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose linear maps have 64 inputs, but for one with 96, which 4 bits leave whole."""
    config = AutoConfig.for_model(
        "llama", hidden_size=64, intermediate_size=96, num_hidden_layers=5, num_attention_heads=4, vocab_size=64,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.1)
    folder = tmp_path_factory.mktemp("wide")
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("make", [gemma, llava])
def test_of_a_multimodal_model_the_layers_of_its_text_part(make: Callable[[], Any], tmp_path: Path) -> None:
    needs("8bit")
    make().save_pretrained(tmp_path)
    found = load_quantised(tmp_path, 8, device="cpu")
    linear = {name: type(module) for name, module in found.named_modules() if isinstance(module, nn.Linear)}
    assert linear.pop("lm_head") is nn.Linear
    assert linear
    assert nn.Linear not in linear.values()


def decoded(module: Any) -> torch.Tensor:
    """The weight that a quantised linear map stands for: its answers to unit vectors."""
    inputs = torch.eye(module.in_features)
    with torch.no_grad():
        output = module(inputs[None])[0] - (0 if module.bias is None else module.bias)
    return output.T.float()


def quantised_share(model: nn.Module) -> float:
    """Share of the decoder layers' parameters that are held in fewer bits than they stand for."""
    whole = held = 0
    for module in decoder_layers(model).modules():
        for parameter in module.parameters(recurse=False):
            state = getattr(parameter, "quant_state", None)
            size = parameter.numel() if state is None else int(torch.Size(state.shape).numel())
            low = type(parameter.data) is not torch.Tensor or not parameter.is_floating_point()
            whole, held = whole + size, held + size * low
    return held / whole


@pytest.mark.parametrize("load_in", HERE)
def test_weights_stand_for_those_of_the_checkpoint(load_in: str, wide: Path) -> None:
    needs(load_in)
    bits = LOAD_IN[load_in]
    plain = AutoModelForCausalLM.from_pretrained(wide)
    model = load_quantised(wide, bits)
    assert type(model) is type(plain)
    found, kept = {}, set()
    for (name, expected), (_, module) in zip(
            decoder_layers(plain).named_modules(), decoder_layers(model).named_modules(), strict=True):
        if isinstance(expected, nn.Linear):
            error = float((decoded(module) - expected.weight).detach().norm() / expected.weight.detach().norm())
            if error:
                found[name] = error
            else:
                kept.add(name)
    assert kept == ({f"{layer}.mlp.down_proj" for layer in range(5)} if bits == 4 else set())
    assert max(found.values()) < WEIGHT_ERROR[bits]
    assert 0.6 < quantised_share(model) < (0.8 if bits == 4 else 1)
    assert torch.equal(model.lm_head.weight, plain.lm_head.weight)
    assert torch.equal(model.model.norm.weight, plain.model.norm.weight)


@pytest.mark.parametrize("name", EARLIER)
def test_states_of_every_family(name: str, tmp_path: Path) -> None:
    needs("8bit")
    plain = build(name)
    plain.save_pretrained(tmp_path)
    model, tokens = load_quantised(tmp_path, 8), CALIBRATION
    for (batch, expected), (_, found) in zip(
            layer_states(plain, tokens, [0, 6], 16), layer_states(model, tokens, [0, 6], 16), strict=True):
        assert torch.equal(expected[0], found[0])
        error = (expected[6] - found[6])[batch.mask].norm() / expected[6][batch.mask].norm()
        assert 0 < error < 0.1


@pytest.mark.parametrize("load_in", HERE)
@pytest.mark.parametrize("form", ["kdp", "shortgpt", "linear", "linearpatch", "streamline", "replaceme-closed"])
def test_what_stays_is_of_full_precision(form: str, load_in: str, wide: Path) -> None:
    needs(load_in)
    model, collector = AutoModelForCausalLM.from_pretrained(wide).eval(), load_quantised(wide, LOAD_IN[load_in])
    pruned = []
    for states in (model, collector):
        method = quick(form)
        pruned.append(apply_edits(model, method(model, CALIBRATION, Run(states_model=states)).edits))
    own = {id(parameter) for parameter in model.parameters()}
    kept = [parameter for parameter in pruned[1].parameters() if id(parameter) in own]
    assert len(kept) > len(own) / 3
    assert all(parameter.dtype == torch.float32 for parameter in pruned[1].parameters())
    assert not any("kdp_source" in vars(parameter) for parameter in kept)
    assert pruned[0].num_parameters() == pruned[1].num_parameters()


def test_one_call(bench: Any) -> None:
    needs("8bit")
    options = {**bench.options, "ranking": "damage"}
    plain, collected = (kdprune.prune(bench.model, load_in=load_in, **options) for load_in in (None, "8bit"))
    assert collected.results.recipe["load_in"] == "8bit"
    assert collected.results.perplexity.dense == plain.results.perplexity.dense
    assert collected.results.perplexity.pruned == pytest.approx(plain.results.perplexity.pruned, rel=0.1)
    assert collected.results.perplexity.pruned != plain.results.perplexity.pruned


def test_units_of_a_comparison_are_those_of_the_copy_that_was_asked_for(bench: Any, tmp_path: Path) -> None:
    needs("8bit")
    options = {"calibration": bench.calibration, "heldout": bench.heldout, "samples": 12, "length": 32, "seeds": 1}
    small, whole, alone = (
        kdprune.compare(bench.model, ["linear", "sleb"], output_dir=tmp_path / folder, load_in=load_in, **options)
        for folder, load_in in (("one", "8bit"), ("one", None), ("two", None)))
    assert [failure.variant for failure in small.failures] == ["sleb"]
    assert "expected it whole" in small.failures[0].reason
    assert small.units[0].perplexity != whole.units[0].perplexity == alone.units[0].perplexity


def test_says_what_it_cannot(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KDPruneError, match=r"got load_in .3bit., expected one of 8bit, 4bit$"):
        check_load_in("3bit", wide)
    with pytest.raises(KDPruneError, match="got a loaded model to load in fewer bits"):
        load_quantised(build("llama3"), 8)
    with pytest.raises(KDPruneError, match="got 3 bits, expected 8 or 4"):
        load_quantised(wide, 3)
    monkeypatch.setattr(quantised.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(KDPruneError, match="8-bit states need bitsandbytes, which is not installed: pip install"):
        check_load_in("8bit", wide)


def test_four_bits_need_groups_of_64_inputs(tmp_path: Path) -> None:
    needs("4bit")
    build("llama3").save_pretrained(tmp_path)
    with pytest.raises(KDPruneError, match="in 4 bits; expected linear maps with a multiple of 64"):
        load_quantised(tmp_path, 4)


@pytest.mark.gpu
@pytest.mark.parametrize("load_in", LOAD_IN)
def test_on_an_accelerator(load_in: str, wide: Path) -> None:
    """The quantised copy on the device, the full-precision model on the host."""
    needs(load_in)
    model, collector = AutoModelForCausalLM.from_pretrained(wide), load_quantised(wide, LOAD_IN[load_in], "cuda")
    tokens = CALIBRATION
    pruned = apply_edits(model, quick("kdp")(model, tokens, Run(states_model=collector)).edits)
    assert {parameter.device.type for parameter in pruned.parameters()} == {"cpu"}
