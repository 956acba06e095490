"""Keras: LSTM and Bidirectional layers, whole models of them, and their lists of weights. Keras is not imported."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cellstep.convert.parts import Array, dense, matrix_shape, reordered, single_layer, tensor
from cellstep.formula import ACTIVATIONS
from cellstep.nn import LSTM, Chain, Dense, Scale

_ORDER = "ifgo"  # of the columns: Keras calls the candidate c


def from_keras(source: Any, *, activation: str | None = None, recurrent_activation: str | None = None) -> LSTM:
    """A Keras LSTM, or a Bidirectional one with merge_mode "concat", of any version of Keras. Batch first, as Keras is.

    Whether a Keras layer answers every step or the last one is up to the caller here: ``y, (h, c) = lstm(x)`` gives
    both. Its last answer is ``y[:, -1]`` of an LSTM, but ``torch.cat([h[0], h[1]], 1)`` of a Bidirectional one, whose
    backward half ends at the first step.

    Args:
        source: a built layer; or its weights as ``get_weights()`` gives them: kernel (I, 4 H), recurrent_kernel
            (H, 4 H) and, if it has one, bias (4 H), columns in Keras' order i, f, c, o, for a Bidirectional layer
            those of the forward and then those of the backward layer.
        activation, recurrent_activation: by cellstep's names; by default what the layer says, and "tanh" and
            "sigmoid" for a list of weights. Mind that what Keras 2 calls "hard_sigmoid" is "hard_sigmoid" here
            (0.2 x + 0.5), and what Keras 3 calls so is "hardsigmoid" (relu6(x + 3) / 6); of a layer it is found out.

    Raises:
        TypeError: it is neither a layer of these kinds nor a list.
        ValueError: shapes do not fit, or the layer has an option that cellstep has not.
    """
    options: dict[str, Any] = {"activation": activation or "tanh", "gate_activation": recurrent_activation or "sigmoid"}
    if isinstance(source, (list, tuple)):
        arrays = list(source)
        if len(arrays) not in (2, 3, 4, 6):
            raise ValueError(
                "expected kernel, recurrent_kernel and perhaps bias, once or, if bidirectional, twice; "
                f"got {len(arrays)} arrays; pass what get_weights() gives"
            )
        sides = [arrays] if len(arrays) < 4 else [arrays[: len(arrays) // 2], arrays[len(arrays) // 2 :]]
    else:
        layers = _sides(source)
        for name, key, given in (
            ("activation", "activation", activation),
            ("recurrent_activation", "gate_activation", recurrent_activation),
        ):
            said = [given or _activation(layer, name) for layer in layers]
            if len(set(said)) > 1:
                raise ValueError(f"expected one {name} forward and backward; got {said}; cellstep has one for both")
            options[key] = said[0]
        options |= _options(layers[0])
        sides = [layer.get_weights() for layer in layers]
        if not all(sides):
            raise ValueError("expected a layer with weights; got one that is not built yet; call it on some data first")
    return single_layer([_direction(side) for side in sides], batch_first=True, **options)


def from_keras_model(model: Any) -> Chain:
    """A Keras model that is one line of layers, as a chain; it answers as the model's ``predict`` does.

    Layers it knows: Normalization in front, Dense (in TimeDistributed too), LSTM, Bidirectional, Activation behind a
    linear Dense, and InputLayer and Dropout, which change nothing in inference. The heads see every step, the last
    one, or the last states of a Bidirectional layer, as ``return_sequences`` of the last LSTM says.

    Args:
        model: a built keras.Sequential, or a functional model without branches.

    Raises:
        ValueError: a layer or an option of another kind, or an order that a chain has not.
    """
    stages: list[Any] = []
    answers = ""
    _refuse_branches(model)
    for layer in model.layers:
        kind = _kind(layer)
        if kind == "TimeDistributed" and _kind(layer.layer) == "Dense":  # which is one a step anyway
            layer, kind = layer.layer, "Dense"
        if kind in ("InputLayer", "Dropout", "SpatialDropout1D"):
            continue
        if kind in ("LSTM", "Bidirectional"):
            stages.append(from_keras(layer))
            every = _config(_sides(layer)[0])["return_sequences"]
            answers = "every" if every else "hidden" if kind == "Bidirectional" else "last"
        elif kind == "Dense":
            stages.append(_dense(layer))
        elif kind == "Activation" and stages and isinstance(stages[-1], Dense) and stages[-1].activation == "linear":
            stages[-1] = dense(stages[-1].weight, stages[-1].bias, _activation(layer, "activation"))
        elif kind == "Normalization":
            stages.append(_scale(layer))
        else:
            raise ValueError(
                "expected Normalization, Dense, LSTM, Bidirectional, Activation behind Dense, Dropout; "
                f"got {type(layer).__name__} ('{layer.name}'); convert the LSTM layers alone with from_keras"
            )
    return Chain(*stages, answers=answers or "last").eval()


def to_keras(lstm: LSTM) -> list[list[Array]]:
    """The weights of an LSTM in Keras' layout: for each of its layers what ``set_weights`` of a Keras layer takes.

    The layer is to be LSTM(hidden_size, activation, recurrent_activation, use_bias) with this LSTM's activations, or
    Bidirectional around it; Keras has one bias, the sum of the two here.

    Raises:
        TypeError: it is no cellstep LSTM.
        ValueError: it has an option that Keras has not.
    """
    if not isinstance(lstm, LSTM):
        raise TypeError(
            f"expected cellstep.nn.LSTM; got {type(lstm).__name__}; convert torch's with cellstep.convert.from_torch"
        )
    used = {
        "proj_size": lstm.proj_size,
        "peephole": lstm.peephole,
        "layer_norm": lstm.layer_norm,
        "coupled": lstm.coupled,
        "residual": lstm.residual and lstm.num_layers > 1,
        "output_activation": lstm.output_activation != lstm.activation,
        "cell_clip": lstm.cell_clip,
        "zoneout": lstm.zoneout_h > 0 or lstm.zoneout_c > 0,
        "learn_initial_state": lstm.learn_initial_state,
    }
    lacking = [name for name, value in used.items() if value]
    if lacking:
        raise ValueError(f"expected options that Keras has; got {', '.join(lacking)}; export to another target")
    if lstm.weight_ih_l0.dtype == torch.bfloat16:
        raise ValueError("expected a dtype that NumPy has; got torch.bfloat16; use lstm.float()")
    layers: list[list[Array]] = []
    for layer in range(lstm.num_layers):
        arrays: list[Array] = []
        for reverse in (False, True)[: 2 if lstm.bidirectional else 1]:
            p = {name: value.detach().cpu() for name, value in lstm.layer_parameters(layer, reverse).items()}
            parts = [p["weight_ih"].t(), p["weight_hh"].t()]
            if lstm.bias:
                parts.append(p["bias_ih"] + p["bias_hh"])
            arrays += [np.ascontiguousarray(part.numpy()) for part in parts]
        layers.append(arrays)
    return layers


def _kind(layer: Any) -> str:
    """The name of the Keras class that a layer is, or is derived from."""
    names = [base.__name__ for base in type(layer).__mro__]
    return next((name for name in names if name in _KINDS), names[0])


_KINDS = (
    "LSTM",
    "Bidirectional",
    "TimeDistributed",
    "Dense",
    "Activation",
    "Normalization",
    "InputLayer",
    "Dropout",
    "SpatialDropout1D",
)


def _config(layer: Any) -> dict[str, Any]:
    config: dict[str, Any] = layer.get_config()
    return config


def _sides(layer: Any) -> list[Any]:
    """The one or two LSTM layers in a layer."""
    kind = _kind(layer)
    sides = [layer]
    if kind == "Bidirectional":
        if layer.merge_mode != "concat":
            raise ValueError(
                f"expected merge_mode 'concat'; got {layer.merge_mode!r}; convert forward_layer and backward_layer "
                "one by one and merge their outputs yourself"
            )
        sides = [layer.forward_layer, layer.backward_layer]
    for place, side in enumerate(sides):
        if _kind(side) != "LSTM":
            raise TypeError(
                f"expected a Keras LSTM, a Bidirectional one or a list of weights; got {type(side).__name__}; for a "
                "whole model use from_keras_model"
            )
        if bool(_config(side).get("go_backwards")) != (place == 1):
            raise ValueError(
                f"expected go_backwards={place == 1}; got {place == 0}; pass get_weights() instead of the layer, and "
                "flip the time of the input"
            )
    return sides


def _options(layer: Any) -> dict[str, Any]:
    config = _config(layer)
    if config.get("dropout"):
        warnings.warn(
            f"Keras' dropout={config['dropout']} of the input is left out of the LSTM; to train on, put a dropout "
            "before it",
            stacklevel=3,
        )
    return {"recurrent_dropout": config.get("recurrent_dropout") or 0.0}


def _activation(layer: Any, name: str) -> str:
    """An activation of a layer by cellstep's name."""
    said = _config(layer).get(name)
    if said == "hard_sigmoid":  # Keras 2 and 3 mean different functions by it
        value = float(getattr(layer, name)(np.float32(1.0)))
        for ours, expected in (("hard_sigmoid", 0.7), ("hardsigmoid", 2 / 3)):
            if abs(value - expected) < 1e-4:
                return ours
    elif said in ACTIVATIONS:
        return str(said)
    raise ValueError(f"expected {name} of {', '.join(ACTIVATIONS)}; got {said!r}; cellstep has no such activation")


def _direction(arrays: Sequence[Any]) -> dict[str, Tensor]:
    parts = [tensor(np.asarray(array)) for array in arrays]
    inputs, columns = matrix_shape("kernel", parts[0])
    hidden = columns // 4
    shapes = [(inputs, 4 * hidden), (hidden, 4 * hidden), (4 * hidden,)][: len(parts)]
    got = [tuple(part.shape) for part in parts]
    if got != shapes:
        raise ValueError(
            f"expected kernel (I, 4 H), recurrent_kernel (H, 4 H) and bias (4 H); got shapes {got}; "
            "pass what get_weights() of an LSTM layer gives"
        )
    direction = {
        name: reordered(part.t(), _ORDER) for name, part in zip(("weight_ih", "weight_hh"), parts, strict=False)
    }
    if len(parts) == 3:
        direction |= {"bias_ih": parts[2], "bias_hh": torch.zeros_like(parts[2])}
    return direction


def _dense(layer: Any) -> Dense:
    weights = [tensor(np.asarray(array)) for array in layer.get_weights()]
    if not weights:
        raise ValueError("expected a model with weights; got one that is not built yet; call it on some data first")
    return dense(weights[0].t(), weights[1] if len(weights) > 1 else None, _activation(layer, "activation"))


def _scale(layer: Any) -> Scale:
    config = _config(layer)
    axis = config.get("axis")
    if config.get("invert") or axis not in (-1, 2, (-1,), (2,), [-1], [2]):
        raise ValueError("expected Normalization of the features, not inverted; got another; scale the input yourself")
    mean, variance = (_values(getattr(layer, name)) for name in ("mean", "variance"))
    return Scale(mean, 1 / variance.sqrt().clamp(min=1e-7))  # Keras' epsilon, for a column that never changes


def _values(given: Any) -> Tensor:
    return tensor(np.asarray(given.detach().cpu() if isinstance(given, Tensor) else given)).flatten()


def _refuse_branches(model: Any) -> None:
    """ValueError for what a list of layers does not show: several ends, layers used twice, states handed on."""
    if len(model.inputs) != 1 or len(model.outputs) != 1:
        raise ValueError(
            f"expected a model with one input and one output; got {len(model.inputs)} and {len(model.outputs)}; "
            "convert its LSTM layers one by one with from_keras"
        )
    for layer in model.layers:
        twice = type(model).__name__ != "Sequential" and len(getattr(layer, "_inbound_nodes", [])) > 1
        if twice or getattr(layer, "return_state", False):
            raise ValueError(
                f"expected a model of one line of layers; got '{layer.name}', which is used twice or gives its state "
                "away; convert its LSTM layers one by one with from_keras"
            )
