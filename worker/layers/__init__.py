"""Layers of a decoder; each says beside itself how it is split over the ranks and reads its own slice."""
