"""Decoded images to batches of views."""
