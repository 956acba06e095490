"""The body of ``cellstep import``: an old TorchScript file in, artifacts of the same model out."""

import copy
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import cellstep
from cellstep.nn import Chain
from cellstep.rescue.build import assemble
from cellstep.rescue.code import Budget, Definitions, Evaluator
from cellstep.rescue.find import Finding, compare, read, report
from cellstep.rescue.match import Match, ask

#: What is written unless the user names other formats.
FORMATS = (".safetensors", ".cellstep", ".pt2", ".onnx")
_STEPS = 12


def import_archive(
    path: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    layers: Sequence[str] | None = None,
    *,
    formats: Sequence[str] = FORMATS,
    run_original: bool = False,
    onnx_names: dict[str, list[str]] | None = None,
) -> Iterator[str]:
    """Read a TorchScript file as data and write what it computes into a directory, as files of its name.

    Nothing of the file is run by Python or torch: its code is parsed, and the operators of a short list are computed
    in float64 to see that the model written gives the same numbers. That comparison is always made; one with the
    original as torch runs it is made only if ``run_original`` says so, since a TorchScript file is a program.

    Args:
        path: a file of ``torch.jit.save`` of any torch since 1.0.
        directory: is made if it is not there; files in it are replaced.
        layers: take these layers in this order, see :func:`cellstep.rescue.build.assemble`, instead of what the code
            says.
        formats: suffixes of the files to write.
        run_original: also load the file with ``torch.jit.load`` and compare. Only for files that you trust.
        onnx_names: ``input_names`` and ``output_names`` of the ONNX file.

    Yields:
        lines for the user, as the work goes on.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: the file is damaged or refused, or its parts make no model; the text says what was found.
    """
    source, target = Path(path), Path(directory)
    unknown = [suffix for suffix in formats if suffix not in FORMATS]
    if unknown or not formats:
        raise ValueError(f"expected formats of {', '.join(FORMATS)}; got {', '.join(unknown) or 'none'}; choose some")
    finding = read(source)
    yield from report(finding)
    if layers is not None:
        compare(finding, assemble(finding.modules, finding.dense, layers))
    model, match = finding.chain, finding.match
    if model is None:
        names = ", ".join([*finding.modules, *finding.dense]) or "none"
        raise ValueError(
            f"expected a model that scaling, LSTMs and dense layers make up; got code of which not all is understood: "
            f"{finding.reason} ('{source}'); name the layers to take with --layers (found: {names})"
        )
    yield f"model: {_describe(model)}"
    if match is None:
        yield f"warning: these layers were not seen to give the numbers of the file's code: {finding.reason}"
    else:
        yield (
            f"the same numbers as the file's code, operator by operator in float64: largest difference "
            f"{match.difference:.1e} of the largest answer, for {match.call}"
        )
    target.mkdir(parents=True, exist_ok=True)
    sample = None if match is None else _sample(finding, match)
    for suffix in formats:
        yield _write(model, target / f"{source.stem}{suffix}", match, sample, onnx_names or {})
    if run_original and match is not None and sample is not None:
        yield _run_original(source, finding, match, sample)
    elif match is not None:
        yield "the original itself was not run; --run-original does that and compares, for a file that you trust"


def _describe(model: Chain) -> str:
    stages = []
    if bool((model.input_offset != 0).any() or (model.input_scale != 1).any()):
        stages.append(f"scaling of {model.input_size} columns")
    stages += [_dense(dense) for dense in model.encoder]
    for lstm in model.lstms:
        layers = f", {lstm.num_layers} layers" if lstm.num_layers > 1 else ""
        both = ", both directions" if lstm.bidirectional else ""
        learned = ", from a learned state" if lstm.learn_initial_state else ""
        stages.append(f"LSTM {lstm.input_size} -> {lstm.hidden_size}{layers}{both}{learned}")
    stages += [_dense(dense) for dense in model.heads]
    if bool((model.output_offset != 0).any() or (model.output_scale != 1).any()):
        stages.append(f"scaling of {model.output_size} columns")
    if model.skip_columns:
        stages.append("plus columns of the input")
    ends = {"every": "every step", "last": "the last step", "hidden": "the last hidden state"}
    return f"{', '.join(stages)}; answers from {ends[model.answers]}; {str(model.dtype).removeprefix('torch.')}"


def _dense(dense: Any) -> str:
    kind = "" if dense.activation == "linear" else f" {dense.activation}"
    return f"dense {dense.in_features} -> {dense.out_features}{kind}"


def _sample(finding: Finding, match: Match) -> tuple[Tensor, Tensor]:
    """Input (N, T, columns) and what the file's code answers to it, in float64."""
    original = Evaluator(finding.archive, Definitions(finding.archive), Budget(), match.saved)
    chain = match.chain
    steps = _STEPS if not any("steps" in limit for limit in match.limits) else 5
    noise = torch.randn(match.rows, steps, chain.input_size, generator=torch.Generator().manual_seed(0))
    x = chain.input_offset + torch.where(chain.input_scale == 0, noise, noise / chain.input_scale)
    x = x.to(chain.dtype).double()  # what the artifacts are given is what the code is given
    return x, ask(match, original.forward, x)


def _write(
    model: Chain,
    output: Path,
    match: Match | None,
    sample: tuple[Tensor, Tensor] | None,
    onnx_names: dict[str, list[str]],
) -> str:
    rounded = output.suffix == ".cellstep" and model.dtype != torch.float32
    try:
        # The deploy file is float32 alone.
        chosen = copy.deepcopy(model).float() if rounded else model
        cellstep.export(chosen, output, **(onnx_names if output.suffix == ".onnx" else {}))
    except (ImportError, NotImplementedError, ValueError) as error:
        return f"{output}: not written: {' '.join(str(error).split())}"
    line = f"{output}: {output.stat().st_size:,} bytes{', rounded to float32' if rounded else ''}"
    if match is None or sample is None:
        return line
    artifact = cellstep.load(output)
    x, answers = sample[0].numpy().astype(artifact.dtype), sample[1]
    if not match.layout.stepwise:
        y = artifact(x)
    elif match.keeps_state:
        y = artifact.run(x, artifact.initial_state(len(x)))[0]
    else:
        y = np.concatenate([artifact(x[:, t : t + 1])[:, None] for t in range(x.shape[1])], 1)
    return f"{line}; largest difference from the original {_relative(torch.from_numpy(np.array(y)), answers)}"


def _relative(ours: Tensor, theirs: Tensor) -> str:
    difference, largest = (ours.double() - theirs).abs().max(), theirs.abs().max()
    return f"{float(difference / largest if largest > 0 else difference):.1e} of the largest answer"


def _run_original(path: Path, finding: Finding, match: Match, sample: tuple[Tensor, Tensor]) -> str:
    """Run the file's code by torch, as the user asked for, and compare with what was read from it."""
    x, answers = sample
    try:
        original: Any = torch.jit.load(str(path), map_location="cpu").eval()
        for name, tensor in (*original.named_buffers(), *original.named_parameters()):
            if name in finding.state:
                tensor.zero_()
        with torch.no_grad():
            forward = original if hasattr(original, "forward") else original.forward__0  # of a bare torch.nn.LSTM
            theirs = ask(match, forward, x.to(match.chain.dtype))
    except Exception as error:  # whatever code of the file raises
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return f"the original was not compared: this torch cannot run it ({lines[-1][:200]})"
    return f"the original as torch runs it: largest difference {_relative(theirs, answers)}"
