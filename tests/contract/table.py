"""The table of docs/keras_contract.md: what works and what is refused.

    python -m tests.contract.table

writes the page anew. Each cell is a test of `test_contract.py`.
"""

from pathlib import Path

import keras_natgrad as kng
from tests.contract.features import FEATURES_IN_ORDER


def preset(optimizer, **defaults):
    """Returns a constructor with other defaults."""
    return lambda **kwargs: optimizer(**{**defaults, **kwargs})


# Small networks and few steps ask for larger rates than the defaults.
OPTIMIZERS = {
    "KFAC": kng.KFAC,
    "NaturalGradient": kng.NaturalGradient,
    "RNGD": preset(kng.RNGD, learning_rate=0.3, relative_damping=0.01),
    "PRONG": preset(kng.PRONG, learning_rate=0.3),
}

# Other arguments of the same optimizers, which the page leaves out.
VARIANTS = {
    "KFAC, line search": preset(
        kng.KFAC,
        learning_rate=kng.LineSearch(),
        momentum=kng.Spring(0.5),
        damping=0.01,
    ),
    "kernel": preset(
        kng.NaturalGradient,
        learning_rate=0.5,
        damping=0.1,
        solver="kernel",
        momentum=0.5,
    ),
    "conjugate gradients": preset(
        kng.NaturalGradient,
        learning_rate=0.5,
        damping=0.1,
        solver=kng.solvers.ConjugateGradient(20, preconditioner="kronecker"),
    ),
    "line search": preset(kng.NaturalGradient, learning_rate=kng.LineSearch()),
    "RNGD, far": preset(
        kng.RNGD,
        learning_rate=0.3,
        damping=0.01,
        horizon=2,
        momentum=0.5,
        identity_start=True,
    ),
    "PRONG, momentum": preset(
        kng.PRONG,
        learning_rate=0.2,
        momentum=0.5,
        damping=0.1,
        relative_damping=False,
        curvature_update_period=1,
    ),
}

# What an optimizer refuses, and the sentence it does so with.
REFUSALS: dict[tuple[str, str], str] = {
    ("NaturalGradient", "mirrored_strategy"): (
        "NaturalGradient with an exact solver does not run on 2 replicas"
    ),
}

INTRODUCTION = """\
# What works in Keras

Every cell is a test (`tests/contract`), run for each optimizer of the package:
"yes" where the feature works as with an optimizer of Keras, otherwise the
sentence that the optimizer refuses it with. The page is written by
`python -m tests.contract.table`.
"""


def path() -> Path:
    """Return where the page is."""
    return Path(__file__).resolve().parents[2] / "docs" / "keras_contract.md"


def document() -> str:
    """Return the page."""
    lines = [INTRODUCTION]
    header = " | ".join(OPTIMIZERS)
    for title, features in FEATURES_IN_ORDER.items():
        lines += [f"## {title}", ""]
        lines += [f"| | {header} |", "| --- |" + " --- |" * len(OPTIMIZERS)]
        for feature in features:
            cells = [
                REFUSALS.get((name, feature.__name__), "yes")
                for name in OPTIMIZERS
            ]
            row = " | ".join([feature.__doc__, *cells])
            lines.append(f"| {row} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    path().write_text(document(), encoding="utf-8")
