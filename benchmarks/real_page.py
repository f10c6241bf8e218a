"""What the pages on the premise and on the theorems have in common: a model, a record a model, a page made from all."""

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

RESULTS = Path(__file__).parent.parent / "docs" / "results"
Records = list[dict[str, Any]]


def loaded(model_at: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in float32, on a GPU where there is one, and its tokenizer."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(model_at, dtype=torch.float32).to(device).eval()
    return model, AutoTokenizer.from_pretrained(model_at)


def write(record: Mapping[str, Any], file: Path) -> None:
    """The record, six digits a number."""
    rounded = json.loads(json.dumps(record), parse_float=lambda text: float(f"{float(text):.6g}"))
    file.write_text(json.dumps(rounded) + "\n", encoding="utf-8")


def records(page: str) -> Records:
    """What has been measured for a page, a record a model."""
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(RESULTS.glob(f"{page}-*.json"))]


def joined(page: str, parts: list[str]) -> str:
    """The page: its parts and, where there are any, its notes."""
    notes = RESULTS / f"{page}-notes.md"
    return "\n\n".join([*parts, *([notes.read_text(encoding="utf-8").strip()] if notes.is_file() else [])]) + "\n"


def arguments(about: str | None) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """The parser of ``run NAME MODEL TEXTS`` and ``page``, and that of ``run``, for what else it takes."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_subparsers(dest="what", required=True)
    measuring = what.add_parser("run")
    measuring.add_argument("name")
    measuring.add_argument("model")
    measuring.add_argument("texts", type=Path)
    what.add_parser("page")
    return parser, measuring


def publish(page: str, text: Callable[[Records], str], picture: Callable[[Records], str]) -> None:
    """Writes page and picture, where anything has been measured."""
    if found := records(page):
        (RESULTS / f"{page}.svg").write_text(picture(found), encoding="utf-8")
        (RESULTS / f"{page}.md").write_text(text(found), encoding="utf-8")
