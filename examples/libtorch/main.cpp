// A libtorch program of a user's own: load an exported model and stream through it, a step at a time.
#include <ATen/Parallel.h>
#include <torch/csrc/jit/runtime/graph_executor.h>
#include <torch/script.h>

#include <cstdio>
#include <exception>

int main(int argc, char** argv) {
    if (argc != 2) {
        std::fprintf(stderr, "usage: %s MODEL.pt\n", argv[0]);
        return 2;
    }
    try {
        c10::InferenceMode inference;
        at::set_num_threads(1);
        // The profiling executor recompiles while it watches; without it every call is like the first.
        torch::jit::getProfilingMode() = false;
        torch::jit::getExecutorMode() = false;

        torch::jit::Module model = torch::jit::load(argv[1]);
        const torch::jit::Method step = model.get_method("step");
        const std::int64_t inputs = model.attr("input_size").toInt();

        // The state is a pair of plain tensors that goes in and comes out; one stream here, so a batch of 1.
        c10::IValue state = model.get_method("initial_state")({std::int64_t{1}});
        for (int t = 0; t < 5; ++t) {
            const at::Tensor x = torch::full({1, inputs}, 0.5f * static_cast<float>(t));
            const c10::IValue result = step({x, state});
            state = result.toTupleRef().elements()[1];
            std::printf("%d,%.9g\n", t, result.toTupleRef().elements()[0].toTensor().item<double>());
        }
        return 0;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "error: %s\n", error.what());
        return 1;
    }
}
