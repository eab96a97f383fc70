// From which sizes on the kernels take another way, and how large the pieces are that they work in.
#pragma once

#include <cstdint>

namespace fastkd {

// What arrays on the stack have room for.
constexpr int kMostBlock = 1024, kMostStretch = 1024;

// The defaults are what measured fastest; docs/performance.md and the code that reads a threshold
// say why. Results are right with any that `set_threshold` accepts: tests lower them, so that small
// tensors reach what is there for large ones.
struct Thresholds {
  int64_t past_cache = int64_t(8) << 20;  // bytes of gradients that are written past the cache
  int64_t huge_page = int64_t(2) << 20;   // bytes of a page that a large gradient may lie in
  int64_t per_thread = 16384;             // elements that are worth waking a thread for

  int64_t block = kMostBlock;     // classes of a row at a time
  int64_t few_classes = 256;      // up to which several rows are taken together
  int64_t column_classes = 4096;  // up to which rows that lie side by side are
  int64_t column_rows = 8;        // from which on they are
  int64_t columns = 128;          // of these in a tile

  int64_t map_chunk = 4096;   // positions of one unit of work
  int64_t map_piece = 65536;  // elements of one unit of work of a gradient
  int64_t map_page = 4096;    // bytes between planes from which on the next ones are asked for
  int64_t samples_ahead = 4;  // for each thread, from which on it asks for its next sample

  int64_t hint_piece = 32768;           // elements of one unit of work
  int64_t hint_stretch = kMostStretch;  // elements in arithmetic precision at a time

  int64_t bins = 128;   // of a plane that are pooled together, at least
  int64_t depth = 128;  // coordinates of points at a time
  int64_t tile = 16;    // rows of angles that share what is read of a vertex
};

// Those in use, by every instruction set.
extern Thresholds thresholds;

// What a threshold must be: a multiple of `step`, from `step` or 0 to `most`.
struct Threshold {
  const char* name;
  int64_t Thresholds::* member;
  int64_t step = 1, least = 1, most = INT32_MAX;
};

// All of them; the last one has no name.
extern const Threshold known_thresholds[];

// Throws std::invalid_argument for what is no threshold, or cannot be the value of one.
void set_threshold(const char* name, int64_t value);

}  // namespace fastkd
