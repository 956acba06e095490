"""From an archive's code to a chain that gives its numbers, or the reason why there is none.

A chain is proposed from one step through the code and believed only if it gives the numbers of the code on several
sequences, from several states, in batches of several sizes. Which of its inputs is batch and which is steps, a file
does not say; the ways to call a model are tried in turn.
"""

import ast
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cellstep.nn import Chain
from cellstep.nn.chain import ANSWERS
from cellstep.rescue import build
from cellstep.rescue.archive import Archive
from cellstep.rescue.code import ODD, Budget, Definitions, Evaluator, Node, Unreadable, below
from cellstep.rescue.line import Recurrent, Stage, stages

#: Relative to the largest answer. Both sides compute in float64: other sums in other orders stay below 1e-12, while
#: a constant that is off in the last bit of a float32 shows as 1e-8.
TOLERANCE = 1e-10

_CALLS = 2  # of whole sequences, one after another
_STEPS = 5
_GUESSES = 16  # at most so many at a number


@dataclass(frozen=True)
class Layout:
    """A way to hand over x (N, T, columns): all of it, or step by step."""

    text: str
    place: Callable[[Tensor], Tensor]
    stepwise: bool = False
    one_row: bool = False
    steps_first: bool = False


_LAYOUTS = (
    Layout("(batch, steps, {})", lambda x: x),
    Layout("(steps, batch, {})", lambda x: x.transpose(0, 1), steps_first=True),
    Layout("(steps, {})", lambda x: x[0], one_row=True),
    Layout("(batch, {}), one step a call", lambda x: x[:, 0], stepwise=True),
    Layout("({}), one step a call", lambda x: x[0, 0], stepwise=True, one_row=True),
    Layout("(batch, 1, {}), one step a call", lambda x: x, stepwise=True),
    Layout("(1, batch, {}), one step a call", lambda x: x.transpose(0, 1), stepwise=True),
)


@dataclass(frozen=True)
class StateForm:
    """How a state (h, c) of (layers, N, size) is handed over, if at all: shaped so, in a pair or in two arguments."""

    text: str
    shape: Callable[[Tensor], Tensor] = lambda part: part
    paired: bool = False
    swapped: bool = False
    sizes: tuple[int, int, int] | None = None  # layers, h, c

    @property
    def names(self) -> list[str]:
        if self.sizes is None:
            return []
        names = ["c", "h"] if self.swapped else ["h", "c"]
        return [f"({', '.join(names)})"] if self.paired else names

    def parts(self, state: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        return tuple(self.shape(part) for part in (state[::-1] if self.swapped else state))

    def arguments(self, state: tuple[Tensor, Tensor]) -> tuple[Any, ...]:
        if self.sizes is None:
            return ()
        return (self.parts(state),) if self.paired else self.parts(state)


@dataclass(eq=False)
class Match:
    """A chain that gives a file's numbers, in float64."""

    chain: Chain
    line: list[Stage]  # what it was made of
    layout: Layout
    form: StateForm
    rows: int  # a batch that the original takes
    keeps_state: bool  # from call to call, in itself or through its caller
    saved: list[Tensor]  # the file's tensors that hold a state from call to call
    difference: float  # largest, relative to the largest answer
    limits: list[str] = field(default_factory=list)  # what the original cannot take and the chain can

    @property
    def call(self) -> str:
        """How the original is called."""
        return _call(self.layout, self.form, self.chain.input_size)


@dataclass(eq=False)
class Search:
    """What came out: a match or a reason, and the operators seen on the way there."""

    match: Match | None
    reason: str
    nodes: list[Node]


def search(
    archive: Archive,
    columns: Sequence[int],
    states: Sequence[tuple[int, int, int]],
    proposal: Chain | None = None,
) -> Search:
    """Look for a chain.

    Args:
        columns: guesses at the number of input columns.
        states: guesses at (layers and directions, size of h, size of c) where the code is given a state.
        proposal: a chain in float64 to compare with the code, instead of one made after it.
    """
    columns, states = (list(dict.fromkeys(guesses))[:_GUESSES] for guesses in (columns, states))  # type: ignore[assignment]
    return _Search(archive, columns, states, proposal).run()


class _Failed(ValueError):
    """A proposal that the numbers speak against."""


class _Search:
    def __init__(
        self,
        archive: Archive,
        columns: Sequence[int],
        states: Sequence[tuple[int, int, int]],
        proposal: Chain | None,
    ) -> None:
        self._archive, self._columns, self._states, self._proposal = archive, columns, states, proposal
        self._definitions, self._budget = Definitions(archive), Budget()
        self._reason, self._rank = "no forward in the code", -1
        self._nodes: list[Node] = []
        self._takes_batches = False

    def run(self) -> Search:
        try:
            function = self._definitions.forward(self._archive.root)
            arguments = function.args.args[1:]
            needed = arguments[: len(arguments) - len(function.args.defaults)]
            forms = self._forms(["Tuple" in _source(argument.annotation) for argument in needed])
            for rows in (2, 1, 4, 8, 16, 32, 64):
                if rows > 2 and self._rank > 0:
                    break  # something was understood at the usual sizes, so no odd batch size is baked in
                match = self._at(rows, forms)
                if match is not None:
                    return Search(match, "", self._nodes)
        except Unreadable as error:
            self._note(error, 0)
        return Search(None, self._reason, self._nodes)

    def _note(self, error: Exception, rank: int, nodes: list[Node] | None = None) -> None:
        """Keep the reason of the attempt that went furthest, and what was seen on the way that saw most."""
        if rank > self._rank:
            self._reason, self._rank = " ".join(str(error).split()), rank
        if nodes is not None and len(nodes) > len(self._nodes):
            self._nodes = nodes

    def _forms(self, pairs: list[bool]) -> list[StateForm]:
        """The ways to hand over a state to a forward with such arguments."""
        if len(pairs) <= 1 and pairs != [True]:
            return [StateForm("")]
        shapes: list[tuple[str, Callable[[Tensor], Tensor], bool]] = [
            ("(layers, batch, size)", lambda part: part, False),
            ("(batch, size)", lambda part: part[0], True),
            ("(size)", lambda part: part[0, 0], True),
        ]
        if pairs[1:] not in ([True], [False, False]) or pairs[0]:
            raise Unreadable(f"a forward of {len(pairs)} inputs, where x, (h, c) or x, h, c are known")
        swaps = (False,) if pairs[1:] == [True] else (False, True)
        return [
            StateForm(text, shape, pairs[1:] == [True], swapped, sizes)
            for sizes, (text, shape, single), swapped in itertools.product(self._states, shapes, swaps)
            if not single or sizes[0] == 1
        ]

    def _at(self, rows: int, forms: Sequence[StateForm]) -> Match | None:
        for layout, form, columns in itertools.product(_LAYOUTS, forms, self._columns):
            if layout.one_row and rows > 2:
                continue
            try:
                return self._try(layout, form, columns, 1 if layout.one_row else rows)
            except (Unreadable, _Failed):
                continue
        return None

    def _try(self, layout: Layout, form: StateForm, columns: int, rows: int) -> Match:
        evaluator = Evaluator(self._archive, self._definitions, self._budget)
        noise = torch.Generator().manual_seed(0)
        x = torch.randn(rows, 1, columns, generator=noise, dtype=torch.float64)
        given = _random_state(form, rows, noise)
        try:
            answer = tensors(evaluator.forward(layout.place(x), *form.arguments(given)))[0]
        except Unreadable as error:
            self._note(error, 0 if evaluator.nodes else -1, evaluator.nodes)
            raise
        nodes = list(evaluator.nodes)
        if layout.one_row and not layout.stepwise and self._takes_batches:
            raise _Failed("numbers of such layers for one sequence alone, but not for a batch, which it takes, too")
        self._takes_batches |= not layout.one_row and not layout.stepwise
        try:
            first = next(node for node in nodes if node.op == "input")
            line: list[Stage] = []
            saved = list(evaluator.written.values())
            chain = self._proposal
            if chain is None:
                line = stages(evaluator.node(answer), first)
                initial, saved = _initial(line, evaluator)
                chain = build.chain(line, initial)
        except ODD as error:
            self._note(error, 2, nodes)
            raise Unreadable(str(error)) from None
        self._note(_Failed(), 1, nodes)
        self._refuse_special_sizes(layout, form, rows, columns)
        try:
            return self._agree(Match(chain, line, layout, form, rows, True, saved, float("inf")))
        except ODD as error:
            self._note(ValueError(f"{error}, called as {_call(layout, form, columns)}"), 3, nodes)
            raise _Failed(str(error)) from None

    def _refuse_special_sizes(self, layout: Layout, form: StateForm, rows: int, columns: int) -> None:
        """One row, or one step a call, is no way to call what takes more and answers otherwise then."""
        larger: list[tuple[int, int]] = []
        if rows == 1 and not layout.one_row:
            larger.append((2, 1))
        if layout.stepwise and layout.place(torch.zeros(rows, 1, columns)).dim() == 3:
            larger.append((rows, _STEPS))
        for more_rows, steps in larger:
            evaluator = Evaluator(self._archive, self._definitions, self._budget)
            noise = torch.Generator().manual_seed(0)
            x = torch.randn(more_rows, steps, columns, generator=noise, dtype=torch.float64)
            try:
                evaluator.forward(layout.place(x), *form.arguments(_random_state(form, more_rows, noise)))
            except Unreadable:
                continue
            raise _Failed("numbers that hang on the number of rows or steps in another way")

    def _agree(self, match: Match) -> Match:
        """Compare a chain that answers every step with the code, over all that the two may mean by a call."""
        layout, rows = match.layout, match.rows

        def difference(rows: int, steps: int, scale: float) -> float:
            original = Evaluator(self._archive, self._definitions, self._budget, match.saved)
            return _difference(match, original, rows, steps, scale)

        def check(found: float) -> None:
            if not found <= TOLERANCE:
                raise _Failed(f"its numbers are not those of such layers (largest relative difference {found:.2g})")
            match.difference = max(match.difference, found)

        tried = []
        for answers in ("last",) if layout.stepwise else ANSWERS:
            for keeps in (True,) if match.form.sizes else (False, True):
                match.chain.answers, match.keeps_state = answers, keeps  # type: ignore[misc]
                tried.append((difference(rows, _STEPS, 1.0), answers, keeps))
        best, match.chain.answers, match.keeps_state = min(tried, key=lambda found: found[0])  # type: ignore[misc]
        match.difference = 0.0
        check(best)
        check(difference(rows, _STEPS, 10.0))
        for more_rows, steps, scale in ((rows, 1, 1.0), (rows, 9, 0.0), (1, 7, 1.0), (3, 4, 1.0)):
            if layout.one_row and more_rows != 1:
                continue
            try:
                check(difference(more_rows, steps, scale))
            except Unreadable:
                match.limits.append(f"batches of {rows} alone" if more_rows != rows else f"not {steps} steps at once")
        match.limits = list(dict.fromkeys(match.limits))
        return match


def _difference(match: Match, original: Evaluator, rows: int, steps: int, scale: float) -> float:
    """The largest difference between the code and the chain, relative to the largest answer."""
    layout, form, chain = match.layout, match.form, match.chain
    noise = torch.Generator().manual_seed(rows * 100 + steps)
    calls, length = (steps + 1, 1) if layout.stepwise else (_CALLS, steps)
    x = scale * torch.randn(calls, rows, length, chain.input_size, generator=noise, dtype=torch.float64)
    # Noise that the scaling turns into values of both signs around zero, so that no gate is far from its middle.
    x = torch.where(chain.input_scale == 0, x, x / chain.input_scale) + chain.input_offset
    start = state = chain.initial_state(rows)
    if form.sizes:
        state = _random_state(form, rows, noise)
        if any(given.shape != own.shape for given, own in zip(state, start, strict=True)):
            return float("inf")
    every = layout.stepwise or chain.answers == "every"
    worst, largest = 0.0, 0.0
    for window in x:
        given = state if match.keeps_state else start
        answer, *returned = tensors(original.forward(layout.place(window), *form.arguments(given)))
        with torch.no_grad():
            ours, state = chain.run(window, given) if every else chain.answer(window, given)
        pairs = [(answer, ours.transpose(0, 1) if layout.steps_first and every else ours)]
        if form.sizes:
            if len(returned) != 2:
                return float("inf")
            pairs += zip(returned, form.parts(state), strict=True)
        for theirs, mine in pairs:
            theirs, mine = theirs.double().squeeze(), mine.squeeze()
            if theirs.shape != mine.shape or not bool(torch.isfinite(theirs).all()):
                return float("inf")
            worst, largest = max(worst, float((theirs - mine).abs().max())), max(largest, float(mine.abs().max()))
    return worst / largest if largest > 0 else worst


def ask(match: Match, forward: Callable[..., Any], x: Tensor) -> Tensor:
    """What an original answers to windows (N, T, columns) from its first state: as the chain, every step or one.

    Args:
        forward: of the original, by an :class:`Evaluator` or by torch.
    """
    layout, form, chain = match.layout, match.form, match.chain
    state = tuple(part.to(x.dtype) for part in chain.initial_state(x.size(0)))
    given = form.arguments((state[0], state[1]))
    if not layout.stepwise:
        answer = tensors(forward(layout.place(x), *given))[0]
        if chain.answers != "every":
            return answer.reshape(x.size(0), -1)
        if layout.steps_first:
            return answer.reshape(x.size(1), x.size(0), -1).transpose(0, 1)
        return answer.reshape(x.size(0), x.size(1), -1)
    answers = []
    for t in range(x.size(1)):
        answer, *returned = tensors(forward(layout.place(x[:, t : t + 1]), *given))
        if form.sizes:
            given = (tuple(returned),) if form.paired else tuple(returned)
        answers.append(answer.reshape(x.size(0), -1))
    return torch.stack(answers, 1)


def _call(layout: Layout, form: StateForm, columns: int) -> str:
    text = f"forward({', '.join(['x', *form.names])}), x {layout.text.format(columns)}"
    return f"{text}, h and c {form.text}" if form.sizes else text


def _random_state(form: StateForm, rows: int, noise: torch.Generator) -> tuple[Tensor, Tensor]:
    layers, *sizes = form.sizes or (1, 1, 1)
    h, c = (torch.randn(layers, rows, size, generator=noise, dtype=torch.float64) for size in sizes)
    return h.tanh(), c


def _initial(line: Sequence[Stage], evaluator: Evaluator) -> tuple[list[tuple[Tensor, Tensor] | None], list[Tensor]]:
    """Where the LSTMs of a line start, and the tensors of the file in which a state is kept from call to call."""
    initial: list[tuple[Tensor, Tensor] | None] = []
    saved: dict[int, Tensor] = {}
    for stage in line:
        if not isinstance(stage, Recurrent):
            continue
        pair: list[Tensor | None] = []
        for node, size in zip(stage.states, state_sizes(stage)[1:], strict=True):
            kept = [root for root in behind(node) if id(root) in evaluator.written]
            saved |= {id(root): root for root in kept}
            if not node.constant or kept or node.value is None or not bool(node.value.any()):
                pair.append(None)
                continue
            value = node.value.double()
            rows = state_sizes(stage)[0]
            if value.size(-1) != size or value.numel() % (rows * size):
                raise Unreadable("a first state of another size than the LSTM's")
            value = value.reshape(rows, -1, size)
            if not bool((value == value[:, :1]).all()):
                raise Unreadable("a first state that differs from row to row of the batch")
            pair.append(value[:, 0])
        layers, h_size, c_size = state_sizes(stage)
        zeros = (torch.zeros(layers, size, dtype=torch.float64) for size in (h_size, c_size))
        h, c = (zero if part is None else part for part, zero in zip(pair, zeros, strict=True))
        initial.append((h, c) if any(part is not None for part in pair) else None)
    return initial, list(saved.values())


def state_sizes(stage: Recurrent) -> tuple[int, int, int]:
    """(layers and directions, size of h, size of c) of a layer."""
    return (
        stage.num_layers * (2 if stage.bidirectional else 1),
        stage.weights[1].size(1),
        stage.weights[1].size(0) // 4,
    )


def behind(node: Node) -> list[Tensor]:
    """The tensors of the file that a value was made of, through whatever operators."""
    found, todo, seen = [], [node], {node}
    while todo and len(seen) < 1000:
        node = todo.pop()
        if node.root is not None:
            found.append(node.root)
        for source in below(node.args):
            if source not in seen:
                seen.add(source)
                todo.append(source)
    return found


def tensors(answer: Any) -> list[Tensor]:
    """The tensors of a nest of tuples and lists, in order."""
    found: list[Tensor] = []
    todo = [answer]
    while todo and len(found) + len(todo) < 1000:  # lists in lists can be longer than they look
        item = todo.pop()
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, (tuple, list)):
            todo += item[::-1]
        else:
            raise Unreadable("an answer of something else than tensors")
    if todo or not found:
        raise Unreadable("an answer of no tensors, or of very many")
    return found


def _source(annotation: Any) -> str:
    return ast.unparse(annotation) if annotation is not None else ""
