"""K-FAC with default arguments on the architectures of `keras.applications`.

Each model is built with random weights for ten classes, attached, and trained
a few steps on one batch of random images, in a process of its own. What was
done before is not done again, unless it is named.

    python -m benchmarks.models --minutes 30
    python -m benchmarks.models --only MobileNetV2
    python -m benchmarks.models --table
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "models.json"
PAGE_FILE = ROOT / "docs" / "models.md"
SIDE, CLASSES, BATCH = 64, 10, 8
# A model whose steps are slow makes fewer, once its loss has fallen.
STEPS, LEAST_STEPS, STEP_SECONDS = 8, 3, 60.0
# Bytes a model may take: more is skipped, with the reason in the table.
LIMIT = 18 * 2**30
SECONDS = 2700.0
# glibc keeps freed tensors of up to 32 MB for itself; with this it gives back
# what is larger than 1 MB. ResNet50 then holds 1.6 GiB between steps, not 2.8.
RETURNED = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}

# All of keras.applications, by their number of parameters.
MODELS = (
    "MobileNetV3Small",
    "MobileNetV2",
    "MobileNetV3Large",
    "MobileNet",
    "EfficientNetB0",
    "NASNetMobile",
    "EfficientNetV2B0",
    "EfficientNetB1",
    "EfficientNetV2B1",
    "DenseNet121",
    "EfficientNetB2",
    "EfficientNetV2B2",
    "EfficientNetB3",
    "DenseNet169",
    "EfficientNetV2B3",
    "EfficientNetB4",
    "DenseNet201",
    "EfficientNetV2S",
    "Xception",
    "InceptionV3",
    "ResNet50V2",
    "ResNet50",
    "VGG16",
    "VGG19",
    "ConvNeXtTiny",
    "EfficientNetB5",
    "EfficientNetB6",
    "ResNet101V2",
    "ResNet101",
    "ConvNeXtSmall",
    "EfficientNetV2M",
    "InceptionResNetV2",
    "ResNet152V2",
    "ResNet152",
    "EfficientNetB7",
    "NASNetLarge",
    "ConvNeXtBase",
    "EfficientNetV2L",
    "ConvNeXtLarge",
    "ConvNeXtXLarge",
)


def build(name: str) -> tuple[Any, int]:
    """Returns the model, and the side of its images."""
    import keras

    make = getattr(keras.applications, name)
    side = SIDE
    while True:
        shape = (side, side, 3)
        try:
            return make(weights=None, classes=CLASSES, input_shape=shape), side
        except ValueError as error:
            least = re.search(r"at least (\d+)", str(error))
            if least is None or int(least[1]) <= side:
                raise
            side = int(least[1])


def record(name: str) -> dict[str, Any]:
    """Trains one model and returns its row."""
    import keras
    import numpy as np

    import keras_natgrad as kng

    keras.utils.set_random_seed(0)
    model, side = build(name)
    dropped = without_dropout(model)
    optimizer = kng.KFAC()
    with warnings.catch_warnings():  # The reasons are recorded below.
        warnings.simplefilter("ignore", UserWarning)
        optimizer.attach(model)
    model.compile(
        optimizer, "sparse_categorical_crossentropy", run_eagerly=True
    )
    optimizer.build(model.trainable_variables)
    row = {"side": side, "parameters": model.count_params(), **blocks(model)}
    weights = 4 * model.count_params()
    # Weights, gradient, direction and momentum, and the factors.
    least = 4 * weights + row["curvature_bytes"]
    if least > LIMIT:
        return {**row, "skipped": f"needs more than {least / 2**30:.1f} GiB"}
    generator = np.random.default_rng(0)
    x = generator.uniform(0, 255, (BATCH, side, side, 3)).astype("float32")
    if not preprocesses(model):
        x = x / 127.5 - 1
    y = np.arange(BATCH) % CLASSES
    losses, seconds = [], []
    for step in range(STEPS):
        slow = sum(seconds) > STEP_SECONDS
        if step >= LEAST_STEPS and slow and losses[-1] < losses[0]:
            break
        start = time.perf_counter()
        # Not `fit`: at the end of an epoch it waits for a thread of tf.data
        # that sleeps twice as long each time, up to a minute.
        losses.append(float(model.train_on_batch(x, y)))
        seconds.append(time.perf_counter() - start)
        print(step, losses[-1], seconds[-1], file=sys.stderr, flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        **row,
        "dropout_off": dropped,
        "losses": losses,
        "seconds": seconds,
        "retracted": int(optimizer.statistics["retracted"]),
        "peak_bytes": peak,
        "memory_given_back": RETURNED.items() <= os.environ.items(),
    }


def without_dropout(model: Any) -> int:
    """Turns dropout and stochastic depth off, and returns their number.

    With them the loss of a step at eight examples is mostly noise.
    """
    count = 0
    for layer in model.layers:
        for name in ("rate", "drop_path_rate"):
            if getattr(layer, name, 0):
                setattr(layer, name, 0.0)
                count += 1
    return count


def preprocesses(model: Any) -> bool:
    """Returns whether the model takes images of 0 to 255."""
    import keras

    kinds = (keras.layers.Rescaling, keras.layers.Normalization)
    return any(isinstance(layer, kinds) for layer in model.layers)


def blocks(model: Any) -> dict[str, Any]:
    """Returns how the parameters are divided, and why some fall back."""
    curvature = model.optimizer.curvature
    sizes = {"captured": 0, "fallback": 0, "first_order": 0}
    for entry in curvature.entries:
        if entry.block.kind in ("first_order", "identity"):
            sizes["first_order"] += entry.block.shape.size
        else:
            kind = "fallback" if entry.layer is None else "captured"
            sizes[kind] += entry.block.shape.size
    reasons: dict[str, int] = {}
    for reason in curvature.plan.reasons:
        reasons[reason] = reasons.get(reason, 0) + 1
    return {
        **{kind: size / curvature.size for kind, size in sizes.items()},
        "trainable": curvature.size,
        "reasons": reasons,
        "curvature_bytes": sum(4 * e.block.memory for e in curvature.entries),
    }


def run_child(name: str) -> dict[str, Any]:
    """Runs one model in a process of its own, within memory and time."""
    command = [sys.executable, "-m", "benchmarks.models", "--child", name]
    start = time.monotonic()
    with subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **RETURNED},
    ) as child:
        while child.poll() is None:
            time.sleep(0.5)
            if resident(child.pid) > LIMIT:
                child.kill()
                return {"skipped": f"took more than {LIMIT / 2**30:.0f} GiB"}
            if time.monotonic() - start > SECONDS:
                child.kill()
                return {"skipped": f"took more than {SECONDS:.0f} s"}
        lines = child.stdout.read().splitlines() if child.stdout else []
    if child.returncode or not lines:
        return {"failed": f"ended with status {child.returncode}"}
    return json.loads(lines[-1])


def resident(pid: int) -> int:
    """Returns the bytes of memory that a process holds (on Linux)."""
    try:
        pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    except (OSError, IndexError):
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def page(rows: dict[str, Any]) -> str:
    """Returns the page of all models."""
    lines = [
        table_row(n, rows[n]) for n in MODELS if "losses" in rows.get(n, {})
    ]
    notes = []
    for name in MODELS:
        row = rows.get(name, {})
        for kind in ("skipped", "failed"):
            if kind in row:
                notes.append(f"- `{name}`: {kind}: {row[kind]}.")
        for reason, count in row.get("reasons", {}).items():
            notes.append(f"- `{name}`: {count} × {reason}.")
    missing = ", ".join(f"`{n}`" for n in MODELS if n not in rows)
    if missing:
        notes.append(f"- Not run yet: {missing}.")
    return PAGE.format(
        table="\n".join([HEAD, *lines]),
        notes="\n".join(notes) or "None.",
        count=len(lines),
        total=len(MODELS),
        batch=BATCH,
        steps=STEPS,
        least=LEAST_STEPS,
        side=SIDE,
        classes=CLASSES,
    )


def table_row(name: str, row: dict[str, Any]) -> str:
    """Returns the line of one model."""
    losses = row["losses"]
    cells = [
        f"`{name}`" + (" †" if row.get("memory_given_back") else ""),
        f"{row['side']}²",
        f"{row['parameters'] / 1e6:.1f} M",
        *(f"{row[k]:.1%}" for k in ("captured", "fallback", "first_order")),
        str(len(losses)),
        f"{losses[0]:.2f} → {losses[-1]:.2g}",
        f"{min(losses):.2g}",
        str(row["retracted"]),
        f"{statistics.median(row['seconds'][1:]):.1f}",
        f"{row['curvature_bytes'] / 2**20:,.0f} MiB",
        f"{row['peak_bytes'] / 2**30:.1f} GiB",
    ]
    return f"| {' | '.join(cells)} |"


HEAD = """\
| model | image | parameters | captured | fallback | first order | steps \
| loss | least | taken back | s / step | curvature | peak |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: \
| ---: | ---: |"""

PAGE = """\
# Whole models

## Applications

`KFAC()` with default arguments on {count} of {total} architectures: those of
`keras.applications`, with random weights and {classes} classes, on one batch of
{batch} random images of {side} × {side} pixels (or the smallest that the model
takes), {steps} steps (fewer, at least {least}, where they are slow), float32,
eagerly on one or two cores, with other work beside.

- captured, fallback, first order: shares of the trainable parameters, as
  `optimizer.summary()` prints them ([layers](layers.md));
- loss: of the training pass of the first and the last step; least: of all
  steps. Dropout and stochastic depth are off: at eight examples the loss of a
  step is mostly their noise;
- taken back: steps after which the loss surged, and which were undone;
- s / step: median after the first step. In these first steps all statistics
  and inverses are computed anew, as the warm-up of the periods asks;
- curvature: state of the blocks; peak: memory of the whole process (†: where
  freed memory is given back, see below).

`python -m benchmarks.models` writes this page. It shows what attaches and
trains; it is no measurement of speed. In these runs layers had learning rates
of their own on small batches, too ([defaults](defaults_and_divergence.md)).

{table}

Fallbacks, and what was not run:

{notes}

In none of the {total} does a variable fall back
(`tests/models/test_applications.py`). Preprocessing layers (`Rescaling`,
`Normalization`) and stochastic depth have nothing to train; the scale per
channel of ConvNeXt is captured.

Without normalisation (`VGG16`, `VGG19`) the first steps are far too long: they
are taken back, and the damping rises tenfold, then a hundred and a thousand
times, until one holds; only then does the loss fall. In no other model is a
step taken back. The models of ConvNeXt, whose scales per channel start at 10⁻⁶,
fall slowest.

### Memory

On Linux, eager steps on a CPU hold more than they need: glibc keeps freed
tensors of up to 32 MB. With

```sh
export MALLOC_MMAP_THRESHOLD_=1048576
```

set before Python starts, `ResNet50` holds 1.6 GiB after two steps, not 2.8, at
a peak of 2.4; the state of its blocks is 0.7. The rows with † ran so.

## Small versions of other models

`tests/models` trains these from the first step, with default arguments:

| model | what falls back |
| --- | --- |
| ResNet for CIFAR | nothing |
| GPT: causal attention, output tied to the embedding | the embedding: tied |
| LSTM language model | weights of the LSTM: a loop |
| U-Net | nothing |
| variational autoencoder, subclassed, with `add_loss` | nothing |
| recommender of two towers | nothing |

The first step of the recommender surged and was taken back, as were up to three
of the first seven steps of a U-Net of depth two (the test has depth one).

## A limit: losses added by a layer

What a layer adds with `add_loss` enters the gradient, not the curvature (only
that of L2 regularizers is known). Automatic steps can then be too long. The
variational autoencoder of the tests, with pixels of pure noise and 128 examples
in one batch, lost what it had gained after some ten steps with `KFAC()` (for
seed 1: 0.72 → 0.68, then 1.2) and with `KFAC(kng.LineSearch())`. It did not
without its added loss, nor, for the same seed, with `KFAC(damping=0.1)` or
`KFAC(0.1, 0.9, 0.01)`. If the loss of such a model surges, set the damping.
"""


def main() -> None:
    """Runs what is missing and writes results and table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=MODELS)
    parser.add_argument("--minutes", type=float, help="start no model after")
    parser.add_argument(
        "--table", action="store_true", help="write the page only"
    )
    parser.add_argument("--child", choices=MODELS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(record(arguments.child)))
        return
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if arguments.table:
        PAGE_FILE.write_text(page(rows), encoding="utf-8")
        return
    start = time.monotonic()
    for name in arguments.only or MODELS:
        if name in rows and not arguments.only:
            continue
        if arguments.minutes and time.monotonic() - start > (
            60 * arguments.minutes
        ):
            break
        rows[name] = run_child(name)
        print(name, json.dumps(rows[name]), flush=True)
        RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
        PAGE_FILE.write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
