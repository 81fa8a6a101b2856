"""Serves a bundle over HTTP and WebSocket: live sessions, clips, a page, metrics.

`python -m serving run BUNDLE` starts it. Built on the public face of `runtime` only.
"""
