"""The report: results.json's schema, and everything made from it alone."""

import ast
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
import report_example
import yaml
from huggingface_hub import ModelInfo
from rich.console import Console

from kdprune.errors import KDPruneError
from kdprune.report import card, findings, fit_plots, gallery, plots
from kdprune.report import page as page_module
from kdprune.report.card import declared_licence, render_card
from kdprune.report.page import layer_strip, render_page, write_analysis
from kdprune.report.plots import save_analysis_plot
from kdprune.report.results import Curve, Fit, Layers, Norms, Outliers, Parameters, Results
from kdprune.report.schema import markdown
from kdprune.report.summary import count, duration, headline, size
from kdprune.report.table import print_summary

ROOT = Path(__file__).parents[1]
VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """Resources, ids, headings and text of a page; fails on tags that do not close in order."""

    def __init__(self, source: str):
        super().__init__()
        self.resources: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(source)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self._open.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
                self.resources.append(value or "")
            if name == "id":
                self.ids.append(value or "")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def run() -> Results:
    return report_example.results()


@pytest.fixture(scope="module")
def source(run: Results) -> str:
    return render_page(run)


def minimal(**changes: object) -> Results:
    """The least a run can say."""
    fields = {"created": "2026-01-02", "model": "a/b", "method": "kdp", "layers": Layers(dense=4)}
    return Results(**{**fields, "parameters": Parameters(dense=1000), **changes})


# --- results.json


def test_round_trip(run: Results, tmp_path: Path) -> None:
    path = run.save(tmp_path / "new" / "results.json")
    assert Results.load(path) == run
    assert Results.load(path.parent) == run
    assert [entry.name for entry in path.parent.iterdir()] == ["results.json"]


def test_not_finite_numbers_are_null(tmp_path: Path) -> None:
    run = minimal(
        recipe={"ratio": float("nan"), "nested": [{"x": float("inf")}], "block": range(2, 4)},
        seconds={"load": float("inf")},
        fit=[report_example.fit(1, 3).model_copy(update={"step2": Curve(loss=[float("nan"), 1.0])})],
    )

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    path = run.save(tmp_path / "results.json")
    record = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    assert record["recipe"] == {"ratio": None, "nested": [{"x": None}], "block": [2, 4]}
    assert record["seconds"] == {"load": None}
    assert record["fit"][0]["step2"]["loss"] == [None, 1.0]
    assert Results.load(path) == run


def test_derived_figures(run: Results) -> None:
    assert run.parameters.net_ratio == pytest.approx(1 - 2_658_944 / 3_548_288)
    assert run.perplexity is not None
    assert run.perplexity.excess_loss == pytest.approx(0.104)
    assert run.perplexity.retained == pytest.approx(45.72 / run.perplexity.pruned)
    assert run.speed is not None
    assert run.speed.decode.ratio == pytest.approx(196 / 141)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ("{", "not valid JSON"),
        ("[" * 200_000, "not valid JSON"),
        ("[]", "holds a list"),
        ('{"schema_version": 2}', "schema version 2"),
        ('{"schema_version": 1}', "created: Field required"),
        ("extra", "surprise: Extra inputs"),
        ("block", "0 <= start < end"),
        ("matrix", "must be 16 x 16|must be 17 x 17"),
        ("norms", "largest_norm has 16 entries, expected 17"),
    ],
)
def test_bad_files_are_one_line(run: Results, tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "results.json"
    record = run.model_dump(mode="json")
    record["surprise"] = 1
    changed = {
        "extra": record,
        "block": {**run.model_dump(mode="json"), "blocks": [[5, 5]]},
        "matrix": run.model_dump(mode="json"),
        "norms": run.model_dump(mode="json"),
    }
    changed["norms"]["analysis"]["largest_norm"].pop()
    changed["matrix"]["analysis"]["pair_cosine"].pop()
    if content is not None:
        path.write_text(json.dumps(changed[content]) if content in changed else content, encoding="utf-8")
    with pytest.raises(KDPruneError, match=message) as caught:
        Results.load(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_failed_write_leaves_the_old_file(
    run: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "results.json"
    path.write_text("old", encoding="utf-8")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(KDPruneError, match="No space left"):
        run.save(path)
    assert path.read_text(encoding="utf-8") == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_schema_page_is_current() -> None:
    assert (ROOT / "docs" / "results-schema.md").read_text(encoding="utf-8") == markdown()


# --- report.html


def test_page_is_one_self_contained_file(source: str) -> None:
    page = Page(source)
    assert [entry for entry in page.resources if not entry.startswith(("#", "data:"))] == []
    assert "script" not in page.tags
    assert "iframe" not in page.tags
    assert "@import" not in source
    assert "url(http" not in source
    assert len(page.ids) == len(set(page.ids))
    anchors = {entry[1:] for entry in page.resources if entry.startswith("#")}
    assert anchors <= set(page.ids)


def test_page_has_every_part(source: str) -> None:
    page = Page(source)
    for words in (
        "Dense against pruned", "Cosine", "Linear CKA", "RBF CKA", "Change per layer", "Massive tokens",
        "What a block costs", "Healing", "Step 1",
        "Step 2", "Step 3", "constants over training", "Norm decay", "Theorem 1’s bound",
        "Is kernel space closer to linear?", "Outlier dimensions",
        "Recipe", "Time per stage", "transformers", "5.16.0", "45.72", "25.06",
        "the people of the town", "49,152 tokens, window 512, stride 256",
    ):  # fmt: skip
        assert words in page.text.replace("\u00a0", " "), words
    assert page.tags.count("svg") == 3 + 4 + 2 + 3 + 5
    assert re.search(r"\b(nan|inf|None)\b", page.text) is None


def test_analysis_alone(run: Results, tmp_path: Path) -> None:
    alone = run.model_copy(update={"layers": Layers(dense=16), "parameters": Parameters(dense=3_548_288)})
    text = write_analysis(alone, tmp_path / "analysis.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.tags.count("svg") == 7
    assert "layer 1 writes them, layer 14 erases them" in page.text
    assert "the 0.2\u00a0% of tokens" in page.text
    assert "Dense against pruned" not in page.text
    assert "would be replaced" in page.text


def test_least_run_and_hostile_text() -> None:
    page = Page(render_page(minimal(model="<b>&x", recipe={"text": "<script>alert(1)</script>"})))
    assert page.tags.count("svg") == 0
    assert "script" not in page.tags
    assert "<b>&x" in page.text


def test_missing_numbers_are_drawn_around() -> None:
    analysis = report_example.analysis(4)
    hole = [[None] * 5 for _ in range(5)]
    analysis = analysis.model_copy(
        update={
            "pair_cosine": hole, "pair_linear_cka": hole, "pair_rbf_cka": hole, "relative_update": [None] * 4,
            "cosine": [None] * 4, "linear_cka": [None] * 4, "rbf_cka": [None] * 4, "state_norm": [],
            "largest_norm": [None] * 5, "median_norm": [0.0] * 5, "massive_above": None, "writes": [], "erases": [],
        }
    )  # fmt: skip
    fit = Fit(
        block=(1, 3), place="before", kind="linear", features=0, parameters=10,
        step1={"loss": [None, 0.0], "spectral_norm": [None, None]}, step2=Curve(loss=[None, None]),
        k_step_error=[None, 0.0], bound=[None, None], kernel_risk_by_step=[None, None], state_error=None,
        norms=Norms(feature_true=[None, None], feature_predicted=[None, None], output_true=0.0),
        outliers=Outliers(
            dimensions=[3], scale=[None], true=[None, 0.0], predicted=[1.0, 0.0], dimension=[3, -1]
        ),
    )  # fmt: skip
    page = Page(render_page(minimal(analysis=analysis, fit=[fit], blocks=[(1, 3)])))
    assert page.tags.count("svg") == 6 + 2 + 5


def test_a_record_from_before_massive_tokens_were_looked_for(source: str, run: Results) -> None:
    record = run.model_dump(mode="json")
    for name in ("largest_norm", "median_norm", "massive_above", "massive_share", "massive_move", "writes", "erases"):
        del record["analysis"][name]
    found = Results.parse(record)
    assert found.analysis is not None
    assert (found.analysis.writes, found.analysis.largest_norm) == ([], [])
    assert "Massive tokens" in source
    assert "Massive tokens" not in render_page(found.model_copy(update={"fit": []}))


def test_no_massive_tokens_are_said_to_be_none(run: Results) -> None:
    assert run.analysis is not None
    calm = run.analysis.model_copy(update={"largest_norm": run.analysis.median_norm, "writes": [], "erases": []})
    found = findings.massive(run.model_copy(update={"analysis": calm}))
    assert found == "The largest token norm is 1 times the median, in h₁₆: no layer writes or erases massive tokens."
    several = run.analysis.model_copy(update={"writes": [2, 3], "erases": []})
    assert "layers 2 and 3 write them. No block" in findings.massive(run.model_copy(update={"analysis": several}))


def test_damage_names_the_cheapest_block_and_the_chosen_ones(run: Results) -> None:
    found = run.analysis.block_damage
    assert len(found) == 5 + 5 + 4
    assert min(found, key=found.__getitem__) == (8, 10)
    text = findings.damage(run)
    assert text == (f"Of 14 blocks layers 8–9 cost least, {found[8, 10]:.3g} nats a token; chosen: layers 4–9 "
                    f"{found[4, 10]:.3g}.")
    svg = Page(plots.block_damage(run))
    for value in found.values():  # each in its cell
        assert f"{value:.2g}".removeprefix("0") in svg.text
    single = run.analysis.model_copy(update={"pair_damage": [
        [value if (s, e) == (4, 10) else None for e, value in enumerate(row)]
        for s, row in enumerate(run.analysis.pair_damage)]})
    assert plots.block_damage(run.model_copy(update={"analysis": single}))
    assert "What a block costs" not in render_page(run.model_copy(
        update={"analysis": run.analysis.model_copy(update={"pair_damage": []})}))


def test_what_held_out_rows_said_of_training_is_told(run: Results) -> None:
    heal, step = run.heal, run.fit[0].step3
    assert findings.healing(heal) == "Held-out loss 4 → 3.71 nats after 7.68\u00a0k tokens."
    assert heal.model_copy(update={"looks": []}).tokens_at_looks == [0, 2400, 4800, 7200, 9600]
    worse = heal.model_copy(update={"watched": [4.0, 4.1, 4.2, 4.3, 4.4], "kept": False})
    assert findings.healing(worse) == "Held-out loss 4 → 4 nats: training gained nothing."
    best = min(range(len(step.watched)), key=step.watched.__getitem__)
    assert findings.training(step).endswith(
        f"On held-out rows 0.45 → {step.watched[best]:.3g}, best after epoch {best}.")
    assert findings.training(step.model_copy(update={"watched": [0.4, 0.5]})).endswith("best before the first: undone.")
    assert "held-out rows" in fit_plots.training(run.fit[0], 3)
    assert "held-out rows" not in fit_plots.training(run.fit[0], 2)
    assert ("dense model" in plots.healing(run), "dense model" in plots.healing(
        run.model_copy(update={"heal": heal.model_copy(update={"loss": "kl"})}))) == (True, False)


def test_a_step_that_was_solved_at_once_has_no_picture_and_one_alone_is_wide(run: Results) -> None:
    fit = run.fit[0]
    assert (gallery.solved_steps(fit), [picture.width for picture in gallery.training_pictures(fit)]) == ([], [2, 2, 2])
    solved = fit.model_copy(update={"step1": None, "step2": Curve(loss=[0.4], cosine=[0.97])})
    assert gallery.solved_steps(solved) == [("Step 2: inverse network", "Solved at once: loss 0.4, cosine 0.97.")]
    assert [(one.title, one.width) for one in gallery.training_pictures(solved)] == [("Step 3: both together", 6)]
    assert "Solved at once: loss 0.4" in Page(render_page(run.model_copy(update={"fit": [solved]}))).text


def test_strip_covers_every_layer_once() -> None:
    run = report_example.results(32, ((6, 10), (20, 28)))
    cells = layer_strip(run)
    assert sum(cell.span for cell in cells) == 32
    assert [(cell.start, cell.span) for cell in cells if cell.kind == "replaced"] == [(6, 4), (20, 8)]
    dropped = layer_strip(run.model_copy(update={"fit": []}))
    assert [cell.start for cell in dropped if cell.kind == "dropped"] == [6, 20]
    assert [cell.start for cell in cells if cell.kind == "protected"] == [0, 1, 30, 31]


def test_analysis_plot(run: Results, tmp_path: Path) -> None:
    assert run.analysis is not None
    path = save_analysis_plot(run.analysis, tmp_path / "plot.svg", run.blocks)
    assert path.read_bytes().startswith(b"<?xml")  # a PNG is in test_pipeline.py


def test_analysis_plot_refuses_other_endings(run: Results, tmp_path: Path) -> None:
    assert run.analysis is not None
    with pytest.raises(KDPruneError, match=r"\.png"):
        save_analysis_plot(run.analysis, tmp_path / "plot.gif")


# --- terminal and model card


def test_table(run: Results, tmp_path: Path) -> None:
    console = Console(width=100, record=True, file=(tmp_path / "out").open("w", encoding="utf-8"))
    with console.file:
        print_summary(run, console, [tmp_path / "report.html"])
        text = console.export_text().replace("\u00a0", " ")
    for words in (
        "layers", "16", "11", "3,548,288", "25.06 %", "45.72", "50.73", "+0.104 nats", "90.1 %", "9,120",
        "1.35×", "1.39×", "4,096", "0.69×", "window 512", "The river rose", "<the morning>",
        "peak memory 1.22 GiB",
    ):  # fmt: skip
        assert words in text, words
    assert f"wrote {tmp_path / 'report.html'}" in text


def test_card(run: Results) -> None:
    text = render_card(run, {"license": "apache-2.0"})
    _, front, body = text.split("---\n", 2)
    fields = yaml.safe_load(front)
    assert fields["library_name"] == "transformers"
    assert fields["base_model"] == "reference/llama-16x128"
    assert fields["license"] == "apache-2.0"
    assert fields["tags"] == ["kdprune", "pruned", "kdp"]
    recipe = body.split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(recipe) == run.recipe
    for words in ("import kdprune", "trust_remote_code=True", "| 45.72 | 50.73 |", "the morning"):
        assert words in body


def test_card_of_a_local_stock_model() -> None:
    parameters = Parameters(dense=9, pruned=6)
    local = minimal(model="/data/models/small llama", blocks=[(1, 2)], parameters=parameters)
    text = render_card(local)
    assert "/data" not in text
    assert "base_model" not in text
    assert "small llama" in text
    assert "trust_remote_code" not in text


def test_words_and_numbers(run: Results) -> None:
    made = [count(3_548_288), count(999_600), count(12), size(1_310_000_000), duration(75.3), duration(8)]
    assert " / ".join(made).replace("\u00a0", " ") == "3.55 M / 1 M / 12 / 1.22 GiB / 1 min 15 s / 8.0 s"
    assert headline(run).startswith("Layers 4–9 of reference/llama-16x128 replaced by one stand-in")


# --- layering


def imports() -> Iterator[tuple[str, str]]:
    """Every (file, imported module) of the room."""
    for file in Path(page_module.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from ((file.name, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield file.name, node.module or "."


def test_room_imports_neither_torch_nor_rooms_that_do() -> None:
    found = list(imports())
    assert found
    for file, module in found:
        assert module.split(".")[0] not in ("torch", "transformers"), (file, module)
        if module.split(".")[0] == "kdprune":
            known = module in ("kdprune.errors", "kdprune.store.files") or module.startswith("kdprune.report")
            assert known, (file, module)


@pytest.mark.parametrize(("front", "expected"), [
    ("license: apache-2.0\nlanguage: en", {"license": "apache-2.0"}),
    ("license: other\nlicense_name: lake\nlicense_link: LICENSE",
     {"license": "other", "license_name": "lake", "license_link": "LICENSE"}),
    ("language: en", {}),
    ("license: [unclosed", {}),
    (None, {}),
])
def test_a_card_carries_the_licence_of_the_dense_model(
    run: Results, tmp_path: Path, front: str | None, expected: dict[str, str]
) -> None:
    (tmp_path / "README.md").write_text("no front matter" if front is None else f"---\n{front}\n---\nwords\n")
    assert declared_licence(str(tmp_path)) == expected
    fields = yaml.safe_load(render_card(run, declared_licence(str(tmp_path))).split("---\n", 2)[1])
    assert {name: fields[name] for name in fields if name.startswith("license")} == expected


def test_without_a_card_no_licence_is_said(tmp_path: Path) -> None:
    assert declared_licence(str(tmp_path)) == declared_licence("nobody/nowhere") == {}
    assert declared_licence(str(tmp_path / "model.gguf")) == {}


def test_the_licence_of_a_model_on_the_hub_is_what_the_hub_says(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(name: str, timeout: float) -> ModelInfo:
        return ModelInfo(id=name, private=False, tags=[], downloads=0, likes=0,
                         cardData={"license": "apache-2.0", "language": "en"} if name == "owner/model" else None)

    monkeypatch.setattr(card, "model_info", answer)  # no network in tests
    assert declared_licence("owner/model") == {"license": "apache-2.0"}
    assert declared_licence("owner/without-a-card") == {}
