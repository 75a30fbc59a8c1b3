"""The embedded default: WARP on a small Gemma 2 and a task with a reward that can be hacked."""
