"""What a build is asked for: model, target, variant, geometry, weights."""
