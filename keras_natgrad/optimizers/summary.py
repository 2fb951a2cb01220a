"""The registration table: what each layer got."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from keras_natgrad.curvature import BlockDiagonal
from keras_natgrad.solvers import Solver

_COLUMNS = ("Layer", "Block", "Shape", "Approximation", "Memory")


def table_rows(
    curvature: BlockDiagonal, variables: Sequence[Any]
) -> list[tuple[str, str, str, str, str]]:
    """Returns one row of text per block.

    Args:
        curvature: The blocks.
        variables: The optimizer's variables.
    """
    rows = []
    reasons = dict(
        zip(curvature.plan.fallback, curvature.plan.reasons, strict=True)
    )
    for entry in curvature.entries:
        shape = entry.block.shape
        if entry.layer is not None:
            name = f"{entry.layer.path} ({entry.layer.layer_class})"
            approximation = entry.block.describe()
        else:
            index = entry.variables[0]
            name = variables[index].path
            approximation = f"fallback: {reasons[index]}"
        memory = entry.block.memory * (
            8 if entry.block.dtype == "float64" else 4
        )
        rows.append(
            (
                name,
                entry.block.kind,
                " × ".join(map(str, shape.matrix)),
                approximation,
                _readable(memory),
            )
        )
    return rows


def render_table(
    curvature: BlockDiagonal,
    variables: Sequence[Any],
    losses: Sequence[tuple[str, str, str]] = (),
) -> str:
    """Returns the table as text, with heads and totals in the last lines.

    Args:
        curvature: The blocks.
        variables: The optimizer's variables.
        losses: Output, head and how its Fisher is found, per loss.
    """
    table = Table(title="Curvature blocks")
    for column in _COLUMNS:
        table.add_column(column, overflow="fold")
    for row in table_rows(curvature, variables):
        table.add_row(*row)
    covered = sum(entry.block.shape.size for entry in curvature.captured)
    memory = sum(
        entry.block.memory * (8 if entry.block.dtype == "float64" else 4)
        for entry in curvature.entries
    )
    stream = io.StringIO()
    console = Console(file=stream, width=100)
    console.print(table)
    _print_losses(console, losses)
    console.print(
        f"Parameters in captured layers: {covered:,} of {curvature.size:,} "
        f"({covered / curvature.size:.1%})"
    )
    console.print(f"Curvature memory: {_readable(memory)}")
    return stream.getvalue()


def render_solver(
    layers: BlockDiagonal,
    variables: Sequence[Any],
    solver: Solver | None,
    losses: Sequence[tuple[str, str, str]] = (),
) -> str:
    """Returns the layers of a whole-network optimizer as text.

    Args:
        layers: How the variables form matrices.
        variables: The optimizer's variables.
        solver: The solver, `None` where the first step will choose it.
        losses: Output, head and how its Fisher is found, per loss.
    """
    table = Table(title="Layers of the exact Fisher")
    for column in ("Layer", "Shape", "Columns of A"):
        table.add_column(column, overflow="fold")
    for entry in layers.entries:
        shape = entry.block.shape
        captured = entry.layer is not None
        name = variables[entry.variables[0]].path
        if entry.layer is not None:
            name = f"{entry.layer.path} ({entry.layer.layer_class})"
        table.add_row(
            name,
            " × ".join(map(str, shape.matrix)),
            "layer-wise contraction" if captured else "Jacobian of the tape",
        )
    stream = io.StringIO()
    console = Console(file=stream, width=100)
    console.print(table)
    _print_losses(console, losses)
    chosen = "chosen at the first step"
    if solver is not None:
        chosen = f"{solver.kind} ({solver.describe()})"
    console.print(f"Parameters: {layers.size:,}. Solver: {chosen}")
    return stream.getvalue()


def _print_losses(
    console: Console, losses: Sequence[tuple[str, str, str]]
) -> None:
    for output, head, fisher in losses:
        line = f"Fisher of {output}: {head}; {fisher}"
        console.print(line, markup=False, soft_wrap=True)


def _readable(size: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1024 or unit == "GB":
            return f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError
