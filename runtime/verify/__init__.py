"""Whether a bundle computes what it should: golden vectors on this machine, and dry runs without the device."""

from .dry_run import require_fit
from .verdict import VERDICT_NAME, Verdict, VerificationError, ensure_verified, judge

__all__ = ["VERDICT_NAME", "Verdict", "VerificationError", "ensure_verified", "judge", "require_fit"]
