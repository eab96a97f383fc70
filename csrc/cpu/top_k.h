// Teachers that kept k classes: the slots of a call, what it asks of a row, and where a row's
// numbers are.
#pragma once

#include "../top_k.h"
#include "soft_target.h"

namespace fastkd::FASTKD_ISA {

// The slots of all rows, and what whole rows have if the classes are a shard.
template <class A>
struct Slots {
  int64_t k;
  const int32_t* indices;
  bool listed_only;
  int64_t first;  // class of the shard
  const A *log_p = nullptr, *log_rest = nullptr;
  A* log_q = nullptr;
  const double* sums = nullptr;
  const A* logits = nullptr;
};

// Where the sums of a row are: see ../operators.inc.
enum { kMaximum, kSum, kSumAt1, kLogits, kSums };

// What a call asks of a row.
struct Wanted {
  bool hard;      // the cross-entropy
  bool reads;     // any class that no slot lists; of whole rows the sums are there
  bool own_hard;  // exponentials at temperature 1 beside those at T

  template <class A>
  Wanted(const Arguments<A>& a, const Slots<A>& slots, bool parts)
      : hard(a.labels && a.p.labels_are_classes && (a.p.hard_weight != 0 || parts)),
        reads((hard || !slots.listed_only) && (!slots.sums || a.to_student)),
        own_hard(hard && a.rates.has_hard && !slots.listed_only) {}
};

// Of a row: its blocks' exponentials of classes that no slot lists, each relative to the block's
// maximum, and its slots. In a thread's scratch memory.
template <class A>
struct Memory {
  int64_t width = thresholds.block, blocks;
  A *student, *hard, *maxima;
  double *logits, *psi, *q;  // of slots

  Memory(int64_t classes, int64_t k, const Wanted& wanted)
      : blocks(wanted.reads ? (classes + width - 1) / width : 0) {
    const int64_t room = blocks * width, kept = room * (wanted.own_hard ? 2 : 1) + blocks;
    const int64_t in_doubles = (kept * int64_t(sizeof(A)) + 7) / 8;
    double* const memory = scratch<double>(3 * k + in_doubles);
    logits = memory;
    psi = logits + k;
    q = psi + k;
    student = reinterpret_cast<A*>(q + k);
    hard = student + (wanted.own_hard ? room : 0);
    maxima = hard + room;
  }
};

// Sums of a row's exponentials, relative to a maximum.
struct Sum {
  double maximum = -INFINITY, value = 0;

  // Of a logit, scaled, and its exponential. `inverse` is 1 / T.
  double apart(double logit, double inverse) const {
    return (logit * kLogitScale - shift(maximum)) * inverse;
  }
  double exponential(double logit, double inverse) const {
    return std::exp(apart(logit, inverse) / kLogitScale);
  }
};

}  // namespace fastkd::FASTKD_ISA
