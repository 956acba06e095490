/// Work for several threads, where the caller has them.
#pragma once

#include <cstddef>

#include "core/nonblocking.h"

namespace cellstep {
namespace core {

/// The caller's threads. `run` calls task(argument, index) once for each index below count and returns when all are
/// done; at once or one after the other, in any order. The tasks of one call never wait for each other.
struct Parallel {
    std::size_t threads;
    void* context;
    void (*run)(void* context, std::size_t count, void (*task)(void* argument, std::size_t index), void* argument);
};

/// Calls visit(index) for each index below count, on the threads of `parallel` unless that is null.
template <class Visit>
void for_each(const Parallel* parallel, std::size_t count, Visit visit) CELLSTEP_NONBLOCKING {
    if (!parallel || count < 2) {
        for (std::size_t index = 0; index < count; ++index) visit(index);
        return;
    }
    CELLSTEP_UNCHECKED_BEGIN  // what the caller's threads do is the caller's promise
        parallel->run(
            parallel->context, count,
            [](void* argument, std::size_t index) { (*static_cast<Visit*>(argument))(index); }, &visit);
    CELLSTEP_UNCHECKED_END
}

/// Begin of share `index` of `count` things in `shares`, at multiples of `grain`.
constexpr std::size_t share_begin(std::size_t count, std::size_t shares, std::size_t index, std::size_t grain) {
    const std::size_t grains = (count + grain - 1) / grain;
    const std::size_t begin = grains * index / shares * grain;
    return begin < count ? begin : count;
}

}  // namespace core
}  // namespace cellstep
