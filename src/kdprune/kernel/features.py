"""Learnable random Fourier features (KDP, section 3).

Convention. By Bochner's theorem, frequencies w ~ N(0, Σ) give the kernel

    k(x, y) = E[cos(wᵀ(x − y))] = exp(−½ (x − y)ᵀ Σ (x − y)),

so Σ is the *frequency* covariance: a large Σ is a narrow kernel. (The paper's notes print Σ⁻¹ in the kernel;
only one of the two can hold with Σ in the sampling law.)
"""

import math

import torch
from torch import Tensor, nn

CHUNK = 2048  # samples that are in float64, or behind φ, at once


def rms_normalize(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x²) + eps) over the last dimension; any shape (…, d)."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def projected_median(x: Tensor, precision: Tensor, generator: torch.Generator, pairs: int = 4096) -> float:
    """Median over random pairs of Σ_i p_i (x_i − y_i)², the squared distance in the metric diag(p).

    Args:
        x: samples, shape (n, d), n ≥ 2.
        precision: p, shape (d,) or (1,).
        generator: source of the pairs, on the CPU.
        pairs: how many pairs are drawn.
    """
    n = len(x)
    first = torch.randint(n, (pairs,), generator=generator)
    # An offset of 1 … n−1 makes every pair two different samples.
    second = (first + torch.randint(1, n, (pairs,), generator=generator)) % n
    difference = (x[first.to(x.device)] - x[second.to(x.device)]).double()
    return float((difference.square() * precision.double()).sum(-1).median())


class FourierFeatures(nn.Module):
    """φ(x) = (1/√m) [cos(Wᵀx + b), sin(Wᵀx + b)] ∈ R^{2m}, columns of W ~ N(0, Σ), Σ = D + LLᵀ.

    W = D^{1/2} ε₁ + L ε₂ with D = diag(exp λ): the draws ε₁ (d, m) and ε₂ (r, m) are made once and stay fixed
    while λ (d,), L (d, r) and b (m,) learn (reparameterisation). ‖φ(x)‖ = 1 for every x, so R_φ = 1.

    Args:
        width: d, size of the input.
        features: m, number of frequencies; φ has 2m entries.
        rank: r, columns of L; 0 leaves Σ diagonal.
        anisotropic: one scale per dimension; otherwise Σ = exp(λ) I with a single λ and no L.
        generator: source of ε₁ and ε₂, on the CPU.

    Source: KDP, section 3 (kernel with learnable anisotropic covariance).
    """

    def __init__(self, width: int, features: int, rank: int, generator: torch.Generator, anisotropic: bool = True):
        super().__init__()
        rank = rank if anisotropic else 0
        self.width, self.features = width, features
        self.register_buffer("draw_diagonal", torch.randn(width, features, generator=generator))
        self.register_buffer("draw_low_rank", torch.randn(rank, features, generator=generator))
        self.log_diagonal = nn.Parameter(torch.zeros(width if anisotropic else 1))
        # L starts small but not at zero: at zero its gradient through LLᵀ would be the draw alone, which is fine,
        # yet a tiny random start lets the r columns tell themselves apart from the first step.
        self.low_rank = nn.Parameter(1e-3 * torch.randn(width, rank, generator=generator))
        self.offset = nn.Parameter(torch.zeros(features))
        self.draw_diagonal: Tensor
        self.draw_low_rank: Tensor

    @torch.no_grad()
    def init_median(self, x: Tensor, generator: torch.Generator, scale: float = 1.0) -> None:
        """Median heuristic with per-dimension scales: D_i = scale² · c / var_i, c so that the median of
        (x − y)ᵀ D (x − y) over pairs is scale².

        A trained residual stream holds outlier dimensions tens of times larger than the rest; with one width for
        all, the kernel would see nothing else. An isotropic kernel keeps its single λ.

        Args:
            x: samples of the input, shape (n, d).
        """
        if self.log_diagonal.numel() == 1:
            precision = torch.ones(1, device=x.device)
        else:
            mean = x.mean(0, dtype=torch.float64)
            squares = sum(((chunk.double() - mean).square().sum(0) for chunk in x.split(CHUNK)), torch.zeros_like(mean))
            variance = (squares / (len(x) - 1)).clamp_min(1e-12)
            # A dimension that hardly varies must not get an unbounded frequency.
            variance = torch.maximum(variance, 1e-4 * variance.median())
            precision = (1 / variance).float()
        median = projected_median(x, precision, generator)
        self.log_diagonal.copy_((precision * scale**2 / max(median, 1e-12)).log())

    def frequencies(self) -> Tensor:
        """W = D^{1/2} ε₁ + L ε₂, shape (d, m)."""
        return (0.5 * self.log_diagonal).exp().unsqueeze(-1) * self.draw_diagonal + self.low_rank @ self.draw_low_rank

    def forward(self, x: Tensor) -> Tensor:
        """φ(x): (…, d) → (…, 2m)."""
        phase = x @ self.frequencies() + self.offset
        return torch.cat((phase.cos(), phase.sin()), -1) / math.sqrt(self.features)


def effective_rank(gram: Tensor) -> float:
    """exp(entropy of the normalised eigenvalues) of a positive semi-definite matrix (D, D): 1 … D.

    Reported for the second moment E[φφᵀ]: a collapsed kernel (φ constant) has rank near 1.
    """
    eigenvalues = torch.linalg.eigvalsh(gram.double()).clamp_min(0)
    share = eigenvalues / eigenvalues.sum().clamp_min(1e-300)
    return float(torch.special.entr(share).sum().exp())
