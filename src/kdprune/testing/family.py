"""The contract of a family: what each kind of edit must leave of its models."""

import copy
import pickle
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoModel, DynamicCache, PreTrainedModel, StaticCache

from kdprune.model.edits import Edit
from kdprune.model.families import decoder_layers, family_of
from kdprune.model.modeling_kdp import StandIn, generated, lacking, lacks_attention
from kdprune.model.surgery import apply_edits
from kdprune.testing.elsewhere import load_elsewhere
from kdprune.testing.kinds import KINDS, Kind, edits_of
from kdprune.testing.models import (
    IDS,
    Dense,
    check_names,
    close,
    dense_of,
    hidden_states,
    logits_of,
    run_checks,
    saved_and_loaded,
)
from kdprune.testing.reference import reference_logits

Build = Callable[[], PreTrainedModel]


@dataclass(frozen=True)
class Edited:
    """A dense model, the edits, and what the edits made of it. Shared by the checks of a case: none changes it."""

    dense: PreTrainedModel
    made: Dense  # what the dense model was before any edit
    edits: list[Edit]
    model: PreTrainedModel
    logits: Tensor


@lru_cache(maxsize=1)
def _edited(build: Build, kind: str) -> Edited:
    made = dense_of(build)
    edits = edits_of(made.model, kind)
    model = apply_edits(made.model, edits)
    return Edited(made.model, made, edits, model, logits_of(model))


@dataclass(frozen=True)
class FamilyCase:
    """One dense model under one kind of edit; made when it is first looked at."""

    name: str
    kind: str
    build: Build

    @property
    def edited(self) -> Edited:
        """The edited model with what it was made from."""
        return _edited(self.build, self.kind)

    @property
    def what(self) -> Kind:
        """What this kind of edit leaves."""
        return KINDS[self.kind]


def _pruned_class(check: Callable[..., None]) -> Callable[..., None]:
    """Marks a check of the generated classes: stock ones are transformers' own."""
    check.pruned_class = True  # type: ignore[attr-defined]
    return check


def _in_full(check: Callable[..., None]) -> Callable[..., None]:
    """The same for one that takes long: it is made for the kinds ``kinds_in_full`` alone."""
    check.in_full = True  # type: ignore[attr-defined]
    return _pruned_class(check)


def _padded(pad: int) -> dict[str, Tensor]:
    """The first row with ``pad`` tokens of padding on the left, beside the second without."""
    rows, length = IDS.shape
    ids, mask = torch.zeros(rows, length + pad, dtype=torch.long), torch.zeros(rows, length + pad, dtype=torch.long)
    ids[0, pad:], mask[0, pad:] = IDS[0], 1
    ids[1], mask[1] = IDS[1].repeat(2)[: length + pad], 1
    return {"input_ids": ids, "attention_mask": mask}


class FamilyContract:
    """Subclasses give ``model``, or several ``models`` by name; pytest collects one test for each kind of edit.

    That test makes every check of the case, the methods ``check_…``, and names all that fail.

    Kinds that follow each other share a model; every call must give one of its own, with the same weights, which make
    every layer count
    (:func:`kdprune.testing.with_random_weights`): six layers or more, 64 tokens, positions for 32, a width that four
    divides, an even number of key-value heads.

    Attributes:
        kinds: the edits that the family can have, names of ``KINDS``; leave "stream" out where a norm stands behind a
            sublayer.
        kinds_in_full: those for which the checks that take long are made: generation, gradients, copies, loading by
            AutoModel. ("mixed", "heads", "channels", "stream", "sublayers") have every place of a stand-in and every
            narrower form.
        kinds_elsewhere: those whose checkpoints one process without kdprune loads, one at least that has its own code.
    """

    models: ClassVar[Mapping[str, Build]] = {}
    kinds: ClassVar[Collection[str]] = tuple(KINDS)
    kinds_in_full: ClassVar[Collection[str]] = tuple(KINDS)
    kinds_elsewhere: ClassVar[Collection[str]] = ("mixed", "heads", "whole", "channels", "stream", "sublayers")

    @staticmethod
    def model() -> PreTrainedModel:
        """The dense model, if there is one alone."""
        raise NotImplementedError("give model() or models, the dense models that the contract is to edit")

    @classmethod
    def cases(cls) -> list[FamilyCase]:
        """Every model under every kind."""
        models = cls.models or {cls.__name__: cls.model}
        return [FamilyCase(name, kind, build) for name, build in models.items() for kind in cls.kinds]

    @classmethod
    def checks(cls, case: FamilyCase) -> list[str]:
        """The checks that are made of a case, methods ``check_…``, in the order in which they stand."""
        marks = {name: vars(getattr(cls, name)) for name in check_names(cls)}
        return [name for name, mark in marks.items()
                if not ("pruned_class" in mark and case.what.stock)
                and not ("in_full" in mark and case.kind not in cls.kinds_in_full)]

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """pytest's hook: a test with the argument ``case`` runs for each of them."""
        if "case" in metafunc.fixturenames:
            cases = self.cases()
            metafunc.parametrize("case", cases, ids=[f"{case.name}-{case.kind}" for case in cases])

    def test_it_keeps_the_contract(self, case: FamilyCase, tmp_path: Path) -> None:
        """Every check of a model that is edited once; what fails is told by the names of the checks."""
        run_checks(self, self.checks(case), case, tmp_path)

    # ------------------------------------------------------------------------------------------ what the edits say

    def check_it_computes_what_its_edits_say(self, case: FamilyCase) -> None:
        """Against the dense model with hooks and zeros in the places of what is gone."""
        logits, before = case.edited.logits, case.edited.made.logits
        assert torch.isfinite(logits).all()
        assert (logits - before).std() > 0.1 * before.std()  # else nothing here would be seen
        if case.kind in ("heads", "layer", "channels"):  # zeros are summed in another order
            close(logits, reference_logits(case.edited.dense, case.edited.edits))
        elif case.kind != "stream":
            assert torch.equal(logits, reference_logits(case.edited.dense, case.edited.edits))

    def check_its_class_and_its_depth_are_in_step(self, case: FamilyCase) -> None:
        """Class, architectures, layers, attention types; a stock result has no trace of the package."""
        model, dense = case.edited.model, case.edited.dense
        config = model.config
        depth = len(decoder_layers(dense)) - case.what.gone
        assert len(decoder_layers(model)) == config.num_hidden_layers == depth
        assert len(getattr(config, "layer_types", None) or range(depth)) == depth
        assert config.architectures == [type(model).__name__]
        if case.what.stock:
            assert type(model) is type(dense)
            assert type(config) is type(dense.config)
            assert not {"kdp", "auto_map"} & set(config.to_dict())
        else:
            assert type(model) is generated(family_of(dense), "ForCausalLM")

    @_pruned_class
    def check_its_config_says_what_heads_its_layers_have(self, case: FamilyCase) -> None:
        """transformers' form for layers that differ, which a server lays out its cache by: what the layers cache."""
        model, family = case.edited.model, family_of(case.edited.dense)
        config: Any = model.config
        assert config.is_heterogeneous == any(
            "groups" in width or lacks_attention(width) for width in config.kdp.get("widths", ()))
        assert type(config).from_dict(config.to_dict()).is_heterogeneous == config.is_heterogeneous
        if not config.is_heterogeneous or not family.lends_attention:
            return
        cache = DynamicCache(config=config)
        logits_of(model, past_key_values=cache, use_cache=True)
        cached: list[Any] = list(cache.layers)
        for layer, states, own in zip(decoder_layers(model), cached, config.per_layer_config, strict=True):
            assert (own.num_key_value_heads, own.head_dim) == (states.keys.shape[1], states.keys.shape[3])
            if lacking(layer, family) == "attention":
                continue
            out: Any = layer.get_submodule(family.attention_out)
            assert own.num_attention_heads * own.head_dim == out.weight.shape[1]

    def check_the_dense_model_is_as_it_was(self, case: FamilyCase) -> None:
        """Its logits to the bit, its depth and its config."""
        dense = case.edited.dense
        assert torch.equal(logits_of(dense), case.edited.made.logits)
        assert len(decoder_layers(dense)) == dense.config.num_hidden_layers
        assert case.edited.made.has_its_config()

    def check_it_shares_the_dense_models_weights(self, case: FamilyCase) -> None:
        """All but stand-ins and what the edits bring."""
        model, prefix = case.edited.model, f"{family_of(case.edited.dense).layers}."
        known = {id(p) for m in model.modules() if isinstance(m, StandIn) for p in m.parameters()}
        known |= {id(p) for p in case.edited.dense.parameters()}
        strangers = [name for name, p in model.named_parameters() if id(p) not in known]
        slots = {int(name.removeprefix(prefix).split(".")[0]) for name in strangers if name.startswith(prefix)}
        assert slots == case.what.new & set(range(len(decoder_layers(model))))
        assert case.kind == "stream" or all(name.startswith(prefix) for name in strangers)

    # ------------------------------------------------------------------------------------------ checkpoints

    def check_saving_and_loading(self, case: FamilyCase, directory: Path) -> None:
        """The same bits, by AutoModelForCausalLM and AutoModel; code lies beside pruned classes only."""
        loaded = saved_and_loaded(case.edited.model, directory, case.edited.logits)
        files = {path.name for path in directory.iterdir()}
        assert {"config.json", "generation_config.json", "model.safetensors"} <= files
        assert ("modeling_kdp.py" in files) is not case.what.stock
        assert getattr(loaded.config, "layer_types", None) == getattr(case.edited.model.config, "layer_types", None)
        if not case.what.stock and case.kind in self.kinds_in_full:
            parts: list[Any] = [AutoModel.from_pretrained(directory), case.edited.model.base_model]
            assert type(parts[0]) is generated(family_of(case.edited.dense), "Model")
            with torch.no_grad():
                assert torch.equal(*(part(IDS).last_hidden_state for part in parts))

    def checkpoints(self, directory: Path) -> dict[Path, Tensor]:
        """What a process without kdprune is to load: checkpoints of different names, with the logits of ``IDS``."""
        found = {}
        for case in self.cases():
            if case.kind in self.kinds_elsewhere:
                path = directory / f"{case.name}-{case.kind}"
                case.edited.model.save_pretrained(path)
                found[path] = case.edited.logits
        return found

    def test_it_loads_where_kdprune_is_not_installed(self, tmp_path: Path) -> None:
        """By the code beside the weights, if that is trusted; what it saves is whole again. Stock results by none."""
        expected = self.checkpoints(tmp_path)
        own = {path: (path / "modeling_kdp.py").exists() for path in expected}
        found = load_elsewhere(sorted(expected, key=own.__getitem__), tmp_path / "work")
        for path, logits in expected.items():
            assert torch.equal(found.logits[path.name], logits), path.name
            assert found.notes[path.name]["base"], path.name
            assert all(found.notes[path.name]["heads"].values()), path.name
            package = "transformers_modules." if own[path] else "transformers.models."
            assert found.notes[path.name]["module"].startswith(package), path.name
        assert found.notes["again"] is True
        assert "trust_remote_code" in found.notes["untrusted"]
        assert "does not recognize this architecture" in found.notes["bare"]

    # ------------------------------------------------------------------------------------------ the model at work

    @_pruned_class
    def check_left_padding(self, case: FamilyCase) -> None:
        """Padding on the left changes nothing for real tokens."""
        batch = _padded(5)
        positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        close(logits_of(case.edited.model, batch.pop("input_ids"), **batch, position_ids=positions)[0, 5:],
              case.edited.logits[0])

    @_pruned_class
    def check_prefill_in_two_chunks(self, case: FamilyCase) -> None:
        """With a cache between them."""
        model = case.edited.model
        with torch.no_grad():
            first = model(IDS[:, :7], use_cache=True)
            second = model(IDS[:, 7:], past_key_values=first.past_key_values, use_cache=True)
        close(torch.cat([first.logits, second.logits], dim=1), case.edited.logits)

    @_pruned_class
    def check_static_cache(self, case: FamilyCase) -> None:
        """A cache of fixed size, filled by a prefill and token by token."""
        model = case.edited.model
        cache = StaticCache(config=model.config, max_cache_len=16)
        found = [logits_of(model, part, past_key_values=cache, use_cache=True)
                 for part in (IDS[:, :9], IDS[:, 9:10], IDS[:, 10:11], IDS[:, 11:])]
        close(torch.cat(found, dim=1), case.edited.logits)

    @_in_full
    def check_generation_with_cache(self, case: FamilyCase) -> None:
        """Of a batch with padding the tokens that one pass without a cache finds the most probable."""
        batch, model, new = _padded(3), case.edited.model, 3
        generate: Any = model.generate
        options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
        found = generate(**batch, **options, use_cache=True)[:, -new:]
        ids = torch.cat([batch["input_ids"], found[:, :-1]], dim=1)
        mask = torch.cat([batch["attention_mask"], torch.ones_like(found[:, :-1])], dim=1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = logits_of(model, ids, attention_mask=mask, position_ids=positions, use_cache=False)
        assert torch.equal(found, logits[:, -new:].argmax(-1))

    @_pruned_class
    def check_hidden_states_are_the_embeddings_and_one_more_a_layer(self, case: FamilyCase) -> None:
        """As many as transformers promises, beginning with what enters layer 0."""
        found = hidden_states(case.edited.model)
        assert len(found) == case.edited.model.config.num_hidden_layers + 1
        assert case.kind == "stream" or torch.equal(found[0], case.edited.made.embedded)

    @_in_full
    def check_copies_and_pickles_compute_the_same(self, case: FamilyCase) -> None:
        """Bit for bit."""
        assert torch.equal(logits_of(copy.deepcopy(case.edited.model)), case.edited.logits)
        assert torch.equal(logits_of(pickle.loads(pickle.dumps(case.edited.model))), case.edited.logits)

    @_in_full
    def check_gradients_with_and_without_checkpointing(self, case: FamilyCase) -> None:
        """The same, and in every stand-in; with checkpointing it runs again on the way back."""
        model = copy.deepcopy(case.edited.model).train()
        plain, calls = _gradients(model)
        with warnings.catch_warnings():  # newer releases of transformers
            warnings.filterwarnings("ignore", "`gradient_checkpointing_enable` is deprecated", FutureWarning)
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        checkpointed, again = _gradients(model)
        assert plain
        assert plain.keys() == checkpointed.keys()
        for name, gradient in plain.items():
            close(checkpointed[name], gradient)
        stand_ins = [name for name, m in case.edited.model.named_modules() if isinstance(m, StandIn)]
        assert bool(stand_ins) == (case.kind not in ("layer", "channels", "stream", "sublayers"))
        assert sorted(calls) == sorted(stand_ins)
        assert sorted(again) == sorted(2 * stand_ins)
        for stand_in in stand_ins:
            assert plain[f"{stand_in}.readout.weight"].abs().max() > 0
            assert plain.get(f"{stand_in}.phase.weight", torch.ones(1)).abs().max() > 0


def _gradients(model: PreTrainedModel) -> tuple[dict[str, Tensor], list[str]]:
    """Gradients of the loss by parameter, and the stand-ins that were run, each as often as it was."""
    calls: list[str] = []

    def seen(name: str) -> Callable[[nn.Module, Any], None]:
        return lambda module, args: calls.append(name)

    hooks = [module.register_forward_pre_hook(seen(name))
             for name, module in model.named_modules() if isinstance(module, StandIn)]
    model.zero_grad(set_to_none=True)
    model(IDS, labels=IDS, use_cache=False).loss.backward()
    for hook in hooks:
        hook.remove()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, calls
