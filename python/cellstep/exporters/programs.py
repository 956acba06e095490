"""The methods of a chain as modules of their own, for artifacts whose programs are one function each."""

from torch import Tensor, nn

from cellstep.exporters.torchscript import PackedChain
from cellstep.nn import Chain


class Forward(nn.Module):
    """x (N, T, input_size) -> y, from the initial state."""

    def __init__(self, chain: Chain | PackedChain) -> None:
        super().__init__()
        self.chain = chain

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.chain(x)
        return y


class Run(Forward):
    """x (N, T, input_size), h, c -> y (N, T, output_size), h, c."""

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        y, state = self.chain.run(x, (h, c))
        return y, *state


class Step(Forward):
    """x (N, input_size), h, c -> y (N, output_size), h, c."""

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        y, state = self.chain.step(x, (h, c))
        return y, *state


class Reset(Forward):
    """h, c, mask (N) bool -> h, c with the rows of the mask put to the initial state."""

    def forward(self, h: Tensor, c: Tensor, mask: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return self.chain.reset((h, c), mask)
