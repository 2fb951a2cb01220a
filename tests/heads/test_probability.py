import subprocess
import sys

import pytest

from keras_natgrad.heads.probability import distributions


def test_distributions():
    assert distributions().Normal(0.0, 1.0).batch_shape == ()


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_probability", None)
    with pytest.raises(ImportError, match="pip install 'tensorflow-prob"):
        distributions()


def test_heads_do_not_import_tensorflow_probability():
    # Nor do the log-probability and the Fisher matrix need it.
    code = (
        "import sys, numpy as np\n"
        "from keras_natgrad import heads, losses\n"
        "heads.Categorical().fisher(np.zeros((1, 2)))\n"
        "losses.NegativeLogLikelihood('normal')(np.ones(2), np.ones((2, 1)))\n"
        "assert 'tensorflow_probability' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
