"""K-FAC as an optimizer of tf_keras."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf
import tf_keras
from typing_extensions import override

from keras_natgrad import replicas
from keras_natgrad._compat import (
    current_rate,
    optimizer_variables,
    serialized_rate,
    set_rate,
)
from keras_natgrad.capture import Plan
from keras_natgrad.integrations.tf_keras.adopted import AdoptedKFAC
from keras_natgrad.integrations.tf_keras.forward import Recorder, remove_taps
from keras_natgrad.integrations.tf_keras.losses import output_terms
from keras_natgrad.optimizers.kfac import KFACSettings

_NOT_ATTACHED = (
    "This KFAC optimizer is not attached to a model, so it cannot see the "
    "layers whose curvature it needs. Write `optimizer.attach(model)` before "
    "training."
)
# Arguments that tf_keras optimizers have too, and the other ones of the engine.
_CLIPPING = ("weight_decay", "clipnorm", "clipvalue", "global_clipnorm")
_SETTINGS = tuple(
    name
    for name in KFACSettings.names()
    if name not in ("log_statistics", "refresh_where")
)


@tf_keras.saving.register_keras_serializable(package="keras_natgrad")
class KFAC(tf_keras.optimizers.Optimizer):
    """`keras_natgrad.KFAC` for models of tf_keras.

    It works in the stock `fit` of tf_keras, and in training loops that call
    `apply_gradients` after one forward pass with `training=True`, as tasks of
    the TensorFlow Model Garden do. All examples count equally in the Fisher:
    sample weights affect only the gradient.

    The loss is not evaluated again, so an adaptive damping stays where the
    first batch sets it, except when a step is taken back. Taking steps back
    needs the loss, which `fit` provides and `apply_gradients` alone does not.

    Args:
        learning_rate: `"auto"` for the minimum of the quadratic model, a float
            or a `tf_keras` schedule. Defaults to `"auto"`.
        automatic: Whether `learning_rate` multiplies the automatic one.
            Defaults to `False`; `"auto"` means a factor of 1.
        name: Name of the optimizer.
        **settings: Arguments of `keras_natgrad.KFAC` except `refresh_where` and
            `log_statistics`, and `weight_decay`, `clipnorm`, `clipvalue` and
            `global_clipnorm`.

    Raises:
        ValueError: If an argument is unknown or out of range.

    Example:

    ```python
    from keras_natgrad.integrations.tf_keras import KFAC

    optimizer = KFAC().attach(model)
    model.compile(optimizer, loss="mse")
    model.fit(x, y, batch_size=512)
    ```
    """

    def __init__(
        self,
        learning_rate: Any = "auto",
        automatic: bool = False,
        name: str = "KFAC",
        **settings: Any,
    ) -> None:
        unknown = sorted(set(settings) - {*_SETTINGS, *_CLIPPING})
        if unknown:
            raise ValueError(
                f"KFAC for tf_keras takes {_SETTINGS} and {_CLIPPING}. "
                f"Received: {unknown}"
            )
        if settings.get("fisher") == "empirical":
            raise ValueError(
                "A training step of tf_keras does not tell its optimizer the "
                "targets. Received: fisher='empirical'"
            )
        if learning_rate == "auto":
            learning_rate, automatic = 1.0, True
        clipping = {key: settings.get(key) for key in _CLIPPING}
        super().__init__(name=name, jit_compile=False, **clipping)
        set_rate(self, learning_rate)
        self.automatic = automatic
        adopted = AdoptedKFAC("auto" if automatic else 1.0, **settings)
        # Kept from tracking: its state is in the list of variables.
        object.__setattr__(self, "adopted", adopted)
        object.__setattr__(self, "_recorder", Recorder())
        object.__setattr__(self, "_matching", {})
        object.__setattr__(self, "_loss", None)

    # -- Attaching -------------------------------------------------------

    def attach(
        self, model: Any, head: Any = None, exclude: Sequence[Any] | None = None
    ) -> KFAC:
        """Attaches the optimizer to the model that it trains.

        The model gets an instance `call` that records the layers during
        training; its class, layers and saved file do not change. Attaching
        again is harmless, and necessary after a model has been loaded.

        Args:
            model: A `tf_keras.Model`, built or not.
            head: A `keras_natgrad.heads.Head`, or a list or dictionary of heads
                like the outputs; the loss is then the mean of its negative
                log-likelihood. Defaults to the head of the compiled loss.
            exclude: Layers that are not captured, as in
                `keras_natgrad.KFAC.attach`.

        Returns:
            The optimizer itself.

        Raises:
            ValueError: If `model` is not a tf_keras model, or not the one that
                the state was built for.
        """
        if not isinstance(model, tf_keras.Model):
            raise ValueError(
                "`attach` takes a tf_keras.Model. "
                f"Received: model={model!r} of type {type(model).__name__}"
            )
        self.adopted.take_model(model, head, exclude)
        self._recorder.install(model)
        if model.built and model.trainable_variables:
            with tf.init_scope():
                self.build(model.trainable_variables)
        return self

    def detach(self) -> None:
        """Takes the instance `call` off the attached model."""
        remove_taps(self.adopted.attached_model())

    def summary(self, print_fn: Callable[[str], Any] | None = None) -> None:
        """Prints what each layer got, see `keras_natgrad.KFAC.summary`."""
        self.adopted.summary(print_fn)

    # -- State -----------------------------------------------------------

    @override
    def build(self, var_list: Sequence[Any]) -> None:
        """Creates the state, if a model is attached or a plan was loaded.

        Args:
            var_list: The trainable variables of the model.
        """
        if getattr(self, "_built", False):
            return
        if self.adopted.plan is None and not self.adopted.is_attached:
            return
        variables = list(var_list)
        super().build(variables)
        self.adopted.adopt(variables)
        for own, adopted in zip(
            variables, optimizer_variables(self.adopted), strict=True
        ):
            self._matching[own.ref()] = adopted
        for state in self.adopted.variables:
            self._variables.append(state.value)
        self._built = True

    # -- One step --------------------------------------------------------

    @override
    def compute_gradients(
        self, loss: Any, var_list: Any, tape: Any = None
    ) -> list[tuple[Any, Any]]:
        """Returns the gradients as tf_keras does, and keeps the loss."""
        if callable(loss):
            raise ValueError(
                "`minimize` needs the loss as a tensor, with its tape. "
                f"Received: loss={loss!r}"
            )
        object.__setattr__(self, "_loss", loss)
        return list(super().compute_gradients(loss, var_list, tape))

    @override
    def update_step(self, gradient: Any, variable: Any) -> None:
        """Not used: all variables are updated at once."""
        raise NotImplementedError

    @override
    def apply_gradients(
        self, grads_and_vars: Any, name: str | None = None, **kwargs: Any
    ) -> Any:
        """Makes one step.

        Args:
            grads_and_vars: Pairs of gradient (or `None`) and variable.
            name: Ignored.
            **kwargs: Ignored.

        Returns:
            The number of steps.

        Raises:
            ValueError: If no model is attached, or no forward pass of it was
                seen.
        """
        replicas.refuse_replicas(
            "KFAC for tf_keras",
            "gradients",
            "the parts of a batch are not combined",
            "Use keras_natgrad.KFAC with a Keras 3 model.",
        )
        if not self.adopted.is_attached:
            raise ValueError(_NOT_ATTACHED)
        gradients, variables = zip(*grads_and_vars, strict=True)
        with tf.init_scope():
            self.build(variables)
        own = [self._adopted_variable(variable) for variable in variables]
        self.adopted.learning_rate = current_rate(self)
        self._observe(gradients, own)
        self.adopted.apply(gradients, own)
        for variable in variables:
            if variable.constraint is not None:
                variable.assign(variable.constraint(variable))
        return self.iterations.assign_add(1)

    def _observe(self, gradients: Sequence[Any], variables: Any) -> None:
        """Hands the forward pass to the engine."""
        model = self.adopted.attached_model()
        forward = self._recorder.take(model.name)
        with forward.gradient_tape:
            forward.terms = output_terms(
                model, forward.model_outputs, self.adopted.attached_head()
            )
        forward.loss = tf.zeros([]) if self._loss is None else self._loss
        object.__setattr__(self, "_loss", None)
        self.adopted.receive_curvature(forward, gradients, variables)

    def _adopted_variable(self, variable: Any) -> Any:
        try:
            return self._matching[variable.ref()]
        except KeyError:
            raise ValueError(
                "The optimizer was built for other variables. Create a new "
                "optimizer, or pass the trainable variables of the attached "
                f"model. Received: variable={variable.name!r}"
            ) from None

    # -- Saving ----------------------------------------------------------

    @override
    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments and the plan of the layers."""
        inner = self.adopted.get_config()
        kept = {key: inner[key] for key in _SETTINGS}
        plan = self.adopted.plan
        return {
            "name": self.name,
            "learning_rate": serialized_rate(self),
            "automatic": self.automatic,
            **{key: getattr(self, key) for key in _CLIPPING},
            **_plain(kept),
            "plan": None if plan is None else _plain(plan.get_config()),
        }

    @classmethod
    @override
    def from_config(
        cls, config: dict[str, Any], custom_objects: Any = None
    ) -> Any:
        """Recreates the optimizer from `get_config`."""
        config = dict(config)
        plan = config.pop("plan", None)
        optimizer = super().from_config(config, custom_objects)
        if plan is not None:
            optimizer.adopted.take_plan(Plan.from_config(plan))
        return optimizer


def _plain(config: dict[str, Any]) -> Any:
    """Returns lists for tuples, which tf_keras does not restore."""
    return json.loads(json.dumps(config))
