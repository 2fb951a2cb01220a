import json
import sys
import textwrap
import types

import numpy as np
import pytest

from benchmarks import overhead, run, table
from benchmarks.child import ChildContender
from benchmarks.curve import Curve
from benchmarks.methods import Method, Setting
from benchmarks.runner import Budget, Run, race
from benchmarks.tasks import MeanSquaredErrorTask
from benchmarks.timing import KerasContender


class Line(MeanSquaredErrorTask):
    name = "line"
    metric = "mean squared error"
    target = 0.01
    sizes = (3, 8, 1)
    activations = ("tanh", None)
    default_batch_size = 16
    eval_every = 20


@pytest.fixture
def line():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(64, 3)).astype("f")
    y = (x @ np.float32([[1.0], [-0.5], [0.3]])).astype("f")
    return Line((x, y), (x, y))


ADAM = Method.parse("adam:learning_rate=0.05")


def test_adam_reaches_the_target(line):
    one = Run(KerasContender(line, ADAM, seed=0))
    other = Run(KerasContender(line, Method.parse("sgd"), seed=0))
    assert one.curve.metric == pytest.approx(other.curve.metric)
    race([one, other], Budget(line.target, 20, steps=600))
    record = one.record(line.target)
    assert 0 < record["steps_to_target"] <= one.contender.step < 600
    assert 0 < record["seconds_to_target"] <= one.seconds
    assert record["curve"]["metric"][-1] <= line.target
    assert record["compile_seconds"] > 0


def test_warm_up_leaves_no_trace(line):
    contender = KerasContender(line, ADAM, seed=3)
    fresh = line.build_model(3)
    assert contender.evaluate() == line.evaluate(fresh)
    fresh.compile(ADAM.build(fresh, Setting()), line.loss())
    batches = line.batches(3)
    for _ in range(20):
        fresh.train_on_batch(*next(batches))
    contender.advance(20)
    assert contender.evaluate() == pytest.approx(line.evaluate(fresh), 1e-4)


def test_steps_must_fill_executions(line):
    contender = KerasContender(line, ADAM, steps_per_execution=4)
    contender.advance(8)
    assert contender.step == 8
    with pytest.raises(ValueError, match="steps_per_execution=4"):
        contender.advance(6)


def test_a_diverging_run_stops(line):
    diverging = Run(KerasContender(line, Method.parse("sgd"), Setting(1e20)))
    race([diverging], Budget(line.target, 20, steps=10_000))
    assert diverging.contender.step < 1000
    record = diverging.record(line.target)
    assert record["diverged"] and record["steps_to_target"] is None
    json.dumps(record, allow_nan=False)


def test_target_is_interpolated():
    curve = Curve()
    curve.append(0, 0.0, 9.0)
    curve.append(10, 2.0, 7.0)
    curve.append(20, 4.0, 3.0)
    assert curve.to_target(4.0) == pytest.approx((17.5, 3.5))
    assert curve.to_target(9.5) == (0.0, 0.0)
    assert curve.to_target(1.0) is None


def test_methods_are_parsed():
    method = Method.parse("kfac:damping=0.1,fisher=sampled", {"momentum": 0.9})
    assert method.options == {
        "damping": 0.1,
        "fisher": "sampled",
        "momentum": 0.9,
    }
    assert not method.first_order
    with pytest.raises(ValueError, match="Received: text='adamw'"):
        Method.parse("adamw")


def test_kfac_is_attached_to_the_model(line, monkeypatch):
    class Stub:
        def __init__(self, **options):
            self.options = options

        def attach(self, model):
            self.model = model
            return self

    module = types.SimpleNamespace(KFAC=Stub)
    monkeypatch.setitem(sys.modules, "keras_natgrad", module)
    model = line.build_model(0)
    optimizer = Method.parse("kfac:damping=0.1").build(model, Setting())
    assert optimizer.model is model
    assert optimizer.options == {"damping": 0.1}


def test_muon_leaves_output_and_biases_to_adam(line):
    model = line.build_model(0)
    optimizer = Method.parse("muon").build(model, Setting(0.01))
    optimizer.build(model.trainable_variables)
    by_adam = [
        "/".join(variable.path.split("/")[-2:])
        for variable, velocity in zip(
            model.trainable_variables, optimizer.adam_velocities, strict=True
        )
        if velocity is not None
    ]
    assert by_adam == ["hidden_0/bias", "output/kernel", "output/bias"]
    assert optimizer.weight_decay is None


CHILD = """
import json, sys, time
metric = 8.0
print(json.dumps({"compile_seconds": 0.5, "versions": {"x": "1"}}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    if request["command"] == "advance":
        metric /= 2
        print(json.dumps({"seconds": 0.1 * request["steps"]}), flush=True)
    else:
        print(json.dumps({"metric": metric}), flush=True)
"""


def test_a_child_takes_part_in_the_race():
    command = [sys.executable, "-c", textwrap.dedent(CHILD)]
    run_ = Run(ChildContender("child", command))
    race([run_], Budget(target=3.0, eval_every=10, steps=100))
    run_.contender.close()
    record = run_.record(3.0)
    assert record["curve"]["metric"] == [8.0, 4.0, 2.0]
    assert record["steps_to_target"] == pytest.approx(15)
    assert record["seconds_to_target"] == pytest.approx(1.5)
    assert record["settings"] == {"versions": {"x": "1"}}


def test_a_child_that_fails_is_reported():
    with pytest.raises(RuntimeError, match="ended with status 3"):
        ChildContender("child", [sys.executable, "-c", "exit(3)"])


def test_step_times_are_compared_in_turn():
    calls = []

    class Fixed:
        compile_seconds = 1.0

        def __init__(self, name, seconds):
            self.name = name
            self.seconds = seconds

        def advance(self, steps):
            calls.append(self.name)
            return steps * self.seconds

    rows = overhead.measure([Fixed("a", 0.001), Fixed("b", 0.004)], 3, 5)
    assert [row["ratio"] for row in rows] == pytest.approx([1.0, 4.0])
    assert calls == ["b", "a", "a", "b", "b", "a", "a", "b"]
    assert "| b | 4.00× | 4.00 | 1.0 |" in overhead.table(rows)


def test_command_line(tmp_path, monkeypatch, line, capsys):
    monkeypatch.setattr(run, "make_task", lambda *arguments: line)
    out = tmp_path / "results.json"
    run.main(
        ["--task", "diabetes", "--methods", "adam:learning_rate=0.05", "sgd"]
        + ["--seeds", "0", "1", "--steps", "400", "--out", str(out)]
    )
    results = json.loads(out.read_text())
    assert [(r["method"], r["seed"]) for r in results["runs"]] == [
        ("adam:learning_rate=0.05", 0),
        ("sgd", 0),
        ("adam:learning_rate=0.05", 1),
        ("sgd", 1),
    ]
    assert set(results) >= {
        *("task", "metric", "target", "batch_size", "parameters", "seeds"),
        "environment",
    }
    for record in results["runs"]:
        curve = record["curve"]
        assert curve["steps"][:2] == [0, 20]
        assert len(curve["seconds"]) == len(curve["metric"])
        assert record["median_step_seconds"] > 0
    assert table.markdown(results) in capsys.readouterr().out
    table.main([str(out), "--png", str(tmp_path / "curves.png")])
    assert (tmp_path / "curves.png").stat().st_size > 1000


@pytest.mark.slow
def test_tuning_from_the_command_line(tmp_path, monkeypatch, line):
    monkeypatch.setattr(run, "make_task", lambda *arguments: line)
    monkeypatch.setattr(
        run, "learning_rates", lambda method, scale: [0.01, 0.05]
    )
    tuned, out = tmp_path / "tuned.json", tmp_path / "results.json"
    arguments = ["--task", "diabetes", "--methods", "adam", "--steps", "300"]
    run.main([*arguments, "--tune", "--out", str(tuned)])
    best = json.loads(tuned.read_text())["line"]["adam"]["best"]
    run.main([*arguments, "--tuned", str(tuned), "--out", str(out)])
    (record,) = json.loads(out.read_text())["runs"]
    assert record["settings"]["learning_rate"] == best["learning_rate"]
    assert record["settings"]["horizon"] == best["horizon"]
    assert record["steps_to_target"] == pytest.approx(
        best["steps_to_target"], rel=1e-3
    )
