// The hyperparameters of a parameter group, for the schedule.
#pragma once

#include "core/schedule.h"
#include "host/python.h"
#include "host/tensor.h"

namespace radam {

// Fills `h` from a parameter group; false where a value is not even of the right kind; range checks
// are in valid(). An lr in a tensor on `device`, where one is given, is left there for the device
// to read, so that the host does not wait for it; `lr_tensor` owns it then, and is left as it is
// otherwise. Raises ValueError where it is on a third device.
bool read_hyperparameters(PyObject* group, Hyperparameters& h, const Device* device = nullptr,
                          Ref* lr_tensor = nullptr);

}  // namespace radam
