"""Models are plain PyTorch, one file each."""
