"""Puts a finished comparison or ablation into docs/results, and its short table into the README.

    kdprune compare --methods … --seeds 3 -o comparison && python benchmarks/publish.py comparison peers
    python benchmarks/publish.py --render peers          # page, pictures and README again, from docs/results/peers.json

Time, memory and speed depend on what else the machine does: where docs/results/NAME-cost.json is a record of the same
variants, run by themselves and without tasks, these columns come from there.

Every figure of the page comes from the record; ``docs/results/NAME-notes.md``, if there is one, is appended to it.
"""

import argparse
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdprune.report import comparison_plots as plots
from kdprune.report.comparison_page import groups, headline, ranked
from kdprune.report.comparison_records import Comparison
from kdprune.report.comparison_table import cells, dense_cells, render_markdown

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results"
QUALITY = ["net ratio", "perplexity", "excess loss", "above chance", "KV cache saved"]
COST = ["prefill", "decode", "time", "peak memory"]
# Keys of the record's recipe that are options of the command, in this order.
OPTIONS = ("base", "only", "methods", "blocks_from", "ratio", "heal", "heal_what", "heal_tokens", "calibration",
           "heldout", "samples", "length", "dtype", "suite", "suite_data", "limit")


def command(found: Comparison) -> str:
    """The command that repeats the run."""
    words = ["kdprune", "ablate" if found.kind == "ablation" else "compare"]
    words += [] if "bundled" in found.model else [found.model]
    for name in OPTIONS:
        value: Any = found.recipe.get(name)
        if value in (None, [], ""):
            continue
        flag = "--" + name.replace("_", "-")
        if name == "suite_data":
            words += [word for folder in value for word in (flag, str(folder))]
        else:
            words += [flag, ",".join(map(str, value)) if isinstance(value, list) else str(value)]
    whole = found.seeds == list(range(len(found.seeds)))
    seeds = str(len(found.seeds)) if whole else "".join(f"{seed}," for seed in found.seeds)
    return shlex.join([*words, "--seeds", seeds])


def portable(found: Comparison) -> Comparison:
    """The record with paths as they are from the repository's root: the page shows its command."""
    def relative(value: Any) -> Any:
        if isinstance(value, list):
            return [relative(item) for item in value]
        return os.path.relpath(value, ROOT) if isinstance(value, str) and os.path.isabs(value) else value

    return found.model_copy(update={
        "model": relative(found.model), "recipe": {name: relative(value) for name, value in found.recipe.items()}})


def merged(found: Sequence[Comparison]) -> Comparison:
    """Comparisons of one model under one protocol as one: the later ones add variants and seeds to the first.

    Raises:
        SystemExit: they differ in model, ratio, calibration or the dense model's figures, or ablate different things.
    """
    first = found[0]
    for other in found[1:]:
        same = [(one.model, one.ratio, one.calibration, one.dense.perplexity, one.dense.tokens, one.dense.tasks,
                 one.kind == "ablation" and (one.recipe.get("base"), one.recipe.get("only"))) for one in (first, other)]
        if same[0] != same[1]:
            raise SystemExit(f"got comparisons of {first.model} and {other.model} under different protocols, expected "
                             f"the same model, ratio, calibration, held-out text and tasks")
    units = {(unit.variant, unit.seed): unit for one in found for unit in one.units}
    variants = {variant.name: variant for one in found for variant in one.variants}
    failures = {(failure.variant, failure.seed): failure for one in found for failure in one.failures}
    # An ablation's base and parts name its variants.
    names = {} if first.kind == "ablation" else {"base": None, "methods": list(variants)}
    seeds = sorted({seed for one in found for seed in one.seeds})
    return first.model_copy(update={
        "seeds": seeds, "variants": list(variants.values()), "units": list(units.values()),
        "failures": [failure for key, failure in failures.items() if key not in units],
        "recipe": first.recipe | names | {"seeds": seeds}})


def pictures(found: Comparison, cost: Comparison) -> dict[str, tuple[str, str]]:
    """Name of the file → what it shows, and the picture."""
    if found.kind == "comparison":
        return {"size": ("quality against size", plots.quality_against_size(found)),
                "cost": ("quality against cost", plots.quality_against_cost(cost)),
                "excess": ("excess loss", plots.excess_by_variant(ranked(found), "Excess loss"))}
    base = found.rows[0]
    switched = [row for row in ranked(found) if row.variant.value is None]
    made = {"parts": ("one part changed", plots.excess_by_variant(switched, "Parts", base))}
    for title, rows in groups(found):
        known = [row for row in rows if row.variant.value is not None and row.excess_loss is not None]
        if known:
            made[title.lower().replace(" ", "-")] = (title, plots.sweep(known, title, base))
    return made


def short_table(found: Comparison, cost: Comparison) -> str:
    """The README's table, least excess loss first."""
    titles = [*QUALITY, *COST]
    lines = ["| " + " | ".join(["method", *titles]) + " |", "|---" + "|---:" * len(titles) + "|",
             "| dense | " + " | ".join(dense_cells(found, titles)) + " |"]
    for row in ranked(found):
        figures = cells(row, QUALITY) + cells(cost.row(row.variant.name), COST)
        lines.append(f"| {row.variant.title} | {' | '.join(figures)} |")
    return "\n".join(lines)


def cost_of(name: str, found: Comparison) -> Comparison:
    """The record that time, memory and speed come from."""
    file = RESULTS / f"{name}-cost.json"
    return Comparison.load(file) if file.is_file() else found


def render(name: str) -> None:
    """Writes NAME.md, its pictures, and the README's block of this name if it has one."""
    found = Comparison.load(RESULTS / f"{name}.json")
    cost = cost_of(name, found)
    drawn = pictures(found, cost)
    for key, (_, svg) in drawn.items():
        (RESULTS / f"{name}-{key}.svg").write_text(svg, encoding="utf-8")
    images = "\n\n".join(f"![{what}]({name}-{key}.svg)" for key, (what, _) in drawn.items())
    notes = RESULTS / f"{name}-notes.md"
    shown = ["net ratio", "perplexity", "excess loss", "KV cache saved"] if found.kind == "ablation" else None
    tables = render_markdown(found, shown)
    if cost is not found:
        quality = render_markdown(found, [*QUALITY, "retained", "tokens used"])
        tables = (f"{quality}\n## Cost\n\nFrom a run of its own:\n\n    {command(cost)} -o {name}-cost\n\n"
                  f"{render_markdown(cost, ['excess loss', *COST])}")
    title = notes.read_text(encoding="utf-8").split("\n", 1) if notes.is_file() else [f"# {name}", ""]
    (RESULTS / f"{name}.md").write_text(
        f"{title[0]}\n\n{headline(found)}\n\n    {command(found)} -o {name}\n    "
        f"python benchmarks/publish.py {name} {name}\n\n{images}\n\n{tables}\n{title[1].strip()}\n",
        encoding="utf-8")
    fill_readme(ROOT / "README.md", name, short_table(found, cost))


def fill_readme(file: Path, name: str, table: str) -> None:
    """Puts the table into the block of this name of a README, if there is one that has it."""
    start, end = f"<!-- table: {name} -->\n", "<!-- end -->"
    readme = file.read_text(encoding="utf-8") if file.is_file() else ""
    if start in readme:
        head, rest = readme.split(start, 1)
        file.write_text(f"{head}{start}{table}\n{end}{rest.split(end, 1)[1]}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", metavar="folder", help="what the command wrote (results.json in it); "
                        "several, of other seeds or variants, become one")
    parser.add_argument("name", help="name of the page in docs/results")
    parser.add_argument("--render", action="store_true", help="only write the page again")
    options = parser.parse_args()
    if not options.render:
        if not options.folders:
            parser.error("got no folder, expected what the command wrote; or give --render")
        merged([Comparison.load(folder) for folder in options.folders]).save(RESULTS / f"{options.name}.json")
    render(options.name)


if __name__ == "__main__":
    main()
