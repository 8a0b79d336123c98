// Classes of torch that the walk knows by name. DTensor is torch.distributed's: a local tensor, and
// a spec that says how it is placed.
#pragma once

#include "host/python.h"

namespace radam {

// Looks for the class, which few programs import; before a walk.
void find_dtensor();

// Whether `object` is a DTensor (a Parameter of one has exactly that type).
bool is_dtensor(PyObject* object);

// This rank's part of a DTensor; empty if it is not a plain tensor, such as one that a collective
// is still writing.
Ref local_tensor(PyObject* dtensor);

// Whether two DTensors are placed alike. May run Python code where their specs are two objects.
bool same_placement(PyObject* a, PyObject* b);

}  // namespace radam
