"""The models that every target runs, their inputs, and the answers of torch and of Python's Session.

``python models.py DIRECTORY`` writes the Session's, in the instruction set that CELLSTEP_CPU names.
"""

import sys
from pathlib import Path

import numpy as np

STEPS = 24
# As in driver.c.
CHUNK, RESET_EVERY, WINDOW, STREAMS = 7, 5, 4, 3

#: Largest difference from the float32 model on torch's own kernels, over the range of its outputs. The fast variant is
#: off by 1.6e-5 in each sigmoid and tanh (core/activations.h), of which a gate and 24 steps make a few times that. For
#: narrow weights the bound is about four times what x86-64 is off.
TOLERANCES = {
    "forecaster": 2e-6,
    "3": 2e-6,
    "13": 2e-6,
    "bidirectional": 2e-6,
    "peephole coupled": 2e-6,
    "layer norm": 2e-6,
    "projection": 2e-6,
    "fast": 1e-4,
    "bfloat16": 2e-3,
    "float16": 2.5e-4,
    "int8": 6e-3,
}
NARROW = ("bfloat16", "float16", "int8")


def file_name(name):
    """Without spaces, which not every emulator passes on in an argument."""
    return name.replace(" ", "-")


def make_models():
    """Float32 models by name, all but the narrow ones different."""
    import torch

    from cellstep.nn import LSTM, Chain, Forecaster

    def chain(hidden, answers="every", layers=2, **options):
        torch.manual_seed(hidden)
        return Chain(LSTM(4, hidden, layers, **options), answers=answers).eval()

    torch.manual_seed(0)
    # Scaled as a weather series would have it.
    forecaster = Forecaster(10, 50, 2, 1).eval()
    ramp = torch.arange(10, dtype=torch.float32)
    forecaster.set_scaling(100 * ramp, 1 + 3 * ramp, torch.tensor([120.0]), torch.tensor([180.0]))
    return {
        "forecaster": forecaster,
        "3": chain(3),
        "13": chain(13),
        "bidirectional": chain(40, answers="last", bidirectional=True),
        "peephole coupled": chain(20, peephole=True, coupled=True),
        "layer norm": chain(20, layer_norm=True),
        "projection": chain(20, proj_size=7),
        "fast": chain(50),
        **dict.fromkeys(NARROW, chain(50)),
    }


def write_jobs(directory):
    """Writes each model and its input, and torch's answers to the whole input, a row a step or the last one alone."""
    import torch

    import cellstep

    for name, model in make_models().items():
        noise = torch.randn(1, STEPS, model.input_size, generator=torch.Generator().manual_seed(1))
        x = (model.input_offset + noise / model.input_scale).detach()
        path = directory / f"{file_name(name)}.cellstep"
        if name in NARROW:
            cellstep.export(cellstep.quantize(model, name), path)
        else:
            cellstep.export(model, path, fast_activations=name == "fast")
        x.numpy().tofile(path.with_suffix(".x"))
        with torch.no_grad():
            reference = model.reference()
            truth = (
                reference(x) if name == "bidirectional" else reference.run(x, reference.initial_state(1))[0].squeeze(0)
            )
        np.save(path.with_suffix(".torch.npy"), truth.numpy())


def session_answers(path):
    """What driver.c writes, by section, from Python's Session."""
    from cellstep.runtime import Session

    session = Session(path)
    x = np.fromfile(path.with_suffix(".x"), np.float32).reshape(-1, session.input_size)
    steps = len(x)
    sections = {"step": np.stack([session.step(row) for row in x])}
    sections["state"] = np.concatenate([part.ravel() for part in session.state])
    session.reset()
    sections["run"] = np.concatenate([session.run(x[at : at + CHUNK]) for at in range(0, steps, CHUNK)])
    session.reset()
    sections["reset"] = session.run(x, np.arange(steps) % RESET_EVERY == 3)
    session.reset()
    sections["forecast"] = session.forecast(x)
    session.start_slide(WINDOW)
    sections["slide"] = np.stack([y for y in map(session.slide, x) if y is not None])
    if path.stem == "bidirectional":  # has no answer step by step
        return sections
    streams = [Session(session.model) for _ in range(STREAMS)]
    pool = []
    for step in range(steps):
        for stream, session in enumerate(streams):
            if (step + stream) % RESET_EVERY == 3:
                session.reset()
            pool.append(session.step(x[(step + stream) % steps]))
    sections["pool"] = np.stack(pool)
    return sections


if __name__ == "__main__":
    from cellstep.runtime import instruction_set

    directory = Path(sys.argv[1])
    for path in sorted(directory.glob("*.cellstep")):
        np.savez(directory / f"{path.stem}.{instruction_set()}.npz", **session_answers(path))
    print(instruction_set())
