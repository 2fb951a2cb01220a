"""A head from any function that makes a TensorFlow Probability distribution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_natgrad.checks import check_integer
from keras_natgrad.heads import tensors
from keras_natgrad.heads.base import Head
from keras_natgrad.heads.probe import Inspection, finite_support, inspect

#: The ways to find a Fisher matrix, in the order in which they are tried.
METHODS = ("summation", "kl_divergence", "monte_carlo")


@keras.saving.register_keras_serializable(package="keras_natgrad")
class Distribution(Head):
    """Any distribution of TensorFlow Probability; finds its own Fisher.

    It uses the first of these methods that works:

    1. `"summation"`: if the support is finite (Bernoulli, Categorical,
       OneHotCategorical, FiniteDiscrete, OrderedLogistic, Binomial with a
       known count), `F = Σ_y p(y) ∇log p(y) ∇log p(y)ᵀ`, exact.
    2. `"kl_divergence"`: if TFP has the divergence between two such
       distributions, its Hessian where they are equal, exact. Costs `K`
       double backward passes and an eigendecomposition `K³` per example. Not
       for Laplace distributions, whose divergence has no automatic Hessian,
       nor for bijectors with parameters from the outputs.
    3. `"monte_carlo"`: the average over `samples` draws of the outer products
       of their scores, unbiased.

    The draws of the last method depend only on the outputs, so both products
    with L use the same draws.

    Args:
        make: Function from outputs `[..., K]` to a distribution over one
            tensor, of batch shape `[...]`. It may use constants and variables
            from outside. To save models with this head, register it with
            `keras.saving.register_keras_serializable`.
        parameter_count: K, or `None` for any.
        method: One of the three, or `"auto"` for the first that works.
        samples: Draws of `"monte_carlo"`. Defaults to `16`.

    Raises:
        ValueError: If an argument is out of range, or `method` is impossible
            for the distribution.

    Example:

    ```python
    @keras.saving.register_keras_serializable()
    def ordered(outputs):
        cutpoints = tf.constant([-1.0, 0.0, 1.0], outputs.dtype)
        return tfp.distributions.OrderedLogistic(cutpoints, outputs[..., 0])


    head = keras_natgrad.heads.Distribution(ordered, parameter_count=1)
    ```
    """

    def __init__(
        self,
        make: Callable[[tf.Tensor], Any] | str,
        parameter_count: int | None = None,
        method: str = "auto",
        samples: int = 16,
    ) -> None:
        if isinstance(make, (str, dict)):
            make = _find_function(make)
        if not callable(make):
            raise ValueError(
                "`make` must be a function from outputs to a distribution. "
                f"Received: make={make!r}"
            )
        if method not in ("auto", *METHODS):
            raise ValueError(
                f"`method` must be 'auto' or one of {METHODS}. "
                f"Received: method={method!r}"
            )
        if parameter_count is not None:
            parameter_count = check_integer("parameter_count", parameter_count)
        self.make = make
        self.parameter_count = parameter_count
        self.method = method
        self.samples = check_integer("samples", samples)
        self._inspected: dict[int, Inspection] = {}

    # -- Distribution ----------------------------------------------------

    def distribution(self, outputs: tf.Tensor) -> Any:
        """Calls `make`."""
        return self.make(tensors.as_parameters(outputs))

    def log_prob(self, outputs: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
        """Computes the log-probability; see `Head.log_prob()`."""
        distribution = self.distribution(outputs)
        targets = tf.cast(tf.convert_to_tensor(targets), distribution.dtype)
        return distribution.log_prob(targets)

    # -- Fisher ----------------------------------------------------------

    def fisher_method(self, parameter_count: int) -> str:
        """Returns how the Fisher matrix is found, one of `METHODS`.

        Args:
            parameter_count: K.

        Raises:
            ValueError: If the chosen method is impossible.
        """
        made = self._inspect(parameter_count)
        if self.method == "auto":
            return made.methods[0]
        if self.method not in made.methods:
            raise ValueError(
                f"The distribution {made.name} allows the methods "
                f"{list(made.methods)}. Received: method={self.method!r}"
            )
        return self.method

    def describe_fisher(self, parameter_count: int | None = None) -> str:
        """Says which method finds the Fisher; see `Head.describe_fisher()`."""
        count = parameter_count or self.parameter_count
        method = self.method if count is None else self.fisher_method(count)
        return {
            "auto": "method chosen when the outputs are known",
            "summation": "exact, summation over the support",
            "kl_divergence": "exact, Hessian of kl_divergence",
            "monte_carlo": f"monte_carlo, {self.samples} samples",
        }[method]

    def factor_rank(self, parameter_count: int) -> int:
        """Returns the number of columns of L: support points, K or draws."""
        method = self.fisher_method(parameter_count)
        if method == "monte_carlo":
            return self.samples
        if method == "kl_divergence":
            return parameter_count
        size = self._inspect(parameter_count).support_size
        assert size is not None
        return size

    def fisher_factor_product(
        self, outputs: tf.Tensor, vector: tf.Tensor
    ) -> tf.Tensor:
        """Multiplies by L: one backward pass, or a dense product."""
        outputs = tensors.as_parameters(outputs)
        vector = tensors.cast_like(vector, outputs)
        if self._method_of(outputs) == "kl_divergence":
            return tf.linalg.matvec(self._root(outputs), vector)
        points, roots = self._points(outputs)
        shape = _leading(outputs, vector)
        with tf.GradientTape() as tape:
            wide = tf.broadcast_to(
                outputs, tf.concat([shape, outputs.shape[-1:]], 0)
            )
            tape.watch(wide)
            total = self._log_probs(wide, points) * roots * vector
        return tape.gradient(total, wide, unconnected_gradients="zero")

    def fisher_factor_transpose_product(
        self, outputs: tf.Tensor, vector: tf.Tensor
    ) -> tf.Tensor:
        """Multiplies by Lᵀ: a tangent by two backward passes, or densely."""
        outputs = tensors.as_parameters(outputs)
        vector = tensors.cast_like(vector, outputs)
        if self._method_of(outputs) == "kl_divergence":
            return tf.linalg.matvec(
                self._root(outputs), vector, transpose_a=True
            )
        points, roots = self._points(outputs)
        shape = _leading(outputs, vector)
        wide = tf.broadcast_to(
            outputs, tf.concat([shape, outputs.shape[-1:]], 0)
        )
        with tf.GradientTape() as outer:
            with tf.GradientTape() as inner:
                inner.watch(wide)
                values = self._log_probs(wide, points)
                probes = tf.zeros_like(values)
                outer.watch(probes)
                weighted = values * probes
            gradient = inner.gradient(
                weighted, wide, unconnected_gradients="zero"
            )
            along = gradient * vector
        tangents = outer.gradient(along, probes, unconnected_gradients="zero")
        return roots * tangents

    def fisher(self, outputs: tf.Tensor) -> tf.Tensor:
        """Builds the dense Fisher matrix, `[..., K, K]`."""
        outputs = tensors.as_parameters(outputs)
        if self._method_of(outputs) == "kl_divergence":
            return self._hessian(outputs)
        return super().fisher(outputs)

    def _inspect(self, parameter_count: int) -> Inspection:
        """Returns what is known beforehand; inspects once per size."""
        if parameter_count not in self._inspected:
            found = inspect(self.make, parameter_count)
            self._inspected[parameter_count] = found
        return self._inspected[parameter_count]

    def _method_of(self, outputs: tf.Tensor) -> str:
        return self.fisher_method(int(outputs.shape[-1]))

    def _hessian(self, outputs: tf.Tensor) -> tf.Tensor:
        """Returns the Hessian of `KL(p ‖ p(η))` in η at equality."""
        size = int(outputs.shape[-1])
        fixed = self.make(tf.stop_gradient(outputs))
        with tf.GradientTape(persistent=True) as outer:
            outer.watch(outputs)
            with tf.GradientTape() as inner:
                inner.watch(outputs)
                divergence = fixed.kl_divergence(self.make(outputs))
            gradient = inner.gradient(
                divergence, outputs, unconnected_gradients="zero"
            )
            columns = [gradient[..., i] for i in range(size)]
        rows = [
            outer.gradient(column, outputs, unconnected_gradients="zero")
            for column in columns
        ]
        hessian = tf.stack(rows, axis=-2)
        return 0.5 * (hessian + tf.linalg.matrix_transpose(hessian))

    def _root(self, outputs: tf.Tensor) -> tf.Tensor:
        """Returns a root of the Fisher matrix, `[..., K, K]`."""
        values, vectors = tf.linalg.eigh(self._hessian(outputs))
        roots = tf.sqrt(tf.maximum(values, tf.zeros_like(values)))
        return vectors * roots[..., tf.newaxis, :]

    def _points(self, outputs: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns points and the roots of their weights `[..., R]`."""
        distribution = self.make(tf.stop_gradient(outputs))
        if self._method_of(outputs) == "summation":
            points = finite_support(distribution)
            assert points is not None
            log_probs = self._log_probs(tf.stop_gradient(outputs), points)
            return points, tf.exp(0.5 * log_probs)
        bits = tf.bitcast(tf.cast(outputs, tf.float32), tf.int32)
        seed = tf.stack([tf.reduce_sum(bits), tf.constant(0, tf.int32)])
        draws = distribution.sample(self.samples, seed=seed)
        count = tf.constant(self.samples, outputs.dtype)
        return tf.stop_gradient(draws), tf.math.rsqrt(count)

    def _log_probs(self, outputs: tf.Tensor, points: tf.Tensor) -> tf.Tensor:
        """Returns the log-probabilities of the points, `[..., R]`."""
        distribution = self.make(outputs)
        event = distribution.event_shape.rank or 0
        batch = outputs.shape.rank - 1
        missing = batch + event + 1 - points.shape.rank
        shape = tf.concat(
            [
                tf.shape(points)[:1],
                tf.ones([missing], tf.int32),
                tf.shape(points)[1:],
            ],
            axis=0,
        )
        points = tf.reshape(points, shape)
        values = distribution.log_prob(points)
        return tf.transpose(values, [*range(1, batch + 1), 0])

    # -- Checks ----------------------------------------------------------

    def validate(self, outputs_shape: Sequence[int | None]) -> None:
        """Checks the number of outputs, and what `make` returns for them."""
        super().validate(outputs_shape)
        size = tuple(outputs_shape)[-1]
        expected = self.parameter_count
        if expected is not None and size is not None and size != expected:
            raise ValueError(
                f"The head {self!r} takes {expected} outputs. Give the last "
                f"layer of the model {expected} units. Received: "
                f"outputs_shape={tuple(outputs_shape)}"
            )
        if size is not None:
            self._inspect(int(size))

    # -- Saving ----------------------------------------------------------

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor.

        Raises:
            ValueError: If `make` is not registered with Keras.
        """
        try:
            name = keras.saving.get_registered_name(self.make)
        except AttributeError:  # A `functools.partial` has no name.
            name = None
        if keras.saving.get_registered_object(name) is not self.make:
            raise ValueError(
                f"This head is made by {self._name()!r}, which is not "
                "registered and cannot be saved; decorate the function with "
                "@keras.saving.register_keras_serializable()."
            )
        return {
            "make": name,
            "parameter_count": self.parameter_count,
            "method": self.method,
            "samples": self.samples,
        }

    def _name(self) -> str:
        return getattr(self.make, "__name__", repr(self.make))

    def __repr__(self) -> str:
        return f"Distribution({self._name()})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Distribution) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[Any, ...]:
        return (self.make, self.parameter_count, self.method, self.samples)


def _find_function(identifier: Any) -> Any:
    function = keras.saving.get_registered_object(identifier)
    if function is None:
        raise ValueError(
            "The function that makes the head's distribution is not "
            "registered; import the module that registers it first. "
            f"Received: make={identifier!r}"
        )
    return function


def _leading(outputs: tf.Tensor, vector: tf.Tensor) -> tf.Tensor:
    return tf.broadcast_dynamic_shape(
        tf.shape(outputs)[:-1], tf.shape(vector)[:-1]
    )
