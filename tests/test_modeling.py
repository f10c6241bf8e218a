"""The stand-in's arithmetic, and the rows of the family table against the models they describe."""

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import CONFIGS, LAYERS, WIDTH, build
from pruned import prune, stand_in
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BertConfig, CohereConfig, PreTrainedModel, T5Config

from kdprune.errors import KDPruneError
from kdprune.model import modeling_kdp
from kdprune.model.families import decoder_layers, family_of, final_norm, find_family
from kdprune.model.modeling_kdp import StandIn

pytestmark = pytest.mark.usefixtures("one_thread")
Build = Callable[..., PreTrainedModel]
IDS = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("kind", [
    "fourier", "mlp", "linear", "data", "linear+data", "linear+fourier+data", "mlp+data"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("hidden", [0, 24])
@pytest.mark.parametrize(("residual", "normalize"), [(True, True), (False, False)])
def test_the_stand_in_computes_its_equation(
    kind: str, gated: bool, hidden: int, residual: bool, normalize: bool
) -> None:
    module = stand_in(
        kind=kind, hidden=hidden, residual=residual, normalize=normalize, channels=10, gated=gated).double()
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 7
    z = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() if normalize else x
    weights = dict(module.named_parameters())

    def through(name: str) -> Tensor:
        return z @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    seen = {"linear": lambda: z, "mlp": lambda: nn.functional.gelu(through("phase")),
            "fourier": lambda: torch.cat([through("phase").cos(), through("phase").sin()], -1),
            "data": lambda: (nn.functional.gelu(through("gate")) * through("up") if gated
                             else nn.functional.gelu(through("up")))}
    z = torch.cat([seen[part]() for part in kind.split("+")], -1)
    if hidden:
        z = nn.functional.gelu(z @ weights["lift.weight"].T + weights["lift.bias"])
    y = z @ weights["readout.weight"].T + weights["readout.bias"]
    torch.testing.assert_close(module(x), x + y if residual else y, rtol=1e-5, atol=1e-5)
    assert not list(module.buffers())
    again = StandIn(WIDTH, **module.spec()).double()
    again.load_state_dict(module.state_dict())
    assert torch.equal(again(x), module(x))


def test_the_stand_in_has_the_parameters_it_should() -> None:
    d, m, h = WIDTH, 16, 24
    count = sum(p.numel() for p in StandIn(d, features=m, hidden=h).parameters())
    assert count == d * m + m + 2 * m * h + h + h * d + d
    count = sum(p.numel() for p in StandIn(d, kind="linear+fourier+data", features=m, channels=10).parameters())
    assert count == (d + 1) * (m + 2 * 10) + (d + 2 * m + 10) * d + d


def test_the_stand_in_normalises_in_float32() -> None:
    x = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(1)).bfloat16() * 300
    module = stand_in(kind="linear", residual=False)
    low = copy.deepcopy(module).bfloat16()
    module.load_state_dict(low.float().state_dict())
    gap = (low.bfloat16()(x).float() - module(x.float())).abs().max()
    assert gap < 0.05
    assert low.bfloat16()(x).dtype == torch.bfloat16


@pytest.mark.parametrize("options", [
    {"kind": "spline"}, {"kind": "data+linear"}, {"kind": "fourier+mlp"}, {"kind": "linear+linear"},
    {"kind": "linear+data"}, {"features": 0}, {"activation": "no"}, {"hidden": -1},
])
def test_the_stand_in_refuses_what_makes_no_layer(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="got"):
        StandIn(WIDTH, **{"features": 8, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_row_of_a_family_fits_its_model(tiny_model: Build, name: str) -> None:
    model = tiny_model(name)
    family = family_of(model)
    layers = decoder_layers(model)
    assert len(layers) == LAYERS
    assert all(type(layer).__name__ == family.layer for layer in layers)
    assert all(hasattr(layers[0], part) for part in family.mlp)
    for names in (family.mlp_norm, family.attention_norm):
        assert bool(names) == bool(family.norm_in(layers[0], names))
    seen: list[Any] = []
    hook = layers[-1].register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        last = model.base_model(IDS).last_hidden_state
    hook.remove()
    state = seen[0][0] if family.returns_tuple else seen[0]
    project = getattr(getattr(model.base_model, "decoder", None), "project_out", None) or nn.Identity()
    assert torch.equal(project(final_norm(model)(state)), last)
    assert family_of(prune(model, "mixed")) is family


def test_what_is_no_known_causal_lm_is_refused(tiny_model: Build) -> None:
    with pytest.raises(KDPruneError, match=r"unknown model family 'cohere'.*llama.*docs/add-a-family\.md"):
        find_family(CohereConfig())
    with pytest.raises(KDPruneError, match="encoder-decoder"):
        find_family(T5Config())
    with pytest.raises(KDPruneError, match="unknown model family 'bert'"):
        find_family(BertConfig())
    with pytest.raises(KDPruneError, match="not a causal LM"):
        decoder_layers(tiny_model("llama3").model)
    with pytest.raises(KDPruneError, match="expected a PreTrainedModel"):
        family_of(nn.Linear(1, 1))


def test_registration_can_be_repeated() -> None:
    modeling_kdp.register()
    config = modeling_kdp.KDPLlamaConfig(num_hidden_layers=0, hidden_size=8, num_attention_heads=1, vocab_size=8)  # type: ignore[attr-defined]
    assert type(AutoModelForCausalLM.from_config(config)) is modeling_kdp.KDPLlamaForCausalLM  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", sorted(modeling_kdp.FAMILIES))
def test_what_a_base_model_runs_is_found_by_name(name: str) -> None:
    """A server keeps compiled models by pickling their forward with what it closes over."""
    model: Any = modeling_kdp.generated(modeling_kdp.FAMILIES[name], "Model")
    assert pickle.loads(pickle.dumps(model.forward)) is model.forward
    for cell in model.forward.__closure__:
        assert pickle.loads(pickle.dumps(cell.cell_contents)) is cell.cell_contents
    stock = model.__mro__[2]
    assert inspect.signature(model.forward) == inspect.signature(stock.forward)


def test_the_config_says_what_the_head_does_behind_the_base_model() -> None:
    """vLLM runs the base model and the head's weight alone."""
    for name, expected in {"granite": 0.5, "llama3": 1.0, "cohere2": 0.0625}.items():
        model: Any = prune(build(name), "after")
        with torch.no_grad():
            head = model.lm_head(model.model(IDS).last_hidden_state)
        assert getattr(model.config, "logit_scale", 1.0) == expected
        torch.testing.assert_close(head * expected, model(IDS).logits)


def test_a_family_that_a_server_cannot_run_says_so() -> None:
    assert modeling_kdp.KDPLlamaForCausalLM.is_backend_compatible()  # type: ignore[attr-defined]
    for name in ("GPT2", "GPTJ", "Falcon", "Bloom"):
        with pytest.raises(ValueError, match="expected a family whose attention vLLM can replace"):
            modeling_kdp.generated(
                next(row for row in modeling_kdp.FAMILIES.values() if row.name == name), "ForCausalLM"
            ).is_backend_compatible()  # type: ignore[attr-defined]
