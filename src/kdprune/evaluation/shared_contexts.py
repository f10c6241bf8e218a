"""lm-eval's model wrapper with every context read once, for all answers to it.

Of an answer a_1 … a_n to a context c,

    log p(a | c) = log p(a_1 | c) + Σ_{t=2…n} log p(a_t | c, a_1 … a_{t−1})

a pass over c gives the first term of all of its answers, and a pass over a_1 … a_{n−1} that goes on from the keys and
values of c gives the rest; lm-eval's own pass reads c again for every answer, and has the head score all of it.
Contexts of one length go together, so that none has padding; that of an answer stands behind it, where none sees it.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, TypeVar

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from kdprune.model.losses import last_logits
from kdprune.model.placement import input_device

Request = tuple[tuple[str, str] | None, list[int], list[int]]  # the text, or None, tokens of context and of answer
T = TypeVar("T")
Tokens = tuple[int, ...]
Score = tuple[float, bool]  # summed log-probability in nats, and whether each token is the likeliest


class SharedContexts(HFLM):
    """HFLM, faster where a question has several answers; it reads what it has to itself where keys and values cannot
    be gone on from (states of a recurrence, a cache of the model's own) and requests longer than the model's context.
    """

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Score]:
        pairs = [(tuple(context), tuple(answer)) for _, context, answer in requests]
        answers: dict[Tokens, list[Tokens]] = {}  # of each context; what is asked twice is read once, and ties
        for context, answer in dict.fromkeys(pairs):
            if len(context) + len(answer) <= self.max_length:
                answers.setdefault(context, []).append(answer)
        found: dict[tuple[Tokens, Tokens], Score] = {}
        if answers and self._goes_on():
            contexts = sorted(answers, key=lambda context: (-len(context), context))
            for _, equal in groupby(contexts, key=len):
                for chunk in _batches(list(equal), self.batch_size):
                    found |= self._scored({context: answers[context] for context in chunk})
        rest = [request for request, pair in zip(requests, pairs, strict=True) if pair not in found]
        theirs = iter(super()._loglikelihood_tokens(rest, disable_tqdm, override_bs))
        return [found[pair] if pair in found else next(theirs) for pair in pairs]

    def _goes_on(self) -> bool:
        """Whether a pass leaves keys and values alone behind, of which rows can be taken."""
        ids = torch.zeros(1, 1, dtype=torch.long, device=input_device(self.model))
        past = getattr(self.model(input_ids=ids, use_cache=True), "past_key_values", None)
        return isinstance(past, Cache) and all(
            type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in past.layers)

    def _scored(self, answers: Mapping[Tokens, Sequence[Tokens]]) -> dict[tuple[Tokens, Tokens], Score]:
        """Scores of the answers to contexts of one length."""
        read = self._read(torch.tensor(list(answers)), **last_logits(self.model, 1))
        first = read.logits[:, -1].float().log_softmax(-1)
        pairs = [(row, context, answer) for row, context in enumerate(answers) for answer in answers[context]]
        found = {(context, answer): _score(first[row, None], answer[:1]) for row, context, answer in pairs}
        longer = sorted((pair for pair in pairs if len(pair[2]) > 1), key=lambda pair: -len(pair[2]))
        for batch in _batches(longer, self.batch_size):
            past = copy.deepcopy(read.past_key_values)  # a pass writes into it
            past.reorder_cache(torch.tensor([row for row, _, _ in batch]))
            ids = pad_sequence([torch.tensor(answer[:-1]) for _, _, answer in batch], batch_first=True)
            logits = self._read(ids, past_key_values=past).logits
            for (_, context, answer), places in zip(batch, logits, strict=True):
                start = found[context, answer]
                rest = _score(places[: len(answer) - 1].float().log_softmax(-1), answer[1:])
                found[context, answer] = start[0] + rest[0], start[1] and rest[1]
        return found

    def _read(self, ids: Tensor, **options: Any) -> Any:
        return self.model(input_ids=ids.to(input_device(self.model)), use_cache=True, **options)


def _score(likely: Tensor, answer: Tokens) -> Score:
    """Of log-probabilities (n, V) of what comes at each of n places, and of the tokens that are there."""
    tokens = torch.tensor(answer, device=likely.device)
    return float(likely.gather(1, tokens[:, None]).sum()), bool((likely.argmax(-1) == tokens).all())


def _batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[first : first + size] for first in range(0, len(items), size))
