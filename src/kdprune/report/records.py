"""The parts of results.json: what one run measured, field by field.

Every number may be ``null`` in the file: it was not measured, or it was not finite (JSON has neither NaN
nor infinity). Notation: a block is ``[s, e)``, k = e − s; h_l is the state that enters layer l, h_L the state
before the final norm; φ is the feature map of the kernel, A_i the operator of the block's i-th layer.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator


def _finite(value: Any) -> Any:
    """NaN and ±inf become None; other numbers plain floats; anything else is left for pydantic to judge."""
    if value is None or isinstance(value, str | bytes | bool | list | tuple | dict):
        return value
    try:
        number = float(value)
    except (TypeError, ValueError):
        return value
    return number if math.isfinite(number) else None


def _plain(value: Any) -> Any:
    """The same for every float inside a nested value, so that a free-form record is valid JSON too."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, range):
        return [value.start, value.stop]
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return _finite(value) if isinstance(value, float) else value


def _pair(value: Any) -> Any:
    """A range is accepted where a block is asked for."""
    return (value.start, value.stop) if isinstance(value, range) else value


def _ordered(value: tuple[int, int]) -> tuple[int, int]:
    """A block starts at a layer and holds at least one."""
    if not 0 <= value[0] < value[1]:
        raise ValueError(f"a block is [start, end) with 0 <= start < end, got {list(value)}")
    return value


Number = Annotated[float | None, BeforeValidator(_finite)]
Numbers = list[Number]
Matrix = list[Numbers]
Block = Annotated[tuple[int, int], BeforeValidator(_pair), AfterValidator(_ordered)]
FreeForm = Annotated[dict[str, Any], BeforeValidator(_plain)]


def divide(numerator: float | None, denominator: float | None) -> float | None:
    """The quotient, or None where a side is missing or the denominator is 0."""
    return None if numerator is None or not denominator else numerator / denominator


def best_of(values: Sequence[float | None]) -> int | None:
    """The index of the least known value; None where none is."""
    known = [index for index, value in enumerate(values) if value is not None]
    return min(known, key=lambda index: values[index] or 0.0, default=None)


class Record(BaseModel):
    """A part of results.json: unknown keys are refused, so that a misspelt figure cannot pass unseen."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class Perplexity(Record):
    """Perplexity on held-out text, exp of the mean next-token loss in nats."""

    dense: Number = Field(None, description="of the dense model")
    pruned: Number = Field(None, description="of the pruned model")
    dataset: str = Field(description="the held-out text")
    window: int = Field(description="tokens per window")
    stride: int = Field(description="tokens between the starts of two windows")
    tokens: int = Field(description="tokens whose loss was counted")
    skipped: int = Field(0, description="rows of the held-out text that were null, and left out")
    excess_loss: Number = Field(None, description="ln(pruned / dense), nats per token; derived when left out")
    retained: Number = Field(None, description="dense / pruned, 1 = nothing lost; derived when left out")
    divergence: Number = Field(None, description="KL(dense‖pruned) of the next token's distributions, nats per token")
    agreement: Number = Field(None, description="share of tokens at which both find the same next token most probable")

    @model_validator(mode="after")
    def _derive(self) -> "Perplexity":
        """Fill in what follows from the rest."""
        if self.dense and self.pruned and self.dense > 0 and self.pruned > 0:
            ratio = self.pruned / self.dense
            self.excess_loss = math.log(ratio) if self.excess_loss is None else self.excess_loss
            self.retained = 1 / ratio if self.retained is None else self.retained
        return self


class Pace(Record):
    """Tokens per second."""

    dense: Number = Field(None, description="dense model, tokens/s")
    pruned: Number = Field(None, description="pruned model, tokens/s")
    ratio: Number = Field(None, description="pruned / dense, above 1 = faster; derived when left out")

    @model_validator(mode="after")
    def _derive(self) -> "Pace":
        """Fill in what follows from the rest."""
        if self.ratio is None:
            self.ratio = divide(self.pruned, self.dense)
        return self


class Speed(Record):
    """How fast both models run, on the same device with the same batch."""

    batch: int = Field(description="sequences at once")
    prompt: int = Field(description="prompt tokens per sequence")
    new_tokens: int = Field(description="tokens generated per sequence")
    device: str = Field(description="where it was measured")
    prefill: Pace = Field(description="reading the prompt")
    decode: Pace = Field(description="generating token by token")


class Calibration(Record):
    """The text the method learned from."""

    source: str = Field(description="file, folder, data set or mixture")
    samples: int = Field(description="sequences")
    tokens: int = Field(description="real tokens, padding left out")
    length: int = Field(description="tokens per sequence at most")
    skipped: int = Field(0, description="rows of the text that were null, and left out")
    shares: list[int] = Field(default_factory=list, description="[P] real tokens each of several processes worked on")


class KernelTraining(Record):
    """Step 1, the kernel and the operators together (lists over epochs)."""

    loss: Numbers = Field(description="Σ_i ‖A_i φ(h_{s+i−1}) − φ(h_{s+i})‖² + (1 − w_t cos), mean over tokens")
    cosine: Numbers = Field(default_factory=list, description="mean cosine of A_i φ(h_{s+i−1}) and φ(h_{s+i})")
    spectral_norm: Numbers = Field(default_factory=list, description="B_A = max_i ‖A_i‖₂")
    feature_norm: Numbers = Field(default_factory=list, description="R_φ = max ‖φ(h)‖ (1 by construction)")
    unexplained: Numbers = Field(
        default_factory=list, description="‖A φ(h_s) − φ(h_e)‖² / ‖φ(h_e) − mean‖²: 0 exact, 1 as the mean"
    )


class Curve(Record):
    """Steps 2 and 3 (lists over epochs)."""

    loss: Numbers = Field(description="mean ‖S(h_s) − h_e‖² in units of mean ‖h_e − h_s‖²: 1 = as dropped")
    cosine: Numbers = Field(default_factory=list, description="mean cosine of S(h_s) and h_e")
    watched: Numbers = Field(
        default_factory=list, description="the loss on held-out rows, before the first epoch and after each")


class Norms(Record):
    """What repeated operators do to norms (means over held-out tokens)."""

    feature_true: Numbers = Field(default_factory=list, description="[k+1] ‖φ(h_{s+j})‖, j = 0 … k")
    feature_predicted: Numbers = Field(default_factory=list, description="[k+1] ‖A_j ⋯ A_1 φ(h_s)‖, j = 0 … k")
    output_true: Number = Field(None, description="norm of h_e as the kernel map sees it")
    output_without_alpha: Number = Field(
        None, description="norm of a read-out fitted on true φ(h_e), applied to A_k ⋯ A_1 φ(h_s)"
    )
    output_with_alpha: Number = Field(None, description="the same times α = E‖φ(h_e)‖ / E‖A_k ⋯ A_1 φ(h_s)‖")


class Outliers(Record):
    """Single coordinates of h_e on held-out tokens, the outlier dimensions apart from ordinary ones."""

    dimensions: list[int] = Field(default_factory=list, description="the outlier dimensions")
    scale: Numbers = Field(default_factory=list, description="root mean square of each / that of the median dimension")
    true: Numbers = Field(default_factory=list, description="[points] coordinate of h_e")
    predicted: Numbers = Field(default_factory=list, description="[points] the same from the stand-in")
    dimension: list[int] = Field(
        default_factory=list, description="[points] the dimension of the point, −1 for an ordinary one"
    )

    @model_validator(mode="after")
    def _shapes(self) -> "Outliers":
        """Refuse lists that do not fit together."""
        if not len(self.true) == len(self.predicted) == len(self.dimension):
            raise ValueError("true, predicted and dimension must have the same length")
        return self


class Fit(Record):
    """One block and the module that stands in for it. Errors are taken on held-out tokens."""

    block: Block = Field(description="[s, e) in the dense model")
    place: Literal["beside", "after", "before", "mlp"] = Field(
        description="folded into a kept layer beside the block (beside; earlier records say after the one in front of "
        "it, or before the one behind it), or the MLP of a decoder layer of its own (mlp)"
    )
    kind: str = Field(description="parts of the feature map, joined by +: linear, fourier (KDP), mlp, data")
    features: int = Field(description="m, random frequencies (2m features)")
    bandwidth: Number = Field(None, description="scale of the first frequencies, in units of the median heuristic")
    channels: int = Field(0, description="c, the block's own MLP channels among the features")
    hidden: int = Field(0, description="hidden width of the inverse network, 0 = linear")
    rank: int = Field(0, description="r, rank of L in Σ = D + LLᵀ")
    context: str = Field("none", description="what precedes the kernel map: none or attention")
    context_layer: int | None = Field(
        None, description="the dense layer that attention was started from; null without, and in older records"
    )
    context_groups: int | None = Field(
        None, description="key-value heads, with the queries that read them, that it kept; null: all"
    )
    ordinary: bool = Field(False, description="whether it is an ordinary decoder layer of the model's family")
    parameters: int = Field(description="parameters of the stand-in, its context included")
    trained: int = Field(
        0, description="parameters trained × tokens seen in training, all steps; 0: none, and in older records"
    )
    step1: KernelTraining | None = Field(None, description="training of kernel and operators")
    step2: Curve | None = Field(None, description="training of the inverse network")
    step3: Curve | None = Field(
        None, description="training of kernel and inverse network together, loss as the layers behind read the error"
    )
    refined: bool | None = Field(
        None, description="whether step 3 was kept; false: held-out rows got worse and it was undone"
    )
    explained_variance: Number = Field(None, description="1 − ‖A φ(h_s) − φ(h_e)‖² / ‖φ(h_e) − mean‖², A = ∏ A_i")
    effective_rank: Number = Field(None, description="exp of the entropy of the spectrum of E[φφᵀ], fitted tokens")
    gamma: Numbers = Field(default_factory=list, description="[k] γ_i of A_i = I + γ_i B_i")
    B_A: Number = Field(None, description="max_i ‖A_i‖₂ after step 1")
    R_phi: Number = Field(None, description="max ‖φ(h)‖ over fitted tokens after step 1")
    alpha: Number = Field(None, description="α of the inverse network I(z) = α · MLP(z)")
    k_step_error: Numbers = Field(
        default_factory=list, description="[k] root mean square of ‖A_j ⋯ A_1 φ(h_s) − φ(h_{s+j})‖, j = 1 … k"
    )
    bound: Numbers = Field(
        default_factory=list,
        description="[k] Theorem 1: sqrt(L_ERM + C B_A² R_φ² sqrt(2m log(2m/δ)/n)) · Σ_{i<j} B_A^{j−1−i}",
    )
    kernel_risk: Number = Field(None, description="Theorem 2: risk of the linear fit of φ(h_e) on φ(h_s), / variance")
    original_risk: Number = Field(None, description="Theorem 2: risk of the linear fit of h_e on h_s, / variance")
    kernel_risk_by_step: Numbers = Field(default_factory=list, description="[k] after j = 1 … k layers")
    original_risk_by_step: Numbers = Field(default_factory=list, description="[k] after j = 1 … k layers")
    norms: Norms | None = Field(None, description="norm decay with and without α")
    outliers: Outliers | None = Field(None, description="outlier dimensions, true against predicted")
    state_error: Number = Field(
        None, description="mean ‖S(h_s) − h_e‖² in units of mean ‖h_e − h_s‖² (the latter over fitted tokens)"
    )
    dropped_error: Number = Field(
        1.0, description="the same when the block is dropped, S(h) = h: near 1 by the choice of the unit"
    )
    linear_error: Number = Field(None, description="the same for the least-squares linear map of h_s")


class Search(Record):
    """What a search over many pruned models took. A pass is one of all calibration rows, through whatever depth."""

    passes: Number = Field(description="forward passes of the calibration rows, the dense model's among them")
    candidates: int = Field(description="how often a pruned model was measured, on however few rows")
    divergence: Numbers = Field(
        default_factory=list, description="KL(dense‖best) in nats a token after each generation, on its own rows")


class Sample(Record):
    """One prompt, continued by both models."""

    prompt: str = Field(description="the text given")
    dense: str | None = Field(None, description="what the dense model writes on")
    pruned: str | None = Field(None, description="what the pruned model writes on")
