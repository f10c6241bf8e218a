"""Fewer heads in the attention in front of a stand-in: those that add most to the state stay."""

import torch
from torch import Tensor

from kdprune.methods.saliency import Part, attention_parts
from kdprune.methods.site import PASS_ROWS, Site, inputs_of
from kdprune.model.families import family_of
from kdprune.model.modeling_kdp import thin_attention
from kdprune.model.widths import set_weights
from kdprune.world import world

_TOKENS = 2048  # at once in float64


@torch.no_grad()
def keep_heads(site: Site, count: int) -> None:
    """Leaves ``count`` key-value groups, with their queries, in the context attention of ``site``, in place.

    Those stay whose energy (:func:`group_energies`) is the greatest, in their old order.
    """
    layer, model = site.module, site.model
    parts = attention_parts(model, layer)
    kept = group_energies(site, parts[-1]).argsort(descending=True, stable=True)[:count].cpu()
    weights: dict[str, Tensor] = {}
    for part in parts:
        weights |= part.select(layer, kept)
    thin_attention(layer, count, family_of(model), model.config)
    set_weights(layer, weights, "the context layer")
    site.groups = count


@torch.no_grad()
def group_energies(site: Site, out: Part) -> Tensor:
    """What each key-value group adds through the output projection, over the real tokens of the rows of the fit.

        E_g = Σ_t ‖W_g a_{t,g}‖² = tr(W_gᵀ W_g Σ_t a_{t,g} a_{t,g}ᵀ)

    with a_{t,g} (k) what the queries of group g read at token t and W_g (d, k) their columns of the projection.

    Args:
        out: the groups' part in the output projection.

    Returns:
        (n,) float64, by group; the same in every process of the run.
    """
    columns = out.lines(site.module)
    size = out.members.shape
    moments = columns.new_zeros(size[0], size[1], size[1])
    with inputs_of(site.module.get_submodule(out.path)) as seen:
        for rows in site.row_batches(PASS_ROWS):
            site.predict(rows)
            _, mask = site.target(rows)
            # Some families flatten (B, T, ·) before the projection.
            for tokens in seen.pop().reshape(*mask.shape, -1)[mask].split(_TOKENS):
                read = tokens.double()[:, out.members.to(tokens.device)].transpose(0, 1)  # (n, tokens, k)
                moments += read.mT @ read
    world().sum(moments)
    return ((columns @ columns.mT) * moments).sum((1, 2))
