/// A mark for what a real-time thread may call: it neither allocates nor locks nor throws nor enters the operating
/// system. It is a part of a function's type, so templates repeat it where they are defined.
#pragma once

#if !defined(CELLSTEP_NONBLOCKING) && defined(__has_attribute)
#if __has_attribute(nonblocking)
#define CELLSTEP_NONBLOCKING __attribute__((nonblocking))
#endif
#endif
#if !defined(CELLSTEP_NONBLOCKING)
#define CELLSTEP_NONBLOCKING
#endif

/// Around a call that clang cannot see through, or that is another's promise.
#if defined(__clang__)
#define CELLSTEP_UNCHECKED_BEGIN                                                                      \
    _Pragma("clang diagnostic push") _Pragma("clang diagnostic ignored \"-Wunknown-warning-option\"") \
        _Pragma("clang diagnostic ignored \"-Wfunction-effects\"")
#define CELLSTEP_UNCHECKED_END _Pragma("clang diagnostic pop")
#else
#define CELLSTEP_UNCHECKED_BEGIN
#define CELLSTEP_UNCHECKED_END
#endif
