/* From a model file to a forecast, in C and without torch. */
#include <cellstep/runtime.h>
#include <stdio.h>
#include <stdlib.h>

static void check(cellstep_status status) {
    if (status == CELLSTEP_OK) return;
    fprintf(stderr, "error: %s\n", cellstep_status_text(status));
    exit(1);
}

int main(int argc, char** argv) {
    cellstep_model* model;
    cellstep_session* session;
    cellstep_model_info info;
    if (argc != 2) {
        fprintf(stderr, "usage: %s MODEL.cellstep\n", argv[0]);
        return 2;
    }
    check(cellstep_model_load_file(argv[1], &model));
    check(cellstep_model_selftest(model, NULL)); /* this machine gives the numbers of the one that trained */
    check(cellstep_session_create(model, &session));
    check(cellstep_model_get_info(model, &info));

    float* x = calloc(info.input_size, sizeof(float));
    float* y = calloc(info.output_size, sizeof(float));
    for (int t = 0; t < 5; ++t) {
        for (uint32_t k = 0; k < info.input_size; ++k) x[k] = 0.5f * (float)t;
        check(cellstep_session_step(session, x, y));
        printf("%d,%.9g\n", t, y[0]);
    }
    free(x);
    free(y);
    cellstep_session_destroy(session);
    cellstep_model_destroy(model);
    return 0;
}
