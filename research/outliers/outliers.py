"""Where do stand-ins err? Outlier dimensions and massive-activation tokens against the rest, for every stand-in.

    python benchmarks/outliers.py                               measures what docs/results/outliers.json lacks, renders
    python benchmarks/outliers.py --model DIR --name llama      the same for another model; the page shows all
    python benchmarks/outliers.py --render                      only rewrites page and plot from that file
    python benchmarks/outliers.py --quick                       few tokens and epochs, into outliers-quick.json

A unit is one stand-in of benchmarks/stand_ins.py in the same block: the four middle layers.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from stand_ins import TRAINED, VARIANTS
from torch import BoolTensor, Tensor
from transformers import PreTrainedModel
from units_file import (
    COLOURS,
    Record,
    Subject,
    arguments,
    by_model,
    compact,
    keep,
    load,
    make_page,
    table,
    write_page,
)

from kdprune.data import TokenSet
from kdprune.methods.kdp import KDP
from kdprune.model.activations import layer_states
from kdprune.model.families import decoder_layers
from kdprune.model.surgery import Drop, Edit, Substitute, apply_edits
from kdprune.session import BATCH

LENGTH = 4
TOKENS, HELD = 24_576, 16_384    # fitted to, and measured on
OUTLIER, FEW = 6.0, 3            # times the median dimension's rms; dimensions shown where none reaches that
MASSIVE, SHARE = 5.0, 0.01       # times the median token's norm; share of tokens shown where none reaches that
QUICK: dict[str, Any] = {"kernel_epochs": 1, "inverse_epochs": 1, "refine_epochs": 1}
# The paper's own blocks are not the subject here: every stand-in stands in the same one.
NAMES = {name: title for name, (title, _) in VARIANTS.items() if name != "paper"}
GROUPS = {"all": "all", "outlier": "outlier dimensions", "ordinary": "other dimensions",
          "massive": "massive tokens", "common": "other tokens"}


def key(record: Record) -> tuple[object, ...]:
    """What makes a unit."""
    return record["model"], record["variant"]


def middle(layers: int) -> range:
    """The block all stand-ins replace."""
    start = (layers - LENGTH) // 2
    return range(start, start + LENGTH)


@torch.no_grad()
def states_at(model: PreTrainedModel, rows: TokenSet, *boundaries: int) -> list[Tensor]:
    """States of the real tokens at some boundaries, each (n, d), float32."""
    found: list[list[Tensor]] = [[] for _ in boundaries]
    for batch, states in layer_states(model, rows, boundaries, BATCH):
        for part, index in zip(found, boundaries, strict=True):
            part.append(states[index][batch.mask].float())
    return [torch.cat(part) for part in found]


def boundary_behind(edit: Edit) -> int:
    """The state of the pruned model that stands for h_e: behind a context layer, else what enters the block's slot."""
    return edit.block.start + (isinstance(edit, Substitute) and edit.context is not None)


def outlier_dimensions(target: Tensor) -> tuple[BoolTensor, Tensor, bool]:
    """Which dimensions are outliers, every dimension's rms over the median one's, whether any is above OUTLIER."""
    size = target.square().mean(0).sqrt()
    size = size / size.median()
    chosen = size > OUTLIER
    if found := bool(chosen.any()):
        return chosen, size, found  # type: ignore[return-value]
    return size >= size.topk(min(FEW, len(size))).values[-1], size, found  # type: ignore[return-value]


def massive_tokens(target: Tensor) -> tuple[BoolTensor, Tensor, bool]:
    """Which tokens are massive, every token's norm over the median one's, whether any is above MASSIVE."""
    size = target.norm(dim=-1)
    size = size / size.median()
    chosen = size > MASSIVE
    if found := bool(chosen.any()):
        return chosen, size, found  # type: ignore[return-value]
    count = max(1, round(SHARE * len(size)))
    return size >= size.topk(count).values[-1], size, found  # type: ignore[return-value]


def errors(guess: Tensor, source: Tensor, target: Tensor) -> Record:
    """Σ(ŷ − y)² by group: over the group's Σ(y − h_s)² (``update_left``, dropping is 1), over its Σ(y − mean)²
    (``variance_left``), and the group's share of the whole error (``share``); all of shape (n, d).
    """
    dimensions, tokens = outlier_dimensions(target)[0], massive_tokens(target)[0]
    everything = torch.ones_like(target, dtype=torch.bool)
    groups = {"all": everything, "outlier": everything & dimensions, "ordinary": everything & ~dimensions,
              "massive": everything & tokens[:, None], "common": everything & ~tokens[:, None]}
    error, update = (guess - target).double().square(), (target - source).double().square()
    spread = (target.double() - target.double().mean(0)).square()
    return {
        name: {"update_left": float(error[group].sum() / update[group].sum()),
               "variance_left": float(error[group].sum() / spread[group].sum()),
               "share": float(error[group].sum() / error.sum())}
        for name, group in groups.items()
    }


def facts(target: Tensor) -> Record:
    """What the groups are made of: how many, how large, and whether they reach the definitions' thresholds."""
    dimensions, width_size, wide = outlier_dimensions(target)
    tokens, token_size, heavy = massive_tokens(target)
    return {
        "outliers": wide, "dimensions": dimensions.nonzero().flatten().tolist(),
        "dimension_sizes": width_size[dimensions].tolist(), "massive": heavy, "massive_tokens": int(tokens.sum()),
        "smallest_massive": float(token_size[tokens].min()), "largest_massive": float(token_size.max()),
        "held_tokens": len(target),
    }


def run(path: Path, text: Path, name: str, file: Path, quick: bool) -> None:
    """Measures what the file lacks of one model."""
    missing = [variant for variant in NAMES if (name, variant) not in load(file, key)]
    if not missing:
        return
    subject = Subject(path, text)
    block = middle(len(decoder_layers(subject.model)))
    rows = subject.rows(2048 if quick else TOKENS, seed=0)
    stream = subject.held_out(2048 if quick else HELD)
    width = rows.ids.shape[1]
    held = TokenSet(*(value[:, : value.shape[1] // width * width].view(-1, width)  # type: ignore[arg-type]
                      for value in (stream.ids, stream.mask)), stream.source, stream.bos)
    source, target = states_at(subject.model, held, block.start, block.stop)
    for variant in missing:
        start = time.perf_counter()
        edit = fitted(subject, rows, block, variant, quick)
        seconds = time.perf_counter() - start
        [guess] = states_at(apply_edits(subject.model, [edit]), held, boundary_behind(edit))
        found = errors(guess, source, target)
        keep(compact({"model": name, "variant": variant, "quick": quick, "block": [block.start, block.stop],
                      "fitted_tokens": rows.fitted(KDP.held).tokens, "seconds": seconds, **facts(target),
                      "errors": found}), file, key)
        print(f"{name} {variant}: {found['all']['update_left']:.3f} of the update left, {seconds:.0f} s", flush=True)


def fitted(subject: Subject, rows: TokenSet, block: range, variant: str, quick: bool) -> Edit:
    """One stand-in in the block: 2.5 d² parameters beside its attention, as by default, with nothing filled up."""
    options = VARIANTS[variant][1]
    if options is None:
        return Drop(block)
    method = KDP(**{
        "fill": False, **TRAINED, **options, "blocks": ((block.start, block.stop),), **(QUICK if quick else {})})
    return method(subject.model, rows, None, seed=0, batch_size=BATCH).edits[0]


# ------------------------------------------------------------------------------------------------- figures


def _ordered(records: list[Record]) -> list[Record]:
    return sorted(records, key=lambda record: list(NAMES).index(record["variant"]))


def plot(records: list[Record]) -> Figure:
    """A row a model: share of the update left by group, dimensions to the left, tokens to the right."""
    models = by_model(records)
    figure = Figure(figsize=(11, 4.2 * len(models)), layout="constrained")
    pairs: tuple[tuple[str, Callable[[Record], str]], ...] = (("outlier ordinary", _wide), ("massive common", _heavy))
    for row, (name, own) in zip(figure.subplots(len(models), 2, squeeze=False), models.items(), strict=True):
        found = _ordered(own)[::-1]
        for axes, (groups, title) in zip(row, pairs, strict=True):
            for mark, colour, group in zip("os", COLOURS, groups.split(), strict=False):
                axes.plot([record["errors"][group]["update_left"] for record in found], range(len(found)), mark,
                          color=colour, label=title(found[0]) if mark == "o" else GROUPS[group])
            axes.set_yticks(range(len(found)), [record["variant"] for record in found])
            axes.axvline(1, color="#888888", linewidth=0.8)
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_xlabel(f"{name}: error over the block's update (dropped: 1)")
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    return figure


def _wide(record: Record) -> str:
    return GROUPS["outlier"] if record["outliers"] else f"the {len(record['dimensions'])} largest dimensions"


def _heavy(record: Record) -> str:
    return GROUPS["massive"] if record["massive"] else f"the {SHARE:.0%} of tokens of largest norm"


def section(name: str, own: list[Record]) -> str:
    """The page's part on one model."""
    first = own[0]
    sizes = ", ".join(f"{dim} ({size:.1f} ×)" for dim, size in zip(
        first["dimensions"], first["dimension_sizes"], strict=True))
    wide = "Outlier dimensions" if first["outliers"] else (
        f"No dimension is above {OUTLIER:g} times the median; instead the largest {len(first['dimensions'])}")
    heavy = (f"{first['massive_tokens']} massive tokens" if first["massive"] else
             f"No token is above {MASSIVE:g} times the median norm; instead the largest {SHARE:.0%}, "
             f"{first['massive_tokens']} tokens")
    rows = [[NAMES[record["variant"]],
             *(f"{record['errors'][group]['update_left']:.3f}" for group in GROUPS),
             f"{record['errors']['outlier']['share']:.1%}", f"{record['errors']['massive']['share']:.1%}",
             f"{record['errors']['outlier']['variance_left']:.3f}",
             f"{record['errors']['ordinary']['variance_left']:.3f}"] for record in _ordered(own)]
    columns = ["all", _wide(first), GROUPS["ordinary"], _heavy(first), GROUPS["common"],
               "share of the error: dimensions", "tokens", "variance left: these dimensions", "others"]
    return f"""## {name}

Layers {first['block'][0]}–{first['block'][1] - 1}; {first['fitted_tokens']:,} fitted and {first['held_tokens']:,}
held-out tokens. {wide}: {sizes}. {heavy}, {first['smallest_massive']:.2f} to {first['largest_massive']:.2f} times the
median.

{table("stand-in | " + " | ".join(columns), rows)}"""


def render(file: Path) -> None:
    """Writes the page and the plot beside the record."""
    records = list(load(file, key).values())
    sections = "\n\n".join(section(name, own) for name, own in by_model(records).items())
    page = f"""# Outliers

A trained stream holds a few dimensions, and sometimes a few tokens, many times larger than the others. Does a kernel,
or any other stand-in, err more there than elsewhere?

    python benchmarks/outliers.py

All stand-ins replace the same block, the four middle layers, at 2.5 d² parameters beside their attention (a linear map
has d²; nothing is filled up to a ratio), {TRAINED["refine_epochs"]} epochs of step 3, one seed.
Outlier dimensions: root mean square above {OUTLIER:g} times the
median dimension's; massive tokens: norm above {MASSIVE:g} times the median token's, both of the dense model's h_e on
the bundled held-out text. Figures are Σ(ŷ − y)² of a group over its Σ(h_e − h_s)²: dropping the block is 1. Then the
group's share of the whole error, and its error over its variance.

![error by group]({file.stem}.svg)

{sections}
"""
    write_page(file, page, plot(records))


def main() -> None:
    make_page(
        arguments(__doc__, "outliers"), "outliers",
        lambda options: run(options.model, options.text, options.name, options.file, options.quick), render)


if __name__ == "__main__":
    main()
