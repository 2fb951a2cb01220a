"""Arguments out of range, and optimizers in the wrong place."""

import keras
import pytest
import tensorflow as tf

import keras_natgrad as kng
from tests.training.networks import compiled, cross_entropy, data, mlp


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"learning_rate": "fast"}, "learning_rate='fast'"),
        ({"learning_rate": 1}, "learning_rate=1"),
        ({"damping": -1.0}, "damping=-1.0"),
        ({"damping": "small"}, "damping='small'"),
        ({"damping": None}, "damping=None"),
        ({"damping": True}, "damping=True"),
        ({"momentum": 1.0}, "momentum=1.0"),
        ({"momentum": -0.1}, "momentum=-0.1"),
        ({"momentum": "nesterov"}, "momentum='nesterov'"),
        ({"momentum": None}, "momentum=None"),
        ({"fisher": "true"}, "fisher='true'"),
        ({"block": "lattice"}, "'lattice'"),
        ({"weight_sharing": "sum"}, "weight_sharing='sum'"),
        ({"fallback": "none"}, "fallback='none'"),
        ({"factor_decay": 1.0}, "factor_decay=1.0"),
        ({"factor_decay": -0.5}, "factor_decay=-0.5"),
        ({"factor_decay": "slow"}, "factor_decay='slow'"),
        ({"norm_constraint": 0.0}, "norm_constraint=0.0"),
        ({"norm_constraint": -1.0}, "norm_constraint=-1.0"),
        ({"max_factor_size": 0}, "max_factor_size=0"),
        ({"clipnorm": 1.0, "clipvalue": 1.0}, "clipnorm"),
        ({"use_ema": True, "ema_momentum": 2.0}, "ema_momentum"),
        ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps"),
    ]
    + [
        ({name: value}, f"{name}={value!r}")
        for name in ("curvature_update_period", "inverse_update_period")
        for value in (0, -3, 2.5, "often", True)
    ],
)
def test_argument_out_of_range(kwargs, message):
    with pytest.raises(ValueError) as error:
        kng.KFAC(**kwargs)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"initial": 0.0},
        {"initial": "large"},
        {"decay": 1.0},
        {"decay": 0.0},
        {"period": 0},
        {"period": 2.5},
        {"minimum": -1.0},
        {"minimum": 2.0, "maximum": 1.0},
    ],
)
def test_levenberg_marquardt_argument_out_of_range(kwargs):
    name, value = next(iter(kwargs.items()))
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        kng.LevenbergMarquardt(**kwargs)


def test_unknown_argument():
    with pytest.raises(ValueError, match="cov_ema"):
        kng.KFAC(cov_ema=0.9)


NOT_ATTACHED = r"not attached.*optimizer\.attach\(model\).*callbacks\.Attach"


@pytest.mark.parametrize("run_eagerly", [True, False])
@pytest.mark.parametrize("how", ["fit", "train_on_batch"])
def test_unattached(run_eagerly, how):
    x, y = data()
    model = mlp()
    model.compile(kng.KFAC(), loss=cross_entropy(), run_eagerly=run_eagerly)
    with pytest.raises(ValueError, match=NOT_ATTACHED):
        if how == "fit":
            model.fit(x, y, verbose=0)
        else:
            model.train_on_batch(x, y)


def test_unattached_may_evaluate_and_predict():
    x, y = data()
    model = mlp()
    model.compile(kng.KFAC(), loss=cross_entropy(), run_eagerly=True)
    assert float(model.evaluate(x, y, verbose=0)) > 0
    assert len(model.predict(x, verbose=0)) == len(x)


def test_unattached_tape():
    with pytest.raises(ValueError, match=NOT_ATTACHED):
        kng.CurvatureTape(kng.KFAC())


def test_model_is_held_weakly():
    optimizer = kng.KFAC().attach(mlp())
    import gc

    gc.collect()
    with pytest.raises(ValueError, match=NOT_ATTACHED):
        optimizer.attached_model()


def test_tape_of_another_optimizer():
    with pytest.raises(ValueError, match="an optimizer of keras_natgrad"):
        kng.CurvatureTape(keras.optimizers.SGD())


def test_plain_gradient_tape():
    x, y = data()
    model = mlp()
    optimizer = kng.KFAC().attach(model)
    with tf.GradientTape() as tape:
        loss = cross_entropy()(y, model(x))
    gradients = tape.gradient(loss, model.trainable_variables)
    with pytest.raises(
        ValueError, match=r"CurvatureTape\(optimizer\).*in place of"
    ):
        optimizer.apply(gradients, model.trainable_variables)


def test_curvature_is_used_once():
    """A second `apply` needs a second tape."""
    x, y = data()
    model = mlp()
    optimizer = kng.KFAC().attach(model, head="categorical")
    with kng.CurvatureTape(optimizer) as tape:
        loss = cross_entropy()(y, model(x))
    gradients = tape.gradient(loss, model.trainable_variables)
    optimizer.apply(gradients, model.trainable_variables)
    with pytest.raises(ValueError, match="without curvature"):
        optimizer.apply(gradients, model.trainable_variables)


def test_tape_without_a_head():
    x, y = data()
    model = mlp()
    optimizer = kng.KFAC().attach(model)
    with kng.CurvatureTape(optimizer) as tape:
        loss = cross_entropy()(y, model(x))
    with pytest.raises(ValueError, match=r"attach\(model, head="):
        tape.gradient(loss, model.trainable_variables)


def test_tape_without_a_call_of_the_model():
    model = mlp()
    optimizer = kng.KFAC().attach(model, head="categorical")
    with kng.CurvatureTape(optimizer) as tape:
        loss = tf.reduce_sum(model.trainable_variables[0] ** 2)
    with pytest.raises(ValueError, match="call the model inside the tape"):
        tape.gradient(loss, model.trainable_variables[:1])


@pytest.mark.parametrize("model", [None, "model", keras.layers.Dense(3)])
def test_attach_to_something_else(model):
    with pytest.raises(ValueError, match="`attach` takes a keras.Model"):
        kng.KFAC().attach(model)


def test_attach_an_unknown_head():
    x, y = data()
    model = mlp()
    with pytest.raises(ValueError, match="gauss"):
        optimizer = kng.KFAC().attach(model, head="gauss")
        model.compile(optimizer, loss=cross_entropy(), run_eagerly=True)
        model.train_on_batch(x, y)


def test_attach_a_built_optimizer_to_another_model():
    x, y = data()
    model = compiled()
    model.train_on_batch(x, y)
    with pytest.raises(ValueError, match="does not have the layers"):
        model.optimizer.attach(mlp(units=7))
    # The first model is still there.
    model.train_on_batch(x, y)


def test_attach_to_another_model_before_building():
    x, y = data()
    optimizer = kng.KFAC().attach(mlp())
    model = compiled(optimizer=optimizer)
    model.train_on_batch(x, y)
    assert optimizer.attached_model() is model


def test_one_optimizer_for_two_models():
    x, y = data()
    optimizer = kng.KFAC()
    model = compiled(optimizer=optimizer)
    model.train_on_batch(x, y)
    other = mlp()
    other.compile(optimizer, loss=cross_entropy(), run_eagerly=True)
    with pytest.raises((ValueError, KeyError)):
        other.train_on_batch(x, y)
