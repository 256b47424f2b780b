"""The input of a backbone: how an image becomes it, and which one the weights were trained for."""
