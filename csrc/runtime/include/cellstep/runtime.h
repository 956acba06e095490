/**
 * cellstep/runtime.h: run a `.cellstep` deploy file without torch.
 *
 * A model is read-only and can be shared by any number of sessions on any threads. A session is one stream: it
 * carries the state (h, c) of every layer, and belongs to one thread at a time. Values are float32 in the units of
 * the data the model was trained on: scaling lies in the file.
 *
 *     cellstep_model* model;
 *     cellstep_session* session;
 *     if (cellstep_model_load_file("m.cellstep", &model) != CELLSTEP_OK) ...
 *     if (cellstep_session_create(model, &session) != CELLSTEP_OK) ...
 *     cellstep_session_step(session, x, y);
 */
#ifndef CELLSTEP_RUNTIME_H
#define CELLSTEP_RUNTIME_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#if defined(CELLSTEP_RUNTIME_BUILD)
#define CELLSTEP_API __declspec(dllexport)
#elif defined(CELLSTEP_RUNTIME_SHARED)
#define CELLSTEP_API __declspec(dllimport)
#else
#define CELLSTEP_API
#endif
#else
#define CELLSTEP_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/** A loaded and checked deploy file. */
typedef struct cellstep_model cellstep_model;
/** One stream through a model, with its state. */
typedef struct cellstep_session cellstep_session;

/** What a call came to. Every value has a text: see cellstep_status_text. */
typedef enum cellstep_status {
    CELLSTEP_OK = 0,
    CELLSTEP_ERROR_ARGUMENT = 1,   /**< a pointer is null or a count is out of range */
    CELLSTEP_ERROR_MEMORY = 2,     /**< not enough memory */
    CELLSTEP_ERROR_FILE = 3,       /**< the file cannot be opened or read */
    CELLSTEP_ERROR_MAGIC = 4,      /**< not a deploy file */
    CELLSTEP_ERROR_VERSION = 5,    /**< a deploy file older than those that this build reads */
    CELLSTEP_ERROR_LENGTH = 6,     /**< shorter or longer than its header says */
    CELLSTEP_ERROR_CHECKSUM = 7,   /**< the checksum does not fit the bytes */
    CELLSTEP_ERROR_FORMAT = 8,     /**< the records contradict each other or the header */
    CELLSTEP_ERROR_DTYPE = 9,      /**< the weights are not float32 */
    CELLSTEP_ERROR_NONFINITE = 10, /**< a weight is NaN or infinite */
    CELLSTEP_ERROR_ALIGNMENT = 11, /**< memory that is used in place is not aligned to 8 bytes */
    CELLSTEP_ERROR_SELFTEST = 12,  /**< the test vector in the file gives other numbers on this machine */
    CELLSTEP_PENDING = 13,         /**< no error, but no answer yet either: a sliding window is not full */
    CELLSTEP_ERROR_NEWER = 14      /**< a deploy file newer than those that this build reads */
} cellstep_status;

/** One line on what a status means and what to do; never null, also for an unknown value. */
CELLSTEP_API const char* cellstep_status_text(cellstep_status status);

/** Version of this library, as "0.1.0". */
CELLSTEP_API const char* cellstep_version(void);

/** Instruction set in use: "baseline", "avx2", "avx512" or "native". */
CELLSTEP_API const char* cellstep_instruction_set(void);

/** Loads a deploy file. On success *model is to be destroyed by the caller; on failure it is null. */
CELLSTEP_API cellstep_status cellstep_model_load_file(const char* path, cellstep_model** model);

/** Loads a deploy file from memory. The bytes are copied, so they need no alignment and may go away. */
CELLSTEP_API cellstep_status cellstep_model_load_memory(const void* data, size_t size, cellstep_model** model);

/**
 * Loads a deploy file in place (flash, a mapped file): `data`, aligned to 8 bytes, must outlive the model. Align it to
 * 64 bytes: elsewhere a processor with vectors of a cache line takes up to 1.6 times as long.
 */
CELLSTEP_API cellstep_status cellstep_model_load_in_place(const void* data, size_t size, cellstep_model** model);

/** Destroys a model; null is allowed. Its sessions must be gone. */
CELLSTEP_API void cellstep_model_destroy(cellstep_model* model);

/** What a model is. Sizes are counts of values. */
typedef struct cellstep_model_info {
    uint32_t input_size;  /**< values in x, one time step */
    uint32_t output_size; /**< values in y */
    uint32_t num_layers;  /**< rows of the state: LSTM layers times directions; 1 if their sizes differ */
    uint32_t hidden_size; /**< values in a row of c; the units of each layer, or of all side by side */
    uint32_t window;      /**< steps that the model was trained to see before a forecast; 0: not said */
    uint32_t horizon;     /**< steps from the last input to the moment forecast; 0: not said */
    uint32_t h_size;      /**< values in a row of h; fewer than hidden_size behind a projection */
    uint32_t answers;     /**< what the model was made to answer: 0 every step, 1 the last, 2 the last hidden state */
} cellstep_model_info;

CELLSTEP_API cellstep_status cellstep_model_get_info(const cellstep_model* model, cellstep_model_info* info);

/** How the weights of the LSTM layers are stored: "float32", "bfloat16", "float16" or "int8"; null for a null model. */
CELLSTEP_API const char* cellstep_model_weights(const cellstep_model* model);

/** Name of input column `index`, or null where the file has no names or the index is out of range. */
CELLSTEP_API const char* cellstep_model_feature_name(const cellstep_model* model, size_t index);

/** Name of output column `index`, or null likewise. */
CELLSTEP_API const char* cellstep_model_output_name(const cellstep_model* model, size_t index);

/**
 * Replays the test vector that lies in the file. *error, if not null, receives the largest difference, in the
 * output's units. CELLSTEP_OK also for a file without a test vector, with *error set to -1.
 */
CELLSTEP_API cellstep_status cellstep_model_selftest(const cellstep_model* model, float* error);

/**
 * Creates a session in the initial state, zero or learned. The model must outlive it. Of the later calls
 * cellstep_session_set_parallel and cellstep_session_slide_begin allocate, and longer and longer runs of a
 * bidirectional model, which needs the whole sequence at once; no other does.
 */
CELLSTEP_API cellstep_status cellstep_session_create(const cellstep_model* model, cellstep_session** session);

/** Destroys a session; null is allowed. */
CELLSTEP_API void cellstep_session_destroy(cellstep_session* session);

/** Moves one time step: x (input_size) in, y (output_size) out. */
CELLSTEP_API cellstep_status cellstep_session_step(cellstep_session* session, const float* x, float* y);

/** Moves `steps` time steps: x (steps, input_size) in, y (steps, output_size) out. To the bit as many single steps. */
CELLSTEP_API cellstep_status cellstep_session_run(cellstep_session* session, const float* x, size_t steps, float* y);

/** The same; where reset[step] is not 0 the state is put to the initial one before the step. `reset` may be null. */
CELLSTEP_API cellstep_status cellstep_session_run_reset(cellstep_session* session, const float* x,
                                                        const unsigned char* reset, size_t steps, float* y);

/**
 * Answers a window: y (output_size) is the output of the last step, or comes from the last hidden state if the model
 * was made so. `steps` must be at least 1.
 */
CELLSTEP_API cellstep_status cellstep_session_forecast(cellstep_session* session, const float* x, size_t steps,
                                                       float* y);

/**
 * Begins a window of the last `window` steps that moves by one step a call, with memory for all of them; 0 takes the
 * model's own window. Begins anew where there was one. CELLSTEP_ERROR_ARGUMENT if the model names no window.
 */
CELLSTEP_API cellstep_status cellstep_session_slide_begin(cellstep_session* session, size_t window);

/**
 * Moves the window: x (input_size) is its newest step. CELLSTEP_PENDING, and y is left as it was, until as many steps
 * have come as the window has; then y (output_size) is to the bit what cellstep_session_forecast gives for these steps
 * from the initial state. What hangs on one step alone, which is what lies before the recurrence of the first LSTM
 * layer, is kept for as long as the step is in the window. The session's state is neither read nor changed.
 */
CELLSTEP_API cellstep_status cellstep_session_slide(cellstep_session* session, const float* x, float* y);

/** Part of a call's work: one of `count` tasks, which never wait for each other. */
typedef void (*cellstep_task)(void* argument, size_t index);

/**
 * The caller's threads: calls task(argument, index) once for each index below count, at once or one after the other, in
 * any order and on any threads, and returns when all are done. Must not throw or return early.
 */
typedef void (*cellstep_run_tasks)(void* context, size_t count, cellstep_task task, void* argument);

/**
 * Lets the calls of a session share their work between `threads` threads, where there is enough of it: layers as a
 * wavefront in long runs, directions side by side, units of large layers. The numbers stay the same to the bit. `run`
 * is called with `context` from within calls of this session, on the thread that makes them; null ends the sharing.
 * Memory for all threads is allocated here. CELLSTEP_ERROR_ARGUMENT for 0 threads.
 */
CELLSTEP_API cellstep_status cellstep_session_set_parallel(cellstep_session* session, size_t threads, void* context,
                                                           cellstep_run_tasks run);

/** Puts the state to the initial one, zero or learned. */
CELLSTEP_API cellstep_status cellstep_session_reset(cellstep_session* session);

/** Copies the state out: h (num_layers, h_size) and c (num_layers, hidden_size). */
CELLSTEP_API cellstep_status cellstep_session_get_state(const cellstep_session* session, float* h, float* c);

/** Copies a state in. */
CELLSTEP_API cellstep_status cellstep_session_set_state(cellstep_session* session, const float* h, const float* c);

#ifdef __cplusplus
}
#endif

#endif
