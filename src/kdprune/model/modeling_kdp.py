"""Pruned causal language models: the family table, the stand-in, narrowed layers and the ``KDP<X>`` classes.

A pruned model is the stock transformer of its family with fewer layers. Where a run of layers was taken out,
a small trained module, the :class:`StandIn`, takes its place. It is either folded into a kept layer (it runs
after that layer, or before it where the run began at layer 0) or it is the MLP of an ordinary decoder layer
in a slot of its own. ``config.kdp`` says where each stand-in lives; the native weights keep their names.
A model can be narrowed instead: fewer heads and MLP channels a layer, or a residual stream whose width changes
from cut to cut. ``config.kdp["widths"]`` then says how wide each layer is; also where the layer around a stand-in has
fewer heads, and where a layer lacks its attention or its MLP.

This file needs torch and transformers alone. It is also shipped beside the weights, so that a pruned model
loads with ``trust_remote_code=True`` where kdprune is not installed; therefore it raises ``ValueError``,
holds the table of families, and imports nothing of the package.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, wraps
from importlib import import_module
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

VERSION = 1  # of the record in config.kdp
NARROWED_VERSION = 2  # of a record with widths, which code that knows version 1 alone must refuse
SUM_VERSION = 3  # of a record with a sum of kernels, with widths or without
PREFIX = "kdp_"  # of the model_type
PARTS = ("linear", "fourier", "mlp", "data")  # of a stand-in's kind, in the order in which its read-out sees them
SUBLAYERS = ("attention", "mlp")  # that a layer can be without
PLACES = ("after", "before", "mlp")
# What a pruned model can be loaded as, where its family has it: the end of the class's name, and who finds it.
HEADS: dict[str, Any] = {
    "Model": AutoModel, "ForCausalLM": AutoModelForCausalLM,
    "ForSequenceClassification": AutoModelForSequenceClassification,
    "ForTokenClassification": AutoModelForTokenClassification,
}
# Phases at once, and in a row, from which on writing them in place beats copying them (research/features).
MANY, LONG = 2**20, 512


def grouped_queries(config: Any) -> int:
    """Key-value heads where queries share them in groups: as many as the config says, or one a query."""
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


@dataclass(frozen=True)
class Family:
    """What sets one architecture apart: the names of its classes, and the paths to its parts."""

    model_type: str  # config.model_type of the stock model: "llama"
    name: str  # transformers has <name>Config and <name>Model; it is X in the generated KDP<X>ForCausalLM
    causal_lm: str  # the stock classes of the model with its head,
    layer: str  # … and of a decoder layer
    package: str  # they are defined in transformers.models.<package>
    layers: str = "model.layers"  # path from the causal LM to its ModuleList of decoder layers
    norm: str = "model.norm"  # … to the final norm
    # A layer's norm in front of its MLP; of several names the first that the layer has; (): it has none there (OLMo 2).
    mlp_norm: str | tuple[str, ...] = "post_attention_layernorm"
    # Attributes of a layer that make up its MLP path, from that norm to the residual sum: where a stand-in is
    # the MLP of a layer, it replaces the first, and Identity the others.
    mlp: tuple[str, ...] = ("mlp",)
    attention_norm: str | tuple[str, ...] = "input_layernorm"  # likewise in front of its attention
    # Paths within a layer: its attention module, the projections into it (one fused, or query, key, value) and out of
    # it, those into its MLP (fused, or gate and up) and out of it. Where experts are its MLP it has none of the latter.
    attention: str = "self_attn"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    attention_out: str = "self_attn.o_proj"
    mlp_in: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    mlp_out: str = "mlp.down_proj"
    activation: str = "hidden_act"  # config field that names the activation between them, or that activation (BLOOM)
    # Path within a layer to its experts, a module whose tensors have one entry an expert: a mixture of experts. Layers
    # that lack it are ordinary ones. config.num_experts_per_tok of them are active at a token.
    experts: str = ""
    router: str = ""  # … and to the module that chooses them
    post_norms: tuple[str, ...] = ()  # norms between a sublayer and the residual sum it adds to (Gemma)
    pre_norm: str = ""  # config flag; where it is False, a layer normalises behind each residual sum (OPT-350m)
    # Rows of one fused q-k-v projection: "blocks" [q; k; v], or "heads", each key-value head's queries, key and value
    # in turn.
    fused: str = "blocks"
    key_value_heads: Callable[[Any], int] = grouped_queries  # how many the dense layers have, by the config
    # Whether heads cannot go one by one, or the config flag under which they cannot: a norm reaches across them, or
    # each has a norm or a slope (ALiBi) of its own, by its place among them.
    joined_heads: bool | str = False
    # Attributes of the attention module that count its heads ("config.x": it reads x from its config), each with what
    # it counts: "queries", "keys", or "columns", the queries times the width of a head.
    counts: tuple[tuple[str, str], ...] = ()
    # Whether attention and MLP read the same state, or the attribute of a layer that says so.
    parallel: bool | str = False
    residual_multiplier: str = ""  # attribute of a layer: what sublayers put out is multiplied by it (Granite)
    returns_tuple: bool = False  # of a layer's forward: the state, then its attention weights
    # Attributes of a layer, modules or rates, for the outputs of attention and MLP; "": it has none there.
    dropouts: tuple[str, ...] = ()
    norm_eps: str | float = "variance_epsilon"  # attribute of its norms, or its value where they have none (OLMo)
    norm_offset: float = 0.0  # what they add to their weights to get their scales (Gemma)
    embeddings: tuple[str, ...] = ("model.embed_tokens",)  # paths to the tables whose sum enters layer 0
    # Path to the module behind that sum from whose output the model takes the width of its result (GPT-2): a narrower
    # sum is filled up with zeros there.
    embedded: str = ""
    embedding_norm: str = ""  # path to a norm between the tables and layer 0 (BLOOM)
    # A config field, and the value without which a layer's arithmetic depends on its number: another is refused.
    numbered: tuple[str, Any] | None = None
    per_layer: tuple[str, ...] = ()  # config lists with an entry a layer, beside layer_types (SmolLM3: who rotates)
    layer_numbers: tuple[str, ...] = ()  # config lists of layers by number (Qwen3-MoE: who has no experts)
    head_divisor: str = ""  # config field: what logits are divided by (Granite)
    # Whether a server's attention, which has its own cache, can take the place of the family's (vLLM): transformers
    # calls that of Falcon, BLOOM and GPT-J by class, and of GPT-2's transposed projections vLLM makes nothing.
    lends_attention: bool = True
    inferred: bool = False  # no row: all that is known of the architecture is its list of layers

    def norm_in(self, layer: Any, names: str | tuple[str, ...]) -> str | None:
        """Which of these names, ``mlp_norm`` or ``attention_norm``, the norm has in this layer; None: there is none."""
        names = (names,) if isinstance(names, str) else names
        return next((name for name in names if getattr(layer, name, None) is not None), None)

    def is_parallel(self, layer: Any) -> bool:
        """Whether attention and MLP of this layer read the same state."""
        return bool(attrgetter(self.parallel)(layer) if isinstance(self.parallel, str) else self.parallel)

    def epsilon(self, norm: Any) -> float:
        """ε of one of its norms."""
        return float(getattr(norm, self.norm_eps) if isinstance(self.norm_eps, str) else self.norm_eps)

    def multiplier(self, layer: Any) -> float:
        """What the outputs of this layer's sublayers are multiplied by before they are added to the stream."""
        return float(getattr(layer, self.residual_multiplier)) if self.residual_multiplier else 1.0

    def has_joined_heads(self, config: Any) -> bool:
        """Whether the heads of a model of this config go together or not at all."""
        joined = self.joined_heads
        return bool(getattr(config, joined, False) if isinstance(joined, str) else joined)


_GEMMA: Any = {"mlp_norm": "pre_feedforward_layernorm", "mlp": ("mlp", "post_feedforward_layernorm"),
               "post_norms": ("post_attention_layernorm", "post_feedforward_layernorm"),
               "activation": "hidden_activation", "norm_eps": "eps", "norm_offset": 1.0}
# Blocks that came before Llama's names: a fused projection of q, k, v, and an MLP without gates.
_FUSED: Any = {"qkv": ("self_attention.query_key_value",), "fused": "heads", "attention": "self_attention",
               "attention_out": "self_attention.dense", "mlp_in": ("mlp.dense_h_to_4h",),
               "mlp_out": "mlp.dense_4h_to_h", "layers": "transformer.h", "norm": "transformer.ln_f",
               "embeddings": ("transformer.word_embeddings",), "norm_eps": "eps", "returns_tuple": True,
               "lends_attention": False}
# The experts leave with their layers.
_EXPERTS: Any = {"experts": "mlp.experts", "router": "mlp.gate", "mlp_in": (), "mlp_out": ""}
# fmt: off
_ROWS = (
    Family("llama", "Llama", "LlamaForCausalLM", "LlamaDecoderLayer", "llama"),
    Family("mistral", "Mistral", "MistralForCausalLM", "MistralDecoderLayer", "mistral"),
    Family("qwen2", "Qwen2", "Qwen2ForCausalLM", "Qwen2DecoderLayer", "qwen2"),
    Family("qwen3", "Qwen3", "Qwen3ForCausalLM", "Qwen3DecoderLayer", "qwen3"),
    Family("phi3", "Phi3", "Phi3ForCausalLM", "Phi3DecoderLayer", "phi3",
           qkv=("self_attn.qkv_proj",), mlp_in=("mlp.gate_up_proj",),
           counts=(("num_key_value_heads", "keys"), ("config.num_attention_heads", "queries")),
           dropouts=("resid_attn_dropout", "resid_mlp_dropout")),
    Family("gemma2", "Gemma2", "Gemma2ForCausalLM", "Gemma2DecoderLayer", "gemma2", **_GEMMA),
    Family("gemma3_text", "Gemma3Text", "Gemma3ForCausalLM", "Gemma3DecoderLayer", "gemma3", **_GEMMA),
    Family("gpt_neox", "GPTNeoX", "GPTNeoXForCausalLM", "GPTNeoXLayer", "gpt_neox",
           layers="gpt_neox.layers", norm="gpt_neox.final_layer_norm", attention="attention",
           qkv=("attention.query_key_value",), attention_out="attention.dense",
           mlp_in=("mlp.dense_h_to_4h",), mlp_out="mlp.dense_4h_to_h", fused="heads",
           parallel="use_parallel_residual", dropouts=("post_attention_dropout", "post_mlp_dropout"),
           norm_eps="eps", embeddings=("gpt_neox.embed_in",)),
    Family("opt", "OPT", "OPTForCausalLM", "OPTDecoderLayer", "opt",
           layers="model.decoder.layers", norm="model.decoder.final_layer_norm",
           mlp_norm="final_layer_norm", mlp=("fc1", "activation_fn", "fc2"), attention_norm="self_attn_layer_norm",
           attention_out="self_attn.out_proj", mlp_in=("fc1",), mlp_out="fc2", activation="activation_function",
           pre_norm="do_layer_norm_before", counts=(("num_heads", "queries"),), dropouts=("dropout", "dropout"),
           norm_eps="eps", embeddings=("model.decoder.embed_tokens", "model.decoder.embed_positions")),
    Family("gpt2", "GPT2", "GPT2LMHeadModel", "GPT2Block", "gpt2",
           layers="transformer.h", norm="transformer.ln_f", mlp_norm="ln_2",
           attention_norm="ln_1", attention="attn", qkv=("attn.c_attn",), attention_out="attn.c_proj",
           mlp_in=("mlp.c_fc",), mlp_out="mlp.c_proj", activation="activation_function",
           numbered=("scale_attn_by_inverse_layer_idx", False),
           counts=(("num_heads", "queries"), ("split_size", "columns")), norm_eps="eps",
           embeddings=("transformer.wte", "transformer.wpe"), embedded="transformer.drop", lends_attention=False),
    Family("phi", "Phi", "PhiForCausalLM", "PhiDecoderLayer", "phi",
           norm="model.final_layernorm", mlp_norm="input_layernorm", attention_out="self_attn.dense",
           mlp_in=("mlp.fc1",), mlp_out="mlp.fc2", parallel=True, dropouts=("resid_dropout", "resid_dropout"),
           norm_eps="eps"),
    Family("gemma", "Gemma", "GemmaForCausalLM", "GemmaDecoderLayer", "gemma", norm_eps="eps", norm_offset=1.0),
    Family("stablelm", "StableLm", "StableLmForCausalLM", "StableLmDecoderLayer", "stablelm",
           mlp_norm=("post_attention_layernorm", "input_layernorm"), parallel="use_parallel_residual",
           counts=(("num_heads", "queries"), ("num_key_value_heads", "keys")), joined_heads="qk_layernorm",
           dropouts=("", "dropout"), norm_eps="eps"),
    Family("olmo2", "Olmo2", "Olmo2ForCausalLM", "Olmo2DecoderLayer", "olmo2",
           mlp_norm=(), attention_norm=(), mlp=("mlp", "post_feedforward_layernorm"),
           post_norms=("post_attention_layernorm", "post_feedforward_layernorm"), joined_heads=True),
    Family("smollm3", "SmolLM3", "SmolLM3ForCausalLM", "SmolLM3DecoderLayer", "smollm3", per_layer=("no_rope_layers",)),
    Family("granite", "Granite", "GraniteForCausalLM", "GraniteDecoderLayer", "granite",
           residual_multiplier="residual_multiplier", head_divisor="logits_scaling"),
    Family("ministral", "Ministral", "MinistralForCausalLM", "MinistralDecoderLayer", "ministral"),
    Family("falcon", "Falcon", "FalconForCausalLM", "FalconDecoderLayer", "falcon",
           mlp_norm=("ln_mlp", "post_attention_layernorm", "input_layernorm"),
           attention_norm=("ln_attn", "input_layernorm"), activation="activation", parallel="config.parallel_attn",
           counts=(("num_heads", "queries"), ("num_kv_heads", "keys")), joined_heads="alibi",
           # Before the new architecture all queries share one head, or none do.
           key_value_heads=lambda config: config.num_kv_heads if config.new_decoder_architecture else (
               1 if config.multi_query else config.num_attention_heads),
           dropouts=("hidden_dropout", "hidden_dropout"), **_FUSED),
    Family("bloom", "Bloom", "BloomForCausalLM", "BloomBlock", "bloom",
           activation="gelu_fast", counts=(("num_heads", "queries"),), joined_heads=True,
           embedding_norm="transformer.word_embeddings_layernorm", **_FUSED),
    Family("gptj", "GPTJ", "GPTJForCausalLM", "GPTJBlock", "gptj",
           layers="transformer.h", norm="transformer.ln_f", mlp_norm="ln_1", attention_norm="ln_1", attention="attn",
           qkv=("attn.q_proj", "attn.k_proj", "attn.v_proj"), attention_out="attn.out_proj", mlp_in=("mlp.fc_in",),
           mlp_out="mlp.fc_out", activation="activation_function", counts=(("num_attention_heads", "queries"),),
           parallel=True, returns_tuple=True, norm_eps="eps", embeddings=("transformer.wte",),
           embedded="transformer.drop", lends_attention=False),
    Family("cohere2", "Cohere2", "Cohere2ForCausalLM", "Cohere2DecoderLayer", "cohere2",
           mlp_norm="input_layernorm", parallel=True),
    Family("olmo", "Olmo", "OlmoForCausalLM", "OlmoDecoderLayer", "olmo", norm_eps=1e-5),
    Family("nemotron", "Nemotron", "NemotronForCausalLM", "NemotronDecoderLayer", "nemotron",
           mlp_in=("mlp.up_proj",), norm_eps="eps", norm_offset=1.0),
    Family("mixtral", "Mixtral", "MixtralForCausalLM", "MixtralDecoderLayer", "mixtral", **_EXPERTS),
    Family("qwen3_moe", "Qwen3Moe", "Qwen3MoeForCausalLM", "Qwen3MoeDecoderLayer", "qwen3_moe",
           numbered=("decoder_sparse_step", 1), layer_numbers=("mlp_only_layers",), **_EXPERTS),
)
# fmt: on
FAMILIES: dict[str, Family] = {row.model_type: row for row in _ROWS}


def cosines_and_sines(p: Tensor) -> Tensor:
    """[cos p, sin p]: (…, m) → (…, 2m).

    Many of them, without gradients, are written where they belong instead of being made and then copied together; few,
    and short rows, are copied faster. A compiler writes them in one pass by itself and wants no out=; nor do tensors
    that stand for others (sharded, traced).
    """
    traced = type(p) is not Tensor or torch.compiler.is_compiling() or torch.jit.is_tracing()
    if traced or p.requires_grad or p.numel() < MANY or p.shape[-1] < LONG:
        return torch.cat((p.cos(), p.sin()), dim=-1)
    z = p.new_empty(*p.shape[:-1], 2 * p.shape[-1])
    cosines, sines = z.chunk(2, dim=-1)
    torch.cos(p, out=cosines)
    torch.sin(p, out=sines)
    return z


class StandIn(nn.Module):
    """Maps the state that entered a run of layers to an estimate of the state that left it, token by token.

        x̂ = x / rms(x)                               if normalize, else x; computed in float32 or wider
        z = [z₁, z₂, …], one for each part that ``kind`` names, in this order:
            x̂                                        "linear"
            [cos p, sin p],  p = phase(x̂)            "fourier"
            act(phase(x̂))                            "mlp"
            act(gate(x̂)) ∘ up(x̂)                     "data", gated; else act(up(x̂))
        y = readout(act(lift(z)))                    if hidden, else readout(z)
        out = x + y                                  if residual, else y

    Shapes: x, out (…, d) with d = ``width``; p (…, m) with m = ``features``; ψ (…, c) with c = ``channels``;
    z (…, D), D the sum of d, 2m or m, and c, of the parts named.
    Parameters: ``phase`` Linear(d, m) for "fourier" and "mlp"; ``gate`` (gated) and ``up`` Linear(d, c) for "data";
    ``lift`` Linear(D, hidden) if ``hidden``; ``readout`` Linear(…, d). No buffers: what is not a parameter is in the
    constructor's arguments.

    Args:
        width: d.
        kind: names of parts joined by "+", as "linear+data".
        features: m.
        channels: c.
        gated: whether the channels have gates.
        hidden: width of a hidden layer in front of the read-out; 0: none.
        residual: whether x is added.
        normalize: whether x is divided by its RMS first.
        activation: of "mlp", "data" and the hidden layer, as transformers calls it.
        eps: of the RMS.

    Raises ValueError for an unknown kind or activation and for sizes that make no layer.
    """

    def __init__(
        self,
        width: int,
        *,
        kind: str = "fourier",
        features: int,
        channels: int = 0,
        gated: bool = True,
        hidden: int = 0,
        residual: bool = True,
        normalize: bool = True,
        activation: str = "gelu",
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.parts = parts_of(kind)
        if activation not in ACT2FN:
            raise ValueError(
                f"got activation {activation!r}, expected a name that transformers knows, such as 'gelu'"
            )
        drawn, data = bool({"fourier", "mlp"} & set(self.parts)), "data" in self.parts
        if width < 1 or hidden < 0 or (drawn and features < 1) or (data and channels < 1):
            raise ValueError(
                f"got a stand-in of width {width}, features {features}, channels {channels}, hidden {hidden}")
        self.width, self.kind, self.hidden = width, kind, hidden
        self.features, self.channels, self.gated = features if drawn else 0, channels if data else 0, gated
        self.residual, self.normalize = residual, normalize
        self.activation, self.eps = activation, eps
        self.act = ACT2FN[activation]
        if drawn:
            self.phase = nn.Linear(width, features)
        if data:
            if gated:
                self.gate = nn.Linear(width, channels)
            self.up = nn.Linear(width, channels)
        sizes = {"linear": width, "fourier": 2 * features, "mlp": features, "data": channels}
        lifted = sum(sizes[part] for part in self.parts)
        if hidden:
            self.lift = nn.Linear(lifted, hidden)
        self.readout = nn.Linear(hidden or lifted, width)

    def forward(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        """x (…, d) → (…, d), in the dtype of x; added ``onto`` the residual where a layer hands it over (BLOOM)."""
        z = x
        if self.normalize:  # torch computes it in float32 for narrower dtypes, and casts back
            z = nn.functional.rms_norm(x, (self.width,), eps=self.eps)
        mapped = [self.mapped(part, z) for part in self.parts]
        z = mapped[0] if len(mapped) == 1 else torch.cat(mapped, dim=-1)
        if self.hidden:
            z = self.act(self.lift(z))
        y = self.readout(z)
        if self.residual:
            y = x + y
        return y if onto is None else onto + y

    def mapped(self, part: str, z: Tensor) -> Tensor:
        """What one part of the kind makes of x̂: (…, d) → (…, d | 2m | m | c)."""
        if part == "linear":
            return z
        if part == "fourier":
            return cosines_and_sines(self.phase(z))
        if part == "mlp":
            return self.act(self.phase(z))
        return self.act(self.gate(z)) * self.up(z) if self.gated else self.act(self.up(z))

    def spec(self) -> dict[str, Any]:
        """The constructor's arguments but ``width``, fit for JSON: ``StandIn(width, **spec)`` has this
        form."""
        names = ["kind", "features", "hidden", "residual", "normalize", "activation", "eps"]
        if self.channels:  # records without it are read by older code too
            names[2:2] = ["channels", "gated"]
        return {name: getattr(self, name) for name in names}

    def extra_repr(self) -> str:
        """What the printed module says beside its children."""
        return ", ".join(f"{name}={value!r}" for name, value in {"width": self.width, **self.spec()}.items())


def parts_of(kind: str) -> tuple[str, ...]:
    """The parts that a stand-in's kind names. Raises ValueError for what is none, twice there or out of order."""
    parts = tuple(kind.split("+"))
    known = tuple(part for part in PARTS if part in parts)
    if parts != known or {"fourier", "mlp"} <= set(parts):
        raise ValueError(
            f"got stand-in kind {kind!r}, expected one or more of {', '.join(PARTS)}, joined by + in this order, "
            "fourier or mlp")
    return parts


class FoldedLayer(nn.Module):
    """Mixed into a family's decoder layer: layer and stand-in as one, so that every layer keeps its slot.

    out = kdp(layer(h)) for ``kdp_place`` "after"; out = layer(kdp(h)) for "before". h, out (B, T, d). Where a
    layer returns a tuple, the rest of it stays. Stand-ins of later prunings, ``kdp_1``, ``kdp_2``, …, with their places
    in ``kdp_more``, are each folded around all that is there. Layers become folded by :func:`place_stand_in`.
    """

    kdp: StandIn
    kdp_place: str
    kdp_more: tuple[str, ...] = ()

    def kdp_folded(self) -> list[tuple[StandIn, str]]:
        """The stand-ins with their places, the innermost first."""
        more = [(getattr(self, f"kdp_{number}"), place) for number, place in enumerate(self.kdp_more, 1)]
        return [(self.kdp, self.kdp_place), *more]

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The layer's own arguments and result."""
        folded = self.kdp_folded()
        for stand_in, place in reversed(folded):
            if place == "before":
                hidden_states = stand_in(hidden_states)
        output = super().forward(hidden_states, *args, **kwargs)
        state = output[0] if isinstance(output, tuple) else output
        for stand_in, place in folded:
            if place == "after":
                state = stand_in(state)
        return (state, *output[1:]) if isinstance(output, tuple) else state


class ScaleFreeNorm(nn.Module):
    """x / sqrt(Σ x² / d + eps) over the last axis, with d = ``divisor`` whatever the width of x; in float32.

    On Qᵀx with orthonormal Q (d, d) it is Qᵀ times the RMS norm of x without its scale; with fewer columns in Q it is
    what SliceGPT (ICLR 2024) puts in the place of every norm. No parameters.
    """

    def __init__(self, divisor: int, eps: float) -> None:
        super().__init__()
        self.divisor, self.eps = divisor, eps

    def forward(self, x: Tensor) -> Tensor:
        """x (…, d') → (…, d'), in the dtype of x."""
        y = x.float()
        return (y * torch.rsqrt(y.square().sum(-1, keepdim=True) / self.divisor + self.eps)).to(x.dtype)


class SlicedLayer(nn.Module):
    """Mixed into a family's decoder layer: its own parts, on a residual stream whose width changes within the layer.

        h (…, a) → u = S₁ h + attention(norm(h)) (…, b) → out = S₂ u + mlp(norm(u)) (…, c)
        parallel:  out = S₂ h + attention(norm(h)) + mlp(norm(h)), (…, a) → (…, c)

    S₁, S₂ are the shortcut matrices of SliceGPT. A wider input is zero behind its first a entries. Arguments and
    result are those of the stock layer; layers become sliced by :func:`slice_layer`.
    """

    kdp_family: Family
    kdp_arguments: tuple[str, ...]  # names of what the stock forward takes behind the hidden states
    kdp_width: int  # a
    kdp_attention_shortcut: nn.Linear  # S₁, absent where the layer is parallel
    kdp_mlp_shortcut: nn.Linear  # S₂

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The layer's own arguments and result."""
        state = hidden_states[..., : self.kdp_width]
        attended, weights = self._attended(state, *args, **kwargs)
        if self.kdp_family.is_parallel(self):
            output = self.kdp_mlp_shortcut(state) + attended + self.transform(state)
        else:
            state = self.kdp_attention_shortcut(state) + attended
            output = self.kdp_mlp_shortcut(state) + self.transform(state)
        return (output, weights) if self.kdp_family.returns_tuple else output

    def attend(self, state: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What attention adds, (B, T, a) → (B, T, b)."""
        return self._attended(state, *args, **kwargs)[0]

    def _attended(self, state: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        """The same, with the attention weights where they were asked for."""
        family, arguments = self.kdp_family, dict(zip(self.kdp_arguments, args, strict=False))
        state = getattr(self, family.norm_in(self, family.attention_norm) or "")(state)
        added, weights, *_ = getattr(self, family.attention)(state, **arguments, **kwargs)
        return self._drop(added, 0) * family.multiplier(self), weights

    def transform(self, state: Tensor) -> Tensor:
        """What the MLP adds, (B, T, b) → (B, T, c)."""
        family = self.kdp_family
        state = getattr(self, family.norm_in(self, family.mlp_norm) or "")(state)
        for name in family.mlp:
            state = getattr(self, name)(state)
        return self._drop(state, 1) * family.multiplier(self)

    def _drop(self, state: Tensor, which: int) -> Tensor:
        """The layer's own dropout behind attention (0) or MLP (1)."""
        if not self.kdp_family.dropouts or not self.kdp_family.dropouts[which]:
            return state
        part = getattr(self, self.kdp_family.dropouts[which])
        if isinstance(part, nn.Module):
            return part(state)
        return nn.functional.dropout(state, part, self.training)


class NoAttention(nn.Module):
    """In the place of an attention sublayer that was left out: it adds nothing to the stream. No parameters.

    Its entry in a KV cache counts tokens, by keys and values (B, 1, T, 1), two numbers a token: models ask the first
    layer's entry, or the first of an attention type, how many have been seen, and one without keys says none.
    """

    def __init__(self, layer_idx: int | None) -> None:
        super().__init__()
        self.layer_idx = layer_idx

    def forward(
        self, hidden_states: Tensor, residual: Tensor | None = None, *args: Any, past_key_values: Any = None,
        layer_past: Any = None, **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """hidden_states (B, T, d) → zeros (B, T, d), or the residual where it is handed over (BLOOM); no weights."""
        cache = layer_past if past_key_values is None else past_key_values
        if cache is not None:
            keys = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
            cache.update(keys, keys, self.layer_idx)
        return (torch.zeros_like(hidden_states) if residual is None else residual), None


class NoMLP(nn.Module):
    """In the place of an MLP that was left out: it adds nothing to the stream. No parameters."""

    def forward(self, hidden_states: Tensor, residual: Tensor | None = None) -> Tensor:
        """hidden_states (…, d) → zeros (…, d), or the residual where a layer hands it over (BLOOM)."""
        return torch.zeros_like(hidden_states) if residual is None else residual


class OwnConfig:
    """The model's config as one layer sees it: what is set here hides ``base``, all else is read there."""

    def __init__(self, base: Any, **own: Any) -> None:
        self.base = base
        self.__dict__.update(own)

    def validate_architecture(self) -> None:
        """Nothing: the model's own config was checked, and asks those of its layers."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "base" not in self.__dict__:  # while it is copied or unpickled
            raise AttributeError(name)
        return getattr(self.base, name)


def _logit_scale(config: Any) -> float:
    """What vLLM multiplies the head's output by: it runs the base model, and none of what the model with its head does
    behind that."""
    return 1.0 / float(getattr(config, FAMILIES[config.model_type.removeprefix(PREFIX)].head_divisor))


def lacks_attention(width: dict[str, Any]) -> bool:
    """Whether a layer of this entry of ``config.kdp["widths"]`` has no attention."""
    return width.get("without") == "attention"


class PrunedConfig:
    """Mixed into a family's config: the record of its stand-ins, and where the code beside the weights is
    found."""

    model_type: str
    _auto_class = "AutoConfig"

    def __post_init__(self, **kwargs: Any) -> None:
        """Takes ``kdp``, the record ``{"version", "blocks", "stand_ins"[, "widths"]}``, out of further arguments."""
        self.kdp: dict[str, Any] | None = kwargs.pop("kdp", None)
        super().__post_init__(**kwargs)  # type: ignore[misc]
        self.auto_map = auto_map(self.model_type)

    # transformers' own form of a model whose layers differ, made from the record: caches that are laid out before the
    # model runs, transformers' static one and those of servers, take the sizes of every layer from here. Its own way to
    # it hides the numbers of the whole model, which the stock code that builds the layers reads.

    @property
    def is_heterogeneous(self) -> bool:
        """Whether layers have fewer heads than the config says, or no attention."""
        return self._heads_differ() or super().is_heterogeneous  # type: ignore[misc]

    @property
    def per_layer_config(self) -> Any:
        """The config of each layer, with the heads that it has: ``num_attention_heads``, ``num_key_value_heads`` and
        ``head_dim``; of a layer without attention those of what it caches, one of one number."""
        if not self._heads_differ():
            return super().per_layer_config  # type: ignore[misc]
        config: Any = self
        heads, groups = config.num_attention_heads, key_value_heads(config)
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        nothing = {"head_dim": 1, "num_key_value_heads": 1, "num_attention_heads": 1}
        kept = [None if lacks_attention(width) else width.get("groups", groups) for width in self._widths()]
        return [OwnConfig(self, **(nothing if left is None else {
            "head_dim": size, "num_key_value_heads": left, "num_attention_heads": heads * left // groups}))
                for left in kept]

    @per_layer_config.setter
    def per_layer_config(self, value: Any) -> None:
        super(PrunedConfig, type(self)).per_layer_config.fset(self, value)  # type: ignore[misc]

    @property
    def per_layer_attributes(self) -> Any:
        """What cannot be read from the config of the whole model: nothing."""
        return super().per_layer_attributes if self._own_way() else set()  # type: ignore[misc]

    def _update_heterogeneous_to_dict_output(self, output: dict[str, Any]) -> None:
        """The record is written, and says it all."""
        if self._own_way():
            super()._update_heterogeneous_to_dict_output(output)  # type: ignore[misc]

    def _own_way(self) -> bool:
        """Whether transformers' own record of layers that differ is there, or none is."""
        return not self.is_heterogeneous or super().is_heterogeneous  # type: ignore[misc]

    def _heads_differ(self) -> bool:
        """Whether the record has layers with fewer heads, or without attention."""
        return any("groups" in width or lacks_attention(width) for width in self._widths())

    def _widths(self) -> list[dict[str, Any]]:
        """The record's widths, none where it has none."""
        return (self.__dict__.get("kdp") or {}).get("widths") or []


class PrunedModel(PreTrainedModel):
    """Mixed into a family's base model and its models with heads: the stock model, then its stand-ins and widths as the
    config has them."""

    def __init__(self, config: Any, *inputs: Any, **kwargs: Any) -> None:
        if config._attn_implementation == "vllm":
            refuse_layers_to_serve(config)
        super().__init__(config, *inputs, **kwargs)
        inner = self.base_model
        if inner is self or not isinstance(inner, PrunedModel):  # some heads make the pruned model themselves
            attach_stand_ins(self)
        self.post_init()

    @classmethod
    def is_backend_compatible(cls) -> bool:
        """Whether a server's attention can take the place of the model's own: asked by vLLM before it loads anything.

        Raises ValueError where it cannot, which says it more clearly than the server would.
        """
        config: Any = cls.config_class
        refuse_to_serve(FAMILIES[config.model_type.removeprefix(PREFIX)])
        return super().is_backend_compatible()


def refuse_to_serve(family: Family) -> None:
    """Raises ValueError for a family whose pruned models vLLM cannot run."""
    if not family.lends_attention:
        raise ValueError(
            f"got a pruned {family.model_type} model with a class of its own, expected a family whose attention vLLM "
            "can replace; serve it with transformers, or prune with a method that leaves a stock model (shortgpt, uidl,"
            " sleb, evopress, flattengpt, laco, replaceme, streamline, or --form stock), which vLLM has a class for")


def refuse_layers_to_serve(config: Any) -> None:
    """Raises ValueError for a pruned model's config with a layer without attention, which vLLM has no place for."""
    widths = (getattr(config, "kdp", None) or {}).get("widths") or []
    lacking = [index for index, width in enumerate(widths) if lacks_attention(width)]
    if lacking:
        raise ValueError(
            f"got a pruned model without attention in layers {', '.join(map(str, lacking))}, expected one in every "
            "layer, which vLLM asks for; serve it with transformers, or leave MLPs out alone (--what mlp)")


def place_stand_in(layer: nn.Module, stand_in: StandIn, place: str, family: Family) -> None:
    """Put ``stand_in`` into ``layer`` (changed in place): folded "after" or "before" it, around what is folded into it
    already, or as its "mlp".

    Raises ValueError for an unknown place.
    """
    if place == "mlp":
        setattr(layer, family.mlp[0], stand_in)
        for name in family.mlp[1:]:
            setattr(layer, name, nn.Identity())
        return
    if place not in PLACES:
        raise ValueError(f"got place {place!r} for a stand-in, expected one of {', '.join(PLACES)}")
    if isinstance(layer, FoldedLayer):
        layer.kdp_more = (*layer.kdp_more, place)
        layer.add_module(f"kdp_{len(layer.kdp_more)}", stand_in)
        return
    layer.__class__ = generated(family, "Layer")
    layer.kdp_place = place  # type: ignore[assignment]
    layer.kdp = stand_in


def stock_class(layer: nn.Module) -> type[nn.Module]:
    """The class of its family that ``layer`` is of, or was before something was folded into it."""
    own = type(layer)
    return own.__mro__[2] if isinstance(layer, FoldedLayer) else own  # behind the generated class and the mixin


def unfold(layer: nn.Module) -> None:
    """Take what is folded into ``layer`` out again, in place: what is left is a layer of its family's own class."""
    if not isinstance(layer, FoldedLayer):
        return
    for number in range(1, len(layer.kdp_more) + 1):
        delattr(layer, f"kdp_{number}")
    del layer.kdp, layer.kdp_place
    layer.__dict__.pop("kdp_more", None)
    layer.__class__ = stock_class(layer)  # type: ignore[assignment]


def attach_stand_ins(model: PreTrainedModel) -> None:
    """Give the freshly built stock layers of ``model`` the (untrained) stand-ins that ``config.kdp`` lists.

    Raises ValueError for a record of another version or one that names a layer the model does not have.
    """
    config: Any = model.config
    family = FAMILIES[config.model_type.removeprefix(PREFIX)]
    record = config.kdp or {"version": VERSION, "stand_ins": []}
    if record.get("version") not in (VERSION, NARROWED_VERSION, SUM_VERSION):
        raise ValueError(
            f"config.kdp has version {record.get('version')!r}, this code reads versions 1 to 3"
        )
    layers: Any = model.base_model.get_submodule(family.layers.partition(".")[2])
    for item in record["stand_ins"]:
        if not 0 <= item["layer"] < len(layers):
            raise ValueError(f"config.kdp puts a stand-in into layer {item['layer']} of {len(layers)}")
        options = {key: value for key, value in item.items() if key not in ("layer", "place")}
        stand_in = StandIn(config.hidden_size, **options)
        place_stand_in(layers[item["layer"]], stand_in, item["place"], family)
    if record.get("widths"):
        narrow(model, record["widths"], family)


def narrow(model: PreTrainedModel, widths: list[dict[str, Any]], family: Family) -> None:
    """Cut the layers of ``model``, in place, to ``widths``, one record a layer: an empty one for a layer that stays.

    ``{"groups": g, "channels": c}``: g key-value heads with their queries and c MLP channels (LLM-Pruner, KDP's
    ordinary layers); ``{"groups": g}``: the heads alone, of a layer whose MLP place holds a stand-in.
    ``{"without": "attention"}``, or "mlp": the layer lacks that sublayer, and the norms that nothing else reads; beside
    it the channels, or the heads, of the other may be fewer.
    ``{"states": [a, b, c]}`` on every layer: the stream is a wide entering the layer, b behind its attention and c
    behind its MLP (SliceGPT); embeddings get a columns, norms lose their scale and the head is not tied. Beside these
    a layer may have fewer heads and channels. It may be narrower already: heads and channels are what is to be left.
    What is cut keeps its first rows and columns: the right weights are loaded, or set, afterwards.

    Raises ValueError for a record that does not fit the model.
    """
    layers: Any = model.base_model.get_submodule(family.layers.partition(".")[2])
    if len(widths) != len(layers):
        raise ValueError(f"config.kdp gives the widths of {len(widths)} layers of {len(layers)}")
    if "states" in widths[0]:
        _slice_outside(model, widths[0]["states"][0], family)
    for index, (layer, width) in enumerate(zip(layers, widths, strict=True)):
        lacks = lacking(layer, family)
        if lacks and "without" in width:
            raise ValueError(f"got layer {index}, which has no {lacks} any more, to be without its {width['without']}; "
                             "expected one that has both: take it out whole")
        lacks = width.get("without", lacks)
        if not set(width) <= {"groups", "channels", "states", "without"} or (
                "channels" in width and "groups" not in width and lacks != "attention") or (
                lacks and ("states" in width or {"attention": "groups", "mlp": "channels"}.get(lacks) in width)):
            raise ValueError(f"config.kdp gives layer {index} widths {sorted(width)}, which this code does not know")
        if ("states" in width) != ("states" in widths[0]):
            raise ValueError("config.kdp gives stream widths to some layers only")
        if "groups" in width:
            thin_attention(layer, width["groups"], family, model.config)
        if "channels" in width:
            thin_mlp(layer, width["channels"], family)
        if "states" in width:
            slice_layer(layer, width["states"], family, model.config.hidden_size)
        if "without" in width:
            leave_out(layer, width["without"], family)


def key_value_heads(config: Any) -> int:
    """How many key-value heads the dense layers of a model have: its queries where it does not group them."""
    family = FAMILIES.get(config.model_type.removeprefix(PREFIX))
    return (grouped_queries if family is None else family.key_value_heads)(config)


def groups_of(layer: nn.Module, family: Family, config: Any) -> int:
    """How many key-value heads ``layer``, of a model of this config, has: those of the dense one, or fewer."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    columns = columns_of(layer.get_submodule(family.attention_out))
    return columns * key_value_heads(config) // (config.num_attention_heads * width)


# Attributes that say how many outputs and inputs a projection or an embedding table has.
_SIZES: tuple[tuple[type[nn.Module], str, str], ...] = (
    (nn.Linear, "out_features", "in_features"), (Conv1D, "nf", "nx"), (nn.Embedding, "embedding_dim", "num_embeddings"),
)  # fmt: skip


def resize(module: nn.Module, *, outputs: int | None = None, inputs: int | None = None, bias: bool = False) -> None:
    """Cut a projection or an embedding table, in place, to its first ``outputs`` and ``inputs``; its parameters are
    new. With ``bias`` it gets one, of zeros, if it has none."""
    _, out_name, in_name = next(row for row in _SIZES if isinstance(module, row[0]))
    outputs, inputs = outputs or getattr(module, out_name), inputs or getattr(module, in_name)
    setattr(module, out_name, outputs)
    setattr(module, in_name, inputs)
    weight: Any = module.weight
    rows, columns = (outputs, inputs) if isinstance(module, nn.Linear) else (inputs, outputs)
    module.weight = nn.Parameter(weight.detach()[:rows, :columns].clone(), weight.requires_grad)
    old: Any = getattr(module, "bias", None)
    if old is not None:
        module.bias = nn.Parameter(old.detach()[:outputs].clone(), old.requires_grad)
    elif bias:
        module.bias = nn.Parameter(weight.new_zeros(outputs), weight.requires_grad)


def sublayer_parts(layer: nn.Module, sublayer: str, family: Family) -> list[str]:
    """The attributes of a layer that go with a sublayer, "attention" or "mlp": what computes, first, and the norms in
    front of it and behind, but for one that the other sublayer reads too.

    Raises ValueError for another sublayer.
    """
    if sublayer not in SUBLAYERS:
        raise ValueError(f"got a layer without {sublayer!r}, expected one of {', '.join(SUBLAYERS)}")
    before = [family.norm_in(layer, names) for names in (family.attention_norm, family.mlp_norm)]
    parts = [*family.mlp] if sublayer == "mlp" else [family.attention, *family.post_norms[:1]]
    own = before[SUBLAYERS.index(sublayer)]
    return parts if own is None or before[0] == before[1] else [*parts, own]


def leave_out(layer: nn.Module, sublayer: str, family: Family) -> None:
    """Take the attention or the MLP out of ``layer``, in place: the stream passes it as it is.

    Raises ValueError for another sublayer.
    """
    first, *others = sublayer_parts(layer, sublayer, family)
    number: Any = getattr(getattr(layer, first), "layer_idx", None)
    setattr(layer, first, NoMLP() if sublayer == "mlp" else NoAttention(number))
    for name in others:
        setattr(layer, name, nn.Identity())


def lacking(layer: nn.Module, family: Family) -> str | None:
    """The sublayer that was left out of ``layer``, "attention" or "mlp"; None: it has both."""
    if isinstance(getattr(layer, family.mlp[0], None), NoMLP):
        return "mlp"
    # Of a model without a row no path is known.
    return "attention" if family.attention and isinstance(
        getattr(layer, family.attention, None), NoAttention) else None


def thin_attention(layer: nn.Module, groups: int, family: Family, config: Any) -> None:
    """Leave the first ``groups`` key-value heads with their queries in ``layer``, of a model of this config, in place.

    Raises ValueError for a number of heads that it does not have.
    """
    all_groups, out = key_value_heads(config), layer.get_submodule(family.attention_out)
    present = groups_of(layer, family, config)
    if not 1 <= groups <= present:
        raise ValueError(f"config.kdp gives a layer {groups}/{present} heads")
    if groups < present and family.has_joined_heads(config):
        raise ValueError(f"got {groups} of {present} heads for a {family.model_type} layer, whose heads are joined "
                         "by a norm, or have norms or slopes of their own; expected all of them")
    columns = columns_of(out) * groups // present
    for module in map(layer.get_submodule, family.qkv):
        resize(module, outputs=_outputs(module) * groups // present)
    resize(out, inputs=columns)
    attention: Any = layer.get_submodule(family.attention)
    sizes = {"queries": config.num_attention_heads * groups // all_groups, "keys": groups, "columns": columns}
    for name, what in family.counts:
        owner, _, leaf = name.rpartition(".")
        if owner == "config":  # an attention of its own number of heads; all else stays with the model's config
            attention.config = OwnConfig(attention.config)
        setattr(attention.config if owner else attention, leaf, sizes[what])


def thin_mlp(layer: nn.Module, channels: int, family: Family) -> None:
    """Leave the first ``channels`` MLP channels in ``layer``, in place.

    Raises ValueError for a number of channels that it does not have.
    """
    if not family.mlp_out:
        raise ValueError(f"got fewer channels for a {family.model_type} layer, whose MLP is a mixture of experts; "
                         "expected the whole of it")
    down = layer.get_submodule(family.mlp_out)
    all_channels = columns_of(down)
    if not 1 <= channels <= all_channels:
        raise ValueError(f"config.kdp gives a layer {channels}/{all_channels} channels")
    for module in map(layer.get_submodule, family.mlp_in):
        resize(module, outputs=_outputs(module) * channels // all_channels)
    resize(down, inputs=channels)


def _outputs(module: Any) -> int:
    """Rows of what a projection puts out."""
    return module.out_features if isinstance(module, nn.Linear) else module.nf


def columns_of(module: Any) -> int:
    """Columns of what a projection takes in."""
    return module.in_features if isinstance(module, nn.Linear) else module.nx


def norms_and_readers(layer: nn.Module, family: Family) -> list[tuple[str, tuple[str, ...]]]:
    """The norms in front of attention and MLP, which may be the same one, each with the projections that read it.

    Raises ValueError for a family without them there, and for one with a norm in front of layer 0.
    """
    found = []
    for names, paths in ((family.attention_norm, family.qkv), (family.mlp_norm, family.mlp_in)):
        name = family.norm_in(layer, names)
        if name is None or not paths or family.embedding_norm:
            raise ValueError(f"got a {family.model_type} layer, expected norms in front of projections, and none "
                             "behind the embeddings: its stream cannot be made narrower")
        found.append((name, paths))
    return found


def slice_layer(layer: nn.Module, states: list[int], family: Family, width: int) -> None:
    """Make ``layer``, of a model of this ``width``, a sliced one in place: ``states`` [a, b, c] as in :func:`narrow`.

    What reads a norm with a bias gets a bias. Where attention and MLP are parallel b must be a.
    """
    entering, middle, leaving = states
    parallel = family.is_parallel(layer)
    if not all(1 <= size <= width for size in states) or (parallel and middle != entering):
        raise ValueError(f"config.kdp gives a layer of a model {width} wide the states {states}")
    readers = [(name, getattr(layer, name), paths) for name, paths in norms_and_readers(layer, family)]
    for (name, old, paths), size in zip(readers, (entering, middle), strict=True):
        for path in paths:
            resize(layer.get_submodule(path), inputs=size, bias=getattr(old, "bias", None) is not None)
        setattr(layer, name, ScaleFreeNorm(width, family.epsilon(old)))
    resize(layer.get_submodule(family.attention_out), outputs=leaving if parallel else middle)
    resize(layer.get_submodule(family.mlp_out), outputs=leaving)
    layer.__class__ = generated(family, "SlicedLayer")
    layer.kdp_width = entering  # type: ignore[assignment]
    like: Any = layer.get_submodule(family.mlp_out).weight
    options: Any = {"bias": False, "device": like.device, "dtype": like.dtype}
    if not parallel:
        layer.kdp_attention_shortcut = nn.Linear(entering, middle, **options)
    layer.kdp_mlp_shortcut = nn.Linear(middle, leaving, **options)


def _slice_outside(model: PreTrainedModel, width: int, family: Family) -> None:
    """Embeddings of this ``width``, a final norm without scale, and a head with a bias if that norm had one."""
    inner: Any = model.base_model

    def below(path: str) -> str:
        return path.partition(".")[2]

    for path in family.embeddings:
        resize(inner.get_submodule(below(path)), outputs=width)
    if family.embedded:
        pad = nn.ConstantPad1d((0, model.config.hidden_size - width), 0.0)
        inner.set_submodule(below(family.embedded), nn.Sequential(inner.get_submodule(below(family.embedded)), pad))
    norm: Any = inner.get_submodule(below(family.norm))
    head = model.get_output_embeddings()
    if head is not None:
        resize(head, bias=getattr(norm, "bias", None) is not None)
    inner.set_submodule(below(family.norm), ScaleFreeNorm(model.config.hidden_size, family.epsilon(norm)))


def generated(family: Family, role: str) -> type:
    """The generated class of ``family`` for role "Config", "Layer", "SlicedLayer" or one of ``HEADS``.

    Raises KeyError for a head that the family has not.
    """
    return _classes(family)[f"KDP{family.name}{role}"]


def auto_map(model_type: str) -> dict[str, str]:
    """What ``config.auto_map`` says for ``model_type`` "kdp_<x>": the classes of this file, for
    trust_remote_code."""
    name = f"KDP{FAMILIES[model_type.removeprefix(PREFIX)].name}"
    classes = _classes(FAMILIES[model_type.removeprefix(PREFIX)])
    found = {auto.__name__: name + role for role, auto in HEADS.items() if name + role in classes}
    return {key: f"{__name__.rpartition('.')[2]}.{value}" for key, value in
            {"AutoConfig": f"{name}Config", **found}.items()}


@cache
def _classes(family: Family) -> dict[str, type]:
    """The classes of ``family`` by name, made when the first is asked for: whom one checkpoint's code serves waits for
    no other family. They are attributes of this module, so that they pickle."""
    classes = _generate(family)
    globals().update(classes)
    # Heads look the model below them up here, also where this file came with the weights.
    stem = f"KDP{family.name}"
    AutoModel.register(classes[f"{stem}Config"], classes[f"{stem}Model"], exist_ok=True)
    return classes


def __getattr__(name: str) -> type:
    """A generated class by its name, for the Auto classes and for pickle."""
    for family in _ROWS:
        if name.startswith(f"KDP{family.name}") and name in (classes := _classes(family)):
            return classes[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _generate(family: Family) -> dict[str, type]:
    path = f"transformers.models.{family.package}"
    modeling = import_module(f"{path}.modeling_{family.package}")
    stock_config = getattr(import_module(f"{path}.configuration_{family.package}"), f"{family.name}Config")
    stem, common = f"KDP{family.name}", {"__module__": __name__}
    own = {"logit_scale": property(_logit_scale)} if family.head_divisor else {}  # others may have a field of that name
    config = type(
        f"{stem}Config", (PrunedConfig, stock_config), {**common, "model_type": PREFIX + family.model_type, **own}
    )
    layer = getattr(modeling, family.layer)
    sliced = {**common, "kdp_family": family, "kdp_arguments": tuple(inspect.signature(layer.forward).parameters)[2:]}
    classes: dict[str, type] = {
        f"{stem}Config": config,
        f"{stem}Layer": type(f"{stem}Layer", (FoldedLayer, layer), common),
        f"{stem}SlicedLayer": type(f"{stem}SlicedLayer", (SlicedLayer, layer), sliced),
    }
    for role, auto in HEADS.items():
        stock = getattr(modeling, family.causal_lm if role == "ForCausalLM" else family.name + role, None)
        if stock is None:  # not every family classifies
            continue
        no_split = [*(stock._no_split_modules or ()), f"{stem}Layer", f"{stem}SlicedLayer"]
        body = {**common, "config_class": config, "_auto_class": auto.__name__, "_no_split_modules": no_split}
        if role == "Model":
            body["forward"] = _own_forward(stock, f"{stem}Model")
        classes[stem + role] = type(stem + role, (PrunedModel, stock), body)
    return classes


def _own_forward(stock: type[nn.Module], name: str) -> Callable[..., Any]:
    """The forward of a class, as one that is found under the name of the generated class.

    vLLM keeps compiled models by pickling the forward with what it closes over. Transformers' own closes over wrapped
    functions that have its name, and are not found under it; this one over one that is.
    """
    forward_of_stock = stock.forward

    @wraps(forward_of_stock)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward_of_stock(self, *args, **kwargs)

    forward.__module__, forward.__qualname__ = __name__, f"{name}.forward"
    return forward


def register() -> None:
    """Make transformers' Auto classes know the generated ones. Safe to repeat."""
    for family in FAMILIES.values():
        classes, stem = _classes(family), f"KDP{family.name}"
        AutoConfig.register(PREFIX + family.model_type, classes[f"{stem}Config"], exist_ok=True)
        for role, auto in HEADS.items():
            if stem + role in classes:
                auto.register(classes[f"{stem}Config"], classes[stem + role], exist_ok=True)
