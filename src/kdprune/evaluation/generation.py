"""What two models write after the same beginnings: how long it stays the same text, and how much repeats itself.

With x_1 … x_n the greedy continuation by the dense model of one prompt and y_1 … y_n the pruned model's:

    same beginning = (j − 1) / n, j the first place with x_j ≠ y_j, n + 1 where there is none
    same tokens    = #{j : x_j = y_j} / n
    repeated       = share of the runs of four tokens y_j … y_{j+3}, j = 1 … n − 3, that stood before in y

The last is 1 − distinct-4 (Li et al. 2016, arXiv:1510.03055) of one continuation, over its runs. An end of text is a
token like others, so that all continuations are n tokens long.
"""

from collections.abc import Sequence

import torch
from torch import LongTensor, Tensor
from transformers import PreTrainedModel

from kdprune.data.tokens import TokenSet
from kdprune.errors import KDPruneError
from kdprune.evaluation.models import evaluating, longest_context
from kdprune.evaluation.speed import carried
from kdprune.model.losses import last_logits
from kdprune.model.placement import input_device
from kdprune.report.task_records import Generation

PROMPT, NEW_TOKENS = 64, 64  # of each continuation; less where the context is shorter
RUN = 4  # tokens of what counts as repeated
BATCH = 64  # prompts at once


def sizes(model: PreTrainedModel) -> tuple[int, int]:
    """Tokens of a prompt and of its continuation: 64 each, or what the context has room for, half and half."""
    longest = longest_context(model) or PROMPT + NEW_TOKENS + 1
    new = max(1, min(NEW_TOKENS, longest // 2))
    return max(1, min(PROMPT, longest - new - 1)), new


def prompts_of(texts: Sequence[TokenSet], count: int, length: int) -> LongTensor:
    """Beginnings to be continued: the texts in turn, evenly spread over each.

    A text's rows are cut into pieces of ``length`` tokens, the leading token left out and put before every prompt; of a
    text of many rows as long as a prompt, these are the beginnings of its rows.

    Args:
        texts: held-out texts of one tokenizer.
        count: how many prompts, over all texts.
        length: tokens a prompt.

    Returns:
        Token ids (count, length), or one column more where rows start with a beginning-of-text token.

    Raises:
        KDPruneError: a text is too short for its share.
    """
    found: list[Tensor] = []
    for number, text in enumerate(texts):
        share = len(range(number, count, len(texts)))
        first = int(text.bos is not None)
        pieces = [piece for ids, mask in zip(text.ids, text.mask, strict=True)
                  for piece in ids[mask][first:].split(length) if len(piece) == length]
        if len(pieces) < share:
            raise KDPruneError(f"got {text.tokens:,} tokens of {text.source}, expected {share} prompts of {length} "
                               "tokens in them; give more text (heldout_tokens), or generate fewer")
        chosen = [pieces[place * len(pieces) // share] for place in range(share)]
        lead = text.ids.new_tensor([text.bos] if first else [])
        found += [torch.cat([lead, piece]) for piece in chosen]
    return torch.stack(found)  # type: ignore[return-value]


@torch.no_grad()
def continuations(model: PreTrainedModel, prompts: Tensor, new_tokens: int) -> LongTensor:
    """Greedy continuations (N, new_tokens) of prompts (N, T), on the CPU: one pass over the prompts, then one a token.

    Not ``generate``: that fills in what the checkpoint's generation config holds, an end of text or a penalty on
    repetition (1.1 in some), under which a continuation is no longer the model's most probable token after the other.
    The model's mode is as before afterwards.
    """
    options = last_logits(model, 1)
    parts = []
    with evaluating(model):
        for ids in prompts.split(BATCH):
            output = model(input_ids=ids.to(input_device(model)), use_cache=True, **options)
            written = [output.logits[:, -1:].argmax(-1)]
            while len(written) < new_tokens:
                token = written[-1].to(input_device(model))
                output = model(input_ids=token, **carried(output), use_cache=True, **options)
                written.append(output.logits[:, -1:].argmax(-1))
            parts.append(torch.cat(written, 1).cpu())
    return torch.cat(parts)  # type: ignore[return-value]


def compared(dense: Tensor, pruned: Tensor, prompt: int) -> Generation:
    """The measures of continuations (N, n) by the pruned model against the dense one's; ``prompt``: its tokens."""
    same = dense == pruned
    return Generation(
        prompt=prompt, new_tokens=dense.shape[1], same_beginning=same.cumprod(1).double().mean(1).tolist(),
        same_tokens=same.double().mean(1).tolist(), repeated=[repetition(row) for row in pruned])


def repetition(tokens: Tensor) -> float:
    """Share of the runs of four tokens of one continuation (n,) that stood before in it; 0 where there is no run."""
    runs = tokens.unfold(0, RUN, 1) if len(tokens) >= RUN else tokens.new_empty(0, RUN)
    return 1 - len(runs.unique(dim=0)) / len(runs) if len(runs) else 0.0
