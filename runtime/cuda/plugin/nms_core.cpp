#include "nms_core.h"

#include <cstring>

namespace parkdet {

const std::vector<Field> kFields = {
    {"conf", FieldType::kFloat32, false},          {"iou", FieldType::kFloat32, false},
    {"max_det", FieldType::kInt32, false},         {"max_candidates", FieldType::kInt32, false},
    {"multi_label", FieldType::kInt32, false},     {"agnostic", FieldType::kInt32, false},
    {"num_classes", FieldType::kInt32, false},     {"strides", FieldType::kInt32, true},
    {"anchors", FieldType::kFloat32, true},        {"view_scales", FieldType::kFloat32, true},
    {"view_flips", FieldType::kInt32, true},
};

namespace {

template <class Value>
void assign(std::vector<Value>& list, const void* data, std::size_t count) {
    const Value* values = static_cast<const Value*>(data);
    list.assign(values, values + count);
}

}  // namespace

bool NmsCore::fail(const std::string& what) {
    error = "ParkdetNMS: " + what;
    return false;
}

bool NmsCore::set(const char* name, FieldType type, const void* data, std::size_t count) {
    const Field* field = nullptr;
    for (const Field& known : kFields)
        if (!std::strcmp(known.name, name)) field = &known;
    if (!field) return fail(std::string("field '") + name + "' is not one of version 1");
    if (field->type != type) return fail(std::string("field '") + name + "' has another type than version 1's");
    if (!field->is_list && count != 1)
        return fail(std::string("field '") + name + "' has " + std::to_string(count) + " values");
    if (count && !data) return fail(std::string("field '") + name + "' has no data");
    const std::string which = name;
    if (which == "strides") assign(strides_, data, count);
    else if (which == "view_flips") assign(view_flips_, data, count);
    else if (which == "anchors") assign(anchors_, data, count);
    else if (which == "view_scales") assign(view_scales_, data, count);
    else if (type == FieldType::kFloat32) std::memcpy(which == "conf" ? &conf_ : &iou_, data, sizeof(float));
    else {
        std::int32_t* target = which == "max_det"          ? &max_det_
                               : which == "max_candidates" ? &max_candidates_
                               : which == "multi_label"    ? &multi_label_
                               : which == "agnostic"       ? &agnostic_
                                                           : &num_classes_;
        std::memcpy(target, data, sizeof(std::int32_t));
    }
    return true;
}

const void* NmsCore::values(const char* name, std::size_t* count) const {
    const std::string which = name;
    *count = 1;
    if (which == "conf") return &conf_;
    if (which == "iou") return &iou_;
    if (which == "max_det") return &max_det_;
    if (which == "max_candidates") return &max_candidates_;
    if (which == "multi_label") return &multi_label_;
    if (which == "agnostic") return &agnostic_;
    if (which == "num_classes") return &num_classes_;
    if (which == "strides") return *count = strides_.size(), strides_.data();
    if (which == "view_flips") return *count = view_flips_.size(), view_flips_.data();
    if (which == "anchors") return *count = anchors_.size(), anchors_.data();
    if (which == "view_scales") return *count = view_scales_.size(), view_scales_.data();
    *count = 0;
    return nullptr;
}

int NmsCore::anchors_per_cell() const { return static_cast<int>(anchors_.size() / (2 * strides_.size())); }

bool NmsCore::complete() {
    const std::size_t heads = strides_.size();
    if (heads < 1 || heads > kMaxHeads)
        return fail("strides names " + std::to_string(heads) + " heads; 1 to " + std::to_string(kMaxHeads) + " can be");
    if (view_scales_.size() != heads || view_flips_.size() != heads)
        return fail("view_scales and view_flips must have a value for each of " + std::to_string(heads) + " heads");
    if (anchors_.empty() || anchors_.size() % (2 * heads) || anchors_per_cell() > kMaxAnchors)
        return fail("anchors has " + std::to_string(anchors_.size()) + " values for " + std::to_string(heads) + " heads");
    if (num_classes_ < 1 || max_det_ < 1 || max_candidates_ < 1)
        return fail("num_classes, max_det and max_candidates must be at least 1");
    if (!(conf_ >= 0 && conf_ <= 1 && iou_ >= 0 && iou_ <= 1)) return fail("conf and iou must be from 0 to 1");
    for (std::size_t head = 0; head < heads; ++head)
        if (strides_[head] < 1 || !(view_scales_[head] > 0)) return fail("strides and view_scales must be positive");
    return true;
}

int NmsCore::output_shape(int index, std::int64_t batch, std::int64_t* dims) const {
    if (index < 0 || index >= kNumOutputs) return 0;
    dims[0] = batch;
    dims[1] = index == 0 ? 1 : max_det_;
    dims[2] = 4;
    return index == 1 ? 3 : 2;
}

bool NmsCore::accepts(const std::vector<HeadShape>& shapes) {
    const std::size_t heads = shapes.size();
    if (heads != strides_.size())
        return fail(std::to_string(heads) + " inputs, but the fields are of " + std::to_string(strides_.size()) + " heads");
    std::int64_t anchors = 0;
    for (std::size_t head = 0; head < heads; ++head) {
        const HeadShape& shape = shapes[head];
        if (shape[0] != shapes[0][0] || shape[1] != anchors_per_cell() || shape[4] != 5 + num_classes_ || shape[2] < 1 ||
            shape[3] < 1)
            return fail("input " + std::to_string(head) + " is no head of (batch, " + std::to_string(anchors_per_cell()) +
                        ", rows, columns, " + std::to_string(5 + num_classes_) + ")");
        anchors += shape[1] * shape[2] * shape[3];
    }
    if (anchors * num_classes_ >= (std::int64_t(1) << 31)) return fail("there are too many anchors and classes to number");
    return true;
}

std::size_t NmsCore::workspace(std::int64_t batch) const {
    const std::size_t images = static_cast<std::size_t>(batch);
    return workspace_bytes(images, static_cast<std::size_t>(max_candidates_)) + 2 * aligned(images * sizeof(int));
}

NmsParameters NmsCore::parameters(const std::vector<HeadShape>& shapes, const void* const* heads, bool half,
                                  const NmsOutputs& outputs, void* workspace) const {
    NmsParameters p{};
    for (std::size_t head = 0; head < strides_.size(); ++head) {
        const HeadShape& shape = shapes[head];
        add_head(p, static_cast<int>(shape[1]), static_cast<int>(shape[2]), static_cast<int>(shape[3]),
                 static_cast<float>(strides_[head]), view_scales_[head], view_flips_[head] != 0,
                 &anchors_[2 * head * static_cast<std::size_t>(anchors_per_cell())]);
        p.heads[head].raw = heads[head];
    }
    p.num_classes = num_classes_;
    p.batch = static_cast<int>(shapes[0][0]);
    p.half_heads = half;
    p.max_det = max_det_;
    p.max_candidates = max_candidates_;
    p.multi_label = multi_label_;
    p.agnostic = agnostic_;
    p.conf = conf_;
    p.iou = iou_;
    p.logit_floor = logit_floor(conf_);
    p.num_dets = outputs.num_dets;
    p.boxes = reinterpret_cast<Box*>(outputs.boxes);
    p.scores = outputs.scores;
    p.classes = outputs.classes;
    bind_workspace(p, workspace);
    const std::size_t images = static_cast<std::size_t>(p.batch);
    char* counts = static_cast<char*>(workspace) + workspace_bytes(images, static_cast<std::size_t>(max_candidates_));
    p.candidates = reinterpret_cast<int*>(counts);
    p.at_max_det = reinterpret_cast<int*>(counts + aligned(images * sizeof(int)));
    return p;
}

}  // namespace parkdet
