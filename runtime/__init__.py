"""Real-time rollout of a bundle: ``Pipeline.load(...)``, ``pipe.session(...)``, ``session.stream(...)``."""
