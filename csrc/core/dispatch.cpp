#include "core/kernels.h"

#if defined(__x86_64__) && !defined(CELLSTEP_STRICT) && !defined(CELLSTEP_SINGLE_ISA)
#define CELLSTEP_MANY_ISAS 1
#include <cstdlib>
#include <cstring>
#endif

namespace cellstep {
namespace core {

#define CELLSTEP_DECLARE(isa)                    \
    namespace isa {                              \
    extern const Kernels<float> kernels_float;   \
    extern const Kernels<double> kernels_double; \
    }

namespace {
struct Choice {
    const char* name;
    const Kernels<float>* single;
    const Kernels<double>* full;
};
}  // namespace

#if defined(CELLSTEP_MANY_ISAS)
CELLSTEP_DECLARE(baseline)
CELLSTEP_DECLARE(avx2)
CELLSTEP_DECLARE(avx512)

static Choice choose() {
    __builtin_cpu_init();
    const bool has_avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                            __builtin_cpu_supports("avx512vl");
    const char* wish = std::getenv("CELLSTEP_CPU");
    const auto wanted = [wish](const char* name) { return !wish || std::strcmp(wish, name) == 0; };
    const bool no_more_than_baseline = wish && std::strcmp(wish, "baseline") == 0;
    if (has_avx512 && wanted("avx512")) return {"avx512", &avx512::kernels_float, &avx512::kernels_double};
    if (has_avx2 && !no_more_than_baseline) return {"avx2", &avx2::kernels_float, &avx2::kernels_double};
    return {"baseline", &baseline::kernels_float, &baseline::kernels_double};
}
#else
CELLSTEP_DECLARE(native)

static Choice choose() { return {"native", &native::kernels_float, &native::kernels_double}; }
#endif

static const Choice& chosen() {
    static const Choice choice = choose();
    return choice;
}

template <>
const Kernels<float>& kernels<float>() {
    return *chosen().single;
}

template <>
const Kernels<double>& kernels<double>() {
    return *chosen().full;
}

const char* instruction_set() { return chosen().name; }

}  // namespace core
}  // namespace cellstep
