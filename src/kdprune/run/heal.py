"""Healing: training a pruned model on the calibration text (the variants marked † in tables)."""

import copy
import dataclasses
import importlib.util
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import BoolTensor, Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kdprune.data.tokens import TokenSet
from kdprune.errors import KDPruneError
from kdprune.evaluation.models import evaluating
from kdprune.methods.common.method import Method
from kdprune.model.families import decoder_layers
from kdprune.model.losses import batch_logits, language_loss, mean_loss
from kdprune.model.surgery import Drop, Edit, Rewrite, Substitute, sharing_copy
from kdprune.options import check_values, option, options_of, recorded, taken
from kdprune.runtime.distributed import world
from kdprune.runtime.run import Run
from kdprune.runtime.stages import Advance
from kdprune.store.checkpoints import Checkpoint
from kdprune.train.gradients import Sums
from kdprune.train.loop import Schedule, fit

_PURPOSE = 1_000  # of the generator: its draws disturb no method's
_POINTS = 20  # of the curve

RATE = 0.25  # of what was put in, times 1/width
LORA_RATE = 1e-3
CLIP = 1.0  # largest norm of a step's gradient

Objective = Callable[[PreTrainedModel, TokenSet], tuple[Tensor, int]]


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
        "stand-ins", "what healing trains: what the method put in, or low-rank updates of every linear layer",
        name="heal_what")
    tokens: int = option(
        1_000_000, "calibration tokens healing sees, the text repeated if it is shorter", least=1, name="heal_tokens")
    rate: float | None = option(
        None, "peak learning rate of healing (0.25 / the width; LoRA 1e-3)", above=0, name="heal_rate", rare=True)
    batch: int = option(8, "rows (sequences) a step of healing", least=1, name="heal_batch", rare=True)
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


def make_heal(given: Mapping[str, Any]) -> Heal | None:
    """The healing that ``heal``, ``heal_rate``, … among options ask for; None where ``heal`` is None or not there.

    Raises:
        KDPruneError: one of the others is given without ``heal``, or a value cannot be.
    """
    asked = [name for name in HEAL_OPTIONS if given.get(name) is not None]
    if not asked:
        return None
    if given.get("heal") is None:
        raise KDPruneError(f"got {asked[0]} without heal, expected heal 'lm' or 'kl' beside it: name the loss")
    return taken(Heal, given)


def heal(
    pruned: PreTrainedModel, dense: PreTrainedModel, edits: Sequence[Edit], tokens: TokenSet, settings: Heal, run: Run,
    *, held: int, follows_from: Any = None,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Trains what ``settings`` names, in float32, on all but the last ``held`` rows of the calibration tokens.

    ``lm``: mean next-token cross-entropy −log q(x_{t+1} | x_{≤t}), in nats.
    ``kl``: mean over positions of KL(p‖q) = Σ_v p(v) (log p(v) − log q(v)), with p the dense model's distribution of
    the next token and q the pruned one's. Padding enters neither. Dropout is off.

    Args:
        pruned: what ``edits`` made of ``dense``; neither is changed.
        dense: the dense model.
        edits: what the method returned.
        tokens: the calibration rows.
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
    key = [follows_from, dataclasses.asdict(settings), held]

    def compute() -> tuple[PreTrainedModel, dict[str, Any]]:
        return _heal(pruned, dense, edits, tokens, settings, held, run, run.checkpoint("heal", key))

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
    run: Run, checkpoint: Checkpoint,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    names = put_in(pruned, dense, edits) if settings.what == "stand-ins" else linear_weights(pruned)
    watched = tokens.select(slice(len(tokens) - held, None))
    rows = budgeted(tokens.select(slice(len(tokens) - held)), settings.tokens)
    objective = language_loss if settings.loss == "lm" else divergence(dense)
    tuned = sharing_copy(pruned, own=names) if pruned.dtype == torch.float32 else copy.deepcopy(pruned).float()
    train = _train_lora if settings.what == "lora" else _train_put_in
    with gradients_as_before(pruned, dense), evaluating(pruned), evaluating(dense), evaluating(tuned):
        with run.stage("heal", len(rows)) as progress:
            training = _Training(tuned, objective, rows, progress, checkpoint)
            count, curve = train(tuned, names, settings, run, training)
        healed = _with_weights(pruned, {name: tuned.get_parameter(name) for name in names})
        record = {"loss": settings.loss, "what": settings.what, "tokens": rows.tokens, "parameters": count,
                  "curve": curve}
        return _better(pruned, healed, watched, objective, settings, record)


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


def budgeted(tokens: TokenSet, budget: int) -> TokenSet:
    """Rows with exactly ``budget`` real tokens: in order, again from the first when all are used, the last one cut."""
    counts = tokens.mask.sum(1)
    total = max(int(counts.sum()), 1)
    numbers = torch.arange(-(-budget // total) * len(tokens)) % len(tokens)
    ends = counts[numbers].cumsum(0)
    chosen = tokens.select(numbers[: int(torch.searchsorted(ends, budget)) + 1])
    mask = chosen.mask.clone()
    mask[-1] &= mask[-1].cumsum(0) <= int(counts[numbers[len(chosen) - 1]] - ends[len(chosen) - 1]) + budget
    return dataclasses.replace(chosen, mask=cast(BoolTensor, mask))


def divergence(dense: PreTrainedModel) -> Objective:
    """Summed KL(dense‖model) of the next-token distributions at a batch's real tokens, float32, and their number."""

    def objective(model: PreTrainedModel, batch: TokenSet) -> tuple[Tensor, int]:
        with torch.no_grad():
            logits = batch_logits(dense, batch)
            mask = batch.mask.to(logits.device)
            target = functional.log_softmax(logits[mask].float(), dim=-1)
        found = functional.log_softmax(batch_logits(model, batch)[mask].float(), dim=-1)
        return functional.kl_div(found, target, log_target=True, reduction="sum"), int(mask.sum())

    return objective


@dataclass(frozen=True)
class _Training:
    """One training: what is measured on which rows, and where it stands."""

    model: PreTrainedModel
    objective: Objective
    rows: TokenSet
    progress: Advance
    checkpoint: Checkpoint

    def loss_function(self, numbers: Tensor) -> Sums:
        """The summed loss of these rows."""
        total, count = self.objective(self.model, self.rows.select(numbers))
        self.progress(len(numbers) * world().size)
        return Sums({"loss": total}, count)

    def fit(self, parameters: list[nn.Parameter], settings: Heal, rate: float, run: Run) -> list[float]:
        """Trains these over the rows, once each; returns the mean loss of at most ``_POINTS`` successive stretches."""
        steps = -(-len(self.rows) // settings.batch)
        schedule = Schedule(1, settings.batch, settings.rate or rate, clip=CLIP, stretch=-(-steps // _POINTS))
        curves = fit(
            parameters, self.loss_function, len(self.rows), schedule, run.generator(_PURPOSE), name="healing",
            local_rows=lambda rows: rows[world().share(len(rows))], checkpoint=self.checkpoint)
        return curves["loss"]


Told = tuple[int, list[float]]  # how many numbers were trained, the curve


def _train_put_in(
    model: PreTrainedModel, names: Collection[str], settings: Heal, run: Run, training: _Training
) -> Told:
    """Trains the named parameters in place."""
    model.requires_grad_(False)
    parameters = [model.get_parameter(name) for name in names]
    for parameter in parameters:
        parameter.requires_grad_()
    curve = training.fit(parameters, settings, RATE / model.config.hidden_size, run)
    return _count(parameters), curve


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _train_lora(model: PreTrainedModel, names: Collection[str], settings: Heal, run: Run, training: _Training) -> Told:
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
    draw = run.generator(_PURPOSE + 1)
    parameters = []
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            parameters.append(parameter)
            if ".lora_A." in name:
                bound = parameter.shape[1] ** -0.5
                start = torch.empty(parameter.shape).uniform_(-bound, bound, generator=draw)
                parameter.data.copy_(start)
    curve = training.fit(parameters, settings, LORA_RATE, run)
    wrapped.merge_and_unload()
    return _count(parameters), curve


@torch.no_grad()
def _better(
    pruned: PreTrainedModel, healed: PreTrainedModel, watched: TokenSet, objective: Objective, settings: Heal,
    record: dict[str, Any],
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model whose loss on the watched rows is the smaller one, in the dtype in which it will be used."""

    def mean(model: PreTrainedModel) -> float:
        batches = list(watched.batches(settings.batch))
        parts = [objective(model, batches[number]) for number in world().share(len(batches)).tolist()]
        total, count = world().total([sum(float(total) for total, _ in parts), sum(count for _, count in parts)])
        return total / max(count, 1)

    before, after = mean(pruned), mean(healed)
    kept = after <= before
    if settings.loss == "lm":
        language = {"language_before": before, "language_after": after}
    else:
        language = {f"language_{when}": mean_loss(model, watched, settings.batch)
                    for when, model in (("before", pruned), ("after", healed))}
    return healed if kept else pruned, {**record, "before": before, "after": after, **language, "kept": kept}


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
