"""The dtypes of stored features. numpy has no bfloat16: its bits are stored as uint16."""

import numpy as np

STORED = {"float16": np.dtype("<f2"), "float32": np.dtype("<f4"), "bfloat16": np.dtype("<u2")}
BFLOAT16_NAN = 0x7FC0


def hole(name):
    """What a reader sees where nothing is written: a NaN of that dtype, as it is stored."""
    return BFLOAT16_NAN if name == "bfloat16" else float("nan")


def read_as(name):
    """numpy dtype that a stored feature is read as: float32 for bfloat16, exactly."""
    return STORED["float32"] if name == "bfloat16" else STORED[name]


def widen(rows, name):
    """Turn stored rows into what they are read as."""
    if name != "bfloat16":
        return rows
    return (rows.astype(np.uint32) << 16).view(np.float32)
