"""The peers, each tuned as its own documentation says, and the hand-written cell.

Every function takes a :class:`cases.Case` and answers with a :class:`cases.Way`; it raises ImportError, or whatever the
peer raises, where the peer cannot run the case. What a peer could do once, such as putting the input into its own
layout, is not timed.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import Case, Way, as_array, quiet
from rows import HAND_WRITTEN
from torch import Tensor, nn

Builder = Callable[[Case], Way]


class OutputsOnly(nn.Module):
    """The module without its last state, which no other peer computes apart."""

    def __init__(self, lstm: nn.LSTM) -> None:
        super().__init__()
        self.lstm = lstm

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


def outputs_only(case: Case) -> nn.Module:
    return OutputsOnly(case.copy()).eval()


def inference(call: Callable[[Any], Any], x: Any, dtype: str = "float32") -> Way:
    """A call without gradients, of a thing that takes and gives tensors."""
    guarded = torch.inference_mode()(call)
    return Way(lambda: guarded(x), lambda y: as_array(y[0] if isinstance(y, tuple | list) else y), dtype)


def hand_written(case: Case) -> Way:
    """What a notebook has: one small operator after another, step by step."""
    weights = [[w.detach() for w in layer] for layer in case.module.all_weights]

    def run(x: Tensor) -> Tensor:
        for w_ih, w_hh, b_ih, b_hh in weights:
            h = c = x.new_zeros(x.size(0), w_hh.size(1))
            outputs = []
            for step in range(x.size(1)):
                gates = nn.functional.linear(x[:, step], w_ih, b_ih) + nn.functional.linear(h, w_hh, b_hh)
                i, f, g, o = gates.chunk(4, 1)
                c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
                h = torch.sigmoid(o) * torch.tanh(c)
                outputs.append(h)
            x = torch.stack(outputs, 1)
        return x

    return inference(run, case.x)


def torch_eager(case: Case) -> Way:
    return inference(case.copy(), case.packed(case.x) if case.row.packed else case.x)


def torch_bfloat16(case: Case) -> Way:
    return inference(case.copy(torch.bfloat16), case.x.bfloat16(), "bfloat16")


def torch_int8(case: Case) -> Way:
    """Weights in int8, activations quantised in every call."""
    with quiet():
        plain = outputs_only(case)
        module = torch.ao.quantization.quantize_dynamic(plain, {nn.LSTM}, dtype=torch.qint8)
    return inference(module, case.x, "int8")


def torch_scripted(case: Case) -> Way:
    """Frozen and optimised for inference, on the executor that does not profile: it recompiles in the first calls."""
    torch._C._jit_set_profiling_executor(False)
    torch._C._jit_set_profiling_mode(False)
    with quiet():
        module = torch.jit.optimize_for_inference(torch.jit.freeze(torch.jit.script(outputs_only(case))))
    return inference(module, case.x)


def torch_compiled(case: Case) -> Way:
    """Static shapes, weights as constants; without ``allow_rnn`` the compiler leaves the layer as it is."""
    torch._dynamo.reset()
    torch._dynamo.config.allow_rnn = True
    torch._inductor.config.freezing = True
    compiled = torch.compile(outputs_only(case), fullgraph=True, dynamic=False)

    def call() -> Tensor:
        with torch.no_grad():
            return compiled(case.x)

    with quiet():
        call()
    return Way(call, as_array)


def torch_aot(case: Case) -> Way:
    with tempfile.TemporaryDirectory() as directory, torch.no_grad(), quiet():
        program = torch.export.export(outputs_only(case), (case.x,))
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(Path(directory) / "peer.pt2"), inductor_configs={"freezing": True}
        )
        loaded = torch._inductor.aoti_load_package(path)
    return inference(loaded, case.x)


def onnx_model(case: Case) -> Any:
    """The stack as ONNX's own LSTM nodes, static shapes: X (time, batch, inputs) to Y (time, 1, batch, outputs)."""
    from onnx import TensorProto, checker, helper, numpy_helper

    row = case.row
    nodes, constants = [], [numpy_helper.from_array(np.array([1], np.int64), "direction")]
    name = "X"
    lengths = ""
    if row.packed:
        lengths = "lengths"
        constants.append(numpy_helper.from_array(np.array(row.lengths, np.int32), lengths))
    for layer, (w_ih, w_hh, b_ih, b_hh) in enumerate(case.module.all_weights):
        for key, value in (("W", w_ih), ("R", w_hh), ("B", torch.cat([_iofc(b_ih), _iofc(b_hh)]))):
            value = value if key == "B" else _iofc(value)
            constants.append(numpy_helper.from_array(value.detach().unsqueeze(0).numpy(), f"{key}{layer}"))
        inputs = [name, f"W{layer}", f"R{layer}", f"B{layer}", lengths]
        nodes.append(helper.make_node("LSTM", inputs, [f"Y{layer}"], hidden_size=row.hidden))
        if layer < row.layers - 1:
            name = f"X{layer + 1}"
            nodes.append(helper.make_node("Squeeze", [f"Y{layer}", "direction"], [name]))
    shapes = ([row.time, row.batch, row.inputs], [row.time, 1, row.batch, row.hidden])
    graph = helper.make_graph(
        nodes,
        "stack",
        [helper.make_tensor_value_info("X", TensorProto.FLOAT, shapes[0])],
        [helper.make_tensor_value_info(f"Y{row.layers - 1}", TensorProto.FLOAT, shapes[1])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    checker.check_model(model)
    return model


def _iofc(value: Tensor) -> Tensor:
    """Rows i, f, g, o as ONNX wants them: i, o, f, g."""
    i, f, g, o = value.detach().chunk(4)
    return torch.cat([i, o, f, g])


def _time_first(y: Any) -> Any:
    """(time, 1, batch, outputs) to (batch, time, outputs)."""
    return np.asarray(y, np.float64)[:, 0].swapaxes(0, 1)


def _onnxruntime(case: Case, model: "bytes | str", dtype: str = "float32") -> Way:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = case.row.threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    # Input and output stay where they are from call to call.
    binding = session.io_binding()
    x = onnxruntime.OrtValue.ortvalue_from_numpy(case.time_first)
    shape = [case.row.time, 1, case.row.batch, case.row.hidden]
    y = onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, np.float32)
    binding.bind_ortvalue_input("X", x)
    binding.bind_ortvalue_output(session.get_outputs()[0].name, y)
    return Way(lambda: session.run_with_iobinding(binding), lambda _: _time_first(y.numpy()), dtype)


def onnxruntime_float(case: Case) -> Way:
    return _onnxruntime(case, onnx_model(case).SerializeToString())


def onnxruntime_int8(case: Case) -> Way:
    """Weights in int8 by column, activations quantised in every call."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as directory, quiet():
        plain, quantized = str(Path(directory) / "plain.onnx"), str(Path(directory) / "int8.onnx")
        onnx.save(onnx_model(case), plain)
        quantize_dynamic(plain, quantized, per_channel=True, weight_type=QuantType.QInt8)
        return _onnxruntime(case, quantized, "int8")


def _openvino(case: Case, precision: str) -> Way:
    import openvino

    core = openvino.Core()
    model = core.read_model(onnx_model(case).SerializeToString())
    compiled = core.compile_model(
        model,
        "CPU",
        {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": case.row.threads,
            "INFERENCE_PRECISION_HINT": "bf16" if precision == "bfloat16" else "f32",
        },
    )
    # One request, whose input and output stay where they are.
    request = compiled.create_infer_request()
    x = case.time_first
    request.set_input_tensor(openvino.Tensor(x, shared_memory=True))
    return Way(request.infer, lambda _, x=x: _time_first(request.get_output_tensor().data), precision)


def openvino_float(case: Case) -> Way:
    return _openvino(case, "float32")


def openvino_bfloat16(case: Case) -> Way:
    return _openvino(case, "bfloat16")


#: What compiles for seconds, which a quick run leaves out.
SLOW_TO_BUILD = ("torch.compile", "AOTInductor")

PEERS: dict[str, Builder] = {
    HAND_WRITTEN: hand_written,
    "torch.nn.LSTM": torch_eager,
    "torch scripted": torch_scripted,
    "torch.compile": torch_compiled,
    "AOTInductor": torch_aot,
    "ONNX Runtime": onnxruntime_float,
    "OpenVINO": openvino_float,
}
#: What else may be the best peer of a row in low precision.
LOW_PEERS: dict[str, Builder] = {
    "torch.nn.LSTM bfloat16": torch_bfloat16,
    "OpenVINO bfloat16": openvino_bfloat16,
    "torch int8": torch_int8,
    "ONNX Runtime int8": onnxruntime_int8,
}
#: What takes lengths.
RAGGED_PEERS: dict[str, Builder] = {name: PEERS[name] for name in ("torch.nn.LSTM", "ONNX Runtime", "OpenVINO")}
