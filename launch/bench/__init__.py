"""Measure a server of this package through its front channel. See docs/performance.md."""
