"""The block's own channels as features: read off the model, chosen, put in."""

import pytest
import torch
from families import CONFIGS, EXPERTS, TRIED, build
from test_methods import random_tokens
from transformers import PreTrainedModel

from kdprune.data.tokens import TokenSet
from kdprune.kernel.operators import Moments
from kdprune.methods.kdp import landmarks
from kdprune.methods.kdp.kdp import KDP
from kdprune.model.activations import recorded
from kdprune.model.families import decoder_layers, family_of, norm_before_mlp
from kdprune.model.passes import run_layers
from kdprune.model.structures import activation_of, mlp_channels, norm_affine
from kdprune.planning.meta import meta_model
from kdprune.runtime.run import Run

pytestmark = pytest.mark.usefixtures("one_thread")
LAYER = 2
# Where nothing stands between an MLP's output and the state, a layer's own attention and channels are the layer.
PLAIN = [name for name in TRIED if name not in ("gemma2", "gemma3", "opt-350m", "gpt_neox", "olmo2")]


@pytest.mark.parametrize("name", TRIED)
def test_channels_are_what_the_layer_computes(name: str, tiny_model) -> None:
    model: PreTrainedModel = tiny_model(name)
    family, layer = family_of(model), decoder_layers(model)[LAYER]
    read, seen = [], []
    norm, out = norm_before_mlp(model, layer), layer.get_submodule(family.mlp_out)
    bare = isinstance(norm, torch.nn.Identity)  # OLMo 2: what the MLP reads is the stream
    hooks = [layer.mlp.register_forward_pre_hook(lambda _, args: read.append(args[0])) if bare
             else norm.register_forward_hook(lambda *args: read.append(args[2])),
             out.register_forward_pre_hook(lambda _, args: seen.append(args[0]))]
    with torch.no_grad(), recorded(model, [LAYER]):
        run_layers(model, random_tokens())
        for hook in hooks:
            hook.remove()
        stand_in = KDP(kernel="linear+data").shape(model).build(torch.Generator())
        assert stand_in.activation == activation_of(model)
        assert stand_in.gated == (len(mlp_channels(model, LAYER).lines[0]) == 2)
        own = norm_affine(norm, model.config.hidden_size)
        x = read[-1].flatten(0, -2)
        torch.testing.assert_close(
            mlp_channels(model, LAYER).through(*own).of(x, stand_in.act), seen[-1].flatten(0, -2), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", PLAIN)
def test_a_layers_own_attention_and_all_its_channels_are_the_layer(name: str, tiny_model) -> None:
    model = tiny_model(name)
    channels = len(mlp_channels(model, LAYER).lines)
    method = KDP(kernel="linear+data", refine=False, channels=channels, blocks=((LAYER, LAYER + 1),), ridge=1e-9)
    [fit] = method(model, random_tokens(rows=40), Run(batch_size=4)).fit
    assert fit["channels"] == channels
    assert fit["state_error"] < 1e-5
    assert fit["linear_error"] > 1e-3


def test_channels_that_add_nothing_are_left_out(tiny_model) -> None:
    model, useful = tiny_model("llama3"), [0, 3, 7, 20, 41]
    layer = decoder_layers(model)[LAYER]
    with torch.no_grad():
        down = layer.mlp.down_proj.weight
        # The others add next to nothing, but not so little that they would not be looked at.
        down[:, [channel for channel in range(down.shape[1]) if channel not in useful]] *= 1e-3
    method = KDP(kernel="linear+data", refine=False, channels=5, blocks=((LAYER, LAYER + 1),))
    [edit] = method(model, random_tokens(rows=40), Run(batch_size=4)).edits
    torch.testing.assert_close(edit.stand_in.up.weight, layer.mlp.up_proj.weight[useful], rtol=1e-4, atol=1e-5)


def test_the_cost_of_leaving_out_is_that_of_solving_without() -> None:
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(200, 7, generator=draw), torch.randn(200, 3, generator=draw)
    x[:, 3] = x[:, 1] + 0.1 * x[:, 3]
    x = x + 2

    def least(inputs: torch.Tensor) -> float:
        moments = Moments(inputs.shape[1], 3)
        moments.update(inputs, y)
        return moments.residual(*moments.solve_affine())

    moments = Moments(7, 3)
    moments.update(x, y)
    others = [[i for i in range(7) if i != j] for j in range(7)]
    expected = torch.tensor([least(x[:, kept]) - least(x) for kept in others], dtype=torch.float64)
    torch.testing.assert_close(moments.cost_of_leaving_out(0.0), expected, rtol=1e-6, atol=1e-8)


def test_of_much_text_landmarks_see_the_first_tokens_and_the_read_out_all(
    tiny_model, monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, some, other = tiny_model("llama3"), random_tokens(rows=40), random_tokens(rows=40, seed=1)
    mixed = some.select(slice(0, 20)).followed_by(other.select(slice(20, None)))
    method = KDP(kernel="linear+data", refine=False, channels=5, blocks=((LAYER, LAYER + 2),))

    def fitted(tokens: TokenSet) -> tuple[torch.Tensor, torch.Tensor]:
        [edit] = method(model, tokens, Run(batch_size=4)).edits
        return edit.stand_in.up.weight, edit.stand_in.readout.weight

    assert not torch.equal(fitted(some)[0], fitted(mixed)[0])
    monkeypatch.setattr(landmarks, "tokens_for", lambda inputs: 20 * some.ids.shape[1])
    (chosen, readout), (same, different) = fitted(some), fitted(mixed)
    assert torch.equal(chosen, same)
    assert not torch.equal(readout, different)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in EXPERTS])
def test_channels_are_where_their_layer_is(name: str) -> None:
    """Wherever that is: a norm without parameters does not say."""
    found = mlp_channels(meta_model(build(name).config), 1)
    assert {part.device.type for part in (found.lines, found.biases, found.outgoing)} == {"meta"}
