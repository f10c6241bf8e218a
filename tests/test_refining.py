"""Step 3: the error as later layers read it, its rate on trial, and how long it lasts."""

import copy

import pytest
import torch
from families import TRIED, WIDTH, build
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdprune.data.tokens import TokenSet
from kdprune.methods.common.block_data import block_states
from kdprune.methods.common.stand_in_fit import StandInFit
from kdprune.methods.kdp.kdp import KDP
from kdprune.model.families import decoder_layers, family_of, final_norm
from kdprune.model.modeling_kdp import StandIn
from kdprune.model.structures import gains_from
from kdprune.model.surgery import apply_edits
from kdprune.runtime.run import Run
from kdprune.train.trial import RATES

pytestmark = pytest.mark.usefixtures("one_thread")
BOUNDARY = 3


def random_tokens(rows: int = 8, length: int = 12) -> TokenSet:
    ids = torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(0))
    return TokenSet(ids, torch.ones_like(ids, dtype=torch.bool), "random")  # type: ignore[arg-type]


def uneven(name: str) -> PreTrainedModel:
    """A model whose norms weigh dimensions differently, as trained ones do."""
    model = copy.deepcopy(build(name))
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for path, weight in model.named_parameters():
            if (weight.shape == (WIDTH,) and "norm" in path and path.endswith("weight")) or ".ln_" in path:
                weight.add_(torch.randn(weight.shape, generator=draw) / 2)
    return model


def read_by(model: PreTrainedModel, boundary: int, state: Tensor) -> list[Tensor]:
    """What the sublayers behind a boundary would read of a state (1, n, d), by running their norms."""
    family, found = family_of(model), []
    behind = family.pre_norm and not getattr(model.config, family.pre_norm)
    for layer in decoder_layers(model)[boundary:]:
        for names in (family.attention_norm, family.attention_norm if behind else family.mlp_norm):
            name = family.norm_in(layer, names)
            found.append(state if name is None else layer.get_submodule(name)(state))
    return found


@pytest.mark.parametrize("name", TRIED)
@torch.no_grad()
def test_gains_are_what_norms_behind_make_of_a_small_change(name: str) -> None:
    model, step = uneven(name), 1e-3
    draw = torch.Generator().manual_seed(2)
    state = torch.randn(1, WIDTH, WIDTH, generator=draw) * 3
    state -= state.mean(-1, keepdim=True)
    # Row i moves by a step along a direction in which neither length nor mean of the state changes, as all do nearly
    # in a wide one: what it makes of each dimension is compared.
    ones = torch.ones_like(state) / WIDTH**0.5
    change = torch.randn(1, WIDTH, WIDTH, generator=draw)
    change -= (change * ones).sum(-1, keepdim=True) * ones
    along = state / state.norm(dim=-1, keepdim=True)
    change -= (change * along).sum(-1, keepdim=True) * along
    moved = state + step * change
    layers = len(decoder_layers(model)) - BOUNDARY
    total = torch.zeros(WIDTH, WIDTH)
    for before, after in zip(read_by(model, BOUNDARY, state), read_by(model, BOUNDARY, moved), strict=True):
        bare = torch.equal(before, state)  # OLMo 2 reads the stream itself
        size = torch.ones(1, WIDTH, 1) if bare else state.square().mean(-1, keepdim=True).sqrt()
        total += ((after - before) * size / step).square()[0]
    expected = (total / change[0].square()).median(0).values / (2 * layers)
    torch.testing.assert_close(gains_from(model, BOUNDARY).square(), expected, rtol=5e-2, atol=1e-3)


@torch.no_grad()
def test_behind_the_last_layer_the_final_norm_reads() -> None:
    model = uneven("gemma3")
    norm = final_norm(model)
    torch.testing.assert_close(gains_from(model, len(decoder_layers(model))), (1 + norm.weight).abs())


@pytest.mark.parametrize("name", ["llama3", "gemma3", "qwen2"])
@torch.no_grad()
def test_the_loss_is_what_later_layers_see_of_an_error(name: str) -> None:
    """Σ over the norms behind of ‖n(S) − n(h_e)‖², in units of what dropping the block does, where both are small."""
    model, tokens = uneven(name), random_tokens()
    [states] = block_states(model, tokens, [range(1, BOUNDARY)], 0.25, Run(batch_size=4))
    draw = torch.Generator().manual_seed(3)
    outputs = states.outputs[torch.arange(len(tokens))].float()

    def aside(size: float) -> Tensor:
        """A small error that leaves every state as long as it is."""
        error = torch.randn(outputs.shape, generator=draw)
        along = outputs / outputs.norm(dim=-1, keepdim=True)
        return size * (error - (error * along).sum(-1, keepdim=True) * along)

    dropped, missed = aside(2e-3), aside(1e-3)
    states = type(states)(**{**vars(states), "inputs": outputs + dropped})
    fitting = StandInFit(model, states, StandIn(WIDTH, kind="linear", features=0), None, Run(batch_size=4))
    rows = torch.arange(fitting.fit_rows)

    class Missing(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            return (outputs + missed)[rows]

    fitting.module = Missing()
    seen = fitting.reading_loss()(rows)

    def read(error: Tensor) -> float:
        pairs = zip(read_by(model, BOUNDARY, (outputs + error)[rows]), read_by(model, BOUNDARY, outputs[rows]),
                    strict=True)
        return sum(float((there - here).square().sum()) for there, here in pairs) / seen.count

    assert seen.count == len(rows) * 12
    assert seen.means()["loss"] == pytest.approx(read(missed) / read(dropped), rel=1e-2)
    plain = fitting.state_loss(fitting.update_energy())(rows).means()["loss"]
    assert plain != pytest.approx(seen.means()["loss"], rel=1e-3)


@pytest.mark.parametrize("kernel", ["linear+data", "learned"])
def test_a_rate_that_is_not_given_is_the_one_that_held_out_rows_find_best(
    kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens = build("llama3"), random_tokens(40)
    told: list[tuple[float, float]] = []
    monkeypatch.setattr("kdprune.methods.common.stand_in_fit.saying", lambda *_: lambda *pair: told.append(pair))
    options = {"blocks": ((1, 3),), "kernel": kernel, "kernel_epochs": 1, "refine_epochs": 2}
    found = KDP(**options)(model, tokens, Run(batch_size=4))
    [rate] = found.rates
    assert [pair[0] for pair in told] == list(RATES[: len(told)])
    assert rate == min(told, key=lambda pair: pair[1])[0]
    # The same draws, so the same bits as with that rate given.
    again = KDP(**options, rate=rate)(model, tokens, Run(batch_size=4))
    assert not again.rates
    states = [apply_edits(model, result.edits).state_dict() for result in (found, again)]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    watched = found.fit[0]["step3"]["watched"]
    assert found.fit[0]["refined"] == (min(watched) < watched[0])


@pytest.mark.parametrize(("rows", "options", "epochs"), [
    (4, {}, 20),                           # 1 step an epoch: 240 epochs would make 240 steps
    (60, {"held": 0.1}, 18),               # 54 rows, 14 steps
    (400, {}, 5),
    (4, {"preset": "thorough"}, 60),
    (200, {"preset": "thorough", "held": 0.2}, 60),             # 160 rows, 20 steps
    (400, {"preset": "thorough", "held": 0.1}, 27),             # 360 rows, 45 steps: 26.7 epochs
    (400, {"preset": "thorough", "held": 0.1, "batch": 2}, 15), # 180 steps: 6.7 epochs
    (4000, {"preset": "thorough"}, 15),
    (4, {"refine_epochs": 3}, 3),
])
def test_few_rows_are_refined_on_for_longer(rows: int, options: dict[str, float], epochs: int) -> None:
    method = KDP(**options)  # type: ignore[arg-type]
    assert method.settings(method.shape(build("llama3")), random_tokens(rows)).step3.epochs == epochs
