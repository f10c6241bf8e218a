#!/usr/bin/env python3
"""Train a reference model: tokenizer, packed tokens, training, held-out perplexity, model card.

Usage: python reference/train.py --data ../shared/data/train --out reference-out
The same command run again goes on from the last checkpoint. reference/README.md has the options.
"""

from __future__ import annotations

import argparse
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from architectures import FAMILIES
from card import write_card
from corpus import CorpusError, text_files
from heldout import evaluate
from settings import BUDGETS, Settings
from trainer import Trainer, write_json

PATHS = ("data", "out", "held_out", "init_from", "tokenizer")       # of the machine, not of the run: not recorded


def finish(trainer: Trainer) -> Path:
    """Save the weights in bfloat16, measure those, and write the records and the card beside them."""
    settings, directory = trainer.settings, trainer.settings.out / "model"
    trainer.model.to(torch.bfloat16).save_pretrained(directory)
    trainer.tokenizer.save_pretrained(directory)
    perplexities = evaluate(
        trainer.model.float(), trainer.tokenizer, settings.held_out,
        window=settings.window, stride=settings.stride, limit=settings.limit,
    )
    progress = trainer.progress
    config = trainer.model.config.to_diff_dict()
    record = {
        "settings": {k: v for k, v in asdict(settings).items() if k not in PATHS},
        "sources": [path.name for path in text_files(settings.data)],
        "continued": settings.init_from is not None,
        "config": {k: v for k, v in config.items() if k != "_name_or_path"},
        "parameters": trainer.model.num_parameters(),
        "packed_tokens": len(trainer.windows.ids),
        "steps": progress.step, "tokens": progress.tokens, "seconds": round(progress.seconds),
        "versions": {"torch": str(torch.__version__)},
    }
    write_json(settings.out / "run.json", record)
    write_json(settings.out / "perplexity.json", perplexities)
    write_json(settings.out / "loss_curve.json", progress.curve)
    write_card(directory, record, progress.curve, perplexities)
    return directory


def train(settings: Settings) -> Path | None:
    """Train to the end of the budget and return the model's directory; None where the run was interrupted."""
    trainer = Trainer(settings)

    def stop(*_: object) -> None:
        """End after the step in hand."""
        trainer.stop = True

    handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        complete = trainer.run()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return finish(trainer) if complete else None


def parse(arguments: list[str] | None = None) -> Settings:
    """Settings from the command line; what is not given comes from the preset."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of training text (.txt, .txt.xz)")
    parser.add_argument("--held-out", type=Path, nargs="+",
                        help="held-out files or folders of them (default: DATA/../heldout)")
    parser.add_argument("--out", type=Path, default=Path("reference-out"))
    parser.add_argument("--preset", choices=tuple(BUDGETS), default="cpu")
    parser.add_argument("--family", choices=tuple(FAMILIES), help="architecture (default: llama)")
    parser.add_argument("--tokenizer", type=Path, help="directory of a tokenizer to use instead of training one")
    parser.add_argument("--optimizer", choices=("adamw", "muon"))
    parser.add_argument("--tokens", type=int, help="stop after so many tokens (default: the preset's)")
    parser.add_argument("--minutes", type=float, help="stop after so many minutes of training")
    parser.add_argument("--init-from", type=Path, help="go on from the weights and tokenizer in a directory")
    parser.add_argument("--history", help="what the card says of those weights")
    for name in ("batch", "length", "seed", "threads"):
        parser.add_argument(f"--{name}", type=int)
    for name in ("lr", "warmup", "sample"):
        parser.add_argument(f"--{name}", type=float)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None)
    given: dict[str, Any] = {k: v for k, v in vars(parser.parse_args(arguments)).items() if v is not None}
    beside = given["data"].parent / "heldout"
    held_out = given.pop("held_out", [beside] if beside.is_dir() else [])
    budget = dict(BUDGETS[given["preset"]])
    if "minutes" in given and "tokens" not in given:
        del budget["tokens"]
    return Settings(**(budget | given), held_out=tuple(held_out))


def main() -> int:
    """Run the command; 1 where it was interrupted, 2 where it cannot start."""
    try:
        directory = train(parse())
    except CorpusError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    print(f"model in {directory}" if directory else "stopped; the same command goes on from here")
    return 0 if directory else 1


if __name__ == "__main__":
    sys.exit(main())
