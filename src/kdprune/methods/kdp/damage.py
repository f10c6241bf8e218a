"""Blocks chosen by what their stand-ins cost (``measuring``): which are measured, and which sets are proposed."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from kdprune.data.tokens import TokenSet
from kdprune.methods.common.budget import Budget
from kdprune.methods.common.selection import reachable
from kdprune.methods.kdp.measuring import (
    ALONE,
    DAMAGE_TOKENS,
    FIT_TOKENS,
    PER_INPUT,
    TOP,
    Measuring,
    Trial,
    damage_rows,
    fit_rows,
)
from kdprune.model.families import decoder_layers
from kdprune.runtime.run import Run
from kdprune.store.cache import JsonCodec

PASSES = 2.0  # passes of the calibration rows through the model that measuring candidates alone may cost, …
SET_PASSES = 1.0  # … and measuring sets
MOST = 4  # most candidates alone for every length, and most sets for every price
# What one block more counts, in nats, in the programme that proposes sets: damages do not add up, and which way they
# do not is found by measuring a set of many short blocks beside one of few long ones.
PRICES = (-0.1, -0.03, 0.0, 0.03, 0.1)


@dataclass(frozen=True)
class Damage:
    """What was measured: Δ, KL(dense‖pruned) in nats a token, of blocks alone and of the sets tried together.

    Attributes:
        alone: by block.
        together: the sets, best first, with the Δ of all their stand-ins at once.
    """

    alone: Mapping[range, float]
    together: Sequence[tuple[tuple[range, ...], float]]


def trials(
    tokens: TokenSet, blocks: Sequence[range], held: float, model: PreTrainedModel, start: int = 0,
) -> tuple[int, int, float]:
    """From how many blocks alone on no more are measured, but those that a set still lacks; how many sets at most, both
    beyond a set of ``start`` blocks, which is counted in; and what these cost in tokens that pass the whole model, fits
    not counted."""
    lengths = len(set(map(len, blocks)))
    fitted, scored = fit_rows(tokens, held, model.config.hidden_size).tokens, damage_rows(tokens, held).tokens
    # A trial runs the layers behind the block, half of all on average, and the block's MLPs over the fitted rows.
    cost = scored / ALONE / 2 + fitted * (1 + lengths / 2) / len(decoder_layers(model))
    most = max(min(round(PASSES * tokens.tokens / cost), MOST * lengths), len(_first_lengths(blocks)))
    sets = max(min(round(SET_PASSES * tokens.tokens / max(scored, 1)), MOST * len(PRICES)), len(PRICES))
    most, sets = most + start, sets + (start > 0)
    return most, sets, most * cost + sets * scored


def choose_by_damage(
    model: PreTrainedModel, tokens: TokenSet, blocks: Sequence[range], budget: Budget, trial: Trial, run: Run,
    fill: bool, start: Sequence[range] = (),
) -> Damage:
    """Damage of blocks behind stand-ins, and of separated ones that meet the budget together, of which the first set,
    all in place at once, does the least that was found.

    1. The relative error of a linear map of the state, held out, for every block.
    2. Δ alone of the blocks of least error of some lengths, and of those of ``start``:

           Δ = E[ KL(p‖q) ],  p(x_t | x_<t) of the dense model, q of the one with the closed-form stand-in

       over held-out tokens, half of those that sets are measured on; of p the ``TOP`` most probable tokens are told
       apart. A difference of next-token losses would be as much as twenty times noisier, and says little of a model
       that is unsure of the text.
    3. Sets of least Σ Δ + price · blocks within the budget, one for every of ``PRICES``, Δ as :func:`guessed` where it
       is not known; what of these is only guessed is measured alone, and so on until nothing in them is, or as often
       as :func:`trials` allows; of one set at least everything is.
    4. Δ of these sets and of ``start``, their spare parameters spent: damages do not add up, so that the sum only
       proposes. Around the best, what the price that proposed it gives without one or another of its blocks, until none
       of these is better.

    Args:
        blocks: those to choose from, none of them over a layer that must stay.
        budget: what has to go, its slack, and the stand-in.
        trial: how stand-ins are fitted.
        fill: whether a set's spare parameters are spent before it is measured.
        start: a set within the budget that is measured whatever the programme proposes, such as that of similarity.
    """
    follows_from = [
        [trial.settings.solved, trial.held, trial.path],
        budget.shape, _ends(blocks), budget.target.parameters, budget.slack, fill, _ends(start),
        [FIT_TOKENS, PER_INPUT, DAMAGE_TOKENS, ALONE, TOP, PASSES, SET_PASSES, MOST, PRICES]]
    measured = run.cached(
        "damage", follows_from, lambda: _plain(_measure(model, tokens, blocks, budget, trial, run, fill, start)),
        JsonCodec(dict))
    alone = {range(*ends): _value(value) for ends, value in measured["alone"]}
    return Damage(alone, [(tuple(range(*ends) for ends in chosen), _value(value))
                          for chosen, value in measured["together"]])


def _plain(damage: Damage) -> dict[str, Any]:
    return {"alone": list(zip(_ends(damage.alone), damage.alone.values(), strict=True)),
            "together": [[_ends(chosen), value] for chosen, value in damage.together]}


def _ends(blocks: Iterable[range]) -> list[list[int]]:
    return [[block.start, block.stop] for block in blocks]


def _value(value: float | None) -> float:
    """A Δ that was kept: what is no number has no place in JSON."""
    return math.inf if value is None else value


def _measure(
    model: PreTrainedModel, tokens: TokenSet, blocks: Sequence[range], budget: Budget, trial: Trial, run: Run,
    fill: bool, start: Sequence[range],
) -> Damage:
    measuring = Measuring.of(model, tokens, blocks, trial, run)
    most, sets, _ = trials(tokens, blocks, trial.held, model, len(start))
    errors = measuring.linear_errors(blocks)

    def damages(new: Sequence[range]) -> dict[range, float]:
        values = measuring.damages([[one] for one in budget.candidates(new)], "damage", ALONE)
        return dict(zip(new, values, strict=True))

    alone = damages(list(dict.fromkeys([*_first(errors), *start])))
    chosen = proposed(guessed(alone, errors), budget)
    while len(alone) < most and (new := _unknown(chosen, alone)):
        alone |= damages(new[: most - len(alone)])
        chosen = proposed(guessed(alone, errors), budget)
    # Else what is known might meet the target with one long block alone, far beyond it.
    if lacking := min((_unknown([one], alone) for one in chosen), key=len):
        alone |= damages(lacking)
    together: dict[tuple[range, ...], float] = {}
    price_of = ({tuple(start): 0.0} if start else {}) | proposed(alone, budget)
    while new_sets := [one for one in price_of if one not in together][: max(sets - len(together), 0)]:
        values = measuring.damages([budget.candidates(one, fill) for one in new_sets], "damage of sets")
        together |= zip(new_sets, values, strict=True)
        best = min(together, key=together.__getitem__)
        price_of = beside(best, alone, budget, price_of[best]) | price_of
    measuring.forget()
    return Damage(alone, sorted(together.items(), key=lambda entry: entry[1]))


def _unknown(sets: Iterable[Sequence[range]], known: Mapping[range, float]) -> list[range]:
    """The blocks of these sets whose Δ is not known, each once."""
    return list(dict.fromkeys(block for chosen in sets for block in chosen if block not in known))


def _first(errors: Mapping[range, float]) -> list[range]:
    """The block of least error of some lengths."""
    return [min((block for block in errors if len(block) == length), key=errors.__getitem__)
            for length in _first_lengths(errors)]


def _first_lengths(blocks: Iterable[range]) -> list[int]:
    """1, 2, 4, …, those of them that there are; or the shortest."""
    lengths = sorted(set(map(len, blocks)))
    return [length for length in lengths if length & (length - 1) == 0] or lengths[:1]


def guessed(alone: Mapping[range, float], errors: Mapping[range, float]) -> dict[range, float]:
    """Δ of every block: as measured, or

        log Δ = a + b log error,   b = (Σ xy + ε) / (Σ x² + ε)

    with x and y the logarithms of what has been measured, less their means, and ε = .1 for one measurement in which Δ
    goes with the error. Where nothing has a finite Δ, the error itself.
    """
    def logarithm(value: float) -> float:
        return math.log(min(max(value, 1e-12), 1e3))

    middle, height, slope = 0.0, 0.0, 1.0
    if finite := [block for block, value in alone.items() if math.isfinite(value)]:
        x, y = ([logarithm(of[block]) for block in finite] for of in (errors, alone))
        middle, height = statistics.fmean(x), statistics.fmean(y)
        products = sum((one - middle) * (other - height) for one, other in zip(x, y, strict=True))
        slope = (products + 0.1) / (sum((one - middle) ** 2 for one in x) + 0.1)
    return {block: alone[block] if block in alone else math.exp(height + slope * (logarithm(error) - middle))
            for block, error in errors.items()}


def beside(
    best: Sequence[range], alone: Mapping[range, float], budget: Budget, price: float
) -> dict[tuple[range, ...], float]:
    """The sets that this price proposes without one of the best set's blocks, where there are any, → the price."""
    found: dict[tuple[range, ...], float] = {}
    for block in best:
        others = {other: value for other, value in alone.items() if other != block}
        if others and budget.most_removed(list(others)) >= budget.target.parameters:
            found |= proposed(others, budget, (price,))
    return found


def proposed(
    alone: Mapping[range, float], budget: Budget, prices: Sequence[float] = PRICES
) -> dict[tuple[range, ...], float]:
    """The sets of separated blocks within the budget and its slack of least Σ Δ + price · blocks → the price, that
    nearest to none of those that propose it."""
    found: dict[tuple[range, ...], float] = {}
    target, sizes = budget.target.parameters, list(map(budget.removal, alone))
    # A set beyond this still meets the target when it lacks any one of its blocks.
    most = target + budget.slack + max(sizes) - sum(min(size, 0) for size in sizes)
    for price in sorted(prices, key=abs):
        cost = {block: min(value, 1e3) + price for block, value in alone.items()}
        table = reachable(list(cost), lambda one, cost=cost: -cost[one], budget.removal, most)  # type: ignore[misc]
        enough = [removed for removed in table if removed >= target]
        near = [removed for removed in enough if removed <= max(min(enough), target + budget.slack)]
        found.setdefault(table[max(near, key=lambda removed: table[removed][0])][1], price)
    return found
