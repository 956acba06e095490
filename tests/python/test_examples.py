"""The example of sequences of different lengths, on real data."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pack_sequence, pad_sequence

import cellstep

_spec = importlib.util.spec_from_file_location(
    "japanese_vowels", Path(__file__).parents[2] / "examples/python/japanese_vowels.py"
)
vowels = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(vowels)


@pytest.fixture(scope="module")
def trained():
    return vowels.train(*vowels.load("TRAIN"), epochs=20)


def test_speakers_are_told_apart(trained):
    sequences, speakers = vowels.load("TEST")
    lengths = [len(sequence) for sequence in sequences]
    assert len(lengths) == 370 and min(lengths) == 7 and max(lengths) == 29
    with torch.no_grad():
        y = trained(pack_sequence(sequences, enforce_sorted=False))
    # The paper's own method is right in 94.1 %, a guess in 11 %.
    assert (y.argmax(1) == speakers).float().mean() > 0.94


@pytest.mark.parametrize("suffix", [".pt", ".cellstep", ".onnx", ".safetensors"])
def test_artifacts_answer_as_the_packed_sequences(trained, tmp_path, suffix):
    sequences, _ = vowels.load("TEST")
    sequences = sequences[:50]
    path = tmp_path / f"vowels{suffix}"
    cellstep.export(trained, path)
    lengths = [len(sequence) for sequence in sequences]
    found = cellstep.load(path)(pad_sequence(sequences, batch_first=True), lengths=lengths)
    with torch.no_grad():
        packed = trained(pack_sequence(sequences, enforce_sorted=False)).numpy()
        alone = torch.cat([trained(sequence.unsqueeze(0)) for sequence in sequences]).numpy()
    assert np.array_equal(packed, alone)
    assert np.array_equal(found, packed) or (suffix == ".onnx" and np.abs(found - packed).max() < 2e-6)


def test_every_step_of_packed_sequences_stays_packed(trained):
    sequences, _ = vowels.load("TEST")
    packed = pack_sequence(sequences[:5], enforce_sorted=False)
    every = cellstep.nn.Chain(*trained.lstms, *trained.heads, answers="every")
    with torch.no_grad():
        y = every(packed)
        assert torch.equal(y.batch_sizes, packed.batch_sizes) and torch.equal(y.sorted_indices, packed.sorted_indices)
        rows, lengths = torch.nn.utils.rnn.pad_packed_sequence(y, batch_first=True)
        for row, length, sequence in zip(rows, lengths, sequences[:5], strict=True):
            assert torch.equal(row[:length], every(sequence))


def test_program_prints_what_it_does(tmp_path):
    vowels.main(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["vowels.cellstep", "vowels.onnx", "vowels.pt"]
    assert sys.modules.get("aeon") is None  # its data alone
