"""Writes the models that the fuzzers begin with, one a file: every option of a deploy file, small.

    python tests/fuzz/make_models.py [FOLDER]

fuzz_session chooses among them by their order, so a change to the list gives the inputs in corpus/session another
meaning.
"""

import sys
from pathlib import Path

import torch

import cellstep
from cellstep.exporters.deploy import image
from cellstep.nn import LSTM, Chain, Dense, Forecaster, Scale, Skip, Unscale

INPUTS = 2
OPTIONS = {
    "peephole": True,
    "layer_norm": True,
    "coupled": True,
    "zoneout": 0.1,
    "cell_clip": 2.0,
    "learn_initial_state": True,
}


def one(hidden=3, layers=1, **options):
    lstm = LSTM(INPUTS, hidden, layers, **options)
    if lstm.learn_initial_state:
        with torch.no_grad():
            lstm.initial_h.normal_()
            lstm.initial_c.normal_()
    return Chain(lstm, answers="every")


def forecaster():
    model = Forecaster(INPUTS, 4, 2, 1)
    model.set_scaling(torch.tensor([1.0, 200.0]), torch.tensor([2.0, 0.01]), torch.tensor([5.0]), torch.tensor([9.0]))
    model.feature_names, model.output_names, model.window, model.horizon = ["a", "β"], ["y"], 6, 3
    return model


def chain(answers):
    return Chain(
        Scale([1.0, 2.0], [3.0, 4.0]),
        Dense(INPUTS, 3, "relu"),
        LSTM(3, 4, bidirectional=True, proj_size=2, **OPTIONS),
        LSTM(4, 3, residual=True, gate_activation="hard_sigmoid", activation="relu"),
        Dense(3, 2, "softmax"),
        Unscale([1.0, 2.0], [3.0, 4.0]),
        Skip([1, 0]),
        answers=answers,
    )


def side_by_side():
    """Enough work in a run of some dozen steps that threads share its directions."""
    return one(12, bidirectional=True)


MODELS = {
    "forecaster": forecaster,
    "panels": lambda: one(23),
    "layers": lambda: one(4, 3, residual=True),
    "other-sizes": lambda: Chain(LSTM(INPUTS, 5), LSTM(5, 3), Dense(3, 1, "tanh"), answers="last"),
    "bidirectional": lambda: one(3, 2, bidirectional=True),
    "directions": side_by_side,
    "projection": lambda: one(5, proj_size=2),
    "peephole": lambda: one(peephole=True),
    "layer-norm": lambda: one(layer_norm=True),
    "coupled": lambda: one(coupled=True),
    "zoneout": lambda: one(zoneout=0.25, cell_clip=1.5),
    "initial": lambda: one(3, 2, learn_initial_state=True),
    "cells": lambda: Chain(LSTM(INPUTS, 3, bidirectional=True, return_cell_states=True), Dense(12, 2), answers="last"),
    "chain": lambda: chain("hidden"),
    "chain-every": lambda: chain("every"),
}
NARROW = ("forecaster", "panels", "bidirectional", "chain")


def main():
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "models"
    folder.mkdir(parents=True, exist_ok=True)
    written = []

    def write(name, data):
        written.append(folder / f"{len(written):02}-{name}.cellstep")
        written[-1].write_bytes(data)

    for name, make in MODELS.items():
        torch.manual_seed(0)
        write(name, image(make().eval()))
    torch.manual_seed(0)
    write("fast", image(forecaster().eval(), fast_activations=True))
    for weights in ("bfloat16", "float16", "int8"):
        for name in NARROW:
            torch.manual_seed(0)
            quantized = cellstep.quantize(MODELS[name]().eval(), weights)
            write(f"{name}-{weights}", quantized.image.numpy().tobytes())
    for other in set(folder.glob("*.cellstep")) - set(written):
        other.unlink()
    print(f"{len(written)} models, {sum(path.stat().st_size for path in written):,} bytes in {folder}")


if __name__ == "__main__":
    main()
