"""The parent process: devices, placement, supervision, scheduling and the step loop. Imports no torch."""
