// Divergences over ranks on the GPU: checks, outputs, launches, one for each of the three; and their kernels.
//
// Mapping: as of streaming rows (divergence/cuda_streaming.cuh), whose sweeps these are, with an exchange between the ranks after
// each: a cluster of blocks takes a row of this rank.
// Bytes that must move: rows * classes * (student + teacher) for each of sums, gradients and, for Jensen-Shannon, terms; and the
// gradients.
#include "common/launch.cuh"
#include "divergence/cuda_losses.h"
#include "divergence/cuda_streaming.cuh"
#include "divergence_shard/operator.h"

namespace fastkd::divergence_shard {

struct DeviceParams : dense::DeviceParams {
  Exchanged exchanged;
};

}  // namespace fastkd::divergence_shard

namespace fastkd::FASTKD_ISA::divergence_shard {

using namespace device;
using namespace divergence;
using ::fastkd::divergence_shard::DeviceParams;
using ::fastkd::divergence_shard::Exchanged;
using ::fastkd::divergence_shard::kD;
using ::fastkd::divergence_shard::kTopX;
using ::fastkd::divergence_shard::kTopY;
using ::fastkd::divergence_shard::kZTask;
using ::fastkd::divergence_shard::kZX;
using ::fastkd::divergence_shard::kZY;

template <typename T>
using DenseRow = Row<T, int64_t>;

// What all ranks know of a row.
template <typename T>
struct Known {
  Compute<T> top[2];
  LinearSums sums;
  FASTKD_DEVICE Known(const Exchanged& all, int64_t row)
      : top{static_cast<Compute<T>>(all.sum(kTopY, row)), static_cast<Compute<T>>(all.sum(kTopX, row))},
        sums{all.sum(kZY, row), all.sum(kZX, row), all.sum(kD, row), all.sum(kZTask, row)} {}
};

template <typename T, bool kJensenShannon>
FASTKD_KERNEL(kMaxRowThreads, 1)
shard_sums(const DeviceParams p) {
  for_rows<DenseRow<T>, ClusterGroup>(p, [&](const DenseRow<T>& row, ClusterGroup& group) {
    const StreamingRow<T, kJensenShannon, ClusterGroup> sweeps(row, group);
    const auto numbers = row.numbers();
    const auto sums = sweeps.sum(numbers);
    if (group.index() != 0) return;
    const double z_task = numbers.own_task ? sums.z_task : row.swap() ? sums.z_x : sums.z_y;
    const bool active = numbers.active;
    p.exchanged.sum_at(kTopY, row.index) = active ? static_cast<double>(sums.top[0]) : 0;
    p.exchanged.sum_at(kTopX, row.index) = active ? static_cast<double>(sums.top[1]) : 0;
    p.exchanged.sum_at(kZY, row.index) = active ? sums.z_y : 0;
    p.exchanged.sum_at(kZX, row.index) = active ? sums.z_x : 0;
    p.exchanged.sum_at(kD, row.index) = active ? sums.d : 0;
    p.exchanged.sum_at(kZTask, row.index) = active ? z_task : 0;
  });
}

template <typename T, bool kJensenShannon>
FASTKD_KERNEL(kMaxRowThreads, 1)
shard_terms(const DeviceParams p) {
  for_rows<DenseRow<T>, ClusterGroup>(p, [&](const DenseRow<T>& row, ClusterGroup& group) {
    group.arrive();
    const auto numbers = row.numbers();
    const Known<T> known(p.exchanged, row.index);
    group.start();
    double terms[3] = {0, 0, 0};
    if constexpr (kJensenShannon) {
      const auto js = mixture_of(row, numbers, known.top, known.sums.z_y, known.sums.z_x);
      const StreamingRow<T, true, ClusterGroup> sweeps(row, group);
      sweeps.sum_mixture(js, numbers.active, terms);
      // less q - m and p - m, these are sums of terms that are not negative
      double parts[2] = {terms[0] - p.beta * terms[2], terms[1] + (1.0 - p.beta) * terms[2]};
      make_exact(row, js, parts, group);
      terms[0] = parts[0], terms[1] = parts[1];
    } else {
      const double log_ratio = log_ratio_of(known.sums, row.c());
      double value[1] = {exact_divergence_of(row, numbers, known.top, known.sums, log_ratio, group)};
      const bool small = is_small(row, rough_divergence_of<T>(known.sums, log_ratio));
      // A class that is masked on side y makes it infinite where e^b is not 0, relative to its rank's maximum; relative to that
      // of all it may well be, and then counts for nothing.
      const bool lost = !(known.sums.d - known.sums.d == 0);
      const Compute<T> scale = row.inverse_temperature(numbers), rest = static_cast<Compute<T>>(log_ratio),
                       inverse_zx = static_cast<Compute<T>>(inverse_sum<Compute<T>>(known.sums.z_x));
      sum_again(row, group, lost, value, [&](Compute<T> y, Compute<T> x, Compute<T>(&term)[1]) {
        const Compute<T> a = (y - known.top[0]) * scale, b = (x - known.top[1]) * scale;
        term[0] = weigh(exp_of<T>(b) * inverse_zx, linear_term(row.c(), a, b) + rest);
      });
      terms[0] = small || lost ? value[0] : 0, terms[1] = small || lost ? 1 : 0;
    }
    if (group.index() != 0) return;
    for (int64_t k = 0; k < 2; ++k) p.exchanged.terms[k * p.rows + row.index] = numbers.active ? terms[k] : 0;
  });
}

// inspect: streaming shard_gradients<*> loads=128 stores=128
template <typename T, bool kJensenShannon>
FASTKD_KERNEL(kMaxRowThreads, 1)
shard_gradients(const DeviceParams p) {
  for_rows<DenseRow<T>, ClusterGroup>(p, [&](const DenseRow<T>& row, ClusterGroup& group) {
    auto numbers = row.numbers();
    numbers.label = p.exchanged.label[row.index];
    const Known<T> known(p.exchanged, row.index);
    const Compute<T> student_top = row.swap() ? known.top[1] : known.top[0];
    const StreamingRow<T, kJensenShannon, ClusterGroup> sweeps(row, group);
    if constexpr (kJensenShannon) {
      auto js = mixture_of(row, numbers, known.top, known.sums.z_y, known.sums.z_x);
      js.finish(row.kd_scale(numbers), p.beta, p.exchanged.term(0, row.index), p.exchanged.term(1, row.index));
      // probabilities, not exponentials
      const TaskGradient<T, int64_t> task(row, numbers, student_top, numbers.own_task ? known.sums.z_task : 1.0);
      sweeps.store_mixture(numbers, js, task);
    } else {
      const TaskGradient<T, int64_t> task(row, numbers, student_top, known.sums.z_task);
      sweeps.store_linear(
          numbers,
          linear_of(row, numbers, known.top, known.sums, log_ratio_of(known.sums, row.c()), p.exchanged.term(0, row.index)),
          task);
    }
  });
}

}  // namespace fastkd::FASTKD_ISA::divergence_shard

namespace fastkd::divergence_shard {
namespace {

using namespace device;
using RowKernel = void (*)(DeviceParams);

// Launches kernels<T, whether it is Jensen-Shannon> on the rows.
template <typename Kernels>
void launch(const char* name, const DeviceContext& context, const Arguments& of, bool task, double kd_scale, double task_scale,
            const Kernels& kernels) {
  if (of.rows() == 0) return;
  const dense::RowInputs inputs = of.inputs(task);
  DeviceParams params{dense::device_params(inputs, of.rows(), of.weight, of.temperatures, kd_scale, task_scale), of.exchanged()};
  params.student_gradient = Arguments::data_of(of.student_gradient);
  params.teacher_gradient = Arguments::data_of(of.teacher_gradient);
  const bool jensen_shannon = inputs.kind == Kind::kJensenShannon;
  const RowKernel kernel = for_dtype(kernel_dtype(of.student), [&]<typename T>() -> RowKernel {
    return jensen_shannon ? kernels.template operator()<T, true>() : kernels.template operator()<T, false>();
  });
  context.launch(name, kernel,
                 dense::plan_streaming(of.rows(), of.classes(), static_cast<int>(of.student.element_size()), context.limits()),
                 params);
}

Tensor sums(Tensor student, Tensor teacher, Tensor weight, Tensor temperatures, int64_t kind, bool task) {
  Arguments of{student, teacher, weight, temperatures, kind};
  of.check();
  const DeviceContext context(student);
  of.sums = context.empty({kSums, of.rows()}, ScalarType::Double);
  launch("divergence_shard_sums", context, of, task, 1, 0, []<typename T, bool kJensenShannon>() -> RowKernel {
    return FASTKD_ISA::divergence_shard::shard_sums<T, kJensenShannon>;
  });
  return *of.sums;
}

Tensor terms(Tensor student, Tensor teacher, Tensor weight, Tensor temperatures, Tensor sums, int64_t kind, double beta) {
  Arguments of{student, teacher, weight, temperatures, kind, beta, {}, sums};
  of.check();
  const DeviceContext context(student);
  of.terms = context.empty({kTerms, of.rows()}, ScalarType::Double);
  launch("divergence_shard_terms", context, of, false, 1, 0, []<typename T, bool kJensenShannon>() -> RowKernel {
    return FASTKD_ISA::divergence_shard::shard_terms<T, kJensenShannon>;
  });
  return *of.terms;
}

void gradients_(Tensor student, Tensor teacher, Tensor weight, Tensor temperatures, Tensor label, Tensor sums, Tensor terms,
                int64_t kind, double beta, double kd_scale, double task_scale, std::optional<Tensor> student_gradient,
                std::optional<Tensor> teacher_gradient) {
  Arguments of{student, teacher, weight, temperatures, kind, beta, label, sums, terms, student_gradient, teacher_gradient};
  of.check();
  const DeviceContext context(student);
  launch("divergence_shard_gradients_", context, of, task_scale != 0, kd_scale, task_scale,
         []<typename T, bool kJensenShannon>() -> RowKernel {
           return FASTKD_ISA::divergence_shard::shard_gradients<T, kJensenShannon>;
         });
}

}  // namespace

FASTKD_CUDA_IMPL(m) {
  m.impl("divergence_shard_sums", TORCH_BOX(&sums));
  m.impl("divergence_shard_terms", TORCH_BOX(&terms));
  m.impl("divergence_shard_gradients_", TORCH_BOX(&gradients_));
}

}  // namespace fastkd::divergence_shard
