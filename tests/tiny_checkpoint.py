"""A tiny Llama on disk with a byte-level tokenizer of its own, and text to prune it with."""

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kdprune.cli import main
from kdprune.data.tokens import bundled_calibration
from kdprune.report import comparison_page
from kdprune.run import pipeline

END, WORDS, CONTEXT, WIDTH = "<|endoftext|>", 320, 64, 32
# Options of a method that has nothing to learn here: seconds, not figures. Measuring the damage of blocks takes a third
# of a run: tests that are about it, about kills or about several processes ask for it (DAMAGE).
QUICK: dict[str, Any] = {
    "kernel_epochs": 1, "kernel_tokens": 64, "refine_epochs": 1, "inverse_epochs": 1, "channels": 8, "rank": 2,
    "protect": 0.0, "ranking": "similarity",
}
DAMAGE = ("--ranking", "damage")


@dataclass(frozen=True)
class Bench:
    """Paths of the checkpoint and of two texts, in a directory of their own."""

    model: Path
    calibration: Path
    heldout: Path

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of a quick ``kdprune.prune``."""
        return {**QUICK, "calibration": self.calibration, "heldout": self.heldout, "samples": 12, "length": 32}

    @property
    def flags(self) -> list[str]:
        """The same for the command line."""
        return [text for name, value in self.options.items() for text in ("--" + name.replace("_", "-"), str(value))]


@dataclass(frozen=True)
class Outcome:
    """What a command returned and wrote."""

    status: int
    out: str
    err: str


@contextlib.contextmanager
def no_drawing() -> Iterator[None]:
    """Three quarters of a tiny run draw the report's pictures: not where a test is about something else."""
    with pytest.MonkeyPatch.context() as patch:
        for write in ("write_page", "write_analysis"):
            patch.setattr(pipeline, write, lambda results, path: Path(path).write_text("no pictures"))
        patch.setattr(comparison_page, "pictures", lambda comparison: [])
        yield


def command(*arguments: object) -> Outcome:
    """Runs ``kdprune`` with these arguments in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([str(argument) for argument in arguments])
    return Outcome(status, out.getvalue(), err.getvalue())


def prune(bench: Bench, work: Path | str, out: Path, *flags: object) -> Outcome:
    """``kdprune prune`` on the tiny checkpoint with a work directory, or "none"."""
    return command("prune", bench.model, "-o", out, "--work-dir", work, *bench.flags, *flags)


def pruned_well(bench: Bench, work: Path | str, out: Path, *flags: object) -> Outcome:
    """The same where it has to succeed."""
    outcome = prune(bench, work, out, *flags)
    assert outcome.status == 0, outcome.err
    return outcome


def same_bits(first: Path, second: Path) -> bool:
    """Whether two saved models hold the same tensors, bit for bit."""
    one, two = (load_file(folder / "model.safetensors") for folder in (first, second))
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def tiny_llama(layers: int = 6, **options: Any) -> LlamaForCausalLM:
    """A seeded random Llama whose layers matter: width 32, 64 positions."""
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=CONTEXT, initializer_range=0.15, bos_token_id=0, eos_token_id=0,
        pad_token_id=0, **options)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def tiny_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on ``text``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=WORDS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=[END],
        show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def build_bench(directory: Path) -> Bench:
    """Writes the checkpoint and the texts."""
    text = bundled_calibration().read_text(encoding="utf-8")
    bench = Bench(directory / "model", directory / "calibration.txt", directory / "heldout.txt")
    tiny_llama().save_pretrained(bench.model)
    tiny_tokenizer(text[:20_000]).save_pretrained(bench.model)
    bench.calibration.write_text(text[:6000], encoding="utf-8")
    bench.heldout.write_text(text[6000:9000], encoding="utf-8")
    return bench


def random_ids(rows: int = 12, length: int = 32, seed: int = 0) -> torch.Tensor:
    """Token ids (rows, length) the tiny model knows, without the padding id, whose embedding is zero."""
    return torch.randint(1, WORDS, (rows, length), generator=torch.Generator().manual_seed(seed))


def tree(directory: Path) -> dict[str, bytes | None]:
    """Every entry below a directory, hidden ones too, with the content of files."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None
        for path in sorted(directory.rglob("*"))
    }
