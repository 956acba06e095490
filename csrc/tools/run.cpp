// cellstep-run: run a TorchScript model or a compiled package on a CSV file through libtorch, tuned as a deployer
// would.
#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/InferenceMode.h>
#include <caffe2/serialize/inline_container.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/runtime/graph_executor.h>
#include <torch/script.h>

#include <cctype>
#include <fstream>
#include <iostream>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <sstream>
#include <unordered_map>

#include "cellstep/ops.h"
#include "program.h"

namespace {

using cellstep::tools::Options;
using cellstep::tools::Runner;
using cellstep::tools::UserError;

/// First sentence of a libtorch error, which can be pages long.
std::string first_sentence(const std::exception& error) {
    const auto* torch_error = dynamic_cast<const c10::Error*>(&error);
    std::string text = torch_error ? torch_error->what_without_backtrace() : error.what();
    text = text.substr(0, text.find('\n'));
    return text.substr(0, text.find(". "));
}

std::string record_text(caffe2::serialize::PyTorchStreamReader& archive, const std::string& name) {
    const auto [data, size] = archive.getRecord(name);
    return std::string(static_cast<const char*>(data.get()), size);
}

/// Operators outside torch's own namespaces that the archive's code calls as `ops.NAMESPACE.NAME(`.
std::set<std::string> custom_operators(caffe2::serialize::PyTorchStreamReader& archive) {
    std::set<std::string> found;
    const auto is_name = [](char c) { return std::isalnum(static_cast<unsigned char>(c)) || c == '_'; };
    for (const std::string& record : archive.getAllRecords()) {
        if (record.rfind("code/", 0) != 0 || record.size() < 3 || record.substr(record.size() - 3) != ".py") continue;
        const std::string code = record_text(archive, record);
        for (std::size_t at = code.find("ops."); at != std::string::npos; at = code.find("ops.", at + 1)) {
            if (at > 0 && (is_name(code[at - 1]) || code[at - 1] == '.')) continue;
            std::size_t dot = at + 4;
            while (dot < code.size() && is_name(code[dot])) ++dot;
            std::size_t end = dot + 1;
            while (end < code.size() && is_name(code[end])) ++end;
            if (dot >= code.size() || code[dot] != '.' || end >= code.size() || code[end] != '(') continue;
            found.insert(code.substr(at + 4, dot - at - 4) + "::" + code.substr(dot + 1, end - dot - 1));
        }
    }
    return found;
}

/// Names every operator that is missing, before the load would fail at the first one.
void check_operators(const std::string& path) {
    caffe2::serialize::PyTorchStreamReader archive(path);
    std::string ours;
    std::string others;
    for (const std::string& name : custom_operators(archive)) {
        if (!c10::Dispatcher::singleton().findOp({name, ""}).has_value() &&
            torch::jit::getAllOperatorsFor(c10::Symbol::fromQualString(name)).empty()) {
            std::string& list = name.rfind("cellstep::", 0) == 0 ? ours : others;
            list += (list.empty() ? "" : ", ") + name;
        }
    }
    const std::string version_record = "extra/cellstep_version";
    const std::string writer = archive.hasRecord(version_record) ? record_text(archive, version_record) : "";
    std::string remedy;
    if (!ours.empty())
        remedy +=
            std::string("; this cellstep-run is version ") + cellstep_ops_version() +
            (writer.empty() ? ": install a newer cellstep"
                            : " and the file was written by cellstep " + writer + ": install that or a newer one");
    if (!others.empty()) remedy += "; pass the library that registers " + others + " with --library";
    if (!remedy.empty())
        throw UserError("expected operators that are registered here; '" + path + "' needs " + ours +
                        (ours.empty() || others.empty() ? "" : ", ") + others + remedy);
}

/// What both kinds of models share.
class LibtorchRunner : public Runner {
protected:
    explicit LibtorchRunner(const Options& options) : device_(options.device) {}

    std::int64_t inputs() const { return static_cast<std::int64_t>(input_size); }

    template <class Call>
    auto called(const Call& call) {
        try {
            return call();
        } catch (const std::exception& error) {
            const std::string text = error.what();
            const std::size_t last = text.rfind("RuntimeError: ");
            throw UserError("the model refuses its input: " + (last == std::string::npos
                                                                   ? first_sentence(error)
                                                                   : text.substr(last, text.find('\n', last) - last)));
        }
    }

    at::Tensor tensor(const float* x, at::IntArrayRef sizes) const {
        const at::Tensor view = at::from_blob(const_cast<float*>(x), sizes, at::kFloat);
        return dtype_ == at::kFloat && device_.is_cpu() ? view : view.to(device_, dtype_);
    }

    void answer(const at::Tensor& result, std::size_t steps, float* y) const {
        const at::Tensor values = result.to(at::kCPU, at::kFloat).contiguous();
        if (values.numel() != static_cast<std::int64_t>(steps * output_size))
            throw UserError("expected " + std::to_string(steps * output_size) +
                            " outputs as output_size says; the model gave " + std::to_string(values.numel()));
        std::memcpy(y, values.const_data_ptr<float>(), steps * output_size * sizeof(float));
    }

    c10::InferenceMode inference_;
    at::ScalarType dtype_ = at::kFloat;
    at::Device device_;
};

class ScriptRunner : public LibtorchRunner {
public:
    explicit ScriptRunner(const Options& options) : LibtorchRunner(options) {
        // The executor without profiles: the one with them recompiles while it watches, and the older one compares
        // every argument's type in every call. For a graph of one operator neither makes a later call faster.
        torch::jit::getProfilingMode() = false;
        torch::jit::getExecutorMode() = true;
        const std::string& path = options.model;
        if (!std::ifstream(path, std::ios::binary))
            throw UserError("expected a TorchScript file at '" + path + "'; it cannot be read; check the path");
        try {
            check_operators(path);
            module_ = torch::jit::load(path, c10::kCPU);
        } catch (const UserError&) {
            throw;
        } catch (const std::exception& error) {
            throw UserError("expected a TorchScript archive; '" + path + "' is none or is damaged (" +
                            first_sentence(error) + "); export it again");
        }
        module_.eval();
        if (!device_.is_cpu()) module_.to(device_);
        input_size = static_cast<std::size_t>(attribute("input_size"));
        output_size = static_cast<std::size_t>(attribute("output_size"));
        window = static_cast<std::size_t>(attribute("window"));
        every_step = module_.hasattr("answers") && module_.attr("answers").isString() &&
                     module_.attr("answers").toStringRef() == "every";
        feature_names = names("feature_names");
        output_names = names("output_names");
        for (const auto& method : module_.get_methods()) {
            if (method.name() == "step") step_ = method;
            if (method.name() == "initial_state") initial_state_ = method;
        }
        if (!module_.find_method("forward") || input_size == 0 || output_size == 0)
            throw UserError("expected a model with forward, input_size and output_size, as cellstep exports it; '" +
                            path + "' lacks one of them; export it with cellstep.export");
        if (options.stream && !(step_ && initial_state_))
            throw UserError("expected a model with step and initial_state for --stream; '" + path +
                            "' lacks one of them; export it with cellstep.export");
        if (step_ && initial_state_) {
            reset();
            dtype_ = state_.toTupleRef().elements()[0].toTensor().scalar_type();
        }
    }

    void forecast(const float* x, std::size_t steps, float* y) override {
        const at::Tensor input = tensor(x, {1, static_cast<std::int64_t>(steps), inputs()});
        answer(called([&] { return module_.forward({input}); }).toTensor(), every_step ? steps : 1, y);
    }

    void step(const float* x, float* y) override {
        const at::Tensor input = tensor(x, {1, inputs()});
        const c10::IValue result = called([&] { return (*step_)({input, state_}); });
        state_ = result.toTupleRef().elements()[1];
        answer(result.toTupleRef().elements()[0].toTensor(), 1, y);
    }

    void reset() override {
        if (initial_state_) state_ = called([&] { return (*initial_state_)({std::int64_t{1}}); });
    }

private:
    std::int64_t attribute(const char* name) const {
        if (!module_.hasattr(name)) return 0;
        const c10::IValue value = module_.attr(name);
        return value.isInt() && value.toInt() > 0 ? value.toInt() : 0;
    }

    std::vector<std::string> names(const char* name) const {
        std::vector<std::string> all;
        if (!module_.hasattr(name) || !module_.attr(name).isList()) return all;
        for (const c10::IValue& value : module_.attr(name).toListRef())
            if (value.isString()) all.push_back(value.toStringRef());
        return all;
    }

    torch::jit::Module module_;
    std::optional<torch::jit::Method> step_;
    std::optional<torch::jit::Method> initial_state_;
    c10::IValue state_;
};

/// Values that the metadata of a package name, as cellstep/exporters/package.py writes them.
class Metadata {
public:
    explicit Metadata(const std::string& path)
        : path_(path), values_(torch::inductor::AOTIModelPackageLoader::load_metadata_from_package(path, "forward")) {}

    const std::string& text(const std::string& name) const {
        static const std::string cpu = "cpu";
        const auto found = values_.find(name);
        if (found == values_.end() && name == "device") return cpu;  // written before there was another
        if (found == values_.end())
            throw UserError("expected a package that cellstep exported; '" + path_ + "' lacks " + name +
                            "; export it with cellstep.export");
        return found->second;
    }

    std::int64_t number(const std::string& name) const {
        std::istringstream stream(text(name));
        std::int64_t value = 0;
        stream >> value;
        return value;
    }

    /// A JSON list of strings; \u escapes are left as they are.
    std::vector<std::string> names(const std::string& name) const {
        std::vector<std::string> all;
        const std::string& list = text(name);
        for (std::size_t at = list.find('"'); at != std::string::npos; at = list.find('"', at + 1)) {
            std::string value;
            for (++at; at < list.size() && list[at] != '"'; ++at) {
                if (list[at] == '\\' && at + 1 < list.size() && list[at + 1] != 'u') ++at;
                value += list[at];
            }
            all.push_back(value);
        }
        return all;
    }

    at::Tensor state(const std::string& name, std::int64_t rows, std::int64_t size) const {
        std::istringstream stream(text("initial_" + name));
        at::Tensor values = at::empty({rows, 1, size}, at::kDouble);
        for (std::int64_t at = 0; at < values.numel(); ++at) stream >> values.mutable_data_ptr<double>()[at];
        return values.to(at::Device(text("device")), text("dtype") == "float64" ? at::kDouble : at::kFloat);
    }

private:
    std::string path_;
    std::unordered_map<std::string, std::string> values_;
};

/// A .pt2 package: its programs are loaded as they are needed.
class PackageRunner : public LibtorchRunner {
public:
    explicit PackageRunner(const Options& options) : LibtorchRunner(options), path_(options.model) {
        if (!std::ifstream(path_, std::ios::binary))
            throw UserError("expected a package at '" + path_ + "'; it cannot be read; check the path");
        try {
            const Metadata metadata(path_);
            input_size = static_cast<std::size_t>(metadata.number("input_size"));
            output_size = static_cast<std::size_t>(metadata.number("output_size"));
            window = static_cast<std::size_t>(metadata.number("window"));
            every_step = metadata.text("answers") == "every";
            if (const std::string compiled = metadata.text("device"); compiled != options.device)
                throw UserError("expected --device " + compiled + ", as '" + path_ + "' is compiled for that; got " +
                                options.device + "; export the model from " + options.device);
            feature_names = metadata.names("feature_names");
            output_names = metadata.names("output_names");
            initial_ = {metadata.state("h", metadata.number("state_layers"), metadata.number("h_size")),
                        metadata.state("c", metadata.number("state_layers"), metadata.number("c_size"))};
            dtype_ = initial_[0].scalar_type();
            program_ =
                std::make_unique<torch::inductor::AOTIModelPackageLoader>(path_, options.stream ? "step" : "forward");
        } catch (const UserError&) {
            throw;
        } catch (const std::exception& error) {
            throw UserError("expected a .pt2 package that cellstep exported; '" + path_ + "' is none or is damaged (" +
                            first_sentence(error) + "); export it again");
        }
        reset();
    }

    void forecast(const float* x, std::size_t steps, float* y) override {
        const at::Tensor input = tensor(x, {1, static_cast<std::int64_t>(steps), inputs()});
        answer(called([&] { return program_->run({input}); })[0], every_step ? steps : 1, y);
    }

    void step(const float* x, float* y) override {
        const at::Tensor input = tensor(x, {1, inputs()});
        const std::vector<at::Tensor> result = called([&] { return program_->run({input, state_[0], state_[1]}); });
        state_ = {result[1], result[2]};
        answer(result[0], 1, y);
    }

    void reset() override { state_ = initial_; }

private:
    std::string path_;
    std::unique_ptr<torch::inductor::AOTIModelPackageLoader> program_;
    std::vector<at::Tensor> initial_;
    std::vector<at::Tensor> state_;
};

std::unique_ptr<Runner> load(const Options& options) {
    at::set_num_threads(options.threads);
    at::set_num_interop_threads(1);
    cellstep_register_ops();
    for (const std::string& library : options.libraries)
        if (!dlopen(library.c_str(), RTLD_NOW | RTLD_GLOBAL))
            throw UserError("expected a library at --library; '" + library + "' cannot be loaded: " + dlerror());
    if (options.device == "cuda") {
        // First, as it brings libtorch_cuda, without which torch knows of no device.
        const bool kernels = cellstep_register_cuda() == 1;
        if (!at::hasCUDA())
            throw UserError(std::string("expected a CUDA device for --device cuda; torch finds none") +
                            (kernels ? "" : std::string(" (") + cellstep_cuda_error() + ")") + "; leave --device out");
        if (!kernels) std::cerr << "note: on CUDA without cellstep's kernels: " << cellstep_cuda_error() << std::endl;
    }
    const std::string& path = options.model;
    if (path.size() > 4 && path.compare(path.size() - 4, 4, ".pt2") == 0)
        return std::make_unique<PackageRunner>(options);
    return std::make_unique<ScriptRunner>(options);
}

}  // namespace

int main(int argc, char** argv) {
    return cellstep::tools::run_program({"cellstep-run", "MODEL.pt or MODEL.pt2", true, load}, argc, argv);
}
