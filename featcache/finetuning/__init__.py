"""Training with the backbone unfrozen: fine-tuning and semi-supervised learning."""
