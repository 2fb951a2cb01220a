"""Every optimizer of the package against every feature of Keras."""

import pytest

from tests.contract.features import FEATURES_IN_ORDER, FEATURES_OF_VARIANTS
from tests.contract.table import OPTIMIZERS, REFUSALS, VARIANTS

CELLS = [
    pytest.param(make, feature, name, id=f"{name}-{feature.__name__}")
    for features in FEATURES_IN_ORDER.values()
    for feature in features
    for name, make in OPTIMIZERS.items()
]
# What no other test of the default run covers, once.
DEFAULT_RUN = (
    *(f"{name}-configuration" for name in OPTIMIZERS),
    "KFAC-two_models",
    "NaturalGradient-default_arguments",
    "NaturalGradient-bad_data",
    "NaturalGradient-logs",
    "NaturalGradient-state_tree",
    "NaturalGradient-not_attached",
    "NaturalGradient-mirrored_strategy",
    "RNGD-weight_decay",
    "RNGD-loss_scale_factor",
    "RNGD-several_optimizers",
    "RNGD-summary",
    "PRONG-learning_rate_schedule",
    "PRONG-changed_learning_rate",
    "PRONG-average_of_weights",
    "PRONG-steps_per_execution",
    "PRONG-own_loop",
    "PRONG-partial_batches",
    "PRONG-saved_model_file",
    "PRONG-checkpoints",
    "PRONG-orbax",
    "PRONG-subclassed",
    "PRONG-embeddings",
    "PRONG-regularizers",
)
CELLS_OF_VARIANTS = [
    pytest.param(make, feature, id=f"{name}-{feature.__name__}")
    for feature in FEATURES_OF_VARIANTS
    for name, make in VARIANTS.items()
]


@pytest.mark.variants(*DEFAULT_RUN)
@pytest.mark.filterwarnings("ignore:These variables")
@pytest.mark.parametrize(("make", "feature", "name"), CELLS)
def test_cell(make, feature, name, tmp_path):
    refusal = REFUSALS.get((name, feature.__name__))
    if refusal is None:
        feature(make, tmp_path)
        return
    with pytest.raises(ValueError, match=refusal):
        feature(make, tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:These variables")
@pytest.mark.parametrize(("make", "feature"), CELLS_OF_VARIANTS)
def test_cell_of_other_arguments(make, feature, tmp_path):
    feature(make, tmp_path)
