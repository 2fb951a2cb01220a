r"""Title: The natural chain rule, with requests sent back op by op.

Author: keras_natgrad authors
Description: Requested changes of the outputs of a small network are sent back
    to its weights op by op, and compared with the Moore-Penrose solution.
Accelerator: None

For an operation `y = f(x)` with the Jacobian `J = ∂y/∂x`, the ordinary chain
rule sends a gradient back, `g_x = Jᵀ g_y`. The *natural chain rule* sends back
a requested change `n_y` of the output, as the smallest change of the operands
that makes it to first order:

    n_x = Jᵀ (J Jᵀ)⁻¹ n_y,    J n_x = n_y.

If every operation of a network reproduces its request, then so does the
composition, `J_total δ = n_η`; with `n_η = F_η⁻¹ g_η` the outputs make a
natural-gradient step. It is *a* right inverse of `J_total`, not the
Moore–Penrose one: `δ ≠ F⁺ g` in general. Three things break it:

- An operation that cannot reach its request (a bottleneck, a slope of zero)
  makes the nearest change instead, and the composition is then not the best
  that the network could do.
- A tensor that is used twice gets two requests. They must be solved for
  jointly; a sum of the two, as of gradients, is wrong. For `y = (x, x)` the
  joint solution is the mean.
- Weights are used by every example of a batch, so a batch is one joint
  problem, which `dense` solves; the rules of single examples do not add up.

For training use `keras_natgrad.NaturalGradient`, which solves for all weights
at once and has none of these limits. docs/natural_gradient_theory.md says more.

References:
    - "Natural gradients with Moore–Penrose inverse of the Fisher information
      matrix", Cross Validated, question 580509.
    - Greville, 1966, "Note on the generalized inverse of a matrix product".
"""

from __future__ import annotations

import argparse
import math
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf


def right_inverse(
    jacobian: Any, increment: Any, damping: float = 0.0
) -> tf.Tensor:
    r"""Returns the change of the operands that makes a change of the output.

        n_x = Jᵀ (J Jᵀ + λI)⁻¹ n_y

    Without damping it is the Moore–Penrose solution `J⁺ n_y`, the limit of
    λ → 0: the smallest change that makes `n_y`, and if no change does, the
    one with the least squared error.

    Cost: `m n min(m, n)` for m outputs, n operands, by a singular value
    decomposition: `J Jᵀ` would lose directions whose singular value is below
    `√ε` of the largest, damped or not. Compiles under XLA; on CPUs XLA's
    decomposition is accurate to about 1e-7 only, also in float64.

    Args:
        jacobian: Tensor `[..., m, n]`, float32 or float64. Leading axes are
            independent operations, each with its own operands.
        increment: Tensor `[..., m]`, the requested change of the output.
        damping: λ, a non-negative number.

    Returns:
        Tensor `[..., n]`, the change of the operands.

    Raises:
        ValueError: If shapes, dtype or damping do not fit.

    Example:

    For y = (x, x), one operand with two requests gets their mean:

    >>> round(float(right_inverse([[1.0], [1.0]], [2.0, 4.0])[0]), 5)
    3.0
    """
    _check_damping(damping)
    jacobian = _floating("jacobian", jacobian)
    increment = _like("increment", increment, jacobian)
    if (
        jacobian.shape.rank is None
        or jacobian.shape.rank < 2
        or not jacobian.shape[:-1].is_compatible_with(increment.shape)
    ):
        raise ValueError(
            "`jacobian` must have the shape [..., m, n], and `increment` the "
            f"shape [..., m]. Received: jacobian.shape={jacobian.shape}, "
            f"increment.shape={increment.shape}"
        )
    values, u, v = tf.linalg.svd(jacobian)
    # σ / (σ² + λ) in units of the larger of σ_max and √λ, so that no square
    # overflows. As in `tf.linalg.pinv`, what is rounding counts as zero.
    root = tf.constant(math.sqrt(damping), values.dtype)
    largest = tf.reduce_max(values, axis=-1, keepdims=True)
    unit = tf.maximum(largest, root)
    scaled = tf.math.divide_no_nan(values, unit)
    bend = tf.square(scaled) + tf.square(tf.math.divide_no_nan(root, unit))
    sides = tf.cast(tf.reduce_max(tf.shape(jacobian)[-2:]), values.dtype)
    rounding = 10.0 * np.finfo(values.dtype.as_numpy_dtype).eps * sides
    tolerance = tf.square(rounding * tf.math.divide_no_nan(largest, unit))
    inside = tf.linalg.matvec(u, increment, transpose_a=True)
    change = _divide(scaled * inside, bend, tolerance)
    return tf.linalg.matvec(v, tf.math.divide_no_nan(change, unit))


def product(
    a: Any, b: Any, increment: Any, damping: float = 0.0
) -> tuple[tf.Tensor, tf.Tensor]:
    r"""Returns the changes of the factors of `c = a · b`, elementwise.

        n_a = b n_c / (a² + b² + λ),    n_b = a n_c / (a² + b² + λ)

    If both factors are zero, no change is possible and the result is zero.

    Args:
        a: Tensor, float32 or float64.
        b: Tensor of the same shape.
        increment: Tensor of the same shape, the requested change of c.
        damping: λ, a non-negative number.

    Returns:
        The pair `(n_a, n_b)`.

    Raises:
        ValueError: If shapes, dtype or damping do not fit. A factor that is
            broadcast is used more than once and needs a joint solution.

    Example:

    >>> a, b = product(3.0, 4.0, 25.0)
    >>> float(a), float(b)
    (4.0, 3.0)
    """
    _check_damping(damping)
    a = _floating("a", a)
    b, increment = _like("b", b, a), _like("increment", increment, a)
    _check_same_shape(a=a, b=b, increment=increment)
    n_b, n_a = _smallest_change((a, b), increment, damping)
    return n_a, n_b


def elementwise(
    derivative: Any, increment: Any, damping: float = 0.0
) -> tf.Tensor:
    r"""Returns the change of z that makes a change of `h = f(z)`.

        n_z = f′(z) n_h / (f′(z)² + λ)

    If the slope is zero (a ReLU that is off), no change is possible and the
    result is zero. Near a slope of zero it grows like 1/f′ unless damped.

    Args:
        derivative: Tensor f′(z), float32 or float64.
        increment: Tensor of the same shape, the requested change of h.
        damping: λ, a non-negative number.

    Returns:
        Tensor of the same shape.

    Raises:
        ValueError: If shapes, dtype or damping do not fit.

    Example:

    >>> elementwise([0.5, 0.0], [1.0, 1.0]).numpy().tolist()
    [2.0, 0.0]
    """
    _check_damping(damping)
    derivative = _floating("derivative", derivative)
    increment = _like("increment", increment, derivative)
    _check_same_shape(derivative=derivative, increment=increment)
    return _smallest_change((derivative,), increment, damping)[0]


def _smallest_change(
    slopes: tuple[tf.Tensor, ...], increment: tf.Tensor, damping: float
) -> list[tf.Tensor]:
    """Returns `s n / (Σ s² + λ)` for each of the slopes, elementwise.

    In units of the largest of |s| and √λ, so that no square overflows or
    vanishes.
    """
    divide = tf.math.divide_no_nan
    root = tf.constant(math.sqrt(damping), increment.dtype)
    unit = root
    for slope in slopes:
        unit = tf.maximum(unit, tf.abs(slope))
    scaled = [divide(slope, unit) for slope in slopes]
    bend = tf.square(divide(root, unit))
    for slope in scaled:
        bend += tf.square(slope)
    share = divide(divide(increment, unit), bend)
    return [slope * share for slope in scaled]


class DenseIncrement(NamedTuple):
    """Result of `dense`.

    Attributes:
        kernel: Tensor `[n, m]`, the change of W.
        bias: Tensor `[m]`, the change of b, or `None`.
        inputs: Tensor `[N, n]`, the requested change of H, or `None`.
    """

    kernel: tf.Tensor
    bias: tf.Tensor | None
    inputs: tf.Tensor | None


def dense(
    inputs: Any,
    kernel: Any,
    increment: Any,
    use_bias: bool = True,
    damping: float = 0.0,
) -> DenseIncrement:
    r"""Returns the changes of weights and inputs of `Z = H W + b`, jointly.

    All examples of the batch share the weights, so their requests are solved
    for together. With `H̄ = [H, 1]`, `W̄ = [W; b]` the smallest changes of both
    with `H̄ δW̄ + n_H W = n_Z` are

        δW̄ = H̄ᵀ S,    n_H = S Wᵀ,    (H̄ H̄ᵀ) S + S (Wᵀ W) + λ S = n_Z.

    The eigenvectors U of `H̄ H̄ᵀ` and V of `WᵀW`, with the eigenvalues α and β,
    solve this Sylvester equation:

        (Uᵀ S V)_ij = (Uᵀ n_Z V)_ij / (α_i + β_j + λ).

    They are the left singular vectors of H̄ and the right ones of W, whose
    squared singular values are α and β; directions outside of both change
    nothing and are left out. Without damping, sums that are zero to rounding
    are left out too, which gives the Moore–Penrose solution.

    Cost: two thin singular value decompositions, `N n min(N, n)` and
    `n m min(n, m)`, and `N m (N + m)` for the products; `N m` memory, where
    the joint Jacobian has `N m (N + m) n` elements. Compiles under XLA; on
    CPUs XLA's decomposition is accurate to about 1e-7 only, also in float64.

    Args:
        inputs: Tensor H, `[N, n]`, float32 or float64.
        kernel: Tensor W, `[n, m]`; `None` if the inputs are data and cannot
            change, as in a first layer. Then `(H̄ H̄ᵀ + λI) S = n_Z`.
        increment: Tensor `[N, m]`, the requested change of Z.
        use_bias: Whether the layer has a bias b.
        damping: λ, a non-negative number.

    Returns:
        A `DenseIncrement`.

    Raises:
        ValueError: If shapes, dtype or damping do not fit.
    """
    _check_damping(damping)
    inputs = _floating("inputs", inputs)
    increment = _like("increment", increment, inputs)
    if kernel is not None:
        kernel = _like("kernel", kernel, inputs)
    _check_dense(inputs, kernel, increment)
    extended = inputs
    if use_bias:
        extended = tf.concat([inputs, tf.ones_like(inputs[:, :1])], axis=1)
    solution = _sylvester(extended, kernel, increment, damping)
    weights = tf.matmul(extended, solution, transpose_a=True)
    back = None
    if kernel is not None:
        back = tf.matmul(solution, kernel, transpose_b=True)
    if not use_bias:
        return DenseIncrement(weights, None, back)
    return DenseIncrement(weights[:-1], weights[-1], back)


def _sylvester(
    left: tf.Tensor,
    right: tf.Tensor | None,
    target: tf.Tensor,
    damping: float,
) -> tf.Tensor:
    """Solves `(A Aᵀ) S + S (BᵀB) + λS = T`, up to what Aᵀ and Bᵀ map to 0."""
    values, u, _ = tf.linalg.svd(left)
    alpha = tf.square(values)[:, tf.newaxis]
    inside = tf.matmul(u, target, transpose_a=True)
    tolerance = _rounding(target) * tf.reduce_max(alpha)
    if right is None:
        return tf.matmul(u, _divide(inside, alpha + damping, tolerance))
    values, _, v = tf.linalg.svd(right)
    beta = tf.square(values)[tf.newaxis]
    tolerance += _rounding(target) * tf.reduce_max(beta)
    # T splits into the span of U and of V, of U only, and of V only.
    both = tf.matmul(inside, v)
    only_u = inside - tf.matmul(both, v, transpose_b=True)
    only_v = tf.matmul(target, v) - tf.matmul(u, both)
    both = _divide(both, alpha + beta + damping, tolerance)
    only_u = _divide(only_u, alpha + damping, tolerance)
    only_v = _divide(only_v, beta + damping, tolerance)
    only_u += tf.matmul(both, v, transpose_b=True)
    return tf.matmul(u, only_u) + tf.matmul(only_v, v, transpose_b=True)


def _divide(
    numerator: tf.Tensor, denominator: tf.Tensor, tolerance: tf.Tensor
) -> tf.Tensor:
    """Divides where the denominator is above the tolerance, else zero."""
    kept = denominator > tolerance
    return tf.where(kept, numerator / tf.where(kept, denominator, 1), 0)


def _rounding(target: tf.Tensor) -> tf.Tensor:
    """Returns the share of the largest eigenvalue that counts as zero."""
    size = tf.cast(tf.reduce_sum(tf.shape(target)), target.dtype)
    return np.finfo(target.dtype.as_numpy_dtype).eps * size


def _floating(name: str, value: Any) -> tf.Tensor:
    tensor = tf.convert_to_tensor(value)
    if tensor.dtype not in (tf.float32, tf.float64):
        raise ValueError(
            f"`{name}` must be float32 or float64. "
            f"Received: {name}.dtype={tensor.dtype.name!r}"
        )
    return tensor


def _like(name: str, value: Any, other: tf.Tensor) -> tf.Tensor:
    if not tf.is_tensor(value):
        value = getattr(value, "value", value)  # of a `keras.Variable`
    if not hasattr(value, "dtype"):
        return tf.convert_to_tensor(value, other.dtype)
    tensor = tf.convert_to_tensor(value)
    if tensor.dtype != other.dtype:
        raise ValueError(
            f"All arguments must have the dtype {other.dtype.name!r} of the "
            f"first. Received: {name}.dtype={tensor.dtype.name!r}"
        )
    return tensor


def _check_damping(damping: float) -> None:
    real = isinstance(damping, (int, float, np.number))
    if isinstance(damping, bool) or not real or not 0 <= damping < math.inf:
        raise ValueError(
            f"`damping` must be non-negative. Received: damping={damping!r}"
        )


def _check_same_shape(**tensors: tf.Tensor) -> None:
    first, *others = tensors.values()
    if not all(first.shape.is_compatible_with(each.shape) for each in others):
        shapes = ", ".join(f"{k}.shape={v.shape}" for k, v in tensors.items())
        raise ValueError(
            "The arguments must have one shape; an operand that is broadcast "
            "is used more than once and needs a joint solution. "
            f"Received: {shapes}"
        )


def _check_dense(
    inputs: tf.Tensor, kernel: tf.Tensor | None, increment: tf.Tensor
) -> None:
    matrices = [inputs, increment] + ([] if kernel is None else [kernel])
    fits = all(matrix.shape.rank == 2 for matrix in matrices)
    if fits:
        fits = inputs.shape[:1].is_compatible_with(increment.shape[:1])
    if fits and kernel is not None:
        outer = [inputs.shape[1], increment.shape[1]]
        fits = kernel.shape.is_compatible_with(outer)
    if not fits:
        raise ValueError(
            "`inputs` must have the shape [N, n], `kernel` [n, m] and "
            f"`increment` [N, m]. Received: inputs.shape={inputs.shape}, "
            f"kernel.shape={None if kernel is None else kernel.shape}, "
            f"increment.shape={increment.shape}"
        )


def backward(
    kernels: list[tf.Tensor], inputs: tf.Tensor, request: tf.Tensor
) -> list[tf.Tensor]:
    """Returns the changes of the kernels of a tanh network, op by op.

    Args:
        kernels: One matrix per layer; the last layer is linear.
        inputs: Tensor `[N, n]`.
        request: Tensor `[N, m]`, the requested change of the outputs.
    """
    hidden = [inputs]
    for kernel in kernels[:-1]:
        hidden.append(tf.tanh(hidden[-1] @ kernel))
    changes = []
    for index in reversed(range(len(kernels))):
        kernel = kernels[index] if index else None
        change = dense(hidden[index], kernel, request, use_bias=False)
        changes.append(change.kernel)
        if index:
            request = elementwise(1 - hidden[index] ** 2, change.inputs)
    return changes[::-1]


def network_jacobian(kernels: list[tf.Tensor], inputs: tf.Tensor) -> tf.Tensor:
    """Returns the derivative of all outputs in all weights, `[N m, P]`."""
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(kernels)
        outputs = inputs
        for kernel in kernels[:-1]:
            outputs = tf.tanh(outputs @ kernel)
        outputs = tf.reshape(outputs @ kernels[-1], [-1])
    parts = tape.jacobian(outputs, kernels)
    return tf.concat([tf.reshape(p, [len(outputs), -1]) for p in parts], 1)


def main(examples: int, seed: int) -> tuple[float, float, float]:
    """Prints the error of the change made, and the lengths of both steps."""
    rng = np.random.default_rng(seed)
    kernels = [
        tf.constant(rng.normal(size=pair) / np.sqrt(pair[0]))
        for pair in ((6, 5), (5, 3))
    ]
    inputs = tf.constant(rng.normal(size=(examples, 6)))
    request = tf.constant(rng.normal(size=(examples, 3)))
    changes = backward(kernels, inputs, request)
    step = tf.concat([tf.reshape(part, [-1]) for part in changes], 0)
    jacobian = network_jacobian(kernels, inputs)
    asked = tf.reshape(request, [-1])
    error = tf.norm(tf.linalg.matvec(jacobian, step) - asked)
    shortest = tf.norm(right_inverse(jacobian, asked))
    print(f"Error of the change made: {error:.1e}")
    print(f"Length, op by op: {tf.norm(step):.4f}")
    print(f"Length of the shortest step: {shortest:.4f}")
    return float(error), float(tf.norm(step)), float(shortest)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))
