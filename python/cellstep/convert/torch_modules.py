"""torch's own LSTM and LSTMCell: copied in and out, or swapped inside a model."""

from typing import Any, TypeVar, overload

from torch import nn
from torch.nn.utils import parametrize

from cellstep.convert.parts import filled
from cellstep.convert.scripted import torchs_kind
from cellstep.nn import LSTM, LSTMCell

_M = TypeVar("_M", bound=nn.Module)


@overload
def from_torch(module: nn.LSTM) -> LSTM: ...
@overload
def from_torch(module: nn.LSTMCell) -> LSTMCell: ...
def from_torch(module: nn.LSTM | nn.LSTMCell) -> LSTM | LSTMCell:
    """A copy of a torch.nn.LSTM or LSTMCell: options, weights, dtype, device, training mode and requires_grad.

    Hooks are not copied. Of a parametrized or pruned weight the copy has the value, as a plain parameter.

    Raises:
        TypeError: it is neither, or a subclass with a ``forward`` of its own.
    """
    why = _not_torchs(module)
    if why:
        raise TypeError(why)
    return _copied(_likeness(module), module)


@overload
def to_torch(module: LSTM) -> nn.LSTM: ...
@overload
def to_torch(module: LSTMCell) -> nn.LSTMCell: ...
def to_torch(module: LSTM | LSTMCell) -> nn.LSTM | nn.LSTMCell:
    """A copy as torch.nn.LSTM or LSTMCell, in the same way as :func:`from_torch`.

    Raises:
        TypeError: it is neither of cellstep's.
        ValueError: it has an option that torch lacks.
    """
    if isinstance(module, LSTMCell):
        return _copied(_alike(module, nn.LSTMCell), module)
    if not isinstance(module, LSTM):
        raise TypeError(
            f"expected cellstep.nn.LSTM or LSTMCell; got {type(module).__name__}; pass the layers of a model one by one"
        )
    lacking = [option for option in _TORCH_LACKS if _uses(module, option)]
    if lacking:
        raise ValueError(
            f"expected options that torch.nn.LSTM has; got {', '.join(lacking)}; "
            "keep cellstep's layer: it exports to every target"
        )
    lstm = _alike(module, nn.LSTM)
    _copied(lstm, module).flatten_parameters()
    return lstm


def replace_lstm(module: nn.Module) -> nn.Module:
    """Swap every torch.nn.LSTM and LSTMCell inside a model for cellstep's.

    The parameters are the same objects, so an optimiser made before goes on training them, and ``state_dict`` keeps
    its names. Modules and parameters that are shared stay shared. Hooks, parametrizations, pruning masks and buffers
    go along; a hook is called with the new module.

    Returns:
        ``module`` itself, or its replacement if it is an LSTM or LSTMCell.

    Raises:
        ValueError: one is a subclass with a ``forward`` of its own, or lies in a scripted module. Nothing has been
            changed then.
    """
    for path, child in module.named_modules():
        if torchs_kind(child):
            raise ValueError(
                f"expected modules in Python; got a scripted LSTM at '{path}'; take its weights out with "
                "cellstep.convert.from_scripted"
            )
        why = isinstance(child, (nn.LSTM, nn.LSTMCell)) and _not_torchs(child)
        if why:
            raise ValueError(f"{why} (at '{path}')")
    twins: dict[nn.Module, nn.Module] = {}
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):  # named_children() gives a shared child once
            if isinstance(child, (nn.LSTM, nn.LSTMCell)):
                if child not in twins:
                    twins[child] = _twin(child)
                parent._modules[name] = twins[child]
    return _twin(module) if isinstance(module, (nn.LSTM, nn.LSTMCell)) else module


#: Options of cellstep's LSTM that torch's has not, with the value that stands for none.
_TORCH_LACKS: dict[str, Any] = {
    "peephole": False,
    "layer_norm": False,
    "coupled": False,
    "residual": False,
    "gate_activation": "sigmoid",
    "activation": "tanh",
    "output_activation": "tanh",
    "cell_clip": 0.0,
    "zoneout_h": 0.0,
    "zoneout_c": 0.0,
    "recurrent_dropout": 0.0,
    "weight_drop": 0.0,
    "learn_initial_state": False,
    "return_cell_states": False,
}


def _uses(module: LSTM, option: str) -> bool:
    return bool(getattr(module, option) != _TORCH_LACKS[option]) and not (
        option == "residual" and module.num_layers == 1
    )


def _not_torchs(module: nn.Module) -> str:
    """Why a module is not torch's LSTM or LSTMCell, or an empty string."""
    for kind in (nn.LSTM, nn.LSTMCell):
        if isinstance(module, kind):
            if type(module).forward is kind.forward and "forward" not in vars(module):
                return ""
            return (
                f"expected torch.nn.{kind.__name__}; got {type(module).__name__}, which has a forward of its own; "
                "convert the layer inside it by hand"
            )
    return (
        f"expected torch.nn.LSTM or LSTMCell; got {type(module).__name__}; for the layers inside a model use "
        "cellstep.convert.replace_lstm, for a scripted one from_scripted"
    )


def _likeness(module: nn.LSTM | nn.LSTMCell) -> LSTM | LSTMCell:
    """Cellstep's module with the options of torch's; its parameters are on the meta device."""
    return _alike(module, LSTMCell) if isinstance(module, nn.LSTMCell) else _alike(module, LSTM)


def _alike(module: Any, kind: type[_M]) -> _M:
    """A module of this kind with the options that torch and cellstep share; its parameters are on the meta device."""
    if kind in (LSTMCell, nn.LSTMCell):
        return kind(module.input_size, module.hidden_size, module.bias, device="meta")
    lstm = kind(
        module.input_size,
        module.hidden_size,
        module.num_layers,
        module.bias,
        module.batch_first,
        bidirectional=module.bidirectional,
        proj_size=module.proj_size,
        device="meta",
    )
    # Set here, for the constructor warns of dropout on one layer.
    lstm.dropout = float(module.dropout)  # type: ignore[assignment]
    return lstm


def _copied(new: _M, old: nn.Module) -> _M:
    names = [name for name, _ in new.named_parameters()]
    filled(new, {name: getattr(old, name) for name in names})
    for name in names:
        getattr(new, name).requires_grad_(getattr(old, name).requires_grad)
    return new.train(old.training)


def _twin(old: nn.LSTM | nn.LSTMCell) -> nn.Module:
    """Cellstep's module with everything that torch's holds."""
    new: nn.Module = _likeness(old)
    # A weight that a hook computes before each call (pruning, the old weight_norm) is no parameter but an attribute.
    computed = {name: vars(old)[name] for name in new._parameters if name in vars(old)}
    if parametrize.is_parametrized(old):
        # Parametrizing gives a module a class of its own, which has the weights as properties.
        properties = {name: value for name, value in vars(type(old)).items() if name not in _CLASS_ATTRIBUTES}
        new.__class__ = type(type(old).__name__, (type(new),), properties)
    for name, value in vars(old).items():
        if "_hook" in name or name in (
            "_parameters",
            "_buffers",
            "_modules",
            "_non_persistent_buffers_set",
            "training",
        ):
            vars(new)[name] = value
    vars(new).update(computed)
    return new


_CLASS_ATTRIBUTES = ("__module__", "__doc__", "__dict__", "__weakref__")
