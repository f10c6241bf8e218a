"""Streamed similarity of layer states (KDP, section 1): no N × N matrix over the calibration set is ever kept."""

import torch
from torch import Tensor


def u_centre(grams: Tensor) -> Tensor:
    """U-centres Gram matrices in place: zero diagonal, rows and columns centred so that the unbiased HSIC is an inner
    product.

        K̃_ij = K_ij − Σ_l K_il/(n−2) − Σ_l K_lj/(n−2) + Σ_lm K_lm/((n−1)(n−2)),  i ≠ j;  K̃_ii = 0,
        HSIC₁(K, M) = ⟨K̃, M̃⟩ / (n(n−3)).

    The sums alone would do for HSIC₁, without a centred matrix; but one token of a large norm makes them cancel, which
    costs two of float32's digits, and such tokens are the rule.

    Args:
        grams: symmetric, shape (…, n, n), n ≥ 4.

    Sources: Székely & Rizzo 2014; Song et al. 2012 (the estimator).
    """
    n = grams.shape[-1]
    diagonals = grams.diagonal(dim1=-2, dim2=-1)
    diagonals.zero_()
    rows = grams.sum(-1)
    shift = rows / (n - 2) - rows.sum(-1, keepdim=True) / (2 * (n - 1) * (n - 2))
    grams.sub_(shift[..., :, None]).sub_(shift[..., None, :])
    diagonals.zero_()
    return grams


def pairwise_hsic(grams: Tensor) -> Tensor:
    """Unbiased HSIC of every pair of layers as one product (S, n²)·(n², S): (…, S, n, n) → (…, S, S), float64.

    ``grams`` are centred in place.
    """
    n = grams.shape[-1]
    flat = u_centre(grams).flatten(-2)
    return (flat @ flat.transpose(-2, -1)).double() / (n * (n - 3))


def squared_distances(x: Tensor) -> Tensor:
    """‖x_i − x_j‖²: (S, n, d) → (S, n, n), from centred rows, which keeps the float32 cancellation small."""
    x = x - x.mean(-2, keepdim=True)
    norms = x.square().sum(-1)
    return (norms[..., :, None] + norms[..., None, :] - 2 * x @ x.transpose(-2, -1)).clamp_min(0)


def median_distances(h: Tensor) -> Tensor:
    """Median of ‖x_i − x_j‖², i ≠ j, in each layer: (S, n, d) → (S,), float32."""
    n = h.shape[1]
    off = ~torch.eye(n, dtype=torch.bool, device=h.device)
    return squared_distances(h.float())[:, off].median(-1).values.clamp_min(1e-12)


class LayerSimilarity:
    """Cosine, linear CKA and RBF CKA between all S = L+1 states, and the relative update norm of every layer.

    ``update`` takes a chunk of tokens at all layers; HSIC values are averaged over chunks before the ratio
    CKA = HSIC(k, l)/√(HSIC(k, k) HSIC(l, l)) is taken (the unbiased estimator makes the average meaningful).
    Sums are float64 and stay on the chunks' device. Sums of several objects with one ``width`` may be added up.

    Args:
        width: of each layer's RBF kernel exp(−‖x − y‖²/(2 width)), shape (S,): the median distance of some chunk.

    Attributes:
        sums: by name, over tokens (cosine, update, norm) or chunks (linear, rbf: HSIC).
        tokens: how many.

    Source: KDP, section 1.
    """

    def __init__(self, width: Tensor):
        states = len(width)
        shapes = {
            "cosine": (states, states), "update": (states - 1,), "norm": (states,), "hsic": (2, states, states),
            "tokens": (),
        }
        self.width = width
        self.sums = {
            name: torch.zeros(shape, dtype=torch.float64, device=width.device) for name, shape in shapes.items()}
        self._grams = torch.empty(0, device=width.device)

    def update(self, h: Tensor) -> None:
        """Adds a chunk of tokens: h of shape (S, n, d), n ≥ 4, padding already removed, on the width's device."""
        h = h.float()
        norms = torch.linalg.vecdot(h, h).sqrt().clamp_min(1e-12)
        unit = (h / norms[..., None]).flatten(1)
        steps = h[1:] - h[:-1]
        updates = torch.linalg.vecdot(steps, steps).sqrt() / norms[:-1]
        self.sums["cosine"] += unit @ unit.T
        self.sums["update"] += updates.double().sum(-1)
        self.sums["norm"] += norms.double().sum(-1)
        self.sums["hsic"] += pairwise_hsic(self._kernels(h, norms.mean(-1)))
        self.sums["tokens"] += h.shape[1]

    def _kernels(self, h: Tensor, scale: Tensor) -> Tensor:
        """Linear and RBF Gram matrices of every layer, (2, S, n, n), both from one product; memory is used again."""
        states, n, _ = h.shape
        if self._grams.shape[-1] != n:
            self._grams = h.new_empty(2, states, n, n)
        linear, rbf = self._grams
        centred = h - h.mean(-2, keepdim=True)
        torch.bmm(centred, centred.transpose(-2, -1), out=linear)
        half = linear.diagonal(dim1=-2, dim2=-1) / 2
        torch.sub(linear, half[:, :, None], out=rbf)  # −‖x_i − x_j‖²/2 = x_i·x_j − ‖x_i‖²/2 − ‖x_j‖²/2
        rbf.sub_(half[:, None, :]).div_(self.width[:, None, None]).clamp_max_(0).exp_()
        linear.div_(scale.square()[:, None, None])  # One common scale per layer keeps entries near one; CKA sees none.
        return self._grams

    def value(self) -> dict[str, Tensor]:
        """By name: ``cosine``, ``linear_cka``, ``rbf_cka`` (S, S), ``relative_update`` (L,), ``state_norm`` (S,)."""
        sums = {name: value.cpu() for name, value in self.sums.items()}
        return {
            "cosine": sums["cosine"] / sums["tokens"],
            "linear_cka": cka(sums["hsic"][0]),
            "rbf_cka": cka(sums["hsic"][1]),
            "relative_update": sums["update"] / sums["tokens"],
            "state_norm": sums["norm"] / sums["tokens"],
        }


def cka(hsic: Tensor) -> Tensor:
    """CKA from a matrix of HSIC values: H_kl/√(H_kk H_ll), at most 1; (S, S) → (S, S)."""
    root = hsic.diagonal().clamp_min(1e-300).sqrt()
    return (hsic / root[:, None] / root[None, :]).clamp_max(1.0)
