"""The dtypes of stored features. numpy has no bfloat16: its bits are stored as uint16."""

import numpy as np

STORED: dict[str, np.dtype] = {"float16": np.dtype("<f2"), "float32": np.dtype("<f4"), "bfloat16": np.dtype("<u2")}
BFLOAT16_NAN = 0x7FC0


def hole(name: str) -> float:
    """Return what a reader sees where nothing is written: a NaN of that dtype, as it is stored."""
    return BFLOAT16_NAN if name == "bfloat16" else float("nan")


def read_as(name: str) -> np.dtype:
    """Return the numpy dtype that a stored feature is read as; it is float32 for bfloat16, which loses nothing."""
    return STORED["float32"] if name == "bfloat16" else STORED[name]


def widen(rows: np.ndarray, name: str) -> np.ndarray:
    """Turn rows as they are stored into rows as they are read."""
    if name != "bfloat16":
        return rows
    return (rows.astype(np.uint32) << 16).view(np.float32)
