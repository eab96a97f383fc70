// Any divergence at any temperatures, one teacher or several, rows of any length and strides: a
// pass for the sums of each tensor, one for the divergence, and one for the gradients. Each reads
// the logits again.
#include "soft_target_general_row.h"

namespace fastkd::cuda {
namespace logits {
namespace {

template <class A, bool kIsColumns>
struct General : GeneralPasses<A, kIsColumns> {
  using Base = GeneralPasses<A, kIsColumns>;
  using Base::call, Base::general, Base::leads, Base::N, Base::shared;
  using typename Base::Classes, typename Base::Row;

  const double divisor;
  const bool is_backward, to_student, to_teacher;

  __device__ __forceinline__ General(const GeneralCall& of, PassesShared<A>& shared,
                                     int64_t vectors, double counted)
      : Base(of, shared, vectors),
        divisor(divisor_of(of.mean.call, counted)),
        is_backward(of.mean.call.is_backward()),
        to_student(of.mean.call.sides[kToStudent].data != nullptr),
        to_teacher(of.mean.call.sides[kToTeacher].data != nullptr) {}

  // One row, whose losses are added to the total.
  __device__ __forceinline__ void run(uint32_t row, Losses& total) const {
    Row of(general, row);
    of.start.phase = kIsColumns ? 0 : phase_of<N>(call, of.start.at[kStudent]);
    if (ignores(call, row)) return skip(of);
    // Before the barriers behind which the gradient may take the logits' place.
    const double logit =
        leads && !is_backward ? logit_of<Any>(call, of.start.at[kStudent], of.label) : 0;
    this->find_sums(of);
    if (general.has_statistics() && general.terms == nullptr)
      find_mean(of);
    else
      find_divergence(of);
    if (leads && general.terms != nullptr)
      write_terms(of.row, of.divergence / kLogitScale, of.mean);
    if (leads && !is_backward) write(of, logit, total);
    if (to_student || to_teacher || general.to_temperatures != nullptr) write_gradients(of);
  }

 private:
  __device__ __forceinline__ void skip(const Row& of) const {
    const A zeros[N] = {};
    if (leads && general.terms != nullptr) write_terms(of.row, 0, 0);
    if (leads && !is_backward) write_ignored_row<A>(call, of.row);
    if (leads) write_temperatures(of.row, 0, 0, 0);
    this->over_vectors(of.start.phase, [&](int64_t i) { store(zeros, zeros, of, i); });
  }

  __device__ __forceinline__ void write_terms(uint32_t row, double phi, double psi) const {
    general.terms[2 * int64_t(row)] = phi;
    general.terms[2 * int64_t(row) + 1] = psi;
  }

  // From the statistics, which forward keeps of KL divergences. Of another one they are those of
  // all shards of the classes, and have the mean in the place of the divergence.
  __device__ __forceinline__ void find_mean(Row& of) const {
    of.divergence = double(static_cast<const A*>(call.statistics)[int64_t(of.row) * kCount + kKl]);
    of.mean = call.divergence == Divergence::forward_kl
                  ? ForwardKl::mean_of(of.divergence, of.log_ratio())
              : call.divergence == Divergence::reverse_kl
                  ? ReverseKl::mean_of(of.divergence, of.log_ratio())
                  : of.divergence;
  }

  __device__ __forceinline__ void find_divergence(Row& of) const {
    double sums[2] = {};
    this->over_vectors(of.start.phase, [&](int64_t i) {
      Classes at;
      this->read_classes(of, i, at);
      A term = 0, other = 0;
      with_any_divergence(call.divergence, [&](auto divergence) {
        using D = decltype(divergence);
#pragma unroll
        for (int k = 0; k < N; ++k) {
          const auto found = of_class<D>(at.x[k], at.y[k], at.es[k], at.et[k], of.target);
          term += found.term;
          other += found.other;
        }
      });
      sums[0] += double(term);
      sums[1] += double(other);
    });
    add_up(sums);
    const bool is_one = general.has_one_teacher(), is_stated = general.is_stated();
    with_any_divergence(call.divergence, [&](auto divergence) {
      using D = FactorsOf<decltype(divergence)>;
      if constexpr (D::kNormalizes) {
        const RowTerms terms{sums[0], sums[1]};
        of.divergence = terms.divergence(double(of.state.student), double(of.state.teacher));
        of.mean = terms.mean(double(of.state.student), double(of.state.teacher));
        if (is_stated) this->use_mass(of, terms);
      } else {
        of.state.difference = A(sums[0]);
        if (!is_one) of.state.teacher = A(sums[1]);
        of.mean = mean_of<D>(of.state, of.rates.inverse);
        of.divergence = divergence_of<D>(of.state, of.rates.inverse);
        if (is_stated) {
          const Mass mass(of.state.teacher_max, of.state.teacher);
          of.divergence = with_mass(D{}, of.divergence, mass);
          of.weight = weight_of(D{}, mass);
        }
      }
    });
  }

  // Where a teacher states its probabilities their mass is any, and so is the divergence's sign.
  __device__ __forceinline__ void use_mass(Row& of, const RowTerms& terms) const {
    const double mass = Mass(of.state.teacher_max, of.state.teacher).value;
    const bool is_valid = of.state.student > 0 && mass >= 0;
    const double phi = terms.phi + taken_off(call.divergence, general.beta, mass);
    of.divergence = is_valid ? phi * kLogitScale : double(NAN);
    of.mean = is_valid ? terms.psi : double(NAN);
  }

  // Adds up what all threads have. The memory is free again for the next sums.
  __device__ __forceinline__ void add_up(double (&sums)[2]) const {
    if constexpr (!kIsColumns) {
      block_sums(sums, shared.sums);
      __syncthreads();
    }
  }

  __device__ __forceinline__ void write(const Row& of, double logit, Losses& total) const {
    const MeanRates<A>& rates = of.rates.student;
    Losses losses{of.divergence, cross_entropy_of(of.state, rates, call, of.label, logit)};
    write_statistics(call, of.row, of.state, rates.has_hard ? of.state.hard : of.state.student,
                     losses);
    losses.divergence *= of.rates.squared;
    write_losses<A>(call, of.row, losses, total);
  }

  __device__ __forceinline__ Weights<A> weights_of(const Row& of) const {
    const double by = double(grad_output_of<A>(call, of.row));
    Weights<A> weights(call, divisor, by);
    const double soft =
        weighted(weighted(call.soft_weight, of.rates.squared / of.rates.temperature), of.weight) /
        divisor;
    weights.soft = A(soft * by);
    return weights.of_shard(call);
  }

  __device__ __forceinline__ void write_gradients(const Row& of) const {
    const Weights<A> weights = weights_of(of);
    RowFactors<A> by;
    with_any_divergence(call.divergence, [&](auto divergence) {
      by = RowFactors<A>(FactorsOf<decltype(divergence)>(), of.state, of.mean, of.rates.inverse,
                         of.rates.student, weights, of.label);
    });
    // Of the teacher's gradient: what log p − log q less the divergence has besides the logits.
    const bool to_others = to_teacher || general.to_temperatures != nullptr;
    const A surplus = to_others ? A(of.log_ratio() - of.divergence) : A(0);
    const A to_own = A(double(weights.soft) * of.rates.ratio), inverse = A(of.rates.inverse);
    const A of_student = to_own * of.target.to_q, of_teacher = to_own * of.target.to_p;
    double sums[2] = {};  // of the products of each side's logits with their gradients
    this->over_vectors(of.start.phase, [&](int64_t i) {
      Classes at;
      A kept[N], g[N], h[N] = {};
      this->read_classes(of, i, at);
      with_any_divergence(call.divergence, [&](auto divergence) {
        using D = decltype(divergence);
#pragma unroll
        for (int k = 0; k < N; ++k) {
          const A x = at.x[k], y = at.y[k], es = at.es[k], et = at.et[k];
          kept[k] = of_class<D>(x, y, es, et, of.target).kept;
          if constexpr (kIsKl<D>)
            if (to_others && by.soft && !(D::kByTeacher && y == A(-INFINITY)))
              h[k] = D::to_teacher(es, et, (at_student(y, of.target.ratio) - x) * inverse + surplus,
                                   of_student, of_teacher);
        }
      });
      if (general.to_temperatures != nullptr) {
        A by_student = 0, by_teacher = 0;
#pragma unroll
        for (int k = 0; k < N; ++k) {
          const A x = at.x[k], y = at.y[k], soft = at.es[k] * by.student + kept[k] * by.teacher;
          by_student += soft == 0 || x == A(-INFINITY) ? A(0) : soft * x;
          by_teacher += h[k] == 0 || y == A(-INFINITY) ? A(0) : h[k] * y;
        }
        sums[0] += double(by_student);
        sums[1] += double(by_teacher);
      }
#pragma unroll
      for (int k = 0; k < N; ++k) {
        const A eh = by.has_hard ? of.rates.student.exp_hard(at.x[k]) : A(0);
        // Every divergence makes the gradient of what it keeps in the same way.
        g[k] = by.template of_kept<Normalized>(at.es[k], kept[k], eh, i + k == of.label);
      }
      const int phase = of.start.phase;
      if (to_student)
        this->uncap(general.softcap, call.sides[kStudent], of.start.at[kStudent], phase, i, g);
      if (to_teacher)
        this->uncap(general.teacher_softcap, general.mean.teachers[0].tensor, of.teacher_start,
                    phase, i, h);
      store(g, h, of, i);
    });
    if (general.to_temperatures == nullptr) return;
    add_up(sums);
    if (leads) write_temperatures(of, weights.soft, sums);
  }

  // What is wanted of the gradients of N classes.
  __device__ __forceinline__ void store(const A (&student)[N], const A (&teacher)[N], const Row& of,
                                        int64_t i) const {
    const auto put = [&](const A(&gradient)[N], Side side) {
      Start<kSides> start = of.start;
      start.is_aligned = is_aligned(call.sides[side], start.at[side], start.phase);
      store_vector<Any>(gradient, call, side, start, i);
    };
    if (to_student) put(student, kToStudent);
    if (to_teacher) put(teacher, kToTeacher);
  }

  __device__ __forceinline__ void write_temperatures(uint32_t row, double student, double teacher,
                                                     double root) const {
    if (general.to_temperatures == nullptr) return;
    A* const to = static_cast<A*>(general.to_temperatures) + row;
    to[0] = A(student);
    to[int64_t(call.rows)] = A(teacher);
    to[2 * int64_t(call.rows)] = A(root);
  }
  // From the weight of the row's divergence and the sums of products, scaled. At a weight of 0
  // nothing may show, whatever the temperatures are.
  __device__ __forceinline__ void write_temperatures(const Row& of, A weight,
                                                     const double (&sums)[2]) const {
    if (weight == 0) return write_temperatures(of.row, 0, 0, 0);
    const double root = double(static_cast<const A*>(general.roots)[of.row]);
    write_temperatures(
        of.row, sums[0] / kLogitScale / -of.rates.temperature,
        sums[1] / kLogitScale / -of.rates.teacher_temperature,
        2 * double(weight) * of.rates.temperature / root * (of.divergence / kLogitScale));
  }
};

template <class A>
__device__ __forceinline__ double counted_rows_of(const GeneralCall& of, PassesShared<A>& shared) {
  const Call& call = of.mean.call;
  if (!of.has_statistics()) return counted_rows(call, shared.losses);
  if (call.reduction == Reduction::none) return call.rows;
  return double(static_cast<const A*>(call.statistics)[int64_t(call.rows) * kCount]);
}

// Arithmetic in float64 takes twice the registers.
template <class A, bool kIsColumns>
__global__ void __launch_bounds__(kIsColumns ? kColumnThreads : kBlockRowThreads,
                                  (kIsColumns ? 4 : 2) / (sizeof(A) == 8 ? 2 : 1))
    soft_target_general_kernel(const __grid_constant__ GeneralCall of, int64_t vectors,
                               const Tickets tickets) {
  const Call& call = of.mean.call;
  if (is_there<A>(call)) return;
  auto& shared = shared_memory<PassesShared<A>>();
  const double counted = counted_rows_of(of, shared);
  const General<A, kIsColumns> general(of, shared, vectors, counted);
  Losses total;
  over_rows<kIsColumns>(call, [&](uint32_t row) { general.run(row, total); });
  write_loss<A>(call, kIsColumns ? over_warp(total) : total, counted, tickets, shared.losses);
}

template <class A, bool kIsColumns>
void launch_typed(const GeneralCall& of, const Scratch& scratch, const Stream& stream) {
  launch_over_rows<A, kIsColumns>(soft_target_general_kernel<A, kIsColumns>, of, of.mean.call,
                                  of.mean.count * sizeof(Normaliser<A>), scratch, stream);
}

}  // namespace

void launch_general(const GeneralCall& of, bool are_columns, const Scratch& scratch,
                    const Stream& stream) {
  if (of.mean.call.is_double)
    return are_columns ? launch_typed<double, true>(of, scratch, stream)
                       : launch_typed<double, false>(of, scratch, stream);
  are_columns ? launch_typed<float, true>(of, scratch, stream)
              : launch_typed<float, false>(of, scratch, stream);
}

}  // namespace logits
}  // namespace fastkd::cuda
