// What will be read once the present computation is done, in the order in which it will be. The base product of many
// tokens keeps the processor busy and the memory idle, unless it is made by tiles; the adapters after it are read once
// each, and the processor would wait for them. They are many short, scattered rows: the hardware sees no stream in them.
// So the product asks for them, a few in each of its turns, and what is left is asked for while they themselves are read.
#pragma once

#include <algorithm>
#include <vector>

#include "caches.h"
#include "vectors.h"

namespace loraplex {

class Ahead {
 public:
  void clear() {
    parts_.clear();
    part_ = 0;
    num_left_ = 0;
  }

  // [rows, bytes] with a stride, all in bytes.
  void add(const void* first, int64_t rows, int64_t bytes, int64_t stride) {
    if (bytes == stride) {
      bytes *= rows;
      rows = 1;
    }
    if (rows <= 0 || bytes <= 0) return;
    parts_.push_back({static_cast<const char*>(first), 0, rows, bytes, stride});
    num_left_ += rows * portions(bytes);
  }

  // How many portions each of `num_turns` turns has to ask for: together all, or what a core's second cache keeps
  // until it is read.
  int64_t share(int64_t num_turns) const {
    return num_turns == 0 ? 0 : (std::min(num_left_, portions(second_cache())) + num_turns - 1) / num_turns;
  }

  void ask(int64_t num_portions) {
    num_portions = std::min(num_portions, num_left_);
    num_left_ -= num_portions;
    for (; num_portions > 0; --num_portions) {
      Part& part = parts_[part_];
      // A row that is no whole number of portions ends with one that overlaps.
      const char* p = part.row + std::max<int64_t>(0, std::min(part.asked, part.bytes - kPortion));
      each<kPortion / kLine>([&](auto line) { ask_for(p + line * kLine); });
      part.asked += kPortion;
      if (part.asked < part.bytes) continue;
      part.asked = 0;
      part.row += part.stride;
      if (--part.rows == 0) ++part_;
    }
  }

  void ask_bytes(int64_t bytes) { ask(portions(bytes)); }

 private:
  static constexpr int64_t kLine = 64, kPortion = 4 * kLine;

  struct Part {
    const char* row;
    int64_t asked, rows, bytes, stride;  // of the row; rows that are left
  };

  static constexpr int64_t portions(int64_t bytes) { return (bytes + kPortion - 1) / kPortion; }

  std::vector<Part> parts_;
  size_t part_ = 0;
  int64_t num_left_ = 0;
};

}  // namespace loraplex
