"""Suites of tasks as data: the rows of their tables, where lm-eval defines the tasks, and what local files change."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

# Warstadt et al. 2020 (arXiv:1912.00582), table 2: 67 paradigms, 12 phenomena. The data's `linguistics_term`
# names 13: its "s-selection" (animate_subject_…) is counted under argument structure in the paper.
PHENOMENA: dict[str, tuple[str, ...]] = {
    "anaphor agreement": ("anaphor_gender_agreement", "anaphor_number_agreement"),
    "argument structure": (
        "animate_subject_passive", "animate_subject_trans", "causative", "drop_argument", "inchoative",
        "intransitive", "passive_1", "passive_2", "transitive"),
    "binding": (
        "principle_A_c_command", "principle_A_case_1", "principle_A_case_2", "principle_A_domain_1",
        "principle_A_domain_2", "principle_A_domain_3", "principle_A_reconstruction"),
    "control/raising": (
        "existential_there_object_raising", "existential_there_subject_raising", "expletive_it_object_raising",
        "tough_vs_raising_1", "tough_vs_raising_2"),
    "determiner-noun agreement": (
        "determiner_noun_agreement_1", "determiner_noun_agreement_2", "determiner_noun_agreement_irregular_1",
        "determiner_noun_agreement_irregular_2", "determiner_noun_agreement_with_adj_2",
        "determiner_noun_agreement_with_adj_irregular_1", "determiner_noun_agreement_with_adj_irregular_2",
        "determiner_noun_agreement_with_adjective_1"),
    "ellipsis": ("ellipsis_n_bar_1", "ellipsis_n_bar_2"),
    "filler-gap": (
        "wh_questions_object_gap", "wh_questions_subject_gap", "wh_questions_subject_gap_long_distance",
        "wh_vs_that_no_gap", "wh_vs_that_no_gap_long_distance", "wh_vs_that_with_gap",
        "wh_vs_that_with_gap_long_distance"),
    "irregular forms": ("irregular_past_participle_adjectives", "irregular_past_participle_verbs"),
    "island effects": (
        "adjunct_island", "complex_NP_island", "coordinate_structure_constraint_complex_left_branch",
        "coordinate_structure_constraint_object_extraction", "left_branch_island_echo_question",
        "left_branch_island_simple_question", "sentential_subject_island", "wh_island"),
    "NPI licensing": (
        "matrix_question_npi_licensor_present", "npi_present_1", "npi_present_2", "only_npi_licensor_present",
        "only_npi_scope", "sentential_negation_npi_licensor_present", "sentential_negation_npi_scope"),
    "quantifiers": (
        "existential_there_quantifiers_1", "existential_there_quantifiers_2", "superlative_quantifiers_1",
        "superlative_quantifiers_2"),
    "subject-verb agreement": (
        "distractor_agreement_relational_noun", "distractor_agreement_relative_clause",
        "irregular_plural_subject_verb_agreement_1", "irregular_plural_subject_verb_agreement_2",
        "regular_plural_subject_verb_agreement_1", "regular_plural_subject_verb_agreement_2"),
}


@dataclass(frozen=True)
class Row:
    """One row of the table: the mean over `tasks`, names of lm-eval; a name that ends in * stands for all of them.

    task, group: as shown; metrics: lm-eval's names, ``name`` or ``name,filter``, empty for a task's first;
    by_size: tasks weigh as many items as they have, otherwise the same; sharing: how many tasks a limit is divided
    among, those of other rows counted, 1: each has the whole.
    """

    task: str
    tasks: tuple[str, ...]
    group: str = ""
    metrics: tuple[str, ...] = ("acc",)
    by_size: bool = True
    sharing: int = 1

    def items(self, limit: int | None) -> int | None:
        """How many items of each of its tasks a limit leaves: ⌈limit / sharing⌉; None: all."""
        return None if limit is None else -(-limit // self.sharing)


@dataclass(frozen=True)
class Text:
    """A text for perplexity: a local file, or a split of a hub data set and its field.

    lines: the data set's rows are the lines of one text, otherwise texts of their own.
    """

    name: str
    file: str
    hub: str
    config: str | None
    split: str
    field: str = "text"
    lines: bool = False


@dataclass(frozen=True)
class Local:
    """How a task reads ``<file>.jsonl``.

    changes: entries of the task's definition that the file's fields ask for; where: fields a row must have these
    values in, to belong to the task.
    """

    file: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    where: Mapping[str, Any] = field(default_factory=dict)


def _single(name: str, *metrics: str) -> Row:
    return Row(name, (name,), metrics=metrics or ("acc",))


BLIMP = tuple(
    Row("blimp", tuple(f"blimp_{paradigm}" for paradigm in paradigms), phenomenon, by_size=False)
    for phenomenon, paradigms in PHENOMENA.items()
)
LAMBADA = _single("lambada_openai", "acc", "perplexity")
HELLASWAG = _single("hellaswag", "acc_norm")
TEXTS = (
    Text("WikiText-2", "wikitext2_test.txt", "Salesforce/wikitext", "wikitext-2-raw-v1", "test", lines=True),
    Text("books", "gutenberg_valid.txt", "emozilla/pg19-test", None, "test"),
    Text("news", "wikinews_en_valid.txt", "abisee/cnn_dailymail", "3.0.0", "test", "article"),
)
SMALL: tuple[Row | Text, ...] = (
    *BLIMP, LAMBADA, *(_single(name) for name in ("sciq", "piqa", "arc_easy", "copa")), HELLASWAG, _single("sst2"),
    *TEXTS,
)
# BLiMP counts as one task here: its 67 paradigms share the limit, and 500 items of each task are 8 of each paradigm.
REAL: tuple[Row | Text, ...] = (
    LAMBADA, *(_single(name) for name in ("arc_easy", "piqa")), HELLASWAG, _single("sciq"),
    *(replace(row, sharing=sum(map(len, PHENOMENA.values()))) for row in BLIMP),
)
PAPER: tuple[Row | Text, ...] = (
    *(_single(name) for name in ("c3", "cmnli", "chid", "boolq", "wsc273", "commonsense_qa")),
    HELLASWAG, *(_single(name) for name in ("piqa", "race_middle", "race")),
    Row("mmlu", ("mmlu_*",)), Row("cmmlu", ("cmmlu_*",)), _single("xsum_rouge1", "rouge1"),
    _single("gsm8k", "exact_match,flexible-extract"), _single("bigbench_strategyqa_multiple_choice"),
)
SUITES: dict[str, tuple[Row | Text, ...]] = {"small": SMALL, "real": REAL, "paper": PAPER}

# Task files of lm-eval, below its directory of tasks: looking a name up in its index of 10,000 takes 14 s.
# {0} is the name, {1} what follows its first underscore.
STOCK: dict[str, str] = {
    "blimp_": "blimp/{1}.yaml",
    "mmlu_": "mmlu/default/{0}.yaml",
    "cmmlu_": "cmmlu/{0}.yaml",
    "lambada_openai": "lambada/{0}.yaml",
    "sciq": "sciq/sciq.yaml",
    "piqa": "piqa/piqa.yaml",
    "arc_easy": "arc/{0}.yaml",
    "arc_challenge": "arc/{0}.yaml",
    "copa": "super_glue/copa/default.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "sst2": "glue/sst2/default.yaml",
    "rte": "glue/rte/default.yaml",
    "mrpc": "glue/mrpc/default.yaml",
    "wsc273": "wsc273/default.yaml",
    "commonsense_qa": "commonsense_qa/default.yaml",
    "race": "race/race.yaml",
    "gsm8k": "gsm8k/gsm8k.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "winogrande": "winogrande/default.yaml",
    "bigbench_strategyqa_multiple_choice": "bigbench/multiple_choice/strategyqa.yaml",
}
OWN = ("c3", "chid", "cmnli", "race_middle", "xsum_rouge1")  # task files of ours, in task_files/

# Local files whose fields are not the raw ones of the hub's rows; all others are read as lm-eval's definition says.
_ADAPTED: dict[str, Local] = {
    "hellaswag": Local("hellaswag", {"process_docs": None, "doc_to_target": "gold"}),  # query, choices, gold: cleaned
    "boolq": Local("boolq", {"doc_to_target": "{{answer|int}}"}),  # a boolean `answer` instead of `label`
    "wsc273": Local("wsc273", {  # both readings are given; lm-eval's continuation starts with a space of its own
        "process_docs": None, "doc_to_text": "gold", "doc_to_choice": "context_options",
        "doc_to_target": "{{' ' + continuation}}", "should_decontaminate": False}),
    "bigbench_strategyqa_multiple_choice": Local("strategyqa", {
        "process_docs": None, "doc_to_text": "query", "doc_to_choice": "choices", "doc_to_target": "gold"}),
    "gsm8k": Local("gsm8k", {"fewshot_split": "test"}),  # the examples shown come from the other rows of the file
}


def suite_rows(suite: str | Sequence[str]) -> list[Row | Text]:
    """The rows of suites and tasks by name, in order, each once, as the first has it; "a,b" is the list of a and b."""
    names = suite.split(",") if isinstance(suite, str) else suite
    rows: dict[Row | Text, Row | Text] = {}
    for name in (name.strip() for name in names):
        if name:
            for row in _rows(name):
                rows.setdefault(_once(row), row)
    return list(rows.values())


def _once(row: Row | Text) -> Row | Text:
    """What makes two rows the same: all but how a limit is shared."""
    return replace(row, sharing=1) if isinstance(row, Row) else row


def _rows(name: str) -> tuple[Row | Text, ...]:
    """A suite's rows; a task's own rows, as in the first suite that has them."""
    if name in SUITES:
        return SUITES[name]
    for rows in SUITES.values():
        if known := tuple(row for row in rows if isinstance(row, Row) and row.task == name):
            return known
    return (Row(name, (name,), metrics=()),)


def stock_file(task: str) -> str | None:
    """lm-eval's file for a task of the table, relative to its directory of tasks."""
    family, _, rest = task.partition("_")
    found = STOCK.get(task) or (STOCK.get(f"{family}_") if rest else None)
    return found and found.format(task, rest)


def local_files(task: str) -> list[Local]:
    """The local files a task can be read from, the likeliest first."""
    family, _, rest = task.partition("_")
    found = [_ADAPTED[task]] if task in _ADAPTED else [Local(task)]
    if family == "blimp":
        found.append(Local(f"blimp/{rest}"))
    if family == "mmlu":
        found.append(Local("mmlu", where={"subject": rest, "split": "test"}))
    return found
