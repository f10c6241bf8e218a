"""Pruned causal language models: the family table, the stand-in and the generated ``KDP<X>`` classes.

A pruned model is the stock transformer of its family with fewer layers. Where a run of layers was taken out,
a small trained module, the :class:`StandIn`, takes its place. It is either folded into a kept layer (it runs
after that layer, or before it where the run began at layer 0) or it is the MLP of an ordinary decoder layer
in a slot of its own. ``config.kdp`` says where each stand-in lives; the native weights keep their names.

This file needs torch and transformers alone. It is also shipped beside the weights, so that a pruned model
loads with ``trust_remote_code=True`` where kdprune is not installed; therefore it raises ``ValueError``,
holds the table of families, and imports nothing of the package.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.activations import ACT2FN

VERSION = 1  # of the record in config.kdp
PREFIX = "kdp_"  # of the model_type
KINDS = ("fourier", "mlp", "linear")
PLACES = ("after", "before", "mlp")


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
    mlp_norm: str = "post_attention_layernorm"  # a layer's norm in front of its MLP
    # Attributes of a layer that make up its MLP path, from that norm to the residual sum: where a stand-in is
    # the MLP of a layer, it replaces the first, and Identity the others.
    mlp: tuple[str, ...] = ("mlp",)
    attention_norm: str = "input_layernorm"  # a layer's norm in front of its attention
    # Paths within a layer: its attention module, the projections into it (one fused, or query, key, value) and out of
    # it, those into its MLP (fused, or gate and up) and out of it.
    attention: str = "self_attn"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    attention_out: str = "self_attn.o_proj"
    mlp_in: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    mlp_out: str = "mlp.down_proj"
    post_norms: tuple[str, ...] = ()  # norms between a sublayer and the residual sum it adds to (Gemma)
    numbered: str = ""  # config flag under which a layer's arithmetic depends on its number: refused


_GEMMA: Any = {"mlp_norm": "pre_feedforward_layernorm", "mlp": ("mlp", "post_feedforward_layernorm"),
               "post_norms": ("post_attention_layernorm", "post_feedforward_layernorm")}
# fmt: off
_ROWS = (
    Family("llama", "Llama", "LlamaForCausalLM", "LlamaDecoderLayer", "llama"),
    Family("mistral", "Mistral", "MistralForCausalLM", "MistralDecoderLayer", "mistral"),
    Family("qwen2", "Qwen2", "Qwen2ForCausalLM", "Qwen2DecoderLayer", "qwen2"),
    Family("qwen3", "Qwen3", "Qwen3ForCausalLM", "Qwen3DecoderLayer", "qwen3"),
    Family("phi3", "Phi3", "Phi3ForCausalLM", "Phi3DecoderLayer", "phi3",
           qkv=("self_attn.qkv_proj",), mlp_in=("mlp.gate_up_proj",)),
    Family("gemma2", "Gemma2", "Gemma2ForCausalLM", "Gemma2DecoderLayer", "gemma2", **_GEMMA),
    Family("gemma3_text", "Gemma3Text", "Gemma3ForCausalLM", "Gemma3DecoderLayer", "gemma3", **_GEMMA),
    Family("gpt_neox", "GPTNeoX", "GPTNeoXForCausalLM", "GPTNeoXLayer", "gpt_neox",
           layers="gpt_neox.layers", norm="gpt_neox.final_layer_norm", attention="attention",
           qkv=("attention.query_key_value",), attention_out="attention.dense",
           mlp_in=("mlp.dense_h_to_4h",), mlp_out="mlp.dense_4h_to_h"),
    Family("opt", "OPT", "OPTForCausalLM", "OPTDecoderLayer", "opt",
           layers="model.decoder.layers", norm="model.decoder.final_layer_norm",
           mlp_norm="final_layer_norm", mlp=("fc1", "activation_fn", "fc2"), attention_norm="self_attn_layer_norm",
           attention_out="self_attn.out_proj", mlp_in=("fc1",), mlp_out="fc2"),
    Family("gpt2", "GPT2", "GPT2LMHeadModel", "GPT2Block", "gpt2",
           layers="transformer.h", norm="transformer.ln_f", mlp_norm="ln_2",
           attention_norm="ln_1", attention="attn", qkv=("attn.c_attn",), attention_out="attn.c_proj",
           mlp_in=("mlp.c_fc",), mlp_out="mlp.c_proj", numbered="scale_attn_by_inverse_layer_idx"),
)
# fmt: on
FAMILIES: dict[str, Family] = {row.model_type: row for row in _ROWS}


class StandIn(nn.Module):
    """Maps the state that entered a run of layers to an estimate of the state that left it, token by token.

        x̂ = x / rms(x)                               if normalize, else x; computed in float32
        z = [cos p, sin p],  p = phase(x̂)            kind "fourier"
        z = act(phase(x̂))                            kind "mlp"
        z = x̂                                        kind "linear"
        y = readout(act(lift(z)))                    if hidden, else readout(z)
        out = x + y                                  if residual, else y

    Shapes: x, out (…, d) with d = ``width``; p (…, m) with m = ``features``; z (…, 2m | m | d).
    Parameters: ``phase`` Linear(d, m), absent for "linear"; ``lift`` Linear(2m | m | d, hidden), absent
    without ``hidden``; ``readout`` Linear(…, d). No buffers: what is not a parameter is in the constructor's
    arguments.

    Raises ValueError for an unknown kind or activation and for sizes that make no layer.
    """

    def __init__(
        self,
        width: int,
        *,
        kind: str = "fourier",
        features: int,
        hidden: int = 0,
        residual: bool = True,
        normalize: bool = True,
        activation: str = "gelu",
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"got stand-in kind {kind!r}, expected one of {', '.join(KINDS)}")
        if activation not in ACT2FN:
            raise ValueError(
                f"got activation {activation!r}, expected a name that transformers knows, such as 'gelu'"
            )
        if width < 1 or hidden < 0 or (features < 1 and kind != "linear"):
            raise ValueError(f"got a stand-in of width {width}, features {features}, hidden {hidden}")
        self.width, self.kind, self.hidden = width, kind, hidden
        self.features = 0 if kind == "linear" else features
        self.residual, self.normalize = residual, normalize
        self.activation, self.eps = activation, eps
        self.act = ACT2FN[activation]
        lifted = {"fourier": 2 * features, "mlp": features, "linear": width}[kind]
        if kind != "linear":
            self.phase = nn.Linear(width, features)
        if hidden:
            self.lift = nn.Linear(lifted, hidden)
        self.readout = nn.Linear(hidden or lifted, width)

    def forward(self, x: Tensor) -> Tensor:
        """x (…, d) → (…, d), in the dtype of x."""
        z = x
        if self.normalize:
            z = nn.functional.rms_norm(x.float(), (self.width,), eps=self.eps).to(x.dtype)
        if self.kind == "fourier":
            p = self.phase(z)
            z = torch.cat((p.cos(), p.sin()), dim=-1)
        elif self.kind == "mlp":
            z = self.act(self.phase(z))
        if self.hidden:
            z = self.act(self.lift(z))
        y = self.readout(z)
        return x + y if self.residual else y

    def spec(self) -> dict[str, Any]:
        """The constructor's arguments but ``width``, fit for JSON: ``StandIn(width, **spec)`` has this
        form."""
        names = ("kind", "features", "hidden", "residual", "normalize", "activation", "eps")
        return {name: getattr(self, name) for name in names}

    def extra_repr(self) -> str:
        """What the printed module says beside its children."""
        return ", ".join(f"{name}={value!r}" for name, value in {"width": self.width, **self.spec()}.items())


class FoldedLayer(nn.Module):
    """Mixed into a family's decoder layer: layer and stand-in as one, so that every layer keeps its slot.

    out = kdp(layer(h)) for ``kdp_place`` "after"; out = layer(kdp(h)) for "before". h, out (B, T, d). Where a
    layer returns a tuple, the rest of it stays. Layers become folded by :func:`place_stand_in`.
    """

    kdp: StandIn
    kdp_place: str

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The layer's own arguments and result."""
        if self.kdp_place == "before":
            return super().forward(self.kdp(hidden_states), *args, **kwargs)
        output = super().forward(hidden_states, *args, **kwargs)
        if isinstance(output, tuple):
            return (self.kdp(output[0]), *output[1:])
        return self.kdp(output)


class PrunedConfig:
    """Mixed into a family's config: the record of its stand-ins, and where the code beside the weights is
    found."""

    model_type: str
    _auto_class = "AutoConfig"

    def __post_init__(self, **kwargs: Any) -> None:
        """Takes ``kdp``, the record ``{"version", "blocks", "stand_ins"}``, out of the further arguments."""
        self.kdp: dict[str, Any] | None = kwargs.pop("kdp", None)
        super().__post_init__(**kwargs)  # type: ignore[misc]
        self.auto_map = auto_map(self.model_type)


class PrunedModel(PreTrainedModel):
    """Mixed into a family's base model and causal LM: the stock model, then its stand-ins as the config has
    them."""

    def __init__(self, config: Any, *inputs: Any, **kwargs: Any) -> None:
        super().__init__(config, *inputs, **kwargs)
        attach_stand_ins(self)
        self.post_init()


def place_stand_in(layer: nn.Module, stand_in: StandIn, place: str, family: Family) -> None:
    """Put ``stand_in`` into ``layer`` (changed in place): folded "after" or "before" it, or as its "mlp".

    Raises ValueError for an unknown place, and for a layer that holds a folded stand-in already.
    """
    if place == "mlp":
        setattr(layer, family.mlp[0], stand_in)
        for name in family.mlp[1:]:
            setattr(layer, name, nn.Identity())
        return
    if place not in PLACES:
        raise ValueError(f"got place {place!r} for a stand-in, expected one of {', '.join(PLACES)}")
    if isinstance(layer, FoldedLayer):
        raise ValueError("a layer can hold one folded stand-in, and this one holds one already")
    layer.__class__ = generated(family, "Layer")
    layer.kdp_place = place  # type: ignore[assignment]
    layer.kdp = stand_in


def attach_stand_ins(model: PreTrainedModel) -> None:
    """Give the freshly built stock layers of ``model`` the (untrained) stand-ins that ``config.kdp`` lists.

    Raises ValueError for a record of another version or one that names a layer the model does not have.
    """
    config: Any = model.config
    family = FAMILIES[config.model_type.removeprefix(PREFIX)]
    record = config.kdp or {"version": VERSION, "stand_ins": []}
    if record.get("version") != VERSION:
        raise ValueError(
            f"config.kdp has version {record.get('version')!r}, this code reads version {VERSION}"
        )
    layers: Any = model.base_model.get_submodule(family.layers.partition(".")[2])
    for item in record["stand_ins"]:
        if not 0 <= item["layer"] < len(layers):
            raise ValueError(f"config.kdp puts a stand-in into layer {item['layer']} of {len(layers)}")
        options = {key: value for key, value in item.items() if key not in ("layer", "place")}
        stand_in = StandIn(config.hidden_size, **options)
        place_stand_in(layers[item["layer"]], stand_in, item["place"], family)


def generated(family: Family, role: str) -> type:
    """The generated class of ``family`` for role "Config", "Model", "ForCausalLM" or "Layer"."""
    return globals()[f"KDP{family.name}{role}"]


def auto_map(model_type: str) -> dict[str, str]:
    """What ``config.auto_map`` says for ``model_type`` "kdp_<x>": the classes of this file, for
    trust_remote_code."""
    stem = f"{__name__.rpartition('.')[2]}.KDP{FAMILIES[model_type.removeprefix(PREFIX)].name}"
    return {
        "AutoConfig": f"{stem}Config",
        "AutoModel": f"{stem}Model",
        "AutoModelForCausalLM": f"{stem}ForCausalLM",
    }


def _generate(family: Family) -> dict[str, type]:
    """The four classes of ``family`` by name. They are attributes of this module, so that they pickle."""
    path = f"transformers.models.{family.package}"
    modeling = import_module(f"{path}.modeling_{family.package}")
    stock_config = getattr(import_module(f"{path}.configuration_{family.package}"), f"{family.name}Config")
    stem, common = f"KDP{family.name}", {"__module__": __name__}
    config = type(
        f"{stem}Config", (PrunedConfig, stock_config), {**common, "model_type": PREFIX + family.model_type}
    )
    classes: dict[str, type] = {
        f"{stem}Config": config,
        f"{stem}Layer": type(f"{stem}Layer", (FoldedLayer, getattr(modeling, family.layer)), common),
    }
    for role, stock_name, auto_class in (
        ("Model", f"{family.name}Model", "AutoModel"),
        ("ForCausalLM", family.causal_lm, "AutoModelForCausalLM"),
    ):
        stock = getattr(modeling, stock_name)
        no_split = [*(stock._no_split_modules or ()), f"{stem}Layer"]
        body = {**common, "config_class": config, "_auto_class": auto_class, "_no_split_modules": no_split}
        classes[stem + role] = type(stem + role, (PrunedModel, stock), body)
    return classes


for _row in _ROWS:
    globals().update(_generate(_row))


def register() -> None:
    """Make AutoConfig, AutoModel and AutoModelForCausalLM know the generated classes. Safe to repeat."""
    for family in FAMILIES.values():
        config = generated(family, "Config")
        AutoConfig.register(PREFIX + family.model_type, config, exist_ok=True)
        AutoModel.register(config, generated(family, "Model"), exist_ok=True)
        AutoModelForCausalLM.register(config, generated(family, "ForCausalLM"), exist_ok=True)
