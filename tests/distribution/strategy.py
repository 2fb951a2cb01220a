"""The strategy that all tests of a process share."""

import functools

import tensorflow as tf


@functools.cache
def two_replicas():
    """Two replicas on two logical CPUs.

    Collective operations of a second strategy would clash with its.
    """
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
