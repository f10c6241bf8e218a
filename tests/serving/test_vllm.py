"""The real vLLM on CPU gives what transformers gives: greedy tokens and their log-probabilities.

Left out by default; in an environment that has vLLM (docs/serving.md): ``pytest -m serving -n 0 tests/serving``. Every
process of vLLM is one of its own, so that none that dies takes the others' answers with it.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from families import REPRESENTATIVES
from served import LENGTHS, NEW, expected, prompts, save, write_prompts

from kdprune.model.modeling_kdp import FAMILIES

pytestmark = [
    pytest.mark.serving, pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed here"),
    pytest.mark.filterwarnings("ignore"),  # transformers' and the tokenizer's own, in an older version
]
TYPES = {"llama3.1": "llama", "gemma3": "gemma3_text"}
REFUSED = tuple(name for name in REPRESENTATIVES if not FAMILIES[TYPES.get(name, name)].lends_attention)
SERVED = tuple(name for name in REPRESENTATIVES if name not in REFUSED)
EXPERTS = ("mixtral", "qwen3_moe")
# Of each family stand-ins in all places; heads and channels that differ by layer (experts have no channels that can go:
# the heads around a stand-in); layers taken out, which leaves a stock model.
CASES = (
    *(f"{name}-mixed" for name in SERVED),
    *(f"{name}-{'heads' if name in EXPERTS else 'channels'}" for name in SERVED),
    *(f"{name}-drop" for name in REPRESENTATIVES),
    # An attention of half the heads around a stand-in, where heads are counted in another way each; narrower streams.
    *(f"{name}-heads" for name in ("llama3.1", "qwen3", "gpt_neox", "opt", "phi3")),
    *(f"{name}-stream" for name in ("llama3.1", "gpt_neox", "opt")),
    *(f"{name}-mlps" for name in ("llama3.1", "gpt_neox", "opt")),  # that lack some
)
ALONE = ("llama3.1-mixed", "qwen3-heads", "granite-channels", "gpt_neox-stream", "mixtral-mixed", "opt-heads")
COMPILED = "llama3.1-heads"
LACKING = "llama3.1-sublayers"  # layers without attention
# In float32 sums of another order; less exact is vLLM's attention on CPU where its logits are capped (Gemma 2) or have
# slopes (BLOOM, by vLLM's own class): up to 3.5e-4 was seen.
CLOSE, CLOSE_CAPPED, CAPPED = 5e-5, 2e-3, ("gemma2", "bloom")
QUIET: dict[str, str] = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false", "VLLM_NO_USAGE_STATS": "1"}
WITHOUT_KDPRUNE = {"VLLM_PLUGINS": ""}  # its entry point is not called
SERVER = "vllm.entrypoints.openai.api_server"  # `vllm serve` wants metadata that the CPU wheel does not have


class Checkpoints:
    """Checkpoints by "family-kind", made when first asked for, with what transformers says of them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.prompts = root / "prompts.json"
        self.found: dict[str, Any] = {}
        write_prompts(self.prompts)

    def path(self, case: str) -> Path:
        """Where it lies."""
        directory = self.root / case
        if not directory.exists():
            save(*case.split("-"), directory)
        return directory

    def expected(self, case: str) -> Any:
        """Of each prompt: ids and log-probabilities."""
        if case not in self.found:
            self.found[case] = expected(self.path(case))
        return self.found[case]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return Checkpoints(tmp_path_factory.mktemp("served"))


def environment(**more: str) -> dict[str, str]:
    """A child's: without what pytest set for this process."""
    return {**os.environ, **QUIET, **more}


def offline(
    checkpoints: Checkpoints, cases: tuple[str, ...], log: Path, options: dict[str, Any], **more: str
) -> dict[str, Any]:
    """What vLLM generates from each case. Where the process dies, the case it was at has died, and the rest goes on."""
    records: dict[str, Any] = {}
    answers, script = log.with_suffix(".jsonl"), Path(__file__).with_name("offline.py")
    while pending := [case for case in cases if case not in records]:
        paths = [str(checkpoints.path(case)) for case in pending]
        with log.open("a") as out:
            status = subprocess.run(
                [sys.executable, str(script), str(checkpoints.prompts), str(answers), json.dumps(options), *paths],
                env=environment(**more), stdout=out, stderr=subprocess.STDOUT, check=False).returncode
        lines = answers.read_text().splitlines() if answers.exists() else []
        records.update({Path(line["directory"]).name: line for line in map(json.loads, lines)})
        left = [case for case in pending if case not in records]
        if left:
            records[left[0]] = {"error": f"the process died with status {status}: {log.read_text()[-2000:]}"}
    return records


def asked_for(request: pytest.FixtureRequest, *tests: str) -> tuple[str, ...]:
    """The cases of those of these tests that run: with -k a part of them."""
    items: list[Any] = [item for item in request.session.items if getattr(item, "originalname", "") in tests]
    return tuple(dict.fromkeys(item.callspec.params["case"] for item in items))


@pytest.fixture(scope="module")
def by_plugin(
    request: pytest.FixtureRequest, checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    cases = asked_for(request, "test_offline", "test_what_it_cannot_run_is_refused")
    return offline(checkpoints, cases, tmp_path_factory.mktemp("log") / "log", {"enforce_eager": True})


@pytest.fixture(scope="module")
def by_remote_code(
    request: pytest.FixtureRequest, checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    log = tmp_path_factory.mktemp("log") / "log"
    options = {"enforce_eager": True, "trust_remote_code": True, "without_kdprune": True}
    cases = asked_for(request, "test_offline_by_remote_code_alone", "test_what_it_cannot_run_is_refused")
    return offline(
        checkpoints, cases, log, options, HF_MODULES_CACHE=str(log.parent / "modules"), **WITHOUT_KDPRUNE)


def same(case: str, found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    """Fails unless all tokens are equal and their log-probabilities close."""
    assert [text["ids"] for text in found] == [text["ids"] for text in wanted]
    gaps = [abs(a - b) for x, y in zip(found, wanted, strict=True) for a, b in zip(x["logs"], y["logs"], strict=True)]
    assert len(gaps) == len(LENGTHS) * NEW
    assert max(gaps) < (CLOSE_CAPPED if case.partition("-")[0] in CAPPED else CLOSE)


def same_rounds(case: str, record: dict[str, Any], checkpoints: Checkpoints) -> None:
    """The same of a round with a cold and one with a warm prefix cache."""
    assert "error" not in record, record["error"]
    assert len(record["rounds"]) == 2
    for texts in record["rounds"]:
        same(case, texts, checkpoints.expected(case))


@pytest.mark.parametrize("case", CASES)
def test_offline(case: str, by_plugin: dict[str, Any], checkpoints: Checkpoints) -> None:
    same_rounds(case, by_plugin[case], checkpoints)


@pytest.mark.parametrize("case", ALONE)
def test_offline_by_remote_code_alone(case: str, by_remote_code: dict[str, Any], checkpoints: Checkpoints) -> None:
    same_rounds(case, by_remote_code[case], checkpoints)


@pytest.mark.parametrize("case", [*(f"{name}-mixed" for name in REFUSED), LACKING])
def test_what_it_cannot_run_is_refused(
    case: str, by_plugin: dict[str, Any], by_remote_code: dict[str, Any]
) -> None:
    for records in (by_plugin, by_remote_code):
        error = records[case]["error"]
        what = f"{case.partition('-')[0]} model with a class of its own"
        assert f"got a pruned {'model without attention in layers 0, 3' if case == LACKING else what}" in error
        assert "serve it with transformers" in error


def test_a_compiled_model_is_written_to_the_cache(checkpoints: Checkpoints, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    # One start: on CPU vLLM 0.32 does not load what it has written, of stock models neither.
    record = offline(checkpoints, (COMPILED,), tmp_path / "log", {}, VLLM_CACHE_ROOT=cache)[COMPILED]
    same_rounds(COMPILED, record, checkpoints)
    said = (tmp_path / "log").read_text()
    assert "Can't pickle" not in said
    assert "saved AOT compiled function" in said


# ------------------------------------------------------------------------------------------------------- the server


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def started(directory: Path, log: Path, port: int, *flags: str, **more: str) -> subprocess.Popen[bytes]:
    """A server of a checkpoint."""
    command = [
        sys.executable, "-m", SERVER, "--model", str(directory), "--served-model-name", "pruned", "--port", str(port),
        "--host", "127.0.0.1", "--dtype", "float32", "--max-model-len", "512", "--enforce-eager",
        "--max-num-batched-tokens", "128", "--max-num-seqs", "8", *flags]
    with log.open("w") as out:
        return subprocess.Popen(command, env=environment(VLLM_ENABLE_V1_MULTIPROCESSING="1", **more), stdout=out,
                                stderr=subprocess.STDOUT)


@pytest.fixture(params=["plug-in", "remote code"])
def server(
    request: pytest.FixtureRequest, checkpoints: Checkpoints, tmp_path: Path
) -> Iterator[tuple[str, subprocess.Popen[bytes], Path]]:
    """The address of a server of a model with stand-ins and heads that differ by layer."""
    port, log = free_port(), tmp_path / "log"
    flags, more = ((), {}) if request.param == "plug-in" else (("--trust-remote-code",), WITHOUT_KDPRUNE)
    process = started(checkpoints.path(COMPILED), log, port, *flags, HF_MODULES_CACHE=str(tmp_path / "modules"), **more)
    try:
        yield f"http://127.0.0.1:{port}", process, log
    finally:
        process.terminate()
        process.wait(60)


def wait_for(address: str, process: subprocess.Popen[bytes], log: Path, seconds: float = 600) -> None:
    """Until the server answers; fails where it ends before."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(1)
    pytest.fail(f"no answer in {seconds} s: {log.read_text()[-3000:]}")


def test_the_server(server: tuple[str, subprocess.Popen[bytes], Path], checkpoints: Checkpoints) -> None:
    address, process, log = server
    wait_for(address, process, log)
    body = {"model": "pruned", "prompt": prompts(), "max_tokens": NEW, "temperature": 0, "logprobs": 1,
            "ignore_eos": True, "return_token_ids": True}
    asked = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked, timeout=600) as answer:
        choices = sorted(json.load(answer)["choices"], key=lambda choice: choice["index"])
    found = [{"ids": choice["token_ids"], "logs": choice["logprobs"]["token_logprobs"]} for choice in choices]
    same(COMPILED, found, checkpoints.expected(COMPILED))
    assert process.poll() is None


def test_the_server_refuses_before_it_starts_an_engine(checkpoints: Checkpoints, tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = started(checkpoints.path("gpt2-mixed"), log, free_port())
    assert process.wait(600) != 0
    said = log.read_text()
    assert "got a pruned gpt2 model with a class of its own, expected" in said
    assert "EngineCore" not in said
