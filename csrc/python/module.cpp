// The Python face of the torch-free runtime: NumPy arrays in and out, no tensors.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cerrno>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cellstep/runtime.h"
#include "core/kernels.h"
#include "core/layer.h"
#include "core/pack.h"
#include "pool.h"

namespace py = pybind11;
using cellstep::python::Pool;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

/// A deploy file that is refused.
struct ModelError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

std::string shape_text(const std::vector<py::ssize_t>& shape) {
    return py::str(py::tuple(py::cast(shape))).cast<std::string>();
}

Array<float> floats(const py::handle& value, const char* name) {
    Array<float> array = Array<float>::ensure(value);
    if (!array) {
        PyErr_Clear();
        throw py::type_error(std::string("expected numbers as ") + name + ", got " +
                             py::str(py::type::of(value)).cast<std::string>() + ": pass a NumPy array or a list");
    }
    return array;
}

void expect_shape(const Array<float>& array, const std::vector<py::ssize_t>& shape, const char* name) {
    const std::vector<py::ssize_t> got(array.shape(), array.shape() + array.ndim());
    if (got != shape)
        throw py::value_error(std::string("expected ") + name + " of shape " + shape_text(shape) + ", got " +
                              shape_text(got));
}

class Model {
public:
    static std::shared_ptr<Model> from_file(const std::string& path) {
        cellstep_model* model = nullptr;
        cellstep_status status = CELLSTEP_OK;
        int error = 0;
        {
            py::gil_scoped_release release;  // a pipe may be written by another thread of this process
            errno = 0;
            status = cellstep_model_load_file(path.c_str(), &model);
            error = errno;
        }
        if (status == CELLSTEP_ERROR_FILE) {
            errno = error;
            PyErr_SetFromErrnoWithFilename(PyExc_OSError, path.c_str());
            throw py::error_already_set();
        }
        return adopt(status, model, "'" + path + "'");
    }

    static std::shared_ptr<Model> from_bytes(const py::bytes& data) {
        char* bytes = nullptr;
        py::ssize_t size = 0;
        if (PyBytes_AsStringAndSize(data.ptr(), &bytes, &size) != 0) throw py::error_already_set();
        cellstep_model* model = nullptr;
        const cellstep_status status = cellstep_model_load_memory(bytes, static_cast<std::size_t>(size), &model);
        return adopt(status, model, "the bytes given");
    }

    Model(const Model&) = delete;
    Model& operator=(const Model&) = delete;
    ~Model() { cellstep_model_destroy(handle); }

    std::vector<std::string> names(const char* (*name)(const cellstep_model*, std::size_t)) const {
        std::vector<std::string> all;
        for (std::size_t at = 0; const char* text = name(handle, at); ++at) all.emplace_back(text);
        return all;
    }

    cellstep_model* handle;
    cellstep_model_info info{};

private:
    explicit Model(cellstep_model* model) : handle(model) { cellstep_model_get_info(handle, &info); }

    static std::shared_ptr<Model> adopt(cellstep_status status, cellstep_model* model, const std::string& what) {
        if (status == CELLSTEP_ERROR_MEMORY) throw std::bad_alloc();
        if (status != CELLSTEP_OK) throw ModelError("cannot load " + what + ": " + cellstep_status_text(status));
        return std::shared_ptr<Model>(new Model(model));
    }
};

class Session {
public:
    Session(std::shared_ptr<Model> shared, py::ssize_t threads) : model(std::move(shared)) {
        if (threads < 1 || threads > most_threads)
            throw py::value_error("expected threads from 1 to " + std::to_string(most_threads) + ", got " +
                                  std::to_string(threads));
        if (threads > 1) pool_.reset(new Pool(static_cast<std::size_t>(threads)));
        if (cellstep_session_create(model->handle, &handle_) != CELLSTEP_OK) throw std::bad_alloc();
        const cellstep_status status =
            pool_ ? cellstep_session_set_parallel(handle_, pool_->threads(), pool_.get(), &Pool::run) : CELLSTEP_OK;
        if (status == CELLSTEP_OK) return;
        cellstep_session_destroy(handle_);
        throw std::bad_alloc();
    }
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;
    ~Session() { cellstep_session_destroy(handle_); }

    py::array step(const py::object& value) {
        const Array<float> x = floats(value, "x");
        expect_shape(x, {inputs()}, "x");
        return call(x, 1, {outputs()}, cellstep_session_run);
    }

    py::array run(const py::object& value, const std::optional<py::object>& reset) {
        const Array<float> x = sequence(value);
        if (!reset) return call(x, x.shape(0), {x.shape(0), outputs()}, cellstep_session_run);
        const Array<bool> mask = Array<bool>::ensure(*reset);
        if (!mask || mask.ndim() != 1 || mask.shape(0) != x.shape(0)) {
            PyErr_Clear();
            throw py::value_error("expected reset with one flag for each of the " + std::to_string(x.shape(0)) +
                                  " steps");
        }
        const auto* flags = reinterpret_cast<const unsigned char*>(mask.data());
        return call(x, x.shape(0), {x.shape(0), outputs()},
                    [flags](cellstep_session* session, const float* source, std::size_t steps, float* target) {
                        return cellstep_session_run_reset(session, source, flags, steps, target);
                    });
    }

    py::array forecast(const py::object& value) {
        const Array<float> x = sequence(value);
        if (x.shape(0) == 0) throw py::value_error("expected x with at least one step, got none");
        return call(x, x.shape(0), {outputs()}, cellstep_session_forecast);
    }

    void start_slide(py::ssize_t window) {
        if (window < 0 || window > most_window)
            throw py::value_error("expected a window of 1 to " + std::to_string(most_window) + " steps, got " +
                                  std::to_string(window));
        if (window == 0) window = model->info.window;
        if (window == 0)
            throw py::value_error(
                "expected the steps of the window, as the model names none: call start_slide(T) first");
        if (cellstep_session_slide_begin(handle_, static_cast<std::size_t>(window)) != CELLSTEP_OK)
            throw std::bad_alloc();
        sliding_ = true;
    }

    py::object slide(const py::object& value) {
        const Array<float> x = floats(value, "x");
        expect_shape(x, {inputs()}, "x");
        if (!sliding_) start_slide(0);
        bool pending = false;
        py::array y = call(x, 1, {outputs()},
                           [&pending](cellstep_session* session, const float* source, std::size_t, float* target) {
                               const cellstep_status status = cellstep_session_slide(session, source, target);
                               pending = status == CELLSTEP_PENDING;
                               return status;
                           });
        if (pending) return py::none();
        return std::move(y);
    }

    void reset() { cellstep_session_reset(handle_); }

    std::pair<py::array, py::array> state() const {
        Array<float> h(h_shape());
        Array<float> c(c_shape());
        cellstep_session_get_state(handle_, h.mutable_data(), c.mutable_data());
        return {h, c};
    }

    void set_state(const std::pair<py::object, py::object>& state) {
        const Array<float> h = floats(state.first, "h");
        const Array<float> c = floats(state.second, "c");
        expect_shape(h, h_shape(), "h");
        expect_shape(c, c_shape(), "c");
        cellstep_session_set_state(handle_, h.data(), c.data());
    }

    std::shared_ptr<Model> model;

private:
    static constexpr py::ssize_t most_threads = 1024;
    static constexpr py::ssize_t most_window = 1 << 24;

    py::ssize_t inputs() const { return model->info.input_size; }
    py::ssize_t outputs() const { return model->info.output_size; }
    std::vector<py::ssize_t> h_shape() const { return {model->info.num_layers, model->info.h_size}; }
    std::vector<py::ssize_t> c_shape() const { return {model->info.num_layers, model->info.hidden_size}; }

    Array<float> sequence(const py::object& value) const {
        Array<float> x = floats(value, "x");
        expect_shape(x, {x.ndim() > 0 ? x.shape(0) : 1, inputs()}, "x");
        return x;
    }

    template <class Function>
    py::array call(const Array<float>& x, py::ssize_t steps, const std::vector<py::ssize_t>& shape, Function function) {
        Array<float> y(shape);
        const float* source = x.data();
        float* target = y.mutable_data();
        cellstep_status status = CELLSTEP_OK;
        {
            py::gil_scoped_release release;
            status = function(handle_, source, static_cast<std::size_t>(steps), target);
        }
        if (status == CELLSTEP_ERROR_MEMORY) throw std::bad_alloc();
        return y;
    }

    std::unique_ptr<Pool, Pool::Release> pool_;  // outlives the session, which is destroyed before it
    cellstep_session* handle_ = nullptr;
    bool sliding_ = false;
};

template <class T>
cellstep::core::MatrixView<T> view(const Array<T>& matrix) {
    return {matrix.data(), matrix.shape(1), 1};
}

template <class T>
Array<T> pack_layer(const Array<T>& weight_ih, const Array<T>& weight_hh, const std::optional<Array<T>>& bias_ih,
                    const std::optional<Array<T>>& bias_hh, bool coupled) {
    const py::ssize_t gates = coupled ? 3 : 4;
    if (weight_ih.ndim() != 2 || weight_hh.ndim() != 2 || weight_hh.shape(0) % gates != 0 ||
        weight_hh.shape(1) > weight_hh.shape(0) / gates || weight_ih.shape(0) != weight_hh.shape(0))
        throw py::value_error("expected weight_ih and weight_hh with a row for each unit of each gate");
    for (const auto* bias : {&bias_ih, &bias_hh})
        if (*bias && ((*bias)->ndim() != 1 || (*bias)->shape(0) != weight_hh.shape(0)))
            throw py::value_error("expected biases with a value for each row of the weights");
    const std::size_t inputs = static_cast<std::size_t>(weight_ih.shape(1));
    const std::size_t units = static_cast<std::size_t>(weight_hh.shape(0) / gates);
    const std::size_t recurrent = static_cast<std::size_t>(weight_hh.shape(1));
    Array<T> packed(static_cast<py::ssize_t>(cellstep::core::packed_size(inputs, units, recurrent)));
    cellstep::core::pack_layer<T>({inputs, units, recurrent, coupled, view(weight_ih), view(weight_hh),
                                   bias_ih ? bias_ih->data() : nullptr, bias_hh ? bias_hh->data() : nullptr},
                                  packed.mutable_data());
    return packed;
}

template <class T>
Array<T> pack_dense(const Array<T>& weight, const std::optional<Array<T>>& bias) {
    if (weight.ndim() != 2 || (bias && (bias->ndim() != 1 || bias->shape(0) != weight.shape(0))))
        throw py::value_error("expected weight (out_size, in_size) and bias (out_size)");
    Array<T> packed((1 + weight.shape(1)) * weight.shape(0));
    cellstep::core::pack_dense<T>(static_cast<std::size_t>(weight.shape(1)), static_cast<std::size_t>(weight.shape(0)),
                                  view(weight), bias ? bias->data() : nullptr, packed.mutable_data());
    return packed;
}

template <class T>
void bind_packing(py::module_& module) {
    module.def("pack_layer", &pack_layer<T>, py::arg("weight_ih").noconvert(), py::arg("weight_hh").noconvert(),
               py::arg("bias_ih").none(true), py::arg("bias_hh").none(true), py::arg("coupled") = false);
    module.def("pack_dense", &pack_dense<T>, py::arg("weight").noconvert(), py::arg("bias").none(true));
}

}  // namespace

/// One digest of many places: address and bytes of each, one after the other.
std::uint64_t digest(const std::vector<std::uintptr_t>& places) {
    std::uint64_t result = places.size();
    for (std::size_t at = 0; at + 1 < places.size(); at += 2)
        result =
            cellstep::core::kernels<float>().digest(reinterpret_cast<const void*>(places[at]), places[at + 1], result);
    return result;
}

PYBIND11_MODULE(_runtime, module) {
    module.doc() = "The torch-free runtime; see cellstep.runtime.";
    py::register_exception<ModelError>(module, "ModelError", PyExc_ValueError);
    module.def("digest", &digest);
    module.def("instruction_set", &cellstep_instruction_set);

    py::class_<Model, std::shared_ptr<Model>>(module, "Model")
        .def_static("from_file", &Model::from_file)
        .def_static("from_bytes", &Model::from_bytes)
        .def_property_readonly("input_size", [](const Model& model) { return model.info.input_size; })
        .def_property_readonly("output_size", [](const Model& model) { return model.info.output_size; })
        .def_property_readonly("num_layers", [](const Model& model) { return model.info.num_layers; })
        .def_property_readonly("hidden_size", [](const Model& model) { return model.info.hidden_size; })
        .def_property_readonly("h_size", [](const Model& model) { return model.info.h_size; })
        .def_property_readonly("answers", [](const Model& model) { return model.info.answers; })
        .def_property_readonly("window", [](const Model& model) { return model.info.window; })
        .def_property_readonly("horizon", [](const Model& model) { return model.info.horizon; })
        .def_property_readonly("weights", [](const Model& model) { return cellstep_model_weights(model.handle); })
        .def_property_readonly("feature_names",
                               [](const Model& model) { return model.names(cellstep_model_feature_name); })
        .def_property_readonly("output_names",
                               [](const Model& model) { return model.names(cellstep_model_output_name); })
        .def("selftest", [](const Model& model) {
            float error = 0.0f;
            const cellstep_status status = cellstep_model_selftest(model.handle, &error);
            if (status != CELLSTEP_OK) throw ModelError(cellstep_status_text(status));
            return error;
        });

    py::class_<Session>(module, "Session")
        .def(py::init<std::shared_ptr<Model>, py::ssize_t>(), py::arg("model"), py::arg("threads") = 1)
        .def_readonly("model", &Session::model)
        .def("step", &Session::step)
        .def("run", &Session::run, py::arg("x"), py::arg("reset") = py::none())
        .def("forecast", &Session::forecast)
        .def("start_slide", &Session::start_slide)
        .def("slide", &Session::slide)
        .def("reset", &Session::reset)
        .def_property("state", &Session::state, &Session::set_state);

    bind_packing<float>(module);
    bind_packing<double>(module);
}
