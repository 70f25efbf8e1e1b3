"""The shape of the repository: sizes, names, and documents that agree with the code."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import json
import re
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

from mcpo.config import DataConfig
from mcpo.data import load_rows
from mcpo.losses import LOSSES

ROOT = Path(__file__).parents[1]
PACKAGES = ("mcpo", "mcpo_kernels")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
PYTHON = [*SOURCES, *sorted((ROOT / "tests").rglob("*.py"))]
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("recipes/**/*.md")]
)
BLOCK = re.compile(r"^```(?P<info>[^\n]*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)

MEDIAN_LINES, MOST_LINES, MOST_FUNCTION_LINES, MOST_PARAMETERS = 130, 400, 60, 8


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def section(document: str, heading: str) -> str:
    """The text under a second-level heading."""
    _, _, rest = (ROOT / document).read_text().partition(f"\n## {heading}\n")
    assert rest, f"{document} must have the heading {heading!r}"
    return rest.partition("\n## ")[0]


def blocks(path: Path, info: str) -> list[re.Match[str]]:
    return [block for block in BLOCK.finditer(path.read_text()) if block["info"] == info]


def runnable_examples() -> list[object]:
    return [
        pytest.param(block["body"], id=f"{name_of(path)}-{number}")
        for path in DOCUMENTS
        for number, block in enumerate(blocks(path, "python runnable"))
    ]


# Sizes and names.


@pytest.mark.parametrize("package", PACKAGES)
def test_files_are_small_in_the_median(package: str) -> None:
    lengths = [len(path.read_text().splitlines()) for path in (ROOT / package).rglob("*.py")]
    assert statistics.median(lengths) <= MEDIAN_LINES


def test_no_file_is_long() -> None:
    lengths = {name_of(path): len(path.read_text().splitlines()) for path in PYTHON}
    assert {name: count for name, count in lengths.items() if count > MOST_LINES} == {}


def test_no_function_is_long() -> None:
    """Docstrings are not counted: they make a function no harder to read."""
    long: dict[str, int] = {}
    for path in PYTHON:
        for node in functions(path):
            documented = ast.get_docstring(node) is not None
            begin = node.body[0].end_lineno if documented else node.lineno - 1
            count = (node.end_lineno or 0) - (begin or 0)
            if count > MOST_FUNCTION_LINES:
                long[f"{name_of(path)}:{node.name}"] = count
    assert long == {}


def test_no_function_has_many_parameters() -> None:
    """An exception carries the linter's mark, and its reason above."""
    many: dict[str, int] = {}
    for path in SOURCES:
        lines = path.read_text().splitlines()
        for node in functions(path):
            given = node.args
            count = len(given.posonlyargs) + len(given.args) + len(given.kwonlyargs)
            if count > MOST_PARAMETERS and "PLR0913" not in lines[node.lineno - 1]:
                many[f"{name_of(path)}:{node.name}"] = count
    assert many == {}


def test_no_file_is_a_drawer() -> None:
    drawers = re.compile(r"_?(utils?|commons?|helpers?|misc)")
    assert [name_of(path) for path in PYTHON if drawers.fullmatch(path.stem)] == []


# Modules.


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_every_module_imports(path: Path) -> None:
    if "triton" in path.parts:
        pytest.importorskip("triton")
    importlib.import_module(
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    )


def test_every_module_says_what_it_is() -> None:
    silent = [
        name_of(path) for path in SOURCES if not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert silent == []


# Documents against code.


def tree() -> dict[str, str]:
    """Every path of README's tree with what is said of it."""
    (block,) = BLOCK.finditer(section("README.md", "The tree"))
    listed: dict[str, str] = {}
    folders: list[str] = []
    for line in block["body"].splitlines():
        found = re.fullmatch(r"(?P<indent> *)(?P<names>\S+(?:, \S+)*)(?: {2,}(?P<text>.*))?", line)
        assert found, f"a line of the tree must be `name  what it is`, got {line!r}"
        folders = folders[: len(found["indent"]) // 2]
        for name in found["names"].split(", "):
            listed["".join([*folders, name])] = found["text"] or ""
        if found["names"].endswith("/"):
            folders.append(found["names"])
    return listed


def test_every_path_of_the_tree_exists() -> None:
    assert [path for path in tree() if not (ROOT / path).exists()] == []


def test_the_tree_knows_every_package_and_every_module_at_the_top() -> None:
    folders = {f"{name_of(path.parent)}/" for path in SOURCES if path.name == "__init__.py"}
    modules = {
        name_of(path)
        for path in SOURCES
        if path.parent.name in PACKAGES and not path.name.startswith("__")
    }
    documents = {name_of(path) for path in DOCUMENTS if "recipes" not in path.parts}
    assert (folders | modules | documents) - set(tree()) == set()


def test_the_flow_table_names_files_in_the_order_of_the_stages() -> None:
    rows = [line.split("|")[1:-1] for line in section("README.md", "The flow").splitlines()]
    stages = [row for row in rows if row and row[0].strip().isdecimal()]
    assert [row[0].strip() for row in stages] == [str(number) for number in range(1, 9)]
    for _, _, file, *_ in stages:
        assert (ROOT / file.strip().strip("`")).is_file(), file


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_resolve(path: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", path.read_text()):
        file, _, anchor = target.partition("#")
        linked = (path.parent / file).resolve() if file else path
        assert linked.exists(), f"{name_of(path)} links to {target}"
        if anchor:
            assert anchor in headings(linked), f"{name_of(path)} links to {target}"


def headings(path: Path) -> set[str]:
    """Anchors as GitHub makes them."""
    text = BLOCK.sub("", path.read_text())
    found = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in found}


@pytest.mark.parametrize("path", PYTHON, ids=name_of)
def test_documents_that_code_points_to_exist(path: Path) -> None:
    text = re.sub(r"\s*\n\s*#?\s*", " ", path.read_text())
    for document, heading in re.findall(r'(docs/\w+\.md)(?:, "([^"]+)")?', text):
        assert (ROOT / document).is_file(), document
        if heading:
            assert f"# {heading}\n" in (ROOT / document).read_text(), heading


def test_tests_that_documents_point_to_exist() -> None:
    known = {node.name for path in PYTHON for node in functions(path)}
    named = {
        name
        for path in DOCUMENTS
        for name in re.findall(r"`(test_\w+)`", path.read_text())
        if path.name != "log.md"
    }
    assert named
    assert named - known == set()


@pytest.mark.parametrize("source", runnable_examples())
def test_runnable_examples_run(source: str) -> None:
    exec(compile(source, "example", "exec"), {"__name__": "example"})


def test_there_are_runnable_examples() -> None:
    assert blocks(ROOT / "README.md", "python runnable")


@pytest.mark.parametrize("block", blocks(ROOT / "docs" / "data.md", "json accepted"))
def test_accepted_rows_are_read(block: re.Match[str], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(json.loads(block["body"])))
    (row,) = load_rows([str(path)]).rows
    assert row.chosen.text == "Blue."
    assert "Seven." in [candidate.text for candidate in row.pool]


@pytest.mark.parametrize("block", blocks(ROOT / "docs" / "data.md", "json refused"))
def test_refused_rows_say_what_the_document_says(block: re.Match[str], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(json.loads(block["body"])))
    quote = re.match(r"\n+((?:> .*\n?)+)", block.string[block.end() :])
    assert quote, "a refused row must be followed by its message as a quotation"
    message = " ".join(line.removeprefix("> ") for line in quote[1].strip().splitlines())
    with pytest.raises(ValueError, match=re.escape(message)):
        load_rows([str(path)])


def test_every_schema_has_an_example_of_each_kind() -> None:
    text = (ROOT / "docs" / "data.md").read_text()
    for schema in ("candidates", "ranked_messages", "nectar", "ultrafeedback", "preference"):
        part = text.partition(f"\n### {schema}\n")[2].partition("\n##")[0]
        assert part.count("```json accepted") == 1, schema
        assert part.count("```json refused") == 1, schema


def test_every_data_option_is_documented_with_its_default() -> None:
    options = section("docs/data.md", "Options")
    for field in dataclasses.fields(DataConfig):
        shown = {(): "none", True: "`true`"}.get(field.default, f"{field.default}")
        row = re.search(
            rf"^\| `{field.name}` \| `?{re.escape(shown.strip('`'))}`? \|", options, re.M
        )
        assert row, f"{field.name} with default {shown}"


def test_every_kind_of_finding_is_documented() -> None:
    counted = section("docs/data.md", "What is counted")
    readers = [
        *(ROOT / "mcpo" / "data").glob("*.py"),
        ROOT / "mcpo/encode.py",
        ROOT / "mcpo/tokens.py",
    ]
    kinds = {
        kind
        for path in readers
        for call in re.findall(r"tally\.add\((.*)\)", path.read_text())
        for kind in re.findall(r'"(\w+)"', call)
    }
    assert len(kinds) > 15
    assert [kind for kind in sorted(kinds) if f"`{kind}`" not in counted] == []


def test_every_loss_and_metric_is_in_the_mathematics() -> None:
    text = (ROOT / "docs" / "math.md").read_text()
    sources = [ROOT / "mcpo" / "step.py", *(ROOT / "mcpo" / "mc_kernel").glob("*.py")]
    metrics = {
        name
        for path in sources
        for name in re.findall(r'"((?:rewards|logps|mc|bco|kto)/\w+)"', path.read_text())
    }
    assert metrics
    assert [name for name in sorted(metrics) if f"`{name}`" not in text] == []
    assert [name for name in LOSSES if f"loss_type: {name}" not in text] == []


# Prose.


def text_files() -> list[Path]:
    names = ("Makefile", ".gitignore", ".ci/run", "pyproject.toml", "constraints.txt")
    recipes = [path for path in (ROOT / "recipes").rglob("*") if path.is_file()]
    return [*(ROOT / name for name in names), *PYTHON, *DOCUMENTS, *recipes]


@pytest.mark.parametrize("path", text_files(), ids=name_of)
def test_no_machine_paths_and_nothing_left_for_later(path: Path) -> None:
    text = path.read_text()
    # Spelt in parts, because this file is looked at too.
    folders = "|".join(("home", "root", "tmp", "work", "Users", "mnt", "opt", "var"))
    assert re.findall(rf"(?<![\w.}}~])/(?:{folders})/", text) == []
    assert re.findall(r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X)\b", text) == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_documents_are_ascii(path: Path) -> None:
    odd = sorted(set(re.findall(r"[^\x00-\x7f]", path.read_text())))
    assert odd == []


def test_the_figures_of_the_readme_are_those_of_the_recorded_run() -> None:
    """Nobody types a number: each comes from the summary that the run itself wrote."""
    summary = json.loads((ROOT / "docs" / "default_run" / "summary.json").read_text())
    measured = (ROOT / "README.md").read_text().partition("**Measured:**")[2].partition("```")[0]
    words = " ".join(measured.split())
    for figure in (
        f"from {summary['heldout_pass_before']:.1%} to {summary['heldout_pass_after']:.1%}",
        f"of {summary['heldout_n']} held-out",
        f"p = {summary['heldout_p_value']:.1g}",
        f"{summary['preference_accuracy']:.1%} of the held-out rejected",
        f"in {summary['wall_s'] / 60:.0f} minutes",
        f"commit {summary['commit']}",
        f"{summary['heldout_tokens_before']:.0f} to {summary['heldout_tokens_after']:.0f} tokens",
    ):
        assert figure in words, figure
