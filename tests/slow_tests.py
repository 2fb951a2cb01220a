"""Tests that the default run leaves out beside those marked in place.

Each is a further variant of something that the default run tests, or a feature
that it tests in another way; the default run has to stay under twenty minutes
on two cores. Patterns of node ids; `[` and `]` stand for themselves.
"""

PATTERNS = (
    # Compiling the step takes long; the other optimizers show the same.
    "tests/contract/test_contract.py::test_cell[KFAC-average_of_weights]",
    "tests/contract/test_contract.py::test_cell[KFAC-backup]",
    "tests/contract/test_contract.py::test_cell[KFAC-clipping]",
    "tests/contract/test_contract.py::test_cell[KFAC-gradient_accumulation]",
    "tests/contract/test_contract.py::test_cell[KFAC-loss_scale_factor]",
    "tests/contract/test_contract.py::test_cell[KFAC-mirrored_strategy]",
    "tests/contract/test_contract.py::test_cell[KFAC-partial_batches]",
    "tests/contract/test_contract.py::test_cell[RNGD-*]",
    "tests/heads/test_contract.py::test_eager_and_compiled*-xla]",
    "tests/optimizers/test_every_optimizer.py::test_modes_agree[*-graph]",
    "tests/optimizers/test_every_optimizer.py::test_modes_agree[*-many]",
    "tests/optimizers/test_natural_gradient.py::test_primal*[normal-0.7]",
    "tests/callbacks/test_monitor.py::test_refresh_is_timed*[xla]",
    "tests/optimizers/test_host_refresh.py::test_host_equals_graph[kwargs*True]",
    "tests/training/test_loss_fallbacks.py::test_ctc[xla]",
    # Variants of what the default run has in another mode or model.
    "tests/training/test_side_effects.py::test_second*no_trace[False]",
    "tests/optimizers/test_every_optimizer.py::test_modes_agree[kfac-xla]",
    "tests/blocks/test_eigen.py::test_modes_agree[xla]",
    "tests/training/test_head_training.py::test_modes_agree[normal]",
    "tests/models/test_zoo.py::test_trains[autoencoder]",
    "tests/training/test_layer_families.py::test_tied*refreshed_on_the_host",
    "tests/training/test_loss_fallbacks.py::test_training[mape]",
    "tests/optimizers/test_retraction.py::test_exploding*taken_back[xla]",
    "tests/training/test_layer_families.py::test_tied*with_a_chosen_block",
    # Further optimizers on two replicas.
    "tests/distribution/test_mirrored.py::test_an_eigenbasis[*",
    "tests/distribution/test_mirrored.py::test_halves_of_unequal_weight[kfac]",
    "tests/distribution/test_mirrored.py::test_custom_loop",
    "tests/distribution/test_mirrored.py::test_default_arguments_learn",
    "tests/distribution/test_mirrored.py::test_eager",
    "tests/distribution/test_mirrored.py::test_mixed_precision*",
    "tests/distribution/test_mirrored.py::*[fixed]",
    "tests/distribution/test_mirrored.py::*[full]",
    "tests/distribution/test_mirrored.py::*[spring]",
    "tests/distribution/test_mirrored.py::*[rngd_identity]",
    "tests/distribution/test_mirrored.py::test_halves_of_unequal_weight[rngd]",
    "tests/distribution/test_mirrored.py::test_halves_of_unequal_weight[prong]",
    # Two processes that load TensorFlow; two replicas are tested in one.
    "tests/distribution/test_workers.py::test_two_workers_equal_one",
    # A whole search; tests/test_tuner.py has shorter ones.
    "tests/examples/test_examples.py::test_keras_tuner_search",
    "tests/test_docs_code.py::test_docstring[tuner.NaturalGradientHyperModel]",
    # Whole examples, whose optimizers and heads have tests of their own.
    "tests/examples/test_examples.py::test_count_regression",
    "tests/examples/test_examples.py::test_distributed_mirrored",
    "tests/examples/test_examples.py::test_heteroscedastic_regression",
    "tests/examples/test_examples.py::test_natural_gradient_cg",
    "tests/examples/test_examples.py::test_rngd_mnist",
    # Further layers and heads.
    "tests/integrations/test_tf_keras.py::test_a_*",
    "tests/integrations/test_tf_keras.py::test_steps_equal*[convolutional*",
    "tests/integrations/test_tf_keras.py::test_steps_equal*[sequences*",
    "tests/integrations/test_tf_keras.py::test_steps_equal*[normalized*",
    "tests/training/test_head_training.py::test_default*[dirichlet]",
    "tests/training/test_head_training.py::test_default*[gamma]",
    "tests/training/test_head_training.py::test_default*[joint]",
    "tests/training/test_head_training.py::test_default*[mixture]",
    "tests/training/test_head_training.py::test_default*[mvn]",
    "tests/training/test_head_training.py::test_default*[negative_binomial]",
    "tests/training/test_head_training.py::test_modes_agree[gamma]",
    "tests/capture/test_attention.py::test_group_query*[True-*",
    "tests/capture/test_attention.py::test_multi_head*[one head]",
    "tests/curvature/test_fallback_layers.py::test_average*[LSTM, all steps]",
    "tests/curvature/test_fallback_layers.py::test_average*[stacked cells]",
    "tests/optimizers/test_reference_step.py::test_a_rate*[*-0.0-*",
    "tests/optimizers/test_reference_step.py::test_a_rate*[*-0.5-*",
    "tests/callbacks/test_keras_callbacks.py::test_backup_and_restore[False]",
    "tests/distribution/test_mirrored.py::test_two_replicas_equal_one[rngd]",
)
