"""An invented run for the report's tests: plausible numbers from a seeded generator, nothing measured."""

import math

import numpy as np

from kdprune.report.results import (
    Analysis,
    Calibration,
    Curve,
    Fit,
    Heal,
    KernelTraining,
    KVCache,
    Layers,
    Norms,
    Outliers,
    Pace,
    Parameters,
    Perplexity,
    Results,
    Sample,
    Speed,
)


def analysis(layers: int, seed: int = 0) -> Analysis:
    """A stream that turns fast at both ends and slowly in the middle."""
    depth = np.arange(layers) / (layers - 1)
    update = 0.13 + 0.9 * np.exp(-12 * depth) + 0.35 * np.exp(-14 * (1 - depth))
    update = update * (1 + 0.04 * np.random.default_rng(seed).standard_normal(layers))
    angle = np.concatenate([[0], np.cumsum(update)])
    distance = np.abs(angle[:, None] - angle[None, :])
    cosine = np.exp(-0.45 * distance**1.3)
    linear, rbf = (np.exp(-rate * distance**1.4) for rate in (0.3, 0.12))
    near = [[v if abs(i - j) <= 9 else None for j, v in enumerate(row)] for i, row in enumerate(rbf)]
    starts, lengths = range(2, layers - 5, 2), (2, 4, 6)
    damage: list[list[float | None]] = [[None] * (layers + 1) for _ in range(layers + 1)]
    for start in starts:
        for length in lengths:
            if start + length <= layers - 2:
                damage[start][start + length] = 0.01 * length**1.5 * (1 + 4 * float(update[start]))
    norm, boundary = 4 * np.exp(1.1 * np.linspace(0, 1, layers + 1) ** 0.7 * 2.2), np.arange(layers + 1)
    inside = (boundary > 1) & (boundary < layers - 1)
    return Analysis(
        relative_update=update.tolist(),
        cosine=np.diag(cosine, 1).tolist(),
        linear_cka=np.diag(linear, 1).tolist(),
        rbf_cka=np.diag(rbf, 1).tolist(),
        pair_cosine=cosine.tolist(),
        pair_linear_cka=linear.tolist(),
        pair_rbf_cka=near,
        pair_damage=damage,
        state_norm=norm.tolist(),
        largest_norm=np.where(inside, np.maximum(600, 2 * norm), 2 * norm).tolist(),
        median_norm=norm.tolist(),
        massive_above=50,
        massive_share=np.where(inside, 0.002, 0).tolist(),
        massive_move=[100.0 if layer in (1, layers - 2) else 1.0 for layer in range(layers)],
        writes=[1],
        erases=[layers - 2],
        left_out=205,
        tokens=102_400,
        protected=(2, 2),
    )


def _falling(start: float, end: float, epochs: int, noise: np.random.Generator) -> np.ndarray:
    """A loss curve from `start` to about `end`."""
    curve = end + (start - end) * np.exp(-np.arange(epochs) / (epochs / 6))
    return curve * (1 + 0.01 * noise.standard_normal(epochs))


def outliers(noise: np.random.Generator) -> Outliers:
    """Two outlier dimensions tens of times larger than the rest."""
    ordinary = noise.normal(0, 1.6, 900)
    large = np.concatenate([noise.normal(41, 5, 90), noise.normal(-23, 3, 90)])
    true = np.concatenate([ordinary, large])
    error = noise.normal(0, 0.55, len(true)) * np.where(np.abs(true) > 10, 2.5, 1)
    return Outliers(
        dimensions=[93, 17],
        scale=[28.4, 15.9],
        true=true.tolist(),
        predicted=(0.96 * true + error).tolist(),
        dimension=[-1] * 900 + [93] * 90 + [17] * 90,
    )


def fit(start: int, end: int, seed: int = 0, epochs: int = 40) -> Fit:
    """One block's stand-in with every figure filled in."""
    noise, k = np.random.default_rng(seed), end - start
    error = 0.11 * np.arange(1, k + 1) ** 0.8
    spectral = 1.21 - 0.12 * np.exp(-np.arange(epochs) / 8)
    return Fit(
        block=(start, end),
        place="mlp",
        kind="fourier",
        features=64,
        hidden=128,
        rank=8,
        context="attention",
        parameters=86_272,
        step1=KernelTraining(
            loss=_falling(0.9, 0.16, epochs, noise).tolist(),
            cosine=(1 - _falling(0.3, 0.06, epochs, noise)).tolist(),
            spectral_norm=spectral.tolist(),
            feature_norm=[1.0] * epochs,
            unexplained=_falling(0.5, 0.19, epochs, noise).tolist(),
        ),
        step2=Curve(
            loss=_falling(2.4, 0.42, epochs, noise).tolist(),
            cosine=(1 - _falling(0.2, 0.03, epochs, noise)).tolist(),
        ),
        step3=Curve(
            loss=_falling(0.42, 0.31, epochs, noise).tolist(),
            cosine=(1 - _falling(0.03, 0.02, epochs, noise)).tolist(),
            watched=[0.45, *(_falling(0.44, 0.33, epochs, noise) + 0.001 * np.arange(epochs)).tolist()],
        ),
        explained_variance=0.81,
        effective_rank=47.3,
        gamma=(0.3 - 0.02 * np.arange(k)).tolist(),
        B_A=float(spectral[-1]),
        R_phi=1.0,
        alpha=1.13,
        k_step_error=error.tolist(),
        bound=[2.9 * sum(float(spectral[-1]) ** i for i in range(j)) for j in range(1, k + 1)],
        kernel_risk=0.21,
        original_risk=0.33,
        kernel_risk_by_step=np.linspace(0.06, 0.21, k).tolist(),
        original_risk_by_step=np.linspace(0.05, 0.33, k).tolist(),
        norms=Norms(
            feature_true=[1.0] * (k + 1),
            feature_predicted=(0.965 ** np.arange(k + 1)).tolist(),
            output_true=31.2,
            output_without_alpha=26.9,
            output_with_alpha=30.6,
        ),
        outliers=outliers(noise),
        state_error=0.31,
        linear_error=0.52,
    )


def results(layers: int = 16, blocks: tuple[tuple[int, int], ...] = ((4, 10),)) -> Results:
    """A whole run; `layers` and `blocks` scale the pictures."""
    return Results(
        created="2026-01-02T03:04:05+00:00",
        model="reference/llama-16x128",
        family="llama",
        method="kdp",
        recipe={
            "method": "kdp",
            "ratio": 0.25,
            "features": 64,
            "hidden": 128,
            "inverse": "residual",
            "seed": 0,
        },
        seed=0,
        blocks=list(blocks),
        layers=Layers(dense=layers, pruned=layers - sum(e - s - 1 for s, e in blocks)),
        parameters=Parameters(dense=3_548_288, pruned=2_658_944),
        perplexity=Perplexity(
            dense=45.72,
            pruned=45.72 * math.exp(0.104),
            dataset="held-out",
            window=512,
            stride=256,
            tokens=49_152,
        ),
        speed=Speed(
            batch=1,
            prompt=256,
            new_tokens=64,
            device="cpu (2 threads)",
            prefill=Pace(dense=9120.0, pruned=12_350.0),
            decode=Pace(dense=141.0, pruned=196.0),
        ),
        kv_cache_bytes_per_token=KVCache(dense=4096, pruned=2816),
        calibration=Calibration(source="calibration.txt", samples=400, tokens=102_400, length=256),
        analysis=analysis(layers),
        fit=[fit(s, e, seed) for seed, (s, e) in enumerate(blocks)],
        heal=Heal(
            loss="lm", what="stand-ins", tokens=9_600, parameters=86_272, rate=2e-3, curve=[3.9, 3.7, 3.65, 3.6],
            watched=[4.0, 3.8, 3.74, 3.71, 3.73], looks=[0, 2_560, 5_120, 7_680, 9_600], before=4.0, after=3.71,
            language_before=4.0, language_after=3.71, language_dense=3.66, kept=True,
        ),
        samples=[
            Sample(
                prompt="The river rose in the night and",
                dense=" the people of the village went up to the church and stayed until the water fell.",
                pruned=" the people of the town went to the hill, and were there till <the morning> & after.",
            ),
            Sample(prompt="A triangle has", dense=" three sides and three angles.", pruned=" three sides, and"),
        ],
        seconds={"load": 1.2, "analyse": 8.4, "prune": 71.9, "evaluate": 22.0, "save": 0.9},
        peak_memory_bytes=1_310_000_000,
        versions={"kdprune": "0.1.0", "torch": "2.9.0", "transformers": "5.16.0", "python": "3.11.9"},
    )
