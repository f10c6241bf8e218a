"""Linear operators fitted from streamed moments, and the form A = I + γB (KDP, section 4)."""

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from kdprune.errors import KDPruneError
from kdprune.runtime.distributed import world


class Moments:
    """Running sums for the regression of y on x: XᵀX, XᵀY, ‖Y‖², Σx, Σy, n.

    Products and sums are float64: thousands of nearly collinear terms are added and then inverted, which float32
    cannot afford.

    Args:
        inputs: p, outputs: q.
        device: where the sums live.

    Raises:
        KDPruneError: in every solve, where inputs depend on each other and the ridge is too small to tell them apart.
    """

    def __init__(self, inputs: int, outputs: int, device: torch.device | str = "cpu"):
        self.xx = torch.zeros(inputs, inputs, dtype=torch.float64, device=device)
        self.xy = torch.zeros(inputs, outputs, dtype=torch.float64, device=device)
        self.x = torch.zeros(inputs, dtype=torch.float64, device=device)
        self.y = torch.zeros(outputs, dtype=torch.float64, device=device)
        self.yy = torch.zeros((), dtype=torch.float64, device=device)
        self.n = 0

    def update(self, x: Tensor, y: Tensor) -> None:
        """Adds a chunk: x (n, p), y (n, q)."""
        x, y = x.double(), y.double()
        self.xx += x.T @ x
        self.xy += x.T @ y
        self.x += x.sum(0)
        self.y += y.sum(0)
        self.yy += y.square().sum()
        self.n += len(x)

    def add_processes(self) -> "Moments":
        """Adds up the sums of all processes, in place, and returns itself."""
        count = torch.tensor(self.n, dtype=torch.float64)
        world().sum(self.xx, self.xy, self.x, self.y, self.yy, count)
        self.n = int(count)
        return self

    def solve(self, ridge: float = 0.0) -> Tensor:
        """argmin_M Σ ‖M x − y‖² + ρ‖M‖², ρ = ridge · tr(XᵀX)/p: M of shape (q, p), float64."""
        with self._solvable(ridge):
            return torch.linalg.solve(_add_ridge(self.xx, ridge), self.xy).T

    def solve_affine(self, ridge: float = 0.0) -> tuple[Tensor, Tensor]:
        """The same with an unpenalised intercept: (M, c) with y ≈ M x + c."""
        xx, xy = self._centred()
        with self._solvable(ridge):
            matrix = torch.linalg.solve(_add_ridge(xx, ridge), xy).T
        return matrix, (self.y - matrix @ self.x) / self.n

    def cost_of_leaving_out(self, ridge: float, intercept: bool = True) -> Tensor:
        """By how much the least Σ ‖M x + c − y‖² + ρ‖M‖² grows without input j, for each of them: (p,).

            ‖m_j‖² / [C⁻¹]_jj,   C the centred moments with the ridge, m_j column j of M

        Without ``intercept`` c = 0, and C is not centred.

        Source: Hassibi & Stork, "Optimal Brain Surgeon" (1993), whose Hessian is C here.
        """
        xx, xy = self._centred() if intercept else (self.xx, self.xy)
        with self._solvable(ridge):
            inverse = torch.linalg.inv(_add_ridge(xx, ridge))
        return (inverse @ xy).square().sum(1) / inverse.diagonal()

    def leverages(self, ridge: float) -> Tensor:
        """Ridge leverage scores of the inputs, (p,), in [0, 1]: [C (C + ρI)⁻¹]_jj, C = XᵀX, ρ = ridge · tr C/p."""
        penalty = ridge * self.xx.diagonal().mean()
        with self._solvable(ridge):
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(_add_ridge(self.xx, ridge)))
        return 1 - penalty * inverse.diagonal()

    def refit(self, inputs: Tensor, start: Tensor, ridge: float, intercept: bool) -> tuple[Tensor, Tensor]:
        """A map of some of the inputs alone, near one that is given.

            argmin_{M, c} Σ ‖M x_S + c − y‖² + ρ‖M − M₀‖²  =  M₀ + (C_SS + ρI)⁻¹ (C_Sy − C_SS M₀ᵀ),   ρ = ridge · tr C/p

        with C the moments of all p inputs, centred where there is an ``intercept``; else c = 0. Where y is a linear map
        W of all inputs and M₀ its columns S, that is Nyström's W_S + (C_SS + ρI)⁻¹ C_SR W_R, R the other inputs.

        Args:
            inputs: S, the numbers of k inputs.
            start: M₀, (q, k).
            ridge: of the map's distance from that.
            intercept: whether c is solved for, unpenalised.

        Returns:
            M (q, k) and c (q,), float64.
        """
        xx, xy = self._centred() if intercept else (self.xx, self.xy)
        inputs, start = inputs.to(xx.device), start.to(xx)
        own, penalty = xx[inputs][:, inputs], ridge * xx.diagonal().mean()
        rest = xy[inputs] - own @ start.T
        with self._solvable(ridge):
            matrix = start + torch.linalg.solve(own + penalty * torch.eye(len(own)).to(own), rest).T
        offset = (self.y - matrix @ self.x[inputs]) / self.n if intercept else torch.zeros_like(self.y)
        return matrix, offset

    @contextlib.contextmanager
    def _solvable(self, ridge: float) -> Iterator[None]:
        try:
            yield
        except torch.linalg.LinAlgError as error:
            raise KDPruneError(
                f"got {self.n} tokens that {len(self.x)} inputs cannot be told apart from, expected more or a larger "
                f"ridge (now {ridge:g}): give more calibration text, raise ridge, or check the checkpoint") from error

    def _centred(self) -> tuple[Tensor, Tensor]:
        mean_x, mean_y = self.x / self.n, self.y / self.n
        return self.xx - self.n * torch.outer(mean_x, mean_x), self.xy - self.n * torch.outer(mean_x, mean_y)

    def residual(self, matrix: Tensor, offset: Tensor | None = None) -> float:
        """Σ ‖M x + c − y‖² of a given map from the sums alone."""
        matrix = matrix.double()
        c = torch.zeros_like(self.y) if offset is None else offset.double()
        quadratic = ((matrix @ self.xx) * matrix).sum() + self.yy - 2 * (matrix * self.xy.T).sum()
        cross = 2 * (c @ (matrix @ self.x)) - 2 * (c @ self.y) + self.n * (c @ c)
        return float(quadratic + cross)

    def variance(self) -> float:
        """Σ ‖y − mean(y)‖²."""
        return float(self.yy - self.y.square().sum() / self.n)


def _add_ridge(xx: Tensor, ridge: float) -> Tensor:
    result = xx.clone()
    result.diagonal().add_(ridge * xx.diagonal().mean())
    return result


def spectral_norm(matrices: Tensor, iterations: int = 100) -> Tensor:
    """‖A‖₂ of every matrix, (k, D, D) → (k,), by power iteration: singular values cost D³, and this is for a picture.

    The iteration starts from a fixed vector and stays below the norm, by far less than a per cent after 100 steps
    unless the two largest singular values nearly agree, in which case their size is found all the same.
    """
    draw = torch.randn(matrices.shape[-1], 1, generator=torch.Generator().manual_seed(0))
    vector = draw.to(matrices).expand(len(matrices), -1, -1)
    for _ in range(iterations):
        vector = torch.nn.functional.normalize(matrices.transpose(1, 2) @ (matrices @ vector), dim=1)
    return (matrices @ vector).norm(dim=(1, 2))


class LinearDynamics(nn.Module):
    """k operators A_i = I + γ_i B_i on R^D, ‖B_i‖₂ = 1 at every (re)start, so that γ_i is the size of the step.

    Args:
        steps: k.
        size: D.

    Source: KDP, section 4 (I + γB keeps the residual form of the network in kernel space).
    """

    def __init__(self, steps: int, size: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(steps))
        self.direction = nn.Parameter(torch.zeros(steps, size, size))

    def matrices(self) -> Tensor:
        """A, shape (k, D, D)."""
        identity = torch.eye(self.direction.shape[-1], device=self.direction.device)
        return identity + self.gamma[:, None, None] * self.direction

    def product(self) -> Tensor:
        """A_k ⋯ A_1, shape (D, D): what folding puts into the next matrix."""
        result = torch.eye(self.direction.shape[-1], device=self.direction.device)
        for matrix in self.matrices():
            result = matrix @ result
        return result

    @torch.no_grad()
    def start(self, matrices: Iterable[Tensor], trained: bool = True) -> None:
        """Sets A_i to given matrices, k times (D, D).

        A_i − I is split into γ_i, its spectral norm, and B_i; where nothing is trained afterwards, which spares the
        norm, into 1 and itself.
        """
        for number, matrix in enumerate(matrices):
            update = matrix.double() - torch.eye(len(matrix), dtype=torch.float64, device=matrix.device)
            gamma = spectral_norm(update[None])[0].clamp_min(1e-12) if trained else torch.ones_like(update[0, 0])
            self.gamma[number] = gamma
            self.direction[number] = update / gamma

    @torch.no_grad()
    def start_random(self, generator: torch.Generator) -> None:
        """Sets γ_i to 0, hence A_i to I, and B_i to Gaussian draws with ‖B_i‖₂ = 1."""
        draw = torch.randn(self.direction.shape, generator=generator).to(self.direction)
        self.gamma.zero_()
        self.direction.copy_(draw / spectral_norm(draw)[:, None, None])

    @torch.no_grad()
    def spectral_norms(self) -> Tensor:
        """‖A_i‖₂, shape (k,); their maximum is Theorem 1's B_A."""
        return spectral_norm(self.matrices())
