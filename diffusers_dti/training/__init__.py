"""From photos to a concept: `DTITrainer` and its settings."""
