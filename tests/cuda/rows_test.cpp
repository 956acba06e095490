// rows.cu on the emulator against the formula in double. Prints what differs; "equal" and a hash of all answers' bits
// at the end.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "device.h"
#include "kernels.h"

namespace {

using namespace cellstep::cuda;

enum class Ragged { none, lengths, packed };

struct Case {
    int hidden, inputs, layers, rows, steps;
    Ragged ragged = Ragged::none;
    bool reset = false;
    bool initial = false;  // a state for resets other than zero
    bool reverse = false;
    bool save = false;
    bool sums = false;
    bool panels = false;  // weights as a deploy file has them
    int biases = 2;
    int multiprocessors = 132;
    bool shifted = false;  // x and y at an odd address
};

std::mt19937 random_bits(7);
double uniform(double low, double high) { return low + (high - low) * (random_bits() % 65536) / 65536.0; }
int below(int n) { return static_cast<int>(random_bits() % static_cast<unsigned>(n)); }

template <class T>
DataType type_of();
template <>
DataType type_of<float>() {
    return DataType::float32;
}
template <>
DataType type_of<double>() {
    return DataType::float64;
}
template <>
DataType type_of<__half>() {
    return DataType::float16;
}
template <>
DataType type_of<__nv_bfloat16>() {
    return DataType::bfloat16;
}

template <class T>
T narrow(double x) {
    return from_float<T>(static_cast<typename Wide<T>::type>(x));
}

template <class T>
double wide(T x) {
    return static_cast<double>(to_float(x));
}

/// Values on the heap by themselves, so that the address sanitizer sees both ends.
template <class T>
struct Values {
    std::vector<T> data;
    std::size_t shift;
    Values(std::size_t count, double spread, bool shifted = false) : data(count + shifted), shift(shifted) {
        for (T& value : data) value = narrow<T>(spread > 0 ? uniform(-spread, spread) : std::nan(""));
    }
    T* at(std::size_t place = 0) { return data.data() + shift + place; }
    double operator[](std::int64_t place) { return wide(data[shift + static_cast<std::size_t>(place)]); }
    std::size_t size() const { return data.size() - shift; }
};

std::uint64_t all_bits = 14695981039346656037u;

/// What may differ, of 1 + |x|. The kernel's sums are float32 (or double) and it rounds to T once: half a unit in the
/// last place of 2 (float16: 2^-11, bfloat16: 2^-8); 140 products and a few steps of a bounded state add to float32.
template <class T>
constexpr double tolerance = sizeof(T) == 8   ? 1e-13
                             : sizeof(T) == 4 ? 3e-6
                                              : 0;
template <>
constexpr double tolerance<__half> = 5.5e-4;
template <>
constexpr double tolerance<__nv_bfloat16> = 4e-3;

template <class T>
bool compare(const char* what, const char* label, Values<T>& found, const std::vector<double>& expected) {
    for (std::size_t at = 0; at < expected.size(); ++at) {
        const double value = found[static_cast<std::int64_t>(at)];
        if (std::abs(value - expected[at]) <= tolerance<T> * (1 + std::abs(expected[at]))) continue;
        std::printf("%s: %s[%zu] = %.9g, expected %.9g\n", label, what, at, value, expected[at]);
        return false;
    }
    return true;
}

template <class T>
void hash(std::uint64_t& bits, const Values<T>& values) {
    const auto* bytes = reinterpret_cast<const unsigned char*>(values.data.data());
    for (std::size_t at = 0; at < values.data.size() * sizeof(T); ++at) bits = (bits ^ bytes[at]) * 1099511628211u;
}

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

template <class T>
bool run(const Case& test) {
    const int H = test.hidden, I = test.inputs, L = test.layers, N = test.rows, T_ = test.steps;
    char label[160];
    std::snprintf(label, sizeof(label),
                  "%zu bytes, H %d, I %d, L %d, N %d, T %d, ragged %d, reset %d %d, reverse %d, save %d, sums %d, "
                  "panels %d, biases %d, mp %d",
                  sizeof(T), H, I, L, N, T_, static_cast<int>(test.ragged), test.reset, test.initial, test.reverse,
                  test.save, test.sums, test.panels, test.biases, test.multiprocessors);
    const auto size = [](auto... sizes) { return (std::size_t{1} * ... * static_cast<std::size_t>(sizes)); };

    std::vector<int> lengths(static_cast<std::size_t>(N), T_), offsets;
    if (test.ragged != Ragged::none)
        for (int& length : lengths) length = below(T_ + 1);
    std::int64_t tokens = std::int64_t{T_} * N;
    if (test.ragged == Ragged::packed) {
        std::sort(lengths.begin(), lengths.end(), std::greater<int>());
        lengths[0] = T_;
        tokens = 0;
        for (int t = 0; t < T_; ++t) {
            offsets.push_back(static_cast<int>(tokens));
            for (const int length : lengths) tokens += t < length;
        }
    }
    const auto token_of = [&](int t, int n) {
        return (offsets.empty() ? std::int64_t{t} * N : offsets[static_cast<std::size_t>(t)]) + n;
    };
    std::vector<unsigned char> reset(size(T_, N));
    for (auto& flag : reset) flag = test.reset && below(4) == 0;

    Values<T> x(size(tokens, I), 2, test.shifted), sums(size(tokens, 4, H), 2);
    if (test.ragged == Ragged::lengths)  // past a row's length nothing is read
        for (int n = 0; n < N; ++n)
            for (int t = lengths[static_cast<std::size_t>(n)]; t < T_; ++t) {
                for (int k = 0; k < I; ++k) *x.at(size(t * N + n, I) + size(k)) = narrow<T>(std::nan(""));
                for (int k = 0; k < 4 * H; ++k) *sums.at(size(t * N + n, 4 * H) + size(k)) = narrow<T>(std::nan(""));
            }
    Values<T> h(size(L, N, H), 1), c(size(L, N, H), 1.5), initial_h(size(L, H), 1), initial_c(size(L, H), 1);
    Values<T> y(size(tokens, H), 0, test.shifted), outputs(size(L - 1, tokens, H), 0);
    Values<T> h_n(size(L, N, H), 0), c_n(size(L, N, H), 0);
    Values<T> gates(test.save ? size(L, tokens, 4, H) : 0, 0), cells(test.save ? size(L, tokens, H) : 0, 0);

    Forward call{};
    call.type = type_of<T>();
    call.steps = {T_, N, tokens, nullptr, nullptr, nullptr};
    if (test.ragged == Ragged::lengths) call.steps.lengths = lengths.data();
    if (test.ragged == Ragged::packed) call.steps.offsets = offsets.data();
    if (test.reset) call.steps.reset = reset.data();
    call.input_size = I;
    call.hidden_size = H;
    call.layers = L;
    call.directions = 1;
    call.reverse = test.reverse;
    const int panels = (H + 15) / 16;
    std::vector<Values<T>> weights;
    weights.reserve(size(4, L));
    for (int layer = 0; layer < L; ++layer) {
        const auto make = [&](int columns, bool there) -> WeightView {
            if (!there) return {};
            weights.emplace_back(test.panels ? size(4, panels, columns, 16) : size(4, H, columns), 0.5);
            if (!test.panels) return weight_view(weights.back().at(), H, columns);
            return {weights.back().at(), std::int64_t{panels} * columns * 16, std::int64_t{columns} * 16, 1, 16};
        };
        StageWeights& stage = call.stages[layer];
        stage.weight_ih = make(layer > 0 ? H : I, true);
        stage.weight_hh = make(H, true);
        stage.bias_ih = make(1, test.biases > 0);
        stage.bias_hh = make(1, test.biases > 1);
    }
    const auto weight = [&](const WeightView& view, int gate, int unit, int column) {
        if (!view.data) return 0.0;
        return wide(static_cast<const T*>(
            view.data)[gate * view.gate + unit / 16 * view.panel + unit % 16 * view.unit + column * view.column]);
    };
    call.x = test.sums ? nullptr : x.at();
    call.sums = test.sums ? sums.at() : nullptr;
    call.h = h.at();
    call.c = c.at();
    call.initial_h = test.initial ? initial_h.at() : nullptr;
    call.initial_c = test.initial ? initial_c.at() : nullptr;
    call.outputs = test.save ? outputs.at() : nullptr;
    call.y = y.at();
    call.h_n = h_n.at();
    call.c_n = c_n.at();
    call.gates = test.save ? gates.at() : nullptr;
    call.cells = test.save ? cells.at() : nullptr;
    call.multiprocessors = test.multiprocessors;
    if (!rows_fits(call)) {
        std::printf("%s: does not fit\n", label);
        return false;
    }

    std::uint64_t bits[2] = {1, 1};
    const char* const own_seed = std::getenv("CELLSTEP_SIMT_SEED");
    const std::string seeds[2] = {own_seed ? own_seed : "0", "4711"};
    for (int turn = 0; turn < 2; ++turn) {
        setenv("CELLSTEP_SIMT_SEED", seeds[1 - turn].c_str(), 1);
        if (const char* error = rows_forward(call)) {
            std::printf("%s: %s\n", label, error);
            return false;
        }
        for (const auto* values : {&y, &outputs, &h_n, &c_n, &gates, &cells}) hash(bits[turn], *values);
    }
    all_bits = (all_bits ^ bits[1]) * 1099511628211u;

    std::vector<double> below_(x.size()), above, want_h(size(L, N, H)), want_c(size(L, N, H));
    std::vector<double> want_outputs, want_gates(size(L, tokens, 4, H)), want_cells(size(L, tokens, H));
    for (std::size_t at = 0; at < below_.size(); ++at) below_[at] = x[static_cast<std::int64_t>(at)];
    for (int layer = 0; layer < L; ++layer) {
        const int columns = layer > 0 ? H : I;
        const StageWeights& stage = call.stages[layer];
        above.assign(size(tokens, H), 0.0);
        for (int n = 0; n < N; ++n) {
            const std::int64_t state = (std::int64_t{layer} * N + n) * H;
            const int length = lengths[static_cast<std::size_t>(n)];
            std::vector<double> own_h(size(H)), own_c(size(H)), next_h(size(H));
            for (int u = 0; u < H; ++u) {
                own_h[size(u)] = h[state + u];
                own_c[size(u)] = c[state + u];
            }
            for (int step = 0; step < length; ++step) {
                const int t = test.reverse ? length - 1 - step : step;
                const int flag = test.reverse ? t + 1 : t;
                if (flag < length && reset[size(flag * N + n)])
                    for (int u = 0; u < H; ++u) {
                        own_h[size(u)] = test.initial ? initial_h[layer * H + u] : 0;
                        own_c[size(u)] = test.initial ? initial_c[layer * H + u] : 0;
                    }
                const std::int64_t token = token_of(t, n);
                for (int u = 0; u < H; ++u) {
                    double gate[4];
                    for (int g = 0; g < 4; ++g) {
                        double sum = weight(stage.bias_ih, g, u, 0) + weight(stage.bias_hh, g, u, 0);
                        if (test.sums)
                            sum += sums[(token * 4 + g) * H + u];
                        else
                            for (int k = 0; k < columns; ++k)
                                sum += weight(stage.weight_ih, g, u, k) * below_[size(token * columns + k)];
                        for (int k = 0; k < H; ++k) sum += weight(stage.weight_hh, g, u, k) * own_h[size(k)];
                        gate[g] = g == 2 ? std::tanh(sum) : sigmoid(sum);
                        want_gates[size(((layer * tokens + token) * 4 + g) * H + u)] = gate[g];
                    }
                    own_c[size(u)] = gate[1] * own_c[size(u)] + gate[0] * gate[2];
                    next_h[size(u)] = gate[3] * std::tanh(own_c[size(u)]);
                    want_cells[size((layer * tokens + token) * H + u)] = own_c[size(u)];
                    above[size(token * H + u)] = next_h[size(u)];
                }
                own_h = next_h;
            }
            for (int u = 0; u < H; ++u) {
                want_h[size(state + u)] = own_h[size(u)];
                want_c[size(state + u)] = own_c[size(u)];
            }
        }
        if (layer + 1 < L) want_outputs.insert(want_outputs.end(), above.begin(), above.end());
        below_ = above;
    }
    bool right = compare("y", label, y, above) & compare("h_n", label, h_n, want_h);
    right &= compare("c_n", label, c_n, want_c);
    if (test.save) {
        right &= compare("outputs", label, outputs, want_outputs);
        right &= compare("gates", label, gates, want_gates) & compare("cells", label, cells, want_cells);
    }
    if (bits[0] != bits[1]) std::printf("%s: the bits hang on the order of threads\n", label);
    return right && bits[0] == bits[1];
}

bool run_all(const Case& test) {
    bool right = run<float>(test) & run<__half>(test) & run<__nv_bfloat16>(test);
    if (test.hidden < 32 || (test.hidden < 50 && test.layers == 1)) right &= run<double>(test);
    return right;
}

/// Any of all that there is, small.
Case any_case() {
    const int hiddens[] = {1, 2, 3, 5, 7, 8, 12, 16, 17, 31, 32, 33};
    Case test{};
    test.hidden = hiddens[below(12)];
    test.inputs = 1 + below(40);
    test.layers = 1 + below(test.hidden > 16 ? 2 : 4);
    test.rows = 1 + below(test.hidden > 16 ? 40 : 150);
    test.steps = below(5) + (test.ragged == Ragged::packed);
    test.ragged = static_cast<Ragged>(below(3));
    if (test.ragged == Ragged::packed) test.steps = 1 + below(5);
    test.reset = test.ragged != Ragged::packed && below(2);
    test.initial = below(2);
    test.reverse = below(2);
    test.save = below(2);
    test.sums = test.layers == 1 && below(2);
    test.panels = below(3) == 0;
    test.biases = below(3);
    test.multiprocessors = below(2) ? 1 : 132;
    test.shifted = below(2);
    return test;
}

bool refused() {
    Forward call{};
    call.steps = {1, 1, 1, nullptr, nullptr, nullptr};
    call.hidden_size = call.input_size = 8;
    call.layers = call.directions = call.multiprocessors = 1;
    const auto fits = [&](auto change) {
        Forward changed = call;
        change(changed);
        return rows_fits(changed);
    };
    bool right = fits([](Forward&) {});
    right &= !fits([](Forward& f) { f.hidden_size = 65; }) && !fits([](Forward& f) { f.directions = 2; });
    right &= !fits([](Forward& f) { f.input_size = 1 << 20; }) && !fits([](Forward& f) { f.input_size = 1500; });
    right &= !fits([](Forward& f) { f.hidden_size = 64, f.input_size = 64, f.layers = 4; });
    right &= !fits([](Forward& f) { f.layers = max_stages + 1; });
    right &= fits([](Forward& f) { f.hidden_size = 64, f.input_size = 64; });
    right &= fits([](Forward& f) { f.layers = max_stages; });
    if (!right) std::printf("rows_fits answers wrongly\n");
    call.steps.batch = 0;
    return right && !rows_forward(call);
}

}  // namespace

int main(int count, char** arguments) {
    const std::string which = count > 1 ? arguments[1] : "sizes";
    bool right = true;
    if (which == "sizes") {
        right &= refused();
        const int hiddens[] = {1, 2, 3, 5, 7, 8, 12, 16, 17, 31, 32, 33, 50, 64};
        for (const int hidden : hiddens) {
            Case test{hidden, 1 + hidden * 69 / 64, 1, 33, 2};
            test.save = true;
            right &= run_all(test);
        }
        for (int layers = 2; layers <= 4; ++layers) right &= run_all({8, 2, layers, 300, 1});
        Case wide_tiles{8, 2, 2, 600, 2};
        wide_tiles.multiprocessors = 1;
        right &= run_all(wide_tiles);
        Case long_input{5, 400, 2, 20, 3};  // more of x than a thread has under way
        right &= run<float>(long_input) & run<__half>(long_input);
        Case long_time{4, 3, 2, 7, 300};
        long_time.ragged = Ragged::lengths;
        right &= run<float>(long_time);
        right &= run_all({7, 3, 2, 65, 0});
    } else {
        random_bits.seed(static_cast<unsigned>(std::atoi(which.c_str())));
        const int cases = count > 2 ? std::atoi(arguments[2]) : 12;
        for (int at = 0; at < cases; ++at) right &= run_all(any_case());
    }
    if (right) std::printf("equal %016llx\n", static_cast<unsigned long long>(all_bits));
    return right ? 0 : 1;
}
