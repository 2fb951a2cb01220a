"""The contract of an output distribution and of its Fisher matrix."""

import abc
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from keras_natgrad.heads import tensors
from keras_natgrad.linalg import pseudo_inverse_solve


class Head(abc.ABC):
    """An output distribution `p(y | outputs)` and its Fisher matrix.

    The last axis of `outputs` holds the `K` parameters of one distribution;
    all leading axes are independent examples and positions. The Fisher matrix
    of one example, with respect to its `K` parameters, is

    ```
    F = E[s sᵀ],  s = ∂ log p(y | outputs) / ∂ outputs,  y ~ p(y | outputs).
    ```

    The primitive of a head is a factor `L` with `F = L Lᵀ`, given by its two
    products. Everything else follows from them; subclasses override methods
    that have a closed form. No method needs the observed targets to build `F`.

    All methods except `validate()` and `validate_targets()` are traceable by
    `tf.function`, compile under XLA and accept a dynamic batch size. Results
    have the dtype of `outputs`, or float32 if that is a half precision. The
    leading axes of a vector may broadcast against those of `outputs`, e.g.
    `outputs[..., None, :]` with one vector per row of a matrix.

    To be implemented by subclasses:

    * `distribution()`: the distribution as a TensorFlow Probability object.
    * `fisher_factor_product()` and `fisher_factor_transpose_product()`.
    * `factor_rank()`, unless `L` is square.
    * `get_config()`, if the constructor has arguments.

    Example:

    ```python
    @keras.saving.register_keras_serializable(package="my_package")
    class Exponential(keras_natgrad.heads.Head):
        \"\"\"Exponential with rate `exp(outputs)`: F = I.\"\"\"

        def distribution(self, outputs):
            base = tfp.distributions.Exponential(tf.exp(outputs))
            return tfp.distributions.Independent(base, 1)

        def fisher_factor_product(self, outputs, vector):
            return vector

        def fisher_factor_transpose_product(self, outputs, vector):
            return vector
    ```

    References:

    - [Martens, 2020](https://jmlr.org/papers/v21/17-678.html)
    """

    @abc.abstractmethod
    def distribution(self, outputs: tf.Tensor) -> Any:
        """Builds the distribution of the targets.

        Args:
            outputs: Tensor of shape `[..., K]`.

        Returns:
            A `tfp.distributions.Distribution` of batch shape
            `outputs.shape[:-1]`.
        """

    @abc.abstractmethod
    def fisher_factor_product(
        self, outputs: tf.Tensor, vector: tf.Tensor
    ) -> tf.Tensor:
        """Multiplies vectors by the factor `L` of the Fisher matrix.

        Args:
            outputs: Tensor of shape `[..., K]`.
            vector: Tensor of shape `[..., R]`, `R = factor_rank(K)`.

        Returns:
            The products `L v`, of shape `[..., K]`.
        """

    @abc.abstractmethod
    def fisher_factor_transpose_product(
        self, outputs: tf.Tensor, vector: tf.Tensor
    ) -> tf.Tensor:
        """Multiplies vectors by the transposed factor `Lᵀ`.

        Args:
            outputs: Tensor of shape `[..., K]`.
            vector: Tensor of shape `[..., K]`.

        Returns:
            The products `Lᵀ v`, of shape `[..., R]`.
        """

    def factor_rank(self, parameter_count: int) -> int:
        """Returns `R`, the number of columns of the factor `L`.

        Args:
            parameter_count: Integer, the size `K` of the last axis of the
                outputs.

        Returns:
            The number of columns; `K` for a square factor.
        """
        return parameter_count

    def log_prob(self, outputs: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
        """Computes the log-probability of targets, summed over the event.

        Args:
            outputs: Tensor of shape `[..., K]`.
            targets: Tensor of targets, in the shape that the head models.

        Returns:
            Tensor of shape `outputs.shape[:-1]`.
        """
        outputs = tensors.as_parameters(outputs)
        return self.distribution(outputs).log_prob(targets)

    def sample(self, outputs: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        """Draws one target per example, determined by the seed.

        Draws differ between devices, and under XLA.

        Args:
            outputs: Tensor of shape `[..., K]`.
            seed: Integer tensor of shape `[2]`.

        Returns:
            Targets that `log_prob()` and `score()` accept.
        """
        outputs = tensors.as_parameters(outputs)
        seed = tf.cast(seed, tf.int32)
        draws = self.distribution(outputs).sample(seed=seed)
        return tf.nest.map_structure(_forget, draws)

    def mean(self, outputs: tf.Tensor) -> tf.Tensor:
        """Returns the mean of the targets, e.g. of `model.predict(x)`.

        Args:
            outputs: Tensor or array of shape `[..., K]`.

        Returns:
            Tensor shaped like the targets.

        Raises:
            NotImplementedError: If TensorFlow Probability has no closed form.
        """
        return self._predict("mean", outputs)

    def stddev(self, outputs: tf.Tensor) -> tf.Tensor:
        """Returns the standard deviation of the targets.

        Args:
            outputs: Tensor or array of shape `[..., K]`.

        Returns:
            Tensor shaped like the targets.

        Raises:
            NotImplementedError: As `mean()`.
        """
        return self._predict("stddev", outputs)

    def _predict(self, name: str, outputs: tf.Tensor) -> tf.Tensor:
        distribution = self.distribution(tensors.as_parameters(outputs))
        try:
            return getattr(distribution, name)()
        except NotImplementedError as error:
            raise NotImplementedError(
                f"TensorFlow Probability has no {name} for the head {self!r}. "
                "Estimate it from draws of head.sample()."
            ) from error

    def score(self, outputs: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
        """Computes the score, the gradient of `log_prob()` in the outputs.

        Args:
            outputs: Tensor of shape `[..., K]`.
            targets: Tensor of targets, as in `log_prob()`.

        Returns:
            Tensor of shape `[..., K]`.
        """
        outputs = tensors.as_parameters(outputs)
        targets = tf.nest.map_structure(_forget, targets)
        with tf.GradientTape() as tape:
            tape.watch(outputs)
            log_prob = self.log_prob(outputs, targets)
        return tape.gradient(
            log_prob,
            outputs,
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )

    def fisher_vector_product(
        self, outputs: tf.Tensor, vector: tf.Tensor
    ) -> tf.Tensor:
        """Multiplies vectors by the Fisher matrix, `F v = L (Lᵀ v)`.

        Args:
            outputs: Tensor of shape `[..., K]`.
            vector: Tensor of shape `[..., K]`.

        Returns:
            Tensor of shape `[..., K]`.
        """
        return self.fisher_factor_product(
            outputs, self.fisher_factor_transpose_product(outputs, vector)
        )

    def fisher(self, outputs: tf.Tensor) -> tf.Tensor:
        """Builds the dense Fisher matrix, in `O(K²)` memory per example.

        Args:
            outputs: Tensor of shape `[..., K]`.

        Returns:
            Tensor of shape `[..., K, K]`.
        """
        outputs = tensors.as_parameters(outputs)
        shape = tf.shape(outputs)
        basis = tf.eye(shape[-1], batch_shape=shape[:-1], dtype=outputs.dtype)
        return self.fisher_vector_product(outputs[..., tf.newaxis, :], basis)

    def natural_gradient(
        self, outputs: tf.Tensor, gradient: tf.Tensor
    ) -> tf.Tensor:
        """Multiplies gradients by the pseudo-inverse of the Fisher matrix.

        Directions that do not change the distribution are mapped to zero.

        Args:
            outputs: Tensor of shape `[..., K]`.
            gradient: Tensor of shape `[..., K]`.

        Returns:
            The natural gradients `F⁺ g`, of shape `[..., K]`.
        """
        outputs = tensors.as_parameters(outputs)
        return pseudo_inverse_solve(
            self.fisher(outputs), tensors.cast_like(gradient, outputs)
        )

    def validate(self, outputs_shape: Sequence[int | None]) -> None:
        """Checks that outputs of this shape can parametrise the head.

        Args:
            outputs_shape: Static shape of the outputs, with `None` for unknown
                sizes.

        Raises:
            ValueError: If the outputs have no last axis or an empty one.
        """
        shape = tuple(tf.TensorShape(outputs_shape))
        if not shape or shape[-1] == 0:
            raise ValueError(
                f"The outputs for the head {self!r} must have a last axis with "
                "the parameters of the distribution. Give the last layer of "
                f"the model at least one unit. Received: outputs_shape={shape}"
            )

    def targets_in_support(
        self, outputs: tf.Tensor, targets: tf.Tensor
    ) -> tf.Tensor:
        """Tells, inside a graph, whether all targets are possible.

        The base class tests for a finite log-probability, so it also fails for
        non-finite outputs; heads override it to test the targets.

        Args:
            outputs: Tensor of shape `[..., K]`.
            targets: Tensor of targets.

        Returns:
            Boolean scalar tensor.
        """
        return tf.reduce_all(tf.math.is_finite(self.log_prob(outputs, targets)))

    def describe_fisher(self, parameter_count: int | None = None) -> str:
        """Says in words how the Fisher matrix is found, for summaries.

        Args:
            parameter_count: Integer, the size `K` of the last axis of the
                outputs, or `None` if it is not known.

        Returns:
            `"exact, closed form"`, unless a subclass says otherwise.
        """
        return "exact, closed form"

    def describe_support(self, outputs_shape: Sequence[int | None]) -> str:
        """Completes the sentence "The targets must be ..." for errors."""
        return "possible values of the distribution"

    def validate_targets(self, outputs: tf.Tensor, targets: tf.Tensor) -> None:
        """Checks concrete targets outside of a graph, before training.

        Inside a graph, use `targets_in_support()`.

        Args:
            outputs: Tensor of shape `[..., K]`.
            targets: Tensor or array of targets.

        Raises:
            ValueError: If the shape of the targets does not match that of the
                outputs, or if a target lies outside of the support.
        """
        outputs = tensors.as_parameters(outputs)
        self.validate(outputs.shape)
        if not bool(self.targets_in_support(outputs, targets)):
            values = np.asarray(targets)
            raise ValueError(
                f"The targets for the head {self!r} must be "
                f"{self.describe_support(outputs.shape)}. Received: targets of "
                f"shape {values.shape} and dtype {values.dtype} with minimum "
                f"{values.min()} and maximum {values.max()}"
            )

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor, to be saved."""
        return {}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Head":
        """Builds a head from what `get_config()` returned."""
        return cls(**config)

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        assert isinstance(other, Head)
        return bool(self.get_config() == other.get_config())

    def __hash__(self) -> int:
        return hash((type(self), repr(sorted(self.get_config().items()))))

    def __repr__(self) -> str:
        arguments = ", ".join(
            f"{name}={value!r}" for name, value in self.get_config().items()
        )
        return f"{type(self).__name__}({arguments})"


def _forget(targets: tf.Tensor) -> tf.Tensor:
    """Returns targets whose origin TFP does not know.

    Its bijectors remember the tensor that a draw was made from and return it as
    the inverse, for any parameters: the score of a draw would be zero.
    """
    return tf.identity(targets)
