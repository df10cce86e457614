"""Decisions and formats without effects."""
