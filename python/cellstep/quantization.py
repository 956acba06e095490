"""Low precision for inference: the matrices of LSTM layers in bfloat16, float16 or int8."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from cellstep.exporters.torchscript import PackedChain
from cellstep.exporters.weights import WEIGHTS, int8_error
from cellstep.nn import LSTM, Chain

Array = NDArray[Any]

_BATCH = 64
_STEPS_COMPARED = 256
_MOST_INT8_VALUES = 1 << 17  # the sum of so many products of int8 stays below 2^31

#: Largest difference from the float32 model, relative to the range of its outputs, that verify lets pass. The
#: forecaster of the sample series is at 9e-4, 2e-4 and 6e-3; DTLN's mask over 500 steps, whose |c| reaches 383, at
#: 9e-3, 1e-3 and 8e-2, with a root mean square of 3e-4, 4e-5 and 3e-3 (tests/python/test_quantization.py).
TOLERANCES = {"bfloat16": 2e-2, "float16": 4e-3, "int8": 1e-1}


def quantize(model: Chain, weights: str = "int8", calibration: ArrayLike | Tensor | None = None) -> PackedChain:
    """A copy of a float32 model for inference, whose LSTM layers have narrow weights.

    The copy has the methods of a chain (``forward``, ``answer``, ``run``, ``step``, ``initial_state``, ``reset``),
    can be scripted, and :func:`cellstep.export` writes it as ``.cellstep``, ``.h`` and ``.pt``. State, biases,
    peepholes, projections and dense layers stay float32, and so do the sums that the weights go into. As ever, no bit
    of an answer hangs on how a stream is cut into calls or on the rest of the batch.

    Args:
        weights: "bfloat16" and "float16" round each weight and halve the file. "int8" rounds each row of a matrix to
            127 steps of its largest weight, or of the matrix's where that is closer, and the inputs and hidden values
            of each step to 127 steps of the largest of them, so that nothing is ever clipped. A layer with
            ``layer_norm`` blows small hidden values up, and their rounding with them: see what
            :func:`cellstep.verify` makes of it.
        calibration: (N, T, input_size) windows, in the units of the data, for "int8" alone: how large each input of
            each layer is, in the root of the mean square. An input is divided, and its weights are multiplied, by the
            square root of that size over its largest weight, which shares the rounding out between large and small
            inputs; a layer whose products are closer without that goes without. Without windows standard normal noise
            in the units of the model's scaling is run.

    Raises:
        TypeError: ``model`` is no chain.
        ValueError: the type is unknown, the model is not float32, its weights are not finite or do not fit float16, it
            is too wide for int8, or the calibration has another shape or values that are not finite.
    """
    if isinstance(model, LSTM):
        raise TypeError('expected a cellstep.nn.Chain; got an LSTM alone; wrap it: Chain(lstm, answers="every")')
    if not isinstance(model, Chain):
        raise TypeError(f"expected a cellstep.nn.Chain; got {type(model).__name__}; put its layers into a Chain")
    if weights not in WEIGHTS[1:]:
        raise ValueError(f"expected weights of {', '.join(WEIGHTS[1:])}; got {weights!r}; choose one")
    if model.dtype != torch.float32:
        raise ValueError(f"expected a float32 model to quantize; got {model.dtype}; use model.float()")
    widest = max(size for lstm in model.lstms for size in (lstm.input_size, lstm.hidden_size))
    if weights == "int8" and widest > _MOST_INT8_VALUES:
        raise ValueError(
            f"expected at most {_MOST_INT8_VALUES} inputs and units for int8 weights; got {widest}; choose bfloat16 or "
            "float16"
        )
    windows = None if calibration is None else _windows(model, calibration)
    return PackedChain(model, weights, _factors(model, windows) if weights == "int8" else None)


def _windows(model: Chain, calibration: ArrayLike | Tensor) -> Tensor:
    if isinstance(calibration, Tensor):
        calibration = calibration.detach().cpu()
    windows = torch.as_tensor(np.asarray(calibration, np.float32))
    if windows.dim() != 3 or windows.shape[2] != model.input_size or 0 in windows.shape:
        raise ValueError(
            f"expected calibration windows of shape (N, T, {model.input_size}); got {tuple(windows.shape)}; check the "
            "features"
        )
    if not windows.isfinite().all():
        raise ValueError("expected finite calibration windows; got NaN or infinity; leave out those windows")
    return windows


@torch.no_grad()
def _factors(model: Chain, windows: Tensor | None) -> list[Array]:
    """Of the inputs of each layer; the layers are run one by one over all windows."""
    chain = model.reference().cpu()
    if windows is None:
        noise = torch.randn(64, model.window or 32, model.input_size, generator=torch.Generator().manual_seed(0))
        y = noise * (chain.input_scale != 0)
    else:
        y = (windows - chain.input_offset) * chain.input_scale
    for dense in chain.encoder:
        y = dense(y)
    factors = []
    for lstm in chain.lstms:
        for layer, single in enumerate(_single_layers(lstm)):
            weights = [single.layer_parameters(0, bool(k))["weight_ih"] for k in range(1 + lstm.bidirectional)]
            largest = _positive(torch.cat(weights).abs().amax(0).double())
            size = _positive(y.double().square().mean((0, 1)).sqrt())
            factors.append(_kept((largest / size).sqrt().float().numpy(), [w.numpy() for w in weights], y))
            parts = [single(part) for part in y.split(_BATCH)]
            h = torch.cat([part[0] for part in parts])
            y = h + y if lstm.residual and layer > 0 else h
            if single.return_cell_states:
                y = torch.cat([y, torch.cat([part[2] for part in parts])], 2)
    return factors


def _kept(factors: Array, weights: list[Array], y: Tensor) -> Array:
    """The factors, or ones where the products of the weights with some of the steps are closer with those."""
    steps = y.flatten(0, 1)
    some = steps[:: max(1, len(steps) // _STEPS_COMPARED)].double().numpy()
    ones = np.ones_like(factors)
    with_factors, without = (sum(int8_error(w, each, some) for w in weights) for each in (factors, ones))
    return ones if without < with_factors else factors


def _positive(values: Tensor) -> Tensor:
    """The values, with the largest of them, or 1, in place of zeros."""
    return torch.where(values > 0, values, values.max() if values.max() > 0 else 1.0)


def _single_layers(lstm: LSTM) -> Iterator[LSTM]:
    """The layers of a stack as LSTMs of their own, batch first and without the residual sum."""
    for layer in range(lstm.num_layers):
        options: dict[str, Any] = {
            **lstm.configuration(),
            "input_size": lstm.layer_parameters(layer)["weight_ih"].shape[1],
            "num_layers": 1,
            "batch_first": True,
            "dropout": 0.0,
            "residual": False,
            "forget_bias": None,
            "return_cell_states": lstm.return_cell_states and layer + 1 == lstm.num_layers,
        }
        single = LSTM(**options).eval()
        single.use_ops = lstm.use_ops  # type: ignore[misc]
        directions = 2 if lstm.bidirectional else 1
        for reverse in range(directions):
            source = lstm.layer_parameters(layer, bool(reverse))
            for name, target in single.layer_parameters(0, bool(reverse)).items():
                target.copy_(source[name])
        if lstm.learn_initial_state:
            rows = slice(layer * directions, (layer + 1) * directions)
            single.initial_h.copy_(lstm.initial_h[rows])
            single.initial_c.copy_(lstm.initial_c[rows])
        yield single
