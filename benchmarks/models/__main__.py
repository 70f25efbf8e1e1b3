"""Examine model types and write docs/models.md.

python -m benchmarks.models                 # all of them, some minutes
python -m benchmarks.models llama qwen3     # these; the rows of the others stay
python -m benchmarks.models --report        # the page alone, from the rows
"""

from __future__ import annotations

import argparse
import datetime
import signal
import warnings
from pathlib import Path

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from benchmarks.models.compare import Verdict, examine
from benchmarks.models.rows import PAGE, RESULTS, Row, page, read, write
from benchmarks.provenance import collect

# A small model takes a fraction of a second; one that did not shrink is given up.
MOST_SECONDS = 90


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model_types", nargs="*", help="which; all if none is named")
    parser.add_argument("--report", action="store_true", help="write the page from what is there")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of rows")
    parser.add_argument("--output", type=Path, default=PAGE, help="the page")
    options = parser.parse_args()
    rows = {row.verdict.model_type: row for row in read(options.results)}
    if not options.report:
        warnings.simplefilter("ignore")
        transformers.logging.set_verbosity_error()
        for model_type in options.model_types or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            verdict = within(MOST_SECONDS, model_type)
            rows[model_type] = _row(verdict)
            print(f"{model_type:28} {verdict.outcome:10} {verdict.reason[:100]}", flush=True)
        write(list(rows.values()), options.results)
    options.output.write_text(page(read(options.results)))


def within(seconds: int, model_type: str) -> Verdict:
    """The verdict, or that it took too long."""

    def give_up(*_: object) -> None:
        raise TimeoutError(f"it took more than {seconds} s")

    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        return examine(model_type)
    except TimeoutError as error:
        return Verdict(
            model_type=model_type, model_class="", outcome="not built", reason=str(error)
        )
    finally:
        signal.alarm(0)


def _row(verdict: Verdict) -> Row:
    origin = collect("python -m benchmarks.models")
    return Row(
        verdict=verdict,
        date=datetime.date.today().isoformat(),
        commit=origin.commit,
        dirty=origin.dirty,
        transformers=transformers.__version__,
        torch=torch.__version__,
    )


if __name__ == "__main__":
    main()
