"""Nearest neighbours: which training images are nearest to an image, and what they vote for."""
