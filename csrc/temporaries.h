// Which arguments of a call from Python are temporaries: the caller's evaluation stack holds the only reference, which goes with the
// call.
#pragma once

#include <Python.h>

#include <ATen/core/Tensor.h>

namespace safe_inplace {

// Those of one call. While it runs without the interpreter's lock, and until the interpreter drops them, the garbage collector does
// not know them: its lists would show them to anybody.
class Temporaries {
 public:
  // `values`: tensors and numbers out of the arguments of `function`, of which `given` lie at `args`.
  Temporaries(PyObject* const* values, int count, PyObject* const* args, Py_ssize_t given, PyCFunction function);
  ~Temporaries();
  Temporaries(const Temporaries&) = delete;

  // The call has returned, and may have taken their memory: they stay hidden, but for those that live on.
  void leave_hidden() { gone_ = true; }

  // Whether any are looked for: off, every result is fresh. Returns what was set before.
  static bool look(bool enabled);

  // For the kernel of the call, which gets there through a dispatcher that has no room for them. Whoever asks second is another call.
  static const Temporaries* claim();

  // Whether the tensor is one, and still nobody else has it: hooks may have run since.
  bool contain(const at::Tensor& tensor) const;

 private:
  static constexpr int kMost = 3;
  PyObject* values_[kMost] = {};
  const c10::TensorImpl* tensors_[kMost] = {};
  bool gone_ = false;
};

// Whether a tensor's Python object, if it has one, lives on only because the tensor does: a tensor keeps its object, which holds a
// handle on it, as long as there are others. With the interpreter's lock.
bool is_forgotten_by_python(const at::Tensor& tensor);

// The same, and from then on nobody can find the object. Takes the lock where there is one.
bool hide_from_python(const at::Tensor& tensor);

} // namespace safe_inplace
