// ParkdetNMS for TensorRT 10 and 11: IPluginV3 over NmsCore, which holds all that can be decided without TensorRT.
#include <exception>
#include <utility>

#include "nms_core.h"
#include "nms_plugin.h"

using namespace nvinfer1;

namespace {
using parkdet::refuse;

PluginFieldType field_type(parkdet::FieldType type) {
    return type == parkdet::FieldType::kInt32 ? PluginFieldType::kINT32 : PluginFieldType::kFLOAT32;
}
DataType output_type(int32_t output) { return output == 0 || output == 3 ? DataType::kINT32 : DataType::kFLOAT; }

template <class Make>
IPluginV3* guarded(Make make) noexcept {  // no exception may reach TensorRT
    try {
        return make();
    } catch (std::exception const& error) {
        return refuse(std::string("ParkdetNMS: ") + error.what()), nullptr;
    }
}

parkdet::HeadShape shape_of(Dims const& dims) {  // all zeros, which no head has, unless there are five
    parkdet::HeadShape shape{};
    for (int d = 0; dims.nbDims == 5 && d < 5; ++d) shape[static_cast<std::size_t>(d)] = dims.d[d];
    return shape;
}

template <class Base>
struct Named : Base {
    char const* getPluginName() const noexcept override { return parkdet::kName; }
    char const* getPluginVersion() const noexcept override { return parkdet::kVersion; }
    char const* getPluginNamespace() const noexcept override { return parkdet::kNamespace; }
};

class NmsPlugin final : public IPluginV3, public Named<IPluginV3OneCore>, public IPluginV3OneBuild,
                        public IPluginV3OneRuntime {
public:
    explicit NmsPlugin(parkdet::NmsCore core) : core_(std::move(core)) {}

    IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override {
        if (type == PluginCapabilityType::kCORE) return static_cast<IPluginV3OneCore*>(this);
        if (type == PluginCapabilityType::kBUILD) return static_cast<IPluginV3OneBuild*>(this);
        return type == PluginCapabilityType::kRUNTIME ? static_cast<IPluginV3OneRuntime*>(this) : nullptr;
    }
    IPluginV3* clone() noexcept override { return guarded([this] { return new NmsPlugin(core_); }); }
    int32_t getNbOutputs() const noexcept override { return parkdet::kNumOutputs; }
    int32_t getOutputDataTypes(DataType* types, int32_t count, DataType const*, int32_t) const noexcept override {
        for (int32_t i = 0; i < count; ++i) types[i] = output_type(i);
        return 0;
    }
    int32_t getOutputShapes(DimsExprs const* inputs, int32_t input_count, DimsExprs const*, int32_t, DimsExprs* outputs,
                            int32_t count, IExprBuilder& builder) noexcept override {
        if (input_count < 1 || inputs[0].nbDims != 5) return refuse("ParkdetNMS takes heads of five dimensions");
        for (int32_t i = 0; i < count; ++i) {
            int64_t dims[3];
            outputs[i].nbDims = core_.output_shape(i, 1, dims);
            outputs[i].d[0] = inputs[0].d[0];
            for (int32_t d = 1; d < outputs[i].nbDims; ++d) outputs[i].d[d] = builder.constant(dims[d]);
        }
        return 0;
    }
    bool supportsFormatCombination(int32_t at, DynamicPluginTensorDesc const* all, int32_t inputs,
                                   int32_t) noexcept override {
        DataType const type = all[at].desc.type, first = all[0].desc.type;
        bool const fits = at < inputs ? type == first && (type == DataType::kHALF || type == DataType::kFLOAT)
                                      : type == output_type(at - inputs);
        return fits && all[at].desc.format == TensorFormat::kLINEAR;
    }
    int32_t configurePlugin(DynamicPluginTensorDesc const* inputs, int32_t count, DynamicPluginTensorDesc const*,
                            int32_t) noexcept override {
        return take_shapes(count, [inputs](int32_t i) { return inputs[i].max; });
    }
    size_t getWorkspaceSize(DynamicPluginTensorDesc const* inputs, int32_t, DynamicPluginTensorDesc const*,
                            int32_t) const noexcept override { return core_.workspace(inputs[0].max.d[0]); }
    int32_t onShapeChange(PluginTensorDesc const* inputs, int32_t count, PluginTensorDesc const*,
                          int32_t) noexcept override {
        return take_shapes(count, [inputs](int32_t i) { return inputs[i].dims; });
    }
    int32_t enqueue(PluginTensorDesc const* inputs, PluginTensorDesc const*, void const* const* heads,
                    void* const* outputs, void* workspace, cudaStream_t stream) noexcept override {
        parkdet::NmsOutputs const to{static_cast<int*>(outputs[0]), static_cast<float*>(outputs[1]),
                                     static_cast<float*>(outputs[2]), static_cast<int*>(outputs[3])};
        auto const run = core_.parameters(shapes_, heads, inputs[0].type == DataType::kHALF, to, workspace);
        char const* const trouble = parkdet::launch_nms(run, stream);
        return trouble ? refuse(trouble) : 0;
    }
    IPluginV3* attachToContext(IPluginResourceContext*) noexcept override { return clone(); }
    PluginFieldCollection const* getFieldsToSerialize() noexcept override {
        fields_.clear();
        size_t n = 0;
        for (auto const& field : parkdet::kFields) {
            void const* const values = core_.values(field.name, &n);
            fields_.emplace_back(field.name, values, field_type(field.type), static_cast<int32_t>(n));
        }
        collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
        return &collection_;
    }

private:
    template <class DimsOf>
    int32_t take_shapes(int32_t count, DimsOf dims_of) {
        shapes_.clear();
        for (int32_t i = 0; i < count; ++i) shapes_.push_back(shape_of(dims_of(i)));
        return core_.accepts(shapes_) ? 0 : refuse(core_.error);
    }
    parkdet::NmsCore core_;
    std::vector<parkdet::HeadShape> shapes_;
    std::vector<PluginField> fields_;
    PluginFieldCollection collection_{};
};

class NmsCreator final : public Named<IPluginCreatorV3One> {
public:
    NmsCreator() {
        for (auto const& field : parkdet::kFields) fields_.emplace_back(field.name, nullptr, field_type(field.type), 1);
        collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
    }
    PluginFieldCollection const* getFieldNames() noexcept override { return &collection_; }
    IPluginV3* createPlugin(char const*, PluginFieldCollection const* given, TensorRTPhase) noexcept override {
        return guarded([given]() -> IPluginV3* {
            parkdet::NmsCore core;
            bool sound = true;
            for (int32_t i = 0; sound && i < given->nbFields; ++i) {
                PluginField const& field = given->fields[i];
                auto const type = field.type == PluginFieldType::kINT32     ? parkdet::FieldType::kInt32
                                  : field.type == PluginFieldType::kFLOAT32 ? parkdet::FieldType::kFloat32
                                                                            : parkdet::FieldType::kOther;
                sound = core.set(field.name, type, field.data, static_cast<size_t>(field.length));
            }
            return sound && core.complete() ? new NmsPlugin(std::move(core)) : (refuse(core.error), nullptr);
        });
    }

private:
    std::vector<PluginField> fields_;
    PluginFieldCollection collection_{};
};
}  // namespace

IPluginCreatorV3One& parkdet::nms_creator() {
    static NmsCreator creator;
    return creator;
}
