"""How FlattenGPT makes one layer of several: a wide parallel one, of which heads and channels are chosen."""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdprune.kernel.operators import Moments
from kdprune.methods.common.stand_in_fit import StandInFit, direction_before, inputs_of, scale_behind
from kdprune.model.block_states import BlockStates
from kdprune.model.families import decoder_layers, family_of, state_of
from kdprune.model.modeling_kdp import SUBLAYERS, StandIn
from kdprune.model.structures import (
    StructurePart,
    attention_parts,
    has_joined_heads,
    mlp_parts,
    norm_affine,
    reciprocal,
)
from kdprune.model.surgery import plain_copy, without_sublayer
from kdprune.model.widths import set_weights
from kdprune.runtime.run import Run

Towards: TypeAlias = Literal["sum", "states"]
Refit: TypeAlias = Literal["mlp", "both"]


@dataclass(frozen=True)
class Pool:
    """What the layers of a block have of one kind of sublayer.

    Attributes:
        kind: "attention" or "mlp".
        alone: the layers with that sublayer alone.
        parts: of each layer, its structures' parts, the projection out of the sublayer last.
        norms: of each layer (γ, β) of the norm in front, (d,) each; 1 and 0 where there is none.
        behind: the attribute that is a norm between the sublayer and the residual sum; None: there is none.
    """

    kind: str
    alone: list[nn.Module]
    parts: list[list[StructurePart]]
    norms: list[tuple[Tensor, Tensor]]
    behind: str | None

    @property
    def counts(self) -> list[int]:
        """How many structures each layer has."""
        return [len(parts[-1].members) for parts in self.parts]

    @property
    def width(self) -> int:
        """Inputs of a structure's part of the projection out of the sublayer."""
        return self.parts[0][-1].members.shape[1]

    def norm_behind(self, layer: int) -> nn.Module | None:
        """The norm between this layer's sublayer and the residual sum."""
        return None if self.behind is None else self.alone[layer].get_submodule(self.behind)

    def number(self, layer: int) -> int:
        """The first structure of this layer, of those of all layers in a row."""
        return sum(self.counts[:layer])

    def inputs(self, kept: Tensor) -> Tensor:
        """Of these structures, by number, the inputs of the wide projection, in order: (n,) → (n · width,)."""
        return (kept[:, None] * self.width + torch.arange(self.width)).flatten()

    def outgoing(self) -> Tensor:
        """What one unit of every input of the wide projection adds to the stream, (all structures, width, d), float64;
        in front of the norm behind the sublayer, where there is one."""
        pairs = zip(self.parts, self.alone, strict=True)
        return torch.cat([parts[-1].lines(layer) for parts, layer in pairs])

    @torch.no_grad()
    def into(self, kept: Tensor, source: int) -> dict[str, Tensor]:
        """The projections into the sublayer, by name as layer ``source`` stores them, of these structures.

        Each reads its own layer's norm γ ∘ n + β through that of the source, γ₀ ∘ n + β₀: W γ/γ₀, and what the shifts
        differ by is added to its bias. Where the projections have no biases that is left out.
        """
        scale, shift = self.norms[source]
        found: dict[str, Tensor] = {}
        for number, template in enumerate(self.parts[source][:-1]):
            lines, biases = [], []
            for layer, parts, (own_scale, own_shift) in zip(self.alone, self.parts, self.norms, strict=True):
                part = parts[number]
                old = part.lines(layer)
                new = old if layer is self.alone[source] else old * (own_scale * reciprocal(scale)).double()
                lines.append(new)
                biases.append(part.biases(layer).detach().double()
                              + old @ own_shift.double() - new @ shift.double())
            found |= template.placed(self.alone[source], torch.cat(lines)[kept], torch.cat(biases)[kept])
        return found


class FlattenFit(StandInFit):
    """A block as one layer: all its layers' sublayers side by side, as many heads and channels left as one has.

        ĥ_e = u + Σ_{j ∈ C} ψ_j(u) w_j + c,   u = h_s + Σ_{i ∈ H} A_i(h_s) O_i + c',   ψ_j(u) = act(g_jᵀ n(u)) u_jᵀ n(u)

    A_i the heads' outputs, O_i and w_j their rows of the projections out of attention and MLP, n the norms, whose own
    scales are in the rows of the projections. With H and C all heads and channels of the block, w and O as they are, it
    is the parallel sum h + Σ_l attention_l(h), then likewise of the MLPs. Where a family's attention and MLP read one
    state, u is h_s in ψ.

    Args:
        model: the dense model; not changed.
        states: the block's calibration states.
        run: says which model runs.

    Attributes:
        source: the layer of the block whose place, kind of attention and norms the result has; set by :meth:`solve`.
    """

    def __init__(self, model: PreTrainedModel, states: BlockStates, run: Run):
        super().__init__(model, states, StandIn(1, kind="linear", features=0), None, run)
        memo = {id(model.config): model.config}
        self.layers = [
            plain_copy(decoder_layers(model)[index], memo).float().to(self.device).eval() for index in states.block]
        self.source = states.block.start
        self._attention: nn.Module = nn.Identity()  # of the new layer, alone, as soon as it is found

    def solve(self, towards: Towards, refit: Refit, ridge: float) -> dict[str, Tensor]:
        """The layer's new weights, by name within the layer ``source``; arguments as of FlattenGPT."""
        model = self._model
        attention = self.pool("attention")
        moments = self.moments(attention, towards)
        source, heads = self.choose_heads(attention, moments)
        self.source = self.states.block[source]
        self.module = plain_copy(self.layers[source], {id(model.config): model.config})
        self._put(attention, source, heads, moments, ridge, solved=refit == "both" or attention.behind is not None)
        self._scale_behind(attention, towards)
        self._attention = without_sublayer(model, self.module, "mlp")
        mlp = self.pool("mlp")
        moments = self.moments(mlp, towards)
        # Of equals the channel that stands first.
        order = moments.leverages(ridge).argsort(descending=True, stable=True)
        channels = order[: mlp.counts[source]].sort().values.cpu()
        self._put(mlp, source, channels, moments, ridge, solved=True)
        self._scale_behind(mlp, towards)
        own = dict(self.layers[source].named_parameters())
        return {name: weight.detach() for name, weight in self.module.named_parameters()
                if not torch.equal(weight, own[name])}

    def pool(self, kind: str) -> Pool:
        """What the layers have of this kind of sublayer."""
        family, model, width = family_of(self._model), self._model, self._model.config.hidden_size
        heads = kind == "attention"
        norms = []
        for layer in self.layers:
            name = family.norm_in(layer, family.attention_norm if heads else family.mlp_norm)
            scale, shift = norm_affine(nn.Identity() if name is None else layer.get_submodule(name), width)
            norms.append((scale.to(self.device), shift.to(self.device)))  # Identity's are on the host
        return Pool(
            kind, [without_sublayer(model, layer, "mlp" if heads else "attention") for layer in self.layers],
            [(attention_parts if heads else mlp_parts)(model, layer) for layer in self.layers], norms,
            dict(zip(SUBLAYERS, family.post_norms, strict=False)).get(kind))

    @torch.no_grad()
    def moments(self, pool: Pool, towards: Towards) -> Moments:
        """Of the regression of what the sublayer should add on what enters the wide projection out of it.

        Where a norm stands behind, of what should be given to that of the block's first layer: its direction.
        """
        inputs = sum(pool.counts) * pool.width
        moments = Moments(inputs, self._model.config.hidden_size, self.device)
        for rows in self.passes():
            z, wanted = self.seen(pool, rows, towards)
            # A norm's scale is found anew behind the map, so any of the block's will do in front.
            norm = pool.norm_behind(0)
            moments.update(z, wanted if norm is None else direction_before(norm, wanted))
        return moments.add_processes()

    @torch.no_grad()
    def seen(self, pool: Pool, rows: Tensor, towards: Towards) -> tuple[Tensor, Tensor]:
        """Of the real tokens of some rows what enters the wide projection, (n, inputs), and what the sublayer should
        add over the layer's multiplier, (n, d)."""
        family = family_of(self._model)
        target, mask = self.target(rows)
        state, stream = self._entering(pool.kind, rows)
        out = family.attention_out if pool.kind == "attention" else family.mlp_out
        parts, total = [], torch.zeros_like(state)
        for index, layer in zip(self.states.block, pool.alone, strict=True):
            with inputs_of(layer.get_submodule(out)) as given:
                total += self._run(layer, rows, index, state) - state
            parts.append(given[0].reshape(*mask.shape, -1)[mask])  # some families flatten the states
        if towards == "states":
            total = self._attentions(rows, pool, state) if pool.kind == "attention" else target - stream
        return torch.cat(parts, dim=1), total[mask] / family.multiplier(self.layers[0])

    def _entering(self, kind: str, rows: Tensor) -> tuple[Tensor, Tensor]:
        """What the new layer's attention or MLP reads of some rows, in front of its norm, and the stream that it adds
        to, (b, T, d) each."""
        start = self.states.inputs[rows].to(self.device).float()
        if kind == "attention":
            return start, start
        attended = self._run(self._attention, rows, self.source, start)
        return start if family_of(self._model).is_parallel(self.module) else attended, attended

    def _attentions(self, rows: Tensor, pool: Pool, state: Tensor) -> Tensor:
        """Σ of what the attentions of the block add in the dense model, (b, T, d)."""
        total = torch.zeros_like(state)
        for index, layer, alone in zip(self.states.block, self.layers, pool.alone, strict=True):
            total += self._run(alone, rows, index, state) - state
            state = self._run(layer, rows, index, state)
        return total

    def _run(self, layer: nn.Module, rows: Tensor, index: int, state: Tensor) -> Tensor:
        """The output of a layer that has what the model hands layer ``index``, (b, T, d)."""
        args, kwargs = self.arguments(rows, index)
        return state_of(layer(state, *args, **kwargs))

    @torch.no_grad()
    def choose_heads(self, pool: Pool, moments: Moments) -> tuple[int, Tensor]:
        """The layer, by place in the block, whose kind of attention is kept, and the heads: the numbers of key-value
        groups, as many as that layer has.

        A group's importance is the root mean square of Σ_j (z_j ‖o_j‖)², z_j what enters row o_j of the projection out
        of it (E‖·‖ there), over rms of what it puts out where a norm stands behind. Only heads of layers that attend
        alike (window, rotation, …) can be side by side; of these the kind whose best heads have most is kept.
        """
        lines = pool.outgoing()
        scores: list[Tensor] = []
        for layer, count in enumerate(pool.counts):
            own = lines[pool.number(layer) : pool.number(layer) + count]
            index = pool.inputs(torch.arange(pool.number(layer), pool.number(layer) + count)).to(moments.xx.device)
            xx = moments.xx[index][:, index]
            size: Tensor | float = 1.0
            if (norm := pool.norm_behind(layer)) is not None:
                flat = own.flatten(0, 1)
                size = ((xx @ flat) * flat).sum().clamp_min(1e-30)  # of its output, squared, in front of the norm
                own = own * norm_affine(norm, own.shape[-1])[0].double()
            squares = xx.diagonal().view(count, -1) * own.square().sum(-1)
            scores.append((squares.sum(1) / size).cpu())
        kinds: dict[Hashable, list[int]] = {}
        for layer in range(len(self.layers)):
            kinds.setdefault(self._kind(layer), []).append(layer)
        best = [self._best(pool, layers, scores) for layers in kinds.values()]
        layer, kept, _ = max(best, key=lambda found: found[2])
        return layer, kept

    @staticmethod
    def _best(pool: Pool, layers: Sequence[int], scores: Sequence[Tensor]) -> tuple[int, Tensor, float]:
        """Of layers of one kind the first, its count of the best heads of all in order, and their importance."""
        numbers = torch.cat([pool.number(layer) + torch.arange(pool.counts[layer]) for layer in layers])
        values = torch.cat([scores[layer] for layer in layers])
        chosen = values.argsort(descending=True, stable=True)[: pool.counts[layers[0]]]
        return layers[0], numbers[chosen].sort().values, float(values[chosen].sum())

    def _kind(self, layer: int) -> Hashable:
        """What the heads of two layers must have in common to stand side by side."""
        family, config, index = family_of(self._model), self._model.config, self.states.block[layer]
        lists = (getattr(config, name, None) for name in ("layer_types", *family.per_layer))
        kind = tuple(None if values is None else values[index] for values in lists)
        # Norms of queries and keys, and slopes, are a layer's own.
        attention, paths = self.layers[layer].get_submodule(family.attention), (*family.qkv, family.attention_out)
        projections = {id(p) for path in paths for p in self.layers[layer].get_submodule(path).parameters()}
        own = has_joined_heads(self._model) or any(id(p) not in projections for p in attention.parameters())
        return (*kind, index) if own else kind

    @torch.no_grad()
    def _put(self, pool: Pool, source: int, kept: Tensor, moments: Moments, ridge: float, solved: bool) -> None:
        """Gives the layer these structures, and its projection out of them."""
        template, layer = pool.parts[source][-1], self.layers[source]
        out = layer.get_submodule(template.path)
        start = pool.outgoing()[kept].flatten(0, 1).T
        biased = getattr(out, "bias", None) is not None
        if pool.behind is not None:
            start = torch.zeros_like(start)  # a direction is asked for, which they do not give
        if solved:
            matrix, offset = moments.refit(pool.inputs(kept), start, ridge, biased)
        else:
            projections = [(parts[-1].path, alone) for parts, alone in zip(pool.parts, pool.alone, strict=True)]
            biases = [alone.get_parameter(f"{path}.bias").double() for path, alone in projections if biased]
            matrix, offset = start, torch.stack(biases).sum(0) if biases else start.new_zeros(len(start))
        lines = matrix.T.unflatten(0, (len(kept), -1))
        weights = pool.into(kept, source) | template.placed(layer, lines, torch.empty(0))
        if biased:
            weights[f"{template.path}.bias"] = offset
        set_weights(self.module, weights, "the flattened layer")

    @torch.no_grad()
    def _scale_behind(self, pool: Pool, towards: Towards) -> None:
        """Gives the norm behind a sublayer, where there is one, the scale of least squared error
        (:func:`kdprune.methods.common.stand_in_fit.scale_behind`), y what the sublayer should add."""
        if pool.behind is None:
            return
        other = next(kind for kind in SUBLAYERS if kind != pool.kind)
        alone, norm = without_sublayer(self._model, self.module, other), self.module.get_submodule(pool.behind)

        def pairs() -> Iterator[tuple[Tensor, Tensor]]:
            for rows in self.passes():
                _, wanted = self.seen(pool, rows, towards)
                state, _ = self._entering(pool.kind, rows)
                yield (self._run(alone, rows, self.source, state) - state)[self.target(rows)[1]], wanted

        scale = scale_behind(norm, pairs(), self._model.config.hidden_size, self.device)
        set_weights(self.module, {f"{pool.behind}.weight": scale}, "the flattened layer")
