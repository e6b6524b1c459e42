"""Evaluation by the paper's protocol: prompts, metrics of pictures, and summaries with intervals."""
