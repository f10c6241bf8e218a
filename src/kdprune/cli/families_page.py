"""Writes ``docs/families.md``: what each method can do for each family, asked of the methods themselves.

python -m kdprune.cli.families_page > docs/families.md
"""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from kdprune.data.tokens import TokenSet
from kdprune.errors import KDPruneError
from kdprune.methods import METHODS, make_method
from kdprune.model import modeling_kdp
from kdprune.model.families import number_layers, set_depth
from kdprune.model.modeling_kdp import FAMILIES, Family
from kdprune.planning.meta import meta_model

LAYERS = 6  # of the models that are asked about; nothing is computed
# What differs in what it needs of a family: (method, options, heading).
FORMS: tuple[tuple[str, Mapping[str, Any], str], ...] = (
    ("kdp", {}, "`kdp`"),
    ("kdp", {"kernel": "linear+learned"}, "`kdp --kernel linear+learned`"),
    ("kdp", {"kernel": "learned", "context": "none"}, "`kdp --kernel learned --context none`"),
    ("kdp", {"form": "stock"}, "`kdp --form stock`"),
    *((name, {}, f"`{name}`") for name in METHODS if name != "kdp"),
)
_CLASSIFIERS = {"sequence": "ForSequenceClassification", "token": "ForTokenClassification"}  # of results
_HEAD = """# Families

What each method can do for each family that kdprune knows, by `config.model_type`. The page is written by
`python -m kdprune.cli.families_page`, which asks every method about a model of every family as transformers configures
it; what a method refuses it says in one line, before any work. `tests/test_contract.py` makes every kind of edit that
these methods return in a model of every family: saved and loaded bit for bit, with and without kdprune installed,
generating with a cache, with gradients. `tests/test_method_contract.py` runs every method on all ways of wiring.

"""
_END = """
Layers of a family without a row can still be dropped, by `shortgpt`, `uidl`, `sleb` or `evopress`, where its model has
one list of layers that are all alike, or told apart by lists in the config with an entry a layer (`layer_types`):
Mamba, Qwen3.5, gpt-oss, Cohere and others. Layers by a rule of their number (DeepSeek-V3, Jamba, Llama 4) and
everything else are told that the family is unknown. [Add a family](add-a-family.md): it is one row of a table.
"""


def markdown() -> str:
    """The page: a table of families and methods, why some refuse, what single families have of their own."""
    reasons: dict[str, str] = {}  # the mark of each
    names = sorted(FAMILIES)
    headings = [*(heading for _, _, heading in FORMS), *(f"{title} classifier" for title in _CLASSIFIERS)]
    lines = [f"| family | {' | '.join(headings)} |", "|---" * (len(headings) + 1) + "|"]
    for name in names:
        model = _model(name)
        cells = [_cell(method, options, model, reasons) for method, options, _ in FORMS]
        cells += ["✓" if hasattr(modeling_kdp, f"KDP{FAMILIES[name].name}{role}") else "–"
                  for role in _CLASSIFIERS.values()]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    lines += ["", *(f"{mark}: {reason}.  " for reason, mark in reasons.items()), "", "## Of single families", ""]
    lines += [f"- `{name}`: {'; '.join(notes)}." for name in names if (notes := _notes(FAMILIES[name]))]
    return _HEAD + "\n".join(lines) + "\n" + _END


def _model(name: str) -> PreTrainedModel:
    """A model of this family, without weights."""
    config: Any = AutoConfig.for_model(name)
    number_layers(config, FAMILIES[name], range(LAYERS))
    types = getattr(config, "layer_types", None)
    set_depth(config, LAYERS, None if types is None else types[:LAYERS])
    if getattr(config, "head_dim", 0) is None:
        config.head_dim = config.hidden_size // config.num_attention_heads
    if getattr(config, "num_key_value_heads", 0) is None:
        config.num_key_value_heads = config.num_attention_heads
    return meta_model(config)


def _cell(method: str, options: Mapping[str, Any], model: PreTrainedModel, reasons: dict[str, str]) -> str:
    """A tick, or the mark of the reason why not."""
    ids = torch.zeros((), dtype=torch.long).expand(64, 128)
    tokens = TokenSet(ids, torch.ones((), dtype=torch.bool).expand(64, 128), "none")  # type: ignore[arg-type]
    try:
        make_method(method, {"ratio": 0.1, "of": "layers", **options}).check(model, tokens)
    except KDPruneError as error:
        reason = str(error).removeprefix("got ").replace(f"{model.config.model_type} ", "")
        return reasons.setdefault(reason, chr(ord("a") + len(reasons)))
    return "✓"


def _notes(family: Family) -> list[str]:
    """What the row says beyond names and paths."""
    notes = []
    if family.joined_heads:
        when = f"with `{family.joined_heads}` " if isinstance(family.joined_heads, str) else ""
        notes.append(f"{when}heads go together or not at all, so `llm-pruner` takes MLP channels alone")
    if family.experts:
        notes.append("a mixture of experts, which leave with their layers; `plan` counts active parameters too")
    if family.pre_norm:
        notes.append(f"without `{family.pre_norm}` norms stand behind the sums: `slicegpt` and `replaceme` refuse that")
    if family.numbered:
        notes.append(f"`{family.numbered[0]}` other than {family.numbered[1]} is refused: layers depend on it")
    for names in (family.per_layer, family.layer_numbers):
        notes += [f"`{name}` follows the layers that stay" for name in names]
    return notes


if __name__ == "__main__":
    print(markdown(), end="")
