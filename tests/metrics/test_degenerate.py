import math

import numpy as np

from expunge.metrics.degenerate import degenerate


def test_confidence_below_the_floor_is_degenerate_and_nan_stays_unscored():
    found = degenerate(np.array([0.1, 0.3, 0.9, math.nan]), 0.3)
    assert found[:3].tolist() == [1, 0, 0]
    assert np.isnan(found[3])
