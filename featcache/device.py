"""Where tensors are computed on."""

import torch

from featcache.errors import BadInput


def choose_device(name=None, local_rank=0):
    """Return the torch device of that name, by default cuda if there is one, else cpu. Raises BadInput.

    local_rank: of this process among those of its machine, each of which gets a GPU of its own.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and torch.cuda.is_available():
        name = f"cuda:{local_rank % torch.cuda.device_count()}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        # torch explains at length; its first sentence says what is wrong.
        reason = str(error).split("\n")[0].split(". ")[0]
        raise BadInput(f"--device {name}: cannot be used here ({reason})") from None
    return device
