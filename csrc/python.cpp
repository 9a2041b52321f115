// The entry points from Python: reads the arguments and hands plain calls to the dispatcher without any Python in between.
#include <torch/csrc/python_headers.h>

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/csrc/utils/python_numbers.h>
#include <torch/csrc/utils/python_arg_parser.h>
#include <ATen/PythonTorchFunctionTLS.h>

#include <pybind11/gil_safe_call_once.h>

#include <memory>
#include <string>
#include <vector>

#include "backend.h"
#include "counts.h"
#include "digest.h"
#include "guard/module.h"
#include "library.h"
#include "node.h"
#include "ownership.h"
#include "temporaries.h"

namespace safe_inplace {

namespace {

namespace py = pybind11;

// Called with (name, args, kwargs) where an argument, or a mode, overrides torch functions.
PyObject* override_handler = nullptr;

// Input, two operands and the parameter.
constexpr int kMaxArguments = 4;

[[noreturn]] void raise_type_error(const std::string& message) {
  PyErr_SetString(PyExc_TypeError, message.c_str());
  throw py::error_already_set();
}

std::string describe(PyObject* value) {
  return value == nullptr ? std::string("nothing") : std::string("a ") + Py_TYPE(value)->tp_name;
}

struct Signature {
  const OpInfo& op;
  Form form;

  const char* op_name() const { return op.names[int(form)]; }
  int count() const { return 1 + op.operands + (op.parameter != nullptr ? 1 : 0); }
  const char* name(int i) const { return i == 0 ? "input" : i <= op.operands ? op.operand_names[i - 1] : op.parameter; }
  bool is_parameter(int i) const { return i > op.operands; }
  std::string text() const {
    std::string text = std::string(op_name()) + "(input";
    for (int i = 0; i < op.operands; ++i) {
      text += std::string(", ") + op.operand_names[i];
    }
    return text + (op.parameter != nullptr ? std::string(", *, ") + op.parameter + "=1)" : ")");
  }
};

// Sorts positional and keyword arguments into the signature's order; null where the parameter was left out.
void collect(const Signature& signature, PyObject* const* args, Py_ssize_t positional, PyObject* keywords, PyObject** out) {
  const int most = 1 + signature.op.operands;
  if (positional > most) {
    raise_type_error(std::string(signature.op_name()) + "(): " + std::to_string(positional) +
                     " positional arguments given, the signature is " + signature.text());
  }
  for (Py_ssize_t i = 0; i < positional; ++i) {
    out[i] = args[i];
  }
  const Py_ssize_t named = keywords == nullptr ? 0 : PyTuple_GET_SIZE(keywords);
  for (Py_ssize_t k = 0; k < named; ++k) {
    PyObject* const key = PyTuple_GET_ITEM(keywords, k);
    int found = -1;
    for (int i = 0; i < signature.count(); ++i) {
      if (PyUnicode_CompareWithASCIIString(key, signature.name(i)) == 0) {
        found = i;
      }
    }
    if (found < 0 || out[found] != nullptr) {
      raise_type_error(std::string(signature.op_name()) + "(): " + (found < 0 ? "unknown" : "repeated") + " argument '" +
                       py::cast<std::string>(py::handle(key)) + "', the signature is " + signature.text());
    }
    out[found] = args[positional + k];
  }
  for (int i = 0; i < most; ++i) {
    if (out[i] == nullptr) {
      raise_type_error(std::string(signature.op_name()) + "(): argument '" + signature.name(i) +
                       "' is missing, the signature is " + signature.text());
    }
  }
}

// Of a number torch's own check asks the metaclass, which takes longer than all the rest of reading it.
bool is_tensor(PyObject* value) {
  return THPVariable_CheckExact(value) || (!PyFloat_Check(value) && !PyLong_Check(value) && THPVariable_Check(value));
}

bool is_numpy(PyObject* value, const char* type) {
  // Only a program that has imported NumPy, all of it, can own one. None stands for a module that must not be imported.
  PyObject* const numpy = PyDict_GetItemString(PyImport_GetModuleDict(), "numpy");
  const py::object kind = numpy != nullptr ? py::getattr(numpy, type, py::none()) : py::none();
  return PyType_Check(kind.ptr()) && py::isinstance(value, kind);
}

// The argument parser of torch's own methods: what it takes as a number, how it reads it, and how it refuses one that is
// too large.
at::Scalar read_as_torch(PyObject* value) {
  PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<torch::PythonArgParser*> parser;
  torch::PythonArgParser* const number =
      parser
          .call_once_and_store_result(
              [] { return new torch::PythonArgParser(std::vector<std::string>{"number(Scalar number)"}); })
          .get_stored();
  const py::tuple arguments = py::make_tuple(py::handle(value));
  torch::ParsedArgs<1> parsed;
  return number->parse(arguments.ptr(), nullptr, parsed).scalar(0);
}

bool take_scalar(PyObject* value, at::Scalar& out) {
  if (PyFloat_Check(value)) {
    out = PyFloat_AS_DOUBLE(value);
    return true;
  }
  if (PyBool_Check(value)) {
    out = value == Py_True;
    return true;
  }
  if (PyLong_Check(value)) {
    int overflow = 0;
    const long long number = PyLong_AsLongLongAndOverflow(value, &overflow);
    out = overflow == 0 ? at::Scalar(static_cast<int64_t>(number)) : read_as_torch(value);
    return true;
  }
  // Without NumPy's own headers, torch's check knows none of its numbers.
  if (!THPUtils_checkScalar(value) && !is_numpy(value, "number") && !is_numpy(value, "bool_")) {
    return false;
  }
  if (is_numpy(value, "complexfloating")) {
    // torch reads a complex number of another width than Python's as a float, and so loses the imaginary part.
    const Py_complex number = PyComplex_AsCComplex(value);
    if (PyErr_Occurred() != nullptr) {
      throw py::error_already_set();
    }
    const bool torch_reads_it = number.imag == 0 && !PyComplex_Check(value);
    out = torch_reads_it ? at::Scalar(number.real) : at::Scalar(c10::complex<double>(number.real, number.imag));
    return true;
  }
  out = read_as_torch(value);
  return true;
}

// torch reads the value of a 0-dim tensor where it wants a number, but not if a gradient would be lost.
bool take_parameter(PyObject* value, at::Scalar& out) {
  if (is_tensor(value)) {
    const at::Tensor& tensor = THPVariable_Unpack(value);
    if (tensor.dim() != 0 || tensor.requires_grad()) {
      return false;
    }
    out = tensor.item();
    return true;
  }
  return take_scalar(value, out);
}

[[noreturn]] void refuse(const Signature& signature, int i, PyObject* value) {
  const char* const wanted = i == 0                      ? "a torch.Tensor"
                             : signature.is_parameter(i) ? "a Python number"
                                                         : "a torch.Tensor or a Python number";
  std::string remedy;
  if (i == 0 && THPUtils_checkScalar(value)) {
    remedy = signature.form == Form::InPlace ? "; a number cannot be written in place, wrap it with torch.tensor"
                                             : "; wrap it with torch.tensor";
  } else if (signature.is_parameter(i) && THPVariable_Check(value)) {
    remedy = THPVariable_Unpack(value).dim() == 0 ? " that requires a gradient, which would be lost; pass its value with .item()"
                                                  : "; pass its value with .item()";
  } else if (PySequence_Check(value) && !PyUnicode_Check(value)) {
    remedy = "; convert it with torch.as_tensor";
  }
  raise_type_error(std::string(signature.op_name()) + "(): argument '" + signature.name(i) + "' must be " + wanted +
                   ", but it is " + describe(value) + remedy);
}

PyObject* call_override(const Signature& signature, PyObject* const* args, Py_ssize_t positional, PyObject* keywords) {
  py::tuple positionals(positional);
  for (Py_ssize_t i = 0; i < positional; ++i) {
    positionals[i] = py::reinterpret_borrow<py::object>(args[i]);
  }
  py::dict named;
  for (Py_ssize_t k = 0; keywords != nullptr && k < PyTuple_GET_SIZE(keywords); ++k) {
    named[py::handle(PyTuple_GET_ITEM(keywords, k))] = py::handle(args[positional + k]);
  }
  const py::handle handler(override_handler);
  return handler(signature.op_name(), positionals, named).release().ptr();
}

bool overrides_torch_functions(PyObject* value) {
  if (THPVariable_CheckExact(value) || PyFloat_CheckExact(value) || PyLong_CheckExact(value) || PyBool_Check(value)) {
    return false;
  }
  PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<py::object> asks;
  return asks
      .call_once_and_store_result(
          [] { return py::object(py::module_::import("torch.overrides").attr("has_torch_function_unary")); })
      .get_stored()(py::handle(value))
      .cast<bool>();
}

using EntryPoint = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t, PyObject*);

PyCFunction as_c_function(EntryPoint entry) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(entry));
}

// Below this a thread switch costs more than the call.
constexpr int64_t kReleaseGilFrom = 1 << 14;

bool is_large(const at::Tensor& tensor) {
  return !tensor.unsafeGetTensorImpl()->has_symbolic_sizes_strides() && tensor.numel() >= kReleaseGilFrom;
}

PyObject* write_in_place(const Call& call, PyObject* input) {
  if (is_large(*call.input)) {
    const py::gil_scoped_release release;
    dispatch_write(call);
  } else {
    dispatch_write(call);
  }
  return Py_NewRef(input);
}

PyObject* call_out_of_place(const Call& call, PyObject* const* values, PyObject* const* args, Py_ssize_t given,
                            PyCFunction function) {
  Temporaries temporaries(values, 1 + call.info().operands, args, given, function);
  at::Tensor result;
  if (any_tensor(call, is_large)) {
    const py::gil_scoped_release release;
    result = dispatch(call);
  } else {
    result = dispatch(call);
  }
  temporaries.leave_hidden();
  return THPVariable_Wrap(std::move(result));
}

PyObject* call_op(int index, Form form, PyCFunction function, PyObject* const* args, Py_ssize_t positional, PyObject* keywords) {
  const Signature signature{infos[index], form};
  PyObject* values[kMaxArguments] = {};
  collect(signature, args, positional, keywords, values);

  bool overridden = at::impl::torch_function_mode_enabled();
  for (int i = 0; i < signature.count(); ++i) {
    overridden = overridden || (values[i] != nullptr && overrides_torch_functions(values[i]));
  }
  if (overridden) {
    return call_override(signature, args, positional, keywords);
  }

  if (!THPVariable_Check(values[0])) {
    refuse(signature, 0, values[0]);
  }
  Call call{index, form, &THPVariable_Unpack(values[0]), {}, 1};
  for (int i = 1; i <= signature.op.operands; ++i) {
    Operand& operand = call.operands[i - 1];
    if (is_tensor(values[i])) {
      operand.tensor = &THPVariable_Unpack(values[i]);
    } else if (!take_scalar(values[i], operand.number)) {
      refuse(signature, i, values[i]);
    }
  }
  const int last = signature.count() - 1;
  if (signature.is_parameter(last) && values[last] != nullptr && !take_parameter(values[last], call.parameter)) {
    refuse(signature, last, values[last]);
  }
  if (form == Form::InPlace) {
    return write_in_place(call, values[0]);
  }
  const Py_ssize_t given = positional + (keywords == nullptr ? 0 : PyTuple_GET_SIZE(keywords));
  return call_out_of_place(call, values, args, given, function);
}

template <int index, Form form>
PyObject* entry_point(PyObject*, PyObject* const* args, Py_ssize_t positional, PyObject* keywords) {
  HANDLE_TH_ERRORS
  return call_op(index, form, as_c_function(entry_point<index, form>), args, positional, keywords);
  END_HANDLE_TH_ERRORS
}

py::list op_table() {
  py::list rows;
  for (const OpInfo& op : infos) {
    py::list operands;
    for (int i = 0; i < op.operands; ++i) {
      operands.append(op.operand_names[i]);
    }
    py::dict row;
    row["names"] = py::make_tuple(op.names[0], op.names[1]);
    row["operands"] = operands;
    row["parameter"] = op.parameter != nullptr ? py::object(py::str(op.parameter)) : py::object(py::none());
    row["nodes"] = py::make_tuple(op.nodes[0], op.nodes[1]);
    rows.append(row);
  }
  return rows;
}

py::dict counts_by_name() {
  py::dict named;
  const auto values = counts();
  for (size_t i = 0; i < kEvents; ++i) {
    named[name_of(Event(i))] = values[i];
  }
  return named;
}

// setup.py knows these; beside the extension it leaves the same facts in _build_info.py, to be read without loading it.
py::dict build_info() {
  py::dict info;
  info["torch"] = SAFE_INPLACE_TORCH_VERSION;
#ifdef SAFE_INPLACE_WITH_CUDA
  info["cuda"] = SAFE_INPLACE_CUDA_VERSION;
  info["cuda_archs"] = SAFE_INPLACE_CUDA_ARCHS;
#else
  info["cuda"] = py::none();
  info["cuda_archs"] = py::none();
#endif
  return info;
}

template <class List>
struct EntryPoints;
template <class... Ops>
struct EntryPoints<OpList<Ops...>> {
  static constexpr EntryPoint rows[][2] = {
      {entry_point<op_index<Ops>, Form::InPlace>, entry_point<op_index<Ops>, Form::OutOfPlace>}...};
};

// By the object: a tensor given by value would be another handle on it.
bool may_be_taken_over(const py::handle& object) {
  if (!THPVariable_Check(object.ptr())) {
    raise_type_error("may_take_over takes a tensor");
  }
  return may_take_over(THPVariable_Unpack(object.ptr()));
}

// The op of that name, in which of its forms.
Signature signature_of(const std::string& name) {
  for (const OpInfo& op : infos) {
    for (const Form form : {Form::InPlace, Form::OutOfPlace}) {
      if (name == op.names[int(form)]) {
        return {op, form};
      }
    }
  }
  throw py::key_error(name);
}

// An op as a built-in function of the Python module that documents it.
py::object make_entry_point(const std::string& name, const std::string& documentation, const py::str& module) {
  struct Made {
    std::string name, documentation;
    PyMethodDef definition;
  };
  const Signature signature = signature_of(name);
  const PyCFunction function = as_c_function(EntryPoints<AllOps>::rows[&signature.op - std::begin(infos)][int(signature.form)]);
  // inspect.signature reads the first line. The interpreter keeps the definition as long as it runs.
  auto* made = new Made{name, signature.text() + "\n--\n\n" + documentation, {}};
  made->definition = {made->name.c_str(), function, METH_FASTCALL | METH_KEYWORDS, made->documentation.c_str()};
  return py::reinterpret_steal<py::object>(PyCFunction_NewEx(&made->definition, nullptr, module.ptr()));
}

// Registers a backend from another extension, which may take the place of one; that one is returned. While nothing else runs.
py::object register_backend(const py::capsule& capsule) {
  if (capsule.name() == nullptr || std::string(capsule.name()) != kBackendCapsule) {
    raise_type_error(std::string("a backend comes in a capsule of the name ") + kBackendCapsule);
  }
  const auto& backend = *capsule.get_pointer<const Backend>();
  const Backend* const known = backend_of(backend.device);
  auto previous = known != nullptr ? std::make_unique<Backend>(*known) : nullptr;
  RegisterBackend{backend};
  if (previous == nullptr) {
    return py::none();
  }
  const auto free = [](PyObject* object) { delete static_cast<const Backend*>(PyCapsule_GetPointer(object, kBackendCapsule)); };
  return py::capsule(previous.release(), kBackendCapsule, free);
}

} // namespace

PYBIND11_MODULE(_C, m) {
  register_node_types();
  m.def("make_entry_point", make_entry_point, py::arg("name"), py::arg("documentation"), py::arg("module"));
  m.def("op_table", op_table);
  m.def("build_info", build_info);
  m.def("counts", counts_by_name);
  m.def("reset_counts", reset_counts);
  m.def("set_override_handler", [](py::object handler) { override_handler = handler.release().ptr(); });
  m.def("register_backend", register_backend, py::arg("backend"));
  m.def("may_take_over", may_be_taken_over, py::arg("tensor"));
  m.def("look_for_temporaries", Temporaries::look, py::arg("enabled"));
  if (!guard::bind(m.ptr())) {
    throw py::error_already_set();
  }
  m.def(
      "digest", [](const at::Tensor& tensor) { return digest(tensor); }, py::arg("tensor"),
      py::call_guard<py::gil_scoped_release>());
}

} // namespace safe_inplace
