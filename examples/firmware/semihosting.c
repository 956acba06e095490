#include "semihosting.h"

#include <stdint.h>
#include <string.h>

static uint32_t call(uint32_t operation, const void* argument) {
    register uint32_t r0 __asm__("r0") = operation;
    register const void* r1 __asm__("r1") = argument;
    __asm__ volatile("bkpt 0xab" : "+r"(r0) : "r"(r1) : "memory");
    return r0;
}

void print(const char* text) { call(0x04 /* SYS_WRITE0 */, text); }

void print_count(unsigned value) {
    char text[12];
    char* at = text + sizeof(text);
    *--at = '\0';
    do *--at = (char)('0' + value % 10);
    while (value /= 10);
    print(at);
}

void print_value(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    const uint32_t exponent = bits >> 23 & 255;
    uint32_t fraction = bits << 1 & 0xffffff; /* six hexadecimal digits */
    if (bits >> 31) print("-");
    if (exponent == 255) {
        print(fraction ? "nan\n" : "inf\n");
        return;
    }
    char text[] = "0x0.000000p";
    if (exponent) text[2] = '1';
    for (int digit = 9; digit > 3; --digit, fraction >>= 4) text[digit] = "0123456789abcdef"[fraction & 15];
    print(text);
    const int power = exponent ? (int)exponent - 127 : bits << 1 ? -126 : 0;
    print(power < 0 ? "-" : "+");
    print_count((unsigned)(power < 0 ? -power : power));
    print("\n");
}

#define SYSTICK ((volatile uint32_t*)0xE000E010) /* control, reload value, current value */

void start_clock(void) {
    SYSTICK[1] = 0xffffff;
    SYSTICK[2] = 0;
    SYSTICK[0] = 5; /* the processor's clock, without an interrupt */
}

unsigned clock_ticks(void) { return 0xffffff - SYSTICK[2]; }

void leave(int code) {
    const uint32_t block[2] = {0x20026 /* ADP_Stopped_ApplicationExit */, (uint32_t)code};
    call(0x20 /* SYS_EXIT_EXTENDED */, block);
    for (;;) {
    }
}
