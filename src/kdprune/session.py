"""What a run works on: the dense model, its tokenizer and its texts, loaded as the user named them."""

import contextlib
import copy
import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from kdprune.analysis import Scores, score_layers
from kdprune.data import DEFAULT_SAMPLES, TokenSet, bundled_calibration, bundled_heldout, load_stream, load_tokens
from kdprune.evaluation.models import longest_context, vocabulary_size
from kdprune.files import tell
from kdprune.identity import Part, as_part, digest, model_identity, tokens_identity
from kdprune.keeper import Keeper
from kdprune.methods.method import Method, RankedMethod
from kdprune.model.loading import load_tokenizer
from kdprune.model.placement import collecting, reads_weights, work_device
from kdprune.resources import BOUNDARIES, Resources, model_part
from kdprune.runtime import BATCH, Stages, device_peak_bytes, host_peak_bytes, resolve_device
from kdprune.world import world

BUNDLED_MODEL = Path(__file__).parent / "bundled" / "model"
LONGEST_ROW = 512    # tokens a row of calibration text, unless the model's context is shorter
NOTHING = Keeper()   # keeps nothing
HELD_OUT_TOKENS = 65_536  # of held-out text that are scored by default


class Session:
    """The model, tokenizer and token sets a run works on.

    Arguments as of :func:`kdprune.prune`. Attributes: ``model``, ``tokenizer``, ``name`` (the model as shown),
    ``bundled``, ``seed``, ``stages``, ``resources``.
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
        self.memory, self._place = resources.memory(device), resolve_device(device)
        self.memory.enforce(self._place)
        stages.watch = self._watch
        with stages.stage("load model"):
            self.model = resources.load(
                model, self.memory, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
            self._collector = resources.collector(
                model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
            self.tokenizer = load_tokenizer(model, tokenizer, trust_remote_code=trust_remote_code)
        if isinstance(model, PreTrainedModel):
            self.name = model.config.name_or_path or type(model).__name__
        else:
            self.name = "kdprune bundled reference model" if self.bundled else str(model)

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
        """Calibration tokens; the bundled text when no source is given."""
        row = min(LONGEST_ROW if length is None else length, longest_context(self.model) or LONGEST_ROW)
        with self.stages.stage("calibration text"):
            return load_tokens(
                bundled_calibration() if source is None else source, self.tokenizer,
                samples=DEFAULT_SAMPLES if samples is None and not self.bundled else samples,
                length=row, seed=self.seed, vocabulary=vocabulary_size(self.model))

    def score(self, tokens: TokenSet, protect: float, keep: Keeper = NOTHING) -> Scores:
        """The analysis of section 1, found again or made."""
        key = keep.key("analysis")
        if keep.work.find("analysis", key) is not None:
            self.stages.found("analyse")
        with self.collecting():
            kept = keep.work.tensors("analysis", key, lambda: score_layers(
                self.model, tokens, protect=protect, seed=self.seed, batch_size=BATCH, stages=self.stages).kept())
        return Scores.again(kept, protect)

    def heldout(self, source: Any, tokens: TokenSet, share: float) -> TokenSet:
        """Tokens for perplexity: as given, or the bundled text, or the calibration rows kept out of every fit."""
        if source is None and self.tokenizer is None:
            rows = tokens.select(slice(len(tokens) - tokens.held_out(share), None))
            return dataclasses.replace(rows, source=f"held-out rows of {tokens.source}")
        return load_stream(
            bundled_heldout() if source is None else source, self.tokenizer, limit=HELD_OUT_TOKENS,
            vocabulary=vocabulary_size(self.model))

    def scores_for(self, method: Method, tokens: TokenSet, keep: Keeper = NOTHING) -> Scores | None:
        """The analysis, if the method ranks its blocks by it."""
        return self.score(tokens, method.protect, keep) if isinstance(method, RankedMethod) else None

    def collecting(self) -> AbstractContextManager[None]:
        """Inside, layer states come from the quantised model, if there is one."""
        return collecting(self.model, self._collector or self.model)

    def weights_identity(self) -> str:
        """A hash of the model: of its weights, or of its files and dtype where it is not in memory whole."""
        if not reads_weights(self.model):
            return model_identity(self.model)
        return digest([model_part(self._source, self.model, self.name).hash, str(self.model.dtype)])

    @contextlib.contextmanager
    def keeper(self, tokens: TokenSet) -> Iterator[Keeper]:
        """What keeps this run's stages: under its model, calibration tokens, dtype and seed."""
        resources = self.resources
        about = {}
        if resources.work_dir not in (None, "none"):
            about = {
                "model": world().broadcast(
                    model_part(self._source, self.model, self.name) if world().first else Part(self.name, "")),
                "calibration": Part(f"{tokens.source}, {len(tokens)} rows of {tokens.ids.shape[1]}",
                                    tokens_identity(tokens)),
                "dtype": as_part(str(self.model.dtype).removeprefix("torch.")), "seed": as_part(str(self.seed)),
                "device": as_part(work_device(self.model).type),
                "states": as_part(resources.load_in or "full precision"),
            }
        states = tokens.ids.numel() * self.model.config.hidden_size * self.model.dtype.itemsize
        try:
            with resources.keeper(about, self.model, self.memory, BOUNDARIES * states) as keep:
                yield keep
        finally:
            self.memory.lift(self._place)


def plain_source(source: Any) -> Any:
    """A text source as the recipe records it: its name, or what it was."""
    if source is None or isinstance(source, str):
        return source
    if isinstance(source, Path):
        return str(source)
    if isinstance(source, Mapping) and "input_ids" not in source:
        return {str(name): weight for name, weight in source.items()}
    if isinstance(source, list) and source and all(isinstance(entry, list | tuple) for entry in source):
        return [[str(name), weight] for name, weight in source]
    return f"{type(source).__name__} given in Python"
