"""The only module that touches private Keras API.

Every function says what it needs and why no public API provides it. Each has a
test in `tests/test_compat.py`, so a Keras release that changes one of them
fails there and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import keras
import tensorflow as tf


class CompiledLoss(NamedTuple):
    """One loss of a compiled model.

    Attributes:
        path: Keys that lead from the structure of outputs to this output.
        loss: The `keras.losses.Loss` (or function) that Keras resolved.
        weight: The loss weight, or `None`.
        name: Name of the output.
    """

    path: tuple[Any, ...]
    loss: Any
    weight: float | None
    name: str


def flatten_layers(model: keras.Model) -> list[keras.layers.Layer]:
    """Returns all layers inside `model`, including nested ones, each once.

    `model.layers` lists direct children only, and inner layers of composite
    layers (attention projections, wrappers) appear in no public list.
    """
    seen: dict[int, keras.layers.Layer] = {}
    for layer in model._flatten_layers(include_self=False, recursive=True):
        seen.setdefault(id(layer), layer)
    return list(seen.values())


def compiled_losses(model: keras.Model) -> list[CompiledLoss]:
    """Returns the losses that `compile` resolved, once the loss is built.

    Keras resolves aliases ("mse"), `loss_weights` and the structure of outputs
    in `CompileLoss` on the first call; nothing public shows the result.
    """
    compiled = getattr(model, "_compile_loss", None)
    if compiled is None or not compiled.built:
        return []
    return [CompiledLoss(*entry) for entry in compiled._flat_losses]


def like_losses(
    model: keras.Model, outputs: Any, targets: Any
) -> tuple[Any, Any]:
    """Returns outputs and targets in the structure of `compiled_losses`.

    `CompileLoss` accepts targets in other structures than the outputs: by the
    names of output layers, a single one with or without a list around it, none
    if an output has no loss. It keeps the resulting structure, filled with
    `None`, but not the function that maps targets to it.

    Args:
        model: A compiled model whose loss has been called.
        outputs: The model's outputs.
        targets: Targets, as the loss was called with.
    """
    compiled = model._compile_loss
    by_name = isinstance(targets, dict) and isinstance(outputs, (list, tuple))
    if by_name and set(compiled.output_names) == set(targets):
        targets = [targets[name] for name in compiled.output_names]
    flat = keras.tree.flatten(targets)
    structure = compiled._y_true_build_structure
    count = len(keras.tree.flatten(structure))
    if len(flat) < count:
        # Outputs without a loss have no targets.
        given = iter(flat)
        losses = keras.tree.flatten(compiled._user_loss)
        flat = [None if loss is None else next(given) for loss in losses]
    return (
        keras.tree.pack_sequence_as(
            compiled._y_pred_build_structure, keras.tree.flatten(outputs)
        ),
        keras.tree.pack_sequence_as(structure, flat),
    )


class DeclaredLoss(NamedTuple):
    """One loss as the user gave it to `compile`.

    Attributes:
        path: Keys that lead from the structure of outputs to this output.
        loss: What the user gave: a name, function or `keras.losses.Loss`.
        shape: Static shape of the output, or `None` if it is not known.
    """

    path: tuple[Any, ...]
    loss: Any
    shape: tuple[int | None, ...] | None


def declared_losses(model: keras.Model) -> list[DeclaredLoss]:
    """Returns the losses given to `compile`, before any of them is called.

    `compiled_losses` knows them only after the first step, and no public API
    gives them.
    """
    compiled = getattr(model, "_compile_loss", None)
    if compiled is None:
        return []
    names = list(getattr(model, "output_names", ()))
    try:
        outputs = model.output
    except AttributeError:
        # A sequential model knows only the shape.
        shape = getattr(model, "output_shape", None)
        outputs = None if shape is None else keras.KerasTensor(shape)

    def items(structure: Any) -> dict[Any, Any]:
        if isinstance(structure, dict):
            return structure
        if isinstance(structure, (list, tuple)):
            return dict(enumerate(structure))
        return {}

    def flatten(loss: Any, own: Any, path: tuple[Any, ...]) -> Any:
        parts = items(loss)
        if not parts and items(own):
            parts = dict.fromkeys(items(own), loss)
        if not parts and loss is not None:
            shape = None if own is None else tuple(own.shape)
            yield DeclaredLoss(path, loss, shape)
        for key, part in parts.items():
            if key not in items(own) and key in names:
                key = names.index(key)  # The name of an output layer.
            yield from flatten(part, items(own).get(key), (*path, key))

    return list(flatten(compiled._user_loss, outputs, ()))


def loss_options(loss: Any) -> dict[str, Any]:
    """Returns the arguments with which a Keras loss calls its function.

    Several losses store them nowhere else: `Huber` has its `delta` neither as
    an attribute nor in its config.
    """
    return dict(loss._fn_kwargs)


def update_loss_tracker(model: keras.Model, loss: Any, batch: Any) -> None:
    """Feeds the `loss` metric of `fit`, as the stock `train_step` does."""
    replicas = tf.distribute.get_strategy().num_replicas_in_sync
    model._loss_tracker.update_state(loss * replicas, sample_weight=batch)


def compute_loss(
    model: keras.Model, x: Any, y: Any, y_pred: Any, sample_weight: Any
) -> Any:
    """Returns the total training loss (losses, regularizers, `add_loss`).

    The `training` argument of the public `compute_loss` may be missing in a
    user's override; Keras's own wrapper handles both cases.
    """
    return model._compute_loss(
        x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=True
    )


def call_with_training(model: keras.Model, x: Any) -> Any:
    """Calls the model in training mode, if it has the argument."""
    if model._call_has_training_arg:
        return model(x, training=True)
    return model(x)


def kernel_variable(layer: keras.layers.Layer) -> Any:
    """Returns the kernel variable of a layer.

    `layer.kernel` is a merged *value* when LoRA is enabled; `_kernel` is the
    variable.
    """
    kernel = getattr(layer, "_kernel", None)
    return layer.kernel if kernel is None else kernel


def special_computation(layer: keras.layers.Layer) -> str:
    """Returns why a layer does not compute with its own float kernel, or "".

    Quantised layers run `quantized_call`, and LoRA splits the kernel into
    three variables; neither has the linear map that capture expects.
    """
    mode = getattr(layer, "quantization_mode", None)
    found = [f"quantised to {mode}"] if mode else []
    if getattr(layer, "lora_enabled", False):
        found.append("LoRA enabled")
    return " and ".join(found)


def takes_argument(layer: keras.layers.Layer, name: str) -> bool:
    """Returns whether `layer.call` takes `"mask"` or `"training"`.

    Keras looks at the signature once; afterwards `call` may be replaced.
    """
    return bool(getattr(layer, f"_call_has_{name}_arg"))


def wrapped_optimizers(optimizer: Any) -> Iterator[Any]:
    """Yields an optimizer and every optimizer that it wraps."""
    if optimizer is None:
        return
    yield optimizer
    yield from wrapped_optimizers(getattr(optimizer, "inner_optimizer", None))
    for inner in getattr(optimizer, "optimizers", ()):
        yield from wrapped_optimizers(inner)


def keras_mask(outputs: Any) -> Any:
    """Returns the mask that Keras attached to a tensor, or `None`."""
    return getattr(outputs, "_keras_mask", None)


def variable_index(optimizer: keras.optimizers.Optimizer, variable: Any) -> int:
    """Returns the position of a variable in the optimizer's list."""
    return optimizer._get_variable_index(variable)


def optimizer_variables(optimizer: keras.optimizers.Optimizer) -> list[Any]:
    """Returns the model variables that an optimizer was built with."""
    return list(optimizer._trainable_variables)


def all_reduce_gradients(
    optimizer: keras.optimizers.Optimizer, gradients: Any, variables: Any
) -> list[Any]:
    """Sums gradients over replicas, as the base class does in its step."""
    pairs = optimizer._all_reduce_sum_gradients(
        list(zip(gradients, variables, strict=True))
    )
    return [gradient for gradient, _ in pairs]


def add_summed_variable(
    optimizer: keras.optimizers.Optimizer,
    name: str,
    shape: tuple[int, ...],
    initializer: Any,
    dtype: str,
) -> keras.Variable:
    """Adds an optimizer variable that is the sum of its replicas' parts.

    Under a strategy every replica assigns and reads its own part; in the
    cross-replica context the variable reads as the sum. `add_variable` cannot
    create such a variable, and no public API adds one that was created
    elsewhere.
    """
    initial = keras.initializers.get(initializer)
    replicas = tf.distribute.get_strategy().num_replicas_in_sync

    def part(shape: Any, dtype: Any) -> Any:
        # Every replica starts with its part of the sum.
        return initial(shape, dtype) / replicas

    with keras.name_scope(optimizer.name):
        variable = keras.Variable(
            part,
            shape=shape,
            dtype=dtype,
            trainable=False,
            aggregation="sum",
            synchronization="on_read",
            name=name,
        )
    optimizer._track_variable(variable)
    return variable


def apply_weight_decay(
    optimizer: keras.optimizers.Optimizer, variables: Any
) -> None:
    """Applies decoupled weight decay as the base class does.

    The base class does it before `_backend_update_step`, even if the step is
    then skipped.
    """
    keras.optimizers.Optimizer._apply_weight_decay(optimizer, variables)


def is_layer_class(candidate: Any) -> bool:
    """Returns whether something is a layer class of Keras 3 or tf_keras.

    tf_keras may not be installed and is slow to import, so its layers are
    recognised as TensorFlow modules with a `call`.
    """
    if not isinstance(candidate, type):
        return False
    if issubclass(candidate, keras.layers.Layer):
        return True
    return issubclass(candidate, tf.Module) and hasattr(candidate, "call")


def is_scratch_graph(graph: Any) -> bool:
    """Returns whether Keras made a graph only to infer a shape.

    Keras gives such a graph a special name.
    """
    return str(getattr(graph, "name", "")).startswith("scratch_graph")


class LayerGraph(NamedTuple):
    """How the layers of a sequential or functional model follow each other.

    Attributes:
        consumers: By `id` of a layer (or operation), the layers that its output
            goes to, one entry per use.
        outputs: The `id`s of layers that produce an output of the model.
        inputs: The `id`s of the input layers of the model.
    """

    consumers: dict[int, list[Any]]
    outputs: set[int]
    inputs: set[int]


def layer_graph(model: keras.Model) -> LayerGraph | None:
    """Returns the graph of a built model, `None` for a subclassed one.

    Keras exposes the layers of a functional model, but not their connections.
    """
    functional = getattr(model, "_functional", None) or model
    by_depth = getattr(functional, "_nodes_by_depth", None)
    if by_depth is None:
        return None
    # Keras 3 says operation, tf_keras says layer.
    name = "operation" if isinstance(model, keras.Model) else "layer"
    consumers: dict[int, list[Any]] = {}
    for node in (node for nodes in by_depth.values() for node in nodes):
        for parent in node.parent_nodes:
            consumers.setdefault(id(getattr(parent, name)), []).append(
                getattr(node, name)
            )

    def operations(tensors: Any) -> set[int]:
        flat = keras.tree.flatten(tensors)
        return {id(getattr(tensor._keras_history, name)) for tensor in flat}

    return LayerGraph(
        consumers,
        operations(functional.outputs),
        operations(functional.inputs),
    )


def set_rate(optimizer: Any, learning_rate: Any) -> None:
    """Sets the learning rate of a tf_keras optimizer in its constructor.

    Every optimizer of tf_keras does it this way; there is no other.
    """
    optimizer._learning_rate = optimizer._build_learning_rate(learning_rate)


def current_rate(optimizer: Any) -> tf.Tensor:
    """Returns the learning rate of a tf_keras optimizer at this step.

    A private method, called at the beginning of a step, evaluates schedules.
    """
    optimizer._compute_current_learning_rate()
    return tf.convert_to_tensor(optimizer.learning_rate)


def serialized_rate(optimizer: Any) -> Any:
    """Returns the learning rate of a tf_keras optimizer for its config."""
    rate = optimizer._serialize_hyperparameter(optimizer._learning_rate)
    return rate if isinstance(rate, dict) else float(rate)


def has_loss_weights(model: Any) -> bool:
    """Returns whether a tf_keras model was compiled with `loss_weights`.

    Only its container of losses stores them.
    """
    weights = getattr(model.compiled_loss, "_user_loss_weights", None)
    return weights is not None


def layer_scale_class() -> type[keras.layers.Layer]:
    """Returns the class of ConvNeXt's scale per channel.

    `keras.applications` builds models with it but does not export it.
    """
    from keras.src.applications.convnext import LayerScale

    return LayerScale
