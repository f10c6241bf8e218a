"""The residual stream in principal components: sizes, rotations cut by cut, and the layers that result (SliceGPT)."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdprune.data.tokens import TokenSet
from kdprune.model.activations import layer_arguments, layer_states
from kdprune.model.families import decoder_layers, family_of, final_norm, norm_before_mlp
from kdprune.model.modeling_kdp import Family, SlicedLayer, norms_and_readers, slice_layer
from kdprune.model.structures import centres
from kdprune.model.surgery import Resize

RIDGE = 0.01  # added to the second moments, in units of the mean of their diagonal

Projection = tuple[Tensor, Tensor | None]  # weight (out, in), bias (out) or None; float64


def stream_states(widths: Sequence[int], width: int, parallel: bool) -> list[list[int]]:
    """Widths of all cuts but the last, which is ``width`` → [entering, behind attention, leaving] of every layer."""
    cuts = [*widths, width]
    if parallel:
        return [[cuts[i], cuts[i], cuts[i + 1]] for i in range(len(cuts) - 1)]
    return [cuts[i : i + 3] for i in range(0, len(cuts) - 1, 2)]


def is_parallel(model: PreTrainedModel) -> bool:
    """Whether attention and MLP of the model's layers read the same state."""
    return family_of(model).is_parallel(decoder_layers(model)[0])


@dataclass(frozen=True)
class StreamSize:
    """Parameters of a sliced model as a function of its widths.

    ``cuts``: how many widths there are. ``layers``: of each layer (parameters that stay, outputs of the projections
    into attention and of those into the MLP, inputs and biases of the one out of attention, of the one out of the
    MLP). ``tables``: rows of the embedding tables. ``head``: parameters of the head, with its bias.
    """

    cuts: int
    layers: list[tuple[int, int, int, int, int]]
    tables: int
    head: int
    width: int
    parallel: bool

    @classmethod
    def of(cls, model: PreTrainedModel) -> "StreamSize":
        """The sizes of ``model``."""
        family, width, parallel = family_of(model), model.config.hidden_size, is_parallel(model)
        layers = [_layer_size(layer, family) for layer in decoder_layers(model)]
        tables = sum(model.get_parameter(f"{path}.weight").shape[0] for path in family.embeddings)
        weight, bias = read(_head(model)[1])
        biased = bias is not None or getattr(final_norm(model), "bias", None) is not None
        head = weight.numel() + weight.shape[0] * biased
        return cls(len(layers) * (1 if parallel else 2), layers, tables, head, width, parallel)

    def parameters(self, widths: Sequence[int]) -> int:
        """Parameters of the model with these widths."""
        return self.outside_embeddings(widths) + self.tables * widths[0] + self.head

    def outside_embeddings(self, widths: Sequence[int]) -> int:
        """Those of its layers, all that is outside the embeddings: norms are folded in, the final one into the head."""
        total = 0
        states = stream_states(widths, self.width, self.parallel)
        for (rest, into, into_mlp, out, out_mlp), (a, b, c) in zip(self.layers, states, strict=True):
            shortcuts = a * c if self.parallel else a * b + b * c
            total += rest + into * a + out * (c if self.parallel else b) + into_mlp * b + out_mlp * c + shortcuts
        return total


def _layer_size(layer: nn.Module, family: Family) -> tuple[int, int, int, int, int]:
    """An entry of ``StreamSize.layers``."""
    rest, sizes = sum(p.numel() for p in layer.parameters()), []
    readers = norms_and_readers(layer, family)
    rest -= sum(p.numel() for name in {name for name, _ in readers} for p in layer.get_submodule(name).parameters())
    for norm, paths in readers:
        own: Any = getattr(layer, norm)
        weights = [read(layer.get_submodule(path)) for path in paths]
        rest -= sum(weight.numel() for weight, _ in weights)
        if getattr(own, "bias", None) is not None:
            rest += sum(weight.shape[0] for weight, bias in weights if bias is None)
        sizes.append(sum(weight.shape[0] for weight, _ in weights))
    for path in (family.attention_out, family.mlp_out):
        weight, bias = read(layer.get_submodule(path))
        rest -= weight.numel() + (0 if bias is None else len(bias))
        sizes.append(weight.shape[1] + (bias is not None))
    return rest, sizes[0], sizes[1], sizes[2], sizes[3]


def read(module: Any) -> Projection:
    """Weight (out, in) and bias of a Linear or, transposed, a Conv1D, in float64."""
    weight = module.weight.detach().double()
    bias = getattr(module, "bias", None)
    return weight if isinstance(module, nn.Linear) else weight.T, None if bias is None else bias.detach().double()


def named(path: str, module: nn.Module, projection: Projection) -> dict[str, Tensor]:
    """The parameters that make ``module`` at ``path`` the ``projection``, by name."""
    weight, bias = projection
    found = {f"{path}.weight": weight if isinstance(module, nn.Linear) else weight.T}
    return found if bias is None else {**found, f"{path}.bias": bias}


def behind_norm(projection: Projection, norm: Any, family: Family) -> Projection:
    """The projection with scale γ and bias β of the norm in front folded in: W diag(γ), b + W β."""
    weight, bias = projection
    scale, shift = getattr(norm, "weight", None), getattr(norm, "bias", None)
    if shift is not None:
        moved = weight @ shift.detach().double()
        bias = moved if bias is None else bias + moved
    return weight if scale is None else weight * (scale.detach().double() + family.norm_offset), bias


def centred(values: Tensor, norm: nn.Module) -> Tensor:
    """``values`` less their mean over the last axis where ``norm`` would subtract it: a layer norm, by what it does, as
    families have classes of their own."""
    return values - values.mean(-1, keepdim=True) if centres(norm, values.shape[-1]) else values


def folded_layer(layer: nn.Module, family: Family) -> dict[str, Projection]:
    """The layer's projections by path, with its norms folded into them: all act between scale-free norms."""
    found = {}
    readers = norms_and_readers(layer, family)
    for name, paths in readers:
        for path in paths:
            found[path] = behind_norm(read(layer.get_submodule(path)), getattr(layer, name), family)
    norm = getattr(layer, readers[-1][0])
    for path in (family.attention_out, family.mlp_out):
        weight, bias = read(layer.get_submodule(path))
        found[path] = centred(weight.T, norm).T, None if bias is None else centred(bias, norm)
    return found


def principal_components(moments: Tensor) -> Tensor:
    """Eigenvectors (d, d) of H + 0.01 mean(diag H) I as columns, largest eigenvalue first; float64."""
    ridge = RIDGE * moments.diagonal().mean() * torch.eye(len(moments), dtype=moments.dtype, device=moments.device)
    return torch.linalg.eigh(moments + ridge).eigenvectors.flip(1)


@torch.no_grad()
def measure_cuts(
    model: PreTrainedModel, tokens: TokenSet, widths: Sequence[int], batch_size: int,
    progress: Callable[[int], None] = lambda _: None,
) -> list[Tensor]:
    """The first columns Q (d, d') of the rotation of every cut, the identity for the last, float64.

    A stream cut to d' components is carried as its projection x Q Qᵀ in the model's own coordinates, (N, T, d) in
    float32 on the host, so that each layer runs once, with its norms folded, on signals already sliced.
    """
    family, device, width = family_of(model), model.device, model.config.hidden_size
    first = decoder_layers(model)[0]
    batches = list(tokens.batches(batch_size))
    stream = [centred(states[0].float().cpu(), norm_before_mlp(model, first))
              for _, states in layer_states(model, tokens, [0], batch_size)]
    sizes = iter(widths)
    rotations = [_cut(stream, batches, next(sizes), device)]
    for index, layer in enumerate(decoder_layers(model)):
        runner = _runner(layer, model, family)
        parallel = is_parallel(model)
        for number, batch in enumerate(batches):
            args, kwargs = layer_arguments(model, index, batch)
            state = stream[number].to(device)
            added = runner.attend(state, *args, **kwargs)
            stream[number] = (state + added + (runner.transform(state) if parallel else 0)).cpu()
        if not parallel:
            rotations.append(_cut(stream, batches, next(sizes), device))
            stream = [state + runner.transform(state.to(device)).cpu() for state in stream]
        if index + 1 < len(decoder_layers(model)):
            rotations.append(_cut(stream, batches, next(sizes), device))
        progress(1)
    return [*rotations, torch.eye(width, dtype=torch.float64, device=device)]


def _cut(stream: list[Tensor], batches: list[TokenSet], width: int, device: torch.device) -> Tensor:
    """Q of the stream's real tokens, (d, ``width``); the stream is projected on it, in place."""
    moments: Any = 0
    for state, batch in zip(stream, batches, strict=True):
        real = state[batch.mask.cpu()].to(device).double()
        moments = moments + real.T @ real
    rotation = principal_components(moments)[:, :width]
    projection = (rotation @ rotation.T).float()
    stream[:] = [(state.to(device) @ projection).cpu() for state in stream]
    return rotation


def _runner(layer: nn.Module, model: PreTrainedModel, family: Family) -> SlicedLayer:
    """A copy of ``layer`` in float32, sliced at full width, with its norms folded."""
    runner: Any = copy.deepcopy(layer, {id(model.config): model.config}).float()
    weights = folded_layer(layer, family)
    width = model.config.hidden_size
    slice_layer(runner, [width] * 3, family, width)
    for path, projection in weights.items():
        for name, weight in named(path, runner.get_submodule(path), projection).items():
            runner.get_parameter(name).copy_(weight)
    return runner.eval()


def sliced_edits(model: PreTrainedModel, rotations: Sequence[Tensor]) -> list[Resize]:
    """Edits that make ``model`` the sliced one: every layer, and embeddings and head around them."""
    family, parallel = family_of(model), is_parallel(model)
    width = model.config.hidden_size
    states = stream_states([q.shape[1] for q in rotations[:-1]], width, parallel)
    edits = [_outside(model, rotations[0])]
    for index, (layer, sizes) in enumerate(zip(decoder_layers(model), states, strict=True)):
        a, b, c = ((rotations[index], rotations[index], rotations[index + 1]) if parallel
                   else rotations[2 * index : 2 * index + 3])
        projections = folded_layer(layer, family)
        ends = ((family.qkv, a, None), ((family.attention_out,), None, c if parallel else b),
                (family.mlp_in, b, None), ((family.mlp_out,), None, c))
        weights: dict[str, Tensor] = {}
        for paths, before, behind in ends:
            for path in paths:
                weights |= named(path, layer.get_submodule(path), _turned(projections[path], before, behind))
        if not parallel:
            weights["kdp_attention_shortcut.weight"] = b.T @ a
        weights["kdp_mlp_shortcut.weight"] = c.T @ b
        edits.append(Resize(index, {"states": sizes}, _stored(weights, model)))
    return edits


def _stored(weights: Mapping[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
    """In the model's dtype, which they get in the end: in float64 all of them would take several times its memory."""
    return {name: weight.to(model.dtype) for name, weight in weights.items()}


def _turned(projection: Projection, before: Tensor | None, behind: Tensor | None) -> Projection:
    """The projection on an input, or to an output, in other coordinates: W Q, Qᵀ W and Qᵀ b."""
    weight, bias = projection
    if before is not None:
        weight = weight @ before
    if behind is not None:
        weight, bias = behind.T @ weight, None if bias is None else behind.T @ bias
    return weight, bias


def _outside(model: PreTrainedModel, rotation: Tensor) -> Resize:
    """Embedding tables in the first cut's coordinates; the head with the final norm folded in."""
    family, norm = family_of(model), final_norm(model)
    weights = {}
    for path in family.embeddings:
        table = model.get_parameter(f"{path}.weight").detach().double()
        weights[f"{path}.weight"] = centred(table, norm) @ rotation
    name, head = _head(model)
    return Resize(None, {}, _stored(weights | named(name, head, behind_norm(read(head), norm, family)), model))


def _head(model: PreTrainedModel) -> tuple[str, nn.Module]:
    """The language-model head and its name."""
    head = model.get_output_embeddings()
    return next((name, module) for name, module in model.named_modules() if module is head)
