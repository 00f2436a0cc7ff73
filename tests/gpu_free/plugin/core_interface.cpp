// NmsCore behind a C interface, for Python.
#include <cstring>

#include "plugin/nms_core.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

using parkdet::FieldType;
using parkdet::HeadShape;
using parkdet::NmsCore;

namespace {

std::vector<HeadShape> shapes_of(const int64_t* dims, size_t heads) {
    std::vector<HeadShape> shapes(heads);
    for (size_t head = 0; head < heads; ++head)
        for (size_t d = 0; d < 5; ++d) shapes[head][d] = dims[5 * head + d];
    return shapes;
}

}  // namespace

EXPORT NmsCore* core_make() { return new NmsCore; }
EXPORT void core_drop(NmsCore* core) { delete core; }
EXPORT NmsCore* core_copy(const NmsCore* core) { return new NmsCore(*core); }
EXPORT const char* core_error(const NmsCore* core) { return core->error.c_str(); }
EXPORT bool core_set(NmsCore* core, const char* name, int whole, const void* data, size_t count) {
    return core->set(name, whole == 2 ? FieldType::kOther : whole ? FieldType::kInt32 : FieldType::kFloat32, data, count);
}
EXPORT bool core_complete(NmsCore* core) { return core->complete(); }
EXPORT const char* core_field(size_t index, int* whole, int* is_list) {
    if (index >= parkdet::kFields.size()) return nullptr;
    *whole = parkdet::kFields[index].type == FieldType::kInt32;
    *is_list = parkdet::kFields[index].is_list;
    return parkdet::kFields[index].name;
}
EXPORT const void* core_values(const NmsCore* core, const char* name, size_t* count) { return core->values(name, count); }
EXPORT int core_output_shape(const NmsCore* core, int output, int64_t batch, int64_t* dims) {
    return core->output_shape(output, batch, dims);
}
EXPORT bool core_accepts(NmsCore* core, const int64_t* dims, size_t heads) { return core->accepts(shapes_of(dims, heads)); }
EXPORT size_t core_workspace(const NmsCore* core, int64_t batch) { return core->workspace(batch); }
EXPORT const char* core_run(const NmsCore* core, const int64_t* dims, size_t heads, const void* const* raw, int half,
                            void* const* outputs, void* workspace) {
    const parkdet::NmsOutputs to{static_cast<int*>(outputs[0]), static_cast<float*>(outputs[1]),
                                 static_cast<float*>(outputs[2]), static_cast<int*>(outputs[3])};
    return parkdet::launch_nms(core->parameters(shapes_of(dims, heads), raw, half != 0, to, workspace), nullptr);
}
