"""The code of README.md, docs/ and the docstrings runs as it stands.

The blocks of a page run in order and share their names, as do those of a
docstring. What a block presupposes is in the tables below: a function of
`tests.docs_setup` makes the names before the block that contains the words, and
another one says after it what has to be true.
"""

import doctest
from typing import NamedTuple

import keras
import pytest
import tensorflow as tf

import keras_natgrad as kng
from tests import docs_setup as setup
from tests.docs_code import blocks_of_page, docstrings, pages


class At(NamedTuple):
    """What happens around the block of a page that contains some words."""

    words: str
    before: object = None
    after: object = None


PAGES = {
    "README.md": [
        At("np.argmax(x[:, :5]", after=setup.learned),
        At('Normal(scale="softplus")', after=setup.band),
        At("NaturalGradient()", after=setup.attached),
        At("RNGD(0.01)", after=setup.attached),
        At("PRONG()", after=setup.attached),
        At("NaturalGradientHyperModel", setup.has_tuner, setup.wraps),
        At("kng.fisher(", after=setup.two_operators),
    ],
    "choosing_an_optimizer.md": [
        At("for optimizer in", setup.regression, setup.attached),
    ],
    "defaults_and_divergence.md": [
        At("log_statistics", setup.regression, setup.trained),
    ],
    "distribution.md": [
        At("MirroredStrategy()", setup.distributed, setup.learned),
        At("def replica_step", setup.heads_loop, setup.replicas_step),
    ],
    "heads.md": [
        At("NegativeBinomial()", setup.counts),
        At("MixtureSameFamily", after=setup.mixture_density),
        At("head.mean(outputs)", setup.predicted),
    ],
    "how_it_finds_layers.md": [
        At("KFAC().attach(model)\nmodel", setup.regression, setup.attached),
        At("callbacks.Attach()", setup.regression, setup.trained),
        At("exclude=", after=setup.excluded),
    ],
    "keras_tuner.md": [
        At("keras_tuner.Hyperband", setup.wide_inputs, setup.found),
        At("def optimizer(hp)", after=setup.searchable),
    ],
    "model_garden.md": [
        At(
            "KFAC().attach",
            setup.tf_keras_regression,
            setup.tf_keras_trained,
        ),
    ],
    "monitoring.md": [
        At("CurvatureMonitor(every=4)", after=setup.monitored),
        At("monitor.record()", after=setup.recorded_state),
        At("RaiseDamping(factor", after=setup.has_patience),
    ],
    "natural_gradient.md": [
        At("epochs=50", setup.regression, setup.trained),
        At("minimize_residuals", after=setup.solved),
    ],
    "prong.md": [
        At("as a preconditioner", setup.classifier),
        At("layers.whitened", setup.classifier, setup.trained),
    ],
    "quickstart.md": [
        At("np.argmax(x[:, :5]", after=setup.learned),
        At("head.quantile", after=setup.band),
        At("load_model", after=setup.resumed),
        At("train_step", after=setup.loop_learned),
        At("combine=True", after=setup.operator),
    ],
    "rngd.md": [At("RNGD(0.01)", setup.classifier, setup.trained)],
}

DOCSTRINGS = {
    "callbacks.monitor.CurvatureMonitor": (setup.compiled, setup.trained),
    "callbacks.nan_policy.RaiseDamping": (setup.regression, setup.trained),
    "optimizers.base.CurvatureOptimizer.raise_damping": (
        setup.built,
        setup.raised,
    ),
    "tuner.search_space": (setup.tunable, None),
    "tuner.NaturalGradientHyperModel": (setup.tunable, setup.searched),
    "blocks.registry.register_block": (None, setup.own_block),
    "callbacks.attach.Attach": (setup.regression, setup.trained),
    "callbacks.whiten.Whiten": (setup.regression, setup.trained),
    "capture.registry.register_layer": (setup.my_dense, setup.own_layer),
    "capture.tape.CurvatureTape": (setup.custom_loop, setup.compiled_step_runs),
    "capture.taps.Taps": (setup.regression, setup.recorded),
    "fisher.fisher": (setup.regression, setup.per_layer),
    "heads.base.Head": (None, setup.own_head),
    "heads.family.Family": (None, setup.own_family),
    "heads.generic.Distribution": (None, setup.own_distribution),
    "heads.losses.register_loss": (None, setup.own_loss),
    "integrations.tf_keras.optimizer.KFAC": (
        setup.tf_keras_regression,
        setup.tf_keras_trained,
    ),
    "layers.conversion.canonical": (setup.whitened, None),
    "layers.conversion.whitened": (setup.classifier, None),
    "layers.whitened_conv.WhitenedConv2D": (
        setup.digit_images,
        setup.same_function,
    ),
    "layers.whitened_dense.WhitenedDense": (
        setup.digits,
        setup.same_function,
    ),
    "losses.NegativeLogLikelihood": (setup.regression, None),
    "metrics.NegativeLogLikelihood": (setup.regression, None),
    "optimizers.base.CurvatureOptimizer.attach": (
        setup.regression,
        setup.attached,
    ),
    "optimizers.kfac.KFAC": (setup.classifier, setup.trained),
    "optimizers.natural_gradient.NaturalGradient": (
        setup.regression,
        setup.trained,
    ),
    "optimizers.natural_gradient.NaturalGradient.minimize_residuals": (
        setup.residuals,
        setup.residual_steps_run,
    ),
    "optimizers.prong.PRONG": (setup.classifier, setup.trained),
    "optimizers.rngd.RNGD": (setup.classifier, setup.trained),
    "training.residual_model.ResidualModel": (setup.residuals, setup.trained),
}

# Pages that take more than about ten seconds.
SLOW = {"quickstart.md", "keras_tuner.md", "distribution.md"}
# A docstring that takes as long.
SEARCHES = {"tuner.NaturalGradientHyperModel"}
# Docstrings that make a few steps only.
SHORT = {
    "callbacks.attach.Attach",
    "capture.tape.CurvatureTape",
    "optimizers.kfac.KFAC",
    "optimizers.natural_gradient.NaturalGradient.minimize_residuals",
    "optimizers.prong.PRONG",
    "optimizers.rngd.RNGD",
}

FOUND = docstrings()


@pytest.fixture(autouse=True)
def isolated(monkeypatch, tmp_path):
    """Files and registrations of an example end with it."""
    monkeypatch.chdir(tmp_path)
    for module, name in (
        (kng.blocks.registry, "_BLOCKS"),
        (kng.capture.registry, "_LAYERS"),
        (kng.heads.losses, "_CONVERTERS"),
    ):
        monkeypatch.setattr(module, name, dict(getattr(module, name)))
    registered = dict(keras.saving.get_custom_objects())
    yield
    keras.saving.get_custom_objects().clear()
    keras.saving.get_custom_objects().update(registered)


@pytest.fixture
def eager_if_short(request):
    """Spares tracing and compiling, most of the time of a short training."""
    tf.config.run_functions_eagerly(
        request.node.callspec.params["name"] in SHORT
    )
    yield
    tf.config.run_functions_eagerly(False)


@pytest.mark.variants("README.md")
@pytest.mark.parametrize(
    "path",
    [
        pytest.param(
            path,
            id=path.name,
            marks=[pytest.mark.slow] if path.name in SLOW else [],
        )
        for path in pages()
    ],
)
def test_page(path):
    names = dict(setup.IMPORTS)
    around = list(PAGES.get(path.name, ()))
    for block in blocks_of_page(path):
        found = [at for at in around if at.words in block.text]
        assert len(found) <= 1
        for at in found:
            around.remove(at)
            if at.before is not None:
                names.update(at.before())
        block.run(names)
        for at in found:
            if at.after is not None:
                at.after(names)
    assert around == []  # every entry of the table has met its block


@pytest.mark.variants(6)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, id=name, marks=pytest.mark.slow if name in SEARCHES else ()
        )
        for name in FOUND
    ],
)
def test_docstring(name, eager_if_short):
    blocks, session = FOUND[name]
    before, after = DOCSTRINGS.get(name, (None, None))
    names = dict(setup.IMPORTS)
    if before is not None:
        names.update(before())
    for block in blocks:
        block.run(names)
    if after is not None:
        after(names)
    session.globs.update(names)
    runner = doctest.DocTestRunner(
        verbose=False, optionflags=doctest.NORMALIZE_WHITESPACE
    )
    report = []
    runner.run(session, out=report.append)
    assert runner.failures == 0, "".join(report)
    assert runner.tries == len(FOUND[name][1].examples)
