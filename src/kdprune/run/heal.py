"""Healing: training a pruned model on the calibration text."""

import copy
import dataclasses
import importlib.util
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kdprune.data.tokens import TokenSet
from kdprune.errors import KDPruneError
from kdprune.evaluation.models import evaluating
from kdprune.evaluation.perplexity import default_batch
from kdprune.methods.common.method import Method
from kdprune.model.families import decoder_layers
from kdprune.model.losses import language_loss, language_loss_of, mean_loss
from kdprune.model.placement import input_device
from kdprune.model.surgery import Drop, Edit, Rewrite, Substitute, sharing_copy
from kdprune.model.teacher import Teacher
from kdprune.options import check_values, option, options_of, recorded, taken
from kdprune.run.heal_training import (
    POINTS,
    PURPOSE,
    Objective,
    Training,
    budgeted,
    mean_objective,
    rows_on_trial,
)
from kdprune.runtime.machine import computes_in
from kdprune.runtime.run import Run
from kdprune.store.checkpoints import Checkpoint
from kdprune.store.states import open_states

WATCHED = 8_192  # tokens of held-out rows that are looked at, or as many as are trained on between two looks
RATES = (4.0, 2.0, 1.0, 0.5, 0.25)  # of what was put in, times 1/width, on trial
LORA_RATE = 1e-3

@dataclass(frozen=True, kw_only=True)
class Heal:
    """What is trained after pruning, on what, for how long.

    As arguments of :func:`kdprune.prune` and on the command line the names begin with ``heal_``; ``loss`` is ``heal``.

    Raises:
        KDPruneError: a value is outside its range.
    """

    loss: Literal["lm", "kl"] = option(
        "lm", "train the pruned model on the calibration text: language-model loss, or KL against the dense model (not "
        "at all)", name="heal", opt_in=True)
    what: Literal["stand-ins", "lora"] = option(
        "stand-ins", "what healing trains: what the method put in, or low-rank updates of every linear layer, which is "
        "what holds for methods that put nothing in", name="heal_what")
    tokens: int = option(
        1_000_000, "tokens healing sees, of the calibration text beyond the samples too, all repeated if it is shorter",
        least=1, name="heal_tokens")
    rate: float | None = option(
        None, "peak learning rate of healing (of 4, 2, 1, 1/2 and 1/4 / the width what a trial finds best; LoRA 1e-3)",
        above=0, name="heal_rate", rare=True)
    batch: int = option(4, "rows (sequences) a step of healing", least=1, name="heal_batch", rare=True)
    top: int = option(
        128, "most probable tokens of the dense model's distribution that KL tells apart; all others count as one",
        least=1, name="heal_top", rare=True)
    patience: int = option(
        10, "healing ends after so many looks at held-out rows, of 20, without gain", least=1, name="heal_patience",
        rare=True)
    rank: int = option(8, "rank of LoRA's updates", least=1, name="heal_rank", rare=True)
    alpha: float = option(
        16.0, "LoRA's updates are scaled by this over the rank", above=0, name="heal_alpha", rare=True)

    def __post_init__(self) -> None:
        check_values(self)
        if self.what == "lora" and importlib.util.find_spec("peft") is None:
            raise KDPruneError("got heal_what 'lora' without PEFT, expected it installed: pip install 'kdprune[heal]'")

    def check(self, method: Method, tokens: TokenSet | None = None) -> None:
        """Raises KDPruneError where ``method`` puts nothing in that could be trained, or no row of tokens could watch.
        """
        if self.what == "stand-ins" and not method.puts_in:
            raise KDPruneError(f"got heal_what 'stand-ins' for {method.title}, which puts nothing in the place of what "
                               f"it takes out; expected something to train: use --heal-what lora")
        if tokens is not None and len(tokens) < 2:
            raise KDPruneError("got one row of calibration text, expected 2 or more: a held-out one watches healing. "
                               "Give more text, or shorter rows (length=…)")

    def options(self) -> dict[str, Any]:
        """These options by the names that ``kdprune.prune`` and recipes know."""
        return recorded(self)


HEAL_OPTIONS = tuple(options_of(Heal))


def make_heal(given: Mapping[str, Any], method: Method) -> Heal | None:
    """The healing of ``method``'s results that ``heal``, ``heal_rate``, … among options ask for; None where ``heal`` is
    None or not there. With no ``heal_what`` a method that puts nothing in is healed by low-rank updates.

    Raises:
        KDPruneError: one of the others is given without ``heal``, or a value cannot be.
    """
    asked = [name for name in HEAL_OPTIONS if given.get(name) is not None]
    if not asked:
        return None
    if given.get("heal") is None:
        raise KDPruneError(f"got {asked[0]} without heal, expected heal 'lm' or 'kl' beside it: name the loss")
    if given.get("heal_what") is None and not method.puts_in:
        given = {**given, "heal_what": "lora"}
    return taken(Heal, given)


def heal(
    pruned: PreTrainedModel, dense: PreTrainedModel, edits: Sequence[Edit], tokens: TokenSet, settings: Heal, run: Run,
    *, held: int, follows_from: Any = None,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Trains what ``settings`` names on all but the last ``held`` rows of the calibration tokens.

    ``lm``: mean next-token cross-entropy −log q(x_{t+1} | x_{≤t}), in nats.
    ``kl``: mean over positions of KL(p‖q) = Σ_v p(v) (log p(v) − log q(v)), with p the dense model's distribution of
    the next token and q the pruned one's; tokens of p beyond the ``top`` most probable ones are taken as one. Padding
    enters neither. Dropout is off.

    Twenty times on the way, held-out rows are looked at; what is kept is what they were best with, and healing ends
    early where they gain nothing any more. What is trained is float32; the other weights stay as they are where the
    device computes in bfloat16, in which matrix products are then made.

    Args:
        pruned: what ``edits`` made of ``dense``; neither is changed.
        dense: the dense model.
        edits: what the method returned.
        tokens: the rows, as of :meth:`kdprune.run.session.Session.healing_rows`.
        settings: what is trained, for how long.
        run: seed (of the order of rows and of LoRA's start), stages, cache; what is cached are the weights trained.
        held: how many rows at the end watch.
        follows_from: the method's options.

    Returns:
        A model that shares with ``pruned`` every weight that was not trained, or ``pruned`` itself where its held-out
        loss is the better one; and the fields of ``results.json``'s ``heal``.

    Raises:
        KDPruneError: the edits put nothing in that could be trained, or the loss became NaN or infinite.
    """
    key = [follows_from, dataclasses.asdict(settings), held, tokens.identity()]

    def compute() -> tuple[PreTrainedModel, dict[str, Any]]:
        return _heal(pruned, dense, edits, tokens, settings, held, run, key)

    return run.cached("heal", key, compute, HealedCodec(pruned))


class HealedCodec:
    """A healed model and its record in the cache: of the weights those that ``pruned`` does not have."""

    def __init__(self, pruned: PreTrainedModel):
        self.pruned = pruned

    def pack(self, value: tuple[PreTrainedModel, dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The record, and the trained weights by name."""
        healed, record = value
        before = dict(self.pruned.named_parameters())
        return record, {name: weight for name, weight in healed.named_parameters() if weight is not before[name]}

    def unpack(self, plain: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[PreTrainedModel, dict[str, Any]]:
        """The model again; ``pruned`` itself where healing was undone."""
        return (_with_weights(self.pruned, tensors) if tensors else self.pruned), plain


def _heal(
    pruned: PreTrainedModel, dense: PreTrainedModel, edits: Sequence[Edit], tokens: TokenSet, settings: Heal, held: int,
    run: Run, key: Any,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    names = put_in(pruned, dense, edits) if settings.what == "stand-ins" else linear_weights(pruned)
    watched = tokens.select(slice(len(tokens) - held, None)).first(min(WATCHED, settings.tokens // POINTS))
    rows, numbers = budgeted(tokens.select(slice(len(tokens) - held)), settings.tokens)
    fast = settings.what == "stand-ins" and computes_in(torch.bfloat16, input_device(pruned))
    # What leaves the dense model's layers is kept of the watched rows: they run once, whatever is asked of them later.
    final = open_states((*watched.ids.shape, dense.config.hidden_size), dense.dtype, "the dense model's last states")
    teacher = Teacher(dense, watched, final=final)
    with gradients_as_before(pruned, dense), evaluating(pruned), evaluating(dense):
        before = _measured(pruned, teacher, settings)
        tuned = _trainable(pruned, names, fast)
        if settings.loss == "lm":
            objective: Objective = lambda model, batch, _: language_loss(model, batch)  # noqa: E731
            looked = objective
        else:
            spill = run.cache.spill_directory("teacher", run.key("teacher", key))
            again = asked_again(numbers, settings)
            objective = Teacher(dense, tokens, settings.top, keep=again, folder=spill).divergence
            looked = Teacher(
                dense, watched, settings.top, keep=torch.arange(len(watched)), final=final).divergence
        train = _train_lora if settings.what == "lora" else _train_put_in
        with evaluating(tuned), run.stage("heal", len(rows)) as progress:
            training = Training(tuned, objective, rows, numbers, looked, watched, settings.batch, settings.patience,
                                fast, run, progress)
            count, rate, curves = train(tuned, names, settings, run, training, run.checkpoint("heal", key))
        healed = _with_weights(pruned, {name: tuned.get_parameter(name) for name in names})
        after = _measured(healed, teacher, settings)
        language = mean_objective(
            lambda _, batch, rows: language_loss_of(teacher.logits(rows), batch), dense, watched, settings.batch)
    kept = after[0] < before[0]
    if not kept:  # what it came to, not the start that it ended with; of KL both were looked at with ``top`` apart
        after = max(after[0], before[0] + min(curves["watched"][1:]) - curves["watched"][0]), after[1]
    record = {
        "loss": settings.loss, "what": settings.what, "tokens": training.seen(curves), "parameters": count,
        "rate": rate, "curve": curves["loss"], "watched": curves["watched"],
        "looks": [training.seen({"loss": curves["loss"][:end]}) for end in range(len(curves["watched"]))],
        "before": before[0], "after": after[0], "language_before": before[1], "language_after": after[1],
        "language_dense": language, "kept": kept}
    return healed if kept else pruned, record


def _trainable(pruned: PreTrainedModel, names: Collection[str], fast: bool) -> PreTrainedModel:
    """A copy whose named parameters are its own, in float32; the others are shared, or float32 too if not ``fast``."""
    if not fast and pruned.dtype != torch.float32:
        return copy.deepcopy(pruned).float()
    tuned = sharing_copy(pruned, own=names)
    for name in names:
        parameter = tuned.get_parameter(name)
        parameter.data = parameter.data.float()
    return tuned


def asked_again(numbers: Tensor, settings: Heal) -> Tensor:
    """Of the rows that are trained on, by their numbers, those whose distributions are wanted more than once: all where
    rows come again, else those that rates are tried on."""
    if len(numbers.unique()) < len(numbers):
        return numbers
    trials = settings.rate is None and settings.what == "stand-ins"
    return numbers[: rows_on_trial(len(numbers), settings.batch) if trials else 0]


@torch.no_grad()
def _measured(model: PreTrainedModel, teacher: Teacher, settings: Heal) -> tuple[float, float]:
    """The loss that is trained on, of all tokens of the vocabulary, and the next-token loss, on the teacher's rows."""
    batch = default_batch(model, teacher.rows.ids.shape[1], copies=2, most=settings.batch)
    language = mean_loss(model, teacher.rows, batch)
    if settings.loss == "lm":
        return language, language
    return mean_objective(teacher.divergence, model, teacher.rows, batch), language


def put_in(pruned: PreTrainedModel, dense: PreTrainedModel, edits: Sequence[Edit]) -> list[str]:
    """Names of what Substitute and Rewrite edits brought: the parameters ``pruned`` does not share with ``dense``.

    Raises:
        KDPruneError: there are none, or edits of another kind made every weight anew.
    """
    kept = {id(parameter) for parameter in dense.parameters()}
    names = [name for name, parameter in pruned.named_parameters() if id(parameter) not in kept]
    if not names or not all(isinstance(edit, Drop | Substitute | Rewrite) for edit in edits):
        raise KDPruneError("got heal_what 'stand-ins' for a model without any, expected something that was put in: "
                           "use --heal-what lora")
    return names


def linear_weights(model: PreTrainedModel) -> list[str]:
    """Names of the weights of all linear maps in the decoder layers, stand-ins' and GPT-2's Conv1D among them."""
    inside = {id(module) for layer in decoder_layers(model) for module in layer.modules()}
    return [f"{name}.weight" for name, module in model.named_modules()
            if id(module) in inside and isinstance(module, nn.Linear | Conv1D)]


Told = tuple[int, float, dict[str, list[float]]]  # how many numbers were trained, the rate, the curves


def _train_put_in(
    model: PreTrainedModel, names: Collection[str], settings: Heal, run: Run, training: Training,
    checkpoint: Checkpoint,
) -> Told:
    """Trains the named parameters in place."""
    model.requires_grad_(False)
    parameters = [model.get_parameter(name) for name in names]
    for parameter in parameters:
        parameter.requires_grad_()
    rates = [settings.rate] if settings.rate else [rate / model.config.hidden_size for rate in RATES]
    return _count(parameters), *training.fit(parameters, rates, checkpoint)


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _train_lora(
    model: PreTrainedModel, names: Collection[str], settings: Heal, run: Run, training: Training,
    checkpoint: Checkpoint,
) -> Told:
    """Trains W + (α/r)·BA with A (r, in), B (out, r) for every named weight W, and adds the update to W in place.

    Source: Hu et al., "LoRA", ICLR 2022. B starts at 0, A uniform as PEFT has it but drawn from the seed.
    """
    import peft

    config = peft.LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=0.0,  # type: ignore[arg-type]
        target_modules=[name.removesuffix(".weight") for name in names])
    with warnings.catch_warnings(), torch.random.fork_rng():
        # PEFT finds out by itself which weights are stored transposed (Conv1D), and says so; and it asks transformers
        # for a name that is going away.
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, config)
    draw = run.generator(PURPOSE + 1)
    parameters = []
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            parameters.append(parameter)
            if ".lora_A." in name:
                bound = parameter.shape[1] ** -0.5
                start = torch.empty(parameter.shape).uniform_(-bound, bound, generator=draw)
                parameter.data.copy_(start)
    rate, curves = training.fit(parameters, [settings.rate or LORA_RATE], checkpoint)
    wrapped.merge_and_unload()
    return _count(parameters), rate, curves


@torch.no_grad()
def _with_weights(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> PreTrainedModel:
    """A copy of ``model`` with these weights by name, cast to its dtype; all others are shared."""
    result = sharing_copy(model, own=weights.keys())
    for name, weight in weights.items():
        result.get_parameter(name).copy_(weight)
    return result


@contextmanager
def gradients_as_before(*models: nn.Module) -> Iterator[None]:
    """Which parameters of ``models`` want gradients is afterwards as it was: they are shared with what is trained."""
    flags = [(parameter, parameter.requires_grad) for model in models for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
