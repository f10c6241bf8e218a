"""Writes ``docs/results-schema.md`` from the models.

python -m kdprune.report.schema > docs/results-schema.md
"""

from collections.abc import Mapping
from typing import Any

from kdprune.report.comparison_records import COMPARISON_VERSION, Comparison
from kdprune.report.records import Record
from kdprune.report.results import SCHEMA_VERSION, Results

_HEAD = f"""# results.json

Everything one run found, schema version {SCHEMA_VERSION}; the only input of `report.html` and of the model
card. Read it with `kdprune.report.results.Results.load(path)`, or as the plain JSON it is: strictly valid,
UTF-8, without NaN or infinity. A number that was not measured or not finite is `null`; a part that a run does
not have is `null` or an empty list. Unknown keys are refused.

Notation: a block is `[s, e)`, k = e − s; h_l is the state that enters layer l, h_L the state before the final
norm; φ is the kernel's feature map, A_i the operator of the block's i-th layer. This page is written by
`python -m kdprune.report.schema`.
"""


_COMPARISON = f"""# results.json of a comparison or an ablation

What `kdprune compare` and `kdprune ablate` write, told apart by `kind`; schema version
{COMPARISON_VERSION}; the only input of their `table.md` and `report.html`. Read it with
`kdprune.report.comparison_records.Comparison.load(path)`. `rows`, `signal` and `left_out` follow from the rest.
"""


def markdown() -> str:
    """The page: one table per part, in the order in which parts are met."""
    done: set[str] = set()
    lines = [_HEAD, *_sections(Results, done), _COMPARISON, *_sections(Comparison, done)]
    return "\n".join(lines).rstrip() + "\n"


def _sections(record: type[Record], done: set[str]) -> list[str]:
    """The tables of a record and of its parts, those in ``done`` left out."""
    schema, top = record.model_json_schema(), record.__name__
    parts: Mapping[str, Any] = schema["$defs"]
    lines, waiting = [], [top]
    while waiting:
        name = waiting.pop(0)
        if name in done:
            continue
        done.add(name)
        part = schema if name == top else parts[name]
        lines += [f"## {name}", "", _first_line(part.get("description", "")), ""]
        lines += ["| field | type | meaning |", "|---|---|---|"]
        for field, entry in part["properties"].items():
            kind = _type(entry)
            lines.append(f"| `{field}` | {kind} | {_cell(entry.get('description', ''))} |")
            waiting += [other for other in parts if f"[{other}]" in kind]
        lines.append("")
    return lines


def _type(entry: Mapping[str, Any]) -> str:
    """A JSON schema's type in words; parts become links."""
    if "$ref" in entry:
        name = entry["$ref"].rsplit("/", 1)[-1]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in entry:
        return " or ".join(_type(option) for option in entry["anyOf"])
    if "enum" in entry:
        return ", ".join(f"`{value}`" for value in entry["enum"])
    if entry.get("type") == "array":
        if "prefixItems" in entry:
            return "[" + ", ".join(_type(item) for item in entry["prefixItems"]) + "]"
        return f"list of {_type(entry['items'])}".replace("list of list of", "lists of")
    if entry.get("type") == "object":
        values = entry.get("additionalProperties")
        return f"object of {_type(values)}" if isinstance(values, Mapping) else "object"
    return {"number": "number", "integer": "integer", "string": "text", "null": "null"}.get(
        str(entry.get("type")), "anything"
    )


def _first_line(text: str) -> str:
    """A docstring's first line."""
    return text.strip().split("\n", 1)[0]


def _cell(text: str) -> str:
    """Text that a Markdown table takes as it is."""
    return text.replace("|", "\\|").replace("_", "\\_").replace("*", "\\*")


if __name__ == "__main__":
    print(markdown(), end="")
