"""The table of docs/keras_contract.md: what works and what is refused.

    python -m tests.contract.table

writes the page anew. Each cell is a test of `test_contract.py`.
"""

from pathlib import Path

import keras_natgrad as kng
from tests.contract.features import FEATURES_IN_ORDER

# Small networks and few steps ask for larger rates than the defaults.
OPTIMIZERS = {
    "KFAC": kng.KFAC,
    "NaturalGradient": kng.NaturalGradient,
    "RNGD": lambda **kw: kng.RNGD(
        **{"learning_rate": 0.1, "relative_damping": 0.1, **kw}
    ),
    "PRONG": lambda **kw: kng.PRONG(**{"learning_rate": 0.1, **kw}),
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
