// DTensor, the sharded tensor of torch.distributed: a local tensor, and a spec of its placement.
#pragma once

#include "host/python.h"

namespace radam {

// Looks the class up, if the program has imported it. To be called before a walk.
void find_dtensor();

// Whether `object` is a DTensor (a Parameter of one has exactly that type).
bool is_dtensor(PyObject* object);

// The local tensor of a DTensor; empty if it is not a plain tensor (a collective may be pending).
Ref local_tensor(PyObject* dtensor);

// The spec of a DTensor: its mesh, placements and so on.
Ref spec_of(PyObject* dtensor);

// a == b in Python; true for one object.
bool equal(const Ref& a, const Ref& b);

// Whether two DTensors have the same mesh, placements, global shape and shard order. Can run Python
// code, unless they share one spec object.
bool same_placement(PyObject* a, PyObject* b);

}  // namespace radam
