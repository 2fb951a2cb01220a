"""What replicas agree on, function by function."""

import numpy as np
import pytest
import tensorflow as tf

from keras_natgrad import replicas
from keras_natgrad.curvature.estimator import share_out


def in_replicas(strategy, function):
    """Runs a function of the replica's number in a graph; results in order."""

    @tf.function
    def run():
        return strategy.run(
            lambda: function(
                tf.distribute.get_replica_context().replica_id_in_sync_group
            )
        )

    results = strategy.experimental_local_results(run())
    return [np.asarray(result) for result in results]


def test_alone():
    assert replicas.replica_count() == 1
    assert replicas.replica_key() == 0
    assert replicas.refresh_devices() == ()
    tensor = tf.constant(3.0)
    assert replicas.sum_over_replicas(tensor) is tensor
    seed = tf.constant([1, 2])
    assert replicas.replica_seed(seed) is seed
    assert replicas.across_replicas(lambda: 5) == 5
    replicas.check_merge("KFAC")
    replicas.refuse_replicas("KFAC", "this", "so", "That.")


@pytest.mark.parametrize("yes", [True, False])
def test_cond_alone(yes):
    variable = tf.Variable(0)
    replicas.cond(
        tf.constant(yes),
        lambda: variable.assign(1),
        lambda: variable.assign(2),
    )
    assert int(variable) == (1 if yes else 2)
    replicas.cond(tf.constant(False), lambda: variable.assign(7))
    assert int(variable) != 7


def test_sum_count_and_key(mirrored_strategy):
    keys = []

    def body(number):
        assert replicas.replica_count() == 2
        keys.append(replicas.replica_key())
        return replicas.sum_over_replicas(tf.cast(number, tf.float32) + 1)

    assert in_replicas(mirrored_strategy, body) == [3.0, 3.0]
    assert sorted(keys) == [0, 1]


def test_seeds_differ(mirrored_strategy):
    first, second = in_replicas(
        mirrored_strategy,
        lambda _: replicas.replica_seed(tf.constant([1, 2])),
    )
    assert np.any(first != second)


@pytest.mark.parametrize("yes", [True, False])
def test_replicas_talk_inside_cond(yes, mirrored_strategy):
    with mirrored_strategy.scope():
        variable = tf.Variable(0.0, aggregation=tf.VariableAggregation.NONE)

    def body(number):
        own = tf.cast(number, tf.float32) + 1

        def talk():
            variable.assign(replicas.sum_over_replicas(own))

            def nested():
                total = replicas.sum_over_replicas(10 * own)
                variable.assign_add(total)

            replicas.cond(own > 0, nested)

        replicas.cond(tf.constant(yes), talk)
        return variable.read_value()

    expected = 33.0 if yes else 0.0
    assert in_replicas(mirrored_strategy, body) == [expected] * 2


def test_across_replicas_sums_are_read(mirrored_strategy):
    with mirrored_strategy.scope():
        total = tf.Variable(
            0.0,
            synchronization=tf.VariableSynchronization.ON_READ,
            aggregation=tf.VariableAggregation.SUM,
        )

    def body(number):
        total.assign(tf.cast(number, tf.float32) + 1)
        found = replicas.across_replicas(lambda: tf.convert_to_tensor(total))
        return found * (tf.cast(number, tf.float32) + 1)

    assert in_replicas(mirrored_strategy, body) == [3.0, 6.0]


@pytest.mark.parametrize("eager", [True, False])
def test_traced_once(eager):
    """A graph has one trace of what it calls twice, in any of its branches."""
    count, calls = tf.Variable(0), []

    def add():
        calls.append(None)
        count.assign_add(1)
        return tf.constant(0)

    def twice(yes):
        traced = replicas.traced_once(add)
        tf.cond(yes, traced, lambda: tf.constant(0))
        between = count.read_value()
        tf.cond(yes, traced, lambda: tf.constant(0))
        return between

    run = twice if eager else tf.function(twice)
    assert run(tf.constant(True)).numpy() == 1
    assert count.numpy() == 2
    assert len(calls) == (2 if eager else 1)
    assert run(tf.constant(False)).numpy() == 2


def test_refuse_replicas(mirrored_strategy):
    def body(number):
        replicas.refuse_replicas("KFAC", "this", "so it is", "Use that.")

    message = "KFAC with this does not run on 2 replicas: so it is. Use that."
    with pytest.raises(ValueError, match=message):
        in_replicas(mirrored_strategy, body)


def test_refresh_devices(mirrored_strategy):
    with mirrored_strategy.scope():
        devices = replicas.refresh_devices()
    assert len(set(devices)) == 2


def test_share_out():
    """The largest first, each to the device with the least work."""
    assert share_out([1, 2], ()) == [None, None]
    assert share_out([3, 5, 4, 1], ["a", "b"]) == ["b", "a", "b", "a"]
