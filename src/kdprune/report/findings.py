"""What each picture shows, said in one sentence with its numbers."""

import math
import statistics
from collections.abc import Sequence

from kdprune.report.analysis_record import Analysis
from kdprune.report.heal_record import Heal
from kdprune.report.records import Curve, Fit, KernelTraining, Number, Outliers, best_of, divide
from kdprune.report.results import Results
from kdprune.report.summary import count, layer_range, listed, percent


def _median(values: Sequence[Number]) -> float | None:
    """Median of the known values."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _number(value: Number) -> str:
    """Three significant digits."""
    return "–" if value is None else f"{value:,.3g}"


def pairs(results: Results, name: str) -> str:
    """The similarity of the states before and behind each chosen block."""
    matrix = getattr(results.analysis, name)
    found = [f"{layer_range((s, e))}: {_number(matrix[s][e])}" for s, e in results.blocks]
    return f"Across layers {', '.join(found)}" if found else ""


def updates(results: Results) -> str:
    """How much the chosen layers change the state, against the others."""
    values = analysis_of(results).relative_update
    chosen = {layer for start, end in results.blocks for layer in range(start, end)}
    inside = _median([value for layer, value in enumerate(values) if layer in chosen])
    outside = _median([value for layer, value in enumerate(values) if layer not in chosen])
    if inside is None:
        return f"A layer changes the state by {percent(outside)} of its norm (median)."
    return (
        f"A chosen layer changes the state by {percent(inside)} of its norm, another by {percent(outside)} (medians)."
    )


def premise(results: Results) -> str:
    """Whether CKA lies above cosine, the observation the method starts from."""
    analysis = analysis_of(results)
    known = [
        (cosine, linear, rbf)
        for cosine, linear, rbf in zip(analysis.cosine, analysis.linear_cka, analysis.rbf_cka, strict=True)
        if cosine is not None and linear is not None and rbf is not None
    ]
    linear_above = sum(linear > cosine for cosine, linear, _ in known)
    rbf_above = sum(rbf > cosine for cosine, _, rbf in known)
    return f"Linear CKA lies above cosine in {linear_above} of {len(known)} layers, RBF CKA in {rbf_above}."


def massive(results: Results) -> str:
    """Which layers write and erase massive tokens, and how large those are."""
    analysis = analysis_of(results)
    ratios = [divide(top, middle) for top, middle in zip(analysis.largest_norm, analysis.median_norm, strict=True)]
    known = [(ratio, boundary) for boundary, ratio in enumerate(ratios) if ratio is not None]
    if not known:
        return ""
    ratio, boundary = max(known)
    text = f"The largest token norm is {_number(ratio)} times the median, in h{_low(boundary)}"
    deeds = [f"{_layers(layers)} {verb}{'s' * (len(layers) == 1)} them"
             for layers, verb in ((analysis.writes, "write"), (analysis.erases, "erase")) if layers]
    if not deeds:
        return f"{text}: no layer writes or erases massive tokens."
    share = percent(analysis.left_out / max(1, analysis.left_out + analysis.tokens), 1)
    return (f"{text}: {', '.join(deeds)}. No block is put over these unless named; the {share} of tokens that are "
            f"massive anywhere are left out of the similarities.")


def _layers(layers: Sequence[int]) -> str:
    """Layer 11, or layers 2 and 3."""
    return f"layer{'s' * (len(layers) > 1)} {listed([str(layer) for layer in layers])}"


def _low(number: int) -> str:
    """A number as an index: 12 → ₁₂."""
    return str(number).translate(str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉"))


def damage(results: Results) -> str:
    """The block of least damage, and those that were chosen."""
    found = analysis_of(results).block_damage
    least = min(found, key=found.__getitem__)
    chosen = [f"layers {layer_range(block)} {_number(found[block])}" for block in results.blocks if block in found]
    text = f"Of {len(found)} blocks layers {layer_range(least)} cost least, {_number(found[least])} nats a token"
    return f"{text}; chosen: {', '.join(chosen)}." if chosen else f"{text}."


def healing(heal: Heal) -> str:
    """Where the held-out rows began, and where they were best."""
    best = best_of(heal.watched)
    if best is None:
        return ""
    text = f"Held-out loss {_number(heal.watched[0])} → {_number(heal.watched[best])} nats"
    return f"{text} after {count(heal.tokens_at_looks[best])} tokens." if best else f"{text}: training gained nothing."


def left_over(results: Results) -> str:
    """The largest share of a block's change that its stand-in misses, against the linear map."""
    parts = [
        f"layers {layer_range(fit.block)}: {percent(fit.state_error)}"
        + ("" if fit.linear_error is None else f" (linear map {percent(fit.linear_error)})")
        for fit in results.fit
        if fit.state_error is not None
    ]
    return f"Left of the block’s change – {'; '.join(parts)}." if parts else ""


def training(curve: KernelTraining | Curve) -> str:
    """Where loss and cosine began and ended."""
    if not curve.loss:
        return ""
    if len(curve.loss) == 1:
        text = f"Solved at once: loss {_number(curve.loss[0])}"
        return f"{text}, cosine {_number(curve.cosine[0])}." if curve.cosine else f"{text}."
    text = f"Loss {_number(curve.loss[0])} → {_number(curve.loss[-1])}"
    if curve.cosine:
        text += f", cosine {_number(curve.cosine[0])} → {_number(curve.cosine[-1])}"
    text = f"{text} in {len(curve.loss)} epochs."
    best = best_of(curve.watched) if isinstance(curve, Curve) else None
    if best is None:
        return text
    held = [_number(curve.watched[index]) for index in (0, best)]  # type: ignore[union-attr]
    return f"{text} On held-out rows {held[0]} → {held[1]}, " + (
        f"best after epoch {best}." if best else "best before the first: undone.")


def constants(fit: Fit) -> str:
    """B_A, R_φ and the explained variance after training."""
    text = f"B_A ends at {_number(fit.B_A)}, R_φ at {_number(fit.R_phi)}"
    if fit.explained_variance is not None:
        text += f"; the operators explain {percent(fit.explained_variance)} of the variance of φ(hₑ)"
    return text + "."


def norm_decay(fit: Fit) -> str:
    """What is left of the norm after all steps, and what α restores."""
    norms, parts = fit.norms, []
    if norms is None:
        return ""
    if norms.feature_true and norms.feature_predicted:
        share = divide(norms.feature_predicted[-1], norms.feature_true[-1])
        parts.append(f"after {len(norms.feature_predicted) - 1} steps {percent(share)} of the true norm is left")
    before = divide(norms.output_without_alpha, norms.output_true)
    after = divide(norms.output_with_alpha, norms.output_true)
    if before is not None and after is not None:
        parts.append(f"a read-out of true features gives {percent(before)} of the true output, with α {percent(after)}")
    text = "; ".join(parts)
    return text[:1].upper() + text[1:] + "." if text else ""


def bound(fit: Fit) -> str:
    """How far Theorem 1's bound lies above the measured error."""
    if not fit.k_step_error or not fit.bound:
        return ""
    error, limit = fit.k_step_error[-1], fit.bound[-1]
    ratio = divide(limit, error)
    times = "" if ratio is None else f", {_number(ratio)} times as much"
    return f"After {len(fit.k_step_error)} steps the error is {_number(error)}, the bound {_number(limit)}{times}."


def risks(fit: Fit) -> str:
    """Which space is closer to linear."""
    kernel, original = fit.kernel_risk, fit.original_risk
    if kernel is None or original is None:
        return ""
    word = "lower" if kernel < original else "higher"
    return f"Over the block {percent(kernel)} in kernel space, {word} than {percent(original)} in the original."


def outliers(points: Outliers) -> str:
    """How well outlier and ordinary dimensions are predicted."""
    text = f"Relative rms error {percent(relative_error(points, -1))} in ordinary dimensions"
    if points.dimensions:
        names = ", ".join(str(name) for name in points.dimensions)
        scales = ", ".join(f"{scale:.2g}×" for scale in points.scale if scale is not None)
        text += f", {percent(relative_error(points, *points.dimensions))} in the outlier dimensions {names}"
        text += f" ({scales} the median size)" if scales else ""
    return text + "."


def relative_error(points: Outliers, *dimensions: int) -> float | None:
    """sqrt(Σ(predicted − true)² / Σ true²) over the points of these dimensions (−1: ordinary ones)."""
    mine = [
        (true, guess)
        for true, guess, dimension in zip(points.true, points.predicted, points.dimension, strict=True)
        if true is not None and guess is not None and dimension in dimensions
    ]
    share = divide(sum((guess - true) ** 2 for true, guess in mine), sum(true**2 for true, _ in mine))
    return None if share is None else math.sqrt(share)


def stand_in(fit: Fit) -> str:
    """The module in one line."""
    if fit.ordinary:
        return (f"ordinary decoder layer with {fit.channels} of the block's own channels, "
                f"{count(fit.parameters)} parameters")
    kinds = {"fourier": f"{fit.features} random Fourier frequencies", "mlp": f"{fit.features} MLP features",
             "linear": "linear map", "data": f"{fit.channels} of the block's own channels"}
    parts = [" + ".join(kinds[part] for part in fit.kind.split("+"))]
    parts += [f"rank {fit.rank}"] if fit.rank else []
    parts += [f"hidden width {fit.hidden}" if fit.hidden else "linear read-out"] if fit.kind != "linear" else []
    heads = f" of {fit.context_groups} key-value head{'s' * (fit.context_groups > 1)}" if fit.context_groups else ""
    parts += [] if fit.context == "none" else [f"behind one {fit.context} sublayer{heads}"]
    return ", ".join([*parts, f"{count(fit.parameters)} parameters"])


def analysis_of(results: Results) -> Analysis:
    """The analysis, which whoever asks for its findings has made sure of."""
    assert results.analysis is not None
    return results.analysis
