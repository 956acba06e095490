/// What the fuzzers share: bytes in memory of their own, and the checks that make a wrong answer a crash.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#define FUZZ_CHECK(condition)                                                            \
    do {                                                                                 \
        if (!(condition)) {                                                              \
            std::fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
            std::abort();                                                                \
        }                                                                                \
    } while (false)

namespace fuzz {

/// Memory of exactly so many bytes, so that AddressSanitizer sees the first one past it, `shift` bytes behind a
/// multiple of 64.
class Memory {
public:
    explicit Memory(std::size_t size, std::size_t shift = 0)
        : block_(static_cast<unsigned char*>(::operator new(size + shift, std::align_val_t{64}))), shift_(shift) {}
    Memory(const void* data, std::size_t size) : Memory(size) {
        if (size > 0) std::memcpy(block_, data, size);
    }
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;
    ~Memory() { ::operator delete(block_, std::align_val_t{64}); }
    unsigned char* data() { return block_ + shift_; }

private:
    unsigned char* block_;
    std::size_t shift_;
};

/// The bits of the input, taken from its front; zeros behind its end.
class Input {
public:
    Input(const std::uint8_t* data, std::size_t size) : at_(data), left_(size) {}

    bool empty() const { return left_ == 0; }
    std::size_t left() const { return left_; }
    template <class T>
    T take() {
        T value{};
        const std::size_t count = left_ < sizeof(T) ? left_ : sizeof(T);
        std::memcpy(&value, at_, count);
        at_ += count;
        left_ -= count;
        return value;
    }
    unsigned byte() { return take<std::uint8_t>(); }
    /// Values of any bit pattern: NaN, infinities and denormal numbers among them. They begin again at the end.
    std::vector<float> values(std::size_t count) {
        std::vector<float> all(count);
        const unsigned kind = byte();
        float last = 0.0f;
        for (std::size_t at = 0; at < count; ++at) {
            if (kind & 1) {
                last = take<float>();
            } else if (at % 16 == 0 || kind & 2) {
                last = static_cast<float>(static_cast<std::int8_t>(byte())) * 0.03125f;
            } else {
                last = -0.8f * last + 0.1f;
            }
            all[at] = last;
        }
        return all;
    }

private:
    const std::uint8_t* at_;
    std::size_t left_;
};

/// Equal to the bit, or both not a number.
inline bool same(const float* a, const float* b, std::size_t count) {
    for (std::size_t at = 0; at < count; ++at) {
        if (std::isnan(a[at]) && std::isnan(b[at])) continue;
        if (std::memcmp(a + at, b + at, sizeof(float)) != 0) return false;
    }
    return true;
}

inline bool same(const std::vector<float>& a, const std::vector<float>& b) {
    return a.size() == b.size() && same(a.data(), b.data(), a.size());
}

}  // namespace fuzz
