"""Pieces of text → one run of token ids."""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kdprune.data.readers import PIECE_CHARACTERS, Piece

BATCH_CHARACTERS = 2**20  # characters given to the tokenizer at once


def flatten(pieces: Iterator[Piece], tokenizer: Any, limit: int | None) -> Tensor:
    """Token ids (T,) of documents joined by the end-of-text token; reading stops once there are `limit`."""
    eos = tokenizer.eos_token_id
    parts: list[Tensor] = []
    found = 0
    for batch in _piece_batches(pieces):
        rows = tokenizer([text for text, _ in batch], add_special_tokens=False, verbose=False)["input_ids"]
        for row, (_, ends) in zip(rows, batch, strict=True):
            ending = [eos] if ends and eos is not None else []
            parts.append(torch.tensor([*row, *ending], dtype=torch.long))
            found += len(parts[-1])
        if limit is not None and found >= limit:
            break
    return torch.cat([torch.empty(0, dtype=torch.long), *parts])[:limit]


def _piece_batches(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    """Pieces with text in them, and the ends of such, in lists of about BATCH_CHARACTERS."""
    batch: list[Piece] = []
    size, inside = 0, False
    for text, ends in itertools.chain.from_iterable(map(_short, pieces)):
        text = text.strip("\n") if ends else text
        if not text.isascii():  # half of a pair of surrogates, as JSON may hold it, is no text
            text = text.encode("utf-8", "replace").decode()
        if text.strip() or (inside and ends):
            batch.append((text, ends))
            size, inside = size + len(text), not ends
        if size > BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _short(piece: Piece) -> Iterator[Piece]:
    """A piece in parts of a bounded length: some documents are longer than what can be tokenised at once."""
    text, ends = piece
    for start in range(0, max(len(text), 1), PIECE_CHARACTERS):
        stop = start + PIECE_CHARACTERS
        yield text[start:stop], ends and stop >= len(text)


def leading_token(tokenizer: Any) -> int | None:
    """The beginning-of-text token, if the tokenizer puts it before a text by itself."""
    bos = tokenizer.bos_token_id
    ids = tokenizer("a")["input_ids"]
    return int(bos) if bos is not None and ids and ids[0] == bos else None


def padding_id(tokenizer: Any) -> int:
    """What fills a row up: the padding token, or that of the end of a text; its positions are masked."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0
