/// A mono effect: a model that is run once for every sample.
#pragma once

#include <cellstep/runtime.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

class Effect {
public:
    /// Most samples of a block.
    static constexpr std::size_t block_size = 64;

    /// Loads a `.cellstep` file. `knobs`: values of the model's inputs behind the sound. Throws std::runtime_error.
    Effect(const std::string& path, std::vector<float> knobs) : knobs_(std::move(knobs)) {
        cellstep_model* model = nullptr;
        check(cellstep_model_load_file(path.c_str(), &model), path);
        model_.reset(model);
        check(cellstep_model_get_info(model, &info_), path);
        if (info_.output_size != 1)
            throw std::runtime_error("expected a model of one output; '" + path + "' has " +
                                     std::to_string(info_.output_size));
        if (info_.input_size != 1 + knobs_.size())
            throw std::runtime_error("expected " + std::to_string(info_.input_size - 1) +
                                     " knobs, the inputs of the model behind the sound; got " +
                                     std::to_string(knobs_.size()));
        cellstep_session* session = nullptr;
        check(cellstep_session_create(model, &session), path);
        session_.reset(session);
        rows_.resize(block_size * info_.input_size);
    }

    const cellstep_model_info& info() const { return info_; }

    /// The audio callback: `count` samples, at most block_size. It neither allocates nor locks nor throws.
    void process(const float* in, float* out, std::size_t count) noexcept {
        const std::size_t width = info_.input_size;
        if (width == 1) {
            cellstep_session_run(session_.get(), in, count, out);
            return;
        }
        for (std::size_t t = 0; t < count; ++t) {
            rows_[t * width] = in[t];
            for (std::size_t k = 1; k < width; ++k) rows_[t * width + k] = knobs_[k - 1];
        }
        cellstep_session_run(session_.get(), rows_.data(), count, out);
    }

private:
    struct Destroy {
        void operator()(cellstep_model* model) const { cellstep_model_destroy(model); }
        void operator()(cellstep_session* session) const { cellstep_session_destroy(session); }
    };

    static void check(cellstep_status status, const std::string& path) {
        if (status != CELLSTEP_OK) throw std::runtime_error("'" + path + "': " + cellstep_status_text(status));
    }

    // The session goes before the model that it runs.
    std::unique_ptr<cellstep_model, Destroy> model_;
    std::unique_ptr<cellstep_session, Destroy> session_;
    cellstep_model_info info_{};
    std::vector<float> knobs_;
    std::vector<float> rows_;
};
