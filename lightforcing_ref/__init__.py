"""The model in plain PyTorch: the truth with which every engine is compared."""
