"""The evaluation of the paper: generate images in many prompts, score them, and summarize the scores."""
