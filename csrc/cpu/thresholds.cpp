#include "thresholds.h"

#include <cstring>
#include <stdexcept>
#include <string>

namespace fastkd {

Thresholds thresholds;

namespace {

constexpr int64_t kLanes = 16;   // of the widest vector: a block has whole ones
constexpr int64_t kPage = 4096;  // bytes: what the system is told about has whole ones

}  // namespace

const Threshold known_thresholds[] = {
    {"past_cache", &Thresholds::past_cache, 1, 0, INT64_MAX},
    {"huge_page", &Thresholds::huge_page, kPage, kPage},
    {"per_thread", &Thresholds::per_thread},
    {"block", &Thresholds::block, kLanes, kLanes, kMostBlock},
    {"few_classes", &Thresholds::few_classes, 1, 0},
    {"column_classes", &Thresholds::column_classes, 1, 0},
    {"column_rows", &Thresholds::column_rows},
    {"columns", &Thresholds::columns, kLanes, kLanes},
    {"map_chunk", &Thresholds::map_chunk},
    {"map_piece", &Thresholds::map_piece},
    {"map_page", &Thresholds::map_page, 1, 0},
    {"samples_ahead", &Thresholds::samples_ahead},
    {"hint_piece", &Thresholds::hint_piece},
    {"hint_stretch", &Thresholds::hint_stretch, 1, 1, kMostStretch},
    {"bins", &Thresholds::bins},
    {"depth", &Thresholds::depth},
    {"tile", &Thresholds::tile},
    {nullptr, nullptr},
};

void set_threshold(const char* name, int64_t value) {
  for (const Threshold* one = known_thresholds; one->name != nullptr; ++one) {
    if (std::strcmp(one->name, name)) continue;
    if (value < one->least || value > one->most || value % one->step)
      throw std::invalid_argument(std::string(name) + " must be a multiple of " +
                                  std::to_string(one->step) + " from " +
                                  std::to_string(one->least) + " to " + std::to_string(one->most) +
                                  ", got " + std::to_string(value));
    thresholds.*one->member = value;
    return;
  }
  throw std::invalid_argument(std::string("there is no threshold ") + name);
}

}  // namespace fastkd
