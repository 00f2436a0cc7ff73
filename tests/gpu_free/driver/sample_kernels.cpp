// Kernels for the tests of the simulated driver itself, as `modules.cpp` wants them, written without CUDA.
#include <cstddef>
#include <cstring>

#define EXPORT extern "C" __attribute__((visibility("default")))

struct Add {
    int* data;
    int count;
    int by;
};

EXPORT size_t simulated_parameter_bytes(char const* entry) {
    return strcmp(entry, "add") && strcmp(entry, "fails") ? 0 : sizeof(Add);
}

EXPORT char const* simulate_launch(char const* entry, unsigned const grid[3], unsigned const block[3],
                                   void const* parameters, unsigned) {
    if (strcmp(entry, "add"))
        return "deadlock, for instance";
    Add const p = *static_cast<Add const*>(parameters);
    for (unsigned i = 0; i < grid[0] * block[0]; i++)
        if (int(i) < p.count)
            p.data[i] += p.by;
    return nullptr;
}
