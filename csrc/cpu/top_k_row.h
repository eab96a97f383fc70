// A row whose teacher kept k classes: one pass over the student's logits leaves the exponentials of
// the classes that no slot lists in cache, a second over the cache writes the gradient. The listed
// ones are taken out of a block as it is loaded, so that the rest of the mass is a sum of its own,
// whatever the listed classes leave of it.
#pragma once

#include <algorithm>

#include "softcap.h"
#include "top_k.h"
#include "top_k_block.h"

namespace fastkd::FASTKD_ISA {

// One row of a call.
template <class A>
class Row {
 public:
  Row(const Arguments<A>& a, const Slots<A>& slots, const Wanted& wanted, int64_t row)
      : a_(a),
        slots_(slots),
        wanted_(wanted),
        row_(row),
        k_(slots.k),
        indices_(slots.indices + row * slots.k),
        memory_(a.classes, slots.k, wanted),
        offset_(a.rows.offset(a.rows.sides[kStudent], row)) {
    while (padding_ < k_ && indices_[padding_] < 0) ++padding_;
    here_ = padding_;
    while (here_ < k_ && class_of(here_) < 0) ++here_;
  }

  void run() {
    A label = 0;
    if (slots_.sums) {
      if (wanted_.reads) read_blocks();
      label = take_whole_row();
    } else {
      const Side& student = a_.rows.sides[kStudent];
      if (wanted_.hard)
        gather(*student.tensor, offset_ + a_.labels[row_] * student.class_stride,
               student.class_stride, 1, &label);
      wanted_.reads ? read_blocks() : read_slots();
    }
    add_up();
    compare();
    if (a_.losses) {
      const double cross_entropy_found =
          wanted_.hard
              ? cross_entropy(std::log(hard_.value) * kLogitScale, shift(hard_.maximum),
                              double(label) * kLogitScale,
                              sum_of_logits_ / double(a_.all_classes()), a_.p.label_smoothing)
              : 0;
      a_.write(row_, {0, 0, 0, 0, 0, 0, 0}, {total_.phi, cross_entropy_found});
    }
    if (a_.to_student) wanted_.reads ? write_gradient() : write_slots();
  }

  // Of the classes here.
  void sum(double* to) {
    read_blocks();
    to[kMaximum] = rest_.maximum;
    to[kSum] = rest_.value;
    to[kSumAt1] = wanted_.own_hard ? rest_hard_.value : rest_.value;
    to[kLogits] = sum_of_logits_;
  }

 private:
  // The class of a slot, counted from the first one here.
  int64_t class_of(int64_t slot) const { return indices_[slot] - slots_.first; }

  // Whether a slot has a class that the one before it has not.
  bool is_first(int64_t slot) const {
    return slot == padding_ || indices_[slot] != indices_[slot - 1];
  }

  // In the place of what is here. The label's logit is what it returns.
  A take_whole_row() {
    const double* const sums = slots_.sums + row_ * kSums;
    const A* const logits = slots_.logits + row_ * (k_ + 1);
    rest_ = {sums[kMaximum], sums[kSum]};
    rest_hard_ = {sums[kMaximum], sums[kSumAt1]};
    sum_of_logits_ = sums[kLogits];
    std::copy(logits, logits + k_, memory_.logits);
    return logits[k_];
  }

  void read_slots() {
    const Side& student = a_.rows.sides[kStudent];
    const auto at = [&](int64_t j) { return offset_ + indices_[j] * student.class_stride; };
    const int64_t bytes = size_of(student.tensor->dtype);
    for (int64_t j = padding_; j < k_; ++j)
      __builtin_prefetch(student.tensor->data + at(j) * bytes);
    for (int64_t j = padding_; j < k_; ++j) {
      A logit;
      gather(*student.tensor, at(j), 1, 1, &logit);
      memory_.logits[j] = logit;
    }
  }

  // One read of all classes: listed logits go to their slots, and their exponentials are 0.
  void read_blocks() {
    const Side& student = a_.rows.sides[kStudent];
    // Where the softmax at T is over the slots alone, what is read is for the cross-entropy.
    const Exp<A>& exp = slots_.listed_only ? a_.raw_exp_hard : a_.raw_exp_soft;
    const double rate = slots_.listed_only ? 1 : a_.rates.inverse;
    const int64_t stride = student.class_stride, bytes = size_of(student.tensor->dtype);
    const int step = stride == 1 ? int(bytes) * Simd<A>::width : 0;
    alignas(64) A x[kMostBlock];
    int64_t slot = here_;
    for (int64_t b = 0; b < memory_.blocks; ++b) {
      const int64_t first = b * memory_.width;
      const int n = size_of_block(b);
      bring(student, offset_ + first * stride, n, x);
      if (a_.p.label_smoothing > 0 && wanted_.hard) sum_of_logits_ += sum_of_logits(x, n);
      for (; slot < k_ && class_of(slot) < first + n; ++slot) {
        A& logit = x[class_of(slot) - first];
        memory_.logits[slot] = is_first(slot) ? logit : memory_.logits[slot - 1];
        logit = A(-INFINITY);
      }
      const A maximum = memory_.maxima[b] = largest_of(x, n);
      const int64_t at = (offset_ + first * stride) * bytes;
      const char* const ahead = student.tensor->data + at + kAhead;
      add(rest_, maximum, exponentiate(x, n, maximum, exp, memory_.student + first, ahead, step),
          rate);
      if (wanted_.own_hard)
        add(rest_hard_, maximum,
            exponentiate(x, n, maximum, a_.raw_exp_hard, memory_.hard + first, ahead, step), 1);
    }
  }

  static void add(Sum& to, double maximum, double value, double rate) {
    const double top = maximum > to.maximum ? maximum : to.maximum;
    to.value =
        to.value * Rates::moving(to.maximum, top, rate) + value * Rates::moving(maximum, top, rate);
    to.maximum = top;
  }

  // The sums over all classes, or over the slots.
  void add_up() {
    double largest = -INFINITY;
    for (int64_t j = padding_; j < k_; ++j)
      if (memory_.logits[j] > largest) largest = memory_.logits[j];
    const auto with_slots = [&](const Sum* rest, double inverse, bool each) {
      Sum of;
      of.maximum = rest && rest->maximum > largest ? rest->maximum : largest;
      if (rest) of.value = rest->value * Rates::moving(rest->maximum, of.maximum, inverse);
      for (int64_t j = padding_; j < k_; ++j)
        if (each || is_first(j)) of.value += of.exponential(memory_.logits[j], inverse);
      return of;
    };
    const double inverse = a_.rates.inverse;
    if (slots_.listed_only) {
      soft_ = with_slots(nullptr, inverse, true);
      // The sums of whole rows are of all classes then.
      if (wanted_.hard) hard_ = slots_.sums ? rest_ : with_slots(&rest_, 1, false);
    } else {
      soft_ = with_slots(&rest_, inverse, false);
      if (wanted_.hard) hard_ = wanted_.own_hard ? with_slots(&rest_hard_, 1, false) : soft_;
    }
  }

  // The terms of the slots and of the rest.
  void compare() {
    const double beta = a_.p.beta;
    const Divergence which = a_.p.divergence;
    const double log_total = std::log(soft_.value) * kLogitScale, inverse = a_.rates.inverse;
    A* const log_q = slots_.log_q ? slots_.log_q + row_ * (k_ + 1) : nullptr;
    for (int64_t j = 0; log_q && j < padding_; ++j) log_q[j] = A(-INFINITY);
    for (int64_t j = padding_; j < k_; ++j) {
      const double log_p = slots_.log_p[row_ * k_ + j];
      const Slot of(log_p * kLogitScale, soft_.apart(memory_.logits[j], inverse) - log_total);
      const Terms<double> found = terms_of(which, beta, of);
      memory_.q[j] = of.q;
      memory_.psi[j] = found.psi;
      count(found);
      if (log_q) log_q[j] = A(of.log_q / kLogitScale);
    }
    double of_rest = -INFINITY;
    if (!slots_.listed_only && (slots_.log_rest || log_q))
      of_rest =
          soft_.apart(rest_.maximum, inverse) - log_total + std::log(rest_.value) * kLogitScale;
    if (log_q) log_q[k_] = A(of_rest / kLogitScale);
    if (slots_.log_rest) {
      const Slot of(double(slots_.log_rest[row_]) * kLogitScale, of_rest);
      const Terms<double> found = terms_of(which, beta, of);
      psi_rest_ = found.psi;
      count(found);
    }
  }

  void count(const Terms<double>& found) {
    total_.phi += found.phi;
    total_.psi += found.psi;
  }

  int size_of_block(int64_t b) const {
    const int64_t left = a_.classes - b * memory_.width;
    return int(left < memory_.width ? left : memory_.width);
  }

  void write_gradient() const {
    const Side& side = a_.rows.sides[kToStudent];
    const int64_t to = a_.rows.offset(side, row_), stride = side.class_stride;
    const Weights by = a_.weights_of(row_);
    const A smoothing =
        A(wanted_.hard ? by.hard * a_.p.label_smoothing / double(a_.all_classes()) : 0);
    const double of_label = wanted_.hard ? by.hard * (1 - a_.p.label_smoothing) : 0;
    const int64_t label = wanted_.hard ? a_.labels[row_] : -1;
    alignas(64) A g[kMostBlock];
    int64_t slot = here_;
    for (int64_t b = 0; b < memory_.blocks; ++b) {
      const int64_t first = b * memory_.width;
      const int n = size_of_block(b);
      write_rest(b, n, by, smoothing, g);
      while (slot < k_ && class_of(slot) < first + n) {
        const int64_t c = class_of(slot);
        g[c - first] = A(of_listed(slot, by) - smoothing);
      }
      if (label >= first && label < first + n) g[label - first] -= A(of_label);
      uncap(a_, kStudent, row_, first, n, g);
      scatter(g, n, *side.tensor, to + first * stride, stride);
    }
  }

  // Zeros, but for the classes of the slots.
  void write_slots() const {
    const Side& side = a_.rows.sides[kToStudent];
    const Tensor& gradient = *side.tensor;
    const int64_t to = a_.rows.offset(side, row_), stride = side.class_stride;
    const int64_t bytes = size_of(gradient.dtype);
    if (stride == 1)
      std::memset(gradient.data + to * bytes, 0, size_t(a_.classes * bytes));
    else
      a_.write_zeros(row_);
    const Weights by = a_.weights_of(row_);
    for (int64_t slot = here_; slot < k_ && class_of(slot) < a_.classes;) {
      const int64_t c = class_of(slot);
      // Not from where the logit was, which may be a zero by now.
      const double capped = memory_.logits[slot], cap = a_.p.softcap;
      const A g = A(of_listed(slot, by) * (cap == 0 ? 1 : Softcap<double>(cap).slope(capped)));
      scatter(&g, 1, gradient, to + c * stride, 1);
    }
  }

  // The gradient of the classes of a block that no slot lists.
  void write_rest(int64_t b, int n, const Weights& by, A smoothing, A* g) const {
    const int64_t first = b * memory_.width;
    const double maximum = memory_.maxima[b];
    double student = 0, hard = 0;
    if (!slots_.listed_only && by.soft != 0) {
      const double inverse = a_.rates.inverse;
      student = -total_.psi / soft_.value * Rates::moving(maximum, soft_.maximum, inverse);
      if (rest_.value != 0)  // or the student excludes all of it
        student += psi_rest_ / rest_.value * Rates::moving(maximum, rest_.maximum, inverse);
      student *= by.soft;
    }
    if (wanted_.hard) hard = by.hard / hard_.value * Rates::moving(maximum, hard_.maximum, 1);
    const A *const es = memory_.student + first, *const eh = memory_.hard + first;
    const bool own_hard = wanted_.own_hard;
    const A of_student = A(own_hard ? student : student + hard), of_hard = A(hard);
    over_vectors<A>(n, [&](int i, auto lanes) {
      vec_t<A> found = load_lanes<A>(es + i, lanes, A(0)) * of_student - smoothing;
      if (own_hard) found += load_lanes<A>(eh + i, lanes, A(0)) * of_hard;
      store_lanes<A>(found, g + i, lanes);
    });
  }

  // The gradient of the class of this slot and of those after it, which are passed over.
  double of_listed(int64_t& slot, const Weights& by) const {
    const int32_t c = indices_[slot];
    const double logit = memory_.logits[slot];
    double soft = 0, q = 0;
    for (; slot < k_ && indices_[slot] == c; ++slot) {
      soft += memory_.psi[slot];
      q = slots_.listed_only ? q + memory_.q[slot] : memory_.q[slot];
    }
    double found = by.soft == 0 ? 0 : by.soft * (soft - q * total_.psi);
    if (wanted_.hard) found += by.hard * (hard_.exponential(logit, 1) / hard_.value);
    return found;
  }

  const Arguments<A>& a_;
  const Slots<A>& slots_;
  const Wanted& wanted_;
  const int64_t row_, k_;
  const int32_t* const indices_;
  const Memory<A> memory_;
  const int64_t offset_;
  int64_t padding_ = 0,
          here_ = 0;  // how many slots are padding, and how many come before the shard
  Sum rest_, rest_hard_, soft_, hard_;
  Terms<double> total_{0, 0};
  double psi_rest_ = 0, sum_of_logits_ = 0;
};

}  // namespace fastkd::FASTKD_ISA
