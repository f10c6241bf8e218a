"""Run in a process of its own by test_streaming.py: peak memory of a streamed model beyond what the process has, MiB.

Arguments: a checkpoint, a scratch folder. Prints JSON.
"""

import json
import sys
from pathlib import Path

import torch

from kdprune.data.tokens import TokenSet
from kdprune.model.activations import layer_states
from kdprune.model.streaming import Scratch, load_streamed
from kdprune.runtime.machine import peak_memory_bytes, reset_peak_memory


def main(checkpoint: str, folder: str) -> None:
    torch.set_num_threads(1)
    scratch = Scratch(Path(folder), host_bytes=0)

    def through(top: int, count: int) -> None:
        ids = torch.zeros(count, 64, dtype=torch.long)
        tokens = TokenSet(ids, torch.ones_like(ids).bool(), "zeros")  # type: ignore[arg-type]
        for _ in layer_states(model, tokens, [top - 1, top], 4, scratch=scratch):
            pass

    def above(start: int) -> float:
        return (peak_memory_bytes() - start) / 2**20

    model = load_streamed(checkpoint, device="cpu")
    through(2, 4)  # libraries make room for themselves at their first use
    found = {}
    for name, work in {
        "load": lambda: load_streamed(checkpoint, device="cpu"),
        "layers": lambda: through(model.config.num_hidden_layers, 4),
        "tokens": lambda: through(2, 16),
        "tokens_x10": lambda: through(2, 160),
    }.items():
        assert reset_peak_memory()
        start = peak_memory_bytes()
        work()
        found[name] = above(start)
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
