"""A comparison as a table: the cells, ``table.md``, and what the terminal shows at the end."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePath

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kdprune.report import summary
from kdprune.report.comparison_records import Comparison, Row, Stat, task_name
from kdprune.report.summary import MISSING, SPACE

Format = Callable[[float], str]
# title: (field of the row, how a number is written, whether its spread over seeds is shown)
COLUMNS: dict[str, tuple[str, Format, bool]] = {
    "net ratio": ("net_ratio", lambda x: f"{100 * x:.2f}", True),
    "layers' net ratio": ("net_ratio_layers", lambda x: f"{100 * x:.2f}", True),
    "perplexity": ("perplexity", lambda x: summary.decimals(x), True),
    "excess loss": ("excess_loss", lambda x: f"{x:.3f}", True),
    "KL": ("divergence", lambda x: f"{x:.3f}", True),
    "same next token": ("agreement", lambda x: f"{100 * x:.1f}", True),
    "retained": ("retained", lambda x: f"{100 * x:.1f}", True),
    "above chance": ("above_chance", lambda x: f"{100 * x:.1f}", True),
    "same beginning": ("same_beginning", lambda x: f"{100 * x:.1f}", True),
    "same tokens": ("same_tokens", lambda x: f"{100 * x:.1f}", True),
    "repeated": ("repeated", lambda x: f"{100 * x:.1f}", True),
    "prefill": ("prefill", lambda x: f"{x:.2f}", True),
    "decode": ("decode", lambda x: f"{x:.2f}", True),
    "KV cache saved": ("kv_cache_saving", lambda x: f"{100 * x:.1f}", True),
    "time": ("seconds", lambda x: summary.duration(x), False),
    "time, passes": ("equivalents", lambda x: f"{x:.1f}", False),
    "peak memory": ("peak_memory_bytes", lambda x: summary.size(x), False),
    "tokens used": ("tokens", lambda x: summary.count(x), False),
    "trained × tokens": ("trained", lambda x: summary.count(x), False),
    "search, passes": ("passes", lambda x: f"{x:.1f}", False),
}
UNITS = {"net_ratio": f"{SPACE}%", "net_ratio_layers": f"{SPACE}%", "retained": f"{SPACE}%",
         "agreement": f"{SPACE}%", "same_beginning": f"{SPACE}%", "same_tokens": f"{SPACE}%",
         "repeated": f"{SPACE}%", "above_chance": f"{SPACE}%", "prefill": "×", "decode": "×",
         "kv_cache_saving": f"{SPACE}%"}

# What a narrow terminal shows, the first longest.
NEEDED = ("excess loss", "layers' net ratio", "net ratio", "KL", "time", "above chance", "decode", "peak memory")


def columns(comparison: Comparison) -> list[str]:
    """The titles that have something to show."""
    shown = [title for title, (name, *_) in COLUMNS.items() if any(getattr(row, name) for row in comparison.rows)]
    return shown or ["net ratio", "perplexity", "excess loss"]


def stat(found: Stat | None, form: Format, spread: bool = True, unit: str = "") -> str:
    """.103 ± .002; without its spread where there is one seed alone, or where every seed gave the same."""
    if found is None or found.mean is None:
        return MISSING
    text = form(found.mean)
    if spread and found.sd is not None and form(found.sd) != form(0.0):
        text += f"{SPACE}±{SPACE}{form(found.sd)}"
    return text + unit


def cells(row: Row, titles: Iterable[str]) -> list[str]:
    """The row's figures, as text."""
    found = []
    for title in titles:
        name, form, spread = COLUMNS[title]
        found.append(stat(getattr(row, name), form, spread, UNITS.get(name, "")))
    return found


def dense_cells(comparison: Comparison, titles: Iterable[str]) -> list[str]:
    """The dense model's figures under the same titles."""
    written = comparison.dense.generation
    known = {
        "net ratio": f"0{SPACE}%", "layers' net ratio": f"0{SPACE}%",
        "perplexity": summary.decimals(comparison.dense.perplexity), "excess loss": "0",
        "KL": "0", "same next token": f"100{SPACE}%", "retained": f"100{SPACE}%", "above chance": f"100{SPACE}%",
        "same beginning": f"100{SPACE}%", "same tokens": f"100{SPACE}%",
        "repeated": summary.percent(None if written is None else written.mean("repeated"), 1),
        "prefill": "1×", "decode": "1×", "KV cache saved": f"0{SPACE}%",
    }
    return [known.get(title, "") for title in titles]


def failure(row: Row) -> str:
    """Why a row is empty, or lacks seeds; empty where it lacks none. One reason of several seeds is said once."""
    reasons: dict[str, list[int]] = {}
    for found in row.failures:
        reasons.setdefault(found.reason, []).append(found.seed)
    parts = []
    for reason, seeds in reasons.items():
        which = "" if not row.seeds and len(reasons) == 1 else f" (seed {', '.join(map(str, seeds))})"
        parts.append(f"failed{which}: {reason}")
    return "; ".join(parts)


def protocol(comparison: Comparison, titles: Sequence[str] = tuple(COLUMNS)) -> list[str]:
    """What the figures under these titles are of, sentence by sentence."""
    dense, calibration, count = comparison.dense, comparison.calibration, len(comparison.seeds)
    pace = next((unit.speed for unit in comparison.units if unit.speed), None)
    exact = "ratio" if dense.parameters_layers is None else (
        "ratios, of all parameters and of those outside the embeddings (the layers')")
    scopes = {unit.peak_memory_scope for unit in comparison.units}
    found = [
        f"{summary.model_name(comparison.model)}, {_parameters(comparison)}, {dense.layers} layers; at least "
        f"{summary.percent(comparison.ratio, 1)} of the parameters{summary.OUTSIDE[comparison.of]} are to go, net "
        f"(less or more where a variant names its blocks or is given them); the table shows the exact {exact}.",
        f"Mean ± standard deviation over {count} {'seed' if count == 1 else 'seeds'}; a seed sets the order of the "
        "calibration text and every draw.",
        f"Calibration: {calibration.source}, {calibration.tokens:,} tokens in {calibration.samples:,} rows.",
        f"Perplexity on {dense.dataset}: {dense.tokens:,} tokens, window {dense.window}, stride {dense.stride}; "
        "excess loss is ln(pruned / dense), nats per token.",
    ]
    if comparison.units and {"prefill", "decode", "time", "peak memory"} & set(titles):
        found.append(
            f"Speed {summary.NOT_MEASURED}." if pace is None else
            f"Speed against the dense model, in turns on {pace.device}: batch {pace.batch}, prompt {pace.prompt}, "
            f"{pace.new_tokens} new tokens.")
        since = "pruning began" if scopes == {"unit"} else "the process began, as this system cannot reset its mark"
        found.append("Time is that of pruning, with the similarity analysis where a method needs it (shared by a "
                     f"seed's methods, counted in each); peak memory is the process's, model included, since {since}.")
    if "time, passes" in titles and any(row.equivalents for row in comparison.rows):
        found.append("Time, passes: the same in forward passes of the calibration text, each as long as the dense "
                     "model would take at the speed at which it read that prompt.")
    if "trained × tokens" in titles and any(row.trained for row in comparison.rows):
        found.append("Trained × tokens: parameters trained times tokens seen in training, over all fits and healing; "
                     "solves in closed form and rates on trial count nothing there, but in the time.")
    if (written := dense.generation) and {"same beginning", "same tokens", "repeated"} & set(titles):
        found.append(f"Continuations: {written.new_tokens} tokens, greedy, after {len(written.repeated)} prompts of "
                     f"{written.prompt} tokens from the held-out texts; same beginning: the share before the first "
                     "token that is not the dense model's, same tokens: the share that is the dense model's at its "
                     "place, repeated: the share of runs of four tokens that stood before in the same continuation.")
    found += _protected(comparison.rows) + _swapped(comparison)
    if comparison.of == "all" and any(
            row.variant.options.get("method") == "slicegpt" and row.variant.options.get("counted") == "all"
            for row in comparison.rows):
        found.append("SliceGPT's net ratio counts its narrower tables, and the head as a matrix of its own where the "
                     "dense model ties it to the table: by the layers' net ratio it compares with the others "
                     "(--of layers, or slicegpt:counted=outside).")
    undone = [unit for unit in comparison.units if unit.heal and not unit.heal.kept]
    if undone:
        found.append("Healing made held-out rows worse and was undone: "
                     f"{', '.join(f'{unit.variant} (seed {unit.seed})' for unit in undone)}.")
    if (limit := comparison.recipe.get("limit")) is not None:
        # Some suites divide the limit among BLiMP's paradigms: what was scored says which did.
        each = sum(score.items for score in dense.tasks if score.task == "blimp") // 67
        number = f"the first {each} " if each < limit else ""
        found.append(f"Tasks: the first {limit} items of each" + (
            f", of BLiMP {number}of each of its 67 paradigms." if each else "."))
    if comparison.signal or comparison.left_out:
        found.append(
            "Retained: sum of scores over the dense model's. Above chance: mean of (score − chance) / (dense − chance) "
            "over the tasks where the dense model is above chance by two standard errors: "
            f"{', '.join(comparison.signal) or 'none'}. "
            f"Without such signal: {', '.join(comparison.left_out) or 'none'}.")
    return found


def _protected(rows: Sequence[Row]) -> list[str]:
    """Which layers selections leave alone, in one sentence; nothing where no row says."""
    kept: dict[tuple[int, int], list[str]] = {}
    for row in rows:
        if row.variant.protected is not None:
            kept.setdefault(row.variant.protected, []).append(row.variant.title)
    if not kept:
        return []
    parts = [f"{'none' if ends == (0, 0) else f'{ends[0]} and {ends[1]}'}: {', '.join(dict.fromkeys(titles))}"
             for ends, titles in sorted(kept.items())]
    return [f"Layers never taken at the start and at the end, each method as its own code has it: {'; '.join(parts)}."]


def _swapped(comparison: Comparison) -> list[str]:
    """Where KDP took a linear map in its stand-in's place, in one sentence; nothing where it did not."""
    parts = []
    for unit in comparison.units:
        row = comparison.row(unit.variant)
        maps = unit.stand_ins.count("linear")
        if row and maps and row.variant.options.get("method") == "kdp" and (
                row.variant.options.get("kernel"), row.variant.options.get("context")) != ("linear", "none"):
            parts.append(f"{maps} of {len(unit.stand_ins)} of {unit.variant} (seed {unit.seed})")
    if not parts:
        return []
    return [f"Stand-ins that are a linear map of the state, as that does where little happens: {', '.join(parts)}."]


def _parameters(comparison: Comparison) -> str:
    """Of the dense model, with those outside the embeddings where the record has them."""
    dense, words = comparison.dense, f"{summary.count(comparison.dense.parameters)} parameters"
    return words if dense.parameters_layers is None else (
        f"{words}, {summary.count(dense.parameters_layers)} of them outside the embeddings")


def render_markdown(comparison: Comparison) -> str:
    """``table.md``: the table, failures in their rows, tasks, and what the figures are of."""
    titles = columns(comparison)
    lines = [_line(["", *titles]), "|---" + "|---:" * len(titles) + "|",
             _line(["dense", *dense_cells(comparison, titles)])]
    group = ""
    for row in comparison.rows:
        if row.variant.group != group:
            group = row.variant.group
            lines.append(_line([f"*{group}*", *([""] * len(titles))]))
        lines.append(_line([title_of(row), *_body(row, titles)]))
    notes = [f"- {title_of(row)}: {failure(row)}" for row in comparison.rows if row.seeds and row.failures]
    text = "\n".join(lines) + "\n"
    if notes:
        text += "\n" + "\n".join(notes) + "\n"
    text += _text_markdown(comparison) + _task_markdown(comparison) + "\n"
    return text + "\n".join(f"- {line}" for line in protocol(comparison, titles)) + "\n"


def text_rows(comparison: Comparison) -> list[list[str]]:
    """One row a variant: excess loss on every text at every window; a header row first, nothing where there is one."""
    rows = [row for row in comparison.rows if row.texts]
    if not rows:
        return []
    places = list(dict.fromkeys((one.dataset, one.window) for row in rows for one in row.texts))
    found = [["", *(f"{PurePath(dataset).name}, window {window}" for dataset, window in places)]]
    for row in rows:
        known = {(one.dataset, one.window): one for one in row.texts}
        found.append([title_of(row), *(stat(known[place].excess_loss if place in known else None, lambda x: f"{x:.3f}")
                                    for place in places)])
    return found


def _text_markdown(comparison: Comparison) -> str:
    return _below("Excess loss by text and window.", text_rows(comparison))


def task_rows(comparison: Comparison) -> list[list[str]]:
    """One row a task: its name, the dense score, and the score of every variant that ended; a header row first."""
    rows = [row for row in comparison.rows if row.tasks]
    if not rows:
        return []
    table = [["", "dense", *(row.variant.title for row in rows)]]
    for score in comparison.dense.tasks:
        name = task_name(score)
        form: Format = (lambda x: f"{100 * x:.1f}") if score.higher_is_better else (lambda x: summary.decimals(x))
        dense = MISSING if score.value is None else form(score.value)
        if score.stderr is not None:
            dense += f" ({form(score.stderr)})"
        table.append([name, dense, *(stat(row.tasks.get(name), form) + _kept(row, name) for row in rows)])
    return table


def _kept(row: Row, name: str) -> str:
    """What a score keeps of the dense model's: " (97 %)"; empty for perplexities and where the dense score is 0."""
    kept = row.task_retained.get(name)
    return "" if kept is None or kept.mean is None else f" ({100 * kept.mean:.0f}{SPACE}%)"


def _task_markdown(comparison: Comparison) -> str:
    return _below("Scores in percent, the dense model's with standard errors over items, the others' with what they "
                  "keep of it; perplexities as they are.", task_rows(comparison))


def _below(says: str, table: Sequence[Sequence[str]]) -> str:
    """A further table below the first, its header row first; nothing where there is none."""
    if not table:
        return ""
    head, *body = table
    lines = [_line(head), "|---" + "|---:" * (len(head) - 1) + "|", *map(_line, body)]
    return f"\n{says}\n\n" + "\n".join(lines) + "\n"


def _body(row: Row, titles: Sequence[str]) -> list[str]:
    return cells(row, titles) if row.seeds else [failure(row) or "not measured", *([""] * (len(titles) - 1))]


def title_of(row: Row) -> str:
    """A method's title, and its name where that says something else."""
    label = row.variant.title
    return label if row.variant.name in (label, label.lower()) else f"{label} `{row.variant.name}`"


def _line(parts: Sequence[str]) -> str:
    return "| " + " | ".join(part.replace("|", "\\|") for part in parts) + " |"


def print_comparison(comparison: Comparison, console: Console, where: Iterable[str | Path] = ()) -> None:
    """The table in the terminal, of the columns that fit it, failures below it, and the paths written."""
    titles = [title for title in columns(comparison) if title not in (
        "time, passes", "tokens used", "trained × tokens", "KV cache saved", "prefill", "same next token",
        "same tokens")]
    table, wide = _terminal_table(comparison, titles), console.options.update_width(1000)
    while len(titles) > 1 and console.measure(table, options=wide).maximum > console.width:
        titles.remove(max(titles, key=lambda title: NEEDED.index(title) if title in NEEDED else len(NEEDED)))
        table = _terminal_table(comparison, titles)
    console.print(table)
    for row in comparison.rows:
        if row.failures:
            console.print(Text(f"{row.variant.title}: {failure(row)}"), soft_wrap=True)
    for path in where:
        console.print(Text(f"wrote {path}"), soft_wrap=True)


def _terminal_table(comparison: Comparison, titles: Sequence[str]) -> Table:
    table = Table(title=Text(f"{summary.model_name(comparison.model)}, {comparison.kind}"), title_justify="left",
                  title_style="bold")
    table.add_column("", overflow="fold", max_width=28)
    for title in titles:
        table.add_column(title.replace(" ", "\n"), justify="right")
    table.add_row("dense", *dense_cells(comparison, titles), style="dim")
    group = ""
    for row in comparison.rows:
        if row.variant.group != group:
            group = row.variant.group
            table.add_section()
        shown = cells(row, titles) if row.seeds else ["failed" if row.failures else "", *([""] * (len(titles) - 1))]
        table.add_row(Text(row.variant.title), *shown)
    return table
