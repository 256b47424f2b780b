"""How a checkpoint file is read, which of its tensors are the backbone, and how they are loaded."""
