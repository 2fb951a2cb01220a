"""What every optimizer of the package shares: a model, a plan, a step."""

from __future__ import annotations

import abc
import weakref
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_natgrad import _compat, replicas
from keras_natgrad.capture import (
    CurvatureTape,
    Plan,
    make_plan,
    match_layers,
)
from keras_natgrad.capture.eligibility import check_batched, check_reached
from keras_natgrad.capture.selectors import pattern_name
from keras_natgrad.optimizers.attachment import (
    NOT_ATTACHED,
    check_exclude,
    check_same_model,
    check_trainable,
)
from keras_natgrad.optimizers.coverage import warn_of_plan
from keras_natgrad.optimizers.observation import Observation, all_finite
from keras_natgrad.training import install, install_hook
from keras_natgrad.training.loss_heads import (
    LossHead,
    declared_rows,
    warn_of_fallbacks,
)
from keras_natgrad.training.terms import mean_terms

_NO_CURVATURE = (
    "This {name} optimizer received gradients without curvature. In a custom "
    "training loop, compute them with `keras_natgrad.CurvatureTape(optimizer)`"
    " in place of `tf.GradientTape()`."
)
_KERAS_MERGES = (
    "Keras does not support `{argument}` under a strategy with several "
    "replicas. Received: {argument}={value!r}"
)


class CurvatureOptimizer(keras.optimizers.Optimizer, abc.ABC):
    """Base class of optimizers that see the layers of their model.

    Subclasses implement `build_curvature`, `observe` and `curvature_step`.
    """

    def __init__(self, learning_rate: Any, **kwargs: Any) -> None:
        super().__init__(learning_rate, **kwargs)
        # Plain attributes, kept from Keras's tracking: the model is not part
        # of the optimizer's state, and is held weakly.
        self._hide("_model_reference", None)
        self._hide("_head", None)
        self._hide("_plan", None)
        self._hide("_exclude", ())
        # One per replica of this process.
        self._hide("_observations", {})
        self._hide("_curvature_built", False)
        self._hide("_loss_rows", None)

    def _hide(self, name: str, value: Any) -> None:
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
        changed = head is not None and head is not self._head
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
        if isinstance(exclude, (str, type)):
            raise ValueError(
                f"`exclude` must be a list. Received: exclude={exclude!r}"
            )
        for pattern in exclude or ():
            pattern_name(pattern, "exclude")
        reference = self._model_reference
        again = reference is not None and reference() is model
        if self._curvature_built:
            if again and exclude is not None:
                check_exclude(type(self).__name__, self._exclude, exclude)
            self.planned_layers(model)
        self._hide("_model_reference", weakref.ref(model))
        if head is not None or not again:
            self._hide("_head", head)
        if exclude is not None or not again:
            self._hide("_exclude", tuple(exclude or ()))
        if self.built and not self._curvature_built:
            self._build_curvature(_compat.optimizer_variables(self))

    def attached_model(self) -> keras.Model:
        """Returns the attached model.

        Raises:
            ValueError: If there is none.
        """
        reference = self._model_reference
        model = None if reference is None else reference()
        if model is None:
            raise ValueError(NOT_ATTACHED.format(name=type(self).__name__))
        return model

    def attached_head(self) -> Any:
        """Returns the head given to `attach`, or `None`."""
        return self._head

    @property
    def uses_targets(self) -> bool:
        """Whether the Fisher is the empirical one, at observed targets."""
        return False

    def receive_choices(self, choices: Sequence[LossHead]) -> None:
        """Takes what stands for each loss; warns of fallbacks once."""
        if self._loss_rows is None:
            warn_of_fallbacks(choices)
        self._hide("_loss_rows", [choice.row() for choice in choices])

    def loss_rows(self) -> list[tuple[str, str, str]]:
        """Returns output, head and how its Fisher is found, per loss."""
        if self._loss_rows is not None:
            return list(self._loss_rows)
        return declared_rows(
            self.attached_model(), self._head, self.uses_targets
        )

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
        attached = self._model_reference is not None
        if attached or self._plan is not None:
            self._build_curvature(variables)

    def _build_curvature(self, variables: list[Any]) -> None:
        if self._model_reference is not None:
            model = self.attached_model()
            own = self.model_variables(variables)
            if isinstance(model, keras.Model):
                check_same_model(type(self).__name__, model, own)
            plan = make_plan(model, own, self._exclude)
            self._hide("_plan", self.choose_layers(plan))
            self.warn_of_plan(self._plan, variables)
        self._hide("_curvature_built", True)
        self.build_curvature(self._plan, variables)

    def choose_layers(self, plan: Plan) -> Plan:
        """Returns the part of a plan that the optimizer's blocks can treat."""
        return plan

    def model_variables(self, variables: Sequence[Any]) -> list[Any]:
        """Returns what the model's layers hold for the given variables."""
        return list(variables)

    def planned_layers(
        self, model: keras.Model
    ) -> list[tuple[keras.layers.Layer, int]]:
        """Returns the layer, and which of its maps, of each planned one."""
        own = self.model_variables(_compat.optimizer_variables(self))
        return match_layers(self._plan, model, own)

    def warn_of_plan(self, plan: Plan, variables: Sequence[Any]) -> None:
        """Warns of the variables that get a fallback block."""
        warn_of_plan(plan, variables)

    def add_curvature_variable(
        self, name: str, shape: tuple[int, ...], initializer: str
    ) -> Any:
        """Adds one saved variable of the curvature's dtype."""
        return self.add_variable(
            shape=shape,
            initializer=initializer,
            dtype=self.curvature_dtype,
            name=name,
        )

    def add_summed_variable(
        self, name: str, shape: tuple[int, ...], initializer: str
    ) -> Any:
        """Adds one that is the sum of a part on every replica."""
        return _compat.add_summed_variable(
            self, name, shape, initializer, self.curvature_dtype
        )

    @property
    def curvature_dtype(self) -> str:
        """float64 where the model is, float32 otherwise."""
        variables = _compat.optimizer_variables(self)
        wide = any(v.dtype == "float64" for v in variables)
        return "float64" if wide else "float32"

    @abc.abstractmethod
    def build_curvature(self, plan: Plan, variables: list[Any]) -> None:
        """Creates the curvature's state from the plan and the variables."""

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
        layers = self.planned_layers(model)
        terms = tape.terms
        if terms is None:
            if self._head is None or tape.model_outputs is None:
                raise ValueError(
                    "The tape does not know what distribution the model's "
                    "outputs parametrise. Write `optimizer.attach(model, "
                    "head=keras_natgrad.heads.<Head>(...))`, and call the "
                    "model inside the tape."
                )
            terms = mean_terms(tape.model_outputs, self._head)
        self.check_replicas()
        records = [tape.taps.record(layer, index) for layer, index in layers]
        check_reached(records)
        check_batched(records, terms[0].outputs.shape[0])
        observation = Observation(tape, terms, records, gradients)
        observation.surged = self.has_surged(observation)
        self.observe(observation)
        self._observations[replicas.replica_key()] = observation

    def check_replicas(self) -> None:
        """Raises ValueError for what several replicas cannot do."""
        if replicas.replica_count() == 1:
            return
        replicas.check_merge(type(self).__name__)
        for argument in (
            "gradient_accumulation_steps",
            "ema_overwrite_frequency",
        ):
            value = getattr(self, argument)
            if value is not None:
                raise ValueError(
                    _KERAS_MERGES.format(argument=argument, value=value)
                )

    @abc.abstractmethod
    def observe(self, observation: Observation) -> None:
        """Updates the statistics from one batch."""

    @property
    def steps_outside(self) -> bool:
        """Whether something happens between two steps, outside the graph."""
        return False

    @property
    def needs_objective(self) -> bool:
        """Whether the step may evaluate the loss again."""
        return False

    def step_logs(self) -> dict[str, tf.Tensor]:
        """Returns what `fit` logs beside the metrics."""
        return {}

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
        observation = self._observations.pop(key, None)
        if observation is None:
            model = self.attached_model()
            check_same_model(type(self).__name__, model, trainable_variables)
            raise ValueError(_NO_CURVATURE.format(name=type(self).__name__))
        grads = _compat.all_reduce_gradients(self, grads, trainable_variables)
        own = _compat.optimizer_variables(self)
        aligned: list[Any] = [tf.zeros(v.shape, v.dtype) for v in own]
        for gradient, variable in zip(grads, trainable_variables, strict=True):
            index = _compat.variable_index(self, variable)
            aligned[index] = tf.convert_to_tensor(gradient)

        if self.gradient_accumulation_steps:
            # An earlier batch among the accumulated ones may have been bad.
            observation.is_finite &= all_finite(aligned)

        def step() -> None:
            _compat.apply_weight_decay(self, trainable_variables)
            self.curvature_step(observation, aligned, learning_rate)

        def skip() -> None:
            self.skip_step(observation)

        replicas.cond(observation.accepted, step, skip)

    def _apply_weight_decay(self, variables: Sequence[Any]) -> None:
        """Leaves decay to the step, which may have to be skipped."""

    @abc.abstractmethod
    def curvature_step(
        self,
        observation: Observation,
        gradients: Sequence[tf.Tensor],
        learning_rate: Any,
    ) -> None:
        """Moves the variables.

        Args:
            observation: What the tape recorded.
            gradients: One gradient per variable of the optimizer, zeros
                where the loss does not reach it.
            learning_rate: The current learning rate.
        """

    @abc.abstractmethod
    def has_surged(self, observation: Observation) -> tf.Tensor:
        """Returns whether the last step has to be taken back."""

    @abc.abstractmethod
    def skip_step(self, observation: Observation) -> None:
        """Deals with a batch that no step is made on."""

    # -- Saving ----------------------------------------------------------

    def load_own_variables(self, store: Any) -> None:
        """Takes a saved state, which an attached optimizer builds first."""
        reference = self._model_reference
        model = None if reference is None else reference()
        if not self.built and model is not None and model.built:
            if len(store.keys()) > len(self.variables):
                self.build(model.trainable_variables)
        super().load_own_variables(store)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments and the plan of the layers."""
        config = super().get_config()
        if self._plan is not None:
            config["plan"] = self._plan.get_config()
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
            optimizer._hide("_plan", Plan.from_config(plan))
        return optimizer
