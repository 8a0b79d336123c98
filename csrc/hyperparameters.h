// The hyperparameters of a parameter group, for the schedule.
#pragma once

#include "python.h"
#include "schedule.h"

namespace radam {

// Fills `h` from a parameter group; false where a value is not even of the right kind.
bool read_hyperparameters(PyObject* group, Hyperparameters& h);

}  // namespace radam
