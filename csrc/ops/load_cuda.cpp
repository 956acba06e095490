#include <dlfcn.h>

#include <string>

#include "cellstep/ops.h"

namespace {

/// Empty once the library beside this one is loaded. It is never closed: torch keeps what it has registered.
std::string load() {
    Dl_info self{};
    if (dladdr(reinterpret_cast<const void*>(&cellstep_register_cuda), &self) == 0 || self.dli_fname == nullptr)
        return "expected to find the file of cellstep's operators; the loader does not name it";
    const std::string path = self.dli_fname;
    const std::size_t slash = path.rfind('/');
    const std::string library =
        (slash == std::string::npos ? "" : path.substr(0, slash + 1)) + "libcellstep_ops_cuda.so";
    if (dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL)) return {};
    const char* reason = dlerror();
    return "expected cellstep's CUDA kernels; they do not load: " + std::string(reason ? reason : library);
}

const std::string& error() {
    static const std::string text = load();
    return text;
}

}  // namespace

int cellstep_register_cuda(void) { return error().empty() ? 1 : 0; }

const char* cellstep_cuda_error(void) { return error().c_str(); }
