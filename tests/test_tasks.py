"""Tasks through lm-eval against the model's own log-likelihoods.

Where KDPRUNE_BENCH, or else ``shared/data/bench`` beside the repository, holds sciq.jsonl and blimp/*.jsonl, real rows
are used too.
"""

import copy
import json
import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tiny_checkpoint import Bench, command
from transformers import AutoTokenizer, PreTrainedModel

from kdprune.data.tokens import bundled_heldout
from kdprune.errors import KDPruneError
from kdprune.evaluation import task_loading
from kdprune.evaluation.suites import PHENOMENA, SUITES, Row, Text, local_files, suite_rows
from kdprune.evaluation.tasks import check_suite, run_suite
from kdprune.report.task_records import TaskScore

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.usefixtures("one_thread")
BENCH = Path(os.environ.get("KDPRUNE_BENCH", Path(__file__).parents[2] / "shared" / "data" / "bench"))


@pytest.fixture(scope="module")
def tokenizer(bundled: PreTrainedModel) -> Any:
    return AutoTokenizer.from_pretrained(bundled.name_or_path)


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    """``<name>.jsonl`` in the folder."""
    path = folder / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def sciq_rows(count: int) -> list[dict[str, Any]]:
    """Rows in SciQ's form, made of the bundled text: which word ends the sentence."""
    text = " ".join(bundled_heldout().read_text(encoding="utf-8").split())
    found = [part.split() for part in re.split(r"[.!?]", text) if 5 < len(part.split()) < 12][: count + 3]
    return [
        {"support": "" if index % 3 else " ".join(found[index - 1]) + ".", "question": " ".join(found[index][:-1]),
         "correct_answer": found[index][-1],
         **{f"distractor{n}": found[index + n][-1] for n in (1, 2, 3)}}
        for index in range(count)
    ]


def test_a_dense_model_that_is_not_there_is_said_before_any_work(bench: Bench, tmp_path: Path) -> None:
    write(tmp_path, "sciq", sciq_rows(4))
    run = ("eval", bench.model, "--suite", "sciq", "--suite-data", tmp_path)
    outcome = command(*run, "--dense", tmp_path / "nosuch")
    assert (outcome.status, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert "nosuch', which is no such directory" in outcome.err


@pytest.fixture(scope="module", params=["made", pytest.param("real", marks=pytest.mark.skipif(
    not BENCH.is_dir(), reason="no benchmark data here"))])
def sciq(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A folder with sciq.jsonl, and its rows."""
    rows = sciq_rows(12)
    if request.param == "real":
        rows = [json.loads(line) for line in (BENCH / "sciq.jsonl").read_text().splitlines()[:10]]
    return write(tmp_path_factory.mktemp("sciq"), "sciq", rows), rows


# ------------------------------------------------------------------------------------------ lm-eval's tasks


def test_local_rows_and_the_stock_task_score_the_same(
    sciq: tuple[Path, list[dict[str, Any]]], bundled: PreTrainedModel, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, rows = sciq
    (ours,) = run_suite(bundled, tokenizer, "sciq", data=[folder], batch_size=8)
    splits = {name: datasets.Dataset.from_list(rows) for name in ("train", "validation", "test")}
    asked = []

    def hub(path: str, **_: Any) -> datasets.DatasetDict:
        asked.append(path)
        return datasets.DatasetDict(splits)

    monkeypatch.setattr(datasets, "load_dataset", hub)
    harness = task_loading.harness()
    with task_loading.silenced():
        where = Path(harness.tasks.__file__).parent / "sciq"
        stock = harness.tasks.TaskManager(include_path=str(where), include_defaults=False).load(["sciq"])
        model = harness.models.huggingface.HFLM(pretrained=bundled, tokenizer=tokenizer, batch_size=8)
        found = harness.evaluator.evaluate(lm=model, task_dict=stock, bootstrap_iters=10)["results"]["sciq"]
    assert asked == ["allenai/sciq"]
    assert (ours.value, ours.stderr, ours.items) == (found["acc,none"], found["acc_stderr,none"], len(rows))
    mine = task_loading.load_task("sciq", [folder])["sciq"].instances
    theirs = stock["tasks"]["sciq"].instances
    assert [item.arguments for item in mine] == [item.arguments for item in theirs]
    for item, stock_item in zip(mine, theirs, strict=True):  # ours goes on from the context's keys and values
        (((value, greedy),), ((expected, likeliest),)) = item.resps, stock_item.resps
        assert (value, greedy) == (pytest.approx(expected, rel=1e-6), likeliest)


@torch.no_grad()
def test_decisions_are_those_of_the_model_itself(
    sciq: tuple[Path, list[dict[str, Any]]], bundled: PreTrainedModel, tokenizer: Any
) -> None:
    folder, rows = sciq
    (score,) = run_suite(bundled, tokenizer, ["sciq"], data=[folder], limit=5, batch_size=3)
    right = []
    for row in rows[:5]:
        context = f"{row['support'].lstrip()}\nQuestion: {row['question']}\nAnswer:"
        sums = []
        for answer in ("distractor1", "distractor2", "distractor3", "correct_answer"):
            start = len(tokenizer(context)["input_ids"])
            ids = torch.tensor([tokenizer(f"{context} {row[answer]}")["input_ids"]])
            likely = bundled(ids).logits[0, :-1].double().log_softmax(-1)
            sums.append(likely[torch.arange(start - 1, ids.shape[1] - 1), ids[0, start:]].sum().item())
        right.append(max(range(4), key=sums.__getitem__) == 3)
        found = task_loading.load_task("sciq", [folder])["sciq"].instances[4 * (len(right) - 1) :][:4]
        assert [item.resps[0][0] for item in found] == pytest.approx(sums, abs=2e-3)
    items = "".join(str(int(value)) for value in right)
    assert score == TaskScore(
        task="sciq", group="sciq", metric="acc", value=sum(right) / 5, stderr=score.stderr, chance=0.25, items=5,
        higher_is_better=True, right=[items])
    assert score.stderr == pytest.approx(math.sqrt(score.value * (1 - score.value) / 4))


def test_blimp_is_a_mean_over_the_paradigms_of_a_phenomenon(
    bundled: PreTrainedModel, tokenizer: Any, tmp_path: Path
) -> None:
    pairs = [("The cats sleep.", "The cats sleeps."), ("She sees him.", "Her sees he."), ("xq", "The dog ran home.")]
    for index, paradigm in enumerate(name for names in PHENOMENA.values() for name in names):
        write(tmp_path, f"blimp/{paradigm}",
              [{"sentence_good": good, "sentence_bad": bad} for good, bad in pairs[: 2 + index % 2]])
    bundled.train()
    try:
        scores = run_suite(bundled, tokenizer, "blimp", data=[tmp_path])
        assert bundled.training
    finally:
        bundled.eval()
    assert [score.group for score in scores] == list(PHENOMENA)
    assert {score.task for score in scores} == {"blimp"}
    for score in scores:
        names = [f"blimp_{name}" for name in PHENOMENA[score.group]]
        tasks = [task_loading.load_task(name, [tmp_path])[name] for name in names]
        found, errors, items = [], [], []
        for task in tasks:
            sums = [item.resps[0][0] for item in task.instances]
            right = [good > bad for good, bad in zip(sums[::2], sums[1::2], strict=True)]
            found.append(sum(right) / len(right))
            items.append("".join(str(int(value)) for value in right))
            errors.append(found[-1] * (1 - found[-1]) / (len(right) - 1))
        assert score.value == pytest.approx(sum(found) / len(found))
        assert score.right == list(items)
        assert score.stderr == pytest.approx(math.sqrt(sum(errors)) / len(errors))
        assert (score.chance, score.items) == (pytest.approx(0.5), sum(len(task.instances) for task in tasks) // 2)


def test_lambada_and_texts_have_perplexities_without_chance(
    bundled: PreTrainedModel, tokenizer: Any, tmp_path: Path
) -> None:
    write(tmp_path, "lambada_openai", [{"text": f"{row['question']} {row['correct_answer']}"} for row in sciq_rows(12)])
    (tmp_path / "wikitext2_test.txt").write_text(bundled_heldout().read_text(encoding="utf-8")[:4000], encoding="utf-8")
    suite = ["lambada_openai"]
    accuracy, perplexity = run_suite(bundled, tokenizer, suite, data=[tmp_path])
    assert (accuracy.metric, accuracy.chance, accuracy.higher_is_better) == ("acc", 0.0, True)
    assert (perplexity.metric, perplexity.chance, perplexity.higher_is_better) == ("perplexity", None, False)
    sums = [item.resps[0][0] for item in task_loading.load_task(suite[0], [tmp_path])[suite[0]].instances]
    assert perplexity.value == pytest.approx(math.exp(-sum(sums) / len(sums)))
    assert (len(accuracy.right[0]), accuracy.right[0].count("1") / 12) == (12, accuracy.value)
    assert perplexity.right == []
    assert perplexity.stderr is not None
    again = run_suite(bundled, tokenizer, suite, data=[tmp_path])
    assert again == [accuracy, perplexity]
    text = next(row for row in SUITES["small"] if isinstance(row, Text))
    tokens = task_loading.load_text(text, [tmp_path], tokenizer, 4096, limit=4)
    assert tokens.tokens == 256


def made_rows() -> dict[str, list[dict[str, Any]]]:
    """Rows of every local form that is not the hub's, and of the hub data sets of our own task files."""
    return {
        "hellaswag": [{"query": "A man", "choices": ["sat.", "eats a car.", "b.", "c."], "gold": 0}],
        "boolq": [{"passage": "Water is wet.", "question": "is water wet", "answer": True}],
        "wsc273": [{"context_options": ["The cup because the cup", "The cup because the man"],
                    "continuation": "broke.", "gold": 1}],
        "strategyqa": [{"query": "Q: Is it?\nA:", "choices": ["Yes", "No"], "gold": 1}],
        "c3": [{"context": ["男：你好。", "女：再见。"], "question": "谁？", "choice": ["男", "女", "猫"],
                "answer": "女"}],
        "cmnli": [{"sentence1": "下雨", "sentence2": "天晴", "label": 2}],
        "race_middle": [{"article": "Tom ran.", "question": "Who ran?", "options": ["A", "Tom", "C", "D"],
                         "answer": "B"}],
        "chid": [{"candidates": ["甲", "乙", "丙"], "content": ["一#idiom000001#二#idiom000002#三", "#idiom000003#。"],
                  "answers": {"text": ["乙", "甲", "丙"], "candidate_id": [1, 0, 2]}}],
    }


@pytest.mark.parametrize(("task", "arguments", "gold", "chance"), [
    ("hellaswag", [("A man", " sat.")], 0, 1 / 4),
    ("boolq", [("Water is wet.\nQuestion: is water wet?\nAnswer:", " no")], 1, 1 / 2),
    ("wsc273", [("The cup because the cup", "  broke."), ("The cup because the man", "  broke.")], 1, 1 / 2),
    ("bigbench_strategyqa_multiple_choice", [("Q: Is it?\nA:", " Yes"), ("Q: Is it?\nA:", " No")], 1, 1 / 2),
    ("c3", [("男：你好。\n女：再见。\n问题：谁？\n答案：", "男")], 1, 1 / 3),
    ("cmnli", [("下雨？", "或许，天晴"), ("下雨？", "对，天晴"), ("下雨？", "错，天晴")], 2, 1 / 3),
    ("race_middle", [("Article: Tom ran.\n\nQuestion: Who ran?\nAnswer:", " A")], 1, 1 / 4),
    ("chid", [("一", "甲二甲三"), ("一", "乙二甲三"), ("一", "丙二甲三"), ("一乙二", "甲三"), ("一乙二", "乙三"),
              ("一乙二", "丙三"), ("", "甲。")], 1, 1 / 3),
])
def test_prompts_and_right_answers_of_what_is_adapted_or_ours(
    task: str, arguments: list[tuple[str, str]], gold: int, chance: float, bundled: PreTrainedModel, tokenizer: Any,
    tmp_path: Path
) -> None:
    file = local_files(task)[0].file
    write(tmp_path, file, made_rows()[file])
    (score,) = run_suite(bundled, tokenizer, task, data=[tmp_path])
    found = task_loading.load_task(task, [tmp_path])[task]
    assert [item.arguments for item in found.instances][: len(arguments)] == arguments
    assert score.chance == pytest.approx(chance)
    sums = [item.resps[0][0] for item in found.instances if item.doc_id == 0]
    choices = found.instances[0].doc.get("choices", [" "] * len(sums))
    if score.metric == "acc_norm":
        sums = [value / len(choice) for value, choice in zip(sums, choices, strict=True)]
    if score.items == 1:
        assert score.value == float(max(range(len(sums)), key=sums.__getitem__) == gold)
        assert score.stderr is None
    else:
        assert [item["gold"] for item in found.eval_docs] == [1, 0, 2]


def test_generated_answers(bundled: PreTrainedModel, tokenizer: Any, tmp_path: Path) -> None:
    write(tmp_path, "xsum_rouge1", [{"document": "The cat sat.", "summary": "The cat was there."}] * 2)
    write(tmp_path, "gsm8k", [{"question": f"{n}+1?", "answer": f"add\n#### {n + 1}"} for n in range(7)])
    (rouge,) = run_suite(bundled, tokenizer, "xsum_rouge1", data=[tmp_path], limit=1)
    assert (rouge.metric, rouge.chance, rouge.items) == ("rouge1", 0.0, 1)
    answer = task_loading.load_task("xsum_rouge1", [tmp_path])["xsum_rouge1"].instances[0].resps[0]
    got, wanted = re.findall("[a-z]+", answer.lower()), ["the", "cat", "was", "there"]
    shared = sum(min(got.count(word), wanted.count(word)) for word in {*got})
    assert rouge.value == pytest.approx(2 * shared / (len(got) + 4), abs=0.2)  # stems may agree where words do not
    task = task_loading.load_task("gsm8k", [tmp_path])["gsm8k"]
    task.set_fewshot_seed(1234)
    with task_loading.silenced():
        task.build_all_requests(limit=1)
    prompt = task.instances[0].arguments[0]
    assert prompt.count("Question:") == 6
    assert prompt.count("Question: 0+1?") == 1


# ------------------------------------------------------------------------------------------ suites


def test_the_twelve_phenomena_hold_every_paradigm_once() -> None:
    counts = dict(zip(PHENOMENA, (2, 9, 7, 5, 8, 2, 7, 2, 8, 7, 4, 6), strict=True))  # table 2 of the paper
    assert {name: len(paradigms) for name, paradigms in PHENOMENA.items()} == counts
    ours = sorted(f"blimp_{name}" for names in PHENOMENA.values() for name in names)
    folder = Path(task_loading.harness().tasks.__file__).parent / "blimp"
    stock = sorted(re.findall(r"blimp_\w+", (folder / "_blimp.yaml").read_text()))
    assert ours == stock
    assert len(stock) == 67


@pytest.mark.skipif(not BENCH.is_dir(), reason="no benchmark data here")
def test_the_data_group_the_paradigms_alike() -> None:
    for phenomenon, paradigms in PHENOMENA.items():
        terms = set()
        for name in paradigms:
            with (BENCH / "blimp" / f"{name}.jsonl").open(encoding="utf-8") as file:
                terms.add(json.loads(file.readline())["linguistics_term"])
        assert len(terms - {"s-selection"}) == 1, phenomenon


def test_suites() -> None:
    small, paper = suite_rows("small"), suite_rows("paper")
    assert sum(isinstance(row, Text) for row in small) == 3
    assert len(small) == 12 + 7 + 3
    assert [row.task for row in paper if isinstance(row, Row)] == [
        "c3", "cmnli", "chid", "boolq", "wsc273", "commonsense_qa", "hellaswag", "piqa", "race_middle", "race", "mmlu",
        "cmmlu", "xsum_rouge1", "gsm8k", "bigbench_strategyqa_multiple_choice"]
    assert suite_rows("small, piqa,paper")[: len(small)] == small
    assert len(suite_rows("small,paper")) == len(small) + len(paper) - 2  # hellaswag and piqa are in both
    real = suite_rows("real")
    assert list(dict.fromkeys(row.task for row in real)) == [
        "lambada_openai", "arc_easy", "piqa", "hellaswag", "sciq", "blimp"]
    assert [row.group for row in real[5:]] == list(PHENOMENA)
    assert suite_rows("small,real") == small, "each row once, as the first suite has it"
    assert suite_rows("real,small")[: len(real)] == real
    assert suite_rows("blimp") == small[:12]
    for limit, items in ((500, 8), (67, 1), (1, 1), (None, None)):
        assert {row.items(limit) for row in real[:5]} == {limit}
        assert {row.items(limit) for row in real[5:]} == {items}
        assert {row.items(limit) for row in small[:12]} == {limit}
    subjects = task_loading.task_names(Row("mmlu", ("mmlu_*",)))
    assert len(subjects) == 57
    for row in (row for row in paper + small if isinstance(row, Row)):
        for name in task_loading.task_names(row)[:2]:
            assert task_loading._definition(name) is not None


def test_mmlu_reads_a_subject_of_one_file(bundled: PreTrainedModel, tokenizer: Any, tmp_path: Path) -> None:
    row = {"question": "Q", "choices": ["1", "2", "3", "4"], "answer": 2, "split": "test"}
    write(tmp_path, "mmlu", [{**row, "subject": "virology"}, {**row, "subject": "virology", "split": "dev"},
                             {**row, "subject": "marketing"}])
    (score,) = run_suite(bundled, tokenizer, "mmlu_virology", data=[tmp_path])
    assert (score.items, score.chance) == (1, 0.25)
    assert "about virology" in task_loading.load_task("mmlu_virology", [tmp_path])["mmlu_virology"].instances[0].args[0]


# ------------------------------------------------------------------------------------------ what is refused


@pytest.fixture
def without_lm_eval(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    task_loading.harness.cache_clear()
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    yield
    task_loading.harness.cache_clear()


def test_without_lm_eval(without_lm_eval: None) -> None:
    with pytest.raises(KDPruneError, match=r"got no lm-eval .*pip install 'kdprune\[eval\]'"):
        check_suite("sciq")


def test_names_and_data_are_refused_before_any_work(tmp_path: Path) -> None:
    write(tmp_path, "sciq", sciq_rows(3))
    (tmp_path / "else").mkdir()
    write(tmp_path / "bad", "sciq", [{"question": "?"}])
    for suite, data, message in (
        ("smal", [], "unknown suite or task 'smal'; did you mean 'small'"),
        ("", [], "got no task"),
        ("mmlu_stem*", [], "got task 'mmlu_stem\\*', expected the beginning of one of lm-eval's names"),
        ("sciq", [tmp_path / "none"], "which is no directory"),
        ("sciq", [tmp_path / "else"], "without a file of these tasks, expected for example sciq.jsonl"),
        ("sciq,piqa", [tmp_path], "cannot load task 'piqa' from the hub .*directory that holds piqa.jsonl"),
        ("sciq", [tmp_path / "bad"], "cannot load task 'sciq' from .*sciq.jsonl"),
    ):
        with pytest.raises(KDPruneError, match=message):
            check_suite(suite, data)


def test_a_task_has_the_metric_that_lm_eval_names_first() -> None:
    assert [suite_rows(name)[0].metrics for name in ("mmlu_pro", "mmlu_virology", "arc_challenge")] == [(), (), ()]


def test_a_loss_beyond_all_perplexities_is_told(bundled: PreTrainedModel, tokenizer: Any, tmp_path: Path) -> None:
    write(tmp_path, "lambada_openai", [{"text": "The cat sat on the mat"}, {"text": "A dog ran to the house"}])
    broken = copy.deepcopy(bundled)
    broken.model.norm.weight.data *= 300
    with pytest.raises(KDPruneError, match="got task 'lambada_openai', whose loss is too large for a perplexity"):
        run_suite(broken, tokenizer, "lambada_openai", data=[tmp_path])


def test_counts_and_models_that_cannot_be(bundled: PreTrainedModel, tokenizer: Any, tmp_path: Path) -> None:
    write(tmp_path, "sciq", sciq_rows(3))
    with pytest.raises(KDPruneError, match="got limit 0, expected at least 1"):
        run_suite(bundled, tokenizer, "sciq", data=[tmp_path], limit=0)
    with pytest.raises(KDPruneError, match="got batch size 0"):
        run_suite(bundled, tokenizer, "sciq", data=[tmp_path], batch_size=0)
    with pytest.raises(KDPruneError, match="without a tokenizer"):
        run_suite(bundled, None, "sciq", data=[tmp_path])


# ------------------------------------------------------------------------------------------ the command


def test_the_command_prints_the_table_and_what_is_kept(
    bench: Bench, bundled: PreTrainedModel, tmp_path: Path
) -> None:
    write(tmp_path, "sciq", sciq_rows(6))
    outcome = command(
        "eval", bundled.name_or_path, "--text", bench.heldout, "--window", 64, "--stride", 64,
        "--suite", "sciq", "--suite-data", tmp_path, "--limit", 5, "--dense", bundled.name_or_path,
        "--json", tmp_path / "eval.json")
    assert (outcome.status, outcome.err) == (0, "")
    assert re.search(r"sciq +│ +│ acc +│ 0\.\d{3} ± 0\.\d{3} │ 0\.\d{3} ± 0\.\d{3} │ +0\.250 │ +5", outcome.out)
    assert "the first 5 of each task" in outcome.out
    assert "window 512, stride 256" in outcome.out
    assert "retained above chance" in outcome.out
    record = json.loads((tmp_path / "eval.json").read_text())
    assert record["tasks"] == record["dense_tasks"]
    assert record["tasks"][0]["items"] == 5
    assert record["retention"]["mean"] == 1.0


@pytest.mark.parametrize(("options", "message"), [
    (["--suite", "smal"], "unknown suite or task 'smal'; did you mean 'small'"),
    (["--limit", "3"], "got --limit without --suite"),
    (["--dense", "x"], "got --dense without --suite"),
    (["--suite", "sciq", "--suite-data", "nowhere"], "no directory"),
    (["--suite", "sciq", "--limit", "0"], "got limit 0, expected a whole number of at least 1"),
])
def test_the_command_refuses_in_one_line(options: list[str], message: str, bench: Bench) -> None:
    outcome = command("eval", bench.model, *options)
    assert outcome.status == 2
    assert re.fullmatch(rf"kdprune: error: .*{message}.*\n", outcome.err), outcome.err
