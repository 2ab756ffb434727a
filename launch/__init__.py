"""The command line: thin click commands, one declared configuration (`settings/`), and the service unit."""
