"""The Fisher information of a model, as linear operators."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import keras
import tensorflow as tf

from keras_natgrad._compat import flatten_layers
from keras_natgrad.capture import Plan, Taps, make_plan, match_layers
from keras_natgrad.capture.eligibility import check_batched, check_reached
from keras_natgrad.curvature import (
    FISHER_KINDS,
    BlockDiagonal,
    BlockOptions,
    CapturedPass,
)
from keras_natgrad.training.terms import mean_terms


def fisher(
    model: keras.Model,
    x: Any,
    head: Any,
    approximation: Any = "kronecker",
    kind: str = "exact",
    layer: str | None = None,
    combine: bool = False,
    weight_sharing: str = "expand",
    seed: int = 0,
) -> Any:
    """Returns the Fisher of a model's layers on a batch of inputs.

    The Fisher is that of the mean negative log-likelihood over the batch,
    `F = 1/N Σ J_iᵀ F_η,i J_i`; it does not depend on targets. The model is
    called once, in inference mode, and is not changed.

    Args:
        model: A built `keras.Model`.
        x: Inputs of one batch.
        head: The `keras_natgrad.heads.Head` that reads the outputs, or what
            `heads.get()` accepts, such as its name; a list or dictionary of
            them for a model with several outputs.
        approximation: Block name: `"kronecker"` (or `"kfac"`), `"ekfac"`,
            `"diagonal"`, `"full"`, or a registered one; or a dictionary of
            patterns and names, as the `block` of `KFAC`.
        kind: How the Fisher is estimated: `"exact"`, `"propagated"` or
            `"sampled"`.
        layer: Path of one layer (or its last part), to return only its
            operator; not together with `combine`.
        combine: Whether to return one block-diagonal operator of all layers,
            in the order of the dictionary, instead of a dictionary.
        weight_sharing: `"expand"` or `"reduce"`.
        seed: Seed of the random kinds.

    Returns:
        A `tf.linalg.LinearOperator` on the row-major flattened
        `[n (+1), m]` parameters, or a dictionary of them by layer path.
        A variable that no captured layer owns has a diagonal operator, under
        the variable's path. A further matrix of a layer is listed under its
        variable's path. If several layers have the same path, `"#2"` is
        appended to the second, and so on.

    Raises:
        ValueError: If a name is unknown, the head does not fit, or both
            `layer` and `combine` are given.

    Example:

    ```python
    operators = keras_natgrad.fisher(model, x, keras_natgrad.heads.Normal())
    operators["sequential/dense"].to_dense()
    ```
    """
    _check(model, kind, layer, combine)
    variables = model.trainable_variables
    plan = make_plan(model, variables)
    dtype = "float32"
    if any(variable.dtype == "float64" for variable in variables):
        dtype = "float64"
    options = BlockOptions(
        block=approximation,
        weight_sharing=weight_sharing,
        fallback="diagonal",
    )
    curvature = _curvature(plan, variables, options, dtype)
    matched = match_layers(plan, model, variables)
    captured = _capture(model, x, head, curvature, matched)
    # A second pass takes second moments in the bases found by the first.
    for repeat in (False, True):
        if repeat and not curvature.update_bases():
            break
        statistics = curvature.statistics(
            captured, kind, tf.constant([seed, 0], tf.int32)
        )
        curvature.accumulate(statistics, tf.constant(0.0, dtype))
    owners = [owner for owner, _ in matched]
    operators = _operators(curvature, variables, owners)
    if layer is not None:
        return _select(operators, layer)
    if combine:
        return tf.linalg.LinearOperatorBlockDiag(
            list(operators.values()), is_self_adjoint=True
        )
    return operators


def _check(
    model: keras.Model, kind: str, layer: str | None, combine: bool
) -> None:
    if kind not in FISHER_KINDS or kind == "empirical":
        raise ValueError(
            "`kind` must be 'exact', 'propagated' or 'sampled'; the "
            "empirical Fisher needs targets. "
            f"Received: kind={kind!r}"
        )
    if layer is not None and combine:
        raise ValueError(
            "`layer` returns the operator of one layer, `combine` that of all: "
            "leave one of them out. "
            f"Received: layer={layer!r}, combine={combine!r}"
        )
    if not model.built:
        raise ValueError(
            f"The model {model.name!r} has no weights yet. Call it once on "
            "data, or give it an Input, before asking for its Fisher."
        )


def _curvature(
    plan: Plan, variables: Sequence[Any], options: BlockOptions, dtype: str
) -> BlockDiagonal:
    """Returns the blocks of a plan, with their state."""

    def add_variable(name: str, shape: tuple[int, ...], init: str) -> Any:
        return keras.Variable(
            init, shape=shape, dtype=dtype, trainable=False, name=name
        )

    shapes = [tuple(variable.shape) for variable in variables]
    curvature = BlockDiagonal(plan, shapes, options, stacked=False)
    curvature.build([f"v{i}" for i in range(len(shapes))], add_variable)
    return curvature


def _capture(
    model: keras.Model,
    x: Any,
    head: Any,
    curvature: BlockDiagonal,
    matched: Sequence[tuple[keras.layers.Layer, int]],
) -> CapturedPass:
    """Calls the model once and records its layers."""
    with (
        Taps(flatten_layers(model)) as taps,
        tf.GradientTape(persistent=True) as tape,
    ):
        outputs = model(x, training=False)
    terms = mean_terms(outputs, head)
    records = [taps.record(layer, index) for layer, index in matched]
    check_reached(records)
    check_batched(records, terms[0].outputs.shape[0])
    values = [variable.value for variable in model.trainable_variables]
    return CapturedPass(tape, terms, records, curvature.entries, values)


def _operators(
    curvature: BlockDiagonal, variables: Sequence[Any], owners: Sequence[Any]
) -> dict[str, Any]:
    """Returns the operator of every block, by the path of its layer."""
    operators: dict[str, Any] = {}
    named = set()
    for entry, owner in zip_longest(curvature.entries, owners):
        name = variables[entry.variables[0]].path
        if entry.layer is not None and id(owner) not in named:
            name = entry.layer.path
            named.add(id(owner))
        operators[_unique(name, operators)] = entry.block.operator()
    return operators


def _unique(name: str, taken: dict[str, Any]) -> str:
    """Returns the name, with a number if it is already used.

    Layers inside a layer may share a path: Keras does not number layers that a
    user has named.
    """
    numbered, count = name, 1
    while numbered in taken:
        count += 1
        numbered = f"{name}#{count}"
    return numbered


def _select(operators: dict[str, Any], layer: str) -> Any:
    found = [
        path
        for path in operators
        if path == layer or path.endswith(f"/{layer}")
    ]
    if len(found) != 1:
        raise ValueError(
            "`layer` must name one layer. "
            f"Received: layer={layer!r}, expected one of {list(operators)}"
        )
    return operators[found[0]]
