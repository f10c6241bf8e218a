"""What a training run is made of, and how far it is."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ARCHITECTURES: dict[str, dict[str, Any]] = {      # cpu: 3.5 M parameters, 7 MB in bfloat16; gpu: 7.9 M, 16 MB
    "cpu": {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 16, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 4096},
    "gpu": {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 18, "num_attention_heads": 6,
            "num_key_value_heads": 2, "vocab_size": 4096},
    # The three families of research/small-models: 4 M parameters, and 28–32 M.
    "suite": {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 16, "num_attention_heads": 4,
              "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 8192},
    "suite-gpu": {"hidden_size": 320, "intermediate_size": 864, "num_hidden_layers": 24, "num_attention_heads": 10,
                  "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 8192},
}
BUDGETS: dict[str, dict[str, Any]] = {            # defaults that a command-line option overrides
    "cpu": {"tokens": 15_000_000, "batch": 8, "lr": 4e-3, "compile": False},
    "gpu": {"tokens": 500_000_000, "batch": 128, "lr": 4e-3, "compile": True},
    # On a CPU eager attention is the quicker one at such lengths, compiled code twice as quick; Muon learns more from
    # few tokens.
    "suite": {"tokens": 3_500_000, "batch": 16, "length": 256, "window": 256, "stride": 128, "limit": 30_000,
              "lr": 4e-3, "optimizer": "muon", "attention": "eager", "sample": 0.2, "threads": 1, "compile": True},
    "suite-gpu": {"tokens": 400_000_000, "batch": 128, "lr": 2e-3, "compile": True},
}
FREE_TO_CHANGE = {"data", "out", "held_out", "history", "tokens", "minutes", "threads", "checkpoint_minutes",
                  "window", "stride", "limit"}


@dataclass(frozen=True)
class Settings:
    """What a run is made of; stored in its checkpoint and its card."""

    data: Path
    out: Path
    held_out: tuple[Path, ...] = ()
    preset: str = "cpu"
    tokens: int | None = None            # the run ends with the first budget that is used up
    minutes: float | None = None
    init_from: Path | None = None        # directory of weights and tokenizer to go on from
    history: str = ""                    # what the card says of those weights
    family: str = "llama"                # a row of architectures.py
    tokenizer: Path | None = None        # directory of a tokenizer to use; None: train one
    architecture: dict[str, Any] = field(default_factory=dict)     # replaces single values of the preset
    length: int = 512
    batch: int = 8
    lr: float = 4e-3
    warmup: float = 0.02                 # share of the run
    weight_decay: float = 0.1
    clip: float = 1.0
    sample: float = 1.0                  # share of the documents to train on
    tokenizer_sample: float = 0.1        # share of the documents to train the tokenizer on
    seed: int = 0
    device: str = "cpu"
    compile: bool = False
    optimizer: str = "adamw"             # or muon: for the matrices of the layers, AdamW for the rest
    attention: str = "sdpa"
    threads: int = 0                     # 0: as torch chooses
    record_every: int = 10               # steps between points of the loss curve
    evaluate_every: int = 100            # steps between held-out losses on it
    checkpoint_minutes: float = 5.0
    window: int = 512                    # of the final perplexity
    stride: int = 256
    limit: int = 100_000                 # ids of each held-out file


@dataclass
class Progress:
    """How far a run is."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)

    def share(self, settings: Settings) -> float:
        """The used part of the budget, by tokens or by time, whichever is further."""
        by_tokens = self.tokens / settings.tokens if settings.tokens else 0.0
        by_time = self.seconds / (60 * settings.minutes) if settings.minutes else 0.0
        return max(by_tokens, by_time)


def learning_rate(share: float, peak: float, warmup: float) -> float:
    """Linear warm-up, then a cosine that ends at zero."""
    if share < warmup:
        return peak * max(share, 0.01 * warmup) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * min((share - warmup) / (1 - warmup), 1.0)))
