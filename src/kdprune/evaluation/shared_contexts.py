"""lm-eval's model wrapper with every context read once, for all answers to it.

Of an answer a_1 … a_n to a context c,

    log p(a | c) = Σ_{t=1…n} log p(a_t | c, a_1 … a_{t−1})

a pass over c gives the first term of all of its answers, and a pass over a_1 … a_{n−1} that goes on from the keys and
values of c gives the rest; lm-eval's own pass reads c again for every answer, and has the head score all of it.
Contexts of about one length go together: read are as many tokens of each as the shortest has, so that none has padding,
and what a longer one has beyond them is read with each of its answers.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import groupby
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from kdprune.model.losses import last_logits
from kdprune.model.placement import input_device

STEP = {"cpu": 1, "accelerator": 16}  # lengths of contexts that go together: fewer tokens, or fewer passes
Request = tuple[tuple[str, str] | None, list[int], list[int]]  # the text, or None, tokens of context and of answer
T = TypeVar("T")
Tokens = tuple[int, ...]
Score = tuple[float, bool]  # summed log-probability in nats, and whether each token is the likeliest


class _Asked(NamedTuple):
    """An answer to the context of a row."""

    row: int
    context: Tokens
    answer: Tokens

    @property
    def read(self) -> int:
        """Tokens that are read: all but the last."""
        return len(self.context) + len(self.answer) - 1


class SharedContexts:
    """In front of lm-eval's ``HFLM``, which takes seconds to import: faster where a question has several answers or the
    vocabulary is large.

    It reads as HFLM does where keys and values cannot be gone on from (states of a recurrence, a cache of the model's
    own), requests that are longer than the model's context or than the rotations of its first positions reach, those
    that HFLM refuses, and contexts of which it would not read less.
    """

    model: Any
    max_length: int
    batch_size: int

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Score]:
        pairs = [(tuple(context), tuple(answer)) for _, context, answer in requests]
        answers: dict[Tokens, list[Tokens]] = {}  # of each context; what is asked twice is read once, and ties
        for context, answer in dict.fromkeys(pairs):
            if context and answer and len(context) + len(answer) <= self._longest:
                answers.setdefault(context, []).append(answer)
        found: dict[tuple[Tokens, Tokens], Score] = {}
        if answers and self._goes_on:
            contexts = sorted(answers, key=lambda context: (-len(context), context))
            for _, alike in groupby(contexts, key=lambda context: len(context) // self._step):
                for chunk in _batches(list(alike), self.batch_size):
                    found |= self._scored({context: answers[context] for context in chunk})
        rest = [request for request, pair in zip(requests, pairs, strict=True) if pair not in found]
        theirs = iter(super()._loglikelihood_tokens(rest, disable_tqdm, override_bs))  # type: ignore[misc]
        return [found[pair] if pair in found else next(theirs) for pair in pairs]

    @property
    def _longest(self) -> int:
        """Tokens up to which keys do not depend on how many follow: "longrope" has two sets of factors."""
        first = getattr(self.model.config, "original_max_position_embeddings", None)
        return min(self.max_length, first or self.max_length)

    @property
    def _step(self) -> int:
        """Lengths of contexts that go together."""
        return STEP["cpu" if input_device(self.model).type == "cpu" else "accelerator"]

    @cached_property
    def _goes_on(self) -> bool:
        """Whether a pass leaves keys and values alone behind, of which rows can be taken."""
        ids = torch.zeros(1, 1, dtype=torch.long, device=input_device(self.model))
        past = getattr(self.model(input_ids=ids, use_cache=True), "past_key_values", None)
        return isinstance(past, Cache) and all(
            type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in past.layers)

    def _scored(self, answers: Mapping[Tokens, Sequence[Tokens]]) -> dict[tuple[Tokens, Tokens], Score]:
        """Scores of the answers to contexts of about one length; none where this would not read less."""
        shared = min(map(len, answers))
        asked = sorted((_Asked(row, context, answer) for row, context in enumerate(answers)
                        for answer in answers[context]), key=lambda one: -one.read)
        batches = list(_batches([one for one in asked if one.read > shared], self.batch_size))
        behind = sum(len(batch) * (batch[0].read - shared) for batch in batches)  # with padding
        # Positions of the layers and of the head, which both weigh alike here.
        if len(answers) * (shared + 1) + 2 * behind >= 2 * sum(one.read for one in asked):
            return {}
        read = self._pass(torch.tensor([context[:shared] for context in answers]), **last_logits(self.model, 1))
        last = read.logits[:, -1:]
        whole = [one for one in asked if one.read == shared]
        found = dict(zip(whole, _scores([last[one.row] for one in whole], whole), strict=True))
        for batch in batches:
            past = copy.copy(read.past_key_values)  # a pass puts new tensors into its layers, and writes into none
            past.layers = [copy.copy(layer) for layer in past.layers]
            past.reorder_cache(torch.tensor([one.row for one in batch]))
            tails = [torch.tensor((one.context + one.answer)[shared:-1]) for one in batch]
            logits = self._pass(pad_sequence(tails, batch_first=True), past_key_values=past).logits
            # From the last shared place on, those in front of the answer.
            places = [torch.cat([last[one.row], rows[: len(tail)]])[len(one.context) - shared :]
                      for one, tail, rows in zip(batch, tails, logits, strict=True)]
            found |= zip(batch, _scores(places, batch), strict=True)
        return {(one.context, one.answer): score for one, score in found.items()}

    def _pass(self, ids: Tensor, **options: Any) -> Any:
        return self.model(input_ids=ids.to(input_device(self.model)), use_cache=True, **options)


def _scores(logits: Sequence[Tensor], asked: Sequence[_Asked]) -> list[Score]:
    """Of logits (n, V) at the n places in front of each answer's tokens; the device is waited for once, not at each."""
    if not asked:
        return []
    padded = pad_sequence([torch.tensor(one.answer) for one in asked], batch_first=True).to(logits[0].device)
    found = []
    for one, row in zip(logits, padded, strict=True):
        likely, tokens = one.float().log_softmax(-1), row[: len(one)]
        greedy = (likely.argmax(-1) == tokens).all()
        found.append(torch.stack((likely.gather(1, tokens[:, None]).sum(), greedy.float())))
    return [(total, bool(greedy)) for total, greedy in torch.stack(found).tolist()]


def _batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[first : first + size] for first in range(0, len(items), size))
