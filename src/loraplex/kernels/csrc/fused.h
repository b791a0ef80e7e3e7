// What stands between the linear modules of a block.
#pragma once

#include "activation.h"
#include "norm.h"
#include "rotary.h"
