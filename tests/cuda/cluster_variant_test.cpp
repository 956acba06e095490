/// Layers with options, all steps in one launch (cluster_variant.cu), against the formula in double and against the
/// kernels of single steps (variant.cu).
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "device.h"
#include "model.h"

using namespace cellstep::cuda;

namespace {

std::uint64_t digest = 1469598103934665603u;
int cases = 0;

enum Option : unsigned {
    biases = 1,
    peephole = 2,
    norm = 4,
    coupled = 8,
    clip = 16,
    zoneout = 32,
    keep = 64,
    mask_h = 128,
    mask_g = 256,
    reset = 512,
    initial = 1024,
    lengths = 2048,
    cells = 4096,
    reverse = 8192,
    expanded = 16384,
    strided = 32768,  ///< weights, flags, y and cells with strides of their own
    all_options = 65535
};

struct Case {
    int H, N, T;
    unsigned options;
    int gate, candidate, output;
    ClusterForm form;
    int multiprocessors;

    bool has(unsigned option) const { return options & option; }
};

[[noreturn]] void fail(const Case& c, const char* what, long at, double found, double expected) {
    std::printf("H %d N %d T %d options %u activations %d %d %d exchange %d parts %d: %s[%ld] is %.9g, expected %.9g\n",
                c.H, c.N, c.T, c.options, c.gate, c.candidate, c.output, static_cast<int>(c.form.exchange),
                c.form.parts, what, at, found, expected);
    std::exit(1);
}

double activate(int which, double x) {
    const double hard = which == 4 ? 0.2 * x + 0.5 : x / 6 + 0.5;
    switch (which) {
        case 1:
            return x < 0 ? 0 : x;
        case 2:
            return 1 / (1 + std::exp(-x));
        case 3:
            return std::tanh(x);
        case 4:
        case 5:
            return hard < 0 ? 0 : hard > 1 ? 1 : hard;
        case 6:
            return x < 0 ? std::expm1(x) : x;
        default:
            return x;
    }
}

/// (x - mean) / sqrt(variance + 1e-5), as torch.nn.LayerNorm has it.
void normalise(std::vector<double>& x) {
    double mean = 0, variance = 0;
    for (const double v : x) mean += v / static_cast<double>(x.size());
    for (const double v : x) variance += (v - mean) * (v - mean) / static_cast<double>(x.size());
    for (double& v : x) v = (v - mean) / std::sqrt(variance + 1e-5);
}

struct Values : std::vector<float> {
    explicit Values(long count) : std::vector<float>(static_cast<std::size_t>(count) + 1, std::nanf("")) {}
    float& at(long place) { return (*this)[static_cast<std::size_t>(place)]; }
};

/// A layer's arguments in one layout: rows lie in N, gates in i, (f,) g, o.
struct Problem {
    Case c;
    int gates, wide_gates, row_stride, y_row, cells_row;
    Values h, c_0, inputs, weight_hh, bias_ih, bias_hh, peepholes, norm_ih, norm_hh, norm_c, norm_c_bias, masks_h,
        masks_g, keep_h, keep_c, initial_h, initial_c;
    std::vector<unsigned char> flags;
    std::vector<std::int64_t> length;

    Problem(const Case& given, unsigned seed)
        : c(given),
          gates(c.has(coupled) ? 3 : 4),
          wide_gates(c.has(expanded) ? 4 : gates),
          row_stride(c.H + (c.has(strided) ? 3 : 0)),
          y_row(c.H + (c.has(strided) ? 5 : 0)),
          cells_row(c.H + (c.has(strided) ? 2 : 0)),
          h(c.N * c.H),
          c_0(c.N * c.H),
          inputs(c.T * c.N * gates * c.H),
          weight_hh(gates * c.H * row_stride),
          bias_ih(gates * c.H),
          bias_hh(gates * c.H),
          peepholes((wide_gates - 1) * c.H),
          norm_ih(wide_gates * c.H),
          norm_hh(wide_gates * c.H),
          norm_c(c.H),
          norm_c_bias(c.H),
          masks_h(c.N * c.H),
          masks_g(c.N * c.H),
          keep_h(c.T * c.N * c.H),
          keep_c(c.T * c.N * c.H),
          initial_h(c.H),
          initial_c(c.H),
          flags(static_cast<std::size_t>(c.T * c.N) + 1),
          length(static_cast<std::size_t>(c.N)) {
        std::mt19937 random(seed);
        std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
        const auto fill = [&](Values& values, float scale) {
            for (std::size_t at = 0; at + 1 < values.size(); ++at) values[at] = scale * uniform(random);
        };
        for (Values* values : {&h, &c_0, &inputs, &bias_ih, &bias_hh, &peepholes, &norm_ih, &norm_hh, &norm_c,
                               &norm_c_bias, &initial_h, &initial_c})
            fill(*values, 1.0f);
        fill(weight_hh, 2.0f / std::sqrt(static_cast<float>(c.H)));
        for (Values* values : {&masks_h, &masks_g, &keep_h, &keep_c}) {
            const bool keeps = values == &keep_h || values == &keep_c;
            for (std::size_t at = 0; at + 1 < values->size(); ++at)
                (*values)[at] = uniform(random) < 0.3f ? (keeps ? 1.0f : 1.25f) : 0.0f;
        }
        for (unsigned char& flag : flags) flag = uniform(random) < -0.4f;
        // Rows of all steps, of none, and what lies between.
        for (std::size_t row = 0; row < length.size(); ++row)
            length[row] = row % 4 == 1 ? 0 : row % 4 == 2 ? c.T + 3 : static_cast<std::int64_t>(random() % (c.T + 1u));
    }

    int place(int gate) const { return c.has(coupled) && gate > 1 ? gate - 1 : gate; }
    int wide_place(int gate) const { return c.has(expanded) ? gate : place(gate); }
    int steps_of(int row) const {
        const std::int64_t own = length[static_cast<std::size_t>(row)];
        return !c.has(lengths) || own > c.T ? c.T : static_cast<int>(own);
    }
    bool flag(int t, int row) const {
        return c.has(reset) && t >= 0 && t < steps_of(row) && flags[static_cast<std::size_t>(t * c.N + row)];
    }
};

struct Answer {
    Values y, cells, h, c;
    explicit Answer(const Problem& p)
        : y(p.c.T * p.c.N * p.y_row), cells(p.c.T * p.c.N * p.cells_row), h(p.c.N * p.c.H), c(p.c.N * p.c.H) {}
};

Answer by_formula(Problem& p) {
    const Case& c = p.c;
    Answer answer(p);
    for (int row = 0; row < c.N; ++row) {
        std::vector<double> h(p.h.begin() + row * c.H, p.h.begin() + (row + 1) * c.H);
        std::vector<double> state(p.c_0.begin() + row * c.H, p.c_0.begin() + (row + 1) * c.H);
        const auto write = [&](int t, bool zero) {
            for (int u = 0; u < c.H; ++u) {
                const auto at = static_cast<std::size_t>(u);
                answer.y.at((t * c.N + row) * p.y_row + u) = zero ? 0.0f : static_cast<float>(h[at]);
                if (c.has(cells))
                    answer.cells.at((t * c.N + row) * p.cells_row + u) = zero ? 0.0f : static_cast<float>(state[at]);
            }
        };
        for (int count = 0; count < c.T; ++count) {
            const int t = c.has(reverse) ? c.T - 1 - count : count;
            if (t >= p.steps_of(row)) {
                write(t, true);
                continue;
            }
            if (p.flag(c.has(reverse) ? t + 1 : t, row))
                for (int u = 0; u < c.H; ++u) {
                    h[static_cast<std::size_t>(u)] = c.has(initial) ? p.initial_h.at(u) : 0;
                    state[static_cast<std::size_t>(u)] = c.has(initial) ? p.initial_c.at(u) : 0;
                }
            std::vector<double> input, hidden;
            for (int at = 0; at < p.gates * c.H; ++at) {
                input.push_back(p.inputs.at((t * c.N + row) * p.gates * c.H + at));
                double sum = 0;
                for (int k = 0; k < c.H; ++k)
                    sum += double(p.weight_hh.at(at * p.row_stride + k)) * h[static_cast<std::size_t>(k)] *
                           (c.has(mask_h) ? p.masks_h.at(row * c.H + k) : 1.0f);
                hidden.push_back(sum);
            }
            if (c.has(norm)) {
                normalise(input);
                normalise(hidden);
            }
            const auto sum_of = [&](int gate, int u) {
                const int at = p.place(gate) * c.H + u, gain = p.wide_place(gate) * c.H + u;
                double a = input[static_cast<std::size_t>(at)], b = hidden[static_cast<std::size_t>(at)];
                if (c.has(norm)) a *= p.norm_ih.at(gain), b *= p.norm_hh.at(gain);
                return a + b + (c.has(biases) ? double(p.bias_ih.at(at)) + p.bias_hh.at(at) : 0.0);
            };
            const auto peep = [&](int which, int u) {
                const int at = which == 2 && p.wide_gates == 3 ? 1 : which;
                return c.has(peephole) ? double(p.peepholes.at(at * c.H + u)) : 0.0;
            };
            std::vector<double> raw;
            for (int u = 0; u < c.H; ++u) {
                const double before = state[static_cast<std::size_t>(u)];
                const double i = activate(c.gate, sum_of(0, u) + peep(0, u) * before);
                const double f = c.has(coupled) ? 1 - i : activate(c.gate, sum_of(1, u) + peep(1, u) * before);
                double g = activate(c.candidate, sum_of(2, u));
                if (c.has(mask_g)) g *= p.masks_g.at(row * c.H + u);
                const double value = f * before + i * g;
                raw.push_back(c.has(clip) ? std::fmin(std::fmax(value, -0.5), 0.5) : value);
            }
            std::vector<double> seen = raw;
            if (c.has(norm)) normalise(seen);
            for (int u = 0; u < c.H; ++u) {
                const auto at = static_cast<std::size_t>(u);
                if (c.has(norm)) seen[at] = seen[at] * p.norm_c.at(u) + p.norm_c_bias.at(u);
                const double o = activate(c.gate, sum_of(3, u) + peep(2, u) * raw[at]);
                const double given = o * activate(c.output, seen[at]);
                const double kept_h = c.has(keep) ? p.keep_h.at((t * c.N + row) * c.H + u) : c.has(zoneout) ? 0.2 : 0;
                const double kept_c = c.has(keep) ? p.keep_c.at((t * c.N + row) * c.H + u) : c.has(zoneout) ? 0.4 : 0;
                h[at] = kept_h * h[at] + (1 - kept_h) * given;
                state[at] = kept_c * state[at] + (1 - kept_c) * raw[at];
            }
            write(t, false);
        }
        for (int u = 0; u < c.H; ++u) {
            answer.h.at(row * c.H + u) = static_cast<float>(h[static_cast<std::size_t>(u)]);
            answer.c.at(row * c.H + u) = static_cast<float>(state[static_cast<std::size_t>(u)]);
        }
    }
    return answer;
}

/// By the device's kernels: `steps` the ones of variant.cu, else the one of whole sequences.
Answer by_kernels(Problem& p, bool steps) {
    const Case& c = p.c;
    const auto checked = [&](const char* error) {
        if (error) fail(c, error, 0, 0, 0);
    };
    Answer answer(p);
    answer.h = p.h;
    answer.c = p.c_0;
    Values inputs = p.inputs, hidden(c.N * p.gates * c.H), h_in(c.N * c.H), m(c.N * c.H);
    if (c.has(norm))
        checked(variant_inputs<float>(
            {c.T * c.N, c.H, c.has(coupled), c.has(expanded), p.norm_ih.data(), inputs.data()}, nullptr));
    const auto some = [&](unsigned option, Values& values) { return c.has(option) ? values.data() : nullptr; };
    // Flags of a step lie side by side, or with others between them.
    const int flag_row = c.has(strided) ? c.T : 1, flag_step = c.has(strided) ? 1 : c.N;
    std::vector<unsigned char> flags(p.flags.size());
    for (int t = 0; t < c.T; ++t)
        for (int row = 0; row < c.N; ++row)
            flags[static_cast<std::size_t>(t * flag_step + row * flag_row)] =
                p.flags[static_cast<std::size_t>(t * c.N + row)];
    VariantCall call{};
    VariantStep<float>& s = call.step;
    s.batch = c.N;
    s.hidden_size = s.recurrent_size = c.H;
    s.coupled = c.has(coupled);
    s.gate = static_cast<Activation>(c.gate);
    s.candidate = static_cast<Activation>(c.candidate);
    s.output = static_cast<Activation>(c.output);
    s.cell_clip = c.has(clip) ? 0.5f : 0.0f;
    s.zoneout_h = c.has(zoneout) ? 0.2f : 0.0f;
    s.zoneout_c = c.has(zoneout) ? 0.4f : 0.0f;
    s.input_sums = inputs.data();
    s.bias_ih = some(biases, p.bias_ih);
    s.bias_hh = some(biases, p.bias_hh);
    s.peephole = some(peephole, p.peepholes);
    s.norm_hh = some(norm, p.norm_hh);
    s.norm_c = some(norm, p.norm_c);
    s.norm_c_bias = some(norm, p.norm_c_bias);
    s.expanded = c.has(expanded);
    s.mask_h = some(mask_h, p.masks_h);
    s.mask_g = some(mask_g, p.masks_g);
    s.keep_h = some(keep, p.keep_h);
    s.keep_c = some(keep, p.keep_c);
    s.lengths = c.has(lengths) ? p.length.data() : nullptr;
    s.reset_row = flag_row;
    s.initial_h = some(initial, p.initial_h);
    s.initial_c = some(initial, p.initial_c);
    s.h = answer.h.data();
    s.c = answer.c.data();
    s.h_in = h_in.data();
    s.y = {answer.y.data(), std::int64_t(c.N) * p.y_row, p.y_row};
    if (c.has(cells)) s.cells = {answer.cells.data(), std::int64_t(c.N) * p.cells_row, p.cells_row};
    const auto flags_at = [&](int t) {
        return c.has(reset) && t >= 0 && t < c.T ? flags.data() + t * flag_step : nullptr;
    };
    const bool back = c.has(reverse);
    s.next_reset_step = back ? c.T : 0;
    s.next_reset = flags_at(back ? c.T : 0);
    checked(variant_begin(s, nullptr));
    if (!steps) {
        s.next_reset = nullptr;
        s.reset = flags_at(0);
        call.steps = c.T;
        call.reverse = back;
        call.reset_distance = flag_step;
        call.weight_hh = {p.weight_hh.data(), std::int64_t(c.H) * p.row_stride, 16 * std::int64_t(p.row_stride),
                          p.row_stride, 1};
        call.multiprocessors = c.multiprocessors;
        if (!cluster_variant_fits(call, c.form)) fail(c, "cluster_variant_fits", 0, 0, 1);
        std::vector<int> progress(cluster_variant_progress_words(call, c.form) + 1);
        call.progress = progress.data();
        progress.back() = 12345;
        checked(cluster_variant_forward(call, c.form));
        if (progress.back() != 12345) fail(c, "progress", 0, progress.back(), 12345);
        return answer;
    }
    s.hidden_sums = hidden.data();
    s.m = m.data();
    for (int count = 0; count < c.T; ++count) {
        const int t = back ? c.T - 1 - count : count;
        for (int row = 0; row < c.N; ++row)
            for (int at = 0; at < p.gates * c.H; ++at) {
                float sum = 0;
                for (int k = 0; k < c.H; ++k) sum += p.weight_hh.at(at * p.row_stride + k) * h_in.at(row * c.H + k);
                hidden.at(row * p.gates * c.H + at) = sum;
            }
        s.step = t;
        s.input_sums = inputs.data() + t * c.N * p.gates * c.H;
        if (c.has(keep)) {
            s.keep_h = p.keep_h.data() + t * c.N * c.H;
            s.keep_c = p.keep_c.data() + t * c.N * c.H;
        }
        s.reset_step = back ? t + 1 : t;
        s.reset = flags_at(static_cast<int>(s.reset_step));
        s.next_reset_step = back ? t : t + 1;
        s.next_reset = flags_at(static_cast<int>(s.next_reset_step));
        s.y.data = answer.y.data() + t * c.N * p.y_row;
        if (c.has(cells)) s.cells.data = answer.cells.data() + t * c.N * p.cells_row;
        checked(variant_step(s, false, nullptr));
    }
    return answer;
}

/// Both sides keep sums of H products in float, in orders of their own: 1e-7 of a sum's range each step, which gains
/// and normalisation of a few values enlarge.
void compare(const Case& c, const char* what, Values& found, Values& expected, bool counts) {
    for (std::size_t at = 0; at < expected.size(); ++at) {
        const float a = found[at], b = expected[at];
        const long place = static_cast<long>(at);
        if (std::isnan(a) != std::isnan(b)) fail(c, what, place, a, b);
        if (counts) {
            std::uint32_t bits;
            __builtin_memcpy(&bits, &a, 4);
            digest = (digest ^ bits) * 1099511628211u;
        }
        if (!std::isnan(b) && std::fabs(a - b) > 2e-5f * (1 + std::fabs(b))) fail(c, what, place, a, b);
    }
}

void check(const Case& c, unsigned seed) {
    Problem p(c, seed);
    Answer found = by_kernels(p, false), formula = by_formula(p), steps = by_kernels(p, true);
    const auto both = [&](const char* what, Values Answer::* values) {
        compare(c, what, found.*values, formula.*values, true);
        compare(c, what, found.*values, steps.*values, false);
    };
    both("y", &Answer::y);
    both("cells", &Answer::cells);
    both("h", &Answer::h);
    both("c", &Answer::c);
    ++cases;
}

/// Which sizes each form takes, on a device of 132 multiprocessors.
void sizes() {
    const float some = 0;
    for (const bool normalises : {false, true})
        for (const auto exchange : {ClusterForm::cluster, ClusterForm::grid}) {
            int least = 0, most = 0;
            for (int H = 1; H <= 2100; ++H) {
                VariantCall call{};
                call.step.batch = 16;
                call.step.hidden_size = call.step.recurrent_size = H;
                call.step.norm_hh = normalises ? &some : nullptr;
                call.weight_hh = weight_view(&some, H, H);
                call.steps = 1;
                call.multiprocessors = 132;
                if (!cluster_variant_fits(call, {exchange, 0})) continue;
                if (most && most + 1 != H) std::printf("%d fits, %d does not\n", H, H - 1);
                least = least ? least : H;
                most = H;
            }
            std::printf("%s, %s: H %d to %d\n", exchange == ClusterForm::cluster ? "cluster" : "grid",
                        normalises ? "normalised" : "not normalised", least, most);
        }
}

}  // namespace

/// alone, together: options; sizes: which H fit; few: some of all, for other seeds and
/// sanitizers; races: less.
int main(int count, char** arguments) {
    const std::string what = count > 1 ? arguments[1] : "few";
    unsigned seed = 1;
    const auto one = [&](int H, int N, int T, unsigned options, ClusterForm form, int multiprocessors = 132,
                         bool usual = false) {
        std::mt19937 random(seed);
        const auto any = [&] { return static_cast<int>(random() % 7); };
        const Case c{H, N, T, options, usual ? 2 : any(), usual ? 3 : any(), usual ? 3 : any(), form, multiprocessors};
        check(c, seed++);
    };
    const auto some = [&] {
        std::mt19937 random(seed + 1000);
        return static_cast<unsigned>(random() & all_options);
    };
    const auto each_form = [&](int most, const auto& visit) {
        for (const auto exchange : {ClusterForm::cluster, ClusterForm::grid})
            for (int parts = exchange == ClusterForm::cluster ? 2 : 1; parts <= most; ++parts)
                visit(ClusterForm{exchange, parts});
    };
    if (what == "alone")  // each option, with what it hangs on
        each_form(3, [&](ClusterForm form) {
            one(35, 3, 4, 0, form, 132, true);
            for (unsigned option = 1; option < all_options; option *= 2)
                one(35, 3, 4,
                    option | (option == expanded  ? coupled | peephole | norm
                              : option == initial ? reset
                              : option == strided ? reset | cells
                                                  : 0u),
                    form, 132, true);
        });
    if (what == "together") {
        each_form(3, [&](ClusterForm form) {
            for (int turn = 0; turn < 12; ++turn) one(35, 5, 4, some() | (turn % 2 ? norm : 0u), form);
            one(19, 5, 4, all_options & ~expanded, form);
            one(19, 5, 4, all_options, form);
            one(1, 2, 3, some() | norm, form);  // a row whose values are all one
        });
        // Tiles of several panels, several tiles, a row alone; more parts than units; a lane's columns in shared
        // memory.
        for (const auto& [exchange, parts] : {std::pair(ClusterForm::cluster, 16), std::pair(ClusterForm::grid, 20)})
            for (const int N : {1, 7, 21}) one(37, N, 3, some() | norm | mask_h, {exchange, parts});
        one(130, 2, 2, some() | norm, {ClusterForm::cluster, 2});
        one(260, 1, 2, some() | norm, {ClusterForm::grid, 7});
        one(12, 40, 3, some() | norm, {ClusterForm::grid, 3}, 7);  // launches one behind another
        for (const int H : {6, 50, 100}) one(H, 9, 3, some(), {});
        // No row, no step.
        one(5, 0, 3, norm, {});
        one(5, 2, 0, norm, {});
    }
    if (what == "few") {
        each_form(3, [&](ClusterForm form) {
            for (const unsigned option : {0u, unsigned(norm)}) one(35, 6, 4, some() | option, form);
        });
        one(35, 6, 4, all_options, {ClusterForm::cluster, 5});
        one(12, 9, 3, all_options, {ClusterForm::grid, 2}, 2);
    }
    if (what == "races")  // the sanitizer's threads are slow
        for (const auto exchange : {ClusterForm::cluster, ClusterForm::grid})
            for (const unsigned options : {0u, all_options & ~reverse}) one(20, 3, 3, options, {exchange, 2});
    if (what == "sizes") sizes();
    std::printf("%d cases, digest %016llx\n", cases, static_cast<unsigned long long>(digest));
}
