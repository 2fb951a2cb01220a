"""Benchmarks of `keras_natgrad` against first-order optimizers and kfac-jax."""
