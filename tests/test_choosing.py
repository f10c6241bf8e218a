"""How many layers the chosen blocks have, and by what they are ranked, against brute force and slow ways."""

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from families import WIRINGS, build
from test_methods import QUICK, random_tokens, run
from tiny_checkpoint import Bench
from transformers import PreTrainedModel

from kdprune import prune
from kdprune.data.tokens import TokenSet, load_tokens
from kdprune.methods.common.budget import (
    WIDEST,
    Budget,
    choose_blocks,
    select_by_similarity,
)
from kdprune.methods.common.selection import candidate_blocks, reachable
from kdprune.methods.common.shape import Candidate, Shape
from kdprune.methods.kdp import damage as damage_module
from kdprune.methods.kdp import measuring as measuring_module
from kdprune.methods.kdp.damage import beside, choose_by_damage, guessed, proposed
from kdprune.methods.kdp.kdp import KDP
from kdprune.methods.kdp.measuring import Measuring, Trial
from kdprune.model.loading import load_model
from kdprune.model.streaming import Scratch, load_streamed, set_scratch
from kdprune.model.surgery import apply_edits
from kdprune.model.weights import Source
from kdprune.planning.plan import plan
from kdprune.report.results import Results
from kdprune.runtime.run import Run
from kdprune.store.cache import Cache

pytestmark = pytest.mark.usefixtures("one_thread")

# ------------------------------------------------------------------------------------------ slack


def layout(model: PreTrainedModel, power: float = 1.0, **options) -> tuple[list[Candidate], Shape, float]:
    """Blocks behind their stand-ins, the first of these and the net ratio as a run would have them, with a similarity
    that falls with distance^power."""
    method = KDP(**options)
    budget, layers = method.budget(model), model.config.num_hidden_layers
    similarity = torch.tensor([[0.97 ** abs(s - e) ** power for e in range(layers + 1)] for s in range(layers + 1)])
    blocks = select_by_similarity(method, similarity, budget)
    chosen = budget.candidates(blocks, fill=True)
    removed = sum(budget.removal(candidate.block, candidate.shape) for candidate in chosen)
    return chosen, chosen[0].shape, removed / budget.target.total


def test_slack_finds_better_blocks_at_the_same_net_ratio(bundled: PreTrainedModel) -> None:
    found = {slack: layout(bundled, power=2.0, ratio=0.25, kernel="fixed", slack=slack) for slack in (0.0, 1.0)}
    assert len(found[1.0][0]) > len(found[0.0][0])      # more and shorter blocks, which are more similar end to end
    for chosen, shape, net in found.values():
        assert shape.unit == 16
        assert all(candidate.shape.units % 16 == 0 for candidate in chosen)
        assert 0.25 <= net < 0.25 + 16 * shape.parameters_per_unit() / bundled.num_parameters()
    without_fill = KDP(slack=1.0, fill=False)
    assert without_fill.budget(bundled).slack == 0      # nothing would spend it


def test_what_the_widest_stand_ins_leave_unspent_shows_in_the_net_ratio(bundled: PreTrainedModel) -> None:
    _, shape, net = layout(bundled, ratio=0.15, blocks=((4, 12),))
    assert shape.units == WIDEST * bundled.config.hidden_size
    assert net > 0.16
    assert plan(ratio=0.15, blocks=((4, 12),)).net_ratio > 0.16


# ------------------------------------------------------------------------------------------ ranking by damage

# What the stand-ins of the measurement are, in the method's own words.
SOLVED = {
    **QUICK, "ranking": "damage", "kernel": "fixed", "kernel_epochs": 1, "refine": False, "protect": 0.0,
    "bandwidth": 2.0}


def solved(**options) -> KDP:
    """The method with these, as large as its kernel is before any filling up."""
    chosen = {**SOLVED, **options}
    sizes = {} if {"learned", "fixed"} & set(chosen["kernel"].split("+")) else {"features": None, "fill": False}
    return KDP(**{**chosen, **sizes})


def slowly(model: PreTrainedModel, tokens: TokenSet, block: range, **options) -> float:
    """The damage of one block as a whole run of the method on that block would show it."""
    method = solved(**{**options, "blocks": ((block.start, block.stop),)})
    pruned = apply_edits(model, method(model, tokens, Run(3, batch_size=4)).edits)
    held = tokens.select(slice(len(tokens) - tokens.held_out(method.held), None))
    return divergence(model, pruned, held)


@torch.no_grad()
def divergence(model: PreTrainedModel, pruned: PreTrainedModel, held: TokenSet) -> float:
    """KL(dense‖pruned), mean over the real tokens."""
    p, q = (one(input_ids=held.ids, attention_mask=held.mask.long()).logits.double().log_softmax(-1)[held.mask]
            for one in (model, pruned))
    return float((p.exp() * (p - q)).sum(-1).mean())


def measured(model: PreTrainedModel, tokens: TokenSet, blocks: list[range], **options) -> dict[range, float]:
    """Of these blocks as the choice would measure them alone."""
    method = solved(**{**options, "ratio": 0.001})
    budget = method.budget(model)
    trial = Trial(method.settings(budget.shape, tokens), method.held, method.path_rows(tokens, budget.shape).fit)
    measuring = Measuring.of(model, tokens, blocks, trial, Run(3, batch_size=4))
    return dict(zip(blocks, measuring.damages([[one] for one in budget.candidates(blocks)], "damage"), strict=True))


def padded_tokens() -> TokenSet:
    ids, mask = random_tokens(rows=40, length=16).ids, torch.ones(40, 16)
    mask[::3, 11:] = 0
    return load_tokens({"input_ids": ids, "attention_mask": mask}, None, samples=None, length=16, seed=0)


def test_step_1_sees_so_many_real_tokens(tiny_model) -> None:
    padded = padded_tokens()  # rows of 11, 16, 16 tokens and so on; of 40 rows four are held out
    for wanted, rows in ((11, 1), (12, 2), (11 + 16, 2), (2 * 43 + 1, 7), (10**6, 36)):
        method = KDP(kernel="fixed", kernel_tokens=wanted)
        assert method.path_rows(padded, method.shape(tiny_model("llama3"))).fit == rows
    assert method.path_rows(padded, method.shape(tiny_model("llama3"))).held == 4
    assert KDP().path_rows(padded, KDP().shape(tiny_model("llama3"))).fit == 0  # there is no step 1


@pytest.mark.parametrize("options", [
    {}, {"context": "none"}, {"kernel": "mlp"}, {"kernel": "mlp", "context": "none"}, {"kernel": "linear"},
    {"kernel": "linear", "context": "none"}, {"kernel": "fixed", "inverse": "direct"}, {"kernel": "fixed"},
    {"without": ("operators",)},
    {"kernel": "linear+data"}, {"kernel": "linear+fixed+data", "context": "none"},
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


def test_every_block_gets_the_stand_in_that_was_asked_for(tiny_model) -> None:
    model, tokens = tiny_model("llama2"), random_tokens(rows=20)
    for options, kind in (({}, "linear+data"), ({"kernel": "learned"}, "fourier"), ({"channels": 16}, "linear+data"),
                          ({"context": "none"}, "linear+data")):
        method = KDP(**options, refine=False, ratio=0.3, protect=0.0)
        assert {entry["kind"] for entry in method(model, tokens, Run(batch_size=4)).fit} == {kind}
        assert method.shortest == 2


def test_the_set_that_similarity_takes_is_measured_too(tiny_model) -> None:
    model, tokens = tiny_model("llama2"), random_tokens(rows=20)
    method, run = KDP(refine=False, ratio=0.3, protect=0.0), Run(batch_size=4)
    budget = method.budget(model)
    similar = choose_blocks(dataclasses.replace(method, ranking="similarity"), model, tokens, run, budget)
    chosen, damage = method.choose(model, tokens, run, budget)
    assert damage is not None
    found = dict(damage.together)
    assert tuple(similar) in found
    assert found[tuple(chosen)] == min(found.values())


def test_a_single_layer_may_go_behind_a_linear_map_alone() -> None:
    """Which has no step 3, whether or not one is asked for."""
    for refine in (True, False):
        method = KDP(kernel="linear", context="none", refine=refine)
        assert (method.shortest, method.trains) == (1, False)
    assert KDP(kernel="linear").trains


@pytest.mark.parametrize("name", WIRINGS)
def test_every_wiring_is_measured(name: str, tiny_model) -> None:
    model, tokens = tiny_model(name), random_tokens(rows=20)
    for context, block in (("attention", range(1, 4)), ("none", range(3, 6)), ("none", range(2))):
        options = {"context": context, "kernel": "linear+data"}
        found = measured(model, tokens, [block], **options)
        assert found[block] == pytest.approx(slowly(model, tokens, block, **options), rel=1e-3, abs=1e-4)


def test_measured_in_the_dtype_of_the_model(tiny_model) -> None:
    model, tokens = tiny_model("llama3").to(torch.bfloat16), random_tokens(rows=20)
    assert measured(model, tokens, [range(1, 3)])[range(1, 3)] == pytest.approx(
        slowly(model, tokens, range(1, 3)), rel=0.1)


def test_what_a_hidden_layer_is_measured_with_is_solved_for(tiny_model) -> None:
    [(_, value)] = measured(tiny_model("llama3"), random_tokens(rows=20), [range(1, 3)], hidden=12).items()
    assert math.isfinite(value)


@pytest.mark.parametrize(("kernel", "context", "shortest", "start"), [
    ("linear", "none", 1, []), ("linear+data", "attention", 2, [range(3)])])
def test_the_set_of_least_damage_is_taken_of_those_that_were_tried_together(
    kernel: str, context: str, shortest: int, start: list[range], tiny_model,
) -> None:
    model, tokens = tiny_model("qwen3", seed=5), random_tokens(rows=40, length=16)
    method = KDP(**{
        **SOLVED, "kernel": kernel, "context": context, "features": None, "ratio": 0.15, "max_block": 3})
    budget, run = method.budget(model), Run(3, batch_size=4)
    trial = Trial(method.settings(budget.shape, tokens), method.held, 0)
    blocks = candidate_blocks(range(6), shortest, 3)
    assert set(map(len, blocks)) == set(range(shortest, 4))
    damage = choose_by_damage(model, tokens, blocks, budget, trial, run, False, start)
    chosen, least = damage.together[0]
    assert least == min(value for _, value in damage.together)
    assert {block for taken, _ in damage.together for block in taken} <= set(damage.alone)
    tried, first = {taken for taken, _ in damage.together}, proposed(damage.alone, budget)
    assert first.keys() < tried
    near = [set(beside(chosen, damage.alone, budget, price)) for price in set(first.values())]
    assert any(sets and sets <= tried for sets in near)  # at the price that proposed it
    held = tokens.select(slice(len(tokens) - tokens.held_out(method.held), None))
    for taken, value in damage.together:
        assert sum(map(budget.removal, taken)) >= budget.target.parameters
        edits = [edit for c in taken for edit in dataclasses.replace(
            method, fill=False, blocks=((c.start, c.stop),))(model, tokens, run).edits]
        assert value == pytest.approx(divergence(model, apply_edits(model, edits), held), rel=1e-3, abs=1e-5)
    assert method(model, tokens, run).blocks == list(chosen)


def drawn_damage(model: PreTrainedModel) -> tuple[Budget, dict[range, float]]:
    """A budget, and blocks with a damage that was drawn."""
    budget = KDP(ratio=0.2, protect=0.25, kernel="linear", context="none").budget(model)
    candidates = candidate_blocks(range(4, 12), 1, 4)
    draw = torch.rand(len(candidates), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return budget, dict(zip(candidates, draw.tolist(), strict=True))


def within_slack(budget: Budget, candidates: Iterable[range]) -> list[tuple[range, ...]]:
    """By brute force the sets of separated blocks that meet the target and stay within the slack."""
    sets = [taken for count in (1, 2, 3) for taken in itertools.combinations(candidates, count)
            if all(second.start > first.stop for first, second in itertools.pairwise(taken))]
    removed = [sum(map(budget.removal, taken)) for taken in sets]
    least = min(value for value in removed if value >= budget.target.parameters)
    most = max(least, budget.target.parameters + budget.slack)
    return [taken for taken, value in zip(sets, removed, strict=True) if budget.target.parameters <= value <= most]


def test_proposals_are_those_of_brute_force_at_every_price(bundled: PreTrainedModel) -> None:
    budget, damage = drawn_damage(bundled)
    within = within_slack(budget, damage)
    expected = [min(sum(damage[c] + price for c in taken) for taken in within) for price in damage_module.PRICES]
    found = proposed(damage, budget)
    costs = [[sum(damage[c] + price for c in taken) for taken in found] for price in damage_module.PRICES]
    assert [min(values) for values in costs] == pytest.approx(expected)
    for taken, price in found.items():
        place = damage_module.PRICES.index(price)
        assert sum(damage[c] + price for c in taken) == pytest.approx(expected[place])
    assert len({len(taken) for taken in within}) > 1


def test_what_is_not_known_is_guessed_from_the_line_through_what_is() -> None:
    blocks = [range(start, start + 2) for start in range(4)]
    errors = {block: 0.1 * 2.0**number for number, block in enumerate(blocks)}
    alone = {blocks[0]: 0.3, blocks[3]: 0.3 * 8**0.5}
    found = guessed(alone, errors)
    assert {block: found[block] for block in alone} == alone
    assert list(found) == blocks
    # One pair at a distance of log 8 and a slope of 1/2, and the measurement of slope 1 that counts .1.
    squares = math.log(8) ** 2 / 2
    slope = (squares / 2 + 0.1) / (squares + 0.1)
    middle = 0.3 * 8**0.25
    assert found[blocks[1]] == pytest.approx(middle * (errors[blocks[1]] / (0.1 * 8**0.5)) ** slope)
    assert guessed({blocks[0]: 1.0}, errors)[blocks[3]] == pytest.approx(8.0)  # as the error goes


def test_what_the_best_guess_would_take_is_measured(tiny_model, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = tiny_model("qwen3", seed=5), random_tokens(rows=40, length=16)
    method = KDP(**{**SOLVED, "kernel": "linear+data", "features": None, "ratio": 0.15, "max_block": 3})
    budget = method.budget(model)
    blocks = candidate_blocks(range(6), 2, 3)
    trial, errors = Trial(method.settings(budget.shape, tokens), method.held, 0), {}
    linear_errors = Measuring.linear_errors
    monkeypatch.setattr(Measuring, "linear_errors",
                        lambda *about: errors.update(linear_errors(*about)) or errors)
    monkeypatch.setattr(damage_module, "PASSES", 1e9)
    damage = choose_by_damage(model, tokens, blocks, budget, trial, Run(3, batch_size=4), fill=False)
    assert len(damage.alone) < len(blocks)
    for taken in proposed(guessed(damage.alone, errors), budget):
        assert set(taken) <= set(damage.alone)  # whatever else was not measured


def test_sets_beside_the_best_lack_one_of_its_blocks_and_cost_least_of_those(bundled: PreTrainedModel) -> None:
    budget, damage = drawn_damage(bundled)
    damage = {block: 0.2 * value for block, value in damage.items()}  # of the prices' size
    sets = within_slack(budget, damage)
    assert len(proposed(damage, budget)) > 1
    for best, price in proposed(damage, budget).items():
        costs = {taken: sum(damage[c] + price for c in taken) for taken in sets}
        found = beside(best, damage, budget, price)
        assert set(found.values()) == {price}
        assert sorted(costs[one] for one in found) == pytest.approx(
            sorted({min(cost for taken, cost in costs.items() if missing not in taken) for missing in best}))
        assert best not in found
        # Without any of them the target is out of reach.
        assert beside(best, {c: damage[c] for c in best}, budget, price) == {}


def test_a_loss_that_is_no_number_is_never_chosen() -> None:
    model = build("llama3")
    budget = KDP(ratio=0.1).budget(model)
    damage = {range(1, 3): math.inf, range(2, 4): 3.0}
    assert list(proposed(damage, budget)) == [(range(2, 4),)]


def test_same_seed_same_damage_and_the_final_fits_do_not_know_of_it(tiny_model) -> None:
    model, tokens = tiny_model("llama3"), random_tokens(rows=20)
    options = {"ratio": 0.15, "protect": 0.0, "features": None}
    options |= {"kernel": "linear+data"}
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


def test_a_run_that_finds_what_no_number_was_takes_the_same(
    tiny_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens = tiny_model("qwen3", seed=5), random_tokens(rows=40, length=16)
    method = KDP(**{**SOLVED, "kernel": "linear+data", "features": None, "ratio": 0.15, "max_block": 3})
    budget, damages, seen = method.budget(model), Measuring.damages, []

    def overflowing(measuring, sets, *about) -> list[float]:
        found = damages(measuring, sets, *about)
        seen.extend(sets)
        return [math.inf if len(seen) == len(sets) and place == 0 else value for place, value in enumerate(found)]

    monkeypatch.setattr(Measuring, "damages", overflowing)
    cache = Cache(tmp_path)
    first, second = (choose_by_damage(
        model, tokens, candidate_blocks(range(6), 2, 3), budget,
        Trial(method.settings(budget.shape, tokens), method.held, 0),
        Run(3, batch_size=4, cache=cache, about="this"), fill=False) for _ in range(2))
    assert math.inf in first.alone.values()
    assert first == second


def test_other_schedules_find_the_choice_and_another_ridge_does_not(
    tiny_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens = tiny_model("llama3"), random_tokens(rows=40, length=16)
    method = KDP(**{**SOLVED, "kernel": "linear+data", "features": None, "ratio": 0.15, "max_block": 3})
    budget, measuring_of, made = method.budget(model), Measuring.of, []
    monkeypatch.setattr(Measuring, "of", lambda *about: made.append(about) or measuring_of(*about))
    run = Run(3, batch_size=4, cache=Cache(tmp_path), about="this")

    def chosen(**options) -> tuple:
        settings = dataclasses.replace(method, **options).settings(budget.shape, tokens)
        found = choose_by_damage(
            model, tokens, candidate_blocks(range(6), 2, 3), budget,
            Trial(settings, method.held, 0), run, fill=False)
        return found.together[0][0]

    first = chosen()
    assert chosen(refine_epochs=7, rate=1e-5, kernel_epochs=3, batch=2) == first
    assert len(made) == 1
    chosen(ridge=1e-2)
    assert len(made) == 2


def test_linear_errors_are_means(tiny_model) -> None:
    model, tokens, method = tiny_model("llama3"), random_tokens(rows=24), KDP(**{**SOLVED, "ratio": 0.1})
    trial = Trial(method.settings(method.budget(model).shape, tokens), 0.25, 0)
    twice = tokens.select(torch.cat([torch.arange(24), torch.arange(18, 24)]))  # six rows that no fit sees, and twelve
    one, other = (
        Measuring.of(
            model, rows, [range(1, 3), range(1, 4)], dataclasses.replace(trial, held=held), Run(3, batch_size=4)
        ).linear_errors([range(1, 3), range(1, 4)]) for rows, held in ((tokens, 6 / 24), (twice, 12 / 30)))
    assert one == pytest.approx(other, rel=1e-5)
    assert 0 < one[range(1, 3)] < one[range(1, 4)] < 2


@pytest.mark.parametrize("most", [0, 3, 40])
def test_totals_beyond_a_bound_are_left_out_and_nothing_else(most: int) -> None:
    blocks = candidate_blocks(range(8), 1, 3)

    def score(block: range) -> float:
        return math.sin(7 * block.start + len(block))

    whole = reachable(blocks, score, len)
    assert reachable(blocks, score, len, most) == {size: entry for size, entry in whole.items() if size <= most}


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
    monkeypatch.setattr(measuring_module, "FIT_TOKENS", 12 * 10)
    monkeypatch.setattr(measuring_module, "PER_INPUT", 0)
    monkeypatch.setattr(measuring_module, "DAMAGE_TOKENS", 12 * 3)
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


@pytest.mark.parametrize("room", ["abreast", "one by one", "in files"])
def test_a_streamed_model_is_measured_to_the_same_bits(
    room: str, tiny_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last layer, behind all blocks, is read once for the states and once for every round of candidates and of
    sets."""
    tiny_model("qwen3", seed=5).save_pretrained(tmp_path / "model")
    whole, streamed = load_model(tmp_path / "model", device="cpu"), load_streamed(tmp_path / "model", device="cpu")
    tokens = padded_tokens()
    set_scratch(streamed, Scratch(tmp_path / "scratch" if room == "in files" else None,
                                  1 if room == "one by one" else 2**30))
    reads: Counter[str] = Counter()
    read = Source.read

    def counted(source: Source) -> torch.Tensor:
        reads[source.stored.key] += 1
        return read(source)

    monkeypatch.setattr(Source, "read", counted)
    rounds, damages = [], Measuring.damages
    monkeypatch.setattr(Measuring, "damages", lambda *about: rounds.append(about) or damages(*about))
    method = KDP(**{**SOLVED, "kernel": "linear+data", "features": None, "ratio": 0.1, "max_block": 3, "protect": 0.1})
    budget = method.budget(whole)
    trial = Trial(method.settings(budget.shape, tokens), method.held, 0)
    blocks = candidate_blocks(range(1, 5), 2, 3)
    damage, found = (
        choose_by_damage(model, tokens, blocks, budget, trial, Run(3, batch_size=4), True, blocks[:1])
        for model in (whole, streamed))
    assert damage == found
    last = [count for key, count in reads.items() if key.startswith("model.layers.5.")]
    assert len(rounds) // 2 < len(damage.alone) + len(damage.together)
    passes = 1 + len(rounds) // 2 if room != "one by one" else 1 + len(damage.alone) + len(damage.together)
    if room == "one by one":
        passes += len(list(streamed_batches(tokens))) - 1  # the states' pass takes one batch at a time as well
    assert set(last) == {passes}


def test_many_states_are_measured_with_from_the_work_directory(
    tiny_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens = tiny_model("qwen3"), padded_tokens()
    method = solved(kernel="linear+data", ratio=0.1)
    trial = Trial(method.settings(method.budget(model).shape, tokens), method.held, 0)
    candidates = [[Candidate(range(1, 3), method.budget(model).shape)]]
    found, spilled = [], []
    for most in (2**31, 0):
        monkeypatch.setattr(measuring_module, "HELD", most)
        run = Run(3, batch_size=4, cache=Cache(tmp_path / str(most)), about="this")
        found.append(Measuring.of(model, tokens, [range(1, 3)], trial, run).damages(candidates, "damage"))
        spilled.append(sum(file.is_file() for file in (tmp_path / str(most) / "states").rglob("*")))
    assert found[0] == found[1]
    assert spilled[0] == 0 < spilled[1]


def streamed_batches(tokens: TokenSet) -> Iterator[TokenSet]:
    """The batches of rows that are looked at: all of them, those that no fit sees set the size."""
    return tokens.batches(tokens.held_out(0.1))


def test_a_method_that_measures_takes_streamed_and_placed_models_and_copies_in_fewer_bits(bench: Bench) -> None:
    method, tokens = KDP(ratio=0.1, ranking="damage"), random_tokens()
    method.check(load_streamed(bench.model, device="cpu"), tokens)
    method.check_states_model()


def test_of_a_copy_in_fewer_bits_it_is_the_copy_that_is_measured(tiny_model) -> None:
    model, copy = tiny_model("llama3"), tiny_model("llama3", seed=1)
    tokens, method = random_tokens(rows=20), solved(kernel="linear", ratio=0.1)
    budget = method.budget(model)
    trial = Trial(method.settings(budget.shape, tokens), method.held, 0)
    block = range(1, 3)
    values = [
        choose_by_damage(one, tokens, [block], budget, trial, Run(3, batch_size=4, states_model=states), False)
        for one, states in ((model, None), (copy, None), (model, copy))]
    assert values[2].alone != values[0].alone
    assert values[2].alone[block] != values[1].alone[block]  # its attention is the model's own


def test_planning_measures_nothing() -> None:
    assert plan(ranking="damage").blocks == plan().blocks
