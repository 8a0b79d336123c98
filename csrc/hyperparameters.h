// The hyperparameters of a parameter group, for the schedule.
#pragma once

#include "python.h"
#include "schedule.h"
#include "tensor_info.h"

namespace radam {

// Fills `h` from a parameter group; false where a value is not even of the right kind. An lr in a
// tensor on `device`, where one is given, is left there for the device to read; so that none who
// calls has to wait for it. Raises ValueError where it is on a third device.
bool read_hyperparameters(PyObject* group, Hyperparameters& h, const Device* device = nullptr);

}  // namespace radam
