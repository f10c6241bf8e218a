"""The stages of a run: load → analyse → prune → evaluate → save → report."""

import dataclasses
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kdprune.analysis import Scores
from kdprune.assemble import analysis_results, evaluate, pruning_results
from kdprune.data import TokenSet
from kdprune.heal import Heal, make_heal
from kdprune.heal import heal as heal_model
from kdprune.methods import METHODS
from kdprune.methods.method import Method, RankedMethod
from kdprune.methods.result import MethodResult
from kdprune.model.checkpoint import save_model, verify
from kdprune.model.surgery import apply_edits
from kdprune.output import check_output, staged_directory
from kdprune.recipe import check_options, load_recipe, reject_unknown
from kdprune.report.card import render_card
from kdprune.report.page import write_analysis, write_page
from kdprune.report.results import Results
from kdprune.runtime import Stages
from kdprune.session import BATCH, Session, plain_source

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
    if output_dir is not None:
        check_output(output_dir, overwrite)
    stages = Stages(show=progress)
    run = Session(model, tokenizer, seed, device, dtype, trust_remote_code, stages)
    tokens = run.calibration(calibration, samples, length)
    check_run(run, settings, tokens, healing)
    scores = run.scores_for(settings, tokens)
    made = run_method(run, settings, tokens, scores, seed, healing)
    measured = evaluate(run.model, made.pruned, run.tokenizer, run.heldout(heldout, tokens, settings.held), stages)
    options = {
        "model": None if run.bundled else run.name, "method": method, "seed": seed,
        "calibration": plain_source(calibration), "heldout": plain_source(heldout), "samples": samples,
        "length": length, "dtype": dtype,
        **({} if healing is None else healing.options()), **dataclasses.asdict(settings),
    }
    base = analysis_results(run.name, run.model, options, tokens, scores, stages, method)
    results = pruning_results(base, run.model, made.pruned, made.outcome, measured, made.healed)
    result = PruneResult(made.pruned, results, run.tokenizer, tokens.ids[:1, :VERIFIED_TOKENS])
    if output_dir is not None:
        with stages.stage("save and verify"):
            result.save(output_dir, overwrite)
    return result


@dataclass(frozen=True)
class RunOutcome:
    """What a method decided, the pruned (and healed) model, and the fields of ``results.json``'s ``heal`` or None."""

    outcome: MethodResult
    pruned: PreTrainedModel
    healed: dict[str, Any] | None = None


def check_run(run: Session, method: Method, tokens: TokenSet, heal: Heal | None = None) -> None:
    """Raises KDPruneError if the session's model cannot be pruned, or healed, so: before any work."""
    if heal is not None:
        heal.check(method, tokens)
    method.check(run.model, tokens)


def run_method(
    run: Session, method: Method, tokens: TokenSet, scores: Scores | None, seed: int, heal: Heal | None = None,
) -> RunOutcome:
    """One method on the session's model, healed if asked for; in the pruned model kept weights are shared."""
    outcome = method(
        run.model, tokens, None if scores is None else scores.tensors(), seed=seed, stages=run.stages, batch_size=BATCH)
    pruned = apply_edits(run.model, outcome.edits)
    if heal is None:
        return RunOutcome(outcome, pruned)
    held = tokens.held_out(method.held)
    return RunOutcome(
        outcome, *heal_model(pruned, run.model, outcome.edits, tokens, heal, seed, run.stages, held=held))


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
    if output_dir is not None:
        check_output(output_dir, overwrite)
    stages = Stages(show=progress)
    run = Session(model, tokenizer, seed, device, dtype, trust_remote_code, stages)
    tokens = run.calibration(calibration, samples, length)
    scores = run.score(tokens, protect)
    if output_dir is not None:
        options = {
            "model": None if run.bundled else run.name, "seed": seed, "calibration": plain_source(calibration),
            "samples": samples, "length": length, "dtype": dtype, "protect": protect,
        }
        results = analysis_results(run.name, run.model, options, tokens, scores, stages)
        with staged_directory(output_dir, overwrite) as staging:
            results.save(staging / "results.json")
            write_analysis(results, staging / "report.html")
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
