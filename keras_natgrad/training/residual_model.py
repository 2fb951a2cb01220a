"""A model that `fit` trains on residuals at points."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_natgrad import _compat
from keras_natgrad.curvature.residual_root import ResidualGroup
from keras_natgrad.training.train_step import curvature_optimizer

Residual = Callable[[keras.Model, Any], tf.Tensor]


@keras.saving.register_keras_serializable(package="keras_natgrad")
class ResidualModel(keras.Model):
    r"""A network that `fit` trains on residuals instead of targets.

    The loss is `Σ_k ½ w_k mean(r_k²)` over residual functions, such as those of
    a differential equation and of its boundary values. `fit` takes the points:
    a `tf.data.Dataset` whose elements are tensors or tuples of tensors (their
    lengths may differ), or one tensor, which `fit` cuts into batches of
    `batch_size`.

    With `keras_natgrad.NaturalGradient` a step is one
    `optimizer.minimize_residuals`; any optimizer of Keras works as well.
    Calling the model calls the network. The trainable variables of the network
    are trained; an unknown coefficient of an equation is a weight of the
    network.

    Args:
        network: A built `keras.Model`.
        residuals: Function `(network, points)` that returns residuals of shape
            `[N]` or `[N, k]` at N points, row i from point i alone; it gets one
            element of the data unchanged. Or a tuple of functions, one per
            tensor of an element.
        weights: One non-negative w per function. Defaults to ones.
        **kwargs: Further arguments of `keras.Model`, such as `name`.

    Raises:
        ValueError: If the network is not built, `residuals` are not functions,
            or the weights do not match them.

    Example:

    ```python
    def equation(network, x):  # u' = u
        with tf.GradientTape() as tape:
            tape.watch(x)
            u = network(x)
        return tape.gradient(u, x) - u


    def start(network, x):  # u(0) = 1
        return network(x) - 1.0


    model = keras_natgrad.ResidualModel(network, (equation, start))
    model.compile(keras_natgrad.NaturalGradient(keras_natgrad.LineSearch()))
    points = (tf.random.uniform([100, 1]), tf.zeros([1, 1]))
    model.fit(tf.data.Dataset.from_tensors(points).repeat(50))
    ```
    """

    def __init__(
        self,
        network: keras.Model,
        residuals: Residual | Sequence[Residual],
        weights: Sequence[float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(network, keras.Model):
            raise ValueError(
                "`network` must be a keras.Model. "
                f"Received: network={network!r} of type "
                f"{type(network).__name__}"
            )
        if not network.built:
            raise ValueError(
                "`network` must be built: give it a keras.Input, or call it "
                f"once. Received: network={network!r}"
            )
        functions: tuple[Any, ...] = (
            tuple(residuals)
            if isinstance(residuals, (list, tuple))
            else (residuals,)
        )
        if not functions or not all(callable(each) for each in functions):
            raise ValueError(
                "`residuals` must be a function of the network and of points, "
                f"or a tuple of them. Received: residuals={residuals!r}"
            )
        # The network and its points keep their own dtype.
        kwargs.setdefault("autocast", False)
        super().__init__(**kwargs)
        self.network = network
        many = isinstance(residuals, (list, tuple))
        self.residuals: Any = functions if many else residuals
        self.residual_weights = _check_weights(weights, len(functions))
        self.built = True

    def call(self, inputs: Any) -> Any:
        """Returns what the network returns."""
        return self.network(inputs)

    # -- Steps -----------------------------------------------------------

    def train_step(self, data: Any) -> dict[str, Any]:
        """Trains on one element of the data.

        Args:
            data: Points, as `residuals` take them.

        Returns:
            The logs: `loss` before the step, and the optimizer's statistics if
            requested.

        Raises:
            ValueError: If the data do not match the residuals, or `compile` got
                a loss, metrics or an unsupported optimizer.
        """
        self._check_compiled()
        functions, points = self._pairs(data)
        variables = self.trainable_variables
        optimizer = self.optimizer
        logs: dict[str, Any] = {}
        if curvature_optimizer(optimizer) is not None:
            if not optimizer.built:
                self._build_optimizer()
            many = isinstance(self.residuals, tuple)
            loss = optimizer.minimize_residuals(
                tuple(functions) if many else functions[0],
                variables,
                tuple(points) if many else points[0],
                self.residual_weights,
            )
            logs = optimizer.step_logs()
        else:
            with tf.GradientTape() as tape:
                loss = self._loss(functions, points)
                scaled = optimizer.scale_loss(loss)
            gradients = tape.gradient(scaled, variables)
            optimizer.apply_gradients(zip(gradients, variables, strict=True))
        return {**self._track(loss, points), **logs}

    def test_step(self, data: Any) -> dict[str, Any]:
        """Returns the logs of one element of the data: `loss`."""
        self._check_compiled()
        functions, points = self._pairs(data)
        return self._track(self._loss(functions, points), points)

    def _build_optimizer(self) -> None:
        """Attaches the optimizer, whose state is then saved with the model."""
        self.optimizer.attach(self).build(self.trainable_variables)

    def _pairs(
        self, data: Any
    ) -> tuple[list[Callable[[Any], tf.Tensor]], list[Any]]:
        """Returns functions of points alone, and the points of each."""
        if isinstance(data, (list, tuple)):
            # `train_on_batch` passes `None` for missing arguments.
            data = tuple(part for part in data if part is not None)
            data = data[0] if len(data) == 1 else data
        if isinstance(self.residuals, tuple):
            functions = self.residuals
            points = list(data) if isinstance(data, tuple) else [data]
            if len(points) != len(functions):
                raise ValueError(
                    "The data must have one tensor of points per residual "
                    f"function. Received: {len(functions)} functions and "
                    f"{len(points)} tensors"
                )
        else:
            functions, points = (self.residuals,), [data]
        points = tf.nest.map_structure(tf.convert_to_tensor, points)
        network = self.network
        return [_bind(function, network) for function in functions], points

    def _loss(
        self,
        functions: Sequence[Callable[[Any], tf.Tensor]],
        points: Sequence[Any],
    ) -> tf.Tensor:
        weights = self.residual_weights or [1.0] * len(functions)
        groups = [
            ResidualGroup(tf.convert_to_tensor(function(own)), weight)
            for function, own, weight in zip(
                functions, points, weights, strict=True
            )
        ]
        return tf.add_n([group.loss() for group in groups])

    def _track(self, loss: tf.Tensor, points: Sequence[Any]) -> dict[str, Any]:
        count = tf.shape(tf.nest.flatten(points)[0])[0]
        _compat.update_loss_tracker(self, loss, count)
        return self.get_metrics_result()

    def _check_compiled(self) -> None:
        if self.loss is not None or "compile_metrics" in self.metrics_names:
            raise ValueError(
                "A ResidualModel is compiled without loss and metrics: its "
                "residuals are the loss. Received: "
                f"loss={self.loss!r}, metrics={self.metrics_names!r}"
            )
        if self.losses:
            raise ValueError(
                "A ResidualModel minimises residuals alone; write a "
                "regularizer as one more residual. Received: a network with "
                f"{len(self.losses)} added losses"
            )
        optimizer = self.optimizer
        if curvature_optimizer(optimizer) is None:
            return
        if not hasattr(optimizer, "minimize_residuals"):
            raise ValueError(
                "A ResidualModel is trained by keras_natgrad.NaturalGradient, "
                "not wrapped, or by an optimizer of Keras. Received: "
                f"optimizer={type(optimizer).__name__}"
            )

    # -- Saving ----------------------------------------------------------

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments.

        Raises:
            ValueError: If a residual function is not registered with Keras.
        """
        config = super().get_config()
        many = isinstance(self.residuals, tuple)
        functions = self.residuals if many else (self.residuals,)
        names = [_registered_name(function) for function in functions]
        return {
            **config,
            "network": keras.saving.serialize_keras_object(self.network),
            "residuals": names if many else names[0],
            "weights": self.residual_weights,
        }

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: Any = None
    ) -> ResidualModel:
        """Recreates the model from `get_config`.

        Args:
            config: What `get_config` returned.
            custom_objects: Classes and functions by registered name.

        Raises:
            ValueError: If a residual function is not registered with Keras.
        """
        config = dict(config)
        names = config.pop("residuals")
        many = isinstance(names, (list, tuple))
        functions = [
            _find_function(name, custom_objects)
            for name in (names if many else [names])
        ]
        network = keras.saving.deserialize_keras_object(
            config.pop("network"), custom_objects=custom_objects
        )
        residuals = tuple(functions) if many else functions[0]
        return cls(network, residuals, **config)


def _bind(
    function: Residual, network: keras.Model
) -> Callable[[Any], tf.Tensor]:
    """Returns the residual as a function of points alone."""
    return lambda points: function(network, points)


def _check_weights(
    weights: Sequence[float] | None, count: int
) -> list[float] | None:
    if weights is None:
        return None
    weights = [float(weight) for weight in weights]
    if len(weights) != count or not all(weight >= 0 for weight in weights):
        raise ValueError(
            "`weights` must be non-negative, one per residual function. "
            f"Received: weights={weights!r} for {count} functions"
        )
    return weights


def _registered_name(function: Any) -> str:
    name = keras.saving.get_registered_name(function)
    if keras.saving.get_registered_object(name) is not function:
        shown = getattr(function, "__name__", repr(function))
        raise ValueError(
            f"The residual function {shown!r} is not registered and cannot be "
            "saved; decorate it with "
            "@keras.saving.register_keras_serializable()."
        )
    return name


def _find_function(name: str, custom_objects: Any) -> Any:
    function = keras.saving.get_registered_object(name, custom_objects)
    if function is None:
        raise ValueError(
            "A residual function is not registered; import the module that "
            f"registers it first. Received: residuals={name!r}"
        )
    return function
