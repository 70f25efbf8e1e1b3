"""Win rates of judged answers: ``python -m mcpo.evaluate COMMAND FILES``.

alpaca      AlpacaEval 2's annotation files: win rate, standard error, length-controlled
arena       Arena-Hard's judgment files: score with a bootstrap interval
published   the statistics, checked against AlpacaEval 2's published figures
page        an HTML page with two models' answers side by side
judge       have a language model compare two models' answers, into an annotation file
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mcpo.evaluate.alpaca import (
    Annotation,
    preferences,
    read_annotations,
    read_outputs,
    why_not_comparable,
    write_annotations,
)
from mcpo.evaluate.arena import arena_score, read_judgments
from mcpo.evaluate.page import side_by_side
from mcpo.evaluate.win_rate import over_seeds, paired_difference, win_rate
from mcpo.judges.verdict import JudgeError
from mcpo.progress import progress

CALLERS_ERRORS = (ValueError, OSError, ModuleNotFoundError, JudgeError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns 0, 1 where figures are off, or 2 for an error of the caller."""
    arguments = _parser().parse_args(argv)
    console = Console()
    try:
        match arguments.command:
            case "alpaca":
                alpaca(arguments, console)
            case "arena":
                arena(arguments, console)
            case "page":
                page(arguments, console)
            case "judge":
                judge(arguments, console)
            case _:
                return published(arguments, console)
    except CALLERS_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def alpaca(arguments: argparse.Namespace, console: Console) -> None:
    """A line per annotation file; with several the paired difference to the first."""
    files = [read_annotations(path) for path in arguments.files]
    rates = [win_rate(preferences(file)) for file in files]
    table = _table("model", "win rate", "s.e.", "LC win rate", "discrete", "W / L / D", "- first")
    for file, rate in zip(files, rates, strict=True):
        table.add_row(
            file[0].generator_2,
            f"{rate.win_rate:.2f}",
            f"{rate.stderr:.2f}",
            _length_controlled(file, arguments),
            f"{rate.discrete:.2f}",
            f"{rate.wins} / {rate.losses} / {rate.draws}",
            "" if file is files[0] else _difference(file, files[0]),
        )
    console.print(table)
    for file, rate in zip(files, rates, strict=True):
        reason = why_not_comparable(file)
        notes = [
            f"{rate.abstained} comparisons without a verdict are left out" * bool(rate.abstained),
            f"not comparable with the leaderboard: {reason}" * bool(reason),
        ]
        for note in filter(None, notes):
            console.print(f"{file[0].generator_2}: {note}", soft_wrap=True)
    if arguments.seeds:
        mean = over_seeds([rate.win_rate for rate in rates])
        console.print(f"over {len(rates)} seeds, mean (std): {mean}")


def _length_controlled(file: Sequence[Annotation], arguments: argparse.Namespace) -> str:
    """The cell of the table; empty where the features of the fit were not given."""
    from mcpo.evaluate.length_control import fit_length_model
    from mcpo.evaluate.published import read_difficulty, read_gamed

    if arguments.difficulty is None and arguments.gamed is None:
        return ""
    if arguments.difficulty is None or arguments.gamed is None:
        raise ValueError("length control needs both --difficulty and --gamed, got one of them")
    difficulty_Q = read_difficulty(arguments.difficulty)
    model = fit_length_model(
        preferences(file),
        [len(annotation.output_2) for annotation in file],
        [len(annotation.output_1) for annotation in file],
        difficulty_Q,
        read_gamed(arguments.gamed),
    )
    return f"{model.win_rate(difficulty_Q):.2f}"


def _difference(file: Sequence[Annotation], first: Sequence[Annotation]) -> str:
    """The cell of the table: points above the first file's model, and their standard error."""
    if [each.instruction for each in file] != [each.instruction for each in first]:
        raise ValueError("a paired difference needs files with the same questions in one order")
    gap = paired_difference(preferences(file), preferences(first))
    return f"{gap.mean:+.2f} ({gap.stderr:.2f})"


def arena(arguments: argparse.Namespace, console: Console) -> None:
    """A line per judgment file."""
    table = _table("model", "judge", "baseline", "score", "90% interval", "questions", "skipped")
    scores: list[float] = []
    for path in arguments.files:
        judgments = read_judgments(path)
        score = arena_score(judgments)
        scores.append(score.score)
        table.add_row(
            judgments[0].model,
            judgments[0].judge,
            judgments[0].baseline or "not said",
            f"{score.score:.1f}",
            f"{score.lower:.1f} to {score.upper:.1f}",
            str(score.num_questions),
            str(score.skipped),
        )
    console.print(table)
    console.print("comparable with another score of the same questions, judge and baseline only")
    if arguments.seeds:
        console.print(f"over {len(scores)} seeds, mean (std): {over_seeds(scores)}")


def published(arguments: argparse.Namespace, console: Console) -> int:
    """Ours against published, a line per leaderboard entry; 1 if anything is off."""
    from mcpo.evaluate.published import (
        LIMIT_EXACT,
        LIMIT_REFITTED,
        LIMIT_WITH_L1,
        compare_with_published,
        judge_records_error,
        worst,
    )

    results = compare_with_published(arguments.folder)
    table = _table(
        "entry", "win rate", "s.e.", "discrete", "error", "LC", "LC error", "with L1", ""
    )
    for result in results:
        table.add_row(
            result.model,
            f"{result.win_rate:.4f}",
            f"{result.stderr:.4f}",
            f"{result.discrete:.4f}",
            f"{result.exact_error:.0e}",
            f"{result.length_controlled:.3f}",
            f"{result.refitted_error:.3f}",
            f"{result.l1_error:.4f}",
            "ok" if result.holds else "OFF",
        )
    console.print(table)
    most = worst(results)
    num_records, record_error = judge_records_error(arguments.folder)
    console.print(
        f"{len(results)} entries; largest errors: win rate, standard error, discrete, counts "
        f"{most['exact_error']:.0e} (limit {LIMIT_EXACT:.0e}); length-controlled from published "
        f"weights {most['weights_error']:.0e} ({LIMIT_EXACT:.0e}), refitted "
        f"{most['refitted_error']:.3f} points ({LIMIT_REFITTED}), with the leaderboard's penalty "
        f"{most['l1_error']:.4f} ({LIMIT_WITH_L1})\n"
        f"{num_records} recorded answers of the judge: largest error of a preference "
        f"{record_error:.0e} ({LIMIT_EXACT:.0e})",
        soft_wrap=True,
    )
    off = [result.model for result in results if not result.holds]
    if off or record_error > LIMIT_EXACT:
        console.print(f"OFF: {', '.join(off) or 'recorded answers'}", style="bold red")
        return 1
    return 0


def page(arguments: argparse.Namespace, console: Console) -> None:
    """Write the side-by-side page."""
    annotations = read_annotations(arguments.annotations)
    arguments.output.write_text(side_by_side(annotations), encoding="utf-8")
    console.print(f"{len(annotations)} questions in {arguments.output}")


def judge(arguments: argparse.Namespace, console: Console) -> None:
    """Ask a language model about every question, in both orders; what it said is kept."""
    from mcpo.evaluate.judged import judge_outputs
    from mcpo.judges.cache import AnswerCache
    from mcpo.judges.instructions import DEFAULT
    from mcpo.judges.llm import JudgeConfig, LanguageModelJudge

    outputs = read_outputs(arguments.outputs)
    baseline = read_outputs(arguments.baseline)
    config = JudgeConfig(
        model=arguments.model,
        base_url=arguments.base_url,
        instructions=arguments.instructions or DEFAULT,
        both_orders=not arguments.one_order,
        concurrency=arguments.concurrency,
    )
    asked = LanguageModelJudge(config, AnswerCache(arguments.cache))
    with progress(console, "judge", len(outputs)) as advance:
        annotations = judge_outputs(
            outputs, baseline, asked, config.model, lambda done: advance(done, "")
        )
    write_annotations(arguments.annotations, annotations)
    usage = asked.usage
    console.print(
        f"{arguments.annotations}: {len(annotations)} comparisons; {usage.requests} requests, "
        f"{usage.cached} answers from {arguments.cache}, {usage.prompt_tokens:,} + "
        f"{usage.completion_tokens:,} tokens; {usage.contradicted} pairs where the order decided, "
        f"{usage.abstained} answers without a verdict",
        soft_wrap=True,
    )


def _table(*columns: str) -> Table:
    table = Table()
    table.add_column(columns[0], no_wrap=True)
    for column in columns[1:]:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mcpo.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    alpaca_parser = commands.add_parser("alpaca", help="AlpacaEval 2's annotation files")
    alpaca_parser.add_argument(
        "files", nargs="+", type=Path, help="annotations.json, one per model"
    )
    alpaca_parser.add_argument("--difficulty", type=Path, help="instruction_difficulty.csv")
    alpaca_parser.add_argument("--gamed", type=Path, help="df_gamed.csv")
    arena_parser = commands.add_parser("arena", help="Arena-Hard's judgment files")
    arena_parser.add_argument(
        "files", nargs="+", type=Path, help="model_judgment/JUDGE/MODEL.jsonl"
    )
    for each in (alpaca_parser, arena_parser):
        each.add_argument("--seeds", action="store_true", help="the files are seeds of one recipe")
    published_parser = commands.add_parser("published", help="check the statistics")
    published_parser.add_argument("folder", type=Path, help="the records")
    page_parser = commands.add_parser("page", help="two models' answers side by side")
    page_parser.add_argument("annotations", type=Path, help="annotations.json")
    page_parser.add_argument("output", type=Path, help="the HTML file to write")
    _add_judge(commands.add_parser("judge", help="have a language model compare answers"))
    return parser


def _add_judge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("outputs", type=Path, help="model_outputs.json of the model")
    parser.add_argument("baseline", type=Path, help="model_outputs.json of the baseline")
    parser.add_argument("annotations", type=Path, help="the file to write")
    parser.add_argument("--model", required=True, help="the judge's name at its endpoint")
    parser.add_argument(
        "--base_url", help="an OpenAI-compatible endpoint; its key in OPENAI_API_KEY"
    )
    parser.add_argument("--instructions", type=Path, help="text file in place of the default")
    parser.add_argument("--one_order", action="store_true", help="ask once per pair, order by lot")
    parser.add_argument("--concurrency", type=int, default=8, help="requests at a time")
    parser.add_argument(
        "--cache", type=Path, default=Path("judge_answers.sqlite"), help="where answers are kept"
    )


if __name__ == "__main__":
    sys.exit(main())
