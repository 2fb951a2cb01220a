"""What Keras users do with an optimizer, one function per feature.

A function takes `make`, which creates the optimizer from keyword arguments,
and the test's temporary folder; it asserts that the feature works. Its
docstring is the feature's row in the table of docs/keras_contract.md.
"""

from tests.contract import arguments, logs, models, running, saving

FEATURES_IN_ORDER = {
    "Arguments": (
        arguments.default_arguments,
        arguments.configuration,
        arguments.learning_rate_schedule,
        arguments.changed_learning_rate,
        arguments.weight_decay,
        arguments.clipping,
        arguments.average_of_weights,
        arguments.loss_scale_factor,
        arguments.gradient_accumulation,
    ),
    "Precision": (
        running.mixed_float16,
        running.mixed_bfloat16,
        running.overflow,
    ),
    "Running": (
        running.several_optimizers,
        running.graph,
        running.xla,
        running.steps_per_execution,
        running.run_eagerly,
        running.train_on_batch,
        running.own_loop,
        running.bad_data,
        running.partial_batches,
        running.mirrored_strategy,
    ),
    "Saving": (
        saving.saved_model_file,
        saving.weights_file,
        saving.checkpoints,
        saving.backup,
        saving.tensorflow_checkpoint,
        saving.orbax,
        saving.state_tree,
        saving.export,
        saving.clone,
        saving.two_models,
    ),
    "Models": (
        models.subclassed,
        models.frozen_layers,
        models.shared_layers,
        models.embeddings,
        models.weighted_examples,
        models.regularizers,
        models.reductions,
        models.low_rank,
    ),
    "Logs": (logs.logs, logs.tensorboard, logs.summary, logs.not_attached),
}

# Those whose path through an optimizer depends on its arguments.
FEATURES_OF_VARIANTS = (
    arguments.default_arguments,
    arguments.configuration,
    arguments.weight_decay,
    arguments.clipping,
    arguments.average_of_weights,
    arguments.loss_scale_factor,
    arguments.gradient_accumulation,
    running.graph,
    running.xla,
    running.steps_per_execution,
    running.own_loop,
    running.bad_data,
    running.partial_batches,
    saving.saved_model_file,
    logs.summary,
    logs.not_attached,
)
