"""Amplifier and effect models in the JSON files of RTNeural, NeuralAmpModeler and GuitarML.

The formats have no specification but the programs that read them: RTNeural's ``model_loader.h`` and
``torch_helpers.h``, NeuralAmpModelerCore's ``lstm.cpp``, CoreAudioML's ``networks.py`` with GuitarML's Proteus.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cellstep.convert.parts import dense, filled, single_layer
from cellstep.nn import LSTM, Chain, Dense, Scale, Skip, Unscale

_Source = str | os.PathLike[str] | Mapping[str, Any]
_ACTIVATIONS = ("tanh", "relu", "sigmoid", "elu", "softmax")


def from_audio(source: _Source, *, dense_activations: Sequence[str] | None = None) -> Chain:
    """A model in whichever of the formats of this module the file is: RTNeural's, NeuralAmpModeler's or GuitarML's.

    Args:
        source: a file, or what ``json.load`` makes of it.
        dense_activations: see :func:`from_rtneural`.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is in none of the formats, is damaged, or has layers of other kinds.
    """
    document = _document(source)
    others = {"architecture": from_nam, "model_data": from_guitarml}
    for key, converter in others.items():
        if key in document:
            if dense_activations is not None:
                raise ValueError(
                    f"expected dense_activations for RTNeural's PyTorch layout alone; got a file with {key}; leave "
                    "them out"
                )
            return converter(document)
    return from_rtneural(document, dense_activations=dense_activations)


def prewarm_steps(source: _Source) -> int:
    """Samples of silence that a format's own player runs through a model before it plays.

    Half a second for NeuralAmpModeler, at 48 kHz where the file names no ``sample_rate``; none elsewhere.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no JSON object.
    """
    document = _document(source)
    if "architecture" not in document:
        return 0
    rate = document.get("sample_rate")
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate < 1e6:
        rate = 48000
    return int(rate / 2)


def from_rtneural(source: _Source, *, dense_activations: Sequence[str] | None = None) -> Chain:
    """A model of dense and LSTM layers in RTNeural's JSON, in its Keras or its PyTorch layout; answers every step.

    In the Keras layout (``in_shape``, ``layers``), ``in_skip``, ``in_gain`` and ``out_gain`` (dB) of AIDA-X are read
    too; ``samplerate`` has no place in a chain. The PyTorch layout is a state_dict, and its layers follow each other
    as their names do in the file.

    Args:
        source: a file, or what ``json.load`` makes of it.
        dense_activations: of the PyTorch layout, which does not name them, for its dense layers in order; by default
            "linear".

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no such file, is damaged, or has layers of other kinds.
    """
    document = _document(source)
    if "layers" in document:
        if dense_activations is not None:
            raise ValueError("expected dense_activations for the PyTorch layout alone; got a file that names them")
        return _rtneural_keras(document)
    for key, converter in (("model_data", "from_guitarml"), ("architecture", "from_nam")):
        if key in document:
            raise ValueError(f"expected RTNeural's JSON; got a file with {key}; use cellstep.convert.{converter}")
    return _rtneural_torch(document, dense_activations)


def from_nam(source: _Source) -> Chain:
    """A NeuralAmpModeler ``.nam`` file of architecture LSTM, versions 0.5 to 0.7; answers every sample.

    The state that the file starts from is the chain's learned initial state. The plugin then runs half a second of
    silence through the model before it plays; ``sample_rate``, loudness and levels have no place in a chain.

    Args:
        source: a file, or what ``json.load`` makes of it.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no such file, is damaged, or of another architecture or version.
    """
    document = _document(source)
    version, architecture = document.get("version"), document.get("architecture")
    if architecture != "LSTM":
        raise ValueError(f"expected a .nam file of architecture LSTM; got {architecture!r}; cellstep has LSTMs alone")
    parts = str(version).split(".")
    if parts[0] != "0" or parts[1:2] not in (["5"], ["6"], ["7"]):
        raise ValueError(f"expected .nam version 0.5 to 0.7; got {version!r}; export the model again")
    config = _mapping(document, "config")
    unknown = sorted(set(config) - {"input_size", "hidden_size", "num_layers", "in_channels", "out_channels"})
    if unknown:
        raise ValueError(
            f"expected a config of sizes; got {', '.join(unknown)} too; export the model in an older version"
        )
    inputs, hidden, layers = (_size(config, key) for key in ("input_size", "hidden_size", "num_layers"))
    outputs = _size(config, "out_channels", 1)
    if _size(config, "in_channels", inputs) != inputs:
        raise ValueError(
            f"expected in_channels={inputs}, the input_size; got {config['in_channels']}; correct the file"
        )

    # Before anything of these sizes is made: a damaged file may have any.
    count = 4 * hidden * (inputs + hidden) + 6 * hidden + (layers - 1) * (8 * hidden * hidden + 6 * hidden)
    count += outputs * (hidden + 1)
    given = document.get("weights")
    if not isinstance(given, (list, tuple)) or len(given) != count:
        got = len(given) if isinstance(given, (list, tuple)) else type(given).__name__
        raise ValueError(
            f"expected {count} weights for {layers} layers of {hidden} units, {inputs} inputs and {outputs} outputs; "
            f"got {got}; the file is damaged"
        )
    weights = _numbers(given, (count,), "weights")
    taken = 0

    def take(*shape: int) -> Tensor:
        nonlocal taken
        size = int(np.prod(shape))
        taken += size
        return weights[taken - size : taken].reshape(shape)

    values: dict[str, Tensor] = {}
    initial_h, initial_c = [], []
    for layer in range(layers):
        width = hidden if layer else inputs
        both = take(4 * hidden, width + hidden)
        values |= {f"weight_ih_l{layer}": both[:, :width], f"weight_hh_l{layer}": both[:, width:]}
        values |= {f"bias_ih_l{layer}": take(4 * hidden), f"bias_hh_l{layer}": torch.zeros(4 * hidden)}
        initial_h.append(take(hidden))
        initial_c.append(take(hidden))
    values |= {"initial_h": torch.stack(initial_h), "initial_c": torch.stack(initial_c)}
    lstm = LSTM(inputs, hidden, layers, batch_first=True, learn_initial_state=True, device="meta")
    head = dense(take(outputs, hidden), take(outputs), "linear")
    return Chain(filled(lstm, values), head, answers="every").eval()


def from_guitarml(source: _Source) -> Chain:
    """A GuitarML model (Proteus, NeuralPi, Automated-GuitarAmpModelling) of unit type LSTM; answers every sample.

    Column 0 of the input is the sound; further columns are the knobs that the model was conditioned on. A file with
    ``skip`` adds the sound to the output. (Proteus itself adds it always.)

    Args:
        source: a file, or what ``json.load`` makes of it.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no such file, is damaged, or has units of another type.
    """
    document = _document(source)
    data, state = _mapping(document, "model_data"), _mapping(document, "state_dict")
    if data.get("model", "SimpleRNN") != "SimpleRNN" or data.get("unit_type") != "LSTM":
        raise ValueError(
            f"expected a SimpleRNN of unit_type LSTM; got {data.get('model')} of {data.get('unit_type')}; cellstep has "
            "LSTMs alone"
        )
    inputs, outputs, hidden = (_size(data, key) for key in ("input_size", "output_size", "hidden_size"))
    layers = _size(data, "num_layers", 1)
    skip = data.get("skip", 0)
    if skip not in (0, 1, outputs) or skip > inputs:
        raise ValueError(f"expected skip of 0, 1 or {outputs}, at most the inputs; got {skip!r}; correct the file")
    if layers > len(state):
        raise ValueError(f"expected weights of {layers} layers; got {len(state)} in all; the file is damaged")
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(layers):
        shapes |= {
            f"rec.weight_ih_l{layer}": (4 * hidden, hidden if layer else inputs),
            f"rec.weight_hh_l{layer}": (4 * hidden, hidden),
            f"rec.bias_ih_l{layer}": (4 * hidden,),
            f"rec.bias_hh_l{layer}": (4 * hidden,),
        }
    shapes["lin.weight"] = (outputs, hidden)
    if data.get("bias_fl", True):
        shapes["lin.bias"] = (outputs,)
    _compare_keys(state, shapes)
    values = {key: _numbers(state[key], shape, key) for key, shape in shapes.items()}
    lstm = LSTM(inputs, hidden, layers, batch_first=True, device="meta")
    filled(lstm, {key.removeprefix("rec."): value for key, value in values.items()})
    head = dense(values["lin.weight"], values.get("lin.bias"), "linear")
    columns = [0] * outputs if skip == 1 else list(range(outputs))
    return Chain(lstm, head, *([Skip(columns)] if skip else []), answers="every").eval()


def _rtneural_keras(document: Mapping[str, Any]) -> Chain:
    shape, layers = document.get("in_shape"), document["layers"]
    if not isinstance(shape, (list, tuple)) or not isinstance(layers, (list, tuple)):
        raise ValueError("expected in_shape and layers, two lists; got something else; check that it is the right file")
    width = inputs = _last_size(shape, "in_shape")
    stages: list[Any] = []
    for place, layer in enumerate(layers):
        where = f"layers[{place}]"
        if not isinstance(layer, Mapping):
            raise ValueError(f"expected {where} to be an object; got {type(layer).__name__}; the file is damaged")
        kind, activation = layer.get("type"), layer.get("activation")
        activation = "linear" if activation in (None, "") else activation
        if kind == "activation" and stages and isinstance(stages[-1], Dense) and stages[-1].activation == "linear":
            before = stages.pop()
            stages.append(dense(before.weight, before.bias, _known(activation, where)))
            continue
        if kind not in ("lstm", "dense", "time-distributed-dense"):
            raise ValueError(
                f"expected layers lstm, dense, and activation behind dense; got {kind!r} in {where}; cellstep has no "
                "such layer there"
            )
        size = _last_size(layer.get("shape"), f"shape of {where}")
        weights = layer.get("weights")
        count = 3 if kind == "lstm" else 2
        if not isinstance(weights, (list, tuple)) or len(weights) != count:
            raise ValueError(f"expected {count} arrays of weights in {where}; got another number; the file is damaged")
        if kind == "lstm":
            if activation not in ("linear", "tanh"):
                # RTNeural reads no activation of an lstm layer and runs tanh, so the file's numbers are not certain.
                raise ValueError(f"expected activation tanh in {where}; got {activation!r}; RTNeural runs tanh alone")
            kernel = _numbers(weights[0], (width, 4 * size), f"kernel of {where}")
            recurrent = _numbers(weights[1], (size, 4 * size), f"recurrent kernel of {where}")
            bias = _numbers(weights[2], (4 * size,), f"bias of {where}")
            layer_weights = {"weight_ih": kernel.t(), "weight_hh": recurrent.t(), "bias_ih": bias}
            layer_weights["bias_hh"] = torch.zeros_like(bias)
            stages.append(single_layer([layer_weights], batch_first=True))
        else:
            kernel = _numbers(weights[0], (width, size), f"kernel of {where}")
            bias = _numbers(weights[1], (size,), f"bias of {where}")
            stages.append(dense(kernel.t(), bias, _known(activation, where)))
        width = size
    if not any(isinstance(stage, LSTM) for stage in stages):
        raise ValueError("expected an lstm layer among layers; got none; cellstep has LSTMs alone")
    return Chain(*_with_gains(document, stages, inputs, width), answers="every").eval()


def _with_gains(document: Mapping[str, Any], stages: list[Any], inputs: int, outputs: int) -> list[Any]:
    """As AIDA-X plays it: G (model(g x) + g x), the second term if it skips, with gains g and G of the sound x."""
    gains = [10 ** (float(_number(document, key)) / 20) for key in ("in_gain", "out_gain")]
    skip = _number(document, "in_skip")
    if skip not in (0, 1):
        raise ValueError(f"expected in_skip of 0 or 1; got {skip}; AIDA-X knows no other")
    if skip and abs(gains[0] * gains[1] - 1) > 1e-9:
        raise ValueError(
            f"expected in_gain and out_gain that cancel where in_skip is set; got {gains[0]:g} and {gains[1]:g}; "
            "a chain skips its input as it came"
        )
    column = torch.ones(inputs)
    column[0] = gains[0]  # of the sound; further columns are knobs
    scaled = [Scale(torch.zeros(inputs), column)] if gains[0] != 1 else []
    unscaled = [Unscale(torch.zeros(outputs), torch.full((outputs,), gains[1]))] if gains[1] != 1 else []
    return [*scaled, *stages, *unscaled, *([Skip([0] * outputs)] if skip else [])]


def _rtneural_torch(document: Mapping[str, Any], activations: Sequence[str] | None) -> Chain:
    layers: dict[str, dict[str, Any]] = {}
    for key, value in document.items():
        prefix, _, name = key.rpartition(".")
        layers.setdefault(prefix, {})[name] = value
    stages: list[Any] = []
    names = list(activations or [])
    for prefix, state in layers.items():
        if "weight_ih_l0" in state:
            stages.append(_torch_lstm(prefix, state))
        elif "weight" in state:
            weight = _numbers(state["weight"], (None, None), f"{prefix}.weight")
            _compare_keys(state, ["weight", "bias"][: 1 + ("bias" in state)])
            bias = _numbers(state["bias"], weight.shape[:1], f"{prefix}.bias") if "bias" in state else None
            activation = names.pop(0) if names else "linear"
            stages.append(dense(weight, bias, activation))
        else:
            raise ValueError(
                f"expected layers of torch.nn.LSTM and Linear; got '{prefix}' with {', '.join(state)}; cellstep has no "
                "such layer"
            )
    if names:
        raise ValueError(f"expected an activation a dense layer; got {len(names)} too many; leave them out")
    return Chain(*stages, answers="every").eval()


def _torch_lstm(prefix: str, state: Mapping[str, Any]) -> LSTM:
    kinds = ["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] if "bias_ih_l0" in state else [])]
    layers = sum(re.fullmatch(r"weight_ih_l\d+", name) is not None for name in state)
    _compare_keys(state, [f"{kind}_l{layer}" for layer in range(layers) for kind in kinds])
    width = len(_numbers(state["weight_ih_l0"], (None, None), f"{prefix}.weight_ih_l0")[0])
    hidden = len(_numbers(state["weight_hh_l0"], (None, None), f"{prefix}.weight_hh_l0")[0])
    values = {}
    for layer in range(layers):
        for kind in kinds:
            columns = {"weight_ih": (hidden if layer else width,), "weight_hh": (hidden,)}.get(kind, ())
            name = f"{kind}_l{layer}"
            values[name] = _numbers(state[name], (4 * hidden, *columns), f"{prefix}.{name}")
    lstm = LSTM(width, hidden, layers, len(kinds) == 4, batch_first=True, device="meta")
    return filled(lstm, values)


def _document(source: _Source) -> Mapping[str, Any]:
    if isinstance(source, Mapping):
        return source
    path = os.fspath(source)
    with open(path, encoding="utf-8") as file:
        try:
            document = json.load(file)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"expected a JSON file; '{path}' is none or is damaged: {error}") from None
    if not isinstance(document, dict):
        raise ValueError(f"expected a JSON object in '{path}'; got {type(document).__name__}; check the file")
    return document


def _mapping(document: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = document.get(key)
    if not isinstance(value, Mapping):
        raise ValueError(f"expected an object {key} in the file; got {type(value).__name__}; check the file")
    return value


def _size(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"expected {key} to be a positive number; got {value!r}; the file is damaged")
    return value


def _last_size(shape: Any, name: str) -> int:
    return _size({name: shape[-1] if isinstance(shape, (list, tuple)) and shape else None}, name)


def _number(document: Mapping[str, Any], key: str) -> float:
    value = document.get(key)
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1000:
        raise ValueError(f"expected {key} to be a number; got {value!r}; correct the file")
    return value


def _known(activation: Any, where: str) -> str:
    if activation != "linear" and activation not in _ACTIVATIONS:
        raise ValueError(
            f"expected an activation of {', '.join(_ACTIVATIONS)} in {where}; got {activation!r}; "
            "cellstep has no such one"
        )
    return str(activation)


def _numbers(given: Any, shape: Sequence[int | None], name: str) -> Tensor:
    """Nested lists of numbers as a float32 tensor of this shape; None stands for any size.

    Raises:
        ValueError: they are not.
    """
    try:
        array = np.asarray(given)
    except ValueError:
        raise ValueError(f"expected {name} to be rows of one length; got different ones; the file is damaged") from None
    fits = array.ndim == len(shape) and all(
        want in (None, size) and size > 0 for want, size in zip(shape, array.shape, strict=True)
    )
    if not fits or array.dtype.kind not in "fiu":
        wanted = tuple("any" if size is None else size for size in shape)
        raise ValueError(
            f"expected {name} to be numbers of shape {wanted}; got {array.dtype} of shape {array.shape}; the file is "
            "damaged or its sizes are wrong"
        )
    values = torch.from_numpy(array.astype(np.float64)).float()
    if not bool(values.isfinite().all()):
        raise ValueError(f"expected finite numbers in {name}; got NaN or infinity; the file is damaged")
    return values


def _compare_keys(state: Mapping[str, Any], expected: "Sequence[str] | Mapping[str, Any]") -> None:
    missing, unknown = sorted(set(expected) - set(state)), sorted(set(state) - set(expected))
    if missing or unknown:
        found = f"missing {', '.join(missing)}" if missing else f"unknown {', '.join(unknown)}"
        raise ValueError(f"expected weights of an LSTM and a dense layer; got keys with {found}; check the file")
