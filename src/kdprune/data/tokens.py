"""Calibration and held-out text → token batches.

Text is packed: documents are joined by the end-of-text token and cut into rows of equal length. Where the
tokenizer puts a beginning-of-text token before a text by itself, every row starts with it, as in use.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import BoolTensor, LongTensor, Tensor

from kdprune.data.columns import Columns
from kdprune.data.readers import Piece
from kdprune.data.sources import (
    as_given,
    bundled_calibration,
    bundled_heldout,
    describe,
    gives_ids,
    parse_weighted,
    read_pieces,
    weighted_sources,
)
from kdprune.data.tokenization import flatten, leading_token, padding_id
from kdprune.errors import KDPruneError, one_line
from kdprune.runtime.distributed import World, world
from kdprune.store.files import tell
from kdprune.store.hashing import feed

__all__ = [
    "BUNDLED_SAMPLES",
    "DEFAULT_SAMPLES",
    "TokenSet",
    "bundled_calibration",
    "bundled_heldout",
    "load_stream",
    "load_tokens",
    "parse_weighted",
]

DEFAULT_SAMPLES = 4000  # rows kept for real models
BUNDLED_SAMPLES = 64  # … and for the bundled one, which is there for a first try; its text has 240
LONGEST_ROW = 512  # tokens a row of calibration text, unless the model's context is shorter
MINIMUM_TOKENS = 256  # fewer tokens of text than this are no calibration set
MINIMUM_GIVEN = 32  # fewer given token ids than this, or of held-out text, say nothing
POOL = 4  # rows read of a source for every row kept of it
ENOUGH_ROWS = 16  # with as many full rows the last, partial one is dropped
STREAM_TOKENS = 2**19  # tokens of held-out text that are read at most


@dataclass(frozen=True)
class TokenSet:
    """Rows of token ids with their padding.

    ids: (N, T) int64; mask: (N, T) bool, False where a position is padding; source: what they came from;
    bos: the beginning-of-text token every row starts with, or None; skipped: rows of the text that were null, on the
    way to these tokens.
    """

    ids: LongTensor
    mask: BoolTensor
    source: str
    bos: int | None = None
    skipped: int = 0

    def __len__(self) -> int:
        """Number of rows N."""
        return self.ids.shape[0]

    @property
    def tokens(self) -> int:
        """Number of real tokens."""
        return int(self.mask.sum())

    def identity(self) -> str:
        """A hash of the tokens themselves, whatever file they came from."""
        found = hashlib.sha256(f"{self.source} {self.bos}".encode())  # windows of perplexity start with bos
        for part in (self.ids, self.mask):
            feed(found, part)
        return found.hexdigest()

    def batches(self, size: int) -> Iterator["TokenSet"]:
        """Consecutive parts of at most `size` rows, in order."""
        if size < 1:
            raise KDPruneError(f"got batch size {size}, expected at least 1")
        for start in range(0, len(self), size):
            yield self.select(slice(start, start + size))

    def local(self, size: int) -> "TokenSet":
        """The rows of this process: batches of `size` rows are dealt out to the processes of the run in turn."""
        return self.shares(size)[world().rank] if world().size > 1 else self

    def shares(self, size: int) -> list["TokenSet"]:
        """The rows of every process of the run, by rank."""
        here = world()
        return [self.select(World(rank, here.size).share(len(self), size)) for rank in range(here.size)]

    def held_out(self, share: float) -> int:
        """How many rows at the end a `share` keeps out of fits: at least one, and never all."""
        return min(max(1, round(share * len(self))), len(self) - 1)

    def fitted(self, share: float) -> "TokenSet":
        """The rows that a `share` held out leaves for fits."""
        return self.select(slice(len(self) - self.held_out(share)))

    def watching(self, share: float) -> "TokenSet":
        """The other rows: those that a `share` keeps out of fits."""
        return self.select(slice(len(self) - self.held_out(share), None))

    def first(self, limit: int) -> "TokenSet":
        """The first rows with at most `limit` real tokens, but one row at least."""
        return self.select(slice(max(1, int((self.mask.sum(1).cumsum(0) <= limit).sum()))))

    def rows_of(self, wanted: int) -> int:
        """How many rows, from the first on, hold at least so many real tokens; all where they hold fewer."""
        return min(int((self.mask.sum(1).cumsum(0) < wanted).sum()) + 1, len(self))

    def without(self, others: "TokenSet") -> "TokenSet":
        """The rows that are none of ``others``, which are as long."""
        known = {row.numpy().tobytes() for row in others.ids}
        return self.select(torch.tensor([row.numpy().tobytes() not in known for row in self.ids]))

    def followed_by(self, others: "TokenSet") -> "TokenSet":
        """These rows and those of ``others``, which are as long."""
        ids, mask = torch.cat([self.ids, others.ids]), torch.cat([self.mask, others.mask])
        return TokenSet(ids, mask, self.source, self.bos)  # type: ignore[arg-type]

    def select(self, rows: slice | Tensor) -> "TokenSet":
        """The set of these rows alone: a slice or an int64 tensor of row indices."""
        return TokenSet(self.ids[rows], self.mask[rows], self.source, self.bos)  # type: ignore[arg-type]


def load_tokens(
    source: Any,
    tokenizer: Any,
    *,
    samples: int | None,
    length: int,
    seed: int,
    vocabulary: int | None = None,
) -> TokenSet:
    """Tokens of a calibration source: at most `samples` rows of `length` tokens, shuffled by `seed`.

    source: a file that ``readers`` knows, a directory of them, a hub data set "org/name[:config]", a data set of
    ``datasets``, a list of strings or rows, a mapping {source: weight} or list of pairs (source, weight) (shares of
    rows), or ``InColumn`` of these; or token ids, taken as they are: a LongTensor (N, T), or a mapping with input_ids
    and attention_mask. Conversations go through the tokenizer's chat template. Of every text source at most 4 rows per
    row kept are read; rows that are null are skipped, counted and told. `samples=None` keeps every row; `vocabulary` is
    the number of token ids the model knows. Raises KDPruneError for a source that is missing, unreadable, empty or too
    short, for text without a tokenizer, and for ids outside the vocabulary.
    """
    _check_counts(samples, length)
    generator = torch.Generator().manual_seed(seed)
    if gives_ids(as_given(source)):
        found = _given(as_given(source))
        if samples is not None and len(found) > samples:
            found = found.select(torch.randperm(len(found), generator=generator)[:samples])
        _check_size(found.tokens, found.source, MINIMUM_GIVEN)
    else:
        found = _mixture(source, _needed(tokenizer), samples, length, seed, generator)
    _check_vocabulary(found, vocabulary)
    return found


def load_stream(
    source: Any, tokenizer: Any, *, limit: int = STREAM_TOKENS, vocabulary: int | None = None
) -> TokenSet:
    """Held-out text as one row (1, T) in its own order, T ≤ `limit`, for sliding-window perplexity.

    Takes the sources of :func:`load_tokens` (the texts of a mixture follow each other, whatever their
    weights); token ids stay in their rows. Raises KDPruneError as it does.
    """
    if gives_ids(as_given(source)):
        found = _given(as_given(source))
    else:
        tokenizer = _needed(tokenizer)
        parts, columns = weighted_sources(source), Columns(tokenizer=tokenizer)
        pieces = (piece for part, _ in parts for piece in read_pieces(part, 0, columns))
        bos = leading_token(tokenizer)
        flat = flatten(pieces, tokenizer, limit)
        if bos is not None:
            flat = torch.cat([torch.tensor([bos]), flat[: limit - 1]])
        name = " + ".join(describe(part) for part, _ in parts)
        found = _token_set(flat[None], torch.ones(1, len(flat), dtype=torch.bool), name, bos, _told(columns, name))
    _check_size(found.tokens, found.source, MINIMUM_GIVEN)
    _check_vocabulary(found, vocabulary)
    return found


# ---------------------------------------------------------------------------------------------- text → rows


def _mixture(
    source: Any, tokenizer: Any, samples: int | None, length: int, seed: int, generator: torch.Generator
) -> TokenSet:
    """Rows of every part in its share, shuffled together."""
    parts = weighted_sources(source)
    pools = []
    skipped = 0
    for part, share in parts:
        wanted, columns = None if samples is None else max(1, round(samples * share)), Columns(tokenizer=tokenizer)
        rows = _pack(read_pieces(part, seed, columns), tokenizer, length, wanted, describe(part))
        skipped += _told(columns, describe(part))
        pools.append(rows.select(torch.randperm(len(rows), generator=generator)))
    _check_size(sum(pool.tokens for pool in pools), pools[0].source, MINIMUM_TOKENS)
    counts = _row_counts([len(pool) for pool in pools], [share for _, share in parts], samples)
    kept = [pool.select(slice(0, count)) for pool, count in zip(pools, counts, strict=True)]
    if len(parts) > 1:
        _tell_scarce([(describe(part), share, len(pool)) for (part, share), pool in zip(parts, pools, strict=True)],
                     sum(counts), samples)
        _check_size(sum(one.tokens for one in kept), "the rows that keep the shares of this mixture", MINIMUM_TOKENS)
    ids, mask = torch.cat([part.ids for part in kept]), torch.cat([part.mask for part in kept])
    order = torch.randperm(len(ids), generator=generator)
    used = int(mask.any(0).sum())  # columns that are padding in every row are left out
    name = kept[0].source
    if len(parts) > 1:
        name = " + ".join(f"{describe(part)} ({share:.0%})" for part, share in parts)
    return _token_set(ids[order, :used], mask[order, :used], name, pools[0].bos, skipped)


def _told(columns: Columns, name: str) -> int:
    """How many rows of a text were skipped, which is told if there are any."""
    if columns.skipped and world().first:
        tell(f"{columns.skipped:,} row{'s' * (columns.skipped > 1)} of {name} without text, skipped")
    return columns.skipped


def _tell_scarce(parts: Sequence[tuple[str, float, int]], used: int, samples: int | None) -> None:
    """Says which part, (name, share, rows), leaves fewer rows than are wanted and there are."""
    wanted = min(sum(rows for _, _, rows in parts), samples or 0)
    if used < wanted and world().first:
        name, share, rows = min(parts, key=lambda part: part[2] / part[1])
        tell(f"{name} has {rows:,} rows for {share:.0%} of the mixture, so that {used:,} of {wanted:,} rows are used; "
             "give more of it, or a lower weight")


def _row_counts(available: list[int], shares: list[float], samples: int | None) -> list[int]:
    """How many rows to keep of each part so that the shares hold and no part gives more than it has."""
    if len(available) == 1:
        return [available[0] if samples is None else min(samples, available[0])]
    total = min(count / share for count, share in zip(available, shares, strict=True))
    if samples is not None:
        total = min(total, samples)
    exact = [total * share for share in shares]
    counts = [int(value + 1e-9) for value in exact]
    missing = int(total + 1e-9) - sum(counts)
    by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[:missing]:
        counts[i] += 1
    counts = [min(max(1, count), most) for count, most in zip(counts, available, strict=True)]
    while samples is not None and sum(counts) > samples and max(counts) > 1:  # the row of a tiny share
        counts[counts.index(max(counts))] -= 1
    return counts


def _pack(pieces: Iterator[Piece], tokenizer: Any, length: int, wanted: int | None, name: str) -> TokenSet:
    """Rows (n, length) of a text in order; a partial last row is padded, or dropped if there are enough."""
    bos = leading_token(tokenizer)
    width = length - (bos is not None)
    flat = flatten(pieces, tokenizer, None if wanted is None else wanted * POOL * width)
    full, rest = divmod(len(flat), width)
    enough = full >= (ENOUGH_ROWS if wanted is None else min(wanted, ENOUGH_ROWS))
    if rest < 2 or enough:
        flat, rest = flat[: full * width], 0
    mask = torch.ones(len(flat), dtype=torch.bool)
    if rest:
        missing = width - rest
        flat = torch.cat([flat, flat.new_full((missing,), padding_id(tokenizer))])
        mask = torch.cat([mask, mask.new_zeros(missing)])
    ids, mask = flat.view(-1, width), mask.view(-1, width)
    if not len(ids):
        raise KDPruneError(f"got no text in {name}, expected {MINIMUM_TOKENS} tokens or more; give more text")
    if bos is not None:
        ids = torch.cat([ids.new_full((len(ids), 1), bos), ids], dim=1)
        mask = torch.cat([mask.new_ones(len(mask), 1), mask], dim=1)
    return _token_set(ids, mask, name, bos)


# ---------------------------------------------------------------------------------------------- token ids


def _given(source: Any) -> TokenSet:
    """Token ids as they are: a LongTensor (N, T) or a mapping with input_ids and perhaps attention_mask."""
    ids = source if isinstance(source, Tensor) else _tensor(source["input_ids"], "input_ids")
    kind = f"{str(ids.dtype).removeprefix('torch.')} of shape {tuple(ids.shape)}"
    if ids.ndim != 2 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise KDPruneError(f"got token ids as {kind}, expected int64 of shape (N, T); give a LongTensor")
    mask = torch.ones_like(ids)
    if not isinstance(source, Tensor) and source.get("attention_mask") is not None:
        mask = _tensor(source["attention_mask"], "attention_mask")
    if mask.shape != ids.shape:
        raise KDPruneError(f"got attention_mask of shape {tuple(mask.shape)}, expected {tuple(ids.shape)}")
    ids, mask = ids.detach().cpu().long(), mask.detach().cpu().bool()
    ids = ids.masked_fill(~mask, 0)  # what stands under the mask must be a token the model can look up
    rows = mask.any(1) if ids.numel() else mask.new_zeros(len(ids))
    return _token_set(ids[rows], mask[rows], f"token ids {ids.shape[0]} × {ids.shape[1]}", None)


def _tensor(values: Any, name: str) -> Tensor:
    """Numbers in nested lists, an array or a tensor, as a tensor. Raises KDPruneError for anything else."""
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise KDPruneError(f"got {name} that make no tensor ({one_line(error)}); expected rows of equal length, int64 "
                           "of shape (N, T)") from error


def _token_set(ids: Tensor, mask: Tensor, source: str, bos: int | None, skipped: int = 0) -> TokenSet:
    return TokenSet(ids, mask, source, bos, skipped)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------- checks


def _needed(tokenizer: Any) -> Any:
    if tokenizer is None:
        raise KDPruneError(
            "got text without a tokenizer, expected the model's: put its files beside the model, or give tokenizer= or "
            "token ids (N, T)"
        )
    return tokenizer


def _check_counts(samples: int | None, length: int) -> None:
    if samples is not None and samples < 1:
        raise KDPruneError(f"got samples {samples}, expected at least 1; leave it out to keep the default")
    if length < 2:
        raise KDPruneError(f"got length {length}, expected rows of at least 2 tokens")


def _check_size(tokens: int, source: str, least: int) -> None:
    if tokens < least:
        raise KDPruneError(f"got {tokens} tokens from {source}, expected at least {least}; give more text, or more or "
                           "longer rows of it")


def _check_vocabulary(tokens: TokenSet, vocabulary: int | None) -> None:
    real = tokens.ids[tokens.mask]
    low, high = int(real.min()), int(real.max())
    if low < 0 or (vocabulary is not None and high >= vocabulary):
        wrong, most = (low if low < 0 else high), "" if vocabulary is None else str(vocabulary - 1)
        raise KDPruneError(
            f"got token id {wrong} from {tokens.source}, expected 0 to {most or 'the vocabulary size'}; "
            "use the tokenizer of this model"
        )
