"""What the replicas of a `tf.distribute` strategy must agree on.

Every replica sees a part of the batch. The loss coefficients are those of the
whole batch (Keras divides means by the number of replicas), so gradients,
losses, statistics of the curvature and `δᵀFδ` are sums over the replicas.
Everything computed from these sums, including all decisions, is the same on
every replica.

Statistics stay where they were computed. Only the cross-replica context, where
inverses are refreshed, reads their variables as the sum of all replicas' parts.

Without a strategy, or with one replica, all functions here only call what they
are given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

_NO_MERGE_CALL = (
    "{name} cannot be compiled by XLA under a strategy with several replicas. "
    "Pass `jit_compile=False` to `compile`."
)
_UNSUPPORTED = (
    "{name} with {what} does not run on {count} replicas: {reason}. {instead}"
)


def replica_count() -> int:
    """Returns the number of replicas that share a batch; one by default."""
    if tf.distribute.get_replica_context() is None:
        return 1
    return int(tf.distribute.get_strategy().num_replicas_in_sync)


def replica_key() -> int | None:
    """Returns a key that identifies this replica in its process."""
    context = tf.distribute.get_replica_context()
    if context is None or replica_count() == 1:
        return 0
    # A constant in graphs, except on a TPU, where all replicas share one trace.
    identifier = tf.get_static_value(
        tf.convert_to_tensor(context.replica_id_in_sync_group)
    )
    return None if identifier is None else int(identifier)


def replica_seed(seed: tf.Tensor) -> tf.Tensor:
    """Returns a seed for this replica, an int32 `[2]` tensor."""
    if replica_count() == 1:
        return seed
    context = tf.distribute.get_replica_context()
    identifier = tf.cast(context.replica_id_in_sync_group, tf.int32)
    return tf.random.fold_in(seed, identifier, alg="philox")


def sum_over_replicas(tensor: tf.Tensor) -> tf.Tensor:
    """Returns the sum of a tensor over all replicas.

    Not allowed inside `tf.cond` or a loop; use `cond` below.
    """
    if replica_count() == 1:
        return tensor
    context = tf.distribute.get_replica_context()
    return context.all_reduce(tf.distribute.ReduceOp.SUM, tensor)


def cond(
    predicate: tf.Tensor,
    true_function: Callable[[], Any],
    false_function: Callable[[], Any] | None = None,
) -> None:
    """`tf.cond` whose branches may communicate with other replicas.

    Args:
        predicate: Scalar bool, the same on all replicas.
        true_function: Called for its side effects.
        false_function: Likewise, or `None`.
    """
    false_function = false_function or _nothing
    if replica_count() == 1:
        tf.cond(predicate, _quiet(true_function), _quiet(false_function))
        return

    # As in Keras's LossScaleOptimizer: a branch of a `tf.cond` must not merge
    # in the replica context, but may call the replicas.
    def across(
        strategy: tf.distribute.Strategy,
        predicates: Any,
        true_functions: Any,
        false_functions: Any,
    ) -> None:
        def call(functions: Any) -> Callable[[], tf.Tensor]:
            def branch() -> tf.Tensor:
                strategy.extended.call_for_each_replica(
                    lambda function: function(), args=(functions,)
                )
                return tf.constant(0)

            return branch

        first = strategy.experimental_local_results(predicates)[0]
        tf.cond(first, call(true_functions), call(false_functions))

    tf.distribute.get_replica_context().merge_call(
        across,
        args=(predicate, _quiet(true_function), _quiet(false_function)),
    )


def across_replicas(function: Callable[[], Any]) -> Any:
    """Calls a function once for all replicas.

    Inside, variables are read and assigned for all replicas, and a sum reads as
    the sum of its parts.

    Args:
        function: May close only over variables and values that are equal on all
            replicas.

    Returns:
        What the function returns.
    """
    if replica_count() == 1:
        return function()
    return tf.distribute.get_replica_context().merge_call(
        lambda strategy: function()
    )


def traced_once(function: Callable[[], Any]) -> Callable[[], Any]:
    """Returns a function that a graph contains once, even if called twice.

    This holds while Python traces it; TensorFlow may inline it later. Replicas
    have their own variables, so each traces its own function.

    Args:
        function: May close only over variables.
    """
    if tf.executing_eagerly() or replica_count() > 1:
        return function
    return tf.function(function, autograph=False)


def traced_here(function: Callable[[], Any]) -> Callable[[], Any]:
    """Returns the function, traced now, for several branches of this graph.

    In a graph, what several branches of `tf.cond` do is traced once, in the
    graph that they branch off from; the branches only call it. Replicas trace
    by themselves.

    Args:
        function: May close over tensors of the graph.
    """
    if tf.executing_eagerly() or replica_count() > 1:
        return function
    return tf.function(function, autograph=False).get_concrete_function()


def refresh_devices() -> Sequence[str]:
    """Returns the devices of this process that share a refresh."""
    strategy = tf.distribute.get_strategy()
    if int(strategy.num_replicas_in_sync) == 1:
        return ()
    return tuple(strategy.extended.worker_devices)


def check_merge(name: str) -> None:
    """Raises ValueError if replicas cannot leave their context."""
    if replica_count() == 1:
        return
    if tf.__internal__.distribute.strategy_supports_no_merge_call():
        raise ValueError(_NO_MERGE_CALL.format(name=name))


def refuse_replicas(name: str, what: str, reason: str, instead: str) -> None:
    """Raises ValueError for a feature that needs a single replica."""
    count = replica_count()
    if count > 1:
        raise ValueError(
            _UNSUPPORTED.format(
                name=name,
                what=what,
                count=count,
                reason=reason,
                instead=instead,
            )
        )


def _quiet(function: Callable[[], Any]) -> Callable[[], tf.Tensor]:
    def call() -> tf.Tensor:
        function()
        return tf.constant(0)

    return call


def _nothing() -> None:
    """Does nothing."""
