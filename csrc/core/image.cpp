#include "core/image.h"

#include <cstring>

#include "core/pack.h"

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "deploy files are little-endian and read in place: a big-endian target is not supported"
#endif

namespace cellstep {
namespace core {

namespace {

constexpr char magic[8] = {'C', 'E', 'L', 'L', 'S', 'T', 'E', 'P'};
constexpr std::uint32_t current_version = 1;
constexpr std::uint32_t packed_layout = 1;
constexpr std::uint64_t data_alignment = 64;
/// Sizes and window lengths above this are a broken file; below it no product of two of them and a factor overflows.
constexpr std::uint64_t largest_size = 1u << 24;

std::uint64_t value_bytes(const ImageHeader& header) {
    return header.dtype == static_cast<std::uint32_t>(DataType::float64) ? 8 : 4;
}

/// Bytes that a record's data must have by its sizes; 0 for a record that is not well formed.
std::uint64_t expected_length(const ImageHeader& header, const ImageRecord& record) {
    const std::uint64_t a = record.sizes[0];
    const std::uint64_t b = record.sizes[1];
    if (a == 0 || a > largest_size || b > largest_size || record.sizes[2] || record.sizes[3]) return 0;
    switch (static_cast<RecordKind>(record.kind)) {
        case RecordKind::input_scaling:
        case RecordKind::output_scaling:
            return b == 0 && record.layout == 0 ? 2 * a * value_bytes(header) : 0;
        case RecordKind::lstm:
            if (b == 0 || record.layout != packed_layout) return 0;
            // packed_size(a, b), in 64 bits also where size_t has 32
            return gate_count * ((b + 3) / 4 * 4) * (1 + a + b) * value_bytes(header);
        case RecordKind::dense:
            return b != 0 && record.layout == packed_layout ? (1 + a) * b * value_bytes(header) : 0;
        case RecordKind::feature_names:
        case RecordKind::output_names:
            return b == 0 && record.layout == 0 ? record.length : 0;
        case RecordKind::test_vector: {
            const std::uint64_t step = static_cast<std::uint64_t>(header.input_size) + header.output_size;
            return b == 0 && record.layout == 0 ? (1 + a * step) * value_bytes(header) : 0;
        }
    }
    return 0;
}

/// Exactly `count` names, each ended by a zero byte, fill the data.
bool names_are_whole(const char* data, std::uint64_t length, std::uint32_t count) {
    std::uint64_t ends = 0;
    for (std::uint64_t at = 0; at < length; ++at) ends += data[at] == '\0';
    return length > 0 && data[length - 1] == '\0' && ends == count;
}

/// Position of a kind in the chain of records that compute; 0 for the others.
int stage(std::uint32_t kind) {
    return kind <= static_cast<std::uint32_t>(RecordKind::output_scaling) ? static_cast<int>(kind) : 0;
}

bool records_fit(const Image& image, const unsigned char* bytes) {
    const ImageHeader& header = image.header();
    const std::uint64_t data_begin = sizeof(ImageHeader) + std::uint64_t{header.record_count} * sizeof(ImageRecord);
    std::uint64_t width = header.input_size;  // values of a step, as they pass from record to record
    std::uint32_t layers = 0;
    int last_stage = 0;
    std::uint32_t seen = 0;
    for (const ImageRecord& record : image) {
        if (record.kind == 0 || record.kind > static_cast<std::uint32_t>(RecordKind::test_vector)) return false;
        if (record.zero || record.zeros[0] || record.zeros[1]) return false;
        if (record.offset % data_alignment || record.offset < data_begin || record.offset > header.length) return false;
        if (record.length > header.length - record.offset) return false;
        if (record.length == 0 || record.length != expected_length(header, record)) return false;

        const auto kind = static_cast<RecordKind>(record.kind);
        if (kind != RecordKind::lstm && (seen & (1u << record.kind))) return false;
        seen |= 1u << record.kind;
        if (stage(record.kind)) {
            if (stage(record.kind) < last_stage || record.sizes[0] != width) return false;
            last_stage = stage(record.kind);
            if (kind == RecordKind::lstm || kind == RecordKind::dense) width = record.sizes[1];
            if (kind == RecordKind::lstm) {
                ++layers;
                if (record.sizes[1] != header.hidden_size) return false;
            } else if (kind != RecordKind::input_scaling && layers == 0) {
                return false;
            }
        } else if (kind == RecordKind::feature_names || kind == RecordKind::output_names) {
            const std::uint32_t count = kind == RecordKind::feature_names ? header.input_size : header.output_size;
            if (record.sizes[0] != count) return false;
            if (!names_are_whole(reinterpret_cast<const char*>(bytes + record.offset), record.length, count))
                return false;
        }
    }
    return layers > 0 && layers == header.num_layers && width == header.output_size;
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

}  // namespace

const char* image_status_text(ImageStatus status) {
    switch (status) {
        case ImageStatus::ok:
        case ImageStatus::argument:
            break;
        case ImageStatus::magic:
            return "expected a deploy file, which begins with CELLSTEP: export one with cellstep.export(model, "
                   "\"m.cellstep\")";
        case ImageStatus::version:
            return "expected a deploy file of version 1: install a cellstep as new as the one that wrote the file";
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
    }
    return nullptr;
}

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
    const ImageHeader& header = candidate.header();
    if (header.version != current_version) return ImageStatus::version;
    if (header.length != size) return ImageStatus::length;
    if (header.dtype > static_cast<std::uint32_t>(DataType::float64)) return ImageStatus::dtype;
    const std::uint32_t sizes[] = {header.input_size, header.output_size, header.num_layers, header.hidden_size};
    for (const std::uint32_t value : sizes)
        if (value == 0 || value > largest_size) return ImageStatus::format;
    if (header.zero || header.window > largest_size || header.horizon > largest_size) return ImageStatus::format;
    if (header.record_count > (size - sizeof(ImageHeader)) / sizeof(ImageRecord)) return ImageStatus::format;
    if (!records_fit(candidate, bytes)) return ImageStatus::format;
    *image = candidate;
    return ImageStatus::ok;
}

ImageStatus check_values(const Image& image) {
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
        if (kind == RecordKind::feature_names || kind == RecordKind::output_names) continue;
        const bool finite = value_bytes(header) == 8
                                ? all_finite<std::uint64_t>(bytes + record.offset, record.length, 0x7ff0000000000000u)
                                : all_finite<std::uint32_t>(bytes + record.offset, record.length, 0x7f800000u);
        if (!finite) return ImageStatus::nonfinite;
    }
    return ImageStatus::ok;
}

}  // namespace core
}  // namespace cellstep
