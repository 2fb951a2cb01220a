"""The factor of softmax's Fisher matrix where a class is nearly certain."""

import numpy as np
import pytest

from keras_natgrad.heads import softmax

CLASSES = 5


def _exact_factor(logits):
    """`diag(√p) − p √pᵀ` in float64, with `1 − p` summed over the others."""
    odds = np.exp(logits - logits.max(axis=-1, keepdims=True))
    p = odds / odds.sum(axis=-1, keepdims=True)
    root = np.sqrt(p)
    factor = -p[:, :, None] * root[:, None, :]
    for k in range(CLASSES):
        others = np.delete(p, k, axis=-1).sum(axis=-1)
        factor[:, k, k] = root[:, k] * others
    return factor


def _certain_logits():
    """One class ahead of the others by 1 to 40: `1 − p` from 0.6 to 1e-17."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(300, CLASSES))
    ahead = logits.max(axis=-1) + np.linspace(1.0, 40.0, 300)
    logits[np.arange(300), rng.integers(CLASSES, size=300)] = ahead
    return logits.astype(np.float32)


def _columns(product, logits):
    return np.stack(
        [
            product(logits, np.tile(column, (len(logits), 1))).numpy()
            for column in np.eye(CLASSES, dtype=np.float32)
        ],
        axis=-1,
    ).astype(float)


def test_every_entry_has_full_relative_precision():
    logits = _certain_logits()
    exact = _exact_factor(logits.astype(float))
    factor = _columns(softmax.factor_product, logits)
    transposed = _columns(softmax.factor_transpose_product, logits)
    np.testing.assert_allclose(factor, exact, rtol=2e-5)
    np.testing.assert_allclose(transposed, exact.swapaxes(-1, -2), rtol=2e-5)


@pytest.mark.parametrize("logits", [[0.0] * CLASSES, [1.0, 1.0, 0, 0, 0]])
def test_ties(logits):
    logits = np.array([logits])
    exact = _exact_factor(logits)
    np.testing.assert_allclose(
        _columns(softmax.factor_product, logits), exact, atol=1e-15
    )
    np.testing.assert_allclose(
        _columns(softmax.factor_transpose_product, logits),
        exact.swapaxes(-1, -2),
        atol=1e-15,
    )
