/// The `.cellstep` deploy file: a flat little-endian image of one model, read in place.
///
/// | bytes | header |
/// | --- | --- |
/// | 0..8 | magic "CELLSTEP" |
/// | 8..12 | version, 3 |
/// | 12..16 | CRC-32 (IEEE 802.3, as in zlib) of the whole file with these four bytes zero |
/// | 16..24 | total length in bytes |
/// | 24..28 | number of records |
/// | 28..32 | type of all values: 0 float32, 1 float64 |
/// | 32..40 | input_size, output_size |
/// | 40..52 | state_layers, h_size, c_size: the state is h (state_layers, h_size) and c (state_layers, c_size) |
/// | 52..60 | window, horizon: steps, 0 if not said |
/// | 60..64 | what the heads see, see Answers |
///
/// Then the records, 64 bytes each, and their data in the same order, each piece at the next multiple of 64 bytes. The
/// file ends with the last of them.
///
/// | bytes | record |
/// | --- | --- |
/// | 0..4 | kind, see RecordKind |
/// | 4..8 | layout of the data, see below |
/// | 8..24 | four sizes, unused ones zero |
/// | 24..28 | options of an LSTM, see LayerFlags |
/// | 28..32 | activations (kernels.h), a byte each: of an LSTM's gates, candidate and output; of a dense layer |
/// | 32..40 | offset of the data from the beginning of the file |
/// | 40..48 | length of the data in bytes |
/// | 48..64 | zero |
///
/// The records that compute stand in the order in which they are applied: at most one input scaling, dense layers,
/// LSTM layers, of which there is at least one, dense layers, at most one output scaling, at most one skip. The others
/// follow in any order, at most one of a kind.
///
/// Layout: 1 for packed weights (pack.h, layer.h), else 0. LSTM records of a float32 file may have 2, 3 or 4, where the
/// packed weights alone are bfloat16, float16 or int8 and whatever stands behind them is float32.
///
/// State: where all LSTM layers have the same sizes each layer and direction has a row of h and c, in order, forward
/// before backward; otherwise state_layers is 1 and the values of all lie side by side.
///
/// Data of an LSTM record: for each direction the packed weights (pack.h), then where the flags say so weight_hr
/// transposed (hidden_size, proj_size), peepholes (3 hidden_size), norm_ih and norm_hh (4 hidden_size each), norm_c and
/// norm_c_bias (hidden_size each), initial h (recurrent size) and initial c (hidden_size); after the directions
/// cell_clip, zoneout of h and zoneout of c.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/nonblocking.h"
#include "core/pack.h"

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
    newer = 17,
    unsupported = 32,  ///< and the number of an option (LeftOut), which this build leaves out
};

/// Options that a build may leave out. The first are the bits of LayerFlags.
enum class LeftOut : int {
    bidirectional = 0,
    peephole = 1,
    layer_norm = 2,
    coupled = 3,
    residual = 4,
    cells = 6,
    fast = 7,
    projection = 8,
    activation = 9,
    cell_clip = 10,
    zoneout = 11,
    narrow_weights = 12,
};

/// With CELLSTEP_PLAIN_ONLY no layer has an option, with CELLSTEP_FLOAT32_ONLY none has narrow weights and no file is
/// float64: what such a model wants is not compiled.
#if defined(CELLSTEP_PLAIN_ONLY)
constexpr bool plain_only = true;
#else
constexpr bool plain_only = false;
#endif
#if defined(CELLSTEP_FLOAT32_ONLY)
constexpr bool float32_only = true;
#else
constexpr bool float32_only = false;
#endif

/// One line on what a status means and what to do; null for ok and argument, which need none.
const char* image_status_text(ImageStatus status);

enum class RecordKind : std::uint32_t {
    input_scaling = 1,   ///< sizes: n; data: n offsets, n scales; x becomes (x - offset) * scale
    lstm = 2,            ///< sizes: input_size, hidden_size, proj_size or 0; data: see above
    dense = 3,           ///< sizes: in_size, out_size; data: packed dense layer
    output_scaling = 4,  ///< sizes: n; data: n offsets, n scales; y becomes y * scale + offset
    feature_names = 5,   ///< sizes: count; data: UTF-8 names, each ended by a zero byte
    output_names = 6,    ///< the same
    test_vector = 7,     ///< sizes: steps; data: tolerance, x (steps, input_size), y (steps, output_size)
    skip = 8,            ///< sizes: output_size; data: as many 32-bit columns of x that are added to y
};

/// What the heads see when whole windows are answered.
enum class Answers : std::uint32_t {
    every = 0,   ///< the output of every step
    last = 1,    ///< the output of the last step
    hidden = 2,  ///< the last hidden state of the last LSTM layer, forward and backward side by side
};

namespace LayerFlags {
constexpr std::uint32_t bidirectional = 1;
constexpr std::uint32_t peephole = 2;
constexpr std::uint32_t layer_norm = 4;
constexpr std::uint32_t coupled = 8;
constexpr std::uint32_t residual = 16;  ///< the layer adds its input to its output
constexpr std::uint32_t initial = 32;   ///< the data hold an initial state
constexpr std::uint32_t cells = 64;     ///< the layer gives the c of its directions behind the h
constexpr std::uint32_t fast = 128;     ///< sigmoid and tanh to 1.6e-5 instead of two units in the last place
constexpr std::uint32_t all = 255;
constexpr std::uint32_t supported = plain_only ? initial : all;
}  // namespace LayerFlags

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
    std::uint32_t state_layers;
    std::uint32_t h_size;
    std::uint32_t c_size;
    std::uint32_t window;
    std::uint32_t horizon;
    std::uint32_t answers;
};

struct ImageRecord {
    std::uint32_t kind;
    std::uint32_t layout;
    std::uint32_t sizes[4];
    std::uint32_t flags;
    std::uint32_t activations;
    std::uint64_t offset;
    std::uint64_t length;
    std::uint64_t zeros[2];
};

static_assert(sizeof(ImageHeader) == 64 && sizeof(ImageRecord) == 64, "the file's layout");

/// How the weights of an LSTM record are stored, once its layout is checked.
constexpr WeightType weight_type(const ImageRecord& record) {
    return float32_only ? WeightType::full : static_cast<WeightType>(record.layout - 1);
}

/// Options of an LSTM record, once it is checked.
constexpr std::uint32_t layer_flags(const ImageRecord& record) { return record.flags & LayerFlags::supported; }

constexpr std::uint32_t direction_count(const ImageRecord& record) {
    return layer_flags(record) & LayerFlags::bidirectional ? 2 : 1;
}

/// Values of h of one direction of an LSTM record, which are fewer behind a projection.
constexpr std::uint32_t recurrent_size(const ImageRecord& record) {
    return record.sizes[2] && !plain_only ? record.sizes[2] : record.sizes[1];
}

/// A checked image: pointers into its bytes, which must outlive it.
class Image {
public:
    const ImageHeader& header() const { return *reinterpret_cast<const ImageHeader*>(bytes_); }
    const ImageRecord* begin() const { return reinterpret_cast<const ImageRecord*>(bytes_ + sizeof(ImageHeader)); }
    const ImageRecord* end() const { return begin() + header().record_count; }

    /// First record of a kind, or null.
    const ImageRecord* find(RecordKind kind) const CELLSTEP_NONBLOCKING;

    template <class T>
    const T* data(const ImageRecord& record) const {
        return reinterpret_cast<const T*>(bytes_ + record.offset);
    }

    /// Name `index` of the feature or output names, or null.
    const char* name(RecordKind kind, std::size_t index) const;

private:
    const unsigned char* bytes_ = nullptr;
    friend ImageStatus open_image(const void*, std::size_t, Image*);
    friend ImageStatus open_records(const void*, std::size_t, std::uint64_t, Image*);
};

/// Checks everything but the values: that every access the engine will make lies inside the image. Takes well under
/// a microsecond, so that a caller who cannot trust its bytes to stay the same may check at every call.
/// Errors: argument, alignment (8 bytes), magic, version, newer, length, format, dtype, unsupported.
ImageStatus open_image(const void* data, std::size_t size, Image* image);

/// The same of the header and the records alone, which lie in `size` bytes, of an image of `length` bytes whose data
/// lie elsewhere: the image then has no data() and no names, and what the data say of themselves (columns of a skip,
/// names) is not checked.
ImageStatus open_records(const void* data, std::size_t size, std::uint64_t length, Image* image);

/// Whether a layer runs backwards in time as well, so that a sequence cannot be cut into calls.
bool is_bidirectional(const Image& image) CELLSTEP_NONBLOCKING;

/// Values that a caller takes.
enum class Values { finite, any };

/// Checks the checksum, then that every weight and scale is finite, unless any will do, that int8 weights are what
/// pack.h says and that names are UTF-8. Errors: checksum, nonfinite, format.
ImageStatus check_values(const Image& image, Values values = Values::finite);

}  // namespace core
}  // namespace cellstep
