"""The command line: thin click commands, one declared configuration, and the service unit."""
