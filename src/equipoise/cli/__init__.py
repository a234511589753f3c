"""Words to calls, and values to tables in the terminal."""
