// A libnvinfer and libnvonnxparser for the real Python bindings: it reads a graph's inputs and outputs, "builds" a plan
// that is the graph, and hands a run to whoever asked for runs. All else of TensorRT's interfaces aborts by name.
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "unsimulated.h"

using namespace nvinfer1;
using namespace nvinfer1::apiv;

#define EXPORT extern "C" __attribute__((visibility("default")))

void not_simulated(char const* method) {
    fprintf(stderr, "simulated TensorRT: %s is not simulated\n", method);
    abort();
}

namespace {

// What tests set and read ----------------------------------------------------------------------------------------

using Run = int (*)(char const* graph, size_t bytes, int64_t const* images, void* stream, char const* names,
                    void* const* addresses, void* scratch, int64_t scratch_bytes);
Run run_with = nullptr;
std::mutex state;
std::string refused, calls;
constexpr int64_t kScratch = 1000;  // bytes of activations an image

// Notes a call with what it was given, and says whether it is to answer no; then the log has its reason.
template <typename... Given>
bool refuses(ILogger* logger, char const* method, Given const&... given) {
    std::ostringstream line;
    line << method;
    ((line << ' ' << given), ...);
    {
        std::lock_guard<std::mutex> const held(state);
        calls += line.str() + '\n';
        if (refused != method) return false;
    }
    if (logger) logger->log(ILogger::Severity::kERROR, (std::string(method) + " was made to fail").c_str());
    return true;
}

std::string shown(Dims const& dims) {
    std::string text;
    for (int i = 0; i < dims.nbDims; ++i) text += (i ? "x" : "") + std::to_string(dims.d[i]);
    return text;
}

// Tensors, and the part of an ONNX file that has them ------------------------------------------------------------

struct Described {
    std::string name;
    DataType type = DataType::kFLOAT;
    Dims dims{};
};

struct Description {
    std::vector<Described> inputs, outputs;
    Described const* find(char const* name) const {
        for (auto const* side : {&inputs, &outputs})
            for (auto const& tensor : *side)
                if (tensor.name == name) return &tensor;
        return nullptr;
    }
};

// Protocol buffers' wire format: fields of a message one by one. A length-delimited one is itself a message or text.
struct Message {
    uint8_t const* at;
    uint8_t const* end;
    bool sound = true;

    uint64_t varint() {
        uint64_t value = 0;
        for (int shift = 0; at < end && shift < 64; shift += 7) {
            value |= uint64_t(*at & 0x7F) << shift;
            if (!(*at++ & 0x80)) return value;
        }
        sound = false;
        return 0;
    }
    bool next(int& field, uint64_t& value, Message& inner) {
        if (at >= end || !sound) return false;
        uint64_t const key = varint();
        field = int(key >> 3);
        uint64_t size = 0;
        switch (key & 7) {
        case 0: value = varint(); return sound;
        case 1: size = 8; break;
        case 2: size = varint(); break;
        case 5: size = 4; break;
        default: sound = false;
        }
        if (!sound || size > uint64_t(end - at)) return sound = false;
        inner = {at, at + size};
        at += size;
        return true;
    }
    std::string text() const { return {reinterpret_cast<char const*>(at), size_t(end - at)}; }
};

bool read_tensor(Message info, Described& tensor) {
    int field;
    uint64_t value = 0, elements = 0;
    Message inner{}, type{}, shape{}, dim{};
    while (info.next(field, value, inner)) {
        if (field == 1) tensor.name = inner.text();
        if (field != 2) continue;
        while (inner.next(field, value, type)) {
            if (field != 1) continue;
            while (type.next(field, value, shape)) {
                if (field == 1) elements = value;
                if (field != 2) continue;
                while (shape.next(field, value, dim)) {
                    int64_t side = -1;
                    Message unused{};
                    while (dim.next(field, value, unused))
                        if (field == 1) side = int64_t(value);
                    if (tensor.dims.nbDims == Dims::MAX_DIMS) return false;
                    tensor.dims.d[tensor.dims.nbDims++] = side;
                }
            }
        }
    }
    std::map<uint64_t, DataType> const types{{1, DataType::kFLOAT}, {2, DataType::kUINT8}, {6, DataType::kINT32},
                                             {7, DataType::kINT64}, {10, DataType::kHALF}};
    auto const found = types.find(elements);
    if (found == types.end()) return false;
    tensor.type = found->second;
    return info.sound && !tensor.name.empty();
}

bool read_graph(void const* data, size_t size, Description& description) {
    Message model{static_cast<uint8_t const*>(data), static_cast<uint8_t const*>(data) + size};
    Message graph{}, info{};
    int field;
    uint64_t value;
    while (model.next(field, value, graph))
        if (field == 7)
            while (graph.next(field, value, info))
                if (field == 11 || field == 12) {
                    auto& side = field == 11 ? description.inputs : description.outputs;
                    side.emplace_back();
                    if (!read_tensor(info, side.back())) return false;
                }
    return model.sound && !description.inputs.empty() && !description.outputs.empty();
}

// Building -------------------------------------------------------------------------------------------------------

struct HostMemory final : IHostMemory, UnsimulatedVHostMemory {
    std::string content;
    explicit HostMemory(std::string text) : content(std::move(text)) { mImpl = this; }
    void* data() const noexcept override { return const_cast<char*>(content.data()); }
    std::size_t size() const noexcept override { return content.size(); }
    DataType type() const noexcept override { return DataType::kINT8; }
};

struct Tensor final : ITensor, UnsimulatedVTensor {
    Described const about;
    explicit Tensor(Described tensor) : about(std::move(tensor)) { mImpl = this; }
    char const* getName() const noexcept override { return about.name.c_str(); }
    Dims getDimensions() const noexcept override { return about.dims; }
    DataType getType() const noexcept override { return about.type; }
};

struct Network final : INetworkDefinition, UnsimulatedVNetworkDefinition {
    std::vector<std::unique_ptr<Tensor>> inputs, outputs;
    std::string graph;
    Network() { mImpl = this; }
    int32_t getNbInputs() const noexcept override { return int32_t(inputs.size()); }
    ITensor* getInput(int32_t index) const noexcept override { return inputs[size_t(index)].get(); }
    int32_t getNbOutputs() const noexcept override { return int32_t(outputs.size()); }
    ITensor* getOutput(int32_t index) const noexcept override { return outputs[size_t(index)].get(); }
};

struct Profile final : IOptimizationProfile, UnsimulatedVOptimizationProfile {
    ILogger* logger;
    std::map<std::string, std::map<OptProfileSelector, Dims>> shapes;
    explicit Profile(ILogger* to) : logger(to) { mImpl = this; }
    bool setDimensions(char const* name, OptProfileSelector select, Dims const& dims) noexcept override {
        shapes[name][select] = dims;
        return !refuses(logger, "setDimensions", name, int(select), shown(dims));
    }
};

struct TimingCache final : ITimingCache, UnsimulatedVTimingCache {
    ILogger* logger;
    std::string content;
    TimingCache(ILogger* to, std::string text) : logger(to), content(std::move(text)) { mImpl = this; }
    IHostMemory* serialize() const noexcept override {
        return refuses(logger, "serialize") ? nullptr : new HostMemory(content + "timed;");
    }
};

struct Config final : IBuilderConfig, UnsimulatedVBuilderConfig {
    ILogger* logger;
    Profile const* profile = nullptr;
    TimingCache const* timings = nullptr;
    IProgressMonitor* monitor = nullptr;
    std::size_t workspace = 0;
    int32_t level = 3;
    HardwareCompatibilityLevel hardware = HardwareCompatibilityLevel::kNONE;
    explicit Config(ILogger* to) : logger(to) { mImpl = this; }
    int32_t addOptimizationProfile(IOptimizationProfile const* added) noexcept override {
        profile = static_cast<Profile const*>(added);
        return refuses(logger, "addOptimizationProfile") ? -1 : 0;
    }
    ITimingCache* createTimingCache(void const* blob, std::size_t size) const noexcept override {
        if (refuses(logger, "createTimingCache", size)) return nullptr;
        return new TimingCache(logger, {static_cast<char const*>(blob), size});
    }
    bool setTimingCache(ITimingCache const& cache, bool ignore_mismatch) noexcept override {
        timings = static_cast<TimingCache const*>(&cache);
        return !refuses(logger, "setTimingCache", ignore_mismatch);
    }
    ITimingCache const* getTimingCache() const noexcept override {
        return refuses(logger, "getTimingCache") ? nullptr : timings;
    }
    void setMemoryPoolLimit(MemoryPoolType pool, std::size_t bytes) noexcept override {
        if (!refuses(logger, "setMemoryPoolLimit", int(pool), bytes)) workspace = bytes;
    }
    std::size_t getMemoryPoolLimit(MemoryPoolType) const noexcept override { return workspace; }
    void setBuilderOptimizationLevel(int32_t to) noexcept override {
        refuses(logger, "setBuilderOptimizationLevel", to);
        level = to;
    }
    int32_t getBuilderOptimizationLevel() const noexcept override { return level; }
    void setHardwareCompatibilityLevel(HardwareCompatibilityLevel to) noexcept override {
        refuses(logger, "setHardwareCompatibilityLevel", int(to));
        hardware = to;
    }
    HardwareCompatibilityLevel getHardwareCompatibilityLevel() const noexcept override { return hardware; }
    void setProgressMonitor(IProgressMonitor* to) noexcept override { monitor = to; }
    IProgressMonitor* getProgressMonitor() const noexcept override { return monitor; }
};

struct Registry final : UnsimulatedIPluginRegistry {
    ILogger* logger = nullptr;
    std::vector<IPluginCreatorInterface*> creators;
    void* loadLibrary(AsciiChar const* path) noexcept override {
        if (refuses(logger, "loadLibrary", path)) return nullptr;
        void* const library = dlopen(path, RTLD_NOW);
        using Creators = IPluginCreatorInterface* const* (*)(int32_t&);
        auto const creators_of = library ? reinterpret_cast<Creators>(dlsym(library, "getCreators")) : nullptr;
        if (!creators_of) {
            logger->log(ILogger::Severity::kERROR, library ? "it has no getCreators" : dlerror());
            return nullptr;
        }
        int32_t count = 0;
        auto const* const found = creators_of(count);
        creators.assign(found, found + count);
        return library;
    }
    IPluginCreatorInterface* getCreator(AsciiChar const* const name, AsciiChar const* const version,
                                        AsciiChar const* const space) noexcept override {
        if (refuses(logger, "getCreator", name, version, space)) return nullptr;
        for (auto* const creator : creators) {
            auto* const one = static_cast<IPluginCreatorV3One*>(creator);
            if (!strcmp(one->getPluginName(), name) && !strcmp(one->getPluginVersion(), version) &&
                !strcmp(one->getPluginNamespace(), space))
                return creator;
        }
        return nullptr;
    }
} registry;

std::string const magic = "simulated plan\n";

struct Builder final : IBuilder, UnsimulatedVBuilder {
    ILogger* logger;
    explicit Builder(ILogger* to) : logger(to) { mImpl = this; }
    INetworkDefinition* createNetworkV2(NetworkDefinitionCreationFlags flags) noexcept override {
        return refuses(logger, "createNetworkV2", flags) ? nullptr : new Network;
    }
    IBuilderConfig* createBuilderConfig() noexcept override {
        return refuses(logger, "createBuilderConfig") ? nullptr : new Config(logger);
    }
    IOptimizationProfile* createOptimizationProfile() noexcept override {
        return refuses(logger, "createOptimizationProfile") ? nullptr : new Profile(logger);
    }
    IPluginRegistry& getPluginRegistry() noexcept override {
        registry.logger = logger;
        return registry;
    }
    IHostMemory* buildSerializedNetwork(INetworkDefinition& given, IBuilderConfig& how) noexcept override {
        auto& network = static_cast<Network&>(given);
        auto& config = static_cast<Config&>(how);
        bool stopped = false;
        // As TensorRT does it: the monitor is called from threads that are not the caller's.
        std::thread([&] {
            IProgressMonitor* const monitor = config.monitor;
            if (!monitor) return;
            monitor->phaseStart("Building Engine", nullptr, 3);
            monitor->phaseStart("Tactic Selection", "Building Engine", 2);
            for (int step = 0; step < 2 && !stopped; ++step) stopped = !monitor->stepComplete("Tactic Selection", step);
            monitor->phaseFinish("Tactic Selection");
            for (int step = 0; step < 3 && !stopped; ++step) stopped = !monitor->stepComplete("Building Engine", step);
            monitor->phaseFinish("Building Engine");
        }).join();
        if (refuses(logger, "buildSerializedNetwork") || stopped) return nullptr;
        logger->log(ILogger::Severity::kINFO, "built");
        std::ostringstream plan;
        plan << magic;
        for (auto const select : {OptProfileSelector::kMIN, OptProfileSelector::kOPT, OptProfileSelector::kMAX}) {
            Dims dims = network.inputs[0]->about.dims;
            if (config.profile) dims = config.profile->shapes.at(network.inputs[0]->about.name).at(select);
            for (int i = 0; i < 4; ++i) plan << dims.d[i] << ' ';
        }
        plan << '\n' << network.graph;
        return new HostMemory(plan.str());
    }
};

// The parser -----------------------------------------------------------------------------------------------------

struct ParserError final : nvonnxparser::UnsimulatedIParserError {
    std::string why;
    nvonnxparser::ErrorCode code() const override { return nvonnxparser::ErrorCode::kMODEL_DESERIALIZE_FAILED; }
    char const* desc() const override { return why.c_str(); }
    char const* nodeName() const override { return "node 7"; }
    char const* nodeOperator() const override { return "Frobnicate"; }
};

struct Parser final : nvonnxparser::UnsimulatedIParser {
    Network* network;
    ILogger* logger;
    ParserError error;
    int errors = 0;
    Parser(Network* into, ILogger* to) : network(into), logger(to) {}
    bool parse(void const* data, size_t size, char const*) noexcept override {
        Description description;
        if (!read_graph(data, size, description) || refuses(logger, "parse", size)) {
            error.why = "it is no graph that this parser reads";
            errors = 1;
            return false;
        }
        network->graph.assign(static_cast<char const*>(data), size);
        for (auto const& one : description.inputs) network->inputs.emplace_back(new Tensor(one));
        for (auto const& one : description.outputs) network->outputs.emplace_back(new Tensor(one));
        return true;
    }
    int getNbErrors() const noexcept override { return errors; }
    nvonnxparser::IParserError const* getError(int) const noexcept override { return &error; }
};

// Running --------------------------------------------------------------------------------------------------------

struct Engine final : ICudaEngine, UnsimulatedVCudaEngine {
    ILogger* logger;
    Description description;
    std::vector<std::string> names;  // outputs before inputs: TensorRT's order is its own
    std::map<OptProfileSelector, Dims> range;
    std::string graph;
    Engine(ILogger* to, std::string const& profile, std::string content) : logger(to), graph(std::move(content)) {
        mImpl = this;
        read_graph(graph.data(), graph.size(), description);
        for (auto const& one : description.outputs) names.insert(names.begin(), one.name);
        for (auto const& one : description.inputs) names.push_back(one.name);
        std::istringstream numbers(profile);
        for (auto const select : {OptProfileSelector::kMIN, OptProfileSelector::kOPT, OptProfileSelector::kMAX}) {
            range[select].nbDims = 4;
            for (int i = 0; i < 4; ++i) numbers >> range[select].d[i];
        }
    }
    bool isInput(char const* name) const { return description.inputs[0].name == name; }
    int32_t getNbIOTensors() const noexcept override { return int32_t(names.size()); }
    char const* getIOTensorName(int32_t index) const noexcept override { return names[size_t(index)].c_str(); }
    TensorIOMode getTensorIOMode(char const* name) const noexcept override {
        return isInput(name) ? TensorIOMode::kINPUT : TensorIOMode::kOUTPUT;
    }
    TensorLocation getTensorLocation(char const*) const noexcept override { return TensorLocation::kDEVICE; }
    DataType getTensorDataType(char const* name) const noexcept override { return description.find(name)->type; }
    Dims getTensorShape(char const* name) const noexcept override { return description.find(name)->dims; }
    Dims getProfileShape(char const*, int32_t, OptProfileSelector select) const noexcept override {
        return range.at(select);
    }
    int64_t getDeviceMemorySizeV2() const noexcept override {
        return kScratch * range.at(OptProfileSelector::kMAX).d[0];
    }
    IExecutionContext* createExecutionContext(ExecutionContextAllocationStrategy strategy) noexcept override;
};

struct Context final : IExecutionContext, UnsimulatedVExecutionContext {
    Engine* engine;
    Dims images{};
    std::map<std::string, void*> addresses;
    void* scratch = nullptr;
    int64_t scratch_bytes = 0;
    explicit Context(Engine* of) : engine(of) { mImpl = this; }
    ICudaEngine const& getEngine() const noexcept override { return *engine; }
    bool setInputShape(char const* name, Dims const& dims) noexcept override {
        if (refuses(engine->logger, "setInputShape", name, shown(dims))) return false;
        auto const &low = engine->range[OptProfileSelector::kMIN], &high = engine->range[OptProfileSelector::kMAX];
        for (int i = 0; i < 4; ++i)
            if (dims.nbDims != 4 || dims.d[i] < low.d[i] || dims.d[i] > high.d[i]) return false;
        images = dims;
        return true;
    }
    int32_t inferShapes(int32_t, char const** names) noexcept override {
        if (refuses(engine->logger, "inferShapes")) return -1;
        if (images.nbDims) return 0;
        names[0] = engine->description.inputs[0].name.c_str();
        return 1;
    }
    size_t updateDeviceMemorySizeForShapes() noexcept override {
        return refuses(engine->logger, "updateDeviceMemorySizeForShapes") ? 0 : size_t(kScratch * images.d[0]);
    }
    void setDeviceMemoryV2(void* memory, int64_t bytes) noexcept override {
        refuses(engine->logger, "setDeviceMemoryV2", bytes);
        scratch = memory;
        scratch_bytes = bytes;
    }
    Dims getTensorShape(char const* name) const noexcept override {
        if (engine->isInput(name)) return images;
        Dims dims = engine->description.find(name)->dims;
        if (dims.d[0] < 0) dims.d[0] = images.d[0];
        return dims;
    }
    bool setTensorAddress(char const* name, void* memory) noexcept override {
        if (refuses(engine->logger, "setTensorAddress", name)) return false;
        addresses[name] = memory;
        return true;
    }
    bool enqueueV3(cudaStream_t stream) noexcept override {
        if (refuses(engine->logger, "enqueueV3")) return false;
        std::string names;
        std::vector<void*> memory;
        for (auto const& name : engine->names) {
            auto const found = addresses.find(name);
            if (found == addresses.end()) return false;
            names += name + '\n';
            memory.push_back(found->second);
        }
        auto const& graph = engine->graph;
        return run_with && !run_with(graph.data(), graph.size(), images.d, stream, names.c_str(), memory.data(),
                                     scratch, scratch_bytes);
    }
};

IExecutionContext* Engine::createExecutionContext(ExecutionContextAllocationStrategy strategy) noexcept {
    return refuses(logger, "createExecutionContext", int(strategy)) ? nullptr : new Context(this);
}

struct Runtime final : IRuntime, UnsimulatedVRuntime {
    ILogger* logger;
    explicit Runtime(ILogger* to) : logger(to) { mImpl = this; }
    ICudaEngine* deserializeCudaEngine(void const* blob, std::size_t size) noexcept override {
        std::string const plan(static_cast<char const*>(blob), size);
        if (refuses(logger, "deserializeCudaEngine", size)) return nullptr;
        size_t const line = plan.find('\n', magic.size());
        if (plan.compare(0, magic.size(), magic) || line == std::string::npos) {
            logger->log(ILogger::Severity::kERROR, "IRuntime::deserializeCudaEngine: Error Code 1: Serialization");
            return nullptr;
        }
        return new Engine(logger, plan.substr(magic.size(), line - magic.size()), plan.substr(line + 1));
    }
};

}  // namespace

// What a test calls ----------------------------------------------------------------------------------------------

EXPORT void simulated_run_with(Run run) { run_with = run; }
EXPORT void simulated_refuse(char const* method) {
    std::lock_guard<std::mutex> const held(state);
    refused = method;
    calls.clear();
}
EXPORT char const* simulated_calls_made() {
    static std::string kept;
    std::lock_guard<std::mutex> const held(state);
    kept = calls;
    return kept.c_str();
}

// What the bindings load -----------------------------------------------------------------------------------------

EXPORT void* createInferBuilder_INTERNAL(void* logger, int32_t) noexcept {
    auto* const to = static_cast<ILogger*>(logger);
    return refuses(to, "createInferBuilder") ? nullptr : static_cast<IBuilder*>(new Builder(to));
}
EXPORT void* createInferRuntime_INTERNAL(void* logger, int32_t) noexcept {
    auto* const to = static_cast<ILogger*>(logger);
    return refuses(to, "createInferRuntime") ? nullptr : static_cast<IRuntime*>(new Runtime(to));
}
EXPORT void* createInferRefitter_INTERNAL(void*, void*, int32_t) noexcept { not_simulated("createInferRefitter"); }
EXPORT IPluginRegistry* getPluginRegistry() noexcept { return &registry; }
EXPORT IPluginRegistry* getBuilderPluginRegistry(EngineCapability) noexcept { return &registry; }
EXPORT bool initLibNvInferPlugins(void*, char const*) { return true; }
EXPORT void* createNvOnnxParser_INTERNAL(void* network, void* logger, int) noexcept {
    auto* const into = static_cast<Network*>(static_cast<INetworkDefinition*>(network));
    auto* const to = static_cast<ILogger*>(logger);
    return refuses(to, "createNvOnnxParser") ? nullptr : static_cast<nvonnxparser::IParser*>(new Parser(into, to));
}
EXPORT void* createNvOnnxParserRefitter_INTERNAL(void*, void*, int32_t) noexcept { not_simulated("createNvOnnxParserRefitter"); }
EXPORT int getNvOnnxParserVersion() noexcept { return 0; }
