"""Floating-point operations of a forward pass, counted from the modules: no weights needed, meta tensors do."""

import math

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kdprune.model.families import decoder_layers, experts_of, family_of
from kdprune.model.modeling_kdp import NoAttention, columns_of


def forward_flops(model: PreTrainedModel, batch: int, tokens: int, past: int = 0, logits: int = 1) -> int:
    """Operations of ``model`` reading ``tokens`` new positions of ``batch`` sequences behind ``past`` cached ones.

        2 · in · out         a token, for every linear map: projections, MLPs, stand-ins, shortcuts, routers; of
                             experts for those that a token goes through
        4 · H·d_h · (past + tokens)   a token and layer, for attention scores and the sum they weigh; masked ones count
        2 · d · V            for each of the last ``logits`` positions of a sequence, in the head

    A multiply-add is two operations. Norms, activations, cosines, softmax, rotations and look-ups are left out, as
    in torch's FlopCounterMode, which is the oracle. Attention with a sliding window counts as without one. In a family
    without a row heads are taken to be as wide as the model together.

    Raises KDPruneError for what is not a causal LM of a known family.
    """
    family, head = family_of(model), model.get_output_embeddings()
    each = sum(_per_token(module) for module in model.modules() if module is not head)
    for experts, router, share in experts_of(model):
        each += round(2 * share * _size(experts)) + 2 * _size(router)
    for layer in decoder_layers(model):
        if any(isinstance(part, NoAttention) for part in layer.children()):
            continue
        known = bool(family.attention_out)
        columns = columns_of(layer.get_submodule(family.attention_out)) if known else model.config.hidden_size
        each += 4 * columns * (past + tokens)
    return batch * (tokens * each + min(tokens, logits) * _per_token(head))


def _per_token(module: nn.Module | None) -> int:
    """Operations of one linear map on one token; 0 for everything else."""
    if not isinstance(module, nn.Linear | Conv1D):
        return 0
    return 2 * math.prod(module.weight.shape)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
