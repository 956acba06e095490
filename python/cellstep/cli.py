"""The ``cellstep`` command. What a user can mend is one line on standard error and exit code 2."""

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from rich.console import Console
from rich.table import Table

# torch, NumPy and matplotlib are imported inside the commands, so that --help answers at once.
if TYPE_CHECKING:
    from cellstep.nn import Forecaster
    from cellstep.train import Task
    from cellstep.verification import Report

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, help=__doc__)

_console = Console(width=None if sys.stdout.isatty() else 100)
_errors = Console(stderr=True)


def _version(wanted: bool) -> None:
    if wanted:
        import cellstep

        print(f"cellstep {cellstep.__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """One LSTM, everywhere it has to run."""


@app.command()
def train(
    data: Annotated[Optional[Path], typer.Argument(help="A CSV file; default: the sample series.")] = None,  # noqa: UP045
    target: Annotated[Optional[str], typer.Option(help="The column to forecast.")] = None,  # noqa: UP045
    features: Annotated[Optional[str], typer.Option(help="Columns to see, with commas; default: all.")] = None,  # noqa: UP045
    window: Annotated[int, typer.Option(min=1, help="Steps that the model sees.")] = 48,
    horizon: Annotated[int, typer.Option(min=1, help="Steps from the last one seen to the one forecast.")] = 3,
    hidden: Annotated[int, typer.Option(min=1, help="Units of a layer.")] = 50,
    layers: Annotated[int, typer.Option(min=1, help="LSTM layers.")] = 2,
    epochs: Annotated[int, typer.Option(min=1, help="At most so many; training stops early.")] = 20,
    seed: Annotated[int, typer.Option(help="Decides initial weights and the order of the windows.")] = 0,
    output: Annotated[Path, typer.Option(help="The .safetensors file to write.")] = Path("forecaster.safetensors"),
    plot: Annotated[Optional[Path], typer.Option(help="Draw forecast against truth as PNG.")] = None,  # noqa: UP045
) -> None:
    """Train a forecaster; with no argument on the sample series: solar radiation three hours ahead."""
    import torch

    import cellstep
    from cellstep.nn import Forecaster
    from cellstep.train import baseline_errors, fit, load_series, load_task, mean_absolute_error, sample_path

    if output.suffix != ".safetensors":
        raise ValueError(f"expected an --output that ends in .safetensors; got '{output}'; export makes the others")
    if data is None:
        target = target or "ghi_wm2"
    elif target is None:
        raise ValueError("expected --target, the column to forecast; got none; name a column of the CSV file")
    columns = [name.strip() for name in features.split(",")] if features else None
    series = load_series(data or sample_path)
    task = load_task(series, target, columns, window, horizon)

    torch.manual_seed(seed)
    model = Forecaster(len(task.features), hidden, layers)
    result = _with_progress(model, task, epochs, seed, fit)
    cellstep.save(model, output)

    print(
        f"{target}, {horizon} steps ahead of {window} steps of {len(task.features)} columns; "
        f"{len(task.train)} windows to train on, {len(task.validation)} to validate, {len(task.test)} to test."
    )
    print(f"Best of {result.epochs} epochs: {result.best_epoch}, validation error {result.validation_error:.2f}.")
    table = Table(title=f"mean absolute error on the test windows, in the unit of {target}")
    table.add_column("forecast")
    table.add_column("error", justify="right")
    for name, error in baseline_errors(task).items():
        table.add_row(name, f"{error:.2f}")
    table.add_row("this model", f"{mean_absolute_error(model, task, task.test):.2f}", style="bold")
    _console.print(table)
    print(f"Saved as {output}.")
    if plot is not None:
        _plot(model, task, plot)
        print(f"Drawn as {plot}.")


def _with_progress(model: "Forecaster", task: "Task", epochs: int, seed: int, fit: Any) -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    batches = -(-len(task.train) // 64)
    columns = (
        TextColumn("epoch {task.fields[epoch]}/" + str(epochs)),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}, validation {task.fields[error]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=_errors) as progress:
        bar = progress.add_task("", total=epochs * batches, epoch=1, loss=0.0, error="-")
        return fit(
            model,
            task,
            epochs=epochs,
            batch_size=64,
            seed=seed,
            on_batch=lambda epoch, loss: progress.update(bar, advance=1, epoch=epoch, loss=loss),
            on_epoch=lambda epoch, error: progress.update(bar, error=f"{error:.2f}"),
        )


def _plot(model: "Forecaster", task: "Task", path: Path) -> None:
    """The longest unbroken stretch of test windows, forecast and truth."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np
    import torch

    ends = task.test.ends
    runs = np.split(np.arange(len(ends)), np.flatnonzero(np.diff(ends) != 1) + 1)
    # The stretch of the largest values is where a forecast shows best; the nights of a winter all look alike.
    truth = task.targets(task.test)
    run = max(runs, key=lambda places: (min(len(places), 96), truth[places].mean()))[:168]
    with torch.no_grad():
        forecast = model(torch.from_numpy(task.inputs(task.test)[run]).float()).numpy()[:, 0]
    times = task.series.times
    at: Any = ends[run] + task.horizon if times is None else times[ends[run] + task.horizon]

    figure, axes = plt.subplots(figsize=(10, 4), layout="constrained")
    axes.plot(at, truth[run], color="0.25", linewidth=1.5, label="measured")
    axes.plot(at, forecast, color="tab:orange", linewidth=1.5, label=f"forecast, {task.horizon} steps ahead")
    axes.set_ylabel(task.target)
    axes.set_xlabel("row" if times is None else "time")
    axes.set_title(f"{task.target}: forecast against truth on test windows")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


@app.command()
def export(
    model: Annotated[Path, typer.Argument(help="A .safetensors file.")],
    outputs: Annotated[
        list[Path], typer.Argument(help="Files to write: .pt, .pt2, .onnx, .cellstep, .h, .pte, .safetensors.")
    ],
    standalone: Annotated[bool, typer.Option(help="A .pt that needs no operator library.")] = False,
    input_names: Annotated[Optional[str], typer.Option(help="Of ONNX's x, h, c, with commas.")] = None,  # noqa: UP045
    output_names: Annotated[Optional[str], typer.Option(help="Of ONNX's y, h, c, with commas.")] = None,  # noqa: UP045
    steps: Annotated[Optional[int], typer.Option(min=1, help="Of ExecuTorch's windows; default: as trained.")] = None,  # noqa: UP045
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of a call of ExecuTorch.")] = 1,
    weights: Annotated[
        str, typer.Option(help="float32, bfloat16, float16 or int8, for .cellstep, .h and .pt.")
    ] = "float32",
    calibration: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="CSV whose windows say how large int8 values become; default: noise of the model's scaling."),
    ] = None,
    fast_activations: Annotated[
        bool, typer.Option(help="sigmoid and tanh to 1.6e-5 in less time, for .cellstep, .h and .pt.")
    ] = False,
    settle: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="CSV whose rows a stream has behind it when it begins, for .cellstep, .h and .pt."),
    ] = None,
) -> None:
    """Write a model as artifacts, by the suffix of each output."""
    import cellstep
    from cellstep.exporters import SUFFIXES

    loaded: Any = cellstep.load_model(model).eval()
    for output in outputs:
        if output.suffix not in SUFFIXES:
            raise ValueError(f"expected outputs that end in {', '.join(SUFFIXES)}; got '{output}'; rename it")
    if calibration is not None and weights != "int8":
        raise ValueError(f"expected --calibration with --weights int8 alone; got {weights} weights; leave one out")
    if settle is not None and (others := {output.suffix for output in outputs} - {".cellstep", ".h", ".pt"}):
        raise ValueError(
            f"expected outputs that end in .cellstep, .h or .pt with --settle; got {', '.join(sorted(others))}; export "
            "those without it"
        )
    feature_names = loaded.feature_names
    if weights != "float32":
        from cellstep.verification import test_windows

        windows = None if calibration is None else test_windows(loaded, calibration)
        loaded = cellstep.quantize(loaded, weights, windows)
    names = {"input_names": input_names, "output_names": output_names}
    packed: dict[str, Any] = {"fast_activations": True} if fast_activations else {}
    if settle is not None:
        from cellstep.table import read_features

        packed["settle"] = read_features(settle, feature_names, loaded.input_size)
    options: dict[str, dict[str, Any]] = {
        ".cellstep": packed,
        ".h": packed,
        ".pt": {**packed, **({"standalone": True} if standalone else {})},
        ".onnx": {key: value.split(",") for key, value in names.items() if value},
        ".pte": {"steps": steps, "batch_size": batch_size},
    }
    for output in outputs:
        cellstep.export(loaded, output, **options.get(output.suffix, {}))
        print(f"{output}: {output.stat().st_size:,} bytes")


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A model of RTNeural, AIDA-X, NeuralAmpModeler (.nam) or GuitarML.")],
    outputs: Annotated[list[Path], typer.Argument(help="Files to write, as export writes them.")],
    settle: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            min=0,
            help="Samples of silence run first, so that .cellstep, .h and .pt start settled; default: what its "
            "own player runs, half a second for .nam.",
        ),
    ] = None,
    dense_activations: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Of dense layers in RTNeural's PyTorch layout, in order, with commas: tanh,linear."),
    ] = None,
) -> None:
    """Convert an amplifier or effect model, with the state that its player would begin with."""
    import numpy as np

    import cellstep
    from cellstep.convert.audio import from_audio, prewarm_steps

    model = from_audio(source, dense_activations=dense_activations.split(",") if dense_activations else None)
    steps = prewarm_steps(source) if settle is None else settle
    silence = np.zeros((steps, model.input_size), np.float32)
    for output in outputs:
        settled = {"settle": silence} if output.suffix in (".cellstep", ".h", ".pt") and steps else {}
        cellstep.export(model, output, **settled)
        print(f"{output}: {output.stat().st_size:,} bytes")


@app.command("import")
def import_(
    old: Annotated[Path, typer.Argument(help="A TorchScript file of any torch since 1.0.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write to.")],
    layers: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Found layers to take, in order, with commas: lstm,fc1:relu,fc2."),
    ] = None,
    formats: Annotated[str, typer.Option(help="What to write.")] = "safetensors,cellstep,pt2,onnx",
    run_original: Annotated[
        bool, typer.Option("--run-original", help="Run the file's own code, too, and compare: for files you trust.")
    ] = False,
    input_names: Annotated[Optional[str], typer.Option(help="Of ONNX's x, h, c, with commas.")] = None,  # noqa: UP045
    output_names: Annotated[Optional[str], typer.Option(help="Of ONNX's y, h, c, with commas.")] = None,  # noqa: UP045
) -> None:
    """Read an old TorchScript file as data, and write the same model anew, with the proof that its numbers are kept."""
    from cellstep.rescue import import_archive

    names = {"input_names": input_names, "output_names": output_names}
    for line in import_archive(
        old,
        output,
        layers.split(",") if layers else None,
        formats=["." + name.strip().lstrip(".") for name in formats.split(",")],
        run_original=run_original,
        onnx_names={key: value.split(",") for key, value in names.items() if value},
    ):
        print(line, flush=True)


@app.command()
def run(
    model: Annotated[Path, typer.Argument(help="A .pt, .pt2, .onnx, .pte, .cellstep, .h or .safetensors file.")],
    data: Annotated[Path, typer.Argument(help="A CSV file with a header line.")],
    stream: Annotated[bool, typer.Option(help="One step at a time, carrying the state.")] = False,
    window: Annotated[Optional[int], typer.Option(min=1, help="Rows of a window; default: as trained.")] = None,  # noqa: UP045
    stride: Annotated[int, typer.Option(min=1, help="Rows from one window to the next.")] = 1,
    repeat: Annotated[Optional[int], typer.Option(min=1, help="Then time so many calls.")] = None,  # noqa: UP045
    device: Annotated[Optional[str], typer.Option(help="cpu or cuda, for .pt, .pt2 and .safetensors.")] = None,  # noqa: UP045
    output: Annotated[Optional[Path], typer.Option(help="Default: standard output.")] = None,  # noqa: UP045
) -> None:
    """Forecast from every window of a CSV file and write the forecasts as CSV."""
    import numpy as np

    import cellstep
    from cellstep.table import read_features, write_forecasts

    artifact = cellstep.load(model, device)
    x = read_features(data, artifact.feature_names, artifact.input_size)
    length = 1 if stream else window or artifact.window
    if length == 0:
        raise ValueError("expected a window length; the model names none; pass --window N or --stream")
    if len(x) < length:
        raise ValueError(
            f"expected at least {length} data rows for a window; '{data}' has {len(x)}; "
            "give more rows or a shorter --window"
        )
    state = artifact.initial_state(1)

    def call(first: int) -> Any:
        nonlocal state
        if stream:
            y, state = artifact.step(x[first : first + 1], state)
            return y
        return artifact(x[None, first : first + length]).reshape(-1, artifact.output_size)

    begin = time.perf_counter()
    call(0)
    first_call = time.perf_counter() - begin
    state = artifact.initial_state(1)
    starts = range(0, len(x) - length + 1, 1 if stream else stride)
    answers = np.concatenate([call(first) for first in starts])
    each = length if artifact.answers == "every" and not stream else 1
    rows = [first + length - each + place for first in starts for place in range(each)]
    write_forecasts(output, rows, answers, artifact.output_names)
    if repeat:
        times = []
        for _ in range(repeat):
            begin = time.perf_counter()
            call(0)
            times.append((time.perf_counter() - begin) * 1e6)
        p50, p99, p999 = np.percentile(times, [50, 99, 99.9])
        print(
            f"latency in us over {repeat} calls: first {first_call * 1e6:.2f}, median {p50:.2f}, 99% {p99:.2f}, "
            f"99.9% {p999:.2f}, maximum {max(times):.2f}",
            file=sys.stderr,
        )


@app.command()
def verify(
    models: Annotated[list[Path], typer.Argument(help="Artifacts of one model.")],
    data: Annotated[Optional[Path], typer.Option(help="CSV to cut windows from; default: the sample.")] = None,  # noqa: UP045
    tolerance: Annotated[float, typer.Option(help="Relative to the output's range.")] = 2e-6,
    compiled: Annotated[bool, typer.Option("--compile", help="Run it under torch.compile as well.")] = False,
) -> None:
    """Run artifacts over the same windows and print how far each is from the eager model; exit 1 past tolerance.

    The model is the .safetensors file among them, or the one of the same name beside the first.
    """
    import cellstep
    from cellstep.verification import test_windows

    sources = [path for path in models if path.suffix == ".safetensors"]
    source = sources[0] if sources else models[0].with_suffix(".safetensors")
    if len(sources) > 1:
        raise ValueError(f"expected one .safetensors file as the model; got {len(sources)}; name one model's artifacts")
    if not source.exists():
        raise ValueError(f"expected the model as a .safetensors file; '{source}' is not there; name it too")
    model = cellstep.load_model(source)
    artifacts = [path for path in models if path.suffix != ".safetensors"]
    report = cellstep.verify(model, artifacts, test_windows(model, data), tolerance, compiled=compiled)
    _print_report(report)
    if report.failures:
        for row in report.failures:
            reason = row.problem or f"{row.relative:.1e} of the range is past {report.allowed(row):.1e}"
            print(f"error: {row.name} {row.artifact}: {reason}", file=sys.stderr)
        raise typer.Exit(1)


def _print_report(report: "Report") -> None:
    from cellstep.quantization import TOLERANCES

    table = Table(
        title=f"agreement over {report.windows} windows; largest difference from the first row",
        caption=f"relative to the output's range, {report.span:.6g}; equal bits: equal outputs to the last bit",
    )
    for name in ("run by", "artifact", "weights"):
        table.add_column(name, overflow="fold")
    for name in ("absolute", "relative", "ulp", "bits", "us/window"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in report.rows:
        latency = "-" if row.latency is None else f"{row.latency:.1f}"
        if row.problem:
            table.add_row(row.name, row.artifact, row.weights, "-", "-", "-", row.problem.splitlines()[0][:20], latency)
        else:
            table.add_row(
                row.name,
                row.artifact,
                row.weights,
                f"{row.difference:.2e}",
                f"{row.relative:.1e}",
                "-" if row.weights in TOLERANCES else str(row.ulps),
                row.bits,
                latency,
            )
    _console.print(table)


@app.command()
def info(
    model: Annotated[Path, typer.Argument(help="A .pt, .pt2, .onnx, .pte, .cellstep, .h or .safetensors file.")],
) -> None:
    """Print what a model file holds."""
    import cellstep
    from cellstep.artifact import DeployArtifact, TorchArtifact

    artifact = cellstep.load(model)
    table = Table(show_header=False)
    facts = {
        "file": f"{model}, {model.stat().st_size:,} bytes",
        "layers": f"{artifact.num_layers} of {artifact.hidden_size} units, {artifact.dtype}",
        "weights": artifact.weights,
        "answers": {"every": "every step", "last": "the last step", "hidden": "the last hidden state"}[
            artifact.answers
        ],
        "inputs": f"{artifact.input_size}: {', '.join(artifact.feature_names) or 'without names'}",
        "outputs": f"{artifact.output_size}: {', '.join(artifact.output_names) or 'without names'}",
        "window": f"{artifact.window} steps" if artifact.window else "not said",
        "horizon": f"{artifact.horizon} steps" if artifact.horizon else "not said",
    }
    if isinstance(artifact, DeployArtifact):
        error = artifact.selftest()
        facts["self-test"] = "no test vector" if error < 0 else f"passed, largest error {error:.2e}"
    if isinstance(artifact, TorchArtifact):
        from cellstep.ops import cuda_missing

        facts["on CUDA"] = (
            f"without cellstep's kernels: {reason}" if (reason := cuda_missing()) else "cellstep's kernels"
        )
    for name, fact in facts.items():
        table.add_row(name, fact)
    _console.print(table)


def main() -> None:
    """Entry point: run the command, and turn what the user can mend into one line and exit code 2."""
    try:
        code = app(standalone_mode=False)
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except Exception as error:
        text = _one_line(error)
        if text is None:
            raise
        print(f"error: {text}", file=sys.stderr)
        code = 2
    sys.exit(code)


def _one_line(error: Exception) -> str | None:
    """The text of an error that the user can mend; None for a defect of the program."""
    if isinstance(error, OSError) and error.filename is not None:
        text = f"expected a file that can be used; '{error.filename}': {error.strerror}; check the path"
    elif hasattr(error, "format_message"):  # a usage error of the command line
        text = f"{error.format_message()} See cellstep --help."
    elif isinstance(error, (OSError, ValueError, NotImplementedError, ImportError)):
        text = str(error)
    else:
        return None
    return " ".join(text.split())
