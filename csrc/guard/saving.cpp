// A saved value is a parameter or not, an operand or a result: told by its autograd history and by the operator that runs.
#include "guard/saving.h"

#include <ATen/SequenceNumber.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/variable.h>

#include "guard/policy.h"

namespace safe_inplace::guard {

std::atomic<uint64_t> saved_so_far{0};

namespace {

PyTypeObject* parameter_type = nullptr;

bool saved_by_training_batch_norm(const SavedValue* entry) {
  for (const auto* op = running; op != nullptr; op = op->outer) {
    if (op->writing != nullptr && overlap_any(op->writing->statistics, entry->extents)) {
      return true;
    }
  }
  return false;
}

// Where backward is differentiated in its turn, a view of a parameter that was saved comes back as a tensor that is no view:
// its history alone leads to the leaf.
bool lies_in_a_leaf(const at::TensorBase& tensor) {
  const auto* node = tensor.grad_fn().get();
  for (int hops = 0; node != nullptr && hops < 8; ++hops) {
    if (node->num_outputs() == 0) {
      const auto* leaf = dynamic_cast<const torch::autograd::AccumulateGrad*>(node);
      return leaf != nullptr && tensor.has_storage() && leaf->variable.has_storage() && tensor.is_alias_of(leaf->variable);
    }
    node = node->num_outputs() == 1 ? node->next_edge(0).function.get() : nullptr;
  }
  return false;
}

// A result of the node that saves it, which is the last one that this thread has made; what an operator was given is of an
// older one.
bool is_result(const at::Tensor& tensor) {
  const auto* meta = torch::autograd::impl::get_autograd_meta(tensor);
  return meta != nullptr && meta->grad_fn_ != nullptr && meta->grad_fn_->sequence_nr() + 1 >= at::sequence_number::peek();
}

bool is_parameter(const at::Tensor& tensor, PyObject* object) {
  const bool view = tensor.is_view();
  const auto& base = view ? tensor._base() : tensor;
  if (!base.is_leaf()) {
    return lies_in_a_leaf(base);
  }
  if (base.requires_grad()) {
    return true;
  }
  const auto wrapped = view ? checked(THPVariable_Wrap(base)) : share(object);
  return PyType_IsSubtype(Py_TYPE(wrapped.get()), parameter_type) != 0;
}

void append_memory(SavedValue& value, const at::Tensor& tensor, bool is_plain) {
  each_plain(tensor, Policy(value.policy.get()), [&](const at::Tensor& one) {
    append_extents(value.extents, one);
    if (is_plain) {
      return;
    }
    each_part(one, [&](const at::Tensor& part) {
      if (part.has_storage()) {
        value.storages.push_back(part.storage());
      }
    });
  });
}

} // namespace

void describe(SavedValue& value, const at::Tensor& tensor, PyObject* object) {
  const bool is_plain = plain(tensor);
  value.value = is_plain ? tensor.tensor_data() : tensor.detach();
  append_memory(value, tensor, is_plain);
  value.had_node = has_node(tensor.unsafeGetTensorImpl());
  value.result = is_result(tensor);
  if (is_plain && !value.result) {
    value.original = WeakTensor(tensor.getIntrusivePtr());
  }
  const auto& counter = tensor.unsafeGetTensorImpl()->version_counter();
  saved_so_far.fetch_add(1, std::memory_order_relaxed);
  value.versioned = counter.enabled();
  value.version = value.versioned ? counter.current_version() : 0;
  value.accounted = value.version;
  value.parameter = is_parameter(tensor, object);
  value.leaf = value.parameter || tensor.is_leaf();
  if (running != nullptr) {
    value.op = running->op;
    value.unread = saved_by_training_batch_norm(&value);
  }
  value.place = current_place();
}

const Running* about_to_overwrite(const SavedValue* entry) {
  for (const auto* op = running; op != nullptr; op = op->outer) {
    if (op->writing == nullptr) {
      continue;
    }
    for (const auto& [counter, extent, version] : op->writing->targets) {
      const bool still_before = !counter.enabled() || counter.current_version() == version;
      if (still_before && overlap_any(extent, entry->extents)) {
        return op;
      }
    }
  }
  return nullptr;
}

Writing* about_to_fill(const SavedValue* entry) {
  for (const auto* op = running; op != nullptr; op = op->outer) {
    if (op->writing != nullptr && overlap_any(op->writing->filled, entry->extents)) {
      return op->writing;
    }
  }
  return nullptr;
}

bool has_node(const c10::TensorImpl* impl) {
  const auto* meta = static_cast<const torch::autograd::AutogradMeta*>(impl->autograd_meta());
  return meta != nullptr && meta->grad_fn_ != nullptr;
}

void set_parameter_type(PyTypeObject* type) {
  Py_XSETREF(parameter_type, type);
}

} // namespace safe_inplace::guard
