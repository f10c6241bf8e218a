"""Do phases need float32? The bundled model, pruned, in bfloat16 and float16 with its stand-ins' phases in either.

    python benchmarks/precision.py                      fits the models, measures, writes record and page
    python benchmarks/precision.py --render FILE.json   the page again, from the record

A phase p = Wx̂ + b goes through cosine and sine, so that its *absolute* error counts, and a narrow dtype's error grows
with |p|, thus with the bandwidth, by which frequencies are multiplied. Errors are relative to the same stand-in in
float64 with the weights as fitted, on states of held-out text: ‖Ŝ − S‖ / ‖S‖ of what the stand-in adds to the stream.
"""

import argparse
import copy
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import hardware
import torch
from speed_page import table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from kdprune.data import TokenSet, bundled_calibration, bundled_heldout, load_stream, load_tokens
from kdprune.evaluation.perplexity import perplexity
from kdprune.methods.kdp import KDP
from kdprune.model.families import decoder_layers
from kdprune.model.loading import load_model, load_tokenizer
from kdprune.model.modeling_kdp import StandIn
from kdprune.model.surgery import apply_edits
from kdprune.session import BUNDLED_MODEL

BLOCKS = ((4, 6), (7, 11))
# How a stand-in in a narrow dtype computes its phases.
WAYS = {
    "as it is": "all in the narrow dtype",
    "float32 phase": "weights in the narrow dtype; product, cosine and sine in float32",
    "float32 weights": "phase weights, product, cosine and sine in float32",
    "float32 stand-in": "the whole stand-in in float32, its result cast",
}


class Wider(nn.Module):
    """A stand-in in one of WAYS. ``fitted`` is the one in float32, whose phase weights it may keep."""

    def __init__(self, fitted: StandIn, way: str, dtype: torch.dtype):
        super().__init__()
        self.inner, self.way = copy.deepcopy(fitted).to(dtype), way
        if way != "as it is":  # the same class in float32, with weights that were narrow before or not
            source = copy.deepcopy(self.inner if way == "float32 phase" else fitted).float()
            self.inner = source if way == "float32 stand-in" else self.inner
            self.inner.phase = source.phase

    def forward(self, x: Tensor) -> Tensor:
        """x (…, d) → (…, d), in the dtype of x."""
        inner = self.inner
        if self.way == "as it is":
            return inner(x)
        if self.way == "float32 stand-in":
            return inner(x.float()).to(x.dtype)
        z = nn.functional.rms_norm(x, (inner.width,), eps=inner.eps) if inner.normalize else x
        p = inner.phase(z.float())
        y = inner.readout(torch.cat((p.cos(), p.sin()), dim=-1).to(x.dtype))
        return x + y if inner.residual else y


def fitted(context: str, bandwidth: float, tokens: TokenSet, keep: Path | None) -> PreTrainedModel:
    """The bundled model in float32 with stand-ins in BLOCKS, fitted in a few epochs; from ``keep`` if it is there."""
    folder = None if keep is None else keep / f"m_{context}_{bandwidth:g}"
    if folder is not None and folder.is_dir():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model = load_model(BUNDLED_MODEL, device="cpu", dtype="float32")
    method = KDP(context=context, bandwidth=bandwidth, refine_epochs=2, kernel_epochs=2, blocks=BLOCKS)  # type: ignore[arg-type]
    pruned = apply_edits(model, method(model, tokens, None, seed=0).edits)
    if folder is not None:
        pruned.save_pretrained(folder)
    return pruned.eval()


def stand_ins(model: nn.Module) -> dict[str, StandIn]:
    """By path."""
    return {name: module for name, module in model.named_modules() if isinstance(module, StandIn)}


def narrowed(model: PreTrainedModel, way: str, dtype: torch.dtype) -> PreTrainedModel:
    """A copy of ``model`` in a narrow dtype, its stand-ins in one of WAYS."""
    result: Any = copy.deepcopy(model).to(dtype)
    for name, module in stand_ins(model).items():
        result.set_submodule(name, Wider(module, way, dtype))
    return result


@torch.no_grad()
def inputs(model: PreTrainedModel, tokens: TokenSet) -> dict[str, Tensor]:
    """What enters every stand-in, and the MLP of layer 2, on the first 4,096 tokens: (n, d) by path."""
    seen: dict[str, Tensor] = {}
    watched = {**stand_ins(model), "mlp": decoder_layers(model)[2].mlp}
    hooks = [module.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].flatten(0, -2)}))
             for name, module in watched.items()]
    model(tokens.ids.flatten()[:4096].view(8, 512))
    for hook in hooks:
        hook.remove()
    return seen


def error(found: Tensor, true: Tensor) -> float:
    """‖found − true‖ / ‖true‖."""
    return float((found.double() - true).norm() / true.norm())


@torch.no_grad()
def errors(model: PreTrainedModel, tokens: TokenSet, dtype: torch.dtype) -> dict[str, Any]:
    """Sizes of the phases, their errors in radians, and errors of outputs, averaged over the stand-ins."""
    seen = inputs(model, tokens)
    found: dict[str, list[float]] = {}
    for name, module in stand_ins(model).items():
        exact, x = copy.deepcopy(module).double(), seen[name]
        bare = exact.normalize and nn.functional.rms_norm(x.double(), (module.width,), eps=module.eps)
        z = bare if isinstance(bare, Tensor) else x.double()
        p, narrow = exact.phase(z), copy.deepcopy(module.phase).to(dtype)
        far = narrow(z.to(dtype)).double() - p
        wide = narrow.float()(z.to(dtype).float()).double() - p
        base = x.double() if module.residual else 0
        true = exact(x.double()) - base
        values = {"phase rms": p.pow(2).mean().sqrt(), "phase max": p.abs().max(),
                  "phase error": far.pow(2).mean().sqrt(), "phase error, float32 product": wide.pow(2).mean().sqrt()}
        for way in WAYS:
            # The sum with the stream is left out: its rounding is the stream's, not the stand-in's.
            alone = copy.deepcopy(module)
            alone.residual = False
            values[way] = error(Wider(alone, way, dtype)(x.to(dtype)), true)
        for key, value in values.items():
            found.setdefault(key, []).append(float(value))
    mlp, x = decoder_layers(model)[2].mlp, seen["mlp"]
    dense = error(copy.deepcopy(mlp).to(dtype)(x.to(dtype)), copy.deepcopy(mlp).double()(x.double()))
    return {key: sum(value) / len(value) for key, value in found.items()} | {"a dense layer's MLP": dense}


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The record."""
    tokenizer = load_tokenizer(BUNDLED_MODEL)
    calibration = load_tokens(bundled_calibration(), tokenizer, samples=64, length=512, seed=0)
    held_out = load_stream(bundled_heldout(), tokenizer, limit=options.tokens)
    rows = []
    for context in ("attention", "none"):
        for bandwidth in map(float, options.bandwidths.split(",")):
            model = fitted(context, bandwidth, calibration, options.keep)
            full = perplexity(model, held_out)
            for dtype in (torch.bfloat16, torch.float16):
                losses = {way: perplexity(narrowed(model, way, dtype), held_out).loss for way in WAYS}
                rows.append({"context": context, "bandwidth": bandwidth, "dtype": str(dtype).removeprefix("torch."),
                             "perplexity": full.value, "loss": full.loss, "tokens": full.tokens, "losses": losses,
                             "errors": errors(model, held_out, dtype)})
                print(json.dumps(rows[-1]), flush=True)
    return {"command": shlex.join(["python", "benchmarks/precision.py", *sys.argv[1:]]), "rows": rows,
            **hardware.facts(torch.device("cpu"))}


def page(record: dict[str, Any]) -> str:
    """Markdown from the record."""
    rows = record["rows"]
    names = [[row["context"], f"{row['bandwidth']:g}", row["dtype"]] for row in rows]
    radians = ("phase rms", "phase max", "phase error", "phase error, float32 product")
    outputs = (*WAYS, "a dense layer's MLP")
    return f"""# Phases in narrow dtypes, {record['hardware']}, {record['month']}

    {record['command']}

Bundled model, blocks {', '.join(f'{a}–{b - 1}' for a, b in BLOCKS)} replaced, fitted in float32 in a few epochs; torch
{record['torch']}. How a stand-in in a narrow dtype may compute its phases:

{chr(10).join(f'- {key}: {value}' for key, value in WAYS.items())}

Phases, in radians (root mean square over held-out states, averaged over stand-ins):

{table(['context', 'bandwidth', 'dtype', *radians],
       [[*name, *(f"{row['errors'][key]:.4g}" for key in radians)] for name, row in zip(names, rows, strict=True)])}

Relative error of what a stand-in puts out, and of the MLP of a dense layer in the same dtype, for comparison:

{table(['context', 'bandwidth', 'dtype', *outputs],
       [[*name, *(f"{row['errors'][key]:.2%}" for key in outputs)] for name, row in zip(names, rows, strict=True)])}

Loss of the whole model in the narrow dtype minus its loss in float32, nats a token, on {rows[0]['tokens']:,} held-out
tokens:

{table(['context', 'bandwidth', 'dtype', 'perplexity, float32', *WAYS],
       [[*name, f"{row['perplexity']:.2f}", *(f"{row['losses'][key] - row['loss']:+.5f}" for key in WAYS)]
        for name, row in zip(names, rows, strict=True)])}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bandwidths", default="2,8,32", help="in units of the median heuristic; the default is 2")
    parser.add_argument("--tokens", type=int, default=16384, help="held-out tokens for the loss")
    parser.add_argument("--keep", type=Path, help="a folder for the fitted models, found there again")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--render", type=Path, help="a record: only write its page")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    file = options.render
    if file is None:
        record = run(options)
        file = Path(__file__).parent / f"precision_{hardware.name(torch.device('cpu'))}_{hardware.month()}.json"
        file.write_text(json.dumps(record, indent=1) + "\n")
    file.with_suffix(".md").write_text(page(json.loads(file.read_text())), encoding="utf-8")


if __name__ == "__main__":
    main()
