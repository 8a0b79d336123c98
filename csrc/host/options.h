// Reads the hyperparameters of a parameter group.
#pragma once

#include "core/schedule.h"
#include "host/python.h"
#include "host/tensor.h"

namespace radam {

// Fills `h` from a parameter group; false if a value has the wrong kind. Range checks are in
// valid(). With `device`, only the address of an lr tensor on that device is stored, so that the
// host does not synchronize; `lr_tensor` then owns it, and is unchanged otherwise. An lr tensor
// that is neither there nor on the CPU raises ValueError.
bool read_hyperparameters(PyObject* group, Hyperparameters& h, const Device* device = nullptr,
                          Ref* lr_tensor = nullptr);

}  // namespace radam
