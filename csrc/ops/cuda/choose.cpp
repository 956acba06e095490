#include "choose.h"

#include <cstdlib>
#include <optional>
#include <string>
#include <type_traits>

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

// The table: the first rule that suits a call and whose kernel fits it. A block with few rows is as fast as it gets
// with its weights in registers; tensor cores pay from about eight rows a block, and where rows are so many that every
// multiprocessor has dozens, what counts is how many of them one block takes. No rule names `cluster` before its blocks
// have been seen to exchange values on a device; CELLSTEP_CUDA_KERNEL alone takes it.

struct ForwardRule {
    Kernel kernel;
    bool (*suits)(const Forward&);
};

const ForwardRule forward_rules[] = {
    {Kernel::rows,
     [](const Forward& call) {
         return call.hidden_size <= 64 && rows_each(call, 1) >= (call.hidden_size <= 32 ? 8 : 16);
     }},
    {Kernel::tensor,
     [](const Forward& call) { return is_narrow(call.type) && rows_each(call, call.layers * call.directions) >= 2; }},
    {Kernel::block, [](const Forward&) { return true; }},
    {Kernel::rows, [](const Forward&) { return true; }},
    {Kernel::tensor, [](const Forward&) { return true; }},
};

struct BackwardRule {
    Kernel kernel;
    bool (*suits)(const Backward&);
};

const BackwardRule backward_rules[] = {
    {Kernel::tensor,
     [](const Backward& call) { return is_narrow(call.type) && rows_each(call, call.directions) >= 2; }},
    {Kernel::block, [](const Backward&) { return true; }},
    {Kernel::tensor, [](const Backward&) { return true; }},
};

template <class Call>
bool fits(Kernel kernel, const Call& call) {
    switch (kernel) {
        case Kernel::rows:
            if constexpr (std::is_same_v<Call, Forward>) return rows_fits(call);
            return false;
        case Kernel::block:
            return block_fits(call);
        case Kernel::tensor:
            return tensor_fits(call);
        case Kernel::cluster:
            return cluster_tensor_fits(call);
        case Kernel::cluster_float:
            return cluster_float_fits(call);
        default:
            return true;
    }
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
    const Kernel kernel = whole ? first_of(forward_rules, *whole) : Kernel::plain;
    if (kernel != Kernel::plain) return {kernel, true};
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

const char* start(Kernel kernel, const Forward& call) {
    switch (kernel) {
        case Kernel::rows:
            return rows_forward(call);
        case Kernel::block:
            return block_forward(call);
        case Kernel::cluster:
            return cluster_tensor_forward(call);
        case Kernel::cluster_float:
            return cluster_float_forward(call);
        default:
            return tensor_forward(call);
    }
}

const char* start(Kernel kernel, const Backward& call) {
    switch (kernel) {
        case Kernel::block:
            return block_backward(call);
        case Kernel::cluster:
            return cluster_tensor_backward(call);
        case Kernel::cluster_float:
            return cluster_float_backward(call);
        default:
            return tensor_backward(call);
    }
}

std::size_t progress_words(Kernel kernel, const Forward& call) {
    switch (kernel) {
        case Kernel::block:
            return block_progress_words(call);
        case Kernel::tensor:
            return tensor_progress_words(call);
        case Kernel::cluster:
            return cluster_tensor_progress_words(call);
        case Kernel::cluster_float:
            return cluster_float_progress_words(call);
        default:
            return 0;
    }
}

std::size_t progress_words(Kernel kernel, const Backward& call) {
    switch (kernel) {
        case Kernel::cluster:
            return cluster_tensor_progress_words(call);
        case Kernel::cluster_float:
            return cluster_float_progress_words(call);
        default:
            return 0;
    }
}

}  // namespace cuda
}  // namespace cellstep
