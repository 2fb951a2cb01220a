"""The code of docs/layers.md runs as it stands."""

import numpy as np
import pytest

import keras_natgrad as kng
from tests.docs_code import ROOT, blocks_of_page


@pytest.fixture
def names(monkeypatch):
    """What the blocks define, after they have run in order."""
    registry = kng.capture.registry
    monkeypatch.setattr(registry, "_LAYERS", dict(registry._LAYERS))
    names = {}
    for block in blocks_of_page(ROOT / "docs" / "layers.md"):
        block.run(names)
    return names


def test_your_own_layer(names):
    """The gradient by hand: `Σ patchesᵀ 2z`."""
    x = np.asarray(names["x"]).reshape(5, 2, 12)
    w = np.asarray(names["layer"].w)
    expected = 2 * np.einsum("bsn,bsm->nm", x, x @ w)
    np.testing.assert_allclose(names["found"], expected, rtol=1e-4, atol=1e-4)
    assert names["g"].shape == (5, 2, 2)


def test_your_own_layer_trains(names):
    keras = names["keras"]
    model = keras.Sequential(
        [
            keras.Input((6, 4)),
            names["PatchDense"](3, 2),
            keras.layers.GlobalAveragePooling1D(),
            keras.layers.Dense(1),
        ]
    )
    optimizer = kng.KFAC().attach(model)
    model.compile(optimizer, loss="mse", run_eagerly=True)
    x = np.random.default_rng(0).normal(size=(16, 6, 4)).astype("float32")
    y = x.mean((1, 2))[:, None]
    losses = [float(model.train_on_batch(x, y)) for _ in range(6)]
    assert losses[-1] < 0.5 * losses[0]
    assert optimizer.curvature.plan.fallback == ()


def test_choosing_blocks(names):
    config = names["optimizer"].get_config()
    assert list(config["block"]) == ["logits", "*/attention/*", "Dense"]
    assert config["weight_sharing"] == {"conv*": "reduce"}
