"""Series, windows, splits, baselines and the training loop."""

import numpy as np
import pytest
import torch

from cellstep.nn import Forecaster
from cellstep.train import baseline_errors, fit, load_series, load_task, mean_absolute_error, sample_path


def write_series(path, rows=400, columns=2, times=False, seed=0):
    noise = np.random.default_rng(seed).normal(size=(rows, columns))
    wave = np.sin(np.arange(rows)[:, None] / 5 + np.arange(columns)) + 0.05 * noise
    header = ",".join([*(["time"] if times else []), *(f"c{k}" for k in range(columns))])
    start = np.datetime64("2024-01-01T00", "h")
    lines = [
        ",".join([*([str(start + row)] if times else []), *(f"{value:.6g}" for value in values)])
        for row, values in enumerate(wave)
    ]
    path.write_text("\n".join([header, *lines]) + "\n")
    return path


def test_sample_task_is_the_one_its_readme_describes():
    task = load_task(load_series(sample_path), "ghi_wm2")
    assert task.series.names[0] == "air_temperature_c" and len(task.features) == 10
    errors = baseline_errors(task)
    assert errors["the last value"] == pytest.approx(86.2, abs=0.05)
    assert errors["the value a day before the target"] == pytest.approx(48.4, abs=0.05)
    assert errors["linear regression on the last 24 steps"] == pytest.approx(51.5, abs=0.2)
    for part, days in ((task.train, range(1, 21)), (task.validation, range(21, 25)), (task.test, range(25, 32))):
        times = task.series.times[part.ends + task.horizon]
        assert {int(str(time)[8:10]) for time in times} <= set(days)
        # No window and no target crosses a gap: every step of it is an hour.
        span = times - task.series.times[part.ends - 47]
        assert (span == np.timedelta64(50, "h")).all()


def test_chronological_split_shares_no_row(tmp_path):
    task = load_task(load_series(write_series(tmp_path / "s.csv")), "c1", window=10, horizon=2)
    train, validation, test = (part.ends for part in (task.train, task.validation, task.test))
    assert train.max() + 2 < validation.min() - 9 and validation.max() + 2 < test.min() - 9
    assert task.inputs(task.train).shape == (len(train), 10, 2)
    values = task.series.values
    assert np.array_equal(task.inputs(task.test)[3], values[test[3] - 9 : test[3] + 1])
    assert task.targets(task.test)[3] == values[test[3] + 2, 1]


def test_two_months_split_by_day(tmp_path):
    task = load_task(load_series(write_series(tmp_path / "s.csv", 24 * 60, times=True)), "c0", window=24, horizon=1)
    days = {int(str(time)[8:10]) for time in task.series.times[task.test.ends + 1]}
    assert min(days) == 25 and task.series.steps_per_day == 24


def test_training_learns_and_repeats(tmp_path):
    task = load_task(load_series(write_series(tmp_path / "s.csv")), "c1", window=16, horizon=2)
    errors = []
    for _ in range(2):
        torch.manual_seed(0)
        model = Forecaster(2, 12)
        seen = []
        result = fit(
            model,
            task,
            epochs=60,
            patience=60,
            learning_rate=1e-2,
            on_epoch=lambda epoch, error, seen=seen: seen.append(error),
        )
        errors.append(mean_absolute_error(model, task, task.test))
        assert result.validation_error == min(seen) == seen[result.best_epoch - 1]
        assert mean_absolute_error(model, task, task.validation) == pytest.approx(result.validation_error)
    assert errors[0] == errors[1]
    assert errors[0] < 0.5 * baseline_errors(task)["the last value"]
    assert model.feature_names == ["c0", "c1"] and model.output_names == ["c1"]
    assert (model.window, model.horizon) == (16, 2) and not model.training


def test_early_stopping_restores_the_best_weights(tmp_path):
    task = load_task(load_series(write_series(tmp_path / "s.csv")), "c0", window=8, horizon=1)
    torch.manual_seed(0)
    model = Forecaster(2, 4)
    # With a learning rate this large the error soon rises again.
    result = fit(model, task, epochs=60, patience=2, learning_rate=0.3)
    assert result.epochs - result.best_epoch == 2 or result.epochs == 60
    assert mean_absolute_error(model, task, task.validation) == pytest.approx(result.validation_error)


def test_loss_that_is_not_finite_is_an_error(tmp_path):
    task = load_task(load_series(write_series(tmp_path / "s.csv")), "c0", window=8, horizon=1)
    model = Forecaster(2, 4)
    with torch.no_grad():
        model.head.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="expected a finite loss"):
        fit(model, task, epochs=1)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, "expected a header line"),
        ("a,b\n", {}, "expected data rows"),
        ("a\nx\ny\n", {}, "expected at least one column of numbers"),
        ("a,b\n1,2\n3\n", {}, "line 3 has 1"),
        ("a,b\n1,2\n3,x\n", {}, "column 'b'; '.*' line 3 has 'x'"),
        ("a,b\n" + "1,2\n" * 200, {"target": "c"}, "'c' is not among those"),
        ("a,b\n" + "1,2\n" * 200, {"features": ["a", "z"]}, "'z' is not among those"),
        ("a,b\n" + "1,2\n" * 20, {}, "expected at least 51 rows without a gap"),
        ("a,b\n" + "1,2\n" * 60, {}, "leaves none; give more rows"),
        ("a,b\n" + "1,2\n" * 60, {"window": 0}, "expected a window of at least 1"),
    ],
)
def test_bad_series(tmp_path, text, options, message):
    path = tmp_path / "s.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_task(load_series(path), **{"target": "a", **options})
