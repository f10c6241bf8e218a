"""Pruned models for pages that look at more than one figure of them: made once, kept in a folder, found again."""

import argparse
import dataclasses
import itertools
import json
import lzma
import math
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from units_file import Record, Subject

from kdprune.analysis import score_layers
from kdprune.data import TokenSet
from kdprune.errors import KDPruneError
from kdprune.evaluation.perplexity import Perplexity, perplexity
from kdprune.identity import tokens_identity
from kdprune.methods.method import Method, RankedMethod
from kdprune.model.checkpoint import save_model
from kdprune.model.loading import load_model
from kdprune.model.surgery import apply_edits
from kdprune.runtime import Stages, quiet_libraries
from kdprune.session import BATCH
from kdprune.text import SEPARATOR
from kdprune.variants import parse_variant

TOKENS = 121_344         # calibration tokens, all the bundled text has
HELD_OUT = 65_536        # held-out tokens that are scored, at most
QUICK_TOKENS = 4096
LONGEST = 30_000         # characters of one document
QUICK: dict[str, dict[str, Any]] = {
    "kdp": {"kernel_epochs": 1, "inverse_epochs": 1, "refine_epochs": 1}, "streamline": {"epochs": 1},
    "replaceme": {"epochs": 1}}
KDP = "kdp:refine_epochs=15"  # what pages of many units measure: a third of the default's time on few rows
TITLES = {
    "kdp": "KDP", "streamline": "Streamline-FFN", "streamline:stand_in=layer": "Streamline-Layer",
    "linearpatch": "LinearPatch", "replaceme": "ReplaceMe",
    "shortgpt": "ShortGPT", "sleb": "SLEB", "slicegpt": "SliceGPT"}


def title(variant: str) -> str:
    """A variant as pages show it."""
    named = [name for name in TITLES if f"{variant}:".startswith(f"{name}:")]
    name = max(named, key=len, default=variant.partition(":")[0])
    options = variant.removeprefix(name).removeprefix(":")
    return f"{TITLES.get(name, name)}{f' `{options}`' if options else ''}"


def add_options(parser: argparse.ArgumentParser, methods: tuple[str, ...], fit_tokens: bool = True) -> None:
    """Which variants, how many seeds and tokens, and where pruned models are kept."""
    parser.add_argument(
        "--methods", nargs="+", default=list(methods), help=f"methods or variants, kdp:rank=8 ({' '.join(methods)})")
    add_sizes(parser, fit_tokens)
    parser.add_argument("--pruned", type=Path, help="keep pruned models here and find them again, those of other pages "
                        "too; made by another version of the package they are stale: empty it yourself")


def add_sizes(parser: argparse.ArgumentParser, fit_tokens: bool = True) -> None:
    """How many seeds and tokens."""
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds, counted from --first-seed")
    parser.add_argument("--first-seed", type=int, default=0)
    if fit_tokens:
        parser.add_argument("--fit-tokens", type=int, default=TOKENS, help="calibration tokens")
    parser.add_argument("--score-tokens", type=int, default=HELD_OUT, help="held-out tokens, at most")


def fitted_tokens(options: argparse.Namespace) -> int:
    """Calibration tokens a method is given."""
    return QUICK_TOKENS if options.quick else options.fit_tokens


def scored_tokens(options: argparse.Namespace) -> int:
    """Held-out tokens that are scored, at most."""
    return QUICK_TOKENS if options.quick else options.score_tokens


def seeds_of(options: argparse.Namespace) -> range:
    """The seeds asked for."""
    return range(options.first_seed, options.first_seed + options.seeds)


def method_of(variant: str, ratio: float, quick: bool) -> Method:
    """The variant's method; `quick`: an epoch or so."""
    method = parse_variant(variant, ratio).method
    known = {field.name for field in dataclasses.fields(method)}
    quickly = QUICK.get(variant.partition(":")[0], {}) if quick else {}
    return dataclasses.replace(method, **{name: value for name, value in quickly.items() if name in known})


def documents(file: Path, characters: int) -> list[str]:
    """The first documents of a .txt or .txt.xz file, separated by lines <|endoftext|>, of so many characters in all.

    Of each at most LONGEST characters are taken, so that one book is not the whole text.
    """
    if not file.is_file():
        raise KDPruneError(f"got {file}, which does not exist; expected a .txt or .txt.xz file")
    found: list[str] = []
    lines: list[str] = []
    with lzma.open(file, "rt", encoding="utf-8") if file.suffix == ".xz" else file.open(encoding="utf-8") as text:
        for line in itertools.chain(text, [SEPARATOR]):
            if line.strip() != SEPARATOR:
                lines.append(line)
                continue
            if document := "".join(lines).strip()[:LONGEST]:
                found.append(document)
            lines = []
            if sum(map(len, found)) >= characters:
                break
    return found


class Pruner:
    """Prunes one model, or finds it pruned.

    Args:
        subject: the dense model. name: what pages call it. folder: where pruned models are kept; None: nowhere.
    """

    def __init__(self, subject: Subject, name: str, folder: Path | None, quick: bool):
        self.subject, self.name, self.folder, self.quick = subject, name, folder, quick
        self._scores: dict[tuple[str, int, float], dict[str, Tensor]] = {}

    def __call__(
        self, variant: str, ratio: float, rows: TokenSet, seed: int,
    ) -> tuple[PreTrainedModel | None, Record]:
        """The pruned model and the facts of its making; None with the reason where the method cannot do it."""
        tokens = tokens_identity(rows)
        words = (self.name, variant, f"{ratio:g}", str(seed), tokens[:12], *(["quick"] if self.quick else []))
        place = self.folder and self.folder / re.sub(r"[^\w.=-]", "_", "-".join(words))
        if place and place.is_dir():
            return load_model(place, device="cpu"), json.loads((place / "facts.json").read_text())
        dense = self.subject.model
        method = method_of(variant, ratio, self.quick)
        start = time.perf_counter()
        try:
            method.check(dense, rows)
            result = method(dense, rows, self._ranked(method, rows, tokens, seed), seed=seed, batch_size=BATCH)
        except KDPruneError as error:
            return None, {"unreachable": str(error)}
        pruned = apply_edits(dense, list(result.edits))
        facts = {
            "net_ratio": 1 - pruned.num_parameters() / dense.num_parameters(),
            "blocks": [[block.start, block.stop] for block in result.blocks],
            "tokens": rows.tokens if result.tokens is None else result.tokens, "text": rows.source,
            "seconds": time.perf_counter() - start}
        if place:
            self._kept(pruned, facts, place)
        return pruned, facts

    def _kept(self, pruned: PreTrainedModel, facts: Record, place: Path) -> None:
        part = place.with_name(f".{place.name}-{os.getpid()}")
        part.mkdir(parents=True)
        with quiet_libraries():
            save_model(pruned, part, self.subject.tokenizer)
        (part / "facts.json").write_text(json.dumps(facts))
        if place.exists():  # another run was faster
            shutil.rmtree(part)
        else:
            part.rename(place)

    def _ranked(self, method: Method, rows: TokenSet, tokens: str, seed: int) -> dict[str, Tensor] | None:
        """The analysis, once for all ratios."""
        if not isinstance(method, RankedMethod) or method.blocks is not None:
            return None
        key = (tokens, seed, method.protect)
        if key not in self._scores:
            scores = score_layers(
                self.subject.model, rows, protect=method.protect, seed=seed, batch_size=BATCH, stages=Stages())
            self._scores[key] = scores.tensors()
        return self._scores[key]


def compared(dense: Perplexity, pruned: PreTrainedModel, held_out: TokenSet) -> Record:
    """Perplexities of both and the excess loss on a held-out text."""
    after = perplexity(pruned, held_out)
    return {"dense": dense.value, "perplexity": after.value, "excess_loss": math.log(after.value / dense.value),
            "window": after.window, "stride": after.stride, "scored": after.tokens}
