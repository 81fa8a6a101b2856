"""What is printed about bundles, plans, targets and this machine."""
