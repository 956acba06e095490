/// Denormal numbers cost a hundred times what others do, and a state that decays runs through them.
#pragma once

#include <cstdint>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace cellstep {
namespace core {

/// While it lives, this thread takes denormal numbers for zero, as operands and as results. RISC-V, WebAssembly and
/// arithmetic in software have no such mode: there they are numbers like any other.
class FlushDenormals {
public:
#if defined(__SSE2__)
    FlushDenormals() : before_(_mm_getcsr()) {
        if (!already()) _mm_setcsr(before_ | both);
    }
    ~FlushDenormals() {
        if (!already()) _mm_setcsr(before_);
    }

private:
    /// Writing the register costs ten times as much as reading it.
    bool already() const { return (before_ & both) == both; }

    static constexpr unsigned both = 0x8000 | 0x0040;  // flush results to zero, take operands for zero
    unsigned before_;
#elif defined(__aarch64__)
    FlushDenormals() {
        __asm__ volatile("mrs %0, fpcr" : "=r"(before_));
        __asm__ volatile("msr fpcr, %0" : : "r"(before_ | std::uint64_t{1} << 24) : "memory");
    }
    ~FlushDenormals() { __asm__ volatile("msr fpcr, %0" : : "r"(before_) : "memory"); }

private:
    std::uint64_t before_;
#elif defined(__ARM_FP)
    FlushDenormals() {
        __asm__ volatile("vmrs %0, fpscr" : "=r"(before_));
        __asm__ volatile("vmsr fpscr, %0" : : "r"(before_ | std::uint32_t{1} << 24) : "memory");
    }
    ~FlushDenormals() { __asm__ volatile("vmsr fpscr, %0" : : "r"(before_) : "memory"); }

private:
    std::uint32_t before_;
#else
    FlushDenormals() {}
    ~FlushDenormals() {}
#endif
    FlushDenormals(const FlushDenormals&) = delete;
    FlushDenormals& operator=(const FlushDenormals&) = delete;
};

}  // namespace core
}  // namespace cellstep
