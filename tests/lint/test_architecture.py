"""The import rule of docs/architecture.md, checked on the source itself."""

import ast
import textwrap
from collections import defaultdict
from pathlib import Path

import pytest

PACKAGE = "keras_natgrad"
ROOT = Path(__file__).resolve().parents[2] / PACKAGE
MAX_LINES = 450

# The top-level module that may touch what Keras keeps private.
COMPAT = "_compat"

# Every room (sub-package or top-level module) and the rooms it may import.
# The rooms of `ANYWHERE` import nothing of the package and are open to all.
ANYWHERE = {"version", "_backend", "checks", "replicas", COMPAT}
MAY_IMPORT: dict[str, set[str]] = {room: set() for room in ANYWHERE}
MAY_IMPORT["linalg"] = set()
MAY_IMPORT["heads"] = {"linalg"}
MAY_IMPORT["blocks"] = {"linalg"}
MAY_IMPORT["losses"] = {"linalg", "heads"}
MAY_IMPORT["metrics"] = {"linalg", "heads"}
MAY_IMPORT["capture"] = {"linalg", "blocks"}
MAY_IMPORT["solvers"] = {"linalg"}
MAY_IMPORT["step"] = {"linalg"}
MAY_IMPORT["curvature"] = {
    *("linalg", "heads", "blocks", "capture", "solvers", "step"),
}
MAY_IMPORT["relative"] = {*MAY_IMPORT["curvature"], "curvature"}
MAY_IMPORT["training"] = {*MAY_IMPORT["curvature"], "curvature", "losses"}
MAY_IMPORT["optimizers"] = {
    *MAY_IMPORT["training"],
    *("relative", "solvers", "step", "training"),
}
MAY_IMPORT["fisher"] = {*MAY_IMPORT["training"], "training"}
MAY_IMPORT["layers"] = {*MAY_IMPORT["capture"], "capture"}
MAY_IMPORT["callbacks"] = {*MAY_IMPORT["optimizers"], "optimizers", "layers"}
MAY_IMPORT["tuner"] = {*MAY_IMPORT["optimizers"], "optimizers"}
MAY_IMPORT["integrations"] = {*MAY_IMPORT["optimizers"], "optimizers"}

# These rooms see tensors, never Keras layers.
KNOWS_NO_LAYERS = {"linalg", "heads", "blocks"}
LAYER_NAMES = (
    "keras.layers",
    "keras.Layer",
    "keras.models",
    "keras.Model",
    "keras.Sequential",
)

# Private attributes of Keras objects. Overriding one is a `def` and allowed;
# reading or calling one belongs in `_compat`.
PRIVATE_KERAS_ATTRIBUTES = {
    # Layers and models.
    *("_flatten_layers", "_kernel", "_call_has_training_arg"),
    *("_inbound_nodes", "_keras_history", "_operations"),
    *("_loss_tracker", "_compute_loss", "_compile_loss", "_compile_metrics"),
    *("_symbolic_build", "_make_function", "_distribute_strategy"),
    # Optimizers.
    *("_iterations", "_learning_rate", "_get_current_learning_rate"),
    *("_trainable_variables", "_trainable_variables_indices"),
    *("_get_variable_index", "_accumulated_gradients", "_track_variable"),
    *("_backend_update_step", "_backend_apply_gradients"),
    *("_all_reduce_sum_gradients", "_distributed_tf_update_step"),
    *("_clip_gradients", "_apply_weight_decay", "_filter_empty_gradients"),
    "_overwrite_variables_directly_with_gradients",
    # Any Keras object.
    *("_tracker", "_dtype_policy"),
}


def room_of(module):
    """The room of a module of the package; None for the package itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else None


def imports_of(module, source, is_package=False):
    """Yield (line, name imported, local name, what that is bound to)."""
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                local = alias.asname or alias.name.split(".")[0]
                bound = alias.name if alias.asname else local
                yield node.lineno, alias.name, local, bound
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                kept = parents[: len(parents) - node.level + 1]
                base = ".".join([*kept, base]) if base else ".".join(kept)
            for alias in node.names:
                name = f"{base}.{alias.name}"
                yield node.lineno, name, alias.asname or alias.name, name


def rooms_imported(module, source, is_package=False):
    """Yield (line, room) for every import from within the package."""
    for line, name, _, _ in imports_of(module, source, is_package):
        if name.split(".")[0] == PACKAGE:
            yield line, room_of(name)


def import_violations(module, source, is_package=False):
    """Imports of other rooms that the table does not allow."""
    room = room_of(module)
    if room is None:
        return []
    if room not in MAY_IMPORT:
        return [f"{module}: the room {room} has no place in MAY_IMPORT"]
    allowed = MAY_IMPORT[room] | {room}
    if room not in ANYWHERE:
        allowed |= ANYWHERE
    return [
        f"{module}:{line}: {room} may not import {target or PACKAGE}"
        for line, target in rooms_imported(module, source, is_package)
        if target not in allowed
    ]


def dotted(node):
    """The dotted name of an attribute chain, or None if it is another."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return None
    return ".".join([node.id, *reversed(parts)])


def names_used(module, source, is_package=False):
    """Yield (line, full dotted name) of imports and attribute chains."""
    aliases = {}
    for line, name, local, bound in imports_of(module, source, is_package):
        aliases[local] = bound
        yield line, name
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and (name := dotted(node)):
            first, _, rest = name.partition(".")
            yield node.lineno, f"{aliases.get(first, first)}.{rest}"


def starts_with(name, prefix):
    return name == prefix or name.startswith(f"{prefix}.")


def layer_violations(module, source, is_package=False):
    """Uses of Keras layers in a room that must not know them."""
    if room_of(module) not in KNOWS_NO_LAYERS:
        return []
    return [
        f"{module}:{line}: {room_of(module)} may not use {name}"
        for line, name in sorted(set(names_used(module, source, is_package)))
        if any(starts_with(name, prefix) for prefix in LAYER_NAMES)
    ]


def private_violations(module, source, is_package=False):
    """Uses of private Keras API outside the module for it."""
    if room_of(module) == COMPAT:
        return []
    found = [
        (line, name)
        for line, name in names_used(module, source, is_package)
        if starts_with(name, "keras.src")
    ]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            if node.attr in PRIVATE_KERAS_ATTRIBUTES:
                found.append((node.lineno, node.attr))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in ("getattr", "hasattr", "setattr", "delattr"):
                found += [
                    (node.lineno, argument.value)
                    for argument in node.args
                    if isinstance(argument, ast.Constant)
                    and argument.value in PRIVATE_KERAS_ATTRIBUTES
                ]
    return [
        f"{module}:{line}: {name} is private to Keras; use {COMPAT}"
        for line, name in sorted(set(found))
    ]


def find_cycle(graph):
    """Return a list of nodes that form a cycle, or an empty list."""
    done = set()

    def visit(node, path):
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        for following in sorted(graph.get(node, ())):
            if cycle := visit(following, [*path, node]):
                return cycle
        done.add(node)
        return []

    for start in sorted(graph):
        if cycle := visit(start, []):
            return cycle
    return []


def package_modules():
    """Every module of the package: (dotted name, source, is a package)."""
    for path in sorted(ROOT.rglob("*.py")):
        parts = [PACKAGE, *path.relative_to(ROOT).with_suffix("").parts]
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        yield name, path.read_text(encoding="utf-8"), is_package


CHECKS = [import_violations, layer_violations, private_violations]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_package_follows_the_rule(check):
    modules = list(package_modules())
    assert modules
    found = [line for module in modules for line in check(*module)]
    assert not found, "\n" + "\n".join(found)


def test_rooms_import_each_other_without_cycles():
    graph = defaultdict(set)
    for module, source, is_package in package_modules():
        room = room_of(module)
        for _, target in rooms_imported(module, source, is_package):
            if room and target and target != room:
                graph[room].add(target)
    assert find_cycle(graph) == []


def test_no_module_is_too_long():
    lengths = {
        module: len(source.splitlines())
        for module, source, _ in package_modules()
    }
    too_long = {name: n for name, n in lengths.items() if n > MAX_LINES}
    assert not too_long


def test_the_table_itself_points_one_way():
    assert find_cycle(MAY_IMPORT) == []
    for allowed in MAY_IMPORT.values():
        assert allowed <= set(MAY_IMPORT)


# The checker is checked: each snippet breaks the rule in one way.

VIOLATIONS = {
    "heads know no blocks": (
        import_violations,
        "keras_natgrad.heads.normal",
        "from keras_natgrad.blocks.kronecker import KroneckerBlock",
    ),
    "heads know no capture": (
        import_violations,
        "keras_natgrad.heads.normal",
        "from keras_natgrad import capture",
    ),
    "heads know no optimizers": (
        import_violations,
        "keras_natgrad.heads.normal",
        "import keras_natgrad.optimizers.kfac as kfac",
    ),
    "capture knows no heads": (
        import_violations,
        "keras_natgrad.capture.dense",
        "from ..heads.base import Head",
    ),
    "a package resolves its own relative imports": (
        import_violations,
        "keras_natgrad.linalg",
        "from ..heads import Normal",
    ),
    "an import inside a function counts": (
        import_violations,
        "keras_natgrad.step.damping",
        """
        def late():
            from keras_natgrad.training import attach
        """,
    ),
    "neighbours do not import each other": (
        import_violations,
        "keras_natgrad.solvers.cg",
        "from keras_natgrad.step import damping",
    ),
    "nobody imports the package itself": (
        import_violations,
        "keras_natgrad.callbacks.attach",
        "import keras_natgrad as kng",
    ),
    "losses may import heads only": (
        import_violations,
        "keras_natgrad.losses",
        "from keras_natgrad.blocks import base",
    ),
    "fisher is below optimizers": (
        import_violations,
        "keras_natgrad.fisher",
        "from keras_natgrad.optimizers import KFAC",
    ),
    "compat imports nothing": (
        import_violations,
        "keras_natgrad._compat",
        "from keras_natgrad.version import __version__",
    ),
    "a new room needs a place": (
        import_violations,
        "keras_natgrad.utils.misc",
        "import numpy",
    ),
    "blocks know no layers, by import": (
        layer_violations,
        "keras_natgrad.blocks.kronecker",
        "from keras import layers",
    ),
    "blocks know no layers, by attribute": (
        layer_violations,
        "keras_natgrad.blocks.kronecker",
        """
        import keras as K

        def is_dense(layer):
            return isinstance(layer, K.layers.Dense)
        """,
    ),
    "keras.src is private, by import": (
        private_violations,
        "keras_natgrad.training.attach",
        "from keras.src.trainers import trainer",
    ),
    "keras.src is private, by attribute": (
        private_violations,
        "keras_natgrad.training.attach",
        "import keras\nTrainer = keras.src.trainers.Trainer",
    ),
    "a private attribute": (
        private_violations,
        "keras_natgrad.training.attach",
        "def layers(model):\n    return list(model._flatten_layers())",
    ),
    "a private attribute by getattr": (
        private_violations,
        "keras_natgrad.training.attach",
        "def tracker(model):\n    return getattr(model, '_loss_tracker', None)",
    ),
}


@pytest.mark.parametrize(
    ("check", "module", "snippet"), VIOLATIONS.values(), ids=VIOLATIONS
)
def test_checker_finds_a_violation(check, module, snippet):
    is_package = module == "keras_natgrad.linalg"
    found = check(module, textwrap.dedent(snippet), is_package)
    assert len(found) >= 1
    assert all(line.startswith(module) for line in found)


ALLOWED = {
    "keras_natgrad": "from keras_natgrad.callbacks import Attach",
    "keras_natgrad.heads.normal": "from ..linalg import psd\nimport keras",
    "keras_natgrad.heads.losses": "from .base import Head\nimport keras.losses",
    "keras_natgrad.capture.dense": """
        import keras
        from keras_natgrad import _compat
        Dense = keras.layers.Dense
        """,
    "keras_natgrad.optimizers.base": """
        from keras_natgrad import capture, losses
        from keras_natgrad._compat import update_step

        class Base:
            def _backend_update_step(self, grads, variables, learning_rate):
                self._plan = None
        """,
    "keras_natgrad._compat": "from keras.src import backend\nx._loss_tracker",
}


@pytest.mark.parametrize("module", ALLOWED)
def test_checker_accepts_what_is_allowed(module):
    source = textwrap.dedent(ALLOWED[module])
    is_package = module == "keras_natgrad"
    assert [check(module, source, is_package) for check in CHECKS] == [[]] * 3


def test_checker_finds_a_cycle():
    graph = {"step": {"linalg"}, "linalg": {"heads"}, "heads": {"step"}}
    cycle = find_cycle(graph)
    assert cycle[0] == cycle[-1]
    assert set(cycle) == set(graph)
    assert find_cycle({"a": {"b", "c"}, "b": {"c"}}) == []
