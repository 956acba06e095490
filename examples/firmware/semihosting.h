/* Output through the debugger or emulator, where a board would have a serial port, and a clock. */
#ifndef SEMIHOSTING_H
#define SEMIHOSTING_H

/* Prints a text. */
void print(const char* text);

/* Prints a value as C and Python read it back to the bit, such as -0x1.5bf0a8p+1, and a line's end. */
void print_value(float value);

/* Prints a whole number. */
void print_count(unsigned value);

/* Ticks of the processor's SysTick timer since start_clock(), at most 2^24. */
void start_clock(void);
unsigned clock_ticks(void);

/* Ends the emulator, or stops in the debugger. */
void leave(int code);

#endif
