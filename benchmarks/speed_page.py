"""The page of benchmarks/speed.py, made from its record alone."""

from typing import Any

from book_tables import markdown

Row = dict[str, Any]


def page(record: dict[str, Any]) -> str:
    """Markdown: what was measured on what, one table of speeds, one of what the models are."""
    rows: list[Row] = record["rows"]
    commands = "\n".join(f"    {line}" for line in record["command"].splitlines())
    skipped = f"\nSkipped: {record['skipped']}.\n" if "skipped" in record else ""
    ours = [row for row in rows if row["form"] == "context"]
    slower = [row for row in rows if row["speedup"] < 1]
    return f"""# Pruned against dense, {record['hardware']}, {record['month']}

{commands}

{record['hardware']}, {record['threads']} thread{'s' * (record['threads'] > 1)}, torch {record['torch']};
{record['ratio']:.0%} net parameters. Random weights. Speed-up: median over turns of dense / pruned seconds, both of the
same turn, with quartiles; ideal: dense operations / pruned operations (linear maps, attention scores, head).
"parts": put together from models of one and two layers, ends + Σ layers, instead of measured whole.
{skipped}
At or above 0.97 of the ideal: {count(rows)} rows, of the default's alone (context): {count(ours)}. Slower than dense:
{len(slower)}{': ' + '; '.join(map(label, slower)) if slower else ''}.

{speeds(rows)}

## The models

{models(rows)}
"""


def count(rows: list[Row]) -> str:
    """How many rows reach the goal."""
    return f"{sum(row['speedup'] >= 0.97 * row['ideal'] for row in rows)} of {len(rows)}"


def label(row: Row) -> str:
    """What a row measured, in words."""
    return f"{row['shape']} {row['dtype']} {mode(row)} {row['form']} {row['pass']} batch {row['batch']}"


def mode(row: Row) -> str:
    """Eager or compiled."""
    return "compiled" if row["compiled"] else "eager"


def speeds(rows: list[Row]) -> str:
    """Measured and ideal speed-ups."""
    titles = ["shape", "dtype", "mode", "stand-in", "pass", "batch", "prompt", "dense", "pruned", "speed-up",
              "quartiles", "ideal", "of ideal"]
    return markdown(titles, [[
        row["shape"], row["dtype"], mode(row) + ("" if row["whole"] else ", parts"),
        row["form"], row["pass"], str(row["batch"]), str(row["prompt"]), milliseconds(row["seconds"]["dense"]),
        milliseconds(row["seconds"]["pruned"]), f"×{row['speedup']:.3f}",
        "–".join(f"{quartile:.3f}" for quartile in row["quartiles"]), f"×{row['ideal']:.3f}",
        f"{row['speedup'] / row['ideal']:.3f}"] for row in rows])


def milliseconds(seconds: float) -> str:
    """Three digits."""
    return f"{seconds * 1000:,.{max(0, 2 - len(str(int(seconds * 1000))) + 1)}f} ms"


def models(rows: list[Row]) -> str:
    """Blocks, stand-ins and KV-cache bytes, one line a model."""
    found = {(row["shape"], row["form"], row["dtype"]): row for row in rows}
    return markdown(
        ["shape", "dtype", "stand-in", "blocks replaced", "m", "net ratio", "KV cache a token, dense", "pruned"],
        [[shape, dtype, form, ", ".join(f"{start}–{stop - 1}" for start, stop in row["blocks"]), str(row["features"]),
          f"{row['net_ratio']:.2%}", f"{row['cache_bytes']['dense']:,} B", f"{row['cache_bytes']['pruned']:,} B"]
         for (shape, form, dtype), row in found.items()])
