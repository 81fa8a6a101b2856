"""One module or folder per backend: how a bundle's engines are built. Backends do not know each other."""
