"""The Keras side of every optimizer: models, plans, variables, replicas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_natgrad import _compat, replicas
from keras_natgrad.capture import CurvatureTape, Plan
from keras_natgrad.capture.eligibility import check_batched, check_reached
from keras_natgrad.checks import check_positive
from keras_natgrad.optimizers.attachment import (
    Attachment,
    check_same_model,
    check_trainable,
)
from keras_natgrad.optimizers.engine import Engine, Parts
from keras_natgrad.optimizers.observation import (
    Verdict,
    observe_network,
    terms_of,
)
from keras_natgrad.optimizers.replica_checks import check_replicas
from keras_natgrad.optimizers.saved_state import check_saved
from keras_natgrad.optimizers.settings import Settings
from keras_natgrad.optimizers.summary import render
from keras_natgrad.optimizers.variables import aligned_gradients, state_factory
from keras_natgrad.step import Damping, StepState
from keras_natgrad.training import install, install_hook
from keras_natgrad.training.loss_heads import LossHead

_NO_CURVATURE = (
    "This {name} optimizer received gradients without curvature. In a custom "
    "training loop, compute them with `keras_natgrad.CurvatureTape(optimizer)`"
    " in place of `tf.GradientTape()`."
)


class CurvatureOptimizer(keras.optimizers.Optimizer):
    """Base class of optimizers that see the layers of their model.

    It connects Keras with an `Engine`, which makes the steps. A subclass is a
    constructor that turns its settings into the parts of an engine.

    Args:
        learning_rate: A float, a schedule or a callable.
        settings: `Settings`, the subclass's own arguments.
        parts: `Parts` of the engine.
        **kwargs: Further arguments of `keras.optimizers.Optimizer`.

    Attributes:
        settings: The same.
        engine: `Engine`.
        attachment: `Attachment`, the model and the plan of its layers.
    """

    settings: Settings
    engine: Engine
    attachment: Attachment

    def __init__(
        self,
        learning_rate: Any,
        settings: Settings,
        parts: Parts,
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate, **kwargs)
        self._hide("settings", settings)
        self._hide("engine", Engine(parts))
        self._hide("attachment", Attachment(type(self).__name__))
        # One per replica of this process.
        self._hide("_observations", {})

    def _hide(self, name: str, value: Any) -> None:
        """Sets a plain attribute, which Keras does not track as state."""
        object.__setattr__(self, name, value)

    # -- Attaching -------------------------------------------------------

    def attach(
        self,
        model: keras.Model,
        head: Any = None,
        exclude: Sequence[Any] | None = None,
    ) -> Any:
        """Attaches the optimizer to the model that it trains.

        The model's class, layers and saved file stay as they are; an
        instance `train_step` is set, unless the class has its own. Attaching
        again is harmless: what is not given stays as it was for this model.
        It is necessary after `keras.models.load_model` (under mixed precision
        of `model.optimizer.inner_optimizer`).

        Args:
            model: A `keras.Model`, built or not.
            head: A `keras_natgrad.heads.Head` that says what distribution
                the outputs parametrise, or a list or dictionary of heads
                like the outputs. Needed in custom training loops, and for
                an exact Fisher where the compiled loss has no head.
            exclude: Names, paths, globs (`"*/attention/*"`) or classes of
                layers that are not to be captured; their variables get the
                fallback block. To be given before the first step.

        Returns:
            The optimizer itself.

        Raises:
            ValueError: If `model` is no Keras model, or not the one that the
                optimizer's state was built for, or if `exclude` is no list
                of patterns or comes too late.

        Example:

        ```python
        optimizer = keras_natgrad.KFAC().attach(model)
        model.compile(optimizer=optimizer, loss="mse")
        ```
        """
        if not isinstance(model, keras.Model):
            raise ValueError(
                "`attach` takes a keras.Model. "
                f"Received: model={model!r} of type {type(model).__name__}"
            )
        changed = head is not None and head is not self.attached_head()
        self.take_model(model, head, exclude)
        install(model)
        if changed:
            # A training function that Keras made before has the other head.
            model.train_function = None
        if self.steps_outside:
            install_hook(model)
        return self

    def take_model(
        self, model: keras.Model, head: Any, exclude: Sequence[Any] | None
    ) -> None:
        """Notes what `attach` was given; the model stays as it is."""
        attachment, own = self.attachment, self._own_variables()
        if self.engine.is_built:
            # An error for another model.
            attachment.layers(model, own)
        attachment.take(model, head, exclude, self.engine.is_built)
        if self.engine.is_built:
            self.engine.direction.attach(model, attachment.plan, own)
        elif self.built:
            self._build_curvature(_compat.optimizer_variables(self))

    def attached_model(self) -> keras.Model:
        """Returns the attached model.

        Raises:
            ValueError: If there is none.
        """
        return self.attachment.model()

    def attached_head(self) -> Any:
        """Returns the head given to `attach`, or `None`."""
        return self.attachment.head

    @property
    def damping(self) -> Damping:
        """The damping rule."""
        return self.engine.damping

    @property
    def state(self) -> StepState:
        """Damping, counters and what else there is one of, once built."""
        return self.engine.state

    @property
    def uses_targets(self) -> bool:
        """Whether the Fisher is the empirical one, at observed targets."""
        return getattr(self.settings, "fisher", None) == "empirical"

    def receive_choices(self, choices: Sequence[LossHead]) -> None:
        """Takes what stands for each loss; warns of fallbacks once."""
        self.attachment.take_loss_heads(choices)

    def loss_rows(self) -> list[tuple[str, str, str]]:
        """Returns output, head and how its Fisher is found, per loss."""
        return self.attachment.loss_rows(self.uses_targets)

    # -- State -----------------------------------------------------------

    def build(self, variables: Sequence[Any]) -> None:
        """Creates the state.

        Where a model is attached, its layers are planned now; otherwise the
        plan comes from the saved config.

        Args:
            variables: The trainable variables, `keras.Variable`s.
        """
        if self.built:
            return
        variables = list(variables)
        super().build(variables)
        if self.attachment.is_made or self.attachment.plan is not None:
            self._build_curvature(variables)

    def _build_curvature(self, variables: list[Any]) -> None:
        if self.attachment.is_made:
            self.attachment.plan_layers(
                self.engine.direction,
                self.model_variables(variables),
                variables,
            )
        self._build_engine(variables)

    def _build_engine(self, variables: list[Any]) -> None:
        self.engine.build(
            self.attachment.plan,
            variables,
            state_factory(self),
            self.iterations,
        )

    def model_variables(self, variables: Sequence[Any]) -> list[Any]:
        """Returns what the model's layers hold for the given variables."""
        return list(variables)

    def _own_variables(self) -> list[Any]:
        """Returns what the model's layers hold for the optimizer's."""
        if not self.built:
            return []
        return self.model_variables(_compat.optimizer_variables(self))

    # -- One step --------------------------------------------------------

    def receive_curvature(
        self,
        tape: CurvatureTape,
        gradients: Sequence[Any],
        variables: Sequence[Any],
    ) -> None:
        """Takes what a `CurvatureTape` recorded; called by the tape."""
        if not self.built:
            self.build(list(variables))
        model = self.attached_model()
        own = _compat.optimizer_variables(self)
        check_trainable(type(self).__name__, own)
        layers = self.attachment.layers(model, self._own_variables())
        terms = terms_of(tape, self.attached_head())
        self.check_replicas()
        records = [tape.taps.record(layer, index) for layer, index in layers]
        check_reached(records)
        check_batched(records, terms[0].outputs.shape[0])
        observation = observe_network(
            tape,
            terms,
            records,
            gradients,
            tape.objective if self.needs_objective else None,
        )
        self._receive(self.engine.judge(observation))

    def _receive(self, verdict: Verdict) -> None:
        """Lets the engine observe a batch, and keeps it for `apply`."""
        verdict = self.engine.observe(verdict)
        self._observations[replicas.replica_key()] = verdict

    def check_replicas(self) -> None:
        """Raises ValueError for what several replicas cannot do."""
        check_replicas(self)

    @property
    def steps_outside(self) -> bool:
        """Whether something happens between two steps, outside the graph."""
        return self.engine.refreshing.is_outside

    @property
    def needs_objective(self) -> bool:
        """Whether the step may evaluate the loss again."""
        return self.engine.needs_objective

    @tf.autograph.experimental.do_not_convert
    def apply(self, grads: Any, trainable_variables: Any = None) -> Any:
        """Updates the variables by their gradients, as in Keras.

        Gradients of embeddings, which come as rows, are made dense first:
        the norms that clip them would count a repeated row twice.
        """
        dense = [g if g is None else tf.convert_to_tensor(g) for g in grads]
        return super().apply(dense, trainable_variables)

    def _backend_update_step(
        self,
        grads: Sequence[Any],
        trainable_variables: Sequence[Any],
        learning_rate: Any,
    ) -> None:
        """Takes the whole gradient list, after clipping and decay."""
        key = replicas.replica_key()
        verdict = self._observations.pop(key, None)
        if verdict is None:
            model = self.attached_model()
            check_same_model(type(self).__name__, model, trainable_variables)
            raise ValueError(_NO_CURVATURE.format(name=type(self).__name__))
        grads = _compat.all_reduce_gradients(self, grads, trainable_variables)
        aligned = aligned_gradients(self, grads, trainable_variables)
        if self.gradient_accumulation_steps:
            # An earlier batch among the accumulated ones may have been bad.
            verdict = verdict.with_gradients(aligned)

        def step() -> None:
            _compat.apply_weight_decay(self, trainable_variables)
            self.engine.step(verdict, aligned, learning_rate)

        def skip() -> None:
            self.engine.skip(verdict)

        replicas.cond(verdict.accepted, step, skip)

    def _apply_weight_decay(self, variables: Sequence[Any]) -> None:
        """Leaves decay to the step, which may have to be skipped."""

    def refresh_inverses(self) -> None:
        """Recomputes the inverses from the statistics as they are now.

        Steps do so by themselves when it is due.
        """
        self.engine.refreshing.now()

    def after_step(self) -> None:
        """Refreshes inverses outside the graph, with `refresh_where`.

        `fit` and `train_on_batch` call it after every step. A custom training
        loop calls it between two steps, outside any `tf.function`.
        """
        if self.engine.is_built:
            self.engine.refreshing.between_steps()

    # -- What happened ---------------------------------------------------

    @property
    def statistics(self) -> dict[str, float]:
        """What happened so far, as Python numbers.

        Damping, reduction ratio, predicted loss change, learning rate and
        momentum of the last step; counts of batches, updates of the
        statistics, refreshes of the inverses, dampings raised by a failed
        factorisation, factorisations given up, batches skipped and steps
        taken back (retracted).
        """
        return self.state.to_dict() if self.engine.is_built else {}

    def step_logs(self) -> dict[str, tf.Tensor]:
        """Returns what `fit` logs beside the metrics."""
        if not self.settings.log_statistics:
            return {}
        tensors = self.state.to_tensors()
        return {f"{self.name}_{key}": value for key, value in tensors.items()}

    def raise_damping(self, factor: float) -> None:
        """Multiplies the damping from the next step on.

        An adaptive damping goes on adapting from there. A constant or
        scheduled one keeps the factor, which is saved with the optimizer and
        multiplied by that of another call. The inverses are renewed before
        they are used again. Call it between steps.

        Args:
            factor: Positive; below one it lowers the damping.

        Raises:
            ValueError: If `factor` is not positive, or before the first step.

        Example:

        ```python
        optimizer.raise_damping(10.0)
        ```
        """
        check_positive("factor", factor)
        if not self.engine.is_built:
            raise ValueError(
                "The damping can be raised once the optimizer is built: after "
                "its first step, or `optimizer.build(model.trainable_variables)"
                f"`. Received: factor={factor!r} for {self!r}"
            )
        self.engine.raise_damping(factor)

    def summary(self, print_fn: Any = None) -> None:
        """Prints what each layer got, and why others fall back.

        With blocks, a row has the block, the shape of the parameters, the
        positions at which one call applies them (if known), the approximation
        and its memory; the last line says what share of the parameters is
        preconditioned. For a compiled model, a line per output says how its
        Fisher is found.

        Args:
            print_fn: Function that prints one string. Defaults to `print`.
        """
        if not self.engine.is_built:
            self.build(self.attached_model().trainable_variables)
        text = render(self)
        (print_fn or print)(text)

    # -- Saving ----------------------------------------------------------

    def load_own_variables(self, store: Any) -> None:
        """Takes a saved state, which an attached optimizer builds first."""
        if not self.built and self.attachment.is_alive:
            model = self.attached_model()
            if model.built and len(store.keys()) > len(self.variables):
                self.build(model.trainable_variables)
        if self.engine.is_built:
            check_saved(type(self).__name__, store, self.variables)
        super().load_own_variables(store)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments and the plan of the layers."""
        config = super().get_config()
        config.update(self.settings.to_config())
        if self.attachment.plan is not None:
            config["plan"] = self.attachment.plan.get_config()
        return config

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: Any = None
    ) -> Any:
        """Recreates the optimizer from `get_config`."""
        config = dict(config)
        plan = config.pop("plan", None)
        optimizer = super().from_config(config, custom_objects=custom_objects)
        if plan is not None:
            optimizer.attachment.plan = Plan.from_config(plan)
        return optimizer
