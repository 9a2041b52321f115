// What most files of the core include of torch, for setup.py to compile once: to read it takes half of the time of such a file.
// Each file still includes what it uses. Nothing of Python: pybind11's headers leave code in every file that sees them.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/library.h>
