"""Loads checkpoints with vLLM, one after the other, and writes what each generates: run in a process of its own.

    python offline.py PROMPTS.json OUT.jsonl '{"enforce_eager": true}' DIR …

One line a checkpoint: {"directory", "texts": [{"ids", "logs"}, …]} or {"directory", "error"}; with --without-kdprune it
also fails where kdprune is imported.
"""

import gc
import json
import sys
import time
from pathlib import Path


def main(prompts_path: str, out_path: str, options: str, *directories: str) -> None:
    """As above."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    prompts = [{"prompt_token_ids": ids} for ids in json.loads(Path(prompts_path).read_text())]
    settings = json.loads(options)
    alone = settings.pop("without_kdprune", False)
    sampling = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=0)
    with open(out_path, "a", encoding="utf-8") as out:
        for directory in directories:
            began, record, server = time.perf_counter(), {"directory": directory}, None
            try:
                server = LLM(
                    directory, dtype="float32", max_model_len=512, max_num_batched_tokens=128, max_num_seqs=8,
                    kv_cache_memory_bytes=64 << 20, distributed_executor_backend="uni", seed=0, **settings)
                rounds = [server.generate(prompts, sampling, use_tqdm=False) for _ in range(2)]  # cold, warm
                record["rounds"] = [[
                    {"ids": list(answer.outputs[0].token_ids),
                     "logs": [next(iter(step.values())).logprob for step in answer.outputs[0].logprobs]}
                    for answer in answers] for answers in rounds]
            except Exception as error:
                record["error"] = f"{type(error).__name__}: {error}"
            if alone and "kdprune" in sys.modules:
                record["error"] = "kdprune was imported"
            record["seconds"] = round(time.perf_counter() - began, 1)
            out.write(json.dumps(record) + "\n")
            out.flush()
            del server
            cleanup_dist_env_and_memory()
            gc.collect()


if __name__ == "__main__":
    main(*sys.argv[1:])
