"""Keys and values from the neighbour: the neighbour's own, in the fit as in the pruned model; and a quick run."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import LAYERS, WIDTH, build
from tiny_checkpoint import Bench
from transformers import PreTrainedModel

from kdprune.data import TokenSet
from kdprune.errors import KDPruneError
from kdprune.methods.blocks import Budget, spare_features
from kdprune.methods.kdp import KDP
from kdprune.methods.site import Site
from kdprune.model.activations import layer_states
from kdprune.model.block_states import PathRows, boundary_states, collect_block_states
from kdprune.model.families import decoder_layers, family_of
from kdprune.model.surgery import apply_edits
from kdprune.runtime import generator

pytestmark = pytest.mark.usefixtures("one_thread")
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
BLOCKS = [range(1, 3), range(4, 6)]  # one kept layer between them, which lends and follows a stand-in
QUICK: dict[str, Any] = {"kernel_epochs": 1, "inverse_epochs": 1, "refine_epochs": 1, "features": 6, "rank": 2}


@pytest.fixture(scope="module")
def pages() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield {name: importlib.import_module(name) for name in ("lent_keys", "shared_keys")}


def rows_with_padding(rows: int = 12, length: int = 10) -> TokenSet:
    ids = torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(rows, length, dtype=torch.bool)
    mask[::3, -2:] = False
    return TokenSet(ids, mask, "test")  # type: ignore[arg-type]


def method() -> KDP:
    return KDP(blocks=tuple((block.start, block.stop) for block in BLOCKS), **QUICK)


def fitted(pages: Any, model: PreTrainedModel, variant: str) -> PreTrainedModel:
    edits, records = pages["shared_keys"].fitted(
        model, rows_with_padding(), method(), method().shape(WIDTH), BLOCKS, variant, 0)
    assert [record["block"] for record in records] == [(1, 3), (4, 6)]
    return apply_edits(model, edits)


def test_own_keys_are_the_default_to_the_bit(pages: Any) -> None:
    model = build("llama3")
    expected = apply_edits(model, method()(model, rows_with_padding(), None, seed=0, batch_size=16).edits)
    found = fitted(pages, model, "own").state_dict()
    assert all(torch.equal(value, found[name]) for name, value in expected.state_dict().items())


@pytest.mark.parametrize("variant", ["shared", "aligned"])
@pytest.mark.parametrize("name", ["llama3", "opt", "qwen3"])
def test_the_fit_sees_what_the_pruned_model_computes(pages: Any, name: str, variant: str) -> None:
    """The keys in the fit are those of the neighbour's own pass, and the site's output is the pruned model's state."""
    lent, model, tokens = pages["lent_keys"], build(name), rows_with_padding()
    family, layers, rows = family_of(model), decoder_layers(model), torch.arange(5)
    before, own = {key: value.clone() for key, value in model.state_dict().items()}, layers[2].self_attn
    [states] = collect_block_states(model, tokens, [range(2, 4)], held=2, path=PathRows(1, 1), batch_size=4)
    near = boundary_states(model, tokens, [1], batch_size=4)[1]
    with lent.lending(model, states.block, variant == "aligned") as purse:
        assert layers[2].self_attn is not own
        paired = lent.Paired(states.inputs, near, purse, model, 1)
        states.__dict__["inputs"] = paired
        site = Site(model, states, method().shape(WIDTH).build(generator(0)), states.block.start, torch.device("cpu"))
        predicted = site.predict(rows)
    predicted.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in site.module.named_parameters()}
    assert not {f"{path}.weight" for path in family.qkv[1:]} & gradients.keys()
    assert all(gradient is not None and gradient.any() for gradient in gradients.values())
    assert layers[2].self_attn is own
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    seen: dict[str, torch.Tensor] = {}
    hooks = [layers[1].get_submodule(path).register_forward_hook(
        lambda _, __, output, path=path: seen.__setitem__(path, output)) for path in family.qkv[1:]]
    next(layer_states(model, tokens.select(rows), [2], 16))
    [hook.remove() for hook in hooks]
    for path in family.qkv[1:]:
        torch.testing.assert_close(purse.held[path], seen[path])
    pruned = apply_edits(model, [site.edit()])
    with lent.connected(pruned):
        state = next(layer_states(pruned, tokens.select(rows), [3], 16))[1][3]
    mask = tokens.mask[rows]
    torch.testing.assert_close(predicted.detach()[mask], state[mask], rtol=1e-4, atol=1e-5)
    other = Site(  # with the block's own keys: something else
        model, states, site.stand_in, states.block.start, torch.device("cpu"))
    assert not torch.allclose(other.predict(rows)[mask], state[mask], rtol=1e-2, atol=1e-2)


def test_shared_keys_save_the_projections_and_see_no_later_token(pages: Any) -> None:
    lent, model = pages["lent_keys"], build("llama3")
    own, shared = (fitted(pages, model, variant) for variant in ("own", "shared"))
    saved = sum(lent.projections(model, block.start) for block in BLOCKS)
    assert own.num_parameters() - shared.num_parameters() == saved == 2 * 2 * 16 * WIDTH
    names = [name for name, _ in shared.named_parameters()]
    assert not any("layers.1.self_attn.k_proj" in name for name in names)
    tokens = rows_with_padding(2)
    with lent.connected(shared), torch.no_grad():
        first = shared(tokens.ids).logits
        assert torch.isfinite(first).all()
        # Causal: what comes later changes nothing before it.
        other = tokens.ids.clone()
        other[:, -1] = 5
        torch.testing.assert_close(shared(other).logits[:, :-1], first[:, :-1])
    assert not any(layer._forward_hooks for layer in shared.modules() if isinstance(layer, torch.nn.Linear))


def test_what_is_saved_goes_into_features(pages: Any) -> None:
    lent, model = pages["lent_keys"], build("llama3")
    shape, blocks = KDP().shape(WIDTH), [range(1, 5)]
    # A ratio that leaves little to spare, so that no stand-in reaches its largest size.
    ratio = (Budget(model, shape, 0.0).removal(blocks[0]) - 100) / model.num_parameters()
    sizes = [spare_features(shape, kind(model, shape, ratio), blocks).features for kind in (Budget, lent.LentBudget)]
    per_feature = shape.parameters_per_feature()
    assert (sizes[1] - sizes[0]) * per_feature == pytest.approx(lent.projections(model, 1), abs=per_feature)


@pytest.mark.parametrize(("name", "block", "message"), [
    ("gpt2", range(1, 3), "expected one with projections"), ("gemma3", range(1, 3), "expected one with projections"),
    ("opt-350m", range(1, 3), "expected one with projections"), ("llama3", range(2), "starts at layer 0"),
])
def test_what_cannot_be_lent_is_refused(pages: Any, name: str, block: range, message: str) -> None:
    with pytest.raises(KDPruneError, match=message):
        pages["lent_keys"].check_lending(build(name), [block])


def test_the_page_is_measured_once_and_shows_every_model(
    pages: Any, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    page, file = pages["shared_keys"], tmp_path / "shared-keys.json"
    monkeypatch.setattr(page, "OPTIONS", {"protect": 0.0, "features": 6, "rank": 2, "blocks": ((2, LAYERS - 1),)})
    arguments = ["shared_keys", "--model", bench.model, "--text", bench.calibration, "--quick", "--file", file]
    monkeypatch.setattr(sys, "argv", [*map(str, arguments), "--name", "one"])
    page.main()
    records = json.loads(file.read_text())
    assert [record["variant"] for record in records] == list(page.VARIANTS)
    own, shared, _ = records
    assert own["dense"] == shared["dense"]
    assert own["cache"] == {"dense": LAYERS, "pruned": LAYERS - 2}
    assert shared["cache"] == {"dense": LAYERS, "pruned": LAYERS - 3}
    monkeypatch.setattr(page, "Bench", lambda *_: pytest.fail("measured again"))
    page.main()
    for record in records:
        page.keep({**record, "model": "two"}, file, page.key)
    page.render(file)
    text = file.with_suffix(".md").read_text()
    assert "## one" in text
    assert "## two" in text
    assert "no option" in text
    assert file.with_suffix(".svg").is_file()
