"""The CUDA operators on the processor: host code and kernels are the CUDA library's, the threads are emulated.

The reference is torch's own LSTM in float64, run on each row and direction by itself and cut at resets.
"""

import itertools

import problems
import pytest
import torch

# What values in 16 bits lose: the products round to 8 or 11 bits, a gate's sum of up to about 4 has an error of 2^-7 or
# 2^-10, and some steps and layers add up. float32: activations to about 2e-7, sums of up to 300 products, and steps.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 4e-6, torch.float16: 8e-3, torch.bfloat16: 6e-2}
KERNELS = [kernel for kernel in problems.KERNELS if kernel]
#: Kernels of 16 bits alone.
NARROW = ("tensor", "cluster")


class Case:
    """A call of lstm_layers with random values."""

    def __init__(self, steps, batch, inputs, hidden, layers=1, directions=1, dtype=torch.float32, biased=True, seed=0):
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype, self.biased, self.directions, self.layers, self.hidden = dtype, biased, directions, layers, hidden
        self.x = self.values(steps, batch, inputs)
        self.h = self.values(layers * directions, batch, hidden) / 2
        self.c = self.values(layers * directions, batch, hidden)
        self.weights = []
        scale = 1 / max(hidden, 1) ** 0.5
        for layer in range(layers):
            width = inputs if layer == 0 else directions * hidden
            for _ in range(directions):
                self.weights += [self.values(4 * hidden, width) * scale, self.values(4 * hidden, hidden) * scale]
                if biased:
                    self.weights += [self.values(4 * hidden) * scale, self.values(4 * hidden) * scale]
        self.lengths = self.reset = self.initial_h = self.initial_c = self.batch_sizes = None

    def values(self, *shape):
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def with_lengths(self):
        steps, batch = self.x.shape[:2]
        self.lengths = torch.randint(0, steps + 1, (batch,), generator=self.generator)
        self.lengths[: min(batch, 2)] = torch.tensor([0, steps])[: min(batch, 2)]
        return self

    def with_reset(self):
        self.reset = torch.rand(self.x.shape[:2], generator=self.generator) < 0.4
        return self

    def with_initial(self):
        self.initial_h, self.initial_c = self.values(*self.h.shape[::2]), self.values(*self.c.shape[::2])
        return self

    def packed(self):
        """Rows by falling length, one step behind the other."""
        steps, batch = self.x.shape[:2]
        self.lengths = torch.randint(1, steps + 1, (batch,), generator=self.generator).sort(descending=True).values
        self.lengths[0] = steps
        self.batch_sizes = torch.tensor([int((self.lengths > step).sum()) for step in range(steps)])
        return self

    def arguments(self):
        if self.batch_sizes is not None:
            return (self.pack(self.x), self.batch_sizes, None, None)
        return (self.x, None, self.lengths, self.reset)

    def pack(self, values):
        return torch.cat([values[step, :rows] for step, rows in enumerate(self.batch_sizes.tolist())])

    def stages(self):
        each = 4 if self.biased else 2
        return [self.weights[at : at + each] for at in range(0, len(self.weights), each)]


def one_direction(x, length, flags, reverse, h, c, weights, initial):
    """One row (T, I) in one direction -> y, h and c behind its last step, and c of each step."""
    cuts = [0, *(step for step in range(1, length) if flags[step]), length]
    pieces = list(itertools.pairwise(cuts)) if length else []
    if length and flags[0] and not reverse:
        h, c = initial
    ys, cells = {}, {}
    for number, (begin, end) in enumerate(reversed(pieces) if reverse else pieces):
        if number:
            h, c = initial
        steps = range(end - 1, begin - 1, -1) if reverse else range(begin, end)
        for step in steps:
            y, h1, c1 = torch._VF.lstm(
                x[step].view(1, 1, -1), (h.view(1, 1, -1), c.view(1, 1, -1)), weights, len(weights) == 4, 1, 0.0, False,
                False, False,
            )  # fmt: skip
            h, c = h1.flatten(), c1.flatten()
            ys[step], cells[step] = y.flatten(), c
    nothing = torch.zeros_like(h)
    rows = range(x.shape[0])
    return (
        torch.stack([ys.get(step, nothing) for step in rows]),
        h,
        c,
        torch.stack([cells.get(step, nothing) for step in rows]),
    )


def reference(case, leaves):
    """-> y, h_n, c_n, cells of the last layer (D, T, N, H), outputs, from float64 leaves x, h, c, weights."""
    x, h, c, *weights = leaves
    steps, batch = case.x.shape[:2]
    each = 4 if case.biased else 2
    lengths = [steps] * batch if case.lengths is None else case.lengths.tolist()
    reset = torch.zeros(steps, batch, dtype=torch.bool) if case.reset is None else case.reset
    h_n, c_n, outputs = [], [], []
    for layer in range(case.layers):
        sides, cells = [], []
        for direction in range(case.directions):
            stage = layer * case.directions + direction
            initial = [
                torch.zeros(case.hidden, dtype=torch.float64) if value is None else value[stage].double()
                for value in (case.initial_h, case.initial_c)
            ]
            rows = [
                one_direction(
                    x[:, row], lengths[row], reset[:, row].tolist(), direction == 1, h[stage, row], c[stage, row],
                    weights[each * stage : each * (stage + 1)], initial,
                )
                for row in range(batch)
            ]  # fmt: skip
            y, h_last, c_last, c_all = (torch.stack(parts, 1 if k in (0, 3) else 0) for k, parts in
                                        enumerate(zip(*rows, strict=True)))  # fmt: skip
            sides.append(y)
            cells.append(c_all)
            h_n.append(h_last)
            c_n.append(c_last)
        x = torch.cat(sides, 2)
        outputs.append(x)
    return x, torch.stack(h_n), torch.stack(c_n), torch.stack(cells), outputs[:-1]


def close(found, expected, dtype, name):
    expected = expected.detach()
    assert found.dtype == dtype, name
    assert found.shape == expected.shape, (name, found.shape, expected.shape)
    if not expected.numel():
        return
    error = (found.double() - expected).abs().max()
    bound = TOLERANCE[dtype] * max(1.0, float(expected.abs().max()))
    assert error <= bound, f"{name}: off by {error:.3g}, allowed {bound:.3g}"  # NaN fails


def check(ops, case, backward=True):
    """One call forward and backward against the reference; -> all that came, for comparisons bit by bit."""
    leaves = [t.double().requires_grad_() for t in (case.x, case.h, case.c, *case.weights)]
    y, h_n, c_n, cells, outputs = reference(case, leaves)
    flat = case.pack if case.batch_sizes is not None else (lambda values: values)
    arguments = case.arguments()
    if case.lengths is not None and case.batch_sizes is None:  # what lies past a row's length must not be read
        past = torch.arange(case.x.shape[0]).unsqueeze(1) >= case.lengths
        arguments = (case.x.masked_fill(past.unsqueeze(2), float("nan")), *arguments[1:])
    state = case.h, case.c, case.initial_h, case.initial_c
    found = ops.lstm_layers(*arguments, *state, case.weights, case.biased, case.directions == 2, True)
    close(found[0], flat(y), case.dtype, "y")
    close(found[1], h_n, case.dtype, "h_n")
    close(found[2], c_n, case.dtype, "c_n")
    for layer, output in enumerate(outputs):
        close(found[3][layer], flat(output), case.dtype, f"outputs {layer}")
    tokens = flat(y).shape[0] if case.batch_sizes is not None else y.shape[0] * y.shape[1]
    last = [flat(side).reshape(tokens, case.hidden) for side in cells]
    close(found[5][-case.directions :], torch.stack(last), case.dtype, "cells")
    unsaved = ops.lstm_layers(*arguments, *state, case.weights, case.biased, case.directions == 2, False)
    for with_saved, without in zip(found[:3], unsaved[:3], strict=True):
        assert torch.equal(with_saved, without)
    assert [tensor.numel() for tensor in unsaved[3:]] == [0, 0, 0]
    if not backward:
        return [*found]

    grads = [case.values(*t.shape) for t in (flat(y), h_n, c_n, torch.stack(last))]
    pairs = zip((flat(y), h_n, c_n, torch.stack(last)), grads, strict=True)
    loss = sum((value * grad.double()).sum() for value, grad in pairs)
    expected = torch.autograd.grad(loss, leaves, materialize_grads=True)
    back = ops.lstm_layers_backward(
        *grads, *arguments, case.h, case.c, case.weights, case.biased, case.directions == 2, found[0], found[3],
        found[4], found[5], True,
    )  # fmt: skip
    close(back[0], flat(expected[0]), case.dtype, "grad_x")
    close(back[1], expected[1], case.dtype, "grad_h")
    close(back[2], expected[2], case.dtype, "grad_c")
    for place, (grad, right) in enumerate(zip(back[3], expected[3:], strict=True)):
        close(grad, right, case.dtype, f"gradient of weight {place}")
    return [*found, *back[:3], *back[3]]


def force(monkeypatch, kernel, dtype, directions=1):
    """Make a kernel do the call, where it is made for such calls."""
    narrow = dtype in (torch.float16, torch.bfloat16)
    if (kernel in ("block", "cluster_float") and dtype == torch.float64) or (kernel in NARROW and not narrow):
        pytest.skip(f"{kernel} has no {dtype}")
    if kernel == "rows" and directions == 2:
        pytest.skip("rows runs one direction")
    monkeypatch.setenv("CELLSTEP_CUDA_KERNEL", kernel)


SHAPES = [  # steps, batch, inputs, hidden, layers, directions
    (1, 1, 1, 1, 1, 1),
    (3, 2, 3, 5, 1, 2),
    (7, 5, 4, 8, 2, 2),
    (2, 17, 3, 33, 2, 1),
    (5, 3, 10, 50, 2, 1),
]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_stacks(emulated, poisoned, monkeypatch, kernel, dtype, shape):
    force(monkeypatch, kernel, dtype, shape[5])
    check(emulated, Case(*shape, dtype=dtype))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("what", ["lengths", "reset", "both", "packed", "unbiased"])
def test_options(emulated, poisoned, monkeypatch, kernel, directions, what):
    dtype = torch.float16 if kernel in NARROW else torch.float32
    force(monkeypatch, kernel, dtype, directions)
    case = Case(6, 7, 3, 16, 2, directions, dtype, biased=what != "unbiased")
    if what in ("lengths", "both"):
        case.with_lengths()
    if what in ("reset", "both"):
        case.with_reset()
    if what == "packed":
        case.packed()
    check(emulated, case)


@pytest.mark.parametrize("kernel", KERNELS)
def test_resets_to_a_learned_state(emulated, poisoned, monkeypatch, kernel):
    dtype = torch.bfloat16 if kernel in NARROW else torch.float32
    directions = 1 if kernel == "rows" else 2
    force(monkeypatch, kernel, dtype, directions)
    check(emulated, Case(5, 3, 4, 8, 2, directions, dtype).with_lengths().with_reset().with_initial(), backward=False)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_same_bits_in_any_order_of_threads(emulated, poisoned, monkeypatch, kernel):
    dtype = torch.bfloat16 if kernel in NARROW else torch.float32
    directions = 1 if kernel == "rows" else 2
    force(monkeypatch, kernel, dtype, directions)
    answers = []
    for seed in ("1", "2"):
        monkeypatch.setenv("CELLSTEP_SIMT_SEED", seed)
        answers.append(check(emulated, Case(4, 9, 5, 16, 2, directions, dtype).with_lengths().with_reset()))
    assert all(torch.equal(a, b) for a, b in zip(*answers, strict=True))


@pytest.mark.parametrize("shape", [(1, 1, 3, 300), (3, 2, 5, 161), (12, 1, 2, 7)], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype)[6:])
def test_the_table_has_a_kernel_for_every_size(emulated, poisoned, monkeypatch, dtype, shape):
    monkeypatch.delenv("CELLSTEP_CUDA_KERNEL", raising=False)
    check(emulated, Case(*shape, dtype=dtype))


@pytest.mark.parametrize(
    ("kernel", "dtype", "batch", "hidden"),
    [
        ("cluster", torch.bfloat16, 3, 768),
        ("cluster", torch.float16, 2, 1024),
        ("cluster", torch.bfloat16, 1, 2048),
        ("cluster_float", torch.float32, 3, 560),
        ("cluster_float", torch.float32, 2, 1024),
        ("cluster_float", torch.float32, 1, 1536),
    ],
    ids=str,
)
def test_weights_over_all_of_the_chip(emulated, poisoned, monkeypatch, kernel, dtype, batch, hidden):
    """Of layers that a cluster holds forward and backward, in one of both, and in neither."""
    force(monkeypatch, kernel, dtype)
    monkeypatch.setenv("CELLSTEP_SIMT_MULTIPROCESSORS", "132")
    case = Case(2, batch, 2, hidden, dtype=dtype)
    check(emulated, case.with_lengths() if batch > 2 else case)


@pytest.mark.parametrize("layers", [1, 3])
def test_no_rows(emulated, layers):
    case = Case(3, 0, 4, 5, layers)
    found = emulated.lstm_layers(case.x, None, None, None, case.h, case.c, None, None, case.weights, True, False, True)
    assert found[0].shape == (3, 0, 5) and found[1].shape == found[2].shape == (layers, 0, 5)
    grads = torch.zeros_like(found[0]), None, None, None
    back = emulated.lstm_layers_backward(
        *grads,
        case.x,
        None,
        None,
        None,
        case.h,
        case.c,
        case.weights,
        True,
        False,
        found[0],
        found[3],
        *found[4:],
        True,
    )
    assert back[0].shape == case.x.shape
    assert all(
        grad.shape == weight.shape and not grad.any() for grad, weight in zip(back[3], case.weights, strict=True)
    )


def test_more_layers_than_one_launch_takes(emulated, poisoned, monkeypatch):
    monkeypatch.setenv("CELLSTEP_CUDA_KERNEL", "block")
    check(emulated, Case(2, 2, 3, 4, 17))


def strided(tensor):
    """The same values with gaps and another order of axes in memory."""
    wide = torch.empty((*(2 * size for size in tensor.shape),), dtype=tensor.dtype).fill_(float("nan"))
    view = wide.permute(*reversed(range(tensor.dim()))).contiguous().permute(*reversed(range(tensor.dim())))
    view = view[tuple(slice(None, None, 2) for _ in tensor.shape)]
    return view.copy_(tensor)


@pytest.mark.parametrize("kernel", ["plain", "block", "rows"])
def test_strides(emulated, monkeypatch, kernel):
    directions = 1 if kernel == "rows" else 2
    force(monkeypatch, kernel, torch.float32, directions)
    case = Case(4, 3, 5, 8, 2, directions).with_reset()
    plain = check(emulated, case)
    for name in ("x", "h", "c"):
        setattr(case, name, strided(getattr(case, name)))
    case.weights = [strided(weight) for weight in case.weights]
    case.generator = torch.Generator().manual_seed(5)
    for first, second in zip(plain[:6], check(emulated, case)[:6], strict=True):
        torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("projected", [False, True])
def test_packed(emulated, poisoned, monkeypatch, dtype, reverse, projected):
    """lstm_packed, whose projection no other operator has, against torch's layer."""
    monkeypatch.delenv("CELLSTEP_CUDA_KERNEL", raising=False)
    case = Case(6, 5, 3, 8, dtype=dtype).packed()
    out = 3 if projected else 8
    weights = [case.values(32, 3) / 3, case.values(32, out) / 3, case.values(32) / 3, case.values(32) / 3]
    weight_hr = case.values(out, 8) / 3 if projected else None
    h, c = case.values(5, out), case.values(5, 8)
    leaves = [t.double().requires_grad_() for t in (case.x, h, c, *weights, *([weight_hr] if projected else []))]
    x, h0, c0, *params = leaves
    ys, h_n, c_n = [], [], []
    for row, length in enumerate(case.lengths.tolist()):
        line = x[:length, row : row + 1]
        line = line.flip(0) if reverse else line
        begin = h0[row].view(1, 1, -1), c0[row].view(1, 1, -1)
        y, h1, c1 = torch._VF.lstm(line, begin, params, True, 1, 0.0, False, False, False)
        y = y.flip(0) if reverse else y
        ys.append(torch.cat([y, y.new_zeros(6 - length, 1, out)]))
        h_n.append(h1.flatten())
        c_n.append(c1.flatten())
    expected = case.pack(torch.cat(ys, 1)), torch.stack(h_n), torch.stack(c_n)
    packed = case.pack(case.x)
    found = emulated.lstm_packed(packed, case.batch_sizes, h, c, *weights, weight_hr, reverse, True, True)
    for name, left, right in zip(("y", "h_n", "c_n"), found[:3], expected, strict=True):
        close(left, right, dtype, name)
    grads = [case.values(*t.shape) for t in expected]
    loss = sum((value * grad.double()).sum() for value, grad in zip(expected, grads, strict=True))
    right = torch.autograd.grad(loss, leaves)
    back = emulated.lstm_packed_backward(
        *grads, None, packed, case.batch_sizes, h, c, *weights[:2], weight_hr, found[0], *found[3:], reverse, True, True
    )
    close(back[0], case.pack(right[0]), dtype, "grad_x")
    names = ["grad_h", "grad_c", "grad_weight_ih", "grad_weight_hh", "grad_bias"]
    for name, left, gradient in zip(names, back[1:6], right[1:6], strict=True):
        close(left, gradient, dtype, name)
    if projected:
        close(back[6], right[7], dtype, "grad_weight_hr")


def test_layer_and_cell(emulated, poisoned):
    """Both go the road of lstm_layers: the same values, in their own shapes."""
    case = Case(4, 3, 5, 8)
    y, h_n, c_n, _, gates, cells = emulated.lstm_layers(
        case.x, None, None, None, case.h, case.c, None, None, case.weights, True, False, True
    )
    found = emulated.lstm_layer(case.x, case.h[0], case.c[0], *case.weights, True)
    right = y, h_n[0], c_n[0], gates.view(4, 3, 32), cells.view(4, 3, 8)
    assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))
    grad = case.values(4, 3, 8)
    one = emulated.lstm_layers_backward(
        grad, None, None, None, case.x, None, None, None, case.h, case.c, case.weights, True, False, y, y.new_empty(0),
        gates, cells, True,
    )  # fmt: skip
    two = emulated.lstm_layer_backward(
        grad, None, None, None, case.x, case.h[0], case.c[0], *case.weights[:2], *found[:1], *found[3:], True, True
    )
    right = one[0], one[1][0], one[2][0], *one[3][:3]
    assert all(torch.equal(a, b) for a, b in zip(two, right, strict=True))

    h1, c1, cell_gates = emulated.lstm_cell(case.x[0], case.h[0], case.c[0], *case.weights, True)
    first = emulated.lstm_layer(case.x[:1], case.h[0], case.c[0], *case.weights, True)
    assert torch.equal(h1, first[1]) and torch.equal(c1, first[2]) and torch.equal(cell_gates, first[3][0])
    back = emulated.lstm_cell_backward(
        grad[0], grad[1], case.x[0], case.h[0], case.c[0], *case.weights[:2], c1, cell_gates
    )
    right = emulated.lstm_layer_backward(
        None, grad[0], grad[1], None, case.x[:1], case.h[0], case.c[0], *case.weights[:2], first[0], *first[3:], True,
        True,
    )  # fmt: skip
    assert all(torch.equal(a.flatten(), b.flatten()) for a, b in zip(back, right, strict=True))


def test_long_batches_of_packed_rows_travel_in_pieces(emulated):
    """Offsets of 2,500 steps do not fit the arguments of one launch."""
    case = Case(2500, 2, 1, 2).packed()
    case.lengths = torch.tensor([2500, 1300])
    case.batch_sizes = torch.tensor([2] * 1300 + [1] * 1200)
    packed = torch.nn.utils.rnn.PackedSequence(case.pack(case.x), case.batch_sizes)
    module = torch.nn.LSTM(1, 2)
    for parameter, weight in zip(module.parameters(), case.weights, strict=True):
        parameter.data = weight
    right, (h_n, c_n) = module(packed, (case.h, case.c))
    found = emulated.lstm_layers(
        packed.data, case.batch_sizes, None, None, case.h, case.c, None, None, case.weights, True, False, False
    )
    torch.testing.assert_close(found[0], right.data, rtol=0, atol=1e-5)
    torch.testing.assert_close(found[1], h_n, rtol=0, atol=1e-5)
    torch.testing.assert_close(found[2], c_n, rtol=0, atol=1e-5)


def test_what_does_not_fit_is_refused_in_one_line(emulated, monkeypatch):
    case = Case(3, 2, 4, 5)

    def call(line, **changes):
        values = {"x": case.x, "batch_sizes": None, "lengths": None, "reset": None, "h": case.h, "c": case.c}
        values |= {"initial_h": None, "initial_c": None, "weights": case.weights, "biased": True}
        values |= {"bidirectional": False, "save": False} | changes
        with pytest.raises(RuntimeError, match=line) as error:
            emulated.lstm_layers(**values)
        assert "\n" not in str(error.value).split("Exception raised")[0].strip()

    call("expected x of float32, float64, float16 or bfloat16, got another type", x=case.x.to(torch.int32))
    call(r"expected at least one step, got x of shape \(0, 2, 4\)", x=case.x[:0])
    call(r"expected c of shape \(1, 2, 5\), got \(1, 2, 4\)", c=case.c[..., :4])
    call(r"expected weight_hh of shape \(20, 5\), got \(20, 4\)", weights=[case.weights[0], *[case.weights[0]] * 3])
    call("expected 4 weights for each layer, got 3", weights=case.weights[:3])
    call("expected lengths as int64", lengths=torch.tensor([1.0, 2.0]))
    call(r"expected reset of shape \(3, 2\), got \(2, 3\)", reset=torch.zeros(2, 3, dtype=torch.bool))
    call("expected x of 3 rows like h, got shape", h=torch.zeros(1, 3, 5), c=torch.zeros(1, 3, 5))
    packed = {"x": case.x.flatten(0, 1), "h": case.h, "c": case.c}
    call("got x of shape .* without batch_sizes: pass them", **packed)
    call("none larger than the one before, got 2 at 1", **packed, batch_sizes=torch.tensor([1, 2, 2]))
    call("expected x of as many rows as batch_sizes tell", **packed, batch_sizes=torch.tensor([2, 2]))
    monkeypatch.setenv("CELLSTEP_CUDA_KERNEL", "fast")
    call("expected CELLSTEP_CUDA_KERNEL as plain, rows, block, tensor, cluster or cluster_float, got fast")
    monkeypatch.setenv("CELLSTEP_CUDA_KERNEL", "tensor")
    call("expected a call that the kernel in CELLSTEP_CUDA_KERNEL can do, got hidden size 5 for tensor")


def test_has_kernels(emulated):
    assert emulated.has_kernels(torch.zeros(1))
