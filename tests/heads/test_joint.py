"""Heads side by side; see the contract's tests as well."""

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_probability as tfp
from scipy.linalg import block_diag

from keras_natgrad import heads


def poisson(outputs):
    """A distribution of single numbers."""
    return tfp.distributions.Poisson(tf.exp(outputs[..., 0]))


PARTS = [
    (heads.Normal("softplus"), 4, 2),
    (heads.Categorical(), 3, 1),
    (heads.MultivariateNormalTriL(), 5, 2),
    (heads.OrderedLogistic([-1.0, 0.5]), 1, 1),
    (heads.Distribution(poisson), 1, 1),
    (heads.Joint(["poisson", "beta"], [1, 2]), 3, 2),
    (heads.VonMisesFisher(), 2, 2),
]
HEAD = heads.Joint([part[0] for part in PARTS], [part[1] for part in PARTS])
OUTPUTS = np.random.default_rng(0).normal(size=(3, 19))


def split(tensor, column):
    ends = np.cumsum([part[column] for part in PARTS])[:-1]
    return np.split(np.asarray(tensor), ends, axis=-1)


def test_fisher_is_block_diagonal():
    blocks = [
        part[0].fisher(outputs).numpy()
        for part, outputs in zip(PARTS, split(OUTPUTS, 1), strict=True)
    ]
    fisher = HEAD.fisher(OUTPUTS)
    for n in range(3):
        np.testing.assert_allclose(
            fisher[n], block_diag(*[b[n] for b in blocks]), rtol=1e-12
        )


def test_factor_products():
    rank = HEAD.factor_rank(19)
    dense = np.stack(
        [
            HEAD.fisher_factor_product(OUTPUTS, np.tile(column, (3, 1)))
            for column in np.eye(rank)
        ],
        axis=-1,
    )
    np.testing.assert_allclose(
        dense @ dense.swapaxes(-1, -2),
        HEAD.fisher(OUTPUTS),
        rtol=1e-10,
        atol=1e-12,
    )
    # One vector for all examples.
    vector = np.random.default_rng(1).normal(size=19)
    np.testing.assert_allclose(
        HEAD.fisher_factor_transpose_product(OUTPUTS, vector),
        np.einsum("nij,i->nj", dense, vector),
        rtol=1e-10,
        atol=1e-12,
    )


@pytest.mark.slow
def test_targets_lie_side_by_side():
    targets = HEAD.sample(OUTPUTS, [1, 2])
    assert targets.shape == (3, 11)
    HEAD.validate_targets(OUTPUTS, targets)
    pieces = split(targets, 2)
    total, scores = 0.0, []
    for (head, size, _), outputs, y in zip(
        PARTS, split(OUTPUTS, 1), pieces, strict=True
    ):
        y = y[..., 0] if size == 1 else y
        total += head.log_prob(outputs, y).numpy()
        scores.append(head.score(outputs, y))
    np.testing.assert_allclose(
        HEAD.log_prob(OUTPUTS, targets), total, rtol=1e-12
    )
    np.testing.assert_allclose(
        HEAD.score(OUTPUTS, targets), np.concatenate(scores, -1), rtol=1e-12
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: heads.Joint(["normal"], [1, 2]), "`sizes` must hold"),
        (lambda: heads.Joint([], []), "at least one"),
        (lambda: heads.Joint(["categorical"], [1]), "at least two"),
        (lambda: HEAD.validate((None, 18)), "takes 19 outputs"),
        (lambda: HEAD.log_prob(OUTPUTS, np.zeros([3, 9])), "places on the"),
        (
            lambda: heads.Joint(["normal", "poisson"], [1, 1]).validate_targets(
                np.zeros([1, 2]), np.array([[0.5, 0.5]])
            ),
            r"side by side: finite numbers.*; non-negative integers \(Poisson",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_equality_does_not_need_heads_that_can_be_saved():
    head = heads.Joint([heads.Distribution(poisson), "normal"], [1, 1])
    same = heads.Joint([heads.Distribution(poisson), "normal"], [1, 1])
    assert head == same and hash(head) == hash(same)
    assert head != heads.Joint(["poisson", "normal"], [1, 1])
    assert head != heads.Normal()
