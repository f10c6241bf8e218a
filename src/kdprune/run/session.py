"""What a run works on: the dense model, its tokenizer and its texts, loaded as the user named them."""

import contextlib
import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from transformers import PreTrainedModel

from kdprune.data.sources import BUNDLED_MODEL, as_given, is_named
from kdprune.data.tokens import (
    BUNDLED_SAMPLES,
    DEFAULT_SAMPLES,
    LONGEST_ROW,
    TokenSet,
    bundled_calibration,
    bundled_heldout,
    load_stream,
    load_tokens,
)
from kdprune.errors import KDPruneError
from kdprune.evaluation.fidelity import HeldOut
from kdprune.evaluation.models import longest_context, vocabulary_size
from kdprune.evaluation.perplexity import check_window, default_window
from kdprune.model.loading import load_tokenizer
from kdprune.model.placement import check_states_model, input_device, reads_weights
from kdprune.model.quantised import check_load_in
from kdprune.run.resources import NONE, Resources, model_part, run_key
from kdprune.runtime.distributed import world
from kdprune.runtime.machine import device_peak_bytes, host_peak_bytes, resolve_device
from kdprune.runtime.run import Run
from kdprune.runtime.stages import Stages
from kdprune.store.cache import Cache
from kdprune.store.files import tell
from kdprune.store.hashing import IdentityPart, as_part, digest, model_identity

HELD_OUT_TOKENS = 65_536  # of held-out text that are scored by default, at most
LEAST_HELD_OUT = 4_096  # … and at least


class Session:
    """The model, tokenizer and token sets a run works on.

    Arguments as of :func:`kdprune.prune`. Used as a context, which ends what a budget made the accelerator refuse.

    Attributes:
        model: the dense model.
        states_model: the quantised model that its hidden states come from, if one is asked for.
        tokenizer: its tokenizer, or None.
        name: the model as shown.
        bundled: whether it is the bundled one.
        seed: of every draw.
        stages: of the run.
        resources: what it may use.
        memory: the budgets in bytes.
        stored: the checkpoint's dtype where the model is computed in float32 instead, or None.
    """

    def __init__(
        self, model: str | Path | PreTrainedModel | None, tokenizer: Any, seed: int, device: str, dtype: str | None,
        trust_remote_code: bool, stages: Stages, resources: Resources | None = None,
    ):
        model, resources = BUNDLED_MODEL if model is None else model, resources or Resources()
        self.bundled = isinstance(model, str | Path) and Path(model) == BUNDLED_MODEL
        self.seed, self.stages, self.resources, self._source = seed, stages, resources, model
        dtype = None if isinstance(model, PreTrainedModel) else dtype
        self._warned, self._before = False, (host_peak_bytes(), device_peak_bytes())
        stays = isinstance(model, PreTrainedModel) and device == "auto" and model.device.type != "meta"
        place = str(model.device) if stays else device  # type: ignore[union-attr]  # a loaded model
        self.memory, self._place = resources.memory(place), resolve_device(place)
        if resources.load_in is not None:
            check_load_in(resources.load_in, model)
        stages.watch = self._watch
        with contextlib.ExitStack() as stack, stages.stage("load model"):
            if self._place.type != "cpu":  # what is waited for, and whose peak is read, is the current device
                stack.enter_context(torch.accelerator.device_index(self._place.index))
            stack.callback(self.memory.lift, self._place)
            self.memory.enforce(self._place)
            self.stored = resources.widens(
                model, self.memory, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
            dtype = dtype if self.stored is None else "float32"
            self.model = resources.load(
                model, self.memory, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
            self.states_model = resources.states_model(
                model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
            if self.states_model is not None:
                check_states_model(self.model, self.states_model)
            self.tokenizer = load_tokenizer(model, tokenizer, trust_remote_code=trust_remote_code)
            self._stack = stack.pop_all()  # what fails before this leaves the process as it was
        if isinstance(model, PreTrainedModel):
            self.name = model.config.name_or_path or type(model).__name__
        else:
            self.name = "kdprune bundled reference model" if self.bundled else str(model)

    def __enter__(self) -> "Session":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _watch(self, stage: str) -> None:
        """Says, once, when a stage took more memory than was allowed."""
        peaks = (host_peak_bytes(), device_peak_bytes())
        grown = [peak if peak > before else 0 for peak, before in zip(peaks, self._before, strict=True)]  # by this run
        remark = None if self._warned else self.memory.remark(*grown)
        if remark is not None:
            self._warned = True
            tell(f"{remark}; since stage {stage!r}")

    def again(self, seed: int, stages: Stages) -> "Session":
        """The same model and tokenizer for a run with another seed and stages of its own."""
        run = copy.copy(self)
        run.seed, run.stages = seed, stages
        return run

    def calibration(self, source: Any, samples: int | None, length: int | None) -> TokenSet:
        """Calibration tokens; the bundled text when no source is given.

        Raises KDPruneError for rows longer than the model's context. That there are fewer than asked for is said.
        """
        longest = longest_context(self.model)
        if length is not None and longest and length > longest:
            raise KDPruneError(f"got length {length}, expected 2 to {longest} tokens, the model's context")
        found = self._rows(source, samples, length)
        if samples is not None and len(found) < samples:
            self.stages.tell(f"{found.source} has {len(found):,} rows of {found.ids.shape[1]:,} tokens; "
                             f"{samples:,} were asked for")
        return found

    def _rows(self, source: Any, samples: int | None, length: int | None) -> TokenSet:
        rows = (BUNDLED_SAMPLES if self.bundled else DEFAULT_SAMPLES) if samples is None else samples
        row = min(LONGEST_ROW if length is None else length, longest_context(self.model) or LONGEST_ROW)
        with self.stages.stage("calibration text"):
            return load_tokens(
                bundled_calibration() if source is None else source, self.tokenizer,
                samples=rows, length=row, seed=self.seed, vocabulary=vocabulary_size(self.model))

    def healing_rows(self, source: Any, tokens: TokenSet, held: float, budget: int) -> TokenSet:
        """The rows that healing is made of: ``tokens``, or where its budget is larger as many as that wants, drawn anew
        from the same text; those that the method saw may be among them.

        Args:
            source: the calibration text as given.
            tokens: what was read of it.
            held: share of its rows that watches healing: none is trained on, and they are the end of the result.
            budget: real tokens that healing sees.
        """
        watched, fitted = tokens.watching(held), tokens.fitted(held)
        if budget <= fitted.tokens:
            return tokens
        rows = len(tokens) + -(-(budget - fitted.tokens) * len(fitted) // fitted.tokens)
        more = self._rows(source, rows, tokens.ids.shape[1])
        return more.without(watched).followed_by(watched) if more.ids.shape[1] == tokens.ids.shape[1] else tokens

    def heldout(
        self, source: Any, tokens: TokenSet, share: float, limit: int | None = None, windows: Sequence[int] = (),
    ) -> HeldOut:
        """What perplexity is taken on: texts as given, or the bundled one, or the calibration rows out of every fit.

        Args:
            source: text, token ids, or several of them by name; None: the bundled text.
            tokens: the calibration rows.
            share: of them that no fit sees.
            limit: tokens of each text, at most; None: so many that all windows cost no more than a pass over the
                calibration rows. A window is run twice, as it overlaps the next by half, by two models.
            windows: tokens a window; none: the model's context, at most 2048, and the length of the calibration rows
                where that is half of it or less.

        Raises:
            KDPruneError: a text cannot be read, or a window is longer than the model's context.
        """
        whole = default_window(self.model)
        windows = tuple(windows) or (whole, *([length] if 2 * (length := tokens.ids.shape[1]) <= whole else []))
        for window in windows:
            check_window(self.model, window)
        if source is None and self.tokenizer is None:
            rows = tokens.watching(share)
            rows = rows if limit is None else rows.first(limit)
            return HeldOut((dataclasses.replace(rows, source=f"held-out rows of {tokens.source}"),), windows)
        named = {"": bundled_heldout() if source is None else source} if not is_named(source) else source
        most = limit or affordable(tokens, len(named))
        texts = []
        for name, text in named.items():
            found = load_stream(text, self.tokenizer, limit=most, vocabulary=vocabulary_size(self.model))
            rows = found if limit is None else found.first(limit)  # of token ids, which stay in their rows
            texts.append(dataclasses.replace(rows, source=name or found.source, skipped=found.skipped))
        return HeldOut(tuple(texts), windows)

    def rounded(self, pruned: PreTrainedModel) -> PreTrainedModel:
        """The pruned model with weights as they are saved: what is measured of it holds for the checkpoint."""
        if self.stored is not None:
            for parameter in pruned.parameters():
                parameter.data = parameter.data.to(self.stored).to(parameter.dtype)
        return pruned

    def as_stored(self, pruned: PreTrainedModel) -> PreTrainedModel:
        """The pruned model in the checkpoint's dtype. The dense one, which shares weights with it, follows.

        Buffers stay: tables of a rotary embedding are float32 in every checkpoint.
        """
        if self.stored is not None:
            for parameter in pruned.parameters():
                parameter.data = parameter.data.to(self.stored)
        return pruned

    def weights_identity(self) -> str:
        """A hash of the model: of its weights, or of its files and dtype where it is not in memory whole."""
        if not reads_weights(self.model):
            return model_identity(self.model)
        return digest([model_part(self._source, self.model, self.name).hash, str(self.model.dtype)])

    @contextlib.contextmanager
    def run(self, tokens: TokenSet, boundaries: int = 0) -> Iterator[Run]:
        """One run on these calibration tokens, with the cache that the resources name, which holds the states at so
        many boundaries at once."""
        about = self._about(tokens) if self.resources.work_dir not in (None, NONE) else {}
        with self.cache(tokens, boundaries, about=about) as cache:
            yield Run(self.seed, stages=self.stages, cache=cache, about=run_key(about), states_model=self.states_model)

    def cache(
        self, tokens: TokenSet, boundaries: int, own: Path | None = None,
        about: Mapping[str, IdentityPart] | None = None,
    ) -> AbstractContextManager[Cache]:
        """The cache that the resources name, for runs on as many tokens that hold the states at so many boundaries at
        once; arguments as of :meth:`Resources.cache`."""
        states = tokens.ids.numel() * self.model.config.hidden_size * self.model.dtype.itemsize
        return self.resources.cache(about or {}, self.model, self.memory, boundaries * states, own)

    def _about(self, tokens: TokenSet) -> dict[str, IdentityPart]:
        """What all stages of a run on these tokens follow from."""
        running = self.model if self.states_model is None else self.states_model
        return {
            "model": world().broadcast(
                model_part(self._source, self.model, self.name) if world().first else IdentityPart(self.name, "")),
            "calibration": IdentityPart(f"{tokens.source}, {len(tokens)} rows of {tokens.ids.shape[1]}",
                                tokens.identity()),
            "dtype": as_part(str(self.model.dtype).removeprefix("torch.")), "seed": as_part(str(self.seed)),
            "device": as_part(input_device(running).type),
            "states": as_part(self.resources.load_in or "full precision"),
        }


def affordable(tokens: TokenSet, texts: int = 1) -> int:
    """Tokens of each held-out text whose scoring at two windows costs no more than a pass over the calibration rows."""
    return max(LEAST_HELD_OUT, min(HELD_OUT_TOKENS, tokens.tokens // (8 * texts)))


def plain_source(source: Any) -> Any:
    """A text source as the recipe records it: its name, or what it was."""
    source = as_given(source)
    if source is None or isinstance(source, str):
        return source
    if isinstance(source, Path):
        return str(source)
    if is_named(source):
        return {name: plain_source(text) for name, text in source.items()}
    if isinstance(source, Mapping) and "input_ids" not in source:
        return {str(name): weight for name, weight in source.items()}
    if isinstance(source, list) and source and all(isinstance(entry, list | tuple) for entry in source):
        return [[str(name), weight] for name, weight in source]
    return f"{type(source).__name__} given in Python"
