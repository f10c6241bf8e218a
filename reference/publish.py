#!/usr/bin/env python3
"""Take a finished training run into the repository, measure the model, and write its page.

    python reference/publish.py RUN NAME               # RUN as train.py left it: RUN/model, RUN/run.json, …
    python reference/publish.py --render NAME          # the page again, from reference/pages/model-NAME.json
    python reference/publish.py src/kdprune/bundled bundled --records reference/records --in-place

Weights and tokenizer go to reference/models/NAME, records to reference/records/NAME, measurements and page to
reference/pages/model-NAME.*; with --in-place nothing is copied.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from manifold import outliers
from model_page import render

from kdprune.data.tokens import bundled_calibration
from kdprune.errors import KDPruneError
from kdprune.evaluation.tasks import check_suite, run_suite
from kdprune.methods.common.analysis import score_layers
from kdprune.report.results import encode, write_file
from kdprune.run.record import software_versions
from kdprune.run.session import Session
from kdprune.runtime.run import Run
from kdprune.runtime.stages import Stages

ROOT = Path(__file__).parents[1]
RECORDS = ("run.json", "loss_curve.json", "perplexity.json")
SUITE, PROTECT = "blimp", 0.1
ALL = 2**20   # rows: all of the calibration text, of which the analysis takes what is enough


def check(run: Path, records: Path) -> None:
    """Raises KDPruneError where the run is not finished."""
    missing = [str(path) for path in (run / "model" / "config.json", *(records / name for name in RECORDS))
               if not path.is_file()]
    if missing:
        raise KDPruneError(f"got {run} without {', '.join(missing)}, expected a finished run; let train.py end")


def take(run: Path, records: Path, name: str) -> tuple[Path, Path]:
    """Copies model and records into the repository; returns where they are now."""
    model, kept = ROOT / "reference" / "models" / name, ROOT / "reference" / "records" / name
    shutil.rmtree(model, ignore_errors=True)
    shutil.copytree(run / "model", model)
    kept.mkdir(parents=True, exist_ok=True)
    for file in RECORDS:
        shutil.copyfile(records / file, kept / file)
    return model, kept


def measure(model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """BLiMP and the slow manifold, in float32."""
    run = Session(model, None, 0, options.device, "float32", False, Stages(show=sys.stderr.isatty()))
    scores = run_suite(
        run.model, run.tokenizer, SUITE, data=options.data, limit=options.limit, stages=run.stages)
    tokens = run.calibration(options.calibration, ALL, None)
    analysis = score_layers(run.model, tokens, Run(stages=run.stages), protect=PROTECT)
    plain = [score.model_dump(exclude={"right"}) for score in scores]  # the page does not show single items
    return {
        "blimp": {"limit": options.limit, "scores": plain},
        "text": tokens.source, "manifold": analysis.record().model_dump(mode="json"),
        "outliers": outliers(run, tokens),
    }


def publish(options: argparse.Namespace, file: Path, command: str) -> None:
    """Copies, measures and writes the record."""
    records = options.records or options.run
    check(options.run, records)
    check_suite(SUITE, options.data)
    model = options.run / "model"
    if not options.in_place:
        model, records = take(options.run, records, options.name)
    run, curve, perplexity = (json.loads((records / name).read_text(encoding="utf-8")) for name in RECORDS)
    record = {
        "name": options.name, "command": command, "run": run, "loss_curve": curve, "perplexity": perplexity,
        **measure(model, options), "versions": software_versions(),
    }
    write_file(file, encode(record) + "\n")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 2 where it cannot be done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", help="what train.py wrote")
    parser.add_argument("name", help="of the model in the repository and of its page")
    parser.add_argument("--records", type=Path, help="folder of run.json, … (default: RUN)")
    parser.add_argument("--in-place", action="store_true", help="measure where it is, copy nothing")
    parser.add_argument("--data", type=Path, nargs="+", default=[ROOT.parent / "shared" / "data" / "bench"],
                        help="folders with BLiMP's files (default: ../shared/data/bench)")
    parser.add_argument("--limit", type=int, default=100, help="pairs of each paradigm of BLiMP")
    parser.add_argument("--calibration", type=Path, default=bundled_calibration(),
                        help="text whose layer states are looked at (default: the package's)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--render", action="store_true", help="only write the page again")
    options = parser.parse_args(arguments)
    file = ROOT / "reference" / "pages" / f"model-{options.name}.json"
    try:
        if not options.render:
            if options.run is None:
                raise KDPruneError("got no run, expected RUN NAME, or --render NAME")
            shown = ["RUN" if options.run.is_absolute() else str(options.run), options.name]
            shown += ["--records", str(options.records)] if options.records else []
            shown += ["--in-place"] if options.in_place else []
            publish(options, file, shlex.join(["python", "reference/publish.py", *shown, "--limit",
                                               str(options.limit)]))
        render(file)
    except KDPruneError as error:
        print(f"publish.py: {error}", file=sys.stderr)
        return 2
    print(f"wrote {file.with_suffix('.md').relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
