"""The paper: its losses, its network."""
