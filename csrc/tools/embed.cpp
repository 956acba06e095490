// cellstep-embed: run a deploy file on a CSV file, without torch, through the C API alone.
#include <memory>

#include "cellstep/runtime.h"
#include "program.h"

namespace {

using cellstep::tools::Options;
using cellstep::tools::Runner;
using cellstep::tools::UserError;

void check(cellstep_status status, const std::string& what) {
    if (status != CELLSTEP_OK) throw UserError("cannot use '" + what + "': " + cellstep_status_text(status));
}

class EmbedRunner : public Runner {
public:
    explicit EmbedRunner(const std::string& path) {
        cellstep_model* model = nullptr;
        check(cellstep_model_load_file(path.c_str(), &model), path);
        model_.reset(model);
        cellstep_session* session = nullptr;
        check(cellstep_session_create(model, &session), path);
        session_.reset(session);

        cellstep_model_info info{};
        check(cellstep_model_get_info(model, &info), path);
        input_size = info.input_size;
        output_size = info.output_size;
        window = info.window;
        every_step = info.answers == 0;
        for (std::size_t at = 0; const char* name = cellstep_model_feature_name(model, at); ++at)
            feature_names.emplace_back(name);
        for (std::size_t at = 0; const char* name = cellstep_model_output_name(model, at); ++at)
            output_names.emplace_back(name);
    }

    void forecast(const float* x, std::size_t steps, float* y) override {
        cellstep_session_reset(session_.get());
        const auto answer = every_step ? cellstep_session_run : cellstep_session_forecast;
        check(answer(session_.get(), x, steps, y), "a window");
    }
    void step(const float* x, float* y) override { cellstep_session_step(session_.get(), x, y); }
    void reset() override { cellstep_session_reset(session_.get()); }

private:
    struct Destroy {
        void operator()(cellstep_model* model) const { cellstep_model_destroy(model); }
        void operator()(cellstep_session* session) const { cellstep_session_destroy(session); }
    };
    std::unique_ptr<cellstep_model, Destroy> model_;
    std::unique_ptr<cellstep_session, Destroy> session_;
};

}  // namespace

int main(int argc, char** argv) {
    return cellstep::tools::run_program(
        {"cellstep-embed", "MODEL.cellstep", false,
         [](const Options& options) { return std::make_unique<EmbedRunner>(options.model); }},
        argc, argv);
}
