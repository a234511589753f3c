"""A name or a TOML file to a validated recipe."""
