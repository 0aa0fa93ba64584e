"""Given, not taught: what the server needs of HTTP. Fields, errors, text, replies, numbers."""
