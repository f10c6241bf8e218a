"""Streamed similarity of layer states (KDP, section 1): no N × N matrix over the calibration set is ever kept."""

import torch
from torch import Tensor


def u_centre(gram: Tensor) -> Tensor:
    """U-centred Gram matrix: zero diagonal, rows and columns centred so that the unbiased HSIC is an inner product.

        K̃_ij = K_ij − Σ_l K_il/(n−2) − Σ_l K_lj/(n−2) + Σ_lm K_lm/((n−1)(n−2)),  i ≠ j;  K̃_ii = 0,
        HSIC₁(K, M) = ⟨K̃, M̃⟩ / (n(n−3)).

    Args:
        gram: shape (…, n, n), n ≥ 4. Sources: Székely & Rizzo 2014; Song et al. 2012 (the estimator).
    """
    n = gram.shape[-1]
    eye = torch.eye(n, dtype=torch.bool, device=gram.device)
    gram = gram.masked_fill(eye, 0.0)
    rows = gram.sum(-1, keepdim=True) / (n - 2)
    total = gram.sum((-2, -1), keepdim=True) / ((n - 1) * (n - 2))
    return (gram - rows - rows.transpose(-2, -1) + total).masked_fill(eye, 0.0)


def pairwise_hsic(grams: Tensor) -> Tensor:
    """Unbiased HSIC of every pair of layers as one product (S, n²)·(n², S): (S, n, n) → (S, S), float64."""
    s, n, _ = grams.shape
    flat = u_centre(grams).reshape(s, n * n)
    return (flat @ flat.T).double() / (n * (n - 3))


def squared_distances(x: Tensor) -> Tensor:
    """‖x_i − x_j‖²: (S, n, d) → (S, n, n), from centred rows, which keeps the float32 cancellation small."""
    x = x - x.mean(-2, keepdim=True)
    norms = x.square().sum(-1)
    return (norms[..., :, None] + norms[..., None, :] - 2 * x @ x.transpose(-2, -1)).clamp_min(0)


class LayerSimilarity:
    """Cosine, linear CKA and RBF CKA between all S = L+1 states, and the relative update norm of every layer.

    ``update`` takes a chunk of tokens at all layers; HSIC values are averaged over chunks before the ratio
    CKA = HSIC(k, l)/√(HSIC(k, k) HSIC(l, l)) is taken (the unbiased estimator makes the average meaningful).
    The RBF width of each layer is the median pairwise distance of the first chunk and then stays.

    Args:
        states: S, number of states. Source: KDP, section 1.
    """

    def __init__(self, states: int):
        self.cosine_sum = torch.zeros(states, states, dtype=torch.float64)
        self.linear = torch.zeros(states, states, dtype=torch.float64)
        self.rbf = torch.zeros(states, states, dtype=torch.float64)
        self.update_sum = torch.zeros(states - 1, dtype=torch.float64)
        self.norm_sum = torch.zeros(states, dtype=torch.float64)
        self.width: Tensor | None = None
        self.tokens = 0
        self.chunks = 0

    def update(self, h: Tensor) -> None:
        """Adds a chunk of tokens: h of shape (S, n, d), n ≥ 4, padding already removed."""
        h = h.float()
        norms = h.norm(dim=-1).clamp_min(1e-12)
        unit = h / norms[..., None]
        self.cosine_sum += torch.einsum("snd,tnd->st", unit, unit).double().cpu()
        self.update_sum += ((h[1:] - h[:-1]).norm(dim=-1) / norms[:-1]).double().sum(-1).cpu()
        self.norm_sum += norms.double().sum(-1).cpu()
        self.tokens += h.shape[1]
        # One common scale per layer keeps the Gram entries near one; CKA does not see it.
        scaled = h / norms.mean(-1)[:, None, None]
        centred = scaled - scaled.mean(-2, keepdim=True)
        self.linear += pairwise_hsic(centred @ centred.transpose(-2, -1)).cpu()
        distances = squared_distances(h)
        if self.width is None:
            self.width = self._median(distances)
        self.rbf += pairwise_hsic((-distances / (2 * self.width[:, None, None])).exp()).cpu()
        self.chunks += 1

    @staticmethod
    def _median(distances: Tensor) -> Tensor:
        n = distances.shape[-1]
        off = ~torch.eye(n, dtype=torch.bool, device=distances.device)
        return distances[:, off].median(-1).values.clamp_min(1e-12)

    def value(self) -> dict[str, Tensor]:
        """By name: ``cosine``, ``linear_cka``, ``rbf_cka`` (S, S), ``relative_update`` (L,), ``state_norm`` (S,)."""
        return {
            "cosine": self.cosine_sum / self.tokens,
            "linear_cka": cka(self.linear),
            "rbf_cka": cka(self.rbf),
            "relative_update": self.update_sum / self.tokens,
            "state_norm": self.norm_sum / self.tokens,
        }


def cka(hsic: Tensor) -> Tensor:
    """CKA from a matrix of HSIC values: H_kl/√(H_kk H_ll), at most 1; (S, S) → (S, S)."""
    root = hsic.diagonal().clamp_min(1e-300).sqrt()
    return (hsic / root[:, None] / root[None, :]).clamp_max(1.0)
