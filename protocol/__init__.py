"""What crosses a process boundary: messages, placement types, checkpoint headers, framing and the clients."""
