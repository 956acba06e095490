// A libtorch program of a user's own, without TorchScript: load a compiled package and stream through it, a step at a
// time.
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <cstdio>
#include <exception>
#include <sstream>
#include <string>

namespace {

using Loader = torch::inductor::AOTIModelPackageLoader;

// The state of a fresh stream lies in the package's metadata: plain numbers, as many as the state has.
at::Tensor initial_state(const std::string& numbers, std::int64_t rows, std::int64_t size) {
    std::istringstream stream(numbers);
    at::Tensor values = torch::empty({rows, 1, size}, torch::kFloat64);
    for (std::int64_t at = 0; at < values.numel(); ++at) stream >> values.data_ptr<double>()[at];
    return values.to(torch::kFloat32);
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 2) {
        std::fprintf(stderr, "usage: %s MODEL.pt2\n", argv[0]);
        return 2;
    }
    try {
        c10::InferenceMode inference;
        auto metadata = Loader::load_metadata_from_package(argv[1], "step");
        Loader step(argv[1], "step");
        const std::int64_t inputs = std::stoll(metadata.at("input_size"));
        const std::int64_t layers = std::stoll(metadata.at("state_layers"));
        at::Tensor h = initial_state(metadata.at("initial_h"), layers, std::stoll(metadata.at("h_size")));
        at::Tensor c = initial_state(metadata.at("initial_c"), layers, std::stoll(metadata.at("c_size")));

        for (int t = 0; t < 5; ++t) {
            const at::Tensor x = torch::full({1, inputs}, 0.5f * static_cast<float>(t));
            const std::vector<at::Tensor> answer = step.run({x, h, c});
            h = answer[1];
            c = answer[2];
            std::printf("%d,%.9g\n", t, answer[0].item<double>());
        }
        return 0;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "error: %s\n", error.what());
        return 1;
    }
}
