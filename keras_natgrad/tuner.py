"""Keras Tuner: hyper-parameters of K-FAC, and searches that resume."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
from typing_extensions import override

from keras_natgrad.optimizers import KFAC
from keras_natgrad.step import Spring
from keras_natgrad.training.train_step import curvature_optimizer

try:
    import keras_tuner

    # Keras Tuner imports it in every trial but does not require it, and
    # TensorFlow no longer does either.
    import tensorboard  # noqa: F401
except ImportError as error:
    raise ImportError(
        "keras_natgrad.tuner needs keras-tuner and tensorboard: "
        "`pip install keras_natgrad[tuner]`. "
        f"Received: {error}"
    ) from error


def search_space(hp: Any, prefix: str = "kfac_", **arguments: Any) -> KFAC:
    """Returns a `KFAC` whose arguments are hyper-parameters of a search.

    The search covers these arguments, with the defaults of `KFAC`:

    | argument | values |
    | --- | --- |
    | `block` | auto, kronecker, input_factor, diagonal |
    | `weight_sharing` | expand, reduce |
    | `damping` | auto, or a constant from 1e-6 to 1, log scale |
    | `momentum` | auto, or fixed or `Spring`, from 0.5 to 0.95 |
    | `factor_decay` | 0.8, 0.9, 0.95, 0.98, 0.99 |
    | `curvature_update_period` | 1, 5, 10, 20 |
    | `inverse_update_period` | 10, 20, 50, 100 |

    The optimizer is not attached; `NaturalGradientHyperModel` does that.

    Args:
        hp: The `keras_tuner.HyperParameters` of the trial.
        prefix: Prefix of the names of the hyper-parameters. Defaults to
            `"kfac_"`.
        **arguments: Arguments of `KFAC` that are not searched; they may be your
            own hyper-parameters.

    Returns:
        A `KFAC`.

    Raises:
        ValueError: If `hp` or `prefix` has the wrong type.

    Example:

    ```python
    def build(hp):
        model = keras.Sequential([...])
        rate = hp.Float("rate", 1e-3, 1.0, sampling="log")
        optimizer = keras_natgrad.tuner.search_space(
            hp, weight_sharing="expand", learning_rate=rate
        )
        model.compile(optimizer.attach(model), loss="mse")
        return model
    ```
    """
    if not isinstance(hp, keras_tuner.HyperParameters):
        raise ValueError(
            "`hp` must be the keras_tuner.HyperParameters that a tuner passes "
            f"to `build(hp)`. Received: hp={hp!r}"
        )
    if not isinstance(prefix, str):
        raise ValueError(
            f"`prefix` must be a string. Received: prefix={prefix!r}"
        )
    for name, values, default in _CHOICES:
        if name not in arguments:
            arguments[name] = hp.Choice(prefix + name, values, default=default)
    for name, choose in (("damping", _damping), ("momentum", _momentum)):
        if name not in arguments:
            arguments[name] = choose(hp, prefix + name)
    return KFAC(**arguments)


#: Arguments that are chosen from a list: name, values, default of `KFAC`.
_CHOICES: tuple[tuple[str, list[Any], Any], ...] = (
    ("block", ["auto", "kronecker", "input_factor", "diagonal"], "auto"),
    ("weight_sharing", ["expand", "reduce"], "expand"),
    # Averages over 1 / (1 − β) = 5, 10, 20, 50, 100 updates.
    ("factor_decay", [0.8, 0.9, 0.95, 0.98, 0.99], 0.95),
    ("curvature_update_period", [1, 5, 10, 20], 10),
    ("inverse_update_period", [10, 20, 50, 100], 50),
)


# A conditional scope must be entered even if it is inactive, so that a tuner
# finds the parameters in it; their value is then `None`.


def _damping(hp: Any, name: str) -> str | float:
    mode = hp.Choice(name, ["auto", "constant"])
    with hp.conditional_scope(name, ["constant"]):
        value = hp.Float(
            f"{name}_constant", 1e-6, 1.0, sampling="log", default=1e-3
        )
    return value if mode == "constant" else "auto"


def _momentum(hp: Any, name: str) -> str | float | Spring:
    mode = hp.Choice(name, ["auto", "fixed", "spring"])
    with hp.conditional_scope(name, ["fixed", "spring"]):
        value = hp.Float(f"{name}_value", 0.5, 0.95, default=0.9)
    if mode == "spring":
        return Spring(value)
    return value if mode == "fixed" else "auto"


class NaturalGradientHyperModel(keras_tuner.HyperModel):
    """Gives the models of any hyper-model an optimizer that is searched.

    Each model is compiled again with the new optimizer and its own loss,
    metrics, weights and other settings; an optimizer of this package is
    attached. The optimizer's state exists before weights are loaded, so the
    later rounds of `keras_tuner.Hyperband` and `get_best_models` continue with
    the saved curvature.

    Args:
        build: A function of `hp` that returns a compiled `keras.Model`, or a
            `keras_tuner.HyperModel`, whose `fit` is kept.
        optimizer: A function of `hp` that returns a Keras optimizer. Defaults
            to `search_space`.
        head: Passed to `attach`.
        exclude: Passed to `attach`.
        name: Name of the hyper-model.
        tunable: Whether its hyper-parameters are added to the search space.

    Raises:
        ValueError: If `build` or `optimizer` is not a function, or returns
            something else; if the model's class overrides `compile`, or a
            metric is not registered with Keras.

    Example:

    ```python
    hypermodel = keras_natgrad.tuner.NaturalGradientHyperModel(build)
    tuner = keras_tuner.Hyperband(hypermodel, "val_loss", max_epochs=9)
    tuner.search(x, y, validation_split=0.2)
    model = tuner.get_best_models()[0]
    ```
    """

    def __init__(
        self,
        build: Any,
        optimizer: Callable[[Any], Any] | None = None,
        head: Any = None,
        exclude: Sequence[Any] = (),
        name: str | None = None,
        tunable: bool = True,
    ) -> None:
        super().__init__(name=name, tunable=tunable)
        is_model = isinstance(build, keras_tuner.HyperModel)
        if not is_model and not callable(build):
            raise ValueError(
                "`build` must be a function of `hp` or a "
                f"keras_tuner.HyperModel. Received: build={build!r}"
            )
        if optimizer is not None and not callable(optimizer):
            raise ValueError(
                "`optimizer` must be a function of `hp` that returns a Keras "
                f"optimizer. Received: optimizer={optimizer!r}"
            )
        self.hypermodel = build if is_model else None
        self.build_model = build.build if is_model else build
        self.build_optimizer = optimizer or search_space
        self.head = head
        self.exclude = exclude

    @override
    def build(self, hp: Any) -> keras.Model:
        """Returns the model of `build`, compiled with the new optimizer.

        Args:
            hp: The `keras_tuner.HyperParameters` of the trial.
        """
        model = self.build_model(hp)
        arguments = _compile_arguments(model)
        optimizer = self.build_optimizer(hp)
        if not isinstance(optimizer, keras.optimizers.Optimizer):
            raise ValueError(
                "`optimizer(hp)` must return a Keras optimizer. "
                f"Received: {optimizer!r}"
            )
        own = curvature_optimizer(optimizer)
        if own is not None:
            own.attach(model, head=self.head, exclude=self.exclude)
        model.compile(**{**arguments, "optimizer": optimizer})
        if model.built:
            model.optimizer.build(model.trainable_variables)
        return model

    @override
    def declare_hyperparameters(self, hp: Any) -> None:
        """Declares the hyper-parameters of the wrapped hyper-model."""
        if self.hypermodel is not None:
            self.hypermodel.declare_hyperparameters(hp)

    @override
    def fit(self, hp: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        """Trains the model with the `fit` of the wrapped hyper-model."""
        if self.hypermodel is not None:
            return self.hypermodel.fit(hp, model, *args, **kwargs)
        return super().fit(hp, model, *args, **kwargs)


def _compile_arguments(model: Any) -> dict[str, Any]:
    """Returns what a model was compiled with, apart from its optimizer."""
    if not isinstance(model, keras.Model) or not model.compiled:
        raise ValueError(
            "`build(hp)` must return a compiled keras.Model. "
            f"Received: {model!r}"
        )
    if type(model).compile is not keras.Model.compile:
        raise ValueError(
            "The model's class overrides `compile`, so Keras cannot compile it "
            "again: use `search_space(hp)` in `build`, without this wrapper. "
            f"Received: model={model!r}"
        )
    config = model.get_compile_config()
    # The loss need not be registered with Keras.
    for name in ("optimizer", "loss"):
        config.pop(name)
    try:
        arguments = keras.saving.deserialize_keras_object(config)
    except (TypeError, ValueError) as error:
        raise ValueError(
            "The model cannot be compiled again with its metrics: your own "
            "metrics must be classes or functions registered by "
            f"`keras.saving.register_keras_serializable`. Received: {error}"
        ) from error
    return {**arguments, "loss": getattr(model, "loss", None)}
