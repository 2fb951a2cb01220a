"""The Fisher information of a model, as linear operators."""

from __future__ import annotations

from itertools import zip_longest
from typing import Any

import keras
import tensorflow as tf

from keras_natgrad._compat import flatten_layers
from keras_natgrad.capture import Taps, make_plan, match_layers
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
    variables = model.trainable_variables
    plan = make_plan(model, variables)
    curvature = BlockDiagonal(
        plan,
        [tuple(variable.shape) for variable in variables],
        BlockOptions(
            block=approximation,
            weight_sharing=weight_sharing,
            fallback="diagonal",
        ),
    )
    wide = any(variable.dtype == "float64" for variable in variables)
    dtype = "float64" if wide else "float32"

    def add_variable(name: str, shape: tuple[int, ...], init: str) -> Any:
        return keras.Variable(
            init, shape=shape, dtype=dtype, trainable=False, name=name
        )

    curvature.build([f"v{i}" for i in range(len(variables))], add_variable)
    with (
        Taps(flatten_layers(model)) as taps,
        tf.GradientTape(persistent=True) as tape,
    ):
        outputs = model(x, training=False)
    terms = mean_terms(outputs, head)
    matched = match_layers(plan, model, variables)
    records = [taps.record(layer_of, index) for layer_of, index in matched]
    check_reached(records)
    check_batched(records, terms[0].outputs.shape[0])
    captured = CapturedPass(
        tape,
        terms,
        records,
        curvature.entries,
        [variable.value for variable in variables],
    )

    def accumulate() -> None:
        statistics = curvature.statistics(
            captured, kind, tf.constant([seed, 0], tf.int32)
        )
        curvature.accumulate(statistics, tf.constant(0.0, dtype))

    accumulate()
    if curvature.update_bases():
        # Second moments in the bases found by the first pass.
        accumulate()
    operators: dict[str, Any] = {}
    named = set()
    owners = [id(layer_of) for layer_of, _ in matched]
    for entry, owner in zip_longest(curvature.entries, owners):
        name = variables[entry.variables[0]].path
        if entry.layer is not None and owner not in named:
            name = entry.layer.path
            named.add(owner)
        operators[_unique(name, operators)] = entry.block.operator()
    if layer is not None:
        return _select(operators, layer)
    if combine:
        return tf.linalg.LinearOperatorBlockDiag(
            list(operators.values()), is_self_adjoint=True
        )
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
