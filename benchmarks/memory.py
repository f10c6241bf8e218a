"""How much memory does a run take, against the number of tokens and against the size of the model?

    OMP_NUM_THREADS=1 python benchmarks/memory.py                  both tables
    python benchmarks/memory.py --render benchmarks/memory_….json  the page again, from the record

Every row is a process of its own; its peak is the high-water mark of its resident set, libraries and all. Weights and
token ids are random. Tokens: KDP's default with one epoch of step 3, ten times as many tokens beside the first row's;
with a work directory states are spilled to it, without one they stay in memory where there is room. Size: the analysis
of models read layer by layer under one budget.
"""

import argparse
import dataclasses
import json
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hardware
import torch
from pruning_run import Job
from random_checkpoint import write_checkpoint

from kdprune.store.files import readable_bytes

HERE = Path(__file__).parent
TOKENS = (1024, 10240)
OPTIONS = {"refine_epochs": 1}
SIZES = {"0.1b": "float32", "1b": "float32", "7b": "bfloat16"}
BUDGET = {"0.1b": "1GiB", "1b": "4GiB", "7b": "4GiB"}


def checkpoint(shape: str, folder: Path) -> Path:
    """The checkpoint of a shape, made if it is not there."""
    path = folder / shape
    return path if path.exists() else write_checkpoint(shape, path, getattr(torch, SIZES[shape]))


def measured(job: Job, folder: Path, on_disk: bool) -> dict[str, Any]:
    """The job's figures, its states in a work directory that is removed afterwards or in memory."""
    work = tempfile.mkdtemp(dir=folder)
    try:
        found = dataclasses.replace(job, work_dir=work if on_disk else None).start()
    finally:
        shutil.rmtree(work)
    found["job"] |= {"model": None, "work_dir": on_disk}  # where this machine had them
    return found


def by_tokens(shape: str, folder: Path, checkpoints: Path) -> Iterator[dict[str, Any]]:
    """Runs with and without a work directory at both numbers of tokens."""
    for count in TOKENS:
        job = Job(model=str(checkpoint(shape, checkpoints)), tokens=count, length=128, once=1024, options=OPTIONS)
        for on_disk in (True, False):
            yield measured(job, folder, on_disk)


def of_size(shape: str, folder: Path, checkpoints: Path) -> dict[str, Any]:
    """The analysis of a shape, read layer by layer."""
    return measured(
        Job(model=str(checkpoint(shape, checkpoints)), tokens=512, length=128, host_memory=BUDGET[shape],
            stop="analyse"), folder, on_disk=True)


def page(record: dict[str, Any]) -> str:
    """The record as a page."""
    lines = [f"# Memory on {record['hardware']}", "", f"    {record['command']}", "",
             f"{record['threads']} thread(s), torch {record['torch']}, {record['month']}. Peaks are of the whole "
             "process.", "", f"## Against tokens: {record['shape']}, KDP's default, one epoch of step 3", "",
             "| work directory | tokens | peak memory | against the first |", "|---|---:|---:|---:|"]
    for spilled in (True, False):
        rows = [row for row in record["by_tokens"] if row["job"]["work_dir"] is spilled]
        for row in rows:
            lines.append(f"| {'yes' if spilled else 'no'} | {row['tokens']:,} | {readable_bytes(row['peak_bytes'])} | "
                         f"{row['peak_bytes'] / rows[0]['peak_bytes']:.3f} |")
    lines += ["", "## Against size: the analysis, 512 tokens", "",
              "| shape | weights | budget | read layer by layer | peak memory | of the weights |",
              "|---|---:|---:|---|---:|---:|"]
    for shape, row in record["by_size"].items():
        lines.append(
            f"| {shape}, {row['dtype']} | {readable_bytes(row['model_bytes'])} | {row['job']['host_memory']} | "
            f"{'yes' if row['streamed'] else 'no'} | {readable_bytes(row['peak_bytes'])} | "
            f"{row['peak_bytes'] / row['model_bytes']:.2f} |")
    return "\n".join(lines) + "\n"


def write(record: dict[str, Any], file: Path) -> None:
    """The record and its page, after every run."""
    file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    file.with_suffix(".md").write_text(page(record), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SIZES, default="0.1b", help="of the table against tokens")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--only", choices=["tokens", "size"], default=None, help="one table; the other is kept")
    parser.add_argument("--folder", type=Path, default=None, help="where work directories go")
    parser.add_argument("--checkpoints", type=Path, default=None, help="where checkpoints by shape are, and stay")
    parser.add_argument("--out", type=Path, default=HERE, help="where the results go")
    parser.add_argument("--render", type=Path, default=None, help="only write the page of this record again")
    given = parser.parse_args()
    if given.render:
        given.render.with_suffix(".md").write_text(page(json.loads(given.render.read_text())), encoding="utf-8")
        return
    device = torch.device("cpu")
    file = given.out / f"memory_{hardware.name(device)}_{hardware.month()}.json"
    record: dict[str, Any] = {"shape": given.shape, "by_tokens": [], "by_size": {}}
    record |= json.loads(file.read_text()) if file.is_file() else {}
    record |= {**hardware.facts(device), "command": shlex.join(["python", "benchmarks/memory.py"])}
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        checkpoints = given.checkpoints or folder
        if given.only != "size":
            record |= {"shape": given.shape, "by_tokens": []}
            for row in by_tokens(given.shape, folder, checkpoints):
                record["by_tokens"].append(row)
                write(record, file)
        if given.only != "tokens":
            for shape in given.sizes:
                record["by_size"][shape] = of_size(shape, folder, checkpoints)
                write(record, file)
    print(file.with_suffix(".md").read_text(), file=sys.stdout)


if __name__ == "__main__":
    main()
