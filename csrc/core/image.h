/// The `.cellstep` deploy file: a flat little-endian image of one model, read in place.
///
/// | bytes | header |
/// | --- | --- |
/// | 0..8 | magic "CELLSTEP" |
/// | 8..12 | version, 1 |
/// | 12..16 | CRC-32 (IEEE 802.3, as in zlib) of the whole file with these four bytes zero |
/// | 16..24 | total length in bytes |
/// | 24..28 | number of records |
/// | 28..32 | type of all values: 0 float32, 1 float64 |
/// | 32..40 | input_size, output_size |
/// | 40..48 | num_layers, hidden_size |
/// | 48..56 | window, horizon: steps, 0 if not said |
/// | 56..64 | zero |
///
/// Then the records, 64 bytes each, and their data, each piece at a multiple of 64 bytes:
///
/// | bytes | record |
/// | --- | --- |
/// | 0..4 | kind, see RecordKind |
/// | 4..8 | layout of the data: 1 for packed weights (pack.h, layer.h), else 0 |
/// | 8..24 | four sizes, unused ones zero |
/// | 24..32 | zero |
/// | 32..40 | offset of the data from the beginning of the file |
/// | 40..48 | length of the data in bytes |
/// | 48..64 | zero |
///
/// The records that compute stand in the order in which they are applied: at most one input scaling, the LSTM
/// layers, at most one dense head, at most one output scaling. The others follow in any order, at most one of a kind.
#pragma once

#include <cstddef>
#include <cstdint>

namespace cellstep {
namespace core {

/// The numbers are those of cellstep_status in cellstep/runtime.h.
enum class ImageStatus {
    ok = 0,
    argument = 1,
    magic = 4,
    version = 5,
    length = 6,
    checksum = 7,
    format = 8,
    dtype = 9,
    nonfinite = 10,
    alignment = 11,
};

/// One line on what a status means and what to do; null for ok and argument, which need none.
const char* image_status_text(ImageStatus status);

enum class RecordKind : std::uint32_t {
    input_scaling = 1,   ///< sizes: n; data: n offsets, n scales; x becomes (x - offset) * scale
    lstm = 2,            ///< sizes: input_size, hidden_size; data: packed layer
    dense = 3,           ///< sizes: in_size, out_size; data: packed dense layer
    output_scaling = 4,  ///< sizes: n; data: n offsets, n scales; y becomes y * scale + offset
    feature_names = 5,   ///< sizes: count; data: UTF-8 names, each ended by a zero byte
    output_names = 6,    ///< the same
    test_vector = 7,     ///< sizes: steps; data: tolerance, x (steps, input_size), y (steps, output_size)
};

enum class DataType : std::uint32_t { float32 = 0, float64 = 1 };

struct ImageHeader {
    char magic[8];
    std::uint32_t version;
    std::uint32_t checksum;
    std::uint64_t length;
    std::uint32_t record_count;
    std::uint32_t dtype;
    std::uint32_t input_size;
    std::uint32_t output_size;
    std::uint32_t num_layers;
    std::uint32_t hidden_size;
    std::uint32_t window;
    std::uint32_t horizon;
    std::uint64_t zero;
};

struct ImageRecord {
    std::uint32_t kind;
    std::uint32_t layout;
    std::uint32_t sizes[4];
    std::uint64_t zero;
    std::uint64_t offset;
    std::uint64_t length;
    std::uint64_t zeros[2];
};

static_assert(sizeof(ImageHeader) == 64 && sizeof(ImageRecord) == 64, "the file's layout");

/// A checked image: pointers into its bytes, which must outlive it.
class Image {
public:
    const ImageHeader& header() const { return *reinterpret_cast<const ImageHeader*>(bytes_); }
    const ImageRecord* begin() const { return reinterpret_cast<const ImageRecord*>(bytes_ + sizeof(ImageHeader)); }
    const ImageRecord* end() const { return begin() + header().record_count; }

    /// First record of a kind, or null.
    const ImageRecord* find(RecordKind kind) const;

    template <class T>
    const T* data(const ImageRecord& record) const {
        return reinterpret_cast<const T*>(bytes_ + record.offset);
    }

    /// Name `index` of the feature or output names, or null.
    const char* name(RecordKind kind, std::size_t index) const;

private:
    const unsigned char* bytes_ = nullptr;
    friend ImageStatus open_image(const void*, std::size_t, Image*);
};

/// Checks everything but the values: that every access the engine will make lies inside the image. Takes well under
/// a microsecond, so that a caller who cannot trust its bytes to stay the same may check at every call.
/// Errors: argument, alignment (8 bytes), magic, version, length, format, dtype.
ImageStatus open_image(const void* data, std::size_t size, Image* image);

/// Checks the checksum, then that every weight and scale is finite. Errors: checksum, nonfinite.
ImageStatus check_values(const Image& image);

}  // namespace core
}  // namespace cellstep
