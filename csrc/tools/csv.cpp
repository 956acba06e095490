#include "csv.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <fstream>
#include <iterator>

namespace cellstep {
namespace tools {

namespace {

/// Cuts a text into rows of cells; remembers the line that each row begins on.
class Reader {
public:
    Reader(const std::string& path, const std::string& text) : path_(path), text_(text) {
        if (text_.compare(0, 3, "\xef\xbb\xbf") == 0) at_ = 3;
    }

    /// False at the end of the file. Blank lines are passed over.
    bool next(std::vector<std::string>& cells) {
        while (at_ < text_.size()) {
            line_ = next_line_;
            cells.clear();
            row(cells);
            if (cells.size() > 1 || !cells[0].empty()) return true;
        }
        return false;
    }

    std::size_t line() const { return line_; }

private:
    void row(std::vector<std::string>& cells) {
        for (;;) {
            cells.push_back(cell());
            if (at_ >= text_.size()) return;
            const char end = text_[at_++];
            if (end == ',') continue;
            if (end == '\r' && at_ < text_.size() && text_[at_] == '\n') ++at_;
            ++next_line_;
            return;
        }
    }

    std::string cell() {
        std::string value;
        if (at_ < text_.size() && text_[at_] == '"') {
            for (++at_;; ++at_) {
                if (at_ >= text_.size())
                    throw UserError("expected a closing quote; '" + path_ + "' line " + std::to_string(line_) +
                                    " has none; repair the file");
                if (text_[at_] == '\n') ++next_line_;
                if (text_[at_] == '"') {
                    if (at_ + 1 >= text_.size() || text_[at_ + 1] != '"') break;
                    ++at_;
                }
                value += text_[at_];
            }
            ++at_;
        }
        while (at_ < text_.size() && text_[at_] != ',' && text_[at_] != '\n' && text_[at_] != '\r')
            value += text_[at_++];
        return value;
    }

    const std::string& path_;
    const std::string& text_;
    std::size_t at_ = 0;
    std::size_t line_ = 1;
    std::size_t next_line_ = 1;
};

std::string read_file(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    std::string text;
    if (file) text.assign(std::istreambuf_iterator<char>(file), {});
    if (!file) throw UserError("expected a CSV file at '" + path + "'; it cannot be read; check the path");
    return text;
}

bool parse(std::string cell, float& value) {
    const auto space = [](char c) { return c == ' ' || c == '\t'; };
    while (!cell.empty() && space(cell.back())) cell.pop_back();
    const char* begin = cell.data();
    const char* end = begin + cell.size();
    while (begin != end && space(*begin)) ++begin;
    if (begin != end && *begin == '+') ++begin;  // from_chars knows no plus sign
    double number = 0;
    const auto [stop, error] = std::from_chars(begin, end, number);
    if (begin == end || stop != end || error == std::errc::invalid_argument) return false;
    // Out of the range of double to either side: too small is zero, as every other reader has it.
    if (error == std::errc::result_out_of_range) {
        value = 0.0f;
        return cell.find("e-") != std::string::npos || cell.find("E-") != std::string::npos;
    }
    value = static_cast<float>(number);
    return std::isfinite(value);
}

std::string join(const std::vector<std::string>& names) {
    std::string text;
    for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
    return text;
}

/// Where each wanted column stands in the header.
std::vector<std::size_t> places(const std::string& path, const std::vector<std::string>& header,
                                const std::vector<std::string>& names, std::size_t count) {
    std::vector<std::size_t> found;
    if (names.empty()) {
        if (header.size() != count)
            throw UserError("expected " + std::to_string(count) + " columns, as the model names none; '" + path +
                            "' has " + std::to_string(header.size()) + "; leave the others out");
        for (std::size_t column = 0; column < count; ++column) found.push_back(column);
        return found;
    }
    std::vector<std::string> missing;
    for (const std::string& name : names) {
        const auto place = std::find(header.begin(), header.end(), name);
        if (place == header.end()) {
            missing.push_back(name);
            continue;
        }
        if (std::find(place + 1, header.end(), name) != header.end())
            throw UserError("expected column '" + name + "' once; '" + path + "' has it twice; rename one");
        found.push_back(static_cast<std::size_t>(place - header.begin()));
    }
    if (!missing.empty())
        throw UserError("expected columns " + join(names) + "; '" + path + "' lacks " + join(missing) +
                        "; add them or rename the columns");
    return found;
}

}  // namespace

Table read_csv(const std::string& path, const std::vector<std::string>& names, std::size_t count) {
    const std::string text = read_file(path);
    Reader reader(path, text);
    std::vector<std::string> header;
    if (!reader.next(header)) throw UserError("expected a header line; '" + path + "' is empty; check the file");
    const std::vector<std::size_t> columns = places(path, header, names, count);

    Table table;
    table.columns = columns.size();
    std::vector<std::string> cells;
    while (reader.next(cells)) {
        const std::string where = "'" + path + "' line " + std::to_string(reader.line());
        if (cells.size() != header.size())
            throw UserError("expected " + std::to_string(header.size()) + " cells as in the header; " + where +
                            " has " + std::to_string(cells.size()) + "; repair the line");
        for (const std::size_t column : columns) {
            float value = 0;
            if (!parse(cells[column], value))
                throw UserError("expected a finite number in column '" + header[column] + "'; " + where + " has '" +
                                cells[column] + "'; repair or remove the row");
            table.values.push_back(value);
        }
        ++table.rows;
    }
    return table;
}

}  // namespace tools
}  // namespace cellstep
