"""What users are told of layers that are not captured."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from keras_natgrad.capture import Plan
from keras_natgrad.capture.eligibility import can_be_described


def warn_of_plan(plan: Plan, variables: Sequence[Any]) -> None:
    """Warns of the variables that get a fallback block, all in one."""
    if not plan.fallback:
        return
    names = ", ".join(
        f"{variables[index].path} ({reason})"
        for index, reason in zip(plan.fallback, plan.reasons, strict=True)
    )
    advice = ""
    if any(can_be_described(reason) for reason in plan.reasons):
        advice = (
            " Teach the optimizer layers that it does not know with "
            "`keras_natgrad.register_layer`."
        )
    warnings.warn(
        "These variables have no captured linear map and get the fallback "
        f"block: {names}.{advice}",
        stacklevel=5,
    )
