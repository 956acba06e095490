"""LSTM and LSTMCell in the places where torch's own are used: every feature, tool and transform around a module."""

import copy
import io
import itertools
import os
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils._pytree import tree_leaves, tree_map_only

from cellstep.nn import LSTM, Chain, Dense, LSTMCell, Scale, Skip

# float64 leaves rounding of 1e-16 a step; a few hundred sums bring it to some 1e-14.
CLOSE = {"rtol": 1e-11, "atol": 1e-12}
# What the stack can be made of; the state has two sizes with proj_size.
KINDS = {
    "plain": {},
    "layers": {"num_layers": 2},
    "bidirectional": {"num_layers": 2, "bidirectional": True},
    "projection": {"num_layers": 2, "proj_size": 3},
    "everything": {"num_layers": 2, "bidirectional": True, "proj_size": 3, "bias": False, "batch_first": True},
}


def pair(kind, dtype=torch.float64, **more):
    """Torch's module and ours with its weights."""
    options = {**KINDS.get(kind, {}), **more}
    theirs = torch.nn.LSTM(4, 6, dtype=dtype, **options)
    ours = LSTM(4, 6, dtype=dtype, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def state_of(module, batch, dtype=torch.float64):
    rows = module.num_layers * (2 if module.bidirectional else 1)
    sizes = (module.proj_size or module.hidden_size, module.hidden_size)
    return tuple(torch.randn(rows, batch, size, dtype=dtype) for size in sizes)


def input_of(module, steps=5, batch=3, dtype=torch.float64):
    x = torch.randn(steps, batch, module.input_size, dtype=dtype)
    return x.transpose(0, 1) if module.batch_first else x


def assert_same(ours, theirs, **tolerance):
    for a, b in zip(tree_leaves(ours), tree_leaves(theirs), strict=True):
        torch.testing.assert_close(a, b, **(tolerance or CLOSE))


def assert_bits(ours, theirs):
    for a, b in zip(tree_leaves(ours), tree_leaves(theirs), strict=True):
        assert torch.equal(a, b)


def gradients(module, *inputs, call=None):
    """The answer, and the gradients of a fixed weighting of it by every tensor that went in."""
    inputs = tree_map_only(torch.Tensor, lambda x: x.detach().clone().requires_grad_(x.is_floating_point()), inputs)
    outputs = tree_leaves((call or module)(*inputs))
    total = sum(
        (part * torch.arange(1.0, part.numel() + 1, dtype=part.dtype).view_as(part).cos()).sum() for part in outputs
    )
    leaves = [leaf for leaf in tree_leaves(inputs) if leaf.requires_grad]
    return outputs, torch.autograd.grad(total, [*leaves, *module.parameters()], allow_unused=True)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients(kind, training):
    """In eval mode too, where cuDNN refuses the backward pass."""
    theirs, ours = pair(kind)
    x, state = input_of(ours), state_of(ours, 3)
    assert_same(gradients(ours.train(training), x, state), gradients(theirs.train(training), x, state))
    assert_same(ours(x), theirs(x))
    one, alone = input_of(ours)[0] if ours.batch_first else input_of(ours)[:, 0], tuple(part[:, 0] for part in state)
    assert_same(gradients(ours, one, alone), gradients(theirs, one, alone))


def packed_case(batch_first, enforce_sorted, dtype=torch.float64):
    x = torch.randn(7, 4, 4, dtype=dtype)
    lengths = [7, 5, 5, 2] if enforce_sorted else [2, 7, 1, 5]
    x = x.transpose(0, 1) if batch_first else x
    return x, lengths, pack_padded_sequence(x, lengths, batch_first=batch_first, enforce_sorted=enforce_sorted)


@pytest.mark.parametrize("enforce_sorted", [True, False], ids=["sorted", "unsorted"])
@pytest.mark.parametrize("given_state", [True, False], ids=["state", "no-state"])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequence(kind, given_state, enforce_sorted):
    theirs, ours = pair(kind)
    x, lengths, packed = packed_case(ours.batch_first, enforce_sorted)
    state = state_of(ours, 4) if given_state else None

    def of(answer):
        output, last = answer
        assert isinstance(output, PackedSequence)
        return [output.data, *last]

    arguments = (packed, state) if given_state else (packed,)
    a, b = ours(*arguments), theirs(*arguments)
    assert_same(of(a), of(b))
    for name in ("batch_sizes", "sorted_indices", "unsorted_indices"):
        here, there = getattr(a[0], name), getattr(b[0], name)
        assert here is there is None or torch.equal(here, there)
    # A plain `lengths` says the same, in the order of the caller.
    padded, _ = pad_packed_sequence(b[0], batch_first=ours.batch_first)
    assert_same(ours(x, state, lengths=torch.tensor(lengths)), (padded, b[1]))

    leaf = packed.data.clone().requires_grad_()
    found = []
    for module in (ours, theirs):
        output, (h, c) = module(PackedSequence(leaf, *packed[1:]), state)
        total = (output.data.cos() * output.data).sum() + h.square().sum() + c.sin().sum()
        found.append(torch.autograd.grad(total, [leaf, *module.parameters()]))
    assert_same(*found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_dtypes(kind, dtype):
    theirs, ours = pair(kind, dtype)
    x, state = input_of(ours, dtype=dtype), state_of(ours, 3, dtype)
    _, _, packed = packed_case(ours.batch_first, False, dtype)
    # torch's module rounds every sum, gate and state of a step to half precision, and ours the answers alone: half a
    # unit in the last place of each, of values up to 1, in a handful of steps and layers.
    close = {"rtol": 1e-5, "atol": 2e-6} if dtype == torch.float32 else {"rtol": 0, "atol": 8 * torch.finfo(dtype).eps}

    def same(a, b):
        assert_same(a, b, **close)

    same(ours(x, state), theirs(x, state))
    a, b = ours(packed), theirs(packed)
    same((a[0].data, a[1]), (b[0].data, b[1]))
    for part in tree_leaves(ours(x, state, lengths=[5, 0, 2])):
        assert part.dtype == dtype


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(kind, dtype):
    theirs, ours = pair(kind, torch.float32)
    x, state = input_of(ours, dtype=torch.float32), state_of(ours, 3, torch.float32)
    _, _, packed = packed_case(ours.batch_first, False, torch.float32)
    with torch.autocast("cpu", dtype):
        for arguments in ((x,), (x, state), (x.to(dtype),)):
            try:
                expected = theirs(*arguments)
            except RuntimeError:  # torch leaves some of its own cells uncast
                with pytest.raises(RuntimeError):
                    ours(*arguments)
                continue
            answer = ours(*arguments)
            assert_bits(answer, expected)
        assert ours(packed)[0].data.dtype == theirs(packed)[0].data.dtype
        assert_bits(tree_leaves(ours(packed)), tree_leaves(theirs(packed)))
        lengths = ours(x, lengths=[5, 2, 0])[0]
    assert lengths.dtype == dtype
    (lengths.sum()).backward()
    assert ours.weight_ih_l0.grad.dtype == torch.float32


def test_autocast_of_the_cell():
    theirs, ours = torch.nn.LSTMCell(3, 5), LSTMCell(3, 5)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert_bits(ours(x), theirs(x))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_cuda(kind):
    theirs, ours = pair(kind)
    x, state = input_of(ours), state_of(ours, 3)
    expected = gradients(ours, x, state)
    theirs, ours = theirs.cuda(), ours.cuda()
    there = tree_map_only(torch.Tensor, lambda part: part.cuda(), (x, state))
    assert_same(gradients(ours, *there), gradients(theirs, *there))
    assert_same([part.cpu() for part in tree_leaves(gradients(ours, *there))], tree_leaves(expected))
    with torch.autocast("cuda", torch.float16):
        assert_same(ours(there[0].float()), theirs(there[0].float()), rtol=1e-2, atol=1e-2)
    _, _, packed = packed_case(ours.batch_first, False)
    assert_same(tree_leaves(ours(packed.cuda())), tree_leaves(theirs(packed.cuda())))


@pytest.mark.parametrize("kind", ["layers", "bidirectional", "projection", "everything"])
def test_dropout_is_drawn_as_torch_draws_it(kind):
    theirs, ours = pair(kind, dropout=0.4)
    x = input_of(ours)
    answers = []
    for module in (ours, theirs):
        torch.manual_seed(3)
        answers.append(gradients(module, x))
    assert_same(*answers)
    assert not torch.equal(ours(x)[0], ours(x)[0])
    assert_same(ours.eval()(x), theirs.eval()(x))


def test_dropout_with_one_layer_warns():
    for cls in (torch.nn.LSTM, LSTM):
        with pytest.warns(UserWarning, match="dropout option adds dropout after all but last"):
            cls(3, 4, dropout=0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_construction(kind):
    """Parameters (names, order, values), representation and weights both ways are torch's."""
    torch.manual_seed(1)
    theirs = torch.nn.LSTM(4, 6, **KINDS[kind])
    torch.manual_seed(1)
    ours = LSTM(4, 6, **KINDS[kind])
    assert repr(ours) == repr(theirs)
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    assert_bits(list(ours.parameters()), list(theirs.parameters()))
    assert [[id(p) for p in layer] for layer in ours.all_weights] == [
        [id(getattr(ours, name)) for name in names] for names in theirs._all_weights
    ]
    for source, target in ((ours, theirs), (theirs, ours)):
        torch.nn.init.normal_(source.weight_hh_l0)
        target.load_state_dict(source.state_dict(), strict=True)
        assert torch.equal(target.weight_hh_l0, source.weight_hh_l0)
        target.load_state_dict({name: p.clone() for name, p in source.state_dict().items()}, strict=True, assign=True)
    x = input_of(ours, dtype=torch.float32)
    assert_same(ours(x), theirs(x), rtol=1e-5, atol=2e-6)
    assert ours.flatten_parameters() is None
    odd = {"dropout": 0.5, "bidirectional": True, "proj_size": 2, "bias": False, "batch_first": True, "num_layers": 3}
    assert repr(LSTM(4, 6, **odd)) == repr(torch.nn.LSTM(4, 6, **odd))
    assert repr(LSTMCell(3, 4, bias=False)) == repr(torch.nn.LSTMCell(3, 4, bias=False))


@pytest.mark.parametrize("kind", KINDS)
def test_meta_device(kind):
    _, ours = pair(kind)
    meta = LSTM(4, 6, **KINDS[kind], device="meta", dtype=torch.float64)
    assert all(p.is_meta for p in meta.parameters())
    x, state = input_of(ours).to("meta"), tuple(part.to("meta") for part in state_of(ours, 3))
    shapes = [part.shape for part in tree_leaves(ours(input_of(ours)))]
    for answer in (meta(x), meta(x, state), meta(x, lengths=torch.ones(3, dtype=torch.long, device="meta"))):
        assert [part.shape for part in tree_leaves(answer)] == shapes
        assert all(part.is_meta for part in tree_leaves(answer))
    meta.to_empty(device="cpu").load_state_dict(ours.state_dict())
    x = input_of(ours)
    assert_bits(meta(x), ours(x))
    skipped = torch.nn.utils.skip_init(LSTM, 4, 6, **KINDS[kind], dtype=torch.float64)
    skipped.load_state_dict(ours.state_dict())
    assert_bits(skipped(x), ours(x))


def test_devices_that_differ_are_refused():
    """A tensor on the meta device has no values, so that an answer on the CPU would be memory as it was found."""
    lstm, cell, x = LSTM(4, 6), LSTMCell(4, 6), torch.randn(5, 3, 4)
    state = tuple(torch.randn(1, 3, 6) for _ in "hc")
    meta_state = tuple(part.to("meta") for part in state)
    for wrong in (
        lambda: lstm(x.to("meta")),
        lambda: lstm(x, meta_state),
        lambda: lstm(x, (state[0], meta_state[1])),
        lambda: LSTM(4, 6, device="meta")(x),
        lambda: cell(x[0].to("meta")),
        lambda: cell(x[0], tuple(part[0] for part in meta_state)),
        lambda: LSTMCell(4, 6, device="meta")(x[0]),
        lambda: torch.ops.cellstep.lstm_layer(
            x, state[0][0], state[1][0], *(p.to("meta") for p in lstm.parameters()), True
        ),
    ):
        with pytest.raises(RuntimeError, match="device"):
            wrong()


@pytest.mark.parametrize("kind", KINDS)
def test_copies(kind):
    _, ours = pair(kind)
    x = input_of(ours)
    expected = ours(x)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    for twin in (
        copy.deepcopy(ours),
        copy.copy(ours),
        pickle.loads(pickle.dumps(ours)),
        torch.load(file, weights_only=False),
    ):
        assert_bits(twin(x), expected)
    twin = copy.deepcopy(ours)
    torch.nn.init.zeros_(twin.weight_hh_l0)
    assert_bits(ours(x), expected)
    ours.share_memory()
    assert all(p.is_shared() for p in ours.parameters())
    assert_bits(ours(x), expected)
    cell = LSTMCell(4, 6)
    assert_bits(pickle.loads(pickle.dumps(cell))(torch.ones(2, 4)), cell(torch.ones(2, 4)))


def test_a_pickled_module_opens_where_there_are_no_operators(tmp_path):
    torch.manual_seed(0)
    module = torch.nn.ModuleList([LSTM(3, 4), LSTMCell(3, 4)])
    torch.save(module, tmp_path / "module.pt")
    program = (
        "import sys, torch\n"
        "lstm, cell = torch.load(sys.argv[1], weights_only=False)\n"
        "print(lstm(torch.ones(2, 1, 3))[0].sum().item() + cell(torch.ones(1, 3))[0].sum().item())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "module.pt"],
        env={**os.environ, "CELLSTEP_DISABLE_OPS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    expected = module[0](torch.ones(2, 1, 3))[0].sum() + module[1](torch.ones(1, 3))[0].sum()
    assert float(done.stdout) == pytest.approx(expected.item(), abs=2e-6)


def test_scripted_after_copies_moves_and_assigned_weights():
    theirs, ours = pair("bidirectional")
    x = input_of(ours)
    torch.jit.script(ours)
    twin = copy.deepcopy(ours)
    twin.load_state_dict({name: 0 * p for name, p in ours.state_dict().items()}, assign=True)
    assert torch.jit.script(twin)(x)[0].abs().max() == 0
    ours.float()
    scripted = torch.jit.script(copy.deepcopy(ours))
    assert_bits(scripted(x.float()), ours(x.float()))
    scripted.double()
    assert_same(scripted(x), theirs(x), rtol=1e-5, atol=1e-6)
    assert_bits(pickle.loads(pickle.dumps(ours))(x.float()), ours(x.float()))


def normed(module, names, wrap):
    for name in names:
        wrap(module, name)
    return module


@pytest.mark.parametrize("kind", ["layers", "bidirectional"])
def test_weight_norm(kind):
    from torch.nn.utils import parametrizations, parametrize

    names = ["weight_ih_l0", "weight_hh_l1"]
    theirs, ours = (normed(module, names, parametrizations.weight_norm) for module in pair(kind))
    x = input_of(ours)
    expected = gradients(theirs, x)
    assert_same(gradients(ours, x), expected)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for module in (ours, theirs):
        torch.optim.SGD(module.parameters(), 0.5).zero_grad()
        module(x)[0].square().sum().backward()
        torch.optim.SGD(module.parameters(), 0.5).step()
    assert_same(ours(x), theirs(x))
    assert_same(copy.deepcopy(ours)(x), theirs(x))
    for name in names:
        parametrize.remove_parametrizations(ours, name)
    assert set(dict(ours.named_parameters())) == set(dict(pair(kind)[1].named_parameters()))
    assert_same(ours(x), theirs(x))
    assert_bits(torch.jit.script(ours)(x), ours(x))


def test_old_weight_norm_and_spectral_norm():
    theirs, ours = pair("layers")
    x = input_of(ours)
    for module in (theirs, ours):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch points to parametrizations
            torch.nn.utils.weight_norm(module, "weight_hh_l0")
    assert_same(gradients(ours, x), gradients(theirs, x))
    for module in (ours, theirs):
        torch.optim.SGD(module.parameters(), 0.5).zero_grad()
        module(x)[0].square().sum().backward()
        torch.optim.SGD(module.parameters(), 0.5).step()
    assert_same(ours(x), theirs(x))
    torch.nn.utils.remove_weight_norm(ours, "weight_hh_l0")
    assert isinstance(ours.weight_hh_l0, torch.nn.Parameter)
    assert_same(ours(x), theirs(x))
    theirs, ours = pair("layers")
    for module in (theirs, ours):
        torch.manual_seed(0)
        torch.nn.utils.parametrizations.spectral_norm(module, "weight_hh_l1").eval()  # in training each look changes it
    assert_same(ours(x), theirs(x))


def test_prune():
    from torch.nn.utils import prune

    theirs, ours = pair("bidirectional")
    x = input_of(ours)
    for module in (theirs, ours):
        prune.l1_unstructured(module, "weight_hh_l0_reverse", 0.5)
    assert_same(gradients(ours, x), gradients(theirs, x))
    prune.remove(ours, "weight_hh_l0_reverse")
    assert (ours.weight_hh_l0_reverse == 0).float().mean() == 0.5
    assert_same(ours(x), theirs(x))


@pytest.mark.parametrize("kind", KINDS)
def test_functional_call_and_an_ensemble(kind):
    models = [pair(kind)[1] for _ in range(3)]
    x = input_of(models[0])
    parameters, buffers = torch.func.stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")

    def run(parameters, buffers, x):
        return torch.func.functional_call(base, (parameters, buffers), (x,))

    answers = torch.vmap(run, in_dims=(0, 0, None))(parameters, buffers, x)
    assert_same(answers, [torch.stack(parts) for parts in zip(*(tree_leaves(m(x)) for m in models), strict=True)])
    replaced = dict(models[1].named_parameters())
    assert_bits(torch.func.functional_call(models[0], replaced, (x,)), models[1](x))
    assert_same(run(replaced, {}, x), models[1](x))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_each_sample(kind):
    """torch.nn.LSTM has none: its operator has no batching rule."""
    _, ours = pair(kind)
    xs = torch.randn(4, 5, 4, dtype=torch.float64)
    lengths = torch.tensor([5, 0, 2, 3])
    parameters = {name: p.detach() for name, p in ours.named_parameters()}

    def loss(parameters, x, length):
        sequence = x.unsqueeze(0 if ours.batch_first else 1)
        y, (h, c) = torch.func.functional_call(ours, parameters, (sequence, None, length.unsqueeze(0)))
        return y.square().sum() + h.sum() + c.sin().sum()

    found = torch.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, xs, lengths)
    for k in range(4):
        total = loss(dict(ours.named_parameters()), xs[k], lengths[k])
        alone = torch.autograd.grad(total, list(ours.parameters()))
        assert_same([grad[k] for grad in found.values()], alone)

    def unbatched(parameters, x):
        return torch.func.functional_call(ours, parameters, (x,))[0].square().sum()

    found = torch.vmap(torch.func.grad(unbatched), in_dims=(None, 0))(parameters, xs)
    for k in range(4):
        alone = torch.autograd.grad(ours(xs[k])[0].square().sum(), list(ours.parameters()))
        assert_same([grad[k] for grad in found.values()], alone)


@pytest.mark.parametrize("kind", KINDS)
def test_forward_mode_jacobians_and_hessians(kind):
    theirs, ours = pair(kind)
    x = input_of(ours, 3, 2)
    tangent = torch.randn_like(x)
    value, forward = torch.func.jvp(lambda x: ours(x)[0], (x,), (tangent,))
    numeric = (theirs(x + 1e-6 * tangent)[0] - theirs(x - 1e-6 * tangent)[0]) / 2e-6
    assert_same(value, theirs(x)[0])
    # Central differences with steps of 1e-6 are good to some 1e-9.
    assert_same(forward, numeric, rtol=1e-7, atol=1e-8)
    with torch.autograd.forward_ad.dual_level():
        dual = ours(torch.autograd.forward_ad.make_dual(x, tangent))[0]
        assert_same(torch.autograd.forward_ad.unpack_dual(dual).tangent, forward)

    def total(x):
        return ours(x)[0].square().sum()

    jacobian = torch.autograd.functional.jacobian(lambda x: theirs(x)[0], x)
    assert_same(torch.func.jacrev(lambda x: ours(x)[0])(x), jacobian)
    assert_same(torch.func.jacfwd(lambda x: ours(x)[0])(x), jacobian)
    assert_same(torch.autograd.functional.jacobian(lambda x: ours(x)[0], x), jacobian)
    hessian = torch.autograd.functional.hessian(lambda x: theirs(x)[0].square().sum(), x)
    assert_same(torch.func.hessian(total)(x), hessian)
    assert_same(torch.autograd.functional.hessian(total, x), hessian)


@pytest.mark.parametrize("kind", KINDS)
def test_batched_gradients_of_a_graph(kind):
    theirs, ours = pair(kind)
    cell, x = LSTMCell(4, 6, dtype=torch.float64), input_of(ours)
    for module, leaf in ((ours, x), (cell, x[0])):
        leaf = leaf.detach().requires_grad_()
        output = module(leaf)[0]
        vectors = torch.randn(3, *output.shape, dtype=torch.float64)
        inputs = [leaf, *module.parameters()]
        one_by_one = [torch.autograd.grad(output, inputs, vector, retain_graph=True) for vector in vectors]
        expected = [torch.stack(parts) for parts in zip(*one_by_one, strict=True)]
        assert_same(torch.autograd.grad(output, inputs, vectors, is_grads_batched=True, retain_graph=True), expected)

        def pull(vector, output=output, inputs=inputs):
            return torch.autograd.grad(output, inputs, vector, retain_graph=True)

        assert_bits(torch.vmap(pull)(vectors), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_double_backward(kind):
    """cuDNN has none. A penalty on the gradient, as in WGAN-GP, and its own gradient by the weights."""
    found = []
    modules = pair(kind)
    x = input_of(modules[0])
    for module in modules:
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(module(leaf)[0].square().sum(), leaf, create_graph=True)
        found.append(torch.autograd.grad((first.norm() - 1).square(), [leaf, *module.parameters()]))
    assert_same(*found)


@pytest.mark.parametrize("kind", KINDS)
def test_deterministic_to_the_bit(kind):
    _, ours = pair(kind)
    x, state = input_of(ours, 9, 5), state_of(ours, 5)
    expected = gradients(ours, x, state)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert_bits(gradients(ours, x, state), expected)
    finally:
        torch.use_deterministic_algorithms(before)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert_bits(gradients(ours, x, state)[0], expected[0])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_the_same_way(kind):
    """20 steps of AdamW with clipped gradients, in double precision."""
    losses = []
    modules = pair(kind)
    x, target = input_of(modules[0]), torch.randn(5, 3, 1, dtype=torch.float64)
    for module in modules:
        torch.manual_seed(0)
        model = torch.nn.ModuleDict({"rnn": module, "head": torch.nn.LazyLinear(1, dtype=torch.float64)})
        model["head"](module(x)[0])
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10)
        for _ in range(20):
            optimizer.zero_grad()
            loss = (model["head"](module(x)[0]).view(-1) - target.view(-1)).square().mean()
            loss.backward()
            losses.append(loss.item())
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            scheduler.step()
    assert losses[20:] == pytest.approx(losses[:20], rel=1e-9)
    assert losses[-1] < losses[20]


def test_gradients_lie_in_memory_of_their_own():
    """So that clipping or zeroing one in place leaves the others alone: both biases have the same gradient."""
    for module, x in ((LSTM(4, 6), torch.randn(5, 3, 4)), (LSTM(4, 6, proj_size=2), torch.randn(5, 3, 4))):
        module(x)[0].sum().backward()
        places = [parameter.grad.data_ptr() for parameter in module.parameters()]
        assert len(set(places)) == len(places)


@pytest.mark.parametrize("frozen", ["weight_ih_l0", "weight_hh_l1", "bias_hh_l0", "all"])
def test_frozen_parameters(frozen):
    found = []
    modules = pair("layers")
    x = input_of(modules[0]).requires_grad_()
    for module in modules:
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name != frozen and frozen != "all")
        x.grad = None
        module(x)[0].square().sum().backward()
        found.append([x.grad, *(p.grad for p in module.parameters() if p.grad is not None)])
        assert all((p.grad is not None) == p.requires_grad for p in module.parameters())
    assert_same(*found)


def test_no_gradient_modes():
    _, ours = pair("bidirectional")
    x = input_of(ours)
    expected = ours(x)
    with torch.no_grad():
        quiet = ours(x)
    with torch.inference_mode():
        inference = ours(x)
        assert inference[0].is_inference()
    assert_bits(quiet, expected)
    assert_bits(inference, expected)
    assert not quiet[0].requires_grad
    with torch.inference_mode():
        assert not LSTM(3, 4)(torch.randn(2, 1, 3))[0].requires_grad


def test_hooks():
    calls = []
    _, ours = pair("layers")
    ours.register_forward_pre_hook(lambda module, args: calls.append("before"))
    ours.register_forward_hook(lambda module, args, output: (2 * output[0], output[1]))
    ours.register_full_backward_hook(lambda module, grad_input, grad_output: calls.append(grad_output[0].shape))
    ours.weight_hh_l0.register_hook(lambda grad: 0 * grad)
    x = input_of(ours).requires_grad_()
    plain = ours.forward(x)[0]
    output = ours(x)[0]
    assert_bits(output, 2 * plain)
    output.sum().backward()
    assert calls == ["before", output.shape]
    assert ours.weight_hh_l0.grad.abs().max() == 0 < ours.weight_ih_l0.grad.abs().max()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(use_reentrant):
    from torch.utils.checkpoint import checkpoint

    _, ours = pair("bidirectional", dropout=0.3)
    x = input_of(ours)
    answers = []
    for run in (ours, lambda x: checkpoint(ours, x, use_reentrant=use_reentrant)):
        torch.manual_seed(5)
        leaf = x.clone().requires_grad_()
        output = run(leaf)[0]
        answers.append([output, *torch.autograd.grad(output.square().sum(), leaf)] if not use_reentrant else [output])
        if use_reentrant:
            ours.zero_grad()
            output.square().sum().backward()
            answers[-1].append(leaf.grad)
    assert_bits(*answers)


def test_no_bit_hangs_on_strides():
    """Everything non-contiguous, expanded or transposed: inputs, states, weights and incoming gradients."""
    _, ours = pair("bidirectional")
    wide = torch.randn(3, 8, 10, dtype=torch.float64)
    x = wide.permute(2, 0, 1)[::2, :, ::2]
    state = tuple(torch.randn(1, 1, 6, dtype=torch.float64).expand(4, 3, 6) for _ in "hc")
    solid = copy.deepcopy(ours)
    for name, parameter in list(ours.named_parameters()):
        loose = torch.empty(*parameter.shape, 2, dtype=torch.float64)[..., 0].copy_(parameter.detach())
        if loose.dim() == 2:
            loose = loose.t().contiguous().t()
        setattr(ours, name, torch.nn.Parameter(loose))
    loose_answer = ours(x, state)
    solid_answer = solid(x.contiguous(), tuple(part.contiguous() for part in state))
    assert_bits(loose_answer, solid_answer)
    grad = torch.randn(12, 3, 5, dtype=torch.float64).permute(2, 1, 0)
    assert_bits(
        torch.autograd.grad(loose_answer[0], list(ours.parameters()), grad),
        torch.autograd.grad(solid_answer[0], list(solid.parameters()), grad.contiguous()),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_no_rows(kind):
    theirs, ours = pair(kind)
    x = input_of(ours, 5, 0)
    answer = ours(x)
    assert [part.shape for part in tree_leaves(answer)] == [part.shape for part in tree_leaves(theirs(x))]
    assert [part.shape for part in tree_leaves(ours(x, lengths=[]))] == [part.shape for part in tree_leaves(answer)]
    answer[0].sum().backward()
    assert all(p.grad.abs().max() == 0 for p in ours.parameters())


class Ragged:
    """Rows of lengths 0 and more, filled up with what must not matter."""

    def __init__(self, module, filling, lengths=(5, 0, 3, 1)):
        self.lengths = torch.tensor(lengths)
        self.past = torch.arange(5).unsqueeze(1) >= self.lengths
        x = torch.randn(5, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        x = x.masked_fill(self.past.unsqueeze(2), filling)
        self.x = x.transpose(0, 1) if module.batch_first else x


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("filling", [torch.nan, torch.inf, 1e300])
def test_what_lies_past_the_end_of_a_row_reaches_nothing(kind, filling):
    _, ours = pair(kind)
    state = state_of(ours, 4)
    answers = []
    for fill in (0.0, filling):
        case = Ragged(ours, fill)
        answers.append(gradients(ours, case.x, state, call=lambda *given, case=case: ours(*given, case.lengths)))
    gradients_of_module = [
        torch.autograd.grad(
            ours(Ragged(ours, fill).x, state, Ragged(ours, fill).lengths)[0].sum(), list(ours.parameters())
        )
        for fill in (0.0, filling)
    ]
    assert_bits(answers[0], answers[1])
    assert_bits(*gradients_of_module)
    assert all(part.isfinite().all() for part in tree_leaves(answers))


@pytest.mark.parametrize("kind", KINDS)
def test_lengths_equal_rows_alone(kind):
    _, ours = pair(kind)
    case, state = Ragged(ours, torch.nan), state_of(ours, 4)
    rows = 0 if ours.batch_first else 1
    output, (h, c) = ours(case.x, state, case.lengths)
    for row, length in enumerate(case.lengths.tolist()):
        mine = output.select(rows, row)
        if length:
            alone = ours(case.x.select(rows, row)[:length], tuple(part[:, row] for part in state))
            assert_bits((mine[:length], (h[:, row], c[:, row])), alone)
        else:
            assert_bits((h[:, row], c[:, row]), tuple(part[:, row] for part in state))
        assert mine[length:].abs().sum() == 0


def test_rows_of_no_steps_pass_the_gradient_of_their_state_on():
    _, ours = pair("layers")
    h, c = (part.requires_grad_() for part in state_of(ours, 3))
    _, (h_n, c_n) = ours(input_of(ours), (h, c), lengths=[0, 0, 0])
    assert torch.equal(h_n, h) and torch.equal(c_n, c)
    (h_n.sum() + 2 * c_n.sum()).backward()
    assert (h.grad == 1).all() and (c.grad == 2).all()


def test_lengths_come_in_many_forms():
    _, ours = pair("bidirectional")
    x = input_of(ours)
    expected = ours(x, lengths=torch.tensor([5, 0, 2]))
    for kind in (torch.int8, torch.uint8, torch.int32, torch.int64):
        assert_bits(ours(x, lengths=torch.tensor([5, 0, 2], dtype=kind)), expected)
        assert_bits(torch.jit.script(ours)(x, lengths=torch.tensor([5, 0, 2], dtype=kind)), expected)
    assert_bits(ours(x, lengths=[5, 0, 2]), expected)
    assert_bits(ours(x, lengths=torch.tensor([5, 0, 2]).numpy()), expected)
    for wrong in ([6, 0, 2], [-1, 0, 2], [5, 0], [[5, 0, 2]], [5.0, 0.0, 2.0], [True, False, True]):
        with pytest.raises(ValueError, match="lengths"):
            ours(x, lengths=wrong)
    with pytest.raises(Exception, match="lengths"):
        torch.jit.script(ours)(x, lengths=torch.tensor([6, 0, 2]))
    with pytest.raises(ValueError, match="batched"):
        ours(x[:, 0], lengths=[5])


def outcome(call):
    try:
        call()
    except Exception as error:
        return type(error)
    return None


WRONG_CONSTRUCTION = [
    *((value,) for value in ((0, 5), (-1, 5), (3, 0), (3.0, 5), ("3", 5), (3, 5.0), (3, 5, 0), (3, 5, -1))),
    *(((3, 5), options) for options in ({"num_layers": 1.5}, {"bias": 1}, {"bias": None}, {"batch_first": 0})),
    *(((3, 5), {"dropout": value}) for value in (-0.1, 1.1, True, float("nan"))),
    *(((3, 5), {"proj_size": value}) for value in (-1, 5, 6)),
    ((3, 5), {"device": "nowhere"}),
    ((3, 5), {"dtype": torch.int64}),
    ((3,), {}),
    ((3, 5), {"nonlinearity": "relu"}),
]


@pytest.mark.parametrize("case", WRONG_CONSTRUCTION, ids=str)
def test_wrong_arguments_raise_what_torch_raises(case):
    args, kwargs = case if len(case) == 2 and isinstance(case[1], dict) else (case[0], {})
    expected = outcome(lambda: torch.nn.LSTM(*args, **kwargs))
    assert expected is not None
    assert outcome(lambda: LSTM(*args, **kwargs)) is expected


def shapes(*sizes, dtype=torch.float64):
    return tuple(torch.randn(size, dtype=dtype) for size in sizes)


WRONG_CALLS = {
    "1-D": lambda: (torch.randn(4, dtype=torch.float64),),
    "4-D": lambda: (torch.randn(5, 3, 4, 1, dtype=torch.float64),),
    "input_size": lambda: shapes((5, 3, 5)),
    "unbatched input_size": lambda: shapes((5, 5)),
    "no steps": lambda: shapes((0, 3, 4)),
    "dtype": lambda: shapes((5, 3, 4), dtype=torch.float32),
    "integers": lambda: (torch.ones(5, 3, 4, dtype=torch.int64),),
    "complex": lambda: (torch.ones(5, 3, 4, dtype=torch.complex128),),
    "h rows": lambda: (*shapes((5, 3, 4)), shapes((1, 3, 6), (2, 3, 6))),
    "c rows": lambda: (*shapes((5, 3, 4)), shapes((2, 3, 6), (1, 3, 6))),
    "h batch": lambda: (*shapes((5, 3, 4)), shapes((2, 1, 6), (2, 3, 6))),
    "c size": lambda: (*shapes((5, 3, 4)), shapes((2, 3, 6), (2, 3, 5))),
    "unbatched state": lambda: (*shapes((5, 3, 4)), shapes((2, 6), (2, 6))),
    "batched state": lambda: (*shapes((5, 4)), shapes((2, 1, 6), (2, 1, 6))),
    "state dtype": lambda: (*shapes((5, 3, 4)), shapes((2, 3, 6), (2, 3, 6), dtype=torch.float32)),
    "no tensor": lambda: ([[1.0]],),
    "nothing": lambda: (),
    "packed input_size": lambda: (pack_padded_sequence(torch.randn(5, 2, 3, dtype=torch.float64), [5, 2]),),
    "packed data": lambda: (pack_padded_sequence(torch.randn(5, 2, 4, 1, dtype=torch.float64), [5, 2]),),
    "packed state": lambda: (
        pack_padded_sequence(torch.randn(5, 2, 4, dtype=torch.float64), [5, 2]),
        shapes((2, 3, 6), (2, 3, 6)),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["operators", "torch"])
@pytest.mark.parametrize("name", WRONG_CALLS)
def test_wrong_calls_raise_what_torch_raises(name, dtype):
    theirs, ours = pair("layers", dtype)
    arguments = WRONG_CALLS[name]()
    if dtype != torch.float64:
        arguments = tree_map_only(torch.Tensor, lambda x: x.to(dtype) if x.dtype == torch.float64 else x, arguments)
    if name == "state dtype" and dtype == torch.float64:
        # oneDNN has no double precision, and what its check of the types raises is not of one class in all versions.
        assert issubclass(outcome(lambda: ours(*arguments)), RuntimeError)
        return
    expected = outcome(lambda: theirs(*arguments))
    assert expected is not None
    assert outcome(lambda: ours(*arguments)) is expected


WRONG_CELL_CALLS = {
    "3-D": lambda: shapes((2, 3, 4)),
    "input_size": lambda: shapes((2, 5)),
    "unbatched input_size": lambda: shapes((5,)),
    "dtype": lambda: shapes((2, 4), dtype=torch.float32),
    "h batch": lambda: (*shapes((2, 4)), shapes((3, 6), (3, 6))),
    "one row of state": lambda: (*shapes((2, 4)), shapes((1, 6), (1, 6))),
    "h size": lambda: (*shapes((2, 4)), shapes((2, 5), (2, 6))),
    "c size": lambda: (*shapes((2, 4)), shapes((2, 6), (2, 5))),
    "3-D state": lambda: (*shapes((2, 4)), shapes((1, 2, 6), (1, 2, 6))),
    "unbatched state": lambda: (*shapes((2, 4)), shapes((6,), (6,))),
    "batched state": lambda: (*shapes((4,)), shapes((2, 6), (2, 6))),
    "state dtype": lambda: (*shapes((2, 4)), shapes((2, 6), (2, 6), dtype=torch.float32)),
}


def test_packed_sequence_of_another_dtype_is_refused():
    """As a padded one is; torch does not ask, and its matrix product raises a RuntimeError."""
    packed = pack_padded_sequence(torch.randn(5, 2, 4), [5, 2])
    with pytest.raises(ValueError, match="does not match weight dtype"):
        pair("layers")[1](packed)


@pytest.mark.parametrize("name", WRONG_CELL_CALLS)
def test_wrong_calls_of_the_cell_raise_what_torch_raises(name):
    theirs, ours = (cls(4, 6, dtype=torch.float64) for cls in (torch.nn.LSTMCell, LSTMCell))
    arguments = WRONG_CELL_CALLS[name]()
    expected = outcome(lambda: theirs(*arguments))
    assert expected is not None
    assert outcome(lambda: ours(*arguments)) is expected
    # Scripted too, where torch's runtime wraps the class.
    assert outcome(lambda: torch.jit.script(ours)(*arguments)) is not None


def test_cell_values_and_gradients():
    for bias, shape in itertools.product((True, False), ((3,), ())):
        theirs, ours = (cls(4, 6, bias=bias, dtype=torch.float64) for cls in (torch.nn.LSTMCell, LSTMCell))
        ours.load_state_dict(theirs.state_dict())
        x, state = torch.randn(*shape, 4, dtype=torch.float64), shapes((*shape, 6), (*shape, 6))
        assert_same(gradients(ours, x, state), gradients(theirs, x, state))
        assert_same(ours(x), theirs(x))
        tangent = torch.randn_like(x)
        jvp = torch.func.jvp(lambda x: ours(x, state), (x,), (tangent,))  # noqa: B023
        assert_same(jvp, torch.func.jvp(lambda x: theirs(x, state), (x,), (tangent,)))  # noqa: B023


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_shape_equals_torch(data):
    """Sizes, options, packed or not, with a state or not, values and gradients."""
    draw = data.draw
    hidden = draw(st.integers(1, 21), "hidden_size")
    options = {
        "num_layers": draw(st.integers(1, 3), "num_layers"),
        "bias": draw(st.booleans(), "bias"),
        "batch_first": draw(st.booleans(), "batch_first"),
        "bidirectional": draw(st.booleans(), "bidirectional"),
        "proj_size": draw(st.integers(0, hidden - 1), "proj_size"),
        "dtype": torch.float64,
    }
    inputs, steps, batch = (
        draw(st.integers(1, most), name) for most, name in ((9, "input"), (8, "steps"), (6, "batch"))
    )
    theirs, ours = torch.nn.LSTM(inputs, hidden, **options), LSTM(inputs, hidden, **options)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(batch, steps, inputs) if ours.batch_first else torch.randn(steps, batch, inputs)
    x = x.double()
    state = state_of(ours, batch) if draw(st.booleans(), "state") else None
    if draw(st.booleans(), "packed"):
        lengths = draw(st.lists(st.integers(1, steps), min_size=batch, max_size=batch), "lengths")
        x = pack_padded_sequence(x, lengths, batch_first=ours.batch_first, enforce_sorted=False)
        data_of = x.data

        def run(module, values):
            output, last = module(PackedSequence(values, *x[1:]), state)
            return output.data, last

    else:
        data_of = x

        def run(module, values):
            return module(values, state)

    found = []
    for module in (ours, theirs):
        leaf = data_of.clone().requires_grad_()
        outputs = tree_leaves(run(module, leaf))
        total = sum((part * part.detach().cos()).sum() for part in outputs)
        found.append([*outputs, *torch.autograd.grad(total, [leaf, *module.parameters()])])
    assert_same(*found)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_stream_cut_anywhere_gives_the_same_bits(data):
    draw = data.draw
    layers, hidden = draw(st.integers(1, 3)), draw(st.integers(1, 40))
    lstm = LSTM(
        5,
        hidden,
        layers,
        proj_size=draw(st.integers(0, hidden - 1)),
        dtype=draw(st.sampled_from([torch.float32, torch.float64])),
    )
    steps = draw(st.integers(2, 12))
    cuts = sorted(draw(st.sets(st.integers(1, steps - 1), max_size=4)))
    x = torch.randn(steps, draw(st.integers(1, 5)), 5, dtype=lstm.weight_ih_l0.dtype)
    with torch.no_grad():
        whole, last = lstm(x)
        state, parts = None, []
        for piece in x.tensor_split(cuts):
            part, state = lstm(piece, state)
            parts.append(part)
    assert_bits((torch.cat(parts), state), (whole, last))


@pytest.mark.parametrize("answers", ["every", "last", "hidden"])
def test_a_chain_reads_nothing_past_the_end_of_a_row(answers):
    torch.manual_seed(0)
    stages = (
        Scale([1.0, 2.0], [0.5, 2.0]),
        Dense(2, 3, "tanh"),
        LSTM(3, 4, bidirectional=True),
        Dense(8, 2),
        Skip([1, 0]),
    )
    chain = Chain(*stages, answers=answers)
    x = torch.randn(4, 6, 2)
    lengths = [6, 0, 1, 4]
    wild = x.clone()
    for row, length in enumerate(lengths):
        wild[row, length:] = float("nan")
    found = []
    for windows, kind in ((x, torch.int64), (wild, torch.uint8), (wild, torch.int32)):
        chain.zero_grad()
        y = chain(windows, torch.tensor(lengths, dtype=kind))
        y.square().sum().backward()
        assert y.isfinite().all() and not y[1].any()
        found.append([y.detach(), *(parameter.grad.clone() for parameter in chain.parameters())])
    for one, *others in zip(*found, strict=True):
        assert all(torch.equal(one, other) for other in others)
    assert torch.equal(chain(wild, lengths), found[0][0])
    with pytest.raises(ValueError, match="lengths of shape"):
        chain(x, torch.tensor([1, 2]))
