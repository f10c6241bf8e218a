"""The training loop: what it minimises, and that kills, NaN, little memory and other processes leave no trace."""

import functools
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from faults import in_two_processes
from pruned import stand_in
from torch import Tensor, nn

from kdprune.data.tokens import TokenSet
from kdprune.errors import Diverged, KDPruneError
from kdprune.model.surgery import Substitute, apply_edits
from kdprune.run.heal import Heal, heal
from kdprune.runtime.distributed import world
from kdprune.runtime.run import Run
from kdprune.runtime.stages import Stages
from kdprune.store.cache import Cache
from kdprune.store.checkpoints import Checkpoint
from kdprune.train import loop as training
from kdprune.train.gradients import Sums
from kdprune.train.loop import Schedule, fit
from kdprune.train.trial import best_rate

pytestmark = pytest.mark.usefixtures("one_thread")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("figures", "best", "tried"), [
    ([3.0, 2.0, 2.5, 1.0], 1, 3), ([None, 0.1, 0.2, 0.9], 1, 3), ([0.5, math.nan, 0.1, 0.1], 0, 2),
    ([math.nan, None, math.inf, 0.9], 3, 4), ([None] * 4, 3, 4)])
def test_the_best_rate_is_the_first_that_beats_the_next(
    figures: list[float | None], best: int, tried: int
) -> None:
    """None: diverges. What diverges is passed over, and parameters start every trial as they were."""
    rates, told, parameter = [8.0, 4.0, 2.0, 1.0], [], nn.Parameter(torch.ones(2))

    def trial(rate: float) -> float:
        assert torch.equal(parameter, torch.ones(2))
        parameter.data += rate
        value = figures[rates.index(rate)]
        if value is None:
            raise Diverged("it does")
        return value

    assert best_rate([parameter], rates, trial, lambda *pair: told.append(pair)) == rates[best]
    assert torch.equal(parameter, torch.ones(2))
    assert [pair[0] for pair in told] == rates[:tried]


SCHEDULE = Schedule(3, 4, 0.05, clip=0.5, weight_decay=0.01)
FAST = replace(SCHEDULE, rate=0.2)


class Problem:
    """y = V tanh(U x) + noise on rows of unequal token counts; V starts every epoch at its least-squares solution."""

    ROWS, WIDTH = 23, 5

    def __init__(self) -> None:
        draw = generator(3)
        self.x = torch.randn(self.ROWS, 6, self.WIDTH, generator=draw)
        self.y = self.x.flip(-1).tanh() + 0.1 * torch.randn(self.x.shape, generator=draw)
        self.mask = torch.arange(6) < torch.randint(1, 7, (self.ROWS, 1), generator=draw)
        self.u = nn.Parameter(torch.randn(self.WIDTH, self.WIDTH, generator=draw))
        self.v = nn.Parameter(torch.randn(self.WIDTH, self.WIDTH, generator=draw))
        self.unused = nn.Parameter(torch.ones(2))
        self.generator = generator(7)
        self.calls, self.stop_at = 0, -1
        self.told: list[str] = []

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [self.u, self.v, self.unused]

    def loss_function(self, rows: Tensor) -> Sums:
        self.calls += 1
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        mask = self.mask[rows]
        difference = (self.x[rows][mask] @ self.u).tanh() @ self.v - self.y[rows][mask]
        return Sums({"loss": difference.square().sum(), "largest": difference.detach().abs().sum()}, int(mask.sum()))

    @torch.no_grad()
    def on_epoch(self, epoch: int) -> dict[str, float]:
        hidden = (self.x[self.mask] @ self.u).tanh().double()
        self.v.copy_(torch.linalg.solve(hidden.T @ hidden, hidden.T @ self.y[self.mask].double()))
        return {"drawn": float(torch.rand((), generator=self.generator)) + epoch}

    def fit(self, schedule: Schedule = SCHEDULE, **options: Any) -> Any:
        options = {"on_epoch": self.on_epoch, **options}
        return fit(self.parameters, self.loss_function, self.ROWS, schedule, self.generator, name="block [2, 4)",
                   notify=self.told.append, **options)

    def bits(self) -> list[Tensor]:
        return [*(parameter.detach() for parameter in self.parameters), self.generator.get_state()]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_training_minimises_and_visits_every_row_once_an_epoch() -> None:
    weight = nn.Parameter(torch.zeros(()))
    seen: list[int] = []

    def loss_function(rows: Tensor) -> Sums:
        seen.extend(rows.tolist())
        return Sums({"loss": len(rows) * (weight - 2).square()}, len(rows))

    curves = fit([weight], loss_function, 10, Schedule(20, 3, 0.3), generator(), name="test")
    assert sorted(seen[:10]) == list(range(10))
    assert curves["loss"][-1] < 0.05 * curves["loss"][0]
    assert float(weight.detach()) == pytest.approx(2, abs=0.2)


def test_a_watched_figure_that_is_no_number_is_beaten_by_any() -> None:
    weight, figures = nn.Parameter(torch.tensor(5.0)), iter([math.nan, 10.0, 9.0, 8.0, 8.5])
    fit([weight], lambda rows: Sums({"loss": len(rows) * (weight - 2).square()}, len(rows)), 4, Schedule(4, 4, 0.3),
        generator(), name="test", watch=lambda: next(figures))
    assert float(weight.detach()) < 4.9


def test_a_fit_of_any_number_of_steps_comes_to_an_end() -> None:
    for rows in range(1, 61):
        for warmup in (0.05, 0.1):
            weight = nn.Parameter(torch.zeros(()))
            curves = fit([weight], lambda _, w=weight: Sums({"loss": (w - 2).square()}, 1), rows,
                         Schedule(1, 1, 0.3, warmup=warmup), generator(), name="test")
            assert math.isfinite(curves["loss"][-1])
            assert float(weight.detach()) > 0


def plain_loop(problem: Problem, schedule: Schedule, slower_from: int) -> list[float]:
    """The loop without its safeguards, one epoch; the rate is halved from a step on. Returns every step's mean loss."""
    optimizer = torch.optim.AdamW(
        problem.parameters, lr=schedule.rate, betas=(0.9, 0.98), weight_decay=schedule.weight_decay)
    total = schedule.epochs * -(-problem.ROWS // schedule.batch) + 1
    annealing = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, schedule.rate, total_steps=total, pct_start=0.05, cycle_momentum=False, final_div_factor=1e4)
    losses = []
    for step, rows in enumerate(torch.randperm(problem.ROWS, generator=problem.generator).split(schedule.batch)):
        seen = problem.loss_function(rows)
        loss = seen.values["loss"] / seen.count
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(problem.parameters, schedule.clip or math.inf)
        rate = optimizer.param_groups[0]["lr"]
        optimizer.param_groups[0]["lr"] = rate / 2 if step >= slower_from else rate
        optimizer.step()
        annealing.step()
    return losses


def test_the_loop_is_adamw_with_one_cycle_and_its_curves_are_means_over_tokens() -> None:
    fitted, plain = Problem(), Problem()
    schedule = Schedule(1, 1, 0.05, clip=0.5, weight_decay=0.01, stretch=9)
    curves = fitted.fit(schedule, on_epoch=None)
    losses = plain_loop(plain, schedule, slower_from=1000)
    for one, other in zip(fitted.parameters, plain.parameters, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    counts = plain.mask.sum(1)[torch.randperm(plain.ROWS, generator=generator(7))].tolist()
    points = [range(9), range(9, 18), range(18, 23)]
    expected = [sum(losses[i] * counts[i] for i in point) / sum(counts[i] for i in point) for point in points]
    assert curves["loss"] == pytest.approx(expected, rel=1e-4)


# ------------------------------------------------------------------------------------------ kills


class Diverging(Problem):
    """A loss that is NaN where U became too large, which it does at the first rate and not at a quarter of it."""

    def loss_function(self, rows: Tensor) -> Sums:
        seen = super().loss_function(rows)
        bad = self.u.detach().abs().max() > 2.2
        return Sums({**seen.values, "loss": seen.values["loss"] + (math.nan if bad else 0)}, seen.count)


@pytest.mark.parametrize(("kind", "keep"), [(Problem, 1), (Problem, 5), (Diverging, 5)])
def test_a_fit_killed_at_any_step_ends_in_the_same_bits(
    kind: type[Problem], keep: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "KEEP", keep)
    whole = kind()
    curves = whole.fit(FAST)
    assert bool(whole.told) == (kind is Diverging)
    assert len(curves["loss"]) == len(curves["drawn"]) == 3
    for stop in range(1, whole.calls + 1):
        checkpoint = Checkpoint(tmp_path / f"{stop}" / "fit", seconds=0)
        killed = kind()
        killed.stop_at = stop
        with pytest.raises(KeyboardInterrupt):
            killed.fit(FAST, checkpoint=checkpoint)
        resumed = kind()
        assert resumed.fit(FAST, checkpoint=checkpoint) == curves
        assert same(resumed.bits(), whole.bits())
        assert resumed.calls <= whole.calls - stop + keep + 2
        # A run that comes by again passes through at once.
        again = kind()
        assert again.fit(FAST, checkpoint=checkpoint) == curves
        assert same(again.bits(), whole.bits())
        assert again.calls == 0


def test_a_fit_killed_again_and_again_ends_in_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "KEEP", 2)
    whole, kills = Problem(), 0
    curves = whole.fit()
    while True:
        part = Problem()
        part.stop_at = 4
        try:
            found = part.fit(checkpoint=Checkpoint(tmp_path / "fit", seconds=0))
            break
        except KeyboardInterrupt:
            kills += 1
    assert kills > 3
    assert found == curves
    assert same(part.bits(), whole.bits())


def test_a_checkpoint_of_another_schedule_is_left_unread(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "fit", seconds=0)
    Problem().fit(checkpoint=checkpoint)
    whole, other = Problem(), Problem()
    curves = whole.fit(Schedule(2, 4, 0.05))
    assert other.fit(Schedule(2, 4, 0.05), checkpoint=checkpoint) == curves
    assert same(other.bits(), whole.bits())
    assert other.told == ["the checkpoint of block [2, 4) has another schedule or size: left unread"]


class Killing(Stages):
    """Stages whose progress bar kills the run when it comes to some row."""

    def __init__(self, at: float) -> None:
        super().__init__()
        self.at = at

    def stage(self, name: str, total: int | None = None) -> Any:
        @contextmanager
        def killing() -> Iterator[Callable[[int], None]]:
            seen = 0

            def advance(rows: int) -> None:
                nonlocal seen
                seen += rows
                if seen >= self.at:
                    raise KeyboardInterrupt
            yield advance

        return killing()


@pytest.mark.parametrize("what", ["stand-ins", "lora"])
def test_healing_goes_on_where_it_was_killed(what: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "KEEP", 2)
    model = build("llama3")
    edits = [Substitute(range(2, 4), stand_in())]
    pruned = apply_edits(model, edits)
    ids = 3 + (torch.randint(20, (8, 1), generator=generator()) + torch.arange(12)) % 20
    tokens = TokenSet(ids, torch.ones(8, 12, dtype=torch.bool), "test")
    settings = Heal(what=what, tokens=360, batch=3, rank=2, rate=3e-3)

    def healed(at: float, cache: Cache) -> tuple[dict[str, Tensor], dict[str, Any]]:
        found, record = heal(
            pruned, model, edits, tokens, settings, Run(stages=Killing(at), cache=cache), held=2)
        assert record["kept"]
        return found.state_dict(), record

    monkeypatch.setattr(Cache, "checkpoint", functools.partialmethod(Cache.checkpoint, seconds=0))
    weights, record = healed(math.inf, Cache(None))
    assert len(record["curve"]) == 10
    for at in (1, 10, 29):
        cache = Cache(tmp_path / f"{at}")
        with pytest.raises(KeyboardInterrupt):
            healed(at, cache)
        for _ in range(2):  # from the checkpoint, and from the finished stage
            again, same_record = healed(math.inf, cache)
            assert same_record == record
            assert all(torch.equal(weight, again[name]) for name, weight in weights.items())


# ------------------------------------------------------------------------------------------ NaN


def test_a_loss_that_is_nan_once_goes_on_from_the_last_good_step_at_half_the_rate() -> None:
    schedule = Schedule(1, 1, 0.05, clip=0.5, weight_decay=0.01)
    fitted, plain = Problem(), Problem()

    def loss_function(rows: Tensor) -> Sums:
        seen = fitted.loss_function(rows)
        return Sums({"loss": seen.values["loss"] * (math.nan if fitted.calls == 20 else 1)}, seen.count)

    curves = fit(fitted.parameters, loss_function, fitted.ROWS, schedule, fitted.generator, name="block [2, 4)",
                 notify=fitted.told.append)
    losses = plain_loop(plain, schedule, slower_from=16)
    for one, other in zip(fitted.parameters, plain.parameters, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    counts = plain.mask.sum(1)[torch.randperm(plain.ROWS, generator=generator(7))].tolist()
    expected = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    assert curves["loss"] == pytest.approx([expected], rel=1e-4)
    assert fitted.told == ["got a nan loss while fitting block [2, 4) in epoch 1, step 20 of 23; going on from epoch "
                           "1, step 17 at half the rate (peak 0.025)"]
    assert fitted.calls == 23 + 4


def test_a_rate_that_leaves_the_domain_of_the_loss_is_lowered_until_it_does_not() -> None:
    weight, told = nn.Parameter(torch.tensor(3.0)), []
    curves = fit([weight], lambda rows: Sums({"loss": len(rows) * (weight - weight.log())}, len(rows)), 40,
                 Schedule(2, 1, 2.0), generator(), name="test", notify=told.append)
    assert 1 <= len(told) <= 3
    assert math.isfinite(curves["loss"][-1])
    assert float(weight.detach()) == pytest.approx(1, abs=0.3)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_state_that_is_not_finite_ends_the_fit_with_block_and_step(value: float) -> None:
    problem = Problem()
    problem.y[13, 0, 2] = value
    step = 1 + torch.randperm(problem.ROWS, generator=generator(7)).tolist().index(13) // 4
    with pytest.raises(KDPruneError, match=rf"got a {value} loss while fitting block \[2, 4\) in epoch 1, step {step} "
                       r"of 6; expected .* tried 3 times \(down to 0.00625\): lower .* \(now 0.05\)") as caught:
        problem.fit(on_epoch=None)
    assert "\n" not in str(caught.value)
    assert len(problem.told) == 3
    assert problem.calls == 4 * step


def test_training_says_where_it_failed() -> None:
    weight = nn.Parameter(torch.ones(()))
    with pytest.raises(KDPruneError, match=r"got a nan loss while fitting block \[2, 4\) in epoch 1, step 1 of 2"):
        fit([weight], lambda _: Sums({"loss": weight * math.nan}, 1), 4, Schedule(1, 2, 1e-3), generator(),
            name="block [2, 4)", notify=lambda _: None)
    with pytest.raises(KDPruneError, match=r"got a nan gradient while fitting test in epoch 1"):
        fit([weight], lambda _: Sums({"loss": (weight * 0).sqrt()}, 1), 4, Schedule(1, 2, 1e-3), generator(),
            name="test", notify=lambda _: None)


# ------------------------------------------------------------------------------------------ memory


class NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise torch.OutOfMemoryError("planted")


def no_forward(_: Tensor) -> Tensor:
    raise torch.OutOfMemoryError("planted")


def no_host_memory(_: Tensor) -> Tensor:
    return torch.empty(1 << 60, dtype=torch.uint8)


@pytest.mark.parametrize("fails", [no_forward, NoBackward.apply, no_host_memory])
def test_too_large_a_batch_is_halved_to_the_same_result(fails: Callable[[Tensor], Tensor]) -> None:
    whole, halved = Problem(), Problem()
    schedule = Schedule(3, 8, 0.02, clip=0.5)
    sizes: list[int] = []

    def loss_function(rows: Tensor) -> Sums:
        seen = halved.loss_function(rows)
        sizes.append(len(rows))
        loss = fails(seen.values["loss"]) if len(rows) > 2 else seen.values["loss"]
        return Sums({**seen.values, "loss": loss}, seen.count)

    curves = whole.fit(schedule)
    found = fit(halved.parameters, loss_function, halved.ROWS, schedule, halved.generator, name="block [2, 4)",
                on_epoch=halved.on_epoch, notify=halved.told.append)
    for one, other in zip(halved.parameters, whole.parameters, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    for key, values in curves.items():
        assert found[key] == pytest.approx(values, rel=1e-6)
    assert halved.told == ["out of memory with 8 rows at once while fitting block [2, 4); going on with 2, to the "
                           "same result up to rounding"]
    assert sizes[:6] == [8, 4, 2, 2, 2, 2]
    assert max(sizes[2:]) == 2


def test_one_row_too_large_says_what_to_do_and_other_errors_pass() -> None:
    weight = nn.Parameter(torch.ones(()))

    def failing(error: Exception) -> None:
        def loss_function(_: Tensor) -> Sums:
            raise error

        fit([weight], loss_function, 4, Schedule(1, 2, 1e-3), generator(), name="block [2, 4)", notify=lambda _: None)

    with pytest.raises(KDPruneError, match=r"one row while fitting block \[2, 4\), .*--length.*--device cpu"):
        failing(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    with pytest.raises(RuntimeError, match="shapes"):
        failing(RuntimeError("shapes"))


# ------------------------------------------------------------------------------------------ processes


CASES = ("dealt", "halved", "diverging", "uneven")


def in_processes(case: str, folder: Path) -> Problem:
    """A fit whose rows are dealt out; every process but the first starts elsewhere."""
    problem = Diverging() if case == "diverging" else Problem()
    here = world()
    if not here.first:
        with torch.no_grad():
            problem.u.add_(1.0)

    def loss_function(rows: Tensor) -> Sums:
        if case == "halved" and here.rank == here.size - 1 and len(rows) > 1:
            raise torch.OutOfMemoryError("planted")
        return problem.loss_function(rows)

    def mine(rows: Tensor) -> Tensor:
        if case == "uneven":  # in some steps a process has no row, and the last the most tokens
            return rows[(rows % 5 > 0) == (here.rank == here.size - 1)] if here.size > 1 else rows
        return rows[rows % here.size == here.rank]

    curves = fit(problem.parameters, loss_function, problem.ROWS, FAST, problem.generator, name=case,
                 on_epoch=problem.on_epoch, local_rows=mine, notify=problem.told.append)
    torch.save({"bits": problem.bits(), "calls": problem.calls}, folder / f"{case}-{here.rank}-of-{here.size}.pt")
    (folder / f"{case}-{here.rank}-of-{here.size}.json").write_text(json.dumps([curves, problem.told]))
    return problem


def process(folder: Path) -> None:
    training.KEEP = 5
    for case in CASES:
        in_processes(case, folder)


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes wrote."""
    folder = tmp_path_factory.mktemp("two")
    in_two_processes(functools.partial(process, folder))
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_processes_fit_what_one_does(
    case: str, together: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "KEEP", 5)
    alone = in_processes("dealt" if case == "halved" else case, tmp_path)
    [curves, told] = json.loads(next(tmp_path.glob("*.json")).read_text())
    first, second = (torch.load(together / f"{case}-{rank}-of-2.pt") for rank in range(2))
    assert same(first["bits"], second["bits"])
    for one, other in zip(first["bits"][:-1], alone.bits()[:-1], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    assert same(first["bits"][-1:], alone.bits()[-1:])
    [found, said], [_, also] = (json.loads((together / f"{case}-{rank}-of-2.json").read_text()) for rank in range(2))
    for key, values in curves.items():
        assert found[key] == pytest.approx(values, rel=1e-5)
    if case == "halved":
        assert [len(said), len(also)] == [0, 1]  # the one that it happened to
    else:
        assert [said, also] == [told, []]
    if case == "uneven":
        assert min(first["calls"], second["calls"]) < 18
