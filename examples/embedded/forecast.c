/* From a model file to the forecast of a window, which comes from standard input: six calls. */
#include <cellstep/runtime.h>
#include <stdio.h>
#include <stdlib.h>

static void check(cellstep_status status) {
    if (status == CELLSTEP_OK) return;
    fprintf(stderr, "error: %s\n", cellstep_status_text(status));
    exit(1);
}

int main(int argc, char** argv) {
    enum { most_values = 1 << 16 };
    static float x[most_values], y[64];
    size_t values = 0;
    cellstep_model* model;
    cellstep_session* session;
    cellstep_model_info info;
    if (argc != 2) {
        fprintf(stderr, "usage: %s MODEL.cellstep < WINDOW\n", argv[0]);
        return 2;
    }
    while (values < most_values && scanf("%f%*[, \n]", &x[values]) == 1) ++values;

    check(cellstep_model_load_file(argv[1], &model));
    check(cellstep_model_get_info(model, &info));
    check(info.output_size <= 64 ? CELLSTEP_OK : CELLSTEP_ERROR_MEMORY);
    check(cellstep_session_create(model, &session));
    check(cellstep_session_forecast(session, x, values / info.input_size, y));
    for (uint32_t k = 0; k < info.output_size; ++k) printf("%.9g\n", y[k]);

    cellstep_session_destroy(session);
    cellstep_model_destroy(model);
    return 0;
}
