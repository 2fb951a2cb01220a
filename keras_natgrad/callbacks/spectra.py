"""Eigenvalues of blocks, in the parts of `Block.spectra`, as numbers."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from keras_natgrad import _compat
from keras_natgrad.blocks import Block

Parts = Mapping[str, np.ndarray]


def block_names(optimizer: Any) -> list[tuple[str, Block]]:
    """Returns the blocks of an optimizer, each with the name of its layer.

    Args:
        optimizer: A built optimizer of the package. An optimizer that treats
            the whole network at once has no blocks.
    """
    curvature = getattr(optimizer, "curvature", None)
    if curvature is None:
        return []
    variables = _compat.optimizer_variables(optimizer)
    return [
        (
            variables[entry.variables[0]].path
            if entry.layer is None
            else entry.layer.path,
            entry.block,
        )
        for entry in curvature.in_plan_order
    ]


def to_arrays(parts: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns tensors as float64 arrays."""
    return {
        name: np.asarray(values, np.float64) for name, values in parts.items()
    }


def product_spectrum(parts: Parts) -> np.ndarray:
    """Returns all products of one entry of each part, largest first."""

    def outer(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        product = left[..., :, np.newaxis] * right[..., np.newaxis, :]
        return product.reshape(*left.shape[:-1], -1)

    values = functools.reduce(outer, parts.values())
    return np.sort(values, axis=None)[::-1]


def extremes(parts: Parts) -> tuple[float, float]:
    """Returns the smallest and the largest of the products.

    A negative eigenvalue of a positive semi-definite matrix is rounding and
    counts as zero.
    """
    smallest, largest = np.ones([]), np.ones([])
    for values in parts.values():
        values = np.maximum(values, 0)
        smallest = smallest * values.min(axis=-1)
        largest = largest * values.max(axis=-1)
    return float(smallest.min()), float(largest.max())


def condition_number(inverse: Mapping[str, Any] | None) -> float:
    """Returns the condition number of what `Block.precondition` applies.

    Args:
        inverse: `Block.inverse_spectra()`.

    Returns:
        A number of at least one; infinite if rounding made the matrix singular,
        NaN if the matrix is zero or unknown.
    """
    if inverse is None:
        return float("nan")
    smallest, largest = extremes(to_arrays(inverse))
    if not largest > 0:
        return float("nan")
    return largest / smallest if smallest > 0 else float("inf")
