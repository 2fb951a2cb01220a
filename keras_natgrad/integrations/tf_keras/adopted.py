"""The Keras 3 optimizer on the variables of a tf_keras model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf
from typing_extensions import override

from keras_natgrad._compat import flatten_layers, optimizer_variables
from keras_natgrad.capture import Plan
from keras_natgrad.curvature import BlockCurvature
from keras_natgrad.integrations.tf_keras.layers import l2_regularizers
from keras_natgrad.optimizers import kfac


class AdoptedKFAC(kfac.KFAC):
    """`keras_natgrad.KFAC` whose model is one of tf_keras.

    Its variables are `keras.Variable`s that share their values with the model's
    `tf.Variable`s.
    """

    @property
    def plan(self) -> Plan | None:
        """The plan of the layers, once known."""
        return self.attachment.plan

    def take_plan(self, plan: Plan) -> None:
        """Takes the plan of a saved optimizer."""
        self.attachment.plan = plan

    @property
    def is_attached(self) -> bool:
        """Whether there is a model."""
        return self.attachment.is_alive

    def adopt(self, variables: Sequence[tf.Variable]) -> None:
        """Builds the state for the variables of a model.

        Args:
            variables: The trainable variables.
        """
        adopted = [
            keras.Variable(
                variable,
                name=variable.name.split(":")[0].replace("/", "_"),
                trainable=True,
            )
            for variable in variables
        ]
        if self.is_attached:
            self._note_regularizers(self.attached_model(), adopted)
        self.build(adopted)

    @override
    def model_variables(self, variables: Sequence[Any]) -> list[Any]:
        return [variable.value for variable in variables]

    @override
    def take_model(
        self, model: Any, head: Any, exclude: Sequence[Any] | None
    ) -> None:
        super().take_model(model, head, exclude)
        if self.engine.is_built:
            variables = optimizer_variables(self)
            self._note_regularizers(model, variables)
            direction = self.engine.direction
            assert isinstance(direction, BlockCurvature)
            direction.note_ridge()

    def _note_regularizers(self, model: Any, variables: Sequence[Any]) -> None:
        """Gives the variables their L2 regularizers, for the curvature."""
        found = l2_regularizers(flatten_layers(model))
        for variable in variables:
            variable.regularizer = found.get(variable.value.ref())
