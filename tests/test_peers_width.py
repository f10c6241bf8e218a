"""Width pruning: LLM-Pruner and SliceGPT against oracles, their records, and their checkpoints."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import CONFIGS, EXPERTS, LAYERS, NORMS_BEHIND, WIDTH, WIRINGS, build
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from kdprune import prune
from kdprune.data.tokens import TokenSet
from kdprune.errors import KDPruneError
from kdprune.evaluation.speed import kv_cache_bytes_per_token
from kdprune.methods.common.method import Method
from kdprune.methods.peers.llm_pruner import LLMPruner
from kdprune.methods.peers.saliency import Gradient, loss_gradients, random_slices, weight_saliency
from kdprune.methods.peers.slicegpt import SliceGPT
from kdprune.methods.peers.slicing import StreamSize, principal_components
from kdprune.model.families import decoder_layers, outside_embeddings
from kdprune.model.losses import language_loss
from kdprune.model.modeling_kdp import key_value_heads
from kdprune.model.structures import attention_parts, mlp_parts
from kdprune.model.surgery import Drop, Resize, Substitute, apply_edits
from kdprune.report.page import layer_strip
from kdprune.report.summary import headline
from kdprune.runtime.machine import generator
from kdprune.runtime.run import Run
from kdprune.testing import edits_of, random_stand_in
from kdprune.testing import logits_of as logits

pytestmark = pytest.mark.usefixtures("one_thread")
SLICEABLE = [name for name in CONFIGS if name not in (*NORMS_BEHIND, "bloom", *EXPERTS)]
SLICED = ("opt", "gpt_neox-sequential", "cohere2", "olmo", "nemotron", *(name for name in WIRINGS if name in SLICEABLE))
METHODS: dict[str, Any] = {"slicegpt": SliceGPT, "llm-pruner": LLMPruner}


def tokens(rows: int = 6, length: int = 24) -> TokenSet:
    ids = torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, : length // 2] = False
    return TokenSet(ids, mask, "random ids")  # type: ignore[arg-type]


def pruned(model: PreTrainedModel, method: Method, seed: int = 0) -> PreTrainedModel:
    return apply_edits(model, method(model, tokens(), Run(seed)).edits)


def removed(dense: PreTrainedModel, model: PreTrainedModel) -> float:
    return 1 - model.num_parameters() / dense.num_parameters()


# ------------------------------------------------------------------------------------------------ both


@pytest.mark.parametrize("name", ["llama3.1", "gpt_neox", "opt"])  # at another ratio the contract has every family
@pytest.mark.parametrize("method", METHODS)
def test_the_net_ratio_is_met_from_above_within_half_a_point(method: str, name: str) -> None:
    dense = build(name)
    for ratio in (0.1, 0.25):
        assert ratio <= removed(dense, pruned(dense, METHODS[method](ratio=ratio))) < ratio + 0.005


@pytest.mark.parametrize("name", ["llama3.1", "gpt_neox", "gpt2"])  # tied, untied, with a table of positions
def test_counted_outside_slicegpt_loses_as_much_there_as_methods_that_drop_layers(name: str) -> None:
    dense = build(name)
    wanted = 0.2 * dense.num_parameters()
    lost = outside_embeddings(dense) - outside_embeddings(pruned(dense, SliceGPT(ratio=0.2, counted="outside")))
    assert wanted <= lost < wanted + 0.005 * dense.num_parameters()
    most = outside_embeddings(dense) / dense.num_parameters()
    with pytest.raises(KDPruneError, match="expected at most 0\\."):
        SliceGPT(ratio=min(0.99, 1.01 * most), counted="outside").check(dense, tokens())


@pytest.mark.parametrize("method", METHODS)
def test_the_bundled_model_meets_the_ratio_too(bundled: PreTrainedModel, method: str) -> None:
    settings = METHODS[method](ratio=0.25)
    if method == "slicegpt":
        left = StreamSize.of(bundled).parameters(settings.widths(bundled))
    else:
        left = apply_edits(bundled, settings(bundled, tokens()).edits).num_parameters()
    assert 0.25 <= 1 - left / bundled.num_parameters() < 0.255


@pytest.mark.parametrize("method", METHODS)
def test_padding_enters_nothing(method: str) -> None:
    dense, text = build("llama3"), tokens()
    other = TokenSet(text.ids.clone(), text.mask, text.source)  # type: ignore[arg-type]
    other.ids[~other.mask] = 7
    first, second = (apply_edits(dense, METHODS[method]()(dense, rows).edits) for rows in (text, other))
    torch.testing.assert_close(logits(first), logits(second), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_the_results_say_what_is_narrowed(method: str, tmp_path: Path) -> None:
    result = prune(build("llama3"), method=method, ratio=0.2, calibration=tokens(12, 32).ids, progress=False)
    record = result.model.config.kdp["widths"]
    widths = {width.layer: width.model_dump(exclude={"layer"}, exclude_none=True) for width in result.results.widths}
    assert [widths.get(index, {}) for index in range(LAYERS)] == [
        {key: tuple(value) if isinstance(value, list) else value for key, value in width.items()} for width in record]
    strip = [cell.kind for cell in layer_strip(result.results)]
    assert strip == ["narrowed" if width else "kept" for width in record]
    assert "layers of" in headline(result.results)
    result.save(tmp_path / "out")
    assert "import kdprune" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_low_precision_keeps_its_dtype_and_loads_back(tmp_path: Path) -> None:
    for method in METHODS:
        model = pruned(build("qwen3").bfloat16(), METHODS[method](ratio=0.2))
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        model.save_pretrained(tmp_path / method)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / method, dtype="bfloat16")
        assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("method", METHODS)
def test_a_record_that_does_not_fit_is_refused(tmp_path: Path, method: str) -> None:
    pruned(build("llama3"), METHODS[method](ratio=0.2)).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    good = json.loads(file.read_text())
    assert good["kdp"]["version"] == 2
    widths = good["kdp"]["widths"]
    for message, change in (("version 4", {"version": 4}), ("widths of 1 layers of 6", {"widths": widths[:1]}),
                            ("not know|some layers", {"widths": [*widths[:-1], {"depth": 1}]})):
        file.write_text(json.dumps({**good, "kdp": {**good["kdp"], **change}}))
        with pytest.raises(ValueError, match=message):
            AutoModelForCausalLM.from_pretrained(tmp_path)


def test_edits_that_make_no_model_are_refused() -> None:
    model = build("llama3")
    edits = LLMPruner(ratio=0.2)(model, tokens()).edits
    first = next(edit for edit in edits if isinstance(edit, Resize))
    wrong = {
        "beside edits": [*edits, Substitute(range(1), random_stand_in(32))],
        "change the stream beside": [Resize(1, {"states": [8, 8, 8]}, {}), Drop(range(1))],
        "once at most": [first, first],
        "without weights": [Resize(first.layer, first.width, {})],
        "for a part of the model": [Resize(0, {"states": [8, 8, 8]}, {})],
        "0/2 heads": [Resize(0, {"groups": 0, "channels": 4}, {})],
        "no such parameter": [Resize(first.layer, first.width, {"nothing": torch.zeros(1)})],
    }
    for message, change in wrong.items():
        with pytest.raises(KDPruneError, match=message):
            apply_edits(model, change)
    with pytest.raises(KDPruneError, match="slicegpt made narrower"):
        apply_edits(apply_edits(model, edits_of(model, "stream")), [Drop(range(1))])


# ------------------------------------------------------------------------------------------------ LLM-Pruner


def resized(model: PreTrainedModel, kept: Tensor, channels: Tensor, index: int) -> Resize:
    layer, weights = decoder_layers(model)[index], {}
    for parts, chosen in ((attention_parts(model, layer), kept), (mlp_parts(model, layer), channels)):
        for part in parts:
            weights |= part.select(layer, chosen)
    return Resize(index, {"groups": len(kept), "channels": len(channels)}, weights)


@pytest.mark.parametrize("name", WIRINGS)
def test_removing_zeroed_structures_changes_nothing(name: str) -> None:
    model = build(name)
    gone_channels = torch.tensor([0, 7, 20])
    layer = decoder_layers(model)[2]
    for parts, gone in ((attention_parts(model, layer), torch.tensor([1])), (mlp_parts(model, layer), gone_channels)):
        module, members = layer.get_submodule(parts[-1].path), parts[-1].members[gone].flatten()
        with torch.no_grad():
            (module.weight.T if isinstance(module, torch.nn.Linear) else module.weight)[members] = 0.0
    groups = key_value_heads(model.config)
    kept = torch.tensor([index for index in range(groups) if index != 1])
    channels = torch.tensor([index for index in range(48) if index not in gone_channels.tolist()])
    small = apply_edits(model, [resized(model, kept, channels, 2)])
    torch.testing.assert_close(logits(small), logits(model), rtol=1e-4, atol=1e-5)
    assert small.num_parameters() < model.num_parameters()
    per_group = kv_cache_bytes_per_token(model) // (LAYERS * groups)
    assert kv_cache_bytes_per_token(small) == kv_cache_bytes_per_token(model) - per_group


@pytest.mark.parametrize("name", ["llama3", "phi3", "gpt_neox", "gpt2", "opt"])
def test_first_order_saliency_is_the_loss_change_of_a_smaller_structure(name: str) -> None:
    """Scaling a structure's weights by 1 − ε changes the loss by −ε Σ w g. Norms round to float32: ε is not tiny."""
    model, rows = build(name).double(), random_slices(tokens(), 2, 16, torch.Generator().manual_seed(0))
    layer, epsilon = decoder_layers(model)[3], 1e-3

    def loss() -> float:
        with torch.no_grad():
            logits_loss = [language_loss_double(model, row) for row in rows]
        return sum(logits_loss) / len(rows)

    weights = dict(layer.named_parameters())
    gradients = loss_gradients(model, weights, rows, "mixed")
    products = {key: p.detach().float() * gradients[key].mean for key, p in weights.items()}
    for parts, structure in ((attention_parts(model, layer), 1), (mlp_parts(model, layer), 5)):
        expected = sum(float(part.total(layer, products)[structure]) for part in parts)
        saved = {key: p.detach().clone() for key, p in weights.items()}
        changes = []
        for factor in (1 - epsilon, 1 + epsilon):
            with torch.no_grad():
                for part in parts:
                    module, members = layer.get_submodule(part.path), part.members[structure]
                    axis = int(part.inputs) if isinstance(module, torch.nn.Linear) else int(not part.inputs)
                    module.weight.index_copy_(axis, members, module.weight.index_select(axis, members) * factor)
                    if not part.inputs and getattr(module, "bias", None) is not None:
                        module.bias[members] *= factor
            changes.append(loss())
            with torch.no_grad():
                for key, value in saved.items():
                    weights[key].copy_(value)
        assert (changes[1] - changes[0]) / (2 * epsilon) == pytest.approx(expected, rel=5e-3, abs=2e-5)


def language_loss_double(model: PreTrainedModel, row: TokenSet) -> float:
    """The slice's mean loss in float64: ``language_loss`` rounds it to float32."""
    scores = model(input_ids=row.ids, use_cache=False).logits[0, :-1].double().log_softmax(-1)
    return -float(scores.gather(1, row.ids[0, 1:, None]).mean())


def test_orders_are_their_formulas() -> None:
    w, g1, g2 = (torch.randn(4, 3, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    gradient = Gradient((g1 + g2) / 2, (g1**2 + g2**2) / 2)
    acc = np.asarray((g1**2 + g2**2) / 2)
    first, second = np.asarray(w * (g1 + g2) / 2), np.asarray(w) ** 2 * acc
    for order, expected in (("first", first), ("second", second), ("mixed", first - second / 2)):
        found = weight_saliency(w, gradient, order)  # type: ignore[arg-type]
        np.testing.assert_allclose(found, abs(expected), rtol=1e-5)


def test_gradients_are_means_over_slices() -> None:
    model = build("llama3")
    rows = random_slices(tokens(), 3, 8, torch.Generator().manual_seed(0))
    weight = decoder_layers(model)[1].get_parameter("mlp.up_proj.weight")
    found = loss_gradients(model, {"up": weight}, rows, "mixed")["up"]
    each = [torch.autograd.grad(loss / count, weight)[0] for loss, count in (language_loss(model, row) for row in rows)]
    torch.testing.assert_close(found.mean, torch.stack(each).mean(0))
    torch.testing.assert_close(found.square, torch.stack(each).square().mean(0))
    assert all(row.mask.all() and row.ids.shape == (1, 8) for row in rows)


@pytest.mark.parametrize("order", ["first", "second", "mixed"])
def test_what_stays_has_the_largest_saliency(order: Any) -> None:
    model, method = build("llama3"), LLMPruner(ratio=0.25, order=order)
    plan = method.plan(model)
    edits = method(model, tokens(), Run(2)).edits
    text = tokens()
    rows = random_slices(text.select(slice(len(text) - text.held_out(0.1))), 10, 64, generator(2, 1))
    saliency = dict(method.saliencies(model, plan, rows))[1]
    layer = decoder_layers(model)[1]
    score = sum(part.total(layer, saliency) for part in mlp_parts(model, layer))
    direct = sum(saliency[f"mlp.{name}.weight"].double().sum(axis)
                 for name, axis in (("gate_proj", 1), ("up_proj", 1), ("down_proj", 0)))  # fmt: skip
    torch.testing.assert_close(score, direct)
    kept = direct.argsort(descending=True)[: plan[1].channels].sort().values
    assert torch.equal(edits[0].weights["mlp.up_proj.weight"], layer.get_parameter("mlp.up_proj.weight")[kept])  # type: ignore[union-attr]


def test_the_paper_range_is_scaled_and_layers_outside_it_are_shared() -> None:
    model = build("llama3")
    small = pruned(model, LLMPruner(ratio=0.2))
    assert [bool(width) for width in small.config.kdp["widths"]] == [False, True, True, True, True, True]
    assert decoder_layers(small)[0].mlp.up_proj.weight is decoder_layers(model)[0].mlp.up_proj.weight  # type: ignore[union-attr]
    with pytest.raises(KDPruneError, match="expected at most 0"):
        LLMPruner(ratio=0.9).check(model, tokens())
    with pytest.raises(KDPruneError, match="expected at least one pruned"):
        LLMPruner(keep_first=6).check(model, tokens())


# ------------------------------------------------------------------------------------------------ SliceGPT


@pytest.mark.parametrize("name", SLICED)
def test_turning_without_cutting_changes_nothing(name: str) -> None:
    model = build(name)
    turned = pruned(model, SliceGPT(sparsity=0.0))
    torch.testing.assert_close(logits(turned), logits(model), rtol=1e-4, atol=1e-4)
    assert not torch.equal(turned.get_input_embeddings().weight, model.get_input_embeddings().weight)


@pytest.mark.parametrize("name", SLICED)
def test_sizes_are_counted_before_they_are_made(name: str) -> None:
    model = build(name)
    method = SliceGPT(sparsity=0.25)
    widths = method.widths(model)
    small = pruned(model, method)
    assert set(widths) == {24}
    assert {weight.dtype for edit in method(model, tokens()).edits for weight in edit.weights.values()} == {model.dtype}  # type: ignore[union-attr]
    assert StreamSize.of(model).parameters(widths) == small.num_parameters()
    assert small.get_input_embeddings().weight.shape[1] == 24
    assert small.config.hidden_size == WIDTH
    assert not small.config.tie_word_embeddings
    assert small.config.kdp["widths"][-1]["states"][2] == WIDTH


def test_principal_components_are_numpys() -> None:
    x = torch.randn(50, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 9)
    moments = x.T @ x
    values, vectors = np.linalg.eigh(moments.numpy() + 0.01 * np.trace(moments.numpy()) / 8 * np.eye(8))
    found = principal_components(moments).numpy()
    assert (np.diff(values) > 0).all()
    np.testing.assert_allclose(abs(found.T @ vectors[:, ::-1]), np.eye(8), atol=1e-10)


def test_the_first_cut_is_the_pca_of_the_embeddings() -> None:
    model, text = build("llama2"), tokens()
    edits = SliceGPT(sparsity=0.25)(model, text).edits
    table = model.get_input_embeddings().weight.detach().double().numpy()
    rows = text.select(slice(len(text) - text.held_out(0.1)))
    x = table[rows.ids[rows.mask].numpy()]
    _, vectors = np.linalg.eigh(x.T @ x)
    found = edits[0].weights["model.embed_tokens.weight"].numpy()  # type: ignore[union-attr]
    np.testing.assert_allclose(abs(found), abs(table @ vectors[:, ::-1][:, :24]), atol=1e-6)


@pytest.mark.parametrize("name", ["llama3", "opt", "gpt_neox", "gpt_neox-sequential", "gpt2"])
def test_errors_grow_with_what_is_cut(name: str) -> None:
    """The more is cut the larger the error, and it starts from nothing."""
    model = build(name)
    gaps = [(logits(pruned(model, SliceGPT(sparsity=s, round_to=1))) - logits(model)).square().mean()
            for s in (0.0, 0.1, 0.5)]  # fmt: skip
    assert gaps[0] < 1e-8 < gaps[1] < gaps[2]


def test_what_slicegpt_cannot_do_is_refused() -> None:
    for name in set(CONFIGS) - set(SLICEABLE):
        with pytest.raises(KDPruneError, match=r"norm|experts"):
            SliceGPT().check(build(name), tokens())
    with pytest.raises(KDPruneError, match="expected at most"):
        SliceGPT(ratio=0.95).check(build("llama3"), tokens())
    with pytest.raises(KDPruneError, match="leaves a multiple of 8"):
        SliceGPT(sparsity=0.9).check(build("llama3"), tokens())
    with pytest.raises(KDPruneError, match="sparsity"):
        SliceGPT(sparsity=1.0)
