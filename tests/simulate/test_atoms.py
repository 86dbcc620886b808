"""What moves atoms gives the same bytes on every machine."""

from __future__ import annotations

import numpy as np
from threadpoolctl import threadpool_limits

from cryo_lib.simulate.atoms import Atoms, mend
from tests.simulate.helices import helices


def test_mending_does_not_depend_on_the_number_of_threads():
    """18,432 atoms: sums as long as these are divided among threads."""
    starts = [(11 * x, 11 * y, 25 * z) for x, y, z in np.ndindex(8, 8, 6)]
    atoms = Atoms.of(helices(A=starts[:192], B=starts[192:]))
    shaken = atoms.xyz + np.random.default_rng(0).normal(0, 1.0, atoms.xyz.shape)
    mended = []
    for threads in (1, 2):
        with threadpool_limits(threads, user_api="blas"):
            mended.append(mend(atoms, shaken))
    assert np.array_equal(*mended)
    assert not np.array_equal(mended[0], shaken)
