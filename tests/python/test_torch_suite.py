"""PyTorch's own module tests on cellstep's modules.

The inputs, references and error cases of ``torch.nn.LSTM`` and ``LSTMCell`` are those that ship with torch
(``torch.testing._internal.common_modules``); the checks are those that PyTorch's test/test_modules.py makes of every
module, for the same dtypes, modes and devices. ``python tests/python/test_torch_suite.py`` runs all of it; pytest
leaves out the derivatives by one parameter alone for the samples that are given no state, which takes half the time.
Both ways end with how many were run, passed and not applicable.
"""

import inspect
import io
import itertools
import sys
import warnings

import pytest
import torch
from torch.testing._internal.common_modules import ModuleErrorEnum, module_db
from torch.testing._internal.common_utils import freeze_rng_state, gradcheck, gradgradcheck
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

import cellstep.nn

INFOS = {info.module_cls.__name__: info for info in module_db if info.module_cls in (torch.nn.LSTM, torch.nn.LSTMCell)}
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
# test_modules.py compares at the precision of its class; the values here are of size 1.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
THOROUGH = __name__ == "__main__"


class Case:
    """One module of ours with what torch's list says of its counterpart."""

    def __init__(self, name, device, dtype, training):
        self.info, self.cls = INFOS[name], getattr(cellstep.nn, name)
        self.device, self.dtype, self.training = device, dtype, training

    def inputs(self, requires_grad=False, device=None):
        return self.info.module_inputs_func(
            self.info,
            device=device or self.device,
            dtype=self.dtype,
            requires_grad=requires_grad,
            training=self.training,
        )

    def make(self, sample, **kwargs):
        module = self.cls(*sample.constructor_input.args, **sample.constructor_input.kwargs, **kwargs)
        return module.to(self.device).to(self.dtype).train(self.training)


def call(module, given):
    return module(*given.args, **given.kwargs)


def assert_same(ours, theirs, **tolerance):
    for a, b in zip(tree_leaves(ours), tree_leaves(theirs), strict=True):
        torch.testing.assert_close(a, b, **(tolerance or CLOSE))


def assert_placed(module, device, dtype):
    for tensor in [*module.parameters(), *module.buffers()]:
        assert tensor.device.type == torch.device(device).type and tensor.dtype == dtype


def forward(case):
    for sample in case.inputs():
        with freeze_rng_state():
            module = case.make(sample)
            answer = call(module, sample.forward_input)
            given = sample.forward_input
            assert_same(answer, sample.reference_fn(module, *given.args, **given.kwargs))
            # Torch's reference is the module itself on a batch of one. Its own module says more.
            theirs = case.info.module_cls(*sample.constructor_input.args, **sample.constructor_input.kwargs)
            theirs.to(case.device, case.dtype).load_state_dict(module.state_dict())
            assert_same(answer, call(theirs, given))
            getattr(module, {torch.float32: "float", torch.float64: "double"}[case.dtype])()
            assert_same(call(module, given), answer)
            assert_placed(module, case.device, case.dtype)


def factory_kwargs(case):
    for sample in case.inputs():
        given = sample.constructor_input
        module = case.cls(*given.args, **given.kwargs, device=case.device, dtype=case.dtype)
        assert list(module.parameters())
        assert_placed(module, case.device, case.dtype)


def multiple_device_transfer(case):
    for sample, on_cpu in zip(case.inputs(), case.inputs(device="cpu"), strict=True):
        module = case.make(sample)
        for device, given in ((case.device, sample), ("cpu", on_cpu), (case.device, sample)):
            call(module.to(device), given.forward_input)
            assert_placed(module, device, case.dtype)


def representation(case):
    for sample in case.inputs():
        module = case.make(sample)
        assert repr(module) == str(module)
        assert case.cls.__name__ in repr(module)


def save_load(case):
    for sample in case.inputs():
        module = case.make(sample)
        answer = call(module, sample.forward_input)
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        assert_same(call(torch.load(file, weights_only=False), sample.forward_input), answer, rtol=0, atol=0)
        file = io.BytesIO()
        torch.save(module.state_dict(), file)
        file.seek(0)
        fresh = case.make(sample)
        fresh.load_state_dict(torch.load(file, weights_only=True))
        assert_same(call(fresh, sample.forward_input), answer, rtol=0, atol=0)


def non_contiguous_tensors(case):
    def spread(tensor):
        """The same values with gaps between them."""
        twin = torch.repeat_interleave(tensor.detach(), 2, dim=-1)[..., ::2]
        return twin.requires_grad_(tensor.requires_grad)

    for sample in case.inputs(requires_grad=True):
        module = case.make(sample)
        args, kwargs = sample.forward_input.args, sample.forward_input.kwargs
        given = tree_flatten((args, kwargs))
        outputs = tree_leaves(call(module, sample.forward_input))
        grads = [torch.randn_like(output) for output in outputs]
        expected = None
        for inputs in (given[0], [spread(leaf) for leaf in given[0]]):
            for grad in (grads, [spread(part) for part in grads]):
                new_args, new_kwargs = tree_unflatten(inputs, given[1])
                answer = tree_leaves(module(*new_args, **new_kwargs))
                found = torch.autograd.grad(answer, [*inputs, *module.parameters()], grad)
                expected = expected or (answer, found)
                assert_same((answer, found), expected, rtol=0, atol=1e-4)


def _gradients(case, check):
    for sample in case.inputs(requires_grad=True):
        module = case.make(sample)
        leaves, spec = tree_flatten((sample.forward_input.args, sample.forward_input.kwargs))
        parameters = list(module.parameters())

        def run(*inputs, module=module, spec=spec):
            args, kwargs = tree_unflatten(list(inputs[: spec.num_leaves]), spec)
            with freeze_rng_state():
                return tuple(tree_leaves(module(*args, **kwargs)))

        assert check(run, [*leaves, *parameters], nondet_tol=0.0)
        if not (THOROUGH or len(leaves) > 1):
            continue
        for alone in parameters:
            for parameter in parameters:
                parameter.requires_grad_(parameter is alone)
            assert check(run, [*leaves, *parameters], nondet_tol=0.0)


def grad(case):
    _gradients(case, gradcheck)


def gradgrad(case):
    _gradients(case, gradgradcheck)


def cpu_gpu_parity(case):
    for sample in case.inputs(requires_grad=True, device="cpu"):
        here, there = case.make(sample).cpu(), case.make(sample)
        there.load_state_dict(here.state_dict())
        answers = []
        for module, device in ((here, "cpu"), (there, case.device)):
            args, kwargs = tree_map_only(
                torch.Tensor,
                lambda leaf, device=device: leaf.detach().to(device).requires_grad_(leaf.requires_grad),
                (sample.forward_input.args, sample.forward_input.kwargs),
            )
            outputs = tree_leaves(module(*args, **kwargs))
            inputs = [*tree_leaves((args, kwargs)), *module.parameters()]
            answers.append([*outputs, *torch.autograd.grad(outputs, inputs, [torch.ones_like(out) for out in outputs])])
        tolerance = 5e-2 if case.dtype == torch.float32 else 4e-4  # test_modules.py's own for this check
        assert_same([part.cpu() for part in answers[1]], answers[0], rtol=0, atol=tolerance)


def memory_format(case):
    for sample in case.inputs(requires_grad=True):
        module = case.make(sample)
        leaves, spec = tree_flatten((sample.forward_input.args, sample.forward_input.kwargs))
        expected = None
        # No input has the four or five dimensions that other formats are for.
        for form in (torch.preserve_format, torch.contiguous_format):
            inputs = [leaf.detach().clone().requires_grad_(leaf.requires_grad) for leaf in leaves]
            args, kwargs = tree_unflatten(inputs, spec)
            outputs = tree_leaves(module.to(memory_format=form)(*args, **kwargs))
            found = torch.autograd.grad(
                outputs, [*inputs, *module.parameters()], [torch.ones_like(part) for part in outputs]
            )
            assert all(part.is_contiguous() for part in [*outputs, *found])
            expected = expected or [*outputs, *found]
            assert_same([*outputs, *found], expected)


def if_train_and_eval_modes_differ(case):
    for sample in case.inputs():
        module = case.make(sample)
        del module.training
        try:
            call(module, sample.forward_input)
        except AttributeError as error:
            assert "'training'" in str(error) and case.info.train_and_eval_differ


def device_ctx_init(case):
    for sample in case.inputs():
        given = sample.constructor_input
        with torch.device("meta"):
            module = case.cls(*given.args, **given.kwargs)
        real = case.cls(*given.args, **given.kwargs)
        for a, b in zip(module.parameters(), real.parameters(), strict=True):
            assert a.is_meta and a.shape == b.shape and a.dtype == b.dtype and a.stride() == b.stride()
            assert a.requires_grad == b.requires_grad


def errors(case):
    cases = case.info.module_error_inputs_func(
        case.info, device=case.device, dtype=case.dtype, requires_grad=False, training=case.training
    )
    assert cases
    for wrong in cases:
        sample = wrong.module_error_input
        given = sample.constructor_input
        if wrong.error_on == ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(wrong.error_type, match=wrong.error_regex):
                case.cls(*given.args, **given.kwargs)
        else:
            module = case.cls(*given.args, **given.kwargs)
            with pytest.raises(wrong.error_type, match=wrong.error_regex):
                call(module, sample.forward_input)


def _swapping(swap):
    """Whether conversions exchange the tensors behind the parameters in place of their data."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(swap)
    return before


def to(case):
    for sample, swap, with_grad in itertools.product(case.inputs(), (True, False), (True, False)):
        module = case.make(sample)
        before = _swapping(swap)
        try:
            for dtype in case.info.dtypes:
                if with_grad:
                    for parameter in module.parameters():
                        parameter.grad = torch.randn_like(parameter)
                known = [id(parameter) for parameter in module.parameters()]
                module.to(device=case.device, dtype=dtype)
                assert_placed(module, case.device, dtype)
                assert all(isinstance(parameter, torch.nn.Parameter) for parameter in module.parameters())
                assert [id(parameter) for parameter in module.parameters()] == known
                if with_grad:
                    assert all(parameter.grad.dtype == dtype for parameter in module.parameters())
        finally:
            _swapping(before)
        call(module.to(case.dtype), sample.forward_input)


def to_empty(case):
    for sample, swap in itertools.product(case.inputs(), (True, False)):
        given = sample.constructor_input
        with torch.device("meta"):
            module = case.cls(*given.args, **given.kwargs)
        known = [id(parameter) for parameter in module.parameters()]
        before = _swapping(swap)
        try:
            module.to_empty(device=case.device)
        finally:
            _swapping(before)
        assert all(isinstance(parameter, torch.nn.Parameter) for parameter in module.parameters())
        assert_placed(module, case.device, torch.float32)
        assert ([id(parameter) for parameter in module.parameters()] == known) == swap


#: Every test of test_modules.py; ``representation`` is its test_repr.
CHECKS = {
    check.__name__: check
    for check in (
        *(forward, factory_kwargs, multiple_device_transfer, representation, save_load, non_contiguous_tensors),
        *(grad, gradgrad, cpu_gpu_parity, memory_format, if_train_and_eval_modes_differ, device_ctx_init, errors),
        *(to, to_empty),
    )
}
#: What test_modules.py restricts a check to.
DTYPES = {"grad": [torch.float64], "gradgrad": [torch.float64], "to": [torch.float32], "to_empty": [torch.float32]}
CUDA_ONLY = ["multiple_device_transfer", "cpu_gpu_parity"]
CPU_ONLY = ["device_ctx_init"]


def plan():
    """What is run, as (check, module, device, dtype, training), and {what does not apply: reason}."""
    runs, not_applicable = [], {}
    for module, info in INFOS.items():
        arguments = inspect.signature(getattr(cellstep.nn, module)).parameters
        assert "inplace" not in arguments
        not_applicable["check_inplace", module] = "the module has no argument `inplace`"
        modes = [True, False] if info.train_and_eval_differ else [True]
        for check, device in itertools.product(CHECKS, ["cpu", "cuda"]):
            if (check in CUDA_ONLY and device == "cpu") or (check in CPU_ONLY and device == "cuda"):
                continue
            for dtype in DTYPES.get(check, info.dtypes):
                for training in modes if check != "if_train_and_eval_modes_differ" else [True]:
                    case = (check, module, device, dtype, training)
                    if device in DEVICES:
                        runs.append(case)
                    else:
                        not_applicable[case] = "needs a CUDA device, which this machine has not"
    return runs, not_applicable


RUNS, NOT_APPLICABLE = plan()
passed = []


def name_of(case):
    return "-".join("train" if part is True else "eval" if part is False else str(part) for part in case)


def closing_lines():
    lines = [f"torch's module tests: {len(RUNS)} run, {len(passed)} passed, {len(NOT_APPLICABLE)} not applicable"]
    for reason, group in itertools.groupby(sorted(NOT_APPLICABLE.items(), key=lambda item: item[1]), lambda x: x[1]):
        lines.append(f"  {len(list(group))} not applicable: {reason}")
    return "\n".join(lines)


def run(case):
    check, *rest = case
    CHECKS[check](Case(*rest))
    passed.append(case)


@pytest.mark.parametrize("case", RUNS, ids=name_of)
def test_module(case):
    run(case)


def test_every_sample_of_torch_is_there():
    """So that a torch that lists other cases is noticed: 32 samples of LSTM (bias, batch_first, bidirectional and
    proj_size, each with and without a state), 2 of LSTMCell, and the cases of errors."""
    for name, samples, wrong in (("LSTM", 32, 14), ("LSTMCell", 2, 4)):
        case = Case(name, "cpu", torch.float32, True)
        assert len(case.inputs()) >= samples
        found = case.info.module_error_inputs_func(
            case.info, device="cpu", dtype=torch.float32, requires_grad=False, training=True
        )
        assert len(found) >= wrong
        assert set(case.info.dtypes) >= {torch.float32, torch.float64}


if __name__ == "__main__":
    warnings.filterwarnings("ignore", "LSTM with projections is not supported with oneDNN")  # torch's own, once
    failed = []
    for case in RUNS:
        try:
            run(case)
        except Exception as error:
            failed.append(case)
            print(f"failed: {name_of(case)}: {error}")
    print(closing_lines())
    sys.exit(bool(failed))
