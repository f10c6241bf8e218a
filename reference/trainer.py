"""The training loop, with checkpoints that a run goes on from as if it had never stopped."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict
from pathlib import Path

import torch
from architectures import new_model
from corpus import CorpusError, Windows, packed, sampled, text_files, train_tokenizer
from heldout import held_out_ids, quick_loss, spread
from settings import ARCHITECTURES, FREE_TO_CHANGE, Progress, Settings, learning_rate
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


def write_json(path: Path, value: object) -> None:
    """Write a record in one go."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1, default=str) + "\n", encoding="utf-8")
    os.replace(partial, path)


def tokenizer_for(settings: Settings) -> PreTrainedTokenizerBase:
    """The tokenizer given, of the weights to go on from, of an earlier start of this run, or a new one."""
    stored = settings.out / "tokenizer"
    given = settings.tokenizer or settings.init_from
    if given is not None:
        return AutoTokenizer.from_pretrained(given)
    if not stored.exists():
        size = (ARCHITECTURES[settings.preset] | settings.architecture)["vocab_size"]
        texts = sampled(text_files(settings.data), settings.tokenizer_sample, settings.seed)
        tokenizer = train_tokenizer(texts, size)
        tokenizer.save_pretrained(stored)
    return AutoTokenizer.from_pretrained(stored)


def model_for(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The weights to go on from in float32, or a newly drawn model of the family."""
    torch.manual_seed(settings.seed)
    if settings.init_from is not None:
        return AutoModelForCausalLM.from_pretrained(settings.init_from, dtype=torch.float32)
    shape = ARCHITECTURES[settings.preset] | settings.architecture
    return new_model(settings.family, shape, settings.length, tokenizer, settings.attention)


def optimizers_for(model: PreTrainedModel, settings: Settings) -> list[torch.optim.Optimizer]:
    """AdamW with weight decay on the matrices alone; with `muon`, the layers' matrices are Muon's."""
    embeddings = {id(p) for part in model.modules() if isinstance(part, torch.nn.Embedding) for p in part.parameters()}
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    inner = [p for p in matrices if id(p) not in embeddings] if settings.optimizer == "muon" else []
    chosen = {id(p) for p in inner}
    groups = [{"params": [p for p in matrices if id(p) not in chosen], "weight_decay": settings.weight_decay},
              {"params": vectors, "weight_decay": 0.0}]
    found: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.95), fused=True)]
    if inner:       # its steps are scaled so that AdamW's learning rate fits
        found.append(torch.optim.Muon(
            inner, lr=settings.lr, weight_decay=settings.weight_decay, adjust_lr_fn="match_rms_adamw"))
    return found


def save_checkpoint(
    settings: Settings, model: PreTrainedModel, optimizers: list[torch.optim.Optimizer], progress: Progress
) -> None:
    """Everything a resumed run needs, replaced atomically."""
    state = {
        "model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers], "progress": asdict(progress),
        "rng": torch.get_rng_state(), "settings": {k: str(v) for k, v in asdict(settings).items()},
    }
    partial = settings.out / "checkpoint.partial"
    torch.save(state, partial)
    os.replace(partial, settings.out / "checkpoint.pt")
    write_json(settings.out / "loss_curve.json", progress.curve)


def load_checkpoint(
    settings: Settings, model: PreTrainedModel, optimizers: list[torch.optim.Optimizer]
) -> Progress:
    """Put the last checkpoint's state in place; a fresh Progress where there is none."""
    path = settings.out / "checkpoint.pt"
    if not path.exists():
        return Progress()
    state = torch.load(path, map_location=settings.device, weights_only=True)
    for name, value in asdict(settings).items():
        if name not in FREE_TO_CHANGE and state["settings"].get(name) != str(value):
            raise CorpusError(f"{path} was made with {name} = {state['settings'].get(name)}, not {value}")
    model.load_state_dict(state["model"])
    for optimizer, stored in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(stored)
    torch.set_rng_state(state["rng"].cpu())
    return Progress(**state["progress"])


class Trainer:
    """One run: settings, model, optimizer, windows, and how far it is."""

    def __init__(self, settings: Settings) -> None:
        """Make everything ready, from the last checkpoint where there is one."""
        self.settings = settings
        self.stop = False           # set it (from a signal handler, say) to end after the step in hand
        settings.out.mkdir(parents=True, exist_ok=True)
        if settings.threads:
            torch.set_num_threads(settings.threads)
        self.tokenizer = tokenizer_for(settings)
        texts = sampled(text_files(settings.data), settings.sample, settings.seed)
        name = f"tokens-{settings.sample:g}-{settings.seed}.npy"
        ids = packed(settings.out / name, texts, self.tokenizer)
        self.windows = Windows(ids, settings.length, settings.batch, settings.seed)
        self.model = model_for(settings, self.tokenizer).to(settings.device).train()
        self.optimizers = optimizers_for(self.model, settings)
        self.progress = load_checkpoint(settings, self.model, self.optimizers)
        self.loss = torch.compile(self._loss) if settings.compile else self._loss
        held_out = [held_out_ids(folder, self.tokenizer, settings.limit) for folder in settings.held_out]
        parts = [spread(ids, settings.length, 8) for by_name in held_out for ids in by_name.values()]
        self.held_out = torch.cat(parts) if parts else None

    def _loss(self, windows: torch.Tensor) -> torch.Tensor:
        """Mean next-token loss of ids (batch, length + 1)."""
        with torch.autocast(torch.device(self.settings.device).type, torch.bfloat16):
            logits = self.model(input_ids=windows[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())

    def step(self) -> torch.Tensor:
        """One optimizer step; its loss, still on the device."""
        settings, progress = self.settings, self.progress
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = learning_rate(progress.share(settings), settings.lr, settings.warmup)
        loss = self.loss(self.windows.batch(progress.step).to(settings.device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        progress.step += 1
        progress.tokens += settings.batch * settings.length
        return loss.detach()

    def record(self, loss: float) -> None:
        """Add a point to the loss curve: the mean loss since the last one, held-out loss now and then."""
        progress, settings = self.progress, self.settings
        point = {"step": progress.step, "tokens": progress.tokens, "seconds": round(progress.seconds, 1),
                 "loss": round(loss, 4), "lr": self.optimizers[0].param_groups[0]["lr"]}
        done = progress.share(settings) >= 1
        if self.held_out is not None and (progress.step % settings.evaluate_every == 0 or done):
            point["held_out_loss"] = round(quick_loss(self.model, self.held_out), 4)
        progress.curve.append(point)
        print(json.dumps(point), flush=True)

    def run(self) -> bool:
        """Train until the budget is used up (true) or `stop` is set (false); ends with a checkpoint."""
        settings, progress = self.settings, self.progress
        if self.held_out is not None and not progress.curve:
            start = {"step": 0, "tokens": 0, "held_out_loss": round(quick_loss(self.model, self.held_out), 4)}
            progress.curve.append(start)
            print(json.dumps(start), flush=True)
        clock = saved = time.perf_counter()
        while progress.share(settings) < 1 and not self.stop:
            losses: list[torch.Tensor] = []
            while progress.share(settings) < 1 and len(losses) < settings.record_every:
                losses.append(self.step())
                now = time.perf_counter()
                progress.seconds, clock = progress.seconds + now - clock, now
            self.record(torch.stack(losses).mean().item())
            if clock - saved > 60 * settings.checkpoint_minutes:
                save_checkpoint(settings, self.model, self.optimizers, progress)
                saved = clock
        save_checkpoint(settings, self.model, self.optimizers, progress)
        return progress.share(settings) >= 1
