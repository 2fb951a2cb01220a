"""The registration table: what each layer got."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from keras_natgrad import _compat
from keras_natgrad.blocks import Block
from keras_natgrad.capture.positions import known_positions
from keras_natgrad.curvature import (
    BlockCurvature,
    BlockDiagonal,
    WholeNetwork,
)
from keras_natgrad.solvers import Solver

_COLUMNS = (
    "Layer",
    "Block",
    "Shape",
    "Positions",
    "Approximation",
    "Memory",
)
_WIDTH = 120
# Blocks that leave the gradient's direction as it is.
_FIRST_ORDER = ("first_order", "identity")


def render(optimizer: Any) -> str:
    """Returns the summary of a built optimizer as text.

    Args:
        optimizer: A `CurvatureOptimizer` that is attached to a model.
    """
    direction, plan = optimizer.engine.direction, optimizer.attachment.plan
    variables = _compat.optimizer_variables(optimizer)
    own, losses = optimizer.model_variables(variables), optimizer.loss_rows()
    if isinstance(direction, BlockCurvature):
        positions = known_positions(plan, optimizer.attached_model(), own)
        return render_table(direction.blocks, variables, losses, positions)
    assert isinstance(direction, WholeNetwork)
    return render_solver(direction.layers, variables, direction.solver, losses)


def table_rows(
    curvature: BlockDiagonal,
    variables: Sequence[Any],
    positions: Sequence[int | None] = (),
) -> list[tuple[str, ...]]:
    """Returns one row of text per block.

    Args:
        curvature: The blocks.
        variables: The optimizer's variables.
        positions: Per captured layer, how often a call applies its matrix,
            as far as that is known.
    """
    rows: list[tuple[str, ...]] = []
    reasons = dict(
        zip(curvature.plan.fallback, curvature.plan.reasons, strict=True)
    )
    known = dict(enumerate(positions))
    for entry in curvature.in_plan_order:
        shared = None if entry.layer is None else known.get(entry.position)
        approximation = entry.block.describe()
        if entry.layer is not None:
            name = f"{entry.layer.path} ({entry.layer.layer_class})"
        else:
            index = entry.variables[0]
            name = variables[index].path
            approximation += f"; fallback: {reasons[index]}"
        rows.append(
            (
                name,
                entry.block.kind,
                " × ".join(map(str, entry.block.shape.matrix)),
                "" if shared is None else str(shared),
                approximation,
                _readable(_bytes(entry.block)),
            )
        )
    return rows


def render_table(
    curvature: BlockDiagonal,
    variables: Sequence[Any],
    losses: Sequence[tuple[str, str, str]] = (),
    positions: Sequence[int | None] = (),
) -> str:
    """Returns the table as text, with heads and totals in the last lines.

    Args:
        curvature: The blocks.
        variables: The optimizer's variables.
        losses: Output, head and how its Fisher is found, per loss.
        positions: See `table_rows`.
    """
    table = Table(title="Curvature blocks")
    for column in _COLUMNS:
        table.add_column(column, overflow="fold")
    for row in table_rows(curvature, variables, positions):
        table.add_row(*map(Text, row))
    stream = io.StringIO()
    console = Console(file=stream, width=_WIDTH)
    console.print(table)
    _print_losses(console, losses)
    memory = sum(_bytes(entry.block) for entry in curvature.entries)
    console.print(f"Curvature memory: {_readable(memory)}")
    console.print(coverage(curvature), soft_wrap=True)
    return stream.getvalue()


def coverage(curvature: BlockDiagonal) -> str:
    """Returns what share of the parameters is preconditioned, and how."""
    captured = fallback = 0
    for entry in curvature.entries:
        if entry.block.kind in _FIRST_ORDER:
            continue
        if entry.layer is None:
            fallback += entry.block.shape.size
        else:
            captured += entry.block.shape.size
    total = curvature.size
    first_order = total - captured - fallback
    return (
        f"Parameters preconditioned: {captured + fallback:,} of {total:,} "
        f"({(captured + fallback) / total:.1%}): captured "
        f"{captured / total:.1%}, fallback with curvature "
        f"{fallback / total:.1%}; first order {first_order / total:.1%}"
    )


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
    for entry in layers.in_plan_order:
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
    console = Console(file=stream, width=_WIDTH)
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


def _bytes(block: Block) -> int:
    return block.memory * (8 if block.dtype == "float64" else 4)


def _readable(size: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1024 or unit == "GB":
            return f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError
