/// Deploy files as their parts, to be changed and put together again. What it knows of the format comes from the table
/// in csrc/core/image.h, so that it does not share the loader's mistakes.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

namespace fuzz {

using Bytes = std::vector<unsigned char>;

constexpr std::size_t header_size = 64;
constexpr std::size_t record_size = 64;

template <class T>
T get(const unsigned char* from) {
    T value;
    std::memcpy(&value, from, sizeof(T));
    return value;
}
template <class T>
void put(unsigned char* to, T value) {
    std::memcpy(to, &value, sizeof(T));
}

/// Writes the right checksum into a file that has a header.
inline void fix_checksum(unsigned char* file, std::size_t size) {
    if (size < 16) return;
    put<std::uint32_t>(file + 12, 0);
    std::uint32_t crc = 0xffffffffu;
    for (std::size_t at = 0; at < size; ++at) {
        crc ^= file[at];
        for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (crc & 1 ? 0xedb88320u : 0);
    }
    put<std::uint32_t>(file + 12, ~crc);
}

struct Record {
    std::uint32_t fields[8] = {};  ///< kind, layout, four sizes, flags, activations
    Bytes data;
};

struct DeployFile {
    unsigned char header[header_size] = {};
    std::vector<Record> records;

    /// Of any bytes; what is not there is left out.
    explicit DeployFile(const std::uint8_t* file, std::size_t size) {
        std::memcpy(header, file, size < header_size ? size : header_size);
        const std::size_t count = get<std::uint32_t>(header + 24);
        for (std::size_t k = 0; k < count && k < 16; ++k) {
            const std::size_t at = header_size + k * record_size;
            if (at + record_size > size) break;
            Record record;
            std::memcpy(record.fields, file + at, sizeof(record.fields));
            const std::uint64_t offset = get<std::uint64_t>(file + at + 32);
            const std::uint64_t length = get<std::uint64_t>(file + at + 40);
            if (offset <= size && length <= size - offset) record.data.assign(file + offset, file + offset + length);
            records.push_back(record);
        }
    }

    /// With the right magic, version, lengths, offsets and checksum.
    Bytes assembled() {
        Bytes file(header, header + header_size);
        std::memcpy(file.data(), "CELLSTEP", 8);
        put<std::uint32_t>(file.data() + 8, 3);
        put<std::uint32_t>(file.data() + 24, static_cast<std::uint32_t>(records.size()));
        file.resize(header_size + records.size() * record_size);
        for (std::size_t k = 0; k < records.size(); ++k) {
            file.resize((file.size() + 63) / 64 * 64);
            unsigned char* record = file.data() + header_size + k * record_size;
            std::memcpy(record, records[k].fields, sizeof(records[k].fields));
            put<std::uint64_t>(record + 32, file.size());
            put<std::uint64_t>(record + 40, records[k].data.size());
            file.insert(file.end(), records[k].data.begin(), records[k].data.end());
        }
        put<std::uint64_t>(file.data() + 16, file.size());
        fix_checksum(file.data(), file.size());
        return file;
    }

    /// Lets sizes agree with each other and data be as long as they say, as far as there is a way.
    void agree() {
        const std::size_t value = get<std::uint32_t>(header + 28) == 1 ? 8 : 4;
        std::uint32_t width = get<std::uint32_t>(header + 32);
        std::uint32_t rows = 0;
        std::uint64_t h_all = 0;
        std::uint64_t c_all = 0;
        std::uint64_t h_first = 0;
        std::uint64_t c_first = 0;
        bool uniform = true;
        for (Record& record : records) {
            std::uint32_t* sizes = record.fields + 2;
            std::size_t bytes = record.data.size();
            switch (record.fields[0]) {
                case 1:
                case 4:
                    sizes[0] = width;
                    bytes = 2 * width * value;
                    break;
                case 2: {
                    sizes[0] = width;
                    const std::size_t units = sizes[1] = sizes[1] % 41;
                    const std::size_t recurrent = sizes[2] = sizes[2] % 41;
                    const std::size_t h = recurrent ? recurrent : units;
                    const std::uint32_t flags = record.fields[6];
                    const std::size_t directions = flags & 1 ? 2 : 1;
                    const std::size_t columns = 4 * ((units + 3) / 4 * 4);
                    std::size_t packed = columns * (1 + width + h) * value;
                    if (record.fields[1] == 2 || record.fields[1] == 3) packed = columns * (4 + 2 * (width + h));
                    if (record.fields[1] == 4)
                        packed = (width + 15) / 16 * 64 + columns * 4 * (5 + (width + 3) / 4 + (h + 3) / 4);
                    std::size_t options = recurrent * units;
                    if (flags & 2) options += 3 * units;
                    if (flags & 4) options += 10 * units;
                    if (flags & 32) options += h + units;
                    bytes = directions * (packed + options * value) + 3 * value;
                    width = static_cast<std::uint32_t>(directions * (h + (flags & 64 ? units : 0)));
                    uniform = uniform && (rows == 0 || (h == h_first && units == c_first));
                    h_first = h;
                    c_first = units;
                    rows += static_cast<std::uint32_t>(directions);
                    h_all += directions * h;
                    c_all += directions * units;
                    break;
                }
                case 3:
                    sizes[0] = width;
                    width = sizes[1] = sizes[1] % 41;
                    bytes = (1 + std::size_t{sizes[0]}) * width * value;
                    break;
                case 7:
                    sizes[0] %= 9;
                    bytes = (1 + sizes[0] * (std::size_t{get<std::uint32_t>(header + 32)} + width)) * value;
                    break;
                case 8:
                    sizes[0] = width;
                    bytes = 4 * width;
                    break;
            }
            record.data.resize(bytes < 1u << 16 ? bytes : 0, 0);
        }
        put<std::uint32_t>(header + 36, width);
        put<std::uint32_t>(header + 40, uniform ? rows : 1);
        put<std::uint32_t>(header + 44, static_cast<std::uint32_t>(uniform ? h_first : h_all));
        put<std::uint32_t>(header + 48, static_cast<std::uint32_t>(uniform ? c_first : c_all));
    }
};

/// Makes the sums in int8 weights fit the weights, which no mutation would find, and weights be none of -128.
inline void fix_int8(Record& record) {
    if (record.fields[0] != 2 || record.fields[1] != 4) return;
    const std::size_t inputs = record.fields[2];
    const std::size_t units = record.fields[3];
    const std::size_t h = record.fields[4] ? record.fields[4] : units;
    if (units == 0 || units > 40 || inputs == 0 || inputs > 4096) return;
    unsigned char* const data = record.data.data();
    std::size_t panel = (inputs + 15) / 16 * 64;
    for (std::size_t left = (units + 3) / 4 * 4; left > 0;) {
        const std::size_t width = left > 12 ? 16 : left > 4 ? 8 : 4;
        const std::size_t columns = 4 * width;
        const std::size_t groups[2] = {(inputs + 3) / 4, (h + 3) / 4};
        std::size_t weights = panel + 20 * columns;
        for (int part = 0; part < 2; ++part) {
            if (weights + 4 * groups[part] * columns > record.data.size()) return;
            for (std::size_t column = 0; column < columns; ++column) {
                std::int32_t sum = 0;
                for (std::size_t at = 0; at < 4 * groups[part]; ++at) {
                    unsigned char& weight = data[weights + 4 * (at / 4 * columns + column) + at % 4];
                    if (weight == 0x80) weight = 0x81;
                    sum += static_cast<signed char>(weight);
                }
                put<std::int32_t>(data + panel + (part == 0 ? 12 : 16) * columns + 4 * column, -128 * sum);
            }
            weights += 4 * groups[part] * columns;
        }
        panel = weights;
        left -= left < width ? left : width;
    }
}

}  // namespace fuzz
