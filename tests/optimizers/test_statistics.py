"""What the optimizer tells about itself."""

import csv

import keras
import pytest

import keras_natgrad as kng
from tests.reference.unknown import Unknown
from tests.training.networks import compiled, data, mlp

KEYS = {
    "damping",
    "reduction_ratio",
    "model_change",
    "learning_rate",
    "momentum",
    "batches",
    "curvature_updates",
    "refreshes",
    "retries",
    "failures",
    "skipped",
}


def test_statistics():
    x, y = data()
    model = compiled()
    assert model.optimizer.statistics == {}
    model.train_on_batch(x, y)
    statistics = model.optimizer.statistics
    assert set(statistics) >= KEYS
    assert statistics["damping"] > 0
    assert statistics["model_change"] < 0
    assert statistics["batches"] == statistics["curvature_updates"] == 1
    assert statistics["skipped"] == statistics["failures"] == 0
    assert all(isinstance(v, (int, float)) for v in statistics.values())


@pytest.mark.variants("True")
@pytest.mark.parametrize("run_eagerly", [True, False])
def test_logged_by_fit(run_eagerly, tmp_path):
    x, y = data()
    optimizer = kng.KFAC(log_statistics=True, name="mine")
    model = compiled(
        optimizer=optimizer, metrics=["accuracy"], run_eagerly=run_eagerly
    )
    logger = keras.callbacks.CSVLogger(tmp_path / "log.csv")
    history = model.fit(x, y, epochs=3, verbose=0, callbacks=[logger]).history
    names = {f"mine_{key}" for key in optimizer.statistics}
    assert set(history) == {"loss", "accuracy"} | names
    assert history["mine_batches"] == [1, 2, 3]
    for key, value in optimizer.statistics.items():
        assert history[f"mine_{key}"][-1] == pytest.approx(value, rel=1e-6)
    with open(tmp_path / "log.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3
    assert names <= set(rows[0])
    assert float(rows[2]["mine_batches"]) == 3


def test_not_logged_unless_asked_for():
    x, y = data()
    history = compiled().fit(x, y, verbose=0).history
    assert set(history) == {"loss"}


def summary_of(model, **kwargs):
    lines = []
    optimizer = kng.KFAC(**kwargs).attach(model)
    optimizer.summary(print_fn=lines.append)
    return "\n".join(lines)


def test_summary():
    text = summary_of(mlp())
    assert "dense" in text and "(Dense)" in text
    assert "kronecker" in text and "5 × 5" in text
    assert "43 of 43 (100.0%)" in text
    assert "Curvature memory" in text and "B" in text


def test_summary_of_fallbacks():
    model = keras.Sequential(
        [
            keras.Input((4,)),
            Unknown(name="norm"),
            keras.layers.Dense(3),
        ]
    )
    with pytest.warns(UserWarning, match="norm"):
        text = summary_of(model)
    assert "fallback" in text and "Unknown" in text
    assert "23 of 23" in text and "captured 65.2%" in text


def test_summary_prints(capsys):
    model = mlp()
    optimizer = kng.KFAC().attach(model)
    optimizer.summary()
    assert "Curvature blocks" in capsys.readouterr().out


def test_summary_after_training_and_after_attaching_only():
    x, y = data()
    model = compiled()
    before = []
    model.optimizer.summary(print_fn=before.append)
    model.train_on_batch(x, y)
    after = []
    model.optimizer.summary(print_fn=after.append)
    assert before == after


def test_summary_without_a_model():
    with pytest.raises(ValueError, match="not attached"):
        kng.KFAC().summary()


def test_model_summary_counts_the_state(capsys):
    x, y = data()
    model = compiled()
    model.train_on_batch(x, y)
    model.summary()
    assert "Optimizer params" in capsys.readouterr().out
