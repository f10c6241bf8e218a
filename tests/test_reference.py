"""The reference model's training script: random weights, an interruption, a directory that loads."""

import json
import math
import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

REFERENCE = Path(__file__).parents[1] / "reference"
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vocab_size": 320}
MODULES = ("architectures", "card", "corpus", "heldout", "settings", "train", "trainer")


@pytest.fixture(scope="module")
def train() -> Iterator[ModuleType]:
    """The script's module; its neighbours are found for as long as it is being imported."""
    threads = torch.get_num_threads()
    sys.path.insert(0, str(REFERENCE))
    try:
        import train
    finally:
        sys.path.remove(str(REFERENCE))
    yield train
    torch.set_num_threads(threads)
    for name in MODULES:
        sys.modules.pop(name, None)


def story(seed: int) -> str:
    """A document of sentences from a small grammar: there is something to learn in a few steps."""
    draw = random.Random(seed).choice
    animals, places = ("cat", "dog", "fox"), ("sea", "hill", "wood")
    return "\n".join(f"The {draw(animals)} saw the {draw(places)}." for _ in range(60))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train/ and heldout/ as the script expects them."""
    root = tmp_path_factory.mktemp("text")
    for folder, seeds in (("train", range(12)), ("heldout", range(100, 103))):
        (root / folder).mkdir()
        (root / folder / "wikinews_en-00.txt").write_text("\n<|endoftext|>\n".join(map(story, seeds)) + "\n")
    return root


@pytest.fixture
def settings(train: ModuleType, text: Path, tmp_path: Path):
    """A run of 16 steps."""
    return train.Settings(
        data=text / "train", out=tmp_path / "whole", held_out=(text / "heldout",), architecture=TINY,
        tokens=16 * 4 * 32, batch=4, length=32, lr=1e-2, warmup=0.1, tokenizer_sample=1.0, record_every=4,
        evaluate_every=8, window=32, stride=16, limit=400, threads=1,
    )


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """The stored tensors of a model directory."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype="auto").state_dict()


def test_trains_resumes_and_saves(train: ModuleType, settings, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train.train(settings)
    curve = json.loads((settings.out / "loss_curve.json").read_text())
    assert curve[-1]["loss"] < curve[1]["loss"] - 0.5
    assert curve[-1]["held_out_loss"] < curve[0]["held_out_loss"] - 0.5
    assert curve[-1]["tokens"] == settings.tokens

    record = train.Trainer.record

    def interrupted(trainer, loss: float) -> None:
        record(trainer, loss)
        trainer.stop = trainer.progress.step == 8

    part = replace(settings, out=settings.out.with_name("part"))
    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "record", interrupted)
        assert train.train(part) is None
    assert not (part.out / "model").exists()
    resumed = train.train(part)
    first, second = weights(whole), weights(resumed)
    assert all(torch.equal(first[name], second[name]) for name in first)
    again = json.loads((part.out / "loss_curve.json").read_text())
    assert [point["loss"] for point in again[1:]] == [point["loss"] for point in curve[1:]]


def test_saved_directory(train: ModuleType, settings, text: Path) -> None:
    directory = train.train(settings)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    assert model.dtype == torch.bfloat16
    sentence = "The fox saw Żółw — 東京."
    ids = tokenizer(sentence, return_tensors="pt")
    assert tokenizer.decode(ids["input_ids"][0]) == sentence
    generated = model.generate(**ids, max_new_tokens=4, do_sample=False)
    assert generated.shape[1] > ids["input_ids"].shape[1]
    card = (directory / "README.md").read_text(encoding="utf-8")
    assert "CC BY 2.5" in card
    assert "random weights" in card
    assert (directory / "loss_curve.png").stat().st_size > 1000
    assert str(text) not in card + (settings.out / "run.json").read_text()

    out = settings.out.with_name("onward")
    onward = replace(settings, out=out, init_from=directory, history="Before: 16 steps.")
    start, stored = train.Trainer(onward).model.state_dict(), model.float().state_dict()
    assert all(torch.equal(start[name], stored[name]) for name in stored)
    assert "Before: 16 steps." in (train.train(onward) / "README.md").read_text(encoding="utf-8")


def test_a_changed_setting_is_refused(train: ModuleType, settings) -> None:
    trainer = train.Trainer(settings)
    trainer.stop = True
    assert trainer.run() is False
    with pytest.raises(train.CorpusError, match=r"lr = 0\.01, not 0\.5"):
        train.Trainer(replace(settings, lr=0.5))


def test_perplexity_scores_every_token_once(train: ModuleType, settings) -> None:
    trainer = train.Trainer(settings)
    heldout = sys.modules["heldout"]
    ids = torch.from_numpy(trainer.windows.ids[:101].astype("int64"))
    overlapping = heldout.perplexity(trainer.model, ids, window=32, stride=16)
    whole = heldout.perplexity(trainer.model, ids, window=100, stride=100)
    assert overlapping["tokens"] == whole["tokens"] == 100
    expected = trainer.model(input_ids=ids[None], labels=ids[None]).loss.item()
    assert math.log(whole["perplexity"]) == pytest.approx(expected, abs=1e-4)


def test_learning_rate_and_presets(train: ModuleType) -> None:
    settings = sys.modules["settings"]
    rates = [settings.learning_rate(share, 1.0, 0.1) for share in (0.0, 0.05, 0.1, 0.55, 1.0)]
    assert rates == pytest.approx([0.01, 0.5, 1.0, 0.5, 0.0])
    for name in settings.ARCHITECTURES:
        run = train.parse(["--data", str(REFERENCE), "--preset", name, "--minutes", "3"])
        assert (run.minutes, run.tokens) == (3.0, None)


# Millions of parameters, least and most, and layers; the bundled weights stay below 17 MB.
SIZES = {"cpu": (3, 8.5, 16), "gpu": (3, 8.5, 18), "suite": (3, 4.5, 16), "suite-gpu": (25, 35, 24)}


@pytest.mark.parametrize(("preset", "family"), [
    (preset, family) for preset in SIZES for family in ("llama", "opt", "qwen3")
    if preset.startswith("suite") or family == "llama"])
def test_families_have_the_size_asked_for(train: ModuleType, settings, preset: str, family: str) -> None:
    least, most, layers = SIZES[preset]
    shape = sys.modules["settings"].ARCHITECTURES[preset]
    config = sys.modules["architectures"].FAMILIES[family].config(
        shape | {"tie_word_embeddings": True, "max_position_embeddings": 256})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert config.model_type == family
    assert least <= model.num_parameters() / 1e6 <= most
    assert config.num_hidden_layers == layers


@pytest.mark.parametrize("family", ["opt", "qwen3"])
def test_other_families_and_muon(train: ModuleType, settings, family: str) -> None:
    made = train.train(replace(settings, family=family, architecture=TINY | {"head_dim": 16}, optimizer="muon"))
    curve = json.loads((settings.out / "loss_curve.json").read_text())
    assert curve[-1]["held_out_loss"] < curve[0]["held_out_loss"] - 0.5
    model = AutoModelForCausalLM.from_pretrained(made)
    assert model.config.model_type == family
    assert model.config.tie_word_embeddings
    card = (made / "README.md").read_text(encoding="utf-8")
    assert "Muon" in card
    assert sys.modules["architectures"].FAMILIES[family].words in card
    with pytest.raises(train.CorpusError, match=r"family = .*, not llama"):
        train.Trainer(replace(settings, family="llama", architecture=TINY | {"head_dim": 16}, optimizer="muon"))
    again = replace(settings, out=settings.out.with_name("again"), tokenizer=made, tokens=4 * 32)
    assert len(train.Trainer(again).tokenizer) == len(AutoTokenizer.from_pretrained(made))
    assert not (again.out / "tokenizer").exists()
