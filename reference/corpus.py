"""Training text: documents → tokenizer → one flat array of token ids → windows in a seeded order."""

from __future__ import annotations

import lzma
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

SEPARATOR = "<|endoftext|>"
BOS, EOS = "<s>", "</s>"


class CorpusError(ValueError):
    """The training text cannot be used as asked."""


def text_files(folder: Path) -> list[Path]:
    """The text files of a folder, compressed or not, by name; a file stands for itself."""
    if folder.is_file():
        return [folder]
    files = sorted(path for path in folder.glob("*") if path.name.endswith((".txt", ".txt.xz")))
    if not files:
        raise CorpusError(f"no .txt or .txt.xz file in {folder}")
    return files


def documents(path: Path) -> Iterator[str]:
    """The documents of one file, in order, without surrounding blank space."""
    open_text = lzma.open if path.suffix == ".xz" else open
    lines: list[str] = []
    with open_text(path, "rt", encoding="utf-8") as file:
        for line in file:
            if line.strip() != SEPARATOR:
                lines.append(line)
                continue
            if text := "".join(lines).strip():
                yield text
            lines = []
    if text := "".join(lines).strip():
        yield text


def sampled(files: Sequence[Path], share: float, seed: int) -> Iterator[str]:
    """Each document of every file, kept with probability `share`."""
    generator = random.Random(seed)
    for path in files:
        for text in documents(path):
            if generator.random() < share:
                yield text


def train_tokenizer(texts: Iterator[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: no unknown token, no normalisation, nothing added around a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=EOS,
        clean_up_tokenization_spaces=False,
    )


def batched(texts: Iterator[str], characters: int = 4_000_000) -> Iterator[list[str]]:
    """Documents in groups of about so many characters."""
    group, size = [], 0
    for text in texts:
        group.append(text)
        size += len(text)
        if size >= characters:
            yield group
            group, size = [], 0
    if group:
        yield group


def encode(texts: Iterator[str], tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """All documents one after another as uint16 ids, `</s>` after each."""
    if len(tokenizer) > 2**16:
        raise CorpusError(f"a vocabulary of {len(tokenizer)} does not fit 16-bit token ids")
    parts: list[np.ndarray] = []
    for group in batched(texts):
        for ids in tokenizer(group, add_special_tokens=False, verbose=False)["input_ids"]:
            parts.append(np.asarray([*ids, tokenizer.eos_token_id], dtype=np.uint16))
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint16)


def packed(path: Path, texts: Iterator[str], tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """The training ids: read from `path` if they are there, else encoded and stored there."""
    if not path.exists():
        partial = path.with_suffix(".partial.npy")
        np.save(partial, encode(texts, tokenizer))
        os.replace(partial, path)
    return np.load(path, mmap_mode="r")


class Windows:
    """Windows of `length` + 1 ids; every window once an epoch, each epoch in its own order and offset.

    `batch(step)` depends on the arguments and the step alone, so that a resumed run sees what an
    uninterrupted one would.
    """

    def __init__(self, ids: np.ndarray, length: int, batch: int, seed: int) -> None:
        """Refuse ids that do not fill one batch."""
        self.ids, self.length, self.size, self.seed = ids, length, batch, seed
        self.count = (len(ids) - 1) // length - 1      # one window is spent on the epoch's offset
        if self.count < batch:
            raise CorpusError(f"{len(ids)} training tokens are too few for a batch of {batch} × {length}")
        self._epoch, self._starts = -1, np.zeros(0, dtype=np.int64)

    def _order(self, epoch: int) -> np.ndarray:
        """Where each window of an epoch starts."""
        if epoch != self._epoch:
            generator = np.random.default_rng((self.seed, epoch))
            offset = int(generator.integers(self.length))
            self._epoch, self._starts = epoch, offset + self.length * generator.permutation(self.count)
        return self._starts

    def batch(self, step: int) -> torch.Tensor:
        """Ids (batch, length + 1) of one step."""
        epoch, place = divmod(step, self.count // self.size)
        starts = self._order(epoch)[place * self.size : (place + 1) * self.size]
        rows = [self.ids[start : start + self.length + 1] for start in starts]
        return torch.from_numpy(np.stack(rows).astype(np.int64))
