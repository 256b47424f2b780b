"""Where tensors are computed on."""

import torch

from featcache.errors import BadInput


def choose_device(name=None):
    """Return the torch device of that name, by default cuda if there is one, else cpu. Raises BadInput."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        # torch explains at length; its first sentence says what is wrong.
        reason = str(error).split("\n")[0].split(". ")[0]
        raise BadInput(f"--device {name}: cannot be used here ({reason})") from None
    return device
