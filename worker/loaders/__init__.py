"""Read a rank's own bytes of a checkpoint and decode them."""
