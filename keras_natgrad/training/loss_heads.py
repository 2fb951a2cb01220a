"""What represents each loss in the curvature: a head, or a fallback."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from keras_natgrad import heads, replicas
from keras_natgrad._compat import declared_losses
from keras_natgrad.curvature import OutputTerm
from keras_natgrad.heads import tensors
from keras_natgrad.heads.losses import find_head
from keras_natgrad.heads.observed import ObservedLoss, observe_loss
from keras_natgrad.heads.surrogates import Surrogate, find_surrogate

_HOW_TO_GIVE_A_HEAD = (
    "The gradient is that of the loss. For an exact Fisher write "
    "`optimizer.attach(model, head=keras_natgrad.heads.<Head>(...))`, use "
    "loss=keras_natgrad.losses.NegativeLogLikelihood(head), or register the "
    "loss with `keras_natgrad.heads.register_loss`."
)


@dataclass(frozen=True)
class LossHead:
    """How the Fisher of one loss is found.

    Attributes:
        loss: The Keras loss.
        name: Name of its output.
        head: The loss's head, the surrogate's head, or `ObservedLoss`.
        weight: The weight for an exact head.
        surrogate: The surrogate, if one is used.
        observed: Whether the empirical Fisher was requested.
        size: Size of the last axis of the outputs, or `None`.
    """

    loss: Any
    name: str
    head: heads.Head
    weight: heads.LossWeight | None = None
    surrogate: Surrogate | None = None
    observed: bool = False
    size: int | None = None

    @property
    def exact(self) -> bool:
        """Whether the loss is the negative log-likelihood of the head."""
        return self.weight is not None

    @property
    def loss_name(self) -> str:
        """Name of the loss."""
        return str(_name_of(self.loss))

    def row(self) -> tuple[str, str, str]:
        """Returns output, head and how its Fisher is found, as text."""
        head = repr(self.head)
        if isinstance(self.head, ObservedLoss):
            head = self.loss_name
        return self.name, head, self.describe()

    def describe(self) -> str:
        """Says in words how the Fisher is found."""
        if self.surrogate is not None:
            kind = type(self.head).__name__
            return f"surrogate: {kind} for {self.loss_name}"
        if self.observed:
            return ObservedLoss().describe_fisher()
        return self.head.describe_fisher(self.size)

    def term(
        self, outputs: Any, targets: Any, sample_weight: Any, mask: Any
    ) -> OutputTerm:
        """Returns the part of this loss in the curvature of one batch."""
        if self.weight is not None:
            self.head.validate(tuple(outputs.shape))
            counted = self.weight.target_mask(outputs, targets)
            if counted is not None:
                # Labels of the ignored class may be outside the support.
                mask = counted if mask is None else counted & mask
                targets = tf.reshape(targets, tf.shape(counted))
                targets = tf.where(counted, targets, tf.zeros_like(targets))
            coefficients = self.weight.coefficients(
                outputs, sample_weight, mask
            )
            if self.weight.open_scale:
                return _at_scale_of_errors(
                    outputs, self.head, coefficients, targets
                )
            return OutputTerm(outputs, self.head, coefficients, targets)
        if self.surrogate is not None:
            parameters, coefficients = self.surrogate.term(
                outputs, targets, sample_weight, mask
            )
            self.head.validate(tuple(parameters.shape))
            # The loss itself decides which targets it supports.
            return OutputTerm(parameters, self.head, coefficients)
        values, coefficients = observe_loss(
            self.loss, outputs, targets, sample_weight, mask
        )
        return OutputTerm(values, self.head, coefficients, tf.ones_like(values))


def _at_scale_of_errors(
    outputs: tf.Tensor, head: heads.Head, coefficients: tf.Tensor, targets: Any
) -> OutputTerm:
    """Returns the term of a loss that leaves the scale of the errors open.

    The sum `Σ c |y − η|` of absolute errors is the negative log-likelihood of
    the Laplace distribution of any scale s, weighted by `c s`, up to a
    constant; its Fisher is `c / s`. The most likely s is the mean of the
    absolute errors. With a fixed s the Fisher of a loss whose slope is ±1 would
    not grow as the errors fall, so steps would not get shorter.

    Args:
        outputs: Tensor `[batch, ..., K]`, η.
        head: The head, of scale one.
        coefficients: Tensor `[batch, ...]`, c.
        targets: Tensor, y.
    """
    targets = tensors.match_targets(outputs, targets)
    errors = tf.reduce_mean(tf.abs(targets - outputs), axis=-1)
    # A mask may hide values that are not finite.
    counted = tf.where(coefficients > 0, coefficients * errors, 0.0)
    total, weight = (
        replicas.sum_over_replicas(tf.reduce_sum(each))
        for each in (counted, coefficients)
    )
    scale = tf.math.divide_no_nan(total, weight)
    scale = tf.stop_gradient(tf.maximum(scale, keras.config.epsilon()))
    return OutputTerm(
        outputs / scale, head, coefficients * scale, targets / scale
    )


def choose(
    loss: Any,
    name: str,
    head: Any,
    shape: tuple[int | None, ...] | None,
    observed: bool = False,
) -> LossHead:
    """Finds what represents a loss.

    It tries, in this order: the head that the user gave, the head whose
    negative log-likelihood the loss is, a surrogate, and the empirical Fisher
    of the loss itself. If the empirical Fisher was requested (`observed`), no
    surrogate is needed.

    Args:
        loss: The Keras loss.
        name: Name of its output.
        head: Head that the user gave, or `None`.
        shape: Static shape of the outputs, or `None`.
        observed: Whether the optimizer uses the empirical Fisher.

    Raises:
        ValueError: If a head does not fit the loss or the output.
    """
    size = None if shape is None else shape[-1]
    make = functools.partial(LossHead, loss, name, size=size)
    if head is not None:
        # The reduction is that of the loss; as for every head, it reduces one
        # value per position.
        reduction = getattr(loss, "reduction", "sum_over_batch_size")
        weight = heads.LossWeight(reduction=reduction)
        return make(heads.get(head), weight, observed=observed)
    found = find_head(loss, shape)
    if found is not None:
        return make(*found, observed=observed)
    surrogate = None if observed else find_surrogate(loss, shape)
    if surrogate is not None:
        return make(surrogate.head, surrogate=surrogate)
    return make(ObservedLoss(), observed=observed)


def declared_rows(
    model: keras.Model, head: Any, observed: bool
) -> list[tuple[str, str, str]]:
    """Returns output, head and how its Fisher is found, before training.

    Args:
        model: The model; without a compiled loss the result is empty.
        head: What `attach` was given.
        observed: Whether the optimizer uses the empirical Fisher.
    """
    rows = []
    for path, loss, shape in declared_losses(model):
        name = output_name(path)
        if shape is None and loss in ("crossentropy", "ce"):
            rows.append((name, loss, "known after the first step"))
            continue
        choice = choose(loss, name, head_of(head, path), shape, observed)
        rows.append(choice.row())
    return rows


def warn_of_fallbacks(choices: Sequence[LossHead]) -> None:
    """Warns about losses whose Fisher is not that of a head."""
    parts = []
    for choice in choices:
        if choice.exact or choice.observed:
            continue
        if choice.surrogate is not None:
            instead = f"the Fisher of {choice.head!r}, a surrogate"
        else:
            instead = "the empirical Fisher of the loss itself"
        parts.append(f"{choice.loss_name!r} of {choice.name!r}, {instead}")
    if parts:
        warnings.warn(
            "No head has these losses as its negative log-likelihood. Instead "
            f"of its Fisher the optimizer uses, for {'; for '.join(parts)}. "
            f"{_HOW_TO_GIVE_A_HEAD}",
            stacklevel=3,
        )


def _name_of(loss: Any) -> Any:
    if isinstance(loss, str):
        return loss
    return (
        getattr(loss, "name", None)
        or getattr(loss, "__name__", None)
        or repr(loss)
    )


def output_name(path: tuple[Any, ...]) -> str:
    """Names an output by the keys that lead to it."""
    return "/".join(str(key) for key in path) or "output"


def head_of(head: Any, path: tuple[Any, ...]) -> Any:
    """Returns the head of one output from those given to `attach`."""
    if isinstance(head, (list, tuple, dict)):
        for key in path:
            head = head[key]
    return head
