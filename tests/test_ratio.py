"""A ratio of all parameters, or of those outside the embeddings: counted by hand, met by every method, always shown."""

import re
from pathlib import Path
from typing import Any

import pytest
import report_example
from families import CONFIGS, LAYERS, VOCABULARY, WIDTH, build
from methods import FORMS, quick
from test_methods import random_tokens
from tiny_checkpoint import Bench, command, no_drawing
from transformers import PreTrainedModel

import kdprune
from kdprune.errors import KDPruneError
from kdprune.methods import METHODS
from kdprune.methods.common.method import DepthMethod
from kdprune.methods.common.target import Target
from kdprune.model.families import decoder_layers, outside_embeddings
from kdprune.model.surgery import apply_edits
from kdprune.planning.plan import plan
from kdprune.report.card import render_card
from kdprune.report.comparison_page import render_comparison
from kdprune.report.comparison_records import Comparison
from kdprune.report.comparison_table import columns, render_markdown
from kdprune.report.page import render_page
from kdprune.report.results import Parameters
from kdprune.report.summary import comparison, headline
from kdprune.runtime.run import Run

pytestmark = pytest.mark.usefixtures("one_thread")

INNER, CONTEXT = 48, 64
TABLES = ("model.embed_tokens.", "model.decoder.embed_tokens.", "model.decoder.embed_positions.", "gpt_neox.embed_in.",
          "transformer.wte.", "transformer.wpe.", "transformer.word_embeddings.", "lm_head.", "embed_out.")
SPACE = "\N{NO-BREAK SPACE}"


def outside(model: PreTrainedModel) -> int:
    """By the names of parameters."""
    return sum(weight.numel() for name, weight in model.named_parameters() if not name.startswith(TABLES))


def unwrapped(text: str) -> str:
    """Without line breaks, which may stand at any blank of a line that a long path begins."""
    return re.sub(r"\s+", " ", text)


# ------------------------------------------------------------------------------------------ what is counted


@pytest.mark.parametrize("name", CONFIGS)
def test_everything_counts_but_tables_and_head(name: str) -> None:
    model = build(name)
    assert outside_embeddings(model) == outside(model) < model.num_parameters()


@pytest.mark.parametrize(("name", "layer", "rest", "tables"), [
    ("llama2", 4 * WIDTH**2 + 3 * WIDTH * INNER + 2 * WIDTH, WIDTH, 2 * VOCABULARY),  # untied
    ("llama3.1", 3 * WIDTH**2 + 3 * WIDTH * INNER + 2 * WIDTH, WIDTH, VOCABULARY),  # tied; half as many keys and values
    # With positions, of which OPT has two more than its context; heads are tied.
    ("opt", 4 * (WIDTH + 1) * WIDTH + 2 * WIDTH * INNER + INNER + WIDTH + 4 * WIDTH, 2 * WIDTH,
     VOCABULARY + CONTEXT + 2),
    ("gpt2", 4 * (WIDTH + 1) * WIDTH + 2 * WIDTH * INNER + INNER + WIDTH + 4 * WIDTH, 2 * WIDTH, VOCABULARY + CONTEXT),
])
def test_sizes_by_hand(name: str, layer: int, rest: int, tables: int) -> None:
    model = build(name)
    assert outside_embeddings(model) == LAYERS * layer + rest
    assert model.num_parameters() - outside_embeddings(model) == tables * WIDTH


def test_projections_into_and_out_of_the_stream_are_no_embeddings() -> None:
    model = build("opt-350m")
    narrow = 16
    inside = (VOCABULARY * narrow) + (CONTEXT + 2) * WIDTH
    assert model.num_parameters() - outside_embeddings(model) == inside


def test_a_target_is_the_fewest_whole_parameters() -> None:
    assert [Target(ratio, "all", 10).parameters for ratio in (0.1, 0.11, 0.3, 0.999)] == [1, 2, 3, 10]
    assert Target(0.7, "all", 100).parameters == 70  # 0.7 · 100 is above 70 in floating point
    model = build("llama2")
    for of, total in (("all", model.num_parameters()), ("layers", outside(model))):
        assert METHODS["sleb"](ratio=0.25, of=of).target(model).total == total


# ------------------------------------------------------------------------------------------ every method


@pytest.mark.parametrize(("form", "name"), [
    *((form, "llama2") for form in FORMS), *((form, "opt") for form in METHODS)])
def test_the_ratio_of_the_layers_is_met_from_above(form: str, name: str) -> None:
    dense, method, tokens = build(name), quick(form, of="layers", ratio=0.3), random_tokens()
    method.check(dense, tokens)
    pruned = apply_edits(dense, method(dense, tokens, Run()).edits)
    layer = sum(weight.numel() for weight in decoder_layers(dense)[0].parameters()) / outside(dense)
    removed = 1 - outside(pruned) / outside(dense)
    assert 0.3 <= removed < 0.3 + (layer if isinstance(method, DepthMethod) else 0.005)
    assert outside_embeddings(pruned) == outside(pruned)


def test_the_same_ratio_of_all_takes_more_out_of_the_layers() -> None:
    dense = build("llama2")
    left = {}
    for of in ("all", "layers"):
        for name in ("llm-pruner", "slicegpt"):
            method = quick(name, of=of, ratio=0.3)
            left[name, of] = apply_edits(dense, method(dense, random_tokens(), Run()).edits)
    assert outside(left["llm-pruner", "all"]) < outside(left["llm-pruner", "layers"])
    # SliceGPT's tables get narrower too, and count for nothing among the layers.
    share = 1 - outside(left["slicegpt", "layers"]) / outside(dense)
    assert 0.3 <= share < 0.305
    assert left["slicegpt", "layers"].get_input_embeddings().weight.shape[1] < WIDTH


@pytest.mark.parametrize("of", ["all", "layers"])
@pytest.mark.parametrize("name", METHODS)
def test_the_largest_ratio_is_named_in_the_same_unit(name: str, of: str) -> None:
    dense, tokens = build("llama2"), random_tokens()
    unit = "" if of == "all" else " of the parameters outside the embeddings"
    with pytest.raises(KDPruneError, match=rf"^got ratio 0\.999{unit}, expected at most 0\.\d+, the largest ") as found:
        quick(name, of=of, ratio=0.999).check(dense, tokens)
    largest = float(re.findall(r"at most (0\.\d+)", str(found.value))[0])
    quick(name, of=of, ratio=largest).check(dense, tokens)
    with pytest.raises(KDPruneError, match=f"expected at most {largest}"):
        quick(name, of=of, ratio=largest + 2e-4).check(dense, tokens)


def test_what_a_ratio_is_of_is_one_of_two() -> None:
    with pytest.raises(KDPruneError, match="got of 'head', expected one of all, layers"):
        METHODS["kdp"](of="head")


# ------------------------------------------------------------------------------------------ where it is shown


@pytest.mark.parametrize("method", ["shortgpt", "slicegpt"])
def test_a_run_shows_both_ratios(method: str) -> None:
    dense = build("opt")
    ids = random_tokens(rows=12).ids
    found = kdprune.prune(dense, method=method, of="layers", ratio=0.3, calibration=ids, heldout=ids)
    counts, results = found.results.parameters, found.results
    assert (counts.dense, counts.pruned) == (dense.num_parameters(), found.model.num_parameters())
    assert (counts.dense_layers, counts.pruned_layers) == (outside(dense), outside(found.model))
    assert counts.net_ratio_layers == 1 - outside(found.model) / outside(dense) >= 0.3
    assert results.recipe["of"] == "layers"
    net, layers = f"{100 * counts.net_ratio:.2f}", f"{100 * counts.net_ratio_layers:.2f}"
    assert (net, layers) == tuple(
        row.pruned.removesuffix(f"{SPACE}%") for row in comparison(results) if "net ratio" in row.name)
    for text in (render_card(results), render_page(results)):
        assert f"{net}{SPACE}%" in text
        assert f"{layers}{SPACE}%" in text
    assert f"({100 * counts.net_ratio_layers:.1f}{SPACE}% of the layers')" in headline(results)


@no_drawing()
def test_a_comparison_shows_both_ratios(bench: Bench, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "calibration": bench.calibration, "heldout": bench.heldout, "samples": 12, "length": 32, "seeds": 1}
    found = kdprune.compare(
        str(bench.model), ["shortgpt", "slicegpt"], of="layers", ratio=0.3, output_dir=tmp_path / "out", **options)
    assert found.of == found.recipe["of"] == "layers"
    for row in found.rows:
        assert row.variant.options["of"] == "layers"
        assert row.net_ratio_layers.mean >= 0.3 > row.net_ratio.mean
    assert columns(found)[:2] == ["net ratio", "layers' net ratio"]
    assert Comparison.load(tmp_path / "out") == found
    table = (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert table == render_markdown(found)
    assert f"30.0{SPACE}% of the parameters outside the embeddings are to go" in table
    assert f"30{SPACE}% of model outside the embeddings" in render_comparison(found)


def test_a_plan_shows_both_ratios(tmp_path: Path) -> None:
    dense = build("gpt2")
    dense.config.save_pretrained(tmp_path)
    found = plan(tmp_path, of="layers", ratio=0.2, protect=0.0, length=16)
    method = quick("kdp", of="layers", ratio=0.2, blocks=found.blocks)
    pruned = apply_edits(dense, method(dense, random_tokens(), Run()).edits)
    assert found.net_ratio_layers == 1 - outside(pruned) / outside(dense) >= 0.2
    assert found.net_ratio == 1 - pruned.num_parameters() / dense.num_parameters() < found.net_ratio_layers
    assert found.dense.parameters_layers == outside(dense)
    shown = command("plan", tmp_path, "--of", "layers", "--ratio", 0.2, "--protect", 0, "--length", 16)
    assert shown.status == 0, shown.err
    both = f"{100 * found.net_ratio:.1f}{SPACE}% net, {100 * found.net_ratio_layers:.1f}{SPACE}% of the layers'"
    assert unwrapped(both) in unwrapped(shown.out)
    assert f"{outside(dense):,}" in shown.out
    short = command("plan", tmp_path, "--of", "layers", "--ratio", 0.6, "--blocks", "2-4", "--length", 16)
    assert "below the 60 % outside the embeddings asked for" in unwrapped(short.out)


def test_records_without_them_are_shown_as_they_were() -> None:
    older = report_example.results()
    assert older.parameters.net_ratio_layers is None
    assert [row.name for row in comparison(older)][:4] == ["layers", "parameters", "net ratio", "perplexity"]
    undrawn = older.model_copy(update={"fit": [], "analysis": None})
    assert "of the layers'" not in render_page(undrawn) + render_card(older)
    counts = Parameters(dense=100, pruned=75, dense_layers=80, pruned_layers=55)
    assert (counts.net_ratio, counts.net_ratio_layers) == (0.25, 0.3125)
    newer = older.model_copy(update={"parameters": counts})
    assert f"25.0{SPACE}% fewer parameters (31.2{SPACE}% of the layers') at" in headline(newer)
