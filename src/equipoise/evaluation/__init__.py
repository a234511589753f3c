"""A network and images to numbers."""
