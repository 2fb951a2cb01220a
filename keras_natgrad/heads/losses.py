"""The heads of Keras losses."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import keras

from keras_natgrad._compat import loss_options
from keras_natgrad.heads.base import Head
from keras_natgrad.heads.bernoulli import Bernoulli
from keras_natgrad.heads.categorical import Categorical
from keras_natgrad.heads.counts import Poisson
from keras_natgrad.heads.location_scale import Laplace
from keras_natgrad.heads.loss_weight import LossWeight
from keras_natgrad.heads.normal import Normal
from keras_natgrad.heads.robust import Huber, HyperbolicSecant, Log1pNormal

Converter = Callable[[Any], tuple[Head, LossWeight]]

# `compile()` wraps loss functions in it; Keras does not export it.
_LossFunctionWrapper = keras.losses.MeanSquaredError.__base__

# Functions that have a class with the same meaning and arguments.
_CLASSES: dict[Any, type] = {
    keras.losses.mean_squared_error: keras.losses.MeanSquaredError,
    keras.losses.mean_absolute_error: keras.losses.MeanAbsoluteError,
    keras.losses.mean_absolute_percentage_error: (
        keras.losses.MeanAbsolutePercentageError
    ),
    keras.losses.mean_squared_logarithmic_error: (
        keras.losses.MeanSquaredLogarithmicError
    ),
    keras.losses.huber: keras.losses.Huber,
    keras.losses.log_cosh: keras.losses.LogCosh,
    keras.losses.cosine_similarity: keras.losses.CosineSimilarity,
    keras.losses.poisson: keras.losses.Poisson,
    keras.losses.kl_divergence: keras.losses.KLDivergence,
    keras.losses.binary_crossentropy: keras.losses.BinaryCrossentropy,
    keras.losses.binary_focal_crossentropy: (
        keras.losses.BinaryFocalCrossentropy
    ),
    keras.losses.categorical_crossentropy: (
        keras.losses.CategoricalCrossentropy
    ),
    keras.losses.categorical_focal_crossentropy: (
        keras.losses.CategoricalFocalCrossentropy
    ),
    keras.losses.sparse_categorical_crossentropy: (
        keras.losses.SparseCategoricalCrossentropy
    ),
    keras.losses.hinge: keras.losses.Hinge,
    keras.losses.squared_hinge: keras.losses.SquaredHinge,
    keras.losses.categorical_hinge: keras.losses.CategoricalHinge,
    keras.losses.dice: keras.losses.Dice,
    keras.losses.tversky: keras.losses.Tversky,
    keras.losses.ctc: keras.losses.CTC,
}


# Changed only by `register_loss()`, like the registry of Keras's objects.
_CONVERTERS: dict[Any, Converter] = {
    # (y - μ)² = -log N(y | μ, ½) + const.
    keras.losses.MeanSquaredError: lambda loss: (
        Normal(scale=0.5**0.5),
        LossWeight(units="mean"),
    ),
    # |y - μ| = -s log Laplace(y | μ, s) + const, for every s.
    keras.losses.MeanAbsoluteError: lambda loss: (
        Laplace(scale=1.0),
        LossWeight(units="mean", open_scale=True),
    ),
    # (log(1 + y) - log(1 + μ))²: log(1 + y) is normal of variance ½.
    keras.losses.MeanSquaredLogarithmicError: lambda loss: (
        Log1pNormal(scale=0.5**0.5),
        LossWeight(units="mean"),
    ),
    keras.losses.Huber: lambda loss: (
        Huber(scale=1.0, delta=float(loss_options(loss)["delta"])),
        LossWeight(units="mean"),
    ),
    # log cosh(y - μ) = -log sech(y - μ).
    keras.losses.LogCosh: lambda loss: (
        HyperbolicSecant(scale=1.0),
        LossWeight(units="mean"),
    ),
    # λ - y log λ = -log Poisson(y | λ) + const; the outputs are rates, which
    # the link raises to ε. (Keras adds ε within the logarithm.)
    keras.losses.Poisson: lambda loss: (
        Poisson(rate="identity"),
        LossWeight(units="mean"),
    ),
    # Σ y log(y / p) is the cross-entropy of soft targets, up to a constant, if
    # outputs sum to one: Keras does not normalise p, the head does.
    keras.losses.KLDivergence: lambda loss: (
        Categorical(from_logits=False, sparse=False),
        LossWeight(),
    ),
    keras.losses.BinaryCrossentropy: lambda loss: (
        Bernoulli(loss.from_logits),
        LossWeight(units="mean"),
    ),
    keras.losses.CategoricalCrossentropy: lambda loss: (
        Categorical(loss.from_logits, sparse=False),
        LossWeight(),
    ),
    keras.losses.SparseCategoricalCrossentropy: lambda loss: (
        Categorical(loss.from_logits, sparse=True),
        LossWeight(ignore_class=loss.ignore_class),
    ),
}


def register_loss(
    loss_class_or_function: Any, converter: Converter
) -> Converter:
    """Registers the head of a loss, so models compiled with it need no head.

    Subclasses of a registered class must be registered themselves: they may
    compute something else.

    Args:
        loss_class_or_function: A subclass of `keras.losses.Loss`, or a
            function of `(y_true, y_pred)`.
        converter: Function that is called with the loss (an instance of the
            class, or the function) and returns a pair of the `Head` and the
            `LossWeight`. The reduction of the weight is filled in from the
            loss. A later registration replaces an earlier one.

    Returns:
        The converter.

    Raises:
        ValueError: If the first argument is not a class or a function.

    Example:

    ```python
    def half_squared_error(y_true, y_pred):
        return 0.5 * keras.ops.sum((y_true - y_pred) ** 2, axis=-1)


    def convert(loss):
        head = keras_natgrad.heads.Normal(scale=1.0)
        return head, keras_natgrad.heads.LossWeight(units="sum")


    keras_natgrad.heads.register_loss(half_squared_error, convert)
    ```
    """
    if not callable(loss_class_or_function) or isinstance(
        loss_class_or_function, keras.losses.Loss
    ):
        raise ValueError(
            "Register the class or the function of a loss, not an instance or "
            "a name. Received: loss_class_or_function="
            f"{loss_class_or_function!r}"
        )
    _CONVERTERS[loss_class_or_function] = converter
    return converter


def from_loss(
    loss: Any, outputs_shape: Sequence[int | None] | None = None
) -> tuple[Head, LossWeight]:
    """Finds the head whose negative log-likelihood a Keras loss is.

    The head models one unit; the weight holds everything else:

    ```
    loss(targets, outputs, sample_weight)
        = Σ_i c_i (-head.log_prob(outputs, targets)_i) + const,
    c = weight.coefficients(outputs, sample_weight)
    ```

    | Loss                     | Head                        | Units |
    |--------------------------|-----------------------------|-------|
    | mean_squared_error       | `Normal(scale=√½)`          | mean  |
    | mean_absolute_error      | `Laplace(scale=1.0)`        | mean  |
    | mean_squared_log…_error  | `Log1pNormal(scale=√½)`     | mean  |
    | huber                    | `Huber(scale=1.0, delta)`   | mean  |
    | log_cosh                 | `HyperbolicSecant(1.0)`     | mean  |
    | poisson                  | `Poisson("identity")`       | mean  |
    | kl_divergence            | `Categorical(False)`        | sum   |
    | binary_crossentropy      | `Bernoulli(from_logits)`    | mean  |
    | categorical_crossentropy | `Categorical(from_logits)`  | sum   |
    | sparse_…_crossentropy    | `Categorical(from_logits)`  | sum   |
    | `NegativeLogLikelihood`  | its head                    | sum   |

    The targets must have the rank that the head documents. Label smoothing
    changes the targets, not the head. For losses of probabilities the identity
    holds if Keras does not clip, and for `kl_divergence` if the outputs sum to
    one, as those of a softmax do: the head normalises them, but Keras does not.

    Args:
        loss: A Keras loss: a name, function, `functools.partial` of a
            function, configuration, class or instance.
        outputs_shape: Optional static shape of the outputs, to check that it
            fits the head, and to resolve the name `"crossentropy"`.

    Returns:
        A pair of the `Head` and the `LossWeight`.

    Raises:
        ValueError: If the loss is not a log-likelihood of a known head, or if
            the loss or the outputs have a form that the head does not model. An
            optimizer then trains with a surrogate or the empirical Fisher; see
            docs/heads.md.

    Example:

    >>> keras_natgrad.heads.from_loss("mse")[0]
    Normal(scale=0.7071067811865476)

    References:

    - [Martens, 2020](https://jmlr.org/papers/v21/17-678.html), section 9.
    """
    found = find_head(loss, outputs_shape)
    if found is None:
        raise ValueError(
            f"No head is known for the loss {_describe(loss)}. Pass "
            "head=keras_natgrad.heads.<Head>(...) to attach(), or use "
            "loss=keras_natgrad.losses.NegativeLogLikelihood(head)."
        )
    return found


def find_head(
    loss: Any, outputs_shape: Sequence[int | None] | None = None
) -> tuple[Head, LossWeight] | None:
    """Finds the head like `from_loss()`, or `None` if no head is known.

    Args:
        loss: As for `from_loss()`.
        outputs_shape: As for `from_loss()`.

    Returns:
        A pair of the `Head` and the `LossWeight`, or `None`.

    Raises:
        ValueError: If the loss or the outputs have a form that the head does
            not model.
    """
    shape = None if outputs_shape is None else tuple(outputs_shape)
    resolved, reduction = resolve(loss, shape)
    converter = _CONVERTERS.get(_key(resolved))
    if converter is None:
        return None
    axis = getattr(resolved, "axis", -1)
    if axis != -1 and (shape is None or axis != len(shape) - 1):
        raise ValueError(
            "Only losses over the last axis have a head. Move the classes or "
            "units to the last axis of the outputs and use axis=-1. Received: "
            f"loss={_describe(loss)} with axis={axis}, outputs_shape={shape}"
        )
    head, weight = converter(resolved)
    if shape is not None:
        head.validate(shape)
    return head, dataclasses.replace(weight, reduction=reduction)


def resolve(
    loss: Any, shape: tuple[int | None, ...] | None = None
) -> tuple[Any, str | None]:
    """Returns the loss instance or function, and its reduction.

    Args:
        loss: As for `from_loss()`.
        shape: Static shape of the outputs, for the name `"crossentropy"`.

    Returns:
        An instance for every loss of Keras, a function for any other one, or
        `None`; and the reduction.
    """
    if isinstance(loss, str) and loss.lower() in ("crossentropy", "ce"):
        loss = _crossentropy(shape)
    if isinstance(loss, (str, dict, type)):
        try:
            loss = keras.losses.get(loss)
        except (ValueError, KeyError):
            return None, None
    # As `compile()` does with a function: the sum over the batch size.
    reduction = getattr(loss, "reduction", "sum_over_batch_size")
    function, options = loss, {}
    if type(loss) is _LossFunctionWrapper:
        function, options = loss.fn, loss_options(loss)
    while isinstance(function, functools.partial) and not function.args:
        if function in _CONVERTERS:
            break
        options = {**function.keywords, **options}
        function = function.func
    if isinstance(function, keras.losses.Loss):
        return function, reduction
    if not options and callable(function) and function in _CONVERTERS:
        return function, reduction
    if callable(function) and function in _CLASSES:
        return _CLASSES[function](**options), reduction
    # For other functions, a converter would not see the options.
    return (None if options else function), reduction


def _crossentropy(shape: tuple[int | None, ...] | None) -> Any:
    """Chooses a loss for `"crossentropy"`, as `compile()` does."""
    if shape is None:
        raise ValueError(
            "The loss 'crossentropy' is binary or categorical depending on the "
            "shape of the outputs. Pass outputs_shape=..., or name the loss, "
            "e.g. 'sparse_categorical_crossentropy'. Received: "
            "outputs_shape=None"
        )
    if shape[-1] == 1:
        return keras.losses.binary_crossentropy
    # Sparse or not depends on the targets; `F` is the same.
    return keras.losses.sparse_categorical_crossentropy


def _key(loss: Any) -> Any:
    """Returns the key of a resolved loss in the registry."""
    if isinstance(loss, keras.losses.Loss):
        return type(loss)
    return loss if callable(loss) else None


def _describe(loss: Any) -> str:
    """Names a loss in an error message."""
    if isinstance(loss, keras.losses.Loss):
        return f"{type(loss).__name__}(name={loss.name!r})"
    return getattr(loss, "__name__", None) or repr(loss)
