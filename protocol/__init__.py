"""What crosses a process: messages, placement types, checkpoint headers, wire framing and the client."""
