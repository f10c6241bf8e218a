"""YAML recipes: the options of a run as a file, checked against the option groups."""

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import yaml

from kdprune.errors import KDPruneError, one_line, shortened
from kdprune.methods import METHODS
from kdprune.options import Option, at_home, options_of, reject_unknown, typed_options
from kdprune.run.option_groups import PRUNE


def load_recipe(path: str | Path) -> dict[str, Any]:
    """The options in a YAML file, checked: names that exist, values of their types.

    Dashes in names count as underscores; a list of texts for calibration is read as on the command line,
    ``[a.txt=0.7, b.jsonl=0.3]``; blocks may be written ``4-7,9-12``.

    Raises:
        KDPruneError: the file is missing, is not YAML, or holds something else than a mapping of options.
    """
    try:
        found = yaml.load(Path(at_home(path)).read_text(encoding="utf-8-sig"), Loader=_Loader)
    except OSError as error:
        raise KDPruneError(f"cannot read the recipe {shortened(path)}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, no date, no name
        raise KDPruneError(f"the recipe {shortened(path)} is not valid YAML: {one_line(error)}") from error
    if not isinstance(found, Mapping):
        raise KDPruneError(
            f"got a {type(found).__name__} in the recipe {str(path)!r}, expected a mapping such as 'ratio: 0.25'")
    options = {str(name).replace("-", "_"): value for name, value in found.items()}
    if len(options) < len(found):
        raise KDPruneError(f"got an option with dashes and with underscores in the recipe {str(path)!r}, expected one")
    return check_options(written(options, prune_options(options)))


class _Loader(yaml.SafeLoader):
    """YAML has no key twice; PyYAML takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        names = [name.value for name, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise yaml.constructor.ConstructorError(problem=f"found {name!r} twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def prune_options(given: Mapping[str, Any]) -> dict[str, Option]:
    """The options that a run has, the fields of the method it asks for among them."""
    name = "kdp" if given.get("method") is None else given["method"]
    reject_unknown([name], METHODS, "method")
    return options_of(*PRUNE, METHODS[name])


def written(given: Mapping[str, Any], known: Mapping[str, Option]) -> dict[str, Any]:
    """Options as a shell or a file has them, with the lists of strings parsed that mean something else there."""
    def parsed(name: str, value: Any) -> Any:
        item = known.get(name)
        strings = isinstance(value, list) and value and all(isinstance(text, str) for text in value)
        return item.parse(value) if item and item.several and item.parse and strings else value

    return {name: parsed(name, value) for name, value in given.items()}


def check_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options that a recipe may hold, each of its type; those at None are as if not given.

    Raises:
        KDPruneError: a name that there is not, or a value that cannot be what it should.
    """
    known = {name: item for name, item in prune_options(given).items() if "recipe" in item.places}
    return _typed(given, known, "option")


def _typed(given: Mapping[str, Any], known: Mapping[str, Option], what: str) -> dict[str, Any]:
    """As :func:`typed_options`, and raises KDPruneError for an option that other methods have, with their names."""
    for name in given.keys() - known.keys():
        if owners := owners_of(name):
            raise KDPruneError(f"got option {name!r}, which belongs to {', '.join(owners)}, with method "
                               f"{given.get('method') or 'kdp'!r}; choose another method, or leave it out")
    return typed_options(given, known, what)


def owners_of(name: str) -> list[str]:
    """The methods that have an option of this name."""
    return [key for key, method in METHODS.items() if name in method.__dataclass_fields__]


def run_options(recipe: str | Path | Mapping[str, Any] | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a run, checked: the recipe's, and over them those given, also where None or the default is given.
    """
    if recipe is not None and not isinstance(recipe, str | Path | Mapping):
        raise KDPruneError(f"got a recipe of type {type(recipe).__name__}, expected a file, or a mapping of options")
    options = {} if recipe is None else check_options(recipe) if isinstance(recipe, Mapping) else load_recipe(recipe)
    options |= given
    return _typed(options, prune_options(options), f"option of {options.get('method') or 'kdp'}")


def dump_recipe(options: Mapping[str, Any]) -> str:
    """The YAML of a run's options, those left at None omitted; ``load_recipe`` reads it back."""
    return yaml.safe_dump(
        {name: _plain(value) for name, value in options.items() if value is not None}, sort_keys=False,
        allow_unicode=True)


def _plain(value: Any) -> Any:
    """Tuples as lists and paths as strings, which is what YAML has."""
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    return str(value) if isinstance(value, Path) else value
