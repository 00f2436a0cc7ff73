// What the NMS plugin does, without TensorRT: settings from named fields, shapes, workspace, launches. `nms_plugin.cpp`
// is the adapter to TensorRT; tests drive this part on the CPU.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "../plan.h"

namespace parkdet {

enum class FieldType { kFloat32, kInt32, kOther };

// A named attribute of the ONNX node, as the host hands it over.
struct Field {
    const char* name;
    FieldType type;
    bool is_list;  // per head, else one value
};

// The fields of version 1, in the order in which they are written.
extern const std::vector<Field> kFields;

// Where the outputs of the plugin go, on the device.
struct NmsOutputs {
    int* num_dets;   // (batch, 1)
    float* boxes;    // (batch, max_det, 4)
    float* scores;   // (batch, max_det)
    int* classes;    // (batch, max_det), -1 in unused slots
};

constexpr int kNumOutputs = 4;

using HeadShape = std::array<std::int64_t, 5>;  // (batch, anchors, rows, columns, 5 + num_classes)

class NmsCore {
public:
    // Set one field; `count` values of its type. False, with `error`, for a name or a type that is not known.
    bool set(const char* name, FieldType type, const void* data, std::size_t count);
    // Whether the fields make sense together; `error` says what does not.
    bool complete();
    // Values of a field, as they were set or by default, for writing. They live as long as this object.
    const void* values(const char* name, std::size_t* count) const;

    // Shape of output `index` for a batch, in `dims` (room for three); returns how many dimensions, 0 for no output.
    int output_shape(int index, std::int64_t batch, std::int64_t* dims) const;
    // Whether heads of these shapes fit the fields; `error` says why not.
    bool accepts(const std::vector<HeadShape>& shapes);
    std::size_t workspace(std::int64_t batch) const;

    // Parameters of one run; `heads` are device pointers. Nothing is launched.
    NmsParameters parameters(const std::vector<HeadShape>& shapes, const void* const* heads, bool half,
                             const NmsOutputs& outputs, void* workspace) const;

    std::string error;

private:
    float conf_ = 0.01f, iou_ = 0.7f;
    std::int32_t max_det_ = 50, max_candidates_ = 30000, multi_label_ = 1, agnostic_ = 0, num_classes_ = 0;
    std::vector<std::int32_t> strides_, view_flips_;
    std::vector<float> anchors_, view_scales_;

    bool fail(const std::string& what);
    int anchors_per_cell() const;
};

// Puts every kernel of a run into the stream (a cudaStream_t). Null, or what went wrong. Where the kernels live:
// `launch.cu` on the GPU, a test's own on the CPU.
const char* launch_nms(const NmsParameters& parameters, void* stream);

}  // namespace parkdet
