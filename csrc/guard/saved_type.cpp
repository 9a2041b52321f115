// What guard's Python sees of a saved value, and what it may do to it.
#include "guard/saved_type.h"

#include <new>

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include "guard/guard.h"
#include "guard/ledger.h"
#include "guard/policy.h"

namespace safe_inplace::guard {
namespace {

PyTypeObject* saved_type = nullptr;

void saved_dealloc(PyObject* object) {
  auto* entry = saved(object);
  ledger().remove(entry);
  entry->~SavedValue();
  PyTypeObject* type = Py_TYPE(object);
  type->tp_free(object);
  Py_DECREF(type);
}

// The value became a private copy.
PyObject* saved_replace(PyObject* self, PyObject* argument) {
  HANDLE_TH_ERRORS
  auto* entry = saved(self);
  TORCH_CHECK_TYPE(THPVariable_Check(argument), "replace() takes a tensor");
  ledger().remove(entry);
  entry->extents.clear();
  entry->storages.clear();
  entry->original.reset();
  entry->value = THPVariable_Unpack(argument).detach();
  entry->versioned = entry->value.unsafeGetTensorImpl()->version_counter().enabled();
  entry->version = entry->versioned ? version_of(entry->value) : 0;
  entry->released = true;
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

// Later writes to it are of no interest: the first one has been reported.
PyObject* saved_release(PyObject* self, PyObject*) {
  saved(self)->released = true;
  saved(self)->fingerprints.clear();
  Py_RETURN_NONE;
}

// Its version rose, its bytes did not change.
PyObject* saved_accept(PyObject* self, PyObject*) {
  HANDLE_TH_ERRORS
  auto* entry = saved(self);
  entry->version = entry->versioned ? version_of(entry->value) : 0;
  entry->accounted = entry->version;
  entry->unaccounted = false;
  entry->beside.reset();
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

PyObject* saved_original_of(PyObject* self, PyObject* argument) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(THPVariable_Check(argument), "original_of() takes a tensor");
  const auto original = original_of(*saved(self), THPVariable_Unpack(argument));
  return original.defined() ? THPVariable_Wrap(original) : Py_NewRef(Py_None);
  END_HANDLE_TH_ERRORS
}

PyObject* saved_get_value(PyObject* self, void*) {
  HANDLE_TH_ERRORS
  return THPVariable_Wrap(saved(self)->value);
  END_HANDLE_TH_ERRORS
}

PyObject* saved_get_op(PyObject* self, void*) {
  HANDLE_TH_ERRORS
  const auto* entry = saved(self);
  if (entry->op == nullptr) {
    Py_RETURN_NONE;
  }
  return operator_name(*entry->op).release();
  END_HANDLE_TH_ERRORS
}

PyObject* saved_get_place(PyObject* self, void*) {
  HANDLE_TH_ERRORS
  return place_objects(*saved(self)->place).release();
  END_HANDLE_TH_ERRORS
}

PyObject* saved_get_beside(PyObject* self, void*) {
  HANDLE_TH_ERRORS
  const auto& raise = saved(self)->beside;
  if (raise == nullptr) {
    Py_RETURN_NONE;
  }
  return checked(PyTuple_Pack(2, operator_name(*raise->op).get(), place_objects(*raise->place).get())).release();
  END_HANDLE_TH_ERRORS
}

PyObject* saved_get_away(PyObject* self, void*) {
  return PyBool_FromLong(saved(self)->away);
}

PyObject* saved_get_unread(PyObject* self, void*) {
  return PyBool_FromLong(saved(self)->unread);
}

PyObject* saved_get_result(PyObject* self, void*) {
  return PyBool_FromLong(saved(self)->result);
}

PyObject* saved_get_stale(PyObject* self, void*) {
  return PyBool_FromLong(stale(saved(self)));
}

PyObject* saved_get_unaccounted(PyObject* self, void*) {
  return PyBool_FromLong(stale(saved(self)) && !seen_beside(saved(self)));
}

PyObject* saved_get_lost(PyObject* self, void*) {
  return PyBool_FromLong(saved(self)->lost);
}

PyObject* saved_get_leaf(PyObject* self, void*) {
  return PyBool_FromLong(saved(self)->leaf);
}

PyObject* saved_get_parameter(PyObject* self, void*) {
  return PyBool_FromLong(saved(self)->parameter);
}

PyObject* saved_get_version(PyObject* self, void*) {
  return PyLong_FromUnsignedLong(saved(self)->version);
}

PyObject* saved_get_unpacked(PyObject* self, void*) {
  return PyLong_FromLong(saved(self)->unpacked);
}

PyObject* saved_get_note(PyObject* self, void*) {
  const auto& note = saved(self)->note;
  return share(note ? note.get() : Py_None).release();
}

int saved_set_note(PyObject* self, PyObject* value, void*) {
  saved(self)->note = share(value);
  return 0;
}

PyMethodDef saved_methods[] = {{"replace", saved_replace, METH_O, nullptr},
                               {"release", saved_release, METH_NOARGS, nullptr},
                               {"accept", saved_accept, METH_NOARGS, nullptr},
                               {"original_of", saved_original_of, METH_O, nullptr},
                               {nullptr, nullptr, 0, nullptr}};

PyGetSetDef saved_attributes[] = {{"value", saved_get_value, nullptr, nullptr, nullptr},
                                  {"op", saved_get_op, nullptr, nullptr, nullptr},
                                  {"place", saved_get_place, nullptr, nullptr, nullptr},
                                  {"result", saved_get_result, nullptr, nullptr, nullptr},
                                  {"beside", saved_get_beside, nullptr, nullptr, nullptr},
                                  {"away", saved_get_away, nullptr, nullptr, nullptr},
                                  {"unread", saved_get_unread, nullptr, nullptr, nullptr},
                                  {"stale", saved_get_stale, nullptr, nullptr, nullptr},
                                  {"unaccounted", saved_get_unaccounted, nullptr, nullptr, nullptr},
                                  {"lost", saved_get_lost, nullptr, nullptr, nullptr},
                                  {"leaf", saved_get_leaf, nullptr, nullptr, nullptr},
                                  {"parameter", saved_get_parameter, nullptr, nullptr, nullptr},
                                  {"version", saved_get_version, nullptr, nullptr, nullptr},
                                  {"unpacked", saved_get_unpacked, nullptr, nullptr, nullptr},
                                  {"note", saved_get_note, saved_set_note, nullptr, nullptr},
                                  {nullptr, nullptr, nullptr, nullptr, nullptr}};

PyType_Slot saved_slots[] = {{Py_tp_dealloc, reinterpret_cast<void*>(saved_dealloc)},
                             {Py_tp_methods, saved_methods},
                             {Py_tp_getset, saved_attributes},
                             {0, nullptr}};

PyType_Spec saved_spec = {"safe_inplace._C.Saved", sizeof(SavedObject), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
                          saved_slots};

} // namespace

bool add_saved_type(PyObject* module) {
  saved_type = reinterpret_cast<PyTypeObject*>(PyType_FromSpec(&saved_spec));
  return saved_type != nullptr && PyModule_AddObjectRef(module, "Saved", reinterpret_cast<PyObject*>(saved_type)) == 0;
}

bool is_saved_object(PyObject* object) {
  return Py_TYPE(object) == saved_type;
}

Object new_saved_object(PyObject* policy) {
  auto object = checked(saved_type->tp_alloc(saved_type, 0));
  auto* value = new (saved(object.get())) SavedValue();
  value->object = object.get();
  value->policy = share(policy);
  return object;
}

} // namespace safe_inplace::guard
