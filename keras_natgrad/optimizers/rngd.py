"""Relative natural gradient descent: every layer with a metric of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf
from typing_extensions import override

from keras_natgrad import _compat, replicas
from keras_natgrad.capture import Plan, match_layers
from keras_natgrad.curvature import BlockDiagonal
from keras_natgrad.optimizers.observation import Observation
from keras_natgrad.optimizers.preconditioned import PreconditionedOptimizer
from keras_natgrad.relative import (
    SHARED_METRICS,
    HorizonOptions,
    MetricSpec,
    RelativeCurvature,
    ResponseOptions,
    find_sources,
    plan_metrics,
)
from keras_natgrad.step import QuadraticModel, Refresh, StepLength
from keras_natgrad.step.checks import (
    check_fraction,
    check_period,
    check_positive,
    is_number,
)

# Damping of `"auto"` where a layer is measured by a response further on.
_FAR_DAMPING = 1e-2


@keras.saving.register_keras_serializable(package="keras_natgrad")
class RNGD(PreconditionedOptimizer):
    r"""Relative natural gradient descent (Sun & Nielsen 2017).

    A layer is treated as a system of its own: given its input x̃, how do its
    weights change the distribution of its response? That Fisher information,
    the relative one, has a closed form,

        g = V(z) ⊗ x̃ x̃ᵀ,    V = diag(ν(z_1), …, ν(z_m)),

    with one `[n, n]` block per unit where the units respond independently,
    and `diag(η) − η ηᵀ` for a softmax. Its mean M over the batches seen is
    kept, and every so many steps inverted, block by block:

        W ← W − α (M + (λ + ρ tr M) I)⁻¹ ∇_W.

    The layers that make the model's output respond with the distribution of
    the loss, so that theirs is the block of the ordinary Fisher. Variables
    outside captured layers follow their gradient. L2 penalties are those of
    the model (`kernel_regularizer`); they enter the gradient alone.

    The optimizer must see the layers: attach it to the model. What follows a
    layer is known in sequential and functional models; in a subclassed one,
    and in a model inside a model, every layer responds through its own
    activation.

    Args:
        learning_rate: α: a float, a
            `keras.optimizers.schedules.LearningRateSchedule` or a callable.
            Defaults to `0.01`.
        damping: λ, non-negative, or `"auto"`: 0 for `horizon=1`, else 0.01,
            because the Fisher of the model's output vanishes where the model
            becomes sure of its answers, and the relative damping with it.
            Defaults to `"auto"`.
        relative_damping: ρ, non-negative. Defaults to `1e-4`.
        horizon: Whose response a layer is measured by: `1` for its own, `2`
            for that of the next Dense layer, and so on, the model's output
            where that is nearer. `"full"` for the model's output, which gives
            the exact diagonal blocks of the Fisher. Defaults to `1`.
        ends: `"metric"`, or `"inputs"` to give the first and the last layer
            the plain second moment of their inputs. Defaults to `"metric"`.
        metric_decay: Decay of the running averages, in [0, 1). Defaults to
            `0.95`.
        metric_update_period: Steps between updates of the averages. Defaults
            to `10`.
        inverse_update_period: Steps between inversions. Defaults to `100`.
        refresh_growth: Warm-up of both periods: the gap after step t is at
            most `refresh_growth · t` steps. `None` for no warm-up. Defaults
            to `0.15`.
        identity_start: Whether the averages start at the identity, and so the
            training at gradient descent. Otherwise they start at the first
            batch. Defaults to `False`.
        softness: ω of the softened rectifiers, see
            `blocks.relative.relu_information`. Defaults to `1.0`.
        noise_scale: σ of the units with Gaussian noise. Defaults to `1.0`.
        other_response: Distribution, with the activation as its mean, of
            units whose activation has no closed form: `"gaussian"`,
            `"bernoulli"`, `"poisson"`, or `None` to refuse them. Defaults to
            `"gaussian"`.
        max_metric_elements: Bound for the metric of one layer. Above it,
            coupled units keep their own blocks only, and above that units
            share what `shared` says; see `summary()`. Defaults to `2**20`.
        shared: `"groups"`: groups of units share the mean of their metrics.
            `"eigen"`: all units of the layer share its eigenvectors, and
            each has eigenvalues of its own. Defaults to `"groups"`.
        momentum: μ of `δ = −α M⁻¹∇ + μ δ₋₁`, in [0, 1). Defaults to `0.0`.
        log_statistics: Whether `fit` logs `statistics` beside the metrics.
        name: Name of the optimizer.
        **kwargs: Further arguments of `keras.optimizers.Optimizer`.

    Raises:
        ValueError: If an argument is out of range; at the first step, if an
            activation has no information, or if what a horizon of two or more
            looks at is no chain of Dense layers.

    Example:

    ```python
    optimizer = keras_natgrad.RNGD(0.01).attach(model)
    model.compile(optimizer, loss="sparse_categorical_crossentropy")
    model.fit(x, y, batch_size=50)
    ```

    The setting of the authors' experiments:

    ```python
    keras_natgrad.RNGD(
        0.01,
        ends="inputs",
        metric_decay=0.995,
        metric_update_period=1,
        refresh_growth=None,
        identity_start=True,
    )
    ```

    References:
        - Sun & Nielsen, 2017, arXiv:1606.06069.
    """

    def __init__(
        self,
        learning_rate: Any = 0.01,
        damping: float | str = "auto",
        relative_damping: float = 1e-4,
        horizon: int | str = 1,
        ends: str = "metric",
        metric_decay: float = 0.95,
        metric_update_period: int = 10,
        inverse_update_period: int = 100,
        refresh_growth: float | None = 0.15,
        identity_start: bool = False,
        softness: float = 1.0,
        noise_scale: float = 1.0,
        other_response: str | None = "gaussian",
        max_metric_elements: int = 2**20,
        shared: str = "groups",
        momentum: float = 0.0,
        log_statistics: bool = False,
        name: str = "rngd",
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate, name=name, **kwargs)
        if damping == "auto":
            damping = 0.0 if horizon == 1 else _FAR_DAMPING
        self._hide("damping", _check_damping("damping", damping))
        self.relative_damping = _check_damping(
            "relative_damping", relative_damping
        )
        responses = ResponseOptions(softness, noise_scale, other_response)
        self._hide("horizon_options", HorizonOptions(horizon, ends, responses))
        self.factor_decay = check_fraction("metric_decay", metric_decay)
        check_period("metric_update_period", metric_update_period)
        self._hide(
            "refresh",
            Refresh(
                metric_update_period, inverse_update_period, refresh_growth
            ),
        )
        self.identity_start = bool(identity_start)
        check_positive("max_metric_elements", max_metric_elements)
        self.max_metric_elements = max_metric_elements
        if shared not in SHARED_METRICS:
            raise ValueError(
                f"`shared` must be one of {SHARED_METRICS}. "
                f"Received: shared={shared!r}"
            )
        self.shared = shared
        momentum = check_fraction("momentum", momentum)
        self._hide("length", StepLength(False, momentum))
        self.log_statistics = log_statistics
        self.fisher = "exact"
        self._hide("quadratic_model", QuadraticModel("exact"))
        self.norm_constraint = None
        self.line_search = None
        self.seed = 0
        self._hide("_velocities", [])
        self._hide("_specs", None)
        self._hide("_sources", None)

    # -- State -----------------------------------------------------------

    @override
    def choose_layers(self, plan: Plan) -> Plan:
        return plan.only_matrices("no metric of its own")

    @override
    def attach(
        self,
        model: keras.Model,
        head: Any = None,
        exclude: Sequence[Any] | None = None,
    ) -> Any:
        self._hide("_sources", None)
        return super().attach(model, head, exclude)

    @override
    def make_blocks(
        self, plan: Plan, shapes: Sequence[tuple[int, ...]]
    ) -> BlockDiagonal:
        if self._model_reference is not None:
            specs = plan_metrics(
                plan,
                self._find_sources(),
                self.max_metric_elements,
                self.shared,
            )
            self._hide("_specs", specs)
        return RelativeCurvature(
            plan,
            shapes,
            self._specs,
            self.relative_damping,
            self.identity_start,
        )

    def _find_sources(self) -> Any:
        """Returns what the metric of every layer of the plan is made of."""
        if self._sources is None:
            model = self.attached_model()
            variables = _compat.optimizer_variables(self)
            found = match_layers(self._plan, model, variables)
            layers = [layer for layer, _ in found]
            self._hide(
                "_sources", find_sources(model, layers, self.horizon_options)
            )
        return self._sources

    # -- One step --------------------------------------------------------

    @override
    def observe(self, observation: Observation) -> None:
        """Inverts what earlier batches said, then adds what this one says."""
        batches = self.state.count("batches")
        updates = self.state.count("curvature_updates")
        started = self.identity_start | (updates > 0)
        due = self.refresh.is_due(batches, self.state.refresh_at.value)
        self._set_damping([], observation.loss)
        self._refresh_if(due & started & observation.accepted, self._refresh)

        def update() -> tf.Tensor:
            assert isinstance(self.curvature, RelativeCurvature)
            captured = self._capture(observation)
            statistics = self.curvature.relative_statistics(
                captured,
                self._find_sources(),
                observation.tape.taps,
                replicas.replica_seed(
                    tf.stack([tf.constant(self.seed, tf.int32), batches])
                ),
            )
            self.curvature.accumulate(
                statistics, self.factor_decay, keep_finite=True
            )
            self.state.increment(curvature_updates=1)
            self.state.update_at.assign(
                self.refresh.next_due(batches, self.refresh.curvature_period)
            )
            return tf.constant(0)

        due = self.refresh.is_due(batches, self.state.update_at.value)
        tf.cond(due & observation.accepted, update, lambda: tf.constant(0))
        self.state.increment(batches=1)

    @override
    def curvature_step(
        self,
        observation: Observation,
        gradients: Sequence[tf.Tensor],
        learning_rate: Any,
    ) -> None:
        # Without a start at the identity there is no inverse before the first
        # batch, and that of the first batch has to do.
        first = tf.equal(self.state.count("refreshes"), 0)
        self._refresh_if(first, self._refresh)
        matrices = self.curvature.to_matrices(gradients)
        solved = self.curvature.precondition(matrices)
        rate = tf.cast(learning_rate, self.curvature_dtype)
        momentum = tf.constant(self.length.momentum, rate.dtype)
        self._move(solved, tf.stack([rate, momentum]))
        self.state.note(learning_rate=rate, momentum=momentum)

    @override
    def _refresh(self) -> tf.Tensor:
        retries, failures = self.curvature.refresh(
            self.inverse_damping(), self._ridge, replicas.refresh_devices()
        )
        self.state.increment(refreshes=1, retries=retries, failures=failures)
        batches = self.state.count("batches")
        self.state.refresh_at.assign(
            self.refresh.next_due(batches, self.refresh.inverse_period)
        )
        return tf.constant(0)

    # -- Saving ----------------------------------------------------------

    @override
    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        options = self.horizon_options
        config.update(
            damping=self.damping,
            relative_damping=self.relative_damping,
            horizon=options.horizon,
            ends=options.ends,
            metric_decay=self.factor_decay,
            metric_update_period=self.refresh.curvature_period,
            inverse_update_period=self.refresh.inverse_period,
            refresh_growth=self.refresh.growth,
            identity_start=self.identity_start,
            softness=options.responses.softness,
            noise_scale=options.responses.noise_scale,
            other_response=options.responses.other_response,
            max_metric_elements=self.max_metric_elements,
            shared=self.shared,
            momentum=self.length.momentum,
            log_statistics=self.log_statistics,
        )
        if self._specs is not None:
            config["metrics"] = [spec.get_config() for spec in self._specs]
        return config

    @override
    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: Any = None
    ) -> Any:
        config = dict(config)
        metrics = config.pop("metrics", None)
        optimizer = super().from_config(config, custom_objects=custom_objects)
        if metrics is not None:
            optimizer._hide("_specs", [MetricSpec(**spec) for spec in metrics])
        return optimizer


def _check_damping(name: str, value: Any) -> float:
    if is_number(value) and value >= 0:
        return float(value)
    also = " or 'auto'" if name == "damping" else ""
    raise ValueError(
        f"`{name}` must be a non-negative float{also}. "
        f"Received: {name}={value!r}"
    )
