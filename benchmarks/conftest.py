"""Options of the suites, the cells and points they select, and what those share."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cells, gate, memory, peers, provenance, roofline, rows, tables, workload
from benchmarks.measure import Limits, cpu_seconds
from benchmarks.step import arms as step_arms
from benchmarks.step import points as step_points
from benchmarks.step import rows as step_rows
from benchmarks.step import tables as step_tables

NAMES = tuple(peer.name for peer in peers.PEERS)
GRID = ",".join(map(str, cells.GRID))
SESSION = pytest.StashKey[list[rows.Row]]()
STEPS = pytest.StashKey[list[step_rows.Row]]()


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """What the cells of one shape and dtype share."""

    inputs: workload.Inputs
    oracle: gate.Oracle
    products: dict[str, roofline.Product]
    peak: Callable[[memory.Request], memory.Peak]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    group = parser.getgroup("head", "benchmarks of the head")
    group.addoption("--device", choices=cells.DEVICES, default="cpu", help="default: cpu")
    group.addoption("--quick", action="store_true", help="one small shape, few rounds")
    group.addoption("--shapes", help=f"NxDxV, comma-separated (default: {GRID})")
    group.addoption("--dtypes", help=f"out of {', '.join(cells.DTYPES)} (default: all)")
    group.addoption("--patterns", help=f"out of {', '.join(cells.PATTERNS)} (default: all)")
    group.addoption("--impls", help=f"out of {', '.join(NAMES)} (default: all)")
    group.addoption("--rounds", type=int, help="of a cell at most (default: 10; quick: 3)")
    group.addoption("--budget", type=float, help="seconds of a cell's rounds (default: 20; 2)")
    group.addoption("--results", type=Path, help="file that rows are appended to")
    group = parser.getgroup("step", "benchmarks of a training step")
    group.addoption("--points", help="PxCxPOOL, comma-separated, such as 256x128x5 (default: all)")
    group.addoption("--model", help=f"of --points (default: {step_points.SMOLLM2})")
    group.addoption("--arms", help=f"out of {', '.join(step_arms.NAMES)} (default: all)")


def pytest_configure(config: pytest.Config) -> None:
    """Let other libraries warn: the suite reports, and does not judge their code."""
    config.addinivalue_line("filterwarnings", "default")
    config.stash[SESSION] = []
    config.stash[STEPS] = []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for each cell of the head, or for each point of the step."""
    try:
        if "point" in metafunc.fixturenames:
            _generate_steps(metafunc)
        else:
            _generate_cells(metafunc)
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None


def _generate_steps(metafunc: pytest.Metafunc) -> None:
    timed = pytest.mark.benchmark(group="step", timer=cpu_seconds)
    points = [
        pytest.param(point, id=str(point).replace(" ", "-"), marks=timed)
        for point in select_points(metafunc.config.option)
    ]
    metafunc.parametrize("point", points)


def _generate_cells(metafunc: pytest.Metafunc) -> None:
    """Those of one shape and dtype follow one another."""
    selected = select(metafunc.config.option)
    # pytest keeps a fixture as long as its parameter is the same object.
    shared = {(cell.shape, cell.dtype): (cell.shape, cell.dtype, cell.device) for cell in selected}
    parameters = [
        pytest.param(
            shared[cell.shape, cell.dtype],
            cell,
            id=f"{cell.group.replace(' ', '-')}-{cell}",
            marks=pytest.mark.benchmark(group=cell.group, timer=cpu_seconds, disable_gc=True),
        )
        for cell in selected
    ]
    metafunc.parametrize(("work", "cell"), parameters, indirect=["work"], scope="module")


def select(options: Any) -> list[cells.Cell]:
    """The cells that the options name.

    Raises:
        ValueError: an option names something that is not known.
    """
    grid = cells.GRID if options.device == "cpu" else cells.CUDA_GRID
    shapes = cells.QUICK if options.quick else grid
    if options.shapes:
        shapes = tuple(cells.parse_shape(text) for text in options.shapes.split(","))
    dtypes = cells.parse_names(options.dtypes or "bf16,fp32", cells.DTYPES, "--dtypes")
    chosen = options.patterns or ",".join(cells.PATTERNS)
    patterns = cells.parse_names(chosen, cells.PATTERNS, "--patterns")
    impls = cells.parse_names(options.impls or ",".join(NAMES), NAMES, "--impls")
    return [
        cells.Cell(
            shape=shape,
            dtype=dtype,
            pattern=pattern,
            way=way,
            impl=peer.name,
            device=options.device,
        )
        for shape in shapes
        for dtype in dtypes
        for wanted in patterns
        for peer in peers.PEERS
        if peer.name in impls and options.device in peer.devices
        for pattern, way in peer.jobs
        if pattern == wanted
    ]


def select_points(options: Any) -> list[step_points.Point]:
    """The points that the options name.

    Raises:
        ValueError: an option names something that is not known.
    """
    if options.quick and not options.points:
        return list(step_points.QUICK)
    texts = options.points.split(",") if options.points else step_points.GRID
    dtypes = cells.parse_names(options.dtypes or "fp32,bf16", step_points.DTYPES, "--dtypes")
    model = options.model or step_points.SMOLLM2
    return [step_points.parse_point(text, model, dtype) for dtype in dtypes for text in texts]


@pytest.fixture
def arms(pytestconfig: pytest.Config) -> Sequence[step_arms.Arm]:
    """The arms of a step that the options name."""
    names = pytestconfig.option.arms or ",".join(step_arms.NAMES)
    try:
        chosen = cells.parse_names(names, step_arms.NAMES, "--arms")
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None
    return [step_arms.named(name) for name in chosen]


@pytest.fixture
def num_rounds(pytestconfig: pytest.Config) -> int:
    """How often each arm of a step is timed."""
    options = pytestconfig.option
    return options.rounds or (2 if options.quick else 5)


@pytest.fixture
def record_steps(pytestconfig: pytest.Config) -> Any:
    """A function that appends the rows of a point to the results, and keeps them for the end."""
    options = pytestconfig.option
    path = options.results or (step_rows.QUICK if options.quick else step_rows.FULL)

    def write(found: Sequence[step_rows.Row]) -> None:
        step_rows.append(found, path)
        pytestconfig.stash[STEPS].extend(found)

    return write


@pytest.fixture(scope="module")
def work(request: pytest.FixtureRequest) -> Iterator[Workload]:
    """Inputs, oracle and bare products of a shape and dtype; those before are let go first."""
    gc.collect()
    if "torch._dynamo" in sys.modules:
        # A function compiled for many shapes would end up running uncompiled, in silence.
        torch.compiler.reset()
    shape, dtype, device = request.param
    with torch.device(device):
        inputs = workload.make_inputs(shape, dtype)
        oracle, products = gate.make_oracle(inputs), roofline.make_products(inputs)
    if device == "cuda":
        yield Workload(inputs=inputs, oracle=oracle, products=products, peak=peak_on_gpu(inputs))
        return
    with memory.open_meter(shape, dtype) as peak:
        yield Workload(inputs=inputs, oracle=oracle, products=products, peak=peak)


def peak_on_gpu(inputs: workload.Inputs) -> Callable[[memory.Request], memory.Peak]:
    """A function as that of ``memory.open_meter``, without a process of its own."""

    def peak(request: memory.Request) -> memory.Peak:
        head = peers.build(peers.named(request.impl))
        return memory.peak_on_gpu(workload.make_job(head, inputs, request.pattern, request.way))

    return peak


@pytest.fixture
def head(cell: cells.Cell) -> workload.Head:
    """The implementation of a cell; without it the cell is skipped."""
    try:
        return peers.build(peers.named(cell.impl))
    except peers.Missing as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="session")
def limits(pytestconfig: pytest.Config) -> Limits:
    """How long a cell may take."""
    options = pytestconfig.option
    rounds, budget = (3, 2.0) if options.quick else (10, 20.0)
    return Limits(rounds=options.rounds or rounds, budget=options.budget or budget)


@pytest.fixture(scope="session")
def origin(pytestconfig: pytest.Config) -> rows.Provenance:
    """Where this session's rows come from."""
    arguments = pytestconfig.invocation_params.args
    command = provenance.command("pytest", arguments)
    return provenance.collect(command, pytestconfig.option.device)


@pytest.fixture
def record(pytestconfig: pytest.Config) -> Any:
    """A function that appends a row to the results, and keeps it for the end."""
    options = pytestconfig.option
    full = rows.FULL if options.device == "cpu" else rows.CUDA
    path = options.results or (rows.QUICK if options.quick else full)

    def write(row: rows.Row) -> None:
        rows.append(row, path)
        pytestconfig.stash[SESSION].append(row)

    return write


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Print the tables of what was measured, as the report has them."""
    found = config.stash[SESSION]
    if found:
        terminalreporter.section("head: seconds by thread (x of bare products), MiB, errors")
        terminalreporter.write_line(tables.all_shapes(found))
    steps = step_rows.latest(config.stash[STEPS])
    if steps:
        terminalreporter.section("step: seconds by thread, MiB beyond the weights")
        terminalreporter.write_line(step_tables.details(steps))
