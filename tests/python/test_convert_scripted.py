"""TorchScript: against the scripted modules themselves, ours and the shipped voice detector of silero-vad."""

import importlib.metadata

import pytest
import torch
from torch import nn

from cellstep.convert import from_scripted
from cellstep.nn import LSTM, LSTMCell

# Outputs are below 1, sums run over up to 256 terms in another order.
CLOSE = {"rtol": 1e-5, "atol": 2e-6}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, 4))
        self.rnn = nn.LSTM(4, 5, 2, batch_first=True, bidirectional=True, dropout=0.25)
        self.parts = nn.ModuleDict(
            {"narrow": nn.LSTM(10, 6, proj_size=2, bias=False), "cell": nn.LSTMCell(2, 3, False)}
        )

    def forward(self, x):
        y, _ = self.rnn(self.encoder(x))
        y, _ = self.parts["narrow"](y)
        h, _ = self.parts["cell"](y[:, -1])
        return h


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # of what torch's own LSTM asks of its input
@pytest.mark.parametrize("compiled", ["script", "trace"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_layers_of_a_model(compiled, dtype, tmp_path):
    model = Model().eval().to(dtype)
    x = torch.randn(2, 6, 3, dtype=dtype)
    script = torch.jit.script(model) if compiled == "script" else torch.jit.trace(model, x)
    script.save(tmp_path / "model.pt")
    found = from_scripted(torch.jit.load(tmp_path / "model.pt"))
    assert list(found) == ["rnn", "parts.narrow", "parts.cell"]
    rnn, narrow, cell = found.values()
    assert [type(layer) for layer in found.values()] == [LSTM, LSTM, LSTMCell]
    assert rnn.dropout == 0.25
    assert rnn.training == narrow.training == cell.training is False
    y, _ = rnn(model.encoder(x))
    y, _ = narrow(y)
    h, _ = cell(y[:, -1])
    torch.testing.assert_close(h, script(x), **CLOSE)


def test_a_layer_that_is_the_whole_file():
    layer = nn.LSTM(3, 4)
    found = from_scripted(torch.jit.script(layer))
    x = torch.randn(5, 2, 3)
    torch.testing.assert_close(found[""](x), layer(x), **CLOSE)
    assert found[""].training


class LSTMOfMine(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.Linear(2, 2)

    def forward(self, x):
        return self.lstm(x)


LSTMOfMine.__name__ = LSTMOfMine.__qualname__ = "LSTM"


def test_nothing_to_find():
    frozen = torch.jit.freeze(torch.jit.script(Model().eval()))
    for script in (frozen, torch.jit.trace(LSTMOfMine(), torch.randn(1, 2))):
        with pytest.raises(ValueError, match="expected torch.nn.LSTM or LSTMCell among the submodules; got none"):
            from_scripted(script)
    with pytest.raises(TypeError, match="expected a ScriptModule; got Model"):
        from_scripted(Model())


def test_a_traced_layer_that_never_ran():
    """Its code does not say how its input lies, and guessing would give wrong numbers."""

    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(2, 3)

        def forward(self, x):
            return 2 * x

    with pytest.raises(ValueError, match="expected batch_first as an attribute or in the code of 'lstm'"):
        from_scripted(torch.jit.trace(Unused(), torch.randn(1, 2)))


@pytest.fixture(scope="module")
def detector():
    path = importlib.metadata.distribution("silero-vad").locate_file("silero_vad/data/silero_vad.jit")
    return torch.jit.load(path)


@pytest.mark.parametrize("part", ["_model", "_model_8k"])
def test_the_cell_of_silero_vad(detector, part):
    theirs = getattr(detector, part).decoder.rnn
    found = from_scripted(detector)
    assert list(found) == ["_model.decoder.rnn", "_model_8k.decoder.rnn"]
    cell = found[f"{part}.decoder.rnn"]
    x, state = torch.randn(9, 128), (torch.randn(9, 128), 20 * torch.randn(9, 128))
    h, c = theirs(x, state)
    got_h, got_c = cell(x, state)
    # Trained weights and large states: sums of 256 terms reach some 30, where a float32 is 2e-6 from the next.
    torch.testing.assert_close(got_h, h, rtol=0, atol=2e-5)
    torch.testing.assert_close(got_c, c, rtol=1e-5, atol=2e-5)


def test_silero_vad_with_our_cell(detector):
    """Two seconds of a sound that comes and goes; the state goes on from chunk to chunk."""
    cell = from_scripted(detector)["_model.decoder.rnn"]
    network = detector._model
    time = torch.arange(64 * 512) / 16000
    sound = torch.sin(time * 1400) * (1 + torch.sin(time * 25)) * torch.sin(3 * time) + 0.01 * torch.randn(len(time))
    detector.reset_states()
    state = (torch.zeros(1, 128), torch.zeros(1, 128))
    before = torch.zeros(1, 64)
    expected, got = [], []
    with torch.no_grad():
        for chunk in sound.reshape(-1, 1, 512):
            expected.append(detector(chunk, 16000).item())
            x = torch.cat([before, chunk], 1)
            before = x[:, -64:]
            state = cell(network.encoder(network.run_extractors(x)).squeeze(-1), state)
            got.append(network.decoder.decoder(state[0].unsqueeze(-1)).mean().item())
    assert max(abs(a - b) for a, b in zip(got, expected, strict=True)) <= 1e-5
    assert max(expected) - min(expected) > 0.01
