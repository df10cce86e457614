"""The resources under /api/v1: one file each."""
