"""Every optimizer of the package against every feature of Keras."""

import pytest

from tests.contract.features import FEATURES_IN_ORDER
from tests.contract.table import OPTIMIZERS, REFUSALS

# Compilation takes long; that XLA agrees is tested with other networks too.
SLOW = {"xla": pytest.mark.slow}
CELLS = [
    pytest.param(
        optimizer,
        feature,
        id=f"{optimizer}-{feature.__name__}",
        marks=SLOW.get(feature.__name__, ()),
    )
    for features in FEATURES_IN_ORDER.values()
    for feature in features
    for optimizer in OPTIMIZERS
]


@pytest.mark.variants(
    "KFAC-learning_rate_schedule",
    "NaturalGradient-weight_decay",
    "NaturalGradient-gradient_accumulation",
    "PRONG-mixed_bfloat16",
    "NaturalGradient-steps_per_execution",
    "KFAC-own_loop",
    "KFAC-saved_model_file",
    "PRONG-checkpoints",
    "PRONG-orbax",
    "KFAC-clone",
    "PRONG-subclassed",
    "NaturalGradient-embeddings",
    "PRONG-regularizers",
    "NaturalGradient-logs",
)
@pytest.mark.filterwarnings("ignore:These variables")
@pytest.mark.parametrize(("optimizer", "feature"), CELLS)
def test_cell(optimizer, feature, tmp_path):
    refusal = REFUSALS.get((optimizer, feature.__name__))
    if refusal is None:
        feature(OPTIMIZERS[optimizer], tmp_path)
        return
    with pytest.raises(ValueError, match=refusal):
        feature(OPTIMIZERS[optimizer], tmp_path)
