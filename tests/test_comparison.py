"""``kdprune.compare`` and ``kdprune.ablate``: one model, many variants, one protocol."""

import importlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from tiny_checkpoint import QUICK, Bench, command, no_drawing, random_ids, tiny_llama

import kdprune
from kdprune.comparison.units import Bench as UnitBench
from kdprune.comparison.variants import ablation_variants, parse_variant, split_methods
from kdprune.errors import KDPruneError
from kdprune.methods import METHODS
from kdprune.methods.kdp import fit_blocks
from kdprune.methods.peers.drop import ShortGPT
from kdprune.report import summary
from kdprune.report.comparison_page import render_comparison
from kdprune.report.comparison_records import Comparison, Stat
from kdprune.report.comparison_table import cells, print_comparison, render_markdown
from kdprune.runtime.run import Run
from kdprune.store.cache import Cache
from kdprune.train.trial import RATES

pytestmark = pytest.mark.usefixtures("one_thread")

FAST = ":".join(f"{name}={value}" for name, value in QUICK.items())
KDP_FAST = f"kdp:{FAST}"
LINEAR = "kdp:kernel=linear:context=none:refine=no:protect=0"
TOO_LONG = "kdp:blocks=1-40"
METHODS_USED = [LINEAR, KDP_FAST, TOO_LONG]


def options(bench: Bench) -> dict[str, Any]:
    return {"calibration": bench.calibration, "heldout": bench.heldout, "samples": 12, "length": 32}


def figures(result: Comparison) -> dict[str, Any]:
    """All that does not depend on the machine's speed."""
    left_out = {"seconds", "analysis_seconds", "stages", "speed", "peak_memory_bytes", "resumed"}
    return {f"{unit.variant} {unit.seed}": unit.model_dump(exclude=left_out) for unit in result.units}


@pytest.fixture(scope="module")
def done(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, Path]:
    """Three variants with two seeds, one of which cannot be. Shared: do not change it."""
    folder = tmp_path_factory.mktemp("comparison") / "out"
    return kdprune.compare(str(bench.model), METHODS_USED, seeds=2, output_dir=folder, **options(bench)), folder


def test_every_variant_has_a_row(done: tuple[Comparison, Path], bench: Bench) -> None:
    result, _ = done
    assert [row.variant.name for row in result.rows] == METHODS_USED
    alone = kdprune.prune(str(bench.model), seed=1, **{**QUICK, **options(bench)}).results
    unit = next(unit for unit in result.units if (unit.variant, unit.seed) == (KDP_FAST, 1))
    assert alone.perplexity is not None
    assert (unit.blocks, unit.parameters, unit.perplexity) == (alone.blocks, alone.parameters, alone.perplexity)
    assert all(found.parameters.net_ratio >= 0.25 for found in result.units)
    assert (unit.tokens, unit.peak_memory_bytes > 10**7, unit.analysis_seconds > 0) == (12 * 32, True, True)
    assert unit.seconds > unit.analysis_seconds


def test_failures_say_why_and_the_rest_goes_on(done: tuple[Comparison, Path]) -> None:
    result, _ = done
    failed = result.row(TOO_LONG)
    assert (failed.seeds, failed.excess_loss, len(failed.failures)) == ([], None, 2)
    assert "got block [1, 40)" in failed.failures[0].reason
    assert [row.seeds for row in result.rows] == [[0, 1], [0, 1], []]


def test_rows_by_text_and_window(bench: Bench, tmp_path: Path) -> None:
    given = options(bench) | {"heldout": {"first": bench.heldout, "second": bench.calibration}, "heldout_tokens": 200}
    found = kdprune.compare(str(bench.model), ["shortgpt"], seeds=1, windows=(64, 16), output_dir=tmp_path / "out",
                            **given)
    [row], [unit] = found.rows, found.units
    assert [(one.dataset, one.window) for one in row.texts] == [
        ("first", 64), ("first", 16), ("second", 64), ("second", 16)]
    for one, measured in zip(row.texts, [unit.perplexity, *unit.texts], strict=True):
        assert one.excess_loss.mean == measured.excess_loss
        assert one.divergence.mean == measured.divergence > 0
        assert 0 <= one.agreement.mean == measured.agreement <= 1
    table = (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert f"| {row.texts[3].excess_loss.mean:.3f} |" in table
    assert "second, window 16" in table
    assert "second, window 16" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_healing_of_a_model_that_is_read_from_disk_is_refused_before_any_work(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdprune.run.pipeline.is_streamed", lambda model: True)
    [failed] = kdprune.compare(str(bench.model), ["linear:heal=kl"], seeds=1, **options(bench)).failures
    assert "got heal for a model whose layers are read from disk" in failed.reason


def test_an_output_where_something_is_read_is_refused_in_python_too(bench: Bench) -> None:
    with pytest.raises(KDPruneError, match="which holds the model"):
        kdprune.compare(str(bench.model), ["shortgpt"], output_dir=Path(bench.model).parent, overwrite=True,
                        **options(bench))
    assert (Path(bench.model) / "config.json").is_file()


def test_rows_are_numpy_s_mean_and_deviation(done: tuple[Comparison, Path]) -> None:
    result, _ = done
    for row in result.rows[:2]:
        units = [unit for unit in result.units if unit.variant == row.variant.name]
        for found, values in (
            (row.excess_loss, [unit.perplexity.excess_loss for unit in units]),
            (row.net_ratio, [unit.parameters.net_ratio for unit in units]),
            (row.decode, [unit.speed.decode.ratio for unit in units]),
            (row.seconds, [unit.seconds for unit in units]),
        ):
            assert found is not None
            np.testing.assert_allclose(found.mean, np.mean(values))
            np.testing.assert_allclose(found.sd, np.std(values, ddof=1), atol=1e-12)
    assert Stat.of([None, 2.0]) == Stat(mean=2.0, sd=None, count=1)
    assert Stat.of([None]) is None


def test_a_terminal_shows_the_columns_that_fit(done: tuple[Comparison, Path]) -> None:
    result, shown = done[0], {}
    for width in (60, 100, 300):
        console = Console(width=width, file=io.StringIO())
        print_comparison(result, console)
        shown[width] = console.file.getvalue().splitlines()
        table = [line for line in shown[width] if "│" in line or "┃" in line]
        assert max(map(len, table)) <= width
        assert "…" not in "".join(table)  # nothing is cut
    heads = {width: " ".join(line for line in lines if "┃" in line) for width, lines in shown.items()}
    assert "excess" in heads[60]
    assert "peak" not in heads[60]
    assert "peak" in heads[300]


def test_files_are_made_from_the_record_alone(done: tuple[Comparison, Path], tmp_path: Path) -> None:
    result, folder = done
    loaded = Comparison.load(folder)
    assert loaded == result
    table, page = ((folder / name).read_text(encoding="utf-8") for name in ("table.md", "report.html"))
    assert render_markdown(loaded) == table
    for name in METHODS_USED:
        assert f"`{name}`" in table
        assert name in page
    assert "got block [1, 40)" in table
    assert "got block [1, 40)" in page
    assert page.count("<svg") == 4
    assert "<script" not in page
    (tmp_path / "results.json").write_bytes((folder / "results.json").read_bytes())
    assert command("report", tmp_path).status == 0
    assert (tmp_path / "table.md").read_text(encoding="utf-8") == table
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page


@no_drawing()
def test_an_interrupted_comparison_continues(
    done: tuple[Comparison, Path], bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    measure = UnitBench._measure
    measured: list[tuple[str, int]] = []

    def counted(self: UnitBench, variant: Any, run: Run, dense: Any) -> Any:
        if interrupt and len(measured) == 1:
            raise KeyboardInterrupt
        unit = measure(self, variant, run, dense)
        measured.append((variant.name, run.seed))
        return unit

    monkeypatch.setattr(UnitBench, "_measure", counted)
    interrupt = True
    folder, arguments = tmp_path / "out", options(bench)
    with pytest.raises(KeyboardInterrupt):
        kdprune.compare(str(bench.model), METHODS_USED, seeds=2, output_dir=folder, **arguments)
    assert measured == [(LINEAR, 0)]
    begun = Comparison.load(folder)  # what was done can be read
    assert [(unit.variant, unit.seed) for unit in begun.units] == [(LINEAR, 0)]
    assert "| not measured |" in render_markdown(begun)
    interrupt = False
    again = kdprune.compare(str(bench.model), METHODS_USED, seeds=2, output_dir=folder, **arguments)
    assert measured == [(LINEAR, 0), (KDP_FAST, 0), (LINEAR, 1), (KDP_FAST, 1)]
    assert figures(again) == figures(done[0])
    # Another ratio finds nothing to reuse; a damaged file is no finished unit.
    for file in (folder / "runs").glob("stages/kdp-seed1-*/record.json"):
        file.write_text("{", encoding="utf-8")
    kdprune.compare(str(bench.model), [LINEAR], seeds=2, output_dir=folder, **arguments)
    with pytest.raises(KDPruneError, match=r"holds the comparison at 0.25 .*, expected the comparison at 0.3"):
        kdprune.compare(str(bench.model), [LINEAR], seeds=1, ratio=0.3, output_dir=folder, **arguments)
    with pytest.raises(KDPruneError, match=rf"of {bench.model.name}, expected the comparison .*, of another: choose"):
        kdprune.compare(tmp_path / "another", [LINEAR], seeds=1, output_dir=folder, **arguments)
    kdprune.compare(str(bench.model), [LINEAR], seeds=1, ratio=0.3, output_dir=tmp_path / "other",
                    work_dir=folder / "runs", **arguments)
    assert measured[4:] == [(LINEAR, 1), (LINEAR, 0)]
    kdprune.compare(str(bench.model), [LINEAR], seeds=1, output_dir=folder, overwrite=True, **arguments)
    assert measured[6:] == [(LINEAR, 0)]
    monkeypatch.setattr("kdprune.comparison.units.code_identity", lambda: "another release")
    kdprune.compare(str(bench.model), [LINEAR], seeds=1, output_dir=folder, **arguments)
    assert measured[7:] == [(LINEAR, 0)]


OWN_METHOD = """
from dataclasses import dataclass
from typing import ClassVar
from kdprune.methods.common.method import Method
from kdprune.methods.common.result import MethodResult
from kdprune.model.edits import Drop

@dataclass(frozen=True, kw_only=True)
class Own(Method):
    title: ClassVar[str] = "Own"

    def __call__(self, model, tokens, run=None):
        return MethodResult([Drop(range({place}, {place} + 2))], tokens=0)
"""


def test_another_code_of_a_method_from_outside_is_measured_again(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # files of one length and second look the same to it
    found = []
    for place in (2, 2, 4):
        (tmp_path / "own_method.py").write_text(OWN_METHOD.format(place=place), encoding="utf-8")
        sys.modules.pop("own_method", None)
        monkeypatch.setitem(METHODS, "own", importlib.import_module("own_method").Own)
        shared = {**options(bench), "seeds": 1, "output_dir": tmp_path / "out"}
        [unit] = kdprune.compare(str(bench.model), ["own"], **shared).units
        single = kdprune.prune(str(bench.model), method="own", work_dir=tmp_path / "work", **options(bench))
        assert [(block.start, block.stop) for block in single.blocks] == unit.blocks
        found.append(unit.blocks)
    assert found == [[(2, 4)], [(2, 4)], [(4, 6)]]


def test_a_work_directory_of_its_own_continues_and_starts_anew(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured, measure = [], UnitBench._measure
    monkeypatch.setattr(UnitBench, "_measure", lambda *given: measured.append(given[1].name) or measure(*given))
    given = {"seeds": 1, "output_dir": tmp_path / "out", "work_dir": tmp_path / "work", **options(bench)}
    for anew, count in ((False, 1), (False, 1), (True, 2)):
        kdprune.compare(str(bench.model), ["shortgpt"], overwrite=anew, **given)
        assert len(measured) == count
    kdprune.compare(str(bench.model), ["shortgpt"], **{**given, "work_dir": "none"})
    with Cache(tmp_path / "work"), pytest.raises(KDPruneError, match=f"process {os.getpid()} .*is using"):
        kdprune.compare(str(bench.model), ["shortgpt"], overwrite=True, **given)
    assert list((tmp_path / "work" / "stages").glob("shortgpt-seed0-*"))
    assert not (tmp_path / "out" / "runs").exists()


def test_python_does_not_replace_what_is_no_comparison(bench: Bench, tmp_path: Path) -> None:
    for name in ("runs/tb/events", "results.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    with pytest.raises(KDPruneError, match="holds no comparison"):
        kdprune.compare(str(bench.model), ["shortgpt"], output_dir=tmp_path, overwrite=True, **options(bench))
    assert (tmp_path / "runs" / "tb" / "events").read_text() == (tmp_path / "results.json").read_text() == "{}"


def test_what_was_healed_on_other_text_is_measured_again(bench: Bench, tmp_path: Path) -> None:
    """Healing reads on in the calibration text: a file that grew leaves the rows of the fit as they were."""
    text = tmp_path / "text.txt"
    given = {**options(bench), "calibration": text, "blocks": ((2, 4),), "heal": "lm", "heal_tokens": 2000,
             "heal_rate": 0.01, "method": "linear"}
    variant = "linear:blocks=2-4:heal=lm:heal-tokens=2000:heal-rate=0.01"
    found = []
    for size in (2, 3):
        text.write_text(f"{bench.calibration.read_text(encoding='utf-8')}\n" * size, encoding="utf-8")
        run = kdprune.prune(str(bench.model), work_dir=tmp_path / "work", **given)
        fresh = kdprune.prune(str(bench.model), **given)
        units = [kdprune.compare(str(bench.model), [variant], seeds=1, output_dir=folder,
                                 **{**options(bench), "calibration": text}).units[0]
                 for folder in (tmp_path / "out", tmp_path / f"fresh-{size}")]
        assert run.results.perplexity == fresh.results.perplexity
        assert units[0].perplexity == units[1].perplexity
        found.append(run.results.perplexity.pruned)
    assert found[0] != found[1]


def test_null_rows_are_counted_in_every_record(bench: Bench, tmp_path: Path) -> None:
    rows = [*({"text": line} for line in bench.calibration.read_text(encoding="utf-8").splitlines()), {"text": None}]
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    given = {**options(bench), "calibration": text, "heldout": text, "heldout_tokens": 200}
    run = kdprune.prune(str(bench.model), method="shortgpt", **given).results
    found = kdprune.compare(str(bench.model), ["shortgpt"], seeds=1, **given)
    assert run.calibration.skipped == found.calibration.skipped == 1
    assert run.perplexity.skipped == found.units[0].perplexity.skipped == 1


def test_the_passes_of_a_search_are_told() -> None:
    found = kdprune.compare(tiny_llama(), ["evopress:passes=20", "shortgpt"], seeds=1, calibration=random_ids(),
                            heldout=random_ids(3, 20, seed=3))
    searched, plain = found.units
    assert 0 < searched.passes <= 20
    assert plain.passes is None
    assert "| search, passes |" in render_markdown(found)
    assert f"| {searched.passes:.1f} |" in render_markdown(found)


def test_the_cost_and_the_ends_of_every_method_are_told() -> None:
    model, rows, blocks = tiny_llama(), random_ids(), "blocks=1-3"
    names = [f"streamline:{blocks}:epochs=2:rate=0.001", f"streamline:{blocks}:epochs=1", "shortgpt", "sleb",
             "linearpatch", "slicegpt", "slicegpt:counted=outside", f"linear:{blocks}:heal=lm:heal_tokens=100"]
    result = kdprune.compare(model, names, seeds=1, calibration=rows, heldout=random_ids(3, 20, seed=3))
    given, searched, *others = result.units
    fitted = 11 * 32  # tokens; of twelve rows one is held out
    layer = sum(parameter.numel() for parameter in model.model.layers[1].parameters())
    assert (given.trained, given.rates) == (2 * fitted * layer, [])
    assert searched.trained == fitted * layer
    assert searched.rates[0] in RATES
    assert [unit.trained for unit in others[:5]] == [0] * 5
    healed = others[-1]
    assert healed.heal is not None
    assert healed.trained == healed.heal.parameters * healed.heal.tokens > 0
    ends = [row.variant.protected for row in result.rows]
    assert ends == [None, None, (0, 0), (1, 1), (1, 1), None, None, None]
    text = render_markdown(result)
    pace = result.units[0].speed.prefill.dense
    assert result.rows[0].equivalents.mean == pytest.approx(given.seconds * pace / result.calibration.tokens)
    assert "| trained × tokens |" in text
    assert "| time, passes |" in text
    assert f"| {summary.count(given.trained)} |" in text
    assert "each method as its own code has it: none: ShortGPT; 1 and 1: SLEB, LinearPatch." in text
    assert "SliceGPT's net ratio counts" in text
    assert "trained × tokens" in render_comparison(result)
    assert Comparison.model_validate_json(result.model_dump_json()) == result
    # The one that counts outside the embeddings loses as much there as those that drop layers.
    whole = result.dense.parameters
    assert result.dense.parameters_layers is not None
    assert result.rows[6].net_ratio_layers.mean * result.dense.parameters_layers >= 0.25 * whole > 0


def test_blocks_from_one_variant() -> None:
    result = kdprune.compare(
        tiny_llama(), [LINEAR, "kdp:blocks=1-3:context=none:refine=no"], blocks_from=KDP_FAST, seeds=[3],
        calibration=random_ids(), heldout=random_ids(3, 20, seed=3))
    first, linear, own = result.rows
    assert first.variant.name == KDP_FAST
    assert linear.blocks == first.blocks
    assert own.blocks == [[(1, 3)]]


def test_blocks_that_a_method_cannot_have_are_refused_when_it_gets_them() -> None:
    result = kdprune.compare(
        tiny_llama(), ["flattengpt"], blocks_from="shortgpt:blocks=1-2,3-4", seeds=[0], calibration=random_ids(),
        heldout=random_ids(3, 20, seed=3))
    assert [(failure.variant, "layers or more" in failure.reason) for failure in result.failures] == [
        ("flattengpt", True)]


def test_a_failed_source_of_blocks_fails_those_that_wait() -> None:
    result = kdprune.compare(
        tiny_llama(), [LINEAR], blocks_from=TOO_LONG, seeds=1, calibration=random_ids(), heldout=random_ids(3, 20))
    assert ["got block" in row.failures[0].reason or "no blocks to take" in row.failures[0].reason
            for row in result.rows] == [True, True]
    assert "none came to an end" in render_comparison(result)


@pytest.mark.parametrize(("arguments", "message"), [
    ({"methods": "kpd"}, "unknown method 'kpd'; did you mean 'kdp'"),
    ({"methods": "kdp:rnk=8"}, "unknown option of kdp 'rnk'; did you mean 'rank'"),
    ({"methods": "kdp:rank"}, "expected option=value"),
    ({"methods": "kdp:rank=many"}, "got rank 'many'"),
    ({"methods": ""}, "got no methods"),
    ({"seeds": 0}, "got seeds 0"),
    ({"seeds": 10**30}, "from 1 to 1000"),
    ({"seeds": [0, 10**30]}, "each from 0 to 4294967295"),
    ({"ratio": 2.0}, "got ratio 2.0"),
    ({"limit": 5}, "got suite_data or limit without a suite"),
    ({"limit": 0, "suite": "small"}, "got limit 0"),
])
def test_mistakes_are_told_before_any_work(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(KDPruneError, match=message):
        kdprune.compare("nowhere", **{"methods": "kdp", "output_dir": tmp_path / "out", **arguments})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("old")
    outcome = command("compare", "--methods", "kdp", "-o", tmp_path, "--overwrite")
    assert (outcome.status, outcome.err.count("\n")) == (2, 1)
    assert "holds no comparison" in outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_variants_by_name() -> None:
    assert split_methods("kdp:blocks=4-7,9-12:rank=2, sleb") == ["kdp:blocks=4-7,9-12:rank=2", "sleb"]
    variant = parse_variant("kdp:kernel=fixed:samples=8:heal=lm:heal-tokens=100", 0.3, {"heal": "kl"})
    assert variant.heal is not None
    assert (variant.method.ratio, variant.samples, variant.heal.loss, variant.heal.tokens) == (0.3, 8, "lm", 100)
    assert variant.options["kernel"] == "fixed"
    assert set(METHODS) >= {name.partition(":")[0] for name in METHODS_USED}


def test_healing_is_a_part_of_a_variant() -> None:
    assert parse_variant("shortgpt:heal=no", 0.3, {"heal": "kl", "heal_what": "lora"}).heal is None
    lora = ":heal=lm:heal_tokens=100:heal_rate=0.001"
    impossible = "uidl:heal=kl:heal_what=stand-ins"
    names = [f"shortgpt{lora}", f"slicegpt{lora}:heal_what=lora", f"llm-pruner{lora}", impossible]
    result = kdprune.compare(
        tiny_llama(), names, seeds=1, calibration=random_ids(), heldout=random_ids(3, 20, seed=3))
    assert [unit.heal is not None and unit.heal.tokens for unit in result.units] == [100, 100, 100]
    assert [unit.heal.what for unit in result.units if unit.heal] == ["lora"] * 3
    assert [(failure.variant, "puts nothing in" in failure.reason) for failure in result.failures] == [
        (impossible, True)]
    assert all(found.parameters.net_ratio >= 0.25 for found in result.units)


def test_ablation_of_two_parts(bench: Bench, tmp_path: Path) -> None:
    outcome = command(
        "ablate", bench.model, "--base", f"{KDP_FAST}:kernel=linear+learned+data", "--only", "rank,alpha", "--seeds",
        "1", "-o", tmp_path / "out", "--calibration", bench.calibration, "--heldout", bench.heldout, "--samples", "12",
        "--length", "32")
    assert outcome.status == 0, outcome.err
    record = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert record["kind"] == "ablation"
    groups = [row["variant"]["group"] for row in record["rows"]]
    assert list(dict.fromkeys(groups)) == ["Base", "α", "Rank r"]
    assert [row["variant"]["value"] for row in record["rows"] if row["variant"]["group"] == "Rank r"] == [0, 4, 16]
    assert not record["failures"]
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 2


def test_a_part_that_the_base_has_not_is_no_question() -> None:
    groups = {variant.group for variant in ablation_variants("kdp", 0.25, 128, 16, 256)}
    assert "Channels c" in groups
    assert not groups & {"Features m", "Rank r", "Operators", "α"}
    refused = command("ablate", "nowhere", "--base", "kdp", "--only", "rank")
    assert (refused.status, refused.err.count("\n")) == (2, 1)
    assert "expected one with learned: kdp:kernel=learned" in refused.err


def test_every_predefined_variant_is_one() -> None:
    base = "kdp:refine=no:kernel=linear+learned+data"
    names = [variant.name for variant in ablation_variants(base, 0.25, 128, 16, 256)]
    assert len(names) == len(set(names)) > 25
    assert all(name.startswith("kdp:refine=no") for name in names)


@no_drawing()
def test_a_unit_goes_on_inside_and_leaves_only_its_record(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    two_blocks = f"{KDP_FAST}:blocks=1-3,4-6"
    fitted: list[int] = []
    fit_block = fit_blocks.fit_block

    def counted(*arguments: Any, **options: Any) -> Any:
        states = folder / "runs" / "states"
        assert list(states.rglob("*.safetensors"))  # hidden states are spilled, as a single run does
        if interrupt and fitted:
            raise KeyboardInterrupt
        fitted.append(len(fitted))
        return fit_block(*arguments, **options)

    monkeypatch.setattr(fit_blocks, "fit_block", counted)
    folder, interrupt = tmp_path / "out", True
    with pytest.raises(KeyboardInterrupt):
        kdprune.compare(str(bench.model), [two_blocks], seeds=1, output_dir=folder, **options(bench))
    assert fitted == [0]
    interrupt = False
    found = kdprune.compare(str(bench.model), [two_blocks], seeds=1, output_dir=folder, **options(bench))
    [unit], [row] = found.units, found.rows
    assert fitted == [0, 1]
    assert unit.resumed
    assert row.seconds is None
    assert row.peak_memory_bytes is None
    assert cells(row, ["time", "peak memory"]) == [summary.MISSING] * 2
    kept = {path.name.rpartition("-")[0] for path in (folder / "runs" / "stages").iterdir()}
    assert kept == {"dense", "kdp-seed0"}
    assert not (folder / "runs" / "states").exists()
    monkeypatch.undo()
    [alone] = kdprune.compare(str(bench.model), [two_blocks], seeds=1, **options(bench)).units
    assert not alone.resumed
    assert (alone.perplexity, alone.blocks) == (unit.perplexity, unit.blocks)


def test_what_a_method_fails_with_is_kept_beside_its_row(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise ZeroDivisionError("halfway")

    monkeypatch.setattr(fit_blocks, "fit_block", broken)
    monkeypatch.setattr(ShortGPT, "check", broken)
    result = kdprune.compare(str(bench.model), [KDP_FAST, TOO_LONG, "shortgpt"], seeds=1, **options(bench))
    first, second, third = result.failures
    assert first.reason == "ZeroDivisionError: halfway"
    assert 'in broken' in first.traceback
    assert second.traceback == ""  # a refusal says it all
    assert third.reason == "ZeroDivisionError: halfway"
    assert "in broken" in third.traceback
