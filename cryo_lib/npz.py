"""Archives of arrays, `.npz`, whose bytes follow from the arrays alone, so that one made again is the same file.

`numpy.savez` writes other ones on Python 3.11.2 than on 3.11.7: zipfile's headers changed.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

import numpy as np

from cryo_lib.files import atomic


def write(path: str | Path, /, **arrays: Any) -> Path:
    """Write arrays by their names, compressed, atomically, and return the path; `numpy.load` reads them.

    ValueError for an array of Python objects, which numpy would not read back without running code.
    """
    with atomic(path) as temporary, ZipFile(temporary, "w") as archive:
        for name, array in arrays.items():
            held = io.BytesIO()
            np.lib.format.write_array(held, np.asarray(array), allow_pickle=False)
            archive.writestr(ZipInfo(f"{name}.npy"), held.getbuffer(), ZIP_DEFLATED)
    return Path(path)
