#include "core/image.h"

#include <cstring>

#include "core/kernels.h"
#include "core/pack.h"

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "deploy files are little-endian and read in place: a big-endian target is not supported"
#endif

// Rounding to whole numbers in the activations and sums of two parts rely on it; x87 registers gave errors of 0.3.
#if defined(__FLT_EVAL_METHOD__) && (__FLT_EVAL_METHOD__ < 0 || __FLT_EVAL_METHOD__ == 1 || __FLT_EVAL_METHOD__ == 2)
#error "each float and double must be rounded to its own precision: on 32-bit x86 build with -msse2 -mfpmath=sse"
#endif

namespace cellstep {
namespace core {

namespace {

constexpr char magic[8] = {'C', 'E', 'L', 'L', 'S', 'T', 'E', 'P'};
constexpr std::uint32_t current_version = 3;
constexpr std::uint32_t packed_layout = 1;
constexpr std::uint32_t last_layout = packed_layout + static_cast<std::uint32_t>(WeightType::int8);
constexpr std::uint64_t data_alignment = 64;
/// Sizes and window lengths above this are a broken file; below it no product of two of them and a factor overflows.
constexpr std::uint64_t largest_size = 1u << 24;

std::uint64_t value_bytes(const ImageHeader& header) {
    return !float32_only && header.dtype == static_cast<std::uint32_t>(DataType::float64) ? 8 : 4;
}

/// Whether a record's layout is one that its kind and the file's type can have.
bool layout_fits(const ImageHeader& header, const ImageRecord& record) {
    switch (static_cast<RecordKind>(record.kind)) {
        case RecordKind::lstm:
            return record.layout >= packed_layout &&
                   record.layout <= (value_bytes(header) == 4 && !float32_only ? last_layout : 1);
        case RecordKind::dense:
            return record.layout == packed_layout;
        default:
            return record.layout == 0;
    }
}

/// Bytes of one direction's packed weights.
std::uint64_t direction_bytes(const ImageHeader& header, const ImageRecord& record) {
    const std::uint64_t recurrent = recurrent_size(record);
    return value_bytes(header) == 8
               ? packed_bytes<double>(weight_type(record), record.sizes[0], record.sizes[1], recurrent)
               : packed_bytes<float>(weight_type(record), record.sizes[0], record.sizes[1], recurrent);
}

/// Values of one direction behind its packed weights.
std::uint64_t option_values(const ImageRecord& record) {
    const std::uint64_t units = record.sizes[1];
    const std::uint64_t recurrent = recurrent_size(record);
    const std::uint32_t flags = layer_flags(record);
    std::uint64_t values = 0;
    if (recurrent != units) values += units * recurrent;
    if (flags & LayerFlags::peephole) values += 3 * units;
    if (flags & LayerFlags::layer_norm) values += 10 * units;
    if (flags & LayerFlags::initial) values += recurrent + units;
    return values;
}

/// Bytes of an LSTM record: see image.h.
std::uint64_t lstm_bytes(const ImageHeader& header, const ImageRecord& record) {
    const std::uint64_t direction = direction_bytes(header, record) + option_values(record) * value_bytes(header);
    return direction * direction_count(record) + 3 * value_bytes(header);
}

/// Activations that a record may name: three elementwise ones of an LSTM, one of a dense layer, else none.
bool activations_fit(const ImageRecord& record) {
    const bool lstm = record.kind == static_cast<std::uint32_t>(RecordKind::lstm);
    const bool dense = record.kind == static_cast<std::uint32_t>(RecordKind::dense);
    for (int place = 0; place < 4; ++place) {
        const std::uint32_t activation = record.activations >> (8 * place) & 255;
        const std::uint32_t limit = lstm && place < 3     ? activation_count - 1
                                    : dense && place == 0 ? activation_count
                                                          : 1;
        if (activation >= limit) return false;
    }
    return true;
}

/// Bytes that a record's data must have by its sizes; 0 for a record that is not well formed.
std::uint64_t expected_length(const ImageHeader& header, const ImageRecord& record) {
    const std::uint64_t a = record.sizes[0];
    const std::uint64_t b = record.sizes[1];
    const std::uint64_t c = record.sizes[2];
    const auto kind = static_cast<RecordKind>(record.kind);
    if (a == 0 || a > largest_size || b > largest_size || record.sizes[3]) return 0;
    if (kind != RecordKind::lstm && (c || record.flags)) return 0;
    if (!activations_fit(record)) return 0;
    const bool packed = kind == RecordKind::lstm || kind == RecordKind::dense;
    if (!layout_fits(header, record) || (b != 0) != packed) return 0;
    switch (kind) {
        case RecordKind::input_scaling:
        case RecordKind::output_scaling:
            return 2 * a * value_bytes(header);
        case RecordKind::lstm:
            if (c >= b) return 0;
            if (weight_type(record) == WeightType::int8 && (a > int8_most_values || b > int8_most_values)) return 0;
            return lstm_bytes(header, record);
        case RecordKind::dense:
            return (1 + a) * b * value_bytes(header);
        case RecordKind::feature_names:
        case RecordKind::output_names:
            return record.length;
        case RecordKind::test_vector: {
            const std::uint64_t step = static_cast<std::uint64_t>(header.input_size) + header.output_size;
            return (1 + a * step) * value_bytes(header);
        }
        case RecordKind::skip:
            return 4 * a;
    }
    return 0;
}

/// UTF-8 as RFC 3629 has it: no code point longer than it must be, no surrogates, none past U+10FFFF.
bool is_utf8(const unsigned char* at, std::uint64_t length) {
    static constexpr std::uint32_t least[] = {0, 0x80, 0x800, 0x10000};  // code point of a lead and so many bytes more
    for (const unsigned char* const end = at + length; at != end;) {
        const unsigned char lead = *at++;
        if (lead < 0x80) continue;
        const int more = lead >= 0xf0 ? 3 : lead >= 0xe0 ? 2 : 1;
        if (lead < 0xc0 || lead > 0xf4 || end - at < more) return false;
        std::uint32_t code = lead & (0x3f >> more);
        for (int k = 0; k < more; ++k, ++at) {
            if ((*at & 0xc0) != 0x80) return false;
            code = code << 6 | (*at & 0x3f);
        }
        if (code < least[more] || code > 0x10ffff || code >> 11 == 0xd800 >> 11) return false;
    }
    return true;
}

/// Exactly `count` names, each ended by a zero byte, fill the data.
bool names_are_whole(const char* data, std::uint64_t length, std::uint32_t count) {
    std::uint64_t ends = 0;
    for (std::uint64_t at = 0; at < length; ++at) ends += data[at] == '\0';
    return length > 0 && data[length - 1] == '\0' && ends == count;
}

/// Place of a record in the chain of those that compute, given the place of the one before; 0 for the others.
int stage(RecordKind kind, int last) {
    switch (kind) {
        case RecordKind::input_scaling:
            return 1;
        case RecordKind::dense:
            return last < 3 ? 2 : 4;
        case RecordKind::lstm:
            return 3;
        case RecordKind::output_scaling:
            return 5;
        case RecordKind::skip:
            return 6;
        default:
            return 0;
    }
}

/// The header's state against the sizes of the layers.
bool state_fits(const Image& image) {
    const ImageHeader& header = image.header();
    std::uint64_t rows = 0;
    std::uint64_t h_values = 0;
    std::uint64_t c_values = 0;
    bool uniform = true;
    for (const ImageRecord& record : image) {
        if (record.kind != static_cast<std::uint32_t>(RecordKind::lstm)) continue;
        const std::uint64_t directions = direction_count(record);
        const std::uint64_t h_size = recurrent_size(record);
        uniform = uniform && h_size == header.h_size && record.sizes[1] == header.c_size;
        rows += directions;
        h_values += directions * h_size;
        c_values += directions * record.sizes[1];
    }
    if (rows == 0) return false;
    if (uniform) return header.state_layers == rows;
    return header.state_layers == 1 && header.h_size == h_values && header.c_size == c_values;
}

bool columns_fit(std::uint32_t input_size, const unsigned char* data, std::uint32_t count) {
    for (std::uint32_t k = 0; k < count; ++k) {
        std::uint32_t column = 0;
        std::memcpy(&column, data + sizeof(column) * k, sizeof(column));
        if (column >= input_size) return false;
    }
    return true;
}

constexpr ImageStatus left_out(LeftOut option) {
    return static_cast<ImageStatus>(static_cast<int>(ImageStatus::unsupported) + static_cast<int>(option));
}

/// Whether this build runs the options that an LSTM record names.
ImageStatus check_options(const ImageRecord& record) {
    constexpr std::uint32_t plain = static_cast<std::uint32_t>(Activation::sigmoid) |
                                    static_cast<std::uint32_t>(Activation::tanh) << 8 |
                                    static_cast<std::uint32_t>(Activation::tanh) << 16;
    if (record.flags & ~LayerFlags::all) return ImageStatus::format;
    for (int bit = 0; LayerFlags::supported != LayerFlags::all && bit < 8; ++bit)
        if (record.flags & ~LayerFlags::supported & 1u << bit) return left_out(static_cast<LeftOut>(bit));
    if (plain_only && record.sizes[2]) return left_out(LeftOut::projection);
    if (plain_only && record.activations != plain) return left_out(LeftOut::activation);
    if (float32_only && record.layout > packed_layout && record.layout <= last_layout)
        return left_out(LeftOut::narrow_weights);
    return ImageStatus::ok;
}

/// The same of cell_clip and zoneout, with which the data of an LSTM record end.
ImageStatus check_constants(const unsigned char* end) {
    if (!plain_only) return ImageStatus::ok;
    float constants[3];
    std::memcpy(constants, end - sizeof(constants), sizeof(constants));
    if (constants[0] > 0.0f) return left_out(LeftOut::cell_clip);
    return constants[1] == 0.0f && constants[2] == 0.0f ? ImageStatus::ok : left_out(LeftOut::zoneout);
}

/// Data: whether the bytes behind the records are there to be looked at.
template <bool Data>
ImageStatus check_records(const Image& image, const unsigned char* bytes) {
    const ImageHeader& header = image.header();
    std::uint64_t end =
        sizeof(ImageHeader) + std::uint64_t{header.record_count} * sizeof(ImageRecord);  // of all so far
    std::uint64_t width = header.input_size;  // values of a step, as they pass from record to record
    int last_stage = 0;
    std::uint32_t seen = 0;
    for (const ImageRecord& record : image) {
        if (record.kind == 0 || record.kind > static_cast<std::uint32_t>(RecordKind::skip)) return ImageStatus::format;
        if (record.zeros[0] || record.zeros[1]) return ImageStatus::format;
        // Each begins where the one before it ends, so that none overlap and none lie outside.
        end = (end + data_alignment - 1) / data_alignment * data_alignment;
        if (record.offset != end || end > header.length || record.length > header.length - end)
            return ImageStatus::format;
        end += record.length;

        const auto kind = static_cast<RecordKind>(record.kind);
        if (kind == RecordKind::lstm) {
            const ImageStatus status = check_options(record);
            if (status != ImageStatus::ok) return status;
        }
        if (record.length == 0 || record.length != expected_length(header, record)) return ImageStatus::format;
        if (Data && kind == RecordKind::lstm) {
            const ImageStatus status = check_constants(bytes + record.offset + record.length);
            if (status != ImageStatus::ok) return status;
        }
        const bool repeats = kind == RecordKind::lstm || kind == RecordKind::dense;
        if (!repeats && (seen & (1u << record.kind))) return ImageStatus::format;
        seen |= 1u << record.kind;
        if (const int place = stage(kind, last_stage)) {
            if (place < last_stage || record.sizes[0] != width) return ImageStatus::format;
            if (place > 3 && last_stage < 3) return ImageStatus::format;
            last_stage = place;
            if (kind == RecordKind::dense) width = record.sizes[1];
            if (kind == RecordKind::lstm) {
                const std::uint64_t directions = direction_count(record);
                const std::uint64_t output = recurrent_size(record) * directions;
                const std::uint32_t flags = layer_flags(record);
                if ((flags & LayerFlags::residual) && output != width) return ImageStatus::format;
                width = output + (flags & LayerFlags::cells ? record.sizes[1] * directions : 0);
            }
            if (Data && kind == RecordKind::skip &&
                !columns_fit(header.input_size, bytes + record.offset, record.sizes[0]))
                return ImageStatus::format;
        } else if (kind == RecordKind::feature_names || kind == RecordKind::output_names) {
            const std::uint32_t count = kind == RecordKind::feature_names ? header.input_size : header.output_size;
            if (record.sizes[0] != count) return ImageStatus::format;
            if (Data && !names_are_whole(reinterpret_cast<const char*>(bytes + record.offset), record.length, count))
                return ImageStatus::format;
        }
    }
    const bool fits = state_fits(image) && width == header.output_size && end == header.length;
    return fits ? ImageStatus::ok : ImageStatus::format;
}

/// All that open_image checks behind the magic, of an image of `length` bytes.
template <bool Data, class Length>
ImageStatus check_image(const Image& image, const unsigned char* bytes, Length length) {
    const ImageHeader& header = image.header();
    if (header.version > current_version) return ImageStatus::newer;
    if (header.version < current_version) return ImageStatus::version;
    if (header.length != length) return ImageStatus::length;
    if (header.dtype > static_cast<std::uint32_t>(float32_only ? DataType::float32 : DataType::float64))
        return ImageStatus::dtype;
    const std::uint32_t sizes[] = {header.input_size, header.output_size, header.state_layers, header.h_size,
                                   header.c_size};
    for (const std::uint32_t value : sizes)
        if (value == 0 || value > largest_size) return ImageStatus::format;
    if (header.window > largest_size || header.horizon > largest_size) return ImageStatus::format;
    if (header.answers > static_cast<std::uint32_t>(Answers::hidden)) return ImageStatus::format;
    if (header.record_count > (length - sizeof(ImageHeader)) / sizeof(ImageRecord)) return ImageStatus::format;
    return check_records<Data>(image, bytes);
}

/// Bitwise by nibbles: sixteen table entries are small enough for a microcontroller.
std::uint32_t crc32(std::uint32_t crc, const unsigned char* bytes, std::size_t count) {
    static const std::uint32_t table[16] = {0x00000000, 0x1db71064, 0x3b6e20c8, 0x26d930ac, 0x76dc4190, 0x6b6b51f4,
                                            0x4db26158, 0x5005713c, 0xedb88320, 0xf00f9344, 0xd6d6a3e8, 0xcb61b38c,
                                            0x9b64c2b0, 0x86d3d2d4, 0xa00ae278, 0xbdbdf21c};
    for (std::size_t at = 0; at < count; ++at) {
        crc ^= bytes[at];
        crc = (crc >> 4) ^ table[crc & 15];
        crc = (crc >> 4) ^ table[crc & 15];
    }
    return crc;
}

/// By bits, so that no compiler option about finite arithmetic can remove it.
template <class Bits>
bool all_finite(const unsigned char* bytes, std::uint64_t length, Bits exponent) {
    for (std::uint64_t at = 0; at < length; at += sizeof(Bits)) {
        Bits bits;
        std::memcpy(&bits, bytes + at, sizeof(Bits));
        if ((bits & exponent) == exponent) return false;
    }
    return true;
}

ImageStatus check_floats(Values values, const unsigned char* bytes, std::uint64_t length) {
    if (values == Values::any || all_finite<std::uint32_t>(bytes, length, 0x7f800000u)) return ImageStatus::ok;
    return ImageStatus::nonfinite;
}

/// The weights of one part of an int8 panel: none is -128, whose negative would not fit, and every column's sum is the
/// one that `begin` was made of.
bool int8_weights_fit(const unsigned char* weights, std::uint64_t groups, std::size_t columns,
                      const unsigned char* begin) {
    for (std::size_t column = 0; column < columns; ++column) {
        std::int32_t sum = 0;
        for (std::uint64_t group = 0; group < groups; ++group) {
            for (std::size_t k = 0; k < 4; ++k) {
                const int weight = static_cast<signed char>(weights[4 * (group * columns + column) + k]);
                if (weight < -127) return false;
                sum += weight;
            }
        }
        std::int32_t stored = 0;
        std::memcpy(&stored, begin + sizeof(stored) * column, sizeof(stored));
        if (stored != -128 * sum) return false;
    }
    return true;
}

/// The narrow weights of one direction.
ImageStatus check_narrow(Values values, WeightType type, const unsigned char* packed, std::size_t inputs,
                         std::size_t units, std::size_t recurrent) {
    ImageStatus status = ImageStatus::ok;
    if (type == WeightType::int8) status = check_floats(values, packed, int8_factor_bytes(inputs));
    const unsigned char* panel = first_panel(type, packed, inputs);
    std::size_t width = 0;
    for (std::size_t unit = 0; unit < units && status == ImageStatus::ok; unit += width) {
        width = panel_width(units - unit);
        const std::size_t columns = gate_count * width;
        const unsigned char* rows = panel;
        panel += panel_stride<float>(type, width, inputs, recurrent);
        status = check_floats(values, rows, columns * (type == WeightType::int8 ? 12 : 4));
        if (type == WeightType::int8) {
            const unsigned char* begin = rows + 12 * columns;
            const unsigned char* weights = begin + 8 * columns;
            const std::uint64_t groups = int8_groups(inputs);
            if (!int8_weights_fit(weights, groups, columns, begin) ||
                !int8_weights_fit(weights + 4 * groups * columns, int8_groups(recurrent), columns, begin + 4 * columns))
                status = ImageStatus::format;
        } else if (values == Values::finite &&
                   !all_finite<std::uint16_t>(rows + 4 * columns, 2 * columns * (inputs + recurrent),
                                              type == WeightType::bfloat16 ? 0x7f80 : 0x7c00)) {
            status = ImageStatus::nonfinite;
        }
    }
    return status;
}

/// A float32 LSTM record with narrow weights.
ImageStatus check_narrow_record(Values values, const ImageHeader& header, const ImageRecord& record,
                                const unsigned char* data) {
    const std::size_t recurrent = recurrent_size(record);
    const std::uint64_t options = 4 * option_values(record);
    const std::uint64_t packed = direction_bytes(header, record);
    const unsigned char* at = data;
    for (std::uint32_t direction = 0; direction < direction_count(record); ++direction) {
        ImageStatus status = check_narrow(values, weight_type(record), at, record.sizes[0], record.sizes[1], recurrent);
        if (status == ImageStatus::ok) status = check_floats(values, at + packed, options);
        if (status != ImageStatus::ok) return status;
        at += packed + options;
    }
    return check_floats(values, at, 12);
}

}  // namespace

#if defined(CELLSTEP_NO_TEXTS)
const char* image_status_text(ImageStatus) { return ""; }
#else
const char* image_status_text(ImageStatus status) {
#define CELLSTEP_LEFT_OUT(option, macro)                                                        \
    "the model has " option ", which this build leaves out to be small: compile without " macro \
    ", or export a "                                                                            \
    "model without it"
    static const char* const options[] = {
        CELLSTEP_LEFT_OUT("a bidirectional layer", "CELLSTEP_PLAIN_ONLY"),
        CELLSTEP_LEFT_OUT("a layer with peephole", "CELLSTEP_PLAIN_ONLY"),
        CELLSTEP_LEFT_OUT("a layer with layer_norm", "CELLSTEP_PLAIN_ONLY"),
        CELLSTEP_LEFT_OUT("a coupled layer", "CELLSTEP_PLAIN_ONLY"),
        CELLSTEP_LEFT_OUT("a residual layer", "CELLSTEP_PLAIN_ONLY"),
        nullptr,
        CELLSTEP_LEFT_OUT("a layer with return_cell_states", "CELLSTEP_PLAIN_ONLY"),
        CELLSTEP_LEFT_OUT("fast_activations", "CELLSTEP_PLAIN_ONLY"),
        CELLSTEP_LEFT_OUT("a layer with proj_size", "CELLSTEP_PLAIN_ONLY"),
        CELLSTEP_LEFT_OUT("a layer with other activations than sigmoid and tanh", "CELLSTEP_PLAIN_ONLY"),
        CELLSTEP_LEFT_OUT("a layer with cell_clip", "CELLSTEP_PLAIN_ONLY"),
        CELLSTEP_LEFT_OUT("a layer with zoneout", "CELLSTEP_PLAIN_ONLY"),
        CELLSTEP_LEFT_OUT("bfloat16, float16 or int8 weights", "CELLSTEP_FLOAT32_ONLY"),
    };
#undef CELLSTEP_LEFT_OUT
    const int option = static_cast<int>(status) - static_cast<int>(ImageStatus::unsupported);
    if (option >= 0 && option < static_cast<int>(sizeof(options) / sizeof(options[0]))) return options[option];
    switch (status) {
        case ImageStatus::ok:
        case ImageStatus::argument:
            break;
        case ImageStatus::magic:
            return "expected a deploy file, which begins with CELLSTEP: export one with cellstep.export(model, "
                   "\"m.cellstep\")";
        case ImageStatus::version:
            return "the file is older than this library, which reads version 3: export the model again";
        case ImageStatus::newer:
            return "the file is newer than this library, which reads version 3: update the library, or export the "
                   "model with a cellstep of the library's age";
        case ImageStatus::length:
            return "the file is shorter or longer than its header says: copy or export it again";
        case ImageStatus::checksum:
            return "the checksum does not fit the bytes, so the file is damaged: copy or export it again";
        case ImageStatus::format:
            return "the records contradict each other, so the file is damaged: copy or export it again";
        case ImageStatus::dtype:
            return "expected float32 weights: export model.float()";
        case ImageStatus::nonfinite:
            return "a weight is NaN or infinite: train the model again";
        case ImageStatus::alignment:
            return "expected memory aligned to 8 bytes: align it, or load with cellstep_model_load_memory";
        case ImageStatus::unsupported:
            break;
    }
    return nullptr;
}
#endif

const ImageRecord* Image::find(RecordKind kind) const {
    for (const ImageRecord& record : *this)
        if (record.kind == static_cast<std::uint32_t>(kind)) return &record;
    return nullptr;
}

const char* Image::name(RecordKind kind, std::size_t index) const {
    const ImageRecord* record = find(kind);
    if (!record || index >= record->sizes[0]) return nullptr;
    const char* name = data<char>(*record);
    for (; index > 0; --index) name += std::strlen(name) + 1;
    return name;
}

ImageStatus open_image(const void* data, std::size_t size, Image* image) {
    if (!data || !image) return ImageStatus::argument;
    if (reinterpret_cast<std::uintptr_t>(data) % 8) return ImageStatus::alignment;
    const unsigned char* bytes = static_cast<const unsigned char*>(data);
    const std::size_t known = size < sizeof(magic) ? size : sizeof(magic);
    if (known == 0) return ImageStatus::length;
    if (std::memcmp(bytes, magic, known) != 0) return ImageStatus::magic;
    if (size < sizeof(ImageHeader)) return ImageStatus::length;

    Image candidate;
    candidate.bytes_ = bytes;
    const ImageStatus status = check_image<true>(candidate, bytes, size);
    if (status != ImageStatus::ok) return status;
    *image = candidate;
    return ImageStatus::ok;
}

ImageStatus open_records(const void* data, std::size_t size, std::uint64_t length, Image* image) {
    if (!data || !image) return ImageStatus::argument;
    if (reinterpret_cast<std::uintptr_t>(data) % 8) return ImageStatus::alignment;
    if (size < sizeof(ImageHeader) || length < size) return ImageStatus::length;
    Image candidate;
    candidate.bytes_ = static_cast<const unsigned char*>(data);
    if (std::memcmp(data, magic, sizeof(magic)) != 0) return ImageStatus::magic;
    if (candidate.header().record_count > (size - sizeof(ImageHeader)) / sizeof(ImageRecord))
        return ImageStatus::length;
    const ImageStatus status = check_image<false>(candidate, candidate.bytes_, length);
    if (status != ImageStatus::ok) return status;
    *image = candidate;
    return ImageStatus::ok;
}

ImageStatus check_values(const Image& image, Values values) {
    const ImageHeader& header = image.header();
    const unsigned char* bytes = reinterpret_cast<const unsigned char*>(&header);
    constexpr std::size_t checksum_at = offsetof(ImageHeader, checksum);
    const unsigned char zeros[sizeof(header.checksum)] = {};
    std::uint32_t crc = crc32(0xffffffffu, bytes, checksum_at);
    crc = crc32(crc, zeros, sizeof(zeros));
    const std::size_t rest = checksum_at + sizeof(zeros);
    crc = crc32(crc, bytes + rest, static_cast<std::size_t>(header.length) - rest);
    if (~crc != header.checksum) return ImageStatus::checksum;

    for (const ImageRecord& record : image) {
        const auto kind = static_cast<RecordKind>(record.kind);
        if (kind == RecordKind::skip) continue;
        if (kind == RecordKind::feature_names || kind == RecordKind::output_names) {
            if (!is_utf8(bytes + record.offset, record.length)) return ImageStatus::format;
            continue;
        }
        if (kind == RecordKind::lstm && weight_type(record) != WeightType::full) {
            const ImageStatus status = check_narrow_record(values, header, record, bytes + record.offset);
            if (status != ImageStatus::ok) return status;
            continue;
        }
        if (values == Values::any) continue;
        const bool finite = value_bytes(header) == 8
                                ? all_finite<std::uint64_t>(bytes + record.offset, record.length, 0x7ff0000000000000u)
                                : all_finite<std::uint32_t>(bytes + record.offset, record.length, 0x7f800000u);
        if (!finite) return ImageStatus::nonfinite;
    }
    return ImageStatus::ok;
}

}  // namespace core
}  // namespace cellstep
