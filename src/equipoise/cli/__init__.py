"""The command line: arguments become calls, and values tables in the terminal."""
