#include "core/kernels.h"

#if defined(__x86_64__) && !defined(CELLSTEP_STRICT) && !defined(CELLSTEP_SINGLE_ISA)
#define CELLSTEP_MANY_ISAS 1
#include <cpuid.h>

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
// The products of int8 weights, for machines that have instructions for them.
#define CELLSTEP_DECLARE_INT8(isa)                                            \
    namespace isa {                                                           \
    extern void (*const kernel)(const Int8Step<float>&) CELLSTEP_NONBLOCKING; \
    }
#if defined(CELLSTEP_AVX_VNNI)
CELLSTEP_DECLARE_INT8(avx2vnni)
#endif
CELLSTEP_DECLARE_INT8(avx512vnni)

CELLSTEP_DECLARE(baseline)
CELLSTEP_DECLARE(avx2)
CELLSTEP_DECLARE(avx512)

/// Leaf 1, bit 29 of ecx: clang's __builtin_cpu_supports knows this one from 16 on.
static bool has_f16c() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
}

#if defined(CELLSTEP_AVX_VNNI)
/// Leaf 7, subleaf 1, bit 4 of eax: not every compiler's __builtin_cpu_supports knows this one.
static bool has_avx_vnni() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
#endif

/// The kernels of the choice, with other products of int8 weights.
static Kernels<float> with_int8_products;

static Choice choose() {
    __builtin_cpu_init();
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                            __builtin_cpu_supports("avx512vl");
    const char* wish = std::getenv("CELLSTEP_CPU");
    const auto wanted = [wish](const char* name) { return !wish || std::strcmp(wish, name) == 0; };
    const auto with_int8 = [](const Kernels<float>& kernels,
                              void (*int8_step)(const Int8Step<float>&) CELLSTEP_NONBLOCKING) {
        with_int8_products = kernels;
        with_int8_products.int8_step = int8_step;
        return &with_int8_products;
    };
    if (has_avx512 && __builtin_cpu_supports("avx512vnni") && wanted("avx512vnni"))
        return {"avx512", with_int8(avx512::kernels_float, avx512vnni::kernel), &avx512::kernels_double};
    if (has_avx512 && (wanted("avx512") || wanted("avx512vnni")))
        return {"avx512", &avx512::kernels_float, &avx512::kernels_double};
#if defined(CELLSTEP_AVX_VNNI)
    if (has_avx2 && has_avx_vnni() && wanted("avx2vnni"))
        return {"avx2", with_int8(avx2::kernels_float, avx2vnni::kernel), &avx2::kernels_double};
#endif
    const bool no_more_than_baseline = wish && std::strcmp(wish, "baseline") == 0;
    if (has_avx2 && !no_more_than_baseline) return {"avx2", &avx2::kernels_float, &avx2::kernels_double};
    return {"baseline", &baseline::kernels_float, &baseline::kernels_double};
}
/// Settled while the library is loaded, so that no call waits for a guard. Who calls even before, from an initializer
/// of another file, gets the baseline.
static Choice chosen = {"baseline", &baseline::kernels_float, &baseline::kernels_double};
[[maybe_unused]] static const bool settled = (chosen = choose(), true);
#else
CELLSTEP_DECLARE(native)

static constexpr Choice chosen = {"native", &native::kernels_float, &native::kernels_double};
#endif

template <>
const Kernels<float>& kernels<float>() CELLSTEP_NONBLOCKING {
    return *chosen.single;
}

template <>
const Kernels<double>& kernels<double>() CELLSTEP_NONBLOCKING {
    return *chosen.full;
}

const char* instruction_set() { return chosen.name; }

}  // namespace core
}  // namespace cellstep
