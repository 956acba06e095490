"""Sequences of 7 to 29 steps through one chain: who of nine speakers says two vowels (Kudo, Toyama and Shimbo 1999).

Trains on packed sequences, exports, and lets every artifact classify the test sequences. The data lie in the package
aeon: pip install --no-deps aeon
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import nll_loss
from torch.nn.utils.rnn import pack_sequence, pad_sequence

import cellstep
from cellstep.nn import LSTM, Chain, Dense, Scale

SPEAKERS = 9


def load(part: str) -> tuple[list[Tensor], Tensor]:
    """The sequences (steps, 12) and speakers of part "TRAIN" or "TEST"."""
    package = find_spec("aeon")
    if package is None or package.origin is None:
        sys.exit("error: expected the package aeon; it is not installed; run: pip install --no-deps aeon")
    path = Path(package.origin).parent / f"datasets/data/JapaneseVowels/JapaneseVowels_{part}.ts"
    _, _, rows = path.read_text(encoding="utf-8").partition("@data\n")
    sequences, speakers = [], []
    for row in rows.splitlines():
        *columns, speaker = row.split(":")
        sequences.append(torch.tensor([[float(value) for value in column.split(",")] for column in columns]).T)
        speakers.append(int(speaker) - 1)
    return sequences, torch.tensor(speakers)


def train(sequences: list[Tensor], speakers: Tensor, epochs: int = 40, seed: int = 0) -> Chain:
    torch.manual_seed(seed)
    values = torch.cat(sequences)
    model = Chain(
        Scale(values.mean(0), 1 / values.std(0)),
        LSTM(12, 32, bidirectional=True, forget_bias=1.0),
        Dense(64, SPEAKERS, "softmax"),
        answers="hidden",
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for batch in torch.randperm(len(sequences)).split(30):
            packed = pack_sequence([sequences[k] for k in batch], enforce_sorted=False)
            loss = nll_loss(model(packed).clamp_min(1e-9).log(), speakers[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    return model.eval()


def main(directory: Path) -> None:
    sequences, speakers = load("TRAIN")
    model = train(sequences, speakers)
    sequences, speakers = load("TEST")
    x = pad_sequence(sequences, batch_first=True)
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    with torch.no_grad():
        answers = model(pack_sequence(sequences, enforce_sorted=False)).numpy()
    print(f"{len(x)} test sequences of {lengths.min()} to {lengths.max()} steps")
    print(f"{'packed, in Python':20}{np.mean(answers.argmax(1) == speakers.numpy()):8.1%} right")

    directory.mkdir(parents=True, exist_ok=True)
    for name, options in {"vowels.pt": {}, "vowels.onnx": {"lengths": True}, "vowels.cellstep": {}}.items():
        path = directory / name
        cellstep.export(model, path, **options)
        found = cellstep.load(path)(x, lengths=lengths)
        right = np.mean(found.argmax(1) == speakers.numpy())
        print(f"{name:20}{right:8.1%} right, largest difference {np.abs(found - answers).max():.1e}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "vowels"))
