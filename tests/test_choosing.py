"""How many layers the chosen blocks have, and by what they are ranked, against brute force and slow ways."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from families import WIRINGS, build
from test_methods import QUICK, random_tokens, run
from tiny_checkpoint import Bench
from transformers import PreTrainedModel

from kdprune import prune
from kdprune.data.tokens import TokenSet, load_tokens
from kdprune.errors import KDPruneError
from kdprune.methods.common.budget import WIDEST, possible_blocks, select_by_similarity, spare_features
from kdprune.methods.common.selection import candidate_blocks, useful_blocks
from kdprune.methods.common.shape import Shape
from kdprune.methods.common.target import Target
from kdprune.methods.kdp import damage as damage_module
from kdprune.methods.kdp.damage import Trial, blocks_to_measure, measure_damage, select_by_damage
from kdprune.methods.kdp.kdp import KDP
from kdprune.model.losses import mean_loss
from kdprune.model.streaming import load_streamed
from kdprune.model.surgery import apply_edits
from kdprune.planning.plan import plan
from kdprune.report.results import Results
from kdprune.runtime.distributed import World
from kdprune.runtime.run import Run

pytestmark = pytest.mark.usefixtures("one_thread")

# ------------------------------------------------------------------------------------------ slack


def layout(model: PreTrainedModel, power: float = 1.0, **options) -> tuple[list[range], Shape, float]:
    """Blocks, stand-ins and net ratio as a run would have them, with a similarity that falls with distance^power."""
    method = KDP(**options)
    budget, layers = method.budget(model), model.config.num_hidden_layers
    similarity = torch.tensor([[0.97 ** abs(s - e) ** power for e in range(layers + 1)] for s in range(layers + 1)])
    blocks = select_by_similarity(method, similarity, budget)
    shape = spare_features(budget.shape, budget, blocks)
    return blocks, shape, sum(budget.removal(block, shape.features) for block in blocks) / budget.target.total


def test_slack_finds_better_blocks_at_the_same_net_ratio(bundled: PreTrainedModel) -> None:
    found = {slack: layout(bundled, power=2.0, ratio=0.25, slack=slack) for slack in (0.0, 1.0)}
    assert len(found[1.0][0]) > len(found[0.0][0])      # more and shorter blocks, which are more similar end to end
    for blocks, shape, net in found.values():
        assert 0.25 <= net < 0.25 + len(blocks) * shape.parameters_per_feature() / bundled.num_parameters()
    without_fill = KDP(slack=1.0, fill=False)
    assert without_fill.budget(bundled).slack == 0      # nothing would spend it


def test_what_the_widest_stand_ins_leave_unspent_shows_in_the_net_ratio(bundled: PreTrainedModel) -> None:
    _, shape, net = layout(bundled, ratio=0.15, blocks=((4, 12),))
    assert shape.features == WIDEST * bundled.config.hidden_size
    assert net > 0.16
    assert plan(ratio=0.15, blocks=((4, 12),)).net_ratio > 0.16


# ------------------------------------------------------------------------------------------ ranking by damage

# What the stand-ins of the measurement are, in the method's own words.
SOLVED = {**QUICK, "kernel": "fixed", "kernel_epochs": 1, "refine": False, "protect": 0.0, "bandwidth": 2.0}


def slowly(model: PreTrainedModel, tokens: TokenSet, block: range, **options) -> float:
    """The damage of one block as a whole run of the method on that block would show it."""
    method = KDP(**{**SOLVED, **options, "blocks": ((block.start, block.stop),)})
    pruned = apply_edits(model, method(model, tokens, Run(3, batch_size=4)).edits)
    held = tokens.select(slice(len(tokens) - tokens.held_out(method.held), None))
    return mean_loss(pruned, held, 4) - mean_loss(model, held, 4)


def measured(model: PreTrainedModel, tokens: TokenSet, blocks: list[range], **options) -> dict[range, float]:
    method = KDP(**{**SOLVED, **options})
    shape = method.shape(model.config.hidden_size)
    trial = Trial(shape, method.settings(shape, tokens), method.held, method.path_rows(tokens, shape).fit)
    return measure_damage(model, tokens, blocks, trial, Run(3, batch_size=4))


def padded_tokens() -> TokenSet:
    ids, mask = random_tokens(rows=40, length=16).ids, torch.ones(40, 16)
    mask[::3, 11:] = 0
    return load_tokens({"input_ids": ids, "attention_mask": mask}, None, samples=None, length=16, seed=0)


@pytest.mark.parametrize("options", [
    {}, {"context": "none"}, {"kernel": "mlp"}, {"kernel": "mlp", "context": "none"}, {"kernel": "linear"},
    {"kernel": "linear", "context": "none"}, {"inverse": "direct"}, {"without": ("operators",)},
])
def test_the_damage_of_a_block_is_that_of_a_run_on_it_alone(options: dict, tiny_model) -> None:
    model, tokens = tiny_model("llama3"), padded_tokens()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    # Where nothing stands in front, which stand-in it is does not matter: its context, if any, is what differs.
    blocks = [range(2), range(2, 5)] if options in ({}, {"context": "none"}) else [range(2, 5)]
    found = measured(model, tokens, blocks, **options)
    for block in blocks:
        assert found[block] == pytest.approx(slowly(model, tokens, block, **options), rel=1e-4, abs=1e-5)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert model.config.num_hidden_layers == 6


@pytest.mark.parametrize("name", WIRINGS)
def test_every_wiring_is_measured(name: str, tiny_model) -> None:
    model, tokens = tiny_model(name), random_tokens(rows=20)
    for context, block in (("attention", range(1, 4)), ("none", range(3, 6)), ("none", range(2))):
        found = measured(model, tokens, [block], context=context)
        assert found[block] == pytest.approx(slowly(model, tokens, block, context=context), rel=1e-3, abs=1e-4)


def test_measured_in_the_dtype_of_the_model(tiny_model) -> None:
    model, tokens = tiny_model("llama3").to(torch.bfloat16), random_tokens(rows=20)
    assert measured(model, tokens, [range(1, 3)])[range(1, 3)] == pytest.approx(
        slowly(model, tokens, range(1, 3)), rel=0.1)


def test_what_a_hidden_layer_is_measured_with_is_solved_for(tiny_model) -> None:
    [(_, value)] = measured(tiny_model("llama3"), random_tokens(rows=20), [range(1, 3)], hidden=12).items()
    assert math.isfinite(value)


def test_the_blocks_are_those_that_brute_force_takes(tiny_model) -> None:
    model, tokens = tiny_model("qwen3", seed=5), random_tokens(rows=40, length=16)
    options = {**SOLVED, "ratio": 0.15, "max_block": 3, "context": "none", "hidden": 0}
    method = KDP(**options, ranking="damage")
    budget = method.budget(model)
    candidates = candidate_blocks(range(6), 2, 3)
    sets = [chosen for count in (1, 2) for chosen in itertools.combinations(candidates, count)
            if all(second.start > first.stop for first, second in itertools.pairwise(chosen))]
    removed = {chosen: sum(map(budget.removal, chosen)) for chosen in sets}
    least = min(value for value in removed.values() if value >= budget.target.parameters)
    tied = [chosen for chosen in sets if removed[chosen] == least]
    single = {block: slowly(model, tokens, block, **options) for block in candidates}
    best = min(tied, key=lambda chosen: sum(single[block] for block in chosen))
    result = method(model, tokens, Run(3, batch_size=4))
    assert len(tied) > 2
    assert result.blocks == list(best)
    # And only what could be chosen was measured.
    assert set(result.damage) == {block for chosen in tied for block in chosen}


def test_two_blocks_are_chosen_by_the_sum_of_their_damages(bundled: PreTrainedModel) -> None:
    method = KDP(ratio=0.25)
    budget = method.budget(bundled)
    useful = blocks_to_measure(possible_blocks(method, budget), budget)
    draw = torch.rand(len(useful), generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.1
    damage = dict(zip(useful, draw.tolist(), strict=True))
    sets = [chosen for count in (1, 2, 3) for chosen in itertools.combinations(useful, count)
            if all(second.start > first.stop for first, second in itertools.pairwise(chosen))]
    removed = [sum(map(budget.removal, chosen)) for chosen in sets]
    least = min(value for value in removed if value >= budget.target.parameters)
    best = min((chosen for chosen, value in zip(sets, removed, strict=True) if value == least),
               key=lambda chosen: sum(damage[block] for block in chosen))
    assert len(best) > 1
    assert select_by_damage(damage, budget) == list(best)


def test_a_loss_that_is_no_number_is_never_chosen() -> None:
    model = build("llama3")
    budget = KDP(ratio=0.1).budget(model)
    damage = {range(1, 3): math.inf, range(2, 4): 3.0, range(3, 5): 20.0}
    assert select_by_damage(damage, budget) == [range(2, 4)]


@pytest.mark.parametrize("slack", [0, 4])
@pytest.mark.parametrize("seed", range(6))
def test_useful_blocks_are_those_of_some_set_that_may_be_chosen(seed: int, slack: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    sizes = torch.randint(5, 9, (9,), generator=draw).tolist() if seed % 2 else [7] * 9
    candidates, target = candidate_blocks(range(1, 9), 2, 4), 15 + 5 * seed
    removal = lambda block: sum(sizes[index] for index in block) - 3  # noqa: E731
    sets = [chosen for count in (1, 2, 3) for chosen in itertools.combinations(candidates, count)
            if all(second.start > first.stop for first, second in itertools.pairwise(chosen))]
    least = min((sum(map(removal, chosen)) for chosen in sets if sum(map(removal, chosen)) >= target), default=None)
    most = max(least, target + slack) if least is not None else -1
    expected = {block for chosen in sets if target <= sum(map(removal, chosen)) <= most for block in chosen}
    assert set(useful_blocks(candidates, removal, Target(target / 100, "all", 100), slack)) == expected


def test_same_seed_same_damage_and_the_final_fits_do_not_know_of_it(tiny_model) -> None:
    model, tokens = tiny_model("llama3"), random_tokens(rows=20)
    options = {"ratio": 0.15, "protect": 0.0, "features": None}
    first, second = (run(model, tokens, ranking="damage", **options) for _ in range(2))
    assert first.damage == second.damage
    assert first.blocks == second.blocks
    blocks = tuple((block.start, block.stop) for block in first.blocks)
    given = run(model, tokens, blocks=blocks, **options)
    assert given.damage is None
    states = [apply_edits(model, result.edits).state_dict() for result in (first, second, given)]
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key])
        assert torch.equal(value, states[2][key])


@pytest.mark.parametrize("context", ["attention", "none"])
def test_padding_enters_no_damage(context: str, tiny_model) -> None:
    model, plain = tiny_model("llama3"), random_tokens(rows=20)
    rubbish = torch.randint(3, 64, (20, 5), generator=torch.Generator().manual_seed(9))
    padded = load_tokens(
        {"input_ids": torch.cat((plain.ids, rubbish), 1),
         "attention_mask": torch.cat((torch.ones(20, 12), torch.zeros(20, 5)), 1)},
        None, samples=None, length=17, seed=0)
    blocks, many = [range(1, 3), range(2, 5)], {"context": context, "kernel_tokens": 10_000}
    one, other = (measured(model, tokens, blocks, **many) for tokens in (plain, padded))
    assert [one[block] for block in blocks] == pytest.approx([other[block] for block in blocks], rel=1e-3, abs=1e-4)


def test_only_a_part_of_the_rows_is_looked_at(tiny_model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(damage_module, "FIT_TOKENS", 12 * 10)
    monkeypatch.setattr(damage_module, "LOSS_TOKENS", 12 * 3)
    model, tokens = tiny_model("llama3"), random_tokens(rows=40)
    part = tokens.select(torch.cat((torch.arange(10), torch.arange(30, 33))))
    found = measured(model, tokens, [range(1, 3)], held=0.25)
    assert found[range(1, 3)] == pytest.approx(slowly(model, part, range(1, 3), held=0.25), rel=1e-4)


def test_the_record_holds_the_damages_and_a_second_run_finds_them(bench: Bench, tmp_path: Path) -> None:
    ids = torch.randint(3, 256, (40, 24), generator=torch.Generator().manual_seed(1))
    options = {"ratio": 0.2, "protect": 0.0, "ranking": "damage", "calibration": ids, "heldout": ids[:4],
               "kernel_epochs": 1, "refine_epochs": 1, "device": "cpu", "work_dir": tmp_path / "work"}
    first, second = (prune(bench.model, **options) for _ in range(2))
    found = [result.results.analysis.pair_damage for result in (first, second)]
    assert found[0] == found[1]
    assert ["damage" in result.results.seconds for result in (first, second)] == [True, False]
    start, end = first.results.blocks[0]
    assert isinstance(found[0][start][end], float)
    assert found[0][0][0] is None
    record = Results.model_validate_json(first.results.model_dump_json())
    assert record.analysis.pair_damage == found[0]
    assert first.blocks == second.blocks


def test_damage_is_refused_where_the_model_cannot_run_whole(
    bench: Bench, tiny_model, monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, tokens = tiny_model("llama3"), random_tokens()
    method = KDP(ratio=0.1, ranking="damage")
    method.check(model, tokens)
    with pytest.raises(KDPruneError, match="leave load_in out") as caught:
        method.check_states_model()
    assert "\n" not in str(caught.value)
    streamed = load_streamed(bench.model, device="cpu")
    with pytest.raises(KDPruneError, match="read from disk"):
        method.check(streamed, tokens)
    with pytest.raises(KDPruneError, match="without two tokens in a row"):
        method.check(model, load_tokens(tokens.ids.reshape(-1, 1), None, samples=None, length=2, seed=0))
    KDP(ratio=0.1, ranking="damage", blocks=((1, 3),)).check(streamed, tokens)  # there is nothing to measure
    monkeypatch.setattr(damage_module, "world", lambda: World(0, 2))
    with pytest.raises(KDPruneError, match="in 2 processes, expected one"):
        method.check(model, tokens)


def test_planning_measures_nothing() -> None:
    assert plan(ranking="damage").blocks == plan().blocks
