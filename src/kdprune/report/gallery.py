"""Every picture of the page with its finding, how to read it, and the equation behind it."""

from dataclasses import dataclass

from markupsafe import Markup

from kdprune.report import findings, fit_plots, plots
from kdprune.report.records import Curve, Fit, KernelTraining
from kdprune.report.results import Results


@dataclass(frozen=True)
class Picture:
    """One figure of the page; `width` is the number of columns out of six."""

    title: str
    svg: Markup
    finding: str
    reading: str
    equation: Markup | None = None
    width: int = 3


_HEAT_MAP = {
    "pair_cosine": (
        "Mean cosine of the states entering layers s and e, token by token.",
        "E<sub>x</sub> cos(h<sub>s</sub>, h<sub>e</sub>)",
    ),
    "pair_linear_cka": (
        "Whether tokens that are neighbours in one state are so in the other, up to rotation and scale.",
        "HSIC(K<sub>s</sub>, K<sub>e</sub>) / √(HSIC(K<sub>s</sub>, K<sub>s</sub>) · "
        "HSIC(K<sub>e</sub>, K<sub>e</sub>)), K = HHᵀ",
    ),
    "pair_rbf_cka": (
        "The same with a Gaussian kernel, which sees neighbourhoods, not directions: the method’s premise.",
        "K<sub>ij</sub> = exp(−‖h<sub>i</sub> − h<sub>j</sub>‖² / 2σ²), σ the median distance",
    ),
}


def analysis_pictures(results: Results) -> list[Picture]:
    """Heat maps, then the figures per layer."""
    if results.analysis is None:
        return []
    maps = [
        Picture(
            name,
            Markup(plots.heat_map(results, key)),
            findings.pairs(results, key),
            reading,
            Markup(formula),
            2,
        )
        for (key, name), (reading, formula) in zip(plots.PAIRS.items(), _HEAT_MAP.values(), strict=True)
    ]
    return [
        *maps,
        Picture(
            "Change per layer",
            Markup(plots.update_norms(results)),
            findings.updates(results),
            "Low bars in a row are a slow stretch of the network, a candidate for removal. "
            "The line below is the size of the state. Hatched ends are never touched.",
            Markup("E<sub>x</sub> ‖h<sub>l+1</sub> − h<sub>l</sub>‖ / ‖h<sub>l</sub>‖"),
        ),
        Picture(
            "Similarity across each layer",
            Markup(plots.layer_similarity(results)),
            findings.premise(results),
            "Higher is more alike; the axis is stretched towards 1: .9, .99 and .999 lie one step apart.",
        ),
        *_massive(results),
        *_damage(results),
    ]


def _massive(results: Results) -> list[Picture]:
    """The massive tokens, if the record says anything of them."""
    if not (results.analysis and results.analysis.largest_norm):
        return []
    return [
        Picture(
            "Massive tokens",
            Markup(plots.massive_tokens(results)),
            findings.massive(results),
            "In many trained models a token or two a row, often the first, has a norm far above all others from some "
            "layer on. A squared error over a layer that makes or undoes one is about that token alone. This is not "
            "about outlier dimensions, which are large in every token.",
            Markup("max<sub>t</sub> ‖h<sub>l,t</sub>‖ / median<sub>t</sub> ‖h<sub>l,t</sub>‖"),
        )
    ]


def _damage(results: Results) -> list[Picture]:
    """What blocks cost, if they were chosen by it."""
    if not (results.analysis and results.analysis.block_damage):
        return []
    return [
        Picture(
            "What a block costs",
            Markup(plots.block_damage(results)),
            findings.damage(results),
            "Every number is one block alone, behind a stand-in that was only solved for, on held-out tokens; frames "
            "mark the chosen ones. Grey was not measured: a linear map models other starts better, or layers there "
            "must stay. Costs do not add up, so that sets of blocks are measured again before one is taken.",
            Markup("Δ = E[ KL(p<sub>dense</sub>‖p<sub>pruned</sub>) ]"),
        )
    ]


def overview_pictures(results: Results) -> list[Picture]:
    """What all stand-ins leave over, and what healing brought."""
    return [*_left_over(results), *_healing(results)]


def _healing(results: Results) -> list[Picture]:
    """Healing's looks at held-out rows, where there were any."""
    heal = results.heal
    if heal is None or not heal.watched:
        return []
    teacher = ("the dashed line is what the dense model has there" if heal.loss == "lm"
               else "0 would be the dense model itself; of its distribution the most probable tokens are told apart")
    return [
        Picture(
            "Healing",
            Markup(plots.healing(results)),
            findings.healing(heal),
            f"Rows that nothing was fitted to, looked at on the way; what they were best with is kept: {teacher}.",
            Markup("E[ −log q(x<sub>t+1</sub> | x<sub>≤t</sub>) ]" if heal.loss == "lm" else "E[ KL(p‖q) ]"),
        )
    ]


def _left_over(results: Results) -> list[Picture]:
    """What all stand-ins leave over, if the record says it."""
    if not any(fit.state_error is not None for fit in results.fit):
        return []
    return [
        Picture(
            "What is left of the change",
            Markup(fit_plots.left_over(results)),
            findings.left_over(results),
            "Near 1 is no better than removing the layers without a replacement, 0 is an exact stand-in.",
            Markup("E‖S(h<sub>s</sub>) − h<sub>e</sub>‖² / E‖h<sub>e</sub> − h<sub>s</sub>‖²"),
        )
    ]


_STEPS = (
    (
        "Step 1: kernel and operators",
        "The feature map φ and one linear operator per layer are trained together.",
        "Σ<sub>i</sub> ‖A<sub>i</sub> φ(h<sub>s+i−1</sub>) − φ(h<sub>s+i</sub>)‖² + 1 − w<sub>t</sub> cos, "
        "A<sub>i</sub> = I + γ<sub>i</sub> B<sub>i</sub>",
    ),
    (
        "Step 2: inverse network",
        "A small network learns the way back from kernel space to the state.",
        "E‖S(h<sub>s</sub>) − h<sub>e</sub>‖² / E‖h<sub>e</sub> − h<sub>s</sub>‖², inverse I(z) = α · MLP(z)",
    ),
    (
        "Step 3: both together",
        "Kernel and inverse are refined as one module, which may at first undo what step 2 had fitted. "
        "The error is taken as the norms behind the block read it. "
        "What held-out rows find best is kept, the start among it.",
        "e = ‖m ∘ (S(h<sub>s</sub>) − h<sub>e</sub>)‖² / ‖h<sub>e</sub>‖², in units of its mean without the block",
    ),
)


def solved_steps(fit: Fit) -> list[tuple[str, str]]:
    """Name and result of the steps that were solved at once: they have no curve."""
    return [(title, findings.training(curve)) for _, curve, (title, _, _) in _steps(fit) if len(curve.loss) == 1]


def training_pictures(fit: Fit) -> list[Picture]:
    """Loss and cosine of the steps that were trained."""
    trained = [step for step in _steps(fit) if len(step[1].loss) > 1]
    alone = len(trained) == 1
    return [
        Picture(title, Markup(fit_plots.training(fit, step, wide=alone)), findings.training(curve), reading,
                Markup(formula), 6 if alone else 2)
        for step, curve, (title, reading, formula) in trained
    ]


def _steps(fit: Fit) -> list[tuple[int, KernelTraining | Curve, tuple[str, str, str]]]:
    """Number, record and texts of the steps that were taken."""
    curves = enumerate((fit.step1, fit.step2, fit.step3), start=1)
    return [(step, curve, _STEPS[step - 1]) for step, curve in curves if curve is not None]


def theory_pictures(fit: Fit) -> list[Picture]:
    """What theory says of a stand-in, beside what was measured."""
    pictures = []
    if fit.step1 is not None and (fit.step1.spectral_norm or fit.step1.feature_norm or fit.step1.unexplained):
        pictures.append(_constants(fit))
    if fit.norms is not None:
        pictures.append(_norms(fit))
    if fit.k_step_error or fit.bound:
        pictures.append(_bound(fit))
    if fit.kernel_risk_by_step or fit.original_risk_by_step:
        pictures.append(_risks(fit))
    if fit.outliers is not None and fit.outliers.true:
        pictures.append(_outliers(fit))
    return pictures


def _constants(fit: Fit) -> Picture:
    """B_A, R_φ and the unexplained share over step 1."""
    return Picture(
        "Theorem 1’s constants over training",
        Markup(fit_plots.constants(fit)),
        findings.constants(fit),
        "B_A near 1 keeps errors from growing step by step; R_φ is 1 by construction. Below, the share of "
        "the target’s variance that the operators miss: near 1 would be a kernel that learned nothing.",
        Markup("B<sub>A</sub> = max<sub>i</sub> ‖A<sub>i</sub>‖₂, R<sub>φ</sub> = max ‖φ(h)‖"),
    )


def _norms(fit: Fit) -> Picture:
    """Norm decay and α."""
    return Picture(
        "Norm decay and what α restores",
        Markup(fit_plots.norm_decay(fit)),
        findings.norm_decay(fit),
        "Left: repeated least-squares operators shrink what they cannot predict, so the line falls. "
        "Right: the size of the output of a read-out fitted on true features, without α and with it.",
        Markup("I(z) = α · MLP(z)"),
    )


def _bound(fit: Fit) -> Picture:
    """k-step error and bound."""
    return Picture(
        "Measured error beside Theorem 1’s bound",
        Markup(fit_plots.error_and_bound(fit)),
        findings.bound(fit),
        "The bound holds for the worst case and is usually far above what is measured; how it grows with "
        "the number of steps is what to compare. The axis is logarithmic.",
        Markup(
            "√(L<sub>ERM</sub> + C B<sub>A</sub>² R<sub>φ</sub>² √(2m log(2m/δ)/n)) · "
            "Σ<sub>j&lt;k</sub> B<sub>A</sub><sup>k−1−j</sup>"
        ),
    )


def _risks(fit: Fit) -> Picture:
    """Theorem 2."""
    return Picture(
        "Is kernel space closer to linear?",
        Markup(fit_plots.risks(fit)),
        findings.risks(fit),
        "Held-out error of the best linear map over j layers, as a share of the target’s variance in its own "
        "space: where the kernel bar is lower, the dynamics are closer to linear there.",
        Markup("E‖A x<sub>s</sub> − x<sub>s+j</sub>‖² / E‖x<sub>s+j</sub> − mean‖², x = φ(h) or h"),
    )


def _outliers(fit: Fit) -> Picture:
    """Predicted against true coordinates."""
    assert fit.outliers is not None
    return Picture(
        "Outlier dimensions",
        Markup(fit_plots.outlier_fit(fit)),
        findings.outliers(fit.outliers),
        "Each point is one coordinate of one held-out token; on the dashed line the stand-in is exact. "
        "Outlier dimensions are those larger than all others, and must be met too. Right: the error of each "
        "group relative to its own size.",
        Markup("√(Σ(ĥ − h)² / Σh²)"),
        6,
    )
