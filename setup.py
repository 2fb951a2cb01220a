"""Packaging of keras_natgrad. Tool settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def read(path):
    """Return the text of a file of this repository."""
    return (ROOT / path).read_text(encoding="utf-8")


def version():
    """Read the version without importing the package (and TensorFlow)."""
    text = read("keras_natgrad/version.py")
    match = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if match is None:
        raise RuntimeError("keras_natgrad/version.py has no __version__ line.")
    return match.group(1)


INSTALL_REQUIRES = [
    # TensorFlow Probability 0.25 refuses an older TensorFlow when imported.
    "tensorflow>=2.18",
    "typing-extensions",
    # The optimizers override one step method of the Keras base optimizer that
    # is not public; it is stable from 3.12 on.
    "keras>=3.12,<4",
    # The `tf` extra brings tf-keras, without which the distributions of
    # TensorFlow Probability do not load.
    "tensorflow-probability[tf]>=0.25",
    "numpy",
    "scipy",
    "rich",
    # TensorFlow Probability 0.25 imports `distutils.version`, which left the
    # standard library in Python 3.12 and which setuptools still provides. It
    # does not use `pkg_resources`, so no upper bound is needed.
    "setuptools",
]

PLOTS = ["matplotlib"]
EXAMPLES = ["scikit-learn", *PLOTS]
TENSORBOARD = ["tensorboard"]
# Keras Tuner imports tensorboard and does not require it.
TUNER = ["keras-tuner", "scikit-learn", *TENSORBOARD]
TESTS = [
    "pytest>=8",
    "pytest-xdist",
    "hypothesis",
    "matplotlib",
    *TUNER,
    # The packaging test builds a wheel with the environment's own setuptools;
    # a new virtual environment may hold one too old for pyproject.toml.
    "setuptools>=77",
]
EXTRAS_REQUIRE = {
    "plots": PLOTS,
    "examples": EXAMPLES,
    "tensorboard": TENSORBOARD,
    # Wants TensorFlow 2.20; docs/model_garden.md says what to do with 2.21.
    "model-garden": ["tf-keras", "tf-models-official"],
    "tuner": TUNER,
    # Ruff breaks the lines of long signatures.
    "docs": ["mkdocs-material", "mkdocstrings[python]", "ruff"],
    "tests": TESTS,
    "dev": [*TESTS, "ruff", "mypy", "pre-commit", "build"],
}

setup(
    name="keras-natgrad",
    version=version(),
    description=(
        "Natural-gradient (K-FAC) optimizers for Keras 3 on TensorFlow"
    ),
    long_description=read("README.md"),
    long_description_content_type="text/markdown",
    author="The keras_natgrad authors",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["keras_natgrad", "keras_natgrad.*"]),
    package_data={"keras_natgrad": ["py.typed"]},
    zip_safe=False,
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
    keywords=[
        "keras",
        "tensorflow",
        "tensorflow-probability",
        "optimizer",
        "second-order optimization",
        "natural gradient",
        "fisher information",
        "kfac",
        "kronecker-factored",
    ],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Mathematics",
        "Topic :: Software Development :: Libraries :: Python Modules",
        "Typing :: Typed",
    ],
)
