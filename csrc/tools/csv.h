/// Reading the columns that a model needs out of a CSV file (RFC 4180, header line first).
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>
#include <vector>

namespace cellstep {
namespace tools {

/// Something the user can mend; its text is one line: what was expected, what came, what to do.
struct UserError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

/// Rows of float32 values, (rows, columns).
struct Table {
    std::size_t rows = 0;
    std::size_t columns = 0;
    std::vector<float> values;

    const float* row(std::size_t index) const { return values.data() + index * columns; }
};

/// Reads the columns `names`, wherever they stand; without names, all columns, which must be `count`. Numbers are
/// parsed as double and rounded to float, independent of the locale.
/// Throws UserError for anything but finite numbers in whole rows.
Table read_csv(const std::string& path, const std::vector<std::string>& names, std::size_t count);

}  // namespace tools
}  // namespace cellstep
