"""What a curvature tape asks of an optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class CurvatureReceiver(Protocol):
    """An optimizer that takes what a `CurvatureTape` records."""

    def attached_model(self) -> Any:
        """Returns the model whose layers the tape records.

        Raises:
            ValueError: If there is none.
        """

    def receive_curvature(
        self, tape: Any, gradients: Sequence[Any], variables: Sequence[Any]
    ) -> None:
        """Takes one batch's recording; its next step uses it.

        Args:
            tape: The `CurvatureTape`, after its backward pass.
            gradients: The gradient of the loss, one per variable or `None`.
            variables: `keras.Variable`s.
        """
