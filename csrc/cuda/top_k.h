// A call whose teacher kept k classes of each row: what its kernel knows of it, and how a thread
// finds these classes among its own.
#pragma once

#include "../top_k.h"
#include "soft_target_general.h"
#include "soft_target_passes.h"

namespace fastkd::cuda::logits {

// `call` is on the student alone. A slot is one of a row's k classes.
struct TopKCall {
  Call call;
  double beta;
  double softcap;          // of the student's logits, or 0
  int64_t count;           // of a row's slots
  const int32_t* indices;  // of classes, ascending within a row; those of padding are negative
  const void* log_p;       // of slots
  const void* log_rest;    // of all other classes together, one a row; or absent
  void* log_q;             // of slots and, last, of all other classes; or absent
  bool listed_only;        // whether the student's softmax is one of the slots, too
  bool has_classes;        // whether labels are classes, and compared with
  // Of rows, or absent: temperatures, and those whose squares multiply the divergence.
  const void *temperatures, *roots;
};

// One row's slots.
template <class A>
struct Slots {
  const int64_t count;
  const int32_t* const indices;
  const A* const log_p;

  __device__ __forceinline__ Slots(const TopKCall& of, uint32_t row)
      : count(of.count),
        indices(of.indices + row * of.count),
        log_p(static_cast<const A*>(of.log_p) + row * of.count) {}

  // The class of a slot; beyond the last slot there is none.
  __device__ __forceinline__ int64_t at(int64_t j) const {
    return j < count ? int64_t(indices[j]) : INT64_MAX;
  }
  // Whether no earlier slot has the same class.
  __device__ __forceinline__ bool is_first(int64_t j) const {
    return j == 0 || indices[j - 1] != indices[j];
  }
};

// Goes through a row's slots along with its classes, both ascending. Most vectors of classes have
// none, and cost a comparison.
template <class A>
class SlotCursor {
 public:
  __device__ __forceinline__ explicit SlotCursor(const Slots<A>& slots)
      : slots_(slots), class_(slots.at(0)) {
    move_to(0);
  }

  // f(slot, its class), of classes from `first` on, before `last`.
  template <class F>
  __device__ __forceinline__ void over(int64_t first, int64_t last, const F& f) {
    if (class_ < first) move_to(first);
#pragma unroll 1
    for (; class_ < last; class_ = slots_.at(++slot_)) f(slot_, class_);
  }

 private:
  const Slots<A>& slots_;
  int64_t slot_ = 0, class_;

  // To the first slot of this class or a later one: ever longer steps, and then halves of the last.
  __device__ __forceinline__ void move_to(int64_t first) {
    int64_t step = 1;
#pragma unroll 1
    for (; slots_.at(slot_ + step - 1) < first; step *= 2) slot_ += step;
    int64_t last = min(slot_ + step - 1, slots_.count);
#pragma unroll 1
    while (slot_ < last) {
      const int64_t middle = slot_ + (last - slot_) / 2;
      slots_.at(middle) < first ? slot_ = middle + 1 : last = middle;
    }
    class_ = slots_.at(slot_);
  }
};

}  // namespace fastkd::cuda::logits
