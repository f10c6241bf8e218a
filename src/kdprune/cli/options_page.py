"""Writes ``docs/options.md`` from the option groups.

python -m kdprune.cli.options_page > docs/options.md
"""

from collections.abc import Iterable, Mapping

from kdprune.cli.evaluate import EVAL
from kdprune.cli.export import ExportOptions
from kdprune.cli.plan import PlanOptions
from kdprune.methods import METHODS
from kdprune.options import HEADINGS, Option, choices, options_of
from kdprune.run.heal import Heal
from kdprune.run.option_groups import (
    ABLATE,
    ANALYZE,
    COMPARE,
    PRUNE,
    AblateOptions,
    AnalysisOptions,
    CompareOptions,
    DataOptions,
    GenerationOptions,
    MethodOptions,
    ModelOptions,
    OutputOptions,
    SeedOptions,
    SuiteOptions,
)
from kdprune.run.resources import Resources

_HEAD = """# Options

What the commands, recipes and Python functions take. An option is said once, as a field of an option group or of a
method's dataclass; this page, `--help`, `help(kdprune.prune)` and the keys of a recipe follow from it, and it is
written by `python -m kdprune.cli.options_page`. In Python and in recipes `--heal-what` is `heal_what`,
and `--output` is `output_dir`.

What is given beats what a recipe says, also where it is the default. The default, or what follows from leaving the
option out, stands in brackets. Options in *italics* are rare: `--help` leaves them out, `--help-all` shows them.

Of the command line alone: `--recipe` reads options from a YAML file and `--dump-recipe` prints them, `--push-to-hub`
uploads a result (`prune`); `--json` writes the figures to a file (`plan`, `eval`).
"""
_COMMANDS: Mapping[str, Mapping[str, Option]] = {
    "prune": options_of(*PRUNE), "analyze": options_of(*ANALYZE), "compare": options_of(*COMPARE),
    "ablate": options_of(*ABLATE), "eval": EVAL,
}


def markdown() -> str:
    """The page: options of all commands by heading, those of one command, those of every method."""
    shared = options_of(
        MethodOptions, ModelOptions, DataOptions, SeedOptions, SuiteOptions, GenerationOptions, Heal, Resources,
        OutputOptions)
    lines = [_HEAD]
    for heading in HEADINGS:
        found = [item for item in shared.values() if item.group == heading]
        if found:
            lines += [f"## {heading.capitalize()}", "", *_table(found, commands=True), ""]
    own = {"compare": options_of(CompareOptions), "ablate": options_of(AblateOptions),
           "analyze": options_of(AnalysisOptions),
           "eval": {name: item for name, item in EVAL.items() if name not in shared},
           "plan": options_of(PlanOptions), "export-gguf": options_of(ExportOptions)}
    for command, options in own.items():
        lines += [f"## Of `kdprune {command}`", "", *_table(options.values()), ""]
    for name, method in METHODS.items():
        lines += [f"## Of method `{name}`", "", *_table(options_of(method).values()), ""]
    return "\n".join(lines).rstrip() + "\n"


def _table(options: Iterable[Option], commands: bool = False) -> list[str]:
    """One line an option; with ``commands`` which ones take it."""
    lines = ["| option | meaning | commands |", "|---|---|---|"] if commands else ["| option | meaning |", "|---|---|"]
    for item in options:
        cells = [_name(item), _meaning(item)]
        if commands:
            others: dict[str, list[str]] = {}  # what it means elsewhere, by command
            for command, known in _COMMANDS.items():
                if item.name in known and known[item.name].help != item.help:
                    others.setdefault(known[item.name].text, []).append(command)
            cells[1] += "".join(f"; {', '.join(names)}: {text}" for text, names in others.items())
            cells.append(", ".join(command for command, known in _COMMANDS.items() if item.name in known))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _name(item: Option) -> str:
    flag = f"`{item.flag}`" if "shell" in item.places else f"`{item.name}` (Python)"
    flag = f"`{item.name.upper()}`" if item.positional else flag
    return f"*{flag}*" if item.rare else flag


def _meaning(item: Option) -> str:
    """The help, the choices among it, as a Markdown cell takes it."""
    allowed = f". One of {', '.join(f'`{choice}`' for choice in choices(item.kind))}" if choices(item.kind) else ""
    more = f"; in Python: {item.in_python}" if item.in_python else ""
    return f"{item.text}{more}{allowed}".replace("|", "\\|").replace("_", "\\_").replace("<", "&lt;")


if __name__ == "__main__":
    print(markdown(), end="")
