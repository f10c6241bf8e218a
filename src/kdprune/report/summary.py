"""The figures people ask for first, in words and numbers, for the page, the tables and the card."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

from kdprune.report.records import Number, Pace, Perplexity
from kdprune.report.results import Results, Step
from kdprune.store.files import readable_bytes

MISSING = "–"
NOT_MEASURED = "not measured: the model was streamed from disk"
SPACE = "\u00a0"  # keeps a number and its unit on one line
OUTSIDE = {"all": "", "layers": " outside the embeddings"}  # by what a ratio is a share of


@dataclass(frozen=True)
class Row:
    """One line of the table dense against pruned."""

    name: str
    dense: str
    pruned: str
    change: str = ""


@dataclass(frozen=True)
class Tile:
    """One headline figure: its value, what it is, and what it was before."""

    value: str
    name: str
    detail: str


def count(number: float | None) -> str:
    """3548288 → 3.55 M."""
    if number is None:
        return MISSING
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= 0.9995 * unit:
            return f"{_short(number / unit)}{SPACE}{name}"
    return f"{number:.4g}"


def _short(number: float) -> str:
    """Three digits, without an exponent up to 999."""
    return f"{number:.3g}" if abs(number) < 999.5 else f"{number:.0f}"


def whole(number: float | None) -> str:
    """12350.4 → 12,350; small numbers keep three digits."""
    if number is None:
        return MISSING
    return f"{number:,.0f}" if abs(number) >= 100 else f"{number:.3g}"


def percent(share: float | None, digits: int = 0) -> str:
    """0.251 → 25 %."""
    return MISSING if share is None else f"{100 * share:.{digits}f}{SPACE}%"


def decimals(number: float | None, digits: int = 2) -> str:
    """A fixed number of decimals; very large ones in powers of ten."""
    if number is None:
        return MISSING
    return f"{number:,.{digits}f}" if abs(number) < 1e6 else f"{number:.3g}"


def times(ratio: float | None) -> str:
    """1.392 → 1.39×."""
    return MISSING if ratio is None else f"{ratio:.2f}×" if abs(ratio) < 1e4 else f"{ratio:.2g}×"


def size(number: float | None) -> str:
    """Bytes in binary units: 1310000000 → 1.22 GiB."""
    return MISSING if number is None else readable_bytes(number).replace(" ", SPACE)


def duration(seconds: float | None) -> str:
    """75.3 → 1 min 15 s."""
    if seconds is None:
        return MISSING
    if seconds < 59.95:
        return f"{seconds:.1f}{SPACE}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    text = f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
    return text.replace(" ", SPACE)


def listed(names: Sequence[str]) -> str:
    """A, b and c."""
    *front, last = names
    return f"{', '.join(front)} and {last}" if front else last


def layer_range(block: tuple[int, int]) -> str:
    """The layers of a block, both ends included: (4, 10) → 4–9."""
    start, end = block
    return f"{start}" if end == start + 1 else f"{start}–{end - 1}"


def block_list(results: Results) -> str:
    """Layers 4–9 and 11–13."""
    joined = listed([layer_range(block) for block in results.blocks])
    one = len(results.blocks) == 1 and results.blocks[0][1] == results.blocks[0][0] + 1
    return f"layer {joined}" if one else f"layers {joined}"


def perplexity_setting(results: Results) -> str:
    """How the perplexity was taken."""
    p = results.perplexity
    if p is None:
        return ""
    return f"{p.dataset}: {p.tokens:,} tokens, window {p.window}, stride {p.stride}"


def speed_setting(results: Results) -> str:
    """How the speed was taken, or why it was not; empty where nobody asked."""
    s = results.speed
    if s is None:
        return NOT_MEASURED if results.streamed and results.layers.pruned is not None else ""
    return f"{s.device}: batch {s.batch}, prompt {s.prompt}, {s.new_tokens} new tokens"


def comparison(results: Results) -> list[Row]:
    """Dense against pruned, what was measured only."""
    layers, parameters = results.layers, results.parameters
    removed = "" if layers.pruned is None else f"{layers.pruned - layers.dense:+d}".replace("-", "−")
    rows = [
        Row("layers", str(layers.dense), MISSING if layers.pruned is None else str(layers.pruned), removed),
        Row("parameters", f"{parameters.dense:,}", whole(parameters.pruned)),
        Row("net ratio", "", percent(parameters.net_ratio, 2)),
    ]
    if parameters.dense_layers is not None:
        rows.insert(2, Row("layers' parameters", f"{parameters.dense_layers:,}", whole(parameters.pruned_layers),
                           "outside the embeddings"))
        rows.append(Row("layers' net ratio", "", percent(parameters.net_ratio_layers, 2)))
    if parameters.first is not None:
        rows.append(Row("… against the first dense model", f"{parameters.first:,}",
                        percent(parameters.net_ratio_first, 2), _of_layers(parameters.net_ratio_first_layers, "")))
    if (p := results.perplexity) is not None:
        excess = "" if p.excess_loss is None else f"{p.excess_loss:+.3f} nats".replace("-", "−")
        rows.append(Row("perplexity", decimals(p.dense), decimals(p.pruned), excess))
        rows.append(Row("retained", "", percent(p.retained, 1)))
        if p.divergence is not None:
            rows.append(Row("KL(dense‖pruned), nats", "0", decimals(p.divergence, 3)))
            rows.append(Row("same next token", "", percent(p.agreement, 1)))
    for other in results.texts:
        excess = "" if other.excess_loss is None else f"{other.excess_loss:+.3f} nats".replace("-", "−")
        rows.append(Row(_where(other, results.perplexity), decimals(other.dense), decimals(other.pruned), excess))
    if (s := results.speed) is not None:
        rows += [_pace("prefill, tokens/s", s.prefill), _pace("decode, tokens/s", s.decode)]
    elif setting := speed_setting(results):
        rows.append(Row("speed", MISSING, MISSING, setting.partition(":")[0]))
    if (kv := results.kv_cache_bytes_per_token) is not None:
        ratio = None if kv.pruned is None or not kv.dense else kv.pruned / kv.dense
        rows.append(Row("KV cache, bytes/token", whole(kv.dense), whole(kv.pruned), times(ratio)))
    return rows


def _where(other: Perplexity, first: Perplexity | None) -> str:
    """perplexity, window 512; with the text, where that is another one."""
    window = f"window {other.window}"
    return f"perplexity, {window}" if first is not None and other.dataset == first.dataset else (
        f"perplexity, {PurePath(other.dataset).name}, {window}")


def _pace(name: str, pace: Pace) -> Row:
    """A line of speed."""
    return Row(name, whole(pace.dense), whole(pace.pruned), times(pace.ratio))


def tiles(results: Results) -> list[Tile]:
    """The headline of the page."""
    p, s, parameters = results.perplexity, results.speed, results.parameters
    change = f"{count(parameters.dense)} → {count(parameters.pruned)}{_of_layers(parameters.net_ratio_layers, '; ')}"
    found = [
        Tile(percent(parameters.net_ratio, 1), "of the parameters removed, net", change)
        if parameters.pruned is not None
        else Tile(count(parameters.dense), "parameters", f"{results.layers.dense} layers")
    ]
    if p is not None and p.pruned is not None:
        found.append(
            Tile(decimals(p.pruned), "perplexity", f"{decimals(p.dense)} dense, {percent(p.retained)} retained")
        )
    elif p is not None:
        found.append(Tile(decimals(p.dense), "perplexity", p.dataset))
    for name, pace in (("prefill", s.prefill), ("decode", s.decode)) if s is not None else ():
        if pace.ratio is not None:
            detail = f"{whole(pace.dense)} → {whole(pace.pruned)} tokens/s"
            found.append(Tile(times(pace.ratio), f"{name} speed", detail))
    if results.seconds:
        total = sum(value or 0.0 for value in results.seconds.values())
        found.append(Tile(duration(total), "in all", f"peak memory {size(results.peak_memory_bytes)}"))
    return found


def healing(results: Results) -> str:
    """What training after pruning brought, in one line; empty where there was none."""
    if (found := results.heal) is None:
        return ""
    what = "the stand-ins" if found.what == "stand-ins" else "LoRA"
    loss = "next-token loss" if found.loss == "lm" else "KL against the dense model"
    figures = f"{decimals(found.before, 3)} → {decimals(found.after, 3)} nats on held-out calibration rows"
    deed = f"{what} on the {loss}, {whole(found.tokens)} tokens, {count(found.parameters)} parameters"
    return f"{deed}: {figures}{'' if found.kept else '; worse, so undone'}"


def is_hub_id(model: str) -> bool:
    """Whether a name has the form owner/model."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", model) is not None


def model_name(model: str) -> str:
    """A hub id as it is, the last part of a path."""
    return model if is_hub_id(model) else PurePath(model).name or model


def headline(results: Results) -> str:
    """The run in one sentence."""
    model = model_name(results.model)
    cost = _ratio_of_perplexity(results)
    sizes = results.parameters
    gain = (f"{percent(sizes.net_ratio, 1)} fewer parameters{_of_layers(sizes.net_ratio_layers, ' (', ')')}"
            f"{f' at {cost} the perplexity' if cost else ''}.")
    if sizes.first is not None and sizes.pruned is not None:
        gain = (f"{gain[:-1]} than that model, which was pruned before; {percent(sizes.net_ratio_first, 1)} fewer "
                f"parameters{_of_layers(sizes.net_ratio_first_layers, ' (', ')')} than the first, dense one.")
    if any(width.without for width in results.widths):
        return f"{_sublayers(results)} of {model} removed: {gain}"
    if results.widths:
        return f"{len(results.widths)} of {results.layers.dense} layers of {model} narrowed: {gain}"
    if not results.blocks:
        return f"The {results.layers.dense} layers of {model}, compared with each other."
    blocks = block_list(results)
    if results.parameters.pruned is None:
        return f"{blocks[0].upper()}{blocks[1:]} of {model} would be replaced."
    deed = "replaced by " + ("one stand-in" if len(results.fit) == 1 else f"{len(results.fit)} stand-ins")
    text = f"{blocks[0].upper()}{blocks[1:]} of {model} {deed if results.fit else 'removed'}"
    return f"{text}: {gain}"


def earlier(results: Results) -> list[str]:
    """What was pruned before, a line a step: "tiny: layers 2–3 by shortgpt, 6 → 4 layers, 3.5 M → 3.1 M parameters"."""
    return [_step(step) for step in results.chain]


def _step(step: Step) -> str:
    name = f"{model_name(step.model)}: " if step.model else ""
    what = f"layers {', '.join(map(layer_range, step.blocks))}" if step.blocks else "narrowed"
    by = f" by {step.method}" if step.method else ""
    sizes = "" if step.layers is None else f", {step.layers.dense} → {step.layers.pruned} layers"
    if step.parameters is not None:
        sizes += f", {count(step.parameters.dense)} → {count(step.parameters.pruned)} parameters"
    return f"{name}{what}{by}{sizes}"


def _sublayers(results: Results) -> str:
    """What was taken out of a model without some of its sublayers: "The attention of 3 layers and 2 whole layers"."""
    lacking = [width.without for width in results.widths]
    counts = {"the attention of {} layer": lacking.count("attention"), "the MLP of {} layer": lacking.count("mlp"),
              "{} whole layer": sum(end - start for start, end in results.blocks)}
    text = listed([text.format(count) + "s" * (count > 1) for text, count in counts.items() if count])
    return text[0].upper() + text[1:]


def _of_layers(ratio: Number, before: str, behind: str = "") -> str:
    """31.4 % of the layers'; nothing in records that do not have it."""
    return "" if ratio is None else f"{before}{percent(ratio, 1)} of the layers'{behind}"


def _ratio_of_perplexity(results: Results) -> str:
    """1.11 times, or nothing where it was not measured."""
    p = results.perplexity
    ratio: Number = None if p is None or not p.retained else 1 / p.retained
    return "" if ratio is None else f"{ratio:.2f} times" if ratio < 1e4 else f"{ratio:.2g} times"
