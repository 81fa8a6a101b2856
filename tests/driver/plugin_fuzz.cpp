// Feeds the creators and the plugins what a damaged engine file or a careless application could bring.
//
//     plugin_fuzz LIBRARY ROUNDS SEED
//
// Every round must end in a plugin that can be serialised and restored, or in no plugin and a message. Meant
// to be built with -fsanitize=address,undefined: data is exactly as long as its field says.
#include <array>
#include <iostream>
#include <limits>
#include <random>

#include "harness.h"

namespace {

using harness::Dims;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

struct Field {
    std::string name;
    bool named = true;
    std::int32_t type = 0;
    std::int32_t length = 0;
    bool hasData = true;
    std::vector<double> values;
};

class Fuzzer {
  public:
    Fuzzer(const char* path, std::uint32_t seed) : library_(path), random_(seed) {}

    void round() {
        const bool attention = chance(2);
        nvinfer1::IPluginCreatorV3One& creator =
            library_.creator(attention ? "HierarchicalSparseAttention" : "QKPrepare");
        std::vector<Field> fields = attention ? soundAttention() : soundPrepare();
        for (std::uint32_t count = below(4); count > 0; --count) {
            damage(fields);
        }
        const std::size_t logged = library_.logger().messages.size();
        std::unique_ptr<nvinfer1::IPluginV3> plugin(create(creator, fields));
        if (plugin == nullptr) {
            ++refused_;
            if (library_.logger().messages.size() == logged ||
                library_.logger().messages.back().size() < 20) {
                throw std::runtime_error("no plugin and no message");
            }
        } else {
            ++created_;
            use(creator, harness::Plugin(plugin.release()));
        }
        library_.logger().messages.clear();
    }

    void report() const { std::cout << "created " << created_ << "\nrefused " << refused_ << '\n'; }

  private:
    std::uint32_t below(std::uint32_t end) {
        return std::uniform_int_distribution<std::uint32_t>(0, end - 1)(random_);
    }
    bool chance(std::uint32_t oneIn) { return below(oneIn) == 0; }

    static Field sound(const char* name, PluginFieldType type, std::vector<double> values) {
        const auto length = static_cast<std::int32_t>(values.size());
        return {name, true, static_cast<std::int32_t>(type), length, true, std::move(values)};
    }

    static std::vector<Field> soundAttention() {
        constexpr auto kInt = PluginFieldType::kINT32;
        return {sound("frame_tokens", kInt, {64}),
                sound("block_q", kInt, {32}),
                sound("block_k", kInt, {32}),
                sound("keep_frames", kInt, {6}),
                sound("sink_frames", kInt, {1}),
                sound("near_frames", kInt, {1}),
                sound("scale", PluginFieldType::kFLOAT32, {0.125}),
                sound("keep_q20", kInt, {1048576, 200000, 0})};
    }

    static std::vector<Field> soundPrepare() {
        constexpr auto kInt = PluginFieldType::kINT32;
        return {sound("heads", kInt, {2}), sound("frame_tokens", kInt, {64}), sound("block_q", kInt, {32}),
                sound("block_k", kInt, {32}), sound("eps", PluginFieldType::kFLOAT32, {1e-6})};
    }

    double absurd() {
        constexpr double kInf = std::numeric_limits<double>::infinity();
        constexpr std::array<double, 14> kValues = {
            0,       -1,    1,     2147483647.0, -2147483648.0, 4294967296.0,
            1e18,    -1e18, 1e300, kInf,         -kInf,         std::numeric_limits<double>::quiet_NaN(),
            1048577, 0.5};
        return kValues[below(kValues.size())];
    }

    void damage(std::vector<Field>& fields) {
        if (fields.empty()) {
            return;
        }
        const std::size_t index = below(static_cast<std::uint32_t>(fields.size()));
        Field& field = fields[index];
        switch (below(9)) {
        case 0:
            fields.erase(fields.begin() + static_cast<std::ptrdiff_t>(index));
            break;
        case 1:
            fields.push_back(field);
            break;
        case 2:
            field.name = chance(2) ? "" : field.name + "x";
            break;
        case 3:
            field.named = false;
            break;
        case 4:
            field.hasData = false;
            break;
        case 5:
            field.type = static_cast<std::int32_t>(below(20)) - 3;
            break;
        case 6: { // shorter or longer, the data with it
            field.values.resize(below(6), absurd());
            field.length = static_cast<std::int32_t>(field.values.size());
            break;
        }
        case 7: { // a length that nothing stands behind
            constexpr std::array<std::int32_t, 4> kLengths = {-1, std::numeric_limits<std::int32_t>::min(),
                                                              65537,
                                                              std::numeric_limits<std::int32_t>::max()};
            field.length = kLengths[below(kLengths.size())];
            break;
        }
        default:
            if (!field.values.empty()) {
                field.values[below(static_cast<std::uint32_t>(field.values.size()))] = absurd();
            }
        }
    }

    template <typename T>
    static void append(std::vector<unsigned char>& bytes, double value) {
        // Out of range, a conversion would be undefined: take the nearest bits instead.
        T converted{};
        if constexpr (std::is_floating_point_v<T>) {
            converted = sizeof(T) == sizeof(double) || std::abs(value) < 1e38
                            ? static_cast<T>(value)
                            : std::numeric_limits<T>::infinity();
        } else if (value >= -9e18 && value <= 9e18) {
            converted = static_cast<T>(static_cast<std::int64_t>(value));
        }
        const auto* const first = reinterpret_cast<const unsigned char*>(&converted);
        bytes.insert(bytes.end(), first, first + sizeof converted);
    }

    static std::vector<unsigned char> dataOf(const Field& field) {
        std::vector<unsigned char> bytes;
        for (double value : field.values) {
            switch (static_cast<PluginFieldType>(field.type)) {
            case PluginFieldType::kINT64:
                append<std::int64_t>(bytes, value);
                break;
            case PluginFieldType::kFLOAT64:
                append<double>(bytes, value);
                break;
            case PluginFieldType::kFLOAT32:
                append<float>(bytes, value);
                break;
            default:
                append<std::int32_t>(bytes, value);
            }
        }
        bytes.shrink_to_fit();
        return bytes;
    }

    nvinfer1::IPluginV3* create(nvinfer1::IPluginCreatorV3One& creator, const std::vector<Field>& fields) {
        std::vector<std::vector<unsigned char>> data;
        for (const Field& field : fields) {
            data.push_back(dataOf(field));
        }
        std::vector<PluginField> given;
        for (std::size_t index = 0; index < fields.size(); ++index) {
            const Field& field = fields[index];
            given.emplace_back(field.named ? field.name.c_str() : nullptr,
                               field.hasData ? data[index].data() : nullptr,
                               static_cast<PluginFieldType>(field.type), field.length);
        }
        nvinfer1::PluginFieldCollection collection{static_cast<std::int32_t>(given.size()), given.data()};
        if (chance(50)) {
            collection.nbFields = chance(2) ? -1 : std::numeric_limits<std::int32_t>::max();
        } else if (chance(50)) {
            collection.fields = nullptr;
        }
        const auto phase = chance(2) ? nvinfer1::TensorRTPhase::kBUILD : nvinfer1::TensorRTPhase::kRUNTIME;
        return creator.createPlugin(chance(20) ? nullptr : "node", chance(100) ? nullptr : &collection,
                                    phase);
    }

    Dims anyDims() {
        Dims dims{};
        dims.nbDims = static_cast<std::int32_t>(below(6)) - (chance(10) ? 1 : 0);
        constexpr std::array<std::int64_t, 11> kSizes = {
            0, 1, 2, 3, 64, 128, 192, 384, -1, 2147483648, 9223372036854775807};
        for (std::int32_t axis = 0; axis < dims.nbDims; ++axis) {
            dims.d[axis] = kSizes[below(kSizes.size())];
        }
        return dims;
    }

    static Dims dims(std::initializer_list<std::int64_t> sizes) {
        Dims result{};
        for (std::int64_t size : sizes) {
            result.d[result.nbDims++] = size;
        }
        return result;
    }

    /// Shapes that the sound attributes agree with, some of them replaced.
    std::vector<Dims> shapes(bool attention) {
        std::vector<Dims> all;
        if (attention) {
            const Dims tokens = dims({192, 2, 64});
            const Dims cache = dims({7, 64, 2, 64});
            const Dims means = dims({3, 2, 2, 64});
            all = {tokens,    tokens,   tokens, means, means, cache, cache, dims({7, 2, 2, 64}),
                   dims({5}), dims({}), tokens};
        } else {
            const Dims tokens = dims({192, 2, 64});
            const Dims means = dims({3, 2, 2, 64});
            all = {dims({192, 384}), dims({384}),     dims({128}), dims({128}),
                   dims({192, 32}),  dims({192, 32}), tokens,      tokens,
                   tokens,           means,           means};
        }
        for (std::uint32_t count = below(3); count > 0; --count) {
            all[below(static_cast<std::uint32_t>(all.size()))] = anyDims();
        }
        return all;
    }

    void use(nvinfer1::IPluginCreatorV3One& creator, harness::Plugin plugin) {
        const harness::Plugin again(creator.createPlugin("again", plugin.runtime->getFieldsToSerialize(),
                                                         nvinfer1::TensorRTPhase::kRUNTIME));
        const std::string text = plugin.build->getMetadataString();
        if (text != again.build->getMetadataString()) {
            throw std::runtime_error("restored as another plugin: " + text);
        }
        const bool attention = std::strcmp(plugin.core->getPluginName(), "QKPrepare") != 0;
        const std::vector<Dims> dimensions = shapes(attention);
        const std::int32_t inputs = attention ? 10 : 6;
        const auto outputs = static_cast<std::int32_t>(dimensions.size()) - inputs;
        std::vector<nvinfer1::DynamicPluginTensorDesc> all;
        std::vector<nvinfer1::PluginTensorDesc> concrete;
        harness::Expressions expressions;
        std::vector<nvinfer1::DimsExprs> shapes;
        for (const Dims& shape : dimensions) {
            const auto type = static_cast<nvinfer1::DataType>(below(14));
            all.push_back(harness::describe(chance(4) ? type : nvinfer1::DataType::kBF16, shape));
            concrete.push_back(all.back().desc);
            shapes.push_back(expressions.of(shape));
        }
        for (std::int32_t position = 0; position < inputs + outputs; ++position) {
            plugin.build->supportsFormatCombination(position, all.data(), inputs, outputs);
        }
        plugin.build->supportsFormatCombination(inputs + outputs, all.data(), inputs, outputs);
        plugin.build->getOutputShapes(shapes.data(), inputs, nullptr, 0, shapes.data() + inputs, outputs,
                                      expressions);
        plugin.build->configurePlugin(all.data(), inputs, all.data() + inputs, outputs);
        plugin.build->getWorkspaceSize(all.data(), inputs, all.data() + inputs, outputs);
        plugin.build->getWorkspaceSize(all.data(), inputs - 1, all.data() + inputs, outputs);
        plugin.runtime->onShapeChange(concrete.data(), inputs, concrete.data() + inputs, outputs);
    }

    harness::Library library_;
    std::mt19937 random_;
    std::size_t created_ = 0;
    std::size_t refused_ = 0;
};

} // namespace

int main(int count, char** arguments) {
    if (count != 4) {
        std::cerr << "usage: plugin_fuzz LIBRARY ROUNDS SEED\n";
        return 2;
    }
    try {
        Fuzzer fuzzer(arguments[1], static_cast<std::uint32_t>(std::stoul(arguments[3])));
        for (unsigned long round = std::stoul(arguments[2]); round > 0; --round) {
            fuzzer.round();
        }
        fuzzer.report();
        return 0;
    } catch (const std::exception& error) {
        std::cerr << "plugin_fuzz: " << error.what() << '\n';
        return 1;
    }
}
