"""The configuration: its schema, its rules, and the way from a command line to it."""
