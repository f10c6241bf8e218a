"""Publishing a reference model: outliers against planted ones, and a page from a real (tiny) run."""

import importlib.util
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tiny_checkpoint import Bench

from kdprune.evaluation.suites import PHENOMENA
from kdprune.run.session import Session
from kdprune.runtime.stages import Stages

ROOT = Path(__file__).parents[1]
NEIGHBOURS = ("architectures", "card", "manifold", "model_page")
pytest.importorskip("lm_eval")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def publish() -> Iterator[ModuleType]:
    """The script's module, by its path."""
    sys.path.insert(0, str(ROOT / "reference"))
    try:
        spec = importlib.util.spec_from_file_location("reference_publish", ROOT / "reference" / "publish.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(ROOT / "reference"))
    yield module
    for name in NEIGHBOURS:
        sys.modules.pop(name, None)


@pytest.fixture
def repository(publish: ModuleType, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty repository, a finished run and BLiMP of two pairs a paradigm beside it."""
    root = tmp_path / "repository"
    (root / "reference" / "pages").mkdir(parents=True)
    monkeypatch.setattr(publish, "ROOT", root)
    shutil.copytree(bench.model, tmp_path / "run" / "model")
    for name in publish.RECORDS:
        shutil.copyfile(ROOT / "reference" / "records" / name, tmp_path / "run" / name)
    (tmp_path / "bench" / "blimp").mkdir(parents=True)
    pairs = [{"sentence_good": "The cats sleep.", "sentence_bad": "The cats sleeps."},
             {"sentence_good": "She sees him.", "sentence_bad": "Her sees he."}]
    for paradigm in (name for names in PHENOMENA.values() for name in names):
        (tmp_path / "bench" / "blimp" / f"{paradigm}.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    return root


def test_planted_outliers_are_found(publish: ModuleType) -> None:
    states = torch.randn(400, 24, generator=torch.Generator().manual_seed(0))
    states[:, [5, 17]] *= torch.tensor([8.0, 20.0])
    states[[3, 40, 41]] *= 30
    states[7, 2] = 2000.0
    found = sys.modules["manifold"]._boundary(states)
    sizes = states.double().square().mean(0).sqrt()
    assert {17} <= set(found["dims"]) <= {2, 5, 17}
    assert found["dims"] == sorted(found["dims"], key=lambda dim: -sizes[dim])
    assert found["times_median"] == pytest.approx([float(sizes[dim] / sizes.median()) for dim in found["dims"]])
    norms = states.norm(dim=1)
    assert found["large"].tolist() == (norms > 6 * norms.median()).tolist()
    assert found["large"][[3, 7, 40, 41]].all()
    assert found["massive_tokens"] == int((states.abs() > max(100, 1000 * float(states.abs().median()))).any(1).sum())
    assert found["massive_tokens"] >= 1


def test_outliers_of_a_model_with_one_large_embedding(publish: ModuleType, bench: Bench) -> None:
    run = Session(bench.model, None, 0, "cpu", "float32", False, Stages())
    with torch.no_grad():
        run.model.get_input_embeddings().weight[:, 3] *= 100
    tokens = run.calibration(bench.calibration, None, None)
    found = sys.modules["manifold"].outliers(run, tokens, batch=2)
    assert found["tokens"] == tokens.tokens
    assert len(found["boundaries"]) == 7
    assert all(boundary["dims"][0] == 3 for boundary in found["boundaries"])  # the stream carries it to the end
    ids = tokens.ids[tokens.mask]
    sizes = run.model.get_input_embeddings().weight.detach()[ids].square().mean(0).sqrt()
    assert found["boundaries"][0]["largest_dim_times_median"] == pytest.approx(float(sizes[3] / sizes.median()), 1e-4)
    again = sys.modules["manifold"].outliers(run, tokens, batch=5)
    assert [boundary["dims"] for boundary in again["boundaries"]] == [b["dims"] for b in found["boundaries"]]


def test_a_run_becomes_a_page(publish: ModuleType, repository: Path, bench: Bench, tmp_path: Path) -> None:
    arguments = [str(tmp_path / "run"), "tiny", "--data", str(tmp_path / "bench"), "--limit", "2", "--device", "cpu",
                 "--calibration", str(bench.calibration)]
    assert publish.main(arguments) == 0
    model = repository / "reference" / "models" / "tiny"
    assert (model / "model.safetensors").read_bytes() == (bench.model / "model.safetensors").read_bytes()
    assert (model / "tokenizer.json").is_file()
    assert (repository / "reference" / "records" / "tiny" / "run.json").is_file()
    results = repository / "reference" / "pages"
    record = json.loads((results / "model-tiny.json").read_text())
    page = (results / "model-tiny.md").read_text(encoding="utf-8")
    mean = sum(score["value"] for score in record["blimp"]["scores"]) / 12
    assert f"{100 * mean:.1f} % of the pairs" in page
    for layer, update in enumerate(record["manifold"]["relative_update"]):
        assert f"| {layer} | {update:.3f} | {record['manifold']['cosine'][layer]:.4f} |" in page
    assert str(tmp_path) not in page
    written = {path.name: path.read_bytes() for path in results.iterdir()}
    assert len(written) == 6
    assert publish.main(["--render", "tiny"]) == 0
    assert {path.name: path.read_bytes() for path in results.iterdir()} == written


def test_an_unfinished_run_is_refused(
    publish: ModuleType, repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run" / "perplexity.json").unlink()
    assert publish.main([str(tmp_path / "run"), "tiny", "--data", str(tmp_path / "bench")]) == 2
    assert "perplexity.json, expected a finished run" in capsys.readouterr().err
    assert [path.name for path in (repository / "reference").iterdir()] == ["pages"]
