// How a host finds the plugin in the library: TensorRT's own loader by `getCreators`; hosts that only dlopen it find it
// registered, where PARKDET_NMS_REGISTER_ON_LOAD is set. Not by default: TensorRT's loader refuses a library whose
// plugin is registered already.
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>

#include "nms_plugin.h"

using namespace nvinfer1;

#define AS_TEXT(name) #name
#define TEXT(name) AS_TEXT(name)

namespace {

ILoggerFinder* logger_finder = nullptr;

struct RegisterOnLoad {
    IPluginRegistry* registry = nullptr;
    RegisterOnLoad() {
        if (!getenv("PARKDET_NMS_REGISTER_ON_LOAD")) return;
        // Opened by name, so that the library links against no TensorRT and the host need not have loaded it yet.
        void* const tensorrt = dlopen("libnvinfer.so." TEXT(NV_TENSORRT_MAJOR), RTLD_LAZY);
        void* const found = tensorrt ? dlsym(tensorrt, "getPluginRegistry") : nullptr;
        auto const find = reinterpret_cast<IPluginRegistry* (*)()>(found);
        if (!find) parkdet::refuse("ParkdetNMS is not registered: libnvinfer.so." TEXT(NV_TENSORRT_MAJOR) " is not found");
        else if (find()->registerCreator(parkdet::nms_creator(), parkdet::kNamespace)) registry = find();
    }
    ~RegisterOnLoad() {
        if (registry) registry->deregisterCreator(parkdet::nms_creator());
    }
} const register_on_load;

}  // namespace

int32_t parkdet::refuse(std::string const& why) {
    ILogger* const logger = logger_finder ? logger_finder->findLogger() : nullptr;
    if (logger) logger->log(ILogger::Severity::kERROR, why.c_str());
    else fprintf(stderr, "%s\n", why.c_str());
    return 1;
}

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void setLoggerFinder(ILoggerFinder* finder) { logger_finder = finder; }

EXPORT IPluginCreatorInterface* const* getCreators(int32_t& count) {
    static IPluginCreatorInterface* const creators[] = {&parkdet::nms_creator()};
    count = 1;
    return creators;
}
