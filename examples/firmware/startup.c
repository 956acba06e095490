/* From reset to main on a Cortex-M: vector table, memory, floating point. */
#include <stdint.h>

int main(void);

extern uint32_t data_source[], data_begin[], data_end[], bss_begin[], bss_end[], stack_top[];

/* Volatile, so that no compiler makes calls of the C library out of the loops. */
static void copy(volatile uint32_t* to, volatile uint32_t* end, const uint32_t* from) {
    while (to < end) *to++ = *from++;
}

static void zero(volatile uint32_t* to, volatile uint32_t* end) {
    while (to < end) *to++ = 0;
}

void reset(void) {
#if defined(__ARM_FP)
    /* Access to the floating-point and vector registers: CP10 and CP11 of CPACR. */
    *(volatile uint32_t*)0xE000ED88 |= 15u << 20;
    __asm__ volatile("dsb\n isb" ::: "memory");
#endif
#if defined(__ARM_FEATURE_MVE)
    /* Loops of known length without a branch: LOB of CCR. */
    *(volatile uint32_t*)0xE000ED14 |= 1u << 19;
#endif
    copy(data_begin, data_end, data_source);
    zero(bss_begin, bss_end);
    main();
    for (;;) {
    }
}

static void stop(void) {
    for (;;) {
    }
}

typedef void (*handler)(void);

__attribute__((section(".vectors"), used)) static const struct {
    uint32_t* stack;
    handler exceptions[15];
} vectors = {stack_top, {reset, stop, stop, stop, stop, stop, stop, stop, stop, stop, stop, stop, stop, stop, stop}};
