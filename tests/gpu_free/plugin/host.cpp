// A host that takes the plugin library through what TensorRT does with one: find the creator, create from fields,
// ask for outputs and formats, configure, clone, serialise by fields, create again for running, change shapes, enqueue.
// It works on host memory: the library's kernels are compiled for the CPU.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <deque>
#include <string>
#include <vector>

using namespace nvinfer1;

namespace {

#define DEMAND(condition, ...)              \
    do {                                    \
        if (!(condition)) {                 \
            snprintf(message, sizeof message, __VA_ARGS__); \
            return message;                 \
        }                                   \
    } while (0)
char message[512];
std::string said;

class Logger final : public ILogger {
    void log(Severity severity, char const* text) noexcept override {
        if (severity <= Severity::kERROR) said += std::string(text) + "\n";
    }
} logger;
class Finder final : public ILoggerFinder {
    ILogger* findLogger() override { return &logger; }
} finder;

// What TensorRT hands to getOutputShapes: values that the plugin may pass on and combine but, where they are dynamic, not read.
struct Expression final : IDimensionExpr {
    int64_t value;
    bool constant;
    struct Reader final : apiv::VDimensionExpr {
        Expression* owner;
        explicit Reader(Expression* of) : owner(of) {}
        bool isConstant() const override { return owner->constant; }
        int64_t getConstantValue() const override { return owner->constant ? owner->value : -(int64_t(1) << 62); }
        bool isSizeTensor() const override { return false; }
    } reader;
    Expression(int64_t v, bool c) : value(v), constant(c), reader(this) { mImpl = &reader; }
    ~Expression() noexcept override = default;
};
struct Expressions final : IExprBuilder {
    std::deque<Expression> made;
    struct Maker final : apiv::VExprBuilder {
        Expressions* owner;
        explicit Maker(Expressions* of) : owner(of) {}
        IDimensionExpr const* constant(int64_t value) override { return owner->make(value, true); }
        IDimensionExpr const* operation(DimensionOperation, IDimensionExpr const& a, IDimensionExpr const&) override { return &a; }
        IDimensionExpr const* declareSizeTensor(int32_t, IDimensionExpr const& opt, IDimensionExpr const&) override { return &opt; }
    } maker;
    Expressions() : maker(this) { mImpl = &maker; }
    ~Expressions() noexcept override = default;
    IDimensionExpr const* make(int64_t value, bool constant) { return &made.emplace_back(value, constant); }
};

template <class Capability>
Capability* capability(IPluginV3* plugin, PluginCapabilityType type) {
    return static_cast<Capability*>(plugin->getCapabilityInterface(type));
}

Dims read(DimsExprs const& from, int64_t batch) {
    Dims dims{};
    dims.nbDims = from.nbDims;
    for (int d = 0; d < from.nbDims; ++d) {
        auto const* const expression = static_cast<Expression const*>(from.d[d]);
        dims.d[d] = expression->constant ? expression->value : batch;
    }
    return dims;
}

// An engine's copy of the fields: their memory is its own, as after reading a file.
struct Stored {
    std::deque<std::string> names, data;
    std::vector<PluginField> fields;
    explicit Stored(PluginFieldCollection const& from) {
        for (int32_t i = 0; i < from.nbFields; ++i) {
            PluginField const& field = from.fields[i];
            names.emplace_back(field.name);
            data.emplace_back(static_cast<char const*>(field.data), 4 * static_cast<size_t>(field.length));
            fields.emplace_back(names.back().c_str(), data.back().data(), field.type, field.length);
        }
    }
};

} // namespace

extern "C" __attribute__((visibility("default"))) char const* host_said() { return said.c_str(); }

// Null when all went well, else what the plugin did wrong. `dims`: five a head, the batch first; `most` is the largest
// batch of the engine, `batch` that of the run.
extern "C" __attribute__((visibility("default"))) char const*
host_run(char const* library, char const* const* names, int const* types, void const* const* values, int const* lengths,
         int field_count, int64_t const* dims, int heads, int half, int64_t most, int64_t batch, void const* const* raw,
         void* const* outputs, size_t* workspace_bytes) {
    said.clear();
    void* const handle = dlopen(library, RTLD_NOW | RTLD_LOCAL);
    DEMAND(handle, "dlopen: %s", dlerror());
    auto const get = reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(handle, "getCreators"));
    auto const set_finder = reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(handle, "setLoggerFinder"));
    DEMAND(get && set_finder, "getCreators or setLoggerFinder is missing");
    set_finder(&finder);
    int32_t creators = 0;
    IPluginCreatorInterface* const* const list = get(creators);
    DEMAND(creators == 1 && list, "%d creators", creators);
    InterfaceInfo const info = list[0]->getInterfaceInfo();
    DEMAND(!strcmp(info.kind, "PLUGIN CREATOR_V3ONE"), "creator is a %s", info.kind);
    auto* const creator = static_cast<IPluginCreatorV3One*>(list[0]);
    DEMAND(!strcmp(creator->getPluginName(), "ParkdetNMS") && !strcmp(creator->getPluginVersion(), "1") &&
               !strcmp(creator->getPluginNamespace(), "parkdet"), "name, version or namespace differ");

    // The parser gives the attributes that the creator names, of the types it names.
    PluginFieldCollection const* const declared = creator->getFieldNames();
    std::vector<PluginField> fields;
    for (int i = 0; i < field_count; ++i) {
        bool known = false;
        for (int32_t j = 0; j < declared->nbFields; ++j)
            known |= !strcmp(declared->fields[j].name, names[i]) && int(declared->fields[j].type) == types[i];
        DEMAND(known, "field %s of type %d is not declared", names[i], types[i]);
        fields.emplace_back(names[i], values[i], PluginFieldType(types[i]), lengths[i]);
    }
    PluginFieldCollection const given{field_count, fields.data()};
    IPluginV3* const built = creator->createPlugin("nms", &given, TensorRTPhase::kBUILD);
    DEMAND(built, "createPlugin refused: %s", said.c_str());

    // Building.
    auto* const core = capability<IPluginV3OneCore>(built, PluginCapabilityType::kCORE);
    auto* const build = capability<IPluginV3OneBuild>(built, PluginCapabilityType::kBUILD);
    DEMAND(core && build && capability<IPluginV3OneRuntime>(built, PluginCapabilityType::kRUNTIME), "a capability is missing");
    DEMAND(!strcmp(core->getPluginName(), "ParkdetNMS") && !strcmp(core->getPluginVersion(), "1") &&
               !strcmp(core->getPluginNamespace(), "parkdet"), "core's name, version or namespace");
    DEMAND(build->getNbOutputs() == 4, "%d outputs", build->getNbOutputs());
    DataType const input_type = half ? DataType::kHALF : DataType::kFLOAT;
    std::vector<DataType> input_types(size_t(heads), input_type), output_types(4);
    DEMAND(build->getOutputDataTypes(output_types.data(), 4, input_types.data(), heads) == 0, "getOutputDataTypes");
    Expressions builder;
    std::vector<DimsExprs> input_shapes(static_cast<size_t>(heads)), output_shapes(4);
    for (int head = 0; head < heads; ++head) {
        input_shapes[size_t(head)].nbDims = 5;
        for (int d = 0; d < 5; ++d) input_shapes[size_t(head)].d[d] = builder.make(dims[5 * head + d], d != 0);
    }
    DEMAND(build->getOutputShapes(input_shapes.data(), heads, nullptr, 0, output_shapes.data(), 4, builder) == 0, "getOutputShapes");
    DataType const right_types[]{DataType::kINT32, DataType::kFLOAT, DataType::kFLOAT, DataType::kINT32};
    int const right_ranks[]{2, 3, 2, 2};
    for (size_t i = 0; i < 4; ++i) {
        DEMAND(output_types[i] == right_types[i], "output %zu has type %d", i, int(output_types[i]));
        DEMAND(output_shapes[i].nbDims == right_ranks[i], "output %zu has %d dimensions", i, output_shapes[i].nbDims);
        DEMAND(output_shapes[i].d[0] == input_shapes[0].d[0], "output %zu has not the batch of the heads", i);
        for (int d = 1; d < output_shapes[i].nbDims; ++d)
            DEMAND(output_shapes[i].d[d]->isConstant(), "output %zu has a dynamic side", i);
    }
    std::vector<DynamicPluginTensorDesc> dynamic;
    for (int i = 0; i < heads + 4; ++i) {
        DynamicPluginTensorDesc desc{};
        bool const input = i < heads;
        DimsExprs const& shape = input ? input_shapes[size_t(i)] : output_shapes[size_t(i - heads)];
        desc.desc = {read(shape, -1), input ? input_type : output_types[size_t(i - heads)], TensorFormat::kLINEAR, 1.f};
        desc.min = read(shape, 1);
        desc.opt = desc.max = read(shape, most);
        dynamic.push_back(desc);
    }
    for (int at = 0; at < heads + 4; ++at) {
        DEMAND(build->supportsFormatCombination(at, dynamic.data(), heads, 4), "refuses its own format at %d", at);
        for (auto const format : {TensorFormat::kCHW32, TensorFormat::kHWC8, TensorFormat::kCHW2}) {
            auto other = dynamic;
            other[size_t(at)].desc.format = format;
            DEMAND(!build->supportsFormatCombination(at, other.data(), heads, 4), "accepts another format at %d", at);
        }
        for (auto const type : {DataType::kINT8, DataType::kINT32, DataType::kHALF, DataType::kFLOAT, DataType::kBF16}) {
            auto other = dynamic;
            other[size_t(at)].desc.type = type;
            bool const right = type == dynamic[size_t(at)].desc.type ||
                               (at == 0 && (type == DataType::kHALF || type == DataType::kFLOAT));
            DEMAND(build->supportsFormatCombination(at, other.data(), heads, 4) == right, "type %d at %d", int(type), at);
        }
    }
    if (build->configurePlugin(dynamic.data(), heads, dynamic.data() + heads, 4)) return snprintf(message, sizeof message, "configurePlugin refused: %s", said.c_str()), message;
    size_t const needed = build->getWorkspaceSize(dynamic.data(), heads, dynamic.data() + heads, 4);
    IPluginV3* const twin = built->clone();
    DEMAND(twin && twin != built, "clone");

    // Serialising, and reading it again when the builder's plugin is gone.
    PluginFieldCollection const* const written = capability<IPluginV3OneRuntime>(twin, PluginCapabilityType::kRUNTIME)->getFieldsToSerialize();
    DEMAND(written && written->nbFields == declared->nbFields, "getFieldsToSerialize");
    Stored const stored(*written);
    delete built;
    delete twin;
    PluginFieldCollection const read_back{int32_t(stored.fields.size()), stored.fields.data()};
    IPluginV3* const plugin = creator->createPlugin("nms", &read_back, TensorRTPhase::kRUNTIME);
    DEMAND(plugin, "createPlugin at run time refused: %s", said.c_str());
    IPluginV3* const attached = capability<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME)->attachToContext(nullptr);
    DEMAND(attached && attached != plugin, "attachToContext");
    auto* const runtime = capability<IPluginV3OneRuntime>(attached, PluginCapabilityType::kRUNTIME);

    // Running, first with the largest batch's shapes, then with this one's.
    std::vector<PluginTensorDesc> now;
    std::vector<char> memory(needed + 256);
    char* const workspace = memory.data() + (256 - reinterpret_cast<uintptr_t>(memory.data()) % 256) % 256;
    memset(workspace, 0xCD, needed);
    for (int64_t const size : {most, batch}) {
        now.clear();
        for (int i = 0; i < heads + 4; ++i) {
            PluginTensorDesc desc = dynamic[size_t(i)].desc;
            desc.dims.d[0] = size;
            now.push_back(desc);
        }
        DEMAND(runtime->onShapeChange(now.data(), heads, now.data() + heads, 4) == 0, "onShapeChange");
    }
    DEMAND(runtime->enqueue(now.data(), now.data() + heads, raw, outputs, workspace, nullptr) == 0, "enqueue: %s", said.c_str());
    for (char const* at = workspace + needed; at < memory.data() + memory.size(); ++at) DEMAND(*at == 0, "wrote past its workspace");
    *workspace_bytes = needed;
    delete attached;
    delete plugin;
    return nullptr;
}
