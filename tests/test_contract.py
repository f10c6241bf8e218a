"""What every pruned model of every family must do, wherever its stand-ins are."""

import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from families import CONFIGS, LAYERS, build
from pruned import PLACES, prune
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel, StaticCache

from kdprune.model.families import decoder_layers, family_of
from kdprune.model.modeling_kdp import FAMILIES, StandIn, generated

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(5))  # longer than the sliding windows
LEFT = {"after": 3, "before": 4, "mlp": 5, "mixed": 3}  # layers left of six


@dataclass
class Case:
    """One model under the contract; tests leave it as it is."""

    name: str
    place: str
    dense: PreTrainedModel
    before: Tensor  # logits of the dense model before it was pruned
    model: PreTrainedModel
    logits: Tensor


@pytest.fixture(scope="module", params=[(n, p) for n in CONFIGS for p in PLACES], ids="-".join)
def case(request: pytest.FixtureRequest, one_thread: None) -> Case:
    name, place = request.param
    dense = build(name)
    before = logits(dense)
    model = prune(dense, place)
    return Case(name, place, dense, before, model, logits(model))


def logits(model: PreTrainedModel, **kwargs: object) -> Tensor:
    with torch.no_grad():
        return model(**{"input_ids": IDS, **kwargs}).logits


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_every_family_is_covered() -> None:
    assert {model_type for model_type, _ in CONFIGS.values()} == set(FAMILIES)


def test_it_is_shorter_and_finite_and_differs(case: Case) -> None:
    assert torch.isfinite(case.logits).all()
    assert (case.logits - case.before).std() > 0.1 * case.before.std()
    assert len(decoder_layers(case.model)) == case.model.config.num_hidden_layers == LEFT[case.place]
    assert type(case.model) is generated(family_of(case.dense), "ForCausalLM")


def test_the_dense_model_is_as_it_was_and_shares_its_weights(case: Case) -> None:
    assert torch.equal(logits(case.dense), case.before)
    assert len(decoder_layers(case.dense)) == case.dense.config.num_hidden_layers == LAYERS
    assert "kdp" not in case.dense.config.to_dict()
    own = {id(p) for m in case.model.modules() if isinstance(m, StandIn) for p in m.parameters()}
    shared = {id(p) for p in case.dense.parameters()}
    strangers = [n for n, p in case.model.named_parameters() if id(p) not in own | shared]
    with_context = case.place in ("mlp", "mixed")
    assert bool(strangers) == with_context
    assert len({n.split("layers.")[-1].split("h.")[-1].split(".")[0] for n in strangers}) == with_context


def test_prefill_in_two_chunks(case: Case) -> None:
    with torch.no_grad():
        first = case.model(IDS[:, :7], use_cache=True)
        second = case.model(IDS[:, 7:], past_key_values=first.past_key_values, use_cache=True)
    close(torch.cat([first.logits, second.logits], dim=1), case.logits)


def test_static_cache(case: Case) -> None:
    cache = StaticCache(config=case.model.config, max_cache_len=16)
    found = [logits(case.model, input_ids=part, past_key_values=cache, use_cache=True)
             for part in (IDS[:, :9], IDS[:, 9:10], IDS[:, 10:11], IDS[:, 11:])]  # fmt: skip
    close(torch.cat(found, dim=1), case.logits)


def padded(pad: int) -> dict[str, Tensor]:
    """The first sequence with ``pad`` tokens of padding on the left, beside the second without."""
    ids = torch.full((2, 12 + pad), 0)
    mask = torch.zeros_like(ids)
    ids[0, pad:], mask[0, pad:] = IDS[0], 1
    ids[1], mask[1] = IDS[1].repeat(2)[: 12 + pad], 1
    return {"input_ids": ids, "attention_mask": mask}


def test_left_padding(case: Case) -> None:
    batch = padded(5)
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    close(logits(case.model, **batch, position_ids=positions)[0, 5:], case.logits[0])


def test_hidden_states_have_one_more_entry_than_layers(case: Case) -> None:
    with torch.no_grad():
        output = case.model(IDS, output_hidden_states=True)
    assert len(output.hidden_states) == LEFT[case.place] + 1
    embedded = case.dense(IDS, output_hidden_states=True).hidden_states[0]
    assert torch.equal(output.hidden_states[0], embedded)


def test_generation_with_and_without_cache(case: Case) -> None:
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    cached, uncached = (case.model.generate(**padded(3), **options, use_cache=use) for use in (True, False))
    assert torch.equal(cached, uncached)


def test_copies_and_pickles_compute_the_same(case: Case) -> None:
    assert torch.equal(logits(copy.deepcopy(case.model)), case.logits)
    fresh = prune(build(case.name), case.place)  # no model pickles once transformers has hooked its hidden states
    assert torch.equal(logits(pickle.loads(pickle.dumps(fresh))), case.logits)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")  # in newer releases
def test_backward_through_gradient_checkpointing(case: Case) -> None:
    def gradients(checkpointing: bool) -> tuple[dict[str, Tensor], int]:
        model = copy.deepcopy(case.model).train()
        calls: list[nn.Module] = []
        for module in model.modules():
            if isinstance(module, StandIn):
                module.register_forward_pre_hook(lambda stand_in, args: calls.append(stand_in))
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, len(calls)

    (plain, calls), (checkpointed, repeated) = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        close(checkpointed[name], gradient)
    assert all(g.abs().max() > 0 for n, g in plain.items() if n.endswith(("phase.weight", "readout.weight")))
    assert repeated == 2 * calls  # stand-ins run again on the way back, within their layers


def test_plain_saving_and_loading(case: Case, tmp_path: Path) -> None:
    case.model.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is type(case.model)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(logits(loaded), case.logits)
    assert loaded.config.kdp == case.model.config.kdp
    assert {"config.json", "generation_config.json", "model.safetensors", "modeling_kdp.py"} <= {
        path.name for path in tmp_path.iterdir()
    }
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is generated(family_of(case.dense), "Model")
    with torch.no_grad():
        states = case.model.base_model(IDS).last_hidden_state
        assert torch.equal(base(IDS).last_hidden_state, states)


REMOTE = """
import json, sys
from pathlib import Path
sys.modules["kdprune"] = None  # the package is not installed here
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

root = Path(sys.argv[1])
ids = load_file(root / "ids.safetensors")["ids"]
logits, notes = {}, {}
with torch.no_grad():
    for path in sorted(p for p in root.iterdir() if p.is_dir() and p.name not in ("bare", "cache")):
        model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
        base = AutoModel.from_pretrained(path, trust_remote_code=True)
        logits[path.name] = model(ids).logits
        states = (m(ids).last_hidden_state for m in (model.base_model, base))
        notes[path.name] = [type(model).__module__.split(".")[0], torch.equal(*states)]
again = root / "again"
model.save_pretrained(again)
logits["again"] = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)(ids).logits.detach()
for name in ("bare", path.name):
    try:
        notes["loaded " + name] = type(AutoModelForCausalLM.from_pretrained(root / name)).__name__
    except ValueError as error:
        notes["refused " + name] = str(error)
    try:
        notes["config of " + name] = type(AutoConfig.from_pretrained(root / name)).__name__
    except ValueError:
        pass
save_file(logits, root / "logits.safetensors")
(root / "notes.json").write_text(json.dumps(notes))
"""


def test_loading_where_kdprune_is_not_installed(tmp_path: Path) -> None:
    """One process loads a model of every family by the code beside its weights."""
    from safetensors.torch import save_file

    save_file({"ids": IDS}, tmp_path / "ids.safetensors")
    expected = {}
    for name in CONFIGS:
        model = prune(build(name), "mixed")
        model.save_pretrained(tmp_path / name)
        expected[name] = logits(model)
    last = max(CONFIGS)
    shutil.copytree(tmp_path / last, tmp_path / "bare")
    config = json.loads((tmp_path / "bare" / "config.json").read_text())
    del config["auto_map"]
    (tmp_path / "bare" / "config.json").write_text(json.dumps(config))

    environment = {
        **os.environ,
        "HF_MODULES_CACHE": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", REMOTE, str(tmp_path)],
        env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found, notes = load_file(tmp_path / "logits.safetensors"), json.loads((tmp_path / "notes.json").read_text())
    for name in CONFIGS:
        assert torch.equal(found[name], expected[name]), name
        assert notes[name] == ["transformers_modules", True]
    assert torch.equal(found["again"], expected[last])
    assert "does not recognize this architecture" in notes["refused bare"]
    assert "trust_remote_code" in notes[f"refused {last}"]
    assert not any(key.startswith(("loaded", "config of")) for key in notes)


def test_the_installed_package_wins_over_the_code_beside_the_weights(tmp_path: Path) -> None:
    model = prune(build("llama3"), "mixed")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(loaded) is type(model)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.slow
def test_compiles_without_graph_breaks() -> None:
    model = prune(build("llama3"), "mixed")
    close(
        torch.compile(model, fullgraph=True, backend="aot_eager")(IDS, use_cache=False).logits.detach(), logits(model)
    )
