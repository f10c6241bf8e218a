"""The stages of a run: load → analyse → prune → evaluate → save → report."""

import dataclasses
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kdprune.analysis import Scores, score_layers
from kdprune.assemble import Evaluation, analysis_results, evaluate, pruning_results
from kdprune.cache import JsonCodec
from kdprune.data import TokenSet
from kdprune.errors import KDPruneError
from kdprune.heal import Heal, make_heal
from kdprune.heal import heal as heal_model
from kdprune.identity import tokens_identity
from kdprune.methods import METHODS
from kdprune.methods.keeping import ResultCodec
from kdprune.methods.method import Method, RankedMethod
from kdprune.methods.result import MethodResult
from kdprune.model.checkpoint import save_model, verify
from kdprune.model.placement import is_dispatched
from kdprune.model.streaming import is_streamed
from kdprune.model.surgery import apply_edits
from kdprune.output import check_output, staged_directory
from kdprune.recipe import check_options, load_recipe, reject_unknown
from kdprune.report.card import render_card
from kdprune.report.page import write_analysis, write_page
from kdprune.report.results import Results
from kdprune.resources import Resources, make_resources
from kdprune.run import Run
from kdprune.runtime import Stages
from kdprune.session import Session, plain_source
from kdprune.world import World, start_world

VERIFIED_TOKENS = 64      # on which the saved model must equal the one in memory, bit for bit


@dataclass(frozen=True)
class PruneResult:
    """A pruned model and everything known about it.

    Attributes:
        model: the pruned model; plain ``save_pretrained`` and ``from_pretrained`` work on it.
        results: the content of ``results.json``. tokenizer: the dense model's, or None.
        probe: token ids (1, T) on which a saved copy is compared with ``model``.
    """

    model: PreTrainedModel
    results: Results
    tokenizer: PreTrainedTokenizerBase | None
    probe: Tensor

    @property
    def blocks(self) -> list[range]:
        """The removed blocks, half-open layer ranges of the dense model."""
        return [range(*block) for block in self.results.blocks]

    @property
    def metrics(self) -> dict[str, Any]:
        """Layers, parameters, perplexity, speed and cache size, as plain numbers by name."""
        names = {"layers", "parameters", "perplexity", "speed", "kv_cache_bytes_per_token"}
        return self.results.model_dump(include=names, mode="json")

    def save(self, directory: str | Path, overwrite: bool = False) -> Path:
        """Writes checkpoint, tokenizer, model card, ``results.json`` and ``report.html``, then loads the checkpoint
        back and compares logits bit for bit.

        Raises:
            KDPruneError: the directory is not empty (without ``overwrite``), cannot be written, or the loaded model
                differs. Nothing half-written is left.
        """
        with staged_directory(directory, overwrite) as staging:
            save_model(self.model, staging, self.tokenizer)
            verify(staging, self.model, self.probe)
            (staging / "README.md").write_text(render_card(self.results), encoding="utf-8")
            self.results.save(staging / "results.json")
            write_page(self.results, staging / "report.html")
        return Path(directory)

    def report(self, path: str | Path) -> Path:
        """Writes the one-file HTML report."""
        return write_page(self.results, path)


def prune(
    model: str | Path | PreTrainedModel | None = None,
    output_dir: str | Path | None = None,
    method: str = "kdp",
    ratio: float = 0.25,
    calibration: Any = None,
    tokenizer: Any = None,
    seed: int = 0,
    device: str = "auto",
    *,
    heldout: Any = None,
    samples: int | None = None,
    length: int | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    heal: str | None = None,
    heal_what: str | None = None,
    heal_tokens: int | None = None,
    heal_rate: float | None = None,
    heal_batch: int | None = None,
    heal_rank: int | None = None,
    heal_alpha: float | None = None,
    work_dir: str | Path | None = None,
    host_memory: str | None = None,
    device_memory: str | None = None,
    device_map: str | None = None,
    load_in: str | None = None,
    recipe: str | Path | Mapping[str, Any] | None = None,
    progress: bool = False,
    **method_options: Any,
) -> PruneResult:
    """Prunes a causal language model to a net-parameter ratio and measures what it cost.

    Args:
        model: local path, hub id or loaded model; None: the bundled reference model. A loaded model's weights stay
            as they are, and the result shares those it keeps: train a deepcopy. It is put into evaluation mode, and
            moved if ``device`` is given.
        output_dir: where to save; None: nothing is written (``result.save`` does it later).
        method: a name in ``kdprune.methods.METHODS``. ratio: net share of all parameters to remove.
        calibration: text file, directory, hub data set, weighted mixture, list of strings, token ids (N, T), or None
            for the bundled text. tokenizer: needed for text when ``model`` is a loaded model.
        seed: of every random draw. device: "auto", "cpu", "cuda", ….
        heldout: text or token ids for perplexity; None: the bundled text, or the calibration rows kept out of every
            fit when there is no tokenizer. samples, length: rows, and tokens a row, of calibration text.
        dtype: of the loaded model ("float32", …); None: the checkpoint's. A loaded model keeps its own.
        overwrite: replace a non-empty ``output_dir``. trust_remote_code: as in transformers.
        heal: train the pruned model on the calibration text afterwards: "lm" (language-model loss) or "kl" (against
            the dense model's logits). heal_what, …: the fields of :class:`kdprune.heal.Heal`.
        work_dir, host_memory, device_memory, device_map, load_in: the fields of :class:`kdprune.resources.Resources`.
            With a work directory a run that was stopped goes on where it was, to the same bits.
        recipe: a YAML file or mapping of any of these options; arguments that differ from their default win.
        progress: show a progress bar a stage, on stderr if that is a terminal.
        method_options: fields of the method's dataclass: ``preset``, ``context``, ``features``, ….

    Raises:
        KDPruneError: anything wrong with what was given, in one line.
    """
    if recipe is not None:
        return prune(**_with_recipe(recipe, {**locals(), "recipe": None}))
    settings = make_method(method, {"ratio": ratio, **method_options})
    healing = make_heal({
        "heal": heal, "heal_what": heal_what, "heal_tokens": heal_tokens, "heal_rate": heal_rate,
        "heal_batch": heal_batch, "heal_rank": heal_rank, "heal_alpha": heal_alpha})
    resources = make_resources({
        "work_dir": work_dir, "host_memory": host_memory, "device_memory": device_memory, "device_map": device_map,
        "load_in": load_in})
    here = start_world(device)
    _check_place(output_dir, overwrite, resources, here)
    stages = Stages(show=progress and here.first)
    with Session(model, tokenizer, seed, device, dtype, trust_remote_code, stages, resources) as session:
        tokens = session.calibration(calibration, samples, length)
        text = session.heldout(heldout, tokens, settings.held)
        check_run(session, settings, tokens, healing)
        options = {
            "model": None if session.bundled else session.name, "method": method, "seed": seed,
            "calibration": plain_source(calibration), "heldout": plain_source(heldout), "samples": samples,
            "length": length, "dtype": dtype, **resources.options(),
            **({} if healing is None else healing.options()), **dataclasses.asdict(settings),
        }
        with session.run(tokens) as run:
            run = scored(session.model, tokens, settings, run)
            made = run_method(session.model, settings, tokens, run, healing)
            measured = evaluated(session, settings, healing, made.pruned, text, run)
            base = analysis_results(session.name, session.model, options, tokens, run, method)
            results = pruning_results(base, session.model, made.pruned, made.outcome, measured, made.healed)
            result = PruneResult(made.pruned, results, session.tokenizer, tokens.ids[:1, :VERIFIED_TOKENS])
            if output_dir is not None:
                with stages.stage("save and verify"):
                    if here.first:
                        result.save(output_dir, overwrite)
                    here.barrier()
                run.cache.clean()
    return result


@dataclass(frozen=True)
class RunOutcome:
    """What a method decided, the pruned (and healed) model, and the fields of ``results.json``'s ``heal`` or None."""

    outcome: MethodResult
    pruned: PreTrainedModel
    healed: dict[str, Any] | None = None


def _check_place(output_dir: str | Path | None, overwrite: bool, resources: Resources, here: World) -> None:
    """Raises KDPruneError for an output that cannot be written, or that holds the work directory: before any work."""
    if output_dir is not None:
        resources.check_apart(output_dir)
        if here.first:
            check_output(output_dir, overwrite)


def check_run(session: Session, method: Method, tokens: TokenSet, heal: Heal | None = None) -> None:
    """Raises KDPruneError if the session's model cannot be pruned, or healed, so: before any work."""
    if heal is not None:
        if is_streamed(session.model) or is_dispatched(session.model):
            raise KDPruneError("got heal for a model whose layers are read from disk or spread over devices, expected "
                               "one that fits on one; give it more memory (--host-memory), or leave healing out")
        heal.check(method, tokens)
    if session.states_model is not None:
        method.check_states_model()
    method.check(session.model, tokens)


def scored(model: PreTrainedModel, tokens: TokenSet, method: Method, run: Run) -> Run:
    """The run with the similarity analysis, if the method ranks its blocks by it."""
    if not isinstance(method, RankedMethod):
        return run
    return dataclasses.replace(run, scores=score_layers(model, tokens, run, protect=method.protect))


def run_method(
    model: PreTrainedModel, method: Method, tokens: TokenSet, run: Run, heal: Heal | None = None,
) -> RunOutcome:
    """One method on a model, healed if asked for; in the pruned model kept weights are shared."""
    options = method_identity(method)

    def compute() -> MethodResult:
        return method(model, tokens, run)

    outcome = compute() if method.caches_parts else run.cached("method", options, compute, ResultCodec(model))
    pruned = apply_edits(model, outcome.edits)
    if heal is None:
        return RunOutcome(outcome, pruned)
    healed, record = heal_model(
        pruned, model, outcome.edits, tokens, heal, run, held=tokens.held_out(method.held), follows_from=options)
    return RunOutcome(outcome, healed, record)


def method_identity(method: Method) -> list[Any]:
    """What a method's result follows from beside model, tokens and seed: its class and its options."""
    return [type(method).__name__, dataclasses.asdict(method)]


def evaluated(
    session: Session, method: Method, heal: Heal | None, pruned: PreTrainedModel, text: TokenSet, run: Run
) -> Evaluation:
    """Both models measured, found in the cache or made."""
    healing = None if heal is None else dataclasses.asdict(heal)
    tokenizer = session.tokenizer
    reader = None if tokenizer is None else [type(tokenizer).__name__, tokenizer.name_or_path]  # of samples
    return run.cached(
        "evaluation", [method_identity(method), healing, tokens_identity(text), reader],
        lambda: evaluate(session.model, pruned, tokenizer, text, run), JsonCodec(Evaluation), "evaluate")


def analyze(
    model: str | Path | PreTrainedModel | None = None,
    calibration: Any = None,
    *,
    output_dir: str | Path | None = None,
    tokenizer: Any = None,
    seed: int = 0,
    device: str = "auto",
    samples: int | None = None,
    length: int | None = None,
    dtype: str | None = None,
    protect: float = RankedMethod.protect,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    work_dir: str | Path | None = None,
    host_memory: str | None = None,
    device_memory: str | None = None,
    device_map: str | None = None,
    load_in: str | None = None,
    progress: bool = False,
) -> Scores:
    """Scores the similarity of all pairs of layer states (KDP, section 1); nothing is pruned.

    Args:
        output_dir: where to write ``results.json`` and ``report.html``; None: nothing is written.
        protect: share of layers at either end that pruning would keep (drawn in the plots).
        Others as in :func:`prune`.

    Returns:
        Arrays by name, with ``.plot(path)``.
    """
    resources = make_resources({
        "work_dir": work_dir, "host_memory": host_memory, "device_memory": device_memory, "device_map": device_map,
        "load_in": load_in})
    here = start_world(device)
    _check_place(output_dir, overwrite, resources, here)
    stages = Stages(show=progress and here.first)
    with Session(model, tokenizer, seed, device, dtype, trust_remote_code, stages, resources) as session:
        tokens = session.calibration(calibration, samples, length)
        with session.run(tokens) as run:
            scores = score_layers(session.model, tokens, run, protect=protect)
            run = dataclasses.replace(run, scores=scores)
        if output_dir is not None and here.first:
            options = {
                "model": None if session.bundled else session.name, "seed": seed,
                "calibration": plain_source(calibration), "samples": samples, "length": length, "dtype": dtype,
                "protect": protect, **resources.options(),
            }
            results = analysis_results(session.name, session.model, options, tokens, run)
            with staged_directory(output_dir, overwrite) as staging:
                results.save(staging / "results.json")
                write_analysis(results, staging / "report.html")
    here.barrier()
    return scores


def make_method(name: str, options: Mapping[str, Any]) -> Method:
    """The method of this name with these options; raises KDPruneError for names and values that cannot be."""
    if name not in METHODS:
        reject_unknown([name], METHODS, "method")
    method = METHODS[name]
    own = [parameter for parameter in inspect.signature(prune).parameters if parameter != "method_options"]
    reject_unknown(options, [*own, *(item.name for item in dataclasses.fields(method))], f"option of {name}")
    options = {key: value for key, value in check_options({**options, "method": name}).items() if key != "method"}
    return method(**options)


def _with_recipe(recipe: str | Path | Mapping[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of ``prune`` with a recipe's values where an argument is at its default."""
    options = check_options(recipe) if isinstance(recipe, Mapping) else load_recipe(recipe)
    method_options = given.pop("method_options")
    parameters = inspect.signature(prune).parameters
    changed = {
        name: value for name, value in given.items()
        if not (type(value) is type(parameters[name].default) and value == parameters[name].default)
    }
    return {**options, **changed, **method_options}
