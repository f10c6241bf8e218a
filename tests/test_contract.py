"""What every pruned model of every family must do: stand-ins in every place."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from contract import IDS, Case, Contract, close, logits
from families import CONFIGS, build
from pruned import PLACES, prune
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

from kdprune.model.families import family_of
from kdprune.model.modeling_kdp import FAMILIES, StandIn, generated

pytestmark = pytest.mark.usefixtures("one_thread")
LEFT = {"after": 3, "before": 4, "mlp": 5, "mixed": 3, "last": 5, "heads": 5}  # layers left of six


def test_every_family_is_covered() -> None:
    assert {model_type for model_type, _ in CONFIGS.values()} == set(FAMILIES)


@pytest.fixture(scope="module", params=[(n, p) for n in CONFIGS for p in PLACES], ids="-".join)
def case(request: pytest.FixtureRequest, one_thread: None) -> Case:
    name, place = request.param
    dense = build(name)
    before = logits(dense)
    model = prune(dense, place)
    return Case(name, place, dense, before, model, logits(model), lambda: prune(build(name), place))


class TestStandIns(Contract):
    """Stand-ins with random weights, in every place."""

    def test_it_is_shorter_and_differs(self, case: Case) -> None:
        assert (case.logits - case.before).std() > 0.1 * case.before.std()
        assert case.model.config.num_hidden_layers == LEFT[case.kind]
        assert type(case.model) is generated(family_of(case.dense), "ForCausalLM")

    def test_it_shares_the_dense_models_weights(self, case: Case) -> None:
        own = {id(p) for m in case.model.modules() if isinstance(m, StandIn) for p in m.parameters()}
        shared = {id(p) for p in case.dense.parameters()}
        strangers = [n for n, p in case.model.named_parameters() if id(p) not in own | shared]
        with_context = case.kind in ("mlp", "mixed", "last", "heads")
        assert bool(strangers) == with_context
        assert len({n.split("layers.")[-1].split("h.")[-1].split(".")[0] for n in strangers}) == with_context

    def test_embeddings_come_first_in_hidden_states(self, case: Case) -> None:
        found, embedded = (m(IDS, output_hidden_states=True).hidden_states[0] for m in (case.model, case.dense))
        assert torch.equal(found, embedded)

    @pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")  # newer releases
    def test_stand_ins_learn_and_run_again_on_the_way_back(self, case: Case) -> None:
        for checkpointing in (False, True):
            model = case.make().train()
            calls: list[nn.Module] = []
            for module in model.modules():
                if isinstance(module, StandIn):
                    module.register_forward_pre_hook(lambda stand_in, args, seen=calls: seen.append(stand_in))
            if checkpointing:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model(IDS, labels=IDS, use_cache=False).loss.backward()
            ends = ("phase.weight", "readout.weight")
            learned = [p for m in set(calls) for n, p in m.named_parameters() if n in ends]
            assert learned
            assert all(p.grad is not None and p.grad.abs().max() > 0 for p in learned)
            assert len(calls) == (2 if checkpointing else 1) * len(set(calls))

    def test_what_is_saved_holds_all_it_needs(self, case: Case, tmp_path: Path) -> None:
        case.model.save_pretrained(tmp_path)
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
    # Heads are counted in another way in every one of these.
    fewer = {f"{name}-heads": name for name in ("gpt2", "gpt_neox", "llama3", "opt", "phi3")}
    for name, config_name in {**{name: name for name in CONFIGS}, **fewer}.items():
        model = prune(build(config_name), "heads" if name in fewer else "mixed")
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
    for name in expected:
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
