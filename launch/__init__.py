"""The command line: parse, check, and call one function of a lower room."""
