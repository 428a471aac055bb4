"""Arrays that all packages speak of."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]  # row numbers, (n,)
