// Modules: what was compiled for the GPU is only recognised; what runs is the same source compiled for the CPU.
#include "simulation.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <sstream>

namespace simulation {
namespace {

struct Kernels;
struct Function {
    std::string entry;
    Kernels const* library;
    size_t parameter_bytes;
    int dynamic_shared_limit = 48 << 10;
};
struct Module {
    std::map<std::string, Function> functions;
};
std::map<void*, std::shared_ptr<Module>> modules;

// Each library that SIMULATED_CUDA_KERNELS names (their paths parted by colons) exports two functions. Every kernel
// takes one struct by value.
struct Kernels {
    // Bytes of that struct, or 0 where there is no such kernel.
    size_t (*parameter_bytes)(char const* entry) = nullptr;
    // Runs a grid, its threads in an order that `schedule` chooses. Null, or what went wrong.
    char const* (*launch)(char const* entry, unsigned const grid[3], unsigned const block[3], void const* parameters,
                          unsigned schedule) = nullptr;
};

std::vector<Kernels> const& libraries() {
    static std::vector<Kernels> const loaded = [] {
        std::vector<Kernels> found;
        char const* const set = getenv("SIMULATED_CUDA_KERNELS");
        std::stringstream paths(set ? set : "");
        for (std::string path; std::getline(paths, path, ':');) {
            Kernels kernels;
            if (void* const library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)) {
                kernels.parameter_bytes = reinterpret_cast<decltype(kernels.parameter_bytes)>(dlsym(library, "simulated_parameter_bytes"));
                kernels.launch = reinterpret_cast<decltype(kernels.launch)>(dlsym(library, "simulate_launch"));
            }
            if (kernels.parameter_bytes && kernels.launch)
                found.push_back(kernels);
            else
                complain("%s is no library of kernels", path.c_str());
        }
        return found;
    }();
    return loaded;
}

unsigned schedule() {
    static unsigned const chosen = [] {
        char const* const order = getenv("SIMULATED_CUDA_ORDER");
        return order ? unsigned(strtoul(order, nullptr, 10)) : 0; // words give 0
    }();
    return chosen;
}

// A fatbin, an ELF file (cubin) or text (PTX).
bool is_image(void const* image) {
    uint32_t magic = 0;
    memcpy(&magic, image, sizeof magic);
    return magic == 0xBA55ED50 || magic == 0x464C457F || !memcmp(image, "//", 2) || !memcmp(image, ".ver", 4);
}

Function* find(void* handle) {
    for (auto const& [key, module] : modules)
        for (auto& [name, function] : module->functions)
            if (&function == handle)
                return &function;
    return nullptr;
}

int capability() {
    static int const value = [] {
        char const* const set = getenv("SIMULATED_CUDA_CAPABILITY");
        return set ? atoi(set) : 75; // a T4
    }();
    return value;
}

} // namespace

int capability_major() { return capability() / 10; }
int capability_minor() { return capability() % 10; }
int shared_bytes_optin() {
    switch (capability()) {
    case 75: return 64 << 10;
    case 80: return 163 << 10;
    case 90: case 100: return 227 << 10;
    default: return 99 << 10;
    }
}

Result load_module(void** module, void const* image) {
    if (!image || !is_image(image))
        return INVALID_IMAGE;
    if (libraries().empty()) {
        complain("SIMULATED_CUDA_KERNELS names no library of kernels");
        return NOT_FOUND;
    }
    auto made = std::make_shared<Module>();
    *module = made.get();
    modules[*module] = made;
    return SUCCESS;
}

Result unload_module(void* module) {
    finish_device();
    return modules.erase(module) ? SUCCESS : INVALID_HANDLE;
}

Result find_function(void** function, void* module, char const* name) {
    auto const found = modules.find(module);
    if (found == modules.end())
        return INVALID_HANDLE;
    for (Kernels const& library : libraries())
        if (size_t const bytes = library.parameter_bytes(name)) {
            *function = &found->second->functions.try_emplace(name, Function{name, &library, bytes}).first->second;
            return SUCCESS;
        }
    return NOT_FOUND;
}

Result function_attribute(int* value, int attribute, void* handle) {
    Function const* const function = find(handle);
    if (!function)
        return INVALID_HANDLE;
    *value = attribute == FUNCTION_MAX_THREADS_PER_BLOCK            ? 1024
             : attribute == FUNCTION_MAX_DYNAMIC_SHARED_SIZE_BYTES ? function->dynamic_shared_limit
                                                                   : 0;
    return SUCCESS;
}

Result set_function_attribute(void* handle, int attribute, int value) {
    Function* const function = find(handle);
    if (!function)
        return INVALID_HANDLE;
    if (attribute != FUNCTION_MAX_DYNAMIC_SHARED_SIZE_BYTES)
        return SUCCESS; // hints
    if (value < 0 || value > shared_bytes_optin())
        return INVALID_VALUE;
    function->dynamic_shared_limit = value;
    return SUCCESS;
}

Result launch(void* handle, unsigned const grid[3], unsigned const block[3], unsigned shared_bytes, void* stream,
              void** parameters, void** extra) {
    Function const* const function = find(handle);
    if (!function)
        return INVALID_HANDLE;
    size_t const threads = size_t(block[0]) * block[1] * block[2];
    bool const grid_fits = grid[0] && grid[0] <= 0x7FFFFFFF && grid[1] && grid[1] <= 65535 && grid[2] && grid[2] <= 65535;
    if (!grid_fits || !threads || threads > 1024 || block[2] > 64 || int(shared_bytes) > function->dynamic_shared_limit)
        return INVALID_VALUE;
    void const* from = parameters ? parameters[0] : nullptr;
    size_t bytes = function->parameter_bytes;
    for (void** at = parameters ? nullptr : extra; at && *at != LAUNCH_PARAM_END; at += 2)
        if (*at == LAUNCH_PARAM_BUFFER_POINTER)
            from = at[1];
        else if (*at == LAUNCH_PARAM_BUFFER_SIZE)
            bytes = *static_cast<size_t const*>(at[1]);
    if (!from || bytes != function->parameter_bytes) {
        complain("%s takes %zu bytes of parameters, not %zu", function->entry.c_str(), function->parameter_bytes, bytes);
        return INVALID_VALUE;
    }
    std::string const copied(static_cast<char const*>(from), bytes); // the caller's may be gone when the kernel runs
    std::string const entry = function->entry;
    std::array<unsigned, 3> const blocks{grid[0], grid[1], grid[2]}, threads_of{block[0], block[1], block[2]};
    auto const run = function->library->launch;
    return enqueue(stream, "kernel", [=] {
        char const* const trouble = run(entry.c_str(), blocks.data(), threads_of.data(), copied.data(), schedule());
        if (trouble)
            complain("%s: %s", entry.c_str(), trouble);
        return trouble ? LAUNCH_FAILED : SUCCESS;
    });
}

void forget_modules() { modules.clear(); }
size_t live_modules() { return modules.size(); }

} // namespace simulation
