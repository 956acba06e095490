// A libtorch program that trains on cellstep's operators, without Python: an LSTM with a linear head learns to tell the
// next value of a sine from the 20 before it. Prints the loss of every step of the optimiser.
#include <cellstep/autograd.h>
#include <torch/torch.h>

#include <cmath>
#include <cstdio>
#include <exception>

namespace {

using Layer = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>(
    const at::Tensor& x, const at::Tensor& h, const at::Tensor& c, const at::Tensor& weight_ih,
    const at::Tensor& weight_hh, const std::optional<at::Tensor>& bias_ih, const std::optional<at::Tensor>& bias_hh,
    bool save);
using Dense = at::Tensor(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias);

template <class Signature>
c10::TypedOperatorHandle<Signature> op(const char* name) {
    return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

struct Forecaster : torch::nn::Module {
    Forecaster(std::int64_t inputs, std::int64_t units) : units(units) {
        const double bound = 1 / std::sqrt(static_cast<double>(units));
        const auto parameter = [&](const char* name, at::IntArrayRef sizes) {
            return register_parameter(name, torch::empty(sizes).uniform_(-bound, bound));
        };
        weight_ih = parameter("weight_ih", {4 * units, inputs});
        weight_hh = parameter("weight_hh", {4 * units, units});
        bias_ih = parameter("bias_ih", {4 * units});
        bias_hh = parameter("bias_hh", {4 * units});
        weight = parameter("weight", {1, units});
        bias = parameter("bias", {1});
    }

    /// x (steps, rows, inputs) -> (rows, 1)
    at::Tensor forward(const at::Tensor& x) {
        const at::Tensor zeros = torch::zeros({x.size(1), units});
        // The last argument keeps what the backward pass needs; with false it is computed again there.
        const auto [y, h, c, gates, cells] = layer.call(x, zeros, zeros, weight_ih, weight_hh, bias_ih, bias_hh, true);
        return dense.call(h, weight, bias);
    }

    const std::int64_t units;
    const c10::TypedOperatorHandle<Layer> layer = op<Layer>("cellstep::lstm_layer");
    const c10::TypedOperatorHandle<Dense> dense = op<Dense>("cellstep::dense");
    at::Tensor weight_ih, weight_hh, bias_ih, bias_hh, weight, bias;
};

}  // namespace

int main() {
    if (const char* error = cellstep_autograd_error()) {
        std::fprintf(stderr, "error: %s\n", error);
        return 1;
    }
    try {
        at::set_num_threads(1);
        torch::manual_seed(0);
        constexpr std::int64_t steps = 20;
        const at::Tensor series = torch::sin(0.3 * torch::arange(120));
        const at::Tensor windows = series.unfold(0, steps + 1, 1);  // (100, steps + 1)
        const at::Tensor x = windows.narrow(1, 0, steps).t().unsqueeze(2);
        const at::Tensor target = windows.narrow(1, steps, 1);

        Forecaster model(1, 16);
        torch::optim::SGD optimizer(model.parameters(), torch::optim::SGDOptions(0.1).momentum(0.9));
        for (int step = 0; step < 30; ++step) {
            optimizer.zero_grad();
            const at::Tensor loss = torch::mse_loss(model.forward(x), target);
            loss.backward();
            optimizer.step();
            std::printf("%d,%.9g\n", step, loss.item<double>());
        }
        return 0;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "error: %s\n", error.what());
        return 1;
    }
}
