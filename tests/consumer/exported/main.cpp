// Runs a package that torch.export and AOTInductor made of a user's own module: x (T, N, I) in, (y, h, c) out.
// usage: exported MODEL.pt2 N I T...; x[t, n, i] = sin(t + 2 n + 3 i); prints T and all of y, a line for each T.
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <cstdio>
#include <cstdlib>
#include <exception>

int main(int argc, char** argv) {
    try {
        c10::InferenceMode inference;
        torch::inductor::AOTIModelPackageLoader model(argv[1]);
        const std::int64_t batch = std::atoll(argv[2]);
        const std::int64_t inputs = std::atoll(argv[3]);
        for (int k = 4; k < argc; ++k) {
            const std::int64_t steps = std::atoll(argv[k]);
            const auto along = [](std::int64_t count) { return torch::arange(count, torch::kFloat64); };
            const at::Tensor phase =
                along(steps).view({steps, 1, 1}) + 2 * along(batch).view({batch, 1}) + 3 * along(inputs);
            const at::Tensor y = model.run({phase.sin().to(torch::kFloat32)})[0].contiguous();
            std::printf("%lld", static_cast<long long>(steps));
            for (std::int64_t at = 0; at < y.numel(); ++at) std::printf(",%.9g", y.const_data_ptr<float>()[at]);
            std::printf("\n");
        }
        return 0;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "error: %s\n", error.what());
        return 1;
    }
}
