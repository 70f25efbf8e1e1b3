"""Make the verifiable data set: ``python -m mcpo.data.make_verifiable``.

SmolLM2-135M-Instruct answers every prompt six times, programs check the answers, and prompts
where some answers pass and others fail become preference rows. A batch that is done is appended to
a work file and not repeated by the next run; the data files appear at the end, in one rename each.

The work file is named after all that decides the samples (seed, model, prompts, temperatures), so a
run never continues another one's work. Batches are fixed by the prompts, hence an interrupted run
ends with the same samples as one that was not; on other hardware or with another number of
threads the logits are rounded otherwise, and single samples may differ.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcpo.data.prompts import SPLITS, VerifiablePrompt, build_prompts, read_topics
from mcpo.data.verifiable_report import figures, insert_figures
from mcpo.data.verifiable_rows import Graded, Sample, candidate_row, grade, prompt_record
from mcpo.models import SMOLLM2

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mcpo.encode import Encoder

TEMPERATURES = (0.4, 0.7, 1.0)
SAMPLES_PER_TEMPERATURE = 2
MAX_NEW_TOKENS = 72
_PROMPTS_PER_BATCH = 16
DATA_FOLDER = Path("recipes/data")


def main(argv: Sequence[str] | None = None) -> None:
    """Sample, check and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=DATA_FOLDER, help="where the files go")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and samples")
    parser.add_argument("--limit", type=int, help="only so many prompts of each split")
    parser.add_argument("--model", default=SMOLLM2, help="a folder or name, see mcpo/models.py")
    parser.add_argument("--work", type=Path, default=default_work_folder(), help="work files")
    args = parser.parse_args(argv)

    prompts = limited(build_prompts(args.seed, read_topics()), args.limit)
    samples = sample_all(prompts, model_name=args.model, seed=args.seed, work_folder=args.work)
    graded = {prompt.prompt_id: grade(prompt, samples[prompt.prompt_id]) for prompt in prompts}
    write_data(prompts, graded, args.output)


def default_work_folder() -> Path:
    """Where unfinished runs are kept."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    return cache / "mcpo" / "make_verifiable"


def limited(prompts: Sequence[VerifiablePrompt], limit: int | None) -> list[VerifiablePrompt]:
    """The first so many prompts of each split; all without a limit."""
    if limit is None:
        return list(prompts)
    if limit < 1:
        raise ValueError(f"--limit must be at least 1; got {limit}; leave it out for all prompts")
    by_split = [[prompt for prompt in prompts if prompt.split == split] for split in SPLITS]
    return [prompt for listed in by_split for prompt in listed[:limit]]


def sample_all(
    prompts: Sequence[VerifiablePrompt], *, model_name: str, seed: int, work_folder: Path
) -> dict[str, list[Sample]]:
    """The samples of every prompt, as far as possible from the work file."""
    work_folder.mkdir(parents=True, exist_ok=True)
    work = work_folder / f"{fingerprint(prompts, model_name, seed)}.jsonl"
    samples = read_work(work)
    by_length = sorted(prompts, key=lambda prompt: (len(prompt.text), prompt.prompt_id))
    batches = [
        by_length[start : start + _PROMPTS_PER_BATCH]
        for start in range(0, len(by_length), _PROMPTS_PER_BATCH)
    ]
    todo = [batch for batch in batches if any(p.prompt_id not in samples for p in batch)]
    if todo:
        print(f"{len(batches) - len(todo)} of {len(batches)} batches are in {work}")
        for done in _sample_batches(todo, model_name=model_name, seed=seed):
            append_work(work, done)
            samples.update(done)
    return samples


def fingerprint(prompts: Sequence[VerifiablePrompt], model_name: str, seed: int) -> str:
    """Short name of everything that decides the samples."""
    settings = [seed, model_name, TEMPERATURES, SAMPLES_PER_TEMPERATURE, MAX_NEW_TOKENS]
    texts = [[prompt.prompt_id, prompt.text] for prompt in prompts]
    return hashlib.sha256(json.dumps([settings, texts]).encode()).hexdigest()[:16]


def read_work(work: Path) -> dict[str, list[Sample]]:
    """The samples so far, by prompt; a line that was cut off by the end of a run is taken out."""
    if not work.exists():
        return {}
    whole, newline, cut_off = work.read_text(encoding="utf-8").rpartition("\n")
    if cut_off:
        write_text(work, whole + newline)
    batches = [json.loads(line) for line in whole.splitlines()]
    return {
        prompt_id: [Sample(**sample) for sample in samples]
        for batch in batches
        for prompt_id, samples in batch.items()
    }


def append_work(work: Path, done: dict[str, list[Sample]]) -> None:
    """Add a finished batch, one line."""
    record = {prompt_id: [asdict(sample) for sample in group] for prompt_id, group in done.items()}
    with work.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def draw_seed(seed: int, prompt_id: str, temperature: float, index: int) -> int:
    """The seed of one sample; no two samples share it by accident."""
    name = f"{seed}/{prompt_id}/{temperature}/{index}"
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")


def _sample_batches(
    batches: Sequence[Sequence[VerifiablePrompt]], *, model_name: str, seed: int
) -> Iterable[dict[str, list[Sample]]]:
    """Load the model and sample batch after batch, showing progress."""
    import torch
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    from mcpo.encode import make_encoder
    from mcpo.models import load_model

    model, tokenizer = load_model(model_name, dtype=torch.bfloat16)
    model.eval()
    encoder = make_encoder(tokenizer, prompt_format="auto", chat_template=None)
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("prompts answered", total=sum(map(len, batches)))
        for batch in batches:
            yield _sample_batch(model, encoder, batch, seed=seed)
            progress.advance(task, len(batch))


def _sample_batch(
    model: PreTrainedModel,
    encoder: Encoder,
    batch: Sequence[VerifiablePrompt],
    *,
    seed: int,
) -> dict[str, list[Sample]]:
    from mcpo.encode import encode_prompt
    from mcpo.evaluate.generate import Draw, generate_batch

    settings = [(t, index) for t in TEMPERATURES for index in range(SAMPLES_PER_TEMPERATURE)]
    draws = [
        [Draw(temperature=t, seed=draw_seed(seed, prompt.prompt_id, t, i)) for t, i in settings]
        for prompt in batch
    ]
    prompt_ids = [encode_prompt(prompt.text, encoder, prompt.prompt_id) for prompt in batch]
    groups = generate_batch(model, encoder, prompt_ids, draws, max_new_tokens=MAX_NEW_TOKENS)
    return {
        prompt.prompt_id: [
            Sample(
                text=completion.text,
                temperature=temperature,
                index=index,
                finished=completion.finished,
                num_tokens=completion.num_tokens,
            )
            for (temperature, index), completion in zip(settings, group, strict=True)
        ]
        for prompt, group in zip(batch, groups, strict=True)
    }


def write_data(
    prompts: Sequence[VerifiablePrompt], graded: dict[str, list[Graded]], output: Path
) -> None:
    """Write the preference rows, the prompts to decode, and the figures of the README."""
    output.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        listed = [prompt for prompt in prompts if prompt.split == split]
        rows = [candidate_row(prompt, graded[prompt.prompt_id]) for prompt in listed]
        write_jsonl(output / f"verifiable_{split}.jsonl", [row for row in rows if row is not None])
        if split != "train":
            write_jsonl(output / f"verifiable_{split}_prompts.jsonl", map(prompt_record, listed))
    report = figures(prompts, graded)
    print(report)
    readme = output / "README.md"
    if readme.exists():
        write_text(readme, insert_figures(readme.read_text(encoding="utf-8"), report))


def write_jsonl(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """One record a line; readers see the old file or the new one, never half of it."""
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))


def write_text(path: Path, text: str) -> None:
    """Write beside the file, then rename."""
    scratch = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)


if __name__ == "__main__":
    main()
