"""Healing: its losses, its budget, what it may change, and what it refuses."""

import math
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from families import build
from pruned import in_context, stand_in
from tiny_checkpoint import Bench, command
from torch import Tensor
from transformers import PreTrainedModel

import kdprune
import kdprune.run.heal_training as heal_training
from kdprune.data.tokens import TokenSet
from kdprune.errors import KDPruneError
from kdprune.methods import METHODS
from kdprune.model.checkpoint import save_model, verify
from kdprune.model.losses import language_loss, mean_loss
from kdprune.model.recompute import activation_bytes, recomputing
from kdprune.model.surgery import Drop, Edit, Rewrite, Substitute, apply_edits
from kdprune.model.teacher import Teacher
from kdprune.report.results import Heal as HealRecord
from kdprune.run.heal import Heal, heal, linear_weights, make_heal, put_in
from kdprune.run.heal_training import budgeted
from kdprune.run.session import Session
from kdprune.runtime.run import Run
from kdprune.runtime.stages import Stages
from kdprune.store.states import open_states

pytestmark = pytest.mark.usefixtures("one_thread")
FAMILIES = ("llama3", "gpt2", "gemma3", "opt", "gpt_neox", "phi3")
BLOCK = range(2, 4)


def tokens(rows: int = 8, length: int = 12, padded: bool = False) -> TokenSet:
    """Rows that count on from a random number, so that what is learned on some holds for others."""
    start = torch.randint(20, (rows, 1), generator=torch.Generator().manual_seed(0))
    ids = 3 + (start + torch.arange(length)) % 20
    mask = torch.ones(rows, length, dtype=torch.bool)
    if padded:
        mask[1, 7:], mask[3, 4:] = False, False
    return TokenSet(ids, mask, "test")


def values(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def healed(
    model: PreTrainedModel, edits: list[Edit], seed: int = 0, **options: object
) -> tuple[PreTrainedModel, PreTrainedModel, dict]:
    settings = Heal(**{"tokens": 192, "batch": 4, "rank": 2, **options})  # type: ignore[arg-type]
    pruned = apply_edits(model, edits)
    found, record = heal(pruned, model, edits, tokens(), settings, Run(seed), held=2)
    return pruned, found, record


@torch.no_grad()
def test_language_loss_is_the_formula_without_padding(tiny_model) -> None:
    model, batch = tiny_model("llama3"), tokens(4, padded=True)
    total, count = language_loss(model, batch)
    expected = 0.0
    for ids, mask in zip(batch.ids, batch.mask, strict=True):
        logits = model(ids[mask][None]).logits[0].double()
        expected -= sum(float(logits[t].log_softmax(-1)[ids[t + 1]]) for t in range(int(mask.sum()) - 1))
    assert count == batch.tokens - 4
    assert float(total) == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_divergence_is_the_formula_without_padding(tiny_model) -> None:
    dense, model, batch = tiny_model("llama3"), tiny_model("llama3", seed=1), tokens(4, padded=True)
    total, count = Teacher(dense, batch).divergence(model, batch, torch.arange(4))
    expected = 0.0
    for ids, mask in zip(batch.ids, batch.mask, strict=True):
        p = dense(ids[mask][None]).logits[0].double().softmax(-1)
        q = model(ids[mask][None]).logits[0].double().softmax(-1)
        expected += float((p * (p / q).log()).sum())
    assert count == batch.tokens
    assert float(total) == pytest.approx(expected, rel=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("folder", [False, True])
def test_a_teacher_tells_the_most_probable_tokens_apart_and_remembers(
    tiny_model, folder: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, model, batch = tiny_model("llama3"), tiny_model("llama3", seed=1), tokens(4, padded=True)
    monkeypatch.setattr("kdprune.model.teacher.KEPT", 0 if folder else 2**31)
    teacher = Teacher(dense, batch, 3, keep=torch.arange(4), folder=tmp_path / "kept" if folder else None)
    expected = 0.0
    for ids, mask in zip(batch.ids, batch.mask, strict=True):
        p = dense(ids[mask][None]).logits[0].double().softmax(-1)
        q = model(ids[mask][None]).logits[0].double().softmax(-1)
        top = p.topk(3).indices
        p, q = (torch.cat([one.gather(-1, top), 1 - one.gather(-1, top).sum(-1, keepdim=True)], -1) for one in (p, q))
        expected += float((p * (p / q).log()).sum())
    order = torch.tensor([2, 0, 3, 1])
    for _ in range(2):
        total, count = teacher.divergence(model, batch.select(order), order)
        assert (float(total), count) == (pytest.approx(expected, rel=1e-4), batch.tokens)
        monkeypatch.setattr(teacher, "_compute", None)  # what was computed once is not computed again
    assert (tmp_path / "kept").is_dir() == folder
    assert float(total) < float(Teacher(dense, batch).divergence(model, batch, torch.arange(4))[0])


@torch.no_grad()
def test_a_teacher_keeps_the_rows_it_is_told_to_and_runs_no_layer_where_the_last_states_are_there(tiny_model) -> None:
    dense, rows, draw = tiny_model("llama3"), tokens(6, padded=True), tiny_model("llama3")
    final = open_states((*rows.ids.shape, dense.config.hidden_size), dense.dtype, "last states")
    plain = Teacher(draw, rows, 3)
    kept, both = (Teacher(dense, rows, 3, keep=torch.tensor([4, 1]), final=one) for one in (None, final))
    seen = rows_through(dense)
    for teacher, passed in ((kept, (1, 3, 3, 4)), (both, (1, 3, 3, 3))):  # rows 4 and 1 once, row 5 each time or once
        seen.clear()
        for order, so_far in zip(([1, 1], [4, 1, 5], [4, 1], [5, 4]), passed, strict=True):
            numbers = torch.tensor(order)
            cut = rows.mask[numbers].clone()
            cut[-1, 3:] = False
            found, expected = teacher(numbers, cut), plain(numbers, cut)
            assert torch.equal(found.ids, expected.ids)
            torch.testing.assert_close(found.log_probabilities, expected.log_probabilities)
            assert sum(seen) == so_far


def rows_through(dense: PreTrainedModel) -> list[int]:
    """From now on how many rows pass the first layer of ``dense``, call by call; copies are to be made before."""
    seen: list[int] = []
    dense.model.layers[0].mlp.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    return seen


@pytest.mark.parametrize(("loss", "budget", "trained"), [("kl", 96, 8), ("kl", 400, 10), ("lm", 96, 0)])
def test_the_teacher_runs_once_for_every_row(loss: str, budget: int, trained: int) -> None:
    """Rows that watch, that rates are tried on (all of eight), and ten that come again."""
    model, text, edits = build("llama3"), tokens(12), [Substitute(BLOCK, stand_in(3, scale=0.5))]
    pruned, watched = apply_edits(model, edits), text.select(slice(10, 11))  # of two as many tokens as a look trains on
    expected = mean_loss(model, watched, 1)
    seen = rows_through(model)
    _, record = heal(pruned, model, edits, text, Heal(loss=loss, tokens=budget, batch=2), Run(), held=2)
    assert sum(seen) == trained + len(watched)
    assert record["language_dense"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_that_are_run_again_give_the_same_gradient_from_less_memory(name: str) -> None:
    model, batch = apply_edits(build(name), [in_context(build(name), BLOCK)]), tokens()
    weights, found = list(model.parameters()), []
    before = activation_bytes(model, batch)
    for context in (nullcontext(), recomputing(model)):
        with context:
            less = activation_bytes(model, batch)
            loss, _ = language_loss(model, batch)
            found.append(torch.autograd.grad(loss, weights, allow_unused=True))
    assert all(a is b or torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(*found, strict=True))
    assert 0 < less < 0.7 * before
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("name", ["opt", "falcon"])
def test_layers_that_are_run_again_leave_dropout_off(name: str) -> None:
    """Whose code asks the layer itself whether it is in training."""
    model, batch = build(name), tokens()
    for module in model.modules():
        for rate in ("dropout", "hidden_dropout"):
            if isinstance(getattr(module, rate, None), float):
                setattr(module, rate, 0.5)
    model.config.hidden_dropout = model.config.attention_dropout = 0.5
    plain = language_loss(model, batch)[0]
    with recomputing(model):
        again = [language_loss(model, batch)[0] for _ in range(2)]
    assert torch.equal(again[0], plain)
    assert torch.equal(again[1], plain)


def test_copies_of_weights_are_no_activations() -> None:
    """Under autocast weights have some in bfloat16, which are kept for the gradient and do not grow with the row."""
    model, batch = build("llama3"), tokens()
    with torch.autocast("cpu", torch.bfloat16):
        found = activation_bytes(model, batch)
    assert 0 < found < 1.2 * activation_bytes(model, batch)


def test_healing_ends_where_held_out_rows_gain_nothing_and_keeps_what_was_best(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # In one precision throughout: looks on the way are in bfloat16 where the processor has it, the last in float32.
    monkeypatch.setattr("kdprune.run.heal.computes_in", lambda *_: False)
    model = build("llama3")
    _, _, record = healed(
        model, [Substitute(BLOCK, stand_in(3, scale=0.5))], loss="kl", tokens=4000, rate=3e-2, patience=2)
    assert record["kept"]
    best = min(range(len(record["watched"])), key=record["watched"].__getitem__)
    assert record["after"] == pytest.approx(record["watched"][best], rel=1e-3)
    assert record["after"] < record["watched"][0] == pytest.approx(record["before"], rel=1e-3)
    assert len(record["watched"]) == len(record["curve"]) + 1
    looks = 17  # 84 steps of 4 rows, at every fifth
    assert len(record["curve"]) == min(best + 2, looks)
    assert record["tokens"] == min(4000, round(4000 * len(record["curve"]) * 5 * 4 / 334))


@pytest.mark.parametrize("budget", [1, 12, 13, 85, 86, 200])
def test_the_budget_is_met_exactly_in_the_order_of_rows(budget: int) -> None:
    text = tokens(padded=True)  # 83 real tokens
    found, numbers = budgeted(text, budget)
    assert torch.equal(found.ids, text.ids[numbers])
    assert found.tokens == budget
    stream = torch.cat([text.ids[text.mask]] * 3)
    assert torch.equal(found.ids[found.mask], stream[:budget])


@pytest.mark.parametrize("loss", ["lm", "kl"])
@pytest.mark.parametrize("name", FAMILIES)
def test_only_what_was_put_in_changes(name: str, loss: str) -> None:
    model = build(name)
    before = values(model)
    pruned, found, record = healed(model, [in_context(model, BLOCK)], loss=loss, rate=1e-3)
    assert record["kept"]
    assert record["after"] < record["before"]
    old, new = values(pruned), values(found)
    changed = {key for key in old if not torch.equal(old[key], new[key])}
    assert changed <= set(put_in(pruned, model, [in_context(model, BLOCK)]))
    assert any(".readout." in key for key in changed)
    assert all(".layers.2." in f".{key}" or ".h.2." in f".{key}" for key in changed)
    assert all(torch.equal(weight, before[key]) for key, weight in model.named_parameters())
    assert all(weight.requires_grad for weight in (*model.parameters(), *found.parameters()))
    shared = {weight.data_ptr() for weight in model.parameters()}
    assert sum(weight.data_ptr() not in shared for weight in found.parameters()) == len(put_in(
        pruned, model, [Substitute(BLOCK, stand_in())]))
    HealRecord(**record)


@pytest.mark.parametrize("name", FAMILIES)
def test_lora_keeps_the_architecture_and_the_dense_model(name: str, tmp_path: Path) -> None:
    model = build(name)
    before = values(model)
    state = torch.random.get_rng_state()
    pruned, found, record = healed(model, [Drop(BLOCK)], what="lora", rate=1e-3)
    assert torch.equal(state, torch.random.get_rng_state())
    assert record["kept"]
    assert type(found) is type(model)
    old, new = values(pruned), values(found)
    changed = {key for key in old if not torch.equal(old[key], new[key])}
    assert changed == set(linear_weights(pruned))
    layers = 4 * (4 if name in ("gpt2", "gpt_neox", "phi3") else 6 if name == "opt" else 7)
    assert len(changed) == layers
    # The update W' − W is of the rank asked for.
    assert all(int(torch.linalg.matrix_rank((new[key] - old[key]).double(), rtol=1e-3)) <= 2 for key in changed)
    assert all(torch.equal(weight, before[key]) for key, weight in model.named_parameters())
    assert all(weight.requires_grad for weight in (*model.parameters(), *found.parameters()))
    save_model(found, tmp_path)
    verify(tmp_path, found, tokens().ids)


def test_lora_reaches_stand_ins_too_and_the_result_saves(tmp_path: Path) -> None:
    model = build("gpt2")
    pruned, found, _ = healed(model, [Substitute(BLOCK, stand_in(hidden=8))], what="lora")
    assert sum(".kdp." in key for key in linear_weights(pruned)) == 3
    save_model(found, tmp_path)
    verify(tmp_path, found, tokens().ids)


def test_a_disturbed_stand_in_is_healed_towards_the_dense_model() -> None:
    model = build("llama3")
    disturbed = stand_in(3, scale=0.5)
    _, _, record = healed(model, [Substitute(BLOCK, disturbed)], loss="kl", tokens=1200, rate=1e-2)
    assert record["kept"]
    assert record["after"] < 0.9 * record["before"]
    assert record["curve"][-1] < record["curve"][0]
    assert record["tokens"] == 1200


def test_the_rate_that_serves_best_on_trial_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tried = build("llama3"), []
    edits: list[Edit] = [Substitute(BLOCK, stand_in(3, scale=0.5))]
    width = model.config.hidden_size
    monkeypatch.setattr("kdprune.run.heal.RATES", (200.0, 0.3, 1e-5))
    fit = heal_training.fit
    monkeypatch.setattr(heal_training, "fit", lambda parameters, loss, rows, schedule, *rest, **options: tried.append(
        (schedule.rate * width, rows)) or fit(parameters, loss, rows, schedule, *rest, **options))
    _, _, record = healed(model, edits, loss="kl", tokens=1200)
    assert [rate for rate, _ in tried] == pytest.approx([200, 0.3, 1e-5, 0.3])
    assert [rows for _, rows in tried] == [16, 16, 16, 100]
    assert record["rate"] == pytest.approx(0.3 / width)
    assert record["kept"]
    monkeypatch.undo()
    given = healed(model, edits, loss="kl", tokens=1200, rate=0.3 / width)[2]
    assert given == record  # a trial leaves no trace


def test_rewritten_weights_alone_are_trained() -> None:
    model = build("llama3")
    weight = model.model.layers[1].mlp.down_proj.weight.detach() * 1.5
    edits: list[Edit] = [Rewrite(1, {"mlp.down_proj.weight": weight}), Drop(BLOCK)]
    pruned, found, record = healed(model, edits)
    assert put_in(pruned, model, edits) == ["model.layers.1.mlp.down_proj.weight"]
    assert record["parameters"] == weight.numel()
    assert not torch.equal(found.model.layers[1].mlp.down_proj.weight, weight)
    assert found.model.layers[0].mlp.down_proj.weight is model.model.layers[0].mlp.down_proj.weight


@pytest.mark.parametrize("what", ["stand-ins", "lora"])
def test_same_seed_same_bits_and_another_seed_others(what: str) -> None:
    model = build("llama3")
    edits: list[Edit] = [Substitute(BLOCK, stand_in())]
    first, second, third = (values(healed(model, edits, seed, what=what)[1]) for seed in (0, 0, 1))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not all(torch.equal(first[key], third[key]) for key in first)


@pytest.mark.parametrize("what", ["stand-ins", "lora"])
def test_healing_that_harms_is_undone(what: str) -> None:
    model = build("llama3")
    pruned, found, record = healed(model, [Substitute(BLOCK, stand_in())], what=what, loss="kl", rate=5.0)
    assert found is pruned
    assert not record["kept"]
    assert record["after"] > record["before"]


@pytest.mark.parametrize("what", ["stand-ins", "lora"])
def test_half_precision_is_healed_in_float32_and_cast_back(what: str) -> None:
    model = build("llama3").bfloat16()
    before = values(model)
    _, found, record = healed(model, [Substitute(BLOCK, stand_in())], what=what, rate=3e-3, tokens=600)
    assert record["kept"]
    assert {weight.dtype for weight in found.parameters()} == {torch.bfloat16}
    assert all(torch.equal(weight, before[key]) for key, weight in model.named_parameters())


def test_drops_are_refused_at_once_and_after_the_fact() -> None:
    for name in ("shortgpt", "sleb", "uidl"):
        if name in METHODS:
            with pytest.raises(KDPruneError, match="use --heal-what lora"):
                Heal().check(METHODS[name]())
    Heal(what="lora").check(METHODS["shortgpt"]())
    model = build("llama3")
    with pytest.raises(KDPruneError, match="use --heal-what lora"):
        healed(model, [Drop(BLOCK)])
    with pytest.raises(KDPruneError, match="one row"):
        Heal().check(METHODS["kdp"](), tokens(1))


@pytest.mark.parametrize(("given", "message"), [
    ({"heal_rate": 1e-3}, "got heal_rate without heal"),
    ({"heal": "mse"}, "expected one of lm, kl"),
    ({"heal": "lm", "heal_tokens": 0}, "at least 1"),
    ({"heal": "lm", "heal_rate": 0.0}, "above 0"),
])
def test_impossible_options_are_refused(given: dict, message: str) -> None:
    with pytest.raises(KDPruneError, match=message):
        make_heal(given, METHODS["kdp"]())
    assert make_heal({"heal": None}, METHODS["kdp"]()) is None


@pytest.mark.parametrize(("name", "options", "what"), [
    ("kdp", {}, "stand-ins"), ("streamline", {}, "stand-ins"), ("streamline", {"stand_in": "none"}, "lora"),
    ("shortgpt", {}, "lora"), ("slicegpt", {}, "lora"), ("kdp", {"heal_what": "lora"}, "lora"),
    ("shortgpt", {"heal_what": "stand-ins"}, "stand-ins"),
])
def test_what_puts_nothing_in_is_healed_by_low_rank_updates(name: str, options: dict, what: str) -> None:
    own = {key: value for key, value in options.items() if key != "heal_what"}
    found = make_heal({"heal": "kl", **options}, METHODS[name](**own))
    assert found is not None
    assert found.what == what


def test_missing_peft_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(KDPruneError, match=r"pip install 'kdprune\[heal\]'"):
        Heal(what="lora")


def test_prune_heals_records_and_saves(bench: Bench, tmp_path: Path) -> None:
    result = kdprune.prune(
        bench.model, tmp_path / "out", "shortgpt", calibration=bench.calibration, heldout=bench.heldout, samples=12,
        length=32, heal="kl", heal_what="lora", heal_tokens=500, heal_batch=4, heal_rank=2)
    record = result.results.heal
    assert record is not None
    assert (record.loss, record.what, record.tokens) == ("kl", "lora", 500)
    assert math.isfinite(record.before or math.nan)
    assert "heal" in result.results.seconds
    recipe = result.results.recipe
    assert {key: recipe[key] for key in ("heal", "heal_what", "heal_tokens")} == {
        "heal": "kl", "heal_what": "lora", "heal_tokens": 500}
    assert "Healed: LoRA on the KL against the dense model, 500 tokens" in (tmp_path / "out/report.html").read_text()


def test_healing_reads_on_in_the_text_and_never_what_watches(bench: Bench) -> None:
    with Session(bench.model, None, 0, "cpu", "float32", False, Stages()) as session:
        seen = session.calibration(bench.calibration, 12, 32)
        assert session.healing_rows(bench.calibration, seen, 0.25, 200) is seen  # the fitted rows are enough
        for budget in (1_000, 10**6):  # more than the samples hold, and more than the text does
            rows = session.healing_rows(bench.calibration, seen, 0.25, budget)
            watched = [tuple(row.tolist()) for row in seen.watching(0.25).ids]
            trained = [tuple(row.tolist()) for row in rows.fitted(3 / len(rows)).ids]
            assert [tuple(row.tolist()) for row in rows.ids[-3:]] == watched
            assert not set(trained) & set(watched)
            assert len(set(trained)) > len(seen)
            assert 32 * len(trained) >= budget or budget == 10**6


def test_the_command_line_has_the_options_and_refuses_before_work(bench: Bench, tmp_path: Path) -> None:
    recipe = command("prune", "--heal", "kl", "--heal-tokens", "4096", "--dump-recipe").out
    assert "heal: kl" in recipe
    assert "heal_tokens: 4096" in recipe
    assert "heal_what: stand-ins" in recipe
    done = command("prune", bench.model, "--method", "shortgpt", "--heal", "lm", "--heal-what", "stand-ins", "-o",
                   tmp_path / "x", "--calibration", bench.calibration, "--samples", "12", "--length", "32")
    assert done.status == 2
    assert "--heal-what lora" in done.err
    assert not (tmp_path / "x").exists()


