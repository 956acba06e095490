"""The body of ``cellstep import``: an old TorchScript file in, artifacts of the same model out."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cellstep
from cellstep.nn import Chain
from cellstep.rescue.find import Finding, assemble, chain, read, report

_SUFFIXES = (".safetensors", ".cellstep", ".pt2", ".onnx")
_STEPS = 12


def import_archive(
    path: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    names: Sequence[str] | None = None,
    *,
    run_original: bool = False,
) -> list[str]:
    """Read a TorchScript file as data and write what it computes into a directory, as files of its name.

    Args:
        path: a file of ``torch.jit.save`` of any torch since 1.0; nothing of it is run.
        directory: is made if it is not there; files in it are replaced.
        names: take these layers in this order, see :func:`cellstep.rescue.assemble`, instead of what the code says.
        run_original: then load the file with ``torch.jit.load``, which runs its code, and compare the answers to
            random input. Only for files that you trust.

    Returns:
        lines for the user: what was found, what was not, what was written, and how far the answers are apart.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: the file is damaged or refused, or its parts make no model; the text says what was found.
    """
    source, target = Path(path), Path(directory)
    finding = read(source)
    lines = report(finding).splitlines()
    model = chain(finding) if names is None else assemble(finding, names)
    if model is None:
        found = "; ".join(line for line in lines if not line.startswith("no chain: "))
        raise ValueError(
            f"expected code that is understood from input to answer; got {finding.reason} ('{source}'); "
            f"name the layers to take ({found})"
        )
    target.mkdir(parents=True, exist_ok=True)
    for suffix in _SUFFIXES:
        output = target / f"{source.stem}{suffix}"
        try:
            cellstep.export(model, output)
        except (ImportError, NotImplementedError, ValueError) as error:
            lines.append(f"not written {output}: {' '.join(str(error).split())}")
        else:
            lines.append(f"{output}: {output.stat().st_size:,} bytes")
    if run_original:
        lines.append(_agreement(source, finding, model))
    return lines


def _agreement(path: Path, finding: Finding, model: Chain) -> str:
    """How far the answers of the original and the chain are apart, over the ways in which a model may be called."""
    noise = torch.randn(1, _STEPS, model.input_size, generator=torch.Generator().manual_seed(0)).to(model.dtype)
    x = model.input_offset + torch.where(model.input_scale == 0, noise, noise / model.input_scale)
    distances = []
    with torch.no_grad():
        ours = [model.run(x, model.initial_state(1))[0].flatten(), model(x).flatten()]
        for call in _calls(x, model):
            try:
                theirs = call(_original(path, finding)).flatten()
            except Exception:  # whatever code of the file raises where it is not meant to be called in this way
                continue
            distances += [float((theirs - answer).abs().max()) for answer in ours if answer.shape == theirs.shape]
    if not distances:
        return "the original was not compared: this torch cannot load it, or it is called in another way"
    zero = ", its saved state put to zero" if finding.state else ""
    largest = float(ours[0].abs().max())
    return f"largest difference from the original{zero}: {min(distances):.2g}, where answers go up to {largest:.3g}"


def _original(path: Path, finding: Finding) -> Any:
    original: Any = torch.jit.load(str(path), map_location="cpu").eval()
    for name, tensor in (*original.named_buffers(), *original.named_parameters()):
        if name in finding.state:
            tensor.zero_()
    return original


def _calls(x: Tensor, model: Chain) -> Iterator[Callable[[Any], Tensor]]:
    """Whole sequences in any layout, and step by step with the state within, as a pair, or as two arguments."""
    for whole in (x, x.transpose(0, 1), x[0]):
        yield lambda original, whole=whole: _first(original(whole))  # type: ignore[misc]
    for rows in (x[0].split(1), x.split(1, 1)):
        yield lambda original, rows=rows: torch.cat([_first(original(row)) for row in rows])  # type: ignore[misc]
        for pair in (True, False):
            yield lambda original, rows=rows, pair=pair: _stepped(original, rows, model.initial_state(1), pair)  # type: ignore[misc]


def _stepped(original: Any, rows: Sequence[Tensor], state: tuple[Tensor, Tensor], pair: bool) -> Tensor:
    answers = []
    for row in rows:
        answer, *rest = original(row, state) if pair else original(row, *state)
        state = rest[0] if len(rest) == 1 else tuple(rest)
        answers.append(_first(answer))
    return torch.cat(answers)


def _first(answer: Any) -> Tensor:
    while not isinstance(answer, Tensor):
        answer = answer[0]
    return answer
