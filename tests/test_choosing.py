"""How many layers the chosen blocks have, and by what they are ranked, against brute force and slow ways."""

import pytest
import torch
from test_methods import random_tokens, run
from transformers import PreTrainedModel

from kdprune.errors import KDPruneError
from kdprune.methods.blocks import WIDEST, choose_blocks, spare_features
from kdprune.methods.fitting import Shape
from kdprune.methods.kdp import KDP
from kdprune.model.surgery import apply_edits
from kdprune.planning import plan
from kdprune.recipe import load_recipe
from kdprune.variants import parse_variant

pytestmark = pytest.mark.usefixtures("one_thread")

# ------------------------------------------------------------------------------------------ longer blocks


def layout(model: PreTrainedModel, **options) -> tuple[list[range], Shape, float]:
    """Blocks, stand-ins and net ratio as a run would have them, with a similarity that falls evenly with distance."""
    method = KDP(**options)
    budget, layers = method.budget(model), model.config.num_hidden_layers
    similarity = torch.tensor([[0.97 ** abs(s - e) for e in range(layers + 1)] for s in range(layers + 1)])
    blocks = choose_blocks(method, {"rbf_cka": similarity}, budget)
    shape = spare_features(budget.shape, budget, blocks)
    return blocks, shape, sum(budget.removal(block, shape.features) for block in blocks) / budget.total


@pytest.mark.parametrize("ratio", [0.25, 0.4])
def test_longer_blocks_and_wider_stand_ins_at_the_same_net_ratio(bundled: PreTrainedModel, ratio: float) -> None:
    found = [layout(bundled, ratio=ratio, longer=longer) for longer in (0, 1)]
    gone = [sum(map(len, blocks)) for blocks, _, _ in found]
    features = [shape.features for _, shape, _ in found]
    assert gone[0] < gone[1]
    assert features[0] < features[1] < WIDEST * bundled.config.hidden_size
    for blocks, shape, net in found:
        one_feature = len(blocks) * shape.parameters_per_feature() / bundled.num_parameters()
        assert ratio <= net < ratio + one_feature


def test_what_the_widest_stand_ins_leave_unspent_shows_in_the_net_ratio(bundled: PreTrainedModel) -> None:
    _, shape, net = layout(bundled, ratio=0.15, longer=5)
    assert shape.features == WIDEST * bundled.config.hidden_size
    assert net > 0.16
    assert plan(ratio=0.15, longer=5).net_ratio > 0.16


def test_a_pruned_model_has_fewer_layers_and_the_same_size(tiny_model) -> None:
    model, tokens = tiny_model("llama3"), random_tokens()
    layers, nets = [], []
    for longer in (0, 1):
        result = run(model, tokens, ratio=0.25, protect=0.0, features=None, longer=longer)
        pruned = apply_edits(model, result.edits)
        layers.append(pruned.config.num_hidden_layers)
        nets.append(1 - pruned.num_parameters() / model.num_parameters())
    assert layers[1] < layers[0]
    assert all(0.25 <= net < 0.255 for net in nets)


@pytest.mark.parametrize(("options", "message"), [
    ({"longer": 1, "blocks": ((1, 3),)}, "longer 1 with blocks, expected 0"),
    ({"longer": 2, "fill": False}, "longer 2 without fill, expected 0"),
    ({"longer": 2, "features": 8}, "without fill"), ({"longer": 2, "preset": "paper"}, "without fill"),
    ({"longer": 2, "kernel": "linear"}, "kernel 'linear', which has no features"),
    ({"longer": -1}, "longer -1, expected a whole number"),
])
def test_longer_is_refused_where_it_means_nothing(options: dict, message: str) -> None:
    with pytest.raises(KDPruneError, match=message) as caught:
        KDP(**options)
    assert "\n" not in str(caught.value)


def test_longer_than_the_model_allows_names_the_most(bundled: PreTrainedModel) -> None:
    with pytest.raises(KDPruneError, match=r"got longer 9, expected at most (\d+), .* ratio 0\.4 ") as caught:
        KDP(ratio=0.4, longer=9).check(bundled, random_tokens())
    most = int(str(caught.value).partition("at most ")[2].partition(",")[0])
    KDP(ratio=0.4, longer=most).check(bundled, random_tokens())
    with pytest.raises(KDPruneError, match=f"at most {most}"):
        KDP(ratio=0.4, longer=most + 1).check(bundled, random_tokens())


def test_a_variant_that_chooses_longer_blocks_keeps_its_own() -> None:
    given = ((1, 3),)
    assert parse_variant("kdp", 0.2).on(given).method == KDP(ratio=0.2, blocks=given)
    assert parse_variant("kdp:longer=1", 0.2).on(given).method == KDP(ratio=0.2, longer=1)


def test_the_options_go_into_recipes(tmp_path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("longer: 2\n", encoding="utf-8")
    assert load_recipe(recipe) == {"longer": 2}
