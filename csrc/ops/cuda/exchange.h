/// How blocks that share the weights of a recurrence ("parts") give one another the values of each step. Parts are the
/// blocks of a cluster, which write to one another's shared memory and count the bytes that they are sent, or any
/// blocks of a grid that runs at once: they send through the cache that all share, and wait for one flag a part. Groups
/// of parts ("slots") know nothing of one another.
#pragma once

#include <array>
#include <atomic>

#include "device.h"

namespace cellstep {
namespace cuda {

/// What blocks of a cluster send with st.async is defined for clusters of more than one (PTX ISA).
constexpr int least_cluster = 2, most_cluster = 16;

/// Who shares, and where the values of a step lie.
struct Sharing {
    bool grid;  ///< parts need not be a cluster
    int parts;
    int busy;              ///< of them, the first ones, those that read values
    int sent;              ///< bytes that each of those is sent in a step
    int bytes;             ///< of the values of a step, a multiple of 16
    int slots;             ///< groups of parts at once
    int first;             ///< number of the group in slot 0
    int arrivals_at;       ///< places in shared memory: 16 bytes, of clusters
    int values_at;         ///< the values: of a cluster those of two steps
    unsigned char* space;  ///< of a grid: (slots, 2, bytes)
    int* flags;            ///< of a grid: (groups, parts): steps that a part has sent
};

/// The values of a step, found by all parts together.
template <bool Clusters>
struct Exchange {
    const Sharing& sharing;
    unsigned char* memory;

    __device__ int part() const { return static_cast<int>(blockIdx.x) % sharing.parts; }
    __device__ int slot() const { return static_cast<int>(blockIdx.x) / sharing.parts; }
    __device__ int group() const { return sharing.first + slot(); }
    /// What `meet` of that step gave.
    __device__ unsigned char* values(int step) const {
        return memory + sharing.values_at + (Clusters ? (step & 1) * sharing.bytes : 0);
    }
    /// Of a cluster: of the values of step 1 and of every second one behind it, of step 2 and of every second one.
    __device__ Arrivals* arrivals(int step) const {
        return reinterpret_cast<Arrivals*>(memory + sharing.arrivals_at) + (step & 1);
    }
    __device__ unsigned char* space(int step) const {
        return sharing.space +
               static_cast<std::size_t>(slot() * 2 + (step & 1)) * static_cast<std::size_t>(sharing.bytes);
    }
    /// Puts a word of 16, 8 or 4 bytes at `place` of the values of step `step`, which comes next. Lanes share the
    /// parts: this one has those from `first` on that are `apart` apart.
    template <class Word>
    __device__ void send(int step, int place, const Word& value, int first, int apart) const {
        if constexpr (Clusters) {
            for (int rank = first; rank < sharing.busy; rank += apart)
                send_word(values(step) + place, value, arrivals(step), rank);
        } else if (first == 0) {
            memcpy(__builtin_assume_aligned(space(step) + place, sizeof(Word)), &value, sizeof(Word));
        }
    }
    /// All parts' values of step `step` are here; those of step 0 each part has put there itself. In a cluster nothing
    /// else is waited for: whoever has them all knows that all warps of all parts have read those of the step before,
    /// as each sends what it found behind its last read, so that its buffer is free; and a warp that sends nothing
    /// meets the others of its block on the way.
    __device__ void meet(int step) const { meet(step, sharing.sent, sharing.bytes); }
    /// Where parts send less than the sharing says: `sent` bytes to each, all within the first `bytes` of the values.
    __device__ void meet(int step, int sent, int bytes) const {
        if constexpr (Clusters) {
            const bool tells = this_thread() == 0;
            if (step == 0) {
                for (int next = 0; tells && next < 2; ++next) {
                    begin_arrivals(arrivals(next));
                    expect_arrivals(arrivals(next), sent);
                }
                warp_sync();
                cluster_sync();
                return;
            }
            wait_for_arrivals(arrivals(step), (step - 1) / 2, sent);
            warp_sync();
            if (tells) expect_arrivals(arrivals(step), sent);
        } else {
            block_sync();
            if (step == 0) return;
            const int thread = this_thread(), threads = static_cast<int>(blockDim.x);
            if (thread < 32) {
                int* const flags = sharing.flags + static_cast<std::size_t>(group()) * sharing.parts;
                if (thread == 0) store_release(flags + part(), step);
                for (int at = thread; at < sharing.parts; at += 32) wait_until(flags + at, step);
            }
            block_sync();
            const unsigned char* const from = space(step);
            unsigned char* const to = values(step);
            for (int at = thread * 16; at < bytes; at += threads * 16) copy_16(to + at, from + at);
            wait_for_copies();
            block_sync();
        }
    }
};

inline std::size_t space_bytes(const Sharing& sharing) {
    return static_cast<std::size_t>(sharing.slots) * 2 * static_cast<std::size_t>(sharing.bytes);
}

/// Of progress: the space, whose chunks of 16 bytes may have to be aligned, and behind it the flags.
inline std::size_t words_of(const Sharing& sharing, int groups) {
    if (!sharing.grid) return 0;
    return 3 + space_bytes(sharing) / 4 + static_cast<std::size_t>(groups) * static_cast<std::size_t>(sharing.parts);
}

/// Clusters that are on the chip at once, each block with all the shared memory there is; asked once for each size and
/// kind of device, as asking takes microseconds.
template <class Plan>
int clusters_at_once(void (*kernel)(Plan), int threads, int parts, int multiprocessors) {
    static std::atomic<int> known[most_cluster + 1];  // multiprocessors and the answer
    int found = known[parts].load(std::memory_order_relaxed);
    if (found >> 10 != multiprocessors) {
        found = multiprocessors << 10 | most_clusters(kernel, static_cast<unsigned>(parts),
                                                      dim3(static_cast<unsigned>(threads)), shared_limit());
        known[parts].store(found, std::memory_order_relaxed);
    }
    return found & 1023;
}

/// What `find(&spread)` answers for a key, of which the last ones are remembered: finding takes longer than a launch,
/// and a call asks several times.
template <class Spread, class Find>
bool remembered(const std::array<int, 7>& key, Spread* spread, const Find& find) {
    struct Entry {
        std::array<int, 7> key{-1};
        bool fits = false;
        Spread spread{};
    };
    thread_local std::array<Entry, 8> entries;
    thread_local std::size_t next = 0;
    for (const Entry& entry : entries)
        if (entry.key == key) {
            *spread = entry.spread;
            return entry.fits;
        }
    Entry& entry = entries[next++ % entries.size()];
    entry.key = key;
    entry.fits = find(&entry.spread);
    *spread = entry.spread;
    return entry.fits;
}

/// Starts a plan, which has a `call` and a `spread` that is a Sharing, for all groups: `clusters` or `grid`, the
/// kernel's two forms. Launches of a grid follow one another where not all groups find room at once. `second`: of the
/// plan, what the same parts give one another beside it.
template <class Plan>
const char* start_groups(void (*clusters)(Plan), void (*grid)(Plan), Plan& plan, int groups, int threads, int shared,
                         Sharing* second = nullptr) {
    Sharing& sharing = plan.spread;
    const dim3 block(static_cast<unsigned>(threads));
    const auto bytes = static_cast<std::size_t>(shared);
    if (!sharing.grid)
        return launch_clusters(clusters, static_cast<unsigned>(sharing.parts),
                               dim3(static_cast<unsigned>(groups * sharing.parts)), block, bytes, plan.call.stream,
                               plan);
    int* words = plan.call.progress;
    for (Sharing* const one : {&sharing, second}) {
        if (!one) continue;
        one->space = reinterpret_cast<unsigned char*>((reinterpret_cast<std::uintptr_t>(words) + 15) / 16 * 16);
        one->flags = reinterpret_cast<int*>(one->space + space_bytes(*one));
        words = one->flags + std::ptrdiff_t(groups) * sharing.parts;
    }
    for (; sharing.first < groups; sharing.first += sharing.slots) {
        if (second) second->first = sharing.first;
        const int slots = groups - sharing.first < sharing.slots ? groups - sharing.first : sharing.slots;
        const char* const error = launch(grid, dim3(static_cast<unsigned>(slots * sharing.parts)), block, bytes,
                                         plan.call.stream, plan, true);
        if (error) return error;
    }
    return nullptr;
}

}  // namespace cuda
}  // namespace cellstep
