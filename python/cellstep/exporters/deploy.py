"""The ``.cellstep`` deploy file; its format is described in ``csrc/core/image.h``."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cellstep import _runtime
from cellstep.exporters.files import replacing
from cellstep.exporters.records import PACKED, Flag, Kind, Record, assemble
from cellstep.exporters.settle import settled
from cellstep.exporters.weights import WEIGHTS, pack_weights, rounded
from cellstep.formula import ACTIVATIONS
from cellstep.nn import LSTM, Chain, Dense

if TYPE_CHECKING:
    from cellstep.exporters.torchscript import PackedChain

_TEST_STEPS = 16
#: Largest error that a self-test allows, relative to the largest output and its scale: float32 leaves some 1e-7 a
#: step, and a wrong weight or a broken kernel gives far more.
_TEST_TOLERANCE = 1e-5
#: With int8 weights a machine without fused multiply-add rounds a hidden value the other way now and then.
_TEST_TOLERANCE_INT8 = 1e-2
#: The fast activations are 1.6e-5 off at most, which layers and steps make more of, layer normalisation most.
_TEST_TOLERANCE_FAST = 1e-2

_Array = NDArray[Any]
_Factors = Sequence[_Array | None]  # of the inputs of each layer


def export_deploy(model: "Chain | PackedChain", path: Path, fast_activations: bool = False, settle: Any = None) -> None:
    """Write the deploy file of a float32 or quantized model.

    Args:
        fast_activations: sigmoid and tanh of LSTM layers with an absolute error of up to 1.6e-5, in less time. They
            saturate that far from 1, so that a forget gate that is fully open loses 8e-6 of c a step.
        settle: (T, input_size): streams begin in the state behind these steps, where the file is run and after a reset.

    Raises:
        ValueError: another dtype; weights that are not finite; ``fast_activations`` with a quantized model, whose
            weights are packed already; ``settle`` of another shape or with a bidirectional model.
    """
    data = deploy_bytes(model, fast_activations, settle)
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def deploy_bytes(model: "Chain | PackedChain", fast_activations: bool = False, settle: Any = None) -> bytes:
    """The bytes of the deploy file of a float32 or quantized model; see :func:`export_deploy`."""
    data = _deploy_bytes(model, fast_activations)
    return data if settle is None else settled(data, settle)[0]


def _deploy_bytes(model: "Chain | PackedChain", fast_activations: bool) -> bytes:
    if not isinstance(model, Chain):
        if fast_activations:
            raise ValueError(
                "expected fast_activations=False for a quantized model, which is packed already; got True; export the "
                "model that it was made from"
            )
        packed: bytes = model.image.cpu().numpy().tobytes()
        return packed
    if model.dtype != torch.float32:
        raise ValueError(f"expected a float32 model for a deploy file; got {model.dtype}; use model.float()")
    return image(model, fast_activations=fast_activations)


def image(
    model: Chain,
    weights: str = "float32",
    factors: list[_Array] | None = None,
    *,
    fast_activations: bool = False,
    test_vector: bool = True,
) -> bytes:
    """The bytes of a deploy file: packed weights, scaling, names and a test vector, in the model's own dtype.

    Args:
        weights: how the two matrices of LSTM layers are stored, of :data:`WEIGHTS`; "float32" is the model's dtype.
            All else stays as it is.
        factors: for "int8", of the inputs of each layer, see :func:`cellstep.exporters.weights.pack_weights`.
        fast_activations: see :func:`export_deploy`.
        test_vector: left out where the image stays in this process.
    """
    layers = [(lstm, layer) for lstm in model.lstms for layer in range(lstm.num_layers)]
    given: _Factors = [None] * len(layers) if factors is None else factors
    records = [Record(Kind.INPUT_SCALING, (model.input_size,), _bytes(model.input_offset, model.input_scale))]
    records += [_dense_record(dense) for dense in model.encoder]
    records += [
        _lstm_record(*place, weights, each, fast_activations) for place, each in zip(layers, given, strict=True)
    ]
    records += [_dense_record(dense) for dense in model.heads]
    records.append(Record(Kind.OUTPUT_SCALING, (model.output_size,), _bytes(model.output_offset, model.output_scale)))
    if model.skip_columns:
        columns = np.array(model.skip_columns, np.uint32)
        records.append(Record(Kind.SKIP, (model.output_size,), columns.tobytes()))
    for kind, names in ((Kind.FEATURE_NAMES, model.feature_names), (Kind.OUTPUT_NAMES, model.output_names)):
        if names:
            records.append(Record(kind, (len(names),), _encode(names)))
    if not test_vector:
        return assemble(model, records)
    x = _test_input(model)
    if weights == "int8":
        # No reference rounds the values of a step, so here the library is its own: another machine's is held to it.
        session = _runtime.Session(_runtime.Model.from_bytes(assemble(model, records)))
        y = torch.from_numpy(session.run(x.numpy()))
    else:
        y = _test_output(model, x, weights)
    relative = _TEST_TOLERANCE_INT8 if weights == "int8" else _TEST_TOLERANCE
    if fast_activations:
        relative = max(relative, _TEST_TOLERANCE_FAST)
    tolerance = relative * (y.abs().max() + model.output_scale.abs().max().cpu())
    content = _bytes(tolerance.to(model.dtype).reshape(1), x, y.to(model.dtype))
    records.append(Record(Kind.TEST_VECTOR, (_TEST_STEPS,), content))
    return assemble(model, records)


def lstm_image(lstm: LSTM) -> bytes:
    """The bytes of an image that answers every step as the LSTM alone does; without a test vector."""
    directions = 2 if lstm.bidirectional else 1
    out = lstm.proj_size or lstm.hidden_size
    sizes = SimpleNamespace(
        dtype=lstm.weight_ih_l0.dtype,
        input_size=lstm.input_size,
        output_size=directions * out,
        state_layers=directions * lstm.num_layers,
        h_size=out,
        c_size=lstm.hidden_size,
        window=0,
        horizon=0,
        answers="every",
    )
    return assemble(sizes, [_lstm_record(lstm, layer, "float32", None, False) for layer in range(lstm.num_layers)])


def _dense_record(dense: Dense) -> Record:
    packed = _runtime.pack_dense(_array(dense.weight), None if dense.bias is None else _array(dense.bias))
    sizes = (dense.in_features, dense.out_features)
    return Record(Kind.DENSE, sizes, packed.tobytes(), PACKED, activations=ACTIVATIONS.index(dense.activation))


def _lstm_record(lstm: LSTM, layer: int, weights: str, factors: _Array | None, fast: bool) -> Record:
    flags = (
        Flag.BIDIRECTIONAL * lstm.bidirectional
        | Flag.PEEPHOLE * lstm.peephole
        | Flag.LAYER_NORM * lstm.layer_norm
        | Flag.COUPLED * lstm.coupled
        | Flag.RESIDUAL * (lstm.residual and layer > 0)
        | Flag.INITIAL * lstm.learn_initial_state
        | Flag.CELLS * (lstm.return_cell_states and layer + 1 == lstm.num_layers)
        | Flag.FAST * fast
    )
    content = b""
    directions = 2 if lstm.bidirectional else 1
    for reverse in range(directions):
        p = {name: _array(tensor) for name, tensor in lstm.layer_parameters(layer, bool(reverse)).items()}
        matrices = (p["weight_ih"], p["weight_hh"], p.get("bias_ih"), p.get("bias_hh"))
        content += pack_weights(weights, *matrices, lstm.coupled, factors)
        parts: list[_Array] = []
        if lstm.proj_size:
            parts.append(p["weight_hr"].T)
        for name in ("weight_peephole", "norm_ih", "norm_hh"):
            if name in p:
                parts.append(_with_forget_gate(p[name], lstm))
        if lstm.layer_norm:
            parts += [p["norm_c"], p["norm_c_bias"]]
        if lstm.learn_initial_state:
            row = layer * directions + reverse
            parts += [_array(lstm.initial_h[row]), _array(lstm.initial_c[row])]
        content += b"".join(part.tobytes() for part in parts)
    content += np.array([lstm.cell_clip, lstm.zoneout_h, lstm.zoneout_c], p["weight_ih"].dtype).tobytes()
    names = (lstm.gate_activation, lstm.activation, lstm.output_activation)
    activations = sum(ACTIVATIONS.index(name) << (8 * place) for place, name in enumerate(names))
    inputs = int(lstm.layer_parameters(layer)["weight_ih"].shape[1])
    layout = PACKED + WEIGHTS.index(weights)
    return Record(Kind.LSTM, (inputs, lstm.hidden_size, lstm.proj_size), content, layout, flags, activations)


def _with_forget_gate(values: _Array, lstm: LSTM) -> _Array:
    """Values by gate, with zeros for the f that a coupled layer has none of."""
    if not lstm.coupled:
        return values
    return np.insert(values, lstm.hidden_size, np.zeros(lstm.hidden_size, values.dtype))


def _array(tensor: Tensor) -> _Array:
    array: _Array = tensor.detach().cpu().contiguous().numpy()
    if not np.isfinite(array).all():
        raise ValueError("expected finite weights; got NaN or infinity in the model; train it again")
    return array


def _bytes(*tensors: Tensor) -> bytes:
    return b"".join(_array(tensor).tobytes() for tensor in tensors)


def _encode(names: list[str]) -> bytes:
    for name in names:
        if "\0" in name:
            raise ValueError(f"expected column names without zero bytes; got {name!r}; rename the column")
    return b"".join(name.encode() + b"\0" for name in names)


def _test_input(model: Chain) -> Tensor:
    """Noise of the deviation that the scaling says, (T, input_size)."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(_TEST_STEPS, model.input_size, generator=generator, dtype=torch.float64)
    scale = model.input_scale.cpu().double()
    return (model.input_offset.cpu().double() + noise * torch.where(scale == 0, 1.0, 1.0 / scale)).to(model.dtype)


def _test_output(model: Chain, x: Tensor, weights: str) -> Tensor:
    """What torch's own operators give in float64 with the weights as they are stored.

    So the test tells of the arithmetic where the file is run. What rounding does to the model, verify tells.
    """
    reference = model.reference().cpu().double()
    for lstm in reference.lstms:
        for layer in range(lstm.num_layers):
            for reverse in range(2 if lstm.bidirectional else 1):
                p = lstm.layer_parameters(layer, bool(reverse))
                for name in ("weight_ih", "weight_hh"):
                    p[name].data.copy_(torch.from_numpy(rounded(weights, _array(p[name]))))
    with torch.no_grad():
        y, _ = reference.run(x.double().unsqueeze(0), reference.initial_state(1))
    return y.squeeze(0)
