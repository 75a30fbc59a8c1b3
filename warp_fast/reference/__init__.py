"""Every op in plain PyTorch: the definition the compiled backends are held to."""
