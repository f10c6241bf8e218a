"""In which error, and at which rate, do gradient steps on a block's states serve the model?

    python refining.py run MODEL NAME BLOCKS EPOCHS RATES ERRORS FISHER     # FISHER: rows that the Fisher matrix is of
    python refining.py page

The first of BLOCKS ("10-13,14-16") behind its closed-form stand-in is trained from there on 43 rows of 512 tokens with each
of the errors (plain, token, read, diag, full) at each rate; five rows are held out, on four of which KL is taken.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from kdprune.data.tokens import TokenSet, load_tokens
from kdprune.methods.common.budget import filled
from kdprune.methods.common.stand_in_fit import StandInFit, average
from kdprune.methods.kdp.fit_block import Fit, fit_closed_form
from kdprune.methods.kdp.fit_blocks import FitPlan, _Collected
from kdprune.methods.kdp.kdp import KDP
from kdprune.model.families import decoder_layers
from kdprune.model.structures import gains_from
from kdprune.model.surgery import Edit, apply_edits
from kdprune.runtime.run import Run
from kdprune.train.gradients import LossFunction, Sums
from kdprune.train.loop import Schedule

HERE = Path(__file__).parent
TEXT = HERE / "calibration.jsonl"  # benchmarks/texts.py makes it
SHRINK = 0.1  # of the full Fisher matrix towards its diagonal


def gradients(model: PreTrainedModel, tokens: TokenSet, boundary: int, rows: int) -> Tensor:
    """‖h‖ ∇_h Σ log p(y) of the state at a boundary, y drawn from the model, (n, d); the longest cut at the 99th percent."""
    found, draw = [], torch.Generator().manual_seed(0)
    for ids in tokens.ids[:rows]:
        kept: dict[str, Tensor] = {}

        def catch(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], kept: dict[str, Tensor] = kept) -> Any:
            state = (args[0] if args else kwargs["hidden_states"]).detach().requires_grad_(True)
            kept["state"] = state
            return ((state, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": state})

        hook = decoder_layers(model)[boundary].register_forward_pre_hook(catch, with_kwargs=True)
        logs = torch.log_softmax(model(ids[None]).logits[0].float(), -1)
        hook.remove()
        drawn = torch.multinomial(logs.detach().exp(), 1, generator=draw)
        logs.gather(1, drawn).sum().backward()
        state = kept["state"]
        assert state.grad is not None
        found.append((state.grad * state.detach().norm(dim=-1, keepdim=True))[0])
    rows_of = torch.cat(found).double()
    norms = rows_of.norm(dim=1)
    return rows_of * (norms.quantile(0.99) / norms).clamp(max=1)[:, None]


def losses(model: PreTrainedModel, fitting: StandInFit, fisher: Tensor) -> dict[str, LossFunction]:
    """By name: plain, the squared error; token, over ‖h_e‖² of each token; and of that, in a metric, read (the gains of
    the norms behind), diag and full (the Fisher matrix's)."""
    width = len(fisher)
    gains, diagonal = gains_from(model, fitting.states.block.stop), fisher.diagonal() / fisher.diagonal().mean()
    shrunk = (1 - SHRINK) * fisher / fisher.diagonal().mean() + SHRINK * torch.diag(diagonal)
    metrics = {
        "token": torch.eye(width), "read": torch.diag(gains / gains.square().mean().sqrt()),
        "diag": torch.diag(diagonal.sqrt()).float(), "full": torch.linalg.cholesky(shrunk).T.float().contiguous()}

    def in_metric(metric: Tensor) -> LossFunction:
        def loss_function(rows: Tensor) -> Sums:
            predicted = fitting.predict(rows)
            target, mask = fitting.target(rows)
            error = (predicted[mask] - target[mask]) / target[mask].norm(dim=-1, keepdim=True)
            return Sums({"loss": (error @ metric.T).square().sum()}, int(mask.sum()))
        return loss_function

    return {"plain": fitting.state_loss(fitting.update_energy()), **{name: in_metric(m) for name, m in metrics.items()}}


def divergence(model: PreTrainedModel, rows: Tensor) -> Callable[[Edit], float]:
    """Mean KL(dense‖pruned) over rows, by the edit."""
    with torch.no_grad():
        dense = [torch.log_softmax(model(ids[None]).logits[0].float(), -1) for ids in rows]

    @torch.no_grad()
    def measure(edit: Edit) -> float:
        pruned, total = apply_edits(model, [edit]), 0.0
        for ids, known in zip(rows, dense, strict=True):
            other = torch.log_softmax(pruned(ids[None]).logits[0].float(), -1)
            total += float((known.exp() * (known - other)).sum(-1).mean())
        return total / len(rows)

    return measure


def run(where: str, name: str, blocks: str, epochs: int, rates: list[float], errors: list[str], fisher: int) -> Iterator[
        dict[str, Any]]:
    """One dict a training, that of the start in front."""
    model = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32).eval().requires_grad_(False)
    tokens = load_tokens(
        str(TEXT), AutoTokenizer.from_pretrained(where), samples=48, length=512, seed=0, vocabulary=None)
    method = KDP(blocks=tuple(tuple(map(int, block.split("-"))) for block in blocks.split(",")), ratio=0.25, of="layers")
    this_run, budget = Run(0), method.budget(model)
    chosen = filled(method.choose(model, tokens, this_run, budget)[0], budget)
    block, shape = chosen[0].block, chosen[0].shape
    settings = method.settings(shape, tokens)
    plan = FitPlan([c.block for c in chosen], [c.shape for c in chosen], settings, tokens.held_out(method.held),
                   method.path_rows(tokens, shape), True)
    this = Fit.of(model, _Collected(model, tokens, plan, this_run).states(0, []), shape, settings, 0, this_run)
    fitting, measure = this.fitting, divergence(model, tokens.watching(method.held).ids[:4])
    found = gradients(model, tokens.fitted(method.held), block.stop, fisher)
    matrix = found.T @ found / len(found)
    with torch.no_grad():
        fit_closed_form(model, this)
    functions = losses(model, fitting, matrix)
    trained = [parameter for parameter in fitting.module.parameters() if parameter.requires_grad]
    start = [parameter.detach().clone() for parameter in trained]

    def held() -> dict[str, float]:
        return {error: average(one, fitting, held=True)["loss"][0] for error, one in functions.items()}

    pair = torch.stack((matrix.diagonal().float().log(), 2 * gains_from(model, block.stop).log()))
    yield {"model": name, "block": [block.start, block.stop], "kl": measure(fitting.edit()), "held": held(),
           "correlation": float(torch.corrcoef(pair)[0, 1])}
    for error in errors:
        for rate in rates:
            with torch.no_grad():
                for parameter, value in zip(trained, start, strict=True):
                    parameter.copy_(value)
            begun, function = time.time(), functions[error]
            curves = dataclasses.replace(this, draw=this_run.generator(1)).train(
                f"{error} {rate}", trained, function, Schedule(epochs, 4, rate, patience=5),
                lambda function=function: average(function, fitting, held=True)["loss"][0])
            watched = curves["watched"]
            yield {"model": name, "block": [block.start, block.stop], "error": error, "rate": rate, "epochs": epochs,
                   "watched": [value / watched[0] for value in watched], "held": held(), "kl": measure(fitting.edit()),
                   "seconds": time.time() - begun}


def page() -> str:
    """The record as a page, a table a model."""
    record = json.loads((HERE / "refining.json").read_text())
    parts = ["# Gradient steps on a block's states"]
    for model in dict.fromkeys(one["model"] for one in record):
        start, *rest = [one for one in record if one["model"] == model]
        first, last = start["block"]
        parts.append(f"## {model}, block `[{first}, {last})`\n\nClosed form: KL {start['kl']:.4f}. Logarithms of the Fisher "
                     f"matrix's diagonal and of the norms' squared gains correlate with {start['correlation']:.2f}.")
        lines = ["| error | rate | epochs | held-out error, of the start's: after the first, the last epoch | KL |",
                 "|---|---:|---:|---:|---:|"]
        for one in sorted(rest, key=lambda one: (one["error"], -one["rate"])):
            kept = "" if min(one["watched"]) < 1 else " (start kept)"
            lines.append(f"| {one['error']} | {one['rate']:g} | {one['epochs']} | {one['watched'][1]:.3f}, "
                         f"{one['watched'][-1]:.3f} | {one['kl']:.4f}{kept} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    if sys.argv[1] == "page":
        (HERE / "refining.md").write_text(page())
    else:
        torch.set_num_threads(1)
        where, name, blocks, epochs, rates, errors, fisher = sys.argv[2:]
        for entry in run(where, name, blocks, int(epochs), [float(rate) for rate in rates.split(",")], errors.split(","),
                         int(fisher)):
            path = HERE / "refining.json"
            known = json.loads(path.read_text()) if path.exists() else []
            path.write_text(json.dumps([*known, entry], indent=1) + "\n")
            print(json.dumps(entry), flush=True)
