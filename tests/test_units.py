"""Sizes that methods choose are multiples that kernels of quantised weights take: results in 8 and 4 bits.

Needs bitsandbytes and torchao (pip install bitsandbytes torchao); skipped where they are missing.
"""

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from test_methods import random_tokens
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from kdprune.methods import METHODS
from kdprune.methods.common.units import unit_of, whole_units
from kdprune.methods.peers.slicegpt import SliceGPT
from kdprune.methods.peers.slicing import StreamSize
from kdprune.model.checkpoint import save_model
from kdprune.model.families import decoder_layers
from kdprune.model.surgery import apply_edits
from kdprune.runtime.run import Run
from kdprune.testing import with_random_weights

pytestmark = pytest.mark.usefixtures("one_thread")
BITS = ("8bit", "4bit", "torchao")
IDS = torch.arange(3, 40)[None]
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "kdp": ("kdp", {"refine": False, "blocks": ((1, 3),)}),
    "kdp-learned": ("kdp", {"preset": "fourier", "refine": False, "blocks": ((1, 3),), "kernel_epochs": 1,
                            "kernel_tokens": 64}),
    "kdp-layer": ("kdp", {"form": "layer", "refine": False, "blocks": ((1, 3),), "ratio": 0.3}),
    "llm-pruner": ("llm-pruner", {"sequences": 2, "slice_length": 8}),
    "slicegpt": ("slicegpt", {"sparsity": 0.3}),
}


def llama(width: int, layers: int = 4) -> PreTrainedModel:
    """Twice as many channels as it is wide, heads of a quarter of that."""
    return with_random_weights(LlamaForCausalLM(LlamaConfig(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=4, vocab_size=64, max_position_embeddings=64, pad_token_id=0, tie_word_embeddings=False)),
        0, width**-0.5)


def pruned(form: str, dense: PreTrainedModel) -> PreTrainedModel:
    name, options = FORMS[form]
    method = METHODS[name](**{"ratio": 0.2, **options})
    return apply_edits(dense, method(dense, random_tokens(), Run(batch_size=4)).edits)


@pytest.fixture(scope="module", params=[128, pytest.param(512, marks=pytest.mark.slow)])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, Path]]:
    """A width, and what each form makes of a model so wide, saved."""
    dense, folders = llama(request.param), {form: tmp_path_factory.mktemp(form) for form in ("dense", *FORMS)}
    for form, folder in folders.items():
        save_model(dense if form == "dense" else pruned(form, dense), folder)
    return request.param, folders


def sizes(model: PreTrainedModel) -> set[int]:
    """Inputs and outputs of all linear maps of the layers."""
    return {size for module in decoder_layers(model).modules() if isinstance(module, nn.Linear)
            for size in (module.in_features, module.out_features)}


def test_the_unit_follows_from_the_width_and_divides_what_is_cut() -> None:
    assert [unit_of(width) for width in (4096, 576, 512, 128, 64, 32, 1)] == [64, 64, 64, 16, 16, 1, 1]
    assert [unit_of(4096, whole) for whole in (11008, 1536, 100, 33)] == [64, 64, 4, 1]
    assert [whole_units(size, 64) for size in (1000, 128, 3)] == [960, 128, 64]


@pytest.mark.parametrize("form", FORMS)
def test_sizes_are_multiples(form: str, results: tuple[int, dict[str, Path]]) -> None:
    width, folders = results
    found, own = (sizes(model) for model in (AutoModelForCausalLM.from_pretrained(folders[form]), llama(width)))
    assert {size % unit_of(width) for size in found} == {0}
    assert found - own  # sizes that the method chose


@pytest.mark.parametrize("width", [64, 128, 512])
def test_a_ratio_is_met_by_one_cut_of_another_width_at_most(width: int) -> None:
    model = llama(width, layers=16)
    for ratio in (0.15, 0.25, 0.4):
        widths = SliceGPT(ratio=ratio).widths(model)
        left = StreamSize.of(model).parameters(widths)
        assert 0 <= 1 - left / model.num_parameters() - ratio < 0.005
        assert sum(kept % unit_of(width) > 0 for kept in widths) <= 1
        assert sorted(widths) == widths


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_results_run_in_fewer_bits(form: str, bits: str, results: tuple[int, dict[str, Path]]) -> None:
    package = "torchao" if bits == "torchao" else "bitsandbytes"
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    width, folders = results
    if bits == "4bit" and unit_of(width) < 64 and _packs_on_use():
        pytest.skip("this processor's 4-bit kernels want multiples of 64, which smaller models do not have")
    maps, error = in_fewer_bits(folders[form], bits)
    assert 0 < error < 1.5 * in_fewer_bits(folders["dense"], bits)[1]
    if bits == "4bit" and unit_of(width) == 64:
        _check_packed(maps)


def _packs_on_use() -> bool:
    """Whether bitsandbytes packs 4-bit weights when they are used first: on processors with bfloat16 instructions."""
    from bitsandbytes.functional import has_avx512bf16

    return bool(has_avx512bf16())


def in_fewer_bits(folder: Path, bits: str) -> tuple[list[Any], float]:
    """The linear maps of a checkpoint's layers, all of them quantised, and the relative error of its logits."""
    plain = AutoModelForCausalLM.from_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=_config(bits))
        expected, found = plain(IDS).logits, model(IDS).logits.float()
    low = [module for module in decoder_layers(model).modules() if isinstance(module, nn.Linear)
           and not (type(module.weight.data) is torch.Tensor and module.weight.is_floating_point())]
    assert len(low) == sum(isinstance(module, nn.Linear) for module in decoder_layers(plain).modules())
    return low, float((found - expected).norm() / expected.norm())


def _config(bits: str) -> Any:
    if bits == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    return BitsAndBytesConfig(load_in_8bit=True) if bits == "8bit" else BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4")


def _check_packed(modules: list[Any]) -> None:
    """As the library packs 4-bit weights for a CPU with the right instructions, which this one may lack."""
    from bitsandbytes import functional

    for module in modules:
        functional._convert_weight_packed_for_cpu(module.weight.data, module.weight.quant_state)
    with pytest.raises(AssertionError, match="N must be divisible"):
        functional._convert_weight_packed_for_cpu(*functional.quantize_4bit(torch.ones(141, 64), quant_type="nf4"))
