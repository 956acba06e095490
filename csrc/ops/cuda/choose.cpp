#include "choose.h"

#include <cstdlib>
#include <optional>
#include <string>

#include "tensor.h"

namespace cellstep {
namespace cuda {

namespace {

constexpr const char* names[] = {"plain", "rows", "block", "tensor", "cluster", "cluster_float"};

bool is_narrow(DataType type) { return value_bytes(type) == 2; }

/// Rows that all multiprocessors together have for each of theirs.
template <class Call>
std::int64_t rows_each(const Call& call, int stages) {
    return std::int64_t(call.steps.batch) * stages / (call.multiprocessors > 0 ? call.multiprocessors : 1);
}

/// Multiply-adds of a step and gate: what a step whose weights are on the chip and one that reads them differ by.
template <class Call>
std::int64_t work(const Call& call) {
    return std::int64_t(call.steps.batch) * call.directions * call.hidden_size * call.hidden_size;
}

/// Whether a cluster's blocks find so many multiprocessors idle that they take fewer clocks than one block, or than the
/// tensor cores of a cluster.
template <class Call>
bool suits_cluster_float(const Call& call) {
    const int rows = call.steps.batch * call.directions;
    return call.hidden_size > 128 &&
           (is_narrow(call.type) ? rows <= 4 && call.hidden_size <= 512 : 2 * rows <= call.multiprocessors) &&
           cluster_float_fits(call, {ClusterForm::cluster});
}

template <class Call>
bool suits_cluster(const Call& call, int most_of_a_block) {
    return call.hidden_size > most_of_a_block && rows_each(call, call.directions) < 1 &&
           cluster_tensor_fits(call, {ClusterForm::cluster});
}

// The table: the first rule that suits a call and whose kernel fits it. A block with few rows is as fast as it gets
// with its weights in registers; tensor cores pay from about eight rows a block, and where rows are so many that every
// multiprocessor has dozens, what counts is how many of them one block takes.
//
// The rules of `cluster` and `cluster_float` are derived and not measured, and no device has seen their blocks exchange
// values yet: CELLSTEP_CUDA_KERNEL=plain is the way around them. In clocks of a step on an H100, a meeting costs a
// cluster 500 and a grid 2,000, a multiprocessor does 128 multiply-adds in float and 1,024 on tensor cores, and moves
// 128 bytes of weights that its registers do not hold. So one block in float takes 860 with H = 128 and 2,000 with
// H = 160; on tensor cores, 8 rows, 1,150 with H = 160 and 2,150 with H = 224. A cluster in float takes 890 and 950 for
// few rows, of H = 160 still 1,490 for 64; on tensor cores 1,060 to 1,310 up to 128 rows of those sizes, and backward,
// where it sends four times as much, 1,380 to 1,760. With 4 rows and H = 512 float takes 1,510 and 2,080 backward,
// where tensor cores take 1,630 and 2,400. A grid is never faster than a block, and is for what no block and no cluster
// holds. There the other road is torch's product in every step: 12,000 for its launches and then less than here for
// each row, so that many rows of many units are faster with it; so are a few steps, for which all weights would be
// fetched.

struct ForwardRule {
    Kernel kernel;
    bool (*suits)(const Forward&);
};

const ForwardRule forward_rules[] = {
    {Kernel::rows,
     [](const Forward& call) {
         return call.hidden_size <= 64 && rows_each(call, 1) >= (call.hidden_size <= 32 ? 8 : 16);
     }},
    {Kernel::cluster_float, suits_cluster_float<Forward>},
    {Kernel::cluster, [](const Forward& call) { return suits_cluster(call, 144); }},
    {Kernel::tensor,
     [](const Forward& call) { return is_narrow(call.type) && rows_each(call, call.layers * call.directions) >= 2; }},
    {Kernel::block, [](const Forward&) { return true; }},
    {Kernel::rows, [](const Forward&) { return true; }},
    {Kernel::tensor, [](const Forward&) { return true; }},
    {Kernel::cluster, [](const Forward& call) { return call.steps.steps >= 4 && work(call) <= 250'000'000; }},
    {Kernel::cluster_float, [](const Forward& call) { return call.steps.steps >= 4 && work(call) <= 100'000'000; }},
};

struct BackwardRule {
    Kernel kernel;
    bool (*suits)(const Backward&);
};

const BackwardRule backward_rules[] = {
    {Kernel::cluster_float, suits_cluster_float<Backward>},
    {Kernel::cluster, [](const Backward& call) { return suits_cluster(call, 192); }},
    {Kernel::tensor,
     [](const Backward& call) { return is_narrow(call.type) && rows_each(call, call.directions) >= 2; }},
    {Kernel::block, [](const Backward&) { return true; }},
    {Kernel::tensor, [](const Backward&) { return true; }},
    {Kernel::cluster, [](const Backward& call) { return call.steps.steps >= 4 && work(call) <= 100'000'000; }},
    {Kernel::cluster_float, [](const Backward& call) { return call.steps.steps >= 4 && work(call) <= 20'000'000; }},
};

/// What each kernel has for calls of one kind, in the order of `names`.
template <class Call>
struct Way {
    bool (*fits)(const Call&);
    const char* (*start)(const Call&);
    std::size_t (*progress_words)(const Call&);
};

template <class Call>
bool any_fits(const Call&) {
    return true;
}

template <class Call>
bool none_fits(const Call&) {
    return false;
}

template <class Call>
std::size_t no_words(const Call&) {
    return 0;
}

const Way<Forward>& way(Kernel kernel, const Forward&) {
    static const Way<Forward> ways[] = {
        {any_fits, nullptr, no_words},
        {rows_fits, rows_forward, no_words},
        {block_fits, block_forward, block_progress_words},
        {tensor_fits, tensor_forward, tensor_progress_words},
        {[](const Forward& call) { return cluster_tensor_fits(call); },
         [](const Forward& call) { return cluster_tensor_forward(call); },
         [](const Forward& call) { return cluster_tensor_progress_words(call); }},
        {[](const Forward& call) { return cluster_float_fits(call); },
         [](const Forward& call) { return cluster_float_forward(call); },
         [](const Forward& call) { return cluster_float_progress_words(call); }},
    };
    return ways[static_cast<int>(kernel)];
}

const Way<Backward>& way(Kernel kernel, const Backward&) {
    static const Way<Backward> ways[] = {
        {any_fits, nullptr, no_words},
        {none_fits, nullptr, no_words},
        {block_fits, block_backward, no_words},
        {tensor_fits, tensor_backward, no_words},
        {[](const Backward& call) { return cluster_tensor_fits(call); },
         [](const Backward& call) { return cluster_tensor_backward(call); },
         [](const Backward& call) { return cluster_tensor_progress_words(call); }},
        {[](const Backward& call) { return cluster_float_fits(call); },
         [](const Backward& call) { return cluster_float_backward(call); },
         [](const Backward& call) { return cluster_float_progress_words(call); }},
    };
    return ways[static_cast<int>(kernel)];
}

template <class Call>
bool fits(Kernel kernel, const Call& call) {
    return way(kernel, call).fits(call);
}

template <class Rules, class Call>
Kernel first_of(const Rules& rules, const Call& call) {
    for (const auto& rule : rules)
        if (rule.suits(call) && fits(rule.kernel, call)) return rule.kernel;
    return Kernel::plain;
}

std::optional<Kernel> forced(const char* op) {
    const char* text = std::getenv("CELLSTEP_CUDA_KERNEL");
    if (!text || !*text) return std::nullopt;
    for (int kernel = 0; kernel < 6; ++kernel)
        if (std::string(text) == names[kernel]) return static_cast<Kernel>(kernel);
    ops::fail(op, ": expected CELLSTEP_CUDA_KERNEL as plain, rows, block, tensor, cluster or cluster_float, got ", text,
              ": unset it");
}

[[noreturn]] void refuse(const char* op, Kernel kernel, int hidden_size) {
    ops::fail(op, ": expected a call that the kernel in CELLSTEP_CUDA_KERNEL can do, got hidden size ", hidden_size,
              " for ", names[static_cast<int>(kernel)], ": unset the variable");
}

}  // namespace

Choice choose(const char* op, const Forward* whole, const Forward& layer) {
    if (const auto kernel = forced(op)) {
        if (*kernel == Kernel::plain) return {*kernel, false};
        if (whole && fits(*kernel, *whole)) return {*kernel, true};
        if (!fits(*kernel, layer)) refuse(op, *kernel, layer.hidden_size);
        return {*kernel, false};
    }
    // In one launch the layers of a stack run beside one another: what can do that comes before what cannot.
    const bool stack = whole && whole->layers > 1;
    for (const ForwardRule& rule : forward_rules) {
        if (whole && rule.suits(*whole) && fits(rule.kernel, *whole)) return {rule.kernel, true};
        if (!stack && rule.suits(layer) && fits(rule.kernel, layer)) return {rule.kernel, false};
    }
    return {first_of(forward_rules, layer), false};
}

Kernel choose(const char* op, const Backward& call) {
    const auto kernel = forced(op);
    if (!kernel || *kernel == Kernel::rows) return first_of(backward_rules, call);
    if (!fits(*kernel, call)) refuse(op, *kernel, call.hidden_size);
    return *kernel;
}

bool choose(const char* op, const VariantCall& call) {
    return forced(op) != Kernel::plain && cluster_variant_pays(call);
}

const char* start(Kernel kernel, const Forward& call) { return way(kernel, call).start(call); }
const char* start(Kernel kernel, const Backward& call) { return way(kernel, call).start(call); }
std::size_t progress_words(Kernel kernel, const Forward& call) { return way(kernel, call).progress_words(call); }
std::size_t progress_words(Kernel kernel, const Backward& call) { return way(kernel, call).progress_words(call); }

}  // namespace cuda
}  // namespace cellstep
