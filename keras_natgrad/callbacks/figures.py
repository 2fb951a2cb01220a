"""The figure of `CurvatureMonitor`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# Plots with more lines have no legend; longer spectra are thinned out.
_MOST_NAMES = 12
_MOST_POINTS = 500
_CONDITION = "condition_number/"


def monitor_figure(
    history: Mapping[str, Sequence[float]], spectra: Mapping[str, np.ndarray]
) -> Any:
    """Returns the figure of a `CurvatureMonitor`.

    Args:
        history: Lists of equal length by name.
        spectra: The last eigenvalues of every layer, largest first.

    Returns:
        A `matplotlib.figure.Figure` with four axes.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "`plot` needs matplotlib: pip install 'keras_natgrad[plots]'."
        ) from error

    figure = Figure(figsize=(10, 7), layout="constrained")
    axes = figure.subplots(2, 2)
    _draw_damping(axes[0, 0], history)
    _draw_norms(axes[0, 1], history)
    _draw_conditions(axes[1, 0], history)
    _draw_spectra(axes[1, 1], spectra)
    for ax in (axes[0, 0], axes[0, 1], axes[1, 0]):
        ax.set_xlabel("step")
    return figure


def _draw_damping(ax: Any, history: Mapping[str, Sequence[float]]) -> None:
    ax.set_title("Damping and reduction ratio")
    lines = _line(ax, history, "damping", "damping", "C0")
    _log_scale(ax, history["damping"])
    if "reduction_ratio" in history:
        other = ax.twinx()
        lines += _line(
            other, history, "reduction_ratio", "reduction ratio", "C1"
        )
        # The bounds between which the damping stays.
        for bound in (0.25, 0.75):
            other.axhline(bound, color="C1", linewidth=0.5, linestyle=":")
        other.set_ylabel("reduction ratio")
    ax.set_ylabel("damping")
    ax.legend(handles=lines)


def _draw_norms(ax: Any, history: Mapping[str, Sequence[float]]) -> None:
    ax.set_title("Steps")
    lines = _line(ax, history, "update_norm", "update norm", "C0")
    lines += _line(ax, history, "step_size", "step size α", "C1")
    _log_scale(ax, [*history["update_norm"], *history["step_size"]])
    ax.legend(handles=lines)


def _draw_conditions(ax: Any, history: Mapping[str, Sequence[float]]) -> None:
    ax.set_title("Condition numbers of the damped blocks")
    names = [name for name in history if name.startswith(_CONDITION)]
    for name in names:
        _line(ax, history, name, name.removeprefix(_CONDITION), None)
    _log_scale(ax, [value for name in names for value in history[name]])
    if 0 < len(names) <= _MOST_NAMES:
        ax.legend()


def _draw_spectra(ax: Any, spectra: Mapping[str, np.ndarray]) -> None:
    ax.set_title("Last eigenvalues of the undamped blocks")
    for name, values in spectra.items():
        # Eigenvalues below this are rounding; even their sign is arbitrary.
        kept = values > np.finfo(np.float32).eps * values.max(initial=0)
        rank = 1 + np.arange(values.size)[kept]
        ax.plot(*thinned(rank, values[kept]), label=name)
    _log_scale(ax, [v for values in spectra.values() for v in values[:1]])
    ax.set_xscale("log")
    ax.set_xlabel("rank")
    if 0 < len(spectra) <= _MOST_NAMES:
        ax.legend()


def thinned(
    rank: np.ndarray, values: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns at most 500 points, evenly spread in log rank."""
    if rank.size <= _MOST_POINTS:
        return rank, values
    wanted = np.geomspace(1, rank.size, _MOST_POINTS).astype(int) - 1
    index = np.unique(wanted)
    return rank[index], values[index]


def _line(
    ax: Any,
    history: Mapping[str, Sequence[float]],
    name: str,
    label: str,
    color: str | None,
) -> list[Any]:
    marker = "." if len(history["step"]) < 100 else None
    return list(
        ax.plot(
            history["step"],
            history[name],
            label=label,
            color=color,
            marker=marker,
        )
    )


def _log_scale(ax: Any, values: Sequence[float]) -> None:
    """Makes the axis logarithmic if it has any value to show."""
    if any(value > 0 and np.isfinite(value) for value in values):
        ax.set_yscale("log")
