"""Massive tokens: the few whose states are many times larger than all others, and the layers that write and erase them.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from kdprune.runtime.distributed import world

# τ. Measured largest token norm over the median: SmolLM2-135M 208, Qwen2.5-Coder-0.5B 143, which have such tokens;
# Gemma-3-270M 30 and the bundled model 3.4, which have none.
MASSIVE = 50.0
# Measured move of massive tokens over that of the others: layers 11 and 28 of SmolLM2 610 and 60, layers 2, 3, 21 and
# 22 of Qwen2.5-Coder 131, 107, 23 and 17; every other layer at most 11.2.
MOVED = 15.0


class MassiveTokens:
    """Streamed statistics of token norms at all S = L + 1 boundaries.

        t is massive at boundary l:   ‖h_{l,t}‖ > τ · median_t ‖h_{l,t}‖,   the median over the tokens of its batch
        M = {t massive at some l}
        ρ_l = rms_{t ∈ M} ‖h_{l+1,t} − h_{l,t}‖ / rms_{t ∉ M} ‖h_{l+1,t} − h_{l,t}‖
        layer l moves massive tokens:  ρ_l > 15;   it writes them if their mean norm grows, else it erases them

    With one such token in rows of 256, ρ > 15 says that about half of the squared change of the layer or more is that
    one token's: a squared error over the layer is then about it alone. That the ratio of largest to median norm crosses
    τ would say less: where tokens are massive the ratio falls from layer to layer because the others grow.

    Not to be taken for outlier *dimensions*, coordinates that are large in every token.

    Source: Sun et al. 2024, "Massive Activations in Large Language Models" (the phenomenon).

    Args:
        states: S.

    Attributes:
        sums: by name, over tokens: how many are ``massive`` at each boundary (S,); of M and of the others (2, …) the
            ``count`` (2,), ``norm`` (2, S) and squared ``move`` (2, L).
        norms: of every token, (S, n) a batch, float32.
    """

    def __init__(self, states: int):
        shapes = {"massive": (states,), "count": (2,), "norm": (2, states), "move": (2, states - 1)}
        self.sums = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
        self.norms = [torch.empty(states, 0)]

    def update(self, states: Iterable[Tensor]) -> Tensor:
        """Adds a batch of real tokens, (n, d) for l = 0 … L, one after the other; says which are in M, (n,), on the
        host.
        """
        norms, moves = [], []
        before = None
        for state in states:
            state = state.float()
            norms.append(torch.linalg.vector_norm(state, dim=-1).cpu())
            if before is not None:
                moves.append(torch.linalg.vector_norm(state - before.to(state.device), dim=-1).cpu())
            before = state
        norm, move = torch.stack(norms), torch.stack(moves)
        massive = norm > MASSIVE * norm.median(-1, keepdim=True).values
        found = massive.any(0)
        groups = torch.stack((found, ~found)).double()
        self.sums["massive"] += massive.double().sum(-1)
        self.sums["count"] += groups.sum(-1)
        self.sums["norm"] += groups @ norm.double().T
        self.sums["move"] += groups @ move.double().square().T
        self.norms.append(norm)
        return found

    def add_processes(self) -> "MassiveTokens":
        """Adds what the other processes of the run have seen."""
        world().sum(*self.sums.values())
        self.norms = world().gather(torch.cat(self.norms, -1))
        return self

    def value(self) -> dict[str, Tensor]:
        """By name: ``largest_norm``, ``median_norm``, ``massive_share`` (S,), ``massive_move`` (L,), ρ, and
        ``massive_growth`` (L,), the mean norm of M behind a layer over that in front of it; ``left_out``, |M|.

        Without massive tokens ρ is 0 and the growth 1.
        """
        norms = torch.cat(self.norms, -1)
        count, norm, move = (self.sums[name] for name in ("count", "norm", "move"))
        growth = norm[0, 1:] / norm[0, :-1].clamp_min(1e-12) if count[0] else torch.ones_like(move[0])
        rms = (move / count.clamp_min(1)[:, None]).sqrt()
        return {
            "largest_norm": norms.amax(-1).double(),
            "median_norm": norms.median(-1).values.double(),
            "massive_share": self.sums["massive"] / count.sum(),
            "massive_move": rms[0] / rms[1].clamp_min(1e-12),
            "massive_growth": growth,
            "left_out": count[0].long(),
        }


def movers(move: Iterable[float], growth: Iterable[float]) -> tuple[list[int], list[int]]:
    """The layers that write massive tokens and those that erase them, from ``massive_move`` and ``massive_growth``."""
    layers = [(layer, grown > 1) for layer, (far, grown) in enumerate(zip(move, growth, strict=True)) if far > MOVED]
    return [layer for layer, writes in layers if writes], [layer for layer, writes in layers if not writes]
