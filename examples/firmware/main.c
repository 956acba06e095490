/* A forecaster in a firmware: the model lies in flash, everything else in static memory. It streams 48 steps of the
   sample series and gives the forecast after each; with PRINT it prints them, and how long they took. */
#include "cellstep.h"
#include "forecaster.h" /* forecaster_model: cellstep.export(model, "forecaster.h") */
#include "series.h"     /* series: (SERIES_STEPS, SERIES_SIZE) */

#if defined(PRINT)
#include "semihosting.h"
#endif

/* Bytes that cellstep_memory_required gives for this model. */
#if !defined(SESSION_BYTES)
#define SESSION_BYTES 4096
#endif

static uint64_t model_memory[CELLSTEP_MODEL_BYTES / 8];
static uint64_t session_memory[SESSION_BYTES / 8];

#if !defined(PRINT)
/* What the rest of a firmware would read. */
volatile float forecast;
#endif

static cellstep_status run(void) {
    cellstep_model* model;
    cellstep_session* session;
    cellstep_status status =
        cellstep_model_init(model_memory, sizeof(model_memory), forecaster_model, forecaster_model_size, 0, &model);
    if (status != CELLSTEP_OK) return status;
    status = cellstep_session_init(model, session_memory, sizeof(session_memory), &session);
    if (status != CELLSTEP_OK) return status;
#if defined(PRINT)
    static float y[SERIES_STEPS];
    start_clock();
    for (int step = 0; step < SERIES_STEPS; ++step) cellstep_session_step(session, series[step], &y[step]);
    const unsigned ticks = clock_ticks();
    for (int step = 0; step < SERIES_STEPS; ++step) print_value(y[step]);
    print("ticks ");
    print_count(ticks);
    print("\nmemory ");
    print_count((unsigned)cellstep_memory_required(model));
    print("\n");
#else
    for (int step = 0; step < SERIES_STEPS; ++step) {
        float y;
        cellstep_session_step(session, series[step], &y);
        forecast = y;
    }
#endif
    return CELLSTEP_OK;
}

int main(void) {
    const cellstep_status status = run();
#if defined(PRINT)
    if (status != CELLSTEP_OK) {
        print(cellstep_status_text(status));
        print("\n");
    }
    leave((int)status);
#endif
    return (int)status;
}
