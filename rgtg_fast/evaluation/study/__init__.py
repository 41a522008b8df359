"""A study: methods side by side on held-out prompts, judged by a reward model that none of them saw."""
