/* From reset to main of the driver on an emulated Cortex-M, with files and arguments by semihosting. */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

int main(int argc, char** argv);
void __libc_init_array(void);
void initialise_monitor_handles(void);

extern char bss_begin[], bss_end[], stack_top[];

static uint32_t call(uint32_t operation, const void* argument) {
    register uint32_t r0 __asm__("r0") = operation;
    register const void* r1 __asm__("r1") = argument;
    __asm__ volatile("bkpt 0xab" : "+r"(r0) : "r"(r1) : "memory");
    return r0;
}

_Noreturn static void leave(int code) {
    const uint32_t block[2] = {0x20026 /* ADP_Stopped_ApplicationExit */, (uint32_t)code};
    call(0x20 /* SYS_EXIT_EXTENDED */, block);
    for (;;) {
    }
}

/* The file's name and the arguments behind it, cut at spaces. */
static int arguments(char** argv, int most) {
    static char line[4096];
    const struct {
        char* text;
        uint32_t size;
    } block = {line, sizeof(line)};
    if (call(0x15 /* SYS_GET_CMDLINE */, &block)) leave(3);
    int count = 0;
    for (char* word = strtok(line, " "); word && count < most; word = strtok(NULL, " ")) argv[count++] = word;
    return count;
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
    memset(bss_begin, 0, (size_t)(bss_end - bss_begin));
    initialise_monitor_handles();
    __libc_init_array();
    static char* argv[100];
    exit(main(arguments(argv, 100), argv));
}

static void fault(void) { leave(4); }

/* newlib's exit comes here. */
void _exit(int code) { leave(code); }
void _init(void) {}
void _fini(void) {}
void* __dso_handle;

typedef void (*handler)(void);

__attribute__((section(".vectors"), used)) static const struct {
    char* stack;
    handler exceptions[15];
} vectors = {stack_top,
             {reset, fault, fault, fault, fault, fault, fault, fault, fault, fault, fault, fault, fault, fault, fault}};
