"""Coupled structures of a layer: heads with their queries, MLP channels, as rows and columns of its projections."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdprune.errors import KDPruneError
from kdprune.model.families import (
    decoder_layers,
    family_of,
    has_experts,
    norm_before_mlp,
    norms_from,
    own_channels,
    widest,
)
from kdprune.model.modeling_kdp import FoldedLayer, StandIn, groups_of, key_value_heads
from kdprune.model.surgery import plain_copy


@dataclass(frozen=True)
class StructurePart:
    """What the structures of one kind have in one projection.

    ``path`` of the projection within its layer; ``inputs``: its columns, else its rows and their biases;
    ``members`` (n, k): which k of them belong to each of the n structures.
    """

    path: str
    inputs: bool
    members: Tensor

    def select(self, layer: nn.Module, kept: Tensor) -> dict[str, Tensor]:
        """The projection's parameters by name with the structures ``kept`` (indices) alone, in their old order."""
        module = layer.get_submodule(self.path)
        index = self.members[kept].flatten().sort().values.to(_weight(module).device)
        found = {f"{self.path}.weight": _weight(module).detach().index_select(_axis(module, self.inputs), index)}
        if (bias := getattr(module, "bias", None)) is not None:
            found[f"{self.path}.bias"] = bias.detach() if self.inputs else bias.detach()[index]
        return found

    def total(self, layer: nn.Module, values: Mapping[str, Tensor]) -> Tensor:
        """Sums over each structure, (n,), of ``values``, which have the shapes of the projection's parameters."""
        module = layer.get_submodule(self.path)
        values_of = values[f"{self.path}.weight"]
        line = values_of.sum(1 - _axis(module, self.inputs), dtype=torch.float64)
        if not self.inputs and (bias := values.get(f"{self.path}.bias")) is not None:
            line = line + bias.double()
        return line[self.members.to(line.device)].sum(1)

    def size(self, layer: nn.Module) -> int:
        """Parameters that one structure has in the projection."""
        module, lines = layer.get_submodule(self.path), self.members.shape[1]
        biases = 0 if self.inputs or getattr(module, "bias", None) is None else lines
        return lines * _weight(module).shape[1 - _axis(module, self.inputs)] + biases

    def biases(self, layer: nn.Module) -> Tensor:
        """The biases of each structure's rows, (n, k); zeros where there are none."""
        module = layer.get_submodule(self.path)
        bias = getattr(module, "bias", None)
        return torch.zeros(self.members.shape, device=_weight(module).device) if bias is None else bias[self.members]

    def lines(self, layer: nn.Module) -> Tensor:
        """Each structure's rows, or columns, of the projection's weight, (n, k, length of one), float64."""
        module = layer.get_submodule(self.path)
        weight = _weight(module).detach().double()
        return (weight.T if _axis(module, self.inputs) else weight)[self.members.to(weight.device)]

    def placed(self, layer: nn.Module, lines: Tensor, biases: Tensor) -> dict[str, Tensor]:
        """The projection's parameters by name, with these ``lines`` (n, k, length of one) and, where it has some of
        each row, ``biases`` (n, k), as its structures: the inverse of :meth:`lines` and :meth:`biases`."""
        module, order = layer.get_submodule(self.path), self.members.flatten().argsort()
        weight = lines.flatten(0, 1)[order.to(lines.device)]
        found = {f"{self.path}.weight": weight.T if _axis(module, self.inputs) else weight}
        if not self.inputs and getattr(module, "bias", None) is not None:
            found[f"{self.path}.bias"] = biases.flatten()[order.to(biases.device)]
        return found


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _axis(module: nn.Module, inputs: bool) -> int:
    """The axis of a projection's weight along which its inputs, or its outputs, lie; Conv1D stores (in, out)."""
    return int(inputs) if isinstance(module, nn.Linear) else int(not inputs)


def attention_parts(model: PreTrainedModel, layer: nn.Module) -> list[StructurePart]:
    """Key-value heads with all their queries: rows of the projections for q, k and v, columns of the one out of it."""
    family, config = family_of(model), model.config
    groups = groups_of(layer, family, config)
    queries = config.num_attention_heads * groups // key_value_heads(config)
    out = layer.get_submodule(family.attention_out)
    columns = _weight(out).shape[_axis(out, inputs=True)]
    width = columns // queries
    query, key = torch.arange(columns).view(groups, -1), torch.arange(groups * width).view(groups, -1)
    if len(family.qkv) > 1:
        parts = [StructurePart(path, False, rows) for path, rows in zip(family.qkv, (query, key, key), strict=True)]
    else:
        blocks = torch.cat((query, columns + key, columns + key.numel() + key), dim=1)
        heads = torch.arange(columns + 2 * groups * width).view(groups, -1)  # of each its queries, key, value in turn
        parts = [StructurePart(family.qkv[0], False, heads if family.fused == "heads" else blocks)]
    return [*parts, StructurePart(family.attention_out, True, query)]


def mlp_parts(model: PreTrainedModel, layer: nn.Module) -> list[StructurePart]:
    """MLP channels: rows of the projections into the MLP (gate and up, fused or not), columns of the one out of it.

    Raises KDPruneError for experts.
    """
    refuse_experts(model)
    family = family_of(model)
    out = layer.get_submodule(family.mlp_out)
    channels = _weight(out).shape[_axis(out, inputs=True)]
    parts = []
    for path in family.mlp_in:
        module = layer.get_submodule(path)
        rows = _weight(module).shape[_axis(module, inputs=False)]
        parts.append(StructurePart(path, False, torch.arange(rows).view(-1, channels).T))
    return [*parts, StructurePart(family.mlp_out, True, torch.arange(channels)[:, None])]


@dataclass(frozen=True)
class Channels:
    """MLP channels as functions of a normalised state n, float32.

        ψ_j(n) = act(g_jᵀn + a_j) (u_jᵀn + b_j)      gated, else act(u_jᵀn + b_j)

    Attributes:
        lines: [g, u] or u alone, (c, 2 or 1, d).
        biases: [a, b] or b, (c, 2 or 1).
        outgoing: the norm of what one unit of a channel adds to the state, in front of a norm behind the MLP where
            the family has one, (c,).
    """

    lines: Tensor
    biases: Tensor
    outgoing: Tensor

    def of(self, x: Tensor, activation: nn.Module) -> Tensor:
        """ψ(x), (n, d) → (n, c)."""
        first, last = (x @ self.lines[:, index].T + self.biases[:, index] for index in (0, -1))
        return activation(first) * last if self.lines.shape[1] == 2 else activation(first)

    def select(self, kept: Tensor) -> "Channels":
        """The channels with these numbers, in their old order."""
        index = kept.sort().values
        return Channels(self.lines[index], self.biases[index], self.outgoing[index])

    def through(self, scale: Tensor, shift: Tensor) -> "Channels":
        """The same as functions of γ ∘ n + β, (d,) each, instead of n; a dimension that γ takes away stays away."""
        lines = self.lines.to(scale.device) * reciprocal(scale)
        return Channels(lines, self.biases.to(scale.device) - lines @ shift, self.outgoing.to(scale.device))


@torch.no_grad()
def mlp_weights(
    model: PreTrainedModel, layer: nn.Module, into: Sequence[nn.Linear], out: nn.Linear
) -> dict[str, Tensor]:
    """The parameters, by name, of the MLP of ``layer`` with which it computes out(act(gate(n)) ∘ up(n)), or
    out(act(up(n))): the inverse of :func:`mlp_channels` for its channels.

    Args:
        model: says how its family stores them.
        layer: with as many channels as ``into`` has rows.
        into: gate and up, or up alone, Linear(d, c).
        out: Linear(c, d).

    Where the layer has no biases these must be zero.
    """
    family, found = family_of(model), {}
    *parts, last = mlp_parts(model, layer)
    rows = torch.cat([module.weight for module in into]).chunk(len(parts))  # fused: gate above up
    biases = torch.cat([module.bias for module in into]).chunk(len(parts))
    for part, weight, bias in zip([*parts, last], [*rows, out.weight], [*biases, out.bias], strict=True):
        module = layer.get_submodule(part.path)
        found[f"{part.path}.weight"] = weight if isinstance(module, nn.Linear) else weight.T.contiguous()
        if getattr(module, "bias", None) is not None:
            found[f"{part.path}.bias"] = bias
        else:
            assert not bias.any(), f"{family.layer} has no bias in {part.path}"
    return found


def has_mlp_biases(model: PreTrainedModel) -> bool:
    """Whether the projections of this model's MLPs have biases."""
    refuse_experts(model)
    layer = decoder_layers(model)[widest(model)]
    return getattr(layer.get_submodule(family_of(model).mlp_out), "bias", None) is not None


def channels_of(model: PreTrainedModel) -> int:
    """How many MLP channels a layer of this model has, the widest where they differ."""
    refuse_experts(model)
    return own_channels(decoder_layers(model)[widest(model)], family_of(model)) or 0


def activation_of(model: PreTrainedModel) -> str:
    """The activation of this model's MLP channels, as transformers calls it."""
    name = family_of(model).activation
    return str(getattr(model.config, name, name))


def is_gated(model: PreTrainedModel) -> bool:
    """Whether the MLP channels of this model have gates."""
    refuse_experts(model)
    *into, _ = mlp_parts(model, decoder_layers(model)[widest(model)])
    return sum(part.members.shape[1] for part in into) == 2


def refuse_experts(model: PreTrainedModel) -> None:
    """Raises KDPruneError where there are no channels to speak of."""
    if has_experts(model):
        raise KDPruneError(
            f"got a {family_of(model).model_type} model, whose MLPs are mixtures of experts and have no channels of "
            "their own; expected plain ones: use a method that takes layers whole (shortgpt, uidl, sleb, linear), or "
            "--kernel linear or learned with kdp")


def has_joined_heads(model: PreTrainedModel) -> bool:
    """Whether this model's heads go together or not at all."""
    return family_of(model).has_joined_heads(model.config)


@torch.no_grad()
def mlp_channels(model: PreTrainedModel, index: int) -> Channels:
    """The channels of layer ``index``, its norm's scale and shift folded in; of a streamed model the layer is read.

    Where a stand-in has the place of its MLP, the channels of that, which may be none.
    """
    layer = plain_copy(decoder_layers(model)[index])
    stand_in = getattr(layer, family_of(model).mlp[0])
    if isinstance(stand_in, StandIn):
        return _stand_in_channels(model, layer, stand_in)
    *into, out = mlp_parts(model, layer)
    lines = torch.cat([part.lines(layer) for part in into], dim=1).float()
    # A norm without parameters does not say where the layer is.
    affine = norm_affine(norm_before_mlp(model, layer).float(), model.config.hidden_size)
    scale, shift = (part.to(lines.device) for part in affine)
    biases = torch.cat([part.biases(layer) for part in into], dim=1).float() + lines @ shift
    outgoing = out.lines(layer).norm(dim=-1)[:, 0].float() * family_of(model).multiplier(layer)
    return Channels(lines * scale, biases, outgoing)


def _stand_in_channels(model: PreTrainedModel, layer: nn.Module, stand_in: StandIn) -> Channels:
    """The same of a stand-in in the MLP place of ``layer``."""
    count, width = stand_in.channels, model.config.hidden_size
    into: list[Any] = [stand_in.gate, stand_in.up] if count and stand_in.gated else [stand_in.up] if count else []
    if not into:
        kinds = 1 + is_gated(model)
        return Channels(torch.empty(0, kinds, width), torch.empty(0, kinds), torch.empty(0))
    lines = torch.stack([part.weight.float() for part in into], dim=1)
    scale, shift = (part.to(lines.device) for part in norm_affine(norm_before_mlp(model, layer).float(), width))
    biases = torch.stack([part.bias.float() for part in into], dim=1) + lines @ shift
    outgoing = stand_in.readout.weight[:, -count:].float().norm(dim=0)  # the channels are the last part of its kind
    return Channels(lines * scale, biases, outgoing * family_of(model).multiplier(layer))


def last_writer(model: PreTrainedModel, layer: nn.Module) -> tuple[str, float]:
    """Path within ``layer`` to the projection whose output is the last that it adds to the stream, and what that output
    is multiplied by before: of its MLP, of the stand-in in the place of that, or of one folded in behind the layer."""
    family = family_of(model)
    if isinstance(layer, FoldedLayer):
        behind = [number for number, (_, place) in enumerate(layer.kdp_folded()) if place == "after"]
        if behind:
            return ("kdp" if behind[-1] == 0 else f"kdp_{behind[-1]}") + ".readout", 1.0
    inside = isinstance(getattr(layer, family.mlp[0]), StandIn)
    return f"{family.mlp[0]}.readout" if inside else family.mlp_out, family.multiplier(layer)


def reciprocal(scale: Tensor) -> Tensor:
    """1/γ of a norm's scale, (d,); 0 where γ takes a dimension away."""
    return torch.where(scale.abs() > 1e-6 * scale.abs().max(), 1 / scale, 0.0)


def norm_affine(norm: nn.Module, width: int) -> tuple[Tensor, Tensor]:
    """(γ, β) of a norm γ ∘ n(x) + β, RMS or layer norm, from what it makes of x and −x; (d,) each.

    Families store γ in different ways (Gemma: γ − 1), and not all have β. Identity has 1 and 0.
    """
    device = next((parameter.device for parameter in norm.parameters()), torch.device("cpu"))
    x = torch.ones(width, device=device)
    x[1::2] = -1
    x = x - x.mean()  # of an odd width; a layer norm would do it
    there, back = norm(x[None])[0], norm(-x[None])[0]
    return (there - back) / 2 / (x / x.square().mean().sqrt()), (there + back) / 2


@torch.no_grad()
def centres(norm: nn.Module, width: int) -> bool:
    """Whether a norm takes the mean of its input away, as a layer norm does and an RMS norm does not: of a constant it
    leaves β alone."""
    copy = plain_copy(norm).float()
    scale, shift = norm_affine(copy, width)
    return bool((copy(torch.ones(1, width, device=scale.device))[0] - shift).norm() < scale.norm() / 2)


@torch.no_grad()
def gains_from(model: PreTrainedModel, boundary: int) -> Tensor:
    """How strongly what comes behind a boundary reads each dimension of the state, (d,), on the host.

        m_i² = mean_l γ_{l,i}²,   γ_l the scale of the norm in front of a sublayer l behind it

    Outlier dimensions are large in the state and small in this: trained models take back in their norms what they write
    there. On Gemma-3-270M log m² follows the diagonal of the Fisher information of the state with a correlation of .98.
    """
    width = model.config.hidden_size
    squares = [norm_affine(plain_copy(norm).float(), width)[0].cpu().square() for norm in norms_from(model, boundary)]
    return torch.stack(squares).mean(0).sqrt()
