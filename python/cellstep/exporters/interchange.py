"""The ``.safetensors`` file for people and hubs: torch's parameter names, the configuration in the metadata."""

import json
import os
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch

import cellstep
from cellstep.exporters.files import replacing
from cellstep.nn import LSTM, Chain, Dense, Forecaster, Skip

_KEY = "cellstep"


def save(model: Chain, path: str | os.PathLike[str]) -> None:
    """Write weights, scaling and configuration.

    Raises:
        OSError: the file cannot be written.
    """
    config = {
        "version": cellstep.__version__,
        "forecaster": isinstance(model, Forecaster),
        "encoder": [_dense_configuration(dense) for dense in model.encoder],
        "lstms": [lstm.configuration() for lstm in model.lstms],
        "heads": [_dense_configuration(dense) for dense in model.heads],
        "skip": model.skip_columns,
        "answers": model.answers,
        "feature_names": model.feature_names,
        "output_names": model.output_names,
        "window": model.window,
        "horizon": model.horizon,
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with replacing(Path(path)) as temporary:
        safetensors.torch.save_file(tensors, temporary, metadata={"format": "pt", _KEY: json.dumps(config)})


def _dense_configuration(dense: Dense) -> dict[str, Any]:
    return {
        "in_features": dense.in_features,
        "out_features": dense.out_features,
        "activation": dense.activation,
        "bias": dense.bias is not None,
    }


def _from_configuration(config: dict[str, Any]) -> Chain:
    """The chain without its values: on the meta device, so that sizes out of a damaged file cost nothing."""
    for lstm in config["lstms"]:
        if "zoneout" in lstm:
            lstm["zoneout"] = tuple(lstm["zoneout"])
    if config["forecaster"]:
        (options,), (head,) = config["lstms"], config["heads"]
        options = {name: value for name, value in options.items() if name != "batch_first"}
        return Forecaster(**options, output_size=head["out_features"], device="meta")
    stages: list[Any] = [
        *(Dense(**dense, device="meta") for dense in config["encoder"]),
        *(LSTM(**lstm, device="meta") for lstm in config["lstms"]),
        *(Dense(**dense, device="meta") for dense in config["heads"]),
    ]
    skip = [Skip(config["skip"])] if config["skip"] else []
    return Chain(*stages, *skip, answers=config["answers"])


def load_model(path: str | os.PathLike[str]) -> Chain:
    """Read what :func:`save` wrote, as a model in training mode.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no safetensors file, or not one of a cellstep model, or its parts contradict each other.
    """
    name = os.fspath(path)
    if not os.path.isfile(name):
        raise FileNotFoundError(f"expected a .safetensors file at '{name}'; there is none; check the path")
    try:
        with safetensors.safe_open(name, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except safetensors.SafetensorError as error:
        raise ValueError(f"expected a safetensors file; '{name}' is none or is damaged: {error}") from None
    if _KEY not in metadata:
        raise ValueError(
            f"expected a model saved by cellstep; '{name}' has no cellstep metadata; save it by cellstep.save"
        )
    try:
        config: dict[str, Any] = json.loads(metadata[_KEY])
        model = _from_configuration(config)
        model.load_state_dict(tensors, assign=True)
        model.requires_grad_(True)
        for key in ("feature_names", "output_names"):
            setattr(model, key, [str(column) for column in config[key]])
        model.window = int(config["window"])
        model.horizon = int(config["horizon"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"expected weights and configuration that fit; '{name}' is damaged: {reason}") from None
    if len({tensor.dtype for tensor in tensors.values()}) != 1:
        raise ValueError(f"expected one dtype throughout; '{name}' mixes several; save the model again")
    return model
