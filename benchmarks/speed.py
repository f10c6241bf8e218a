"""How much faster is a pruned model than the dense one, against what its operations promise?

    python benchmarks/speed.py --threads 1                                  on a CPU
    python benchmarks/speed.py --device cuda --dtype bfloat16 --prompt 512  on a GPU, every model whole
    python benchmarks/speed.py --render benchmarks/speed_….json             the page again, from the record

Weights are random: speed does not depend on them. Blocks are those that KDP's own selection takes for 25 % net when
similarity falls evenly with distance, stand-ins those of its default ("context") and of context=none ("token-wise"),
spare budget spent. Whole: the models themselves take turns. Parts: models of one and two layers take turns, and the
time of deep ones is put together from theirs, ends + Σ layers. Prefill reads --prompt tokens a sequence, decode writes
one more behind them; both give the last position's logits. On one CPU thread seconds are those of the processor, which
other work on the machine does not lengthen; elsewhere they are those of the clock.
"""

import argparse
import itertools
import json
import shlex
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hardware
import torch
from speed_page import page
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, StaticCache

from kdprune.data.sources import BUNDLED_MODEL
from kdprune.evaluation.flops import forward_flops
from kdprune.evaluation.speed import kv_cache_bytes_per_token
from kdprune.methods.common.shape import Shape
from kdprune.methods.kdp.kdp import KDP
from kdprune.model.edits import Drop, Substitute
from kdprune.model.surgery import apply_edits, context_layer
from kdprune.planning.meta import layout
from kdprune.runtime.machine import generator, resolve_device

# What differs from a Llama with these widths; "bundled" has the config of the model that comes with the package.
SHAPES: dict[str, dict[str, Any]] = {
    "bundled": {},
    "0.1b": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 2048},
    "1b": {"hidden_size": 2048, "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4,
           "intermediate_size": 5632},
    "7b": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008},
}
FORMS: dict[str, dict[str, Any]] = {
    "context": {"kernel": "learned"}, "token-wise": {"kernel": "learned", "context": "none"}}
WHOLE = 200_000_000  # parameters up to which a CPU measures eager models whole
STEPS = 4  # decode steps a turn
NUMBERS = itertools.count()


def build(shape: str, layers: int | None, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A dense model with random weights, of its own depth or another."""
    config = AutoConfig.from_pretrained(BUNDLED_MODEL)
    if SHAPES[shape]:
        config = AutoConfig.for_model("llama", vocab_size=32000, max_position_embeddings=4096, **SHAPES[shape])
    config.num_hidden_layers = layers or config.num_hidden_layers
    torch.manual_seed(0)
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def plan(dense: PreTrainedModel, form: str, ratio: float) -> tuple[list[range], Shape]:
    """The blocks and stand-ins that KDP takes for a net ratio."""
    return layout(KDP(ratio=ratio, **FORMS[form]), dense)


def prune(dense: PreTrainedModel, blocks: list[range], shape: Shape) -> PreTrainedModel:
    """``dense`` with random stand-ins in the place of blocks; kept weights are shared."""
    edits = []
    for block in blocks:
        stand_in = shape.build(generator(block.start))
        source = shape.source(block)
        context = None if source is None else context_layer(dense, source, stand_in)
        edits.append(Substitute(block, stand_in, context, source))
    return apply_edits(dense, edits).eval()


class Models:
    """The models of one shape that take turns, and how their seconds make up those of the dense and the pruned ones.

    Attributes:
        outlines: the models of full depth, on meta: "dense" and every form. plans: blocks and stand-ins of every form.
        measured: what takes turns: the outlines with weights, or "one", "two" layers and one layer with a stand-in.
    """

    def __init__(self, shape: str, forms: list[str], ratio: float, whole: bool, device: torch.device,
                 dtype: torch.dtype):
        outline = build(shape, None, torch.device("meta"), dtype)
        self.layers, self.whole = outline.config.num_hidden_layers, whole
        self.plans = {form: plan(outline, form, ratio) for form in forms}
        self.outlines = {"dense": outline, **{form: prune(outline, *self.plans[form]) for form in forms}}
        dense = build(shape, None if whole else 2, device, dtype)
        self.cache_bytes = kv_cache_bytes_per_token(dense) // len(dense.model.layers)
        if whole:
            self.measured = {"dense": dense, **{form: prune(dense, *self.plans[form]) for form in forms}}
        else:
            second = range(1, 2)
            self.measured = {"two": dense, "one": apply_edits(dense, [Drop(second)]).eval()}
            self.measured |= {form: prune(dense, [second], self.plans[form][1]) for form in forms}

    def seconds(self, timed: dict[str, list[float]], name: str) -> list[float]:
        """Seconds of every turn at full depth, of "dense" or a form; parts: ends + layer · kept + stand-ins."""
        if self.whole:
            return timed[name]
        found = []
        for turn, (one, two) in enumerate(zip(timed["one"], timed["two"], strict=True)):
            layer = two - one
            total = one + (self.layers - 1) * layer
            if name != "dense":
                blocks = self.plans[name][0]
                total += len(blocks) * (timed[name][turn] - one) - sum(map(len, blocks)) * layer
            found.append(total)
        return found


def compile_alone(model: PreTrainedModel) -> Callable[..., Any]:
    """``model`` compiled as one graph. Compiled graphs hang on the code of the function they were made from: with one
    of its own, a call does not have to look through the other models' graphs for its own."""

    def call(ids: torch.Tensor, **options: Any) -> Any:
        return model(ids, **options)

    call.__code__ = call.__code__.replace(co_name=f"call_{next(NUMBERS)}")
    return torch.compile(call, dynamic=False, fullgraph=True)


class Runner:
    """One model with its cache, eager or compiled: one turn reads the prompts, then writes some tokens."""

    def __init__(self, model: PreTrainedModel, compiled: bool, batch: int, prompt: int):
        self.ids = torch.randint(model.config.vocab_size, (batch, prompt), device=model.device)
        # A growing cache is a new shape every step: compiled models get one of fixed size, as generate gives them.
        self.cache = StaticCache(model.config, prompt + STEPS) if compiled else None
        self.read, self.write = (compile_alone(model), compile_alone(model)) if compiled else (model, model)
        self.now = hardware.Clock(model.device).now

    @torch.no_grad()
    def turn(self) -> tuple[float, float]:
        """Seconds to read the prompts, and to write one token after them (median of STEPS)."""
        if self.cache is not None:
            self.cache.reset()
        start = self.now()
        output = self.read(self.ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        read, steps = self.now() - start, []
        for _ in range(STEPS):
            token = output.logits[:, -1:].argmax(-1)
            start = self.now()
            output = self.write(token, past_key_values=output.past_key_values, use_cache=True, logits_to_keep=1)
            steps.append(self.now() - start)
        return read, statistics.median(steps)


def measure(models: Models, compiled: bool, batch: int, prompt: int, budget: float) -> list[dict[str, Any]]:
    """Rows of the record, one a form and pass; turns go on for ``budget`` seconds, but at least five."""
    torch.compiler.reset()
    runners = {name: Runner(model, compiled, batch, prompt) for name, model in models.measured.items()}
    for runner in runners.values():  # compile, then once more for what is guarded, then to warm up
        for _ in range(3 if compiled else 1):
            runner.turn()
    timed: dict[str, dict[str, list[float]]] = {way: {name: [] for name in runners} for way in ("prefill", "decode")}
    start, turns = time.perf_counter(), 0
    while turns < 5 or (time.perf_counter() - start < budget and turns < 200):
        for name in sorted(runners, reverse=bool(turns % 2)):
            for way, seconds in zip(("prefill", "decode"), runners[name].turn(), strict=True):
                timed[way][name].append(seconds)
        turns += 1
    rows = []
    for form, (blocks, stand_in) in models.plans.items():
        for way, tokens, past in (("prefill", prompt, 0), ("decode", 1, prompt)):
            dense, pruned = (models.seconds(timed[way], name) for name in ("dense", form))
            low, ratio, high = statistics.quantiles([a / b for a, b in zip(dense, pruned, strict=True)], n=4)
            operations = {name: forward_flops(models.outlines[name], batch, tokens, past) for name in ("dense", form)}
            rows.append({
                "form": form, "pass": way, "batch": batch, "prompt": prompt, "compiled": compiled,
                "whole": models.whole, "turns": turns, "speedup": ratio, "quartiles": [low, high],
                "seconds": {"dense": statistics.median(dense), "pruned": statistics.median(pruned)},
                "flops": {"dense": operations["dense"], "pruned": operations[form]},
                "ideal": operations["dense"] / operations[form],
                "blocks": [[block.start, block.stop] for block in blocks], "features": stand_in.features,
                "net_ratio": 1 - models.outlines[form].num_parameters() / models.outlines["dense"].num_parameters(),
                "cache_bytes": {name: models.cache_bytes * models.outlines[key].config.num_hidden_layers
                                for name, key in (("dense", "dense"), ("pruned", form))},
            })
    return rows


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The record."""
    device, dtype = resolve_device(options.device), getattr(torch, options.dtype)
    facts = {"command": shlex.join(["python", "benchmarks/speed.py", *sys.argv[1:]]),
             "ratio": options.ratio, **hardware.facts(device)}
    modes = options.modes.split(",")
    if device.type == "cpu" and "compiled" in modes and not shutil.which("g++"):
        modes.remove("compiled")
        facts["skipped"] = "torch.compile: no C++ compiler (g++) on this machine"
    rows = []
    for shape in options.shapes.split(","):
        size = build(shape, None, torch.device("meta"), dtype).num_parameters()
        for mode in modes:
            whole = device.type != "cpu" or (size < WHOLE and mode == "eager")
            models = Models(shape, options.forms.split(","), options.ratio, whole, device, dtype)
            for batch in map(int, options.batches.split(",")):
                found = measure(models, mode == "compiled", batch, options.prompt, options.seconds)
                rows += [{"shape": shape, "dtype": options.dtype, **row} for row in found]
                for row in found:
                    print(shape, mode, f"batch {batch}", row["form"], row["pass"], f"×{row['speedup']:.3f}",
                          f"of ideal ×{row['ideal']:.3f}: {row['speedup'] / row['ideal']:.3f}", flush=True)
    return {**facts, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--forms", default=",".join(FORMS))
    parser.add_argument("--modes", default="eager,compiled")
    parser.add_argument("--batches", default="1,16")
    parser.add_argument("--prompt", type=int, default=128, help="tokens read, and cached in decode")
    parser.add_argument("--seconds", type=float, default=10.0, help="of turns for every table row pair")
    parser.add_argument("--ratio", type=float, default=0.25)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, help="of a CPU")
    parser.add_argument("--add", action="store_true", help="keep the record's rows that this run does not measure")
    parser.add_argument("--render", type=Path, help="a record: only write its page")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    file = options.render
    if file is None:
        record = run(options)
        file = Path(__file__).parent / f"speed_{hardware.name(resolve_device(options.device))}_{hardware.month()}.json"
        record = merged(json.loads(file.read_text()), record) if options.add and file.is_file() else record
        file.write_text(json.dumps(record, indent=1) + "\n")
    file.with_suffix(".md").write_text(page(json.loads(file.read_text())), encoding="utf-8")


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The new record with the old one's other rows; both commands are named."""

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row[name] for name in ("dtype", "shape", "compiled", "form", "pass", "batch"))

    fresh = {key(row) for row in new["rows"]}
    return {**new, "command": f"{old['command']}\n{new['command']}",
            "rows": [row for row in old["rows"] if key(row) not in fresh] + new["rows"]}


if __name__ == "__main__":
    main()
