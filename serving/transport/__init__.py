"""What carries a live session: a WebSocket, or WebRTC."""
