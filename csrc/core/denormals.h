/// Denormal numbers cost a hundred times what others do, and a state that decays runs through them.
#pragma once

#include <cstdint>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace cellstep {
namespace core {

/// While it lives, this thread takes denormal numbers for zero, as operands and as results.
class FlushDenormals {
public:
#if defined(__SSE2__)
    FlushDenormals() : before_(_mm_getcsr()) {
        constexpr unsigned flush_to_zero = 0x8000;
        constexpr unsigned denormals_are_zero = 0x0040;
        _mm_setcsr(before_ | flush_to_zero | denormals_are_zero);
    }
    ~FlushDenormals() { _mm_setcsr(before_); }

private:
    unsigned before_;
#elif defined(__aarch64__)
    FlushDenormals() {
        __asm__ volatile("mrs %0, fpcr" : "=r"(before_));
        __asm__ volatile("msr fpcr, %0" : : "r"(before_ | std::uint64_t{1} << 24) : "memory");
    }
    ~FlushDenormals() { __asm__ volatile("msr fpcr, %0" : : "r"(before_) : "memory"); }

private:
    std::uint64_t before_;
#else
    FlushDenormals() {}
    ~FlushDenormals() {}
#endif
    FlushDenormals(const FlushDenormals&) = delete;
    FlushDenormals& operator=(const FlushDenormals&) = delete;
};

}  // namespace core
}  // namespace cellstep
