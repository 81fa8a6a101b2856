"""What is trained, one module a model, and the order in which stages follow one another (`run`)."""
