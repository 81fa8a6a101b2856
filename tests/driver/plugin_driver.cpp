// Takes a plugin through its life as TensorRT would, and prints what it answers.
//
//     plugin_driver LIBRARY SCRIPT
//
// Lines of the script, in this order:
//
//     plugin NAME
//     field NAME int32|int64|float32|float64 VALUE...
//     input NAME TYPE "[" SIZE... "]" [FILE]    TYPE: float32, float16, bfloat16, int32; FILE: raw content
//     output NAME TYPE "[" SIZE... "]" [FILE]
//     enqueue                                   once, on the GPU; writes the outputs to their files
//     capture                                   into a CUDA graph
//     replay [NAME=FILE...]                     new content of inputs, the graph, new files of outputs
//
// Prints lines of "KEY VALUE...". Exits with 1 if the plugin refuses anything, and prints why as "log ...".
#include <algorithm>
#include <fstream>
#include <iostream>
#include <map>
#include <sstream>

#include "gpu.h"
#include "harness.h"

namespace {

using harness::Dims;
using nvinfer1::DataType;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

const std::map<std::string, DataType> kTypes = {
    {"float32", DataType::kFLOAT},
    {"float16", DataType::kHALF},
    {"bfloat16", DataType::kBF16},
    {"int32", DataType::kINT32},
};

struct Tensor {
    std::string name;
    DataType type{};
    Dims dims{};
    std::string file;

    std::size_t bytes() const {
        std::size_t count = type == DataType::kFLOAT || type == DataType::kINT32 ? 4 : 2;
        for (std::int32_t axis = 0; axis < dims.nbDims; ++axis) {
            count *= static_cast<std::size_t>(dims.d[axis]);
        }
        return count;
    }
};

struct Field {
    std::string name;
    PluginFieldType type{};
    std::int32_t length = 0;
    std::vector<unsigned char> data;
};

struct Script {
    std::string plugin;
    std::vector<Field> fields;
    std::vector<Tensor> inputs;
    std::vector<Tensor> outputs;
    std::vector<std::vector<std::string>> actions;
};

template <typename T>
void append(Field& field, std::istream& values) {
    for (T value{}; values >> value;) {
        const auto* const bytes = reinterpret_cast<const unsigned char*>(&value);
        field.data.insert(field.data.end(), bytes, bytes + sizeof value);
        ++field.length;
    }
}

Field readField(std::istream& line) {
    Field field;
    std::string type;
    line >> field.name >> type;
    if (type == "int32") {
        field.type = PluginFieldType::kINT32;
        append<std::int32_t>(field, line);
    } else if (type == "int64") {
        field.type = PluginFieldType::kINT64;
        append<std::int64_t>(field, line);
    } else if (type == "float32") {
        field.type = PluginFieldType::kFLOAT32;
        append<float>(field, line);
    } else {
        field.type = PluginFieldType::kFLOAT64;
        append<double>(field, line);
    }
    return field;
}

Tensor readTensor(std::istream& line) {
    Tensor tensor;
    std::string type;
    std::string word;
    line >> tensor.name >> type >> word;
    tensor.type = kTypes.at(type);
    while (line >> word && word != "]") {
        tensor.dims.d[tensor.dims.nbDims++] = std::stoll(word);
    }
    line >> tensor.file;
    return tensor;
}

Script readScript(const char* path) {
    std::ifstream file(path);
    Script script;
    for (std::string text; std::getline(file, text);) {
        std::istringstream line(text);
        std::string word;
        line >> word;
        if (word == "plugin") {
            line >> script.plugin;
        } else if (word == "field") {
            script.fields.push_back(readField(line));
        } else if (word == "input") {
            script.inputs.push_back(readTensor(line));
        } else if (word == "output") {
            script.outputs.push_back(readTensor(line));
        } else if (!word.empty()) {
            script.actions.push_back({word});
            while (line >> word) {
                script.actions.back().push_back(word);
            }
        }
    }
    return script;
}

void print(const char* key, const Dims& dims) {
    std::cout << key;
    for (std::int32_t axis = 0; axis < dims.nbDims; ++axis) {
        std::cout << ' ' << dims.d[axis];
    }
    std::cout << '\n';
}

/// Throws unless a method of the plugin returned 0.
void require(std::int32_t status, const char* method) {
    if (status != 0) {
        throw std::runtime_error(std::string(method) + " failed");
    }
}

std::vector<DynamicPluginTensorDesc> describe(const std::vector<Tensor>& tensors) {
    std::vector<DynamicPluginTensorDesc> result;
    for (const Tensor& tensor : tensors) {
        result.push_back(harness::describe(tensor.type, tensor.dims));
    }
    return result;
}

std::vector<nvinfer1::PluginTensorDesc> concrete(const std::vector<DynamicPluginTensorDesc>& tensors) {
    std::vector<nvinfer1::PluginTensorDesc> result;
    for (const DynamicPluginTensorDesc& tensor : tensors) {
        result.push_back(tensor.desc);
    }
    return result;
}

/// Which type each tensor may have, given the types of the script for those before it.
void printFormats(harness::Plugin& plugin, std::vector<DynamicPluginTensorDesc> all, std::int32_t inputs) {
    const auto outputs = static_cast<std::int32_t>(all.size()) - inputs;
    for (std::int32_t position = 0; position < inputs + outputs; ++position) {
        const DynamicPluginTensorDesc kept = all[static_cast<std::size_t>(position)];
        nvinfer1::PluginTensorDesc& asked = all[static_cast<std::size_t>(position)].desc;
        std::cout << "types " << position;
        for (const auto& [name, type] : kTypes) {
            asked.type = type;
            if (plugin.build->supportsFormatCombination(position, all.data(), inputs, outputs)) {
                std::cout << ' ' << name;
            }
        }
        std::cout << '\n';
        all[static_cast<std::size_t>(position)] = kept;
        asked.format = nvinfer1::TensorFormat::kCHW4;
        if (plugin.build->supportsFormatCombination(position, all.data(), inputs, outputs)) {
            throw std::runtime_error("a format that is not linear was accepted");
        }
        asked.format = kept.desc.format;
    }
}

/// Build phase: what the plugin answers to TensorRT's builder. Returns the workspace size.
std::size_t interrogate(harness::Plugin& plugin, const Script& script) {
    const auto inputs = describe(script.inputs);
    const auto outputs = describe(script.outputs);
    const auto inputCount = static_cast<std::int32_t>(inputs.size());
    const auto outputCount = plugin.build->getNbOutputs();
    if (outputCount != static_cast<std::int32_t>(outputs.size())) {
        throw std::runtime_error("the plugin has " + std::to_string(outputCount) + " outputs");
    }
    std::vector<DataType> inputTypes;
    std::vector<DataType> outputTypes(outputs.size());
    std::vector<nvinfer1::DimsExprs> shapes;
    std::vector<nvinfer1::DimsExprs> outputShapes(outputs.size());
    harness::Expressions expressions;
    for (const Tensor& tensor : script.inputs) {
        inputTypes.push_back(tensor.type);
        shapes.push_back(expressions.of(tensor.dims));
    }
    require(plugin.build->getOutputDataTypes(outputTypes.data(), outputCount, inputTypes.data(), inputCount),
            "getOutputDataTypes");
    require(plugin.build->getOutputShapes(shapes.data(), inputCount, nullptr, 0, outputShapes.data(),
                                          outputCount, expressions),
            "getOutputShapes");
    for (std::size_t index = 0; index < outputs.size(); ++index) {
        const auto name = std::find_if(kTypes.begin(), kTypes.end(),
                                       [&](const auto& entry) { return entry.second == outputTypes[index]; });
        print(("output " + script.outputs[index].name + " " + name->first).c_str(),
              harness::valueOf(outputShapes[index]));
        std::cout << "aliased " << plugin.build->getAliasedInput(static_cast<std::int32_t>(index)) << '\n';
    }
    std::vector<DynamicPluginTensorDesc> all = inputs;
    all.insert(all.end(), outputs.begin(), outputs.end());
    printFormats(plugin, all, inputCount);
    require(plugin.build->configurePlugin(inputs.data(), inputCount, outputs.data(), outputCount),
            "configurePlugin");
    const std::size_t workspace =
        plugin.build->getWorkspaceSize(inputs.data(), inputCount, outputs.data(), outputCount);
    std::cout << "workspace " << workspace << '\n';
    std::cout << "metadata " << plugin.build->getMetadataString() << '\n';
    return workspace;
}

/// Serialises to fields, and makes a plugin of them as an engine's deserialisation does: from memory of its
/// own.
harness::Plugin restored(nvinfer1::IPluginCreatorV3One& creator, harness::Plugin& plugin) {
    const nvinfer1::PluginFieldCollection* const stored = plugin.runtime->getFieldsToSerialize();
    std::deque<Field> copies;
    std::vector<PluginField> fields;
    for (std::int32_t index = 0; index < stored->nbFields; ++index) {
        const PluginField& field = stored->fields[index];
        const auto* const first = static_cast<const unsigned char*>(field.data);
        copies.push_back({field.name, field.type, field.length, {first, first + 4 * field.length}});
        fields.emplace_back(copies.back().name.c_str(), copies.back().data.data(), field.type, field.length);
    }
    const nvinfer1::PluginFieldCollection collection{static_cast<std::int32_t>(fields.size()), fields.data()};
    harness::Plugin result(creator.createPlugin("restored", &collection, nvinfer1::TensorRTPhase::kRUNTIME));
    std::cout << "restored " << result.build->getMetadataString() << '\n';
    return result;
}

/// Runs the script's actions on the GPU.
void execute(harness::Plugin& plugin, const Script& script, std::size_t workspaceBytes) {
    gpu::Device device;
    const auto inputDescs = concrete(describe(script.inputs));
    const auto outputDescs = concrete(describe(script.outputs));
    const harness::Plugin attached(plugin.runtime->attachToContext(nullptr));
    std::cout << "attached\n";
    require(attached.runtime->onShapeChange(inputDescs.data(), static_cast<std::int32_t>(inputDescs.size()),
                                            outputDescs.data(),
                                            static_cast<std::int32_t>(outputDescs.size())),
            "onShapeChange");

    std::map<std::string, gpu::Buffer> buffers;
    std::vector<const void*> inputs;
    std::vector<void*> outputs;
    for (const Tensor& tensor : script.inputs) {
        gpu::Buffer& buffer = buffers.emplace(tensor.name, gpu::Buffer(device, tensor.bytes())).first->second;
        buffer.read(tensor.file);
        inputs.push_back(buffer.address());
    }
    for (const Tensor& tensor : script.outputs) {
        outputs.push_back(
            buffers.emplace(tensor.name, gpu::Buffer(device, tensor.bytes())).first->second.address());
    }
    gpu::Buffer workspace(device, workspaceBytes);
    const auto enqueue = [&] {
        require(attached.runtime->enqueue(inputDescs.data(), outputDescs.data(), inputs.data(),
                                          outputs.data(), workspace.address(),
                                          static_cast<cudaStream_t>(device.stream())),
                "enqueue");
    };
    for (const std::vector<std::string>& action : script.actions) {
        std::map<std::string, std::string> files;
        for (const Tensor& tensor : script.outputs) {
            files[tensor.name] = tensor.file;
        }
        if (action[0] == "enqueue") {
            enqueue();
        } else if (action[0] == "capture") {
            device.capture(enqueue);
            continue;
        } else {
            for (std::size_t index = 1; index < action.size(); ++index) {
                const std::size_t equals = action[index].find('=');
                const std::string name = action[index].substr(0, equals);
                if (files.count(name) != 0) {
                    files[name] = action[index].substr(equals + 1);
                } else {
                    buffers.at(name).read(action[index].substr(equals + 1));
                }
            }
            device.replay();
        }
        device.synchronize();
        for (const auto& [name, file] : files) {
            buffers.at(name).write(file);
        }
        std::cout << action[0] << " done\n";
    }
}

int run(const char* libraryPath, const char* scriptPath) {
    harness::Library library(libraryPath);
    for (const nvinfer1::IPluginCreatorV3One* creator : library.creators()) {
        std::cout << "creator " << creator->getPluginName() << ' ' << creator->getPluginVersion() << ' '
                  << creator->getPluginNamespace() << '\n';
    }
    int status = 0;
    try {
        const Script script = readScript(scriptPath);
        nvinfer1::IPluginCreatorV3One& creator = library.creator(script.plugin);
        std::vector<PluginField> fields;
        for (const Field& field : script.fields) {
            fields.emplace_back(field.name.c_str(), field.data.data(), field.type, field.length);
        }
        const nvinfer1::PluginFieldCollection collection{static_cast<std::int32_t>(fields.size()),
                                                         fields.data()};
        harness::Plugin created(creator.createPlugin("node", &collection, nvinfer1::TensorRTPhase::kBUILD));
        harness::Plugin cloned(created.object->clone());
        created.object.reset(); // a clone stands on its own
        const std::size_t workspace = interrogate(cloned, script);
        harness::Plugin loaded = restored(creator, cloned);
        if (!script.actions.empty()) {
            execute(loaded, script, workspace);
        }
    } catch (const std::exception& error) {
        std::cout << "error " << error.what() << '\n';
        status = 1;
    }
    for (const std::string& message : library.logger().messages) {
        std::cout << "log " << message << '\n';
    }
    return status;
}

} // namespace

int main(int count, char** arguments) {
    if (count != 3) {
        std::cerr << "usage: plugin_driver LIBRARY SCRIPT\n";
        return 2;
    }
    try {
        return run(arguments[1], arguments[2]);
    } catch (const std::exception& error) {
        std::cerr << "plugin_driver: " << error.what() << '\n';
        return 2;
    }
}
